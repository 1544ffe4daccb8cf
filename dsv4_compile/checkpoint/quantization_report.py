"""What a conversion to NVFP4 did and how exact the result is: by kind of weight, by layer, and weight by weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from dsv4_compile.checkpoint.conversion import natural_key
from dsv4_compile.checkpoint.convert import WeightRecord
from dsv4_compile.checkpoint.formats import FORMAT_NAMES
from dsv4_compile.checkpoint.names import layer_pattern
from dsv4_compile.checkpoint.packing import sqnr_db

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass
class Group:
    """Quantised weights taken together; their SQNR is that of the sums of squares.

    Attributes:
        name: kind of weight, or layer.
        weights: the records.
    """

    name: str
    weights: list[WeightRecord] = field(default_factory=list)

    @property
    def sqnr_db(self) -> float:
        """SQNR of all weights."""
        return sqnr_db(sum(w.signal for w in self.weights), sum(w.noise for w in self.weights))

    @property
    def gain_db(self) -> float:
        """SQNR above that of the nearest block scales."""
        nearest = sum(w.nearest_noise for w in self.weights)
        noise = sum(w.noise for w in self.weights)
        return 10 * math.log10(nearest / noise) if noise and nearest else 0.0

    @property
    def worst(self) -> WeightRecord:
        """The weight with the lowest SQNR."""
        return min(self.weights, key=lambda w: sqnr_db(w.signal, w.noise))


@dataclass
class QuantizationReport:
    """What :func:`quantize_checkpoint` did.

    Attributes:
        weights: a record of each weight of the result.
        search: how block scales were chosen.
        bytes_before, bytes_after: of all tensors.
        dropped_activation_scales: static scales that the source has and the result has not.
        mtp: weights of multi-token-prediction modules, copied as they are.
        resumed: files that an interrupted run had finished.
    """

    weights: list[WeightRecord]
    search: str
    bytes_before: int
    bytes_after: int
    dropped_activation_scales: int
    mtp: int
    resumed: int = 0

    @property
    def quantized(self) -> list[WeightRecord]:
        """Weights that were quantised, with an error."""
        return [weight for weight in self.weights if weight.action == "quantize"]

    @property
    def taken_over(self) -> list[WeightRecord]:
        """4-bit weights that were taken over without an error."""
        return [weight for weight in self.weights if weight.action == "take_over"]

    @property
    def left_alone(self) -> dict[str, str]:
        """Name and reason of the weights that are not NVFP4."""
        return {weight.name: weight.reason for weight in self.weights if weight.action in ("keep", "copy")}

    def by_kind(self) -> list[Group]:
        """Quantised weights by name without layer and expert."""
        return _grouped(self.quantized, lambda weight: layer_pattern(weight.name).removesuffix(".weight"))

    def by_layer(self) -> list[Group]:
        """Quantised weights by layer; those outside of any by their name."""
        return _grouped(self.quantized, lambda weight: _layer(weight.name))

    def table(self, by: str = "kind") -> Table:
        """SQNR by ``kind`` or by ``layer``, with the worst weight of each."""
        table = Table(title=f"SQNR of the quantised weights by {by}", title_justify="left")
        table.add_column(by, overflow="fold")
        columns = ["weights", "SQNR dB", *(["gain dB"] if self.search != "none" else []), "worst dB"]
        for column in columns:
            table.add_column(column, justify="right")
        table.add_column("worst at *" if by == "kind" else "worst weight", overflow="fold")
        for group in self.by_kind() if by == "kind" else self.by_layer():
            worst = group.worst
            cells = [
                group.name.removeprefix("model.").removeprefix("layers.*."),
                str(len(group.weights)),
                f"{group.sqnr_db:.2f}",
            ]
            cells += [f"{group.gain_db:+.2f}"] if self.search != "none" else []
            cells += [f"{sqnr_db(worst.signal, worst.noise):.2f}"]
            where = (
                ", ".join(_NUMBER.findall(worst.name)) if by == "kind" else worst.name.removeprefix(f"{group.name}.")
            )
            table.add_row(*cells, where.removesuffix(".weight"))
        return table

    def summary(self) -> str:
        """Counts, sizes and what was left alone, with the reasons."""
        everything = Group("", self.quantized)
        size = f"{decimal(self.bytes_before)} -> {decimal(self.bytes_after)}"
        counts = f"{len(self.quantized)} weights quantised, {len(self.taken_over)} taken over unchanged"
        lines = [f"{counts}; {size}", f"source: {describe_formats(self.weights)}"]
        if self.quantized:
            gain = f", {everything.gain_db:+.2f} dB by the search" if self.search != "none" else ""
            lines.append(f"SQNR of all quantised weights {everything.sqnr_db:.2f} dB{gain}")
        reasons: dict[str, int] = {}
        for reason in self.left_alone.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        for reason in sorted(reasons, key=lambda reason: -reasons[reason]):
            lines.append(f"left alone: {reasons[reason]} ({reason})")
        if self.mtp:
            lines.append(f"{self.mtp} weights of multi-token prediction copied as they are")
        if self.dropped_activation_scales:
            lines.append(f"{self.dropped_activation_scales} static activation scales dropped")
        lines.extend(
            f"{weight.name} holds NaN or Inf, as in the source" for weight in self.weights if not weight.is_finite
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        console = Console(width=150)
        with console.capture() as text:
            if self.quantized:
                console.print(self.table())
            console.print(self.summary(), markup=False, highlight=False)
        return text.get()

    def as_json(self) -> dict[str, Any]:
        """Everything but ``resumed``, so that it does not depend on interruptions."""
        groups = {
            name: [{"name": group.name, "weights": len(group.weights)} | _figures(group) for group in found]
            for name, found in (("kinds", self.by_kind()), ("layers", self.by_layer()))
        }
        return {
            "search": self.search,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "dropped_activation_scales": self.dropped_activation_scales,
            "mtp": self.mtp,
            **groups,
            "weights": [weight.as_json() | _weight_figures(weight) for weight in self.weights],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> QuantizationReport:
        """Inverse of :meth:`as_json`."""
        names = ("search", "bytes_before", "bytes_after", "dropped_activation_scales", "mtp")
        weights = [WeightRecord.from_json(weight) for weight in value["weights"]]
        return QuantizationReport(weights, **{name: value[name] for name in names})


def describe_formats(weights: Iterable[WeightRecord]) -> str:
    """Stored formats of the source, counted."""
    counts: dict[str, int] = {}
    for weight in weights:
        counts[weight.source] = counts.get(weight.source, 0) + 1
    return ", ".join(f"{count} {FORMAT_NAMES[name]}" for name, count in sorted(counts.items()))


def _grouped(weights: Iterable[WeightRecord], key: Callable[[WeightRecord], str]) -> list[Group]:
    groups: dict[str, Group] = {}
    for weight in weights:
        name = key(weight)
        groups.setdefault(name, Group(name)).weights.append(weight)
    return [groups[name] for name in sorted(groups, key=natural_key)]


def _layer(name: str) -> str:
    match = _LAYER.search(name)
    return name.removesuffix(".weight") if match is None else name[: match.end() - 1]


def _figures(group: Group) -> dict[str, Any]:
    return {"sqnr_db": _finite(group.sqnr_db), "gain_db": round(group.gain_db, 3), "worst": group.worst.name}


def _weight_figures(weight: WeightRecord) -> dict[str, Any]:
    return {"sqnr_db": _finite(sqnr_db(weight.signal, weight.noise)) if weight.action == "quantize" else None}


def _finite(value: float) -> float | None:
    """A figure for JSON, which has no infinity: None."""
    return round(value, 3) if math.isfinite(value) else None
