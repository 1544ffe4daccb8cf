"""``inspect``: what a checkpoint holds, in which formats, how large, and what is wrong with it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsv4_compile.checkpoint.decode import BadScalesError, check_scales
from dsv4_compile.checkpoint.formats import FORMAT_NAMES, Contents, Source, recognise
from dsv4_compile.checkpoint.index import Checkpoint, open_checkpoint
from dsv4_compile.checkpoint.names import layer_number, layer_pattern, mtp_names


@dataclass
class Group:
    """Weights of one kind: equal names but for layer and expert, one format, one dtype and one shape."""

    name: str
    format: str
    dtype: str
    shape: tuple[int, ...]
    count: int = 0
    num_bytes: int = 0
    layers: set[int] = field(default_factory=set)


@dataclass
class Inspection:
    """What :func:`inspect` found; ``print`` it for the table.

    Attributes:
        path: of the checkpoint.
        files: number of safetensors files.
        num_bytes: size of all tensors.
        layers: number of decoder layers, without those of multi-token-prediction modules.
        groups: the weights by kind, in the order of their names.
        activation_scales: number of static activation scales, which are never used.
        mtp: number of weights of multi-token-prediction modules.
        announced: quantisation method and algorithm that the configs name.
        problems: one line each; empty for a checkpoint that can be loaded.
    """

    path: Path
    files: int
    num_bytes: int
    layers: int = 0
    groups: list[Group] = field(default_factory=list)
    activation_scales: int = 0
    mtp: int = 0
    announced: str = ""
    problems: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """The groups as a rich table."""
        table = Table(title=str(self.path), title_justify="left")
        for column in ("weights", "layers", "count", "shape", "format", "stored as", "MiB"):
            table.add_column(column, overflow="fold", justify="right" if column in ("count", "MiB") else "left")
        for group in self.groups:
            shape = "x".join(map(str, group.shape)) or "-"
            size = f"{group.num_bytes / 2**20:.1f}"
            layers, format_name = _ranges(group.layers), FORMAT_NAMES[group.format]
            table.add_row(group.name, layers, str(group.count), shape, format_name, group.dtype, size)
        return table

    def summary(self) -> str:
        """Totals and problems."""
        lines = [
            f"{_count(self.files, 'file')}, {_count(self.layers, 'layer')}, {self.num_bytes / 2**30:.2f} GiB; "
            f"configs announce {self.announced or 'nothing'}; "
            f"{self.activation_scales} activation scales (never used), {self.mtp} MTP weights"
        ]
        lines.append(_count(len(self.problems), "problem") + "".join(f"\n  - {problem}" for problem in self.problems))
        return "\n".join(lines)

    def __str__(self) -> str:
        console = Console(width=150)
        with console.capture() as text:
            console.print(self.table())
            console.print(self.summary(), markup=False, highlight=False)
        return text.get()


def inspect(path: str | Path, *, scales: bool = True) -> Inspection:
    """Looks at a checkpoint without a model.

    Args:
        path: a ``.safetensors`` file, an ``index.json``, or a folder with either.
        scales: read the scales too (an eighth of an NVFP4 weight), and look for NaN, negative and zero ones.

    Raises:
        CheckpointError: nothing is there, or nothing that is a safetensors checkpoint.
    """
    with open_checkpoint(path) as checkpoint:
        contents = recognise(checkpoint)
        found = Inspection(Path(path), len(checkpoint.files), checkpoint.num_bytes)
        found.problems = checkpoint.problems + contents.problems
        groups: dict[tuple[object, ...], Group] = {}
        mtp = mtp_names(contents.sources)
        for source in contents.sources.values():
            dtype = " + ".join(entry.dtype for entry in source.parts.values())
            key = layer_pattern(source.name), source.format, dtype, source.shape
            group = groups.setdefault(key, Group(key[0], source.format, dtype, source.shape))
            group.count += 1
            group.num_bytes += source.num_bytes
            if (layer := layer_number(source.name)) is not None:
                group.layers.add(layer)
            if scales:
                found.problems.extend(_scale_problems(checkpoint, source))
        found.groups = sorted(groups.values(), key=lambda group: (group.name, min(group.layers, default=0)))
        found.activation_scales = len(contents.activation_scales)
        found.mtp = len(mtp)
        found.layers = len({layer_number(name) for name in contents.sources if name not in mtp} - {None})
        found.announced = _announced(checkpoint)
        found.problems.extend(_missing_experts(contents))
    return found


def _announced(checkpoint: Checkpoint) -> str:
    sections = [checkpoint.config.get("quantization_config"), checkpoint.quant_config.get("quantization")]
    values = [
        str(section[key])
        for section in sections
        if isinstance(section, dict)
        for key in ("quant_method", "quant_algo", "format")
        if section.get(key) is not None
    ]
    return ", ".join(dict.fromkeys(values))


def _scale_problems(checkpoint: Checkpoint, source: Source) -> list[str]:
    problems = []
    for role in sorted(source.parts.keys() - {"data"}):
        try:
            check_scales(source, role, checkpoint.read(source.parts[role].name))
        except BadScalesError as problem:
            problems.append(str(problem))
    return problems


def _ranges(numbers: set[int]) -> str:
    """``0-2, 5`` for 0, 1, 2 and 5."""
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _missing_experts(contents: Contents) -> list[str]:
    """Layers whose experts have numbers left out, or projections of one expert that another lacks."""
    experts: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in contents.sources:
        block, found, rest = name.partition(".experts.")
        number, _, projection = rest.partition(".")
        if found and number.isdigit():
            experts[block][int(number)].add(projection)
    problems = []
    for block, by_number in experts.items():
        projections = set().union(*by_number.values())
        for index in range(max(by_number) + 1):
            if absent := projections - by_number.get(index, set()):
                problems.append(f"{block}: expert {index} lacks {', '.join(sorted(absent))}")
    return problems
