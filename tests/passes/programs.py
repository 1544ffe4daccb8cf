"""A program to compile: a function with parameters; its graph after the passes, and how near two results are."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsv4_compile.testing import Rewritten, capture


class Model(nn.Module):
    """A function of itself and its inputs, with parameters by name."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def capture_one(model: Callable[..., Any], *inputs: Tensor, **kwargs: Any) -> tuple[Any, Rewritten]:
    result, (graph,) = capture(model, *inputs, **kwargs)
    return result, graph


def sqnr_db(actual: Tensor, expected: Tensor) -> float:
    noise = (actual.double() - expected.double()).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(expected.double().square().sum() / noise))
