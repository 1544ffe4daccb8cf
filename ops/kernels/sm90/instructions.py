"""PTX instructions that the matrix kernels are made of, as functions of registers and addresses.

Addresses are plain integers: 64 bits in global memory, 32 bits in shared memory. Functions without side effects are
declared so, which lets the compiler schedule and merge them.
"""

from cutlass import Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from dsv4_compile.ops.kernels.sm90 import e2m1_decoding
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
def load_shared_v2(address, *, loc=None, ip=None):
    """Two 32-bit words from an 8-byte aligned shared address."""
    text = "ld.shared.v2.b32 {$0, $1}, [$2];"
    words = asm(struct_of("i32", 2), _i32([address], loc, ip), text, "=r,=r,r", loc, ip, True)
    return tuple(Int32(llvm.extractvalue(T.i32(), words, [i], loc=loc, ip=ip)) for i in range(2))


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
def copy_to_shared(address, source, num_bytes, barrier, *, loc=None, ip=None):
    """Begins a copy from global memory, all in units of 16 bytes; an mbarrier counts the bytes that have arrived."""
    operands = [
        Int32(address).ir_value(loc=loc, ip=ip),
        Int64(source).ir_value(loc=loc, ip=ip),
        *_i32([num_bytes, barrier], loc, ip),
    ]
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    asm(None, operands, text, "r,l,r,r", loc, ip, True)


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
def shift_left(a, bits, *, loc=None, ip=None):
    """Shift of a 32-bit word."""
    return Int32(asm(T.i32(), _i32([a, bits], loc, ip), "shl.b32 $0, $1, $2;", "=r,r,r", loc, ip))


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


class Decoder:
    """Decodes e2m1 codes to ``f16`` or ``bf16``: :mod:`e2m1_decoding` with the device's instructions.

    A shift by a constant and an addition become one instruction of the pipe that masks need. To stay multiplications,
    their multipliers must not be constants: they are made from a one that only the launch knows.
    """

    def __init__(self, dtype, one):
        """``one`` is 1, for example an extent of the grid."""
        self.dtype = dtype
        self.multipliers = {
            multiplier: Int32(one) * _signed(multiplier) for multiplier in e2m1_decoding.MULTIPLIERS[dtype]
        }

    def decode(self, word):
        """Eight codes of a word to four registers: (0, 4) (1, 5) (2, 6) (3, 7) in ``f16``, in ``bf16`` as they lie.

        Every code is exact, times 2^-14 in ``f16`` and 2^-126 in ``bf16``.
        """
        return e2m1_decoding.DECODE[self.dtype](self, word)

    def mask(self, word, bits):
        """The bits of a word that are set in a constant."""
        return word & _signed(bits)

    def multiply_add(self, word, multiplier, addend):
        """The low word of ``word * multiplier``, plus ``addend``."""
        return _multiply_add(word, self.multipliers[multiplier], addend)

    def subtract(self, a, b):
        """``a - b``, by a multiplication too."""
        return _multiply_subtract(b, self.multipliers[e2m1_decoding.MINUS_ONE], a)

    def permute(self, a, b, selector):
        """Four bytes picked from the eight of (b, a); the upper half of the selector's nibbles: their signs."""
        return permute(a, b, selector)

    def shift_left(self, word, bits):
        """``word`` shifted left by a constant."""
        return shift_left(word, bits)

    def shift_right(self, word, bits):
        """``word`` shifted right by a constant."""
        return shift_right(word, bits)

    def shift_right_add(self, word, bits, addend):
        """``word`` shifted right by a constant, plus ``addend``."""
        return shift_right(word, bits) + _signed(addend)


@dsl_user_op
def multiply_word(a, constant, *, loc=None, ip=None):
    """The low word of a product; kept a multiplication, which runs beside the logic operations that follow."""
    return Int32(asm(T.i32(), _i32([a, constant], loc, ip), "mul.lo.u32 $0, $1, $2;", "=r,r,n", loc, ip))


class ByteDecoder:
    """The instructions of :func:`e2m1_decoding.decode_byte_of`; shifts are multiplications, beside the logic."""

    mask = staticmethod(lambda word, bits: word & _signed(bits))
    shift_left = staticmethod(lambda word, bits: multiply_word(word, 1 << bits))
    permute = staticmethod(permute)


@dsl_user_op
def _multiply_add(a, b, addend, *, loc=None, ip=None):
    return Int32(asm(T.i32(), _i32([a, b], loc, ip), f"mad.lo.u32 $0, $1, $2, {addend};", "=r,r,r", loc, ip))


@dsl_user_op
def _multiply_subtract(a, b, c, *, loc=None, ip=None):
    return Int32(asm(T.i32(), _i32([a, b, c], loc, ip), "mad.lo.u32 $0, $1, $2, $3;", "=r,r,r,r", loc, ip))


def _signed(word):
    return Int32(word - (word >> 31 << 32))


def decode_two_scales(word, dtype):
    """The e4m3 bytes 0 and 1 of a word, each twice in a register: the factors for :class:`Decoder`; NaN stays.

    ``f16``: the scale itself. ``bf16``: the scale times 2^112.
    """
    both = convert_two_e4m3(word)
    if dtype == "bf16":
        both = multiply_pair(_bf16_of_f16(both), _signed(e2m1_decoding.BF16_SCALE_FACTOR), dtype)
    return repeat_half(both, 0), repeat_half(both, 1)


@dsl_user_op
def two_scales_f32(word, *, loc=None, ip=None):
    """The e4m3 bytes 0 and 1 of a word, exactly; NaN stays."""
    text = (
        "{ .reg .b16 p, l, h; .reg .b32 w; cvt.u16.u32 p, $2; cvt.rn.f16x2.e4m3x2 w, p; mov.b32 {l, h}, w; "
        "cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    )
    pair = asm(struct_of("f32", 2), _i32([word], loc, ip), text, "=f,=f,r", loc, ip)
    return tuple(Float32(llvm.extractvalue(T.f32(), pair, [i], loc=loc, ip=ip)) for i in range(2))


@dsl_user_op
def multiply_add_f32(a, b, c, *, loc=None, ip=None):
    """``a b + c`` in fp32, rounded once."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    return Float32(asm(T.f32(), operands, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", loc, ip))


@dsl_user_op
def _bf16_of_f16(pair, *, loc=None, ip=None):
    """Two f16 values rounded to bf16."""
    text = (
        "{ .reg .b16 l, h; .reg .f32 a, b; mov.b32 {l, h}, $1; cvt.f32.f16 a, l; cvt.f32.f16 b, h; "
        "cvt.rn.bf16x2.f32 $0, b, a; }"
    )
    return Int32(asm(T.i32(), _i32([pair], loc, ip), text, "=r,r", loc, ip))


@dsl_user_op
def f16_of_bf16(pair, *, loc=None, ip=None):
    """Two bf16 values rounded to f16."""
    text = (
        "{ .reg .b32 l, h; shl.b32 l, $1, 16; and.b32 h, $1, 0xFFFF0000; .reg .f32 a, b; mov.b32 a, l; mov.b32 b, h; "
        "cvt.rn.f16x2.f32 $0, b, a; }"
    )
    return Int32(asm(T.i32(), _i32([pair], loc, ip), text, "=r,r", loc, ip))


@dsl_user_op
def repeat_half(word, half, *, loc=None, ip=None):
    """One half of a word twice; written so that it becomes a modifier of the multiplication that reads it."""
    twice = "{b, b}" if half else "{a, a}"
    text = "{ .reg .b16 a, b; mov.b32 {a, b}, $1; mov.b32 $0, " + twice + "; }"
    return Int32(asm(T.i32(), _i32([word], loc, ip), text, "=r,r", loc, ip))
