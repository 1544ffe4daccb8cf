"""Kernels of a test's own: a body of PTX, or one instruction, put into an entry and run by the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.kernels.ptx import run

Array = np.ndarray[Any, Any]
ONE = (1, 1, 1)
HEAD = """
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry kernel({parameters})
{{
  .reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %rd<40>; .reg .f32 %f<20>; .reg .f64 %fd<20>;
  {body}
  ret;
}}
"""


def execute(
    body: str, arrays: Sequence[Array], *, block: int = 32, grid: int = 1, cluster: int = 1, shared: int = 0,
    extra: Sequence[bytes] = (), **options: Any,
) -> None:  # fmt: skip
    """Runs a body whose parameters p0, p1 .. are the addresses of arrays; ``extra`` ones follow, of 64-byte alignment."""
    parameters = [f".param .b64 p{i}" for i in range(len(arrays))]
    parameters += [f".param .align 64 .b8 p{len(arrays) + i}[{len(value)}]" for i, value in enumerate(extra)]
    memory = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays]
    values = [array.ctypes.data.to_bytes(8, "little") for array in arrays]
    text = HEAD.format(parameters=", ".join(parameters), body=body)
    run(text, (grid, 1, 1), (block, 1, 1), (cluster, 1, 1), shared, [*values, *extra], memory=memory, **options)


WIDTHS = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}
REGISTERS = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}


def lanes(instruction: str, result: Any, *sources: Array) -> Array:
    """One instruction, 32 lanes at a time: ``$0`` is its result, ``$1`` .. its operands."""
    count = len(sources[0])
    size = -(-count // 32) * 32
    padded = [np.resize(source, size) for source in sources]
    out = np.zeros(size, result)
    body = "mov.u32 %r30, %tid.x; mov.u32 %r31, %ctaid.x; mad.lo.s32 %r30, %r31, 32, %r30;"
    names = []
    for i, source in enumerate([*padded, out]):
        name = f"{REGISTERS[source.itemsize]}{i + 1}"
        names.append(name)
        body += f"ld.param.b64 %rd30, [p{i}]; mul.wide.u32 %rd31, %r30, {source.itemsize}; add.s64 %rd30, %rd30, %rd31;"
        if i < len(padded):
            body += f"ld.global.{WIDTHS[source.itemsize]} {name}, [%rd30];"
    text = instruction.replace("$0", names[-1])
    for i, name in enumerate(names[:-1]):
        text = text.replace(f"${i + 1}", name)
    execute(f"{body} {text}; st.global.{WIDTHS[out.itemsize]} [%rd30], {names[-1]};", [*padded, out], grid=size // 32)
    return out[:count]


def numbers(dtype: Any, count: int = 256, seed: int = 0) -> Array:
    """Random bits, and those at the ends."""
    dtype = np.dtype(dtype)
    bits = 8 * dtype.itemsize
    random = np.random.default_rng(seed)
    values = random.integers(0, 1 << bits, count, dtype=f"u{dtype.itemsize}")
    values[:6] = [0, 1, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, 2]
    random.shuffle(values)
    return values.view(dtype)
