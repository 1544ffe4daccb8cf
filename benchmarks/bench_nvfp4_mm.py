"""Times packed-weight products against cuBLAS bf16 in the same run, with the share of the measured roofline.

Columns: ``cublas`` bf16 x bf16; ``w4a16`` is ``nvfp4_weight_mm``; ``w4a4`` is ``nvfp4_mm`` of a quantised activation,
its expansion included; ``quack`` and ``humming`` (benchmarks/rivals.py) where they are installed, else empty. A rival
that fails or gives a wrong result is named with what it said, and stands in the results as that. Ours must be a sum in
fp32 and one rounding; a rival, which may add in less, must be within a hundredth as a whole, and its error is recorded.

    python benchmarks/bench_nvfp4_mm.py [--tokens 1 16 64] [--replays 20]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import rivals
import torch
from harness import measure_peaks, record
from torch import Tensor

from dsv4_compile.ops import nvfp4_mm, nvfp4_weight_mm, quantize_nvfp4
from dsv4_compile.timing import copies_beyond_l2, time_variants

SHAPES = ((4096, 4096), (32768, 1024), (7168, 16384))  # N, K
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CHECKED_ROWS = 512
LARGEST_ERROR = 0.01  # of a rival, the norm of its difference relative to that of the product
WEIGHT_BYTES = 0.5625  # an element: half a byte of code, a sixteenth of a byte of scale


def any_weight(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Any codes and block scales between 2^-3 and 2^3."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    block_scales = torch.randint(0x20, 0x50, (n, k // 16), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    return codes, block_scales, torch.rand((), device="cuda")


def expected_rows(x: Tensor, weight: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The first columns of the product in float64, and of that of magnitudes."""
    from dsv4_compile import nvfp4

    w = nvfp4.scaled_codes(weight[0][:CHECKED_ROWS], weight[1][:CHECKED_ROWS]).double() * weight[2].double()
    return x.double() @ w.T, x.double().abs() @ w.abs().T


def error_of(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], y: Tensor) -> float:
    """Norm of a result's error relative to the product."""
    expected, _ = expected_rows(x, weight)
    return float((y[:, :CHECKED_ROWS].double() - expected).norm() / expected.norm())


def check(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], y: Tensor) -> None:
    """Raises unless a result is that of float64 up to fp32 sums and one rounding to bf16."""
    expected, magnitude = expected_rows(x, weight)
    wrong = ~((y[:, :CHECKED_ROWS].double() - expected).abs() <= expected.abs() * 2**-8 + magnitude * 2**-16)
    if wrong.any():
        raise RuntimeError(f"wrong result: {int(wrong.sum())} of {wrong.numel()} elements")


def measure(n: int, k: int, tokens: int, weights: list[Any], dense: list[Tensor], replays: int) -> dict[str, Any]:
    """One row of the table: the time of each variant in us."""
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    packed = quantize_nvfp4(x, "tensor")
    check(x, weights[0], nvfp4_weight_mm(x, *([part] for part in weights[0])))
    variants: dict[str, list[Callable[[], Any]]] = {
        "cublas": [lambda w=w: torch.mm(x, w.T) for w in dense],
        "w4a16": [lambda w=w: nvfp4_weight_mm(x, *([part] for part in w)) for w in weights],
        "w4a4": [lambda w=w: nvfp4_mm(*packed, *([part] for part in w)) for w in weights],
    }
    failed: dict[str, str] = {}
    errors = {"w4a16_error": round(error_of(x, weights[0], nvfp4_weight_mm(x, *([part] for part in weights[0]))), 5)}
    for name, prepare in rivals.installed().items():
        try:
            calls = [prepare(x, *w) for w in weights]
            error = error_of(x, weights[0], calls[0]())
            if not error <= LARGEST_ERROR:
                raise RuntimeError(f"wrong result: relative error {error:.3g}")
            errors[f"{name}_error"] = round(error, 5)
        except rivals.FAILURES as failure:
            failed[f"{name}_failed"] = f"{type(failure).__name__}: {failure}"[:200]
        else:
            variants[name] = calls
    times = time_variants(variants, replays=replays)
    row: dict[str, Any] = {"n": n, "k": k, "tokens": tokens}
    for name in ("cublas", "w4a16", "w4a4", "quack", "humming"):
        row[f"{name}_us"] = round(times[name].median_us, 2) if name in times else None
        row[f"{name}_spread_us"] = round(times[name].max_us - times[name].min_us, 2) if name in times else None
    return row | errors | failed


def main() -> None:
    """Prints and records the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--replays", type=int, default=20)
    arguments = parser.parse_args()
    peaks = measure_peaks()
    print(f"peaks: read {peaks.read_tb_s:.2f} TB/s, bf16 {peaks.bf16_tflop_s:.0f} TFLOP/s")
    rows = []
    for n, k in SHAPES:
        weights = [any_weight(n, k) for _ in range(copies_beyond_l2(int(n * k * WEIGHT_BYTES), 24))]
        dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(copies_beyond_l2(2 * n * k, 8))]
        for tokens in arguments.tokens:
            row = measure(n, k, tokens, weights, dense, arguments.replays)
            num_bytes = n * k * WEIGHT_BYTES + 2 * tokens * (n + k)
            floor_us = max(num_bytes / peaks.read_tb_s / 1e6, 2 * n * k * tokens / peaks.bf16_tflop_s / 1e6)
            row |= {"floor_us": round(floor_us, 2), "roofline_share": round(floor_us / row["w4a16_us"], 3)}
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items() if value is not None), flush=True)
    record("nvfp4_mm", rows, peaks)


if __name__ == "__main__":
    main()
