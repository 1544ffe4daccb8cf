"""Runs the compiled code of kernels on the CPU, launch by launch, beside the functions that stand for them.

:func:`run_code` is what ``emulated_hopper`` can call for each launch. The kernel's own host code makes the launch
(``launches.py``), its PTX runs (``ptx.py``), and what it wrote is compared with what the stand-in writes: bit for bit,
but for products, whose sums a GPU adds in another order. The stand-in's result is kept, so that differences in last bits
do not add up over the launches of an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsv4_compile.ops.dispatch.decode_mm import Config as DecodeConfig
from dsv4_compile.ops.dispatch.grouped_unaligned import Config as UnalignedConfig
from dsv4_compile.ops.dispatch.wgmma_w4 import Config as WgmmaConfig
from tests.gpu import bytes_of
from tests.kernels import ptx
from tests.kernels.emulated_kernels import writes
from tests.kernels.emulation import run_stand_in
from tests.kernels.launches import launches, tensor_map

PRODUCTS = (DecodeConfig, WgmmaConfig, UnalignedConfig)
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-18}  # two roundings, and fp32 sums
CANCELLED = 2.0**-18  # of the row's largest: sums in another order


class Executions:
    """A way to run launches, for ``emulated_hopper``.

    Attributes:
        seed: of the order in which warps run.
        executed: names of the kernels whose code ran.
        without: names of those whose code cannot run here, with the instructions that are missing.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.executed: list[str] = []
        self.without: dict[str, list[str]] = {}

    def __call__(self, name: str, config: Any, arguments: Sequence[Any]) -> None:
        """Runs one launch."""
        written = [tensor for tensor in writes(config, arguments) if tensor.numel()]
        before = [_storage(tensor).clone() for tensor in written]
        if self._runs(name, config, arguments):
            by_code = [tensor.clone() for tensor in written]
            for tensor, content in zip(written, before, strict=True):
                _storage(tensor).copy_(content)
            run_stand_in(name, config, arguments)
            for i, (actual, expected) in enumerate(zip(by_code, written, strict=True)):
                _assert_agrees(actual, expected, isinstance(config, PRODUCTS), f"{name} {config}: written tensor {i}")
        else:
            run_stand_in(name, config, arguments)

    def _runs(self, name: str, config: Any, arguments: Sequence[Any]) -> bool:
        found = launches(name, config, arguments)
        missing = [instruction for launch in found for instruction in ptx.unknown_instructions(launch.ptx)]
        if missing:
            self.without[name] = missing
            return False
        tensors = [part for part in pytree.tree_leaves(list(arguments)) if isinstance(part, Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        memory = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        for launch in found:
            ptx.run(
                launch.ptx, launch.grid, launch.block, launch.cluster, launch.shared_bytes, list(launch.parameters),
                memory=memory, tensor_map=tensor_map, seed=self.seed,
            )  # fmt: skip
            self.executed.append(name)
        return True


def _storage(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _assert_agrees(actual: Tensor, expected: Tensor, is_product: bool, where: str) -> None:
    if not is_product or not expected.dtype.is_floating_point:
        left, right = bytes_of(actual), bytes_of(expected)
        if expected.dtype.is_floating_point and expected.itemsize > 1:
            both_nan = actual.isnan() & expected.isnan()
            actual, expected = actual.masked_fill(both_nan, 0), expected.masked_fill(both_nan, 0)
            left, right = bytes_of(actual), bytes_of(expected)
        assert torch.equal(left, right), f"{where}: {int((left != right).sum())} of {left.numel()} bytes differ"
        return
    a, b = actual.double(), expected.double()
    assert torch.equal(a.isnan(), b.isnan()), f"{where}: NaN in other places"
    a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
    largest = b.abs().amax(-1, keepdim=True) if b.dim() else b.abs()
    wrong = (a - b).abs() > ROUNDING[expected.dtype] * b.abs() + CANCELLED * largest
    assert not wrong.any(), (
        f"{where}: {int(wrong.sum())} of {wrong.numel()} differ, first {wrong.nonzero()[:3].tolist()}"
    )
