"""``swiglu_quantize_nvfp4``: clamped SwiGLU and its quantisation in one step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsv4_compile import nvfp4
from dsv4_compile.nvfp4 import GRANULARITIES
from dsv4_compile.ops import dequantize_nvfp4, swiglu_quantize_nvfp4
from tests import gpu
from tests import nvfp4_oracle as oracle

OP = torch.ops.dsv4.swiglu_quantize_nvfp4.default
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INF = math.inf


def expected(gate: Tensor, up: Tensor, limit: float, granularity: str) -> oracle.Packed:
    return oracle.quantize(oracle.swiglu(oracle.as_float64(gate), oracle.as_float64(up), limit), granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), spread=st.sampled_from((1e-4, 1.0, 8.0, 200.0)), limit=st.sampled_from((10.0, INF)))
def test_matches_reference(dtype: torch.dtype, granularity: str, seed: int, spread: float, limit: float) -> None:
    """Guards against a product rounded to the input dtype before it is quantised, and a maximum taken of that."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(2, 3, 32, generator=generator).mul(spread).to(dtype) for _ in range(2))
    parts = swiglu_quantize_nvfp4(gate, up, limit, granularity)
    oracle.assert_packed_equal(parts, expected(gate, up, limit, granularity))


def test_known_values() -> None:
    """Guards against a missing clamp: with limit 10, gate 80 and up ±90 count as silu(10) * ±10 = ±99.99546.

    So amax is that, gsa = amax / 2688, the block scale 448 and the codes ±6; gate 5, up 10 is 49.665 = 0.497 amax,
    2.98 of 6, code 3 (5). Without the clamp it would be 0.7 % of 7200, code 0.
    """
    gate, up = torch.zeros(2, 1, 16)
    gate[0, :3] = torch.tensor([80.0, 80.0, 5.0])
    up[0, :3] = torch.tensor([90.0, -90.0, 10.0])
    codes, block_scales, global_scale = swiglu_quantize_nvfp4(gate, up, 10.0)
    assert codes[0, :2].tolist() == [0xF7, 0x05]
    assert block_scales.float().item() == 448.0
    assert global_scale.item() == pytest.approx(99.99546 / 2688, rel=1e-6)
    codes, _, global_scale = swiglu_quantize_nvfp4(gate, up)
    assert codes[0, :2].tolist() == [0xF7, 0x00]
    assert global_scale.item() == pytest.approx(7200 / 2688, rel=1e-6)


def test_halves_of_a_merged_projection() -> None:
    """Guards against views read in storage order: gate and up are column slices of one tensor."""
    merged = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    gate, up = merged.chunk(2, dim=-1)
    oracle.assert_packed_equal(swiglu_quantize_nvfp4(gate, up, 10.0), expected(gate, up, 10.0, "tensor"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("which", ["gate", "up"])
def test_contains_nan(which: str, granularity: str) -> None:
    """Guards against clamp(NaN) = limit, which would be a silent number, and against a NaN in other rows."""
    values = {"gate": torch.randn(3, 32), "up": torch.randn(3, 32)}
    values["gate"][1, 20] = 0.0  # silu(0) = 0: what the row is compared with
    before = swiglu_quantize_nvfp4(values["gate"], values["up"], 10.0, granularity)
    values[which][1, 20] = math.nan
    parts = swiglu_quantize_nvfp4(values["gate"], values["up"], 10.0, granularity)
    is_nan = dequantize_nvfp4(*parts).isnan()
    assert is_nan[1, 16:].all()
    assert is_nan.sum() == 16
    others = torch.tensor([0, 2])
    assert torch.equal(parts[0][others], before[0][others])
    assert torch.equal(parts[1].view(torch.uint8)[others], before[1].view(torch.uint8)[others])
    assert torch.equal(parts[2], before[2])


def test_infinite_gate_and_up() -> None:
    """Guards against Inf that turns into zeros: clamped where the model clamps it, else a NaN block scale."""
    gate, up = torch.ones(4, 16), torch.ones(4, 16)
    gate[0, 0], gate[1, 0], up[2, 0] = INF, -INF, -INF
    assert swiglu_quantize_nvfp4(gate, up, 10.0)[1].float().isnan().flatten().tolist() == [False, True, False, False]
    assert swiglu_quantize_nvfp4(gate, up, INF)[1].float().isnan().flatten().tolist() == [True, True, True, False]


def test_large_negative_gate_is_zero() -> None:
    """Guards against silu(-3e38) = -4.9, which would then be the largest value of the batch."""
    gate, up = torch.full((1, 16), 0.5), torch.ones(1, 16)
    before = swiglu_quantize_nvfp4(gate, up)
    gate[0, 1] = torch.finfo(torch.bfloat16).min
    codes, block_scales, global_scale = swiglu_quantize_nvfp4(gate.bfloat16(), up.bfloat16())
    assert codes[0].tolist() == [0x87, *before[0][0, 1:].tolist()]  # -0 in the high nibble
    assert torch.equal(block_scales.float(), before[1].float())
    assert torch.equal(global_scale, before[2])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck(granularity: str) -> None:
    """Guards against a fake that differs from the kernel: ranks 1 to 3, zero rows, non-contiguous halves."""
    x = torch.randn(2, 3, 64)
    for view in (x, x[0], x[0, 0]):
        torch.library.opcheck(OP, (*view.chunk(2, dim=-1), 10.0, granularity))
    torch.library.opcheck(OP, (x[:0], x[:0], 10.0, granularity))
    torch.library.opcheck(OP, (torch.randn(32, 5).t(), torch.randn(5, 32), INF, granularity))


X = torch.zeros(2, 32)


@pytest.mark.parametrize(
    ("gate", "up", "limit", "granularity", "message"),
    [
        (X.double(), X.double(), 10.0, "tensor", "gate must be bfloat16 or float16 or float32, got float64"),
        (X, X.half(), 10.0, "tensor", "up must be float32, got float16"),
        (X, X[:1], 10.0, "tensor", r"up must have the shape of gate \(2, 32\), got \(1, 32\)"),
        (
            X[:, :8],
            X[:, :8],
            10.0,
            "tensor",
            r"gate must have a last dimension divisible by 16, got shape \(2, 8\)",
        ),
        (X, X, 0.0, "tensor", r"limit must be positive \(inf for none\), got 0.0"),
        (X, X, -10.0, "tensor", r"limit must be positive \(inf for none\), got -10.0"),
        (X, X, math.nan, "tensor", r"limit must be positive \(inf for none\), got nan"),
        (X, X, 10.0, "block", "granularity must be one of tensor, tensor_pow2, token, got 'block'"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects(gate: Tensor, up: Tensor, limit: float, granularity: str, message: str, device: str) -> None:
    """Guards against broadcasting, and a limit of 0 that a config uses for "none" and that would zero everything."""
    with pytest.raises(RuntimeError, match=f"^swiglu_quantize_nvfp4: {message}$"):
        swiglu_quantize_nvfp4(gate.to(device), up.to(device), limit, granularity)


def test_compiles() -> None:
    """Guards against a graph break, and against a second compilation for another number of rows."""
    counter = CompileCounterWithBackend("aot_eager")

    def program(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return swiglu_quantize_nvfp4(*x.chunk(2, dim=-1), 10.0)

    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 9):
        x = torch.randn(rows, 64)
        oracle.assert_packed_equal(compiled(x), expected(*x.chunk(2, dim=-1), 10.0, "tensor"))
    assert counter.frame_count == 1


def check_on_gpu(gate: Tensor, up: Tensor, limit: float, granularity: str) -> None:
    """Bit for bit the reference."""
    parts = gpu.on_gpu(swiglu_quantize_nvfp4, gate, up, limit, granularity)
    for part, value in zip(parts, nvfp4.quantize(nvfp4.swiglu(gate, up, limit), granularity), strict=True):
        oracle.assert_same_bits(part, value)


GPU_SHAPES = ((2, 2048), (40, 2048), (60, 2048), (400, 2048), (3, 48))


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [10.0, INF])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("style", gpu.STYLES)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_matches_the_cpu(shape: tuple[int, int], style: str, granularity: str, limit: float) -> None:
    """Guards against one different bit of exp, of a quotient or of a clamp, in any schedule; halves of one tensor."""
    merged = gpu.values((shape[0], 2 * shape[1]), torch.bfloat16, style)
    check_on_gpu(*merged.chunk(2, dim=-1), limit, granularity)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_silu_of_every_magnitude(dtype: torch.dtype) -> None:
    """Guards against an exp that is one bit off somewhere: gates from -100 to 100, and all finite bf16 numbers."""
    if dtype == torch.bfloat16:
        gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        gate = gate[gate.isfinite()].view(-1, 256)
    else:
        gate = torch.cat([torch.linspace(-100, 100, 1 << 18), torch.randn(1 << 17) * 5]).to(dtype).view(-1, 256)
    # Ones in up: each block's largest element shows in its scale; amax of 16 equal rows shows the bits in gsa.
    check_on_gpu(gate, torch.ones_like(gate), INF, "token")
    single = gate.reshape(-1, 1).expand(-1, 16)[:: max(1, gate.numel() // 65536)]
    check_on_gpu(single, torch.ones_like(single), INF, "token")


@pytest.mark.gpu
def test_gpu_reads_any_strides() -> None:
    """Guards against storage order and empty launches: transposed, expanded, misaligned, rank 3, no rows."""
    x = torch.randn(6, 5, 128)
    for gate, up in (
        (x[..., :64], x[..., 64:]),
        (x[:0, :, :64], x[:0, :, :64]),
        (torch.randn(64, 5).t(), torch.randn(5, 64)),
        (torch.randn(1, 64).expand(7, 64), torch.randn(7, 66)[:, 1:65]),
        (x[0, 0, ::2], x[0, 1, ::2]),
    ):
        for granularity in GRANULARITIES:
            check_on_gpu(gate, up, 10.0, granularity)
