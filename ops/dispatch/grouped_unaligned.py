"""Launches grouped products of any K % 16 == 0 and any N, for operands that the faster kernels do not take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4_compile.ops.dispatch.moe_combine import DTYPE_NAMES
from dsv4_compile.ops.kernels import cache

WARPS = 4
BLOCK_ROWS = 16 * WARPS  # weight rows a CTA


@dataclass(frozen=True)
class Config:
    """One compiled variant of ``sm90.grouped_unaligned``.

    Attributes:
        out_dtype: of the result.
        is_swiglu: the result is SwiGLU of the two halves of the product.
        has_row_weight: which is multiplied by a weight a row.
        pdl: programmatic dependent launch.
    """

    out_dtype: str
    is_swiglu: bool = False
    has_row_weight: bool = False
    pdl: bool = True


def grouped_unaligned(
    x: Tensor,
    row_scale: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    schedule: Tensor,
    out: Tensor,
    *,
    swiglu_limit: float | None = None,
    row_weight: Tensor | None = None,
    amax: Tensor | None = None,
) -> None:
    """The product of :func:`grouped_wgmma.grouped_wgmma`, which documents the arguments, for any tile size.

    Args:
        amax: int32 [1], zero before; the bits of the largest finite magnitude written are put there.
    """
    experts, n = codes.shape[:2]
    codes, block_scales = (part if part.stride(-1) == 1 else part.contiguous() for part in (codes, block_scales))
    scales = global_scale.reshape(-1, 1) if global_scale.dim() < 2 else global_scale
    columns = n if swiglu_limit is None else n // 2
    config = Config(DTYPE_NAMES[out.dtype], swiglu_limit is not None, row_weight is not None)
    cache.kernel("sm90.grouped_unaligned", config)(
        x,
        row_scale.reshape(-1),
        codes,
        block_scales,
        scales.expand(experts, scales.shape[1]).contiguous(),
        schedule,
        out,
        row_scale.reshape(-1) if row_weight is None else row_weight,
        schedule.view(-1) if amax is None else amax,
        0.0 if swiglu_limit is None else swiglu_limit,
        schedule.shape[0] - 1,
        -(-columns // BLOCK_ROWS),
    )
