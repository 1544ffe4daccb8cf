"""Linear layers whose weights are bound, what they give on NVFP4 operands, and the graph that binding makes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsv4_compile import Nvfp4Tensor, nvfp4
from dsv4_compile.binding import BoundGraph, bind_weights, runner
from dsv4_compile.options import Options
from dsv4_compile.testing import Capture, Rewritten

K = 64
PARTS = ("codes", "block_scales", "global_scale")


def linear(n: int = K, k: int = K, bias: bool = False) -> nn.Linear:
    return nn.Linear(k, n, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


def activation() -> Tensor:
    return torch.randn(8, K, dtype=torch.bfloat16)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` on NVFP4 operands; a packed weight as it is, a plain one packed first."""
    is_packed = isinstance(weight, Nvfp4Tensor)
    b_codes, b_scales, gsb = (getattr(weight, part) for part in PARTS) if is_packed else nvfp4.quantize_weight(weight)
    a_codes, a_scales, gsa = nvfp4.quantize(x)
    a, b = (nvfp4.scaled_codes(*packed, torch.float64) for packed in ((a_codes, a_scales), (b_codes, b_scales)))
    return ((a @ b.mT).to(torch.float32) * (gsa * gsb)).to(x.dtype)


def compile_recording(model: Callable[..., Any], **kwargs: Any) -> tuple[Callable[..., Any], list[Rewritten]]:
    recorder = Capture(kwargs.pop("options", None))
    return torch.compile(model, backend=recorder, **kwargs), recorder.graphs


class Function(nn.Module):
    """A module that computes a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def bind(
    model: Callable[..., Any], *inputs: Tensor, options: Options | None = None
) -> tuple[fx.GraphModule, BoundGraph]:
    """Dynamo's graph of a model, and what bind_weights makes of it."""
    found: list[tuple[fx.GraphModule, BoundGraph]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        bound = bind_weights(gm, example_inputs, options or Options())
        found.append((gm, bound))
        return runner(bound.gm, bound)

    with torch.inference_mode():
        torch.compile(model, backend=backend)(*inputs)
    ((gm, bound),) = found
    return gm, bound
