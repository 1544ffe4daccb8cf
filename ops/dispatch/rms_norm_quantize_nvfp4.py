"""``rms_norm_quantize_nvfp4`` on a GPU, with the normalised tensor or without."""

from __future__ import annotations

from torch import Tensor

from dsv4_compile.ops.dispatch.quantizer import (
    MAX_HELD_BLOCKS,
    Source,
    dtype_name,
    is_aligned,
    quantize,
    view_rows,
)

OP = "rms_norm_quantize_nvfp4"


def _source(x: Tensor, weight: Tensor | None, eps: float) -> Source:
    if weight is not None and not (weight.is_contiguous() and is_aligned(weight)):
        weight = weight.clone().contiguous()
    second = x.new_empty((0,)) if weight is None else weight
    held = MAX_HELD_BLOCKS[x.dtype]
    return Source(
        OP, view_rows(x), second, held, eps, weight=None if weight is None else dtype_name(weight), has_statistic=True
    )


def rms_norm_quantize_nvfp4(
    x: Tensor, weight: Tensor | None, eps: float, granularity: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and global scale of the norm, which is not written."""
    return quantize(_source(x, weight, eps), x, granularity)


def rms_norm_quantize_nvfp4_with_norm(
    x: Tensor, weight: Tensor | None, eps: float, granularity: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm, then its codes, block scales and global scale."""
    norm = x.new_empty(x.shape)
    return norm, *quantize(_source(x, weight, eps), x, granularity, norm)
