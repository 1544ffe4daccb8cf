"""The compiler: an ordered list of rewrites of functional ATen graphs, one file a fusion.

They run on Inductor's graph before it pads, fuses or folds anything (``joint_custom_pre_pass``). What no pass matches
stays correct: its weights go through ``dequantize_nvfp4``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import fx

from dsv4_compile.passes import (
    clean_up,
    dense_moe,
    experts,
    grouped_linear,
    linear,
    merge_gemms,
    moe,
    rms_norm,
    share_quantization,
    swiglu,
    topk_router,
)

Pass = tuple[str, Callable[[fx.Graph], int]]


@functools.lru_cache
def build_passes(granularity: str = "tensor", merge: bool = True, activations: str = "nvfp4") -> tuple[Pass, ...]:
    """The passes in the order they run; tracing their patterns takes about half a second, once a process."""
    merge_passes = [(merge_gemms.NAME, merge_gemms.apply)] if merge else []
    if activations == "bf16":  # nothing is quantised: the linears, and the router, which reads no packed weight
        return (
            *((fusion.name, fusion.build()) for fusion in linear.build(granularity, activations)),
            (topk_router.NAME, topk_router.apply),
            *merge_passes,
            (clean_up.NAME, clean_up.apply),
        )
    products = [*linear.build(granularity), *grouped_linear.build(granularity), *experts.build(granularity)]
    fused_products = [(fusion.name, fusion.build()) for fusion in products]
    fused_moe = [(fusion.name, fusion.build()) for fusion in [*moe.build(granularity), *dense_moe.build(granularity)]]
    fused_norm = [(fusion.name, fusion.build()) for fusion in rms_norm.build(granularity)]
    fused_swiglu = [(fusion.name, fusion.build()) for fusion in swiglu.build(granularity)]
    return (
        # Every product with a packed weight first: the others look for the operators that this leaves.
        *fused_products,
        # Before swiglu, whose pattern ends in a quantisation with no view in front of it.
        (share_quantization.NAME, share_quantization.apply_to_products),
        *fused_swiglu,
        # Whole experts, out of the operators that the passes above made of their parts; then their tokens, too, share
        # a quantisation with whatever else reads them.
        *fused_moe,
        (share_quantization.NAME + "_of_experts", share_quantization.apply),
        (topk_router.NAME, topk_router.apply),
        # Once there is one quantisation of each norm.
        *fused_norm,
        # After swiglu: gate and up become slices of one product, which the operator reads in place.
        *merge_passes,
        (clean_up.NAME, clean_up.apply),
    )


def run_passes(
    graph: fx.Graph, granularity: str = "tensor", merge: bool = True, activations: str = "nvfp4"
) -> dict[str, int]:
    """Rewrites a functional ATen graph in place; returns the number of rewrites of each pass."""
    return {name: apply(graph) for name, apply in build_passes(granularity, merge, activations)}
