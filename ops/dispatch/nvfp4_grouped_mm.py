"""``nvfp4_grouped_mm`` on Hopper: groups that end at offsets on the device, and static groups."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch import decode_choice, decode_mm, fresh_weights, tuning
from dsv4_compile.ops.dispatch.alignment import aligned
from dsv4_compile.ops.dispatch.expand import expand
from dsv4_compile.ops.dispatch.expand_groups import expand_groups
from dsv4_compile.ops.dispatch.grouped_unaligned import grouped_unaligned
from dsv4_compile.ops.dispatch.grouped_wgmma import grouped_wgmma, supports_grouped_wgmma
from dsv4_compile.ops.dispatch.interleave import interleave
from dsv4_compile.ops.dispatch.moe_align import schedule_of_offsets
from dsv4_compile.ops.dispatch.nvfp4_moe import UNALIGNED_TILE_ROWS, Plan, grouped_plans, tile_rows_of
from dsv4_compile.ops.dispatch.wgmma_w4 import BLOCK_ROWS
from dsv4_compile.ops.dispatch.zero_tail import zero_tail
from dsv4_compile.ops.kernels.device import require_hopper, sm_count

OP = "nvfp4_grouped_mm"
DECODE_AVERAGE_ROWS = 8  # of a group: few groups are faster there with 8 (measured)


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
    fresh_weights.settle(b_codes, b_block_scales, b_global_scale)
    flat = out.view(-1, out.shape[-1])
    rows = flat.shape[0]
    row_scale = a_global_scale.reshape(-1).contiguous()
    is_wide = supports_grouped_wgmma(b_codes.new_empty((rows, k), device="meta"), b_codes, b_block_scales)
    # Static groups inside the rows of an activation are expanded: one launch where two copies would be two.
    is_apart = offsets is None and not (a_codes.is_contiguous() and a_block_scales.is_contiguous())
    plan, config = Plan("unaligned", UNALIGNED_TILE_ROWS), None
    if is_wide:
        read_by_decode = decode_mm.is_mappable(b_codes, b_block_scales)
        has_schedule = offsets is not None or is_apart
        question = _question(
            rows, groups, b_codes.shape[1], k, not is_apart, has_schedule, offsets is None, out.dtype, read_by_decode,
            sm_count(b_codes),
        )  # fmt: skip
        plan = tuning.answer(question, b_codes)
        if plan.path == "decode":
            config = _decode_config(plan.block, k, not is_apart, has_schedule, out.dtype)
    tile_rows = plan.tile_rows

    x, x_scales, schedule = a_codes, None, None
    if offsets is not None:
        schedule = schedule_of_offsets(offsets, rows, tile_rows)
    if config is not None and not is_apart:
        x, x_scales = (aligned(part.reshape(rows, -1)) for part in (a_codes, a_block_scales))
    elif offsets is None:
        x, schedule = expand_groups(a_codes, a_block_scales, tile_rows, plan.path == "wgmma")
    else:
        x = (interleave if plan.path == "wgmma" else expand)(a_codes, a_block_scales)

    if config is not None:
        scales = b_global_scale.reshape(-1, 1) if b_global_scale.dim() < 2 else b_global_scale
        scales = scales.expand(groups, scales.shape[1]).contiguous()
        decode_mm.grouped_decode_mm(
            config, x, x_scales, row_scale, b_codes, b_block_scales, scales, schedule, flat, group_rows=rows // groups
        )
    else:
        assert schedule is not None, "only the decode kernel does without"
        if is_wide:
            grouped_wgmma(x, _one_or_all(row_scale), b_codes, b_block_scales, b_global_scale, schedule, tile_rows, flat)
        else:
            grouped_unaligned(x, row_scale, b_codes, b_block_scales, b_global_scale, schedule, flat)
    if offsets is not None and schedule is not None:
        zero_tail(flat, schedule)
    return out


@functools.lru_cache(maxsize=4096)
def _question(
    rows: int,
    groups: int,
    n: int,
    k: int,
    is_packed: bool,
    has_schedule: bool,
    are_equal: bool,
    out_dtype: torch.dtype,
    read_by_decode: bool,
    sms: int,
) -> tuning.Question:
    """The plans that run a shape on tensor cores."""

    def fits(plan: Plan) -> bool:
        return _decode_config(plan.block, k, is_packed, has_schedule, out_dtype) is not None

    wgmma_rows = tile_rows_of(rows, groups, -(-n // BLOCK_ROWS), sms, are_equal)
    plans = grouped_plans(
        rows, groups, decode_choice.GROUPED_TILE_ROWS, wgmma_rows, fits if read_by_decode else None, DECODE_AVERAGE_ROWS
    )
    key = (
        f"groups {tuning.bucket(rows)} rows of {groups} x {n} x {k} {decode_mm.OUT_DTYPE_NAMES[out_dtype]}"
        f"{'' if is_packed else ' apart'}{' offsets' if has_schedule and is_packed else ''}"
        f"{'' if read_by_decode else ' gaps'}"
    )
    return tuning.Question(key, {plan.name: plan for plan in plans}, plans[0].name)


def _decode_config(
    block: tuple[int, int, int], k: int, is_packed: bool, has_schedule: bool, out_dtype: torch.dtype
) -> decode_mm.Config | None:
    return decode_choice.choose_grouped(block, k, is_packed, False, False, out_dtype, has_schedule)


def _one_or_all(row_scale: Tensor) -> Tensor:
    return row_scale.reshape(()) if row_scale.numel() == 1 else row_scale
