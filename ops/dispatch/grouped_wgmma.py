"""Launches grouped products on tensor cores: expanded rows, sorted by expert, times each expert's packed weight."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch.wgmma_w4 import (
    BLOCK_ROWS,
    OUT_DTYPE_NAMES,
    STAGE_K,
    TILE_TOKENS,
    Config,
    is_mappable,
    num_clusters,
)
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import require_hopper, sm_count

OP = "nvfp4_grouped_mm"

# By tile, measured (docs/measured.md). Decoding waits more than it computes where a tile has few tokens: more warps.
CTAS_PER_SM = {16: 3, 32: 2, 64: 2, 128: 1, 256: 1}
GROUPS = {16: 2, 32: 4, 64: 4, 128: 2, 256: 2}
TEAMS = {16: 1, 32: 1, 64: 1, 128: 2, 256: 1}
MAX_CTAS_PER_SM = 3


def config_of(
    mode: str,
    tile_rows: int,
    out_dtype: str = "bf16",
    *,
    is_one_wave: bool = False,
    has_row_scale: bool = True,
    has_row_weight: bool = False,
    has_amax: bool = False,
) -> Config:
    """The variant for tiles of ``tile_rows`` rows; ``is_one_wave`` if a multiprocessor has at most one."""
    return Config(
        mode=mode,  # type: ignore[arg-type]
        tile_tokens=tile_rows,
        has_row_scale=has_row_scale,
        has_row_weight=has_row_weight,
        has_amax=has_amax,
        out_dtype=out_dtype,  # type: ignore[arg-type]
        ctas_per_sm=1 if is_one_wave else CTAS_PER_SM[tile_rows],
        k_groups=2 if is_one_wave and tile_rows <= 64 else 1,
        teams=1 if is_one_wave else TEAMS[tile_rows],
        group=GROUPS[tile_rows],
    )


def supports_grouped_wgmma(x: Tensor, codes: Tensor, block_scales: Tensor) -> bool:
    """Whether :func:`grouped_wgmma` takes these operands: K % 256 == 0, N % 16 == 0, 16-byte aligned bases and strides.

    Args:
        x: 16 bits [R, K].
        codes: uint8 [E, N, K/2].
        block_scales: float8_e4m3fn [E, N, K/16].
    """
    return x.shape[1] % STAGE_K == 0 and codes.shape[1] % 16 == 0 and is_mappable(x, codes, block_scales)


def partial_amax_size(like: Tensor) -> int:
    """Number of elements of ``partial_amax``: at least the CTAs of any launch on the tensor's device."""
    return MAX_CTAS_PER_SM * sm_count(like)


def grouped_wgmma(
    x: Tensor,
    row_scale: Tensor | None,
    codes: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    schedule: Tensor,
    tile_rows: int,
    out: Tensor,
    *,
    swiglu_limit: float | None = None,
    row_weight: Tensor | None = None,
    partial_amax: Tensor | None = None,
) -> None:
    """``out[r] = (x[r] @ (code * block scale)[e].T) * (row_scale[r] * global_scale[e])`` for the rows of a schedule.

    With ``swiglu_limit`` (``inf`` for no clamp): ``out[r] = silu(min(gate, L)) * clamp(up, -L, L) [* row_weight[r]]``
    of the two halves of that product in fp32, gate rows first, by the formula of :func:`nvfp4.swiglu`, rounded once.
    Rows of ``out`` that no tile names are left as they are.

    Args:
        x: fp16 [R, K], rows of a group side by side, in the order of :func:`interleave.interleave`.
        row_scale: fp32, 0-d or [R], or None for 1.
        codes: uint8 [E, N, K/2], contiguous along K.
        block_scales: float8_e4m3fn [E, N, K/16].
        global_scale: fp32, 0-d, [E] or [E, S], one for each of S equal segments of the N rows (S = 2 for gate and up).
        schedule: int32 [max_tiles + 1, 4] on the device: row 0 is (num_tiles, ...), row 1 + i is (expert, first row,
            number of rows <= ``tile_rows``, 0). No tile at all is fine.
        tile_rows: 16, 32, 64, 128 or 256: what the schedule was made for. The kernel's work for a tile does not depend
            on how many of its rows are used.
        out: [R, N], or [R, N/2] with ``swiglu_limit``, bf16, fp16 or fp32, unit stride along the last dimension.
        swiglu_limit: see above; None for a plain product.
        row_weight: fp32 [R], only with ``swiglu_limit``.
        partial_amax: fp32 [:func:`partial_amax_size`], only with ``swiglu_limit``: each element becomes the largest
            finite magnitude that one CTA wrote to ``out`` (after its rounding), 0 for none; all are written.

    Raises:
        RuntimeError: another architecture, or operands that :func:`supports_grouped_wgmma` does not take.
    """
    require_hopper(OP, x)
    torch._check(tile_rows in TILE_TOKENS, lambda: f"{OP}: tile_rows must be one of {TILE_TOKENS}, got {tile_rows}")
    torch._check(
        supports_grouped_wgmma(x, codes, block_scales),
        lambda: f"{OP}: x must have K % {STAGE_K} == 0 and 16-byte aligned rows, got shape {tuple(x.shape)}",
    )
    if x.shape[0] == 0:
        if partial_amax is not None:
            partial_amax.zero_()
        return
    config = config_of(
        "grouped" if swiglu_limit is None else "swiglu",
        tile_rows,
        OUT_DTYPE_NAMES[out.dtype],
        is_one_wave=(schedule.shape[0] - 1) * -(-codes.shape[1] // BLOCK_ROWS) <= sm_count(x),
        has_row_scale=row_scale is not None,
        has_row_weight=row_weight is not None,
        has_amax=partial_amax is not None,
    )
    experts = codes.shape[0]
    scales = global_scale.reshape(1, 1) if global_scale.dim() == 0 else global_scale.reshape(experts, -1).contiguous()
    unused = scales.reshape(-1)  # stands for an absent argument
    cache.kernel("sm90.wgmma_w4", config)(
        x,
        unused if row_scale is None else row_scale.reshape(-1),
        codes,
        block_scales,
        scales,
        schedule,
        out,
        unused if row_weight is None else row_weight,
        unused if partial_amax is None else partial_amax,
        0.0 if swiglu_limit is None else swiglu_limit,
        num_clusters(config, x),
    )
