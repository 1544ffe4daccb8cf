"""What an instruction becomes: a closure that changes a warp, made by the builder of its opcode."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.parser import _NUMBER, DTYPES, UNSIGNED, Instruction, bits_dtype, number, split_operands
from tests.kernels.ptx.warp import EXIT, LANES, YIELD, Array, PtxError, Warp

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
