"""``nvfp4_mm``: a packed activation times one or several packed weights that read it."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch.nvfp4_mm import run_packed
from dsv4_compile.ops.registration import FLOAT_DTYPES, check_dtype, check_packed, define, require

OP = "nvfp4_mm"


def allocate(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    b_codes: list[Tensor],
    b_block_scales: list[Tensor],
    b_global_scales: list[Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Checks the arguments and returns an uninitialised output."""
    check_packed(OP, "a_", a_codes, a_block_scales, a_global_scale)
    lead = tuple(a_codes.shape[:-1])
    require(
        tuple(a_global_scale.shape) in ((), lead),
        lambda: f"{OP}: a_global_scale must be 0-d or one a row {lead}, got shape {tuple(a_global_scale.shape)}",
    )
    require(
        len(b_codes) > 0 and len(b_codes) == len(b_block_scales) == len(b_global_scales),
        lambda: (
            f"{OP}: b_codes, b_block_scales and b_global_scales must be lists of one length > 0, "
            f"got {len(b_codes)}, {len(b_block_scales)}, {len(b_global_scales)}"
        ),
    )
    n = 0
    for codes, block_scales, global_scale in zip(b_codes, b_block_scales, b_global_scales, strict=True):
        check_packed(OP, "b_", codes, block_scales, global_scale)
        require(
            codes.dim() == 2 and codes.shape[1] == a_codes.shape[-1],
            lambda codes=codes: (  # type: ignore[misc]
                f"{OP}: b_codes must be [N, {a_codes.shape[-1]}] as a_codes has that many bytes a "
                f"row, got shape {tuple(codes.shape)}"
            ),
        )
        n += codes.shape[0]
    if bias is not None:
        check_dtype(OP, "bias", bias, FLOAT_DTYPES)
        require(tuple(bias.shape) == (n,), lambda: f"{OP}: bias must have shape ({n},), got {tuple(bias.shape)}")
    require(out_dtype in FLOAT_DTYPES, lambda: f"{OP}: out_dtype must be a float dtype, got {out_dtype}")
    return a_codes.new_empty((*lead, n), dtype=out_dtype)


def reference(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    b_codes: list[Tensor],
    b_block_scales: list[Tensor],
    b_global_scales: list[Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """CPU kernel: :func:`nvfp4.matmul`, the bias added in fp32, then ``out_dtype``."""
    out = allocate(a_codes, a_block_scales, a_global_scale, b_codes, b_block_scales, b_global_scales, bias, out_dtype)
    rows = out.view(out.shape[:-1].numel(), out.shape[-1])
    a = nvfp4.scaled_codes(a_codes, a_block_scales, torch.float64).reshape(rows.shape[0], 2 * a_codes.shape[-1])
    a_scale = a_global_scale.flatten() if a_global_scale.dim() else a_global_scale
    column = 0
    for codes, block_scales, global_scale in zip(b_codes, b_block_scales, b_global_scales, strict=True):
        columns = slice(column, column + codes.shape[0])
        y = nvfp4.matmul(a, a_scale, codes, block_scales, global_scale)
        rows[:, columns] = y if bias is None else y + bias[columns].to(torch.float32)
        column = columns.stop
    return out


def on_hopper(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    b_codes: list[Tensor],
    b_block_scales: list[Tensor],
    b_global_scales: list[Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """CUDA kernels; see ``dispatch/nvfp4_mm.py``."""
    out = allocate(a_codes, a_block_scales, a_global_scale, b_codes, b_block_scales, b_global_scales, bias, out_dtype)
    return run_packed(out, a_codes, a_block_scales, a_global_scale, b_codes, b_block_scales, b_global_scales, bias)


_op = define(
    f"{OP}(Tensor a_codes, Tensor a_block_scales, Tensor a_global_scale, Tensor[] b_codes, Tensor[] b_block_scales,"
    " Tensor[] b_global_scales, Tensor? bias, ScalarType out_dtype) -> Tensor",
    fake=allocate,
    cpu=reference,
    cuda=on_hopper,
)


def nvfp4_mm(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    b_codes: list[Tensor],
    b_block_scales: list[Tensor],
    b_global_scales: list[Tensor],
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``y = (sum_blocks s_a s_b sum q_a q_b) * gsa * gsb + bias``, the columns of all weights side by side.

    Several weights that read one activation are one call: each keeps its storage and its own global scale, so nothing
    is copied to merge them.

    Args:
        a_codes, a_block_scales: activation, uint8 [..., K/2] and float8_e4m3fn [..., K/16].
        a_global_scale: fp32, 0-d or one a row [...].
        b_codes, b_block_scales: weights, each uint8 [N_i, K/2] and float8_e4m3fn [N_i, K/16].
        b_global_scales: fp32, each 0-d or [S], one for each of S equal segments of that weight's rows.
        bias: [sum N_i] or None, added in fp32.
        out_dtype: bf16, fp16 or fp32; the one rounding of the fp32 result.

    Returns:
        [..., sum N_i] in ``out_dtype``, contiguous. A row that holds a NaN block scale is NaN.

    Raises:
        RuntimeError: dtypes or shapes that do not belong together, or no kernel for the device.
    """
    out: Tensor = _op(
        a_codes, a_block_scales, a_global_scale, b_codes, b_block_scales, b_global_scales, bias, out_dtype
    )
    return out
