"""``dequantize_nvfp4`` on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch import division
from dsv4_compile.ops.dispatch.alignment import aligned
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import require_hopper

OP = "dequantize_nvfp4"
KERNEL = "sm90.dequantize_nvfp4"

THREADS = 256
UNROLL = 4  # pieces a thread
PIECE_ELEMENTS = 8


@dataclass(frozen=True)
class DequantizeConfig:
    """Configuration of the kernel: dtype of the result, programmatic dependent launch."""

    dtype: str
    pdl: bool = True


def dequantize_nvfp4(codes: Tensor, block_scales: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``code * block_scale * global_scale`` in ``dtype``; arguments as of the operator."""
    require_hopper(OP, codes)
    k = 2 * codes.shape[-1]
    out = codes.new_empty((*codes.shape[:-1], k), dtype=dtype)
    if out.numel() == 0:
        return out
    rows, row_pieces = out.numel() // k, k // PIECE_ELEMENTS
    pieces = rows * row_pieces
    if pieces >= division.LIMIT:
        raise RuntimeError(f"{OP}: codes must hold fewer than 2^34 elements, got shape {tuple(codes.shape)}")
    # A global scale serves the same number of consecutive rows wherever it stands: of all, of a matrix, of a segment.
    scale_rows = rows // global_scale.numel()
    cache.kernel(KERNEL, DequantizeConfig(str(dtype).removeprefix("torch.")))(
        aligned(codes, 8).view(-1),
        block_scales.contiguous().view(torch.uint8).view(-1),
        global_scale.contiguous().view(-1),
        out.view(-1),
        pieces,
        *division.magic(row_pieces),
        *division.magic(scale_rows),
    )
    return out
