"""Merged GEMMs: products of one quantised activation with several weights become one call.

Matches: ``nvfp4_mm`` or ``nvfp4_weight_mm`` nodes with the same activation and output dtype, all with a bias or all
without, whose weights are inputs of the graph. Not one whose result, or a view of it, leaves the graph: the model's own
product is contiguous, and both eager code behind a graph break and the caller of a repeated region rely on that.
Rewrites to: one such node over the list of weights, and a slice of its columns for each. No weight is copied, each
keeps its own global scale. Exact: a column does not depend on its neighbours.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch._ops import OpOverload

from dsv4_compile.passes.graph import MM, VIEWS, WEIGHT_MM, aten, calls, insert, value

NAME = "merge_gemms"
# The number of arguments in front of the three lists of weights; after those come the bias and the output dtype.
ACTIVATION_ARGUMENTS = {MM: 3, WEIGHT_MM: 1}


def apply(graph: fx.Graph) -> int:
    """Runs the pass; returns the number of products that were merged into another."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in [*calls(graph, MM), *calls(graph, WEIGHT_MM)]:
        activation, lists, bias, out_dtype = _arguments(node)
        weights = [*lists[0], *lists[1], *lists[2], *([bias] if bias is not None else [])]
        if _all_inputs(weights) and not _is_returned(node):
            groups.setdefault((node.target, *activation, bias is None, out_dtype), []).append(node)
    merged = [group for group in groups.values() if len(group) > 1]
    for group in merged:
        _merge(graph, group)
    return sum(len(group) - 1 for group in merged)


def _arguments(node: fx.Node) -> tuple[tuple[Any, ...], tuple[Any, ...], Any, Any]:
    """Activation, the three lists of weights, bias, output dtype."""
    first = ACTIVATION_ARGUMENTS[node.target]
    return node.args[:first], node.args[first : first + 3], node.args[first + 3], node.args[first + 4]


def _all_inputs(nodes: list[Any]) -> bool:
    return all(node.op in ("placeholder", "get_attr") for node in nodes)


def _is_returned(node: fx.Node) -> bool:
    return any(user.op == "output" or (_is_view(user) and _is_returned(user)) for user in node.users)


def _is_view(node: fx.Node) -> bool:
    if node.target in (operator.getitem, *VIEWS):
        return True
    return isinstance(node.target, OpOverload) and any(
        result.alias_info is not None for result in node.target._schema.returns
    )


def _merge(graph: fx.Graph, group: list[fx.Node]) -> None:
    first = group[0]
    activation, _, first_bias, out_dtype = _arguments(first)
    weights = [[part for node in group for part in _arguments(node)[1][index]] for index in range(3)]
    with graph.inserting_before(first):
        bias = None
        if first_bias is not None:
            bias = insert(graph, aten.cat.default, ([_arguments(node)[2] for node in group],), like=first)
        merged = insert(graph, first.target, (*activation, *weights, bias, out_dtype), like=first)
        dim, start = value(merged).dim() - 1, 0
        for node in group:
            stop = start + value(node).shape[-1]
            columns = insert(graph, aten.slice.Tensor, (merged, dim, start, stop), like=node)
            node.replace_all_uses_with(columns)
            start = stop
    for node in group:
        graph.erase_node(node)
