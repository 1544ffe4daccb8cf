"""What several passes need of an FX graph: inserting an operator, reading a fake value, matching a traced pattern."""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._inductor import pattern_matcher
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    GraphPatternEntry,
    Ignored,
    KeywordArg,
    Match,
    MultiOutputPattern,
    PatternExpr,
    PatternMatcherPass,
    fwd_only,
    fx_to_pattern,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
dsv4 = torch.ops.dsv4

QUANTIZE = dsv4.quantize_nvfp4.default
SWIGLU_QUANTIZE = dsv4.swiglu_quantize_nvfp4.default
MM = dsv4.nvfp4_mm.default
WEIGHT_MM = dsv4.nvfp4_weight_mm.default
GROUPED_MM = dsv4.nvfp4_grouped_mm.default
MOE = dsv4.nvfp4_moe.default
DEQUANTIZE = dsv4.dequantize_nvfp4.default
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
CAST = torch.ops.prims.convert_element_type.default


def value(node: fx.Node) -> Tensor:
    """The fake tensor that stands for a node's result."""
    result: Tensor = node.meta["val"]
    return result


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    """The calls of an operator in the order of the graph, which ``find_nodes`` does not keep in torch 2.11."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target is target]


def insert(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """Appends ``target(*args)`` at the graph's insertion point, with its fake value and ``like``'s provenance."""
    node = graph.call_function(target, args)
    node.meta.update(
        {key: item for key, item in like.meta.items() if key not in ("val", "tensor_meta", "eager_input_vals")}
    )
    node.meta["val"] = target(*fx.map_arg(args, lambda argument: argument.meta["val"]))
    return node


def same_shape(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes, symbolic or not, are known to be equal without a new guard."""
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))


def outputs(node: fx.Node) -> list[fx.Node | None]:
    """The ``getitem`` nodes of a node with three results, None where one is not read."""
    items: list[fx.Node | None] = [None, None, None]
    for user in node.users:
        if user.target is operator.getitem:
            items[user.args[1]] = user
    return items


@dataclass(frozen=True)
class Fusion:
    """A pattern and its replacement, both traced from plain functions.

    Every number in a pattern must be the same in the graph, but for the sizes of views and the captured scalars; dtypes
    and devices are left to ``applies``.

    Attributes:
        name: of the pass, for logs and reports.
        patterns: functions of tensors and of the captured scalars; each traced form is one way to write the same.
        example_inputs: sets of tensors to trace them with; sizes, dtypes and devices do not bind the match.
        applies: proves that a match is exact. Returns the replacement, a function that is traced with the fake values
            of its arguments, and the arguments; or None to leave the match alone.
        scalars: names of the scalars to capture, each with an example value that occurs nowhere else in the pattern.
        shared: intermediate results of a match may have other readers.
    """

    name: str
    patterns: Sequence[Callable[..., Any]]
    example_inputs: Callable[[], Sequence[Sequence[Tensor]]]
    applies: Callable[[Match], tuple[Callable[..., Any], list[Any]] | None]
    scalars: Mapping[str, float] = field(default_factory=dict)
    shared: bool = False

    def build(self) -> Callable[[fx.Graph], int]:
        """Traces the patterns and returns the pass: a function of a graph that returns its number of rewrites."""
        matcher = PatternMatcherPass(pass_name=self.name)
        for function in self.patterns:
            for pattern in trace_patterns(function, self.example_inputs, self.scalars, self.shared):
                entry = GraphPatternEntry(pattern=pattern, extra_check=self._is_exact, handler=self._rewrite)
                entry.register(matcher)

        def apply(graph: fx.Graph) -> int:
            # The matcher passes over nodes that Inductor cannot generate code for, those on the meta device among them,
            # on which explain looks at models without allocating them.
            with mock.patch.object(pattern_matcher, "fallback_node_due_to_unsupported_type", return_value=False):
                count: int = matcher.apply(graph)
            if count:  # what a rewrite leaves behind would read the inputs of the next one
                graph.eliminate_dead_code()
            return count

        return apply

    def _is_exact(self, match: Match) -> bool:
        return _has_no_other_keywords(match) and self.applies(match) is not None

    def _rewrite(self, match: Match, *args: Any, **kwargs: Any) -> None:
        prepared = self.applies(match)
        assert prepared is not None  # extra_check asked before
        replacement, arguments = prepared
        match.replace_by_example(replacement, arguments)


# Arguments that are sizes or dimensions, by position: those of the example bind nothing, ``applies`` looks at shapes.
_SIZE_ARGUMENTS = {
    **dict.fromkeys(VIEWS, (1,)),
    aten.expand.default: (1,),
    aten.split.Tensor: (1,),
    aten.histc.default: (1, 2, 3),
    aten.ge.Scalar: (1,),
    aten.clamp_max.default: (1,),
    aten.mean.dim: (1,),
    aten.empty.memory_format: (0,),
    aten.repeat.default: (1,),
    torch.ops.prims.iota.default: (0,),
}


def trace_patterns(
    function: Callable[..., Any],
    example_inputs: Callable[[], Sequence[Sequence[Tensor]]],
    scalars: Mapping[str, float] | None = None,
    shared: bool = False,
) -> list[PatternExpr]:
    """The patterns of a function: one for each way in which it traces with the example inputs."""
    patterns: dict[str, PatternExpr] = {}
    # In a fake mode of our own: with real tensors an operator would run, on uninitialised ids, say; and the mode that
    # is active while Inductor compiles is not ours to mix with.
    with _disable_current_modes(), torch._guards.tracing(None), FakeTensorMode():
        graphs = [_trace(function, inputs, scalars or {}) for inputs in example_inputs()]
    for traced in graphs:
        text = re.sub(r"torch\.(bfloat16|float16|float32)", "dtype", str(traced.graph))
        if text not in patterns:
            patterns[text] = pattern = _pattern(traced, function, scalars or {})
            for part in _parts(pattern):
                # A view of an input is no intermediate result: its size, for one, is read where shapes are dynamic.
                of_input = part.fns[0] in VIEWS and isinstance(part.args[0], KeywordArg)
                part.users = MULTIPLE if (shared or of_input) and part is not pattern else part.users
    return list(patterns.values())


def match_traced(pattern: PatternExpr, node: fx.Node) -> Match | None:
    """Matches one pattern against one node."""
    match = pattern.match(node)
    return match if isinstance(match, Match) and _has_no_other_keywords(match) else None


def _has_no_other_keywords(match: Match) -> bool:
    # The matcher passes over keyword arguments that the pattern does not have, such as addmm's alpha and beta.
    calls = match.ctx.pattern_to_node.items()
    return all(not set(node.kwargs) - set(part.kwargs) for part, node in calls if isinstance(part, CallFunction))


def _captured(function: Callable[..., Any], scalars: Mapping[str, float]) -> dict[str, float]:
    return {name: example for name, example in scalars.items() if name in inspect.signature(function).parameters}


def _trace(function: Callable[..., Any], inputs: Sequence[Tensor], scalars: Mapping[str, float]) -> fx.GraphModule:
    return fwd_only(functools.partial(function, **_captured(function, scalars)), list(inputs))


def _pattern(traced: fx.GraphModule, function: Callable[..., Any], scalars: Mapping[str, float]) -> PatternExpr:
    captured = _captured(function, scalars)
    pattern = fx_to_pattern(
        traced,
        ignore_types=(torch.dtype, torch.device),
        argnames=[name for name in inspect.signature(function).parameters if name not in captured],
        scalar_workaround=captured,
    )
    for part in _parts(pattern):
        sizes = _SIZE_ARGUMENTS.get(part.fns[0], ())
        if sizes:
            part.args = tuple(Ignored() if index in sizes else arg for index, arg in enumerate(part.args))
            part.flatten = part.simple_flatten
            part.flat_args_kwargs = part.flatten(part.args, part.kwargs)
    return pattern


def _parts(pattern: Any) -> list[Any]:
    """Every operator call in a pattern, each once."""
    found: list[Any] = []
    waiting = list(pattern.outputs) if isinstance(pattern, MultiOutputPattern) else [pattern]
    while waiting:
        part = waiting.pop()
        if isinstance(part, CallFunction) and not any(part is other for other in found):
            found.append(part)
            waiting.extend(part.flat_args_kwargs[0])
    return found
