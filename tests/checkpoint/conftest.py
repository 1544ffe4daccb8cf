"""The small DeepSeek V4 that every format stores, and its tensors under both sets of names."""

from collections.abc import Iterator
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are small: on a busy machine threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
