"""Models that checkpoints are loaded into, and what must hold afterwards."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv4_compile import Nvfp4Tensor, nvfp4
from dsv4_compile.checkpoint import CheckpointError, load_checkpoint
from tests.checkpoint import stored

IDS = torch.arange(24).view(1, 24) * 17 % 512


def demo_model_buffers(config: Any) -> dict[str, Tensor]:
    from transformers import DeepseekV4ForCausalLM

    fresh = DeepseekV4ForCausalLM(config)
    persistent = set(fresh.state_dict())
    return {name: buffer for name, buffer in fresh.named_buffers() if name not in persistent}


def empty_model(model: Any) -> Any:
    """The same architecture on the meta device."""
    from transformers import DeepseekV4ForCausalLM

    with torch.device("meta"):
        return DeepseekV4ForCausalLM(model.config).to(torch.bfloat16).eval()


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(IDS, use_cache=False).logits
    return result


def with_values(model: Any, value_of: Callable[[str, Tensor], Tensor]) -> Any:
    """A copy whose parameters are ``value_of`` HuggingFace's per-expert name and value."""
    network = copy.deepcopy(model)
    for name, parameter in network.named_parameters():
        block, _, projection = name.rpartition(".")
        for expert in range(parameter.shape[0]) if projection in ("gate_up_proj", "down_proj") else ():
            if projection == "down_proj":
                key = f"{block}.{expert}.down_proj.weight"
                parameter.data[expert] = value_of(key, parameter.data[expert])
            else:
                for half, rows in zip(("gate", "up"), parameter.data[expert].chunk(2), strict=True):
                    rows.copy_(value_of(f"{block}.{expert}.{half}_proj.weight", rows.clone()))
        if projection not in ("gate_up_proj", "down_proj"):
            parameter.data.copy_(value_of(name, parameter.data.clone()))
    return network


def unpacked(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.dequantize() if isinstance(p, Nvfp4Tensor) else p for name, p in network.state_dict().items()}


def assert_same_model(actual: Any, expected: Any) -> None:
    """Every tensor stands for the same values, and the models compute the same bits."""
    left, right = unpacked(actual), unpacked(expected)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    assert torch.equal(logits(actual), logits(expected))


def nvfp4_values(weight: Tensor) -> Tensor:
    return nvfp4.dequantize(*nvfp4.quantize_weight(weight), weight.dtype)


def fp8_values(weight: Tensor, block: int, scale_dtype: torch.dtype) -> Tensor:
    return stored.fp8_values(*stored.fp8_parts(weight, block, scale_dtype), block)


def assert_refused(network: nn.Module, path: Path, *messages: str, **arguments: Any) -> CheckpointError:
    """The load fails with these problems, and every tensor of the model is the one it was."""
    before = {name: (id(value), value.clone()) for name, value in network.state_dict(keep_vars=True).items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(network, path, **arguments)
    for message in messages:
        assert re.search(message, str(caught.value)), (message, str(caught.value))
    for name, value in network.state_dict(keep_vars=True).items():
        assert id(value) == before[name][0]
        assert torch.equal(value, before[name][1])
    return caught.value


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 16, bias=False)
        self.b = nn.Linear(32, 16)
        self.register_buffer("table", torch.zeros(4, dtype=torch.int64))


def small_tensors() -> stored.Tensors:
    packed = stored.modelopt({"a.weight": torch.randn(16, 32)}, lambda *_: True)
    return {
        **packed,
        "b.weight": torch.randn(16, 32),
        "b.bias": torch.randn(16),
        "table": torch.arange(4),
    }
