"""Runs the PTX of a kernel on the CPU, to check its logic and its numerics where there is no GPU.

A warp is 32 lanes of NumPy vectors with a program counter each; of the lanes, those with the lowest counter execute, so
that structured code reconverges. Warps of a cluster interleave in an order drawn from a seed; clusters run one after the
other. Global memory is that of this process; shared memory starts as 0xFF, and the target of a bulk copy is 0xFF until
the copy completes, which is at a step drawn from the seed.

What differs from a GPU: memory is sequentially consistent, so a fence that is missing does not show; ``.approx``
functions are correctly rounded; an ``mma`` or ``wgmma`` sums in fp64, rounds once, and is over at once. Everything else is
meant to be exact, NaNs included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.kernels.ptx import access, arithmetic, barriers, bits, control, copies, wgmma  # noqa: F401 - instructions
from tests.kernels.ptx.builder import build
from tests.kernels.ptx.machine import Machine, TensorMap, Triple
from tests.kernels.ptx.parser import Instruction, parse
from tests.kernels.ptx.warp import Deadlock, PtxError

__all__ = ["Deadlock", "PtxError", "TensorMap", "run", "unknown_instructions"]


def run(
    ptx: str, grid: Triple, block: Triple, cluster: Triple, shared_bytes: int, parameters: Sequence[bytes], *,
    memory: Sequence[tuple[int, int]] = (), tensor_map: Callable[[bytes], TensorMap] | None = None, seed: int = 0,
    max_steps: int = 20_000_000,
) -> None:  # fmt: skip
    """Runs the one entry of a PTX module.

    Args:
        ptx: the text.
        grid: CTAs, a multiple of ``cluster``.
        block: threads of a CTA.
        cluster: CTAs of a cluster, (1, 1, 1) for none.
        shared_bytes: dynamic shared memory.
        parameters: the bytes of each parameter.
        memory: (begin, end) addresses of this process that the kernel may read and write.
        tensor_map: decodes the 128 bytes of a tensor map.
        seed: of the order in which warps run and copies complete.
        max_steps: instructions of warps of a cluster.

    Raises:
        PtxError: an access outside of ``memory``, a misaligned one, a wrong use of a barrier, too many steps.
        Deadlock: no warp can go on.
        NotImplementedError: an instruction that is missing here.
    """
    program = parse(ptx)
    if program.threads is not None and program.threads != int(np.prod(block)):
        raise ValueError(f"PTX: the kernel requires {program.threads} threads, got {block}")
    with np.errstate(all="ignore"):
        Machine(
            program, grid, block, cluster, shared_bytes, parameters, memory, tensor_map, seed, max_steps, build
        ).launch()


def unknown_instructions(ptx: str) -> list[str]:
    """The instructions of a module that are missing here."""
    program = parse(ptx)
    unknown: list[str] = []

    def attempt(machine: Machine, instruction: Instruction) -> Callable[..., None]:
        try:
            return build(machine, instruction)
        except NotImplementedError as error:
            unknown.append(str(error))
            return lambda w, m: None

    one = (1, 1, 1)
    Machine(program, one, one, one, 0, [bytes(size) for _, size, _ in program.parameters], (), None, 0, 0, attempt)
    return unknown
