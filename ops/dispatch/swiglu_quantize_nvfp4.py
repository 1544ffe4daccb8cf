"""``swiglu_quantize_nvfp4`` on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch.quantizer import MAX_HELD_BLOCKS, Source, quantize, view_rows

OP = "swiglu_quantize_nvfp4"


def swiglu_quantize_nvfp4(gate: Tensor, up: Tensor, limit: float, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and global scale of the clamped SwiGLU, whose products are held in fp32."""
    source = Source(OP, view_rows(gate), view_rows(up), MAX_HELD_BLOCKS[torch.float32], scalar=limit)
    return quantize(source, gate, granularity)
