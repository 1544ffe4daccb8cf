"""Dense MoE: every expert run on every token, all but the top-k outputs multiplied by zero, becomes ``nvfp4_moe``.

Matches what the grouped_linear and swiglu passes made of ``bmm``s over tokens repeated for each expert, weighted by a
table ``zeros[T, E].scatter(1, ids, weights)`` and summed over the experts.
Rewrites to: ``nvfp4_moe(*quantize_nvfp4(x), ids, weights, gate_up, down, limit)``, k experts a token in place of all of
them. The table shows that the other outputs count for nothing; ``scatter`` keeps one weight of an id that
stands twice where the operator adds both, so the ids must come from a ``topk``, whose ids are distinct. Not where
weights multiply the input of the experts, as in Llama 4: another function.
The input of ``down`` gets its global scale from the routed rows alone, and a NaN in an output that counts for nothing
does not reach the token (in the dense form 0 * NaN does).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch._inductor.pattern_matcher import Match

from dsv4_compile.ops.nvfp4_grouped_mm import nvfp4_grouped_mm
from dsv4_compile.ops.quantize_nvfp4 import quantize_nvfp4
from dsv4_compile.ops.swiglu_quantize_nvfp4 import swiglu_quantize_nvfp4
from dsv4_compile.passes import moe
from dsv4_compile.passes.graph import Fusion, aten, same_shape, value


def example_inputs() -> Sequence[Sequence[Tensor]]:
    x, _, weights, *packed = moe.example_inputs()[0]
    return [(x, weights.new_empty(moe._TOKENS, moe._EXPERTS), *packed)]


def _expanded(x: Tensor) -> Tensor:
    return x.expand(moe._EXPERTS, moe._TOKENS, moe._HIDDEN)


def _unsqueezed(x: Tensor) -> Tensor:
    return x.unsqueeze(0).expand(moe._EXPERTS, moe._TOKENS, moe._HIDDEN)


def _repeated(x: Tensor) -> Tensor:
    return x.repeat(moe._EXPERTS, 1).view(moe._EXPERTS, moe._TOKENS, moe._HIDDEN)


def _pattern(
    rows_of: Callable[[Tensor], Tensor], table_first: bool, dim: int, granularity: str
) -> Callable[..., Tensor]:
    def pattern(
        x: Tensor,
        table: Tensor,
        gate_up_codes: Tensor,
        gate_up_block_scales: Tensor,
        gate_up_global_scale: Tensor,
        down_codes: Tensor,
        down_block_scales: Tensor,
        down_global_scale: Tensor,
        limit: float,
    ) -> Tensor:
        gate_up = (gate_up_codes, gate_up_block_scales, gate_up_global_scale)
        down = (down_codes, down_block_scales, down_global_scale)
        column = table.t().unsqueeze(dim)
        gate_and_up = nvfp4_grouped_mm(*quantize_nvfp4(rows_of(x), granularity), *gate_up, None, x.dtype)
        gate, up = gate_and_up.chunk(2, dim=-1)
        y = nvfp4_grouped_mm(*swiglu_quantize_nvfp4(gate, up, limit, granularity), *down, None, x.dtype)
        return (column * y if table_first else y * column).sum(dim=0)

    return pattern


def applies(match: Match, granularity: str) -> tuple[Any, list[Any]] | None:
    """Exact when ids are distinct and each expert sees each token once; the rest is as for the other forms of a MoE."""
    x, experts = value(match.kwargs["x"]), value(match.kwargs["gate_up_codes"]).shape[0]
    table = match.kwargs["table"]
    found = _ids_and_weights(table)
    if found is None or not same_shape(value(table).shape, (x.shape[0], experts)):
        return None
    for node in match.nodes:
        if node.target is aten.repeat.default and list(node.args[1]) != [experts, 1]:
            return None
        if node.target is aten.expand.default and not same_shape(value(node).shape, (experts, *x.shape)):
            return None
    match.kwargs["ids"], match.kwargs["weights"] = found
    return moe.applies(match, granularity)


def _ids_and_weights(table: fx.Node) -> tuple[Any, Any] | None:
    """What ``zeros.scatter(1, ids, weights)`` was made of, if the ids of a row are those of a ``topk``."""
    if table.target is not aten.scatter.src or table.args[1] not in (1, -1):
        return None
    zeros, _, ids, weights = table.args
    if zeros.target is not aten.full.default or zeros.args[1] != 0:
        return None
    if ids.target is not operator.getitem or ids.args[1] != 1 or ids.args[0].target is not aten.topk.default:
        return None
    dim = ids.args[0].args[2] if len(ids.args[0].args) > 2 else -1
    return (ids, weights) if dim in (-1, 1) else None


def build(granularity: str) -> list[Fusion]:
    """The fusion of this file for one granularity of the activation global scale."""
    patterns = [
        _pattern(rows_of, table_first, dim, granularity)
        for rows_of in (_expanded, _unsqueezed, _repeated)
        for table_first in (False, True)
        for dim in (-1, 2)
    ]
    check = functools.partial(applies, granularity=granularity)
    return [Fusion("dense_moe", patterns, example_inputs, check, scalars={"limit": moe._LIMIT})]
