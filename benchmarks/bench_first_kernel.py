"""Time from the start of a process to its first product on a GPU, with a warm kernel cache: the goal is 2 s.

    python benchmarks/bench_first_kernel.py [--runs 5]

Each run is a process of its own that imports torch and dsv4_compile, makes its operands, runs ``nvfp4_mm`` once and
waits for it. It fails if a kernel was compiled; the first process, not counted, compiles what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from harness import record

RUN = """
import time
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
torch.zeros(1, device="cuda")
context_s = time.perf_counter() - start
import json, sys
import dsv4_compile
from dsv4_compile.ops.kernels import cache
compiled = []
build = cache._build
cache._build = lambda name, *rest: (compiled.append(name), build(name, *rest))
import_s = time.perf_counter() - start
x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
codes = torch.zeros(4096, 2048, dtype=torch.uint8, device="cuda")
scales = torch.zeros(4096, 256, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
scale = torch.ones((), device="cuda")
packed = dsv4_compile.ops.quantize_nvfp4(x, "tensor")
dsv4_compile.ops.nvfp4_mm(*packed, [codes], [scales], [scale])
torch.cuda.synchronize()
first_s = time.perf_counter() - start
print(json.dumps(dict(torch_s=torch_s, context_s=context_s, import_s=import_s, first_s=first_s, compiled=compiled)))
"""


def run() -> dict[str, float | list[str]]:
    """The times of one process in s, cumulated, and the kernels that it compiled."""
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    found: dict[str, float | list[str]] = json.loads(result.stdout.splitlines()[-1])
    return found | {"process_s": time.perf_counter() - start}


def main() -> None:
    """Prints and records the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    run()
    runs = [run() for _ in range(arguments.runs)]
    if any(found["compiled"] for found in runs):
        raise RuntimeError(f"a process with a warm cache compiled {[found['compiled'] for found in runs]}")
    names = ("torch_s", "context_s", "import_s", "first_s", "process_s")
    row = {name: round(statistics.median(float(found[name]) for found in runs), 3) for name in names}  # type: ignore[arg-type]
    print(
        f"to the end of: import torch {row['torch_s']}, CUDA context {row['context_s']}, import dsv4_compile "
        f"{row['import_s']}, first product {row['first_s']} s; the whole process {row['process_s']} s"
    )
    record("first_kernel", [row | {"runs": arguments.runs}])


if __name__ == "__main__":
    main()
