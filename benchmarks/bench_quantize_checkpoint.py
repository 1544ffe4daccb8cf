"""Time and peak memory of quantising a bf16 checkpoint on disk to NVFP4, against what the disk itself takes.

Writes a checkpoint in the shapes of DeepSeek V4 Flash, reads it plainly, quantises it in a process of its own, all with
cold file caches, checks a few weights against the reference, and deletes everything.

    python benchmarks/bench_quantize_checkpoint.py [--gb 20] [--search none] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import harness
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.packing import SEARCHES

# V4 Flash: hidden 4096, experts of 2048, and the projections of its attention.
EXPERT = {"gate_proj": (2048, 4096), "up_proj": (2048, 4096), "down_proj": (4096, 2048)}
ATTENTION = {
    "q_a_proj": (1024, 4096), "q_b_proj": (32768, 1024), "kv_proj": (512, 4096), "o_a_proj": (8192, 4096),
    "o_b_proj": (4096, 8192),
}  # fmt: skip
EXPERTS_A_LAYER = 32  # of 256, so that a small checkpoint has several layers
FILE_BYTES = 2 << 30
READ_BYTES = 16 << 20


def weights(num_bytes: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of as many layers as make up ``num_bytes`` in bf16."""
    written = 0
    for layer in range(1 << 30):
        block = f"model.layers.{layer}"
        shapes = {f"{block}.self_attn.{name}.weight": shape for name, shape in ATTENTION.items()}
        for expert in range(EXPERTS_A_LAYER):
            shapes |= {f"{block}.mlp.experts.{expert}.{name}.weight": shape for name, shape in EXPERT.items()}
        for name, shape in shapes.items():
            if written >= num_bytes:
                return
            written += 2 * shape[0] * shape[1]
            yield name, shape


def write_checkpoint(folder: Path, num_bytes: int) -> int:
    """Writes files of 2 GiB; one random matrix a shape, scaled anew each time. Returns the bytes of all weights."""
    torch.manual_seed(0)
    base = {shape: torch.randn(shape).bfloat16() for shape in {*EXPERT.values(), *ATTENTION.values()}}
    file: dict[str, torch.Tensor] = {}
    filled = total = count = 0
    for name, shape in [*weights(num_bytes), ("", (0, 0))]:
        if filled >= FILE_BYTES or (not name and file):
            count += 1
            save_file(file, folder / f"model-{count:05d}.safetensors")
            forget(folder / f"model-{count:05d}.safetensors")
            file, filled = {}, 0
        if name:
            file[name] = base[shape] * (0.01 + 0.001 * (len(file) % 17))
            filled += file[name].nbytes
            total += file[name].nbytes
    (folder / "config.json").write_text('{"model_type": "deepseek_v4"}')
    return total


def forget(file: Path) -> None:
    """Takes a file out of the file cache."""
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_s(folder: Path) -> float:
    """Seconds to read every weight file once, from the disk."""
    buffer = bytearray(READ_BYTES)
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - start


def check(source: Path, result: Path) -> int:
    """Compares every 97th weight with the reference, bitwise; returns how many."""
    index = json.loads((result / "model.safetensors.index.json").read_text())["weight_map"]
    checked = 0
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as original:
            for name in sorted(original.keys())[::97]:
                if name.endswith(("gate_proj.weight", "up_proj.weight")):
                    continue  # these share a global scale
                parts = nvfp4.quantize_weight(original.get_tensor(name))
                for suffix, part in zip(("", "_scale", "_scale_2"), parts, strict=True):
                    with safe_open(result / index[f"{name}{suffix}"], "pt") as packed:
                        found = packed.get_tensor(f"{name}{suffix}")
                    if not torch.equal(found.flatten().view(torch.uint8), part.flatten().view(torch.uint8)):
                        raise AssertionError(f"{name}{suffix} differs from the reference")
                checked += 1
    return checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=20.0)
    parser.add_argument("--search", choices=SEARCHES, default="none")
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results")
    arguments = parser.parse_args()

    console = Console()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        source, result = Path(root, "bf16"), Path(root, "nvfp4")
        source.mkdir()
        start = time.perf_counter()
        total = write_checkpoint(source, int(arguments.gb * 1e9))
        written_s = time.perf_counter() - start
        plain_read_s = read_s(source)
        for file in source.glob("*.safetensors"):
            forget(file)
        load = os.getloadavg()[0]
        command = [sys.executable, "-W", "ignore", "-m", "dsv4_compile.cli", "quantize", str(source), str(result)]
        cpu_before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        subprocess.run([*command, "--search", arguments.search], check=True)
        wall_s = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        figures = {
            "search": arguments.search,
            "source_gb": total / 1e9,
            "result_gb": sum(file.stat().st_size for file in result.glob("*.safetensors")) / 1e9,
            "wall_s": wall_s,
            "cpu_s": usage.ru_utime + usage.ru_stime - cpu_before.ru_utime - cpu_before.ru_stime,
            "peak_rss_gib": usage.ru_maxrss / 2**20,
            "source_gb_s": total / 1e9 / wall_s,
            "plain_read_gb_s": total / 1e9 / plain_read_s,
            "plain_write_gb_s": total / 1e9 / written_s,
            "checked_weights": check(source, result) if arguments.search == "none" else 0,
        }
        shutil.rmtree(source)

    table = Table(title="Quantising a bf16 checkpoint on disk", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    console.print(table)
    if arguments.record:
        machine = {"cores": os.cpu_count(), "load_before": round(load, 1)}
        harness.record("quantize_checkpoint", [figures | machine])


if __name__ == "__main__":
    main()
