"""``nvfp4_weight_mm``: a bf16 activation, not quantised, times one or several packed weights that read it (W4A16)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch.nvfp4_mm import run_bf16
from dsv4_compile.ops.registration import FLOAT_DTYPES, check_dtype, check_packed, define, require

OP = "nvfp4_weight_mm"


def allocate(
    x: Tensor,
    b_codes: list[Tensor],
    b_block_scales: list[Tensor],
    b_global_scales: list[Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Checks the arguments and returns an uninitialised output."""
    check_dtype(OP, "x", x, (torch.bfloat16,))
    require(x.dim() >= 1, lambda: f"{OP}: x must have at least one dimension, got shape {tuple(x.shape)}")
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
            codes.dim() == 2 and 2 * codes.shape[1] == x.shape[-1],
            lambda codes=codes: (  # type: ignore[misc]
                f"{OP}: b_codes must be [N, {x.shape[-1] // 2}], two codes a byte for the {x.shape[-1]} columns of x, "
                f"got shape {tuple(codes.shape)}"
            ),
        )
        n += codes.shape[0]
    if bias is not None:
        check_dtype(OP, "bias", bias, FLOAT_DTYPES)
        require(tuple(bias.shape) == (n,), lambda: f"{OP}: bias must have shape ({n},), got {tuple(bias.shape)}")
    require(out_dtype in FLOAT_DTYPES, lambda: f"{OP}: out_dtype must be a float dtype, got {out_dtype}")
    return x.new_empty((*x.shape[:-1], n), dtype=out_dtype)


def reference(
    x: Tensor,
    b_codes: list[Tensor],
    b_block_scales: list[Tensor],
    b_global_scales: list[Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """CPU kernel: :func:`nvfp4.matmul` of ``x`` in fp64, times the global scale and plus the bias in fp32."""
    out = allocate(x, b_codes, b_block_scales, b_global_scales, bias, out_dtype)
    rows = out.view(out.shape[:-1].numel(), out.shape[-1])
    a = x.to(torch.float64).reshape(rows.shape[0], x.shape[-1])
    one = torch.ones((), dtype=torch.float32)
    column = 0
    for codes, block_scales, global_scale in zip(b_codes, b_block_scales, b_global_scales, strict=True):
        columns = slice(column, column + codes.shape[0])
        y = nvfp4.matmul(a, one, codes, block_scales, global_scale)
        rows[:, columns] = y if bias is None else y + bias[columns].to(torch.float32)
        column = columns.stop
    return out


def on_hopper(
    x: Tensor,
    b_codes: list[Tensor],
    b_block_scales: list[Tensor],
    b_global_scales: list[Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """CUDA kernels; see ``dispatch/nvfp4_mm.py``."""
    out = allocate(x, b_codes, b_block_scales, b_global_scales, bias, out_dtype)
    return run_bf16(out, x, b_codes, b_block_scales, b_global_scales, bias)


_op = define(
    f"{OP}(Tensor x, Tensor[] b_codes, Tensor[] b_block_scales, Tensor[] b_global_scales, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    fake=allocate,
    cpu=reference,
    cuda=on_hopper,
)


def nvfp4_weight_mm(
    x: Tensor,
    b_codes: list[Tensor],
    b_block_scales: list[Tensor],
    b_global_scales: list[Tensor],
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``y = (sum_k x q_b s_b) * gsb + bias``, the columns of all weights side by side; ``x`` keeps its bf16 values.

    Args:
        x: bf16 [..., K], any strides.
        b_codes, b_block_scales: weights, each uint8 [N_i, K/2] and float8_e4m3fn [N_i, K/16].
        b_global_scales: fp32, each 0-d or [S], one for each of S equal segments of that weight's rows.
        bias: [sum N_i] or None, added in fp32.
        out_dtype: bf16, fp16 or fp32; the one rounding of the fp32 result.

    Returns:
        [..., sum N_i] in ``out_dtype``, contiguous.

    Raises:
        RuntimeError: dtypes or shapes that do not belong together, or no kernel for the device.
    """
    out: Tensor = _op(x, b_codes, b_block_scales, b_global_scales, bias, out_dtype)
    return out
