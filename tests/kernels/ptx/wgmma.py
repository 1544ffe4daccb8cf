"""``wgmma`` and ``stmatrix`` of the PTX interpreter.

Each warp of a warpgroup multiplies its own 16 rows, when it gets to the instruction: what it reads of shared memory is
not read later, as on a GPU, so a ``wait_group`` that is missing does not show.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.kernels.ptx import numerics
from tests.kernels.ptx.builder import Builder, Step, active, builds, first
from tests.kernels.ptx.control import A_INDEX, C_BACK, C_INDEX
from tests.kernels.ptx.copies import swizzled
from tests.kernels.ptx.machine import SHARED_BASE
from tests.kernels.ptx.warp import MISSING, Array, PtxError, Warp

ROW_BYTES = {1: 128, 2: 64, 3: 32}  # of a group of eight rows, by the swizzle code of a descriptor
CHUNK = 16


@builds("wgmma")
def _wgmma(b: Builder) -> Step:
    if b.parts[1] != "mma_async":  # fence, commit_group, wait_group
        check = b.needs(None)
        return lambda w, m: MISSING if check(w, m) is None else None
    shape = re.match(r"m64n(\d+)k16$", b.parts[4])
    kinds = b.parts[5:]
    if (
        b.parts[2:4] != ["sync", "aligned"]
        or shape is None
        or kinds[0] != "f32"
        or kinds[1:] not in (["bf16"] * 2, ["f16"] * 2)
    ):
        raise b.missing()
    columns, kind = int(shape[1]), kinds[1]
    targets, left, descriptor, scale, *signs = b.operands
    if not left.startswith("{") or signs != ["1", "1", "0"]:  # A from shared memory, negated or transposed operands
        raise b.missing()
    writes = [b.write(text, "f32") for text in b.elements(targets)]
    sums = [b.read(text, "f32") for text in b.elements(targets)]
    rows = [b.read(text, "b32") for text in b.elements(left)]
    where, adds = b.read(descriptor, "b64"), b.read(scale, "pred")
    check = b.needs(None)
    if len(writes) != columns // 2 or len(rows) != 4:
        raise b.missing()

    def multiply(w: Warp, m: Any) -> Any:
        here = check(w, m)
        if here is None:
            return MISSING
        R = w.R
        a = numerics.halves_as_f64(np.stack([read(R) for read in rows]).reshape(-1), kind)[A_INDEX]
        right = operand(w, first(where(R), here), columns, kind)
        total = a @ right.T
        is_sum = bool(first(adds(R).astype(np.uint32), here))
        for tile in range(columns // 8):
            result = total[:, 8 * tile : 8 * tile + 8]
            if is_sum:
                before = np.stack([read(R) for read in sums[4 * tile : 4 * tile + 4]])
                result = result + before.reshape(-1)[C_INDEX].astype(np.float64)
            registers = result.astype(np.float32).reshape(-1)[C_BACK].reshape(4, 32)
            for write, values in zip(writes[4 * tile : 4 * tile + 4], registers, strict=True):
                write(w, m, values)
        return None

    return multiply


def operand(w: Warp, descriptor: int, rows: int, kind: str) -> Array:
    """The [rows, 16] operand that a matrix descriptor names, K-major, in fp64."""
    start, group_stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    swizzle = descriptor >> 62 & 3
    if swizzle == 0 or descriptor >> 49 & 7:
        raise NotImplementedError(f"PTX: a matrix descriptor {descriptor:#x}: no swizzle, or a base offset")
    pitch = ROW_BYTES[swizzle]
    row = np.arange(rows)[:, None]
    chunks = start + row // 8 * group_stride + row % 8 * pitch + CHUNK * np.arange(2)
    places = swizzled(chunks, pitch) - SHARED_BASE
    memory = w.cta.views[2]
    if places.min() < 0 or places.max() + CHUNK > memory.nbytes:
        raise PtxError(f"a matrix descriptor {descriptor:#x} that leaves shared memory")
    halves = memory[(places[:, :, None] // 2 + np.arange(8)).reshape(rows, 16)]
    pairs = np.ascontiguousarray(halves).view(np.uint32).reshape(-1)
    return numerics.halves_as_f64(pairs, kind).reshape(rows, 16)


@builds("stmatrix")
def _stmatrix(b: Builder) -> Step:
    count = next((int(part[1:]) for part in b.parts if re.match(r"x\d$", part)), 0)
    if b.parts[1:4] != ["sync", "aligned", "m8n8"] or not count or b.kind != "b16":
        raise b.missing()
    address, reads = b.address(b.operands[0]), [b.read(text, "b32") for text in b.elements(b.operands[1])]
    is_transposed, check = b.has("trans"), b.needs(None)

    def store(w: Warp, m: Any) -> Any:
        if check(w, m) is None:
            return MISSING
        if not active(w, m).all():
            raise PtxError("stmatrix by a part of a warp")
        addresses = address(w.R) - SHARED_BASE
        if (addresses % CHUNK).any() or addresses.min() < 0 or addresses.max() + CHUNK > w.cta.views[1].nbytes:
            raise PtxError("stmatrix outside of shared memory, or rows that are not 16-byte aligned")
        for i, read in enumerate(reads):
            matrix = read(w.R).view(np.uint16).reshape(8, 8)  # lane 4 r + c holds columns 2 c and 2 c + 1 of row r
            rows = matrix.T if is_transposed else matrix
            at = addresses[8 * i : 8 * i + 8, None] // 2 + np.arange(8)
            w.cta.views[2][at] = rows
        return None

    return store
