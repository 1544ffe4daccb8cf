"""Blocks of 16 elements in the registers of one thread: loaded, reduced, encoded to NVFP4.

A block is a list of words as they lie in memory: 8 of bf16 or fp16 pairs, or 16 of fp32.
"""

import cutlass
from cutlass import Float32, Int64, Uint32, cute

from dsv4_compile.ops.kernels.sm90 import numerics as nm

AMAX_FLOOR = 1e-8
GLOBAL_SCALE_DIVISOR = 2688.0
E2M1_MAX = 6.0
INF_BITS = 0x7F800000
NAN_SCALE = 0x7F


def words_of(dtype: str) -> int:
    """Words of a block."""
    return 16 if dtype == "float32" else 8


def bytes_of(dtype: str) -> int:
    """Bytes of a block."""
    return 4 * words_of(dtype)


def load(address, dtype: str):
    """The words of a block, 16 bytes at a time."""
    return [word for i in range(words_of(dtype) // 4) for word in nm.load_words(address + 16 * i, 4)]


def store(address, words):
    """Words, 16 bytes at a time."""
    for i in range(0, len(words), 4):
        nm.store_words(address + 4 * i, words[i : i + 4])


def unpack(words, dtype: str):
    """The 16 fp32 values of a block."""
    if dtype == "float32":
        return [nm.from_bits(word) for word in words]
    unpack_pair = nm.unpack_bf16x2 if dtype == "bfloat16" else nm.unpack_f16x2
    return [value for word in words for value in unpack_pair(word)]


def pack(values, dtype: str):
    """16 fp32 values rounded to a block of ``dtype``."""
    if dtype == "float32":
        return [nm.bits(value) for value in values]
    pack_pair = nm.pack_bf16x2 if dtype == "bfloat16" else nm.pack_f16x2
    return [pack_pair(values[i], values[i + 1]) for i in range(0, 16, 2)]


def _tree(function, values):
    while len(values) > 1:
        pairs = [function(values[i], values[i + 1]) for i in range(0, len(values) - 1, 2)]
        values = pairs + values[len(values) // 2 * 2 :]
    return values[0]


def amax(words, dtype: str):
    """max|x| of a block as fp32; NaN or Inf where the block holds one, so its bits then reach INF_BITS."""
    if dtype == "float32":
        return _tree(nm.larger_or_nan, [nm.absolute(nm.from_bits(word)) for word in words])
    # Magnitudes of one sign are ordered as their bits are: two a word, as integers.
    pair = _tree(nm.larger_u16x2, [word & Uint32(0x7FFF7FFF) for word in words])
    largest = nm.larger_u32(pair & Uint32(0xFFFF), pair >> 16)
    return nm.from_bits(largest << 16) if dtype == "bfloat16" else nm.unpack_f16x2(largest)[0]


@cute.jit
def finite_amax(block: cute.Tensor, first: cutlass.Constexpr, dtype: cutlass.Constexpr) -> Uint32:
    """Bits of the largest finite |x| of the block whose words start at ``first`` of a register tensor."""
    words = [block[first + i] for i in range(words_of(dtype))]
    largest = nm.bits(amax(words, dtype))
    if largest >= Uint32(INF_BITS):
        largest = Uint32(0)
        for value in unpack(words, dtype):
            magnitude = nm.bits(nm.absolute(value))
            if magnitude < Uint32(INF_BITS):
                largest = nm.larger_u32(largest, magnitude)
    return largest


@cute.jit
def global_scale(amax_bits: Uint32, is_pow2: cutlass.Int32) -> Float32:
    """``max(amax, 1e-8) / 2688``, rounded up to a power of two on demand."""
    scale = nm.divide(nm.larger(nm.from_bits(amax_bits), AMAX_FLOOR), GLOBAL_SCALE_DIVISOR)
    if is_pow2 != 0:
        scale = nm.from_bits((nm.bits(scale) + Uint32(0x007FFFFF)) & Uint32(0xFF800000))
    return scale


def _signs(words, values, group: int, dtype: str):
    """A word whose bytes carry the signs of elements 4 group to 4 group + 3 in their top bits."""
    if dtype != "float32":
        return nm.permute(words[2 * group], words[2 * group + 1], 0x7531)
    tops = [words[4 * group + i] for i in range(4)]
    return nm.permute(nm.permute(tops[0], tops[1], 0x0073), nm.permute(tops[2], tops[3], 0x0073), 0x5410)


def encode(words, dtype: str, inverse):
    """The codes of a block, as two words; ``inverse`` is finite and positive.

    The magnitude a is rounded by an addition whose unit in the last place is the spacing of E2M1 around a: 0.5 below 2,
    then 1, then 2. With e = max(a, 1) cut to a power of two, 2^k, t = e 2^22 + a has that unit, ties go to the even
    code, and its bits are ``(149 + k) << 23 | m`` with m + 2 k the code. ``(t >> 22) + t`` holds 298 + code in its low
    byte. a stays below 16 (a subnormal block scale can be a third too small): code 8 is the saturated 7.
    """
    values = unpack(words, dtype)
    halves = []
    for group in range(4):
        sums = []
        for value in values[4 * group : 4 * group + 4]:
            a = nm.multiply(nm.absolute(value), inverse)
            power = nm.from_bits(nm.bits(nm.larger(a, 1.0)) & Uint32(INF_BITS))
            t = nm.bits(nm.fused_multiply_add(power, 2.0**22, a))
            sums.append((t >> 22) + t)
        pairs = [nm.permute(sums[i], sums[i + 1], 0x0040) for i in (0, 2)]
        codes = nm.permute(pairs[0], pairs[1], 0x5410) - Uint32(0x2A2A2A2A)
        codes -= (codes >> 3) & Uint32(0x01010101)
        codes |= (_signs(words, values, group, dtype) >> 4) & Uint32(0x08080808)
        halves.append(codes + (codes >> 4))  # bytes 0 and 2 hold two codes each
    return [nm.permute(halves[i], halves[i + 1], 0x6420) for i in (0, 2)]


def quantize(words, dtype: str, scale, six_scales):
    """Steps 3 to 5 of the rounding order: two words of codes and the byte of the block scale.

    Args:
        words: the block.
        dtype: of the block.
        scale: the global scale.
        six_scales: six times that, rounded.
    """
    largest = amax(words, dtype)
    is_finite = nm.bits(largest) < Uint32(INF_BITS)
    byte = nm.e4m3_byte(nm.divide(largest, six_scales))
    byte = nm.select(is_finite, byte, NAN_SCALE)
    is_used = is_finite & (byte > Uint32(0))
    inverse = nm.reciprocal(nm.multiply(nm.e4m3_value(byte), scale))
    codes = [nm.select(is_used, word, 0) for word in encode(words, dtype, inverse)]
    return codes, byte


def write(codes_at, scales_at, block, codes, byte):
    """Stores the codes and the scale of the block with that number in the whole tensor."""
    nm.store_words(codes_at + Int64(block) * 8, codes)
    nm.store_byte(scales_at + Int64(block), byte)
