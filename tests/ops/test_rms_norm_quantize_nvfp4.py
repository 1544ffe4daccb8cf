"""``rms_norm_quantize_nvfp4``: every rounding of the norm, and that it quantises what it returns."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm

from dsv4_compile.nvfp4 import GRANULARITIES
from dsv4_compile.ops import (
    dequantize_nvfp4,
    quantize_nvfp4,
    rms_norm_quantize_nvfp4,
    rms_norm_quantize_nvfp4_with_norm,
)
from tests import gpu
from tests import nvfp4_oracle as oracle

OPS = (torch.ops.dsv4.rms_norm_quantize_nvfp4.default, torch.ops.dsv4.rms_norm_quantize_nvfp4.with_norm)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-6


def expected_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The documented roundings, from float64: exact sums of squares here, and + / sqrt and * of fp32 round correctly."""
    f32 = oracle.f32
    values = oracle.as_float64(x)
    mean = f32(f32(np.square(values).sum(-1, keepdims=True)) / x.shape[-1])
    y = f32(values * f32(1 / f32(np.sqrt(f32(mean + f32(eps))))))
    if weight is not None:
        y = f32(y * oracle.as_float64(weight))
    return oracle.to_dtype(y, x.dtype)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("weight_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype: torch.dtype, weight_dtype: torch.dtype | None, granularity: str) -> None:
    """Guards against rsqrt, a fused multiply-add, a weight multiplied after the rounding, or quantising unrounded values."""
    x = (torch.randn(7, 96) * torch.logspace(-2, 2, 7)[:, None]).to(dtype)
    weight = None if weight_dtype is None else (torch.rand(96) + 0.5).to(weight_dtype)
    norm, *packed = rms_norm_quantize_nvfp4_with_norm(x, weight, EPS, granularity)
    oracle.assert_same_bits(norm, expected_norm(x, weight, EPS))
    oracle.assert_packed_equal(tuple(packed), oracle.quantize(oracle.as_float64(norm), granularity))
    for part, other in zip(packed, rms_norm_quantize_nvfp4(x, weight, EPS, granularity), strict=True):
        oracle.assert_same_bits(part, other)


@settings(max_examples=30)
@given(x=oracle.activations(torch.bfloat16, finite=False))
def test_equals_norm_then_quantise(x: Tensor) -> None:
    """Guards against a fused operator that is not its two halves, for any values, NaN and Inf included."""
    for granularity, weight in itertools.product(GRANULARITIES, (None, torch.linspace(-2, 2, x.shape[1]))):
        norm, *packed = rms_norm_quantize_nvfp4_with_norm(x, weight, EPS, granularity)
        for part, other in zip(packed, quantize_nvfp4(norm, granularity), strict=True):
            oracle.assert_same_bits(part, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_norm_of_transformers(dtype: torch.dtype) -> None:
    """Guards against another norm: bf16 and fp16 differ from eager mode by the last bit in rare elements, fp32 by 4 ulp.

    Eager's rsqrt and sum are each a few fp32 ulp off; only elements next to a rounding boundary then move, by one step.
    It gets fp32 and is rounded here, because transformers 5.17 rounds before it multiplies by the weight.
    """
    module = DeepseekV4RMSNorm(256, eps=EPS)
    module.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(64, 256).to(dtype)
    norm, *_ = rms_norm_quantize_nvfp4_with_norm(x, module.weight.detach(), EPS)
    theirs = module(x.float()).detach().to(dtype)
    assert norm.dtype == dtype
    step = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    assert ((norm.double() - theirs.double()).abs() <= step * theirs.double().abs()).all()
    if dtype != torch.float32:
        assert norm.ne(theirs).double().mean() < 0.001


def test_known_values() -> None:
    """Guards against a sum in place of the mean, eps outside the root, and a weight of another column.

    Row 0: mean of squares (36 + 28) / 16 = 4, with eps 0 halved. Row 1: 16 * 9 / 16 = 9, divided by 3.
    """
    x = torch.zeros(2, 16)
    x[0, :5] = torch.tensor([6.0, 5.0, 1.0, -1.0, -1.0])
    x[1] = -3
    norm, codes, block_scales, global_scale = rms_norm_quantize_nvfp4_with_norm(x, None, 0.0, "token")
    assert norm[0, :6].tolist() == [3.0, 2.5, 0.5, -0.5, -0.5, 0.0]
    assert norm[1].eq(-1).all()
    # token: amax 3 -> 6 is code 7, 2.5 -> 5 ties to 4 (code 6), 0.5 -> 1 (code 2), -0.5 -> -1 (code 10).
    assert codes[0].tolist() == [0x67, 0xA2, 0x0A, 0, 0, 0, 0, 0]
    assert block_scales.float().tolist() == [[448.0], [448.0]]
    assert torch.equal(global_scale, torch.tensor([3.0, 1.0]) / 2688)

    weight = torch.tensor([2.0, -1.0, *[0.0] * 14], dtype=torch.bfloat16)
    assert rms_norm_quantize_nvfp4_with_norm(x, weight, 0.0)[0][0, :3].tolist() == [6.0, -2.5, 0.0]
    # eps joins the mean: sqrt(9 + 16) = 5
    assert rms_norm_quantize_nvfp4_with_norm(x, None, 16.0)[0][1, 0].item() == pytest.approx(-0.6, abs=1e-7)


def test_does_not_depend_on_the_order_of_summation() -> None:
    """Guards against a sum of squares in fp32: a row of all magnitudes, permuted, gives the permuted result."""
    x = torch.randn(4, 4096) * torch.logspace(-8, 8, 4096)
    order = torch.randperm(4096)
    norm = rms_norm_quantize_nvfp4_with_norm(x, None, EPS)[0]
    oracle.assert_same_bits(rms_norm_quantize_nvfp4_with_norm(x[:, order], None, EPS)[0], norm[:, order])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_row_is_contained_and_loud(value: float, granularity: str) -> None:
    """Guards against silent zeros in the bad row, and a global scale taken from it."""
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    good = rms_norm_quantize_nvfp4(x[[0, 2]], None, EPS, granularity)
    x[1, 20] = value
    codes, block_scales, global_scale = rms_norm_quantize_nvfp4(x, None, EPS, granularity)
    assert dequantize_nvfp4(codes, block_scales, torch.ones(()))[1, 16:32].isnan().all()
    assert block_scales[[0, 2]].float().isfinite().all()
    rest = codes[[0, 2]], block_scales[[0, 2]], global_scale[[0, 2]] if granularity == "token" else global_scale
    for part, other in zip(rest, good, strict=True):
        oracle.assert_same_bits(part, other)


def test_zeros() -> None:
    """Guards against 0 / 0 where eps keeps a row of zeros from it; with eps 0 the row is NaN, not a silent zero."""
    norm, *packed = rms_norm_quantize_nvfp4_with_norm(torch.zeros(2, 32), None, EPS)
    assert norm.eq(0).all()
    assert dequantize_nvfp4(*packed).eq(0).all()
    assert dequantize_nvfp4(*rms_norm_quantize_nvfp4(torch.zeros(2, 32), None, 0.0)).isnan().all()


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (0, 32), (2, 0, 32), (2, 0)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    """Guards against a fake that differs from the kernel: ranks, zero rows, no columns, with and without weight."""
    x, weight = torch.randn(shape, dtype=torch.bfloat16), torch.rand(shape[-1])
    torch.library.opcheck(OPS[0], (x, weight, EPS, "token"))
    torch.library.opcheck(OPS[1], (x, None, EPS, "tensor"))
    norm, codes, block_scales, global_scale = OPS[1](x, weight, EPS, "token")
    lead = shape[:-1]
    assert (norm.shape, codes.shape) == (shape, (*lead, shape[-1] // 2))
    assert (block_scales.shape, global_scale.shape) == ((*lead, shape[-1] // 16), lead)


def test_non_contiguous() -> None:
    """Guards against elements read in storage order, and outputs with the strides of the input."""
    x = torch.randn(64, 3, 5).permute(1, 2, 0)
    weight = torch.rand(128)[::2]
    for op in OPS:
        torch.library.opcheck(op, (x, weight, EPS, "token"))
        for part, other in zip(
            op(x, weight, EPS, "token"), op(x.contiguous(), weight.contiguous(), EPS, "token"), strict=True
        ):
            assert part.is_contiguous()
            oracle.assert_same_bits(part, other)


@pytest.mark.parametrize(
    ("x", "weight", "eps", "granularity", "message"),
    [
        (torch.zeros(2, 16, dtype=torch.int32), None, EPS, "tensor", "x must be bfloat16 or float16 or float32, got int32"),
        (torch.zeros(2, 24), None, EPS, "tensor", r"x must have a last dimension divisible by 16, got shape \(2, 24\)"),
        (torch.zeros(()), None, EPS, "tensor", r"x must have a last dimension divisible by 16, got shape \(\)"),
        (torch.zeros(2, 16), torch.zeros(16).double(), EPS, "tensor", "weight must be bfloat16 or float16 or float32, got float64"),
        (torch.zeros(2, 16), torch.zeros(8), EPS, "tensor", r"weight must have shape \(16,\), got \(8,\)"),
        (torch.zeros(2, 16), torch.zeros(1, 16), EPS, "tensor", r"weight must have shape \(16,\), got \(1, 16\)"),
        (torch.zeros(2, 16), None, -1.0, "tensor", r"eps must be non-negative, got -1\.0"),
        (torch.zeros(2, 16), None, math.nan, "tensor", "eps must be non-negative, got nan"),
        (torch.zeros(2, 16), None, EPS, "row", "granularity must be one of tensor, tensor_pow2, token, got 'row'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects(x: Tensor, weight: Tensor | None, eps: float, granularity: str, message: str, device: str) -> None:
    """Guards against arguments that do not belong together, broadcast without a word."""
    weight = None if weight is None else weight.to(device)
    for op in (rms_norm_quantize_nvfp4, rms_norm_quantize_nvfp4_with_norm):
        with pytest.raises(RuntimeError, match=f"^rms_norm_quantize_nvfp4: {message}$"):
            op(x.to(device), weight, eps, granularity)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    """Guards against a graph break, and against a second compilation for another number of rows; both overloads."""
    counter = CompileCounterWithBackend(backend)
    weight = torch.rand(64)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return *rms_norm_quantize_nvfp4(x, weight, EPS, "token"), *rms_norm_quantize_nvfp4_with_norm(x, None, EPS)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for rows in (5, 9):
        x = torch.randn(rows, 2, 64, dtype=torch.bfloat16).transpose(0, 1)
        torch._dynamo.mark_dynamic(x, 1)
        for part, other in zip(compiled(x), run(x), strict=True):
            oracle.assert_same_bits(part, other)
    assert counter.frame_count == 1


def check_on_gpu(x: Tensor, weight: Tensor | None, granularity: str, eps: float = EPS) -> None:
    """Both overloads bit for bit the reference."""
    norm, *packed = OPS[1](x, weight, eps, granularity)
    results = gpu.on_gpu(rms_norm_quantize_nvfp4_with_norm, x, weight, eps, granularity)
    for part, value in zip(results, (norm, *packed), strict=True):
        oracle.assert_same_bits(part, value)
    for part, value in zip(gpu.on_gpu(rms_norm_quantize_nvfp4, x, weight, eps, granularity), packed, strict=True):
        oracle.assert_same_bits(part, value)


GPU_SHAPES = ((2, 4096), (30, 4096), (60, 4096), (300, 4096), (50, 7168), (6, 1040))
GPU_WEIGHTS = (None, torch.bfloat16, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", GPU_WEIGHTS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_matches_the_cpu(shape: tuple[int, int], granularity: str, weight_dtype: torch.dtype | None) -> None:
    """Guards against one different bit for any value, in any schedule."""
    weight = None if weight_dtype is None else (torch.rand(shape[1]) + 0.5).to(weight_dtype)
    for style in ("bits", "gaussian", "non-finite", "zeros"):
        check_on_gpu(gpu.values(shape, torch.bfloat16, style), weight, granularity)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gpu_matches_the_cpu_in_other_dtypes(dtype: torch.dtype) -> None:
    """Guards against a norm rounded to another dtype than that of the input."""
    for granularity, rows in itertools.product(GRANULARITIES, (2, 300)):
        for style in ("finite", "gaussian", "non-finite"):
            check_on_gpu(gpu.values((rows, 4096), dtype, style), torch.rand(4096), granularity)


@pytest.mark.gpu
def test_gpu_sum_of_squares_rounds_like_the_cpu() -> None:
    """Guards against a sum whose order shows: 2^17 rows of Gaussian values of all magnitudes within a row.

    Sums in another order differ by some 2^-52, so one row in 2^26 or so may round to another fp32 number.
    """
    for _ in range(16):
        x = (torch.randn(8192, 256) * torch.logspace(-3, 3, 256)).bfloat16()
        norm = gpu.on_gpu(rms_norm_quantize_nvfp4_with_norm, x.float(), None, EPS, "token")[0]
        oracle.assert_same_bits(norm, OPS[1](x.float(), None, EPS, "token")[0])


@pytest.mark.gpu
def test_gpu_reads_any_strides() -> None:
    """Guards against storage order and empty launches: permuted, sliced, misaligned, no rows, a weight with steps."""
    weight = torch.rand(128)[::2]
    x = torch.randn(64, 3, 5).permute(1, 2, 0)
    for view in (x, x[:0], torch.randn(5, 200)[:, 3:67], torch.randn(64), torch.randn(9, 128)[::2, 64:]):
        check_on_gpu(view, weight, "token")
        check_on_gpu(view, weight, "tensor", eps=0.1)
