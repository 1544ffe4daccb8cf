"""``interleave``: activations in the order of K in which ``wgmma_w4`` decodes its weights.

A lane of a tensor-core instruction holds two neighbours of every eight values of K. For a lane's values to be whole
words of codes, those of a weight stay where they are and the activation moves: of each 128 values of K, word w of lane
t (t, w below 4) begins at ``32 t + 8 w``, and its pair i (below 4) goes to ``32 w + 8 i + 2 t``. Lane t of a quad then
has the 32 codes from ``32 t`` on, in pairs as a word of eight decodes: to f16 (0, 4), (1, 5), (2, 6), (3, 7), to bf16
(0, 1), (2, 3), (4, 5), (6, 7).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch import division
from dsv4_compile.ops.dispatch.alignment import aligned
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import require_hopper

OP = "interleave"
CHUNK = 128  # K must be a multiple
PIECE_ELEMENTS = 8
THREADS = 256
UNROLL = 4  # pieces a thread


@dataclass(frozen=True)
class InterleaveConfig:
    """Configuration of the kernel.

    Attributes:
        is_packed: NVFP4 to f16, else bf16 to bf16.
        has_gather: rows are picked by an index.
        pdl: launched by programmatic dependent launch.
    """

    is_packed: bool
    has_gather: bool = False
    pdl: bool = True


def interleave(x: Tensor, block_scales: Tensor | None, rows: Tensor | None = None, divisor: int = 1) -> Tensor:
    """A packed activation as ``code * block_scale`` in fp16, exact, or a bf16 one, in the order of ``wgmma_w4``.

    Args:
        x: uint8 [R, K/2] with ``block_scales``, else bf16 [R, K]; K % 128 == 0.
        block_scales: float8_e4m3fn [R, K/16]. NaN gives NaN.
        rows: int32 [M]: row r of the result is row ``rows[r] // divisor`` of ``x``; where that is negative, the row is
            left unwritten. None for all rows in order.
        divisor: >= 1; top-k for an index of slots.

    Returns:
        [M, K], contiguous: fp16 of a packed operand, else bf16.
    """
    require_hopper(OP, x)
    x = aligned(x)
    is_packed = block_scales is not None
    scales = x if block_scales is None else block_scales.contiguous().view(torch.uint8)
    count = x.shape[0] if rows is None else rows.shape[0]
    k = x.shape[1] * (2 if is_packed else 1)
    out = x.new_empty((count, k), dtype=torch.float16 if is_packed else torch.bfloat16)
    row_pieces = k // PIECE_ELEMENTS
    pieces = count * row_pieces
    if pieces >= division.LIMIT:
        raise ValueError(f"{OP}: rows times K must be below 2^34, got {count} x {k}")
    if pieces == 0:
        return out
    kernel = cache.kernel("sm90.interleave", InterleaveConfig(is_packed, rows is not None))
    index = x.new_empty((0,), dtype=torch.int32) if rows is None else rows.contiguous()
    kernel(x, scales, index, out, pieces, row_pieces, *division.magic(row_pieces), *division.magic(divisor))
    return out
