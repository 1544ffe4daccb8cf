"""The quantisers on a GPU: dsv4's kernels, the reference formula compiled by Inductor, and a plain copy, in one run.

    python benchmarks/bench_quantize_nvfp4.py [--ops quantize swiglu rms_norm] [--shapes 1x4096 16384x7168] [--no-rival]

bf16 in. ``share`` is the least time for the bytes that must move (the input read once, codes and scales written once)
at the copy bandwidth measured in this run, over the time taken; the granularity ``tensor`` has to read twice what the
L2 does not hold. The results of all variants are compared bit by bit first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import measure_peaks, record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops import quantize_nvfp4, rms_norm_quantize_nvfp4, swiglu_quantize_nvfp4
from dsv4_compile.ops.rms_norm_quantize_nvfp4 import rms_norm
from dsv4_compile.timing import copies_beyond_l2, time_variants

SHAPES = ("1x4096", "16x4096", "64x4096", "256x4096", "1024x4096", "16384x4096", "16384x7168")
LIMIT, EPS = 10.0, 1e-6

Variant = Callable[[Tensor, Tensor, str], Any]

OURS: dict[str, Variant] = {
    "quantize": lambda x, weight, granularity: quantize_nvfp4(x, granularity),
    "swiglu": lambda x, weight, granularity: swiglu_quantize_nvfp4(*x.chunk(2, dim=-1), LIMIT, granularity),
    "rms_norm": lambda x, weight, granularity: rms_norm_quantize_nvfp4(x, weight, EPS, granularity),
}
FORMULAS: dict[str, Variant] = {
    "quantize": lambda x, weight, granularity: nvfp4.quantize(x, granularity),
    "swiglu": lambda x, weight, granularity: nvfp4.quantize(nvfp4.swiglu(*x.chunk(2, dim=-1), LIMIT), granularity),
    "rms_norm": lambda x, weight, granularity: nvfp4.quantize(rms_norm(x, weight, EPS), granularity),
}


def differing(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> int:
    """Number of bytes in which two results differ."""
    return sum(
        int((a.contiguous().view(-1).view(torch.uint8) != b.contiguous().view(-1).view(torch.uint8)).sum())
        for a, b in zip(ours, theirs, strict=True)
    )


def measure(op: str, rows: int, k: int, rival: Callable[..., Any] | None, copy_tb_s: float) -> list[dict[str, Any]]:
    """Rows of results for one operator and shape."""
    num_copies = copies_beyond_l2(2 * rows * k, most=32)
    xs = [torch.randn(rows, k, device="cuda").bfloat16() for _ in range(num_copies)]
    targets = [torch.empty_like(x) for x in xs[:2]]
    weight = torch.rand(k, device="cuda") + 0.5
    variants: dict[str, list[Callable[[], Any]]] = {
        "dsv4 tensor": [lambda x=x: OURS[op](x, weight, "tensor") for x in xs],
        "dsv4 token": [lambda x=x: OURS[op](x, weight, "token") for x in xs],
        "copy": [lambda x=x, i=i: targets[i % 2].copy_(x) for i, x in enumerate(xs)],
    }
    differs: dict[str, int] = {}
    if rows <= 1024:
        expected = FORMULAS[op](xs[0].cpu(), weight.cpu(), "tensor")
        differs["dsv4 tensor"] = differing(tuple(part.cpu() for part in OURS[op](xs[0], weight, "tensor")), expected)
    if rival is not None:
        variants["Inductor tensor"] = [lambda x=x: rival(x, weight, "tensor") for x in xs]
        differs["Inductor tensor"] = differing(OURS[op](xs[0], weight, "tensor"), rival(xs[0], weight, "tensor"))
    timings = time_variants(variants)
    elements = rows * k // (2 if op == "swiglu" else 1)
    floor_us = (2 * rows * k + elements * 0.5625) / copy_tb_s / 1e6
    return [
        {
            "op": op,
            "rows": rows,
            "k": k,
            "variant": name,
            "median_us": round(timing.median_us, 2),
            "min_us": round(timing.min_us, 2),
            "max_us": round(timing.max_us, 2),
            "share": None if name == "copy" else round(floor_us / timing.median_us, 3),
            "bytes_that_differ": differs.get(name),
        }
        for name, timing in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--no-rival", action="store_true")
    options = parser.parse_args()
    console = Console(width=160)
    peaks = measure_peaks()
    console.print(peaks)
    results: list[dict[str, Any]] = []
    table = Table("op", "shape", "variant", "median us", "min", "max", "share", "bytes that differ")
    for op in options.ops:
        rival = None if options.no_rival else torch.compile(FORMULAS[op], dynamic=False)
        for shape in options.shapes:
            rows, k = (int(size) for size in shape.split("x"))
            for row in measure(op, rows, k, rival, peaks.read_write_tb_s):
                results.append(row)
                console.print(row)
                table.add_row(op, shape, *(str(row[key]) for key in list(row)[3:]))
    console.print(table)
    record("quantize_nvfp4", results, peaks)


if __name__ == "__main__":
    main()
