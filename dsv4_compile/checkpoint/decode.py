"""Turns stored weights into NVFP4 or into plain floats, and checks the scales while it reads them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.formats import MXFP4_BLOCK, Source
from dsv4_compile.checkpoint.index import Checkpoint

# Exponents that an E4M3 block scale holds exactly: 2^-9, the smallest subnormal, to 2^8, the largest power below 448.
LOWEST_EXPONENT, HIGHEST_EXPONENT = -9, 8
MXFP4_SPAN = HIGHEST_EXPONENT - LOWEST_EXPONENT
E8M0_BIAS, E8M0_NAN = 127, 255
_ELEMENTS_AT_ONCE = 1 << 20  # of a weight that are expanded to fp32 at a time


class Packed(NamedTuple):
    """NVFP4 parts of one weight: codes uint8 [..., K/2], block scales e4m3 [..., K/16], global scale fp32."""

    codes: Tensor
    block_scales: Tensor
    global_scale: Tensor


class BadScalesError(ValueError):
    """Scales that no intact checkpoint has."""


def read_packed(checkpoint: Checkpoint, source: Source) -> tuple[Packed, bool]:
    """A 4-bit source as NVFP4.

    Returns:
        The parts, in the checkpoint's own memory where nothing had to change, and whether each value is exactly the
        stored one: always for NVFP4, for MXFP4 unless the exponents of its non-zero blocks span more than 17.

    Raises:
        BadScalesError: NaN or negative block scales, or a global scale that is not positive and finite.
    """
    codes = checkpoint.read(source.parts["data"].name).view(torch.uint8)
    scale = checkpoint.read(source.parts["scale"].name)
    if source.format == "mxfp4":
        exponents = scale.view(torch.uint8)
        if bool((exponents == E8M0_NAN).any()):
            raise BadScalesError(f"{source.parts['scale'].name}: holds NaN")
        return mxfp4_to_nvfp4(codes, exponents)
    _check_block_scales(source.parts["scale"].name, scale)
    entry = source.parts["global_scale"]
    global_scale = checkpoint.read(entry.name)
    if not bool((global_scale.isfinite() & (global_scale > 0)).all()):
        bad = global_scale[~(global_scale.isfinite() & (global_scale > 0))].flatten()[0].item()
        raise BadScalesError(f"{entry.name}: must be positive and finite, got {bad}")
    if source.format == "nvfp4_ct":  # stored as 2688 / amax, to divide by
        global_scale = 1.0 / global_scale
        if not bool((global_scale.isfinite() & (global_scale > 0)).all()):
            raise BadScalesError(f"{entry.name}: its reciprocal must be positive and finite")
    lead = source.shape[:-2]
    return Packed(codes, scale, global_scale if lead else global_scale.reshape(())), True


def _check_block_scales(name: str, scale: Tensor) -> None:
    as_bytes = scale.view(torch.uint8)
    magnitude = as_bytes & 0x7F
    if bool((magnitude == 0x7F).any()):
        raise BadScalesError(f"{name}: block scales must be numbers, got NaN")
    if bool(((as_bytes >= 0x80) & (magnitude > 0)).any()):
        raise BadScalesError(f"{name}: block scales must not be negative, got {scale.to(torch.float32).min().item()}")


def mxfp4_to_nvfp4(codes: Tensor, exponents: Tensor) -> tuple[Packed, bool]:
    """E2M1 codes with one power of two for 32 elements, as NVFP4 with two E4M3 scales for them.

    With ``k`` the exponents of the blocks that hold anything but zeros, ``global scale = 2^(max k - 8)`` and ``block
    scale = 2^(k - max k + 8)``, both exact while ``max k - min k <= 17``; codes are taken over as they are.

    Args:
        codes: uint8 [..., N, K/2].
        exponents: uint8 [..., N, K/32], biased by 127, no NaN (255).

    Returns:
        The parts, one global scale for all of them (0-d), and whether every value is exactly that of MXFP4. Where the
        span is larger, the weight is quantised anew from its fp32 values.
    """
    k = exponents.to(torch.int32) - E8M0_BIAS
    used = (codes & 0x77).unflatten(-1, (-1, MXFP4_BLOCK // 2)).amax(dim=-1) > 0
    highest = int(k[used].max()) if bool(used.any()) else 0
    shifted = k - highest + HIGHEST_EXPONENT
    is_exact = bool((shifted[used] >= LOWEST_EXPONENT).all())
    if not is_exact:
        values = nvfp4.decode_codes(codes).unflatten(-1, (-1, MXFP4_BLOCK))
        weight = torch.ldexp(values, k.unsqueeze(-1)).flatten(-2)
        return Packed(*nvfp4.quantize(weight)), False
    powers = torch.arange(LOWEST_EXPONENT, HIGHEST_EXPONENT + 1, dtype=torch.float32).exp2().to(torch.float8_e4m3fn)
    position = shifted.clamp(LOWEST_EXPONENT, HIGHEST_EXPONENT) - LOWEST_EXPONENT
    block_scales = powers.view(torch.uint8)[position.long()].repeat_interleave(2, dim=-1).view(torch.float8_e4m3fn)
    global_scale = torch.ldexp(torch.ones(()), torch.tensor(highest - HIGHEST_EXPONENT))
    return Packed(codes, block_scales, global_scale), True


def read_float(checkpoint: Checkpoint, source: Source, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A plain or FP8 source in ``dtype``, rounded once; packed ones are dequantised.

    Args:
        checkpoint, source: what to read.
        dtype: of the result.
        out: where to write it; a new CPU tensor, or the checkpoint's own memory, without.

    Raises:
        BadScalesError: scales that are NaN, infinite or negative.
    """
    if source.format == "plain":
        stored = checkpoint.read(source.name)
        return stored.to(dtype) if out is None else out.copy_(stored)
    if out is None:
        out = torch.empty(source.shape, dtype=dtype)
    if source.format == "fp8":
        return _fp8_to_float(checkpoint, source, out)
    packed, _ = read_packed(checkpoint, source)
    return out.copy_(nvfp4.dequantize(*packed, dtype))


def _fp8_to_float(checkpoint: Checkpoint, source: Source, out: Tensor) -> Tensor:
    """``element * scale of its block`` in fp32, a few rows at a time."""
    data, scale = (checkpoint.read(source.parts[role].name) for role in ("data", "scale"))
    if scale.dtype == torch.float8_e8m0fnu:
        exponents = scale.view(torch.uint8)
        is_bad = bool((exponents == E8M0_NAN).any())
        scale = torch.ldexp(torch.ones(()), exponents.to(torch.int32) - E8M0_BIAS)
    else:
        scale = scale.to(torch.float32)
        is_bad = not bool((scale.isfinite() & (scale >= 0)).all())
    if is_bad:
        raise BadScalesError(f"{source.parts['scale'].name}: scales must be finite and not negative")
    *lead, n, k = source.shape
    rows, columns = source.block
    row_scales = scale.reshape(*lead, -(-n // rows), -(-k // columns))
    flat_data, flat_out = data.reshape(-1, n, k), out.view(-1, n, k)
    flat_scales = row_scales.reshape(flat_data.shape[0], *row_scales.shape[-2:])
    step = max(rows, _ELEMENTS_AT_ONCE // max(1, k) // rows * rows)
    for matrix, scales, target in zip(flat_data, flat_scales, flat_out, strict=True):
        for start in range(0, n, step):
            part = matrix[start : start + step].to(torch.float32)
            blocks = scales[start // rows : -(-min(n, start + step) // rows)]
            spread = blocks.repeat_interleave(rows, dim=0)[: part.shape[0]].repeat_interleave(columns, dim=1)[:, :k]
            target[start : start + step].copy_(part.mul_(spread))
    return out
