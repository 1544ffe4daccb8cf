"""Router: scores, selection, gathering and normalising of routing weights become ``topk_router``.

Matches, from the logits on: ``score(logits)`` with sqrt-softplus, softmax or sigmoid; ``topk(scores)`` or
``topk(scores + bias)``, sorted or not, or the rows of a table; the scores of the selected experts by ``gather`` or as
topk's own values; divided by their sum plus an eps or not; times a scale or not.
Rewrites to: ``topk_router(logits, ...)`` and a cast of its weights to the dtype they had. The operator computes in
fp32 where a bf16 model rounds after every step, so experts whose scores differ by less than such a rounding may swap.
The steps have many optional parts, so they are walked back one by one instead of listed as patterns.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.pattern_matcher import PatternExpr

from dsv4_compile.passes.graph import CAST, VIEWS, aten, insert, match_traced, same_shape, trace_patterns, value

NAME = "topk_router"
ROUTER = torch.ops.dsv4.topk_router.default


def sqrtsoftplus(logits: Tensor) -> Tensor:
    return F.softplus(logits).sqrt()


def sigmoid(logits: Tensor) -> Tensor:
    return torch.sigmoid(logits)


def softmax(logits: Tensor) -> Tensor:
    return F.softmax(logits, dim=-1)


def softmax_over_columns(logits: Tensor) -> Tensor:
    return F.softmax(logits, dim=1)


def softmax_in_fp32(logits: Tensor) -> Tensor:
    return F.softmax(logits, dim=-1, dtype=torch.float32)


SCORES = {
    "sqrtsoftplus": (sqrtsoftplus,),
    "sigmoid": (sigmoid,),
    "softmax": (softmax, softmax_over_columns, softmax_in_fp32),
}


def _score_inputs() -> Sequence[Sequence[Tensor]]:
    return [(torch.empty(7, 5, dtype=dtype),) for dtype in (torch.bfloat16, torch.float32)]


@functools.lru_cache
def _score_patterns() -> tuple[tuple[str, PatternExpr], ...]:
    return tuple(
        (name, pattern)
        for name, functions in SCORES.items()
        for function in functions
        for pattern in trace_patterns(function, _score_inputs, shared=True)
    )


@dataclass
class _Selection:
    """How the experts were chosen: the ids' node, and what they were chosen by."""

    ids: fx.Node
    top_k: int
    topk: fx.Node | None = None
    bias: fx.Node | None = None
    hash_table: fx.Node | None = None
    token_ids: fx.Node | None = None


def apply(graph: fx.Graph) -> int:
    """Runs the pass; returns the number of routers rewritten."""
    count = 0
    for node in list(graph.nodes):
        if not node._erased and _is_selected_scores(node) and _rewrite(graph, node):
            count += 1
    if count:
        graph.eliminate_dead_code()
    return count


def _is_selected_scores(node: Any) -> bool:
    if node.target is aten.gather.default:
        return node.args[1] in (1, -1) and value(node).dim() == 2
    return node.target is operator.getitem and node.args[1] == 0 and _topk(node.args[0]) is not None


def _topk(node: Any) -> fx.Node | None:
    """``node`` when it is a topk of the largest over the last of two dimensions."""
    if not isinstance(node, fx.Node) or node.target is not aten.topk.default or value(node.args[0]).dim() != 2:
        return None
    dim, largest = (*node.args[2:4], -1, True)[:2] if len(node.args) > 2 else (-1, True)
    return node if dim in (1, -1) and (len(node.args) < 4 or largest) else None


def _rewrite(graph: fx.Graph, selected: fx.Node) -> bool:
    if selected.target is operator.getitem:
        topk = selected.args[0]
        scores, selection = topk.args[0], _from_topk(topk, topk.args[0])
    else:
        scores = selected.args[0]
        selection = _selection(selected.args[2], scores)
        if selection is not None and selection.topk is not None and _values(selection.topk):
            return False  # topk's own values would stay behind, in another order than the new ids
    found = _score(scores)
    if found is None or selection is None:
        return False
    name, logits = found
    weights, normalization, eps, scale = _weights(selected)
    arguments = (logits, selection.bias, selection.hash_table, selection.token_ids, selection.top_k)
    # As early as what it reads allows: ids may have readers before the gather.
    with graph.inserting_before(selected if selection.topk is None else selection.topk):
        router = insert(graph, ROUTER, (*arguments, name, normalization, eps, scale), like=weights)
        new_weights = insert(graph, operator.getitem, (router, 0), like=weights)
        if value(weights).dtype != torch.float32:
            new_weights = insert(graph, CAST, (new_weights, value(weights).dtype), like=weights)
        if selection.hash_table is None:
            new_ids = insert(graph, operator.getitem, (router, 1), like=weights)
            if value(selection.ids).dtype == torch.int64:
                selection.ids.replace_all_uses_with(new_ids)  # a second gather too: its order must be that of the ids
    weights.replace_all_uses_with(new_weights)
    return True


def _values(topk: fx.Node) -> bool:
    return any(user.target is operator.getitem and user.args[1] == 0 and user.users for user in topk.users)


def _score(scores: fx.Node) -> tuple[str, fx.Node] | None:
    """Name of the score function and the logits it reads."""
    for name, pattern in _score_patterns():
        match = match_traced(pattern, scores)
        if match is not None:
            logits: fx.Node = match.kwargs["logits"]
            return (name, logits) if value(logits).dim() == 2 else None
    return None


def _selection(ids: fx.Node, scores: fx.Node) -> _Selection | None:
    source: Any = ids
    while source.target is CAST:
        source = source.args[0]
    if source.target is operator.getitem and source.args[1] == 1 and (topk := _topk(source.args[0])) is not None:
        return _from_topk(topk, scores)
    if source.target is aten.index.Tensor and len(source.args[1]) == 1 and source.args[1][0] is not None:
        table, token_ids = source.args[0], source.args[1][0]
        if value(table).dim() == 2 and value(token_ids).dim() == 1:
            top_k = value(source).shape[1]
            return _Selection(ids, top_k, hash_table=table, token_ids=token_ids)
    return None


def _from_topk(topk: fx.Node, scores: fx.Node) -> _Selection | None:
    ids = next((user for user in topk.users if user.target is operator.getitem and user.args[1] == 1), None)
    if ids is None or not isinstance(topk.args[1], int):
        return None
    chosen_by: Any = topk.args[0]
    if chosen_by is scores:
        return _Selection(ids, topk.args[1], topk)
    is_sum = chosen_by.target is aten.add.Tensor and not chosen_by.kwargs
    if is_sum and scores in chosen_by.args[:2]:
        bias = chosen_by.args[1] if chosen_by.args[0] is scores else chosen_by.args[0]
        one_a_column = isinstance(bias, fx.Node) and same_shape(
            [1, *value(bias).shape][-2:], [1, value(scores).shape[1]]
        )
        while isinstance(bias, fx.Node) and bias.target in (CAST, aten.unsqueeze.default, *VIEWS):
            if not value(bias).is_floating_point():
                break
            bias = bias.args[0]
        if (
            one_a_column
            and isinstance(bias, fx.Node)
            and value(bias).is_floating_point()
            and value(bias).dim() == 1
            and same_shape(value(bias).shape, value(scores).shape[1:])
        ):
            return _Selection(ids, topk.args[1], topk, bias)
    return None


def _weights(selected: fx.Node) -> tuple[fx.Node, str, float, float]:
    """Follows the selected scores to the routing weights: the node, how they are normalised, its eps, and the scale."""
    normalization, eps, node = "none", 0.0, selected
    quotient = _divided_by_own_sum(selected)
    if quotient is not None:
        node, eps = quotient
        normalization = "sum"
    scaled = _only_reader(node, lambda user: user.target is aten.mul.Tensor and isinstance(user.args[1], (int, float)))
    if scaled is not None:
        return scaled, normalization, eps, float(scaled.args[1])
    return node, normalization, eps, 1.0


def _only_reader(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> fx.Node | None:
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if wanted(user) else None


def _is_eps(plus: fx.Node) -> bool:
    return isinstance(plus.args[1], float) and plus.args[1] >= 0 and not plus.kwargs


def _divided_by_own_sum(selected: fx.Node) -> tuple[fx.Node, float] | None:
    """The quotient ``selected / (sum(selected, -1, keepdim) + eps)`` and its eps."""
    for total in selected.users:
        if total.target is not aten.sum.dim_IntList or list(total.args[1]) not in ([-1], [1]):
            continue
        if len(total.args) < 3 or total.args[2] is not True or total.kwargs:
            continue
        plus = _only_reader(total, lambda user: user.target is aten.add.Tensor and _is_eps(user))
        divisor, eps = (plus, plus.args[1]) if plus is not None else (total, 0.0)
        quotient = _only_reader(divisor, lambda user: user.target is aten.div.Tensor)
        if quotient is not None and quotient.args[0] is selected and set(selected.users) == {total, quotient}:
            return quotient, float(eps)
    return None
