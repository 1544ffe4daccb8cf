"""Bits: logic, shifts, bytes and fields of a register, counts; each lane for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.arithmetic import unsigned
from tests.kernels.ptx.builder import Builder, Step, builds
from tests.kernels.ptx.parser import _NUMBER, DTYPES, UNSIGNED, number
from tests.kernels.ptx.warp import Array


@builds("and", "or", "xor")
def _logic(b: Builder) -> Step:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[b.parts[0]]
    return b.map(function, b.kind, b.kind, b.kind)


@builds("not", "cnot")
def _not(b: Builder) -> Step:
    if b.parts[0] == "cnot":
        return b.map(lambda x: (x == 0).astype(x.dtype), b.kind, b.kind)
    return b.map(np.invert, b.kind, b.kind)


@builds("shl", "shr")
def _shift(b: Builder) -> Step:
    kind, is_left = b.kind, b.parts[0] == "shl"
    dtype, bits = DTYPES[kind], 8 * DTYPES[kind].itemsize
    if _NUMBER.match(b.operands[2]):
        amount = number(b.operands[2], "u32")
        if amount < bits:
            by = dtype.type(amount)
            b.operands[2:] = []
            return b.map((lambda x: x << by) if is_left else (lambda x: x >> by), kind, kind)

    def shift(x: Array, n: Array) -> Array:
        big = n >= bits
        n = np.where(big, np.uint32(bits - 1), n).astype(dtype)
        if is_left:
            return np.where(big, dtype.type(0), x << n)
        return np.where(big, (x >> n) if dtype.kind == "i" else dtype.type(0), x >> n)

    return b.map(shift, kind, kind, "u32")


@builds("shf")
def _funnel(b: Builder) -> Step:
    is_left, wraps = b.parts[1] == "l", b.parts[2] == "wrap"

    def shift(low: Array, upper: Array, n: Array) -> Array:
        n = (n & np.uint32(31) if wraps else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = upper.astype(np.uint64) << np.uint64(32) | low
        return ((both << n) >> np.uint64(32) if is_left else both >> n).astype(np.uint32)

    return b.map(shift, "b32", "b32", "b32", "u32")


@builds("lop3")
def _lop3(b: Builder) -> Step:
    if b.kind != "b32" or len(b.operands) != 5:
        raise b.missing()
    table = number(b.operands.pop(), "u32")

    def logic(x: Array, y: Array, z: Array) -> Array:
        result = np.zeros(32, np.uint32)
        for i in range(8):
            if table >> i & 1:
                result |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        return result

    return b.map(logic, "b32", "b32", "b32", "b32")


@builds("prmt")
def _prmt(b: Builder) -> Step:
    mode = b.kind if b.kind != "b32" else ""
    lane = np.arange(4)

    def both(x: Array, y: Array) -> Array:
        pair = np.empty((32, 2), np.uint32)
        pair[:, 0], pair[:, 1] = x, y
        return pair.view(np.uint8)

    if mode:
        tables = {
            "f4e": [[(s + i) % 8 for i in range(4)] for s in range(4)],
            "b4e": [[(s - i) % 8 for i in range(4)] for s in range(4)],
            "rc8": [[s] * 4 for s in range(4)],
            "ecl": [[max(s, i) for i in range(4)] for s in range(4)],
            "ecr": [[min(s, i) for i in range(4)] for s in range(4)],
            "rc16": [[2 * (s & 1), 2 * (s & 1) + 1] * 2 for s in range(4)],
        }
        table = np.array(tables[mode])

        def special(x: Array, y: Array, s: Array) -> Array:
            picked = np.take_along_axis(both(x, y), table[s & np.uint32(3)], 1)
            return np.ascontiguousarray(picked).view(np.uint32).reshape(32)

        return b.map(special, "b32", "b32", "b32", "b32")
    if _NUMBER.match(b.operands[3]):
        selector = number(b.operands.pop(), "b32")
        nibbles = [selector >> 4 * i & 15 for i in range(4)]
        columns = np.array([n & 7 for n in nibbles])
        signs = np.array([n >> 3 for n in nibbles], bool)
        has_signs = bool(signs.any())

        def constant(x: Array, y: Array) -> Array:
            picked = both(x, y).take(columns, 1)
            if has_signs:
                picked = np.where(signs, np.where(picked & 0x80, np.uint8(0xFF), np.uint8(0)), picked)
            return picked.view(np.uint32).reshape(32)

        return b.map(constant, "b32", "b32", "b32")

    def general(x: Array, y: Array, s: Array) -> Array:
        nibble = s[:, None] >> (4 * lane).astype(np.uint32) & np.uint32(15)
        picked = np.take_along_axis(both(x, y), (nibble & np.uint32(7)).astype(np.int64), 1)
        picked = np.where(nibble & np.uint32(8), np.where(picked & 0x80, np.uint8(0xFF), np.uint8(0)), picked)
        return np.ascontiguousarray(picked).view(np.uint32).reshape(32)

    return b.map(general, "b32", "b32", "b32", "b32")


def _each(function: Callable[..., int], dtype: Any) -> Callable[..., Array]:
    return lambda *sources: np.array([function(*map(int, lane)) for lane in zip(*sources, strict=True)], dtype=dtype)


@builds("popc", "clz", "brev", "bfind")
def _bits(b: Builder) -> Step:
    kind, name = b.kind, b.parts[0]
    bits = 8 * DTYPES[kind].itemsize
    if name == "popc":
        return b.map(lambda x: np.bitwise_count(x).astype(np.uint32), "u32", kind)
    if name == "clz":
        return b.map(_each(lambda x: bits - x.bit_length(), np.uint32), "u32", kind)
    if name == "brev":
        return b.map(_each(lambda x: int(f"{x:0{bits}b}"[::-1], 2), DTYPES[kind]), kind, kind)
    shifts = b.has("shiftamt")

    def find(x: int) -> int:
        x = ~x if x < 0 else x
        return 0xFFFFFFFF if x == 0 else bits - x.bit_length() if shifts else x.bit_length() - 1

    return b.map(_each(find, np.uint32), "u32", kind)


@builds("bfe")
def _bfe(b: Builder) -> Step:
    kind = b.kind
    bits, signed = 8 * DTYPES[kind].itemsize, kind[0] == "s"

    def extract(x: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        value = (x & (1 << bits) - 1) >> position & (1 << length) - 1
        if signed and length:
            sign = (x >> min(position + length - 1, bits - 1)) & 1
            if sign:
                value |= (1 << bits) - 1 & ~((1 << min(length, max(bits - position, 0))) - 1)
        return value

    function = _each(extract, UNSIGNED[bits // 8])
    return b.map(lambda *sources: function(*sources), unsigned(kind), kind, "u32", "u32")


@builds("bfi")
def _bfi(b: Builder) -> Step:
    kind = b.kind
    bits = 8 * DTYPES[kind].itemsize

    def insert(x: int, into: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        mask = ((1 << length) - 1) << position & (1 << bits) - 1
        return into & ~mask | (x << position) & mask

    return b.map(_each(insert, DTYPES[kind]), kind, kind, kind, "u32", "u32")
