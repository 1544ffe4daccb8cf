"""The ``dsv4`` backend of torch.compile: bind the weights, rewrite the graph, let Inductor compile it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.constant_folding import add_dont_constant_fold
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from dsv4_compile import ops, passes
from dsv4_compile.binding import BoundGraph, bind_weights, runner
from dsv4_compile.ops.dispatch import tuning
from dsv4_compile.options import REQUIRED_BY_BACKEND, Options
from dsv4_compile.passes import run_passes
from dsv4_compile.printing import format_graph

Observer = Callable[[fx.Graph, str, dict[str, int]], None]

log = logging.getLogger("dsv4_compile")

# Freezing would otherwise expand every weight that no pass matched to bf16 at compile time.
add_dont_constant_fold(torch.ops.dsv4.dequantize_nvfp4.default)


def _source_files() -> tuple[str, ...]:
    folders = [Path(module.__file__ or "").resolve().parent for module in (ops, passes, sys.modules[__name__])]
    return tuple(sorted(str(path) for folder in folders for path in folder.glob("*.py")))


def _as_passes(setting: Any) -> tuple[Any, ...]:
    """What ``joint_custom_pre_pass`` holds: nothing, a pass, or (torch 2.13) several."""
    if setting is None:
        return ()
    return tuple(setting) if isinstance(setting, (list, tuple)) else (setting,)


class RewriteGraph(CustomGraphPass):
    """Runs the passes on each graph that Inductor compiles, subgraphs of repeated regions included.

    Args:
        options: of the backend.
        observe: called with each graph after the passes, its program before them, and the rewrites of each pass.
    """

    def __init__(self, options: Options, observe: Observer | None = None) -> None:
        self.options = options
        self.observe = observe
        self.others = _as_passes(
            options.inductor.get("joint_custom_pre_pass", torch._inductor.config.joint_custom_pre_pass)
        )

    def __call__(self, graph: fx.Graph) -> None:
        before = format_graph(graph) if self.options.dump or self.observe is not None else ""
        counts = run_passes(graph, *self._choices())
        log.debug("passes: %s", counts)
        if self.options.dump:
            _dump(self.options.dump, before, format_graph(graph), counts)
        if self.observe is not None:
            self.observe(graph, before, counts)
        for other in self.others:
            other(graph)
        if self.options.tunes:
            from dsv4_compile.tuning import tune_graph  # imports this module

            tune_graph(graph)

    def uuid(self) -> Any:
        """Part of the key of Inductor's cache: the options, and the source of every pass and operator."""
        others = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.others]
        if self.observe is not None or self.options.dump or None in others:
            return None  # a cached graph would never be shown to the observer
        kernels = tuning.sources_digest() if self.options.tunes else ""  # other ones are timed again
        return get_hash_for_files(_source_files(), repr((self._choices(), others, kernels)))

    def _choices(self) -> tuple[str, bool, str]:
        return self.options.gsa, self.options.merge_gemms, self.options.activations


def dsv4(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a graph for inference with NVFP4 operators; what ``torch.compile(backend="dsv4")`` calls.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs, parameters included.
        mode: a torch.compile mode.
        options: see :class:`dsv4_compile.options.Options`.

    Returns:
        A function of ``gm``'s inputs.

    Raises:
        ValueError, TypeError: an option that is unknown or has a value it may not have.
        RuntimeError: gradients are wanted.
    """
    parsed = Options.parse(mode, options)
    bound = prepare(gm, example_inputs, parsed)
    compiled = compile_bound(bound, [example_inputs[index] for index in bound.kept], parsed)
    return runner(compiled, bound)


def prepare(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> BoundGraph:
    """Checks that no gradients are wanted, and binds the weights to a copy of the graph.

    Raises:
        RuntimeError: gradients are wanted.
    """
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        raise RuntimeError(
            "dsv4: inputs must not require gradients, got a call with gradients enabled; this backend is for "
            "inference only: call the compiled model under torch.inference_mode() or torch.no_grad()"
        )
    bound = bind_weights(gm, example_inputs, options)
    if bound.newly_packed:
        log.warning(
            "dsv4: packed %d plain weights to NVFP4 at compile time; dsv4_compile.quantize_(model) packs them "
            "beforehand and frees the originals",
            bound.newly_packed,
        )
    return bound


def compile_bound(
    bound: BoundGraph,
    inputs: Sequence[Any],
    options: Options,
    observe: Observer | None = None,
    **compile_options: Any,
) -> Callable[..., Any]:
    """Hands a bound graph to Inductor with the passes installed."""
    config = {
        **options.inductor_config(),
        "joint_custom_pre_pass": RewriteGraph(options, observe),
        # Constants cost nothing a call. A scalar one would be written into the code as a literal, and the cached code
        # of one checkpoint would then serve another one with that checkpoint's global scales: keep them as tensors.
        **REQUIRED_BY_BACKEND,
    }
    with torch.no_grad():
        compiled: Any = compile_fx(bound.gm, list(inputs), config_patches=config, **compile_options)
    return compiled


def _dump(target: str, before: str, after: str, counts: dict[str, int]) -> None:
    applied = ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "no rewrite"
    text = f"# before dsv4 passes\n{before}\n\n# after dsv4 passes: {applied}\n{after}\n\n"
    if target == "-":
        sys.stderr.write(text)
    else:
        with open(target, "a", encoding="utf-8") as file:
            file.write(text)
