"""Looks inside a compilation: the graphs before and after the passes, with or without Inductor's code generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dsv4_compile.backend import compile_bound, prepare
from dsv4_compile.binding import BoundGraph, runner
from dsv4_compile.options import Options
from dsv4_compile.printing import format_graph


@dataclass
class Rewritten:
    """One graph that went through the passes.

    Attributes:
        before: the functional ATen program, see :func:`dsv4_compile.printing.format_graph`.
        after: the program after the passes.
        counts: rewrites of each pass, those with none left out.
        graph: the rewritten graph, valid while the capture runs and afterwards.
        bound: the weights it reads.
    """

    before: str
    after: str
    counts: dict[str, int]
    graph: fx.Graph
    bound: BoundGraph


@dataclass
class Capture:
    """A backend that records what the passes do: ``torch.compile(model, backend=Capture())``.

    Args:
        options: of the dsv4 backend.
        codegen: let Inductor generate code; by default the rewritten graph is run node by node, which takes
            milliseconds to compile and is what the generated code must agree with.
    """

    options: Mapping[str, Any] | None = None
    codegen: bool = False
    graphs: list[Rewritten] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        options = Options.parse(None, self.options)
        bound = prepare(gm, example_inputs, options)

        def observe(graph: fx.Graph, before: str, counts: dict[str, int]) -> None:
            counts = {name: count for name, count in counts.items() if count}
            self.graphs.append(Rewritten(before, format_graph(graph), counts, graph, bound))

        inner = {} if self.codegen else {"inner_compile": _run_node_by_node}
        inputs = [example_inputs[index] for index in bound.kept]
        return runner(compile_bound(bound, inputs, options, observe, **inner), bound)


def _run_node_by_node(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    def run(inputs: list[Any]) -> Any:
        arguments = tuple(inputs)
        inputs.clear()
        return gm(*arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def capture(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, Any] | None = None,
    codegen: bool = False,
    **kwargs: Any,
) -> tuple[Any, list[Rewritten]]:
    """Compiles ``model``, calls it once under inference mode, and returns its result and the rewritten graphs.

    Example:
        >>> result, (graph,) = capture(mlp, x)
        >>> print(graph.after)
    """
    recorder = Capture(options, codegen)
    torch._dynamo.reset()
    with torch.inference_mode():
        result = torch.compile(model, backend=recorder, **kwargs)(*inputs)
    return result, recorder.graphs
