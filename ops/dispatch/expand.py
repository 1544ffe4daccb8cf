"""``expand``: packed NVFP4 rows to bf16 ``code * scale``, for products that run on bf16 tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch import division
from dsv4_compile.ops.dispatch.alignment import aligned
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import require_hopper

OP = "expand"
KERNEL = "sm90.expand"

THREADS = 256
UNROLL = 4  # pieces a thread
PIECE_ELEMENTS = 8


@dataclass(frozen=True)
class ExpandConfig:
    """Configuration of the kernel.

    Attributes:
        gather: rows are picked by an index.
        pdl: launched by programmatic dependent launch.
    """

    gather: bool
    pdl: bool = True


def expand(codes: Tensor, block_scales: Tensor, rows: Tensor | None = None, divisor: int = 1) -> Tensor:
    """``code * block_scale`` in bf16, exact: row r is row ``rows[r] // divisor`` of the packed operand.

    Args:
        codes: uint8 [R, K/2].
        block_scales: float8_e4m3fn [R, K/16]. NaN gives NaN.
        rows: int32 [M], or None for all rows in order. The output row of a negative index is left unwritten.
        divisor: >= 1; top-k for an index of slots.

    Returns:
        bf16 [M, K], contiguous.
    """
    require_hopper(OP, codes)
    codes, block_scales = aligned(codes), block_scales.contiguous().view(torch.uint8)
    count = codes.shape[0] if rows is None else rows.shape[0]
    out = codes.new_empty((count, 2 * codes.shape[1]), dtype=torch.bfloat16)
    row_pieces = out.shape[1] // PIECE_ELEMENTS
    pieces = count * row_pieces
    if pieces >= division.LIMIT:
        raise ValueError(f"{OP}: rows times K must be below 2^34, got {count} x {out.shape[1]}")
    if pieces == 0:
        return out
    kernel = cache.kernel(KERNEL, ExpandConfig(gather=rows is not None))
    index = codes.new_empty((0,), dtype=torch.int32) if rows is None else rows.contiguous()
    kernel(codes, block_scales, index, out, pieces, row_pieces, *division.magic(row_pieces), *division.magic(divisor))
    return out
