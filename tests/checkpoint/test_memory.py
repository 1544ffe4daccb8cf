"""Memory that loading takes: the new tensors, and what two stored ones take."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.checkpoint import stored

EXPERTS, HIDDEN, INTERMEDIATE = 24, 1024, 512

LOAD = """
import sys, threading, time, gc
import torch
from dsv4_compile.checkpoint import load_checkpoint
sys.path.insert(0, sys.argv[3])
from tests.checkpoint.test_memory import Model
from tests.checkpoint.test_memory import num_bytes

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

with torch.device("meta"):
    model = Model().bfloat16()
load_checkpoint(torch.nn.Linear(512, 512, bias=False), sys.argv[2])  # libraries and thread pools are not the loader's
gc.collect()
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
before = anonymous()
thread = threading.Thread(target=watch, daemon=True)
thread.start()
load_checkpoint(model, sys.argv[1])
done = True
thread.join()
print(max(peak, anonymous()) - before, num_bytes(model))
"""


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * INTERMEDIATE, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INTERMEDIATE))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(4096, HIDDEN)
        self.experts = Experts()
        self.q_b_proj = nn.Linear(HIDDEN, 4096, bias=False)


def num_bytes(model: nn.Module) -> int:
    return sum(getattr(p, "packed_bytes", p.numel() * p.element_size()) for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounts of memory")
def test_peak_memory(tmp_path: Path) -> None:
    """Guards against a stacked bf16 copy of the experts, which is 3.6 times the packed ones, or a second packed one."""
    tensors: stored.Tensors = {"embed.weight": torch.randn(4096, HIDDEN).bfloat16()}
    tensors["q_b_proj.weight"], tensors["q_b_proj.scale"] = stored.fp8_parts(
        torch.randn(4096, HIDDEN), 128, torch.float8_e8m0fnu
    )
    w1, w2 = (stored.mxfp4_parts(torch.randn(n, k)) for n, k in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)))
    for expert in range(EXPERTS):
        for name, (codes, scale) in {"w1": w1, "w2": w2, "w3": w1}.items():
            tensors[f"experts.{expert}.{name}.weight"], tensors[f"experts.{expert}.{name}.scale"] = codes, scale
    folder = stored.write(tmp_path, {name: value.clone() for name, value in tensors.items()}, shards=2)
    codes, scale = stored.mxfp4_parts(torch.randn(512, 512))
    small = stored.write(tmp_path / "small", {"weight": codes, "scale": scale})
    root = str(Path(__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", LOAD, folder, small, root], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peak, loaded = map(int, run.stdout.split())
    largest = max(value.nbytes for value in tensors.values())
    assert loaded == 4096 * HIDDEN * 2 * 2 + EXPERTS * (3 * INTERMEDIATE * HIDDEN * 9 // 16 + 12)
    assert loaded <= peak <= loaded + 2 * largest
