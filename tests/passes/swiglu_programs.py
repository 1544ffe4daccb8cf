"""Gate and up, a linear that reads their SwiGLU, and what it gives on NVFP4 operands."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_compile import nvfp4
from tests.passes.programs import Model

M, N, K = 8, 32, 64
L = 2.0  # low, so that each clamp changes the answer by much


def product(x: Tensor, weight: Tensor, dtype: torch.dtype = torch.bfloat16, granularity: str = "tensor") -> Tensor:
    """``x @ weight.T`` on NVFP4 operands: the exact sum, scaled in fp32, rounded once."""
    a_codes, a_scales, gsa = nvfp4.quantize(x, granularity)
    b_codes, b_scales, gsb = nvfp4.quantize_weight(weight)
    a, b = (nvfp4.scaled_codes(*packed, torch.float64) for packed in ((a_codes, a_scales), (b_codes, b_scales)))
    return ((a @ b.mT).to(torch.float32) * ((gsa.unsqueeze(-1) if gsa.dim() else gsa) * gsb)).to(dtype)


def gate_and_up(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Activations that reach past the limit on every side."""
    gate, up = (3 * torch.randn(M, K, dtype=dtype) for _ in range(2))
    assert gate.min() < -L < L < gate.max()
    assert up.min() < -L < L < up.max()
    return gate, up


def down(form: Callable[[Tensor, Tensor], Tensor]) -> tuple[Model, Tensor]:
    """A model ``F.linear(form(gate, up), weight)`` and its weight."""
    weight = torch.randn(N, K, dtype=torch.bfloat16)
    return Model(lambda self, gate, up: F.linear(form(gate, up), self.weight), weight=weight), weight
