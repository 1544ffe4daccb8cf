"""The experts of DeepSeek V4 on a GPU: the whole of ``nvfp4_moe`` against the whole block in bf16, in one run.

    python benchmarks/bench_nvfp4_moe.py [--tokens 1 4 16 64 256 1024 4096] [--experts 256] [--top-k 6]
        [--hidden 4096] [--intermediate 2048] [--no-bf16]

Random weights and activations, uniform routing, another one for each call in a graph, so that few experts of one call
are in the L2 when the next comes. ``bf16`` is the form that HuggingFace's experts have with ``grouped_mm``: sort,
gather, two grouped products, SwiGLU, weights, scatter; compiled by torch.compile (Inductor). The floor is
``max(bytes / measured read bandwidth, FLOP / measured bf16 rate)`` with 0.5625 bytes a weight of the experts hit.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import measure_peaks, record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv4_compile.ops import nvfp4_moe, quantize_nvfp4
from dsv4_compile.ops.nvfp4_moe import reference
from dsv4_compile.timing import time_variants

LIMIT = 10.0
CALLS = 8  # a graph, each with its own tokens and routing
BYTES_OF_A_WEIGHT = 0.5625
Packed = tuple[Tensor, Tensor, Tensor]


def any_experts(experts: int, n: int, k: int) -> Packed:
    """Random packed weights; scales around those of weights of size 1 / sqrt(k)."""
    codes = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, device="cuda")
    block_scales = torch.randint(0x68, 0x78, (experts, n, k // 16), dtype=torch.uint8, device="cuda")
    return codes, block_scales.view(torch.float8_e4m3fn), torch.full((experts,), 2e-3 / k**0.5, device="cuda")


def any_call(tokens: int, experts: int, top_k: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, ids and weights; a token's experts are distinct."""
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    ids = torch.rand(tokens, experts, device="cuda").argsort(-1)[:, :top_k].contiguous()
    return x, ids, torch.rand(tokens, top_k, device="cuda")


def bf16_block(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every step between the router's choice and the sum over experts, with torch's grouped product."""
    tokens, top_k = ids.shape
    order = ids.flatten().argsort()
    ends = torch.zeros(gate_up.shape[0], dtype=torch.int32, device=x.device)
    ends = ends.scatter_add(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=torch.int32)).cumsum(0)
    ends = ends.to(torch.int32)
    rows = x[order // top_k]
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    h = F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
    y = F.grouped_mm(h, down.transpose(1, 2), offs=ends)
    y = y * weights.flatten()[order].unsqueeze(-1)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=x.device))
    return y[inverse].view(tokens, top_k, -1).sum(1).to(x.dtype)


def check(gate_up: Packed, down: Packed, top_k: int, hidden: int) -> float:
    """SQNR in dB of two tokens against the reference, run by torch; a code of the input of ``down`` may move."""
    x, ids, weights = any_call(2, down[0].shape[0], top_k, hidden)
    a = quantize_nvfp4(x)
    args = (*a, ids, weights, *gate_up, *down)
    expected = reference(*args, LIMIT, "after_down", "tensor", torch.bfloat16).double()
    noise = expected - nvfp4_moe(*args, LIMIT).double()
    return float(10 * torch.log10(expected.square().sum() / noise.square().sum()))


def hit_experts(calls: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    return sum(ids.unique().numel() for _, ids, _ in calls) / len(calls)


def measure(arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """One row for each number of tokens."""
    experts, top_k, hidden, intermediate = (
        getattr(arguments, name) for name in ("experts", "top_k", "hidden", "intermediate")
    )
    peaks = measure_peaks()
    console.print(peaks)
    gate_up, down = any_experts(experts, 2 * intermediate, hidden), any_experts(experts, hidden, intermediate)
    sqnr = check(gate_up, down, top_k, hidden)
    console.print(f"against the reference: {sqnr:.1f} dB")
    if not sqnr > 35:
        raise SystemExit("nvfp4_moe differs from the reference, nothing is timed")
    wide = None
    if not arguments.no_bf16:
        wide = [
            torch.randn(experts, n, k, dtype=torch.bfloat16, device="cuda") / k**0.5
            for n, k in ((2 * intermediate, hidden), (hidden, intermediate))
        ]
    rows = []
    for tokens in arguments.tokens:
        calls = [any_call(tokens, experts, top_k, hidden) for _ in range(CALLS)]
        variants: dict[str, list[Callable[[], Any]]] = {"nvfp4_moe": [], "with quantize": []}
        for x, ids, weights in calls:
            a = quantize_nvfp4(x)
            run = functools.partial(nvfp4_moe, topk_ids=ids, topk_weights=weights, limit=LIMIT, **named(gate_up, down))
            variants["nvfp4_moe"].append(functools.partial(run, *a))
            variants["with quantize"].append(lambda x=x, run=run: run(*quantize_nvfp4(x)))
        if wide is not None:
            torch._dynamo.reset()
            compiled = torch.compile(bf16_block, dynamic=False)
            variants["bf16"] = [functools.partial(compiled, *call, *wide) for call in calls]
        timings = time_variants(variants, replays=arguments.replays)
        hit = hit_experts(calls)
        elements = 3 * hidden * intermediate
        floor_us = max(
            hit * elements * BYTES_OF_A_WEIGHT / peaks.read_tb_s / 1e6,
            2 * tokens * top_k * elements / peaks.bf16_tflop_s / 1e6,
        )
        row = {"tokens": tokens, "experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate}
        row |= {"experts_hit": hit, "floor_us": floor_us, "share": floor_us / timings["nvfp4_moe"].median_us}
        for name, timing in timings.items():
            row[f"{name}_us"] = timing.median_us
            row[f"{name}_spread_us"] = (timing.min_us, timing.max_us)
        console.print(row)
        rows.append(row)
    record("nvfp4_moe", rows, peaks)
    return rows


def named(gate_up: Packed, down: Packed) -> dict[str, Tensor]:
    parts = ("codes", "block_scales", "global_scale")
    return {
        f"{prefix}_{part}": tensor
        for prefix, packed in (("gate_up", gate_up), ("down", down))
        for part, tensor in zip(parts, packed, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096])
    for name, default in (("experts", 256), ("top-k", 6), ("hidden", 4096), ("intermediate", 2048), ("replays", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-bf16", action="store_true", help="leave the bf16 block out")
    arguments = parser.parse_args()
    console = Console(width=160)
    with torch.inference_mode():
        rows = measure(arguments, console)
    table = Table("tokens", "experts hit", "floor us", "nvfp4_moe us", "share", "with quantize us", "bf16 us")
    for row in rows:
        cells = [row[key] for key in ("floor_us", "nvfp4_moe_us", "share", "with quantize_us")]
        bf16 = f"{row['bf16_us']:.1f}" if "bf16_us" in row else ""
        table.add_row(str(row["tokens"]), f"{row['experts_hit']:.0f}", *(f"{cell:.2f}" for cell in cells), bf16)
    console.print(table)


if __name__ == "__main__":
    main()
