"""``nvfp4_mm`` and ``nvfp4_weight_mm`` on Hopper: which kernel a product runs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import decode_mm, fresh_weights
from dsv4_compile.ops.dispatch.expand import expand
from dsv4_compile.ops.dispatch.wgmma_choice import config_of, plan
from dsv4_compile.ops.dispatch.wgmma_w4 import OUT_DTYPE_NAMES, STAGE_K, is_mappable, launch_dense
from dsv4_compile.ops.kernels.device import require_hopper, sm_count

MAX_WEIGHTS = 4  # of one launch
EXPANDED_ELEMENTS = 1 << 27  # of a weight in bf16 or a product in fp32, at a time: 256 and 512 MiB


def run_packed(
    out: Tensor,
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    b_codes: Sequence[Tensor],
    b_block_scales: Sequence[Tensor],
    b_global_scales: Sequence[Tensor],
    bias: Tensor | None,
) -> Tensor:
    """Writes ``out`` and returns it; see :func:`dsv4_compile.ops.nvfp4_mm.nvfp4_mm`."""
    require_hopper("nvfp4_mm", a_codes)
    if out.numel() == 0:
        return out
    rows, k = out.numel() // out.shape[-1], 2 * a_codes.shape[-1]
    x, x_scales = a_codes.reshape(rows, k // 2), a_block_scales.reshape(rows, k // nvfp4.BLOCK_SIZE)
    row_scale = a_global_scale.reshape(-1).contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    weights = _weights(b_codes, b_block_scales, b_global_scales)
    fresh_weights.settle(*(part for weight in weights for part in weight))
    if not _decode(x, x_scales, row_scale, weights, bias, out.view(rows, -1)):
        _multiply(expand(x, x_scales), row_scale, weights, bias, out.view(rows, -1))
    return out


def run_bf16(
    out: Tensor,
    x: Tensor,
    b_codes: Sequence[Tensor],
    b_block_scales: Sequence[Tensor],
    b_global_scales: Sequence[Tensor],
    bias: Tensor | None,
) -> Tensor:
    """Writes ``out`` and returns it; see :func:`dsv4_compile.ops.nvfp4_weight_mm.nvfp4_weight_mm`."""
    require_hopper("nvfp4_weight_mm", x)
    if out.numel() == 0:
        return out
    rows = out.numel() // out.shape[-1]
    x = x.reshape(rows, x.shape[-1])
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    weights = _weights(b_codes, b_block_scales, b_global_scales)
    fresh_weights.settle(*(part for weight in weights for part in weight))
    if not _decode(x, None, None, weights, bias, out.view(rows, -1)):
        _multiply(x, None, weights, bias, out.view(rows, -1))
    return out


def _weights(
    codes: Sequence[Tensor], block_scales: Sequence[Tensor], global_scales: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The weights that have rows."""
    return [
        (weight, scales, global_scale.reshape(-1).contiguous())
        for weight, scales, global_scale in zip(codes, block_scales, global_scales, strict=True)
        if weight.shape[0]
    ]


def _parts(
    weights: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> Iterator[tuple[slice, list[Tensor], list[Tensor], list[Tensor]]]:
    """The weights of each launch: their columns, codes, block scales and global scales."""
    column = 0
    for start in range(0, len(weights), MAX_WEIGHTS):
        codes, scales, global_scales = (list(part) for part in zip(*weights[start : start + MAX_WEIGHTS], strict=True))
        columns = slice(column, column + sum(weight.shape[0] for weight in codes))
        column = columns.stop
        yield columns, codes, scales, global_scales


def _decode(
    x: Tensor,
    x_scales: Tensor | None,
    row_scale: Tensor | None,
    weights: Sequence[tuple[Tensor, Tensor, Tensor]],
    bias: Tensor | None,
    out: Tensor,
) -> bool:
    """Runs the decode kernel, if it runs this shape."""
    k = 2 * weights[0][0].shape[1]
    activation: Literal["packed", "bf16"] = "bf16" if x_scales is None else "packed"
    configs = [
        decode_mm.choose(
            x.shape[0], [part.shape[0] for part in codes], k, activation, bias is not None, out.dtype,
            row_scale is not None,
        )
        for _, codes, _, _ in _parts(weights)
    ]  # fmt: skip
    if None in configs or not decode_mm.is_mappable(*(part for weight in weights for part in weight[:2])):
        return False
    x = decode_mm.aligned(x)
    x_scales = None if x_scales is None else decode_mm.aligned(x_scales)
    for config, (columns, codes, scales, global_scales) in zip(configs, _parts(weights), strict=True):
        assert config is not None
        decode_mm.decode_mm(
            config, x, x_scales, row_scale, codes, scales, global_scales,
            None if bias is None else bias[columns], out[:, columns],
        )  # fmt: skip
    return True


def _multiply(
    x: Tensor,
    row_scale: Tensor | None,
    weights: Sequence[tuple[Tensor, Tensor, Tensor]],
    bias: Tensor | None,
    out: Tensor,
) -> None:
    is_tiled = (
        x.shape[1] % STAGE_K == 0 and x.shape[1] > 0 and all(weight.shape[0] % 8 == 0 for weight, _, _ in weights)
    )
    if not is_tiled or not is_mappable(*(part for weight in weights for part in weight[:2])):
        _multiply_expanded(x, row_scale, weights, bias, out)
        return
    if not is_mappable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    for columns, codes, scales, global_scales in _parts(weights):
        rows = tuple(weight.shape[0] for weight in codes)
        for part in plan(x.shape[0], rows, x.shape[1], sm_count(x)):
            tokens = slice(part.first, part.first + part.tokens)
            config = config_of(
                part.variant, len(codes), row_scale is not None, bias is not None, OUT_DTYPE_NAMES[out.dtype]
            )
            one_or_each = row_scale if row_scale is None or row_scale.shape[0] == 1 else row_scale[tokens]
            part_bias = None if bias is None else bias[columns]
            launch_dense(config, x[tokens], one_or_each, codes, scales, global_scales, part_bias, out[tokens, columns])


def _multiply_expanded(
    x: Tensor,
    row_scale: Tensor | None,
    weights: Sequence[tuple[Tensor, Tensor, Tensor]],
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """For shapes that TMA cannot map: weights to bf16, a bounded number of rows at a time, and cuBLAS.

    Both operands are exact in bf16 and the sum is kept in fp32, so this is as exact as the kernels.
    """
    k = x.shape[1]
    chunk_rows = max(1, EXPANDED_ELEMENTS // max(1, k, x.shape[0]))
    column = 0
    for codes, block_scales, global_scale in weights:
        rows = codes.shape[0]
        scale = nvfp4.expand_global_scale(global_scale, (), rows).reshape(-1).expand(rows)
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, rows))
            columns = slice(column + chunk.start, column + chunk.stop)
            total = torch.mm(x, expand(codes[chunk], block_scales[chunk]).T, out_dtype=torch.float32)
            alpha = scale[chunk] if row_scale is None else row_scale.unsqueeze(1) * scale[chunk]
            total = total.mul_(alpha)
            out[:, columns] = total if bias is None else total.add_(bias[columns])
        column += rows
