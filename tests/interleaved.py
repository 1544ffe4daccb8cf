"""The order of K of ``dsv4_compile.ops.dispatch.interleave``, by torch."""

from __future__ import annotations

from torch import Tensor


def in_order(x: Tensor, is_packed: bool) -> Tensor:
    """[..., K] in the order of an activation that was packed, or of a bf16 one; K % 128 == 0."""
    lead = range(x.dim() - 1)
    if is_packed:  # chunks, t, w, b, i
        return x.unflatten(-1, (-1, 4, 4, 2, 4)).permute(*lead, -5, -3, -1, -4, -2).flatten(-5)
    return x.unflatten(-1, (-1, 4, 4, 4, 2)).permute(*lead, -5, -3, -2, -4, -1).flatten(-5)
