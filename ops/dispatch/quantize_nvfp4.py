"""``quantize_nvfp4`` on a GPU."""

from __future__ import annotations

from torch import Tensor

from dsv4_compile.ops.dispatch.quantizer import MAX_HELD_BLOCKS, ONE_LAUNCH, Source, as_rows, quantize

OP = "quantize_nvfp4"


def quantize_nvfp4(x: Tensor, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and global scale of x: one launch for few rows or one scale a row, else two."""
    rows = as_rows(x)
    return quantize(Source(OP, rows, rows, MAX_HELD_BLOCKS[x.dtype], ONE_LAUNCH), x, granularity)
