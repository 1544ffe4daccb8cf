"""Bulk copies from global to shared memory, of tiles by a tensor map and of contiguous bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.barriers import at_shared
from tests.kernels.ptx.builder import Builder, Step, active, builds
from tests.kernels.ptx.machine import SHARED_BASE, Cta, Machine, TensorMap
from tests.kernels.ptx.parser import split_operands
from tests.kernels.ptx.warp import Array, PtxError, Warp

# Bulk copies


OTHERS = "im2col", "gather4", "im2col_no_offs", "multicast::cluster"  # copies that no kernel of ours makes


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
    if b.parts[1:3] == ["async", "bulk"] and b.parts[4:] == ["global", "mbarrier::complete_tx::bytes"] and to_shared:
        return _copy_bytes(b)
    if b.parts[1:4] != ["async", "bulk", "tensor"] or not to_shared or b.has(*OTHERS):
        raise b.missing()
    target = b.address(b.operands[0])
    map_text, coordinate_text = split_operands(b.operands[1][1:-1])
    map_address = b.address(f"[{map_text}]")
    coordinates = [b.read(text, "s32") for text in b.elements(coordinate_text)]
    barrier = b.address(b.operands[2])
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
            _copy_tile(w, tensor, at, owner, signalled, place_, signal)

    return copy


def _copy_tile(w: Warp, tensor: TensorMap, at: list[int], owner: Cta, signalled: Cta, place_: int, signal: int) -> None:
    machine = w.machine
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
    _begin(w, owner, signalled, place_, signal, index, lambda: tile(machine, tensor, at))


def _copy_bytes(b: Builder) -> Step:
    target, source, barrier = (b.address(b.operands[i]) for i in (0, 1, 3))
    size_of = b.read(b.operands[2], "u32")

    def copy(w: Warp, m: Any) -> None:
        machine = w.machine
        for lane in np.flatnonzero(active(w, m)).tolist():
            size, start = int(size_of(w.R)[lane]), int(source(w.R)[lane])
            owner, place_ = at_shared(w, int(target(w.R)[lane]), "shared")
            signalled, signal = at_shared(w, int(barrier(w.R)[lane]), "shared")
            if size % 16 or start % 16 or place_ % 16 or not size:
                raise PtxError(f"a copy of {size} bytes from {start:#x} to shared address {place_}: not in units of 16")
            if place_ + size > machine.shared_end:
                raise PtxError(f"a copy of {size} bytes to shared address {place_} of {machine.shared_end}")
            index = np.arange(place_ - SHARED_BASE, place_ - SHARED_BASE + size)
            machine.memory.bytes(start, size)  # may be read

            def content(start: int = start, size: int = size) -> Array:
                return machine.memory.bytes(start, size).copy()

            _begin(w, owner, signalled, place_, signal, index, content)

    return copy


def _begin(
    w: Warp, owner: Cta, signalled: Cta, place_: int, signal: int, index: Array, content: Callable[[], Array]
) -> None:
    """Begins a copy that completes at any time: until then the bytes are 0xFF."""
    size = len(index)
    signalled.mbarrier(signal)
    if any(place_ - 8 < barrier < place_ + size for barrier in owner.mbarriers):
        raise PtxError(f"a copy of {size} bytes to shared address {place_} overwrites an mbarrier")
    owner.shared[index] = 0xFF

    def complete() -> None:
        owner.shared[index] = content()
        state = signalled.mbarrier(signal)
        state.transactions -= size
        state.settle()

    if w.machine.random.random() < 0.3:
        complete()
    else:
        w.cta.cluster.copies.append(complete)
