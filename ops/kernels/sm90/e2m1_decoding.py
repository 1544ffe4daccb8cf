"""How words of e2m1 codes become pairs of 16-bit values: the integer steps, for kernels and for a test without a GPU.

A code is a sign, two bits of exponent and one of mantissa. In f16 the three bits of its magnitude go to bits 11 to 9,
in bf16 to bits 8 to 6: the lowest exponent bits and the highest mantissa bit, where 0.5 is a subnormal. So every code
is exact, times 2^-14 in f16 and 2^-126 in bf16. The sign has to move further than the magnitude. In f16 a carry takes
it there: with the code in its place, ones are added from the sign's bit to the bit below the half's highest; a set sign
carries through them to the highest bit, and what is left in between is masked away. A multiplication by a power of two
places the code and adds the ones in one instruction, on another pipe than the masks. In bf16 a permutation of bytes
repeats the sign in the bits above a code.

The functions take a ``machine`` that has the instructions: ``instructions.Decoder`` in kernels, NumPy in tests.
"""

MINUS_ONE = 0xFFFFFFFF
SIGN = 0x80008000  # of both halves
F16_MAGNITUDE, F16_CARRY, F16_LOWEST = 0x0E000E00, 0x70007000, 9
BF16_SCALE_FACTOR = 0x77807780  # 2^112 twice: a bf16 code times a scale comes out as in f16, times 2^-14
BF16_MAGNITUDE, BF16_LOWEST = 0x01C001C0, 6


def decode_f16(machine, word):
    """Eight codes to four registers of f16: codes (0, 4), (1, 5), (2, 6), (3, 7)."""
    # Four zero bits above each code: three take the carry. What is below a code stays below it, and no mask keeps it.
    even = machine.mask(word, 0x0F0F0F0F)
    odd = machine.subtract(word, even)
    placed = (
        machine.multiply_add(even, 1 << F16_LOWEST, F16_CARRY),
        machine.multiply_add(odd, 1 << (F16_LOWEST - 4), F16_CARRY),
        machine.multiply_add(even, 1 << (F16_LOWEST - 8), F16_CARRY),
        machine.shift_right_add(odd, 12 - F16_LOWEST, F16_CARRY),
    )
    return tuple(machine.mask(pair, SIGN | F16_MAGNITUDE) for pair in placed)


def decode_bf16(machine, word):
    """Eight codes to four registers of bf16, as they lie: codes (0, 1), (2, 3), (4, 5), (6, 7)."""
    lower = machine.shift_left(word, 4)
    pairs = [machine.permute(lower, word, byte_selector(byte)) for byte in range(4)]
    return tuple(_bf16_of_bytes(machine, pair) for pair in pairs)


def decode_byte_of(machine, word, selector):
    """The two codes of a byte of a word, by its :func:`byte_selector`, to a register of bf16, the low nibble's low."""
    return _bf16_of_bytes(machine, machine.permute(machine.shift_left(word, 4), word, selector))


def byte_selector(byte):
    """The selector that picks the two codes of a byte of a word, 0 to 3, out of the word moved left by four and itself.

    Each code becomes the upper nibble of a byte with its sign in all bits above it, the low nibble's in the lower half.
    """
    return byte * 0x1111 + 0xC480  # from the lowest: the moved word's byte, its sign eight times, and those of the word


def _bf16_of_bytes(machine, pair):
    """The upper nibble of each half's low byte to bf16, its sign in all bits above."""
    return machine.mask(machine.shift_left(pair, BF16_LOWEST - 4), SIGN | BF16_MAGNITUDE)


DECODE = {"f16": decode_f16, "bf16": decode_bf16}
# Those that decoding multiplies by.
MULTIPLIERS = {"f16": (1 << 9, 1 << 5, 1 << 1, MINUS_ONE), "bf16": ()}
