"""Times short GPU kernels: CUDA-graph replay, inputs rotated through more than the L2, variants interleaved."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
L2_BYTES = 64 << 20  # more than the 50 MB of an H100 and the 60 MB of an H200


@dataclass(frozen=True)
class Timing:
    """Time of one call in us over the replays: median, lowest and highest."""

    median_us: float
    min_us: float
    max_us: float


def copies_beyond_l2(num_bytes: int, most: int = 64) -> int:
    """How many copies of inputs of ``num_bytes`` leave no call an input that the L2 still holds."""
    return max(2, min(most, -(-3 * L2_BYTES // max(1, num_bytes))))


def time_variants(
    variants: Mapping[str, list[Callable[[], Any]]], replays: int = 20, warm_up: int = 3
) -> dict[str, Timing]:
    """Times each variant by replaying a CUDA graph of all its calls, the variants interleaved.

    Args:
        variants: name -> its calls, one for each copy of the inputs; a graph holds them one after the other.
        replays: timed replays a variant.
        warm_up: replays before those.

    Returns:
        name -> time of one call.
    """
    graphs = {name: _capture(calls) for name, calls in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for replay in range(warm_up + replays):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= warm_up:
                times[name].append(start.elapsed_time(end) * 1e3 / len(variants[name]))
    return {name: Timing(statistics.median(t), min(t), max(t)) for name, t in times.items()}


def _capture(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


@dataclass(frozen=True)
class Peaks:
    """What this GPU reached in this run: device-to-device copy and an 8192^3 bf16 product."""

    read_write_tb_s: float
    read_tb_s: float
    bf16_tflop_s: float


def measure_peaks() -> Peaks:
    """Measures the two rooflines that shares are stated against."""
    source = torch.randint(0, 1 << 30, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    timings = time_variants(
        {"copy": [lambda: target.copy_(source)], "read": [lambda: source.amax()], "mm": [lambda: a @ b] * 2}, replays=10
    )
    num_bytes = source.numel() * source.element_size()
    return Peaks(
        read_write_tb_s=2 * num_bytes / timings["copy"].median_us / 1e6,
        read_tb_s=num_bytes / timings["read"].median_us / 1e6,
        bf16_tflop_s=2 * 8192**3 / timings["mm"].median_us / 1e6,
    )


def machine() -> dict[str, str]:
    """What a result must say about where it was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }


def record(name: str, rows: list[dict[str, Any]], peaks: Peaks | None = None, folder: Path = RESULTS) -> None:
    """Appends rows to ``results/<name>.jsonl``, each with the machine and the peaks of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    common = machine() | ({"peaks": asdict(peaks)} if peaks else {})
    with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row | common) + "\n")
