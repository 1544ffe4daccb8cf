"""Time from the start of a process to its first product on a GPU, with a warm kernel cache: the goal is 2 s.

    python benchmarks/bench_first_kernel.py [--runs 3] [--timeout 60]

Each run is a process of its own that imports torch and dsv4_compile, makes its operands, runs ``nvfp4_mm`` once and
waits for it; its phases are printed as they end. It fails if a kernel was compiled; the first process, not counted,
compiles what is missing. What a process pays depends on what else runs: on a machine that is busy it says little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time

from harness import record

RUN = """
import time
start = time.perf_counter()
def report(name):
    print(name, time.perf_counter() - start, flush=True)
import torch
report("torch_s")
torch.zeros(1, device="cuda")
report("context_s")
import json, sys
import dsv4_compile
from dsv4_compile.ops.kernels import cache
compiled = []
build = cache._build
cache._build = lambda name, *rest: (compiled.append(name), build(name, *rest))
report("import_s")
x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
codes = torch.zeros(4096, 2048, dtype=torch.uint8, device="cuda")
scales = torch.zeros(4096, 256, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
scale = torch.ones((), device="cuda")
packed = dsv4_compile.ops.quantize_nvfp4(x, "tensor")
dsv4_compile.ops.nvfp4_mm(*packed, [codes], [scales], [scale])
torch.cuda.synchronize()
report("first_s")
print("compiled", json.dumps(compiled), flush=True)
"""
PHASES = ("torch_s", "context_s", "import_s", "first_s")  # each from the start of the process to its end


def run(label: str, timeout_s: float) -> tuple[dict[str, float], list[str]]:
    """The times of one process in s, cumulated, and the kernels that it compiled.

    Raises:
        RuntimeError: it failed, or it took longer than ``timeout_s``; the message says after which phase.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    times: dict[str, float] = {}
    compiled: list[str] | None = None
    assert process.stdout is not None
    for line in process.stdout:
        name, _, value = line.partition(" ")
        if name == "compiled":
            compiled = json.loads(value)
        elif name in PHASES:
            times[name] = float(value)
            print(f"{label}: {name} {times[name]:.2f}", flush=True)
    process.wait()
    took_s = time.perf_counter() - start
    is_late = not timer.is_alive()
    timer.cancel()
    if process.returncode or compiled is None:
        end = f"was ended after {timeout_s:.0f} s" if is_late else f"failed with status {process.returncode}"
        raise RuntimeError(f"{label}: the process {end}, after these phases: {times}")
    print(f"{label}: process_s {took_s:.2f}, compiled {compiled}", flush=True)
    return times | {"process_s": took_s}, compiled


def main() -> None:
    """Prints and records the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one process")
    arguments = parser.parse_args()
    run("warm-up", arguments.timeout)
    runs = [run(f"run {index + 1}", arguments.timeout) for index in range(arguments.runs)]
    if any(compiled for _, compiled in runs):
        raise RuntimeError(f"a process with a warm cache compiled {[compiled for _, compiled in runs]}")
    names = (*PHASES, "process_s")
    row = {name: round(statistics.median(times[name] for times, _ in runs), 3) for name in names}
    print(
        f"to the end of: import torch {row['torch_s']}, CUDA context {row['context_s']}, import dsv4_compile "
        f"{row['import_s']}, first product {row['first_s']} s; the whole process {row['process_s']} s"
    )
    record("first_kernel", [row | {"runs": arguments.runs}])


if __name__ == "__main__":
    main()
