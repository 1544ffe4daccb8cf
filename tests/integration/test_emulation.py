"""Compiled blocks against an emulation of NVFP4 that shares no code with the package, on inputs a model produced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP

from dsv4_compile.backend import dsv4
from dsv4_compile.demo import demo_model
from dsv4_compile.testing import capture

LAYER_KINDS = ("sliding", "csa", "hca")


def outlier_activations(*shape: int) -> Tensor:
    """Gaussian with a few channels far larger than the others, as hidden states of trained models have."""
    x = torch.randn(*shape)
    x[..., torch.randperm(shape[-1])[: max(1, shape[-1] // 64)]] *= 30
    return x.bfloat16()


class Linear(nn.Module):
    """A linear as DeepSeek's inference code writes it: weight and optional bias as plain parameters."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features, dtype=torch.bfloat16) * in_features**-0.5)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Expert(nn.Module):
    """An expert as DeepSeek's inference code writes it: w1 gate, w3 up, computed in fp32, cast back, w2 down."""

    def __init__(self, hidden: int, intermediate: int, limit: float) -> None:
        super().__init__()
        self.w1 = Linear(hidden, intermediate)
        self.w2 = Linear(intermediate, hidden)
        self.w3 = Linear(hidden, intermediate)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x).float(), self.w3(x).float()
        up = torch.clamp(up, min=-self.limit, max=self.limit)
        gate = torch.clamp(gate, max=self.limit)
        return self.w2((F.silu(gate) * up).to(x.dtype))


def biased_sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 64)).bfloat16()


def shared_expert(hidden: int, intermediate: int) -> nn.Module:
    config = DeepseekV4Config(hidden_size=hidden, moe_intermediate_size=intermediate, num_hidden_layers=1)
    return DeepseekV4MLP(config).bfloat16().eval()


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_emulation(rows: int, bias: bool, emulate: Any, sqnr_db: Any) -> None:
    """A wrong scale, rounding or code order costs far more than the bf16 rounding of the result, 45 dB and up."""
    linear = nn.Linear(512, 256, bias=bias).bfloat16()
    x = outlier_activations(2, rows, 512)
    compiled, (graph,) = capture(linear, x)
    assert graph.counts["linear_bias" if bias else "linear"] == 1
    with torch.no_grad():
        assert sqnr_db(emulate(linear)(x), compiled) >= 45


@pytest.mark.parametrize(
    ("make", "hidden"),
    [
        (lambda: shared_expert(256, 128), 256),
        (lambda: shared_expert(4096, 2048), 4096),
        (lambda: Expert(256, 512, limit=1.0), 256),
        (biased_sequential, 256),
    ],
    ids=["hf_shared_expert", "flash_shared_expert", "deepseek_expert", "biased_sequential"],
)
def test_mlp_is_closer_to_the_emulation_than_to_bf16(
    make: Callable[[], nn.Module], hidden: int, emulate: Any, sqnr_db: Any
) -> None:
    """Compiled and emulated differ by roundings of intermediates only; a pass that changed the meaning, or a region
    that silently stayed in bf16, would be as far from the emulation as bf16 is."""
    mlp = make()
    x = outlier_activations(1, 16, hidden)
    with torch.no_grad():
        reference = mlp(x)
        emulation = emulate(mlp)(x)
    compiled, (graph,) = capture(mlp, x)
    assert "dequantize" not in graph.after
    assert sqnr_db(emulation, compiled) >= sqnr_db(emulation, reference) + 8


@pytest.fixture(scope="module")
def attention_inputs() -> tuple[DeepseekV4ForCausalLM, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """A small model with one layer of each kind, and what reached each attention block in one forward."""
    model = demo_model()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.randint(0, model.config.vocab_size, (1, 24)), use_cache=False)
    for hook in hooks:
        hook.remove()
    return model, calls


@pytest.mark.parametrize("layer", range(3), ids=LAYER_KINDS)
def test_attention_is_closer_to_the_emulation_than_to_bf16(
    layer: int, attention_inputs: Any, emulate: Any, sqnr_db: Any
) -> None:
    """Every projection of sliding, compressed sparse and heavily compressed attention, on captured inputs."""
    model, calls = attention_inputs
    attention = model.model.layers[layer].self_attn
    args, kwargs = calls[layer]
    with torch.no_grad():
        reference = attention(*args, **kwargs)[0]
        emulation = emulate(attention)(*args, **kwargs)[0]
    compiled, (graph,) = capture(lambda: attention(*args, **kwargs)[0])
    assert graph.counts["linear"] == sum(type(module) is nn.Linear for module in attention.modules())
    # Of 45 blocks with other weights and inputs the margin was 3.4 dB at least; a block left in bf16 has none.
    assert sqnr_db(emulation, compiled) >= sqnr_db(emulation, reference) + 2


@pytest.mark.parametrize("make", [lambda: shared_expert(256, 128), biased_sequential], ids=["expert", "sequential"])
def test_generated_code_is_the_rewritten_graph(make: Callable[[], nn.Module]) -> None:
    """With casts emulated, Inductor's code computes what the graph says: nothing reads freed or reused memory, no
    constant is baked in, no layout is assumed."""
    block = make()
    x = outlier_activations(1, 8, 256)
    node_by_node, _ = capture(block, x)
    torch._dynamo.reset()
    with torch.inference_mode():
        generated = torch.compile(block, backend=dsv4, options={"emulate_precision_casts": True})(x)
    assert torch.equal(generated, node_by_node)
