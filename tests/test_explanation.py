"""``explain`` and the command line: what they say must be what the compiled graphs do."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import fake_tensor_tls

import dsv4_compile
from dsv4_compile.cli import main
from dsv4_compile.demo import demo_model
from dsv4_compile.explanation import kernel_name
from tests import torch_2_11


class Block(nn.Module):
    """A linear that is matched, an embedding, an fp32 weight, and a product that no pass takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 32)
        self.up = nn.Linear(32, 64)
        self.left = nn.Linear(48, 32, bias=False)
        self.exact = nn.Linear(64, 16, bias=False)
        self.bfloat16()
        self.exact.float()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.embed_tokens(ids))
        return self.exact(x.float()) @ torch.matmul(self.left.weight, torch.ones(48, 16).bfloat16()).float()[:16]


def test_regions_totals_and_reasons() -> None:
    """A table that counts a dequantised or skipped weight as covered hides the very thing it is for."""
    found = dsv4_compile.explain(Block(), torch.arange(4))
    regions = {region.module: region for region in found.regions}
    assert regions["up.weight"].operator == "nvfp4_mm"
    assert regions["up.weight"].kernel == "CPU reference"
    assert regions["embed_tokens.weight"].reason == "excluded by '*embed*'"
    assert regions["exact.weight"].reason == "float32 weight"
    assert "no pass" in regions["left.weight"].reason
    assert [region.module for region in found.covered] == ["up.weight"]
    assert sorted(region.module for region in found.eligible) == ["left.weight", "up.weight"]
    assert found.covered_fraction == pytest.approx(32 * 64 / (32 * 64 + 48 * 32))
    (activation,) = found.activations
    assert activation.readers == ("up.weight",)
    assert activation.shape == (4, 32)
    assert "1 of 2 eligible weights" in found.summary()
    assert "left.weight" in str(found)


@pytest.mark.parametrize("gsa", ["tensor", "token"])
def test_global_scales_are_those_of_the_activation(gsa: str) -> None:
    """The gsa shown is max|x| / 2688 of what really arrived, not of a trace with other values."""
    x = torch.randn(4, 32).bfloat16()
    found = dsv4_compile.explain(nn.Linear(32, 16).bfloat16(), x, options={"gsa": gsa})
    scales = x.float().abs().amax(-1) / torch.full((4,), 2688.0)
    expected = (scales.max(),) if gsa == "tensor" else (scales.min(), scales.max())
    assert found.activations[0].global_scales == tuple(float(scale) for scale in expected)


def test_weights_behind_a_loop_over_experts_are_listed() -> None:
    """Experts in a Python loop over the hit ones are not compiled; they vanished from the table instead of being named."""
    model = demo_model()
    model.config._experts_implementation = "eager"
    found = dsv4_compile.explain(model.model.layers[1].mlp, torch.randn(1, 6, 256).bfloat16())
    experts = {region.module: region for region in found.regions if region.kind == "experts"}
    assert set(experts) == {"experts.gate_up_proj", "experts.down_proj"}
    assert all(region.eligible and "in no graph" in region.reason for region in experts.values())
    assert found.covered_fraction < 0.5
    assert any("nonzero" in reason for reason in found.graph_breaks)


@pytest.mark.parametrize("packed", [False, True])
def test_repeated_regions_list_every_weight(packed: bool) -> None:
    """Layers that share one compiled subgraph have weights of their own; only the first one's were listed."""

    class Layer(nn.Linear):
        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = nn.Sequential(*(Layer(32, 32) for _ in range(3))).bfloat16()
    if packed:
        dsv4_compile.quantize_(model)
    with torch_2_11.packed_region() if packed else nullcontext():
        found = dsv4_compile.explain(model, torch.randn(2, 32).bfloat16())
    assert sorted(region.module for region in found.covered) == ["0.weight", "1.weight", "2.weight"]


def test_constant_on_the_meta_device() -> None:
    """Guards against refusing models that make a tensor on the device of their inputs, as a mask of transformers is."""
    layer = nn.Linear(32, 32, device="meta", dtype=torch.bfloat16)

    def model(x: Tensor) -> Tensor:
        return layer(torch.where(x > 0, torch.tensor(0.0, device=x.device, dtype=x.dtype), x))

    found = dsv4_compile.explain(model, torch.empty(2, 32, device="meta", dtype=torch.bfloat16))
    assert [region.operator for region in found.regions] == ["nvfp4_mm"]
    assert fake_tensor_tls.allow_non_fake_inputs_override is None


def test_command_explains_a_config_without_allocating(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A full-size model is explained from its config on the meta device; a layer's quantisations are counted."""
    config = demo_model().config.to_dict()
    config.update(architectures=["DeepseekV4ForCausalLM"], hidden_size=4096, moe_intermediate_size=2048)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["explain", str(tmp_path), "--layers", "1", "--tokens", "16"]) == 0
    output = capsys.readouterr().out
    assert "10 of 10 eligible weights (100.0%" in output
    assert "6 quantisations (6 to 6 a layer)" in output


def test_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing folder is one line on standard error, not a traceback."""
    assert main(["explain", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), "sm_90 kernels"), ((10, 3), "no kernel for sm_103")], ids=str
)
def test_names_what_runs_on_a_gpu(capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a Hopper GPU that is told it has no kernel, and another one that is told it has."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernel_name(torch.device("cuda", 0)) == expected
    assert kernel_name(torch.device("cpu")) == "CPU reference"
    assert kernel_name(torch.device("xpu")) == "no kernel for xpu"
