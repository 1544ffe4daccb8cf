"""Routing on the device: the rows of each expert side by side, and the list of tiles that a grouped product walks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch.moe_combine import DTYPE_NAMES
from dsv4_compile.ops.kernels import cache

MAX_EXPERTS = 1024  # one thread of a CTA an expert
SMALL_SLOTS = 128  # one thread a slot, sorted by comparing all with all
SINGLE_CTA_SLOTS = 2048  # beyond, a cluster of CTAs shares the slots
CLUSTER_CTAS = 8
SCHEDULE_COLUMNS = 4
MAX_SLOTS = CLUSTER_CTAS << 15  # a CTA counts its slots of an expert in 16 bits, and all may go to one


@dataclass(frozen=True)
class AlignConfig:
    """Sorts slots by expert.

    Attributes:
        index_dtype: of the ids, ``int32`` or ``int64``.
        ctas: CTAs of the one cluster that runs; 0 for the variant that compares all with all.
        weight_dtype: of the routing weights that are sorted too; empty for none.
        has_token_scale: a scale of each token goes along.
        pdl: programmatic dependent launch.
    """

    index_dtype: Literal["int32", "int64"]
    ctas: int
    weight_dtype: str = ""
    has_token_scale: bool = False
    pdl: bool = True


@dataclass(frozen=True)
class ScheduleConfig:
    """Makes a schedule from the ends of groups.

    Attributes:
        pdl: programmatic dependent launch.
    """

    pdl: bool = True


class Alignment(NamedTuple):
    """Where each slot (token * k + rank) went.

    Attributes:
        sorted_slots: int32 [S], the slot of each sorted row, by expert and then by slot; -1 from ``num_valid`` on.
        row_of_slot: int32 [S], the sorted row of each slot; -1 where its expert is none of ours.
        schedule: int32 [max_tiles + 1, 4]: row 0 is (num_tiles, num_valid, 0, 0), row 1 + i of tile i is
            (expert, first row, number of rows, 0). Rows beyond are not written.
        zeroed: int32 [Z], all zero: what later kernels count or take maxima in.
        row_weight: fp32 [S], the routing weight of each sorted row, or None.
        row_scale: fp32 [S], the scale of each sorted row's token, or None.
    """

    sorted_slots: Tensor
    row_of_slot: Tensor
    schedule: Tensor
    zeroed: Tensor
    row_weight: Tensor | None
    row_scale: Tensor | None


def max_tiles(rows: int, groups: int, tile_rows: int) -> int:
    """The most tiles of at most ``tile_rows`` rows that ``rows`` rows in ``groups`` groups can make.

    Each group makes at most ``ceil(n / tile_rows) <= floor(n / tile_rows) + 1`` tiles and at most n.
    """
    return min(rows, rows // tile_rows + min(groups, rows))


def align(
    topk_ids: Tensor,
    num_experts: int,
    tile_rows: int,
    num_zeroed: int = 0,
    weights: Tensor | None = None,
    token_scale: Tensor | None = None,
) -> Alignment:
    """Sorts the slots of ``topk_ids`` by expert, stably, in one launch.

    Args:
        topk_ids: int32 or int64 [T, k]; ids below 0 or from ``num_experts`` on go nowhere.
        num_experts: E.
        tile_rows: the most rows of a tile.
        num_zeroed: Z, how many zeros are wanted.
        weights: bf16, fp16 or fp32 [T, k], to be sorted as the slots are; or None.
        token_scale: fp32 [T], to be spread over the rows of each token; or None.

    Raises:
        RuntimeError: more experts or slots than the kernel counts.
    """
    torch._check(
        num_experts <= MAX_EXPERTS,
        lambda: f"nvfp4_moe: gate_up_codes must have at most {MAX_EXPERTS} experts on a GPU, got {num_experts}",
    )
    ids = topk_ids.reshape(-1)
    slots = ids.numel()
    torch._check(
        slots <= MAX_SLOTS,
        lambda: f"nvfp4_moe: topk_ids must have at most {MAX_SLOTS} elements on a GPU, got {slots}",
    )
    integers = torch.int32
    alignment = Alignment(
        ids.new_empty(slots, dtype=integers),
        ids.new_empty(slots, dtype=integers),
        ids.new_empty((max_tiles(slots, num_experts, tile_rows) + 1, SCHEDULE_COLUMNS), dtype=integers),
        ids.new_empty(num_zeroed, dtype=integers),
        None if weights is None else ids.new_empty(slots, dtype=torch.float32),
        None if token_scale is None else ids.new_empty(slots, dtype=torch.float32),
    )
    config = AlignConfig(
        index_dtype="int64" if ids.dtype == torch.int64 else "int32",
        ctas=0 if slots <= SMALL_SLOTS else 1 if slots <= SINGLE_CTA_SLOTS else CLUSTER_CTAS,
        weight_dtype="" if weights is None else DTYPE_NAMES[weights.dtype],
        has_token_scale=token_scale is not None,
    )
    absent = ids.new_empty(0, dtype=torch.float32)
    cache.kernel("sm90.moe_align", config)(
        ids.contiguous(),
        *alignment[:4],
        absent if weights is None else weights.reshape(-1).contiguous(),
        absent if alignment.row_weight is None else alignment.row_weight,
        absent if token_scale is None else token_scale.contiguous(),
        absent if alignment.row_scale is None else alignment.row_scale,
        num_experts,
        topk_ids.shape[1],
        tile_rows,
    )
    return alignment


def schedule_of_offsets(offsets: Tensor, rows: int, tile_rows: int) -> Tensor:
    """The schedule of groups that end at ``offsets`` int32 [E]; offsets that decrease or leave 0..rows are clamped."""
    groups = offsets.numel()
    tiles = max_tiles(rows, groups, tile_rows)
    schedule = offsets.new_empty((tiles + 1, SCHEDULE_COLUMNS), dtype=torch.int32)
    cache.kernel("sm90.moe_align", ScheduleConfig())(offsets.contiguous(), schedule, groups, rows, tile_rows)
    return schedule
