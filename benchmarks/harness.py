"""What the benchmarks share: the peaks of the GPU in the same run, and results with where they were measured."""

from __future__ import annotations

import datetime
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dsv4_compile.timing import time_variants

RESULTS = Path(__file__).parent / "results"


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
