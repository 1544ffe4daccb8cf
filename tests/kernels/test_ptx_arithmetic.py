"""The PTX interpreter: integers, floating point and conversions against Python's numbers and torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.ptx_bodies import Array, lanes, numbers


def check(instruction: str, result: Any, function: Callable[..., int], *sources: Array) -> None:
    """Compares with a function of Python's integers."""
    bits = 8 * np.dtype(result).itemsize
    mask = (1 << bits) - 1
    expected = [function(*map(int, lane)) & mask for lane in zip(*sources, strict=True)]
    actual = lanes(instruction, result, *sources)
    assert [int(x) & mask for x in actual] == expected


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def signed(x: int, bits: int = 32) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> bits - 1 else x


INTEGER_CASES: list[tuple[str, str, str, Callable[..., int]]] = [
    ("add.s32 $0, $1, $2", "i4", "i4 i4", lambda a, b: a + b),
    ("sub.s64 $0, $1, $2", "i8", "i8 i8", lambda a, b: a - b),
    ("add.s16 $0, $1, $2", "u2", "u2 u2", lambda a, b: a + b),
    ("add.s32 $0, $1, -5", "i4", "i4", lambda a: a - 5),
    ("mul.lo.s32 $0, $1, $2", "i4", "i4 i4", lambda a, b: a * b),
    ("mul.hi.s32 $0, $1, $2", "i4", "i4 i4", lambda a, b: a * b >> 32),
    ("mul.hi.u32 $0, $1, $2", "u4", "u4 u4", lambda a, b: a * b >> 32),
    ("mul.hi.u64 $0, $1, $2", "u8", "u8 u8", lambda a, b: a * b >> 64),
    ("mul.wide.s32 $0, $1, $2", "i8", "i4 i4", lambda a, b: a * b),
    ("mul.wide.u32 $0, $1, $2", "u8", "u4 u4", lambda a, b: a * b),
    ("mul.wide.u16 $0, $1, $2", "u4", "u2 u2", lambda a, b: a * b),
    ("mad.lo.s32 $0, $1, $2, $3", "i4", "i4 i4 i4", lambda a, b, c: a * b + c),
    ("mad.wide.u32 $0, $1, $2, $3", "u8", "u4 u4 u8", lambda a, b, c: a * b + c),
    ("shl.b32 $0, $1, $2", "u4", "u4 shift", lambda a, n: a << n),
    ("shl.b32 $0, $1, 7", "u4", "u4", lambda a: a << 7),
    ("shl.b64 $0, $1, $2", "u8", "u8 shift", lambda a, n: a << n),
    ("shr.u32 $0, $1, $2", "u4", "u4 shift", lambda a, n: a >> n),
    ("shr.s32 $0, $1, $2", "i4", "i4 shift", lambda a, n: a >> n),
    ("shr.s64 $0, $1, 63", "i8", "i8", lambda a: a >> 63),
    ("shr.u16 $0, $1, 3", "u2", "u2", lambda a: a >> 3),
    ("shf.l.wrap.b32 $0, $1, $2, $3", "u4", "u4 u4 shift", lambda a, b, n: (b << 32 | a) << (n & 31) >> 32),
    ("shf.r.clamp.b32 $0, $1, $2, $3", "u4", "u4 u4 shift", lambda a, b, n: (b << 32 | a) >> min(n, 32)),
    ("min.s32 $0, $1, $2", "i4", "i4 i4", min),
    ("max.u32 $0, $1, $2", "u4", "u4 u4", max),
    ("max.u16x2 $0, $1, $2", "u4", "u4 u4", lambda a, b: max(a >> 16, b >> 16) << 16 | max(a & 0xFFFF, b & 0xFFFF)),
    ("xor.b32 $0, $1, $2", "u4", "u4 u4", lambda a, b: a ^ b),
    ("not.b32 $0, $1", "u4", "u4", lambda a: ~a),
    ("neg.s32 $0, $1", "i4", "i4", lambda a: -a),
    ("abs.s32 $0, $1", "i4", "i4", abs),
    ("popc.b32 $0, $1", "u4", "u4", int.bit_count),
    ("popc.b64 $0, $1", "u4", "u8", int.bit_count),
    ("clz.b32 $0, $1", "u4", "u4", lambda a: 32 - a.bit_length()),
    ("brev.b32 $0, $1", "u4", "u4", lambda a: int(f"{a:032b}"[::-1], 2)),
    ("bfind.u32 $0, $1", "u4", "u4", lambda a: a.bit_length() - 1),
    ("bfind.s32 $0, $1", "u4", "i4", lambda a: (~a if a < 0 else a).bit_length() - 1),
    ("bfe.u32 $0, $1, 5, 9", "u4", "u4", lambda a: a >> 5 & 511),
    ("bfe.s32 $0, $1, 5, 9", "u4", "i4", lambda a: signed(a >> 5, 9)),
    ("bfe.s32 $0, $1, 28, 9", "u4", "i4", lambda a: a >> 28),
    ("bfi.b32 $0, $1, $2, 5, 9", "u4", "u4 u4", lambda a, b: b & ~(511 << 5) | (a & 511) << 5),
    ("lop3.b32 $0, $1, $2, $3, 0xCA", "u4", "u4 u4 u4", lambda a, b, c: a & b | ~a & c),
    ("lop3.b32 $0, $1, $2, $3, 0x96", "u4", "u4 u4 u4", lambda a, b, c: a ^ b ^ c),
    ("cvt.s64.s32 $0, $1", "i8", "i4", lambda a: a),
    ("cvt.u64.u32 $0, $1", "u8", "u4", lambda a: a),
    ("cvt.u32.u64 $0, $1", "u4", "u8", lambda a: a),
    ("cvt.u16.u32 $0, $1", "u2", "u4", lambda a: a),
    ("cvt.u32.u16 $0, $1", "u4", "u2", lambda a: a),
    ("cvt.s32.s8 $0, $1", "i4", "u4", lambda a: signed(a, 8)),
    ("cvt.sat.s8.s32 %r20, $1; mov.b32 $0, %r20", "i4", "i4", lambda a: min(max(a, -128), 127)),
    ("{ .reg .b16 l, h; mov.b32 {l, h}, $1; mov.b32 $0, {h, l}; }", "u4", "u4", lambda a: a >> 16 | a << 16),
    ("mov.b64 {%r20, %r21}, $1; sub.s32 $0, %r21, %r20", "u4", "u8", lambda a: (a >> 32) - a),
    ("setp.lt.s32 %p1, $1, $2; selp.b32 $0, 7, -1, %p1", "i4", "i4 i4", lambda a, b: 7 if a < b else -1),
    ("setp.hi.u32 %p1, $1, $2; selp.b32 $0, 7, 1, !%p1", "i4", "u4 u4", lambda a, b: 1 if a > b else 7),
    ("setp.gt.or.s32 %p1|%p2, $1, 5, %p3; selp.b32 $0, 2, 3, %p2", "i4", "i4", lambda a: 3 if a > 5 else 2),
    ("mov.b32 $0, 9; setp.gt.s32 %p1, $1, 0; @!%p1 add.s32 $0, $1, 1", "i4", "i4", lambda a: 9 if a > 0 else a + 1),
]  # fmt: skip


def sources_of(kinds: str) -> list[Array]:
    return [
        np.random.default_rng(9).integers(0, 70, 256, dtype=np.uint32) if kind == "shift" else numbers(kind, seed=i)
        for i, kind in enumerate(kinds.split())
    ]


@pytest.mark.parametrize(
    ("instruction", "result", "kinds", "function"), INTEGER_CASES, ids=[c[0] for c in INTEGER_CASES]
)
def test_integers(instruction: str, result: str, kinds: str, function: Callable[..., int]) -> None:
    """Guards against an integer instruction that wraps, extends or shifts in another way than PTX says."""
    check(instruction, result, function, *sources_of(kinds))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_division(kind: str) -> None:
    """Guards against quotients that round down where PTX truncates."""
    dtype = {"s": "i", "u": "u"}[kind[0]] + str(int(kind[1:]) // 8)
    a, b = numbers(dtype), numbers(dtype, seed=1)
    b = np.where(b == 0, b.dtype.type(3), b)
    b[::2] = b[::2] % 1000 + 1
    edge = (a == np.iinfo(a.dtype).min) & (b.astype(object) == -1)
    a[edge] = 7
    check(f"div.{kind} $0, $1, $2", dtype, truncated, a, b)
    check(f"rem.{kind} $0, $1, $2", dtype, lambda x, y: x - truncated(x, y) * y, a, b)


@pytest.mark.parametrize("mode", ["", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"])
def test_permute(mode: str) -> None:
    """Guards against bytes from elsewhere, and a replicated sign."""
    a, b, s = (numbers("u4", seed=i) for i in range(3))

    def permute(x: int, y: int, selector: int) -> int:
        data = [(y << 32 | x) >> 8 * i & 255 for i in range(8)]
        n = selector & 3
        chosen = {
            ".f4e": [n, n + 1, n + 2, n + 3], ".b4e": [n, n - 1, n - 2, n - 3], ".rc8": [n] * 4,
            ".ecl": [max(n, i) for i in range(4)], ".ecr": [min(n, i) for i in range(4)],
            ".rc16": [0, 1, 0, 1] if n % 2 == 0 else [2, 3, 2, 3],
        }  # fmt: skip
        if mode:
            picked = [data[i % 8] for i in chosen[mode]]
        else:
            nibbles = [selector >> 4 * i & 15 for i in range(4)]
            picked = [(255 if data[n & 7] >> 7 else 0) if n & 8 else data[n & 7] for n in nibbles]
        return sum(byte << 8 * i for i, byte in enumerate(picked))

    check(f"prmt.b32{mode} $0, $1, $2, $3", "u4", permute, a, b, s)
    if not mode:
        check("prmt.b32 $0, $1, $2, 0xB273", "u4", lambda x, y: permute(x, y, 0xB273), a, b)


# Floating point


def rounded(value: Fraction, mantissa: int, lowest: int, highest: float) -> float:
    """To nearest even, with ``mantissa`` bits and exponents of the last one from ``lowest``."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = max(math.floor(math.log2(magnitude.numerator) - math.log2(magnitude.denominator)) - mantissa, lowest)
    while magnitude / Fraction(2) ** exponent >= 2**mantissa:
        exponent += 1
    while exponent > lowest and magnitude / Fraction(2) ** exponent < 2 ** (mantissa - 1):
        exponent -= 1
    result = round(magnitude / Fraction(2) ** exponent) * Fraction(2) ** exponent
    result_float = math.inf if result > highest else float(result)
    return math.copysign(result_float, -1 if value < 0 else 1)


FORMATS = {
    "f32": (24, -149, float(np.finfo(np.float32).max)), "f16": (11, -24, 65504.0), "bf16": (8, -133, 3.3895313892515355e38),
}  # fmt: skip


def floats(kind: str, seed: int, count: int = 512) -> Array:
    """Finite values of all magnitudes, as fp64."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 1 << 32, count, dtype=np.uint32)
    values = bits.view("f4").copy()
    near = random.integers(0x3F000000, 0x41000000, count, dtype=np.uint32).view("f4")
    values = np.where(random.random(count) < 0.6, near * np.where(random.random(count) < 0.5, -1, 1), values).astype(
        "f4"
    )
    if kind == "f16":
        values = torch.from_numpy(values).half().float().numpy()
    if kind == "bf16":
        values = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    return np.where(np.isfinite(values), values, np.float32(1.5)).astype("f8")


def encoded(values: Array, kind: str) -> Array:
    if kind == "f32":
        return values.astype("f4").view("u4")
    if kind == "f16":
        return values.astype("f2").view("u2")
    return (values.astype("f4").view("u4") >> 16).astype("u2")


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "f16x2", "bf16x2"])
def test_rounds_once(name: str, kind: str) -> None:
    """Guards against a result that is rounded twice, ends among the subnormals wrongly, or overflows too late."""
    base = kind.removesuffix("x2")
    values = [floats(base, seed) for seed in range(3 if name == "fma" else 2)]
    if name == "fma":  # sums that nearly cancel
        product = torch.from_numpy(-values[0] * values[1])
        values[2][::2] = (product.half() if base == "f16" else product.float()).double().numpy()[::2]
        values[2] = np.where(np.isfinite(values[2]), values[2], 0)
        if base == "bf16":
            values[2] = torch.from_numpy(values[2]).bfloat16().double().numpy()
            values[2] = np.where(np.isfinite(values[2]), values[2], 0)
    function: Callable[..., Fraction] = {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "fma": lambda a, b, c: a * b + c,
    }[name]  # fmt: skip
    expected = np.array([rounded(function(*map(Fraction, lane)), *FORMATS[base]) for lane in zip(*values, strict=True)])
    bits = [encoded(value, base) for value in values]
    operands = ", ".join(f"${i}" for i in range(len(values) + 1))
    if kind.endswith("x2"):
        words = [np.ascontiguousarray(word).view("u4") for word in bits]
        actual = lanes(f"{name}.rn.{kind} {operands}", "u4", *words).view("u2")
    else:
        actual = lanes(f"{name}.rn.{kind} {operands}", bits[0].dtype, *bits)
    zero = expected == 0
    wanted = encoded(np.where(np.isinf(expected), np.copysign(np.inf, expected), expected), base)
    sign = {"f32": 0x7FFFFFFF}.get(base, 0x7FFF)
    assert np.array_equal(np.where(zero, actual & sign, actual), np.where(zero, 0, wanted))


def test_fma_at_a_tie() -> None:
    """Guards against a sum that fp64 rounds to a tie of fp32."""
    a, b, c = (1 + 2.0**-20) * 2.0**-12, (1 - 2.0**-20) * 2.0**-12, 1 + 2.0**-23
    words = [np.array([x, -x, x], "f4").view("u4") for x in (a, b, c)]
    expected = [rounded(Fraction(x) * Fraction(y) + Fraction(z), *FORMATS["f32"]) for x, y, z in
                zip(*(word.view("f4").astype(float) for word in words), strict=True)]  # fmt: skip
    assert lanes("fma.rn.f32 $0, $1, $2, $3", "u4", *words).view("f4").tolist() == expected


def test_nan_and_zero() -> None:
    """Guards against a NaN of other bits than the GPU's, and against -0 that is as large as 0."""
    a = np.array([np.nan, np.inf, 1.0, -0.0, 0.0, np.nan], "f4").view("u4")
    b = np.array([1.0, -np.inf, np.nan, 0.0, -0.0, np.nan], "f4").view("u4")
    nan, one = 0x7FFFFFFF, 0x3F800000
    assert lanes("add.rn.f32 $0, $1, $2", "u4", a, b).tolist() == [nan, nan, nan, 0, 0, nan]
    assert lanes("max.f32 $0, $1, $2", "u4", a, b).tolist() == [one, 0x7F800000, one, 0, 0, nan]
    assert lanes("min.f32 $0, $1, $2", "u4", a, b).tolist() == [one, 0xFF800000, one, 1 << 31, 1 << 31, nan]
    assert lanes("max.NaN.f32 $0, $1, $2", "u4", a, b).tolist() == [nan, 0x7F800000, nan, 0, 0, nan]
    for compare, expected in {
        "lt": [0, 0, 0, 0, 0, 0], "ltu": [1, 0, 1, 0, 0, 1], "ne": [0, 1, 0, 0, 0, 0], "neu": [1, 1, 1, 0, 0, 1],
        "equ": [1, 0, 1, 1, 1, 1], "num": [0, 1, 0, 1, 1, 0], "nan": [1, 0, 1, 0, 0, 1],
    }.items():  # fmt: skip
        text = f"setp.{compare}.f32 %p1, $1, $2; selp.b32 $0, 1, 0, %p1"
        assert lanes(text, "u4", a, b).tolist() == expected, compare


def test_conversions() -> None:
    """Guards against encodings that round, saturate or order their halves otherwise than torch does."""
    values = np.concatenate(
        [floats("f32", 3), np.linspace(-500, 500, 991), [464.0, 448.0, 465.0, 2.0**-10, 3 * 2.0**-10]]
    )
    x, y = values.astype("f4"), values[::-1].astype("f4").copy()
    tx = torch.from_numpy(x)
    half = {"bf16": tx.bfloat16(), "f16": tx.half()}
    for kind, tensor in half.items():
        bits = tensor.view(torch.int16).numpy().view("u2")
        assert np.array_equal(lanes(f"cvt.rn.{kind}.f32 $0, $1", "u2", x.view("u4")), bits)
        pair = lanes(f"cvt.rn.{kind}x2.f32 $0, $1, $2", "u4", y.view("u4"), x.view("u4"))
        assert np.array_equal(pair & 0xFFFF, bits)
        assert np.array_equal(pair >> 16, bits[::-1])
        back = lanes(f"cvt.f32.{kind} $0, $1", "u4", bits)
        assert np.array_equal(back.view("f4"), tensor.float().numpy())
    saturated = tx.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    pair = lanes("cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2", "u2", y.view("u4"), x.view("u4"))
    assert np.array_equal(pair & 0xFF, saturated)
    assert np.array_equal(pair >> 8, saturated[::-1])
    codes = np.arange(256, dtype="u2") | np.arange(255, -1, -1, dtype="u2") << 8
    decoded = lanes("cvt.rn.f16x2.e4m3x2 $0, $1", "u4", codes).view("f2").reshape(-1, 2)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(decoded[:, 0].astype("f4"), table, equal_nan=True)
    assert np.array_equal(decoded[:, 1].astype("f4"), table[::-1], equal_nan=True)
    small = np.array([0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 100, -0.25, -5.1], "f4")
    e2m1 = lanes(
        "{ .reg .b8 d; cvt.rn.satfinite.e2m1x2.f32 d, 0f00000000, $1; cvt.u32.u8 $0, d; }", "u4", small.view("u4")
    )
    assert e2m1.tolist() == [0, 1, 2, 2, 4, 4, 6, 6, 7, 7, 8, 15]
    for text, function in {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.items():
        expected = np.clip(function(x.astype("f8")), -(2.0**31), 2.0**31 - 1).astype("i8")
        assert np.array_equal(lanes(f"cvt.{text}.s32.f32 $0, $1", "i4", x.view("u4")), expected)
    whole = numbers("i4")
    assert np.array_equal(lanes("cvt.rn.f32.s32 $0, $1", "u4", whole).view("f4"), whole.astype("f4"))


def test_functions() -> None:
    """Guards against a quotient, root or exponential that is not the nearest."""
    x, y = np.abs(floats("f32", 1)).astype("f4"), floats("f32", 2).astype("f4")
    with np.errstate(all="ignore"):
        assert np.array_equal(lanes("div.rn.f32 $0, $1, $2", "u4", x.view("u4"), y.view("u4")).view("f4"), x / y)
        assert np.array_equal(lanes("sqrt.rn.f32 $0, $1", "u4", x.view("u4")).view("f4"), np.sqrt(x))
        exact = np.exp2(y.astype("f8")).astype("f4")
    assert np.array_equal(lanes("ex2.approx.f32 $0, $1", "u4", y.view("u4")).view("f4"), exact)
