"""``nvfp4_mm`` and ``nvfp4_weight_mm`` on Hopper: which kernel a product runs on."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import decode_choice, decode_mm, fresh_weights, tuning, wgmma_choice
from dsv4_compile.ops.dispatch.alignment import aligned
from dsv4_compile.ops.dispatch.expand import expand
from dsv4_compile.ops.dispatch.interleave import interleave
from dsv4_compile.ops.dispatch.wgmma_choice import (
    FEW_ELEMENTS,
    FEW_TOKENS,
    INTERLEAVED_TOKENS,
    Activation,
    Part,
    config_of,
    plan,
)
from dsv4_compile.ops.dispatch.wgmma_w4 import OUT_DTYPE_NAMES, STAGE_K, is_mappable, launch_dense
from dsv4_compile.ops.kernels.device import require_hopper, sm_count

MAX_WEIGHTS = 4  # of one launch
PLAN = "wgmma by estimate"  # the launches of wgmma_choice.plan
ACTIVATIONS: dict[torch.dtype, Activation] = {torch.float16: "f16", torch.bfloat16: "bf16"}
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
    weights = _weights(b_codes, b_block_scales, b_global_scales)
    _multiply(x, x_scales, row_scale, weights, bias, out.view(rows, -1))
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
    weights = _weights(b_codes, b_block_scales, b_global_scales)
    _multiply(x.reshape(rows, x.shape[-1]), None, None, weights, bias, out.view(rows, -1))
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


def _multiply(
    x: Tensor,
    x_scales: Tensor | None,
    row_scale: Tensor | None,
    weights: Sequence[tuple[Tensor, Tensor, Tensor]],
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """``out = (x * x_scales) @ weights.T`` times the global scales, plus ``bias``.

    Args:
        x: uint8 [M, K/2] with ``x_scales`` [M, K/16], or bf16 [M, K] without.
        row_scale: fp32, one or [M]; None for 1.
        weights: codes, block scales and 1-D global scales of each.
        bias: [N] or None.
        out: [M, N].
    """
    fresh_weights.settle(*(part for weight in weights for part in weight))
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    read_by_decode = decode_mm.is_mappable(*(part for weight in weights for part in weight[:2]))
    k = 2 * weights[0][0].shape[1]
    is_tiled = k % STAGE_K == 0 and k > 0 and all(weight.shape[0] % 8 == 0 for weight, _, _ in weights)
    read_by_wgmma = is_tiled and is_mappable(*(part for weight in weights for part in weight[:2]))
    is_interleaved = x_scales is not None or x.shape[0] <= INTERLEAVED_TOKENS
    ready: Tensor | None = None
    for columns, codes, scales, global_scales in _parts(weights):
        question = _question(
            x.shape[0], tuple(weight.shape[0] for weight in codes), k, "bf16" if x_scales is None else "packed",
            bias is not None, out.dtype, row_scale is not None, sm_count(x), read_by_decode, read_by_wgmma,
        )  # fmt: skip
        variant = None if question is None else tuning.answer(question, x)
        part_bias, part_out = None if bias is None else bias[columns], out[:, columns]
        if isinstance(variant, decode_mm.Config):
            x = aligned(x)
            x_scales = None if x_scales is None else aligned(x_scales)
            decode_mm.decode_mm(variant, x, x_scales, row_scale, codes, scales, global_scales, part_bias, part_out)
            continue
        if variant is None:
            expanded = x if x_scales is None else expand(x, x_scales)
            _multiply_expanded(expanded, row_scale, codes, scales, global_scales, part_bias, part_out)
            continue
        if ready is None and is_interleaved:
            ready = interleave(x, x_scales)
        elif ready is None:
            ready = x if is_mappable(x) else x.clone(memory_format=torch.contiguous_format)
        _multiply_wgmma(
            variant, is_interleaved, ready, row_scale, codes, scales, global_scales, part_bias, part_out
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _question(
    tokens: int,
    weight_rows: tuple[int, ...],
    k: int,
    activation: Literal["packed", "bf16"],
    has_bias: bool,
    out_dtype: torch.dtype,
    has_row_scale: bool,
    sms: int,
    read_by_decode: bool,
    read_by_wgmma: bool,
) -> tuning.Question | None:
    """What may run a launch: configurations of the decode kernel, plans of the wgmma kernel; None where neither can."""
    variants: dict[str, decode_mm.Config | tuple[Part, ...]] = {}
    default = None
    shape = (tokens, weight_rows, k, activation, has_bias, out_dtype, has_row_scale)
    if read_by_decode and (default := decode_choice.choose(*shape)) is not None:
        variants = {config.block_name: config for config in (default, *decode_choice.variants(*shape))}
    if read_by_wgmma:
        products: tuple[int, tuple[int, ...], int, int, Activation]
        products = (tokens, weight_rows, k, sms, "f16" if activation == "packed" else "bf16")
        variants |= {v.name: (Part(0, tokens, v),) for v in wgmma_choice.variants(*products)}
        variants[PLAN] = plan(*products)
    if not variants:
        return None
    rows = "+".join(str(rows) for rows in weight_rows)
    key = (
        f"product {tuning.bucket(tokens)} x {rows} x {k} {activation} {decode_mm.OUT_DTYPE_NAMES[out_dtype]}"
        f"{' bias' if has_bias else ''}{'' if read_by_decode else ' gaps'}"
    )
    is_many = tokens > FEW_TOKENS and sum(weight_rows) * k > FEW_ELEMENTS
    if default is None or (read_by_wgmma and is_many):
        return tuning.Question(key, variants, PLAN)
    return tuning.Question(key, variants, default.block_name)


def _multiply_wgmma(
    parts: Sequence[Part],
    is_interleaved: bool,
    x: Tensor,
    row_scale: Tensor | None,
    codes: Sequence[Tensor],
    block_scales: Sequence[Tensor],
    global_scales: Sequence[Tensor],
    bias: Tensor | None,
    out: Tensor,
) -> None:
    for part in parts:
        tokens = slice(part.first, part.first + part.tokens)
        config = config_of(
            part.variant, len(codes), row_scale is not None, bias is not None, OUT_DTYPE_NAMES[out.dtype],
            ACTIVATIONS[x.dtype], is_interleaved,
        )  # fmt: skip
        one_or_each = row_scale if row_scale is None or row_scale.shape[0] == 1 else row_scale[tokens]
        launch_dense(config, x[tokens], one_or_each, codes, block_scales, global_scales, bias, out[tokens])


def _multiply_expanded(
    x: Tensor,
    row_scale: Tensor | None,
    codes: Sequence[Tensor],
    block_scales: Sequence[Tensor],
    global_scales: Sequence[Tensor],
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """For shapes that TMA cannot map: weights to bf16, a bounded number of rows at a time, and cuBLAS.

    Both operands are exact in bf16 and the sum is kept in fp32, so this is as exact as the kernels.
    """
    chunk_rows = max(1, EXPANDED_ELEMENTS // max(1, *x.shape))
    column = 0
    for weight, scales, global_scale in zip(codes, block_scales, global_scales, strict=True):
        rows = weight.shape[0]
        scale = nvfp4.expand_global_scale(global_scale, (), rows).reshape(-1).expand(rows)
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, rows))
            columns = slice(column + chunk.start, column + chunk.stop)
            total = torch.mm(x, expand(weight[chunk], scales[chunk]).T, out_dtype=torch.float32)
            alpha = scale[chunk] if row_scale is None else row_scale.unsqueeze(1) * scale[chunk]
            total = total.mul_(alpha)
            out[:, columns] = total if bias is None else total.add_(bias[columns])
        column += rows
