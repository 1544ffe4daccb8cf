"""What each Hopper kernel does with the arguments of a launch, in plain torch: see :mod:`tests.kernels.emulation`.

Written from the kernels' sources. A schedule, an index or a pitch is read as the kernel reads it; rows that it leaves
unwritten stay so. Asserted is what a kernel takes for granted. Of ``nvfp4`` only the numerics are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import expand_groups, zero_tail
from dsv4_compile.ops.dispatch.decode_mm import Config as DecodeConfig
from dsv4_compile.ops.dispatch.dequantize_nvfp4 import DequantizeConfig
from dsv4_compile.ops.dispatch.expand import ExpandConfig
from dsv4_compile.ops.dispatch.grouped_unaligned import Config as UnalignedConfig
from dsv4_compile.ops.dispatch.interleave import InterleaveConfig
from dsv4_compile.ops.dispatch.moe_align import AlignConfig, ScheduleConfig
from dsv4_compile.ops.dispatch.moe_combine import CombineConfig
from dsv4_compile.ops.dispatch.moe_requantize import RequantizeConfig
from dsv4_compile.ops.dispatch.quantizer import AmaxConfig, FlatConfig, RowsConfig
from dsv4_compile.ops.dispatch.topk_router import RouterConfig
from dsv4_compile.ops.dispatch.wgmma_w4 import Config as WgmmaConfig
from dsv4_compile.ops.topk_router import scores
from tests.interleaved import in_order

CTA_THREADS = 512  # of the quantisers that own rows or look for a maximum
AMAX_FLOOR = 1e-8
# Kernels that call launch_dependents after their wait; the others call it first.
STARTS_NEXT_LATE = (RowsConfig, AmaxConfig, FlatConfig, ExpandConfig, DequantizeConfig, RouterConfig, RequantizeConfig)


# What is read and written when


def span(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def early_reads(config: Any, arguments: Sequence[Any]) -> list[Tensor]:
    """What a kernel reads before ``griddepcontrol.wait``."""
    if isinstance(config, DecodeConfig) and config.mode == "dense":
        return [part for parts in arguments[3:6] for part in parts]
    if isinstance(config, DecodeConfig) and not config.has_schedule:
        return [arguments[5], arguments[6]]
    if isinstance(config, DecodeConfig) and config.has_old_schedule:
        return [arguments[i] for i in (4, 5, 6)]
    if isinstance(config, WgmmaConfig) and config.mode == "dense":
        return [part for parts in arguments[2:5] for part in parts]
    if isinstance(config, FlatConfig) and config.early:
        first, second, num_blocks, row_blocks = arguments[0], arguments[1], arguments[7], arguments[10]
        inner, *_, first_outer, first_inner, second_outer, second_inner = arguments[13:20]
        rows = num_blocks // row_blocks
        read = [_operand(first, rows, row_blocks, inner, first_outer, first_inner)]
        if config.weight is None and second.numel() and second.data_ptr() != first.data_ptr():
            read.append(_operand(second, rows, row_blocks, inner, second_outer, second_inner))
        return read
    return []


def writes(config: Any, arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors that a launch writes."""
    places: tuple[int, ...]
    if isinstance(config, DecodeConfig):
        places = {"dense": (7,), "grouped": (10,), "swiglu": (9, 10)}[config.mode]
    elif isinstance(config, WgmmaConfig):
        places = (6, 8) if config.has_amax else (6,)
    elif isinstance(config, UnalignedConfig):
        places = (6, 8) if config.is_swiglu else (6,)
    elif isinstance(config, RowsConfig):
        places = (2, 3, 4) if config.is_partial else (2, 3, 4, 5)
    else:
        places = {
            AmaxConfig: (2,), FlatConfig: (4, 5, 6), ExpandConfig: (3,), InterleaveConfig: (3,), DequantizeConfig: (3,), RouterConfig: (4, 5),
            AlignConfig: (1, 2, 3, 4, 6, 8), ScheduleConfig: (1,), CombineConfig: (3,), RequantizeConfig: (3, 4),
            expand_groups.Config: (2, 3), zero_tail.Config: (0,),
        }[type(config)]  # fmt: skip
    return [arguments[place] for place in places]


# Numerics


def _product(x: Tensor, codes: Tensor, block_scales: Tensor) -> Tensor:
    """``x @ (code * block scale).T`` in fp32, the sum exact."""
    return (x.double() @ nvfp4.scaled_codes(codes, block_scales, torch.float64).T).float()


def _e4m3(scale_bytes: Tensor) -> Tensor:
    return scale_bytes if scale_bytes.dtype == torch.float8_e4m3fn else scale_bytes.view(torch.float8_e4m3fn)


def _finite_amax(x: Tensor, granularity: str = "tensor") -> Tensor:
    """Largest finite magnitude of all, or of each row."""
    return nvfp4.finite_amax(x.float(), granularity)


def _quotient(n: Tensor, multiplier: int, shift: int) -> Tensor:
    """``numerics.quotient``."""
    assert n.numel() == 0 or int(n.max()) < 1 << 30, "more than this emulation divides"
    low = (n * (2 * (multiplier & 0xFFFF))) >> 16
    return ((n * (2 * (multiplier >> 16)) + low) >> 16) >> shift


# The products


def _check_decode_block(config: DecodeConfig, k: int) -> None:
    """What the kernel takes for granted of a block: threads, loads, steps that stages share, room for one stage."""
    block_rows = 16 * config.row_tiles * config.row_warps
    assert 32 * (config.row_warps * config.k_warps + 1) <= 1024
    assert block_rows <= 256
    assert block_rows % config.splits == 0
    assert config.splits <= 8
    assert config.stage_steps in (1, 2, 4)
    assert config.k_warps % config.stage_steps == 0 or config.stage_steps % config.k_warps == 0
    assert _decode_slots(config, k) >= 1, "no room in shared memory"


def _decode_slots(config: DecodeConfig, k: int) -> int:
    """Stages that the ring in shared memory holds for each class of warp groups, as the kernel divides it up."""
    steps = k // 256
    stages = -(-steps // config.stage_steps)
    most_steps = -(-stages // config.splits) * config.stage_steps
    block_rows = 16 * config.row_tiles * config.row_warps
    reduction = 4 * config.k_warps * config.token_slots * (block_rows + 4)
    is_copied = config.activation == "bf16" and config.mode == "dense"
    activations = config.token_slots * (most_steps * 512 + (16 if is_copied else 0))
    ring_offset = -(-(1152 + activations + reduction) // 1024) * 1024
    stage_bytes = block_rows * (128 * config.stage_steps + 16 * config.stage_steps)
    held = (config.smem_kib * 1024 - ring_offset) // stage_bytes
    return min(held, 32) // max(1, config.k_warps // config.stage_steps)


def _decode_activation(config: DecodeConfig, x: Tensor, x_scales: Tensor, rows: Tensor, k: int) -> Tensor:
    """Rows of the activation, read from contiguous memory by their number."""
    assert bool(((rows >= 0) & (rows < x.shape[0])).all()), "row of the activation out of range"
    if config.activation == "bf16":
        assert x.shape[1] == k
        return x[rows].double()
    assert x.shape[1] * 2 == k
    assert x_scales.shape[0] > int(rows.max())
    return nvfp4.scaled_codes(x[rows], x_scales[rows], torch.float64)


def _decode(name: str, config: DecodeConfig, *arguments: Any) -> None:
    (_decode_dense if config.mode == "dense" else _decode_grouped)(config, *arguments)


def _decode_dense(
    config: DecodeConfig, x: Tensor, x_scales: Tensor, row_scale: Tensor, codes: list[Tensor], scales: list[Tensor],
    global_scales: list[Tensor], bias: Tensor, out: Tensor, num_ctas: int,
) -> None:  # fmt: skip
    tokens, k = out.shape[0], 2 * codes[0].shape[1]
    assert k > 0
    assert k % 256 == 0
    assert 0 < tokens <= config.token_slots
    assert num_ctas > 0
    assert num_ctas % config.splits == 0
    assert k // 256 >= config.splits
    _check_decode_block(config, k)
    assert all(part.shape[0] for part in global_scales), "the first is read of weights without rows too"
    a = _decode_activation(config, x, x_scales, torch.arange(tokens), k)
    column = 0
    for i in range(config.num_weights):
        rows = codes[i].shape[0]
        if rows:
            segments = global_scales[i].shape[0]
            weight_scale = global_scales[i][torch.arange(rows) // (rows // segments)]
            value = _product(a, codes[i], scales[i])
            value = value * (_scale_of_rows(config, row_scale, torch.arange(tokens)) * weight_scale)
            if config.has_bias:
                value = value + bias[column : column + rows]
            out[:, column : column + rows] = value
        column += rows
    assert column == out.shape[1]


def _scale_of_rows(config: Any, row_scale: Tensor, rows: Tensor) -> Tensor:
    """The activation's global scale of rows: one a row, or one for all, or 1."""
    if not config.has_row_scale:
        return torch.ones(len(rows), 1)
    if row_scale.shape[0] > 1:
        return row_scale[rows].unsqueeze(1)
    return row_scale[:1].expand(len(rows)).unsqueeze(1)


def _tiles(schedule: Tensor, rows: int, experts: int, grid: int | None = None) -> list[list[int]]:
    """Tiles of a schedule, each (expert, first row, rows), which must lie inside."""
    count = int(schedule[0, 0])
    assert 0 <= count < schedule.shape[0], f"schedule of {schedule.shape[0] - 1} tiles says {count}"
    tiles = schedule[1 : 1 + (count if grid is None else min(count, grid)), :3].tolist()
    for expert, first, number in tiles:
        inside = 0 <= expert < experts and first >= 0 and number > 0 and first + number <= rows
        assert inside, f"tile {(expert, first, number)} outside {experts} experts, {rows} rows"
    return tiles


class _Weights:
    """``code * block scale`` of experts, each expanded once."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales, self.expanded = codes, _e4m3(scales), {}

    def product(self, x: Tensor, expert: int) -> Tensor:
        if expert not in self.expanded:
            weight = nvfp4.scaled_codes(self.codes[expert], self.scales[expert], torch.float64)
            self.expanded[expert] = weight.T.contiguous()
        return (x.double() @ self.expanded[expert]).float()


def _swiglu(
    value: Tensor, scale: Tensor, gate_scale: Tensor, up_scale: Tensor, limit: float, row_weight: Tensor | None
) -> Tensor:
    """SwiGLU of the halves of sums, scaled; times the weight of the row."""
    gate, up = value.chunk(2, dim=1)
    result = nvfp4.swiglu(gate * (scale * gate_scale), up * (scale * up_scale), limit)
    return result if row_weight is None else result * row_weight.unsqueeze(1)


def _decode_grouped(
    config: DecodeConfig, x: Tensor, x_scales: Tensor, row_scale: Tensor, sorted_slots: Tensor, schedule: Tensor,
    codes: Tensor, scales: Tensor, global_scale: Tensor, row_weight: Tensor, partial_amax: Tensor, out: Tensor,
    top_k: int, limit: float, group_rows: int, num_ctas: int,
) -> None:  # fmt: skip
    experts, rows, half_k = codes.shape
    k, is_swiglu = 2 * half_k, config.mode == "swiglu"
    assert k > 0
    assert k % 256 == 0
    assert num_ctas > 0
    assert config.splits == 1
    assert out.shape[1] == (rows // 2 if is_swiglu else rows)
    _check_decode_block(config, k)
    if config.has_schedule:
        tiles = _tiles(schedule, out.shape[0], experts)
    else:
        step = config.token_slots
        tiles = [
            [expert, expert * group_rows + start, min(group_rows - start, step)]
            for expert in range(experts)
            for start in range(0, group_rows, step)
        ]
    weights = _Weights(codes, scales)
    blocks = -(-out.shape[1] // (config.block_rows // (2 if is_swiglu else 1)))
    largest = torch.zeros(num_ctas)
    for number, (expert, first, count) in enumerate(tiles):
        assert count <= config.token_slots, f"tile of {count} rows, room for {config.token_slots}"
        at = torch.arange(first, first + count)
        source = torch.div(sorted_slots[at].long(), top_k, rounding_mode="trunc") if config.has_gather else at
        value = weights.product(_decode_activation(config, x, x_scales, source, k), expert)
        scale = _scale_of_rows(config, row_scale, at)
        if is_swiglu:
            scales_of = global_scale[expert]
            weight = row_weight[at] if config.has_row_weight else None
            result = _swiglu(value, scale, scales_of[0], scales_of[-1], limit, weight).to(out.dtype)
            # Units of work are shared out evenly: each CTA has the maximum of its own.
            width = config.block_rows // 2
            for block in range(blocks):
                cta = ((number * blocks + block + 1) * num_ctas - 1) // (len(tiles) * blocks)
                part = _finite_amax(result[:, block * width : (block + 1) * width])
                largest[cta] = torch.maximum(largest[cta], part)
        else:
            segment_rows = rows // global_scale.shape[1]
            result = value * (scale * global_scale[expert, torch.arange(rows) // segment_rows])
        out[at] = result.to(out.dtype)
    if is_swiglu:
        partial_amax[torch.arange(num_ctas)] = largest


def _wgmma(name: str, config: WgmmaConfig, *arguments: Any) -> None:
    (_wgmma_dense if config.mode == "dense" else _wgmma_grouped)(config, *arguments)


def _wgmma_rows(config: WgmmaConfig, x: Tensor) -> Tensor:
    """Activations of the wgmma kernel, in the order of K of the weights."""
    assert x.dtype == {"f16": torch.float16, "bf16": torch.bfloat16}[config.activation]
    assert config.is_interleaved or config.activation == "bf16"
    if not config.is_interleaved:
        return x
    result = torch.empty_like(x)
    result[:, in_order(torch.arange(x.shape[1]), config.activation == "f16")] = x
    return result


def _wgmma_dense(
    config: WgmmaConfig, x: Tensor, row_scale: Tensor, codes: list[Tensor], scales: list[Tensor],
    global_scales: list[Tensor], bias: Tensor, out: Tensor, num_ctas: int,
) -> None:  # fmt: skip
    tokens, k = out.shape[0], x.shape[1]
    clusters = num_ctas // config.cluster
    assert clusters > 0
    assert config.cluster <= 8
    assert k // 256 >= config.splits, "a CTA of a split has nothing to add"
    assert x.shape[0] == tokens
    if config.splits > 1:
        blocks = sum(-(-part.shape[0] // (128 * config.multicast)) for part in codes)
        assert blocks * -(-tokens // config.tile_tokens) <= clusters, "partial sums overwrite those that are still read"
    activation = _wgmma_rows(config, x)
    column = 0
    for i in range(config.num_weights):
        rows = codes[i].shape[0]
        assert rows % 8 == 0, "stores are eight columns wide"
        assert codes[i].shape[1] * 2 == k
        assert scales[i].shape == (rows, k // 16)
        segments = global_scales[i].shape[0]
        factor = global_scales[i][torch.arange(rows) // (rows // segments)]
        value = _product(activation, codes[i], scales[i])
        if config.has_row_scale:
            value = value * (row_scale[torch.arange(tokens).clamp(max=row_scale.shape[0] - 1)].unsqueeze(1) * factor)
        else:
            value = value * factor
        if config.has_bias:
            value = value + bias[column : column + rows]
        out[:, column : column + rows] = value
        column += rows
    assert column == out.shape[1]


def _wgmma_grouped(
    config: WgmmaConfig, x: Tensor, row_scale: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor,
    schedule: Tensor, out: Tensor, row_weight: Tensor, partial_amax: Tensor, limit: float, num_ctas: int,
) -> None:  # fmt: skip
    experts, rows, half_k = codes.shape
    is_swiglu = config.mode == "swiglu"
    assert config.splits == 1
    assert num_ctas // config.cluster > 0
    assert x.shape[1] == 2 * half_k
    assert out.shape[1] == (rows // 2 if is_swiglu else rows)
    assert out.shape[1] % 8 == 0, "stores are eight columns wide"
    assert config.activation == "f16"
    activation, weights = _wgmma_rows(config, x), _Weights(codes, scales)
    segments = global_scale.shape[1]
    of_row = torch.arange(rows) // (rows // segments)
    ctas = num_ctas // config.cluster * config.cluster
    blocks = -(-out.shape[1] // ((64 if is_swiglu else 128) * config.multicast))
    largest = torch.zeros(ctas)
    for number, (expert, first, count) in enumerate(_tiles(schedule, out.shape[0], experts)):
        at = torch.arange(first, first + min(count, config.tile_tokens))  # more than a tile are left out
        value = weights.product(activation[at], expert)
        factor = global_scale[min(expert, global_scale.shape[0] - 1)][of_row]
        scale = torch.ones(len(at), 1)
        if config.has_row_scale:
            scale = row_scale[at.clamp(max=row_scale.shape[0] - 1)].unsqueeze(1)
        if is_swiglu:
            weight = row_weight[at] if config.has_row_weight else None
            half = rows // 2
            result = _swiglu(value, scale, factor[:half], factor[half:], limit, weight).to(out.dtype)
            for block in range(blocks if config.has_amax else 0):
                cta = (number * blocks + block) % ctas
                largest[cta] = torch.maximum(largest[cta], _finite_amax(result[:, block * 64 : block * 64 + 64]))
        else:
            result = value * (scale * factor)
        out[at] = result.to(out.dtype)
    if config.has_amax:
        partial_amax.copy_(largest[torch.arange(partial_amax.shape[0]) % ctas])


def _unaligned(
    name: str, config: UnalignedConfig, x: Tensor, row_scale: Tensor, codes: Tensor, scales: Tensor,
    global_scales: Tensor, schedule: Tensor, out: Tensor, row_weight: Tensor, amax: Tensor, limit: float,
    max_tiles: int, blocks_of_rows: int,
) -> None:  # fmt: skip
    experts, rows = codes.shape[:2]
    columns, segments = out.shape[1], global_scales.shape[1]
    assert max_tiles > 0
    assert 0 < blocks_of_rows < 1 << 16
    assert rows == columns * (2 if config.is_swiglu else 1)
    assert scales.shape[:2] == codes.shape[:2]
    weights = _Weights(codes, scales)
    largest = torch.zeros(())
    for expert, first, count in _tiles(schedule, out.shape[0], experts, max_tiles):
        at = torch.arange(first, first + count)
        scale = row_scale[at.clamp(max=row_scale.shape[0] - 1)].unsqueeze(1)
        value = weights.product(x[at], expert)
        scales_of = global_scales[expert]
        if config.is_swiglu:
            weight = row_weight[at] if config.has_row_weight else None
            value = _swiglu(value, scale, scales_of[0], scales_of[segments - 1], limit, weight)
        else:
            value = value * (scale * scales_of[torch.arange(rows) // (rows // segments)])
        written = value.to(out.dtype)[:, : 64 * blocks_of_rows]
        out[at, : written.shape[1]] = written
        largest = torch.maximum(largest, _finite_amax(written))
    if config.is_swiglu and largest > 0:
        bits = largest.reshape(1).view(torch.int32)
        amax[:1] = torch.maximum(amax[:1], bits)  # signed, as atomicMax


# Around the products


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
        out.copy_(nvfp4.scaled_codes(codes, _e4m3(scales), torch.bfloat16))
        return
    piece = torch.arange(0, pieces, row_pieces)
    row = _quotient(piece, row_multiplier, row_shift)
    assert torch.equal(row, torch.arange(out.shape[0]))
    index = rows[row].long()
    kept = index >= 0
    source = _quotient(index[kept], index_multiplier, index_shift)
    out[kept] = nvfp4.scaled_codes(codes[source], _e4m3(scales[source]), torch.bfloat16)


def _interleave(
    name: str, config: InterleaveConfig, x: Tensor, scales: Tensor, rows: Tensor, out: Tensor, pieces: int,
    row_pieces: int, row_multiplier: int, row_shift: int, index_multiplier: int, index_shift: int,
) -> None:  # fmt: skip
    assert pieces == out.numel() // 8 > 0
    assert out.shape[1] == 8 * row_pieces
    assert out.shape[1] % 128 == 0
    row = _quotient(torch.arange(0, pieces, row_pieces), row_multiplier, row_shift)
    assert torch.equal(row, torch.arange(out.shape[0]))
    index = rows[row].long() if config.has_gather else row
    kept = index >= 0
    source = _quotient(index[kept], index_multiplier, index_shift) if config.has_gather else index
    value = x[source]
    if config.is_packed:
        assert scales.shape == (x.shape[0], out.shape[1] // 16)
        value = nvfp4.scaled_codes(value, _e4m3(scales)[source], torch.float16)
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
    flat_row = _quotient(torch.arange(0, pieces, row_pieces), row_multiplier, row_shift)
    group = _quotient(flat_row, group_multiplier, group_shift)
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
        scale = nvfp4.global_scale_from_amax(_finite_amax(x, "token"), "token")
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


# Quantisers


def _operand(start: Tensor, rows: int, row_blocks: int, inner: int, outer_pitch: int, inner_pitch: int) -> Tensor:
    """[outer, inner, K] at an address, its pitches in bytes."""
    k, size = 16 * row_blocks, start.itemsize
    assert outer_pitch % 16 == 0, "blocks are read 16 bytes at a time"
    assert inner_pitch % 16 == 0, "blocks are read 16 bytes at a time"
    assert rows % inner == 0
    return start.as_strided((rows // inner, inner, k), (outer_pitch // size, inner_pitch // size, 1))


@dataclass
class _Source:
    """The rows that a quantiser reads, and how it makes of them what is quantised."""

    op: str
    config: Any
    first: Tensor
    second: Tensor
    scalar: float
    row_blocks: int

    def factors(self) -> Tensor:
        """Of RMSNorm: ``1 / sqrt(mean(x^2) + eps)`` a row."""
        x = self.first.reshape(-1, 16 * self.row_blocks)
        total = x.double().square().sum(dim=1).float()
        mean = total / torch.full_like(total, 16.0 * self.row_blocks)
        return 1.0 / nvfp4.sqrt(mean + torch.tensor(self.scalar, dtype=torch.float32))

    def prepared(self, factors: Tensor | None = None) -> Tensor:
        """[rows, K] that are quantised."""
        k = 16 * self.row_blocks
        x = self.first.reshape(-1, k)
        if self.op == "swiglu_quantize_nvfp4":
            return nvfp4.swiglu(x, self.second.reshape(-1, k), self.scalar)
        if self.op == "rms_norm_quantize_nvfp4":
            assert factors is not None
            y = x.float() * factors.unsqueeze(1)
            if self.config.weight is not None:
                y = y * self.second.as_strided((k,), (1,)).float()
            return y.to(x.dtype)
        return x


def _source(
    name: str, config: Any, first: Tensor, second: Tensor, rows: int, row_blocks: int, geometry: Sequence[int],
    scalar: float,
) -> _Source:  # fmt: skip
    op = name.removeprefix("sm90.")
    inner, multiplier, shift, first_outer, first_inner, second_outer, second_inner = geometry
    assert rows > 0
    row = torch.arange(rows)
    assert torch.equal(_quotient(row, multiplier, shift), row // inner)
    if op == "swiglu_quantize_nvfp4":
        second = _operand(second, rows, row_blocks, inner, second_outer, second_inner)
    return _Source(
        op, config, _operand(first, rows, row_blocks, inner, first_outer, first_inner), second, scalar, row_blocks
    )


def _write_packed(x: Tensor, global_scale: Tensor, codes: Tensor, scales: Tensor) -> None:
    packed, block_scales = nvfp4.quantize_with_global_scale(x.float(), global_scale)
    assert codes.numel() == packed.numel()
    assert scales.numel() == block_scales.numel()
    codes.copy_(packed.flatten())
    scales.copy_(block_scales.view(torch.uint8).flatten())


def _rows(name: str, config: RowsConfig, first: Tensor, second: Tensor, *rest: Any) -> None:
    if config.is_partial:
        _rows_amax(name, config, first, second, *rest)
        return
    codes, scales, global_scale, norm, rows, row_blocks, *geometry, scalar, is_pow2 = rest
    groups = CTA_THREADS // config.threads
    assert config.cluster <= 16
    assert row_blocks <= config.threads * config.blocks, "a row that threads cannot hold"
    held = groups * config.rows * config.cluster
    assert config.per_token or rows <= held, f"one maximum over {rows} rows, {held} are held"
    assert config.cluster == 1 or rows <= held
    source = _source(name, config, first, second, rows, row_blocks, geometry, scalar)
    x = source.prepared(source.factors() if "rms_norm" in name else None)
    if config.per_token:
        scale = nvfp4.global_scale_from_amax(_finite_amax(x, "token"), "tensor_pow2" if is_pow2 else "token")
        global_scale[torch.arange(rows)] = scale
        _write_packed(x, scale.unsqueeze(1), codes, scales)
    else:
        scale = nvfp4.global_scale_from_amax(_finite_amax(x), "tensor_pow2" if is_pow2 else "tensor")
        global_scale[0] = scale
        _write_packed(x, scale, codes, scales)
    if config.norm:
        norm[: x.numel()] = x.flatten()


def _rows_amax(
    name: str, config: RowsConfig, first: Tensor, second: Tensor, partials: Tensor, factors: Tensor, norm: Tensor,
    rows: int, ctas: int, row_blocks: int, *rest: Any,
) -> None:  # fmt: skip
    *geometry, scalar = rest
    groups = CTA_THREADS // config.threads
    assert config.rows == 1
    assert ctas > 0
    assert row_blocks <= config.threads * config.blocks, "a row that threads cannot hold"
    source = _source(name, config, first, second, rows, row_blocks, geometry, scalar)
    factor = source.factors()
    x = source.prepared(factor)
    factors[torch.arange(rows)] = factor
    cta = torch.arange(rows) // groups % ctas
    partials[torch.arange(ctas)] = torch.zeros(ctas).scatter_reduce(0, cta, _finite_amax(x, "token"), "amax")
    if config.norm:
        norm[: x.numel()] = x.flatten()


def _amax(
    name: str, config: AmaxConfig, first: Tensor, second: Tensor, partials: Tensor, num_blocks: int, ctas: int,
    row_blocks: int, multiplier: int, shift: int, *rest: Any,
) -> None:  # fmt: skip
    *geometry, scalar = rest
    assert ctas > 0
    rows = _rows_of(num_blocks, row_blocks, multiplier, shift)
    x = _source(name, config, first, second, rows, row_blocks, geometry, scalar).prepared()
    of_block = _finite_amax(x.reshape(-1, 16), "token")
    cta = torch.arange(num_blocks) // (CTA_THREADS * config.unroll) % ctas
    partials[torch.arange(ctas)] = torch.full((ctas,), AMAX_FLOOR).scatter_reduce(0, cta, of_block, "amax")


def _rows_of(num_blocks: int, row_blocks: int, multiplier: int, shift: int) -> int:
    last = torch.tensor([num_blocks - 1])
    assert num_blocks % row_blocks == 0
    assert int(_quotient(last, multiplier, shift)) == (num_blocks - 1) // row_blocks
    return num_blocks // row_blocks


def _flat(
    name: str, config: FlatConfig, first: Tensor, second: Tensor, partials: Tensor, factors: Tensor, codes: Tensor,
    scales: Tensor, global_scale: Tensor, num_blocks: int, num_partials: int, ctas: int, row_blocks: int,
    multiplier: int, shift: int, *rest: Any,
) -> None:  # fmt: skip
    *geometry, scalar, is_pow2 = rest
    assert ctas > 0
    assert 0 < num_partials <= 384, "maxima beyond three words of four a lane are not read"
    assert num_partials % 4 == 0
    assert partials.data_ptr() % 16 == 0
    rows = _rows_of(num_blocks, row_blocks, multiplier, shift)
    source = _source(name, config, first, second, rows, row_blocks, geometry, scalar)
    x = source.prepared(factors[torch.arange(rows)] if "rms_norm" in name else None)
    bits = partials[torch.arange(num_partials)].view(torch.int32).long() & 0xFFFFFFFF
    amax = bits.amax().to(torch.int32).view(torch.float32)
    scale = nvfp4.global_scale_from_amax(amax, "tensor_pow2" if is_pow2 else "tensor")
    global_scale[0] = scale
    _write_packed(x, scale, codes, scales)


def _dequantize(
    name: str, config: DequantizeConfig, codes: Tensor, scales: Tensor, global_scales: Tensor, out: Tensor,
    pieces: int, row_multiplier: int, row_shift: int, scale_multiplier: int, scale_shift: int,
) -> None:  # fmt: skip
    assert pieces > 0
    assert out.numel() == 8 * pieces
    piece = torch.arange(pieces)
    row = _quotient(piece, row_multiplier, row_shift)
    factor = global_scales[_quotient(row, scale_multiplier, scale_shift)]
    words = codes.view(pieces, 4)
    values = nvfp4.decode_codes(words) * _e4m3(scales)[piece >> 1].float().unsqueeze(1)
    out.copy_((values * factor.unsqueeze(1)).flatten())


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
    DecodeConfig: _decode,
    WgmmaConfig: _wgmma,
    UnalignedConfig: _unaligned,
    ExpandConfig: _expand,
    InterleaveConfig: _interleave,
    expand_groups.Config: _expand_groups,
    zero_tail.Config: _zero_tail,
    AlignConfig: _align,
    ScheduleConfig: _schedule,
    CombineConfig: _combine,
    RequantizeConfig: _requantize,
    RowsConfig: _rows,
    AmaxConfig: _amax,
    FlatConfig: _flat,
    DequantizeConfig: _dequantize,
    RouterConfig: _router,
}
