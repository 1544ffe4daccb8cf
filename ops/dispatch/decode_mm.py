"""Chooses and launches the decode kernels: products of few tokens with packed weights, bound by reading the weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import HOPPER_SM_COUNT, sm_count

STEP_K = 256  # K of a product must be a multiple
TILE_ROWS = 16  # weight rows of a tensor-core instruction
MAX_TOKENS = 32
MAX_WEIGHTS = 4  # of one launch
MAX_STAGES = 32
BARRIER_BYTES = 1152
TOKEN_GAP_BYTES = 16  # between tokens in shared memory: no bank conflicts
SMEM_KIB = 226
TOKEN_SLOTS = (1, 2, 4, 8, 16, 24, 32)
# Row tiles, row warps, K warps and steps a stage of blocks of 16 to 256 rows, for at most so many tokens: the fastest
# of those tried on an H100 at 1, 8, 16 and 32 tokens (docs/measured.md). The last one of each needs the least shared
# memory beside the activations. More than 16 tokens have eight warps: registers for four tiles of tokens.
BLOCK_SHAPES = {
    8: ((1, 1, 16, 1), (1, 2, 8, 1), (2, 2, 4, 2), (2, 4, 4, 1), (2, 8, 1, 1)),
    16: ((1, 1, 16, 1), (1, 2, 8, 1), (1, 4, 4, 2), (2, 4, 4, 1), (2, 8, 1, 1)),
    32: ((1, 1, 8, 1), (2, 1, 8, 1), (2, 2, 4, 2), (2, 4, 2, 1), (2, 8, 1, 1)),
}
# Blocks of clusters for 5 to 16 tokens: small ones of any, large ones of at least four CTAs.
CLUSTER_TOKENS = range(5, 17)
SMALL_CLUSTER_ROWS = 64
LARGE_CLUSTER_BLOCKS = ((1, 16, 1, 1),)
LARGE_CLUSTER_SPLITS = 4
LARGEST_BLOCK_ROWS = 256
FEW_WARPS_TOKENS, MANY_TOKENS_WARPS = 16, 8  # most warps of more tokens
SPLITS = (1, 2, 4, 8)
# Row tiles, row warps and K warps that tuning tries; benchmarks/sweep_decode_mm.py times them.
TUNED_BLOCKS = ((1, 1, 8), (1, 1, 16), (2, 1, 8), (1, 2, 8), (1, 4, 4), (2, 2, 4), (1, 7, 2), (2, 4, 2), (2, 4, 4),
                (2, 7, 1), (1, 14, 1), (1, 15, 1), (2, 8, 1), (2, 8, 2), (1, 16, 1))  # fmt: skip
GROUPED_TILE_ROWS = 8
GROUPED_FEW_ROWS = 48
GROUPED_FEW, GROUPED_MANY = (2, 2, 4), (2, 4, 2)
GROUPED_BLOCKS = (GROUPED_FEW, GROUPED_MANY, (2, 2, 8), (1, 4, 4))
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


def choose(
    tokens: int,
    weight_rows: Sequence[int],
    k: int,
    activation: Literal["packed", "bf16"],
    has_bias: bool,
    out_dtype: torch.dtype,
    has_row_scale: bool,
) -> Config | None:
    """The dense variant for a shape, or None where the kernel does not run: too many tokens, or K not in steps.

    A CTA takes as few rows as still leave one wave of CTAs, so that all of them finish together; where the activations
    do not fit beside a ring of weights, a cluster of CTAs shares K.
    """
    if not 0 < tokens <= MAX_TOKENS or k % STEP_K or not k:
        return None
    rows = sum(weight_rows)
    for shape, splits in _preferred(tokens):
        config = _dense(shape, splits, tokens, weight_rows, activation, has_bias, out_dtype, has_row_scale)
        is_largest = config.block_rows == LARGEST_BLOCK_ROWS
        if -(-rows // config.block_rows) * splits > HOPPER_SM_COUNT and (splits > 1 or not is_largest):
            continue
        if config.class_slots(k) >= 1:
            return config
    return None


def _preferred(tokens: int) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    """Block shapes and splits of K, the first to be tried first."""
    shapes = next(shapes for most, shapes in BLOCK_SHAPES.items() if tokens <= most)
    if tokens in CLUSTER_TOKENS:
        small = [shape for shape in shapes if TILE_ROWS * shape[0] * shape[1] <= SMALL_CLUSTER_ROWS]
        yield from ((shape, 1) for shape in shapes)
        for splits in SPLITS[1:]:
            large = LARGE_CLUSTER_BLOCKS if splits >= LARGE_CLUSTER_SPLITS else ()
            yield from ((shape, splits) for shape in (*small, *large))
    yield from ((shape, splits) for splits in SPLITS for shape in shapes)


def variants(
    tokens: int,
    weight_rows: Sequence[int],
    k: int,
    activation: Literal["packed", "bf16"],
    has_bias: bool,
    out_dtype: torch.dtype,
    has_row_scale: bool,
) -> list[Config]:
    """Dense variants among which the fastest for a shape may be: those that fit, and keep half the device busy."""
    if not 0 < tokens <= MAX_TOKENS or k % STEP_K or not k:
        return []
    found = []
    for block, stage_steps, splits in itertools.product(TUNED_BLOCKS, (1, 2), SPLITS):
        shape = (*block, stage_steps)
        config = _dense(shape, splits, tokens, weight_rows, activation, has_bias, out_dtype, has_row_scale)
        ctas = sum(-(-rows // config.block_rows) for rows in weight_rows) * splits
        is_one_wave = ctas <= HOPPER_SM_COUNT or (splits == 1 and config.block_rows == LARGEST_BLOCK_ROWS)
        is_busy = 2 * ctas >= HOPPER_SM_COUNT or config.block_rows == TILE_ROWS
        steps_divide = config.k_warps % stage_steps == 0 or stage_steps % config.k_warps == 0
        few_warps = tokens <= FEW_WARPS_TOKENS or config.row_warps * config.k_warps <= MANY_TOKENS_WARPS
        if not (is_one_wave and is_busy and steps_divide and few_warps) or k // STEP_K < splits * config.k_warps:
            continue
        if config.class_slots(k) >= 1:
            found.append(config)
    return found


def _dense(
    shape: tuple[int, int, int, int],
    splits: int,
    tokens: int,
    weight_rows: Sequence[int],
    activation: Literal["packed", "bf16"],
    has_bias: bool,
    out_dtype: torch.dtype,
    has_row_scale: bool,
) -> Config:
    row_tiles, row_warps, k_warps, stage_steps = shape
    return Config(
        token_slots=next(size for size in TOKEN_SLOTS if size >= tokens),
        row_tiles=row_tiles,
        row_warps=row_warps,
        k_warps=k_warps,
        stage_steps=stage_steps,
        splits=splits,
        activation=activation,
        num_weights=1 if len(weight_rows) == 1 else MAX_WEIGHTS,
        has_bias=has_bias,
        out_dtype=OUT_DTYPE_NAMES[out_dtype],
        smem_kib=SMEM_KIB,
        has_row_scale=has_row_scale,
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
        config: of :func:`choose`.
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


def grouped_block(rows: int) -> tuple[int, int, int]:
    """Row tiles, row warps and K warps of the grouped variant for a number of routed rows."""
    return GROUPED_FEW if rows <= GROUPED_FEW_ROWS else GROUPED_MANY


@functools.lru_cache(maxsize=4096)
def choose_grouped(
    block: tuple[int, int, int],
    k: int,
    is_packed: bool,
    is_swiglu: bool,
    has_row_weight: bool,
    out_dtype: torch.dtype,
    has_schedule: bool = True,
    tile_rows: int = GROUPED_TILE_ROWS,
    has_old_schedule: bool = False,
) -> Config | None:
    """The grouped variant of a block shape, tiles of 1 or 8 routed rows; None where K is not in steps.

    Args:
        block: row tiles, row warps and K warps: :func:`grouped_block`, or one of :data:`GROUPED_BLOCKS`.
        k: K.
        is_packed, is_swiglu, has_row_weight, out_dtype, has_schedule, has_old_schedule: see :class:`Config`.
        tile_rows: 1 or 8, the most rows of a tile.
    """
    if k % STEP_K or not k:
        return None
    row_tiles, row_warps, k_warps = block
    config = Config(
        token_slots=tile_rows,
        row_tiles=row_tiles,
        row_warps=row_warps,
        k_warps=k_warps,
        stage_steps=2,
        splits=1,
        activation="packed" if is_packed else "bf16",
        num_weights=1,
        has_bias=False,
        out_dtype=OUT_DTYPE_NAMES[out_dtype],
        smem_kib=SMEM_KIB,
        mode="swiglu" if is_swiglu else "grouped",
        has_gather=is_packed and is_swiglu,
        has_row_weight=has_row_weight,
        has_schedule=has_schedule,
        has_old_schedule=has_old_schedule,
    )
    return config if config.class_slots(k) >= 1 else None


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
        config: of :func:`choose_grouped`.
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
