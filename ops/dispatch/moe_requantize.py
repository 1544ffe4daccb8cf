"""Launches ``moe_requantize``: the input of the second product, quantised to NVFP4 and expanded to exact 16 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch.moe_combine import DTYPE_NAMES
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import sm_count

THREADS = 256
VALUES = 8  # a thread at a time
CTAS_PER_SM = 4  # all at once: registers allow four, or six that quantise rows
ROW_CTAS_PER_SM = 6


@dataclass(frozen=True)
class RequantizeConfig:
    """Quantises and expands.

    Attributes:
        dtype: of the input.
        granularity: ``tensor``, ``tensor_pow2`` or ``token``.
        is_interleaved: fp16 in the order of :mod:`interleave`, for the wgmma kernel; else bf16 in order.
        pdl: programmatic dependent launch.
    """

    dtype: str
    granularity: str
    is_interleaved: bool = False
    pdl: bool = True


def requantize(
    h: Tensor,
    partial_amax: Tensor,
    schedule: Tensor,
    granularity: str,
    scaled: Tensor | None = None,
    is_interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``code * block scale`` of the routed rows as :func:`nvfp4.quantize` gives them, exact, and their scale.

    Args:
        h: bf16, fp16 or fp32 [S, K], contiguous, K % 16 == 0.
        partial_amax: fp32 [P], their maximum is that of the finite |h| of all routed rows; not read for ``token``.
        schedule: of :func:`moe_align.align`, says how many of the S rows are routed. The others are not touched.
        granularity: ``tensor``, ``tensor_pow2`` or ``token``.
        scaled: where to put the result, 16 bits an element; may be ``h``.
        is_interleaved: fp16, each row in the order of :func:`interleave.interleave`; K % 128 == 0.

    Returns:
        bf16 or fp16 [S, K] and fp32 [1] or, for ``token``, [S].
    """
    rows, k = h.shape
    out_dtype = torch.float16 if is_interleaved else torch.bfloat16
    scaled = h.new_empty(h.shape, dtype=out_dtype) if scaled is None else scaled
    scaled = scaled if scaled.dtype == out_dtype else scaled.view(out_dtype)
    global_scale = h.new_empty(rows if granularity == "token" else 1, dtype=torch.float32)
    if granularity == "token":
        ctas = min(sm_count(h) * ROW_CTAS_PER_SM, rows)
    else:
        ctas = min(sm_count(h) * CTAS_PER_SM, -(-rows * k // (THREADS * VALUES)))
    kernel = cache.kernel("sm90.moe_requantize", RequantizeConfig(DTYPE_NAMES[h.dtype], granularity, is_interleaved))
    kernel(h, partial_amax, schedule, scaled, global_scale, max(1, ctas))
    return scaled, global_scale
