"""``quantize_nvfp4``: an activation to NVFP4, its global scale computed from itself on its own device."""

from __future__ import annotations

from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import quantize_nvfp4 as dispatch
from dsv4_compile.ops.registration import allocate_packed, check_granularity, check_quantizable, define

OP = "quantize_nvfp4"


def check(x: Tensor, granularity: str) -> None:
    """Checks the arguments."""
    check_quantizable(OP, "x", x)
    check_granularity(OP, granularity)


def allocate(x: Tensor, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the arguments and returns uninitialised outputs."""
    check(x, granularity)
    return allocate_packed(x, granularity)


def reference(x: Tensor, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """CPU kernel. The roundings that matter, and their order, are those of :mod:`dsv4_compile.nvfp4`."""
    check(x, granularity)
    return nvfp4.quantize(x, granularity)


def cuda(x: Tensor, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """GPU kernel: bitwise the reference."""
    check(x, granularity)
    return dispatch.quantize_nvfp4(x, granularity)


_op = define(
    f"{OP}(Tensor x, str granularity) -> (Tensor codes, Tensor block_scales, Tensor global_scale)",
    fake=allocate,
    cpu=reference,
    cuda=cuda,
)


def quantize_nvfp4(x: Tensor, granularity: str = "tensor") -> tuple[Tensor, Tensor, Tensor]:
    """Quantises ``x`` to e2m1 codes with ``global_scale = max|x| / 2688`` taken from ``x`` on its device.

    Args:
        x: bf16, fp16 or fp32 [..., K], K % 16 == 0, any strides, zero rows allowed.
        granularity: ``tensor``; ``tensor_pow2`` (rounded up to a power of two); ``token`` (one a row).

    Returns:
        codes uint8 [..., K/2], even k in the low nibble; block_scales float8_e4m3fn [..., K/16]; global_scale fp32,
        0-d or, for ``token``, [...]. A block that holds NaN or Inf has block scale NaN and codes 0, and its elements
        do not count in the maximum. All zeros give scales and codes 0.

    Raises:
        RuntimeError: wrong dtype, K not a multiple of 16, unknown granularity, or no kernel for the device.
    """
    codes, block_scales, global_scale = _op(x, granularity)
    return codes, block_scales, global_scale
