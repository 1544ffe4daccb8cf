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
    """A copy whose linears multiply what is left of activation and weight in NVFP4, rounded once to bf16."""
    module = copy.deepcopy(module)
    for child in module.modules():
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2 and type(child).__name__ == "Linear":
            child.forward = _emulated_linear(fake_quantize(weight), child.bias, weight.dtype)
    return module


def _emulated_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return F.linear(fake_quantize(x), weight, None if bias is None else bias.float()).to(dtype)

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
