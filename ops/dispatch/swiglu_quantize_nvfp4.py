"""``swiglu_quantize_nvfp4`` on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch.quantizer import ONE_LAUNCH_COSTLY, Source, as_rows, match, quantize

OP = "swiglu_quantize_nvfp4"

# Blocks of gate, up and fp32 products that the registers of a thread hold.
MAX_HELD_BLOCKS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 2}


def swiglu_quantize_nvfp4(gate: Tensor, up: Tensor, limit: float, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and global scale of the clamped SwiGLU, whose products are held in fp32."""
    first, second = as_rows(gate), as_rows(up)
    if not match(first, second):
        first, second = as_rows(gate.contiguous()), as_rows(up.contiguous())
    source = Source(OP, first, second, MAX_HELD_BLOCKS[gate.dtype], ONE_LAUNCH_COSTLY, scalar=limit)
    return quantize(source, gate, granularity)
