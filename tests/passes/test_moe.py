"""The MoE pass: HuggingFace's two expert implementations become one operator; whatever differs keeps its meaning."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from transformers import DeepseekV4Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dsv4_compile import nvfp4, quantize_
from dsv4_compile.testing import Rewritten, capture

T, E, TOP_K, H, INTERMEDIATE = 6, 4, 2, 64, 32
L = 2.0  # low, so that each clamp changes the answer by much
IMPLEMENTATIONS = ("grouped_mm", "batched_mm")


def dequantized(packed: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Scaled codes in fp64, without the global scale: their products add up exactly."""
    return nvfp4.scaled_codes(*packed[:2], torch.float64)


def product(x: Tensor, weight: Tensor, granularity: str = "tensor") -> Tensor:
    """``x[r] @ weight[r].T`` for every row on NVFP4 operands: the exact sum, scaled in fp32, not rounded."""
    a, b = nvfp4.quantize(x, granularity), nvfp4.quantize_weight(weight)
    total = torch.einsum("rk,rnk->rn", dequantized(a), dequantized(b)).float()
    gsa = a[2].unsqueeze(-1) if a[2].dim() else a[2]
    return total * (gsa * b[2].unsqueeze(-1))


def emulated(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    limit: float = math.inf,
    granularity: str = "tensor",
) -> Tensor:
    """Every routed row with its own expert, in the order of tokens: no sorting, no operator of the package.

    Bitwise what a match must give: fp32 between the products, one rounding before the second quantisation.
    """
    routed = ids.flatten() < len(gate_up)
    expert = ids.flatten()[routed]
    # Tokens are quantised together, whether they are routed here or not.
    a = nvfp4.quantize(x, granularity)
    b = nvfp4.quantize_weight(gate_up)
    token = torch.arange(len(x)).repeat_interleave(ids.shape[1])[routed]
    total = torch.einsum("rk,rnk->rn", dequantized(a)[token], dequantized(b)[expert]).float()
    gsa = a[2][token].unsqueeze(-1) if a[2].dim() else a[2]
    gate, up = (total * (gsa * b[2][expert].unsqueeze(-1))).chunk(2, dim=-1)
    y = product(nvfp4.swiglu(gate, up, limit).to(x.dtype), down[expert], granularity)
    rows = y.new_zeros(ids.numel(), x.shape[1])
    rows[routed] = y * weights.flatten()[routed].float().unsqueeze(-1)
    return sum(rows.view(*ids.shape, -1).unbind(1), torch.zeros(())).to(x.dtype)


def sqnr_db(actual: Tensor, expected: Tensor) -> float:
    noise = (actual.double() - expected.double()).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(expected.double().square().sum() / noise))


def routing(experts: int = E, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, ids of distinct experts, and weights that differ by much."""
    ids = torch.stack([torch.randperm(experts)[:TOP_K] for _ in range(T)])
    return torch.randn(T, H, dtype=torch.bfloat16), ids, 4 * torch.rand(T, TOP_K, dtype=dtype)


def experts_module(kind: Any, config: Any, implementation: str) -> nn.Module:
    """Experts of a model, each with a scale of its own, so that reading another expert's shows."""
    config._experts_implementation = implementation
    module = kind(config).bfloat16()
    for weight in module.parameters():
        scale = torch.logspace(-0.2, 0.2, len(weight)).view(-1, 1, 1)
        weight.data = (torch.randn(weight.shape) * scale / 4).bfloat16()
    return module.eval()


def v4_experts(implementation: str, experts: int = E, limit: float = L) -> nn.Module:
    config = DeepseekV4Config(
        hidden_size=H,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=experts,
        num_experts_per_tok=TOP_K,
        swiglu_limit=limit,
        num_hidden_layers=1,
    )
    return experts_module(DeepseekV4Experts, config, implementation)


def masks_other_experts(module: nn.Module, implementation: str) -> bool:
    """Whether an id out of range does not count; with ``batched_mm`` before transformers 5.23 it is the last expert's."""
    return implementation == "grouped_mm" or hasattr(module, "_is_expert_parallel")


def capture_one(model: Callable[..., Any], *inputs: Tensor, **kwargs: Any) -> tuple[Any, Rewritten]:
    result, (graph,) = capture(model, *inputs, **kwargs)
    return result, graph


# HuggingFace's experts.


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


# The two forms written out, so that they can be edited: each step is a function of this class.


class Steps:
    """HuggingFace's experts, a method a step. ``grouped`` and ``batched`` are the products, real or emulated."""

    def __init__(self, gate_up: Tensor, down: Tensor, emulate: bool = False) -> None:
        self.gate_up, self.down, self.emulate = gate_up, down, emulate

    def grouped(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        if not self.emulate:
            return torch._grouped_mm(x, weight.transpose(-2, -1), offsets)
        expert = torch.searchsorted(offsets.long(), torch.arange(len(x)), right=True)
        y = product(x, weight[expert.clamp(max=len(weight) - 1)])
        return torch.where((expert < len(weight)).unsqueeze(-1), y, 0.0).to(x.dtype)

    def batched(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        if not self.emulate:
            return torch.bmm(weight[ids], x.unsqueeze(-1)).squeeze(-1)
        return product(x, weight[ids]).to(x.dtype)

    def top_k(self, ids: Tensor) -> int:
        return ids.shape[1]

    def sort(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids)

    def offsets(self, ids: Tensor) -> Tensor:
        counts = torch.histc(ids.float(), bins=len(self.gate_up), min=0, max=len(self.gate_up) - 1)
        return torch.cumsum(counts, dim=0, dtype=torch.int32)

    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x.repeat_interleave(top_k, dim=0)

    def halves(self, gate_and_up: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return gate, up

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=L)) * up.clamp(-L, L)

    def weighted(self, y: Tensor, weights: Tensor) -> Tensor:
        return y * weights.unsqueeze(-1)

    def inverse(self, order: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return inverse

    def total(self, y: Tensor) -> Tensor:
        return y.sum(dim=1)

    def routing_weights(self, weights: Tensor) -> Tensor:
        return weights.reshape(-1)

    def row_ids(self, ids: Tensor) -> Tensor:
        return ids

    def down_ids(self, ids: Tensor) -> Tensor:
        return ids

    def grouped_mm(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        sorted_ids, order = self.sort(ids.reshape(-1))
        rows = x[order // self.top_k(ids)]
        row_weights = self.routing_weights(weights)[order]
        offsets = self.offsets(sorted_ids)
        gate, up = self.halves(self.grouped(rows, self.gate_up, offsets))
        y = self.grouped(self.activate(gate, up), self.down, self.down_ids(offsets))
        y = self.weighted(y, row_weights)[self.inverse(order)]
        return self.total(y.view(*ids.shape, -1)).to(x.dtype)

    def batched_mm(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        rows, row_ids = self.rows(x, self.top_k(ids)), self.row_ids(ids.reshape(-1))
        gate, up = self.halves(self.batched(rows, self.gate_up, row_ids))
        y = self.batched(self.activate(gate, up), self.down, self.down_ids(row_ids))
        y = self.weighted(y, self.routing_weights(weights))
        return self.total(y.view(*ids.shape, -1)).to(x.dtype)


class Model(nn.Module):
    """Experts written in ``steps``."""

    def __init__(self, steps: type[Steps], implementation: str, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.steps, self.implementation = steps, implementation
        self.gate_up = nn.Parameter(gate_up, requires_grad=False)
        self.down = nn.Parameter(down, requires_grad=False)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        return getattr(self.steps(self.gate_up, self.down), self.implementation)(x, ids, weights)


def run(steps: type[Steps], implementation: str, *, fires: bool) -> tuple[Any, Any, Tensor, Rewritten]:
    """The compiled model's result, its emulation, the emulation of the unedited one, and the graph."""
    module = v4_experts(implementation)
    gate_up, down = module.gate_up_proj.data, module.down_proj.data
    for _ in range(20):  # until the edit shows: of all routings a third hide that the smallest expert is left out
        inputs = routing()
        edited, unedited = (
            getattr(kind(gate_up, down, emulate=True), implementation)(*inputs) for kind in (steps, Steps)
        )
        if sqnr_db(edited, unedited) < OTHER_DB:
            break
    result, graph = capture_one(Model(steps, implementation, gate_up, down), *inputs)
    assert ("moe" in graph.counts) == ("dsv4.nvfp4_moe(" in graph.after) == fires
    assert graph.counts.get("experts_grouped", 0) + graph.counts.get("experts_gathered", 0) == 2
    return result, edited, unedited, graph


# With NVFP4 operands fixed, what is left is bf16 against fp32 between the products: 2^-9 of gate and up, which moves
# few codes of the second quantisation, each by an eighth at least: around 30 dB. Another model is below 10 dB.
SAME_DB, OTHER_DB = 20.0, 12.0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_written_out(implementation: str) -> None:
    """Guards against edits below that are tested against a program which would not match anyway."""
    result, edited, unedited, _ = run(Steps, implementation, fires=True)
    assert torch.equal(edited, unedited)
    assert sqnr_db(result, edited) > SAME_DB


class IdsClamped(Steps):
    def row_ids(self, ids: Tensor) -> Tensor:
        return ids.clamp(0, len(self.gate_up) - 1)


def test_ids_clamped() -> None:
    """Guards against leaving out a clamp that is no mask: without it the operator skips ids out of range."""
    module = v4_experts("batched_mm")
    x, ids, weights = routing()
    ids[0, 0], ids[1, 1] = E, -1
    gate_up, down = module.gate_up_proj.data, module.down_proj.data
    result, graph = capture_one(Model(IdsClamped, "batched_mm", gate_up, down), x, ids, weights)
    assert graph.counts["moe"] == 1
    assert torch.equal(result, emulated(x, ids.clamp(0, E - 1), weights, gate_up, down, L))


class SecondReaderOfDown(Steps):
    def weighted(self, y: Tensor, weights: Tensor) -> Tensor:
        self.read = y
        return super().weighted(y, weights)

    def total(self, y: Tensor) -> Tensor:
        return super().total(y) + self.read.norm()  # a sum may be nearly 0


class SecondReaderOfGateAndUp(Steps):
    def halves(self, gate_and_up: Tensor) -> tuple[Tensor, Tensor]:
        self.read = gate_and_up
        return super().halves(gate_and_up)

    def total(self, y: Tensor) -> Tensor:
        return super().total(y) + self.read.norm()  # a sum may be nearly 0


class OtherActivation(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.cos(gate.clamp(max=L)) * up.clamp(-L, L)


class GateAndUpSwapped(Steps):
    def halves(self, gate_and_up: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return up, gate


class Interleaved(Steps):
    def halves(self, gate_and_up: Tensor) -> tuple[Tensor, Tensor]:
        return gate_and_up[..., 0::2], gate_and_up[..., 1::2]


class WeightTwice(Steps):
    def weighted(self, y: Tensor, weights: Tensor) -> Tensor:
        return y * weights.unsqueeze(-1) * weights.unsqueeze(-1)


class NoWeight(Steps):
    def weighted(self, y: Tensor, weights: Tensor) -> Tensor:
        return y


class WeightsOfOtherTokens(Steps):
    def routing_weights(self, weights: Tensor) -> Tensor:
        return weights.t().reshape(-1)


class FirstExpertOnly(Steps):
    def total(self, y: Tensor) -> Tensor:
        return y[:, :1].sum(dim=1)


class OtherDownExpert(Steps):
    def down_ids(self, ids: Tensor) -> Tensor:
        return ids.roll(1)


BOTH = (
    SecondReaderOfDown,
    SecondReaderOfGateAndUp,
    OtherActivation,
    GateAndUpSwapped,
    Interleaved,
    WeightTwice,
    NoWeight,
    WeightsOfOtherTokens,
    FirstExpertOnly,
)


class OffsetsShifted(Steps):
    def offsets(self, ids: Tensor) -> Tensor:
        return (super().offsets(ids) - 2).clamp(min=0)


class OffsetsOfOtherIds(Steps):
    def offsets(self, ids: Tensor) -> Tensor:
        return super().offsets((ids + 1) % E)


class OffsetsOfOtherBins(Steps):
    def offsets(self, ids: Tensor) -> Tensor:
        counts = torch.histc(ids.float(), bins=len(self.gate_up), min=1, max=len(self.gate_up) - 1)
        return torch.cumsum(counts, dim=0, dtype=torch.int32)


class OffsetsOfOneDownOtherwise(Steps):
    def down_ids(self, ids: Tensor) -> Tensor:
        return (ids - 2).clamp(min=0)


class NoInverse(Steps):
    def inverse(self, order: Tensor) -> Tensor:
        return order


class InverseReversed(Steps):
    def inverse(self, order: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0] - 1, -1, -1)
        return inverse


class OtherTopK(Steps):
    def top_k(self, ids: Tensor) -> int:
        return ids.shape[1] + 1


class SortedDown(Steps):
    def sort(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids, descending=True)


GROUPED = (
    OffsetsShifted,
    OffsetsOfOtherIds,
    OffsetsOfOtherBins,
    OffsetsOfOneDownOtherwise,
    NoInverse,
    InverseReversed,
    OtherTopK,
    SortedDown,
)


class RowsRepeated(Steps):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x.repeat(top_k, 1)


class RowsExpanded(Steps):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x.unsqueeze(0).expand(top_k, -1, -1).reshape(-1, x.shape[1])


class LastExpertLeftOut(Steps):
    def row_ids(self, ids: Tensor) -> Tensor:
        return ids.clamp(0, len(self.gate_up) - 2)


class FirstExpertLeftOut(Steps):
    def row_ids(self, ids: Tensor) -> Tensor:
        return ids.clamp(1, len(self.gate_up) - 1)


BATCHED = (RowsRepeated, RowsExpanded, OtherDownExpert, LastExpertLeftOut, FirstExpertLeftOut)

EDITS = [
    *[(IMPLEMENTATIONS[index % 2], steps) for index, steps in enumerate(BOTH)],
    *[("grouped_mm", steps) for steps in GROUPED],
    *[("batched_mm", steps) for steps in BATCHED],
]


@pytest.mark.parametrize(("implementation", "steps"), EDITS)
def test_edited_model_gives_its_own_answer(implementation: str, steps: type[Steps]) -> None:
    """Guards against a pattern that accepts a program that means something else."""
    result, edited, unedited, graph = run(steps, implementation, fires=False)
    assert graph.after.count("dsv4.nvfp4_grouped_mm(") == 2
    assert sqnr_db(result, edited) > SAME_DB
    assert sqnr_db(edited, unedited) < OTHER_DB
    assert sqnr_db(result, unedited) < OTHER_DB


def test_weights_of_another_shape() -> None:
    """Guards against a down projection to another width than the tokens have."""
    down = torch.randn(E, 2 * H, INTERMEDIATE).bfloat16()
    gate_up = torch.randn(E, 2 * INTERMEDIATE, H).bfloat16() / 4
    inputs = routing()
    result, graph = capture_one(Model(Steps, "grouped_mm", gate_up, down), *inputs)
    assert "moe" not in graph.counts
    assert_expected_inline(
        "\n".join(line for line in graph.after.splitlines() if "dsv4." in line),
        """\
%9: (u8[12, 32], f8e4m3[12, 4], f32[]) = dsv4.quantize_nvfp4(%3, 'tensor')
%10: bf16[12, 64] = dsv4.nvfp4_grouped_mm(*%9, *w0, %8, bf16)
%12: (u8[12, 16], f8e4m3[12, 2], f32[]) = dsv4.swiglu_quantize_nvfp4(%11[0], %11[1], 2.0, 'tensor')
%13: bf16[12, 128] = dsv4.nvfp4_grouped_mm(*%12, *w1, %8, bf16)""",
    )
    assert sqnr_db(result, Steps(gate_up, down, emulate=True).grouped_mm(*inputs)) > SAME_DB


# A clamp that is not DeepSeek's stays in the graph. Between the product and the SwiGLU it keeps the whole from
# matching; the parts are still operators.


class NoClamp(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class GateNotClamped(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up.clamp(-L, L)


class UpClampedOnOneSide(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=L)) * up.clamp(max=L)


class ClampSideSwapped(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(min=-L)) * up.clamp(-L, L)


class OtherLimitOnUp(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=L)) * up.clamp(-L / 8, L / 8)


class OtherLimit(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=L / 8)) * up.clamp(-L / 8, L / 8)


CLAMPS = {
    NoClamp: "inf",
    OtherLimit: "0.25",
    GateNotClamped: None,
    UpClampedOnOneSide: None,
    ClampSideSwapped: None,
    OtherLimitOnUp: None,
}


@pytest.mark.parametrize(
    ("implementation", "steps"), [(IMPLEMENTATIONS[index % 2], steps) for index, steps in enumerate(CLAMPS)]
)
def test_clamps(implementation: str, steps: type[Steps]) -> None:
    """Guards against the limit of the model this was copied from, and against a clamp that is lost."""
    limit = CLAMPS[steps]
    result, edited, unedited, graph = run(steps, implementation, fires=limit is not None)
    if limit is None:
        assert graph.after.count("dsv4.nvfp4_grouped_mm(") == 2
        assert graph.after.count(", inf, 'tensor')") == 1
        assert "aten.clamp" in graph.after
    else:
        assert f", {limit}, 'after_down', 'tensor', bf16)" in graph.after
    assert sqnr_db(result, edited) > SAME_DB
    assert sqnr_db(edited, unedited) < SAME_DB
    assert sqnr_db(result, unedited) < SAME_DB
