"""``nvfp4_weight_mm``: a bf16 activation times packed weights, against exact rational arithmetic where that is cheap."""

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsv4_compile.ops import dequantize_nvfp4, nvfp4_weight_mm
from tests import nvfp4_oracle as oracle

OP = torch.ops.dsv4.nvfp4_weight_mm.default
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema fails on fp8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Packed = tuple[Tensor, Tensor, Tensor]


def any_packed(n: int, k: int = 64, scale_shape: tuple[int, ...] = ()) -> Packed:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    block_scales = torch.randint(0, 127, (n, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes, block_scales, torch.rand(scale_shape) * 1e-3 + 1e-5


def mm(x: Tensor, *weights: Packed, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32) -> Tensor:
    codes, block_scales, global_scales = (list(parts) for parts in zip(*weights, strict=True))
    return nvfp4_weight_mm(x, codes, block_scales, global_scales, bias, out_dtype)


def activation(*shape: int) -> Tensor:
    """bf16 in steps of 1/64 below 2: the sum of products with scaled codes is then exact in float64."""
    return (torch.randint(-127, 128, shape) / 64).bfloat16()


def expected(x: Tensor, *weights: Packed, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """The exact sum, rounded to fp32; times the global scale and plus the bias, each rounded to fp32; then the dtype."""
    columns = []
    for codes, block_scales, global_scale in weights:
        scaled = dequantize_nvfp4(codes, block_scales, torch.ones(()), torch.float32).double()
        total = (x.double().flatten(0, -2) @ scaled.T).float()
        rows = codes.shape[0]
        segments = global_scale.reshape(-1).repeat_interleave(rows // max(1, global_scale.numel()))
        columns.append(total * segments)
    y = torch.cat(columns, dim=1)
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype).view(*x.shape[:-1], y.shape[1])


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
def test_matches_reference(bias_dtype: torch.dtype | None, out_dtype: torch.dtype) -> None:
    """Guards against another order of sum, global scale and bias, a second rounding, and a scale on other columns."""
    x, weights = activation(5, 64), [any_packed(7), any_packed(6, scale_shape=(2,)), any_packed(3, scale_shape=(3,))]
    bias = None if bias_dtype is None else torch.randn(16).to(bias_dtype)
    actual = mm(x, *weights, bias=bias, out_dtype=out_dtype)
    oracle.assert_same_bits(actual, expected(x, *weights, bias=bias, out_dtype=out_dtype))


def test_known_values() -> None:
    """Guards against an activation that is quantised after all: 1.0078125 has more bits than NVFP4 holds.

    Codes 4 (6) and -1.5 (11), block scale 8, global scales 0.25 and 4: 1.0078125 * 32 * 0.25 and * -12 * 4.
    """
    x = torch.tensor([[1.0078125, *[0] * 15]], dtype=torch.bfloat16)
    codes = torch.tensor([[6, *[0] * 7], [11, *[0] * 7]], dtype=torch.uint8)
    weight = codes, torch.tensor([[8.0], [8.0]]).to(torch.float8_e4m3fn), torch.tensor([0.25, 4.0])
    assert mm(x, weight).tolist() == [[8.0625, -48.375]]
    assert mm(x, weight, bias=torch.tensor([1.0, 2.0])).tolist() == [[9.0625, -46.375]]


@pytest.mark.parametrize("lead", [(), (2, 3), (0,), (3, 1, 2)])
def test_leading_shapes(lead: tuple[int, ...]) -> None:
    """Guards against rows in another order for other ranks, and against zero rows."""
    x, weight = activation(*lead, 64), any_packed(5)
    actual = mm(x, weight)
    assert actual.is_contiguous()
    oracle.assert_same_bits(actual, expected(x.view(math.prod(lead), 64), weight).view(*lead, 5))


def test_non_contiguous() -> None:
    """Guards against elements read in storage order."""
    x, weight = activation(64, 6).T, any_packed(5)
    oracle.assert_same_bits(mm(x, weight), expected(x.contiguous(), weight))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_row(value: float) -> None:
    """Guards against NaN that vanishes or spreads: the row of x, or the column of a weight block that holds one."""
    x, weight = activation(3, 64), any_packed(4)
    weight[1].view(torch.uint8)[:] = 0x38
    clean = mm(x, weight)
    x[1, 5] = value
    weight[0][:, 2] = 0x22  # the weight that meets it is 1
    after = mm(x, weight)
    assert not after[1].isfinite().any()
    oracle.assert_same_bits(mm(x[::2], weight), after[::2])
    weight[1].view(torch.uint8)[2, 0] = 0x7F
    damaged = mm(activation(3, 64), weight)
    assert damaged[:, 2].isnan().all()
    assert damaged[:, [0, 1, 3]].isfinite().all()
    assert clean.isfinite().all()


@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,)])
def test_opcheck(lead: tuple[int, ...]) -> None:
    """Guards against a fake that differs from the kernel."""
    first, second = any_packed(4), any_packed(6, scale_shape=(2,))
    lists = [[x, y] for x, y in zip(first, second, strict=True)]
    x = torch.randn(*lead, 64, dtype=torch.bfloat16)
    torch.library.opcheck(OP, (x, *lists, torch.randn(10), torch.bfloat16), test_utils=OPCHECKS)


X, B = torch.randn(2, 3, 64, dtype=torch.bfloat16), any_packed(4)


@pytest.mark.parametrize(
    ("x", "weights", "bias", "out_dtype", "message"),
    [
        (X.float(), [B], None, torch.float32, "x must be bfloat16, got float32"),
        (X[0, 0, 0], [B], None, torch.float32, r"x must have at least one dimension, got shape \(\)"),
        (X, [(B[0].int(), *B[1:])], None, torch.float32, "b_codes must be uint8, got int32"),
        (
            X,
            [any_packed(4, k=32)],
            None,
            torch.float32,
            r"b_codes must be \[N, 32\], two codes a byte for the 64 columns of x, got shape \(4, 16\)",
        ),
        (X, [B], torch.zeros(5), torch.float32, r"bias must have shape \(4,\), got \(5,\)"),
        (X, [B], None, torch.int32, "out_dtype must be a float dtype, got torch.int32"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects(
    x: Tensor, weights: list[Packed], bias: Tensor | None, out_dtype: torch.dtype, message: str, device: str
) -> None:
    """Guards against operands that do not belong together, multiplied without a word."""
    moved = [tuple(part.to(device) for part in weight) for weight in weights]
    bias = None if bias is None else bias.to(device)
    with pytest.raises(RuntimeError, match=f"^nvfp4_weight_mm: {message}$"):
        mm(x.to(device), *moved, bias=bias, out_dtype=out_dtype)


def test_rejects_lists_of_different_lengths() -> None:
    """Guards against a weight that is dropped by zip."""
    with pytest.raises(RuntimeError, match=r"^nvfp4_weight_mm: b_codes, .* must be lists of one length > 0, got 2, 1"):
        nvfp4_weight_mm(X, [B[0], B[0]], [B[1]], [B[2]])


def test_compiles() -> None:
    """Guards against a graph break and a second compilation for another number of rows."""
    counter = CompileCounterWithBackend("inductor")
    weights = [any_packed(4), any_packed(6, scale_shape=(2,))]
    compiled = torch.compile(lambda x: mm(x * 2, *weights), fullgraph=True, backend=counter)
    for rows in (5, 9):
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        oracle.assert_same_bits(compiled(x), mm(x * 2, *weights))
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "rows", "k"),
    [
        (1, (64,), 256),
        (7, (136, 8), 512),
        (64, (512, 72, 128), 768),
        (300, (384, 16, 8, 64, 256), 512),
        (1030, (2048,), 256),
        (70, (64, 60), 272),
        (0, (8,), 256),
    ],
)
def test_gpu_matches_cpu(tokens: int, rows: tuple[int, ...], k: int, out_dtype: torch.dtype) -> None:
    """Guards against an activation that is rounded, and a kernel chosen for a shape that it does not fit.

    Bound: that of a sum on tensor cores, see tests/kernels/test_sm90_wgmma.py, twice, and one rounding.
    """
    x, weights = torch.randn(tokens, 2 * k).bfloat16()[:, k:], [any_packed(n, k=k, scale_shape=(n,)) for n in rows]
    bias = torch.randn(sum(rows))
    gpu_weights = [(codes.cuda(), block_scales.cuda(), scale.cuda()) for codes, block_scales, scale in weights]
    storage = torch.empty(tokens, 2 * k, dtype=torch.bfloat16, device="cuda")
    gpu_x = storage[:, k:].copy_(x)
    actual = mm(gpu_x, *gpu_weights, bias=bias.cuda(), out_dtype=out_dtype).cpu().double()
    exact = expected(x, *weights, bias=bias).double()
    unsigned = [(codes & 0x77, block_scales, scale) for codes, block_scales, scale in weights]
    error = expected(x.abs(), *unsigned, bias=bias.abs()).double() * (k / 16 + 16) * 2.0**-21
    rounding = 2.0**-8 if out_dtype == torch.bfloat16 else 2.0**-23
    assert actual.shape == exact.shape
    assert ((actual - exact).abs() <= error + (exact.abs() + error) * rounding).all()


@pytest.mark.gpu
def test_gpu_non_finite() -> None:
    """Guards against an Inf or NaN of the activation that leaves its row or is lost."""
    x = torch.randn(70, 512, device="cuda").bfloat16()
    codes, block_scales, scale = (part.cuda() for part in any_packed(72, k=512))
    codes |= 0x11  # no zero code
    block_scales.view(torch.uint8).clamp_(min=1)
    before = mm(x, (codes, block_scales, scale))
    x[3, 5], x[9, 500] = math.nan, math.inf
    after = mm(x, (codes, block_scales, scale))
    assert after[3].isnan().all()
    assert after[9].isinf().all()
    after[[3, 9]] = before[[3, 9]]
    oracle.assert_same_bits(after.cpu(), before.cpu())
