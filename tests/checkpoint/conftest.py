"""The small DeepSeek V4 that every format stores, its tensors under both sets of names, and a toy checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4_compile.demo import demo_model
from tests.checkpoint import stored
from tests.checkpoint.models import demo_model_buffers


@pytest.fixture(scope="module")
def model() -> Any:
    """Weights multiples of what survives a bf16 rounding; buffers in fp32, as from_pretrained leaves them."""
    network = demo_model()
    for name, buffer in demo_model_buffers(network.config).items():
        owner, _, attribute = name.rpartition(".")
        network.get_submodule(owner)._buffers[attribute] = buffer
    for parameter in network.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return network


@pytest.fixture(scope="module")
def native(model: Any, tmp_path_factory: pytest.TempPathFactory) -> stored.Tensors:
    return stored.native_tensors(model, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def huggingface(model: Any) -> stored.Tensors:
    return stored.huggingface_tensors(model)


@pytest.fixture(scope="module")
def config(model: Any) -> dict[str, Any]:
    return {**model.config.to_dict(), "dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few weights of every kind in three files, for tests of files and errors."""
    tensors: stored.Tensors = {
        "model.embed_tokens.weight": torch.randn(32, 64),
        "model.layers.0.self_attn.q_a_proj.weight": torch.randn(48, 64),
        "model.layers.0.self_attn.kv_proj.weight": torch.randn(16, 64),
        "model.layers.0.mlp.experts.0.gate_proj.weight": torch.randn(32, 64),
        "model.layers.0.mlp.experts.0.up_proj.weight": 3 * torch.randn(32, 64),
        "model.layers.0.mlp.experts.0.down_proj.weight": torch.randn(64, 32),
        "model.layers.0.mlp.gate.weight": torch.randn(8, 64),
        "model.layers.0.mlp.odd.weight": torch.randn(8, 24),
    }
    tensors = {name: value.bfloat16() for name, value in tensors.items()}
    tensors["model.layers.0.mlp.wide.weight"] = torch.randn(8, 64)
    folder = stored.write(tmp_path_factory.mktemp("small"), tensors, {"model_type": "toy"}, shards=3)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"not copied")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are small: on a busy machine threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
