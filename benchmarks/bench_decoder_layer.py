"""One DeepSeek V4 decoder layer at full Flash width on a GPU: dsv4 against Inductor in bf16, in one run.

    python benchmarks/bench_decoder_layer.py [--tokens 1 8 64 2048] [--replays 20] [--rounds 3]

HuggingFace's layer (compressed sparse attention, 256 experts, top-6), random weights, compiled with
mode="reduce-overhead" both times, no cache: T tokens attend to each other only, so the projections, the router, the
norms and the experts have their real sizes and the attention core does not. Both graphs are captured by Inductor's own
CUDA graphs.

``gpu_us`` is what the GPU needs: the calls are queued while it sleeps, so that it replays without waiting for the host.
``call_us`` is the wall clock of one call and the wait for its result: Dynamo's guards, the launch and the GPU.

A compilation takes a minute, most of it on one core. So each (variant, number of tokens) is a process of its own: they
compile side by side, and when all have, they are timed one after the other, in rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from harness import measure_peaks, record
from rich.console import Console
from rich.table import Table

from dsv4_compile.quantization import quantize_

BACKENDS = {"dsv4": "dsv4", "inductor_bf16": "inductor"}  # in this order: packed models leave room for the others
DEVICE = "cuda"
FIRST_SLEEP_CYCLES = 2_000_000  # about a millisecond
MAX_SLEEP_CYCLES = 1 << 29  # a third of a second: whoever has not queued a call by then waits for the GPU in it


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
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        model = DeepseekV4Model(config).eval()
        torch.set_default_dtype(torch.float32)
    return model.to(torch.bfloat16)


def gpu_times(call: Callable[[], Any], replays: int) -> list[float]:
    """Times of single calls in us between events that the GPU reaches after the host has queued all of them.

    Raises:
        RuntimeError: a call is not queued while the GPU sleeps for MAX_SLEEP_CYCLES.
    """
    flush = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)
    cycles, times = FIRST_SLEEP_CYCLES, []
    while len(times) < replays:
        flush.zero_()  # no call finds the weights of the one before in the L2
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
        is_queued_in_time = not start.query()
        end.synchronize()
        if is_queued_in_time:
            times.append(start.elapsed_time(end) * 1e3)
        elif cycles >= MAX_SLEEP_CYCLES:
            raise RuntimeError("a call must not wait for the GPU, this one is not queued while the GPU sleeps")
        else:
            cycles *= 2
    return times


def call_times(call: Callable[[], Any], replays: int) -> list[float]:
    """Wall-clock times of single calls in us, each with the wait for its result."""
    flush = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)
    times = []
    for _ in range(replays):
        flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def serve(variant: str, tokens: int, num_experts: int, replays: int, output: Path) -> None:
    """One process: builds and compiles, then times whenever a line comes; answers in lines of JSON."""

    def say(**fields: Any) -> None:
        print(json.dumps(fields), flush=True)

    start = time.perf_counter()
    with torch.inference_mode():
        torch.manual_seed(0)
        say(ready_s=time.perf_counter() - start)
        sys.stdin.readline()  # a turn to build: bf16 experts and their packed copies, one process at a time
        model = make_model(num_experts)
        torch.manual_seed(tokens)
        ids = torch.randint(0, 1024, (1, tokens), device=DEVICE)
        if variant == "dsv4":
            quantize_(model)
        torch.cuda.empty_cache()
        say(built_s=time.perf_counter() - start)
        compiled = torch.compile(model, backend=BACKENDS[variant], mode="reduce-overhead", dynamic=False)

        def call() -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(ids, use_cache=False)

        for _ in range(5):  # compiles, records a CUDA graph, replays it
            result = call()
        torch.save(result.last_hidden_state.float().cpu(), output)
        say(compiled_s=time.perf_counter() - start)
        for _ in sys.stdin:
            for _ in range(3):
                call()
            answer: dict[str, Any] = {"call_us": call_times(call, replays)}
            try:
                answer["gpu_us"] = gpu_times(call, replays)
            except RuntimeError as error:
                answer |= {"gpu_us": [], "error": str(error)}
            say(**answer)


class Process:
    """A process that serves one variant at one number of tokens, and the lines it says."""

    def __init__(self, variant: str, tokens: int, folder: Path, arguments: argparse.Namespace) -> None:
        self.variant, self.tokens, self.output = variant, tokens, folder / f"{variant}_{tokens}.pt"
        command = [sys.executable, __file__, "--serve", variant, str(self.output), "--tokens", str(tokens)]
        command += ["--experts", str(arguments.experts), "--replays", str(arguments.replays)]
        self.running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.running.stdout is not None
        for line in self.running.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def go(self) -> None:
        """Says that it is this process's turn."""
        assert self.running.stdin is not None
        self.running.stdin.write("go\n")
        self.running.stdin.flush()

    def answer(self, field: str, until: float) -> dict[str, Any]:
        """Its next answer that has a field.

        Raises:
            RuntimeError: it ended, or said nothing until a ``time.monotonic()``.
        """
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(
                    f"{self.variant} at {self.tokens} tokens: no {field} within the time limit"
                ) from None
            if line is None:
                raise RuntimeError(f"{self.variant} at {self.tokens} tokens: ended with {self.running.wait()}")
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                if field in found:
                    print(f"{self.variant} {self.tokens}: " + _short(found), flush=True)
                    return found
            print(line, end="", flush=True)


def _short(answer: dict[str, Any]) -> str:
    values = {
        name: statistics.median(value or [0]) if isinstance(value, list) else value for name, value in answer.items()
    }
    return ", ".join(
        f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[tuple[str, int], dict[str, list[float]]], Any]:
    """All times by (variant, tokens), and the peaks of the GPU in between; a process that fails is left out."""
    until = time.monotonic() + arguments.timeout
    processes = [Process(v, t, folder, arguments) for v in BACKENDS for t in sorted(arguments.tokens, reverse=True)]
    failed: set[Process] = set()

    def answers(field: str, *, takes_turn: bool = False) -> Iterator[tuple[Process, dict[str, Any]]]:
        for process in processes:
            if process in failed:
                continue
            try:
                if takes_turn:
                    process.go()
                yield process, process.answer(field, until)
            except (RuntimeError, BrokenPipeError) as error:
                print(f"FAILED {error}", flush=True)
                failed.add(process)
                process.running.kill()

    try:
        for _ in answers("ready_s"):
            pass
        for _ in answers("built_s", takes_turn=True):
            pass
        for _ in answers("compiled_s"):
            pass
        peaks = measure_peaks()
        torch.cuda.empty_cache()
        times: dict[tuple[str, int], dict[str, list[float]]] = {}
        for _ in range(arguments.rounds):
            for process, answer in answers("call_us", takes_turn=True):
                into = times.setdefault((process.variant, process.tokens), {"gpu_us": [], "call_us": []})
                for name, values in into.items():
                    values += answer[name]
        return times, peaks
    finally:
        for process in processes:
            process.running.kill()


def as_row(variant: str, tokens: int, times: dict[str, list[float]], num_experts: int) -> dict[str, Any]:
    """Median, lowest and highest of each kind of time."""
    row: dict[str, Any] = {"variant": variant, "tokens": tokens, "experts": num_experts}
    for name, values in times.items():
        for suffix, reduce in (("", statistics.median), ("_min", min), ("_max", max)):
            row[name + suffix] = round(reduce(values), 1) if values else None
    return row


def main() -> None:
    """Prints and records the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 2048])
    parser.add_argument("--replays", type=int, default=20, help="timed calls of each kind in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--timeout", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--serve", nargs=2, metavar=("VARIANT", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        variant, output = arguments.serve
        serve(variant, arguments.tokens[0], arguments.experts, arguments.replays, Path(output))
        return
    count = len(BACKENDS) * len(arguments.tokens)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, 2 * (os.cpu_count() or 1) // count)))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))

    table = Table(title="One V4-Flash decoder layer, us, Inductor bf16 / dsv4")
    for column in ("tokens", "GPU", "speed-up", "call", "speed-up", "SQNR dB"):
        table.add_column(column, justify="right")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        times, peaks = measure(arguments, Path(folder))
        for tokens in arguments.tokens:
            timed = [variant for variant in BACKENDS if (variant, tokens) in times]
            rows += [as_row(variant, tokens, times[variant, tokens], arguments.experts) for variant in timed]
            cells = [""] * 5
            if len(timed) == len(BACKENDS):
                ours, rival = rows[-2:]
                cells = []
                for name in ("gpu_us", "call_us"):
                    has_both = rival[name] and ours[name]
                    cells += (
                        [f"{rival[name]} / {ours[name]}", f"{rival[name] / ours[name]:.2f}x"] if has_both else ["", ""]
                    )
                reference, output = (torch.load(Path(folder, f"{v}_{tokens}.pt")) for v in ("inductor_bf16", "dsv4"))
                sqnr = float(10 * torch.log10(reference.square().sum() / (reference - output).square().sum()))
                ours["sqnr_db"] = round(sqnr, 1)
                cells.append(f"{sqnr:.1f}")
            table.add_row(str(tokens), *cells)
    for row in rows:
        print(json.dumps(row), flush=True)
    Console().print(table)
    record("decoder_layer", rows, peaks)


if __name__ == "__main__":
    main()
