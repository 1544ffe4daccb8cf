"""``dsv4-compile tune``: times the variants of each product of a model on this GPU and keeps the fastest.

What is found lies beside the kernels (:mod:`dsv4_compile.ops.dispatch.tuning`) and is used by every later process on
the same model of GPU, on request or not. ``torch.compile(model, backend="dsv4", mode="max-autotune")`` does the same
for the shapes of each graph that it compiles.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dsv4_compile.ops.dispatch import tuning
from dsv4_compile.ops.dispatch.tuning import Answer, Question
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import require_hopper
from dsv4_compile.ops.registration import CUDA_IMPLEMENTATIONS
from dsv4_compile.timing import copies_beyond_l2, time_variants
from dsv4_compile.warming import Call, Kernel, calls_of, compile_all, model_calls

log = logging.getLogger("dsv4_compile")

TOKENS = (1, 2, 4, 8, 16, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LEAST_GAIN = 0.02  # of the table's time; less is noise
# Of a row, against the table's variant: a rounding to bf16 is 2^-9, codes of a second quantisation may differ by more.
LARGEST_DIFFERENCE = 2.0**-6


@dataclass(frozen=True)
class TuneReport:
    """What :func:`tune` did.

    Attributes:
        gpu: the model of GPU; empty if variants were only compiled.
        path: the file of answers.
        answers: of the products that were timed, by their keys.
        found: products whose answers were there.
        compiled: kernels compiled now.
        untried: variants that could not be compiled here.
        wrong: variants, with their products, whose result was not the table's; never chosen.
    """

    gpu: str
    path: Path | None
    answers: Mapping[str, Answer]
    found: int
    compiled: int
    untried: int
    wrong: tuple[str, ...]

    def table(self) -> Table:
        """The products whose answer is not the table's, and their times."""
        table = Table(
            "product", "variant", "us", "table's variant", "us", title=f"faster than the table's on {self.gpu}"
        )
        for key, answer in sorted(self.answers.items()):
            if answer.variant != answer.default:
                times = f"{answer.us:.2f}", f"{answer.default_us:.2f}"
                table.add_row(key, answer.variant, times[0], answer.default, times[1])
        return table

    def summary(self) -> str:
        """What was done, in a line or two."""
        if self.path is None:
            return f"{self.compiled} kernels compiled in {cache.folder()}"
        changed = sum(answer.variant != answer.default for answer in self.answers.values())
        lines = [
            f"{len(self.answers)} products timed, {changed} of them changed, {self.found} known before; {self.path}",
            f"{self.compiled} kernels compiled" + (f", {self.untried} variants not tried" if self.untried else ""),
        ]
        return "\n".join([*lines, *(f"wrong result, never used: {name}" for name in self.wrong)])


def tune(
    model: Any,
    *,
    tokens: Sequence[int] = TOKENS,
    options: Mapping[str, Any] | None = None,
    compile_only: bool = False,
    again: bool = False,
    jobs: int | None = None,
    console: Console | None = None,
) -> TuneReport:
    """Times every variant of every product of a model on the current GPU.

    Args:
        model: a causal language model on the meta device, see :func:`dsv4_compile.cli.model_on_meta`.
        tokens: the numbers of tokens of a call; an answer serves those up to an eighth of a power of two below.
        options: of the dsv4 backend, those the model will be compiled with.
        compile_only: compile the variants into the kernel cache, for a machine without a compiler; needs no GPU.
        again: time what has an answer too.
        jobs: compiling processes; by default one a core, at most 8.
        console: where progress is shown.

    Raises:
        ValueError: numbers below 1, or no GPU to time on.
        RuntimeError: a GPU without kernels; with ``compile_only``, cutlass or a C compiler is missing.
    """
    for name, values in (("tokens", tokens), ("jobs", [1 if jobs is None else jobs])):
        if not values or min(values) < 1:
            raise ValueError(f"tune: {name} must be at least 1, got {list(values)}")
    if not compile_only and not torch.cuda.is_available():
        raise ValueError(
            "tune: compile_only (--compile-only) must be set where no CUDA device is, got False: variants are compiled "
            "there, and timed where there is one"
        )
    console = console or Console(stderr=True)
    with console.status("tracing the model"):
        calls = [call.at(count) for call in model_calls(model, options) for count in tokens]
    return tune_calls(calls, compile_only=compile_only, again=again, jobs=jobs, console=console)


def tune_graph(graph: fx.Graph) -> None:
    """Times the variants of the products of a traced graph that run on a GPU, one after the other in this process."""
    on_gpu = [node for node in graph.nodes if getattr(node.meta.get("val"), "is_cuda", False)]
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        tune_calls(calls_of(on_gpu), jobs=1, console=Console(stderr=True))


def tune_calls(
    calls: Iterable[Call],
    *,
    compile_only: bool = False,
    again: bool = False,
    jobs: int | None = None,
    console: Console,
) -> TuneReport:
    """Times every variant of the products of some calls; see :func:`tune`."""
    gpu = "" if compile_only else _gpu()
    asked = questions_of(calls)
    known = {} if compile_only or again else tuning.answers(gpu)
    wanted = {key: entry for key, entry in asked.items() if key not in known}
    kernels = {
        key: {name: kernels_of_variant(call, question, name) for name in question.variants}
        for key, (call, question) in wanted.items()
    }
    every = dict.fromkeys(kernel for variants in kernels.values() for needed in variants.values() for kernel in needed)
    missing = [kernel for kernel in every if cache.find(*kernel) is None]
    try:
        compile_all(missing, jobs or min(8, os.cpu_count() or 1), console)
        unavailable: set[Kernel] = set()
    except RuntimeError as error:
        if compile_only:
            raise
        unavailable = {kernel for kernel in missing if cache.find(*kernel) is None}
        log.warning("tune: variants that need %d kernels are left out: %s", len(unavailable), error)

    answers: dict[str, Answer] = {}
    untried, wrong = 0, []
    with Progress(console=console, disable=compile_only or not wanted) as progress:
        for key, (call, question) in progress.track(wanted.items(), description="timing products"):
            names = [n for n, needed in kernels[key].items() if unavailable.isdisjoint(needed)]
            untried += len(question.variants) - len(names)
            if compile_only or question.default not in names:
                continue
            try:
                answers[key], different = _measure(call, question, names)
            except torch.OutOfMemoryError:
                log.warning(
                    "tune: not enough memory on the GPU for the operands of %s; it keeps the table's variant", key
                )
                continue
            wrong += [f"{key}: {name}" for name in different]
    for name in wrong:
        log.error(
            "tune: a variant differs from the table's by more than %g and is not used: %s", LARGEST_DIFFERENCE, name
        )
    path = None if compile_only else tuning.record(gpu, answers) if answers else tuning.path_of(gpu)
    return TuneReport(
        gpu, path, answers, len(asked) - len(wanted), len(missing) - len(unavailable), untried, tuple(wrong)
    )


def _gpu() -> str:
    require_hopper("tune", torch.empty(0, device="cuda"))
    return torch.cuda.get_device_name()


def questions_of(calls: Iterable[Call]) -> dict[str, tuple[Call, Question]]:
    """What the calls leave open, by key, each with the first call that asks it."""
    found: dict[str, tuple[Call, Question]] = {}
    for call in calls:
        if (implementation := CUDA_IMPLEMENTATIONS.get(call.op)) is None:
            continue
        with cache.recording(), tuning.asking() as asked:
            implementation(*call.arguments)
        for key, question in asked.items():
            found.setdefault(key, (call, question))
    return found


def kernels_of_variant(call: Call, question: Question, name: str) -> list[Kernel]:
    """The kernels that a call runs when a question of it is answered by a variant."""
    with cache.recording() as recorded, tuning.forced(question.key, name):
        CUDA_IMPLEMENTATIONS[call.op](*call.arguments)
    return list(recorded)


def _measure(call: Call, question: Question, names: Sequence[str]) -> tuple[Answer, list[str]]:
    """The answer to a question, and the variants with another result than the table's."""
    implementation = CUDA_IMPLEMENTATIONS[call.op]
    first = operands(call, seed=0)
    num_bytes = sum(x.numel() * x.element_size() for x in pytree.tree_leaves(first) if isinstance(x, Tensor))
    copies = [first, *(operands(call, seed) for seed in range(1, copies_beyond_l2(num_bytes)))]

    def run(name: str, arguments: Sequence[Any]) -> Tensor:
        with tuning.forced(question.key, name):
            result: Tensor = implementation(*arguments)
            return result

    expected = _poisoned(partial(run, question.default, first))
    right = [name for name in names if _is_close(_poisoned(partial(run, name, first)), expected)]
    times = time_variants({name: [partial(run, name, arguments) for arguments in copies] for name in right})
    best = min(right, key=lambda name: times[name].median_us)
    default_us = times[question.default].median_us
    if times[best].median_us > (1 - LEAST_GAIN) * default_us:
        best = question.default
    answer = Answer(best, times[best].median_us, question.default, default_us)
    return answer, [name for name in names if name not in right]


def _poisoned(run: Callable[[], Tensor]) -> Tensor:
    """A result whose memory held NaN before: an element that is not written shows."""
    was_on, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    try:
        return run()
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    """Whether each row differs by little of the row's norm; NaN differs."""
    difference = (actual.double() - expected.double()).norm(dim=-1)
    return bool((difference <= LARGEST_DIFFERENCE * expected.double().norm(dim=-1)).all())


def operands(call: Call, seed: int, device: str = "cuda") -> tuple[Any, ...]:
    """Random operands of a call: any codes, block scales near 1, tokens that each choose distinct experts at random."""
    generator = torch.Generator(device).manual_seed(seed)
    names = [argument.name for argument in call.op._schema.arguments]
    shapes = dict(zip(names, call.arguments, strict=False))

    def fill(name: str, like: Tensor) -> Tensor:
        x = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        if like.dtype == torch.uint8:
            x.random_(0, 256, generator=generator)
        elif like.dtype == torch.float8_e4m3fn:
            x.view(torch.uint8).random_(0x28, 0x48, generator=generator)  # 2^-2 to 2^2
        elif name == "topk_ids":
            experts = shapes["gate_up_codes"].shape[0]
            chances = torch.rand(like.shape[0], experts, generator=generator, device=device)
            x.copy_(chances.topk(min(experts, like.shape[1]), dim=-1).indices)
        elif name == "offsets":
            rows, groups = shapes["a_codes"].shape[0], like.shape[0]
            x.copy_(
                torch.randint(groups, (rows,), generator=generator, device=device).bincount(minlength=groups).cumsum(0)
            )
        elif "global_scale" in name:
            x.uniform_(0.5e-2, 2e-2, generator=generator)
        else:
            x.normal_(generator=generator)
        return x

    return tuple(
        pytree.tree_map_only(Tensor, partial(fill, name), argument)
        for name, argument in zip(names, call.arguments, strict=False)
    )
