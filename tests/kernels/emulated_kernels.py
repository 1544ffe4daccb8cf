"""What each Hopper kernel does with the arguments of a launch, in plain torch: see :mod:`tests.kernels.emulation`.

Written from the kernels' sources. A schedule, an index or a pitch is read as the kernel reads it; rows that it leaves
unwritten stay so. Asserted is what a kernel takes for granted. Of ``nvfp4`` only the numerics are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from tests.interleaved import in_order
from tests.kernels import emulated_moe, emulated_quantizers
from tests.kernels.emulated_numerics import e4m3
from tests.kernels.emulated_numerics import finite_amax as _finite_amax
from tests.kernels.emulated_quantizers import operand

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
        read = [operand(first, rows, row_blocks, inner, first_outer, first_inner)]
        if config.weight is None and second.numel() and second.data_ptr() != first.data_ptr():
            read.append(operand(second, rows, row_blocks, inner, second_outer, second_inner))
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


# The products


def _product(x: Tensor, codes: Tensor, block_scales: Tensor) -> Tensor:
    """``x @ (code * block scale).T`` in fp32, the sum exact."""
    return (x.double() @ nvfp4.scaled_codes(codes, block_scales, torch.float64).T).float()


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
        self.codes, self.scales, self.expanded = codes, e4m3(scales), {}

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
    clusters = num_ctas // config.splits
    assert clusters > 0
    assert config.splits <= 8
    assert k // 256 >= config.splits, "a CTA of a split has nothing to add"
    assert x.shape[0] == tokens
    if config.splits > 1:
        blocks = sum(-(-part.shape[0] // 128) for part in codes)
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
    assert num_ctas // config.splits > 0
    assert x.shape[1] == 2 * half_k
    assert out.shape[1] == (rows // 2 if is_swiglu else rows)
    assert out.shape[1] % 8 == 0, "stores are eight columns wide"
    assert config.activation == "f16"
    activation, weights = _wgmma_rows(config, x), _Weights(codes, scales)
    segments = global_scale.shape[1]
    of_row = torch.arange(rows) // (rows // segments)
    ctas = num_ctas // config.splits * config.splits
    blocks = -(-out.shape[1] // 64)  # of SwiGLU's columns
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


KERNELS: dict[type, Callable[..., None]] = {
    DecodeConfig: _decode,
    WgmmaConfig: _wgmma,
    UnalignedConfig: _unaligned,
    **emulated_moe.KERNELS,
    **emulated_quantizers.KERNELS,
}
