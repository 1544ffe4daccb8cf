"""Launches ``expand_groups``: packed matrices of static groups to rows of 16 bits side by side, and their schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch import division
from dsv4_compile.ops.dispatch.moe_align import SCHEDULE_COLUMNS
from dsv4_compile.ops.kernels import cache

THREADS = 256
UNROLL = 4  # pieces a thread
PIECE_ELEMENTS = 8


@dataclass(frozen=True)
class Config:
    """One compiled variant of ``sm90.expand_groups``.

    Attributes:
        is_interleaved: fp16 in the order of :mod:`interleave`, for the wgmma kernel; else bf16 in order.
        pdl: programmatic dependent launch.
    """

    is_interleaved: bool = False
    pdl: bool = True


def expand_groups(
    codes: Tensor, block_scales: Tensor, tile_rows: int, is_interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """``code * block scale`` of every group, exact, and the tiles of groups of equal size.

    Args:
        codes: uint8 [G, M, K/2], any strides: the groups may lie inside the rows.
        block_scales: float8_e4m3fn [G, M, K/16], any strides.
        tile_rows: the most rows of a tile.
        is_interleaved: fp16, each row in the order of :func:`interleave.interleave`; K % 128 == 0.

    Returns:
        bf16 or fp16 [G M, K], contiguous, and a schedule as of :func:`moe_align.align`.
    """
    groups, rows, row_bytes = codes.shape
    out = codes.new_empty((groups * rows, 2 * row_bytes), dtype=torch.float16 if is_interleaved else torch.bfloat16)
    tiles_of_group = -(-rows // tile_rows)
    schedule = codes.new_empty((groups * tiles_of_group + 1, SCHEDULE_COLUMNS), dtype=torch.int32)
    row_pieces = out.shape[1] // PIECE_ELEMENTS
    pieces = out.numel() // PIECE_ELEMENTS
    torch._check(
        pieces < division.LIMIT,
        lambda: f"nvfp4_grouped_mm: a_codes must have fewer than 2^34 elements, got shape {tuple(codes.shape)}",
    )
    if not _is_readable(codes):
        codes = codes.clone(memory_format=torch.contiguous_format)
    if block_scales.stride(2) != 1:
        block_scales = block_scales.contiguous()
    cache.kernel("sm90.expand_groups", Config(is_interleaved))(
        codes, block_scales, out, schedule, pieces, row_pieces, *division.magic(row_pieces), *division.magic(rows),
        tiles_of_group, tile_rows,
    )  # fmt: skip
    return out, schedule


def _is_readable(codes: Tensor) -> bool:
    """Whether every row can be read four bytes at a time."""
    strides_fit = codes.stride(2) == 1 and codes.stride(0) % 4 == 0 and codes.stride(1) % 4 == 0
    return strides_fit and (codes.is_meta or codes.data_ptr() % 4 == 0)
