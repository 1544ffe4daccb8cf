"""Packs one weight to NVFP4, a cache-sized part at a time, with nearest or searched block scales; measures the error.

Without a search, codes and scales are bitwise those of ``nvfp4.quantize_weight``, the reference: this is the same
arithmetic in fewer and smaller passes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.decode import Packed

_T = TypeVar("_T")
_R = TypeVar("_R")

SEARCHES = ("none", "six_four", "wide")

# ``wide`` tries the nearest block scale and its neighbours in E4M3, a sixteenth to an eighth apart: block maxima of
# about 7.5 down to 3.5.
_WIDE_STEPS = (-1, -2, 1, 2, 3, 4, 5, 6)
_LARGEST_SCALE_BYTE = 0x7E  # 448; the next one is NaN

_ELEMENTS_AT_ONCE = 1 << 17  # half a MiB in fp32: measured fastest, the few buffers stay in the L2
_EXPONENT_MASK = 0x7F800000
_ONE_BITS = 0x3F800000
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23
_ROUNDING_EXPONENT = 22  # p * 2^22 + m, with p <= m < 2p, has an ulp of p/2: E2M1's step above p


@dataclass(frozen=True)
class Packing:
    """A packed weight and its error.

    Attributes:
        packed: codes uint8 [N, K/2], block scales e4m3 [N, K/16], global scale fp32 0-d.
        signal: sum of the squared elements.
        noise: sum of the squared errors.
        nearest_noise: what ``noise`` is without a search.
    """

    packed: Packed
    signal: float
    noise: float
    nearest_noise: float


def sqnr_db(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; inf where there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


class Workers:
    """Threads that share the parts of a weight, each with one thread of torch's own; a context manager.

    torch's own threads meet after every operation. Where other processes want the cores too, the one that waits for a
    core holds up all of them: measured 30 times slower than these, which meet once a weight.

    Args:
        count: how many; by default as many as torch would use.
    """

    def __init__(self, count: int | None = None) -> None:
        self._before = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count or self._before, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
        """The results, in order; the first exception is raised."""
        return list(self._pool.map(function, items))

    def __enter__(self) -> Workers:
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._before)


def finite_amax(weight: Tensor, workers: Workers | None = None) -> Tensor:
    """Largest magnitude of a weight, fp32 0-d.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    if not weight.numel():
        return torch.zeros(())
    extremes = _map(workers, lambda part: torch.stack(torch.aminmax(part)), weight.split(_rows_at_once(weight)))
    amax = torch.stack(extremes).abs().amax().to(torch.float32)
    if not bool(amax.isfinite()):
        raise ValueError("weight must be finite, got NaN or Inf elements")
    return amax


def pack_weight(weight: Tensor, amax: Tensor, search: str = "none", workers: Workers | None = None) -> Packing:
    """Packs a weight with ``max(amax, 1e-8) / 2688`` as its global scale.

    Args:
        weight: bf16, fp16 or fp32 [N, K] on the CPU, finite, K % 16 == 0.
        amax: fp32 0-d, at least the weight's own :func:`finite_amax`; larger where two weights share a global scale.
        search: how each block scale is chosen. ``none``: the nearest one to ``amax_block / (6 gs)``, bitwise as
            ``nvfp4.quantize_weight``. ``six_four``: that, or the nearest to ``amax_block / (4 gs)``, where its squared
            error is smaller. ``wide``: the smallest squared error among the nearest and eight E4M3 values around it.
        workers: threads to share the work; the result does not depend on them.

    Returns:
        A :class:`Packing`.

    Source: the choice between 6 and 4 is that of "Four Over Six" (Cook et al., 2025), here with the global scale as is.
    """
    n, k = weight.shape
    global_scale = nvfp4.global_scale_from_amax(amax, "tensor")
    codes = torch.empty((n, k // 2), dtype=torch.uint8)
    block_scales = torch.empty((n, k // nvfp4.BLOCK_SIZE), dtype=torch.float8_e4m3fn)

    def pack(start: int) -> tuple[float, float, float]:
        part = slice(start, min(n, start + rows))
        work = _buffers(part.stop - start, k)
        work.x.copy_(weight[part])
        in_gs = torch.mul(work.x, 1.0 / global_scale, out=work.q)  # at most 2688, whatever the weight's magnitude
        signal = float(torch.mul(in_gs, in_gs, out=work.scratch).sum())
        nearest, best = _pack_part(work, global_scale, search, block_scales[part])
        _pack_pairs(work.codes, codes[part])
        return signal, best, nearest

    rows = _rows_at_once(weight)
    sums = [sum(column) for column in zip(*_map(workers, pack, range(0, n, rows)), strict=True)]
    signal, noise, nearest_noise = (value * float(global_scale) ** 2 for value in sums or (0.0, 0.0, 0.0))
    return Packing(Packed(codes, block_scales, global_scale), signal, noise, nearest_noise)


def _map(workers: Workers | None, function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    return [function(item) for item in items] if workers is None else workers.map(function, items)


def _rows_at_once(weight: Tensor) -> int:
    return max(1, _ELEMENTS_AT_ONCE // max(1, weight.shape[-1]))


class _Buffers(NamedTuple):
    """What a part needs, each [rows, K]: fp32, fp32, fp32, int32, and uint8 for the rest."""

    x: Tensor
    q: Tensor
    scratch: Tensor
    bits: Tensor
    codes: Tensor
    other_codes: Tensor
    steps: Tensor
    twice_log2: Tensor


_reused = threading.local()


def _buffers(rows: int, k: int) -> _Buffers:
    """The calling thread's own, allocated when a part is larger than all before."""
    if getattr(_reused, "elements", 0) < rows * k:
        _reused.elements = max(rows * k, _ELEMENTS_AT_ONCE)
        dtypes = (*(torch.float32,) * 3, torch.int32, *(torch.uint8,) * 4)
        _reused.flat = [torch.empty(_reused.elements, dtype=dtype) for dtype in dtypes]
    return _Buffers(*(flat[: rows * k].view(rows, k) for flat in _reused.flat))


def _pack_part(work: _Buffers, global_scale: Tensor, search: str, block_scales: Tensor) -> tuple[float, float]:
    """Fills ``work.codes`` and ``block_scales``; returns squared errors / gs^2, of nearest and chosen scales."""
    block_amax = _block_amax(torch.abs(work.x, out=work.scratch))
    block_scales.copy_((block_amax / (global_scale * nvfp4.E2M1_MAX)).clamp_(max=nvfp4.E4M3_MAX))
    errors = _encode(work, block_scales.to(torch.float32), global_scale, work.codes)
    nearest = _total(errors)
    for scales in _candidates(search, block_amax, block_scales, global_scale):
        other = _encode(work, scales.to(torch.float32), global_scale, work.other_codes)
        is_better = other < errors
        torch.where(is_better.unsqueeze(-1), _blocks(work.other_codes), _blocks(work.codes), out=_blocks(work.codes))
        chosen = torch.where(is_better, scales.view(torch.uint8), block_scales.view(torch.uint8))
        block_scales.view(torch.uint8).copy_(chosen)
        errors = torch.where(is_better, other, errors)
    return nearest, _total(errors) if search != "none" else nearest


def _candidates(search: str, block_amax: Tensor, nearest: Tensor, global_scale: Tensor) -> list[Tensor]:
    """Block scales to try besides the nearest ones."""
    if search == "none":
        return []
    if search == "six_four":
        return [(block_amax / (global_scale * 4.0)).clamp_(max=nvfp4.E4M3_MAX).to(torch.float8_e4m3fn)]
    as_bytes = nearest.view(torch.uint8).to(torch.int16)
    # All-zero blocks keep scale 0: a zero scale for a block that is not zero is tried only where it is the nearest.
    floor = torch.where(block_amax > 0, 1, 0).to(torch.int16)
    return [
        torch.maximum(as_bytes + step, floor).clamp_(max=_LARGEST_SCALE_BYTE).to(torch.uint8).view(torch.float8_e4m3fn)
        for step in _WIDE_STEPS
    ]


def _encode(work: _Buffers, scale: Tensor, global_scale: Tensor, codes: Tensor) -> Tensor:
    """``e2m1(x / (scale * global_scale))`` into ``codes`` (uint8, 0..15); returns each block's squared error / gs^2.

    With ``m = min(|q|, 6)``, ``p = max(1, 2^floor(log2 m))`` and ``C = p 2^22``, the fp32 sum ``m + C`` rounds m to a
    multiple of ``p/2``, ties to even: E2M1's own step and, as its codes count these steps, its own ties. The bits of
    the sum less those of C are the number of steps, and ``2 log2 p`` more is the magnitude code.
    """
    inverse = torch.where(scale > 0, 1.0 / (scale * global_scale), 0.0)
    torch.mul(_blocks(work.x), inverse.unsqueeze(-1), out=_blocks(work.q))
    codes.copy_(torch.bitwise_right_shift(work.q.view(torch.int32), 28, out=work.bits)).bitwise_and_(8)  # the sign
    magnitude = work.q.abs_()
    total = torch.clamp(magnitude, max=nvfp4.E2M1_MAX, out=work.scratch)  # m, and m + C from here on
    rounder = torch.bitwise_and(total.view(torch.int32), _EXPONENT_MASK, out=work.bits).clamp_(min=_ONE_BITS)
    rounder.add_(_ROUNDING_EXPONENT << _MANTISSA_BITS)
    total.add_(rounder.view(torch.float32))
    steps = work.steps.copy_(total.view(torch.int32))  # the lowest byte, which C leaves to the steps
    error = magnitude.sub_(total.sub_(rounder.view(torch.float32)))
    squares = torch.linalg.vector_norm(_blocks(error), dim=-1).mul_(scale).square_()
    twice_log2 = work.twice_log2.copy_(rounder.bitwise_right_shift_(_MANTISSA_BITS - 1))
    codes.bitwise_or_(steps.add_(twice_log2).sub_(2 * (_EXPONENT_BIAS + _ROUNDING_EXPONENT) % 256))
    is_zero = scale == 0
    if bool(is_zero.any()):
        _blocks(codes).masked_fill_(is_zero.unsqueeze(-1), 0)
        lost = torch.linalg.vector_norm(_blocks(work.x * (1.0 / global_scale)), dim=-1).square_()
        squares = torch.where(is_zero, lost, squares)
    return squares


def _block_amax(magnitude: Tensor) -> Tensor:
    """Maximum of each block: twice half against half, then column by column; amax over 16 takes twice as long."""
    blocks = _blocks(magnitude)
    for half in (8, 4):
        blocks = torch.maximum(blocks[..., :half], blocks[..., half:])
    first, second, third, fourth = blocks.unbind(-1)
    return torch.maximum(torch.maximum(first, second), torch.maximum(third, fourth))


def _pack_pairs(codes: Tensor, packed: Tensor) -> None:
    """Codes [n, K] to bytes [n, K/2]: a pair read as one little-endian int16, the odd code 8 bits up."""
    pairs = codes.view(torch.int16)
    packed.copy_(pairs | (pairs >> 4))


def _blocks(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, nvfp4.BLOCK_SIZE)


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
