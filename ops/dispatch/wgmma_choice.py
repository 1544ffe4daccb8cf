"""Which variants of ``sm90.wgmma_w4`` a dense product runs on, by times measured a stage of K."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from dsv4_compile.ops.dispatch.wgmma_w4 import STAGE_K, Config, clusters_of, num_tiles_of

LAUNCH_US = 2.0  # from one kernel's end to the next one's first product, with its last store


@dataclass(frozen=True)
class Variant:
    """A variant and what was measured of it.

    Attributes:
        tile_tokens, k_groups, ctas_per_sm, splits: see :class:`Config`.
        stage_us: for 256 of K of a tile, the tiles of a multiprocessor's other CTA included.
        tile_us: for what is left of a tile: first loads, sums of splits, stores.
    """

    tile_tokens: int
    k_groups: int
    ctas_per_sm: int
    splits: int
    stage_us: float
    tile_us: float

    @property
    def name(self) -> str:
        """Name of the choices that a shape leaves open."""
        ctas = self.ctas_per_sm
        return f"wgmma {self.tile_tokens} tokens, {self.k_groups} K groups, {ctas} CTAs, {self.splits} splits"


# H100, 2026-11-25, fitted to times of 4096 x 4096, 32768 x 1024 and 7168 x 16384 at 33 to 4096 tokens.
VARIANTS = (
    Variant(64, 1, 2, 1, 2.53, 3.5),
    Variant(64, 2, 1, 1, 1.30, 2.3),
    Variant(64, 2, 1, 2, 1.40, 3.0),
    Variant(64, 2, 1, 3, 1.40, 4.5),
    Variant(64, 1, 2, 4, 2.55, 5.0),
    Variant(128, 2, 1, 1, 1.62, 2.8),
    Variant(128, 2, 1, 2, 1.75, 2.7),
    Variant(256, 1, 1, 1, 2.60, 4.2),
    Variant(256, 1, 1, 2, 2.45, 8.5),
)


@dataclass(frozen=True)
class Part:
    """Consecutive tokens that one launch takes."""

    first: int
    tokens: int
    variant: Variant


@functools.lru_cache(maxsize=4096)
def plan(tokens: int, weight_rows: tuple[int, ...], k: int, sms: int) -> tuple[Part, ...]:
    """The launches of a product: one, or a second for the tokens that would leave most of a last wave idle.

    The variants have run one by one; the plan of 2048 tokens x 7168 x 16384 is the one of two launches that was timed.

    Args:
        tokens: M.
        weight_rows: rows of each weight.
        k: K.
        sms: multiprocessors.
    """
    variant, best_us = _best(tokens, weight_rows, k, sms)
    parts: tuple[Part, ...] = (Part(0, tokens, variant),)
    tile = VARIANTS[-1].tile_tokens
    for first in range(tile, tokens, tile):
        head, head_us = _best(first, weight_rows, k, sms)
        tail, tail_us = _best(tokens - first, weight_rows, k, sms)
        if head_us + tail_us < best_us:
            best_us = head_us + tail_us
            parts = (Part(0, first, head), Part(first, tokens - first, tail))
    return parts


def variants(tokens: int, weight_rows: tuple[int, ...], k: int, sms: int) -> list[Variant]:
    """The variants that run a product, any of which may be the fastest."""
    return [v for v in VARIANTS if _estimate_us(v, tokens, weight_rows, k, sms) < float("inf")]


@functools.lru_cache(maxsize=4096)
def _best(tokens: int, weight_rows: tuple[int, ...], k: int, sms: int) -> tuple[Variant, float]:
    times = [(_estimate_us(variant, tokens, weight_rows, k, sms), i) for i, variant in enumerate(VARIANTS)]
    time_us, index = min(times)
    return VARIANTS[index], time_us


def _estimate_us(variant: Variant, tokens: int, weight_rows: tuple[int, ...], k: int, sms: int) -> float:
    tiles = num_tiles_of(variant.tile_tokens, 1, tokens, weight_rows)
    clusters = clusters_of(variant.splits, variant.ctas_per_sm, sms)
    stages = k // STAGE_K
    if stages < variant.splits or (variant.splits > 1 and variant.tile_tokens == 256 and tiles > clusters):
        return float("inf")
    waves = -(-tiles // clusters)
    return LAUNCH_US + waves * (-(-stages // variant.splits) * variant.stage_us + variant.tile_us)


def config_of(
    variant: Variant,
    num_weights: int,
    has_row_scale: bool,
    has_bias: bool,
    out_dtype: str,
    activation: str,
    is_interleaved: bool = True,
) -> Config:
    """The configuration of a variant for the operands of a call."""
    return Config(
        mode="dense",
        tile_tokens=variant.tile_tokens,
        num_weights=num_weights,
        splits=variant.splits,
        has_row_scale=has_row_scale,
        has_bias=has_bias,
        out_dtype=out_dtype,  # type: ignore[arg-type]
        ctas_per_sm=variant.ctas_per_sm,
        k_groups=variant.k_groups,
        activation=activation,  # type: ignore[arg-type]
        is_interleaved=is_interleaved,
    )
