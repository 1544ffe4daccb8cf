"""The arithmetic of PTX in NumPy, each result rounded once; bf16, e4m3 and e2m1 are bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
F32_NAN = np.array(0x7FFFFFFF, np.uint32).view(np.float32)


def odd_sum(product: Array, addend: Array) -> Array:
    """``product + addend`` in fp64, rounded to odd: rounding that again to 51 bits or fewer is as rounding once."""
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    fix = (error != 0) & np.isfinite(total) & np.isfinite(error)
    if not fix.any():
        return total
    bits = total.view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(fix & (bits & 1 == 0), bits + step, bits).view(np.float64)


def odd_f32(values: Array) -> Array:
    """fp64 to fp32, rounded to odd."""
    near = values.astype(np.float32)
    error = values - near.astype(np.float64)
    fix = (error != 0) & np.isfinite(near)
    bits = near.view(np.int32)
    # Of a subnormal that rounds to zero, the sign is that of the value.
    step = np.where((error > 0) == ~np.signbit(near), 1, -1).astype(np.int32)
    result = np.where(fix & (bits & 1 == 0), bits + step, bits).view(np.float32)
    overflow = np.isinf(near) & np.isfinite(values)
    return np.where(overflow, np.copysign(np.float32(np.finfo(np.float32).max), near), result)


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    return odd_sum(a.astype(np.float64) * b, c.astype(np.float64)).astype(np.float32)


def extreme(a: Array, b: Array, is_max: bool, keeps_nan: bool) -> Array:
    """The larger or smaller: -0 is below 0; a NaN gives way, unless it is kept."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    if keeps_nan:
        result = np.maximum(a, b) if is_max else np.minimum(a, b)
    else:
        result = np.fmax(a, b) if is_max else np.fmin(a, b)
    equal = a == b
    if equal.any():
        same = a.view(bits) & b.view(bits) if is_max else a.view(bits) | b.view(bits)
        result = np.where(equal, same, result.view(bits)).view(a.dtype)
    return result


# Halves


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """To nearest even; NaN is 0x7FFF."""
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def f64_to_bf16(values: Array) -> Array:
    near = values.astype(np.float32)
    if (near == values).all():
        return f32_to_bf16(near)
    # Beyond the largest fp32 an odd fp32 rounds up to infinity, as it must: the largest bf16 is below.
    return f32_to_bf16(odd_f32(values))


def to_f16(values: Array) -> Array:
    half = values.astype(np.float16)
    bad = half != half
    return np.where(bad, np.uint16(0x7FFF), half.view(np.uint16)).view(np.float16) if bad.any() else half


def halves_as_f64(words: Array, kind: str) -> Array:
    if kind == "f16":
        return words.view(np.float16).astype(np.float64)
    return bf16_to_f32(words.view(np.uint16)).astype(np.float64)


def _f16(function: Callable[..., Array]) -> Callable[..., Array]:
    """Of f16 or pairs of them; ``function`` in fp64, exact or odd."""

    def call(*sources: Array) -> Array:
        dtype = sources[0].dtype
        return to_f16(function(*[source.view(np.float16).astype(np.float64) for source in sources])).view(dtype)

    return call


def _bf16(function: Callable[..., Array]) -> Callable[..., Array]:
    def call(*sources: Array) -> Array:
        dtype = sources[0].dtype
        wide = [bf16_to_f32(source.view(np.uint16)).astype(np.float64) for source in sources]
        return f64_to_bf16(function(*wide)).view(dtype)

    return call


def _odd_fma(a: Array, b: Array, c: Array) -> Array:
    return odd_sum(a * b, c)


def _odd_difference(a: Array, b: Array) -> Array:
    return odd_sum(a, -b)


mul_f16, add_f16, sub_f16, fma_f16 = _f16(np.multiply), _f16(odd_sum), _f16(_odd_difference), _f16(_odd_fma)
mul_bf16, add_bf16, sub_bf16, fma_bf16 = _bf16(np.multiply), _bf16(odd_sum), _bf16(_odd_difference), _bf16(_odd_fma)

# Eight bits and four


def _decode(exponent_bits: int, mantissa_bits: int, code: int) -> float:
    exponent, mantissa = code >> mantissa_bits, code & (1 << mantissa_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    if exponent == 0:
        return mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


E4M3 = np.array([_decode(4, 3, code) for code in range(127)])  # 448 is 126; 127 is NaN
E2M1 = np.array([_decode(2, 1, code) for code in range(8)])
E5M2 = np.array([_decode(5, 2, code) for code in range(124)])  # 57344 is 123; 124 is infinity


def nearest_code(values: Array, table: Array) -> Array:
    """Codes of magnitudes, to nearest, ties to the even code; the last one for all above."""
    middles = (table[1:] + table[:-1]) / 2
    magnitudes = np.abs(values).astype(np.float64)
    code = np.searchsorted(middles, magnitudes, "left")
    tie = (code < len(middles)) & (middles[np.minimum(code, len(middles) - 1)] == magnitudes)
    return code + (tie & (code & 1 == 1))


def to_e4m3(values: Array) -> Array:
    """Saturating; NaN is 0x7F."""
    code = nearest_code(values, E4M3) | (np.signbit(values).astype(np.int64) << 7)
    return np.where(np.isnan(values), 0x7F, code).astype(np.uint8)


def to_e5m2(values: Array) -> Array:
    code = nearest_code(values, E5M2) | (np.signbit(values).astype(np.int64) << 7)
    return np.where(np.isnan(values), 0x7F, code).astype(np.uint8)


def to_e2m1(values: Array) -> Array:
    """Saturating; NaN is the largest."""
    code = nearest_code(values, E2M1) | (np.signbit(values).astype(np.int64) << 3)
    return np.where(np.isnan(values), 7, code).astype(np.uint8)


def _signed_table(table: Array, size: int, beyond: Sequence[float]) -> Array:
    positive = np.concatenate([table, beyond])
    assert len(positive) == size // 2
    return np.concatenate([positive, -positive]).astype(np.float32)


E4M3_VALUES = _signed_table(E4M3, 256, [np.nan])
E5M2_VALUES = _signed_table(E5M2, 256, [np.inf, np.nan, np.nan, np.nan])
E2M1_VALUES = _signed_table(E2M1, 16, [])


# Conversions


def _relu(values: Array) -> Array:
    return np.where(values <= 0, values.dtype.type(0), values)


def _pair(low: Array, high: Array, bits: int, dtype: Any) -> Array:
    return low.astype(dtype) | high.astype(dtype) << dtype(bits)


def conversion(to: str, source: str, modifiers: Sequence[str]) -> Callable[..., Array] | None:
    """``cvt`` from one type to another, or None."""
    relu = _relu if "relu" in modifiers else (lambda x: x)
    if "rna" in modifiers or "ftz" in modifiers:
        return None
    integers = {
        f"{sign}{bits}": np.dtype(f"{'i' if sign == 's' else 'u'}{bits // 8}")
        for sign in "us"
        for bits in (8, 16, 32, 64)
    }
    floats = {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "bf16": np.dtype("u2")}
    if to in integers and source in integers:
        dtype = integers[to]
        if "sat" in modifiers:
            info = np.iinfo(dtype)
            return lambda x: np.array([min(max(int(v), info.min), info.max) for v in x], dtype)
        return lambda x: x.astype(dtype)
    if to in integers and source in floats:
        return _to_integer(integers[to], source, modifiers)
    if to in floats and source in integers:
        if "rn" not in modifiers:
            return None
        if to == "bf16":
            return lambda x: f64_to_bf16(x.astype(np.float64)) if x.dtype.itemsize < 8 else None
        if to == "f16":
            return lambda x: to_f16(x.astype(np.float64))
        return lambda x: x.astype(floats[to])
    if to in floats and source in floats:
        return _between_floats(to, source, modifiers, relu)
    if to in ("f16x2", "bf16x2") and source == "f32" and "rn" in modifiers:
        one = (lambda x: to_f16(relu(x)).view(np.uint16)) if to == "f16x2" else (lambda x: f32_to_bf16(relu(x)))
        limit = {"f16x2": 65504.0, "bf16x2": float(bf16_to_f32(np.array([0x7F7F], np.uint16))[0])}[to]
        if "satfinite" in modifiers:
            inner = one
            one = lambda x: inner(np.clip(x, np.float32(-limit), np.float32(limit)))  # noqa: E731
        return lambda high, low: _pair(one(low), one(high), 16, np.uint32)
    eight = {"e4m3x2": to_e4m3, "e5m2x2": to_e5m2}
    if to in eight and "rn" in modifiers and "satfinite" in modifiers:
        encode = eight[to]
        if source == "f32":
            return lambda high, low: _pair(encode(relu(low)), encode(relu(high)), 8, np.uint16)
        if source == "f16x2":
            return lambda x: encode(relu(x.view(np.float16))).view(np.uint16)
    if to == "e2m1x2" and source == "f32" and "satfinite" in modifiers:
        return lambda high, low: to_e2m1(relu(low)) | to_e2m1(relu(high)) << np.uint8(4)
    if to == "f16x2" and source in ("e4m3x2", "e5m2x2"):
        table = E4M3_VALUES if source == "e4m3x2" else E5M2_VALUES
        return lambda x: to_f16(relu(table[x.view(np.uint8)])).view(np.uint32)
    if to == "f16x2" and source == "e2m1x2":

        def from_e2m1(x: Array) -> Array:
            pair = np.stack([x & np.uint8(15), x >> np.uint8(4)], 1).reshape(-1)
            return to_f16(relu(E2M1_VALUES[pair])).view(np.uint32)

        return from_e2m1
    return None


def _to_integer(dtype: Any, source: str, modifiers: Sequence[str]) -> Callable[[Array], Array] | None:
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    functions = [rounding[m] for m in modifiers if m in rounding]
    if len(functions) != 1:
        return None
    function, info = functions[0], np.iinfo(dtype)

    def convert(x: Array) -> Array:
        wide = (bf16_to_f32(x) if source == "bf16" else x).astype(np.float64)
        return np.array(
            [0 if v != v else min(max(int(np.clip(v, -1e30, 1e30)), info.min), info.max) for v in function(wide)], dtype
        )

    return convert


def _between_floats(
    to: str, source: str, modifiers: Sequence[str], relu: Callable[[Array], Array]
) -> Callable[[Array], Array] | None:
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    if any(m not in ("rn", "relu", *rounding) for m in modifiers):
        return None
    read: Callable[[Array], Array] = bf16_to_f32 if source == "bf16" else (lambda x: x)
    whole = next((rounding[m] for m in modifiers if m in rounding), None)
    if whole is not None:
        return (lambda x: whole(x)) if to == source and to != "bf16" else None
    if to == "bf16":
        if source == "f64":
            return lambda x: f64_to_bf16(relu(x))
        return lambda x: f32_to_bf16(relu(read(x).astype(np.float32)))
    if to == "f16":
        return lambda x: to_f16(relu(read(x)))
    dtype = np.dtype({"f32": "f4", "f64": "f8"}[to])
    if source == "bf16":
        return lambda x: read(x).astype(dtype)

    def convert(x: Array) -> Array:
        result = relu(x).astype(dtype)
        bad = result != result
        if not bad.any():
            return result
        bits = np.uint32(0x7FFFFFFF) if to == "f32" else np.uint64(0x7FFFFFFFFFFFFFFF)
        return np.where(bad, bits, result.view(bits.dtype)).view(dtype)

    return convert
