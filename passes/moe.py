"""MoE: sorting, gathering, two grouped products, SwiGLU, weighting and summing become one ``nvfp4_moe``.

Matches what the experts and swiglu passes made of HuggingFace's expert implementations, from the rows that are gathered
to the sum over a token's experts: ``grouped_mm`` and ``batched_mm``, with and without the masks of expert parallelism.
Rewrites to: ``nvfp4_moe(*quantize_nvfp4(x), ids, weights, gate_up, down, limit)``, routing weight after down.
Tokens are quantised before they are gathered: the same values, since a row's codes do not depend on its place, and the
same global scale where every token is routed (under expert parallelism it is that of all tokens, not of those routed
here). No intermediate may have another reader.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.pattern_matcher import Match

from dsv4_compile.ops.nvfp4_grouped_mm import nvfp4_grouped_mm
from dsv4_compile.ops.nvfp4_moe import nvfp4_moe
from dsv4_compile.ops.quantize_nvfp4 import quantize_nvfp4
from dsv4_compile.ops.swiglu_quantize_nvfp4 import swiglu_quantize_nvfp4
from dsv4_compile.passes.experts import Packed, gathered_mm
from dsv4_compile.passes.graph import Fusion, aten, same_shape, value

PARTS = ("codes", "block_scales", "global_scale")
NAMES = (*(f"gate_up_{part}" for part in PARTS), *(f"down_{part}" for part in PARTS))

# Example sizes, all different, so that a captured scalar stands for one thing only.
_TOKENS, _TOP_K, _EXPERTS, _HIDDEN, _INTERMEDIATE = 7, 3, 5, 64, 32
_LIMIT = 7.25


def example_inputs() -> Sequence[Sequence[Tensor]]:
    def packed(rows: int, k: int) -> Packed:
        codes = torch.empty(_EXPERTS, rows, k // 2, dtype=torch.uint8)
        return codes, torch.empty(_EXPERTS, rows, k // 16, dtype=torch.float8_e4m3fn), torch.empty(_EXPERTS)

    return [
        (
            torch.empty(_TOKENS, _HIDDEN, dtype=torch.bfloat16),
            torch.empty(_TOKENS, _TOP_K, dtype=torch.int64),
            torch.empty(_TOKENS, _TOP_K, dtype=weights),
            *packed(2 * _INTERMEDIATE, _HIDDEN),
            *packed(_HIDDEN, _INTERMEDIATE),
        )
        for weights in (torch.bfloat16, torch.float32)
    ]


def sorted_form(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Packed,
    down: Packed,
    top_k: int,
    limit: float,
    mask: bool,
    gsa: str,
) -> Tensor:
    """Rows sorted by expert, offsets from a histogram; ``mask``: rows of experts that live elsewhere are zeroed."""
    sorted_ids, order = torch.sort(ids.reshape(-1))
    rows = x[torch.div(order, top_k, rounding_mode="floor")]
    row_weights = weights.reshape(-1)[order]
    counts = torch.histc(sorted_ids.float(), bins=_EXPERTS, min=0, max=_EXPERTS - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    elsewhere = (sorted_ids >= _EXPERTS).unsqueeze(-1)
    if mask:
        rows = rows.masked_fill(elsewhere, 0.0)
    gate_and_up = nvfp4_grouped_mm(*quantize_nvfp4(rows, gsa), *gate_up, offsets, x.dtype)
    if mask:
        gate_and_up = gate_and_up.masked_fill(elsewhere, 0.0)
    gate, up = gate_and_up.chunk(2, dim=-1)
    y = nvfp4_grouped_mm(*swiglu_quantize_nvfp4(gate, up, limit, gsa), *down, offsets, x.dtype)
    if mask:
        y = y.masked_fill(elsewhere, 0.0)
    y = y * row_weights.unsqueeze(-1)
    inverse = torch.empty_like(order).index_put((order,), torch.arange(order.shape[0], device=order.device))
    return y[inverse].view(_TOKENS, _TOP_K, _HIDDEN).sum(dim=1)


def gathered_form(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Packed,
    down: Packed,
    top_k: int,
    limit: float,
    mask: bool,
    gsa: str,
) -> Tensor:
    """A copy of the token for each of its experts; ``mask``: ids of experts that live elsewhere are clamped, and do not
    count."""
    row_ids, row_weights = ids.reshape(-1), weights.reshape(-1)
    elsewhere = row_ids >= _EXPERTS
    if mask:
        row_ids, row_weights = row_ids.clamp(0, _EXPERTS - 1), row_weights.masked_fill(elsewhere, 0.0)
    return _gathered(x, row_ids, row_weights, gate_up, down, limit, gsa)


def clamped_form(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Packed,
    down: Packed,
    top_k: int,
    limit: float,
    mask: bool,
    gsa: str,
) -> Tensor:
    """The same in transformers before 5.23: ids are always clamped, and do count."""
    return _gathered(x, ids.reshape(-1).clamp(0, _EXPERTS - 1), weights.reshape(-1), gate_up, down, limit, gsa)


def _gathered(
    x: Tensor, row_ids: Tensor, row_weights: Tensor, gate_up: Packed, down: Packed, limit: float, gsa: str
) -> Tensor:
    rows = x.repeat_interleave(_TOP_K, dim=0)
    gate, up = gathered_mm(quantize_nvfp4(rows, gsa), gate_up, row_ids, x.dtype).chunk(2, dim=-1)
    y = gathered_mm(swiglu_quantize_nvfp4(gate, up, limit, gsa), down, row_ids, x.dtype)
    return (y * row_weights.unsqueeze(-1)).view(_TOKENS, _TOP_K, _HIDDEN).sum(dim=1)


FORMS = (
    (sorted_form, False),
    (sorted_form, True),
    (gathered_form, False),
    (gathered_form, True),
    (clamped_form, False),
)


def _pattern(form: Callable[..., Tensor], mask: bool, cast: bool, granularity: str) -> Callable[..., Tensor]:
    def pattern(
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up_codes: Tensor,
        gate_up_block_scales: Tensor,
        gate_up_global_scale: Tensor,
        down_codes: Tensor,
        down_block_scales: Tensor,
        down_global_scale: Tensor,
        top_k: int,
        limit: float,
    ) -> Tensor:
        gate_up = (gate_up_codes, gate_up_block_scales, gate_up_global_scale)
        down = (down_codes, down_block_scales, down_global_scale)
        y = form(x, ids, weights, gate_up, down, top_k, limit, mask, granularity)
        return y.to(torch.bfloat16) if cast else y

    return pattern


def replacement(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_codes: Tensor,
    gate_up_block_scales: Tensor,
    gate_up_global_scale: Tensor,
    down_codes: Tensor,
    down_block_scales: Tensor,
    down_global_scale: Tensor,
    *,
    limit: float,
    granularity: str,
    out_dtype: torch.dtype,
    clamp: bool,
) -> Tensor:
    quantized = quantize_nvfp4(x, granularity)
    if clamp:  # the operator leaves ids out of range out
        ids = ids.clamp(0, gate_up_codes.shape[0] - 1)
    gate_up = (gate_up_codes, gate_up_block_scales, gate_up_global_scale)
    down = (down_codes, down_block_scales, down_global_scale)
    return nvfp4_moe(*quantized, ids, weights, *gate_up, *down, limit, "after_down", granularity, out_dtype)


def applies(match: Match, granularity: str) -> tuple[Any, list[Any]] | None:
    """Exact when the sizes that the pattern leaves open are those of one MoE: k, the experts, the halves of gate_up."""
    arguments = [match.kwargs[name] for name in ("x", "ids", "weights", *NAMES)]
    x, ids, weights, gate_up, _, gate_up_scale, down, _, down_scale = (value(argument) for argument in arguments)
    result = value(match.output_node())
    experts = gate_up.shape[0]
    if (
        x.dim() != 2
        or ids.dim() != 2
        or not same_shape(ids.shape, weights.shape)
        or not same_shape(result.shape, x.shape)
    ):
        return None
    if down.shape[0] != experts or down_scale.dim() != 1 or gate_up_scale.dim() not in (1, 2):
        return None
    if gate_up_scale.dim() == 2 and gate_up_scale.shape[1] != 2:
        return None
    for node in match.nodes:
        if node.target is aten.histc.default and list(node.args[1:]) != [experts, 0, experts - 1]:
            return None
        if node.target is aten.ge.Scalar and node.args[1] != experts:
            return None
        if node.target is aten.clamp_max.default and node.args[1] != experts - 1:
            return None
        if node.target is aten.split.Tensor and 2 * node.args[1] != gate_up.shape[1]:
            return None
    if match.kwargs.get("top_k", ids.shape[1]) != ids.shape[1]:
        return None
    targets = {node.target for node in match.nodes}
    options = {
        "limit": match.kwargs["limit"],
        "granularity": granularity,
        "out_dtype": result.dtype,
        "clamp": aten.clamp_max.default in targets and aten.ge.Scalar not in targets,  # clamped, not masked
    }
    return functools.partial(replacement, **options), arguments


def build(granularity: str) -> list[Fusion]:
    """The fusion of this file for one granularity of the activation global scale."""
    patterns = [_pattern(form, mask, cast, granularity) for form, mask in FORMS for cast in (False, True)]
    check = functools.partial(applies, granularity=granularity)
    return [Fusion("moe", patterns, example_inputs, check, scalars={"top_k": _TOP_K, "limit": _LIMIT})]
