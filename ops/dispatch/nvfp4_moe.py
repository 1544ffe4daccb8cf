"""``nvfp4_moe`` on Hopper: which kernels run, a fixed number of them, none of whose grids depends on the routing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch import decode_choice, decode_mm, tuning
from dsv4_compile.ops.dispatch.alignment import aligned
from dsv4_compile.ops.dispatch.expand import expand
from dsv4_compile.ops.dispatch.grouped_unaligned import grouped_unaligned
from dsv4_compile.ops.dispatch.grouped_wgmma import grouped_wgmma, partial_amax_size, supports_grouped_wgmma
from dsv4_compile.ops.dispatch.interleave import interleave
from dsv4_compile.ops.dispatch.moe_align import align, max_tiles
from dsv4_compile.ops.dispatch.moe_combine import combine
from dsv4_compile.ops.dispatch.moe_requantize import requantize
from dsv4_compile.ops.dispatch.wgmma_w4 import BLOCK_ROWS, TILE_TOKENS
from dsv4_compile.ops.kernels.device import require_hopper, sm_count

OP = "nvfp4_moe"
UNALIGNED_TILE_ROWS = 64
# Of an expert that is hit: 1.9 are faster on the decode kernel, 6 on the other (measured).
DECODE_AVERAGE_ROWS = 4
TUNED_DECODE_AVERAGE_ROWS = 32  # up to which tuning tries it


@dataclass(frozen=True)
class Plan:
    """How a call runs.

    Attributes:
        path: ``decode`` for few rows an expert, ``wgmma`` for many, or ``unaligned`` for widths that TMA cannot read.
        tile_rows: the most rows of a tile.
        block: of the decode kernel, see :func:`decode_choice.choose_grouped`.
    """

    path: Literal["decode", "wgmma", "unaligned"]
    tile_rows: int
    block: tuple[int, int, int] = decode_choice.GROUPED_MANY

    @property
    def name(self) -> str:
        """Name of the choices that a shape leaves open."""
        if self.path != "decode":
            return f"{self.path} {self.tile_rows}"
        return f"decode {'x'.join(map(str, self.block))}, tiles of {self.tile_rows}"


def tile_rows_of(rows: int, groups: int, row_blocks: int, sms: int, are_equal: bool = False) -> int:
    """Rows of a tile.

    The fewest with which a multiprocessor has at most one tile, whatever the sizes of the groups; else what holds the
    rows of most groups. Measured (benchmarks/sweep_wgmma.py): 8 groups of 16 to 512 rows, 1024 weight rows each; and
    256 experts, where with 6 rows each tiles of 16 are fastest, with 24 rows 32, with 48 rows 64, with 72 and 96 rows
    128, with 192 rows 256.

    Args:
        rows: routed rows.
        groups: of which each row takes one.
        row_blocks: blocks of 128 weight rows.
        sms: multiprocessors.
        are_equal: the groups are equal in size.
    """
    for tile_rows in TILE_TOKENS:
        tiles = groups * -(-rows // groups // tile_rows) if are_equal else max_tiles(rows, groups, tile_rows)
        if tiles * row_blocks <= sms:
            return tile_rows
    average = rows / max(1, min(rows, groups))
    for limit, tile_rows in ((8, 16), (24, 32), (48, 64), (160, 128)):
        if average <= limit:
            return tile_rows
    return 256


def run(
    out: Tensor,
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_codes: Tensor,
    gate_up_block_scales: Tensor,
    gate_up_global_scale: Tensor,
    down_codes: Tensor,
    down_block_scales: Tensor,
    down_global_scale: Tensor,
    limit: float,
    weight_position: str,
    granularity: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Writes ``out`` [T, H] and returns it; see :func:`dsv4_compile.ops.nvfp4_moe.nvfp4_moe`."""
    require_hopper(OP, a_codes)
    top_k, rows = topk_ids.shape[1], topk_ids.numel()
    experts, hidden = down_codes.shape[:2]
    intermediate = gate_up_codes.shape[1] // 2
    if out.numel() == 0:
        return out
    if rows * experts * intermediate == 0:
        return out.zero_()

    is_before = weight_position == "before_down"
    is_token = a_global_scale.dim() > 0 and a_global_scale.shape[0] > 1
    plan = plan_of(topk_ids.shape[0], rows, gate_up_codes, gate_up_block_scales, down_codes, down_block_scales)
    alignment = align(
        topk_ids,
        experts,
        plan.tile_rows,
        num_zeroed=1,
        weights=topk_weights if is_before else None,
        token_scale=a_global_scale if is_token else None,
    )
    schedule = alignment.schedule
    row_scale = a_global_scale if alignment.row_scale is None else alignment.row_scale
    h = a_codes.new_empty((rows, intermediate), dtype=out_dtype)
    if plan.path == "decode":
        partial_amax = a_codes.new_empty(sm_count(a_codes), dtype=torch.float32)  # one a CTA
        config = _decode_config(plan, hidden, True, is_before, out_dtype)
        assert config is not None, "plan_of looked"
        decode_mm.grouped_decode_mm(
            config, aligned(a_codes), aligned(a_block_scales), row_scale,
            gate_up_codes, gate_up_block_scales,
            gate_up_global_scale.reshape(experts, -1).contiguous(), schedule, h,
            sorted_slots=alignment.sorted_slots, top_k=top_k, swiglu_limit=limit,
            row_weight=alignment.row_weight, partial_amax=partial_amax,
        )  # fmt: skip
    elif plan.path == "wgmma":
        partial_amax = a_codes.new_empty(partial_amax_size(a_codes), dtype=torch.float32)
        x = interleave(a_codes, a_block_scales, alignment.sorted_slots, top_k)
        grouped_wgmma(
            x, row_scale, gate_up_codes, gate_up_block_scales, gate_up_global_scale, schedule, plan.tile_rows, h,
            swiglu_limit=limit, row_weight=alignment.row_weight, partial_amax=partial_amax,
        )  # fmt: skip
        del x  # its memory serves for y
    else:
        x = expand(a_codes, a_block_scales, alignment.sorted_slots, top_k)
        grouped_unaligned(
            x, row_scale, gate_up_codes, gate_up_block_scales, gate_up_global_scale, schedule, h,
            swiglu_limit=limit, row_weight=alignment.row_weight, amax=alignment.zeroed,
        )  # fmt: skip
        partial_amax = alignment.zeroed.view(torch.float32)
        del x
    in_place = h if h.element_size() == 2 else None
    scaled, h_scale = requantize(h, partial_amax, schedule, granularity, in_place, plan.path == "wgmma")
    y = h.new_empty((rows, hidden), dtype=torch.float32)
    if plan.path == "decode":
        config = _decode_config(plan, intermediate, False, False, torch.float32)
        assert config is not None, "plan_of looked"
        scales = down_global_scale.contiguous().view(experts, 1)
        decode_mm.grouped_decode_mm(config, scaled, None, h_scale, down_codes, down_block_scales, scales, schedule, y)
    elif plan.path == "wgmma":
        grouped_wgmma(scaled, h_scale, down_codes, down_block_scales, down_global_scale, schedule, plan.tile_rows, y)
    else:
        grouped_unaligned(scaled, h_scale, down_codes, down_block_scales, down_global_scale, schedule, y)
    combine(y, alignment.row_of_slot, None if is_before else topk_weights, top_k, out)
    return out


def plan_of(
    tokens: int,
    rows: int,
    gate_up_codes: Tensor,
    gate_up_block_scales: Tensor,
    down_codes: Tensor,
    down_block_scales: Tensor,
) -> Plan:
    """The plan for that many tokens and routed rows."""
    experts, hidden = down_codes.shape[:2]
    intermediate = 2 * down_codes.shape[2]
    x = gate_up_codes.new_empty((rows, hidden), dtype=torch.bfloat16, device="meta")
    h = gate_up_codes.new_empty((rows, intermediate), dtype=torch.bfloat16, device="meta")
    if not supports_grouped_wgmma(x, gate_up_codes, gate_up_block_scales) or not supports_grouped_wgmma(
        h, down_codes, down_block_scales
    ):
        return Plan("unaligned", UNALIGNED_TILE_ROWS)
    read_by_decode = decode_mm.is_mappable(gate_up_codes, gate_up_block_scales, down_codes, down_block_scales)
    sms = sm_count(gate_up_codes)
    question = _question(rows, tokens == 1, experts, hidden, intermediate, read_by_decode, sms)
    plan: Plan = tuning.answer(question, gate_up_codes)
    return plan


@functools.lru_cache(maxsize=4096)
def _question(
    rows: int, is_one_token: bool, experts: int, hidden: int, intermediate: int, read_by_decode: bool, sms: int
) -> tuning.Question:
    """The plans that run a shape: the decode kernel's where activations fit beside a ring of weights."""

    def fits(plan: Plan) -> bool:
        products = (hidden, True), (intermediate, False)
        return all(_decode_config(plan, k, is_gate_up, False, torch.bfloat16) is not None for k, is_gate_up in products)

    # The rows of one token have an expert each.
    tile_rows = 1 if is_one_token else decode_choice.GROUPED_TILE_ROWS
    row_blocks = -(-max(2 * intermediate, hidden) // BLOCK_ROWS)
    wgmma_rows = tile_rows_of(rows, experts, row_blocks, sms)
    plans = grouped_plans(rows, experts, tile_rows, wgmma_rows, fits if read_by_decode else None)
    key = (
        f"experts {tuning.bucket(rows)} rows of {experts} x {hidden} x {intermediate}"
        f"{' one token' if is_one_token else ''}{'' if read_by_decode else ' gaps'}"
    )
    return tuning.Question(key, {plan.name: plan for plan in plans}, plans[0].name)


def grouped_plans(
    rows: int,
    experts: int,
    tile_rows: int,
    wgmma_rows: int,
    fits: Callable[[Plan], bool] | None,
    decode_average_rows: int = DECODE_AVERAGE_ROWS,
) -> list[Plan]:
    """Plans among which the fastest may be, the table's choice first.

    Args:
        rows: routed rows.
        experts: of which each row takes one.
        tile_rows: of the decode kernel's tiles.
        wgmma_rows: of the other's, see :func:`tile_rows_of`.
        fits: whether the decode kernel runs a plan; None where it cannot read the weights.
        decode_average_rows: of a group that is hit, up to which the decode kernel is the table's choice.
    """
    hit = max(1, min(rows, experts))
    wgmma = [Plan("wgmma", wgmma_rows)]
    wgmma += [Plan("wgmma", tile) for tile in TILE_TOKENS if tile != wgmma_rows]
    if fits is None or rows > TUNED_DECODE_AVERAGE_ROWS * hit:
        return wgmma
    first = decode_choice.grouped_block(rows)
    blocks = [first, *(block for block in decode_choice.GROUPED_BLOCKS if block != first)]
    decode = [plan for block in blocks if fits(plan := Plan("decode", tile_rows, block))]
    is_decode = rows <= decode_average_rows * hit and decode and decode[0].block == first
    return [*decode, *wgmma] if is_decode else [*wgmma, *decode]


def _decode_config(
    plan: Plan, k: int, is_gate_up: bool, has_row_weight: bool, out_dtype: torch.dtype
) -> decode_mm.Config | None:
    # The schedule is older than the first product, whose end requantisation waits for before it lets the second begin.
    return decode_choice.choose_grouped(
        plan.block, k, is_gate_up, is_gate_up, has_row_weight, out_dtype, tile_rows=plan.tile_rows,
        has_old_schedule=not is_gate_up,
    )  # fmt: skip
