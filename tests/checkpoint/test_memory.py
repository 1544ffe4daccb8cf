"""Memory that loading takes: the new tensors, and what two stored ones take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.checkpoint import peak_memory, stored

EXPERTS, HIDDEN, INTERMEDIATE = 24, 1024, 512

LOAD = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from dsv4_compile.checkpoint import load_checkpoint
from tests.checkpoint.peak_memory import peak_bytes
from tests.checkpoint.test_memory import Model, num_bytes

with torch.device("meta"):
    model, small = Model().bfloat16(), Model(2).bfloat16()
load_checkpoint(small, sys.argv[2], fp8=sys.argv[4])  # libraries and thread pools are not the loader's
del small
peak = peak_bytes(lambda: load_checkpoint(model, sys.argv[1], fp8=sys.argv[4]))
print(peak, num_bytes(model))
"""


class Experts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * INTERMEDIATE, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(experts, HIDDEN, INTERMEDIATE))


class Model(nn.Module):
    def __init__(self, experts: int = EXPERTS) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(4096 if experts == EXPERTS else 128, HIDDEN)
        self.experts = Experts(experts)
        self.q_b_proj = nn.Linear(HIDDEN, 4096 if experts == EXPERTS else 256, bias=False)


def num_bytes(model: nn.Module) -> int:
    return sum(getattr(p, "packed_bytes", p.numel() * p.element_size()) for p in model.parameters())


def write(folder: Path, model: Model, span: int) -> int:
    """Native DeepSeek V4 tensors for a model; returns the size of the largest."""
    rows, outputs = model.embed_tokens.weight.shape[0], model.q_b_proj.weight.shape[0]
    tensors: stored.Tensors = {"embed.weight": torch.randn(rows, HIDDEN).bfloat16()}
    tensors["q_b_proj.weight"], tensors["q_b_proj.scale"] = stored.fp8_parts(
        torch.randn(outputs, HIDDEN), 128, torch.float8_e8m0fnu
    )
    w1, w2 = torch.randn(INTERMEDIATE, HIDDEN), torch.randn(HIDDEN, INTERMEDIATE)
    narrow = {"w1": stored.mxfp4_parts(w1), "w2": stored.mxfp4_parts(w2), "w3": stored.mxfp4_parts(w1)}
    w1[0] *= 2.0**-span
    wide = {"w1": stored.mxfp4_parts(w1), "w2": narrow["w2"], "w3": narrow["w3"]}
    for expert in range(len(model.experts.down_proj)):
        for name, (codes, exponents) in (wide if expert < 3 else narrow).items():
            tensors[f"experts.{expert}.{name}.weight"] = codes.clone()
            tensors[f"experts.{expert}.{name}.scale"] = exponents.clone()
    stored.write(folder, tensors, shards=2)
    return max(value.nbytes for value in tensors.values())


@pytest.mark.skipif(not peak_memory.RESET.exists(), reason="reads Linux's accounts of memory")
@pytest.mark.parametrize(("fp8", "span"), [("bfloat16", 0), ("nvfp4", 30)], ids=["as stored", "quantised anew"])
def test_peak_memory(fp8: str, span: int, tmp_path: Path) -> None:
    """Guards against stacked bf16 experts (3.6 times the packed ones), a second packed copy, pages mapped and kept."""
    with torch.device("meta"):
        whole, small = Model().bfloat16(), Model(2).bfloat16()
    largest = write(tmp_path / "whole", whole, span)
    write(tmp_path / "small", small, span)
    arguments = [str(tmp_path / "whole"), str(tmp_path / "small"), str(Path(__file__).parents[2]), fp8]
    command, environment = [sys.executable, "-c", LOAD, *arguments], os.environ | peak_memory.ENVIRONMENT
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peak, loaded = map(int, run.stdout.split())
    q_b_proj = 4096 * HIDDEN * 2 if fp8 == "bfloat16" else 4096 * HIDDEN * 9 // 16 + 4
    assert loaded == 4096 * HIDDEN * 2 + q_b_proj + EXPERTS * (3 * INTERMEDIATE * HIDDEN * 9 // 16 + 12)
    assert 0.9 * loaded < peak < loaded + 2 * largest, (peak, loaded, largest)
