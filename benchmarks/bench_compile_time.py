"""Compile time of the demo model: backend dsv4 against plain Inductor, with cold and with warm caches.

Each compilation is a process of its own. Cold ones start with an empty cache folder, warm ones with the folder that the
cold one of the same backend left. Besides wall time the CPU time of the process and its children is given, which a busy
machine disturbs less.

    python benchmarks/bench_compile_time.py [--repeats 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

BACKENDS = ("inductor", "dsv4")


def compile_once(backend: str) -> dict[str, float]:
    """Compiles the demo model and runs it once, in this process."""
    import dsv4_compile.backend
    from dsv4_compile.demo import demo_model

    seconds_in_passes = 0.0
    run_passes = dsv4_compile.backend.run_passes

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal seconds_in_passes
        start = time.perf_counter()
        counts = run_passes(*args, **kwargs)
        seconds_in_passes += time.perf_counter() - start
        return counts

    dsv4_compile.backend.run_passes = timed
    model = demo_model()
    tokens = torch.zeros((1, 32), dtype=torch.long)
    cpu_before, start = cpu_seconds(), time.perf_counter()
    with torch.inference_mode():
        torch.compile(model, backend=backend)(tokens, use_cache=False)
    inductor = torch._dynamo.utils.counters["inductor"]
    return {
        "wall_s": time.perf_counter() - start,
        "cpu_s": cpu_seconds() - cpu_before,
        "passes_s": seconds_in_passes,
        "fxgraph_cache_hits": float(inductor["fxgraph_cache_hit"]),
        "fxgraph_cache_misses": float(inductor["fxgraph_cache_miss"]),
    }


def cpu_seconds() -> float:
    """CPU time of this process and of the children that ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_child(backend: str, cache: Path) -> dict[str, float]:
    """Compiles in a fresh process with that cache folder."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "ignore", __file__, "--child", backend]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", help="append the figures as one line to this file")
    parser.add_argument("--child", choices=BACKENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(compile_once(arguments.child)))
        return

    samples: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.repeats):
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    samples.setdefault(f"{backend} {state}", []).append(run_child(backend, Path(cache)))
    figures = {
        name: {key: statistics.median(sample[key] for sample in rows) for key in rows[0]}
        for name, rows in samples.items()
    }

    table = Table(title=f"Compile time of the demo model, torch {torch.__version__}", title_justify="left")
    for column in ("", "wall s", "CPU s", "passes s", "graph cache hits / misses"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in figures.items():
        hits = f"{row['fxgraph_cache_hits']:.0f} / {row['fxgraph_cache_misses']:.0f}"
        table.add_row(name, f"{row['wall_s']:.1f}", f"{row['cpu_s']:.1f}", f"{row['passes_s']:.2f}", hits)
    Console().print(table)
    if arguments.json:
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.write(json.dumps({"torch": torch.__version__, **figures}) + "\n")


if __name__ == "__main__":
    main()
