"""``load_checkpoint`` of other models by the same rules, and its options."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsv4_compile.checkpoint import load_checkpoint
from tests.checkpoint import stored
from tests.checkpoint.models import assert_same_model, empty_model, nvfp4_values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fp8": "int8"}, "fp8 must be one of bfloat16, nvfp4, got 'int8'"),
        ({"experts": [1, 2]}, r"experts must be a range of expert numbers with step 1, got \[1, 2\]"),
        ({"experts": range(0)}, "experts must be a range"),
        ({"experts": range(-1, 2)}, "experts must be a range"),
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
