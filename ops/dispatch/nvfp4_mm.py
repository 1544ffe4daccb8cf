"""``nvfp4_mm`` and ``nvfp4_weight_mm`` on Hopper: which kernel a product runs on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch.expand import expand
from dsv4_compile.ops.dispatch.wgmma_w4 import OUT_DTYPE_NAMES, STAGE_K, TILE_TOKENS, Config, is_mappable, launch_dense
from dsv4_compile.ops.kernels.device import require_hopper

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
    x = expand(a_codes.reshape(rows, k // 2), a_block_scales.reshape(rows, k // nvfp4.BLOCK_SIZE))
    _multiply(x, a_global_scale.reshape(-1), b_codes, b_block_scales, b_global_scales, bias, out.view(rows, -1))
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
    _multiply(x.reshape(rows, x.shape[-1]), None, b_codes, b_block_scales, b_global_scales, bias, out.view(rows, -1))
    return out


def _multiply(
    x: Tensor,
    row_scale: Tensor | None,
    codes: Sequence[Tensor],
    block_scales: Sequence[Tensor],
    global_scales: Sequence[Tensor],
    bias: Tensor | None,
    out: Tensor,
) -> None:
    row_scale = None if row_scale is None else row_scale.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    weights = [
        (weight, scales, global_scale.reshape(-1).contiguous())
        for weight, scales, global_scale in zip(codes, block_scales, global_scales, strict=True)
        if weight.shape[0]
    ]
    is_tiled = (
        x.shape[1] % STAGE_K == 0 and x.shape[1] > 0 and all(weight.shape[0] % 8 == 0 for weight, _, _ in weights)
    )
    if not is_tiled or not is_mappable(*(part for weight in weights for part in weight[:2])):
        return _multiply_expanded(x, row_scale, weights, bias, out)
    if not is_mappable(x):
        x = x.contiguous() if not x.is_contiguous() else x.clone()
    column = 0
    for start in range(0, len(weights), MAX_WEIGHTS):
        part = weights[start : start + MAX_WEIGHTS]
        columns = slice(column, column + sum(weight.shape[0] for weight, _, _ in part))
        column = columns.stop
        config = choose(
            x.shape[0], [weight.shape[0] for weight, _, _ in part], row_scale is not None, bias is not None, out.dtype
        )
        launch_dense(
            config,
            x,
            row_scale,
            [weight for weight, _, _ in part],
            [scales for _, scales, _ in part],
            [global_scale for _, _, global_scale in part],
            None if bias is None else bias[columns],
            out[:, columns],
        )
    return None


def choose(
    tokens: int, weight_rows: Sequence[int], has_row_scale: bool, has_bias: bool, out_dtype: torch.dtype
) -> Config:
    """The variant for a number of tokens and the rows of the weights."""
    tile_tokens = next((size for size in TILE_TOKENS if size >= tokens), TILE_TOKENS[-1])
    return Config(
        mode="dense",
        tile_tokens=tile_tokens,
        num_weights=len(weight_rows),
        multicast=2 if tile_tokens >= 128 else 1,
        has_row_scale=has_row_scale,
        has_bias=has_bias,
        out_dtype=OUT_DTYPE_NAMES[out_dtype],  # type: ignore[arg-type]
    )


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
