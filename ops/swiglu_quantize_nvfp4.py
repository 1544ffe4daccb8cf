"""``swiglu_quantize_nvfp4``: clamped SwiGLU and the quantisation of its result in one step."""

from __future__ import annotations

from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import swiglu_quantize_nvfp4 as dispatch
from dsv4_compile.ops.registration import (
    allocate_packed,
    check_dtype,
    check_granularity,
    check_quantizable,
    define,
    require,
)

OP = "swiglu_quantize_nvfp4"


def check(gate: Tensor, up: Tensor, limit: float, granularity: str) -> None:
    """Checks the arguments."""
    check_quantizable(OP, "gate", gate)
    check_dtype(OP, "up", up, (gate.dtype,))
    require(
        up.shape == gate.shape,
        lambda: f"{OP}: up must have the shape of gate {tuple(gate.shape)}, got {tuple(up.shape)}",
    )
    require(limit > 0, lambda: f"{OP}: limit must be positive (inf for none), got {limit}")
    check_granularity(OP, granularity)


def allocate(gate: Tensor, up: Tensor, limit: float, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the arguments and returns uninitialised outputs."""
    check(gate, up, limit, granularity)
    return allocate_packed(gate, granularity)


def reference(gate: Tensor, up: Tensor, limit: float, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """CPU kernel: :func:`nvfp4.swiglu` in fp32, quantised from fp32 with no rounding to the input dtype between."""
    check(gate, up, limit, granularity)
    return nvfp4.quantize(nvfp4.swiglu(gate, up, limit), granularity)


def cuda(gate: Tensor, up: Tensor, limit: float, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """GPU kernel: bitwise the reference."""
    check(gate, up, limit, granularity)
    return dispatch.swiglu_quantize_nvfp4(gate, up, limit, granularity)


_op = define(
    f"{OP}(Tensor gate, Tensor up, float limit, str granularity)"
    " -> (Tensor codes, Tensor block_scales, Tensor global_scale)",
    fake=allocate,
    cpu=reference,
    cuda=cuda,
)


def swiglu_quantize_nvfp4(
    gate: Tensor, up: Tensor, limit: float = float("inf"), granularity: str = "tensor"
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises ``silu(min(gate, limit)) * clamp(up, -limit, limit)``, computed in fp32.

    Args:
        gate, up: bf16, fp16 or fp32 [..., K], same shape and dtype, K % 16 == 0; the two halves of a merged
            projection can be passed as views, strides are free.
        limit: swiglu_limit of the model (DeepSeek V4: 10), ``inf`` for none. It clamps gate from above, up both ways.
        granularity: see :func:`quantize_nvfp4`.

    Returns:
        codes, block_scales and global_scale as of :func:`quantize_nvfp4`; the maximum is that of the fp32 product.

    Raises:
        RuntimeError: shapes or dtypes that differ, limit not positive, or no kernel for the device.
    """
    codes, block_scales, global_scale = _op(gate, up, limit, granularity)
    return codes, block_scales, global_scale
