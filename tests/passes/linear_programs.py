"""The spellings of a linear without bias, and what a linear gives on NVFP4 operands."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.testing import Rewritten

M, N, K = 8, 32, 64


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, granularity: str = "tensor") -> Tensor:
    """``x @ weight.T + bias`` on NVFP4 operands: the exact sum, scaled in fp32, rounded once to ``x``'s dtype."""
    a_codes, a_scales, gsa = nvfp4.quantize(x, granularity)
    b_codes, b_scales, gsb = nvfp4.quantize_weight(weight)
    a, b = (nvfp4.scaled_codes(*packed, torch.float64) for packed in ((a_codes, a_scales), (b_codes, b_scales)))
    y = (a @ b.mT).to(torch.float32) * ((gsa.unsqueeze(-1) if gsa.dim() else gsa) * gsb)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def dequantized(weight: Tensor) -> Tensor:
    return nvfp4.dequantize(*nvfp4.quantize_weight(weight), weight.dtype)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def reasons(graph: Rewritten) -> dict[str, str]:
    """The plain weights that were left alone, and why."""
    return {weight.name: weight.reason for weight in graph.bound.weights if weight.packed is None}


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.linear": lambda self, x: F.linear(x, self.weight),
    "F.linear by keywords": lambda self, x: F.linear(input=x, weight=self.weight),
    "x @ w.t()": lambda self, x: x @ self.weight.t(),
    "x @ w.T": lambda self, x: x @ self.weight.T,
    "x @ w.mT": lambda self, x: x @ self.weight.mT,
    "torch.mm": lambda self, x: torch.mm(x, self.weight.t()),
    "x.mm by keyword": lambda self, x: x.mm(mat2=self.weight.t()),
    "matmul of transpose": lambda self, x: torch.matmul(x, self.weight.transpose(0, 1)),
    "matmul of transpose from the end": lambda self, x: x.matmul(self.weight.transpose(-1, -2)),
    "matmul of transpose by keywords": lambda self, x: x.matmul(self.weight.transpose(dim0=0, dim1=1)),
    "matmul of permute": lambda self, x: torch.matmul(x, torch.permute(self.weight, (1, 0))),
    "matmul of permute by keyword": lambda self, x: x.matmul(self.weight.permute(dims=(1, 0))),
}
