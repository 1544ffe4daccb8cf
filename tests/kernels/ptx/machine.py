"""Runs a launch: memory, barriers, CTAs, and the warps of a cluster in an order drawn from a seed."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.kernels.ptx.parser import UNSIGNED, Instruction, Program
from tests.kernels.ptx.warp import LANES, Array, Deadlock, PtxError, Warp

Triple = tuple[int, int, int]
SHARED_BASE = 1024  # of a CTA's shared memory; the first KiB is the system's, as on Hopper
RANK_SHIFT = 24  # of a shared::cluster address: CTA rank + 1; 0 is the CTA's own
SHARED_WINDOW = 1 << 61  # generic addresses of shared memory
LOCAL_WINDOW = 1 << 60  # and of local memory


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
