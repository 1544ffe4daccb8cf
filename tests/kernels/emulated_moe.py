"""What the Hopper kernels around the products do: routing, schedules, expansion, requantisation, combination."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import expand_groups, zero_tail
from dsv4_compile.ops.dispatch.expand import ExpandConfig
from dsv4_compile.ops.dispatch.interleave import InterleaveConfig
from dsv4_compile.ops.dispatch.moe_align import AlignConfig, ScheduleConfig
from dsv4_compile.ops.dispatch.moe_combine import CombineConfig
from dsv4_compile.ops.dispatch.moe_requantize import RequantizeConfig
from dsv4_compile.ops.dispatch.topk_router import RouterConfig
from dsv4_compile.ops.topk_router import scores
from tests.interleaved import in_order
from tests.kernels.emulated_numerics import e4m3, finite_amax, quotient


def _expand(
    name: str, config: ExpandConfig, codes: Tensor, scales: Tensor, rows: Tensor, out: Tensor, pieces: int,
    row_pieces: int, row_multiplier: int, row_shift: int, index_multiplier: int, index_shift: int,
) -> None:  # fmt: skip
    assert pieces > 0
    assert pieces == out.numel() // 8
    assert codes.shape[1] == 4 * row_pieces
    assert scales.shape == (codes.shape[0], row_pieces // 2)
    if not config.gather:
        assert out.shape[0] == codes.shape[0]
        out.copy_(nvfp4.scaled_codes(codes, e4m3(scales), torch.bfloat16))
        return
    piece = torch.arange(0, pieces, row_pieces)
    row = quotient(piece, row_multiplier, row_shift)
    assert torch.equal(row, torch.arange(out.shape[0]))
    index = rows[row].long()
    kept = index >= 0
    source = quotient(index[kept], index_multiplier, index_shift)
    out[kept] = nvfp4.scaled_codes(codes[source], e4m3(scales[source]), torch.bfloat16)


def _interleave(
    name: str, config: InterleaveConfig, x: Tensor, scales: Tensor, rows: Tensor, out: Tensor, pieces: int,
    row_pieces: int, row_multiplier: int, row_shift: int, index_multiplier: int, index_shift: int,
) -> None:  # fmt: skip
    assert pieces == out.numel() // 8 > 0
    assert out.shape[1] == 8 * row_pieces
    assert out.shape[1] % 128 == 0
    row = quotient(torch.arange(0, pieces, row_pieces), row_multiplier, row_shift)
    assert torch.equal(row, torch.arange(out.shape[0]))
    index = rows[row].long() if config.has_gather else row
    kept = index >= 0
    source = quotient(index[kept], index_multiplier, index_shift) if config.has_gather else index
    value = x[source]
    if config.is_packed:
        assert scales.shape == (x.shape[0], out.shape[1] // 16)
        value = nvfp4.scaled_codes(value, e4m3(scales)[source], torch.float16)
    out[kept] = in_order(value, config.is_packed)


def _expand_groups(
    name: str, config: Any, codes: Tensor, scales: Tensor, out: Tensor, schedule: Tensor, pieces: int, row_pieces: int,
    row_multiplier: int, row_shift: int, group_multiplier: int, group_shift: int, tiles_of_group: int, tile_rows: int,
) -> None:  # fmt: skip
    groups, rows, row_bytes = codes.shape
    assert pieces > 0
    assert pieces == out.numel() // 8
    assert row_bytes == 4 * row_pieces
    assert scales.shape == (groups, rows, row_bytes // 8)
    assert codes.data_ptr() % 4 == 0, "codes are read four bytes at a time"
    assert all(size == 1 or stride % 4 == 0 for size, stride in zip(codes.shape[:2], codes.stride()[:2], strict=True))
    flat_row = quotient(torch.arange(0, pieces, row_pieces), row_multiplier, row_shift)
    group = quotient(flat_row, group_multiplier, group_shift)
    row = flat_row - group * rows
    value = nvfp4.scaled_codes(codes[group, row], scales[group, row], out.dtype)
    out[flat_row] = in_order(value, True) if config.is_interleaved else value
    tiles = groups * tiles_of_group
    schedule[0] = torch.tensor([tiles, groups * rows, 0, 0], dtype=torch.int32)
    for tile in range(tiles):
        group_of, begin = tile // tiles_of_group, tile % tiles_of_group * tile_rows
        schedule[tile + 1] = torch.tensor([group_of, group_of * rows + begin, min(rows - begin, tile_rows), 0])


def _zero_tail(name: str, config: Any, out: Tensor, schedule: Tensor, columns: int, ctas: int) -> None:
    assert ctas > 0
    out[int(schedule[0, 1]) * columns :] = 0


def _align(
    name: str, config: AlignConfig, ids: Tensor, sorted_slots: Tensor, row_of_slot: Tensor, schedule: Tensor,
    zeroed: Tensor, weights: Tensor, row_weight: Tensor, token_scale: Tensor, row_scale: Tensor, experts: int,
    top_k: int, tile_rows: int,
) -> None:  # fmt: skip
    slots = ids.shape[0]
    assert 0 < experts <= 1024
    assert top_k > 0
    assert config.ctas in (0, 1, 8)
    assert config.ctas or slots <= 128, "a thread a slot"
    assert slots <= max(1, config.ctas) * (1 << 16), "counters of 16 bits"
    slot = torch.arange(slots)
    valid = (ids >= 0) & (ids < experts)
    order = slot[valid][ids[valid].long().argsort(stable=True)]
    count = len(order)
    sorted_slots[:slots] = -1
    sorted_slots[:count] = order.int()
    row_of_slot[:slots] = -1
    row_of_slot[order] = torch.arange(count, dtype=torch.int32)
    if config.weight_dtype:
        row_weight[:count] = weights[order].float()
    if config.has_token_scale:
        row_scale[:count] = token_scale[order // top_k]
    zeroed.zero_()
    _write_schedule(schedule, torch.bincount(ids[valid].long(), minlength=experts), tile_rows, count)


def _write_schedule(
    schedule: Tensor, counts: Tensor, tile_rows: int, valid: int, begins: Tensor | None = None, is_clamped: bool = False
) -> None:
    tiles = []
    begins = counts.cumsum(0) - counts if begins is None else begins
    for group in counts.nonzero().flatten().tolist():
        number, begin = int(counts[group]), int(begins[group])
        tiles += [[group, begin + i, min(tile_rows, number - i), 0] for i in range(0, number, tile_rows)]
    room = schedule.shape[0] - 1
    assert is_clamped or len(tiles) <= room, f"{len(tiles)} tiles, room for {room}"
    schedule[0] = torch.tensor([min(len(tiles), room), valid, 0, 0], dtype=torch.int32)
    if tiles[:room]:
        schedule[1 : 1 + len(tiles[:room])] = torch.tensor(tiles[:room], dtype=torch.int32)


def _schedule(
    name: str, config: ScheduleConfig, offsets: Tensor, schedule: Tensor, groups: int, rows: int, tile_rows: int
) -> None:
    ends = offsets[:groups].long().clamp(0, rows)
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    valid = int(ends[-1]) if groups else 0
    _write_schedule(schedule, (ends - begins).clamp(min=0), tile_rows, valid, begins, is_clamped=True)


def _combine(
    name: str, config: CombineConfig, y: Tensor, row_of_slot: Tensor, weights: Tensor, out: Tensor, top_k: int
) -> None:
    tokens = out.shape[0]
    assert tokens > 0
    assert y.shape[1] == out.shape[1]
    total = torch.zeros(out.shape)
    for rank in range(top_k):
        slot = torch.arange(tokens) * top_k + rank
        row = row_of_slot[slot].long()
        kept = row >= 0
        part = y[row[kept]]
        if config.weight_dtype:
            part = part * weights[slot[kept]].float().unsqueeze(1)
        total[kept] += part
    out.copy_(total)


def _requantize(
    name: str, config: RequantizeConfig, h: Tensor, partial_amax: Tensor, schedule: Tensor, scaled: Tensor,
    global_scales: Tensor, ctas: int,
) -> None:  # fmt: skip
    rows = int(schedule[0, 1])
    assert ctas > 0
    assert 0 <= rows <= h.shape[0]
    assert scaled.shape == h.shape
    x = h[:rows].float()
    if config.granularity == "token":
        scale = nvfp4.global_scale_from_amax(finite_amax(x, "token"), "token")
        global_scales[:rows] = scale
        per_block = scale.unsqueeze(1)
    else:
        bits = partial_amax.view(torch.int32).long() & 0xFFFFFFFF  # unsigned, NaN above all numbers
        amax = bits.amax().to(torch.int32).view(torch.float32)
        per_block = scale = nvfp4.global_scale_from_amax(amax, config.granularity)
        global_scales[0] = scale
    codes, block_scales = nvfp4.quantize_with_global_scale(x, per_block)
    value = nvfp4.scaled_codes(codes, block_scales, scaled.dtype)
    scaled[:rows] = in_order(value, True) if config.is_interleaved else value


def _router(
    name: str, config: RouterConfig, logits: Tensor, bias: Tensor, table: Tensor, token_ids: Tensor, weights: Tensor,
    ids: Tensor, tokens: int, experts: int, top_k: int, is_normalized: int, norm_eps: float, route_scale: float,
) -> None:  # fmt: skip
    assert tokens > 0
    assert experts <= 32 * config.lane_experts
    assert logits.shape == (tokens, experts)
    score = scores(logits.float(), config.score_function)
    selection = score + bias[torch.arange(experts)].float() if config.bias is not None else score
    if config.is_hash:
        at = token_ids[torch.arange(tokens)].long().unsqueeze(1) * top_k + torch.arange(top_k)
        chosen = table[at].long()
    else:
        chosen = selection.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    weight = score.gather(1, chosen)
    total = weight[:, 0]
    for rank in range(1, top_k):
        total = total + weight[:, rank]
    if is_normalized:
        weight = weight / (total + torch.tensor(norm_eps, dtype=torch.float32)).unsqueeze(1)
    weight = weight * torch.tensor(route_scale, dtype=torch.float32)
    weight = torch.where(selection.isnan().any(1, keepdim=True), float("nan"), weight)
    weights.copy_(weight.flatten())
    ids.copy_(chosen.flatten())


KERNELS: dict[type, Callable[..., None]] = {
    ExpandConfig: _expand,
    InterleaveConfig: _interleave,
    expand_groups.Config: _expand_groups,
    zero_tail.Config: _zero_tail,
    AlignConfig: _align,
    ScheduleConfig: _schedule,
    CombineConfig: _combine,
    RequantizeConfig: _requantize,
    RouterConfig: _router,
}
