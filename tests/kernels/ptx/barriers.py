"""Barriers of a CTA and of a cluster, and mbarriers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.kernels.ptx.access import _space, remote
from tests.kernels.ptx.builder import Builder, Step, active, builds, first
from tests.kernels.ptx.machine import RANK_SHIFT, SHARED_BASE, SHARED_WINDOW, Cta, Mbarrier
from tests.kernels.ptx.warp import MISSING, YIELD, Blocked, PtxError, Warp

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
