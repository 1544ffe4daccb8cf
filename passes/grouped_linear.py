"""Grouped linear: a batch of matrix products, each with its own packed weight, becomes ``nvfp4_grouped_mm``.

Matches: ``bmm(x, dequantize(w).view(G, N, K).transpose(1, 2))``, DeepSeek V4's o_a_proj, whose groups lie one under
the other in a 2-D weight; the same with a stacked weight [G, N, K], as models have it that run every expert on every
token; each with an optional cast of the weight (autocast).
Rewrites to: ``nvfp4_grouped_mm(*quantize_nvfp4(x), w)`` with static groups. The view splits rows of the weight only, so
codes and block scales are viewed the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.pattern_matcher import Match

from dsv4_compile.ops.dequantize_nvfp4 import dequantize_nvfp4
from dsv4_compile.ops.nvfp4_grouped_mm import nvfp4_grouped_mm
from dsv4_compile.ops.quantize_nvfp4 import quantize_nvfp4
from dsv4_compile.passes.graph import Fusion, value

_GROUPS, _ROWS, _K = 2, 16, 32


def bmm_rows(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    weight = dequantize_nvfp4(codes, block_scales, global_scale, x.dtype)
    return torch.bmm(x, weight.view(_GROUPS, _ROWS, _K).transpose(1, 2))


def bmm_rows_cast_weight(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    weight = dequantize_nvfp4(codes, block_scales, global_scale, torch.float32)
    return torch.bmm(x, weight.view(_GROUPS, _ROWS, _K).transpose(1, 2).to(x.dtype))


def bmm_stack(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    return torch.bmm(x, dequantize_nvfp4(codes, block_scales, global_scale, x.dtype).transpose(1, 2))


def bmm_stack_cast_weight(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    weight = dequantize_nvfp4(codes, block_scales, global_scale, torch.float32)
    return torch.bmm(x, weight.to(x.dtype).transpose(1, 2))


def bmm_stack_cast_transposed_weight(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    weight = dequantize_nvfp4(codes, block_scales, global_scale, torch.float32)
    return torch.bmm(x, weight.transpose(1, 2).to(x.dtype))


def _inputs(*rows: int) -> Sequence[Sequence[Tensor]]:
    codes = torch.empty(*rows, _K // 2, dtype=torch.uint8)
    block_scales = torch.empty(*rows, _K // 16, dtype=torch.float8_e4m3fn)
    return [(torch.empty(_GROUPS, 8, _K, dtype=torch.bfloat16), codes, block_scales, torch.empty(rows[:-1]))]


def rows_inputs() -> Sequence[Sequence[Tensor]]:
    x, codes, block_scales, _ = _inputs(_GROUPS * _ROWS)[0]
    return [(x, codes, block_scales, torch.empty(()))]


def stack_inputs() -> Sequence[Sequence[Tensor]]:
    return _inputs(_GROUPS, _ROWS)


def replacement(
    x: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    *,
    groups: int,
    granularity: str,
    out_dtype: torch.dtype,
) -> Tensor:
    if codes.dim() == 2:
        codes = codes.view(groups, -1, codes.shape[-1])
        block_scales = block_scales.view(groups, -1, block_scales.shape[-1])
    quantized = quantize_nvfp4(x, granularity)
    return nvfp4_grouped_mm(*quantized, codes, block_scales, global_scale, None, out_dtype)


def applies(match: Match, granularity: str) -> tuple[Any, list[Any]] | None:
    """Exact when the view splits rows only, and one global scale serves all of them."""
    arguments = [match.kwargs[name] for name in ("x", "codes", "block_scales", "global_scale")]
    product = match.output_node()
    x, codes, _, global_scale = (value(node) for node in arguments)
    rows_of_x, _, contracted = x.shape
    if contracted != 2 * codes.shape[-1] or not isinstance(rows_of_x, int):
        return None
    if codes.dim() == 2 and (global_scale.dim() != 0 or codes.shape[0] % rows_of_x != 0):
        return None
    if codes.dim() == 3 and codes.shape[0] != rows_of_x:
        return None
    options = {"groups": rows_of_x, "granularity": granularity, "out_dtype": value(product).dtype}
    return functools.partial(replacement, **options), arguments


def build(granularity: str) -> list[Fusion]:
    """The fusions of this file for one granularity of the activation global scale."""
    check = functools.partial(applies, granularity=granularity)
    stack = (bmm_stack, bmm_stack_cast_weight, bmm_stack_cast_transposed_weight)
    return [
        Fusion("grouped_linear", (bmm_rows, bmm_rows_cast_weight), rows_inputs, check, shared=True),
        Fusion("grouped_linear_stack", stack, stack_inputs, check, shared=True),
    ]
