"""DeepSeek V4's grouped output projection on a GPU: ``nvfp4_grouped_mm`` against ``torch.bmm`` in bf16.

    python benchmarks/bench_nvfp4_grouped_mm.py [--tokens 1 8 64 512 4096] [--groups 8 16]

Static groups, N = 1024 and K = 4096 each. The activation is quantised before, its groups lie inside the rows as in the
model. Weights rotate through more than the L2. The floor counts 0.5625 bytes a weight, the packed activation and the
bf16 result.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from harness import measure_peaks, record
from rich.console import Console
from rich.table import Table

from dsv4_compile.ops import nvfp4_grouped_mm, quantize_nvfp4
from dsv4_compile.ops.nvfp4_grouped_mm import reference
from dsv4_compile.timing import copies_beyond_l2, time_variants

N, K = 1024, 4096
BYTES_OF_A_WEIGHT = 0.5625


def measure(groups: int, tokens: int, peaks: Any, replays: int) -> dict[str, Any]:
    """One row: times in us."""
    num_bytes = groups * N * K * BYTES_OF_A_WEIGHT
    copies = copies_beyond_l2(int(num_bytes))
    x = torch.randn(tokens, groups, K, dtype=torch.bfloat16, device="cuda")
    codes, block_scales, scale = quantize_nvfp4(x)
    a = codes.transpose(0, 1), block_scales.transpose(0, 1), scale
    ours, theirs = [], []
    for _ in range(copies):
        b_codes = torch.randint(0, 256, (groups, N, K // 2), dtype=torch.uint8, device="cuda")
        b_block_scales = torch.randint(0x68, 0x78, (groups, N, K // 16), dtype=torch.uint8, device="cuda")
        b = b_codes, b_block_scales.view(torch.float8_e4m3fn), torch.full((groups,), 1e-5, device="cuda")
        ours.append(functools.partial(nvfp4_grouped_mm, *a, *b))
        wide = torch.randn(groups, K, N, dtype=torch.bfloat16, device="cuda")
        theirs.append(functools.partial(torch.bmm, x.transpose(0, 1), wide))
    check(ours[0], a, b_rows=2)
    timings = time_variants({"nvfp4_grouped_mm": ours, "bmm bf16": theirs}, replays=replays)
    num_bytes += tokens * groups * (K * BYTES_OF_A_WEIGHT + 2 * N)
    floor_us = max(num_bytes / peaks.read_tb_s / 1e6, 2 * tokens * groups * N * K / peaks.bf16_tflop_s / 1e6)
    row = {"groups": groups, "tokens": tokens, "n": N, "k": K, "floor_us": floor_us}
    for name, timing in timings.items():
        row |= {f"{name}_us": timing.median_us, f"{name}_spread_us": (timing.min_us, timing.max_us)}
    return row | {"share": floor_us / timings["nvfp4_grouped_mm"].median_us}


def check(call: functools.partial[torch.Tensor], a: tuple[torch.Tensor, ...], b_rows: int) -> None:
    """Compares the first token of every group, and a few columns, with the CPU reference within 2^-7."""
    actual = call()[:, :1, :b_rows].float().cpu()
    b_codes, b_block_scales, b_scale = (part.cpu() for part in call.args[3:6])
    some = b_codes[:, :b_rows], b_block_scales[:, :b_rows], b_scale
    expected = reference(a[0][:, :1].cpu(), a[1][:, :1].cpu(), a[2].cpu(), *some, None, torch.float32)
    if not ((actual - expected).abs() <= 2.0**-7 * expected.abs().max()).all():
        raise SystemExit(f"nvfp4_grouped_mm differs from the reference: {actual} and {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--replays", type=int, default=20)
    arguments = parser.parse_args()
    with torch.inference_mode():
        peaks = measure_peaks()
        rows = [
            measure(groups, tokens, peaks, arguments.replays)
            for groups in arguments.groups
            for tokens in arguments.tokens
        ]
    record("nvfp4_grouped_mm", rows, peaks)
    table = Table("groups", "tokens", "floor us", "nvfp4_grouped_mm us", "share", "bmm bf16 us")
    for row in rows:
        cells = [row[key] for key in ("floor_us", "nvfp4_grouped_mm_us", "share", "bmm bf16_us")]
        table.add_row(str(row["groups"]), str(row["tokens"]), *(f"{cell:.2f}" for cell in cells))
    Console(width=160).print(peaks, table)


if __name__ == "__main__":
    main()
