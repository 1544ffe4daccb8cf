"""``rms_norm_quantize_nvfp4`` on a GPU, with the normalised tensor or without."""

from __future__ import annotations

from torch import Tensor

from dsv4_compile.ops.dispatch.quantizer import (
    MAX_HELD_BLOCKS,
    ONE_LAUNCH_COSTLY,
    Source,
    as_rows,
    dtype_name,
    quantize,
)

OP = "rms_norm_quantize_nvfp4"


def _source(x: Tensor, weight: Tensor | None, eps: float) -> Source:
    second = as_rows(x.new_empty((0,)) if weight is None else weight)
    dtype = None if weight is None else dtype_name(weight)
    return Source(
        OP, as_rows(x), second, MAX_HELD_BLOCKS[x.dtype], ONE_LAUNCH_COSTLY, eps, weight=dtype, has_statistic=True
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
