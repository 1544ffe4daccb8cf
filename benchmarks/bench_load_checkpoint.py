"""Time and peak memory of ``load_checkpoint`` on a large checkpoint, against the raw read speed of the disk.

Writes a checkpoint of DeepSeek V4 Flash's widths as nvidia stores it (experts NVFP4, linears FP8, the rest bf16), one
shard a layer, and loads it into a model on the meta device, with torch's default number of threads and with one.
Reading the same files through one 8 MiB buffer is the raw speed. Each run is a process of its own, the kinds
interleaved; before each the files are dropped from the page cache (``posix_fadvise``), and the bytes that the kernel
then fetched from the disk are given, which shows that they were. Peak memory is the kernel's high-water mark of
resident pages (reset before the load) above what was resident before. The files are deleted at the end.

    python benchmarks/bench_load_checkpoint.py [--layers 5] [--experts 230] [--repeats 1] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv4_compile.checkpoint import load_checkpoint

RAW = "raw read"
KINDS = (RAW, "load_checkpoint", "load_checkpoint, one thread")
BUFFER_BYTES = 8 << 20
SPARE_BYTES = 3 << 30  # of memory that must be left to others


def build_model(layers: int, experts: int) -> nn.Module:
    """DeepSeek V4 Flash with fewer layers and experts, bf16, on the meta device."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        vocab_size=129280,
        hidden_size=4096,
        moe_intermediate_size=2048,
        num_hidden_layers=layers,
        layer_types=["sliding_attention"] * layers,
        mlp_layer_types=["moe"] * layers,
        num_attention_heads=64,
        head_dim=512,
        q_lora_rank=1024,
        o_groups=8,
        o_lora_rank=1024,
        n_routed_experts=experts,
        num_experts_per_tok=6,
    )
    with torch.device("meta"):
        model: nn.Module = DeepseekV4ForCausalLM(config).to(torch.bfloat16)
    return model


def stored_tensors(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What is stored for a parameter: one expert's bytes are its number, so that a load can be checked."""
    block, _, projection = name.rpartition(".")
    if projection in ("gate_up_proj", "down_proj") and parameter.dim() == 3:
        halves = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        n, k = parameter.shape[1] // len(halves), parameter.shape[2]
        for expert in range(parameter.shape[0]):
            for half in halves:
                weight = f"{block}.{expert}.{half}.weight"
                yield weight, torch.full((n, k // 2), expert, dtype=torch.uint8)
                yield (
                    f"{weight}_scale",
                    torch.full((n, k // 16), 8 + expert % 64, dtype=torch.uint8).view(torch.float8_e4m3fn),
                )
                yield f"{weight}_scale_2", torch.tensor(1.0 + expert)
    elif parameter.dim() == 2 and ("self_attn" in name or "shared_experts" in name) and "norm" not in name:
        n, k = parameter.shape
        yield name, torch.full((n, k), 0.5).to(torch.float8_e4m3fn)
        yield (
            f"{name.removesuffix('weight')}scale",
            torch.full((-(-n // 128), -(-k // 128)), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        )
    else:
        yield name, torch.ones(parameter.shape, dtype=parameter.dtype)


def write_checkpoint(model: nn.Module, folder: Path) -> list[Path]:
    """One shard a layer and one for the rest, flushed to the disk."""
    shards: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.state_dict().items():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})[name] = parameter
    files, weight_map = [], {}
    for shard, parameters in shards.items():
        tensors = dict(pair for name, parameter in parameters.items() for pair in stored_tensors(name, parameter))
        file = folder / f"model-{shard}.safetensors"
        save_file(tensors, file)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        weight_map |= dict.fromkeys(tensors, file.name)
        files.append(file)
        del tensors
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return files


def check(model: nn.Module) -> None:
    """That the experts are where they belong, and FP8 weights are what they stand for."""
    experts = next(module for module in model.modules() if hasattr(module, "gate_up_proj"))
    numbers = torch.arange(len(experts.gate_up_proj), dtype=torch.uint8)
    for weight in (experts.gate_up_proj, experts.down_proj):
        assert torch.equal(weight.codes[:, 0, 0], numbers)
        assert torch.equal(weight.codes[:, -1, -1], numbers)
        assert torch.equal(weight.block_scales[:, -1, -1].view(torch.uint8), 8 + numbers % 64)
        assert torch.equal(weight.global_scale.reshape(len(numbers), -1)[:, -1], 1.0 + numbers)
    attention = next(value for name, value in model.named_parameters() if name.endswith("o_b_proj.weight"))
    assert bool((attention == 0.5).all())


def run_child(kind: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One run in a fresh process, with the files out of the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    command = [sys.executable, "-W", "ignore", __file__, "--child", kind, "--folder", str(folder)]
    command += ["--layers", str(arguments.layers), "--experts", str(arguments.experts)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One run in this process."""
    folder = Path(arguments.folder)
    model = build_model(arguments.layers, arguments.experts)
    if kind == KINDS[2]:
        torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # if memory runs out, this process goes
    rss_before, disk_before, before = proc("status", "VmRSS:") << 10, proc("io", "read_bytes:"), os.times()
    start = time.perf_counter()
    if kind == RAW:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
    else:
        load_checkpoint(model, folder)
    figures = {
        "wall_s": time.perf_counter() - start,
        "user_s": os.times().user - before.user,
        "system_s": os.times().system - before.system,
        "disk_bytes": proc("io", "read_bytes:") - disk_before,
        "peak_bytes": (proc("status", "VmHWM:") << 10) - rss_before,
    }
    if kind != RAW:
        check(model)
        sizes = [getattr(value, "packed_bytes", value.nbytes) for value in model.state_dict().values()]
        figures["loaded_bytes"] = sum(sizes)
    return figures


def proc(file: str, field: str) -> int:
    """A number from /proc/self."""
    lines = Path("/proc/self", file).read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--experts", type=int, default=230, help="at most 256")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", help="where to write the checkpoint (default the folder for temporary files)")
    parser.add_argument("--json", help="append the figures as one line to this file")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments)))
        return

    available = int(next(x for x in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in x).split()[1])
    model = build_model(arguments.layers, arguments.experts)
    experts = sum(value.numel() for value in model.parameters() if value.dim() == 3)
    needed = experts * 9 // 16 + 2 * (sum(value.numel() for value in model.parameters()) - experts)
    if (available << 10) < needed + SPARE_BYTES:
        raise SystemExit(
            f"--layers: {needed / 1e9:.1f} GB will be loaded, {available * 1024 / 1e9:.1f} GB are available"
        )
    folder = Path(tempfile.mkdtemp(prefix="bench-load-", dir=arguments.folder))
    try:
        start = time.perf_counter()
        files = write_checkpoint(model, folder)
        stored_bytes = sum(file.stat().st_size for file in files)
        print(f"{stored_bytes / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        samples: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(arguments.repeats):
            for kind in KINDS:
                samples[kind].append(run_child(kind, arguments, folder))
                print(kind, samples[kind][-1], file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    report(stored_bytes, samples, arguments)


def report(stored_bytes: int, samples: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    """Prints the medians, and appends all figures to the file that was asked for."""
    table = Table(title=f"{stored_bytes / 1e9:.2f} GB in {arguments.layers + 1} files", title_justify="left")
    for column in ("", "wall s", "GB/s", "user s", "system s", "from disk GB", "peak memory GB", "loaded GB"):
        table.add_column(column, justify="right" if column else "left")
    for kind, rows in samples.items():
        row = {key: statistics.median(sample[key] for sample in rows) for key in rows[0]}
        spread = f"{row['wall_s']:.1f} ({min(x['wall_s'] for x in rows):.1f}-{max(x['wall_s'] for x in rows):.1f})"
        seconds = [f"{row[key]:.1f}" for key in ("user_s", "system_s")]
        gigabytes = [
            f"{row[key] / 1e9:.2f}" if key in row else "" for key in ("disk_bytes", "peak_bytes", "loaded_bytes")
        ]
        table.add_row(kind, spread, f"{stored_bytes / row['wall_s'] / 1e9:.2f}", *seconds, *gigabytes)
    Console().print(table)
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        common: dict[str, Any] = {
            "commit": commit.stdout.strip(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "layers": arguments.layers,
            "experts": arguments.experts,
            "stored_bytes": stored_bytes,
        }
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(common | samples) + "\n")


if __name__ == "__main__":
    main()
