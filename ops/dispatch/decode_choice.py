"""Which variant of ``sm90.decode_mm`` a product runs on, by tables of what was the fastest of those measured."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from dsv4_compile.ops.dispatch.decode_mm import OUT_DTYPE_NAMES, STEP_K, TILE_ROWS, Config
from dsv4_compile.ops.kernels.device import HOPPER_SM_COUNT

MAX_TOKENS = 32
MAX_WEIGHTS = 4  # of one launch
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
    if not _is_readable(tokens, k):
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


def _is_readable(tokens: int, k: int) -> bool:
    return 0 < tokens <= MAX_TOKENS and k > 0 and k % STEP_K == 0


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
    if not _is_readable(tokens, k):
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
