"""One DeepSeek V4 decoder layer at full Flash width on a GPU: dsv4 against Inductor in bf16, in one run.

    python benchmarks/bench_decoder_layer.py [--tokens 1 8 64 2048] [--replays 20]

HuggingFace's layer (compressed sparse attention, 256 experts, top-6), random weights, compiled with
mode="reduce-overhead" both times, no cache: T tokens attend to each other only, so the projections, the router, the
norms and the experts have their real sizes and the attention core does not. Both graphs are captured by Inductor's own
CUDA graphs; the time is that of a call, replay included, between two events.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from harness import measure_peaks, record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv4_compile.quantization import quantize_


def make_model(num_experts: int) -> Any:
    """A one-layer DeepSeek V4 at Flash width with a small vocabulary, bf16 on the GPU, random weights."""
    from transformers import DeepseekV4Config, DeepseekV4Model

    config = DeepseekV4Config(
        vocab_size=1024,
        n_routed_experts=num_experts,
        num_hidden_layers=1,
        layer_types=["compressed_sparse_attention"],
        mlp_layer_types=["moe"],
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = DeepseekV4Model(config).eval()
        torch.set_default_dtype(torch.float32)
    return model.to(torch.bfloat16)


def time_calls(call: Callable[[], Any], replays: int) -> list[float]:
    """Times of single calls in us, warm."""
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        call()
    times = []
    flush = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(replays):
        flush.zero_()  # no call finds the weights of the one before in the L2
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.compiler.cudagraph_mark_step_begin()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 2048])
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--experts", type=int, default=256)
    arguments = parser.parse_args()

    peaks = measure_peaks()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        torch.manual_seed(0)
        model = make_model(arguments.experts)
        inputs = {tokens: torch.randint(0, 1024, (1, tokens), device="cuda") for tokens in arguments.tokens}
        results: dict[str, dict[int, tuple[float, Tensor]]] = {"inductor_bf16": {}, "dsv4": {}}
        for name in results:
            if name == "dsv4":
                quantize_(model)
            for tokens, ids in inputs.items():
                torch._dynamo.reset()
                backend = "inductor" if name == "inductor_bf16" else "dsv4"
                compiled = torch.compile(model, backend=backend, mode="reduce-overhead", dynamic=False)
                times = time_calls(lambda c=compiled, i=ids: c(i, use_cache=False), arguments.replays)
                output = compiled(ids, use_cache=False).last_hidden_state.float().clone()
                results[name][tokens] = statistics.median(times), output
                rows.append({"variant": name, "tokens": tokens, "median_us": statistics.median(times)})
                rows[-1] |= {"min_us": min(times), "max_us": max(times), "experts": arguments.experts}
                print(rows[-1], flush=True)
    table = Table(title="One V4-Flash decoder layer, us a call")
    for column in ("tokens", "Inductor bf16", "dsv4", "speed-up", "SQNR dB"):
        table.add_column(column, justify="right")
    for tokens in arguments.tokens:
        (rival, reference), (ours, output) = results["inductor_bf16"][tokens], results["dsv4"][tokens]
        sqnr = 10 * torch.log10(reference.square().sum() / (reference - output).square().sum())
        table.add_row(str(tokens), f"{rival:.0f}", f"{ours:.0f}", f"{rival / ours:.2f}x", f"{sqnr:.1f}")
    Console().print(table)
    record("decoder_layer", rows, peaks)


if __name__ == "__main__":
    main()
