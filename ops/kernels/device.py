"""What a launch has to know of the device that its tensors are on."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

HOPPER_SM_COUNT = 132  # H100 SXM and H200: what kernels are chosen for where no GPU is


@functools.cache
def _sm_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def sm_count(tensor: Tensor) -> int:
    """Number of multiprocessors of a CUDA tensor's device; 132 for a meta tensor."""
    if tensor.is_meta:
        return HOPPER_SM_COUNT
    return _sm_count(tensor.get_device())


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def require_hopper(op: str, tensor: Tensor) -> None:
    """Raises unless a CUDA tensor is on a device that runs sm_90a code; a meta tensor passes.

    Raises:
        RuntimeError: another architecture, for which this version has no kernel.
    """
    if tensor.is_meta:
        return
    major, minor = _capability(tensor.get_device())
    if major != 9:
        raise RuntimeError(
            f"{op}: no kernel for {torch.cuda.get_device_name(tensor.device)} (sm_{major}{minor}) is built into this "
            "version, which has those for sm_90 (H100, H200); the CPU reference runs when all inputs are on the CPU"
        )
