"""SwiGLU: ``silu(gate) * up`` in front of a quantisation becomes ``swiglu_quantize_nvfp4``.

Matches: ``quantize_nvfp4(silu(gate) * up)``, the factors in either order, silu as one function or written out with
sigmoid, computed in the model's dtype or in fp32 and cast back.
Rewrites to: ``swiglu_quantize_nvfp4(gate, up, limit)``. Clamps in front of gate and up are folded into ``limit`` when
they are DeepSeek's, ``min(gate, L)`` and ``clamp(up, -L, L)``; any other clamp stays in the graph and limit is inf.
The product must have no other reader. The operator computes in fp32 where eager rounds to the model's dtype after
every step: closer to the exact value, never further.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.pattern_matcher import Match
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dsv4_compile.ops.quantize_nvfp4 import quantize_nvfp4
from dsv4_compile.ops.swiglu_quantize_nvfp4 import swiglu_quantize_nvfp4
from dsv4_compile.passes.graph import CAST, Fusion, aten, same_shape, value

Packed = tuple[Tensor, Tensor, Tensor]

_CLAMPS = (
    aten.clamp.default,
    aten.clamp_max.default,
    aten.clamp_min.default,
    aten.minimum.default,
    aten.maximum.default,
)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def mul_silu(gate: Tensor, up: Tensor) -> Tensor:
    return up * F.silu(gate)


def sigmoid_mul(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def mul_sigmoid(gate: Tensor, up: Tensor) -> Tensor:
    return up * (gate * torch.sigmoid(gate))


def sigmoid_first_mul(gate: Tensor, up: Tensor) -> Tensor:
    return torch.sigmoid(gate) * gate * up


def mul_sigmoid_first(gate: Tensor, up: Tensor) -> Tensor:
    return up * (torch.sigmoid(gate) * gate)


def example_inputs() -> Sequence[Sequence[Tensor]]:
    return [
        (torch.empty(8, 32, dtype=dtype), torch.empty(8, 32, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)
    ]


def replacement(gate: Tensor, up: Tensor, *, limit: float, granularity: str) -> Packed:
    return swiglu_quantize_nvfp4(gate, up, limit, granularity)


def applies(match: Match, granularity: str) -> tuple[Any, list[Any]] | None:
    """Exact when gate and up have one shape and dtype; the clamps are folded only when they are DeepSeek's."""
    gate, up = match.kwargs["gate"], match.kwargs["up"]
    if not isinstance(up, fx.Node):
        return None  # silu(gate) times a number
    gate_input, gate_low, gate_high = without_clamps(gate)
    up_input, up_low, up_high = without_clamps(up)
    limit = math.inf
    if gate_low == -math.inf and gate_high == up_high == -up_low and gate_high > 0 and _alike(gate_input, up_input):
        gate, up, limit = gate_input, up_input, gate_high
    if not _alike(gate, up):
        return None
    return functools.partial(replacement, limit=limit, granularity=granularity), [gate, up]


def _alike(gate: fx.Node, up: fx.Node) -> bool:
    return value(gate).dtype == value(up).dtype and same_shape(value(gate).shape, value(up).shape)


def without_clamps(node: fx.Node) -> tuple[fx.Node, float, float]:
    """Walks back over clamps and the casts around them.

    Returns:
        The node before them and the bounds low and high that they amount to. The casts walked over lose nothing: each
        dtype on the way holds every value of the node returned.
    """
    found, low, high = node, -math.inf, math.inf
    passed = {value(node).dtype}
    bounds = (low, high)
    while True:
        step = _clamp_step(node)
        if step is None:
            return found, low, high
        node, step_low, step_high = step
        bounds = (max(bounds[0], step_low), min(bounds[1], step_high))
        dtype = value(node).dtype
        if all(torch.promote_types(dtype, other) == other for other in passed):
            found, (low, high) = node, bounds
        passed.add(dtype)


def _clamp_step(node: fx.Node) -> tuple[fx.Node, float, float] | None:
    if node.target is not CAST and node.target not in _CLAMPS:
        return None
    source: Any = node.args[0]
    if not value(source).is_floating_point() or not same_shape(value(source).shape, value(node).shape):
        return None
    if node.target is CAST:
        return source, -math.inf, math.inf
    bound = node.args[1] if len(node.args) > 1 else None
    if node.target is aten.clamp.default:
        top = node.args[2] if len(node.args) > 2 else None
        return _bounded(source, bound, top)
    if node.target in (aten.clamp_max.default, aten.minimum.default):
        return _bounded(source, None, _constant(bound))
    if node.target in (aten.clamp_min.default, aten.maximum.default):
        return _bounded(source, _constant(bound), None)
    return None


def _bounded(source: fx.Node, low: Any, high: Any) -> tuple[fx.Node, float, float] | None:
    if not all(isinstance(bound, (int, float, type(None))) for bound in (low, high)) or low is high is None:
        return None
    return source, -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _constant(bound: Any) -> Any:
    """The number behind a bound: itself, or what a scalar tensor was filled with."""
    if isinstance(bound, fx.Node) and bound.target is aten.full.default:
        return bound.args[1]
    if isinstance(bound, fx.Node) and bound.target is aten.lift_fresh_copy.default:  # torch.tensor(limit)
        constant: Any = bound.args[0]
        if constant.op == "get_attr" and value(constant).dim() == 0:
            with unset_fake_temporarily():
                return getattr(bound.graph.owning_module, constant.target).item()
    return bound


def _quantized(
    form: Callable[[Tensor, Tensor], Tensor], granularity: str, cast: bool
) -> Callable[[Tensor, Tensor], Packed]:
    def pattern(gate: Tensor, up: Tensor) -> Packed:
        product = form(gate, up)
        return quantize_nvfp4(product.to(torch.bfloat16) if cast else product, granularity)

    return pattern


def build(granularity: str) -> list[Fusion]:
    """The fusion of this file for one granularity of the activation global scale."""
    forms = (silu_mul, mul_silu, sigmoid_mul, mul_sigmoid, sigmoid_first_mul, mul_sigmoid_first)
    patterns = [_quantized(form, granularity, cast) for cast in (False, True) for form in forms]
    return [Fusion("swiglu", patterns, example_inputs, functools.partial(applies, granularity=granularity))]
