"""``quantize_nvfp4`` as an operator: shapes, strides, dtypes, errors, compilation. Format: test_nvfp4_quantize.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsv4_compile import nvfp4
from dsv4_compile.nvfp4 import GRANULARITIES
from dsv4_compile.ops import quantize_nvfp4
from tests import gpu
from tests import nvfp4_oracle as oracle

OP = torch.ops.dsv4.quantize_nvfp4.default
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def layouts() -> dict[str, Tensor]:
    """One tensor of each rank and stride pattern that a model can hand over."""
    x = torch.randn(6, 4, 64)
    return {
        "rank 1": x[0, 0],
        "rank 2": x[0],
        "rank 3": x,
        "rank 4": x.view(3, 2, 4, 64),
        "zero rows": x[:0],
        "zero columns": x[..., :0],
        "transposed": torch.randn(64, 5).t(),
        "every second row": x[::2],
        "column slice": x[..., 16:48],
        "last step 2": torch.randn(4, 64)[:, ::2],
        "expanded": x[0, :1].expand(3, 64),
    }


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", layouts())
def test_matches_reference(layout: str, granularity: str) -> None:
    """Guards against blocks cut across rows, or read by storage order instead of strides; outputs are contiguous."""
    x = layouts()[layout]
    parts = quantize_nvfp4(x, granularity)
    oracle.assert_packed_equal(parts, oracle.quantize(oracle.as_float64(x), granularity))
    fake = torch.ops.dsv4.quantize_nvfp4(x.to("meta"), granularity)
    for part, meta in zip(parts, fake, strict=True):
        assert part.is_contiguous()
        assert (part.shape, part.stride(), part.dtype) == (meta.shape, meta.stride(), meta.dtype)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)
@given(data=st.data())
def test_matches_reference_for_any_values(dtype: torch.dtype, granularity: str, data: st.DataObject) -> None:
    """Guards against an operator that computes in its input's dtype: any bits, NaN and Inf among them."""
    x = data.draw(oracle.activations(dtype, finite=False))
    oracle.assert_packed_equal(quantize_nvfp4(x, granularity), oracle.quantize(oracle.as_float64(x), granularity))


def test_known_values() -> None:
    """Guards against a scale that is divided where it should multiply; amax 2688, so gsa = 2688 / (6 * 448) = 1.

    Block 0: s = 2688 / 6 = 448, codes 6 (7) and 448 / 448 = 1 (2). Block 1: s = 12 / 6 = 2, codes -6 (15), 3 / 2 (3).
    """
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0], x[0, 1], x[0, 16], x[0, 31] = 2688.0, 448.0, -12.0, 3.0
    codes, block_scales, global_scale = quantize_nvfp4(x)
    assert codes.tolist() == [[0x27, *[0] * 7, 0x0F, *[0] * 6, 0x30]]
    assert block_scales.float().tolist() == [[448.0, 2.0]]
    assert global_scale.item() == 1.0


def test_default_granularity_is_tensor() -> None:
    """Guards against a default that changes what a model computes."""
    x = torch.randn(3, 32)
    oracle.assert_packed_equal(quantize_nvfp4(x), oracle.quantize(oracle.as_float64(x), "tensor"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", ["rank 1", "rank 2", "rank 3", "zero rows", "transposed"])
def test_opcheck(layout: str, granularity: str) -> None:
    """Guards against a fake that differs from the kernel, a mutated input and an output that aliases one."""
    torch.library.opcheck(OP, (layouts()[layout], granularity))


@pytest.mark.parametrize(
    ("x", "granularity", "message"),
    [
        (torch.zeros(2, 32, dtype=torch.float64), "tensor", "x must be bfloat16 or float16 or float32, got float64"),
        (torch.zeros(2, 32, dtype=torch.int32), "tensor", "x must be bfloat16 or float16 or float32, got int32"),
        (torch.zeros(2, 24), "tensor", r"x must have a last dimension divisible by 16, got shape \(2, 24\)"),
        (torch.zeros(()), "tensor", r"x must have a last dimension divisible by 16, got shape \(\)"),
        (torch.zeros(2, 32), "row", "granularity must be one of tensor, tensor_pow2, token, got 'row'"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects(x: Tensor, granularity: str, message: str, device: str) -> None:
    """Guards against a check that only one of fake and real makes."""
    with pytest.raises(RuntimeError, match=f"^quantize_nvfp4: {message}$"):
        quantize_nvfp4(x.to(device), granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compiles(granularity: str) -> None:
    """Guards against a graph break, and against a second compilation for another number of rows."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: quantize_nvfp4(x * 2, granularity), fullgraph=True, dynamic=True, backend=counter
    )
    for rows in (5, 9):
        x = torch.randn(rows, 32)
        oracle.assert_packed_equal(compiled(x), oracle.quantize(oracle.as_float64(x * 2), granularity))
    assert counter.frame_count == 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_contains_non_finite_values(value: float, granularity: str) -> None:
    """Guards against one bad row that changes any bit of another row."""
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    x[2, 7] = 0.0
    expected = quantize_nvfp4(x, granularity)
    x[2, 7] = value
    codes, block_scales, global_scale = quantize_nvfp4(x, granularity)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(codes[others], expected[0][others])
    assert torch.equal(block_scales.view(torch.uint8)[others], expected[1].view(torch.uint8)[others])
    assert torch.equal(global_scale, expected[2])
    assert block_scales[2].float().isnan().tolist() == [True, False, False, False]


def check_on_gpu(x: Tensor, granularity: str) -> None:
    """Bit for bit the reference, outputs contiguous."""
    parts = gpu.on_gpu(quantize_nvfp4, x, granularity)
    for part, expected in zip(parts, nvfp4.quantize(x, granularity), strict=True):
        assert part.is_contiguous()
        oracle.assert_same_bits(part, expected)


# One launch in one CTA, in a cluster with one, two and four rows a thread, two launches; a row in 64 to 512 threads.
GPU_SHAPES = ((3, 4096), (30, 4096), (60, 4096), (100, 4096), (300, 4096), (70, 7168), (5, 1040), (9, 48), (2, 12288))
GPU_SHAPES_OF_OTHER_DTYPES = ((3, 4096), (60, 2048), (300, 4096))


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("style", gpu.STYLES)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_matches_the_cpu(shape: tuple[int, int], style: str, granularity: str) -> None:
    """Guards against one different bit for any value, in any of the schedules."""
    check_on_gpu(gpu.values(shape, torch.bfloat16, style), granularity)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("style", gpu.STYLES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gpu_matches_the_cpu_in_other_dtypes(dtype: torch.dtype, style: str, granularity: str) -> None:
    """Guards against NaN, maxima and signs found by the bit patterns of another dtype."""
    for shape in GPU_SHAPES_OF_OTHER_DTYPES:
        check_on_gpu(gpu.values(shape, dtype, style), granularity)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gpu_rounds_every_bf16_value_like_the_cpu(granularity: str) -> None:
    """Guards against a wrong rounding of one value: all finite bf16 numbers against block maxima of every mantissa."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()].view(-1, 15)  # 65280 = 15 * 4352
    blocks = torch.cat([torch.zeros(len(every), 1, dtype=torch.bfloat16), every], 1)
    for mantissa in range(0, 128, 5):
        blocks[:, 0] = blocks[:, 1:].abs().amax(1) * (1 + mantissa / 128)
        check_on_gpu(blocks.nan_to_num(posinf=3e38).view(-1, 512), granularity)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", layouts())
def test_gpu_reads_any_strides(layout: str, granularity: str) -> None:
    """Guards against storage order, rows that do not start at 16 bytes, and launches with nothing to do."""
    x = layouts()[layout]
    check_on_gpu(x, granularity)
    check_on_gpu(torch.cat([x.new_ones(3), x.reshape(-1)])[3:].view(x.shape), granularity)  # 12 bytes off


@pytest.mark.gpu
def test_gpu_random_shapes() -> None:
    """Guards against an edge between schedules, or a grid that ends too early: 150 shapes up to 2^19 elements."""
    for _ in range(150):
        k = 16 * int(2 ** (torch.rand(()) * 9))
        rows = int(2 ** (torch.rand(()) * 10)) if k < 1024 else int(2 ** (torch.rand(()) * 7))
        parts = int(torch.randint(1, 3, ()))
        x = gpu.values((rows, parts * k), torch.bfloat16, gpu.STYLES[int(torch.randint(0, len(gpu.STYLES), ()))])
        check_on_gpu(x[:, :k], GRANULARITIES[int(torch.randint(0, 3, ()))])


@pytest.mark.gpu
def test_gpu_in_a_graph() -> None:
    """Guards against a launch on another stream, and a workspace that a replay finds changed."""
    for rows in (2, 40, 500):
        x = torch.randn(rows, 4096, dtype=torch.bfloat16)
        static = x.cuda()
        quantize_nvfp4(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            parts = quantize_nvfp4(static)
        for scale in (1.0, 30.0, 0.01):
            static.copy_(x * scale)
            graph.replay()
            for part, expected in zip(parts, nvfp4.quantize(x * scale), strict=True):
                oracle.assert_same_bits(part.cpu(), expected)
