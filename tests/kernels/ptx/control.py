"""Branches and exits, and what the lanes of a warp do together: shuffles, votes, elections."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.kernels.ptx import numerics
from tests.kernels.ptx.builder import Builder, Step, active, builds
from tests.kernels.ptx.parser import DTYPES
from tests.kernels.ptx.warp import EXIT, LANES, MISSING, YIELD, Array, Fork, PtxError, Warp

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
