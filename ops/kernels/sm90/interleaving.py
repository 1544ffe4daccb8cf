"""Words of an activation in the order of K of ``wgmma_w4``: see ``ops/dispatch/interleave.py``.

A lane has a word of eight codes, or eight values, as four pairs of 16 bits. Sixteen lanes have 128 of K, lane
``4 t + w`` word w of t.
"""

from cutlass import Int32, Uint32, cute

from dsv4_compile.ops.kernels.sm90.instructions import Decoder, convert_two_e4m3, multiply_pair, repeat_half
from dsv4_compile.ops.kernels.sm90.numerics import select

F16_EXPONENT = 0x74007400  # 2^14 twice: what decoded codes lack


def expanded_pairs(word, scale_byte, one):
    """The pairs of eight codes times their block scale, fp16; ``one`` is 1, see :class:`Decoder`."""
    scale = repeat_half(convert_two_e4m3(Int32(scale_byte)), 0)
    exponent = Int32(F16_EXPONENT)
    pairs = Decoder("f16", one).decode(Int32(word))
    return [Uint32(multiply_pair(multiply_pair(pair, exponent, "f16"), scale, "f16")) for pair in pairs]


def exchange(pairs):
    """Transposes the pairs of the lanes t of a word w: lane ``4 t + w`` gets pair t of each, 16 bytes of the output.

    All lanes of a warp must take part.
    """
    lane = cute.arch.lane_idx()
    for distance, bit in ((4, 1), (8, 2)):
        is_upper = (lane & distance) != 0
        result = list(pairs)
        for i in range(4):
            if i & bit == 0:
                sent = select(is_upper, pairs[i], pairs[i + bit])
                received = Uint32(cute.arch.shuffle_sync_bfly(sent, distance))
                result[i] = select(is_upper, received, pairs[i])
                result[i + bit] = select(is_upper, pairs[i + bit], received)
        pairs = result
    return pairs


def place_of(vector):
    """Where the 16 bytes that lane ``vector % 16`` holds after the exchange go, in units of 16 bytes."""
    return (vector & ~15) | ((vector & 3) << 2) | ((vector >> 2) & 3)
