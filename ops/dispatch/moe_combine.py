"""Launches ``moe_combine``: the routed rows of a token summed in the order of its experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_compile.ops.kernels import cache

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class CombineConfig:
    """Sums routed rows.

    Attributes:
        out_dtype: of the result.
        weight_dtype: of the routing weights; empty where the rows already carry them.
        pdl: programmatic dependent launch.
    """

    out_dtype: str
    weight_dtype: str
    pdl: bool = True


def combine(y: Tensor, row_of_slot: Tensor, topk_weights: Tensor | None, top_k: int, out: Tensor) -> None:
    """``out[t] = sum_r y[row_of_slot[t k + r]] * w[t, r]`` in fp32 from 0 in the order of r, rows -1 left out.

    Args:
        y: fp32 [S, H], contiguous.
        row_of_slot: int32 [T k].
        topk_weights: [T, k] or None for none.
        top_k: k.
        out: [T, H], contiguous, written.
    """
    weights = topk_weights.reshape(-1).contiguous() if topk_weights is not None else row_of_slot
    config = CombineConfig(DTYPE_NAMES[out.dtype], "" if topk_weights is None else DTYPE_NAMES[weights.dtype])
    cache.kernel("sm90.moe_combine", config)(y, row_of_slot, weights, out, top_k)
