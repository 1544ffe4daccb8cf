"""The MoE pass: HuggingFace's two expert implementations become one operator."""

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dsv4_compile import quantize_
from tests.passes.moe_programs import (
    IMPLEMENTATIONS,
    INTERMEDIATE,
    TOP_K,
    E,
    H,
    L,
    emulated,
    experts_module,
    masks_other_experts,
    routing,
    v4_experts,
)
from tests.passes.programs import capture_one


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_deepseek_v4(implementation: str) -> None:
    """Guards against any node of either implementation staying behind, and against a change of its numbers."""
    module = v4_experts(implementation)
    inputs = routing()
    result, graph = capture_one(module, *inputs)
    if implementation == "grouped_mm":
        assert_expected_inline(
            graph.after,
            """\
w0: nvfp4[4, 64, 64]
w1: nvfp4[4, 64, 32]
x0: bf16[6, 64]
x1: i64[6, 2]
x2: bf16[6, 2]
%0: (u8[6, 32], f8e4m3[6, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[6, 64] = dsv4.nvfp4_moe(*%0, x1, x2, *w0, *w1, 2.0, 'after_down', 'tensor', bf16)
return %1""",
        )
    elif masks_other_experts(module, implementation):  # Dynamo numbers inputs in the order they are first read in
        assert_expected_inline(
            graph.after,
            """\
w0: nvfp4[4, 64, 64]
w1: nvfp4[4, 64, 32]
x0: i64[6, 2]
x1: bf16[6, 64]
x2: bf16[6, 2]
%0: (u8[6, 32], f8e4m3[6, 4], f32[]) = dsv4.quantize_nvfp4(x1, 'tensor')
%1: bf16[6, 64] = dsv4.nvfp4_moe(*%0, x0, x2, *w0, *w1, 2.0, 'after_down', 'tensor', bf16)
return %1""",
        )
    else:
        assert_expected_inline(
            graph.after,
            """\
w0: nvfp4[4, 64, 64]
w1: nvfp4[4, 64, 32]
x0: i64[6, 2]
x1: bf16[6, 64]
x2: bf16[6, 2]
%0: (u8[6, 32], f8e4m3[6, 4], f32[]) = dsv4.quantize_nvfp4(x1, 'tensor')
%1: i64[6, 2] = aten.clamp_min(x0, 0)
%2: i64[6, 2] = aten.clamp_max(%1, 3)
%3: bf16[6, 64] = dsv4.nvfp4_moe(*%0, %2, x2, *w0, *w1, 2.0, 'after_down', 'tensor', bf16)
return %3""",
        )
    assert graph.counts["moe"] == 1
    assert torch.equal(result, emulated(*inputs, module.gate_up_proj, module.down_proj, L))


@pytest.mark.parametrize(("experts", "weights_dtype"), [(2, torch.bfloat16), (8, torch.float32)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_number_of_experts_and_dtype_of_weights(implementation: str, experts: int, weights_dtype: torch.dtype) -> None:
    """Guards against a pattern that holds for the sizes and dtypes it was traced with only."""
    module = v4_experts(implementation, experts)
    inputs = routing(experts, weights_dtype)
    result, graph = capture_one(module, *inputs)
    assert graph.counts["moe"] == 1
    assert "nvfp4_grouped_mm" not in graph.after
    assert torch.equal(result, emulated(*inputs, module.gate_up_proj, module.down_proj, L))


@pytest.mark.parametrize(
    ("implementation", "granularity"), [("grouped_mm", "token"), ("batched_mm", "token"), ("batched_mm", "tensor_pow2")]
)
def test_granularity(implementation: str, granularity: str) -> None:
    """Guards against quantising tokens or the input of down with another granularity than the model asked for."""
    module = v4_experts(implementation)
    x, ids, weights = routing()
    x[0] /= 1024
    result, graph = capture_one(module, x, ids, weights, options={"gsa": granularity})
    assert graph.counts["moe"] == 1
    expected = emulated(x, ids, weights, module.gate_up_proj, module.down_proj, L, granularity)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(("experts", "weights_dtype"), [(E, torch.bfloat16), (5, torch.float32)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_expert_parallel(implementation: str, experts: int, weights_dtype: torch.dtype) -> None:
    """Guards against the sentinel ``num_experts`` (an expert elsewhere) reading a weight, whatever its own weight."""
    module = v4_experts(implementation, experts)
    masks = masks_other_experts(module, implementation)
    module._is_expert_parallel = True
    x, ids, weights = routing(experts, weights_dtype)
    ids[0, 0] = ids[2] = experts
    result, graph = capture_one(module, x, ids, weights)
    assert graph.counts["moe"] == 1
    assert "nvfp4_grouped_mm" not in graph.after
    ids = ids if masks else ids.clamp(max=experts - 1)
    assert torch.equal(result, emulated(x, ids, weights, module.gate_up_proj, module.down_proj, L))
    assert result[2].any() != masks


@pytest.mark.parametrize(("implementation", "kind"), [("grouped_mm", MixtralExperts), ("batched_mm", Qwen3MoeExperts)])
def test_experts_without_clamp(implementation: str, kind: Any) -> None:
    """Guards against a limit that was never asked for, and against a match of DeepSeek's class alone."""
    if kind is MixtralExperts:
        config: Any = MixtralConfig(hidden_size=H, intermediate_size=INTERMEDIATE, num_local_experts=E)
    else:
        config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=INTERMEDIATE, num_experts=E)
    module = experts_module(kind, config, implementation)
    inputs = routing()
    result, graph = capture_one(module, *inputs)
    assert graph.counts["moe"] == 1
    assert ", inf, 'after_down', 'tensor', bf16)" in graph.after
    assert torch.equal(result, emulated(*inputs, module.gate_up_proj, module.down_proj))


def test_packed_beforehand() -> None:
    """Guards against a difference between experts packed by quantize_ and those packed by the backend."""
    module = v4_experts("batched_mm")
    inputs = routing()
    plain_result, plain = capture_one(module, *inputs)
    quantize_(module)
    result, graph = capture_one(module, *inputs)
    assert graph.after == plain.after
    assert torch.equal(result, plain_result)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dynamic_shapes(implementation: str) -> None:
    """Guards against a number of tokens that is not known when compiling."""
    module = v4_experts(implementation)
    x, _, _ = routing()

    def routed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, (x[:, :TOP_K] > 0).long() + 1, x[:, :TOP_K].abs()

    result, graph = capture_one(lambda x: module(*routed(x)), x, dynamic=True)
    assert graph.counts["moe"] == 1
    assert "bf16[s0, 64] = dsv4.nvfp4_moe(" in graph.after
    assert torch.equal(result, emulated(*routed(x), module.gate_up_proj, module.down_proj, L))


def test_all_tokens_on_one_expert() -> None:
    """Guards against empty groups, and an expert that stands twice in a row of ids."""
    module = v4_experts("grouped_mm")
    x, ids, weights = routing()
    inputs = x, torch.full_like(ids, 2), weights
    result, graph = capture_one(module, *inputs)
    assert graph.counts["moe"] == 1
    assert torch.equal(result, emulated(*inputs, module.gate_up_proj, module.down_proj, L))
