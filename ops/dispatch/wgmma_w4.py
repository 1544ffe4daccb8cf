"""Configurations of ``sm90.wgmma_w4``, the kernel of products with more than a few tokens, and how it is launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import HOPPER_SM_COUNT, sm_count

STAGE_K = 256  # K % STAGE_K == 0: a stage of block scales is 16 bytes a row, the least that TMA copies
BLOCK_ROWS = 128  # weight rows a CTA
TILE_TOKENS = (16, 32, 64, 128, 256)
RESIDENT_SHARE = {1: 1.0, 2: 1.0, 3: 39 * 3 / 132}  # of the CTAs that fit, by CTAs of a cluster
OUT_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Config:
    """One compiled variant.

    Attributes:
        mode: ``dense``: weights [N_i, K]; ``grouped``: experts [E, N, K] and a schedule; ``swiglu``: the same with
            SwiGLU of the two halves of the rows.
        tile_tokens: tokens a tile, one of :data:`TILE_TOKENS`.
        num_weights: weights of a dense call, side by side in the output.
        splits: CTAs of a cluster that share a tile, each with its part of K; dense only, and one tile a cluster.
        has_row_scale: the activation has a scale, one for all or one a row.
        has_bias: a bias is added; dense only.
        has_row_weight: SwiGLU's result is multiplied by a weight a row.
        has_amax: SwiGLU's largest magnitude is written, one a CTA.
        out_dtype: ``bf16``, ``fp16`` or ``fp32``.
        ctas_per_sm: CTAs that share a multiprocessor: 1, 2 for at most 64 tokens a tile, or 3 for at most 32.
        k_groups: pairs of warpgroups that share a tile, 2 of them each with half of every 256 of K; 1 for 256 tokens.
        teams: 2 for two pairs of warpgroups that take tiles in turn, so that one stores while the other multiplies; for
            at most 128 tokens a tile, without splits and with one K group.
        group: k16 steps, 2 or 4, that are decoded, then multiplied, together.
        activation: ``f16`` for ``code * scale`` of a quantised activation, ``bf16`` for any.
        is_interleaved: the activation is in the order of :func:`interleave.interleave`, which is cheaper to decode for;
            ``f16`` always is.
    """

    mode: Literal["dense", "grouped", "swiglu"]
    tile_tokens: int
    num_weights: int = 1
    splits: int = 1
    has_row_scale: bool = True
    has_bias: bool = False
    has_row_weight: bool = False
    has_amax: bool = False
    out_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    ctas_per_sm: int = 1
    k_groups: int = 1
    teams: int = 1
    group: int = 2
    activation: Literal["f16", "bf16"] = "f16"
    is_interleaved: bool = True


def is_mappable(*tensors: Tensor) -> bool:
    """Whether TMA can read the matrices: unit stride along K, rows and bases at multiples of 16 bytes."""
    return all(
        tensor.stride(-1) == 1
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        and (tensor.is_meta or tensor.data_ptr() % 16 == 0)
        for tensor in tensors
    )


def clusters_of(cluster: int, ctas_per_sm: int, sms: int) -> int:
    """Clusters that a device holds at once: those of three or more do not fill its processor clusters.

    Measured with cudaOccupancyMaxActiveClusters on an H100 of 132 multiprocessors: 66 of two, 39 of three, 30 of four.
    """
    ctas = sms * ctas_per_sm
    return int(ctas * RESIDENT_SHARE.get(cluster, 30 * 4 / 132)) // cluster


def num_clusters(config: Config, like: Tensor | None = None) -> int:
    """:func:`clusters_of` a variant on the device of a tensor, or on an H100."""
    sms = HOPPER_SM_COUNT if like is None else sm_count(like)
    return clusters_of(config.splits, config.ctas_per_sm, sms)


def num_tiles_of(tile_tokens: int, tokens: int, weight_rows: Sequence[int]) -> int:
    """Tiles of a dense product, each the work of a cluster."""
    return sum(-(-n // BLOCK_ROWS) for n in weight_rows) * -(-tokens // tile_tokens)


def fits(config: Config, tokens: int, weight_rows: Sequence[int], like: Tensor | None = None) -> bool:
    """Whether a variant takes a shape: with splits a cluster takes one tile."""
    tiles = num_tiles_of(config.tile_tokens, tokens, weight_rows)
    return config.splits == 1 or tiles <= num_clusters(config, like)


def launch_dense(
    config: Config,
    x: Tensor,
    row_scale: Tensor | None,
    codes: Sequence[Tensor],
    block_scales: Sequence[Tensor],
    global_scales: Sequence[Tensor],
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """``out = (x @ (code * block scale).T) * (row_scale * global scale) + bias``, the weights' columns side by side.

    Args:
        config: its ``num_weights`` is that of the lists.
        x: of the config's dtype [M, K], K % 256 == 0, interleaved or not as the config says.
        row_scale: fp32 [1] or [M], or None for 1.
        codes, block_scales: each uint8 [N_i, K/2], float8_e4m3fn [N_i, K/16], N_i % 8 == 0; see :func:`is_mappable`.
        global_scales: fp32, each [S_i], one for each of S_i equal segments of that weight's rows.
        bias: fp32 [sum N_i] or None.
        out: [M, sum N_i], unit stride along the columns, rows and base at multiples of 16 bytes.
    """
    weight_rows = [weight.shape[0] for weight in codes]
    assert fits(config, x.shape[0], weight_rows, x)
    tiles = num_tiles_of(config.tile_tokens, x.shape[0], weight_rows)
    unused = global_scales[0]  # stands for an absent argument
    cache.kernel("sm90.wgmma_w4", config)(
        x,
        unused if row_scale is None else row_scale,
        list(codes),
        list(block_scales),
        list(global_scales),
        unused if bias is None else bias,
        out,
        min(tiles, num_clusters(config, x)) * config.splits,
    )
