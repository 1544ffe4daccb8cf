"""Experts: products of sorted or gathered rows with their expert's packed weight become ``nvfp4_grouped_mm``.

Matches: ``_grouped_mm(x, dequantize(w).transpose(-2, -1), offsets)``, HuggingFace's ``grouped_mm`` experts; and
``bmm(dequantize(w)[ids], x.unsqueeze(-1)).squeeze(-1)``, its ``batched_mm`` experts, which copy a weight for each row.
Rewrites to: ``nvfp4_grouped_mm(*quantize_nvfp4(x), w, offsets)``; the second form sorts the quantised rows by expert,
and puts the results back in place. Ids of the second form are those of an index, so all of them are in range.
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

_EXPERTS, _ROWS, _K = 4, 16, 32


def grouped(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor, offsets: Tensor) -> Tensor:
    weight = dequantize_nvfp4(codes, block_scales, global_scale, x.dtype)
    return torch._grouped_mm(x, weight.transpose(-2, -1), offsets)


def gathered(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor, ids: Tensor) -> Tensor:
    weight = dequantize_nvfp4(codes, block_scales, global_scale, x.dtype)
    return torch.bmm(weight[ids], x.unsqueeze(-1)).squeeze(-1)


def _inputs(last: Tensor) -> Sequence[Sequence[Tensor]]:
    codes = torch.empty(_EXPERTS, _ROWS, _K // 2, dtype=torch.uint8)
    block_scales = torch.empty(_EXPERTS, _ROWS, _K // 16, dtype=torch.float8_e4m3fn)
    return [(torch.empty(8, _K, dtype=torch.bfloat16), codes, block_scales, torch.empty(_EXPERTS), last)]


def grouped_inputs() -> Sequence[Sequence[Tensor]]:
    return _inputs(torch.empty(_EXPERTS, dtype=torch.int32))


def gathered_inputs() -> Sequence[Sequence[Tensor]]:
    return _inputs(torch.empty(8, dtype=torch.int64))


def grouped_replacement(
    x: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    offsets: Tensor,
    *,
    granularity: str,
    out_dtype: torch.dtype,
) -> Tensor:
    quantized = quantize_nvfp4(x, granularity)
    return nvfp4_grouped_mm(*quantized, codes, block_scales, global_scale, offsets, out_dtype)


def gathered_replacement(
    x: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    ids: Tensor,
    *,
    granularity: str,
    out_dtype: torch.dtype,
) -> Tensor:
    quantized = quantize_nvfp4(x, granularity)
    return gathered_mm(quantized, (codes, block_scales, global_scale), ids, out_dtype)


Packed = tuple[Tensor, Tensor, Tensor]


def gathered_mm(x: Packed, weight: Packed, ids: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Row s of ``x`` [S, K] times the weight of expert ``ids[s]``: rows sorted by expert, results put back in place."""
    x_codes, x_block_scales, x_global_scale = x
    sorted_ids, order = torch.sort(ids)
    experts = torch.arange(weight[0].shape[0], device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    x_block_scales = x_block_scales.view(torch.uint8)[order].view(torch.float8_e4m3fn)  # fp8 has no index kernel
    if x_global_scale.dim():
        x_global_scale = x_global_scale[order]
    y = nvfp4_grouped_mm(x_codes[order], x_block_scales, x_global_scale, *weight, offsets, out_dtype)
    return y[torch.argsort(order)]


def applies(match: Match, last: str, replacement: Any, granularity: str) -> tuple[Any, list[Any]] | None:
    """Exact for stacked experts [E, N, K] and rows [S, K]: the weight is read by this product only as it stands."""
    arguments = [match.kwargs[name] for name in ("x", "codes", "block_scales", "global_scale", last)]
    x, codes, index = value(arguments[0]), value(arguments[1]), value(arguments[4])
    if codes.dim() != 3 or x.dim() != 2 or index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        return None
    options = {"granularity": granularity, "out_dtype": value(match.output_node()).dtype}
    return functools.partial(replacement, **options), arguments


def build(granularity: str) -> list[Fusion]:
    """The fusions of this file for one granularity of the activation global scale."""
    forms = (
        ("experts_grouped", grouped, grouped_inputs, "offsets", grouped_replacement),
        ("experts_gathered", gathered, gathered_inputs, "ids", gathered_replacement),
    )
    return [
        Fusion(
            name,
            (pattern,),
            inputs,
            functools.partial(applies, last=last, replacement=replacement, granularity=granularity),
            shared=True,
        )
        for name, pattern, inputs, last, replacement in forms
    ]
