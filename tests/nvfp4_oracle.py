"""NVFP4 written a second time, from the documented order of roundings alone, so that tests do not compare code with itself.

NumPy and Python integers, none of `dsv4_compile`, no torch arithmetic. Every step is computed in float64 and rounded to
fp32: for + - * / of fp32 operands that is the correctly rounded fp32 result, since 53 >= 2 * 24 + 2 bits. E2M1 and E4M3
are rounded by looking for the nearest entry of a table, ties to the even entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Bytes = NDArray[np.uint8]

E2M1_TABLE = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Byte b: exponent b >> 3 with bias 7, mantissa b & 7; exponent 0 is subnormal; 127 is NaN.
E4M3_TABLE = np.array([(b & 7) / 512 if b < 8 else (8 + (b & 7)) * 2.0 ** ((b >> 3) - 10) for b in range(127)])
E4M3_NAN = 0x7F


class Packed(NamedTuple):
    """What a quantiser returns: packed codes and scales as bytes, global scale as fp32 values in float64."""

    codes: Bytes
    block_scales: Bytes
    global_scale: Float64


def f32(x: Float64 | float) -> Float64:
    """Rounds float64 to fp32 (kept in float64)."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)


def _nearest(table: Float64, x: Float64) -> Bytes:
    upper = np.clip(np.searchsorted(table, x), 1, len(table) - 1)
    lower = upper - 1
    below, above = x - table[lower], table[upper] - x
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.where(take_upper, upper, lower).astype(np.uint8)


def e2m1_code(x: Float64) -> Bytes:
    """Nearest E2M1 code of finite values, ties to the even code, the sign in bit 3."""
    return _nearest(E2M1_TABLE, np.abs(x)) | (np.signbit(x).astype(np.uint8) << 3)


def e4m3_byte(x: Float64) -> Bytes:
    """Nearest E4M3 byte of values in 0..448, ties to the even byte."""
    return _nearest(E4M3_TABLE, x)


def e2m1_value(code: Bytes) -> Float64:
    """Value of codes 0..15."""
    return np.where(code >= 8, -1.0, 1.0) * E2M1_TABLE[code % 8]


def e4m3_value(byte: Bytes) -> Float64:
    """Value of non-negative E4M3 bytes; 127 is NaN."""
    return np.append(E4M3_TABLE, np.nan)[byte]


def quantize(x: Float64, granularity: str) -> Packed:
    """Steps 1 to 5 of the documented order for values [..., K] that are exact in fp32."""
    finite = np.where(np.isfinite(x), np.abs(x), 0.0)
    axis = -1 if granularity == "token" else None
    amax = np.maximum(finite.max(axis=axis, initial=0.0), f32(1e-8))
    global_scale = f32(amax / 2688.0)
    if granularity == "tensor_pow2":
        mantissa, exponent = np.frexp(global_scale)
        global_scale = np.ldexp(1.0, exponent - (mantissa == 0.5))
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    gs = global_scale[..., None] if granularity == "token" else global_scale

    is_finite = np.isfinite(blocks).all(axis=-1)
    blocks = np.where(is_finite[..., None], blocks, 0.0)
    block_amax = np.abs(blocks).max(axis=-1, initial=0.0)
    scale_bytes = e4m3_byte(np.minimum(f32(block_amax / f32(6.0 * gs)), 448.0))
    scale = e4m3_value(scale_bytes)
    is_used = is_finite & (scale > 0)
    inverse = f32(1.0 / f32(np.where(is_used, scale, 1.0) * gs))
    codes = np.where(is_used[..., None], e2m1_code(f32(blocks * inverse[..., None])), 0).astype(np.uint8)
    codes = codes.reshape(x.shape)
    return Packed(
        codes[..., 0::2] + 16 * codes[..., 1::2],
        np.where(is_finite, scale_bytes, E4M3_NAN).astype(np.uint8),
        np.asarray(global_scale),
    )


def unpack(codes: Bytes) -> Bytes:
    """Codes 0..15 [..., K] of bytes [..., K/2], the low nibble first."""
    return np.stack((codes % 16, codes // 16), axis=-1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def scaled(codes: Bytes, block_scales: Bytes) -> Float64:
    """``code * block scale`` [..., K], exact."""
    return e2m1_value(unpack(codes)) * np.repeat(e4m3_value(block_scales), 16, axis=-1)


def dequantize(codes: Bytes, block_scales: Bytes, global_scale: Float64) -> Float64:
    """fp32 values [..., K]; the global scale broadcasts against [..., N, K] from the left, segments spread over N."""
    values = scaled(codes, block_scales)
    if np.ndim(global_scale):
        global_scale = spread(global_scale, values.shape[:-1])[..., None]
    return f32(values * global_scale)


def spread(global_scale: Float64, shape: tuple[int, ...]) -> Float64:
    """A global scale [], [E], [S] or [E, S] as one a row of ``shape`` [N] or [E, N]."""
    if np.ndim(global_scale) == 0:
        return np.full(shape, global_scale)
    if np.ndim(global_scale) < len(shape):
        return np.broadcast_to(global_scale[..., None], shape)
    return np.repeat(global_scale, shape[-1] // max(1, global_scale.shape[-1]), axis=-1)


def mm(a: Packed, b: list[Packed], bias: Float64 | None = None) -> Float64:
    """``sum * (gsa * gsb) + bias`` [rows, sum N] before the rounding to the output dtype; the sum in 64-bit integers.

    A code is a multiple of 2^-1, a block scale of 2^-9, hence a product of two scaled codes one of 2^-20; it is below
    2^23, so up to K = 2^20 the integer sum is exact.
    """
    columns = []
    rows = unpack(a.codes).shape[0]
    for weight in b:
        left, right = (scaled(p.codes, p.block_scales) * 1024 for p in (a, weight))
        is_nan = np.isnan(left).any(axis=1)[:, None] | np.isnan(right).any(axis=1)[None]
        left, right = (np.nan_to_num(side).astype(np.int64) for side in (left, right))
        total = (left @ right.T).astype(np.float32).astype(np.float64) * 2.0**-20  # int64 -> fp32: one rounding
        alpha = f32(spread(a.global_scale, (rows,))[:, None] * spread(weight.global_scale, (right.shape[0],))[None])
        columns.append(np.where(is_nan, np.nan, f32(total * alpha)))
    y = np.concatenate(columns, axis=1)
    return y if bias is None else f32(y + bias)


# exp by Cody and Waite with the coefficients of Cephes' expf, every operation rounded to fp32.
_CEPHES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exp(y: Float64) -> Float64:
    """exp of fp32 values in -87..87, no step contracted into a fused multiply-add."""
    n = np.rint(f32(y * f32(1.44269504)))
    r = f32(f32(y - f32(n * 0.693359375)) - f32(n * f32(-2.12194440e-4)))
    p = np.full_like(r, f32(_CEPHES[0]))
    for coefficient in _CEPHES[1:]:
        p = f32(f32(p * r) + f32(coefficient))
    return f32(f32(f32(f32(f32(p * r) * r) + r) + 1.0) * np.exp2(n))


def silu(x: Float64) -> Float64:
    """silu of fp32 values: -0 below -87."""
    bounded = np.clip(x, -87.0, 87.0)
    return np.where(x < -87.0, -0.0, f32(x / f32(1.0 + exp(-bounded))))


def swiglu(gate: Float64, up: Float64, limit: float) -> Float64:
    """Clamped SwiGLU of fp32 values."""
    return f32(silu(np.minimum(gate, limit)) * np.clip(up, -limit, limit))


def as_float64(x: torch.Tensor) -> Float64:
    """Values of a bf16, fp16 or fp32 tensor; bf16 by its bits."""
    if x.dtype == torch.bfloat16:
        bits = x.contiguous().view(torch.int16).numpy().astype(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    return x.contiguous().numpy().astype(np.float64)


def to_dtype(x: Float64, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values (held in float64) rounded to ``dtype``, to nearest even; bf16 by its bits."""
    single = np.asarray(x).astype(np.float32)
    if dtype == torch.bfloat16:
        bits = single.view(np.uint32).astype(np.uint64)
        rounded = np.where(np.isnan(single), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return torch.from_numpy(rounded.view(np.int16).copy()).view(torch.bfloat16)
    with np.errstate(over="ignore"):
        return torch.from_numpy(single.astype({torch.float16: np.float16, torch.float32: np.float32}[dtype]))


def as_bytes(x: torch.Tensor) -> Bytes:
    """Bytes of a uint8 or e4m3 tensor."""
    return x.contiguous().view(torch.uint8).numpy()


def bits_of(x: torch.Tensor) -> list[int]:
    """fp32 bits, sign bit included, as unsigned integers."""
    return [bits & 0xFFFFFFFF for bits in x.flatten().view(torch.int32).tolist()]


def as_packed(parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Packed:
    """Codes, block scales and global scale that an operator returned."""
    return Packed(as_bytes(parts[0]), as_bytes(parts[1]), as_float64(parts[2]))


def assert_packed_equal(actual: tuple[torch.Tensor, torch.Tensor, torch.Tensor], expected: Packed) -> None:
    """Fails unless dtypes, shapes and every bit agree."""
    assert [part.dtype for part in actual] == [torch.uint8, torch.float8_e4m3fn, torch.float32]
    for name, left, right in zip(Packed._fields, as_packed(actual), expected, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=name, strict=True)


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    """Fails unless dtype, shape and bits agree; NaNs agree whatever their payload."""
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    if left.is_floating_point() and left.dtype.itemsize > 1:
        assert torch.equal(left.isnan(), right.isnan())
        left, right = (side.contiguous().nan_to_num(nan=0.0, posinf=None, neginf=None) for side in (left, right))
        assert torch.equal(left, right)
        assert torch.equal(left.signbit(), right.signbit())
    else:
        assert torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


_INTS = {torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float32: np.uint32}
_MAX_BITS = {torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF, torch.float32: 0x7F7FFFFF}


@st.composite
def activations(
    draw: Callable[..., object], dtype: torch.dtype, finite: bool = True, max_rows: int = 3, max_blocks: int = 3
) -> torch.Tensor:
    """Tensors [rows, K] in three styles: any bits; few distinct values with exact ties; Gaussian, a scale a block.

    Any bits means denormals, zeros of both signs, ±max and all magnitudes of the dtype within one block.
    """
    rows, blocks = draw(st.integers(1, max_rows)), draw(st.integers(1, max_blocks))
    style = draw(st.sampled_from(("bits", "ties", "gaussian")))
    width = np.dtype(_INTS[dtype]).itemsize * 8
    if style == "bits":
        x_bits = draw(st_numpy.arrays(_INTS[dtype], (rows, blocks * 16), elements=st.integers(0, 2**width - 1)))
    else:
        if style == "ties":
            quarters = draw(st_numpy.arrays(np.int32, (rows, blocks, 16), elements=st.integers(-24, 24)))
            values = torch.from_numpy(quarters * 0.25)
        else:
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
            values = torch.randn(rows, blocks, 16, generator=generator, dtype=torch.float64)
        low, high = (-14, 10) if dtype == torch.float16 else (-60, 60)
        exponents = draw(st_numpy.arrays(np.int32, (rows, blocks, 1), elements=st.integers(low, high)))
        x = (values * 2.0 ** torch.from_numpy(exponents)).reshape(rows, -1).to(dtype)
        x_bits = x.view(torch.int16 if width == 16 else torch.int32).numpy().view(_INTS[dtype])
    if finite:
        magnitude = x_bits & (2 ** (width - 1) - 1)
        x_bits = (x_bits - magnitude) | np.minimum(magnitude, _MAX_BITS[dtype]).astype(_INTS[dtype])
    signed = x_bits.view(np.int16 if width == 16 else np.int32).copy()
    return torch.from_numpy(signed).view(dtype)
