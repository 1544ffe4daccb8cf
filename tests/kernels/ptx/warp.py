"""Steps a warp: its lanes in groups that branch apart and meet again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.kernels.ptx.machine import Cta, Machine

Array = np.ndarray[Any, Any]
LANES = np.arange(32)


class PtxError(RuntimeError):
    """A kernel does what it must not; names the instruction."""


class Deadlock(PtxError):
    """No warp can go on."""


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
