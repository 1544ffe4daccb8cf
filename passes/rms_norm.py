"""RMSNorm in front of a quantisation becomes ``rms_norm_quantize_nvfp4``.

Matches: ``quantize_nvfp4(norm)`` with ``norm = w * (x * rsqrt(mean(x^2) + eps))`` over the last axis, computed in fp32
and rounded to the dtype of ``x``, the weight multiplied before or after that rounding, or no weight at all.
Rewrites to: ``rms_norm_quantize_nvfp4(x, w, eps)``; when ``norm`` has other readers too, to the overload that also
returns it. The operator multiplies in fp32 and rounds once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.pattern_matcher import Match

from dsv4_compile.ops.quantize_nvfp4 import quantize_nvfp4
from dsv4_compile.ops.rms_norm_quantize_nvfp4 import rms_norm_quantize_nvfp4, rms_norm_quantize_nvfp4_with_norm
from dsv4_compile.passes.graph import CAST, Fusion, value

_EPS = 3.25e-6


def _normalized(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _normalized_by_function(x: Tensor, eps: float) -> Tensor:
    """The steps of ``F.rms_norm``, which adds a scalar where a number is added to a tensor above."""
    x = x.float()
    return x * torch.rsqrt(torch.ops.aten.add.Scalar(x.pow(2).mean(-1, keepdim=True), eps))


def weight_in_fp32(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (weight * _normalized(x, eps)).to(x.dtype)


def weight_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_normalized(x, eps) * weight).to(x.dtype)


def weight_after_rounding(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * _normalized(x, eps).to(x.dtype)


def no_weight(x: Tensor, eps: float) -> Tensor:
    return _normalized(x, eps).to(x.dtype)


def function(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_normalized_by_function(x, eps) * weight).to(x.dtype)


def function_without_weight(x: Tensor, eps: float) -> Tensor:
    return _normalized_by_function(x, eps).to(x.dtype)


def weighted_inputs() -> Sequence[Sequence[Tensor]]:
    dtypes = ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32))
    return [(torch.empty(8, 32, dtype=x), torch.empty(32, dtype=weight)) for x, weight in dtypes]


def unweighted_inputs() -> Sequence[Sequence[Tensor]]:
    return [(x,) for x, _ in weighted_inputs()]


def _quantized(norm: Callable[..., Tensor], granularity: str, keep: bool) -> Callable[..., Any]:
    def weighted(x: Tensor, weight: Tensor, eps: float) -> Any:
        result = norm(x, weight, eps)
        return (result, *quantize_nvfp4(result, granularity)) if keep else quantize_nvfp4(result, granularity)

    def unweighted(x: Tensor, eps: float) -> Any:
        result = norm(x, eps)
        return (result, *quantize_nvfp4(result, granularity)) if keep else quantize_nvfp4(result, granularity)

    return unweighted if norm in (no_weight, function_without_weight) else weighted


def replacement(x: Tensor, weight: Tensor | None = None, *, eps: float, granularity: str, keep: bool) -> Any:
    operator = rms_norm_quantize_nvfp4_with_norm if keep else rms_norm_quantize_nvfp4
    return operator(x, weight, eps, granularity)


def applies(match: Match, granularity: str, keep: bool) -> tuple[Any, list[Any]] | None:
    """Exact for a weight [K], a result of the dtype of ``x``, a mean over the last axis and an eps that is a number."""
    x, weight = match.kwargs["x"], match.kwargs.get("weight")
    norm = next(node for node in match.nodes if node.target is torch.ops.dsv4.quantize_nvfp4.default).args[0]
    if value(norm).dtype != value(x).dtype or value(norm).dim() != value(x).dim():
        return None
    last = value(x).dim() - 1
    for node in match.nodes:
        if node.target is torch.ops.aten.mean.dim and [dim % (last + 1) for dim in node.args[1]] != [last]:
            return None
        if node.target is CAST and node.args[0] is x and value(node).dtype != torch.float32:
            return None
    eps = match.kwargs["eps"]
    if not isinstance(eps, (int, float)) or eps < 0:
        return None
    if weight is not None and (value(weight).dim() != 1 or value(weight).shape[0] != value(x).shape[-1]):
        return None
    bound = functools.partial(replacement, eps=float(eps), granularity=granularity, keep=keep)
    return bound, [x] if weight is None else [x, weight]


def build(granularity: str) -> list[Fusion]:
    """The fusions of this file, those for a norm with other readers last."""
    forms = (
        ((weight_in_fp32, weight_last, weight_after_rounding, function), weighted_inputs),
        ((no_weight, function_without_weight), unweighted_inputs),
    )
    return [
        Fusion(
            "rms_norm" + ("_kept" if keep else "") + ("" if inputs is weighted_inputs else "_unweighted"),
            [_quantized(norm, granularity, keep) for norm in norms],
            inputs,
            functools.partial(applies, granularity=granularity, keep=keep),
            scalars={"eps": _EPS},
        )
        for keep in (False, True)
        for norms, inputs in forms
    ]
