"""What each PTX instruction does to a warp of :mod:`tests.kernels.ptx_machine`: a closure an instruction."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from tests.kernels import ptx_numerics as numerics
from tests.kernels.ptx_machine import (
    _NUMBER,
    DTYPES,
    EXIT,
    LANES,
    LOCAL_WINDOW,
    MISSING,
    RANK_SHIFT,
    SHARED_BASE,
    SHARED_WINDOW,
    UNSIGNED,
    YIELD,
    Array,
    Blocked,
    Cta,
    Fork,
    Instruction,
    Machine,
    Mbarrier,
    PtxError,
    TensorMap,
    Warp,
    bits_dtype,
    number,
    split_operands,
)

Step = Callable[[Warp, Any], Any]
Reader = Callable[[list[Array]], Array]
Writer = Callable[[Warp, Any, Array], None]
BUILDERS: dict[str, Callable[[Builder], Step]] = {}


def builds(*names: str) -> Callable[[Callable[[Builder], Step]], Callable[[Builder], Step]]:
    def register(function: Callable[[Builder], Step]) -> Callable[[Builder], Step]:
        for name in names:
            BUILDERS[name] = function
        return function

    return register


def build(machine: Machine, instruction: Instruction) -> Step:
    """The closure of an instruction.

    Raises:
        NotImplementedError: an instruction that is missing here.
    """
    builder = Builder(machine, instruction)
    make = BUILDERS.get(instruction.parts[0])
    if make is None:
        raise NotImplementedError(f"PTX: {instruction.text}")
    step = make(builder)
    if instruction.predicate is None or instruction.parts[0] == "bra":
        return step
    predicate, negated = builder.register(instruction.predicate), instruction.negated

    def predicated(w: Warp, m: Any) -> Any:
        p = w.R[predicate]
        if negated:
            p = ~p
        live = w.live if m is None else m
        active = p & live
        if not active.any():
            return None
        if m is None and bool((active == live).all()):
            return step(w, None)
        result = step(w, active)
        if result is EXIT:
            return _exit_some(w, active, live)
        return result

    return predicated


def _exit_some(w: Warp, active: Array, live: Array) -> Any:
    if bool((active == live).all()):
        return EXIT
    w.live = w.live & ~active
    for group in w.groups:
        group.mask = group.mask & ~active
    return YIELD


class Builder:
    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        self.machine, self.ins, self.parts, self.operands = (
            machine, instruction, instruction.parts, instruction.operands
        )  # fmt: skip

    def missing(self) -> NotImplementedError:
        return NotImplementedError(f"PTX: {self.ins.text}")

    def has(self, *modifiers: str) -> bool:
        return any(modifier in self.parts for modifier in modifiers)

    @property
    def kind(self) -> str:
        return self.parts[-1]

    def only(self, *modifiers: str) -> None:
        """Refuses modifiers of the opcode that nothing here looks at."""
        for part in self.parts[1:]:
            if part not in modifiers and part not in DTYPES:
                raise self.missing()

    def register(self, text: str) -> int:
        found = self.ins.scope.find(text)
        if found is None or found[0] != "register":
            raise NotImplementedError(f"PTX: {text} of {self.ins.text}")
        return int(found[1])

    def is_register(self, text: str) -> bool:
        found = self.ins.scope.find(text)
        return found is not None and found[0] == "register"

    def symbol(self, text: str) -> int | None:
        name, _, offset = text.partition("+")
        found = self.ins.scope.find(name.strip())
        if found is None or found[0] != "symbol":
            return None
        return self.machine.symbols[found[1]][1] + (int(offset, 0) if offset else 0)

    def index(self, text: str, kind: str) -> int:
        """The register of an operand; of a number, one that holds it."""
        if self.is_register(text):
            return self.register(text)
        if text.startswith("%"):
            return self.machine.special(text, bits_dtype(kind))
        if text == "WARP_SZ":
            return self.machine.constant(32, bits_dtype(kind))
        if (address := self.symbol(text)) is not None:
            return self.machine.constant(address, bits_dtype(kind))
        if not _NUMBER.match(text):
            raise NotImplementedError(f"PTX: {text} of {self.ins.text}")
        return self.machine.constant(number(text, kind), bits_dtype(kind))

    def read(self, text: str, kind: str) -> Reader:
        if kind == "pred" and text.startswith("!"):
            inner = self.read(text[1:].strip(), kind)
            return lambda R: ~inner(R)
        i, dtype = self.index(text, kind), DTYPES[kind]
        stored = self.machine.registers[i].dtype
        if stored == dtype:
            return lambda R: R[i]
        if stored.itemsize == dtype.itemsize:
            return lambda R: R[i].view(dtype)
        unsigned = UNSIGNED[dtype.itemsize]
        return lambda R: R[i].astype(unsigned).view(dtype)

    def write(self, text: str, kind: str) -> Writer:
        if text == "_":
            return lambda w, m, v: None
        i, dtype = self.register(text), DTYPES[kind]
        stored = self.machine.registers[i].dtype
        if stored == dtype:

            def same(w: Warp, m: Any, v: Array) -> None:
                w.R[i] = v if m is None else np.where(m, v, w.R[i])

            return same
        if stored.itemsize == dtype.itemsize:

            def viewed(w: Warp, m: Any, v: Array) -> None:
                w.R[i] = v.view(stored) if m is None else np.where(m, v.view(stored), w.R[i])

            return viewed
        if stored.itemsize < dtype.itemsize or stored == DTYPES["pred"]:
            raise self.missing()
        wide = np.dtype(f"i{stored.itemsize}") if kind.startswith("s") else stored
        narrow = dtype if dtype.kind in "iu" else UNSIGNED[dtype.itemsize]

        def extended(w: Warp, m: Any, v: Array) -> None:
            v = v.view(narrow).astype(wide).view(stored)
            w.R[i] = v if m is None else np.where(m, v, w.R[i])

        return extended

    def elements(self, text: str) -> list[str]:
        return split_operands(text[1:-1]) if text.startswith("{") else [text]

    def map(self, function: Callable[..., Array], result: str, *sources: str) -> Step:
        """An instruction whose lanes do the same, each for itself: operands of the types ``sources`` to one of ``result``."""
        write = self.write(self.operands[0], result)
        if len(self.operands) != 1 + len(sources):
            raise self.missing()
        reads = [self.read(text, kind) for text, kind in zip(self.operands[1:], sources, strict=True)]
        if len(reads) == 1:
            (a,) = reads

            def one(w: Warp, m: Any) -> None:
                write(w, m, function(a(w.R)))

            return one
        if len(reads) == 2:
            a, b = reads

            def two(w: Warp, m: Any) -> None:
                R = w.R
                write(w, m, function(a(R), b(R)))

            return two

        def more(w: Warp, m: Any) -> None:
            R = w.R
            write(w, m, function(*[read(R) for read in reads]))

        return more

    def address(self, text: str) -> Reader:
        """The addresses ``[register + offset]`` as signed 64-bit numbers."""
        inside = text.strip()
        if not (inside.startswith("[") and inside.endswith("]")):
            raise self.missing()
        inside = inside[1:-1].strip()
        match = re.match(r"([%$\w]+)\s*(?:\+\s*(-?\w+))?$", inside)
        if match is None:
            raise self.missing()
        offset = int(match[2], 0) if match[2] else 0
        if self.is_register(match[1]):
            i = self.register(match[1])
            if self.machine.registers[i].dtype == np.uint64:
                if offset == 0:
                    return lambda R: R[i].view(np.int64)
                return lambda R: R[i].view(np.int64) + offset
            return lambda R: R[i].astype(np.int64) + offset
        base = self.symbol(match[1])
        i = self.machine.constant((int(match[1], 0) if base is None else base) + offset, np.dtype(np.uint64))
        return lambda R: R[i].view(np.int64)

    def needs(self, mask_text: str | None) -> Callable[[Warp, Any], Array | None]:
        """The lanes that a .sync names, if all are here, else None."""
        read = None if mask_text is None else self.read(mask_text, "b32")

        def check(w: Warp, m: Any) -> Array | None:
            here = w.live if m is None else m
            if read is None:
                return here if m is None or bool((here == w.live).all()) else None
            masks = read(w.R)[here]
            if (masks != masks[0]).any():
                raise PtxError("lanes with different member masks")
            bits = (int(masks[0]) >> LANES & 1).astype(bool)
            if (here & ~bits).any():
                if m is None:
                    raise PtxError("a lane that is not in its member mask")
                raise PtxError("a lane that is not in its member mask, or lanes with different ones")
            wanted = bits & w.live
            if (wanted & ~here).any():
                return None
            return here

        return check


def active(w: Warp, m: Any) -> Array:
    return w.live if m is None else m


def first(values: Array, lanes: Array) -> int:
    """A value that is the same in all lanes."""
    picked = values[lanes]
    if (picked != picked[0]).any():
        raise PtxError("an operand that must be the same in all lanes")
    return int(picked[0])


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


@builds("and", "or", "xor")
def _logic(b: Builder) -> Step:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[b.parts[0]]
    return b.map(function, b.kind, b.kind, b.kind)


@builds("not", "cnot")
def _not(b: Builder) -> Step:
    if b.parts[0] == "cnot":
        return b.map(lambda x: (x == 0).astype(x.dtype), b.kind, b.kind)
    return b.map(np.invert, b.kind, b.kind)


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


# Memory


def _space(b: Builder) -> str:
    for part in b.parts[1:]:
        if part in ("param", "global", "const", "local") or part.split("::")[0] == "shared":
            return {"const": "global", "param": "global", "shared::cta": "shared"}.get(
                part.replace("param::entry", "param"), part
            )
    return "generic"


def place(w: Warp, space: str, addresses: Array) -> list[tuple[Any, Array, Array]]:
    """The lanes of each memory that addresses are in: of ``addresses``, a mask, and addresses inside of that memory."""
    if space in ("shared", "global", "local"):
        return [({"shared": w.cta}.get(space, space), np.ones(len(addresses), bool), addresses)]
    if space == "generic":
        if (addresses < LOCAL_WINDOW).all() or (addresses >= SHARED_WINDOW * 2).any():
            return [("global", np.ones(len(addresses), bool), addresses)]
        if (addresses < SHARED_WINDOW).all():
            return [("local", np.ones(len(addresses), bool), addresses - LOCAL_WINDOW)]
        if (addresses < SHARED_WINDOW).any():
            raise PtxError("lanes whose generic addresses are of different memories")
        addresses = addresses - SHARED_WINDOW
    found = []
    ranks = addresses >> RANK_SHIFT
    for rank in sorted(set(ranks.tolist())):
        lanes = ranks == rank
        found.append((remote(w.cta, rank), lanes, (addresses & ((1 << RANK_SHIFT) - 1))))
    return found


def remote(cta: Cta, rank: int) -> Cta:
    if rank == 0:
        return cta
    if not 0 < rank <= len(cta.cluster.ctas):
        raise PtxError(f"no CTA {rank - 1} in the cluster")
    other = cta.cluster.ctas[rank - 1]
    if not any(warp.groups for warp in other.warps):
        raise PtxError(f"CTA {rank - 1} of the cluster has exited: its shared memory is gone")
    return other


def words(w: Warp, memory: Any, addresses: Array, lanes: Array, size: int, count: int) -> tuple[Array, Array]:
    """A memory as words of ``size`` bytes, and the index of each address, after checks."""
    num_bytes = size * count
    low, high = int(addresses.min()), int(addresses.max())
    if num_bytes > 1 and (addresses & (num_bytes - 1)).any():
        raise PtxError(f"{num_bytes} bytes at an address that is no multiple: {low:#x}")
    if memory == "global":
        part = w.machine.memory.find(low, high + num_bytes)
        if part is None:
            raise PtxError("")
        base, view = w.machine.memory.view(part, size)
        return view, (addresses - base) // size
    if memory == "local":
        assert w.local is not None
        if low < 0 or high + num_bytes > w.local.shape[1]:
            raise PtxError(f"local address {low}..{high} outside of {w.local.shape[1]} bytes")
        at = addresses + np.flatnonzero(lanes) * w.local.shape[1]
        return w.local.reshape(-1).view(UNSIGNED[size]), at // size
    end = w.machine.shared_end
    if low < SHARED_BASE or high + num_bytes > end:
        raise PtxError(f"shared address {low}..{high} + {num_bytes} outside of {SHARED_BASE}..{end}")
    return memory.views[size], (addresses - SHARED_BASE) // size


def pieces(
    w: Warp, space: str, addresses: Array, lanes: Array, size: int, count: int
) -> list[tuple[Array, Array, Array]]:
    """(words, indices, lanes) of an access by ``lanes``, whose addresses these are; one piece as a rule."""
    found = []
    for memory, part, inside in place(w, space, addresses):
        numbers = np.flatnonzero(lanes)[part]
        inside = inside[part]
        if memory == "global":
            bytes_of = w.machine.memory
            if bytes_of.find(int(inside.min()), int(inside.max()) + size * count) is None:
                for number_, address in zip(numbers.tolist(), inside, strict=True):
                    if bytes_of.find(int(address), int(address) + size * count) is None:
                        raise PtxError(
                            f"lane {number_}: {size * count} bytes at {int(address):#x} are outside of the memory of the launch"
                        )
                    one = np.array([address])
                    view, at = words(w, memory, one, lanes, size, count)
                    found.append((view, at, np.array([number_])))
                continue
        mask = np.zeros(32, bool)
        mask[numbers] = True
        view, at = words(w, memory, inside, mask, size, count)
        found.append((view, at, numbers))
    return found


@builds("ld", "ldu")
def _ld(b: Builder) -> Step:
    kind, space = b.kind, _space(b)
    targets = b.elements(b.operands[0])
    vector = next((int(p[1:]) for p in b.parts if re.match(r"v\d$", p)), 1)
    if len(targets) != vector:
        raise b.missing()
    writes = [b.write(target, kind) for target in targets]
    address = b.address(b.operands[1])
    dtype = bits_dtype(kind)
    size = dtype.itemsize
    typed = DTYPES[kind]

    def load(w: Warp, m: Any) -> None:
        here = active(w, m)
        addresses = address(w.R)
        whole = bool(here.all())
        if not whole:
            addresses = addresses[here]
        parts = pieces(w, space, addresses, here, size, vector)
        for i, write in enumerate(writes):
            if whole and len(parts) == 1:
                view, at, _ = parts[0]
                values = view[at + i] if i else view[at]
            else:
                values = np.zeros(32, dtype)
                for view, at, numbers in parts:
                    values[numbers] = view[at + i]
            write(w, m, values.view(typed))

    return load


@builds("st")
def _st(b: Builder) -> Step:
    kind, space = b.kind, _space(b)
    sources = b.elements(b.operands[1])
    reads = [b.read(source, unsigned(kind)) for source in sources]
    address = b.address(b.operands[0])
    size, count = DTYPES[kind].itemsize, len(sources)
    if count != next((int(p[1:]) for p in b.parts if re.match(r"v\d$", p)), 1) or b.has("async"):
        raise b.missing()

    def store(w: Warp, m: Any) -> None:
        here = active(w, m)
        parts = pieces(w, space, address(w.R)[here], here, size, count)
        for i, read in enumerate(reads):
            values = read(w.R)
            for view, at, numbers in parts:
                view[at + i] = values[numbers]

    return store


@builds("atom", "red")
def _atom(b: Builder) -> Step:
    returns = b.parts[0] == "atom"
    kind, space = b.kind, _space(b)
    operation = next(
        (p for p in b.parts if p in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")), None
    )
    if operation is None or kind not in {*INTEGERS, "f32", "f64"} or b.has("v2", "v4", "async"):
        raise b.missing()
    write = b.write(b.operands[0], kind) if returns else None
    rest = b.operands[1:] if returns else b.operands
    address = b.address(rest[0])
    reads = [b.read(text, kind) for text in rest[1:]]
    dtype, size = DTYPES[kind], DTYPES[kind].itemsize
    functions: dict[str, Callable[..., Any]] = {
        "add": lambda old, x: old + x, "min": min, "max": max, "and": lambda old, x: old & x,
        "or": lambda old, x: old | x, "xor": lambda old, x: old ^ x, "exch": lambda old, x: x,
        "cas": lambda old, compare, x: x if old == compare else old,
        "inc": lambda old, x: dtype.type(0) if old >= x else old + dtype.type(1),
        "dec": lambda old, x: x if old == 0 or old > x else old - dtype.type(1),
    }  # fmt: skip
    function = functions[operation]

    def atomic(w: Warp, m: Any) -> None:
        here = active(w, m)
        olds = np.zeros(32, dtype)
        sources = [read(w.R) for read in reads]
        for view, at, numbers in pieces(w, space, address(w.R)[here], here, size, 1):
            typed = view.view(dtype)
            for i, lane in zip(at.tolist(), numbers.tolist(), strict=True):
                olds[lane] = typed[i]
                typed[i] = function(typed[i], *[source[lane] for source in sources])
        if write is not None:
            write(w, m, olds)

    return atomic


@builds("cvta")
def _cvta(b: Builder) -> Step:
    window = (
        SHARED_WINDOW if b.has("shared", "shared::cta", "shared::cluster") else LOCAL_WINDOW if b.has("local") else 0
    )
    kind = b.kind
    if not window:
        return b.map(lambda x: x, kind, kind)
    delta = np.uint64(window)
    if b.has("to"):
        return b.map(lambda x: x - delta, kind, kind)
    return b.map(lambda x: x + delta, kind, kind)


@builds("mapa")
def _mapa(b: Builder) -> Step:
    mask = (1 << RANK_SHIFT) - 1
    window = 0 if b.has("shared::cluster") else SHARED_WINDOW
    kind = b.kind
    dtype = DTYPES[kind]

    def mapa(x: Array, rank: Array) -> Array:
        return (
            (x & dtype.type(mask))
            | ((rank.astype(dtype) + dtype.type(1)) << dtype.type(RANK_SHIFT))
            | dtype.type(window)
        )

    return b.map(mapa, kind, kind, "u32")


# Control


@builds("bra")
def _bra(b: Builder) -> Step:
    label = b.operands[0]
    target = b.ins.scope.label(label)
    if target is None:
        raise b.missing()
    if b.ins.predicate is None:
        return lambda w, m: target
    p, negated = b.register(b.ins.predicate), b.ins.negated

    def branch(w: Warp, m: Any) -> Any:
        taken = w.R[p]
        if negated:
            taken = ~taken
        live = w.live if m is None else m
        taken = taken & live
        count = np.count_nonzero(taken)
        if count == 0:
            return None
        if count == np.count_nonzero(live):
            return target
        return Fork(target, taken, live & ~taken)

    return branch


@builds("ret", "exit")
def _ret(b: Builder) -> Step:
    return lambda w, m: EXIT


@builds("trap")
def _trap(b: Builder) -> Step:
    def trap(w: Warp, m: Any) -> None:
        raise PtxError("trap")

    return trap


@builds("fence", "membar", "griddepcontrol", "prefetch", "prefetchu", "setmaxnreg", "applypriority", "discard")
def _nothing(b: Builder) -> Step:
    return lambda w, m: None


@builds("nanosleep")
def _sleep(b: Builder) -> Step:
    return lambda w, m: YIELD


# Warps


@builds("shfl")
def _shfl(b: Builder) -> Step:
    mode = b.parts[2]
    target, _, flag = b.operands[0].partition("|")
    write = b.write(target.strip(), "b32")
    write_flag = b.write(flag.strip(), "pred") if flag else None
    value, by, clamp = (b.read(text, "b32") for text in b.operands[1:4])
    check = b.needs(b.operands[4])

    def shuffle(w: Warp, m: Any) -> Any:
        here = check(w, m)
        if here is None:
            return MISSING
        n, c = by(w.R).astype(np.int64) & 31, clamp(w.R).astype(np.int64)
        segment = c >> 8 & 31
        last = LANES & segment | c & 31 & ~segment
        if mode == "up":
            source = LANES - n
            inside = source >= last
        elif mode == "down":
            source = LANES + n
            inside = source <= last
        elif mode == "bfly":
            source = LANES ^ n
            inside = source <= last
        else:
            source = LANES & segment | n & ~segment
            inside = source <= last
        source = np.where(inside, source, LANES)
        if not here[source[here]].all():
            raise PtxError("a shuffle reads a lane that does not take part")
        write(w, m, value(w.R)[source])
        if write_flag is not None:
            write_flag(w, m, inside)
        return None

    return shuffle


def bitmask(lanes: Array) -> int:
    return int(np.packbits(lanes, bitorder="little").view(np.uint32)[0])


@builds("vote")
def _vote(b: Builder) -> Step:
    mode = b.parts[2]
    source, check = b.read(b.operands[1], "pred"), b.needs(b.operands[2])
    write = b.write(b.operands[0], "b32" if mode == "ballot" else "pred")

    def vote(w: Warp, m: Any) -> Any:
        here = check(w, m)
        if here is None:
            return MISSING
        p = source(w.R)
        if mode == "ballot":
            write(w, m, np.full(32, bitmask(p & here), np.uint32))
        else:
            picked = p[here]
            result = {"all": picked.all(), "any": picked.any(), "uni": picked.all() or not picked.any()}[mode]
            write(w, m, np.full(32, bool(result)))
        return None

    return vote


@builds("activemask")
def _activemask(b: Builder) -> Step:
    write = b.write(b.operands[0], "b32")
    return lambda w, m: write(w, m, np.full(32, bitmask(active(w, m)), np.uint32))


@builds("match")
def _match(b: Builder) -> Step:
    mode, kind = b.parts[1], b.kind
    target, _, flag = b.operands[0].partition("|")
    write = b.write(target.strip(), "b32")
    write_flag = b.write(flag.strip(), "pred") if flag else None
    source, check = b.read(b.operands[1], kind), b.needs(b.operands[2])

    def match(w: Warp, m: Any) -> Any:
        here = check(w, m)
        if here is None:
            return MISSING
        values = source(w.R)
        same = (values[:, None] == values[None, :]) & here
        if mode == "any":
            write(w, m, np.packbits(same, axis=1, bitorder="little").view(np.uint32).reshape(32))
        else:
            equal = bool((values[here] == values[here][0]).all())
            write(w, m, np.full(32, bitmask(here) if equal else 0, np.uint32))
            if write_flag is not None:
                write_flag(w, m, np.full(32, equal))
        return None

    return match


@builds("redux")
def _redux(b: Builder) -> Step:
    kind, operation = b.kind, b.parts[2]
    function = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }.get(operation)  # fmt: skip
    if function is None or kind not in ("u32", "s32", "b32"):
        raise b.missing()
    write, source, check = b.write(b.operands[0], kind), b.read(b.operands[1], kind), b.needs(b.operands[2])
    dtype = DTYPES[kind]

    def redux(w: Warp, m: Any) -> Any:
        here = check(w, m)
        if here is None:
            return MISSING
        write(w, m, np.full(32, function.reduce(source(w.R)[here]), dtype))
        return None

    return redux


@builds("elect")
def _elect(b: Builder) -> Step:
    target, _, flag = b.operands[0].partition("|")
    write, write_flag, check = b.write(target.strip(), "b32"), b.write(flag.strip(), "pred"), b.needs(b.operands[1])

    def elect(w: Warp, m: Any) -> Any:
        here = check(w, m)
        if here is None:
            return MISSING
        leader = int(np.argmax(here))
        write(w, m, np.full(32, leader, np.uint32))
        write_flag(w, m, leader == LANES)
        return None

    return elect


def _fragments() -> tuple[Array, Array, Array]:
    """Where the elements of the fragments of m16n8k16 lie: for A and B the index in (register, lane, half); for C likewise."""
    group, inner = LANES >> 2, (LANES & 3) * 2
    a, right, c = np.zeros((16, 16), int), np.zeros((16, 8), int), np.zeros((16, 8), int)
    for lane in range(32):
        for half in range(2):
            for register in range(4):
                row, column = group[lane] + 8 * (register & 1), inner[lane] + half + 8 * (register >> 1)
                a[row, column] = (register * 32 + lane) * 2 + half
            for register in range(2):
                right[inner[lane] + half + 8 * register, group[lane]] = (register * 32 + lane) * 2 + half
                c[group[lane] + 8 * register, inner[lane] + half] = (2 * register + half) * 32 + lane
    return a, right, c


A_INDEX, B_INDEX, C_INDEX = _fragments()
C_BACK = np.argsort(C_INDEX.reshape(-1))


@builds("mma")
def _mma(b: Builder) -> Step:
    if b.parts[1:6] != ["sync", "aligned", "m16n8k16", "row", "col"] or b.parts[6] != "f32" or b.parts[9] != "f32":
        raise b.missing()
    kind = b.parts[7]
    if kind not in ("f16", "bf16") or b.parts[8] != kind:
        raise b.missing()
    writes = [b.write(text, "f32") for text in b.elements(b.operands[0])]
    left, right = ([b.read(text, "b32") for text in b.elements(b.operands[i])] for i in (1, 2))
    add = [b.read(text, "f32") for text in b.elements(b.operands[3])]
    check = b.needs(None)

    def halves(registers: list[Array]) -> Array:
        both = np.stack(registers).reshape(-1)
        return numerics.halves_as_f64(both, kind)

    def mma(w: Warp, m: Any) -> Any:
        if check(w, m) is None:
            return MISSING
        R = w.R
        x = halves([read(R) for read in left])[A_INDEX]
        y = halves([read(R) for read in right])[B_INDEX]
        z = np.stack([read(R) for read in add]).reshape(-1)[C_INDEX].astype(np.float64)
        result = (x @ y + z).astype(np.float32)
        bad = result != result
        if bad.any():
            result = np.where(bad, np.array(0x7FFFFFFF, np.uint32).view("f4"), result)
        registers = result.reshape(-1)[C_BACK].reshape(4, 32)
        for i, write in enumerate(writes):
            write(w, m, registers[i])
        return None

    return mma


# Barriers


@builds("bar", "barrier")
def _bar(b: Builder) -> Step:
    if b.parts[1] == "cluster":
        return _cluster_barrier(b)
    if b.parts[1] == "warp":
        check = b.needs(b.operands[0])
        return lambda w, m: MISSING if check(w, m) is None else None
    if not b.has("sync", "arrive"):
        raise b.missing()
    number_of = b.read(b.operands[0], "u32")
    count_of = b.read(b.operands[1], "u32") if len(b.operands) > 1 else None
    check, waits = b.needs(None), b.has("sync")

    def barrier(w: Warp, m: Any) -> Any:
        here = check(w, m)
        if here is None:
            return MISSING
        number_ = first(number_of(w.R), here)
        if not 0 <= number_ < 16:
            raise PtxError(f"barrier {number_} of 16")
        count = None if count_of is None else first(count_of(w.R), here)
        if count is not None and (count == 0 or count % 32):
            raise PtxError(f"a barrier for {count} threads")
        state, generation = w.cta.arrive(number_, count, 32)
        if not waits or state.generation != generation:
            return None
        return Blocked(lambda: state.generation != generation, True)

    return barrier


def _cluster_barrier(b: Builder) -> Step:
    check = b.needs(None)
    if b.has("arrive"):

        def arrive(w: Warp, m: Any) -> Any:
            if check(w, m) is None:
                return MISSING
            if w.cluster_phase % 2:
                raise PtxError("a warp arrives at the barrier of its cluster twice")
            cluster = w.cta.cluster
            w.cluster_phase = 2 * cluster.phase + 1
            cluster.arrived += 32
            cluster.settle()
            return None

        return arrive

    def wait(w: Warp, m: Any) -> Any:
        if check(w, m) is None:
            return MISSING
        if w.cluster_phase % 2 == 0:
            raise PtxError("a warp waits at the barrier of its cluster and did not arrive")
        cluster, phase = w.cta.cluster, w.cluster_phase // 2
        if cluster.phase == phase:
            return Blocked(lambda: cluster.phase != phase, False)
        w.cluster_phase = 0
        return None

    return wait


def at_shared(w: Warp, address: int, space: str) -> tuple[Cta, int]:
    """The CTA and the address inside of it of a shared address."""
    if space == "generic":
        address -= SHARED_WINDOW
    cta = remote(w.cta, address >> RANK_SHIFT)
    address &= (1 << RANK_SHIFT) - 1
    if not SHARED_BASE <= address < w.machine.shared_end:
        raise PtxError(f"shared address {address} outside of {SHARED_BASE}..{w.machine.shared_end}")
    return cta, address


@builds("mbarrier")
def _mbarrier(b: Builder) -> Step:
    name, space = b.parts[1], _space(b)
    if name in ("init", "inval", "expect_tx", "complete_tx"):
        address = b.address(b.operands[0])
        argument = b.read(b.operands[1], "u32") if len(b.operands) > 1 else None

        def change(w: Warp, m: Any) -> None:
            addresses = address(w.R)
            for lane in np.flatnonzero(active(w, m)).tolist():
                cta, at = at_shared(w, int(addresses[lane]), space)
                value = 0 if argument is None else int(argument(w.R)[lane])
                if name == "init":
                    if at % 8 or not 0 < value < 1 << 20:
                        raise PtxError(f"an mbarrier at {at} for {value}")
                    cta.mbarriers[at] = Mbarrier(value, value)
                elif name == "inval":
                    cta.mbarrier(at)
                    del cta.mbarriers[at]
                else:
                    state = cta.mbarrier(at)
                    state.transactions += value if name == "expect_tx" else -value
                    state.settle()

        return change
    if name in ("arrive", "arrive_drop"):
        operands = list(b.operands)
        write = None if operands[0].startswith("[") else b.write(operands.pop(0), "b64")
        address = b.address(operands[0])
        argument = b.read(operands[1], "u32") if len(operands) > 1 else None
        expects, drops = b.has("expect_tx"), name == "arrive_drop"

        def arrive(w: Warp, m: Any) -> None:
            addresses, tokens = address(w.R), np.zeros(32, np.uint64)
            for lane in np.flatnonzero(active(w, m)).tolist():
                cta, at = at_shared(w, int(addresses[lane]), space)
                state = cta.mbarrier(at)
                tokens[lane] = state.phase
                value = 1 if argument is None else int(argument(w.R)[lane])
                if expects:
                    state.transactions += value
                    value = 1
                if value > state.pending:
                    raise PtxError(
                        f"{value} arrivals at the mbarrier at {at}, which waits for {state.pending} of {state.expected}"
                    )
                state.pending -= value
                state.expected -= value if drops else 0
                state.settle()
            if write is not None:
                write(w, m, tokens)

        return arrive
    if name in ("try_wait", "test_wait"):
        write, address = b.write(b.operands[0], "pred"), b.address(b.operands[1])
        by_parity, blocks = b.has("parity"), name == "try_wait"
        token = b.read(b.operands[2], "u32" if by_parity else "b64")

        def wait(w: Warp, m: Any) -> Any:
            here = active(w, m)
            pairs = list(zip(address(w.R)[here].tolist(), token(w.R)[here].tolist(), strict=True))
            states = {pair: at_shared(w, pair[0], space) for pair in set(pairs)}
            barriers = {pair: cta.mbarrier(at) for pair, (cta, at) in states.items()}

            def done(pair: tuple[int, int]) -> bool:
                phase = barriers[pair].phase
                return (phase & 1) != (pair[1] & 1) if by_parity else phase != pair[1]

            if blocks and not any(done(pair) for pair in barriers):
                return Blocked(lambda: any(done(pair) for pair in barriers), False)
            result = np.zeros(32, bool)
            result[here] = [done(pair) for pair in pairs]
            write(w, m, result)
            return None if result[here].all() else YIELD

        return wait
    raise b.missing()


# Bulk copies


def swizzled(addresses: Array, swizzle: int) -> Array:
    """Shared addresses of 16-byte chunks, permuted: bits 4.. xor-ed with bits 7.. ."""
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    return addresses ^ ((addresses >> 7 & mask) << 4)


def tile(machine: Machine, tensor: TensorMap, coordinates: list[int]) -> Array:
    """The bytes of a box, dense, zero outside of the tensor."""
    strides, box = list(tensor.strides_bytes), list(tensor.box)
    if len(strides) < len(box):
        strides = [tensor.element_bytes, *strides]
    if getattr(tensor, "interleave", 0) or strides[0] != tensor.element_bytes or len(coordinates) != len(box):
        raise NotImplementedError(f"PTX: a copy by {tensor}")
    inner = box[0] * tensor.element_bytes
    outer = box[1:]
    out = np.zeros((int(np.prod(outer, dtype=int)), inner), np.uint8)
    low, high = max(coordinates[0], 0), min(coordinates[0] + box[0], tensor.dims[0])
    if low >= high:
        return out.reshape(-1)
    for row in range(out.shape[0]):
        rest, address = row, tensor.address
        for i, size in enumerate(outer, 1):
            position = coordinates[i] + rest % size
            rest //= size
            if not 0 <= position < tensor.dims[i]:
                break
            address += position * strides[i]
        else:
            begin, size = (low - coordinates[0]) * tensor.element_bytes, (high - low) * tensor.element_bytes
            out[row, begin : begin + size] = machine.memory.bytes(address + low * tensor.element_bytes, size)
    return out.reshape(-1)


@builds("cp")
def _cp(b: Builder) -> Step:
    if b.parts[1:3] == ["async", "bulk"] and b.parts[3] in ("commit_group", "wait_group"):
        return lambda w, m: None
    if b.parts[1:3] == ["async", "bulk"] and b.parts[3] == "prefetch":
        return lambda w, m: None
    to_shared = b.has("shared::cta", "shared::cluster") and b.has("mbarrier::complete_tx::bytes")
    if b.parts[1:4] != ["async", "bulk", "tensor"] or not to_shared or b.has("im2col", "gather4", "im2col_no_offs"):
        raise b.missing()
    target = b.address(b.operands[0])
    map_text, coordinate_text = split_operands(b.operands[1][1:-1])
    map_address = b.address(f"[{map_text}]")
    coordinates = [b.read(text, "s32") for text in b.elements(coordinate_text)]
    barrier = b.address(b.operands[2])
    multicast = b.read(b.operands[3], "u16") if b.has("multicast::cluster") else None
    machine = b.machine

    def copy(w: Warp, m: Any) -> None:
        R = w.R
        for lane in np.flatnonzero(active(w, m)).tolist():
            encoded = machine.memory.bytes(int(map_address(R)[lane]), 128).tobytes()
            if encoded not in machine.maps:
                if machine.tensor_map is None:
                    raise PtxError("a copy of a tile needs tensor_map")
                machine.maps[encoded] = machine.tensor_map(encoded)
            tensor = machine.maps[encoded]
            at = [int(read(R)[lane]) for read in coordinates]
            address, mbarrier = int(target(R)[lane]), int(barrier(R)[lane])
            owner, place_ = at_shared(w, address, "shared")
            signalled, signal = at_shared(w, mbarrier, "shared")
            ctas = [(owner, signalled)]
            if multicast is not None:
                ranks = int(multicast(R)[lane])
                ctas = [(remote(w.cta, rank + 1),) * 2 for rank in range(16) if ranks >> rank & 1]
            _copy_tile(w, tensor, at, ctas, place_, signal)

    return copy


def _copy_tile(
    w: Warp, tensor: TensorMap, at: list[int], ctas: list[tuple[Cta, Cta]], place_: int, signal: int
) -> None:
    machine, draw = w.machine, w.machine.random
    inner = tensor.box[0] * tensor.element_bytes
    size = inner * int(np.prod(tensor.box[1:], dtype=int))
    alignment = 128 if tensor.swizzle == 0 else 8 * tensor.swizzle
    if inner % 16 or place_ % 128 or (tensor.swizzle and inner > tensor.swizzle):
        raise PtxError(f"a copy by {tensor} to shared address {place_} (swizzle repeats every {alignment} bytes)")
    if tensor.swizzle and inner != tensor.swizzle:
        raise NotImplementedError(f"PTX: a copy by {tensor}, whose rows are shorter than the swizzle")
    if place_ + size > machine.shared_end:
        raise PtxError(f"a copy of {size} bytes to shared address {place_} of {machine.shared_end}")
    chunks = swizzled(place_ + 16 * np.arange(size // 16), tensor.swizzle)
    index = ((chunks - SHARED_BASE)[:, None] + np.arange(16)).reshape(-1)
    if int(index.max()) >= machine.shared_end - SHARED_BASE or int(index.min()) < 0:
        raise PtxError(f"a swizzled copy of {size} bytes to shared address {place_} leaves the shared memory")
    for owner, signalled in ctas:
        signalled.mbarrier(signal)
        if any(place_ - 8 < barrier < place_ + size for barrier in owner.mbarriers):
            raise PtxError(f"a copy of {size} bytes to shared address {place_} overwrites an mbarrier")
        owner.shared[index] = 0xFF

        def complete(owner: Cta = owner, signalled: Cta = signalled) -> None:
            owner.shared[index] = tile(machine, tensor, at)
            state = signalled.mbarrier(signal)
            state.transactions -= size
            state.settle()

        if draw.random() < 0.3:
            complete()
        else:
            w.cta.cluster.copies.append(complete)
