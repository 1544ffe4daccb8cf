"""Launches the decode kernels: products of few tokens with packed weights, bound by reading the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import sm_count

STEP_K = 256  # K of a product must be a multiple
TILE_ROWS = 16  # weight rows of a tensor-core instruction
MAX_STAGES = 32
BARRIER_BYTES = 1152
TOKEN_GAP_BYTES = 16  # between tokens in shared memory: no bank conflicts
OUT_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Config:
    """One compiled variant of ``sm90.decode_mm``.

    Attributes:
        token_slots: tokens whose activations a CTA holds: 1, 2, 4 or a multiple of 8.
        row_tiles: tiles of 16 weight rows a warp.
        row_warps: warps side by side along the weight rows.
        k_warps: warps that share a row block, each taking every ``k_warps``-th step of 256 values of K.
        stage_steps: steps that are loaded together; divides ``k_warps`` or is a multiple of it.
        splits: CTAs of a cluster that share a row block, each with its part of K.
        activation: ``packed`` (NVFP4) or ``bf16``.
        num_weights: weights of a dense call, side by side in the output; unused ones have no rows.
        has_bias: a bias is added.
        out_dtype: of the result.
        smem_kib: dynamic shared memory.
        mode: ``dense``; ``grouped``, rows of a schedule times the weight of their expert; or ``swiglu``, the same with
            the SwiGLU of the two halves of the product as result.
        has_gather: the activation of a grouped row is that of its slot's token.
        has_row_weight: the result of ``swiglu`` is multiplied by a weight of its row.
        has_row_scale: the activation has a global scale, one for all rows or one a row.
        has_schedule: the tiles of a grouped product are those of a schedule on the device, not of groups of one size.
        has_old_schedule: the schedule was complete before the launch in front of this one let this one begin: weights
            are loaded while that runs.
    """

    token_slots: int
    row_tiles: int
    row_warps: int
    k_warps: int
    stage_steps: int
    splits: int
    activation: Literal["packed", "bf16"]
    num_weights: int
    has_bias: bool
    out_dtype: str
    smem_kib: int
    mode: Literal["dense", "grouped", "swiglu"] = "dense"
    has_gather: bool = False
    has_row_weight: bool = False
    has_row_scale: bool = True
    has_schedule: bool = True
    has_old_schedule: bool = False

    @property
    def block_rows(self) -> int:
        """Weight rows of a CTA."""
        return TILE_ROWS * self.row_tiles * self.row_warps

    @property
    def block_name(self) -> str:
        """Name of the choices that a shape leaves open."""
        block = f"{self.row_tiles}x{self.row_warps}x{self.k_warps}"
        return f"decode {block}, {self.stage_steps} steps a stage, {self.splits} splits"

    @property
    def has_copied_activations(self) -> bool:
        """Whether the activations lie in shared memory as in global memory, and not in the order of decoding."""
        return self.activation == "bf16" and self.mode == "dense"

    @property
    def token_gap_bytes(self) -> int:
        """Between the activations of two tokens in shared memory."""
        return TOKEN_GAP_BYTES if self.has_copied_activations else 0

    def class_slots(self, k: int) -> int:
        """Stages that the shared memory holds for each class of warp groups; below 1 the variant cannot run."""
        stages = -(-k // (STEP_K * self.stage_steps))
        token_bytes = -(-stages // self.splits) * self.stage_steps * STEP_K * 2 + self.token_gap_bytes
        activations = token_bytes * self.token_slots
        reduction = 4 * self.k_warps * self.token_slots * (self.block_rows + 4)
        ring = self.smem_kib * 1024 - -(-(BARRIER_BYTES + activations + reduction) // 1024) * 1024
        stage_bytes = self.stage_steps * self.block_rows * (STEP_K // 2 + STEP_K // 16)
        return min(MAX_STAGES, ring // stage_bytes) // max(1, self.k_warps // self.stage_steps)


def is_mappable(*tensors: Tensor) -> bool:
    """Whether TMA reads these: K in steps, rows contiguous, 16-byte aligned bases."""
    return all(
        tensor.stride(-1) == 1
        and tensor.shape[-1] * tensor.stride(-1) == tensor.stride(-2)
        and (tensor.is_meta or tensor.data_ptr() % 16 == 0)
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def decode_mm(
    config: Config,
    x: Tensor,
    x_scales: Tensor | None,
    row_scale: Tensor | None,
    codes: Sequence[Tensor],
    block_scales: Sequence[Tensor],
    global_scales: Sequence[Tensor],
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """``out = (x @ (code * block scale).T) * (row_scale * global_scale) + bias`` for at most 32 tokens.

    Args:
        config: of :func:`decode_choice.choose`.
        x: packed uint8 [T, K/2] or bf16 [T, K], contiguous, 16-byte aligned.
        x_scales: float8_e4m3fn [T, K/16] of a packed ``x``, contiguous.
        row_scale: fp32 [1] or [T], exactly with ``config.has_row_scale``.
        codes, block_scales: at most 4 weights, uint8 [N_i, K/2] and float8_e4m3fn [N_i, K/16], see :func:`is_mappable`.
        global_scales: fp32, each 1-D: one, or one for each of equal segments of the weight's rows.
        bias: fp32 [sum N_i] or None.
        out: [T, sum N_i], unit stride along the last dimension.
    """
    missing = config.num_weights - len(codes)
    launch(
        config,
        x,
        block_scales[0] if x_scales is None else x_scales,
        global_scales[0] if row_scale is None else row_scale,
        [*codes, *[codes[0][:0]] * missing],
        [*block_scales, *[block_scales[0][:0]] * missing],
        [*global_scales, *[global_scales[0]] * missing],
        global_scales[0] if bias is None else bias,
        out,
    )


def grouped_decode_mm(
    config: Config,
    x: Tensor,
    x_scales: Tensor | None,
    row_scale: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    global_scale: Tensor,
    schedule: Tensor | None,
    out: Tensor,
    *,
    group_rows: int = 0,
    sorted_slots: Tensor | None = None,
    top_k: int = 1,
    swiglu_limit: float = 0.0,
    row_weight: Tensor | None = None,
    partial_amax: Tensor | None = None,
) -> None:
    """``out[r] = (x[r] @ (code * block scale)[e].T) * (row_scale[r] * global_scale[e])``, or the SwiGLU of its halves.

    Args:
        config: of :func:`decode_choice.choose_grouped`.
        x: packed uint8 [T, K/2] or bf16 [S, K], contiguous. With ``config.has_gather`` row r of the schedule reads row
            ``sorted_slots[r] // top_k``, else row r.
        x_scales: float8_e4m3fn [T, K/16] of a packed ``x``, contiguous.
        row_scale: fp32, one element or one a row of the schedule.
        codes, block_scales: uint8 [E, N, K/2] and float8_e4m3fn [E, N, K/16], see :func:`is_mappable`.
        global_scale: fp32 [E, S], one for each of S equal segments of the N rows; for SwiGLU S is 1 or 2.
        schedule: int32 [max_tiles + 1, 4], see ``ops/dispatch/moe_align.py``; exactly with ``config.has_schedule``.
        out: [S, N], or [S, N/2] of a SwiGLU. Rows that no tile names are left as they are.
        group_rows: rows of each group, one after the other, where there is no schedule.
        sorted_slots: int32 [S].
        top_k: slots of a token.
        swiglu_limit: ``inf`` for no clamp.
        row_weight: fp32 [S], exactly with ``config.has_row_weight``.
        partial_amax: fp32, an element a multiprocessor, exactly with SwiGLU: the largest finite result of each CTA.
    """
    unused = global_scale.view(-1)
    unused_integers = unused.view(torch.int32)
    launch_grouped(
        config,
        x,
        block_scales[0] if x_scales is None else x_scales,
        row_scale.view(-1),
        unused_integers if sorted_slots is None else sorted_slots,
        top_k,
        unused_integers.new_empty((1, 4)) if schedule is None else schedule,
        codes,
        block_scales,
        global_scale,
        unused if row_weight is None else row_weight,
        unused if partial_amax is None else partial_amax,
        swiglu_limit,
        out,
        group_rows,
    )


def launch(
    config: Config,
    x: Tensor,
    x_scales: Tensor,
    row_scale: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    global_scales: Sequence[Tensor],
    bias: Tensor,
    out: Tensor,
) -> None:
    """Runs one dense variant; the grid covers every row block in one wave, or each CTA takes several."""
    blocks = sum(-(-weight.shape[0] // config.block_rows) for weight in codes)
    ctas = blocks * config.splits if config.splits > 1 else min(blocks, sm_count(out))
    cache.kernel("sm90.decode_mm", config)(
        x, x_scales, row_scale, list(codes), list(scales), list(global_scales), bias, out, ctas
    )


def launch_grouped(
    config: Config,
    x: Tensor,
    x_scales: Tensor,
    row_scale: Tensor,
    sorted_slots: Tensor,
    top_k: int,
    schedule: Tensor,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    row_weight: Tensor,
    partial_amax: Tensor,
    limit: float,
    out: Tensor,
    group_rows: int,
) -> None:
    """Runs one grouped variant, a CTA a multiprocessor."""
    cache.kernel("sm90.decode_mm", config)(
        x, x_scales, row_scale, sorted_slots, schedule, codes, scales, global_scale, row_weight, partial_amax, out,
        top_k, limit, group_rows, sm_count(out),
    )  # fmt: skip
