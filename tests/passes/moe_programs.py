"""Experts, HuggingFace's and the same written out step by step, and what they give on NVFP4 operands."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

from dsv4_compile import nvfp4

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
