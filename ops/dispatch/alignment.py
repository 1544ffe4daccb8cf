"""Operands at the addresses that kernels read."""

from __future__ import annotations

from torch import Tensor


def aligned(x: Tensor, num_bytes: int = 16) -> Tensor:
    """``x`` contiguous, at an address that is a multiple of ``num_bytes``; copied only where it is not."""
    x = x.contiguous()
    return x if x.is_meta or x.data_ptr() % num_bytes == 0 else x.clone()
