"""``nvfp4_grouped_mm`` on Hopper: groups that end at offsets on the device, and static groups."""

from __future__ import annotations

from torch import Tensor

from dsv4_compile.ops.dispatch.expand import expand
from dsv4_compile.ops.dispatch.expand_groups import expand_groups
from dsv4_compile.ops.dispatch.grouped_unaligned import grouped_unaligned
from dsv4_compile.ops.dispatch.grouped_wgmma import grouped_wgmma, supports_grouped_wgmma
from dsv4_compile.ops.dispatch.moe_align import schedule_of_offsets
from dsv4_compile.ops.dispatch.nvfp4_moe import UNALIGNED_TILE_ROWS, tile_rows_of
from dsv4_compile.ops.dispatch.zero_tail import zero_tail
from dsv4_compile.ops.kernels.device import require_hopper

OP = "nvfp4_grouped_mm"


def run(
    out: Tensor,
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    b_codes: Tensor,
    b_block_scales: Tensor,
    b_global_scale: Tensor,
    offsets: Tensor | None,
) -> Tensor:
    """Writes ``out`` and returns it; see :func:`dsv4_compile.ops.nvfp4_grouped_mm.nvfp4_grouped_mm`."""
    require_hopper(OP, a_codes)
    if out.numel() == 0:
        return out
    k, groups = 2 * a_codes.shape[-1], b_codes.shape[0]
    if k * groups == 0:
        return out.zero_()
    flat = out.view(-1, out.shape[-1])
    rows = flat.shape[0]
    row_scale = a_global_scale.reshape(-1).contiguous()
    is_wide = supports_grouped_wgmma(b_codes.new_empty((rows, k), device="meta"), b_codes, b_block_scales)
    tile_rows = tile_rows_of(rows, groups) if is_wide else UNALIGNED_TILE_ROWS
    if offsets is None:
        x, schedule = expand_groups(a_codes, a_block_scales, tile_rows)
    else:
        schedule = schedule_of_offsets(offsets, rows, tile_rows)
        x = expand(a_codes, a_block_scales)
    if is_wide:
        grouped_wgmma(x, _one_or_all(row_scale), b_codes, b_block_scales, b_global_scale, schedule, tile_rows, flat)
    else:
        grouped_unaligned(x, row_scale, b_codes, b_block_scales, b_global_scale, schedule, flat)
    if offsets is not None:
        zero_tail(flat, schedule)
    return out


def _one_or_all(row_scale: Tensor) -> Tensor:
    return row_scale.reshape(()) if row_scale.numel() == 1 else row_scale
