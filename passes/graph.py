"""What several passes need of an FX graph: inserting an operator, reading a fake value, matching a traced pattern."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    GraphPatternEntry,
    Match,
    PatternExpr,
    PatternMatcherPass,
    fwd_only,
    fx_to_pattern,
    gen_pattern_and_search_gm,
)
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
dsv4 = torch.ops.dsv4

QUANTIZE = dsv4.quantize_nvfp4.default
SWIGLU_QUANTIZE = dsv4.swiglu_quantize_nvfp4.default
MM = dsv4.nvfp4_mm.default
DEQUANTIZE = dsv4.dequantize_nvfp4.default
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
CAST = torch.ops.prims.convert_element_type.default


def value(node: fx.Node) -> Tensor:
    """The fake tensor that stands for a node's result."""
    result: Tensor = node.meta["val"]
    return result


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
            items[user.args[1]] = user  # type: ignore[index, call-overload]
    return items


@dataclass(frozen=True)
class Fusion:
    """A pattern and its replacement, both traced from plain functions.

    Attributes:
        name: of the pass, for logs and reports.
        patterns: functions of tensors; each traced form is one way to write the same thing.
        example_inputs: tensors to trace them with; sizes, dtypes and devices do not bind the match.
        replacement: function of tensors, traced with the fake values of the arguments that ``applies`` returns.
        applies: proves that a match is exact. Returns the arguments of ``replacement``, or None to leave it alone.
        shared: names of arguments through which a match may share intermediate results with other readers.
    """

    name: str
    patterns: Sequence[Callable[..., Any]]
    example_inputs: Callable[[], Sequence[Sequence[Tensor]]]
    applies: Callable[[Match], tuple[Callable[..., Any], list[Any]] | None]
    shared: bool = False

    def build(self) -> Callable[[fx.Graph], int]:
        """Traces the patterns and returns the pass: a function of a graph that returns its number of rewrites."""
        matcher = PatternMatcherPass(pass_name=self.name)
        seen: set[str] = set()
        for pattern_function in self.patterns:
            for inputs in self.example_inputs():
                pattern = _trace(pattern_function, inputs)
                if self.shared:
                    _allow_other_readers(pattern)
                if repr(pattern) not in seen:
                    seen.add(repr(pattern))
                    entry = GraphPatternEntry(pattern=pattern, extra_check=self._is_exact, handler=self._rewrite)
                    entry.register(matcher)
        return matcher.apply  # type: ignore[return-value]

    def _is_exact(self, match: Match) -> bool:
        # The matcher passes over keyword arguments that the pattern does not have, such as addmm's alpha and beta.
        return not any(node.kwargs for node in match.nodes) and self.applies(match) is not None

    def _rewrite(self, match: Match, *args: Any, **kwargs: Any) -> None:
        prepared = self.applies(match)
        assert prepared is not None
        replacement, arguments = prepared
        match.replace_by_example(replacement, arguments)


def _trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> PatternExpr:
    """The pattern of a traced function: dtypes and devices match anything, other constants (dims) only themselves."""
    traced = gen_pattern_and_search_gm(function, inputs, fwd_only)[1]
    names = [*inspect.signature(function).parameters]
    return fx_to_pattern(traced, ignore_types=(torch.device, torch.dtype), argnames=names)


def _allow_other_readers(pattern: PatternExpr) -> None:
    """Lets every intermediate of a pattern have readers outside it; they keep it alive."""
    for argument in getattr(pattern, "flat_args_kwargs", ((),))[0]:
        if isinstance(argument, PatternExpr) and hasattr(argument, "users"):
            argument.users = MULTIPLE
            _allow_other_readers(argument)
