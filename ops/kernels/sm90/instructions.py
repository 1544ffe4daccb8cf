"""PTX instructions that the matrix kernels are made of, as functions of registers and addresses.

Addresses are plain integers: 64 bits in global memory, 32 bits in shared memory. Functions without side effects are
declared so, which lets the compiler schedule and merge them.
"""

from cutlass import Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from dsv4_compile.ops.kernels.sm90.inline_asm import asm, struct_of


def _i32(values, loc, ip):
    return [Int32(value).ir_value(loc=loc, ip=ip) for value in values]


@dsl_user_op
def load_shared_v4(address, *, loc=None, ip=None):
    """Four 32-bit words from a 16-byte aligned shared address."""
    words = asm(
        struct_of("i32", 4),
        _i32([address], loc, ip),
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        loc,
        ip,
        True,
    )
    return tuple(Int32(llvm.extractvalue(T.i32(), words, [i], loc=loc, ip=ip)) for i in range(4))


@dsl_user_op
def load_shared_u16(address, *, loc=None, ip=None):
    """Two bytes from an even shared address, zero-extended."""
    text = "{ .reg .b16 h; ld.shared.b16 h, [$1]; cvt.u32.u16 $0, h; }"
    return Int32(asm(T.i32(), _i32([address], loc, ip), text, "=r,r", loc, ip, True))


@dsl_user_op
def load_shared_f32(address, *, loc=None, ip=None):
    """One fp32 from a shared address."""
    return Float32(asm(T.f32(), _i32([address], loc, ip), "ld.shared.f32 $0, [$1];", "=f,r", loc, ip, True))


@dsl_user_op
def load_cluster_f32(address, rank, *, loc=None, ip=None):
    """One fp32 from the shared memory of another CTA of the cluster, at the address it has there."""
    text = "{ .reg .b32 a; mapa.shared::cluster.u32 a, $1, $2; ld.shared::cluster.f32 $0, [a]; }"
    return Float32(asm(T.f32(), _i32([address, rank], loc, ip), text, "=f,r,r", loc, ip, True))


@dsl_user_op
def store_shared_v4(address, w0, w1, w2, w3, *, loc=None, ip=None):
    """Four 32-bit words to a 16-byte aligned shared address."""
    operands = _i32([address, w0, w1, w2, w3], loc, ip)
    asm(None, operands, "st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", loc, ip, True)


@dsl_user_op
def store_shared_f32(address, value, *, loc=None, ip=None):
    """One fp32 to a shared address."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip), Float32(value).ir_value(loc=loc, ip=ip)]
    asm(None, operands, "st.shared.f32 [$0], $1;", "r,f", loc, ip, True)


@dsl_user_op
def load_global_v4(address, *, loc=None, ip=None):
    """Four 32-bit words from a 16-byte aligned global address, through the L2 only: another kernel just wrote them."""
    words = asm(
        struct_of("i32", 4),
        [Int64(address).ir_value(loc=loc, ip=ip)],
        "ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        loc,
        ip,
        True,
    )
    return tuple(Int32(llvm.extractvalue(T.i32(), words, [i], loc=loc, ip=ip)) for i in range(4))


@dsl_user_op
def load_global_u16(address, *, loc=None, ip=None):
    """Two bytes from an even global address through the L2, zero-extended."""
    text = "{ .reg .b16 h; ld.global.cg.b16 h, [$1]; cvt.u32.u16 $0, h; }"
    return Int32(asm(T.i32(), [Int64(address).ir_value(loc=loc, ip=ip)], text, "=r,l", loc, ip, True))


@dsl_user_op
def load_global_i32(address, *, loc=None, ip=None):
    """One int32 from a global address through the L2."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Int32(asm(T.i32(), operands, "ld.global.cg.b32 $0, [$1];", "=r,l", loc, ip, True))


@dsl_user_op
def load_global_f32(address, *, loc=None, ip=None):
    """One fp32 from a global address through the L2."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Float32(asm(T.f32(), operands, "ld.global.cg.f32 $0, [$1];", "=f,l", loc, ip, True))


@dsl_user_op
def multiply_pair(a, b, dtype, *, loc=None, ip=None):
    """Two products of ``dtype`` (``f16`` or ``bf16``), each rounded to nearest even; subnormals are kept."""
    return Int32(asm(T.i32(), _i32([a, b], loc, ip), f"mul.rn.{dtype}x2 $0, $1, $2;", "=r,r,r", loc, ip))


@dsl_user_op
def permute(a, b, selector, *, loc=None, ip=None):
    """Four bytes picked from the eight of (b, a)."""
    return Int32(asm(T.i32(), _i32([a, b, selector], loc, ip), "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", loc, ip))


@dsl_user_op
def shift_right(a, bits, *, loc=None, ip=None):
    """Logical shift of a 32-bit word."""
    return Int32(asm(T.i32(), _i32([a, bits], loc, ip), "shr.u32 $0, $1, $2;", "=r,r,r", loc, ip))


@dsl_user_op
def multiply_f32(a, b, *, loc=None, ip=None):
    """fp32 product, rounded to nearest even and never contracted."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b)]
    return Float32(asm(T.f32(), operands, "mul.rn.f32 $0, $1, $2;", "=f,f,f", loc, ip))


@dsl_user_op
def add_f32(a, b, *, loc=None, ip=None):
    """fp32 sum, rounded to nearest even and never contracted."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b)]
    return Float32(asm(T.f32(), operands, "add.rn.f32 $0, $1, $2;", "=f,f,f", loc, ip))


@dsl_user_op
def mma(c, a, b, dtype, *, loc=None, ip=None):
    """``c + a b`` of one warp: a 16 x 16, b 16 x 8, of ``dtype`` (``f16`` or ``bf16``); c 16 x 8, fp32."""
    operands = _i32([*a, *b], loc, ip) + [Float32(x).ir_value(loc=loc, ip=ip) for x in c]
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    sums = asm(struct_of("f32", 4), operands, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", loc, ip)
    return tuple(Float32(llvm.extractvalue(T.f32(), sums, [i], loc=loc, ip=ip)) for i in range(4))


@dsl_user_op
def convert_two_e4m3(word, *, loc=None, ip=None):
    """The e4m3 bytes 0 and 1 of a word to f16x2, exactly."""
    text = "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.rn.f16x2.e4m3x2 $0, h; }"
    return Int32(asm(T.i32(), _i32([word], loc, ip), text, "=r,r", loc, ip))


# Powers of two that decoded values lack, per decoded operand: q * s comes out as q * s * 2^-EXPONENT.
EXPONENTS = {"f16": 14, "bf16": 14}


def decode_e2m1x8(word, dtype):
    """Eight e2m1 codes of a word to four registers of two: codes (0, 4), (1, 5), (2, 6), (3, 7).

    The sign goes to the sign bit, the three bits of the magnitude to the lowest exponent bits and the highest mantissa
    bit, where 0.5 is a subnormal: so every code is exact, times 2^-14 in ``f16`` and 2^-126 in ``bf16``.
    """
    return _decode_f16(word) if dtype == "f16" else _decode_bf16(word)


def _decode_f16(word):
    """Only the upper byte of an f16 is used: the codes of a word become bytes, then the upper bytes of halves."""
    signs, magnitudes = Int32(-0x7F7F7F80), Int32(0x0E0E0E0E)
    even = ((word << 4) & signs) | ((word << 1) & magnitudes)  # codes 0 2 4 6
    odd = (word & signs) | (shift_right(word, 3) & magnitudes)  # codes 1 3 5 7
    upper, spread, zero = Int32(-0x00FF0100), Int32(0x2404), Int32(0)
    return permute(even, zero, spread), permute(odd, zero, spread), even & upper, odd & upper


def _decode_bf16(word):
    signs, magnitudes = Int32(-0x7FFF8000), Int32(0x01C001C0)
    return tuple(((word << (12 - 4 * i)) & signs) | (_shifted(word, 6 - 4 * i) & magnitudes) for i in range(4))


def _shifted(word, left):
    return word << left if left >= 0 else shift_right(word, -left)


def decode_two_scales(word, dtype):
    """The e4m3 bytes 0 and 1 of a word, each twice in a register: the factors for :func:`decode_e2m1x8`; NaN stays.

    ``f16``: the scale itself. ``bf16``: the scale times 2^112; a byte shifted left by four is the scale times 2^-120 as
    bf16, subnormal scales included.
    """
    if dtype == "f16":
        both = convert_two_e4m3(word)
    else:
        spread = permute(word, Int32(0), Int32(0x4140))  # byte 0 in the low half, byte 1 in the high half
        nan = ((spread + Int32(0x00010001)) & Int32(0x00800080)) * Int32(0xFF)  # 0x7F80 where the byte is 0x7F
        factor = Int32(0x79807980)  # 2^116 twice
        both = multiply_pair(multiply_pair((spread << 4) | nan, factor, dtype), factor, dtype)
    return permute(both, both, Int32(0x1010)), permute(both, both, Int32(0x3232))
