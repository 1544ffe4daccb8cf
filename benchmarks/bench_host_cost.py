"""Host cost of packed weights: what 300 of them add to one call of a compiled model, by the way they reach the graph.

The operators' CPU kernels are replaced by ones that return the same tensors every time, so that what is left is the
host's work: Dynamo's guards, AOT's wrapper, the generated code, the dispatcher. Times are CPU time of the calling
thread, variants interleaved, median of the rounds, so that a busy machine disturbs them little.

    python benchmarks/bench_host_cost.py [--weights 300] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

import dsv4_compile
from dsv4_compile.backend import RewriteGraph, compile_bound, prepare
from dsv4_compile.binding import runner
from dsv4_compile.options import Options

WIDTH = 32


class Chain(nn.Module):
    """``num_weights`` linears, one behind the other."""

    def __init__(self, num_weights: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_weights))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def replace_kernels() -> torch.library.Library:
    """Gives the two operators of a linear CPU kernels that do nothing; they stay while the library object lives."""
    quantized = dsv4_compile.ops.quantize_nvfp4(torch.randn(1, WIDTH))
    product = torch.randn(1, WIDTH, dtype=torch.bfloat16)
    library = torch.library.Library("dsv4", "IMPL")
    library.impl("quantize_nvfp4", lambda x, granularity: quantized, "CPU", allow_override=True)
    library.impl("nvfp4_mm", lambda *args: product, "CPU", allow_override=True)
    return library


def time_us(function: Callable[..., Any], x: Tensor, calls: int) -> float:
    """CPU time of a call in microseconds, mean of ``calls``."""
    start = time.thread_time()
    for _ in range(calls):
        function(x)
    return (time.thread_time() - start) / calls * 1e6


def unbound_backend(gm: Any, example_inputs: Any) -> Any:
    """The same passes, but packed weights stay inputs: AOT takes them apart on every call."""
    with torch.no_grad():
        return compile_fx(gm, example_inputs, config_patches={"joint_custom_pre_pass": RewriteGraph(Options())})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=300)
    parser.add_argument("--calls", type=int, default=20, help="calls a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="append the figures as one line to this file")
    arguments = parser.parse_args()

    model = Chain(arguments.weights).bfloat16().eval()
    dsv4_compile.quantize_(model)
    x = torch.randn(1, WIDTH, dtype=torch.bfloat16)

    def bound_backend(gm: Any, example_inputs: Any) -> Any:
        bound = prepare(gm, example_inputs, Options())
        compiled = compile_bound(bound, [example_inputs[index] for index in bound.kept], Options())
        return runner(compiled, bound)

    skip_guards = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    library = replace_kernels()
    variants: dict[str, Callable[..., Any]] = {}
    samples: dict[str, list[float]] = {}
    with torch.inference_mode():
        for name, backend, options in (
            ("subclass inputs", unbound_backend, None),
            ("subclass inputs, module guards skipped", unbound_backend, skip_guards),
            ("bound", bound_backend, None),
            ("bound, module guards skipped", bound_backend, skip_guards),
        ):
            # A function of its own for each variant: Dynamo keeps the compiled code of one apart from the others'.
            def call(x: Tensor, model: nn.Module = model) -> Tensor:
                return model(x)

            forward = types.FunctionType(
                call.__code__.replace(co_name=name.replace(" ", "_")), globals(), name, (model,)
            )
            variants[name] = torch.compile(forward, backend=backend, options=dict(options) if options else None)
            variants[name](x)
        for _ in range(arguments.rounds):
            for name, compiled in variants.items():
                samples.setdefault(name, []).append(time_us(compiled, x, arguments.calls))
    figures = {name: statistics.median(values) for name, values in samples.items()}
    del library

    table = Table(title=f"{arguments.weights} packed weights, {torch.__version__}", title_justify="left")
    for column in ("weights reach the graph as", "us a call", "us a weight"):
        table.add_column(column, justify="left" if column.startswith("weights") else "right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.0f}", f"{value / arguments.weights:.2f}")
    Console().print(table)
    if arguments.json:
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.write(json.dumps({"weights": arguments.weights, "torch": torch.__version__, **figures}) + "\n")


if __name__ == "__main__":
    main()
