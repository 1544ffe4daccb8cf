"""Draws a comparison of two models: SQNR by layer, accumulated and of each module by itself, and the worst modules."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dsv4_compile.comparison import Comparison, ModuleError

_LAYER = re.compile(r"^(.*?\.)?(\d+)(?:\.(.*))?$")
_WORST = 15
_KINDS = 20  # as many as the palette has colours; the kinds with the lowest SQNR get them
_MARKERS = "osD^vP"
_SPREAD = 0.6  # of the distance between two layers that the symbols of one take


def plot(comparison: Comparison, path: str | Path) -> None:
    """Writes the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing differs, so there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'dsv4-compile[plot]'") from error

    if not any(math.isfinite(m.accumulated.sqnr_db) for m in comparison.modules) and not comparison.worst():
        raise ValueError("plot: comparison must hold a module whose outputs differ, got none")
    figure = Figure(figsize=(14, 10), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    _draw_layers(parts[0].subplots(), comparison)
    _draw_worst(parts[1].subplots(), comparison)
    figure.savefig(path, dpi=120)


def _points(comparison: Comparison) -> tuple[list[tuple[float, float]], dict[str, list[tuple[float, float]]], str]:
    """Accumulated SQNR of the layers, own SQNR of the modules by kind, and what x is."""
    layers: list[tuple[float, float]] = []
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    has_numbers = any(_LAYER.match(module.name) for module in comparison.modules)
    for position, module in enumerate(comparison.modules):
        match = _LAYER.match(module.name)
        if has_numbers and match is None:
            continue
        x = position if match is None else int(match[2])
        if (match is None or match[3] is None) and math.isfinite(module.accumulated.sqnr_db):
            layers.append((x, module.accumulated.sqnr_db))
        if module.own is not None and math.isfinite(module.own.sqnr_db):
            kind = module.kind if match is None or match[3] is None else re.sub(r"\b\d+\b", "*", match[3])
            kinds[kind].append((x, module.own.sqnr_db))
    return layers, kinds, "layer" if has_numbers else "module, in the order they ran"


def _draw_layers(axes: Axes, comparison: Comparison) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    layers, kinds, x_label = _points(comparison)
    chosen = sorted(sorted(kinds, key=lambda kind: min(y for _, y in kinds[kind]))[:_KINDS])
    for number, kind in enumerate(chosen):
        beside = (number - (len(chosen) - 1) / 2) * _SPREAD / len(chosen)  # so that equal values do not hide each other
        xs, ys = zip(*((x + beside, y) for x, y in kinds[kind]), strict=True)
        marker, color = _MARKERS[number % len(_MARKERS)], colormaps["tab20"](number % 20)
        axes.scatter(xs, ys, s=32, marker=marker, color=color, label=kind, zorder=3)
    if layers:
        label = f"after the {x_label.partition(',')[0]}, accumulated"
        axes.plot(*zip(*layers, strict=True), color="black", linewidth=2, marker=".", markersize=10, label=label)
    axes.set_title("Error of each module by itself (symbols) and accumulated (line); higher is better", loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel("SQNR, dB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)


def _draw_worst(axes: Axes, comparison: Comparison) -> None:
    worst = comparison.worst(_WORST)[::-1]
    values = [_own_sqnr(module) for module in worst]
    widths = [value if math.isfinite(value) else 0.0 for value in values]
    bars = axes.barh([module.name for module in worst], widths, color="tab:red", height=0.7)
    axes.bar_label(bars, [f"{value:.1f}" if math.isfinite(value) else "NaN or Inf" for value in values], padding=3)
    axes.set_title(f"The {len(worst)} modules that add most error by themselves", loc="left")
    axes.set_xlabel("SQNR, dB")
    axes.margins(x=0.08)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _own_sqnr(module: ModuleError) -> float:
    return math.nan if module.own is None else module.own.sqnr_db
