"""``nvfp4_grouped_mm``: groups of packed rows, each times its own packed weight."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch.nvfp4_grouped_mm import run
from dsv4_compile.ops.registration import FLOAT_DTYPES, check_dtype, check_packed, define, require

OP = "nvfp4_grouped_mm"


def allocate(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    b_codes: Tensor,
    b_block_scales: Tensor,
    b_global_scale: Tensor,
    offsets: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Checks the arguments and returns an uninitialised output."""
    check_packed(OP, "a_", a_codes, a_block_scales, a_global_scale)
    check_packed(OP, "b_", b_codes, b_block_scales, b_global_scale)
    lead = tuple(a_codes.shape[:-1])
    require(
        tuple(a_global_scale.shape) in ((), lead),
        lambda: f"{OP}: a_global_scale must be 0-d or one a row {lead}, got shape {tuple(a_global_scale.shape)}",
    )
    require(
        b_codes.dim() == 3 and b_codes.shape[2] == a_codes.shape[-1],
        lambda: (
            f"{OP}: b_codes must be [E, N, {a_codes.shape[-1]}] as a_codes has that many bytes a row, "
            f"got shape {tuple(b_codes.shape)}"
        ),
    )
    if offsets is None:
        require(
            a_codes.dim() == 3 and a_codes.shape[0] == b_codes.shape[0],
            lambda: (
                f"{OP}: a_codes must be [{b_codes.shape[0]}, M, K/2], one matrix a group of b_codes, when there are "
                f"no offsets, got shape {tuple(a_codes.shape)}"
            ),
        )
    else:
        require(a_codes.dim() == 2, lambda: f"{OP}: a_codes must be [S, K/2] with offsets, got {tuple(a_codes.shape)}")
        check_dtype(OP, "offsets", offsets, (torch.int32,))
        require(
            tuple(offsets.shape) == (b_codes.shape[0],),
            lambda: f"{OP}: offsets must have shape ({b_codes.shape[0]},), got {tuple(offsets.shape)}",
        )
    require(out_dtype in FLOAT_DTYPES, lambda: f"{OP}: out_dtype must be a float dtype, got {out_dtype}")
    return a_codes.new_empty((*lead, b_codes.shape[1]), dtype=out_dtype)


def _row_ranges(offsets: Tensor, num_rows: int) -> list[slice]:
    ends = offsets.tolist()
    bounds = [0, *ends]
    require(
        bounds == sorted(bounds) and bounds[-1] <= num_rows,
        lambda: f"{OP}: offsets must be non-decreasing within 0..{num_rows}, got {ends}",
    )
    return [slice(start, end) for start, end in pairwise(bounds)]


def reference(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    b_codes: Tensor,
    b_block_scales: Tensor,
    b_global_scale: Tensor,
    offsets: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """CPU kernel: :func:`nvfp4.matmul` for each group that has rows, then ``out_dtype``."""
    out = allocate(
        a_codes, a_block_scales, a_global_scale, b_codes, b_block_scales, b_global_scale, offsets, out_dtype
    ).zero_()
    num_groups = b_codes.shape[0]
    selections: Sequence[Any] = range(num_groups) if offsets is None else _row_ranges(offsets, a_codes.shape[0])
    for group, rows in enumerate(selections):
        if not out[rows].numel():
            continue
        a = nvfp4.scaled_codes(a_codes[rows], a_block_scales[rows], torch.float64)
        a_scale = a_global_scale[rows] if a_global_scale.dim() else a_global_scale
        b_scale = b_global_scale[group] if b_global_scale.dim() else b_global_scale
        out[rows] = nvfp4.matmul(a, a_scale, b_codes[group], b_block_scales[group], b_scale)
    return out


def on_hopper(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    b_codes: Tensor,
    b_block_scales: Tensor,
    b_global_scale: Tensor,
    offsets: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """CUDA kernels; offsets that decrease or leave 0..S are clamped. See ``dispatch/nvfp4_grouped_mm.py``."""
    operands = a_codes, a_block_scales, a_global_scale, b_codes, b_block_scales, b_global_scale, offsets
    return run(allocate(*operands, out_dtype), *operands)


_op = define(
    f"{OP}(Tensor a_codes, Tensor a_block_scales, Tensor a_global_scale, Tensor b_codes, Tensor b_block_scales,"
    " Tensor b_global_scale, Tensor? offsets, ScalarType out_dtype) -> Tensor",
    fake=allocate,
    cpu=reference,
    cuda=on_hopper,
)


def nvfp4_grouped_mm(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    b_codes: Tensor,
    b_block_scales: Tensor,
    b_global_scale: Tensor,
    offsets: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``y[r] = (sum_blocks s_a s_b sum q_a q_b) * gsa * gsb`` with the weight of the group that row r belongs to.

    Args:
        a_codes, a_block_scales: activation, any strides. With ``offsets`` uint8 [S, K/2] and float8_e4m3fn [S, K/16],
            the rows of a group side by side; without, [E, M, K/2] and [E, M, K/16], a matrix a group.
        a_global_scale: fp32, 0-d or one a row, [S] or [E, M].
        b_codes, b_block_scales: weights, uint8 [E, N, K/2] and float8_e4m3fn [E, N, K/16].
        b_global_scale: fp32, 0-d, [E], or [E, s], one for each of s equal segments of a weight's rows.
        offsets: int32 [E], the end of each group's rows, non-decreasing, at most S; equal neighbours are an empty
            group. None for static groups.
        out_dtype: bf16, fp16 or fp32; the one rounding of the fp32 result.

    Returns:
        [S, N] or [E, M, N] in ``out_dtype``, contiguous. Rows from ``offsets[-1]`` on are 0. A row that holds a NaN
        block scale is NaN.

    Raises:
        RuntimeError: dtypes or shapes that do not belong together, or no kernel for the device; on the CPU also
            offsets that decrease or leave 0..S.
    """
    out: Tensor = _op(
        a_codes, a_block_scales, a_global_scale, b_codes, b_block_scales, b_global_scale, offsets, out_dtype
    )
    return out
