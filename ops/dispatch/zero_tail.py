"""Launches ``zero_tail``: zeros for the rows that belong to no group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import sm_count

CTAS_PER_SM = 2


@dataclass(frozen=True)
class Config:
    """One compiled variant of ``sm90.zero_tail``.

    Attributes:
        element_bytes: 2 or 4.
        pdl: programmatic dependent launch.
    """

    element_bytes: int
    pdl: bool = True


def zero_tail(out: Tensor, schedule: Tensor) -> None:
    """Zeros the rows of ``out`` [R, N], contiguous, from the number of rows in row 0 of a schedule on."""
    cache.kernel("sm90.zero_tail", Config(out.element_size()))(
        out.view(-1).view(torch.int16 if out.element_size() == 2 else torch.int32),
        schedule,
        out.shape[1],
        sm_count(out) * CTAS_PER_SM,
    )
