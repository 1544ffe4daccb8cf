"""An emulation of NVFP4 inference that uses no code of ours: only the format, in fp32, module by module."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fake_quantize(x: Tensor) -> Tensor:
    """What is left of ``x`` [..., K] in NVFP4 with gsa = max|x| / 2688, in fp32."""
    x = x.float()
    scale = x.abs().max().clamp(min=1e-8) / 2688
    blocks = x.unflatten(-1, (-1, 16))
    block_scale = (blocks.abs().amax(-1, keepdim=True) / (6 * scale)).clamp(max=448).to(torch.float8_e4m3fn).float()
    step = block_scale * scale
    scaled = torch.where(step > 0, blocks / step, 0.0).clamp(-6, 6)
    distance = (scaled.abs().unsqueeze(-1) - MAGNITUDES).abs()
    # On a tie the even code wins: look at codes 0, 2, 4, 6 first.
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    nearest = order[distance[..., order].argmin(-1)]
    return (MAGNITUDES[nearest] * scaled.sign() * step).flatten(-2)


def emulated(module: nn.Module) -> nn.Module:
    """A copy whose linears multiply what is left of activation and weight in NVFP4, rounded once to bf16.

    So do DeepSeek V4's grouped linear and stacks of experts. Routers keep their bf16 weight; their scores are computed
    in fp32, so that no tie of bf16 decides which experts a token gets.
    """
    module = copy.deepcopy(module)
    for child in list(module.modules()):
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2 and type(child).__name__ == "Linear":
            child.forward = _emulated_linear(fake_quantize(weight), child.bias, weight.dtype)
        elif type(child).__name__ == "DeepseekV4GroupedLinear":
            child.forward = _emulated_grouped_linear(fake_quantize(weight), child.n_groups, weight.dtype)
        elif isinstance(getattr(child, "gate_up_proj", None), nn.Parameter):
            child.forward = _emulated_experts(child)
        if hasattr(child, "score_fn"):
            child.score_fn = _InFp32(child.score_fn)
    return module


class _InFp32(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.float())


def _emulated_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return F.linear(fake_quantize(x), weight, None if bias is None else bias.float()).to(dtype)

    return forward


def _emulated_grouped_linear(weight: Tensor, groups: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return torch.einsum("...gk,gnk->...gn", fake_quantize(x), weight.unflatten(0, (groups, -1))).to(dtype)

    return forward


def _emulated_experts(experts: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Expert by expert; a global scale for each expert's weight, one for the tokens, one for all inputs of ``down``."""
    gate_up = [fake_quantize(weight) for weight in experts.gate_up_proj]
    down = [fake_quantize(weight) for weight in experts.down_proj]

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens = fake_quantize(x)
        hidden = torch.zeros(*ids.shape, down[0].shape[1])
        for expert, weight in enumerate(gate_up):
            token, slot = torch.where(ids == expert)
            hidden[token, slot] = experts._apply_gate(tokens[token] @ weight.T)
        hidden = fake_quantize(hidden.to(x.dtype))
        y = torch.zeros(*ids.shape, x.shape[1])
        for expert, weight in enumerate(down):
            token, slot = torch.where(ids == expert)
            y[token, slot] = hidden[token, slot] @ weight.T
        return (y * weights.float().unsqueeze(-1)).sum(dim=1).to(x.dtype)

    return forward


@pytest.fixture
def emulate() -> Callable[[nn.Module], nn.Module]:
    return emulated


@pytest.fixture
def sqnr_db() -> Callable[[Tensor, Tensor], float]:
    def measure(reference: Tensor, other: Tensor) -> float:
        reference, other = reference.double(), other.double()
        return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))

    return measure
