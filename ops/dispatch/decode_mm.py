"""Chooses and launches the decode kernels: products of few tokens with packed weights, bound by reading the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import sm_count

STEP_K = 256  # K of a product must be a multiple
MAX_TOKENS = 32
MAX_WEIGHTS = 4  # of one launch
MAX_STAGES = 32
BARRIER_BYTES = 1024
SMEM_KIB = 226
SHARED_SMEM_KIB = 110  # room for the CTA of the next kernel beside this one's
TOKEN_SLOTS = (1, 2, 4, 8, 16, 24, 32)
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

    @property
    def block_rows(self) -> int:
        """Weight rows of a CTA."""
        return 16 * self.row_tiles * self.row_warps

    def class_slots(self, k: int) -> int:
        """Stages that the shared memory holds for each class of warp groups; below 1 the variant cannot run."""
        stages = -(-k // (STEP_K * self.stage_steps))
        activations = -(-stages // self.splits) * self.stage_steps * STEP_K * 2 * self.token_slots
        reduction = 4 * self.k_warps * self.token_slots * (self.block_rows + 4)
        ring = self.smem_kib * 1024 - -(-(BARRIER_BYTES + activations + reduction) // 1024) * 1024
        stage_bytes = self.stage_steps * self.block_rows * (STEP_K // 2 + STEP_K // 16)
        return min(MAX_STAGES, ring // stage_bytes) // max(1, self.k_warps // self.stage_steps)


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
    most = sm_count(out) * (2 if config.smem_kib <= SHARED_SMEM_KIB else 1)
    ctas = blocks * config.splits if config.splits > 1 else min(blocks, most)
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
) -> None:
    """Runs one grouped variant, a CTA a multiprocessor."""
    cache.kernel("sm90.decode_mm", config)(
        x, x_scales, row_scale, sorted_slots, schedule, codes, scales, global_scale, row_weight, partial_amax, out,
        top_k, limit, sm_count(out),
    )  # fmt: skip
