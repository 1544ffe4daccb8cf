"""Which variants of ``sm90.wgmma_w4`` a dense product runs on, by times measured a stage of K."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from dsv4_compile.ops.dispatch.wgmma_w4 import STAGE_K, Config, clusters_of, num_tiles_of

Activation = Literal["f16", "bf16"]
LAUNCH_US = 2.0  # from one kernel's end to the next one's first product, with its last store
# More tokens and a larger weight than these are faster here than on the decode kernel (measured at 24 and 32 tokens:
# weights of 2^25 elements and more are, one of 2^24 is not).
FEW_TOKENS, FEW_ELEMENTS = 16, 24 << 20
INTERLEAVED_TOKENS = 64  # of a bf16 activation, up to which that is worth a launch; a packed one is decoded anyway


@dataclass(frozen=True)
class Variant:
    """A variant and what was measured of it.

    Attributes:
        tile_tokens, k_groups, ctas_per_sm, splits: see :class:`Config`.
        f16_us, bf16_us: with activations of that dtype. First for 256 of K of a tile, the tiles of a multiprocessor's
            other CTA included; then for what is left of a tile: first loads, sums of splits, stores.
    """

    tile_tokens: int
    k_groups: int
    ctas_per_sm: int
    splits: int
    f16_us: tuple[float, float]
    bf16_us: tuple[float, float]

    @property
    def name(self) -> str:
        """Name of the choices that a shape leaves open."""
        ctas = self.ctas_per_sm
        return f"wgmma {self.tile_tokens} tokens, {self.k_groups} K groups, {ctas} CTAs, {self.splits} splits"


# H100, 2026-11-26, fitted to benchmarks/sweep_wgmma.py at 24 to 2048 tokens.
VARIANTS = (
    Variant(32, 1, 2, 1, (1.95, 0.4), (2.05, 0.4)),
    Variant(32, 1, 2, 4, (1.95, 1.0), (2.05, 1.5)),
    Variant(32, 2, 1, 2, (1.11, 1.6), (1.13, 2.4)),
    Variant(64, 2, 1, 1, (0.97, 1.95), (1.10, 1.95)),
    Variant(64, 2, 1, 2, (1.15, 2.6), (1.20, 2.25)),
    Variant(64, 2, 1, 3, (1.03, 3.0), (1.06, 3.7)),
    Variant(64, 1, 2, 1, (2.00, 1.15), (2.30, 1.2)),
    Variant(64, 1, 2, 4, (2.25, 0.6), (2.60, 0.55)),
    Variant(128, 1, 1, 1, (1.37, 1.8), (1.76, 1.2)),
    Variant(128, 2, 1, 1, (1.36, 2.6), (1.68, 2.0)),
    Variant(128, 1, 1, 2, (1.44, 3.3), (1.74, 3.2)),
    Variant(128, 2, 1, 2, (1.45, 3.4), (1.74, 2.8)),
    Variant(128, 1, 1, 3, (1.49, 2.8), (1.75, 3.9)),
    Variant(256, 1, 1, 1, (2.63, 2.0), (2.60, 2.0)),
    Variant(256, 1, 1, 2, (2.64, 4.1), (2.68, 3.5)),
)


@dataclass(frozen=True)
class Part:
    """Consecutive tokens that one launch takes."""

    first: int
    tokens: int
    variant: Variant


@functools.lru_cache(maxsize=4096)
def plan(tokens: int, weight_rows: tuple[int, ...], k: int, sms: int, activation: Activation) -> tuple[Part, ...]:
    """The launches of a product: one, or a second for the tokens that would leave most of a last wave idle.

    Args:
        tokens: M.
        weight_rows: rows of each weight.
        k: K.
        sms: multiprocessors.
        activation: dtype of the activation, see :class:`Config`.
    """
    variant, best_us = _best(tokens, weight_rows, k, sms, activation)
    parts: tuple[Part, ...] = (Part(0, tokens, variant),)
    tile = VARIANTS[-1].tile_tokens
    for first in range(tile, tokens, tile):
        head, head_us = _best(first, weight_rows, k, sms, activation)
        tail, tail_us = _best(tokens - first, weight_rows, k, sms, activation)
        if head_us + tail_us < best_us:
            best_us = head_us + tail_us
            parts = (Part(0, first, head), Part(first, tokens - first, tail))
    return parts


def variants(tokens: int, weight_rows: tuple[int, ...], k: int, sms: int, activation: Activation) -> list[Variant]:
    """The variants that run a product, any of which may be the fastest."""
    return [v for v in VARIANTS if _estimate_us(v, tokens, weight_rows, k, sms, activation) < float("inf")]


@functools.lru_cache(maxsize=4096)
def _best(tokens: int, weight_rows: tuple[int, ...], k: int, sms: int, activation: Activation) -> tuple[Variant, float]:
    times = [(_estimate_us(variant, tokens, weight_rows, k, sms, activation), i) for i, variant in enumerate(VARIANTS)]
    time_us, index = min(times)
    return VARIANTS[index], time_us


def _estimate_us(
    variant: Variant, tokens: int, weight_rows: tuple[int, ...], k: int, sms: int, activation: Activation
) -> float:
    tiles = num_tiles_of(variant.tile_tokens, tokens, weight_rows)
    clusters = clusters_of(variant.splits, variant.ctas_per_sm, sms)
    stages = k // STAGE_K
    # Clusters that share K wait for each other at the end of every tile: never faster in a second wave (measured).
    if stages < variant.splits or (variant.splits > 1 and tiles > clusters):
        return float("inf")
    waves = -(-tiles // clusters)
    stage_us, tile_us = variant.f16_us if activation == "f16" else variant.bf16_us
    return LAUNCH_US + waves * (-(-stages // variant.splits) * stage_us + tile_us)


def config_of(
    variant: Variant,
    num_weights: int,
    has_row_scale: bool,
    has_bias: bool,
    out_dtype: str,
    activation: Activation,
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
        activation=activation,
        is_interleaved=is_interleaved,
    )
