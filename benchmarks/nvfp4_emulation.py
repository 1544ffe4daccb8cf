"""NVFP4 in plain torch, written from the format alone: the yardstick `accuracy.py` holds the compiled model against.

Nothing here imports `dsv4_compile`. A value is e2m1 code x e4m3 block scale (16 consecutive elements) x fp32 global
scale; everything is fp32 and quantise-dequantise, so no packing, no kernels and no graph passes are involved.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-8
GRANULARITIES = ("tensor", "tensor_pow2", "token")

# Upper end of each interval of |v| that rounds to the value with the same index. A tie goes to the even code, so
# the end belongs to the lower value where that value's code is even (index 0, 2, 4, 6) and to the upper one elsewhere.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

Scale = Callable[[Tensor], Tensor]


def round_e2m1(v: Tensor) -> Tensor:
    """Nearest E2M1 value, ties to the even code, saturating at 6."""
    magnitude = v.abs()
    index = torch.zeros_like(magnitude, dtype=torch.int8)
    for lower, midpoint in enumerate(_MIDPOINTS):
        index += (magnitude > midpoint) if lower % 2 == 0 else (magnitude >= midpoint)
    return torch.copysign(v.new_tensor(_VALUES)[index.int()], v)


def global_scale(x: Tensor, granularity: str = "tensor") -> Tensor:
    """`max(max|x|, 1e-8) / 2688` over the finite values.

    Args:
        x: [..., K].
        granularity: `tensor`; `tensor_pow2`, rounded up to a power of two; `token`, one scale a row.

    Returns:
        fp32, shape [] or, for `token`, [..., 1].
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"global_scale: granularity must be one of {GRANULARITIES}, got {granularity!r}")
    magnitude = x.float().abs()
    magnitude = torch.where(magnitude.isfinite(), magnitude, 0.0)
    amax = magnitude.amax(-1, keepdim=True) if granularity == "token" else magnitude.amax()
    gsa = amax.clamp(min=AMAX_FLOOR) / (E2M1_MAX * E4M3_MAX)
    if granularity == "tensor_pow2":
        mantissa, exponent = torch.frexp(gsa)
        gsa = torch.where(mantissa == 0.5, gsa, torch.ldexp(torch.ones_like(gsa), exponent))
    return gsa


def quantize_dequantize(x: Tensor, gs: Tensor) -> Tensor:
    """Rounds x to NVFP4 with the global scale gs; a block that holds a NaN or Inf becomes NaN.

    Args:
        x: [..., K], K % 16 == 0.
        gs: fp32, [] or [..., 1].

    Returns:
        fp32 [..., K].
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"quantize_dequantize: x.shape[-1] must be a multiple of {BLOCK}, got {x.shape[-1]}")
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    gs = gs[..., None]
    amax = blocks.abs().amax(-1, keepdim=True)
    amax = torch.where(amax.isfinite(), amax, torch.nan)
    scale = (amax / (E2M1_MAX * gs)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    inverse = torch.where(scale == 0, 0.0, 1.0 / (scale * gs))
    return (round_e2m1(blocks * inverse) * scale * gs).flatten(-2)


def runtime_scale(granularity: str) -> Scale:
    """A `Scale` that looks at the activation it is to quantise."""
    return lambda x: global_scale(x, granularity)


def static_scale(gs: Tensor) -> Scale:
    """A `Scale` that never looks: what a checkpoint's `input_scale` does."""
    return lambda _: gs


def quantized_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear but the output head, by name."""
    get_head: Callable[[], nn.Module] | None = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@contextlib.contextmanager
def emulate(model: nn.Module, scales: Scale | Mapping[str, Scale] | None) -> Iterator[None]:
    """While active, the model's Linears compute with NVFP4 weights, and NVFP4 activations unless scales is None.

    W4A16 rounds the dequantised weight to the activation's dtype and multiplies there. W4A4 multiplies and accumulates
    in fp32 and rounds once to the activation's dtype. Parameters are never written, so a tied head stays as it is.

    Args:
        model: any module; its Linears except the output head are replaced for the time being.
        scales: the activations' global scale, for all Linears or by their names.
    """
    linears = quantized_linears(model)

    def make_forward(scale: Scale | None) -> Callable[[nn.Linear, Tensor], Tensor]:
        def forward(self: nn.Linear, x: Tensor) -> Tensor:
            weight = quantize_dequantize(self.weight, global_scale(self.weight))
            if scale is None:
                return F.linear(x, weight.to(x.dtype), self.bias)
            bias = None if self.bias is None else self.bias.float()
            return F.linear(quantize_dequantize(x, scale(x)), weight, bias).to(x.dtype)

        return forward

    try:
        for name, linear in linears.items():
            scale = scales[name] if isinstance(scales, Mapping) else scales
            linear.forward = types.MethodType(make_forward(scale), linear)  # type: ignore[method-assign]
        yield
    finally:
        for linear in linears.values():
            linear.__dict__.pop("forward", None)


def calibrate(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """The static global scale of every Linear's input: what `tensor` would give over the inputs that run() sends."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, linear in quantized_linears(model).items():

        def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            gsa = global_scale(args[0])
            found[name] = torch.maximum(found[name], gsa) if name in found else gsa

        handles.append(linear.register_forward_pre_hook(hook))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
