"""``dequantize_nvfp4``: packed NVFP4 to a float tensor; what eager mode and unmatched regions use."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import dequantize_nvfp4 as dispatch
from dsv4_compile.ops.registration import FLOAT_DTYPES, check_packed, define, require

OP = "dequantize_nvfp4"


def check(codes: Tensor, block_scales: Tensor, global_scale: Tensor, dtype: torch.dtype) -> None:
    """Checks the arguments."""
    check_packed(OP, "", codes, block_scales, global_scale)
    require(dtype in FLOAT_DTYPES, lambda: f"{OP}: dtype must be bfloat16, float16 or float32, got {dtype}")


def allocate(codes: Tensor, block_scales: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Checks the arguments and returns an uninitialised output."""
    check(codes, block_scales, global_scale, dtype)
    return codes.new_empty((*codes.shape[:-1], 2 * codes.shape[-1]), dtype=dtype)


def reference(codes: Tensor, block_scales: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """CPU kernel: ``code * block scale`` exactly, times the global scale in fp32, then rounded to ``dtype``."""
    check(codes, block_scales, global_scale, dtype)
    return nvfp4.dequantize(codes, block_scales, global_scale, dtype)


def cuda(codes: Tensor, block_scales: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """GPU kernel: bitwise the reference."""
    check(codes, block_scales, global_scale, dtype)
    return dispatch.dequantize_nvfp4(codes, block_scales, global_scale, dtype)


_op = define(
    f"{OP}(Tensor codes, Tensor block_scales, Tensor global_scale, ScalarType dtype) -> Tensor",
    fake=allocate,
    cpu=reference,
    cuda=cuda,
)


def dequantize_nvfp4(
    codes: Tensor, block_scales: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``code * block_scale * global_scale`` in ``dtype``.

    Args:
        codes: uint8 [..., N, K/2], even k in the low nibble.
        block_scales: float8_e4m3fn [..., N, K/16].
        global_scale: fp32, 0-d; or [...], one a matrix; or [..., S], one for each of S equal segments of the rows.
        dtype: bf16, fp16 or fp32.

    Returns:
        [..., N, K], contiguous. Blocks with a NaN scale are NaN.

    Raises:
        RuntimeError: dtypes or shapes that do not belong together, or no kernel for the device.
    """
    out: Tensor = _op(codes, block_scales, global_scale, dtype)
    return out
