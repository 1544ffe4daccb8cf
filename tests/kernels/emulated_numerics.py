"""Numbers that the emulated kernels share: block scales, finite maxima, a quotient by a multiplication."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_compile import nvfp4


def e4m3(scale_bytes: Tensor) -> Tensor:
    return scale_bytes if scale_bytes.dtype == torch.float8_e4m3fn else scale_bytes.view(torch.float8_e4m3fn)


def finite_amax(x: Tensor, granularity: str = "tensor") -> Tensor:
    """Largest finite magnitude of all, or of each row."""
    return nvfp4.finite_amax(x.float(), granularity)


def quotient(n: Tensor, multiplier: int, shift: int) -> Tensor:
    """``numerics.quotient``."""
    assert n.numel() == 0 or int(n.max()) < 1 << 30, "more than this emulation divides"
    low = (n * (2 * (multiplier & 0xFFFF))) >> 16
    return ((n * (2 * (multiplier >> 16)) + low) >> 16) >> shift
