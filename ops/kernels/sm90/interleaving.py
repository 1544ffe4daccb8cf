"""Words of an activation in the order of K of ``wgmma_w4``: see ``ops/dispatch/interleave.py``.

A piece is a quarter of 128 values of K: the words of the same w of the four lanes t. It becomes 64 bytes in a row.
"""

import cutlass
from cutlass import Int32, Uint32, cute

from dsv4_compile.ops.kernels.sm90 import numerics
from dsv4_compile.ops.kernels.sm90.instructions import Decoder, convert_two_e4m3, multiply_pair, permute, repeat_half

F16_EXPONENT = 0x74007400  # 2^14 twice: what decoded codes lack


@cute.jit
def expand_piece(codes_at, scales_at, piece, out_at, one):
    """Codes and block scales of a piece, numbered along the rows of a packed matrix, to fp16 at an address.

    Args:
        codes_at, scales_at: addresses of the first codes and block scales of the row.
        piece: number of the piece in the row.
        out_at: address of its 64 bytes.
        one: 1, see :class:`Decoder`.
    """
    chunk, word = piece >> 2, piece & 3
    first = codes_at + chunk * 64 + word * 4
    first_scale = scales_at + chunk * 8 + (word >> 1)
    words = cute.make_rmem_tensor(4, Uint32)
    scales = cute.make_rmem_tensor(4, Uint32)
    for t in cutlass.range_constexpr(4):  # all loads first
        words[t] = numerics.load_words(first + 16 * t, 1)[0]
        scales[t] = numerics.load_byte(first_scale + 2 * t)
    decoder = Decoder("f16", one)
    lanes = []
    for t in cutlass.range_constexpr(4):
        scale = repeat_half(convert_two_e4m3(Int32(scales[t])), 0)
        pairs = decoder.decode(Int32(words[t]))
        lanes.append([multiply_pair(multiply_pair(pair, Int32(F16_EXPONENT), "f16"), scale, "f16") for pair in pairs])
    store(out_at, lanes)


@cute.jit
def copy_piece(row_at, piece, out_at):
    """As :func:`expand_piece`, of bf16 values."""
    first = row_at + (piece >> 2) * 256 + (piece & 3) * 16
    words = cute.make_rmem_tensor((4, 4), Uint32)
    for t in cutlass.range_constexpr(4):
        loaded = numerics.load_words(first + 64 * t, 4)
        for i in cutlass.range_constexpr(4):
            words[i, t] = loaded[i]
    low, high = Int32(0x5410), Int32(0x7632)
    lanes = []
    for t in cutlass.range_constexpr(4):
        w = [Int32(words[i, t]) for i in range(4)]
        lanes.append([permute(w[0], w[2], low), permute(w[0], w[2], high), permute(w[1], w[3], low),
                      permute(w[1], w[3], high)])  # fmt: skip
    store(out_at, lanes)


def store(out_at, lanes):
    """Pairs i of the lanes t side by side, 16 bytes for each i."""
    for i in range(4):
        numerics.store_words(out_at + 16 * i, [Uint32(lanes[t][i]) for t in range(4)])
