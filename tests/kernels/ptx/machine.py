"""Parses PTX, and steps the warps of a launch: see :mod:`tests.kernels.ptx`."""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Triple = tuple[int, int, int]
LANES = np.arange(32)
LANES32 = LANES.astype(np.uint32)
SHARED_BASE = 1024  # of a CTA's shared memory; the first KiB is the system's, as on Hopper
RANK_SHIFT = 24  # of a shared::cluster address: CTA rank + 1; 0 is the CTA's own
SHARED_WINDOW = 1 << 61  # generic addresses of shared memory
LOCAL_WINDOW = 1 << 60  # and of local memory


class PtxError(RuntimeError):
    """A kernel does what it must not; names the instruction."""


class Deadlock(PtxError):
    """No warp can go on."""


@dataclass(frozen=True)
class TensorMap:
    """What a copy of tiles needs to know. ``dims`` and ``box`` in elements, the innermost dimension first.

    ``strides_bytes`` are those of all dimensions, or of all but the innermost.
    """

    address: int
    element_bytes: int
    dims: Sequence[int]
    strides_bytes: Sequence[int]
    box: Sequence[int]
    swizzle: int = 0
    interleave: int = 0


# Types

DTYPES: dict[str, Any] = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool),
    "bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "e4m3x2": np.dtype("u2"),
    "e5m2x2": np.dtype("u2"), "e2m1x2": np.dtype("u1"), "u16x2": np.dtype("u4"), "s16x2": np.dtype("u4"),
}  # fmt: skip
UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


def bits_dtype(kind: str) -> Any:
    """How a register of a type is stored."""
    return DTYPES["pred"] if kind == "pred" else UNSIGNED[DTYPES[kind].itemsize]


# Parsing


@dataclass
class Scope:
    parent: Scope | None
    names: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def find(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None

    def label(self, name: str) -> int | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None


@dataclass
class Instruction:
    pc: int
    text: str
    opcode: str
    parts: list[str]  # of the opcode
    operands: list[str]
    predicate: str | None
    negated: bool
    scope: Scope

    def __str__(self) -> str:
        return f"instruction {self.pc}: {self.text}"


@dataclass
class Program:
    instructions: list[Instruction]
    registers: list[Any]  # dtype of each
    parameters: list[tuple[str, int, int]]  # name, size, alignment
    shared: list[tuple[str, int, int]]
    local: list[tuple[str, int, int]]
    constants: list[tuple[str, bytes]]
    dynamic: list[str]
    threads: int | None
    scope: Scope


def split_operands(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _variable(text: str) -> tuple[str, int | None, int, str | None, str]:
    """Name, bytes (None if of any size), alignment and initializer of ``.shared .align 8 .b8 name[16]``."""
    alignment = re.search(r"\.align\s+(\d+)", text)
    bare = re.sub(r"\.align\s+\d+", "", text)
    match = re.search(r"\.([a-z]\w*)\s+([$%\w]+)\s*(\[(\d*)\])?\s*(=.*)?$", bare.strip(), re.S)
    if match is None:
        raise NotImplementedError(f"PTX: {text}")
    kind, name, brackets, count, value = match.groups()
    size = DTYPES[kind].itemsize
    num_bytes = size if not brackets else None if not count else size * int(count)
    return name, num_bytes, int(alignment[1]) if alignment else size, value, kind


def parse(ptx: str) -> Program:
    """The one entry of a PTX module."""
    text = re.sub(r"/\*.*?\*/", " ", ptx, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file|version|target|address_size)\b[^\n]*", "", text, flags=re.M)
    entries = list(re.finditer(r"\.entry\s+([$\w]+)\s*\((.*?)\)([^{;]*)\{", text, re.S))
    if len(entries) != 1:
        raise ValueError(f"PTX: must have one .entry, got {len(entries)}")
    entry = entries[0]
    program = Program([], [], [], [], [], [], [], None, Scope(None))
    for declaration in split_operands(entry[2]):
        name, size, alignment, _, _ = _variable(declaration)
        program.parameters.append((name, size or 0, alignment))
        program.scope.names[name] = ("symbol", name)
    if threads := re.search(r"\.reqntid\s+([\d, ]+)", entry[3]):
        program.threads = int(np.prod([int(n) for n in threads[1].split(",")]))
    for statement in re.sub(r"\.visible\s*$", "", text[: entry.start()]).split(";"):
        if statement.strip():
            _declare(program, program.scope, statement.strip())
    _parse_body(program, text[entry.end() :])
    return program


def _declare(program: Program, scope: Scope, statement: str) -> None:
    if statement.startswith(".reg"):
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement, re.S)
        assert match is not None
        dtype = bits_dtype(match[1])
        for name in match[2].split(","):
            name = name.strip()
            many = re.match(r"(.*)<(\d+)>$", name)
            for each in [name] if many is None else [f"{many[1]}{i}" for i in range(int(many[2]))]:
                scope.names[each] = ("register", len(program.registers))
                program.registers.append(dtype)
        return
    if statement.startswith((".pragma", ".section", ".noreturn")):
        return
    name, size, alignment, value, kind = _variable(statement)
    scope.names[name] = ("symbol", name)
    if ".shared" in statement:
        if size is None:
            program.dynamic.append(name)
        else:
            program.shared.append((name, size, alignment))
    elif ".local" in statement:
        program.local.append((name, size or 0, alignment))
    elif ".global" in statement or ".const" in statement:
        data = np.zeros((size or 0) // DTYPES[kind].itemsize, bits_dtype(kind))
        if value is not None:
            numbers = [number(n, kind) for n in re.sub(r"[={}]", "", value).split(",")]
            data[: len(numbers)] = numbers
        program.constants.append((name, data.tobytes()))
    else:
        raise NotImplementedError(f"PTX: {statement}")


def _parse_body(program: Program, text: str) -> None:
    scope, at = Scope(program.scope), 0
    blank, label = re.compile(r"\s*"), re.compile(r"([$\w.]+)\s*:(?!:)")
    while True:
        space = blank.match(text, at)
        assert space is not None
        at = space.end()
        if at >= len(text):
            raise ValueError("PTX: the entry does not end")
        if text[at] == "{":
            scope, at = Scope(scope), at + 1
        elif text[at] == "}":
            assert scope.parent is not None
            scope, at = scope.parent, at + 1
            if scope is program.scope:
                return
        elif found := label.match(text, at):
            scope.labels[found[1]] = len(program.instructions)
            at = found.end()
        else:
            end = text.index(";", at)
            statement, at = " ".join(text[at:end].split()), end + 1
            if statement.startswith("."):
                _declare(program, scope, statement)
            elif statement:
                program.instructions.append(_instruction(len(program.instructions), statement, scope))


def _instruction(pc: int, text: str, scope: Scope) -> Instruction:
    predicate, negated, rest = None, False, text
    if match := re.match(r"@(!?)\s*([%$\w]+)\s+(.*)$", text):
        negated, predicate, rest = bool(match[1]), match[2], match[3]
    opcode, _, operands = rest.partition(" ")
    if "[" in opcode:
        opcode, bracket, tail = rest.partition("[")
        operands = bracket + tail
    return Instruction(pc, text, opcode, opcode.split("."), split_operands(operands), predicate, negated, scope)


def number(text: str, kind: str) -> int:
    """The bits of a literal, as an unsigned integer of the type's width."""
    text = text.strip()
    dtype = bits_dtype(kind)
    if kind == "pred":
        return int(text, 0) & 1
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        bits = int(text[2:], 16)
        return bits if kind != "f64" else int(np.array(bits, "u4").view("f4").astype("f8").view("u8"))
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        bits = int(text[2:], 16)
        return bits if kind != "f32" else int(np.array(bits, "u8").view("f8").astype("f4").view("u4"))
    if kind in ("f32", "f64", "f16"):
        return int(np.array(float(text), DTYPES[kind]).view(dtype))
    negative = text.startswith("-")
    digits = text.lstrip("-").rstrip("uU")
    value = int(digits, 8) if re.match(r"0[0-7]+$", digits) else int(digits, 0)
    return (-value if negative else value) & ((1 << 8 * dtype.itemsize) - 1)


_NUMBER = re.compile(r"-?(\d|0[xXbBfFdD])[0-9a-fA-FxX.]*([eE][+-]?\d+)?[uU]?$")

# Memory


class Memory:
    """Ranges of this process's memory that a kernel may touch."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.ranges = [(begin, end) for begin, end in ranges if end > begin]
        self.views: dict[tuple[int, int], Array] = {}
        self.last: tuple[int, int] = (0, 0)

    def find(self, low: int, high: int) -> tuple[int, int] | None:
        begin, end = self.last
        if begin <= low and high <= end:
            return self.last
        for part in self.ranges:
            if part[0] <= low and high <= part[1]:
                self.last = part
                return part
        return None

    def view(self, part: tuple[int, int], size: int) -> tuple[int, Array]:
        """Aligned base of a range, and the memory from there on in words of a size."""
        base = part[0] & ~15
        if (base, size) not in self.views:
            num_bytes = (part[1] - base + 15) & ~15
            raw = np.frombuffer((ctypes.c_ubyte * num_bytes).from_address(base), np.uint8)
            self.views[base, size] = raw.view(UNSIGNED[size])
        return base, self.views[base, size]

    def bytes(self, address: int, count: int) -> Array:
        part = self.find(address, address + count)
        if part is None:
            raise PtxError(f"{count} bytes at {address:#x} are outside of the memory of the launch")
        base, raw = self.view(part, 1)
        return raw[address - base : address - base + count]


# The machine


@dataclass
class Mbarrier:
    expected: int
    pending: int
    transactions: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.expected


@dataclass
class Barrier:
    arrived: int = 0
    count: int | None = None
    generation: int = 0


class Blocked:
    """Why a warp's lanes cannot go on: until ``ready()``; ``advance`` if the instruction is then done."""

    __slots__ = ("advance", "ready")

    def __init__(self, ready: Callable[[], bool], advance: bool) -> None:
        self.ready, self.advance = ready, advance


class Fork:
    """Lanes that branch, and lanes that do not."""

    __slots__ = ("rest", "taken", "target")

    def __init__(self, target: int, taken: Array, rest: Array) -> None:
        self.target, self.taken, self.rest = target, taken, rest


EXIT, MISSING, YIELD = object(), object(), object()


class Group:
    """Lanes of a warp at one program counter."""

    __slots__ = ("blocked", "mask", "pc")

    def __init__(self, pc: int, mask: Array) -> None:
        self.pc, self.mask, self.blocked = pc, mask, None


class Warp:
    def __init__(self, machine: Machine, cta: Cta, number: int, registers: list[Array], live: Array) -> None:
        self.machine, self.cta, self.number, self.R, self.live = machine, cta, number, registers, live
        self.groups = [Group(0, live)]
        self.local = np.full((32, machine.local_bytes), 0xFF, np.uint8) if machine.local_bytes else None
        self.cluster_phase = 0
        self.steps = 0
        self.is_stuck = False  # lanes that do not wait need some that do

    def runnable(self) -> bool:
        if self.is_stuck:
            return any(group.blocked is not None and group.blocked.ready() for group in self.groups)
        return any(group.blocked is None or group.blocked.ready() for group in self.groups)

    def where(self) -> str:
        code = self.machine.program.instructions
        return f"CTA {self.cta.index} warp {self.number}: " + "; ".join(
            f"{int(group.mask.sum())} lanes at {code[group.pc]}" for group in self.groups
        )

    def run(self, budget: int) -> int:
        """Executes up to a number of instructions; how many."""
        code, start = self.machine.code, budget
        groups, self.is_stuck = self.groups, False
        while budget > 0 and groups:
            groups.sort(key=lambda group: group.pc)
            missing, chosen = False, None
            for group in groups:
                if group.blocked is not None:
                    if not group.blocked.ready():
                        continue
                    if group.blocked.advance:
                        group.pc += 1
                        group.blocked, chosen = None, group
                        break
                    group.blocked = None
                chosen = group
                break
            if chosen is None:
                return start - budget
            if self._merge(chosen):
                continue
            result = self._step_group(chosen, code, budget)
            budget -= result[0]
            if result[1] is MISSING:
                # Lanes that a .sync needs are elsewhere: let the others run, lowest counter first.
                missing = True
                for group in sorted(groups, key=lambda group: group.pc):
                    if group is chosen:
                        continue
                    if group.blocked is not None:
                        if not group.blocked.ready():
                            continue
                        if group.blocked.advance:
                            group.pc += 1
                        group.blocked = None
                    if self._merge(group):
                        missing = False
                        break
                    steps, why = self._step_group(group, code, 1)
                    if why is MISSING:
                        continue
                    budget -= max(steps, 1)
                    missing = False
                    break
                if missing:
                    if any(group.blocked is not None for group in groups):
                        self.is_stuck = True
                        return start - budget
                    raise Deadlock(f"lanes that a .sync needs never get there; {self.where()}")
            elif result[1] is YIELD:
                return start - budget
        return start - budget

    def _merge(self, group: Group) -> bool:
        for other in self.groups:
            if other is not group and other.pc == group.pc and other.blocked is None:
                other.mask = other.mask | group.mask
                self.groups.remove(group)
                return True
        return False

    def _step_group(self, group: Group, code: list[Callable[..., Any]], budget: int) -> tuple[int, Any]:
        """Executes a group until it branches apart, meets others, or waits."""
        groups = self.groups
        alone = len(groups) == 1
        mask = None if alone else group.mask
        limit = 1 << 60 if alone else min((g.pc for g in groups if g is not group and g.pc > group.pc), default=1 << 60)
        pc, steps = group.pc, 0
        while steps < budget:
            steps += 1
            self.steps += 1
            try:
                result = code[pc](self, mask)
            except PtxError as error:
                group.pc = pc
                if getattr(error, "placed", False):
                    raise
                placed = type(error)(
                    f"{error}; CTA {self.cta.index} warp {self.number}, {self.machine.program.instructions[pc]}"
                )
                placed.placed = True  # type: ignore[attr-defined]
                raise placed from error
            if result is None:
                pc += 1
            elif type(result) is int:
                if result < pc and not alone:
                    group.pc = result
                    return steps, None
                pc = result
            elif type(result) is Fork:
                group.pc, group.mask = pc + 1, result.rest
                groups.append(Group(result.target, result.taken))
                return steps, None
            elif result is EXIT:
                self.live = self.live & ~group.mask
                groups.remove(group)
                if not groups:
                    self.cta.warp_exits()
                return steps, None
            elif type(result) is Blocked:
                group.pc, group.blocked = pc, result
                return steps, YIELD
            elif result is YIELD:
                group.pc = pc + 1
                return steps, YIELD
            else:
                group.pc = pc
                return steps - 1, result
            if pc >= limit:
                group.pc = pc
                return steps, None
        group.pc = pc
        return steps, None


class Cta:
    def __init__(self, machine: Machine, cluster: Cluster, index: Triple, rank: int) -> None:
        self.machine, self.cluster, self.index, self.rank = machine, cluster, index, rank
        size = (machine.shared_end - SHARED_BASE + 15) // 16 * 16
        raw = np.full(size + 16, 0xFF, np.uint8)
        start = -raw.ctypes.data % 16
        self.shared = raw[start : start + size]
        self.views = {n: self.shared.view(UNSIGNED[n]) for n in (1, 2, 4, 8)}
        self.mbarriers: dict[int, Mbarrier] = {}
        self.barriers: dict[int, Barrier] = {}
        self.warps: list[Warp] = []

    def live_threads(self) -> int:
        return 32 * sum(bool(warp.groups) for warp in self.warps)

    def warp_exits(self) -> None:
        for barrier in self.barriers.values():
            self.settle(barrier)
        self.cluster.settle()

    def settle(self, barrier: Barrier) -> None:
        expected = barrier.count if barrier.count is not None else self.live_threads()
        if barrier.arrived > expected:
            raise PtxError(f"{barrier.arrived} threads arrive at a barrier for {expected}")
        if barrier.arrived and barrier.arrived == expected:
            barrier.generation += 1
            barrier.arrived = 0

    def arrive(self, number: int, count: int | None, threads: int) -> tuple[Barrier, int]:
        barrier = self.barriers.setdefault(number, Barrier())
        if barrier.arrived and barrier.count != count:
            raise PtxError(f"barrier {number} has {barrier.count} threads for one warp, {count} for another")
        barrier.count = count
        generation = barrier.generation
        barrier.arrived += threads
        self.settle(barrier)
        return barrier, generation

    def mbarrier(self, address: int) -> Mbarrier:
        if address not in self.mbarriers:
            raise PtxError(f"no mbarrier at shared address {address}")
        return self.mbarriers[address]


class Cluster:
    def __init__(self) -> None:
        self.ctas: list[Cta] = []
        self.arrived = 0
        self.phase = 0
        self.copies: list[Callable[[], None]] = []

    def settle(self) -> None:
        if self.arrived and self.arrived == sum(cta.live_threads() for cta in self.ctas):
            self.arrived, self.phase = 0, self.phase + 1


class Machine:
    def __init__(
        self, program: Program, grid: Triple, block: Triple, cluster: Triple, shared_bytes: int,
        parameters: Sequence[bytes], memory: Sequence[tuple[int, int]],
        tensor_map: Callable[[bytes], TensorMap] | None, seed: int, max_steps: int,
        build: Callable[[Machine, Instruction], Callable[..., Any]],
    ) -> None:  # fmt: skip
        self.program, self.grid, self.block, self.cluster_shape = program, grid, block, cluster
        self.tensor_map, self.random, self.max_steps = tensor_map, random.Random(seed), max_steps
        self.maps: dict[bytes, TensorMap] = {}
        self.symbols: dict[str, tuple[str, int]] = {}
        if len(parameters) != len(program.parameters):
            raise ValueError(f"PTX: {len(program.parameters)} parameters, got {len(parameters)}")
        self.keep: list[Any] = []
        ranges = list(memory)
        for (name, size, _), value in zip(program.parameters, parameters, strict=True):
            if len(value) != size:
                raise ValueError(f"PTX: parameter {name} has {size} bytes, got {len(value)}")
            ranges.append(self._hold(name, "param", value))
        for name, value in program.constants:
            ranges.append(self._hold(name, "global", value))
        at = SHARED_BASE
        for name, size, alignment in program.shared:
            at = -(-at // alignment) * alignment
            self.symbols[name] = ("shared", at)
            at += size
        if program.shared:
            at = -(-at // 1024) * 1024
        for name in program.dynamic:
            self.symbols[name] = ("shared", at)
        self.shared_end = at + shared_bytes
        self.shared_bytes = shared_bytes
        at = 0
        for name, size, alignment in program.local:
            at = -(-at // alignment) * alignment
            self.symbols[name] = ("local", at)
            at += size
        self.local_bytes = -(-at // 16) * 16
        self.memory = Memory(ranges)
        self.registers: list[Array] = [np.zeros(32, dtype) for dtype in program.registers]
        self.constants: dict[tuple[Any, int], int] = {}
        self.specials: dict[tuple[str, Any], int] = {}
        self.code: list[Callable[..., Any]] = []
        self.code = [build(self, instruction) for instruction in program.instructions]

    def _hold(self, name: str, space: str, value: bytes) -> tuple[int, int]:
        raw = np.zeros(len(value) + 64, np.uint8)
        start = -raw.ctypes.data % 64
        raw[start : start + len(value)] = np.frombuffer(value, np.uint8)
        self.keep.append(raw)
        address = raw.ctypes.data + start
        self.symbols[name] = (space, address)
        return address, address + len(value)

    def constant(self, value: int, dtype: Any) -> int:
        """The register that holds a number."""
        key = (dtype, value)
        if key not in self.constants:
            self.constants[key] = len(self.registers)
            self.registers.append(np.full(32, value, dtype))
        return self.constants[key]

    def special(self, name: str, dtype: Any) -> int:
        key = (name, dtype)
        if key not in self.specials:
            self.specials[key] = len(self.registers)
            self.registers.append(np.zeros(32, dtype))
        return self.specials[key]

    def special_values(self, cta: Cta, warp: int) -> dict[str, Any]:
        thread = 32 * warp + LANES
        bx, by, bz = self.block
        values: dict[str, Any] = {
            "%laneid": LANES, "%warpid": warp, "%nwarpid": -(-bx * by * bz // 32), "%smid": 0,
            "%cluster_ctarank": cta.rank, "%cluster_nctarank": int(np.prod(self.cluster_shape)),
            "%is_explicit_cluster": int(np.prod(self.cluster_shape) > 1),
            "%lanemask_lt": (1 << LANES) - 1, "%lanemask_le": (2 << LANES) - 1, "%lanemask_eq": 1 << LANES,
            "%lanemask_gt": 0xFFFFFFFF & ~((2 << LANES) - 1), "%lanemask_ge": 0xFFFFFFFF & ~((1 << LANES) - 1),
            "%dynamic_smem_size": self.shared_bytes, "%total_smem_size": self.shared_end - SHARED_BASE,
        }  # fmt: skip
        for i, axis in enumerate("xyz"):
            shape = self.cluster_shape[i]
            values[f"%tid.{axis}"] = (thread % bx, thread // bx % by, thread // (bx * by))[i]
            values[f"%ntid.{axis}"] = self.block[i]
            values[f"%ctaid.{axis}"] = cta.index[i]
            values[f"%nctaid.{axis}"] = self.grid[i]
            values[f"%cluster_ctaid.{axis}"] = cta.index[i] % shape
            values[f"%cluster_nctaid.{axis}"] = shape
            values[f"%clusterid.{axis}"] = cta.index[i] // shape
            values[f"%nclusterid.{axis}"] = self.grid[i] // shape
        return values

    def launch(self) -> None:
        shapes = [range(0, self.grid[i], self.cluster_shape[i]) for i in range(3)]
        firsts = [(x, y, z) for z in shapes[2] for y in shapes[1] for x in shapes[0]]
        self.random.shuffle(firsts)
        for first in firsts:
            self._run_cluster(first)

    def _run_cluster(self, first: Triple) -> None:
        cluster = Cluster()
        cx, cy, cz = self.cluster_shape
        threads = int(np.prod(self.block))
        for rank in range(cx * cy * cz):
            index = (first[0] + rank % cx, first[1] + rank // cx % cy, first[2] + rank // (cx * cy))
            cta = Cta(self, cluster, index, rank)
            cluster.ctas.append(cta)
            for number in range(-(-threads // 32)):
                registers = list(self.registers)
                values = self.special_values(cta, number)
                for (name, dtype), place in self.specials.items():
                    if name not in values:
                        raise NotImplementedError(f"PTX: {name}")
                    registers[place] = np.broadcast_to(np.asarray(values[name]), 32).astype(dtype)
                live = 32 * number + LANES < threads
                cta.warps.append(Warp(self, cta, number, registers, live))
        warps = [warp for cta in cluster.ctas for warp in cta.warps]
        steps, draw = 0, self.random
        while warps:
            while cluster.copies and draw.random() < 0.3:
                cluster.copies.pop(draw.randrange(len(cluster.copies)))()
            ready = [warp for warp in warps if warp.runnable()]
            if not ready:
                if cluster.copies:
                    cluster.copies.pop(draw.randrange(len(cluster.copies)))()
                    continue
                raise Deadlock("every warp waits:\n" + "\n".join(warp.where() for warp in warps))
            warp = draw.choice(ready)
            steps += max(warp.run(draw.randrange(8, 96)), 1)
            if steps > self.max_steps:
                raise PtxError("more steps than allowed:\n" + "\n".join(warp.where() for warp in warps))
            if not warp.groups:
                warps.remove(warp)
        for copy in cluster.copies:
            copy()
