"""``dsv4-compile warm``: compiles every GPU kernel that a model needs, before it is served and with no GPU at hand."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from dsv4_compile.backend import compile_bound, prepare
from dsv4_compile.meta_device import meta_constants
from dsv4_compile.ops.dispatch.wgmma_choice import VARIANTS
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.compilation import ARCHITECTURES
from dsv4_compile.ops.registration import CUDA_IMPLEMENTATIONS, NAMESPACE
from dsv4_compile.options import Options

Kernel = tuple[str, Any]  # module below ops/kernels, and its configuration

MAX_TOKENS = 16384
# A prime that divides no width of a model: what is divisible by it in a traced graph is a number of rows.
TRACED_TOKENS = 1009


@dataclass(frozen=True)
class Call:
    """A call of an operator with meta tensors."""

    op: OpOverload
    arguments: tuple[Any, ...]

    def at(self, tokens: int) -> Call:
        """The call, traced at :data:`TRACED_TOKENS` tokens, at another number of them; strides keep their order."""

        def scaled(size: int) -> int:
            return size // TRACED_TOKENS * tokens if size % TRACED_TOKENS == 0 else size

        def resized(x: Tensor) -> Tensor:
            shape, strides = [scaled(size) for size in x.shape], [scaled(stride) for stride in x.stride()]
            return torch.empty_strided(shape, strides, dtype=x.dtype, device="meta")

        return Call(self.op, pytree.tree_map_only(Tensor, resized, self.arguments))


def token_counts(max_tokens: int = MAX_TOKENS) -> list[int]:
    """Numbers of tokens for which kernels are looked up: all up to 64, then multiples of the smallest tile."""
    smallest = min(variant.tile_tokens for variant in VARIANTS)
    return sorted({*range(1, min(64, max_tokens) + 1), *range(64, max_tokens + 1, smallest), max_tokens})


def model_calls(model: Any, options: Mapping[str, Any] | None = None) -> list[Call]:
    """The distinct operator calls of a causal language model on the meta device, at :data:`TRACED_TOKENS` tokens."""
    parsed = Options.parse(None, options)
    calls: dict[str, Call] = {}

    def observe(graph: fx.Graph, before: str, counts: dict[str, int]) -> None:
        for call in calls_of(graph.nodes):
            calls.setdefault(str(call), call)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        bound = prepare(gm, example_inputs, parsed)
        compile_bound(bound, [example_inputs[i] for i in bound.kept], parsed, observe, inner_compile=_generate_nothing)
        return gm.forward  # eager, on the meta device

    input_ids = torch.zeros((1, TRACED_TOKENS), dtype=torch.long, device="meta")
    torch._dynamo.reset()
    with torch.inference_mode(), meta_constants(input_ids):
        torch.compile(model, backend=backend)(input_ids, use_cache=False)
    torch._dynamo.reset()
    return list(calls.values())


def _generate_nothing(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    return gm.forward


def calls_of(nodes: Iterable[fx.Node]) -> list[Call]:
    """The calls of our operators among the nodes of a traced graph; of a size that is a symbol, its hint."""
    with torch.utils._python_dispatch._disable_current_modes():  # not fake tensors of the trace
        return [
            Call(node.target, fx.map_arg(node.args, _as_meta))
            for node in nodes
            if isinstance(node.target, OpOverload) and node.target.namespace == NAMESPACE
        ]


def _as_meta(node: fx.Node) -> Any:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return value
    shape, strides = ([_hint(size) for size in sizes] for sizes in (value.shape, value.stride()))
    return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def kernels_of(calls: Iterable[Call], tokens: Sequence[int]) -> tuple[list[Kernel], set[str]]:
    """The kernels that the calls run at those numbers of tokens, and the operators that have none."""
    wanted: dict[Kernel, None] = {}
    without: set[str] = set()
    for call in calls:
        implementation = CUDA_IMPLEMENTATIONS.get(call.op)
        if implementation is None:
            without.add(call.op._schema.name.removeprefix(f"{NAMESPACE}::"))
            continue
        for count in tokens:
            with cache.recording() as recorded:
                implementation(*call.at(count).arguments)
            wanted.update(recorded)
    return list(wanted), without


@dataclass(frozen=True)
class WarmReport:
    """What :func:`warm` did.

    Attributes:
        folder: the cache, which can be copied to a machine with neither cutlass nor a compiler.
        compiled: kernels compiled now.
        found: kernels that were there.
        num_bytes: size of all of them.
        without_kernel: operators of the model that have no kernel for the architecture.
    """

    folder: Path
    compiled: int
    found: int
    num_bytes: int
    without_kernel: tuple[str, ...]


def warm(
    model: Any,
    *,
    arch: str = "sm_90a",
    max_tokens: int = MAX_TOKENS,
    options: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    console: Console | None = None,
) -> WarmReport:
    """Compiles what a model needs for up to ``max_tokens`` tokens a call into the kernel cache.

    Args:
        model: a causal language model on the meta device, see :func:`dsv4_compile.cli.model_on_meta`.
        arch: ``sm_90a``; others have no kernels in this version.
        max_tokens: the most tokens of one call.
        options: of the dsv4 backend, those the model will be compiled with.
        jobs: compiling processes; by default one a core, at most 8.
        console: where progress is shown.

    Raises:
        ValueError: an architecture without kernels, or numbers below 1.
        RuntimeError: cutlass or a C compiler is missing.
    """
    if arch != ARCHITECTURES["sm90"]:
        raise ValueError(f"warm: arch must be {ARCHITECTURES['sm90']}, the only one with kernels, got {arch!r}")
    for name, value in (("max_tokens", max_tokens), ("jobs", 1 if jobs is None else jobs)):
        if value < 1:
            raise ValueError(f"warm: {name} must be at least 1, got {value}")
    console = console or Console(stderr=True)
    with console.status("tracing the model"):
        calls = model_calls(model, options)
        kernels, without = kernels_of(calls, token_counts(max_tokens))
    missing = [kernel for kernel in kernels if cache.find(*kernel) is None]
    compile_all(missing, jobs or min(8, os.cpu_count() or 1), console)
    entries = [cache.ensure(*kernel) for kernel in kernels]
    return WarmReport(
        folder=cache.folder(),
        compiled=len(missing),
        found=len(kernels) - len(missing),
        num_bytes=sum(entry.stat().st_size for entry in entries),
        without_kernel=tuple(sorted(without)),
    )


def _leave_it_to_the_bar() -> None:
    """In a compiling process: no line of its own for each kernel, which would tear the progress bar."""
    logging.getLogger("dsv4_compile").setLevel(logging.ERROR)


def compile_all(kernels: Sequence[Kernel], jobs: int, console: Console) -> None:
    """Compiles kernels into the cache in ``jobs`` processes, with a progress bar."""
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling kernels", total=len(kernels))
        if jobs == 1 or len(kernels) <= 1:
            for kernel in kernels:
                progress.update(task, description=kernel[0])
                cache.ensure(*kernel)
                progress.advance(task)
            return
        # Spawned, not forked: torch and the DSL hold threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(kernels)), context, initializer=_leave_it_to_the_bar) as pool:
            futures = {pool.submit(cache.ensure, *kernel): kernel for kernel in kernels}
            for future in as_completed(futures):
                future.result()
                progress.update(task, advance=1, description=futures[future][0])
