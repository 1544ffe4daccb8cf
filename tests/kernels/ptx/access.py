"""Loads, stores, atomics and addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.arithmetic import (
    INTEGERS,
    unsigned,
)
from tests.kernels.ptx.builder import Builder, Step, active, builds
from tests.kernels.ptx.machine import LOCAL_WINDOW, RANK_SHIFT, SHARED_BASE, SHARED_WINDOW, Cta
from tests.kernels.ptx.parser import DTYPES, UNSIGNED, bits_dtype
from tests.kernels.ptx.warp import Array, PtxError, Warp

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
