"""``nvfp4_moe``: quantised tokens through their top-k packed experts, combined."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch.nvfp4_moe import run
from dsv4_compile.ops.registration import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_choice,
    check_dtype,
    check_granularity,
    check_packed,
    define,
    require,
)

OP = "nvfp4_moe"

WeightPosition = Literal["before_down", "after_down"]
WEIGHT_POSITIONS: tuple[str, ...] = get_args(WeightPosition)


def allocate(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_codes: Tensor,
    gate_up_block_scales: Tensor,
    gate_up_global_scale: Tensor,
    down_codes: Tensor,
    down_block_scales: Tensor,
    down_global_scale: Tensor,
    limit: float,
    weight_position: str,
    granularity: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Checks the arguments and returns an uninitialised output."""
    check_packed(OP, "a_", a_codes, a_block_scales, a_global_scale)
    require(a_codes.dim() == 2, lambda: f"{OP}: a_codes must be [T, H/2], got shape {tuple(a_codes.shape)}")
    tokens, hidden = a_codes.shape[0], 2 * a_codes.shape[1]
    require(
        tuple(a_global_scale.shape) in ((), (tokens,)),
        lambda: f"{OP}: a_global_scale must be 0-d or one a row ({tokens},), got shape {tuple(a_global_scale.shape)}",
    )
    check_dtype(OP, "topk_ids", topk_ids, INDEX_DTYPES)
    require(
        topk_ids.dim() == 2 and topk_ids.shape[0] == tokens,
        lambda: f"{OP}: topk_ids must be [{tokens}, k], got shape {tuple(topk_ids.shape)}",
    )
    check_dtype(OP, "topk_weights", topk_weights, FLOAT_DTYPES)
    require(
        topk_weights.shape == topk_ids.shape,
        lambda: (
            f"{OP}: topk_weights must have the shape of topk_ids {tuple(topk_ids.shape)}, "
            f"got {tuple(topk_weights.shape)}"
        ),
    )
    check_packed(OP, "gate_up_", gate_up_codes, gate_up_block_scales, gate_up_global_scale)
    require(
        gate_up_codes.dim() == 3 and gate_up_codes.shape[1] % 32 == 0 and gate_up_codes.shape[2] == a_codes.shape[1],
        lambda: (
            f"{OP}: gate_up_codes must be [E, 2 I, {a_codes.shape[1]}], I % 16 == 0, as a_codes has that many bytes a "
            f"row, got shape {tuple(gate_up_codes.shape)}"
        ),
    )
    experts, intermediate = gate_up_codes.shape[0], gate_up_codes.shape[1] // 2
    require(
        tuple(gate_up_global_scale.shape) in ((experts,), (experts, 2)),
        lambda: (
            f"{OP}: gate_up_global_scale must have shape ({experts},) or ({experts}, 2), "
            f"got {tuple(gate_up_global_scale.shape)}"
        ),
    )
    check_packed(OP, "down_", down_codes, down_block_scales, down_global_scale)
    require(
        tuple(down_codes.shape) == (experts, hidden, intermediate // 2),
        lambda: (
            f"{OP}: down_codes must be [E, H, I/2] = ({experts}, {hidden}, {intermediate // 2}), as a_codes and "
            f"gate_up_codes have it, got shape {tuple(down_codes.shape)}"
        ),
    )
    require(
        tuple(down_global_scale.shape) == (experts,),
        lambda: f"{OP}: down_global_scale must have shape ({experts},), got {tuple(down_global_scale.shape)}",
    )
    require(limit > 0, lambda: f"{OP}: limit must be positive (inf for none), got {limit}")
    check_choice(OP, "weight_position", weight_position, WEIGHT_POSITIONS)
    check_granularity(OP, granularity)
    require(out_dtype in FLOAT_DTYPES, lambda: f"{OP}: out_dtype must be a float dtype, got {out_dtype}")
    return a_codes.new_empty((tokens, hidden), dtype=out_dtype)


def reference(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_codes: Tensor,
    gate_up_block_scales: Tensor,
    gate_up_global_scale: Tensor,
    down_codes: Tensor,
    down_block_scales: Tensor,
    down_global_scale: Tensor,
    limit: float,
    weight_position: str,
    granularity: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """CPU kernel: expert by expert, those that are hit, a chunk of one weight expanded at a time.

    Both products are those of :func:`nvfp4.matmul` in fp32, not rounded. Roundings that matter: the SwiGLU (times the
    weight, if before down) once to ``out_dtype``, quantised from there with one global scale over all routed rows, or
    one a row; the sum over the k routed rows of a token in fp32, from 0 in the order of k; its result to ``out_dtype``.
    """
    out = allocate(
        a_codes, a_block_scales, a_global_scale, topk_ids, topk_weights,
        gate_up_codes, gate_up_block_scales, gate_up_global_scale, down_codes, down_block_scales, down_global_scale,
        limit, weight_position, granularity, out_dtype,
    )  # fmt: skip
    tokens, top_k = topk_ids.shape
    experts, hidden = down_codes.shape[:2]
    ids = topk_ids.flatten()
    valid = ((ids >= 0) & (ids < experts)).nonzero().flatten()
    slots = valid[ids[valid].argsort(stable=True)]  # the routed rows, those of one expert side by side
    hit, counts = ids[slots].unique_consecutive(return_counts=True)
    groups = [
        (expert, slice(end - count, end))
        for expert, count, end in zip(hit.tolist(), counts.tolist(), counts.cumsum(0).tolist(), strict=True)
    ]
    token_of_row = slots // max(1, top_k)
    weights = topk_weights.flatten()[slots].to(torch.float32).unsqueeze(-1)

    a = nvfp4.scaled_codes(a_codes, a_block_scales, torch.float64)
    h = a.new_empty((slots.numel(), 2 * down_codes.shape[2]), dtype=out_dtype)
    for expert, rows in groups:
        token = token_of_row[rows]
        a_scale = a_global_scale[token] if a_global_scale.dim() else a_global_scale
        gate, up = nvfp4.matmul(
            a[token], a_scale, gate_up_codes[expert], gate_up_block_scales[expert], gate_up_global_scale[expert]
        ).chunk(2, dim=-1)
        activated = nvfp4.swiglu(gate, up, limit)
        h[rows] = activated * weights[rows] if weight_position == "before_down" else activated

    h_codes, h_block_scales, h_global_scale = nvfp4.quantize(h, granularity)
    routed = a.new_zeros((tokens * top_k, hidden), dtype=torch.float32)
    for expert, rows in groups:
        h_scaled = nvfp4.scaled_codes(h_codes[rows], h_block_scales[rows], torch.float64)
        h_scale = h_global_scale[rows] if h_global_scale.dim() else h_global_scale
        y = nvfp4.matmul(h_scaled, h_scale, down_codes[expert], down_block_scales[expert], down_global_scale[expert])
        routed[slots[rows]] = y * weights[rows] if weight_position == "after_down" else y

    total = a.new_zeros((tokens, hidden), dtype=torch.float32)
    for rank in range(top_k):
        total += routed.view(tokens, top_k, hidden)[:, rank]
    return out.copy_(total)


def on_hopper(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_codes: Tensor,
    gate_up_block_scales: Tensor,
    gate_up_global_scale: Tensor,
    down_codes: Tensor,
    down_block_scales: Tensor,
    down_global_scale: Tensor,
    limit: float,
    weight_position: str,
    granularity: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """CUDA kernels: sort by expert, multiply with SwiGLU, quantise, multiply, sum; see ``dispatch/nvfp4_moe.py``."""
    arguments = (
        a_codes, a_block_scales, a_global_scale, topk_ids, topk_weights,
        gate_up_codes, gate_up_block_scales, gate_up_global_scale, down_codes, down_block_scales, down_global_scale,
        limit, weight_position, granularity, out_dtype,
    )  # fmt: skip
    return run(allocate(*arguments), *arguments)


_op = define(
    f"{OP}(Tensor a_codes, Tensor a_block_scales, Tensor a_global_scale, Tensor topk_ids, Tensor topk_weights,"
    " Tensor gate_up_codes, Tensor gate_up_block_scales, Tensor gate_up_global_scale,"
    " Tensor down_codes, Tensor down_block_scales, Tensor down_global_scale,"
    " float limit, str weight_position, str granularity, ScalarType out_dtype) -> Tensor",
    fake=allocate,
    cpu=reference,
    cuda=on_hopper,
)


def nvfp4_moe(
    a_codes: Tensor,
    a_block_scales: Tensor,
    a_global_scale: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_codes: Tensor,
    gate_up_block_scales: Tensor,
    gate_up_global_scale: Tensor,
    down_codes: Tensor,
    down_block_scales: Tensor,
    down_global_scale: Tensor,
    limit: float = float("inf"),
    weight_position: str = "after_down",
    granularity: str = "tensor",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``y[t] = sum_k w[t,k] down[e] swiglu(gate_up[e] a[t])`` with ``e = topk_ids[t,k]``, all three packed.

    The input of ``down`` is rounded to ``out_dtype`` and quantised with a global scale taken from itself.

    Args:
        a_codes, a_block_scales: tokens, quantised once: uint8 [T, H/2], float8_e4m3fn [T, H/16], any strides.
        a_global_scale: fp32, 0-d or one a row [T].
        topk_ids: int32 or int64 [T, k], the experts of a token. Ids below 0 or from E on contribute nothing (experts
            that live elsewhere); an id that stands twice counts twice.
        topk_weights: bf16, fp16 or fp32 [T, k].
        gate_up_codes, gate_up_block_scales: uint8 [E, 2 I, H/2], float8_e4m3fn [E, 2 I, H/16], gate rows first.
        gate_up_global_scale: fp32 [E], or [E, 2] with one for gate and one for up.
        down_codes, down_block_scales: uint8 [E, H, I/2], float8_e4m3fn [E, H, I/16].
        down_global_scale: fp32 [E].
        limit: swiglu_limit of the model (DeepSeek V4: 10), ``inf`` for none; see :func:`swiglu_quantize_nvfp4`.
        weight_position: ``after_down`` multiplies the output of ``down`` by the routing weight, ``before_down`` its
            input. Both in fp32.
        granularity: of the input of ``down``: ``tensor`` and ``tensor_pow2`` take one global scale over all routed rows
            of the call, ``token`` one a routed row; see :func:`quantize_nvfp4`.
        out_dtype: bf16, fp16 or fp32, of the input of ``down`` before it is quantised, and of the result.

    Returns:
        [T, H] in ``out_dtype``, contiguous. Tokens with no valid expert are 0; a token that holds a NaN block scale,
        and no other, is NaN.

    Raises:
        RuntimeError: dtypes or shapes that do not belong together, limit not positive, an unknown weight position or
            granularity, or no kernel for the device.

    Source: HuggingFace transformers, models/deepseek_v4/modeling_deepseek_v4.py, ``DeepseekV4Experts``, which weights
    after down; DeepSeek's own inference code weights before it.
    """
    out: Tensor = _op(
        a_codes, a_block_scales, a_global_scale, topk_ids, topk_weights,
        gate_up_codes, gate_up_block_scales, gate_up_global_scale, down_codes, down_block_scales, down_global_scale,
        limit, weight_position, granularity, out_dtype,
    )  # fmt: skip
    return out
