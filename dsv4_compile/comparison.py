"""``compare``: where two models of one architecture part, module by module."""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsv4_compile.quantization import matching_pattern

WHOLE_MODEL = "(model)"
_ELEMENTS_AT_ONCE = 1 << 20  # that are widened to fp64 at a time


@dataclass
class Difference:
    """Sums over pairs of outputs, reference and other; figures come from the sums.

    Attributes:
        signal, noise: sums of squares of the reference and of the difference.
        other, product: sums of squares of the other output, and of the products of both.
        equal, integers: how many integers (ids of experts, say) are equal, and how many there are.
    """

    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    product: float = 0.0
    equal: int = 0
    integers: int = 0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Adds one pair of equal shapes."""
        if not reference.is_floating_point():
            self.equal += int((reference == other).sum())
            self.integers += reference.numel()
            return
        for a, b in zip(*(x.reshape(-1).split(_ELEMENTS_AT_ONCE) for x in (reference, other)), strict=True):
            wide_a, wide_b = a.to(torch.float64), b.to(torch.float64)
            if not bool(wide_a.isfinite().all()):  # masks hold -Inf on purpose: equal ones are no error
                same = (wide_a == wide_b) & wide_a.isinf()
                wide_a, wide_b = wide_a.masked_fill(same, 0.0), wide_b.masked_fill(same, 0.0)
            self.signal += float(wide_a @ wide_a)
            self.other += float(wide_b @ wide_b)
            self.product += float(wide_a @ wide_b)
            self.noise += float((wide_a - wide_b).square().sum())

    @property
    def sqnr_db(self) -> float:
        """``10 log10(signal / noise)``: inf for equal outputs, NaN where one holds NaN or Inf."""
        if not math.isfinite(self.signal) or not math.isfinite(self.noise):
            return math.nan
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the outputs; NaN where one is zero, NaN or Inf."""
        norm = math.sqrt(self.signal) * math.sqrt(self.other)
        return self.product / norm if norm and math.isfinite(norm) else math.nan

    @property
    def agreement(self) -> float:
        """Share of equal integers; NaN where there are none."""
        return self.equal / self.integers if self.integers else math.nan


@dataclass
class ModuleError:
    """How far one module's outputs are apart.

    Attributes:
        name: full name; ``(model)`` for the model itself.
        kind: its class.
        accumulated: each model ran by itself: the module's own error and all that came in with its input.
        own: both modules ran on the reference's input; None for modules that hold modules with parameters.
    """

    name: str
    kind: str
    accumulated: Difference = field(default_factory=Difference)
    own: Difference | None = None


@dataclass
class Comparison:
    """What :func:`compare` found; ``print`` it for a table.

    Attributes:
        modules: one entry a module, in the order in which the reference finished them.
        skipped: modules without a counterpart or with outputs of another shape, with the reason.
    """

    modules: list[ModuleError]
    skipped: dict[str, str] = field(default_factory=dict)

    def worst(self, count: int = 1) -> list[ModuleError]:
        """The modules that add most error themselves: the lowest own SQNR, NaN first, exact ones left out."""
        scored = [module for module in self.modules if module.own is not None and module.own.sqnr_db != math.inf]
        return sorted(scored, key=lambda module: _rank(module.own))[:count]

    def outliers(self, margin_db: float = 3.0) -> list[tuple[ModuleError, float]]:
        """Modules whose own SQNR is ``margin_db`` or more below the median of their kind, and by how much, worst first.

        A kind is a name without its numbers: experts, three products in a row, are less exact than a linear by nature.
        """
        kinds: dict[str, list[ModuleError]] = {}
        for module in self.modules:
            if module.own is not None:
                kinds.setdefault(re.sub(r"\b\d+\b", "*", module.name), []).append(module)
        found = []
        for alike in kinds.values():
            median = statistics.median(_rank(module.own) for module in alike)
            for module in alike:
                below = median - _rank(module.own)
                if below >= margin_db:  # false for the NaN that two infinities leave
                    found.append((module, below))
        return sorted(found, key=lambda pair: -pair[1])

    def table(self, limit: int | None = 30) -> Table:
        """The modules with the most error of their own; with ``limit=None`` all modules, in the order they ran."""
        shown = self.modules if limit is None else self.worst(limit)
        title = "all modules" if limit is None else f"the {len(shown)} modules that add most error"
        table = Table(title=f"SQNR in dB, {title}", title_justify="left")
        table.add_column("module", overflow="fold")
        for column in ("own", "own cosine", "accumulated", "cosine"):
            table.add_column(column, justify="right")
        for module in shown:
            own = ("", "") if module.own is None else (_decibel(module.own), f"{module.own.cosine:.5f}")
            table.add_row(module.name, *own, _decibel(module.accumulated), f"{module.accumulated.cosine:.5f}")
        return table

    def summary(self) -> str:
        """The model's outputs, the worst module, and what was not compared."""
        lines = []
        outputs = next((module for module in self.modules if module.name == WHOLE_MODEL), None)
        if outputs is not None:
            found = outputs.accumulated
            lines.append(f"outputs of the model: SQNR {_decibel(found)} dB, cosine {found.cosine:.5f}")
        for module in self.worst(1):
            lines.append(f"most error of its own: {module.name}, {_decibel(module.own or Difference())} dB")
        for module, below in self.outliers()[:5]:
            lines.append(f"stands out: {module.name}, {below:.1f} dB below the median of its kind")
        ids = [m for m in self.modules if m.own is not None and m.own.integers]
        if ids:
            equal, total = (sum(getattr(m.accumulated, name) for m in ids) for name in ("equal", "integers"))
            lines.append(f"integers (ids of experts) that are equal: {equal / total:.1%}" if total else "")
        exact = sum(module.own is not None and module.own.sqnr_db == math.inf for module in self.modules)
        lines.append(f"{len(self.modules)} modules compared, {exact} of them exact by themselves")
        lines.extend(f"not compared: {name}: {reason}" for name, reason in self.skipped.items())
        return "\n".join(line for line in lines if line)

    def __str__(self) -> str:
        console = Console(width=150)
        with console.capture() as text:
            console.print(self.table())
            console.print(self.summary(), markup=False, highlight=False)
        return text.get()

    def as_json(self) -> dict[str, Any]:
        """All figures; what is not finite as a string."""
        return {
            "modules": [
                {
                    "name": module.name,
                    "kind": module.kind,
                    "accumulated": _figures(module.accumulated),
                    "own": None if module.own is None else _figures(module.own),
                }
                for module in self.modules
            ],
            "skipped": self.skipped,
        }

    def save(self, path: str | Path) -> None:
        """Writes :meth:`as_json` to a file."""
        Path(path).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draws both errors by layer, and the modules that add most, to a PNG, SVG or PDF file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from dsv4_compile.comparison_plot import plot

        plot(self, path)


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    inputs: Any,
    *,
    modules: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """SQNR and cosine of each module's outputs in ``model_b`` against ``model_a``: its own error and the accumulated.

    ``model_a`` runs first. Where a module of ``model_b`` has no parts with parameters, it is run at once on the input
    that its counterpart just got: its own error. Then ``model_b`` runs by itself: the accumulated error. Outputs of
    ``model_a`` wait in a temporary folder on disk, so that memory holds those of one module at a time.

    Both models run eagerly, module by module: packed weights are dequantised, activations are not quantised. A compiled
    model has no modules left to look into.

    Args:
        model_a: the reference, in eval mode.
        model_b: the model to judge, its modules named as those of ``model_a``; on another device or in another dtype if
            you like.
        inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments; or a list of these, several batches.
            No caches: both models would write to them.
        modules: name patterns of the modules to compare, or one; None for all.
        progress: called with a line about what is done now.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: a model in training mode, no module in common, or a pattern that matches none.
    """
    for name, model in (("model_a", model_a), ("model_b", model_b)):
        if model.training:
            raise ValueError(f"compare: {name} must be in eval mode, got training mode")
    patterns = (modules,) if isinstance(modules, str) else None if modules is None else tuple(modules)
    theirs = dict(model_b.named_modules())
    chosen = dict(model_a.named_modules())
    if patterns is not None:
        chosen = {name: chosen[name] for name in chosen if matching_pattern(name or WHOLE_MODEL, patterns) is not None}
    skipped = {name or WHOLE_MODEL: "model_b has no such module" for name in chosen if name not in theirs}
    pairs = {name: (module, theirs[name]) for name, module in chosen.items() if name in theirs}
    if not pairs:
        raise ValueError(f"compare: modules must name modules of both models, got {patterns!r} which names none")
    errors: dict[str, ModuleError] = {}
    batches = inputs if isinstance(inputs, list) else [inputs]
    for number, batch in enumerate(batches):
        of = f" on batch {number + 1} of {len(batches)}" if len(batches) > 1 else ""
        with tempfile.TemporaryDirectory(prefix="dsv4-compare-") as folder, torch.inference_mode():
            waiting = _Outputs(Path(folder))
            if progress is not None:
                progress(f"running the reference, and each module by itself{of}")
            with _hooks({name: a for name, (a, _) in pairs.items()}, _reference_hook(pairs, waiting, errors, skipped)):
                _call(model_a, batch)
            if progress is not None:
                progress(f"running the other model{of}")
            with _hooks({name: b for name, (_, b) in pairs.items()}, _accumulated_hook(waiting, errors, skipped)):
                _call(model_b, _moved(batch, model_b, model_a))
            for name in waiting.left():
                skipped[name or WHOLE_MODEL] = "it did not run as often in model_b"
    return Comparison([error for error in errors.values() if error.name not in skipped], skipped)


_Hook = Callable[[str, nn.Module, tuple[Any, ...], Mapping[str, Any], Any], None]


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], hook: _Hook) -> Iterator[None]:
    def bind(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: hook(name, module, args, kwargs, output)

    handles = [module.register_forward_hook(bind(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reference_hook(
    pairs: Mapping[str, tuple[nn.Module, nn.Module]],
    waiting: _Outputs,
    errors: dict[str, ModuleError],
    skipped: dict[str, str],
) -> _Hook:
    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        outputs = _tensors(output)
        waiting.put(name, outputs)
        error = errors.setdefault(name, ModuleError(name or WHOLE_MODEL, type(module).__name__))
        counterpart = pairs[name][1]
        if _is_leaf(module) and _is_leaf(counterpart):
            args, kwargs = _moved((args, kwargs), counterpart, module)
            error.own = error.own or Difference()
            _add(error.own, name, outputs, _tensors(counterpart(*args, **kwargs)), skipped)

    return hook


def _accumulated_hook(waiting: _Outputs, errors: dict[str, ModuleError], skipped: dict[str, str]) -> _Hook:
    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        reference = waiting.take(name)
        if reference is None:
            skipped[name or WHOLE_MODEL] = "it did not run as often in model_a"
        else:
            _add(errors[name].accumulated, name, reference, _tensors(output), skipped)

    return hook


def _add(into: Difference, name: str, a: Sequence[Tensor], b: Sequence[Tensor], skipped: dict[str, str]) -> None:
    shapes = [[tuple(tensor.shape) for tensor in outputs] for outputs in (a, b)]
    if shapes[0] != shapes[1]:
        skipped[name or WHOLE_MODEL] = f"its outputs have shapes {shapes[0]} and {shapes[1]}"
        return
    for reference, other in zip(a, b, strict=True):
        into.add(reference, other.to(reference.device))


class _Outputs:
    """Outputs that wait for their counterparts, in files: a module's first call meets its first call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, list[Path]] = {}
        self.count = 0

    def put(self, name: str, tensors: Sequence[Tensor]) -> None:
        self.count += 1
        file = self.folder / f"{self.count}.safetensors"
        save_file({f"{number:06d}": tensor.cpu().contiguous().clone() for number, tensor in enumerate(tensors)}, file)
        self.files.setdefault(name, []).append(file)

    def take(self, name: str) -> list[Tensor] | None:
        if not self.files.get(name):
            return None
        file = self.files[name].pop(0)
        tensors = [tensor for _, tensor in sorted(load_file(file).items())]
        file.unlink()
        return tensors

    def left(self) -> list[str]:
        return [name for name, files in self.files.items() if files]


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _is_leaf(module: nn.Module) -> bool:
    """Whether no part of a module has parameters: it can be run by itself, and touches no cache."""
    has_parameters = next(module.parameters(), None) is not None
    return has_parameters and all(next(child.parameters(), None) is None for child in module.children())


def _moved(inputs: Any, module: nn.Module, from_module: nn.Module) -> Any:
    """Inputs of one module for another: on its device, what has the one's dtype in the other's."""
    new, old = next(module.parameters(), None), next(from_module.parameters(), None)
    if new is None or old is None:
        return inputs

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(new.device, new.dtype if leaf.dtype == old.dtype else leaf.dtype)

    return pytree.tree_map(move, inputs)


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    else:
        model(*(inputs if isinstance(inputs, tuple) else (inputs,)))


def _rank(difference: Difference | None) -> float:
    sqnr = math.nan if difference is None else difference.sqnr_db
    return -math.inf if math.isnan(sqnr) else sqnr


def _decibel(difference: Difference) -> str:
    sqnr = difference.sqnr_db
    if math.isnan(sqnr):
        return "NaN or Inf"
    return "exact" if sqnr == math.inf else f"{sqnr:.2f}"


def _figures(difference: Difference) -> dict[str, Any]:
    figures = {"sqnr_db": difference.sqnr_db, "cosine": difference.cosine, "agreement": difference.agreement}
    return {name: value if math.isfinite(value) else str(value) for name, value in figures.items()} | asdict(difference)
