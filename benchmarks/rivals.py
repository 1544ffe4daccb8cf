"""NVFP4-weight kernels of other libraries, where they are installed: ``pip install quack-kernels humming-kernels``.

Each takes a bf16 activation and the checkpoint's weight, which it repacks once, untimed. quack compiles by the CuTe DSL
on first use, humming by NVRTC; both need their compilers on the GPU machine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

# What another library's kernel may raise where it does not build or run; the table then says so and goes on.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
Rival = Callable[[Tensor, Tensor, Tensor, Tensor], Callable[[], Any]]


def quack(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Callable[[], Tensor]:
    """quack-kernels' ``gemm_w4a16``, format nvfp4: bf16 [M, K] times [N, K]; N % 128 == 0, K % 64 == 0."""
    from quack.gemm_w4 import gemm_w4a16, prepare_w4_weight

    blob, scales = prepare_w4_weight(codes, block_scales, "nvfp4")
    scale = float(global_scale)
    return lambda: gemm_w4a16(x, blob, scales, tensor_scale=scale, wformat="nvfp4")


def humming(x: Tensor, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> Callable[[], Tensor]:
    """humming-kernels' layer for ModelOpt's NVFP4, bf16 activations."""
    from humming.layer import HummingLayer

    n, k = codes.shape[0], 2 * codes.shape[1]
    config = {"quant_method": "modelopt", "quant_algo": "nvfp4"}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=x.dtype).to(x.device)
    layer.load_from_tensors({"weight": codes, "weight_scale": block_scales, "weight_scale_2": global_scale.reshape(1)})
    layer.transform()
    return lambda: layer(x)


def installed() -> dict[str, Rival]:
    """The rivals whose packages are here."""
    every: dict[str, Rival] = {"quack": quack, "humming": humming}
    return {name: rival for name, rival in every.items() if importlib.util.find_spec(name) is not None}
