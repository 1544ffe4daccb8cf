"""The PTX interpreter itself: instructions against Python's numbers and torch, and the mistakes that it must see."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv4_compile.ops.dispatch import decode_choice
from dsv4_compile.ops.dispatch.expand import ExpandConfig
from dsv4_compile.ops.dispatch.moe_align import AlignConfig, ScheduleConfig
from dsv4_compile.ops.dispatch.moe_combine import CombineConfig
from dsv4_compile.ops.dispatch.moe_requantize import RequantizeConfig
from dsv4_compile.ops.dispatch.quantizer import AmaxConfig, FlatConfig, RowsConfig
from dsv4_compile.ops.dispatch.topk_router import RouterConfig
from dsv4_compile.ops.kernels import compilation
from tests.kernels.ptx import Deadlock, PtxError, TensorMap, run, unknown_instructions

Array = np.ndarray[Any, Any]
ONE = (1, 1, 1)
HEAD = """
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry kernel({parameters})
{{
  .reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %rd<40>; .reg .f32 %f<20>; .reg .f64 %fd<20>;
  {body}
  ret;
}}
"""


def execute(
    body: str, arrays: Sequence[Array], *, block: int = 32, grid: int = 1, cluster: int = 1, shared: int = 0,
    extra: Sequence[bytes] = (), **options: Any,
) -> None:  # fmt: skip
    """Runs a body whose parameters p0, p1 .. are the addresses of arrays; ``extra`` ones follow, of 64-byte alignment."""
    parameters = [f".param .b64 p{i}" for i in range(len(arrays))]
    parameters += [f".param .align 64 .b8 p{len(arrays) + i}[{len(value)}]" for i, value in enumerate(extra)]
    memory = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays]
    values = [array.ctypes.data.to_bytes(8, "little") for array in arrays]
    text = HEAD.format(parameters=", ".join(parameters), body=body)
    run(text, (grid, 1, 1), (block, 1, 1), (cluster, 1, 1), shared, [*values, *extra], memory=memory, **options)


WIDTHS = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}
REGISTERS = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}


def lanes(instruction: str, result: Any, *sources: Array) -> Array:
    """One instruction, 32 lanes at a time: ``$0`` is its result, ``$1`` .. its operands."""
    count = len(sources[0])
    size = -(-count // 32) * 32
    padded = [np.resize(source, size) for source in sources]
    out = np.zeros(size, result)
    body = "mov.u32 %r30, %tid.x; mov.u32 %r31, %ctaid.x; mad.lo.s32 %r30, %r31, 32, %r30;"
    names = []
    for i, source in enumerate([*padded, out]):
        name = f"{REGISTERS[source.itemsize]}{i + 1}"
        names.append(name)
        body += f"ld.param.b64 %rd30, [p{i}]; mul.wide.u32 %rd31, %r30, {source.itemsize}; add.s64 %rd30, %rd30, %rd31;"
        if i < len(padded):
            body += f"ld.global.{WIDTHS[source.itemsize]} {name}, [%rd30];"
    text = instruction.replace("$0", names[-1])
    for i, name in enumerate(names[:-1]):
        text = text.replace(f"${i + 1}", name)
    execute(f"{body} {text}; st.global.{WIDTHS[out.itemsize]} [%rd30], {names[-1]};", [*padded, out], grid=size // 32)
    return out[:count]


def numbers(dtype: Any, count: int = 256, seed: int = 0) -> Array:
    """Random bits, and those at the ends."""
    dtype = np.dtype(dtype)
    bits = 8 * dtype.itemsize
    random = np.random.default_rng(seed)
    values = random.integers(0, 1 << bits, count, dtype=f"u{dtype.itemsize}")
    values[:6] = [0, 1, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, 2]
    random.shuffle(values)
    return values.view(dtype)


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


# Warps


def test_divergent_loop() -> None:
    """Guards against lanes that do not meet again, and against a shuffle of those that did not."""
    start = np.arange(1, 65, dtype="u4")
    out = np.zeros(64, "u4")
    body = """
      mov.u32 %r1, %tid.x; mul.wide.u32 %rd1, %r1, 4;
      ld.param.b64 %rd2, [p0]; add.s64 %rd2, %rd2, %rd1; ld.global.nc.L1::no_allocate.b32 %r2, [%rd2];
      mov.b32 %r3, 0;
    LOOP:
      setp.eq.s32 %p1, %r2, 1; @%p1 bra DONE;
      and.b32 %r4, %r2, 1; setp.eq.s32 %p2, %r4, 0; @%p2 bra EVEN;
      mad.lo.s32 %r2, %r2, 3, 1; bra NEXT;
    EVEN:
      shr.u32 %r2, %r2, 1;
    NEXT:
      add.s32 %r3, %r3, 1; bra LOOP;
    DONE:
      shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
      ld.param.b64 %rd2, [p1]; add.s64 %rd2, %rd2, %rd1; st.global.b32 [%rd2], %r5;
    """
    execute(body, [start, out], block=64)

    def length(n: int) -> int:
        return 0 if n == 1 else 1 + length(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert out.tolist() == [length((i ^ 1) + 1) for i in range(64)]


def test_warp_instructions() -> None:
    """Guards against shuffles, votes and reductions over other lanes than the mask's."""
    x = numbers("u4", 32) % 5
    lane = np.arange(32)
    up = lanes("shfl.sync.up.b32 $0, $1, 3, 0, -1", "u4", x)
    assert np.array_equal(up, np.where(lane >= 3, x[lane - 3], x))
    down = lanes("shfl.sync.down.b32 $0|%p1, $1, 2, 0x181f, -1; selp.b32 $0, $0, 99, %p1", "u4", x)
    assert np.array_equal(down, np.where(lane % 8 < 6, x[(lane + 2) % 32], 99))
    index = lanes("shfl.sync.idx.b32 $0, $1, 5, 0x181f, -1", "u4", x)
    assert np.array_equal(index, x[lane // 8 * 8 + 5])
    ballot = lanes("setp.gt.u32 %p1, $1, 2; vote.sync.ballot.b32 $0, %p1, -1", "u4", x)
    assert (ballot == sum(1 << i for i in range(32) if x[i] > 2)).all()
    match = lanes("match.any.sync.b32 $0, $1, -1", "u4", x)
    assert match.tolist() == [sum(1 << j for j in range(32) if x[j] == x[i]) for i in range(32)]
    assert (lanes("redux.sync.max.u32 $0, $1, 0xffffffff", "u4", x) == x.max()).all()
    elected = lanes("elect.sync %r9|%p1, -1; selp.b32 $0, 1, 0, %p1", "u4", x)
    assert elected.tolist() == [1] + [0] * 31


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma(kind: str) -> None:
    """Guards against fragments whose elements lie elsewhere."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    lane = torch.arange(32)
    group, inner = lane // 4, lane % 4 * 2
    fragments = [
        torch.stack([a[group + row, inner + column], a[group + row, inner + column + 1]], 1)
        for row, column in ((0, 0), (8, 0), (0, 8), (8, 8))
    ] + [torch.stack([b[inner + row, group], b[inner + row + 1, group]], 1) for row in (0, 8)]
    words = [part.contiguous().view(torch.int32).reshape(32).numpy().view("u4").copy() for part in fragments]
    sums = [c[group + row, inner + column].numpy().view("u4").copy() for row in (0, 8) for column in (0, 1)]
    for i, (row, column) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
        targets = ["%r20", "%r21", "%r22", "%r23"]
        text = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{', '.join(targets)}}}, {{$1, $2, $3, $4}}, "
        text += f"{{$5, $6}}, {{$7, $8, $9, $9}}; mov.b32 $0, {targets[i]}"
        last = (
            "ld.param.b64 %rd20, [p9]; mov.u32 %r32, %tid.x; mul.wide.u32 %rd21, %r32, 4; add.s64 %rd20, %rd20, %rd21;"
        )
        del last
        text = text.replace("%r33", "$9") if i != 3 else text.replace("$9, %r33", "$8, $9")
        given = [*words, *(sums[:3] if i != 3 else [sums[0], sums[1], sums[3]])]
        actual = lanes(text, "u4", *given).view("f4")
        expected = (a.double() @ b.double() + c.double()).float()[group + row, inner + column].numpy()
        assert np.array_equal(actual, expected), (row, column)


def test_memory() -> None:
    """Guards against vectors in another order, and against accesses that a GPU refuses."""
    x, out = numbers("u4", 128), np.zeros(128, "u4")
    body = """
      mov.u32 %r1, %tid.x; mul.wide.u32 %rd1, %r1, 16; shl.b32 %r2, %r1, 4; mov.b32 %r3, smem; add.s32 %r2, %r2, %r3;
      ld.param.b64 %rd2, [p0]; cvta.to.global.u64 %rd2, %rd2; add.s64 %rd2, %rd2, %rd1;
      ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd2];
      st.shared.v2.b32 [%r2+8], {%r4, %r5}; st.shared.v2.b32 [%r2], {%r6, %r7};
      bar.warp.sync -1;
      ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2];
      ld.param.b64 %rd3, [p1]; add.s64 %rd3, %rd3, %rd1; st.global.v4.b32 [%rd3], {%r4, %r5, %r6, %r7};
    """
    execute(body, [x, out], shared=512)
    assert np.array_equal(out.reshape(-1, 4), x.reshape(-1, 4)[:, [2, 3, 0, 1]])
    with pytest.raises(PtxError, match=r"outside of the memory of the launch.*ld.global"):
        execute(body, [x[:-1], out], shared=512)
    with pytest.raises(PtxError, match=r"shared address .* outside .*st.shared"):
        execute(body, [x, out], shared=496)
    with pytest.raises(PtxError, match=r"no multiple"):
        execute(body.replace("[%r2+8]", "[%r2+4]"), [x, out], shared=512)


def test_atomics() -> None:
    """Guards against atomics that lose an update."""
    out = np.array([5, 1000, 0, 7], "u4")
    body = """
      ld.param.b64 %rd1, [p0]; mov.u32 %r1, %tid.x;
      atom.global.add.u32 %r2, [%rd1], 1; red.global.min.s32 [%rd1+4], %r1; atom.global.max.u32 %r3, [%rd1+8], %r1;
      setp.eq.s32 %p1, %r1, 3; @%p1 atom.global.cas.b32 %r4, [%rd1+12], 7, 9;
    """
    execute(body, [out], block=96)
    assert out.tolist() == [101, 0, 95, 9]


# Protocols

RING = """
  mov.u32 %r1, %tid.x; mov.b32 %r2, smem; setp.ne.s32 %p1, %r1, 0; @%p1 bra READY;
  mbarrier.init.shared.b64 [smem], 1; mbarrier.init.shared.b64 [smem+8], 32;
  fence.mbarrier_init.release.cluster;
READY:
  bar.sync 0;
  mov.b32 %r3, 0; ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1];
  setp.ge.s32 %p2, %r1, 32; @%p2 bra CONSUMER;
PRODUCER:
  and.b32 %r4, %r3, 1; xor.b32 %r4, %r4, 1;
  { .reg .pred P1; LAB_WAIT: mbarrier.try_wait.parity.shared.b64 P1, [smem+8], %r4, 10000000; @P1 bra.uni DONE;
    bra.uni LAB_WAIT; DONE: }
  elect.sync %r5|%p3, -1; @!%p3 bra NEXT;
  mbarrier.arrive.expect_tx.shared.b64 _, [smem], 1024;
  mov.b64 %rd3, p2; cvta.param.u64 %rd4, %rd3; add.s32 %r6, %r2, 1024; mov.b32 %r7, -8;
  cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r6], [%rd4, {%r7, %r3}], [%r2];
NEXT:
  add.s32 %r3, %r3, 1; setp.lt.s32 %p4, %r3, STEPS; @%p4 bra PRODUCER;
  bra END;
CONSUMER:
  and.b32 %r4, %r3, 1;
  { .reg .pred P1; LAB_WAIT: mbarrier.try_wait.parity.shared.b64 P1, [smem], %r4, 10000000; @P1 bra.uni DONE;
    bra.uni LAB_WAIT; DONE: }
  and.b32 %r8, %r1, 31; shl.b32 %r9, %r8, 4; add.s32 %r9, %r9, %r2;
  mad.lo.s32 %r10, %r3, 64, %r8; mul.wide.u32 %rd5, %r10, 16; add.s64 %rd5, %rd5, %rd2;
  ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r9+1024]; st.global.v4.b32 [%rd5], {%r20, %r21, %r22, %r23};
  ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r9+1536]; st.global.v4.b32 [%rd5+512], {%r20, %r21, %r22, %r23};
  ARRIVE
  add.s32 %r3, %r3, 1; setp.lt.s32 %p4, %r3, STEPS; @%p4 bra CONSUMER;
END:
"""


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_ring(swizzle: int) -> None:
    """Guards against a barrier whose phases mix, a copy that lands elsewhere, and elements outside that are not zero."""
    inner = swizzle or 64
    rows, steps = 1024 // inner, 5
    x, out = np.arange(40 * (inner // 2 + 16), dtype="u2").reshape(40, -1), np.zeros((steps, rows, inner // 2), "u2")
    width = inner // 2 - 10
    tensor = TensorMap(x.ctypes.data, 2, (width, rows + 2), (x.strides[0],), (inner // 2, rows), swizzle)
    body = RING.replace("STEPS", str(steps)).replace("ARRIVE", "mbarrier.arrive.shared.b64 %rd9, [smem+8];")
    expected = np.zeros_like(out)
    for step in range(steps):
        dense = np.zeros((rows, inner // 2), "u2")
        for row in range(min(rows, rows + 2 - step)):
            dense[row, 8 : 8 + width] = x[step + row, :width][: inner // 2 - 8]
        chunks = dense.reshape(-1, 8)
        for i in range(64):  # 16-byte chunk i of the box lies at chunk j
            mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
            j = i ^ (i >> 3 & mask)
            expected[step].reshape(-1, 8)[j] = chunks[i]
    for seed in range(6):
        out[:] = 1
        execute(body, [x, out], block=64, shared=2048, extra=[bytes(128)], tensor_map=lambda raw: tensor, seed=seed)
        assert np.array_equal(out, expected), seed
    broken = body.replace("mbarrier.arrive.shared.b64 %rd9, [smem+8];", "")
    with pytest.raises(Deadlock, match=r"mbarrier.try_wait"):
        execute(broken, [x, out], block=64, shared=2048, extra=[bytes(128)], tensor_map=lambda raw: tensor)
    inside = body.replace("add.s32 %r6, %r2, 1024", "add.s32 %r6, %r2, 0")
    with pytest.raises(PtxError, match=r"overwrites an mbarrier.*cp.async.bulk"):
        execute(inside, [x, out], block=64, shared=2048, extra=[bytes(128)], tensor_map=lambda raw: tensor)
    early = body.replace("[smem+8], %r4, 10000000", "[smem+8], 1, 10000000").replace("[smem], %r4, 1", "[smem], 1, 1")
    results = []
    for seed in range(6):  # nobody waits: some order shows it
        try:
            execute(
                early, [x, out], block=64, shared=2048, extra=[bytes(128)], tensor_map=lambda raw: tensor, seed=seed
            )
            results.append(np.array_equal(out, expected))
        except PtxError:
            results.append(False)
    assert not all(results)


def test_early_read() -> None:
    """Guards against copies that are there at once: a read that does not wait must find 0xFF in some orders."""
    x, out = np.arange(512, dtype="u2"), np.zeros(2, "u4")
    tensor = TensorMap(x.ctypes.data, 2, (64, 8), (128,), (64, 8))
    body = """
      mov.u32 %r1, %tid.x; setp.ne.s32 %p1, %r1, 0; @%p1 bra END; mbarrier.init.shared.b64 [smem], 1;
      st.shared.b32 [smem+1024], 5; mov.b32 %r2, smem; add.s32 %r3, %r2, 1024; ld.param.b64 %rd1, [p1]; mov.b32 %r4, 0;
      mbarrier.arrive.expect_tx.shared.b64 _, [smem], 1024; mov.b64 %rd2, p2;
      cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r3], [%rd2, {%r4, %r4}], [%r2];
      ld.shared.b32 %r5, [smem+1024]; st.global.b32 [%rd1], %r5;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [smem], 0; @!%p3 bra WAIT;
      ld.shared.b32 %r5, [smem+1024]; st.global.b32 [%rd1+4], %r5;
    END:
    """
    seen = set()
    for seed in range(10):
        execute(body, [x, out], shared=2048, extra=[bytes(128)], tensor_map=lambda raw: tensor, seed=seed)
        assert out[1] == 1 << 16
        seen.add(int(out[0]))
    assert seen == {0xFFFFFFFF, 1 << 16}


def test_copy_of_bytes() -> None:
    """Guards against a copy that misses its bytes or its barrier, or is there before the barrier says so."""
    x, out = np.arange(64, dtype="u4"), np.zeros(40, "u4")
    body = """
      mov.u32 %r1, %tid.x; setp.ne.s32 %p1, %r1, 0; @%p1 bra JOIN; mbarrier.init.shared.b64 [smem], 1;
      mbarrier.arrive.expect_tx.shared.b64 _, [smem], 160;
    JOIN: bar.sync 0; mov.b32 %r2, smem; ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1]; shl.b32 %r3, %r1, 4;
      add.s32 %r4, %r2, 64; add.s32 %r4, %r4, %r3; mul.wide.u32 %rd3, %r1, 16; add.s64 %rd4, %rd1, %rd3;
      setp.ge.s32 %p2, %r1, 10; @%p2 bra WAIT; mov.b32 %r5, 16;
      cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd4+32], %r5, [%r2];
    WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [smem], 0; @!%p3 bra WAIT;
      setp.ge.s32 %p2, %r1, 10; @%p2 bra END;
      ld.shared.v4.b32 {%r6, %r7, %r8, %r9}, [%r4]; add.s64 %rd5, %rd2, %rd3;
      st.global.v4.b32 [%rd5], {%r6, %r7, %r8, %r9};
    END:
    """
    for seed in range(4):
        out[:] = 0
        execute(body, [x, out], shared=1024, seed=seed)
        assert np.array_equal(out, x[8:48])
    with pytest.raises(Deadlock, match=r"mbarrier.try_wait"):
        execute(body.replace("[smem], 160", "[smem], 176"), [x, out], shared=1024)
    with pytest.raises(PtxError, match=r"units of 16.*cp.async.bulk"):
        execute(body.replace("[%rd4+32]", "[%rd4+36]"), [x, out], shared=1024)
    with pytest.raises(PtxError, match=r"outside of the memory"):
        execute(body.replace("[%rd4+32]", "[%rd4+128]"), [x, out], shared=1024)
    early = body.replace("[smem], 160", "[smem], 0")
    seen = set()
    for seed in range(8):
        execute(early, [x, out], shared=1024, seed=seed)
        seen.add(bool(np.array_equal(out, x[8:48])))
    assert False in seen


def test_barriers() -> None:
    """Guards against named barriers that let warps pass too early, and waits that never end unseen."""
    out = np.zeros(96, "u4")
    body = """
      mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.b32 %r3, smem; add.s32 %r2, %r2, %r3;
      setp.ge.s32 %p1, %r1, 64; @%p1 bra OTHERS;
      add.s32 %r4, %r1, 100; st.shared.b32 [%r2], %r4; bar.arrive 1, 96; bra END;
    OTHERS:
      bar.sync 1, 96; ld.shared.b32 %r4, [%r2+-256]; ld.shared.b32 %r5, [%r2+-128]; ld.param.b64 %rd1, [p0];
      mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2; st.global.b32 [%rd1+-256], %r4; st.global.b32 [%rd1+-128], %r5;
    END:
    """
    for seed in range(4):
        out[:] = 0
        execute(body, [out], block=96, shared=512, seed=seed)
        assert out[:64].tolist() == list(range(100, 164))
    with pytest.raises(
        PtxError, match=r"128 threads for one warp, 96 for another|96 threads for one warp, 128 for another"
    ):
        execute(body.replace("sync 1, 96", "sync 1, 128"), [out], block=96, shared=512)
    with pytest.raises(Deadlock, match=r"bar.sync 2, 96"):
        execute(body.replace("sync 1, 96", "sync 2, 96"), [out], block=96, shared=512)
    part = "mov.u32 %r1, %tid.x; setp.lt.s32 %p1, %r1, 7; @%p1 bra A; bar.sync 0; A: "
    with pytest.raises(Deadlock, match=r"bar.sync 0"):
        execute(part.replace("A: ", "A: bar.sync 0;"), [out], block=32, max_steps=1000)


def test_lanes_that_wait_for_each_other() -> None:
    """Guards against a hang: lanes at a shuffle need some that wait, first in vain and then not."""
    out = np.zeros(64, "u4")
    body = """
      mov.u32 %r1, %tid.x; setp.ne.s32 %p1, %r1, 0; @%p1 bra A; mbarrier.init.shared.b64 [smem], 1;
    A: bar.sync 0; mov.b32 %r2, 1; setp.ge.s32 %p1, %r1, 32; @%p1 bra SECOND; and.b32 %r3, %r1, 1;
      setp.eq.s32 %p2, %r3, 0; @%p2 bra MEET;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [smem], 0; @!%p3 bra WAIT;
      mov.b32 %r2, 2;
    MEET: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; mul.wide.u32 %rd1, %r1, 4; ld.param.b64 %rd2, [p0];
      add.s64 %rd2, %rd2, %rd1; st.global.b32 [%rd2], %r4; ret;
    SECOND: setp.lt.s32 %p4, %r1, 40; @%p4 ret; elect.sync %r5|%p5, 0xFFFFFF00; @%p5 mbarrier.arrive.shared.b64 _, [smem];
    """
    for seed in range(4):
        out[:] = 0
        execute(body, [out], block=64, shared=16, seed=seed)
        assert out.tolist() == [2, 1] * 16 + [0] * 32
    with pytest.raises(Deadlock, match=r"16 lanes at .*shfl"):
        execute(
            body.replace("@%p5 mbarrier.arrive.shared.b64 _, [smem];", ""), [out], block=64, shared=16, max_steps=10**5
        )


def test_cluster() -> None:
    """Guards against shared memory of another CTA that is one's own, and a cluster's barrier that does not wait."""
    out = np.zeros(4 * 32, "u4")
    body = """
      mov.u32 %r1, %tid.x; mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, %ctaid.x; shl.b32 %r4, %r1, 2;
      mov.b32 %r5, smem; add.s32 %r5, %r5, %r4; xor.b32 %r6, %r2, 1; mad.lo.s32 %r7, %r3, 1000, %r1;
      { .reg .b32 a; mapa.shared::cluster.u32 a, %r5, %r6; st.shared::cluster.b32 [a], %r7; }
      barrier.cluster.arrive; barrier.cluster.wait;
      ld.shared.b32 %r8, [%r5];
      mad.lo.s32 %r9, %r3, 32, %r1; mul.wide.u32 %rd1, %r9, 4; ld.param.b64 %rd2, [p0]; add.s64 %rd2, %rd2, %rd1;
      st.global.b32 [%rd2], %r8;
    """
    for seed in range(4):
        execute(body, [out], grid=4, cluster=2, shared=128, seed=seed)
        assert out.tolist() == [1000 * (cta ^ 1) + lane for cta in range(4) for lane in range(32)]


# Kernels

KERNELS: list[tuple[str, Any]] = [
    ("decode_mm", decode_choice.choose(1, (32,), 512, "packed", False, torch.bfloat16, True)),
    ("decode_mm", decode_choice.choose(8, (4096,), 4096, "bf16", True, torch.bfloat16, False)),
    ("expand", ExpandConfig(True)),
    ("quantize_nvfp4", AmaxConfig("bfloat16")),
    ("quantize_nvfp4", FlatConfig("float16")),
    ("swiglu_quantize_nvfp4", RowsConfig("bfloat16", 128, 2, cluster=8)),
    ("rms_norm_quantize_nvfp4", RowsConfig("bfloat16", 128, 2, per_token=True, weight="bfloat16", norm=True)),
    ("moe_align", AlignConfig("int64", 8, "bfloat16", True)),
    ("moe_align", ScheduleConfig()),
    ("moe_requantize", RequantizeConfig("bfloat16", "token")),
    ("moe_combine", CombineConfig("bfloat16", "float16")),
    ("topk_router", RouterConfig("bfloat16", 8, "sqrtsoftplus", bias="float32")),
]


@pytest.mark.parametrize(("name", "config"), KERNELS, ids=str)
def test_kernels_parse(name: str, config: Any) -> None:
    """Guards against a kernel that starts to use what the interpreter does not know."""
    with tempfile.TemporaryDirectory() as folder:
        compilation._compile(f"sm90.{name}", config, f" --keep-ptx --keep-cubin --dump-dir {folder}")
        (text,) = Path(folder).glob("*.ptx")
        assert unknown_instructions(text.read_text()) == []


def test_unknown() -> None:
    """Guards against an instruction that is taken for another one."""
    text = HEAD.format(
        parameters="",
        body="ldmatrix.sync.aligned.m8n8.x1.shared.b16 %r1, [%r1]; add.rz.f32 %f1, %f2, %f3; mov.b32 %r1, 0;",
    )
    assert unknown_instructions(text) == [
        "PTX: ldmatrix.sync.aligned.m8n8.x1.shared.b16 %r1, [%r1]",
        "PTX: add.rz.f32 %f1, %f2, %f3",
    ]
    with pytest.raises(NotImplementedError, match="ldmatrix"):
        run(text, ONE, (32, 1, 1), ONE, 0, [])
