"""``swizzle_block_scales`` and its inverse: row-major block scales to the tiled layout of cuBLAS and tcgen05."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.registration import check_dtype, define, require

OP = "swizzle_block_scales"
INVERSE_OP = "unswizzle_block_scales"
SCALE_DTYPES = (torch.float8_e4m3fn, torch.uint8)


def _padded_shape(rows: int, cols: int) -> tuple[int, int]:
    row_tile, col_tile = nvfp4.SCALE_TILE_ROWS, nvfp4.SCALE_TILE_COLS
    return (rows + row_tile - 1) // row_tile * row_tile, (cols + col_tile - 1) // col_tile * col_tile


def allocate(block_scales: Tensor) -> Tensor:
    """Checks the argument and returns an uninitialised output."""
    check_dtype(OP, "block_scales", block_scales, SCALE_DTYPES)
    require(block_scales.dim() == 2, lambda: f"{OP}: block_scales must be 2-D, got shape {tuple(block_scales.shape)}")
    return block_scales.new_empty(_padded_shape(*block_scales.shape))


def reference(block_scales: Tensor) -> Tensor:
    """Kernel of every device, see :func:`nvfp4.swizzle`: it moves bytes and waits for nothing."""
    allocate(block_scales)
    return nvfp4.swizzle(block_scales)


def allocate_inverse(swizzled: Tensor, rows: int, cols: int) -> Tensor:
    """Checks the arguments and returns an uninitialised output."""
    check_dtype(INVERSE_OP, "swizzled", swizzled, SCALE_DTYPES)
    require(
        swizzled.dim() == 2 and tuple(swizzled.shape) == _padded_shape(rows, cols),
        lambda: (
            f"{INVERSE_OP}: swizzled must have shape {_padded_shape(rows, cols)} for rows={rows}, cols={cols}, "
            f"got {tuple(swizzled.shape)}"
        ),
    )
    return swizzled.new_empty((rows, cols))


def reference_inverse(swizzled: Tensor, rows: int, cols: int) -> Tensor:
    """Kernel of every device, see :func:`nvfp4.unswizzle`."""
    allocate_inverse(swizzled, rows, cols)
    return nvfp4.unswizzle(swizzled, rows, cols)


_op = define(f"{OP}(Tensor block_scales) -> Tensor", fake=allocate, cpu=reference, cuda=reference)
_inverse_op = define(
    f"{INVERSE_OP}(Tensor swizzled, SymInt rows, SymInt cols) -> Tensor",
    fake=allocate_inverse,
    cpu=reference_inverse,
    cuda=reference_inverse,
)


def swizzle_block_scales(block_scales: Tensor) -> Tensor:
    """Block scales [R, K/16] to the 128x4-tile 32x4x4 layout, zero padded.

    Args:
        block_scales: float8_e4m3fn (or its bytes as uint8) [R, C], any strides.

    Returns:
        [ceil(R/128)*128, ceil(C/4)*4], same dtype, contiguous; the offsets are in :func:`nvfp4.swizzle`.

    Raises:
        RuntimeError: not 2-D, another dtype, or no kernel for the device.
    """
    out: Tensor = _op(block_scales)
    return out


def unswizzle_block_scales(swizzled: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of :func:`swizzle_block_scales`: back to row-major [rows, cols], padding dropped.

    Raises:
        RuntimeError: ``swizzled`` does not have the padded shape of ``rows`` and ``cols``.
    """
    out: Tensor = _inverse_op(swizzled, rows, cols)
    return out
