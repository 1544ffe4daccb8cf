"""Integer division by a number that is known when a kernel is launched."""

from __future__ import annotations

LIMIT = 1 << 31


def magic(divisor: int) -> tuple[int, int]:
    """``(multiplier, shift)`` with ``n // divisor == (2 n * multiplier >> 32) >> shift`` for 0 <= n < 2^31.

    Source: Granlund and Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994, theorem 4.2:
    ``2^(31 + l) <= multiplier * divisor <= 2^(31 + l) + 2^l`` with ``l = ceil(log2 divisor)`` suffices for 31 bits.
    """
    shift = (divisor - 1).bit_length()
    return -(-(1 << (31 + shift)) // divisor), shift
