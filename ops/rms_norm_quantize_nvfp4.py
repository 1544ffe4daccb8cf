"""``rms_norm_quantize_nvfp4``: RMSNorm and the quantisation of its result in one step, the result itself on request."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import rms_norm_quantize_nvfp4 as dispatch
from dsv4_compile.ops.registration import (
    FLOAT_DTYPES,
    allocate_packed,
    check_dtype,
    check_granularity,
    check_quantizable,
    define,
    require,
)

OP = "rms_norm_quantize_nvfp4"


def check(x: Tensor, weight: Tensor | None, eps: float, granularity: str) -> None:
    """Checks the arguments."""
    check_quantizable(OP, "x", x)
    if weight is not None:
        check_dtype(OP, "weight", weight, FLOAT_DTYPES)
        require(
            tuple(weight.shape) == (x.shape[-1],),
            lambda: f"{OP}: weight must have shape ({x.shape[-1]},), got {tuple(weight.shape)}",
        )
    require(eps >= 0, lambda: f"{OP}: eps must be non-negative, got {eps}")
    check_granularity(OP, granularity)


def allocate(x: Tensor, weight: Tensor | None, eps: float, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the arguments and returns uninitialised outputs."""
    check(x, weight, eps, granularity)
    return allocate_packed(x, granularity)


def allocate_with_norm(
    x: Tensor, weight: Tensor | None, eps: float, granularity: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checks the arguments and returns uninitialised outputs, the normalised tensor first."""
    packed = allocate(x, weight, eps, granularity)
    return x.new_empty(x.shape), *packed


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, rounded to the dtype of ``x`` at the end only.

    The sum of squares in fp64, rounded to fp32, so that its order does not matter; then IEEE fp32, each step rounded:
    ``r = 1 / sqrt(sum / K + eps)``, ``(x * r) * weight``.
    """
    square_sum = x.to(torch.float64).square().sum(dim=-1, keepdim=True).to(torch.float32)
    # A tensor as divisor: CUDA divides by a Python scalar as a multiplication by its reciprocal, which rounds twice.
    mean = square_sum / torch.full_like(square_sum, x.shape[-1])
    y = x.to(torch.float32) * (1.0 / nvfp4.sqrt(mean + eps))
    if weight is not None:
        y = y * weight.to(torch.float32)
    return y.to(x.dtype).contiguous()


def reference(x: Tensor, weight: Tensor | None, eps: float, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """CPU kernel: :func:`rms_norm`, quantised from its rounded result, so bitwise what quantising that result gives."""
    check(x, weight, eps, granularity)
    return nvfp4.quantize(rms_norm(x, weight, eps), granularity)


def reference_with_norm(
    x: Tensor, weight: Tensor | None, eps: float, granularity: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CPU kernel: as :func:`reference`, the normalised tensor first."""
    check(x, weight, eps, granularity)
    norm = rms_norm(x, weight, eps)
    return norm, *nvfp4.quantize(norm, granularity)


def cuda(x: Tensor, weight: Tensor | None, eps: float, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """GPU kernel: bitwise the reference, but for what the order of the fp64 sum does to a last bit of fp32."""
    check(x, weight, eps, granularity)
    return dispatch.rms_norm_quantize_nvfp4(x, weight, eps, granularity)


def cuda_with_norm(
    x: Tensor, weight: Tensor | None, eps: float, granularity: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GPU kernel: as :func:`cuda`, the normalised tensor first."""
    check(x, weight, eps, granularity)
    return dispatch.rms_norm_quantize_nvfp4_with_norm(x, weight, eps, granularity)


_op = define(
    f"{OP}(Tensor x, Tensor? weight, float eps, str granularity)"
    " -> (Tensor codes, Tensor block_scales, Tensor global_scale)",
    fake=allocate,
    cpu=reference,
    cuda=cuda,
)
_op_with_norm = define(
    f"{OP}.with_norm(Tensor x, Tensor? weight, float eps, str granularity)"
    " -> (Tensor norm, Tensor codes, Tensor block_scales, Tensor global_scale)",
    fake=allocate_with_norm,
    cpu=reference_with_norm,
    cuda=cuda_with_norm,
)


def rms_norm_quantize_nvfp4(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, granularity: str = "tensor"
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises ``x / sqrt(mean(x^2) + eps) * weight``, the mean over the last axis.

    Args:
        x: bf16, fp16 or fp32 [..., K], K % 16 == 0, any strides, zero rows allowed.
        weight: bf16, fp16 or fp32 [K], multiplied in fp32; None for none.
        eps: added to the mean of squares, >= 0.
        granularity: see :func:`quantize_nvfp4`.

    Returns:
        codes, block_scales and global_scale as of :func:`quantize_nvfp4`, bitwise those of the normalised tensor
        rounded to the dtype of ``x``. A row that holds NaN or Inf gives NaN block scales in that row and in no other. A
        sum of squares beyond fp32's range gives a row of zeros, as in eager mode.

    Raises:
        RuntimeError: wrong dtype, K not a multiple of 16, a weight that is not [K], negative eps, unknown granularity,
            or no kernel for the device.

    Source: HuggingFace transformers, models/deepseek_v4/modeling_deepseek_v4.py, ``DeepseekV4RMSNorm``: the weight is
    multiplied in fp32 and the product rounded once.
    """
    codes, block_scales, global_scale = _op(x, weight, eps, granularity)
    return codes, block_scales, global_scale


def rms_norm_quantize_nvfp4_with_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, granularity: str = "tensor"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`rms_norm_quantize_nvfp4` for a normalised tensor that has other readers too.

    Args:
        x, weight, eps, granularity: see :func:`rms_norm_quantize_nvfp4`.

    Returns:
        The normalised tensor, shape and dtype of ``x``, contiguous; then its codes, block_scales and global_scale.

    Raises:
        RuntimeError: as :func:`rms_norm_quantize_nvfp4`.
    """
    norm, codes, block_scales, global_scale = _op_with_norm(x, weight, eps, granularity)
    return norm, codes, block_scales, global_scale
