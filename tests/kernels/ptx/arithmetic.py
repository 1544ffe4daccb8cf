"""Moves, integers, floating point, conversions: instructions whose lanes do the same, each for itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from tests.kernels.ptx import numerics
from tests.kernels.ptx.builder import Builder, Step, builds
from tests.kernels.ptx.parser import DTYPES
from tests.kernels.ptx.warp import Array, Warp

# Moves and integers

INTEGERS = {kind for kind in DTYPES if re.match(r"[busd]\d+$", kind)}


@builds("mov")
def _mov(b: Builder) -> Step:
    target, source = b.operands
    kind = b.kind
    if target.startswith("{") or source.startswith("{"):
        pieces = b.elements(target if target.startswith("{") else source)
        small = f"u{8 * DTYPES[kind].itemsize // len(pieces)}"
        whole_kind = f"b{8 * DTYPES[kind].itemsize}"
        if target.startswith("{"):
            writes = [b.write(piece, small) for piece in pieces]
            whole = b.read(source, whole_kind)

            def unpack(w: Warp, m: Any) -> None:
                parts = whole(w.R).view(DTYPES[small]).reshape(32, -1)
                for i, write in enumerate(writes):
                    write(w, m, parts[:, i].copy())

            return unpack
        reads = [b.read(piece, small) for piece in pieces]
        put = b.write(target, whole_kind)

        def pack(w: Warp, m: Any) -> None:
            parts = np.stack([read(w.R) for read in reads], 1)
            put(w, m, parts.view(DTYPES[whole_kind]).reshape(32))

        return pack
    if source in ("%clock", "%clock64", "%globaltimer", "%clock_hi"):
        put, dtype = b.write(target, kind), DTYPES[kind]
        return lambda w, m: put(w, m, np.full(32, w.steps, dtype))
    return b.map(lambda a: a, kind, kind)


def unsigned(kind: str) -> str:
    return f"u{8 * DTYPES[kind].itemsize}"


def flush(values: Array) -> Array:
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def _floating(b: Builder, function: Callable[..., Array], count: int) -> Step:
    """An fp32 or fp64 function of ``count`` operands; NaN is 0x7FFFFFFF."""
    kind = b.kind
    dtype = DTYPES[kind]
    nan = (
        np.array(0x7FFFFFFF, np.uint32).view("f4")
        if kind == "f32"
        else np.array(0x7FFFFFFFFFFFFFFF, np.uint64).view("f8")
    )
    if b.has("ftz"):
        inner = function

        def function(*values: Array) -> Array:
            return flush(inner(*[flush(value) for value in values]))

    saturates, relu = b.has("sat"), b.has("relu")

    def whole(*values: Array) -> Array:
        result = function(*values)
        if result.dtype != dtype:
            result = result.astype(dtype)
        if saturates:
            result = np.where(result > 0, np.minimum(result, dtype.type(1)), dtype.type(0))
        if relu:
            result = np.where(result <= 0, dtype.type(0), result)
        bad = result != result
        return np.where(bad, nan, result) if bad.any() else result

    return b.map(whole, kind, *[kind] * count)


def _packed(b: Builder, function: str, count: int) -> Step:
    """f16, bf16 and pairs of them."""
    b.only("rn", "relu", "sat")
    if b.has("relu", "sat"):
        raise b.missing()
    half = "bf16" if "bf16" in b.kind else "f16"
    return b.map(getattr(numerics, f"{function}_{half}"), b.kind, *[b.kind] * count)


@builds("add", "sub")
def _add(b: Builder) -> Step:
    is_add = b.parts[0] == "add"
    if "f16" in b.kind:
        return _packed(b, b.parts[0], 2)
    b.only("rn", "ftz", "sat")
    if b.kind in ("f32", "f64"):
        return _floating(b, np.add if is_add else np.subtract, 2)
    if b.has("sat") or b.kind not in INTEGERS:
        raise b.missing()
    kind = unsigned(b.kind)
    return b.map(np.add if is_add else np.subtract, kind, kind, kind)


def high(a: Array, b: Array) -> Array:
    """The upper half of products."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
        return (a.astype(wide) * b.astype(wide) >> bits).astype(a.dtype)
    return np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], dtype=a.dtype)


def wide(a: Array, b: Array) -> Array:
    dtype = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
    return a.astype(dtype) * b.astype(dtype)


@builds("mul", "mad", "fma", "mul24")
def _mul(b: Builder) -> Step:
    name, kind = b.parts[0], b.kind
    count = 2 if name == "mul" else 3
    if "f16" in kind:
        return _packed(b, "fma" if count == 3 else "mul", count)
    b.only("rn", "ftz", "sat", "lo", "hi", "wide")
    if kind == "f32":
        return _floating(b, np.multiply if count == 2 else numerics.fma_f32, count)
    if kind == "f64":
        return _floating(b, np.multiply if count == 2 else fma_f64, count)
    if b.has("lo"):
        plain = unsigned(kind)
        if count == 2:
            return b.map(np.multiply, plain, plain, plain)
        return b.map(lambda x, y, z: x * y + z, plain, plain, plain, plain)
    if b.has("hi"):
        if count == 2:
            return b.map(high, kind, kind, kind)
        return b.map(lambda x, y, z: high(x, y) + z, kind, kind, kind, kind)
    if b.has("wide"):
        double = f"{kind[0]}{16 * DTYPES[kind].itemsize}"
        if count == 2:
            return b.map(wide, double, kind, kind)
        return b.map(lambda x, y, z: wide(x, y) + z, double, kind, kind, double)
    raise b.missing()


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    result = a * b + c
    for i in range(len(a)):
        x, y, z = float(a[i]), float(b[i]), float(c[i])
        if np.isfinite(result[i]) and (np.float32(x) != x or np.float32(y) != y):  # else the product is exact
            exact = Fraction(x) * Fraction(y) + Fraction(z)
            if exact:
                result[i] = float(exact)
    return result


def quotient(a: Array, b: Array) -> Array:
    if a.dtype.kind == "u":
        return np.where(
            b == 0, a.dtype.type(-1 & (1 << 8 * a.dtype.itemsize) - 1), a // np.where(b == 0, b.dtype.type(1), b)
        )
    divisor = np.where(b == 0, b.dtype.type(1), b)
    down = a // divisor
    return np.where(
        b == 0, b.dtype.type(-1), down + ((a - down * divisor != 0) & ((a < 0) != (divisor < 0))).astype(a.dtype)
    )


@builds("div")
def _div(b: Builder) -> Step:
    b.only("rn", "full", "approx", "ftz")
    if b.kind in ("f32", "f64"):
        return _floating(b, np.divide, 2)
    return b.map(quotient, b.kind, b.kind, b.kind)


@builds("rem")
def _rem(b: Builder) -> Step:
    return b.map(lambda x, y: x - quotient(x, y) * y, b.kind, b.kind, b.kind)


@builds("min", "max")
def _extreme(b: Builder) -> Step:
    is_max, kind = b.parts[0] == "max", b.kind
    b.only("NaN", "ftz")
    if kind in ("f32", "f64"):
        if len(b.operands) != 3:
            raise b.missing()
        keeps_nan = b.has("NaN")
        return _floating(b, lambda x, y: numerics.extreme(x, y, is_max, keeps_nan), 2)
    function = np.maximum if is_max else np.minimum
    if kind in ("u16x2", "s16x2"):
        half = np.dtype("u2" if kind[0] == "u" else "i2")
        return b.map(lambda x, y: function(x.view(half), y.view(half)).view(np.uint32), "b32", "b32", "b32")
    if kind not in INTEGERS:
        raise b.missing()
    return b.map(function, kind, kind, kind)


@builds("neg", "abs")
def _sign(b: Builder) -> Step:
    kind, is_neg = b.kind, b.parts[0] == "neg"
    b.only("ftz")
    if kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
        if b.has("ftz"):
            raise b.missing()
        bits = unsigned(kind)
        sign = {"f32": 1 << 31, "f64": 1 << 63, "f16": 1 << 15, "bf16": 1 << 15}.get(kind, 0x80008000)
        flag = DTYPES[bits].type(sign)
        return b.map((lambda x: x ^ flag) if is_neg else (lambda x: x & ~flag), bits, bits)
    return b.map(np.negative if is_neg else np.abs, kind, kind)


@builds("selp")
def _selp(b: Builder) -> Step:
    return b.map(lambda x, y, p: np.where(p, x, y), unsigned(b.kind), unsigned(b.kind), unsigned(b.kind), "pred")


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


@builds("setp")
def _setp(b: Builder) -> Step:
    kind, name = b.kind, b.parts[1]
    if b.has("ftz") or kind in ("bf16", "f16x2", "bf16x2"):
        raise b.missing()
    compare: Callable[[Array, Array], Array]
    if kind in ("f16", "f32", "f64"):
        if name == "num":
            compare = lambda x, y: (x == x) & (y == y)  # noqa: E731
        elif name == "nan":
            compare = lambda x, y: (x != x) | (y != y)  # noqa: E731
        elif name.endswith("u"):
            plain = COMPARE[name[:-1]]
            compare = lambda x, y: plain(x, y) | (x != x) | (y != y)  # noqa: E731
        elif name == "ne":
            compare = lambda x, y: (x != y) & (x == x) & (y == y)  # noqa: E731
        else:
            compare = COMPARE[name]
    else:
        compare = COMPARE[name]
    targets = b.operands[0].split("|")
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(b.parts[2])
    if len(targets) == 1 and combine is None:
        return b.map(compare, "pred", kind, kind)
    writes = [b.write(target.strip(), "pred") for target in targets]
    x, y = (b.read(text, kind) for text in b.operands[1:3])
    other = b.read(b.operands[3], "pred") if combine is not None else None

    def setp(w: Warp, m: Any) -> None:
        truth = compare(x(w.R), y(w.R))
        results = [truth, ~truth]
        if combine is not None and other is not None:
            results = [combine(result, other(w.R)) for result in results]
        for write, result in zip(writes, results, strict=False):
            write(w, m, result)

    return setp


@builds("sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _function(b: Builder) -> Step:
    b.only("rn", "approx", "ftz")
    if b.kind not in ("f32", "f64"):
        raise b.missing()
    functions: dict[str, Callable[[Array], Array]] = {
        "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2, "lg2": np.log2,
        "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    }  # fmt: skip
    function = functions[b.parts[0]]
    return _floating(b, lambda x: function(x.astype(np.float64)), 1)


@builds("cvt")
def _cvt(b: Builder) -> Step:
    to, source = b.parts[-2], b.parts[-1]
    b.only("rn", "rna", "rz", "rni", "rzi", "rmi", "rpi", "sat", "satfinite", "relu", "ftz")
    function = numerics.conversion(to, source, b.parts[1:-2])
    if function is None:
        raise b.missing()
    return b.map(function, to, *[source] * (len(b.operands) - 1))
