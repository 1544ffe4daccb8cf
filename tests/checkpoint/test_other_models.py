"""``load_checkpoint`` of other models by the same rules, and its options."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsv4_compile.checkpoint import load_checkpoint
from dsv4_compile.checkpoint.index import Checkpoint
from tests.checkpoint import stored
from tests.checkpoint.models import assert_same_model, empty_model, nvfp4_values, unpacked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fp8": "int8"}, "fp8 must be one of bfloat16, nvfp4, got 'int8'"),
        ({"experts": [1, 2]}, r"experts must be a range of expert numbers with step 1, got \[1, 2\]"),
        ({"experts": range(0)}, "experts must be a range"),
        ({"experts": range(-1, 2)}, "experts must be a range"),
        ({"device": "meta"}, "device must be one that holds data, got meta"),
    ],
)
def test_rejects_arguments(arguments: dict[str, Any], message: str) -> None:
    """Guards against options that are silently without effect."""
    with pytest.raises(ValueError, match=f"^load_checkpoint: {message}"):
        load_checkpoint(nn.Linear(16, 16), "nowhere", **arguments)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 16)
        self.lm_head = nn.Linear(16, 8, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


@pytest.mark.parametrize(
    "names", [["embed_tokens.weight"], ["lm_head.weight"], ["embed_tokens.weight", "lm_head.weight"]]
)
def test_tied_weights(names: list[str], tmp_path: Path) -> None:
    """Guards against weights that are no longer tied after loading, and a demand for both names."""
    network, value = Tied(), torch.randn(8, 16)
    load_checkpoint(network, stored.write(tmp_path, {name: value.clone() for name in names}))
    assert network.lm_head.weight is network.embed_tokens.weight
    assert torch.equal(network.lm_head.weight, value)


class Mixtral(nn.Module):
    """Experts in a list, as many models have them: no stacking."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(32, 16, bias=False)}) for _ in range(2))


def test_experts_in_a_list(tmp_path: Path) -> None:
    """Guards against rules that only know stacked experts."""
    network = Mixtral()
    values = {f"experts.{i}.gate_proj.weight": torch.randn(16, 32) for i in range(2)}
    report = load_checkpoint(network, stored.write(tmp_path, stored.modelopt(values, lambda *_: True)))
    assert len(report.packed) == 2
    for index in range(2):
        weight = network.experts[index]["gate_proj"].weight
        assert torch.equal(weight.dequantize(), nvfp4_values(values[f"experts.{index}.gate_proj.weight"]).float())


def test_own_flat_state_dict(model: Any, tmp_path: Path) -> None:
    """Guards against our own way to store a packed model that we cannot read back."""
    from dsv4_compile import quantize_
    from dsv4_compile.quantization import flatten_state_dict

    network, again = copy.deepcopy(model), empty_model(model)
    quantize_(network)
    load_checkpoint(again, stored.write(tmp_path, flatten_state_dict(network.state_dict())))
    assert_same_model(again, network)


def test_casts_are_reported(tmp_path: Path) -> None:
    """Guards against an fp32 checkpoint rounded to bf16 without a word."""
    network = nn.Linear(16, 4).bfloat16()
    values = {"weight": torch.randn(4, 16), "bias": torch.randn(4).bfloat16()}
    report = load_checkpoint(network, stored.write(tmp_path, values))
    assert report.cast == ["weight"]
    assert torch.equal(network.weight, values["weight"].bfloat16())


def test_quantised_model_is_filled_again(tmp_path: Path) -> None:
    """Guards against a packed model that cannot take a plain checkpoint, or one of other global scales."""
    from dsv4_compile import quantize_

    network = nn.Sequential(nn.Linear(32, 16, bias=False)).bfloat16()
    quantize_(network)
    value = {"0.weight": torch.randn(16, 32).bfloat16()}
    load_checkpoint(network, stored.write(tmp_path / "plain", value))
    assert torch.equal(network[0].weight, value["0.weight"])
    load_checkpoint(network, stored.write(tmp_path / "packed", stored.modelopt(value, lambda *_: True)))
    assert torch.equal(network[0].weight.dequantize(), nvfp4_values(value["0.weight"]))


def test_stored_values_are_copies(tmp_path: Path) -> None:
    """Guards against parameters that are pages of the file: they would change, or kill the process, when it does."""
    network, value = nn.Linear(16, 4, bias=False), torch.randn(4, 16)
    folder = stored.write(tmp_path, {"weight": value})
    load_checkpoint(network, folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(network.weight, value)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 4, bias=False)


class WithMtp(nn.Module):
    def __init__(self, has_mtp: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Head()])
        self.mtp = nn.ModuleList([Head()] if has_mtp else [])


@pytest.mark.parametrize("has_mtp", [True, False])
def test_mtp_goes_where_the_model_has_it(has_mtp: bool, tmp_path: Path) -> None:
    """Guards against weights of a model's own MTP modules called absent, and a demand for modules it has not."""
    network = WithMtp(has_mtp)
    tensors = {"layers.0.proj.weight": torch.randn(4, 16), "mtp.0.proj.weight": torch.randn(4, 16)}
    report = load_checkpoint(network, stored.write(tmp_path, tensors))
    assert report.ignored_mtp == ([] if has_mtp else ["mtp.0.proj.weight"])
    assert all(torch.equal(value, tensors[name]) for name, value in network.state_dict().items())


def test_mtp_as_a_last_layer(tmp_path: Path) -> None:
    """Guards against HuggingFace's naming, where MTP is one more layer with an eh_proj."""
    names = ["model.layers.0.proj.weight", "model.layers.1.proj.weight", "model.layers.1.eh_proj.weight"]
    tensors = {name: torch.randn(4, 16) for name in names}
    report = load_checkpoint(WithMtp(False), stored.write(tmp_path, tensors))
    assert set(report.ignored_mtp) == set(names[1:])


def test_only_wanted_experts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a rank that reads the experts of the others to throw them away."""
    tensors: stored.Tensors = {}
    for expert in range(6):
        name = f"experts.{expert}.w2"
        tensors[f"{name}.weight"], tensors[f"{name}.scale"] = stored.mxfp4_parts(torch.randn(16, 32))
    network, read = nn.Module(), []
    network.experts = nn.Module()
    network.experts.down_proj = nn.Parameter(torch.empty(2, 16, 32))
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, out=None: read.append(name) or original(self, name, out))
    report = load_checkpoint(network, stored.write(tmp_path, tensors, shards=2), experts=range(3, 5))
    assert sorted(read) == [f"experts.{expert}.w2.{part}" for expert in (3, 4) for part in ("scale", "weight")]
    assert report.num_bytes == 2 * (16 * 16 + 16)
    for index, expert in enumerate((3, 4)):
        values = stored.mxfp4_values(*(tensors[f"experts.{expert}.w2.{part}"] for part in ("weight", "scale")))
        assert torch.equal(network.experts.down_proj[index].dequantize(), values)


@pytest.mark.gpu
@pytest.mark.parametrize("is_meta", [True, False], ids=["meta", "on the CPU"])
def test_device(model: Any, native: stored.Tensors, tmp_path: Path, is_meta: bool) -> None:
    """Guards against other bits on a GPU than on the CPU, and buffers, rotary frequencies above all, left behind."""
    network, expected = empty_model(model) if is_meta else copy.deepcopy(model), empty_model(model)
    for name, tensors in {"mxfp4": stored.native(native), "nvfp4": stored.nvidia_mixed(native)}.items():
        folder = stored.write(tmp_path / name, tensors)
        load_checkpoint(network, folder, device="cuda", fp8="nvfp4")
        load_checkpoint(expected, folder, fp8="nvfp4")
        assert {value.device.type for value in (*network.parameters(), *network.buffers())} == {"cuda"}
        for key, value in unpacked(expected).items():
            assert torch.equal(unpacked(network)[key].cpu(), value), key
