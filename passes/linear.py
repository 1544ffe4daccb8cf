"""Linear: a packed weight in front of a matrix product becomes ``quantize_nvfp4`` + ``nvfp4_mm``.

Matches: ``mm(x, dequantize(w).t())`` and ``addmm(bias, x, dequantize(w).t())``, which is what F.linear, ``x @ w.t()``
and torch.addmm decompose to, with an optional cast before or after the transpose (autocast).
Rewrites to: ``nvfp4_mm(*quantize_nvfp4(x), [w], bias)``, rounded once to the dtype of the product it replaces; with
``activations="bf16"`` to ``nvfp4_weight_mm(x, [w], bias)``, where ``x`` is bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.pattern_matcher import Match

from dsv4_compile.ops.dequantize_nvfp4 import dequantize_nvfp4
from dsv4_compile.ops.nvfp4_mm import nvfp4_mm
from dsv4_compile.ops.nvfp4_weight_mm import nvfp4_weight_mm
from dsv4_compile.ops.quantize_nvfp4 import quantize_nvfp4
from dsv4_compile.passes.graph import Fusion, value


def mm(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    return torch.mm(x, dequantize_nvfp4(codes, block_scales, global_scale, x.dtype).t())


def mm_cast_weight(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    weight = dequantize_nvfp4(codes, block_scales, global_scale, torch.float32)
    return torch.mm(x, weight.to(x.dtype).t())


def mm_cast_transposed(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    weight = dequantize_nvfp4(codes, block_scales, global_scale, torch.float32)
    return torch.mm(x, weight.t().to(x.dtype))


def addmm(bias: Tensor, x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    return torch.addmm(bias, x, dequantize_nvfp4(codes, block_scales, global_scale, x.dtype).t())


def addmm_cast_weight(bias: Tensor, x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    weight = dequantize_nvfp4(codes, block_scales, global_scale, torch.float32)
    return torch.addmm(bias, x, weight.to(x.dtype).t())


def addmm_cast_transposed(bias: Tensor, x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    weight = dequantize_nvfp4(codes, block_scales, global_scale, torch.float32)
    return torch.addmm(bias, x, weight.t().to(x.dtype))


def _packed_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.empty(8, 32, dtype=torch.bfloat16)
    codes = torch.empty(16, 16, dtype=torch.uint8)
    return x, codes, torch.empty(16, 2, dtype=torch.float8_e4m3fn), torch.empty(())


def mm_inputs() -> Sequence[Sequence[Tensor]]:
    return [_packed_inputs()]


def addmm_inputs() -> Sequence[Sequence[Tensor]]:
    return [(torch.empty(16, dtype=torch.bfloat16), *_packed_inputs())]


def replacement(
    x: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    *,
    granularity: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return nvfp4_mm(*quantize_nvfp4(x, granularity), [codes], [block_scales], [global_scale], bias, out_dtype)


def weight_replacement(
    x: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    return nvfp4_weight_mm(x, [codes], [block_scales], [global_scale], bias, out_dtype)


def applies(match: Match, granularity: str, activations: str) -> tuple[Any, list[Any]] | None:
    """Exact whenever it matches, but for a bias that broadcasts over rows: the product is the weight's only reading."""
    arguments = [match.kwargs[name] for name in ("x", "codes", "block_scales", "global_scale")]
    bias = match.kwargs.get("bias")
    if bias is not None:
        if value(bias).dim() != 1 or value(bias).shape[0] != value(arguments[1]).shape[0]:
            return None
        arguments.append(bias)
    out_dtype = value(match.output_node()).dtype
    if activations == "bf16":
        if value(arguments[0]).dtype != torch.bfloat16:
            return None
        return functools.partial(weight_replacement, out_dtype=out_dtype), arguments
    return functools.partial(replacement, granularity=granularity, out_dtype=out_dtype), arguments


def build(granularity: str, activations: str = "nvfp4") -> list[Fusion]:
    """The fusions of this file for one granularity of the activation global scale, or for bf16 activations."""
    check = functools.partial(applies, granularity=granularity, activations=activations)
    return [
        Fusion("linear", (mm, mm_cast_weight, mm_cast_transposed), mm_inputs, check, shared=True),
        Fusion("linear_bias", (addmm, addmm_cast_weight, addmm_cast_transposed), addmm_inputs, check, shared=True),
    ]
