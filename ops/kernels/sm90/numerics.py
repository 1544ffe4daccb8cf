"""Exact device arithmetic: IEEE fp32 steps that no compiler contracts, and the E2M1 and E4M3 encodings.

Every function gives the bits of its namesake in :mod:`dsv4_compile.nvfp4`. 32-bit words are ``Uint32``; functions
without side effects are declared so, which lets the compiler schedule and merge them. Addresses are ``Int64``.
"""

from cutlass import Boolean, Float32, Float64, Int32, Int64, Uint32
from cutlass._mlir.dialects import arith, llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from dsv4_compile.ops.kernels.sm90.inline_asm import asm, struct_of

LOG2_E = 1.44269504
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
EXP_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
EXP_LIMIT = 87.0
ROUND_TO_INTEGER = 12582912.0  # 1.5 * 2^23: added and subtracted, it rounds |x| < 2^22 to integers, ties to even


def _f32(values, loc, ip):
    return [Float32(value).ir_value(loc=loc, ip=ip) for value in values]


def _u32(values, loc, ip):
    return [Uint32(value).ir_value(loc=loc, ip=ip) for value in values]


def _words(struct, count, loc, ip):
    return tuple(Uint32(llvm.extractvalue(T.i32(), struct, [i], loc=loc, ip=ip)) for i in range(count))


@dsl_user_op
def _binary(text, a, b, *, loc=None, ip=None):
    return Float32(asm(T.f32(), _f32([a, b], loc, ip), f"{text} $0, $1, $2;", "=f,f,f", loc, ip))


@dsl_user_op
def _unary(text, a, *, loc=None, ip=None):
    return Float32(asm(T.f32(), _f32([a], loc, ip), f"{text} $0, $1;", "=f,f", loc, ip))


def multiply(a, b):
    """fp32 product, rounded to nearest even, never contracted; subnormals kept."""
    return _binary("mul.rn.f32", a, b)


def add(a, b):
    """fp32 sum, rounded to nearest even, never contracted."""
    return _binary("add.rn.f32", a, b)


def subtract(a, b):
    """fp32 difference, rounded to nearest even, never contracted."""
    return _binary("sub.rn.f32", a, b)


def divide(a, b):
    """fp32 quotient, correctly rounded; subnormals kept."""
    return _binary("div.rn.f32", a, b)


def square_root(a):
    """Correctly rounded fp32 square root."""
    return _unary("sqrt.rn.f32", a)


def absolute(a):
    """|a|."""
    return _unary("abs.f32", a)


def negate(a):
    """-a."""
    return _unary("neg.f32", a)


@dsl_user_op
def select(condition, a, b, *, loc=None, ip=None):
    """a where the condition holds, else b; both of the type of a."""
    kind = type(a)
    chosen = arith.select(
        Boolean(condition).ir_value(loc=loc, ip=ip),
        a.ir_value(loc=loc, ip=ip),
        kind(b).ir_value(loc=loc, ip=ip),
        loc=loc,
        ip=ip,
    )
    return kind(chosen)


def larger(a, b):
    """The larger of two, the other one where one is NaN."""
    return _binary("max.f32", a, b)


def larger_or_nan(a, b):
    """The larger of two, NaN where one is NaN."""
    return _binary("max.NaN.f32", a, b)


def smaller_or_nan(a, b):
    """The smaller of two, NaN where one is NaN."""
    return _binary("min.NaN.f32", a, b)


def reciprocal(a):
    """1 / a in fp32, correctly rounded; subnormals kept."""
    return _unary("rcp.rn.f32", a)


def exp2_about(a):
    """2^a within 2 units in the last place."""
    return _unary("ex2.approx.f32", a)


def reciprocal_about(a):
    """1 / a within a unit in the last place; what underflows is 0."""
    return _unary("rcp.approx.ftz.f32", a)


@dsl_user_op
def fused_multiply_add(a, b, c, *, loc=None, ip=None):
    """``a b + c`` rounded once: only where the product is exact."""
    return Float32(asm(T.f32(), _f32([a, b, c], loc, ip), "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", loc, ip))


@dsl_user_op
def bits(a, *, loc=None, ip=None):
    """The bits of an fp32 value."""
    return Uint32(llvm.bitcast(T.i32(), Float32(a).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def from_bits(word, *, loc=None, ip=None):
    """The fp32 value of a word."""
    return Float32(llvm.bitcast(T.f32(), Uint32(word).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def permute(a, b, selector, *, loc=None, ip=None):
    """Four bytes picked from the eight of (b, a), by the four low nibbles of ``selector``."""
    return Uint32(asm(T.i32(), _u32([a, b, selector], loc, ip), "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", loc, ip))


@dsl_user_op
def larger_u16x2(a, b, *, loc=None, ip=None):
    """The larger of each pair of unsigned halves."""
    return Uint32(asm(T.i32(), _u32([a, b], loc, ip), "max.u16x2 $0, $1, $2;", "=r,r,r", loc, ip))


@dsl_user_op
def larger_u32(a, b, *, loc=None, ip=None):
    """The larger of two unsigned words."""
    return Uint32(asm(T.i32(), _u32([a, b], loc, ip), "max.u32 $0, $1, $2;", "=r,r,r", loc, ip))


@dsl_user_op
def largest_of_warp(a, *, loc=None, ip=None):
    """The largest unsigned word of the 32 lanes, in each of them."""
    text = "redux.sync.max.u32 $0, $1, 0xffffffff;"
    return Uint32(asm(T.i32(), _u32([a], loc, ip), text, "=r,r", loc, ip, True))


@dsl_user_op
def multiply_high(a, b, *, loc=None, ip=None):
    """The upper word of the product of two words."""
    return Uint32(asm(T.i32(), _u32([a, b], loc, ip), "mul.hi.u32 $0, $1, $2;", "=r,r,r", loc, ip))


@dsl_user_op
def multiply_bf16x2(a, b, *, loc=None, ip=None):
    """Two bf16 products, each rounded to nearest even; subnormals kept."""
    return Uint32(asm(T.i32(), _u32([a, b], loc, ip), "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", loc, ip))


@dsl_user_op
def pack_bf16x2(low, high, *, loc=None, ip=None):
    """Two fp32 values rounded to nearest even to the halves of a word."""
    return Uint32(asm(T.i32(), _f32([high, low], loc, ip), "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", loc, ip))


@dsl_user_op
def pack_f16x2(low, high, *, loc=None, ip=None):
    """Two fp32 values rounded to nearest even to the fp16 halves of a word."""
    return Uint32(asm(T.i32(), _f32([high, low], loc, ip), "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", loc, ip))


def unpack_bf16x2(word):
    """The two fp32 values of a word of bf16, the low half first."""
    return from_bits(word << 16), from_bits(word & 0xFFFF0000)


@dsl_user_op
def unpack_f16x2(word, *, loc=None, ip=None):
    """The two fp32 values of a word of fp16, the low half first."""
    text = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    struct = struct_of("f32", 2)
    pair = asm(struct, _u32([word], loc, ip), text, "=f,=f,r", loc, ip)
    return tuple(Float32(llvm.extractvalue(T.f32(), pair, [i], loc=loc, ip=ip)) for i in range(2))


@dsl_user_op
def e4m3_byte(a, *, loc=None, ip=None):
    """Rounds fp32 to an E4M3 byte, ties to even, saturating at 448; NaN becomes 0x7F."""
    text = (
        "{ .reg .b16 p; .reg .f32 z; mov.f32 z, 0f00000000; cvt.rn.satfinite.e4m3x2.f32 p, z, $1; cvt.u32.u16 $0, p; }"
    )
    return Uint32(asm(T.i32(), _f32([a], loc, ip), text, "=r,f", loc, ip))


@dsl_user_op
def e4m3_value(byte, *, loc=None, ip=None):
    """The fp32 value of the E4M3 byte in the low eight bits of a word, the others zero; 0x7F is NaN."""
    text = (
        "{ .reg .b16 p, l, h; .reg .b32 w; cvt.u16.u32 p, $1; cvt.rn.f16x2.e4m3x2 w, p; mov.b32 {l, h}, w; "
        "cvt.f32.f16 $0, l; }"
    )
    return Float32(asm(T.f32(), _u32([byte], loc, ip), text, "=f,r", loc, ip))


@dsl_user_op
def add_square_f64(total, a, *, loc=None, ip=None):
    """``total + a^2`` in fp64; the square of an fp32 value is exact there."""
    text = "{ .reg .f64 v; cvt.f64.f32 v, $2; fma.rn.f64 $0, v, v, $1; }"
    operands = [Float64(total).ir_value(loc=loc, ip=ip), Float32(a).ir_value(loc=loc, ip=ip)]
    return Float64(asm(T.f64(), operands, text, "=d,d,f", loc, ip))


@dsl_user_op
def add_f64(a, b, *, loc=None, ip=None):
    """fp64 sum."""
    operands = [Float64(x).ir_value(loc=loc, ip=ip) for x in (a, b)]
    return Float64(asm(T.f64(), operands, "add.rn.f64 $0, $1, $2;", "=d,d,d", loc, ip))


@dsl_user_op
def round_f64(a, *, loc=None, ip=None):
    """fp64 rounded to fp32, to nearest even."""
    return Float32(asm(T.f32(), [Float64(a).ir_value(loc=loc, ip=ip)], "cvt.rn.f32.f64 $0, $1;", "=f,d", loc, ip))


def exponential(y):
    """:func:`nvfp4.exp` without its clamp from above, for y <= 87; below -87 as at -87; NaN stays NaN."""
    y = larger_or_nan(y, -EXP_LIMIT)
    shifted = add(multiply(y, LOG2_E), ROUND_TO_INTEGER)
    n = subtract(shifted, ROUND_TO_INTEGER)
    r = subtract(subtract(y, multiply(n, LN2_HIGH)), multiply(n, LN2_LOW))
    p = Float32(EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        p = add(multiply(p, r), coefficient)
    p = add(add(multiply(multiply(p, r), r), r), 1.0)
    return multiply(p, from_bits((bits(shifted) << 23) + Uint32(0x3F800000)))  # 2^n: n is in the low bits of shifted


def silu(x):
    """:func:`nvfp4.silu`: ``x / (1 + exp(-x))``, ``x * 0`` below -87."""
    quotient = divide(x, add(exponential(negate(x)), 1.0))
    return select(x < -EXP_LIMIT, multiply(x, 0.0), quotient)


def clamp(x, limit):
    """``x`` within -limit and limit; NaN stays."""
    return smaller_or_nan(larger_or_nan(x, negate(limit)), limit)


def swiglu(gate, up, limit):
    """:func:`nvfp4.swiglu` of fp32 values."""
    clamped = clamp(up, limit)
    return multiply(silu(smaller_or_nan(gate, limit)), clamped)


# Loads have side effects for the compiler, so that none is moved above griddepcontrol.wait.


@dsl_user_op
def load_words(address, count, *, loc=None, ip=None):
    """1, 2 or 4 words from a global address aligned to their size."""
    address = [Int64(address).ir_value(loc=loc, ip=ip)]
    if count == 1:
        return (Uint32(asm(T.i32(), address, "ld.global.b32 $0, [$1];", "=r,l", loc, ip, True)),)
    struct = struct_of("i32", count)
    registers = ", ".join(f"${i}" for i in range(count))
    text = f"ld.global.v{count}.b32 {{{registers}}}, [${count}];"
    return _words(asm(struct, address, text, "=r," * count + "l", loc, ip, True), count, loc, ip)


@dsl_user_op
def load_words_from_l2(address, *, loc=None, ip=None):
    """4 words from a 16-byte aligned global address, as :func:`load_f32_from_l2`."""
    struct = struct_of("i32", 4)
    address = [Int64(address).ir_value(loc=loc, ip=ip)]
    text = "ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4];"
    return _words(asm(struct, address, text, "=r,=r,=r,=r,l", loc, ip, True), 4, loc, ip)


@dsl_user_op
def load_f32_from_l2(address, *, loc=None, ip=None):
    """An fp32 value from a global address that a kernel still running may have written before this one started."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Float32(asm(T.f32(), operands, "ld.global.cg.f32 $0, [$1];", "=f,l", loc, ip, True))


@dsl_user_op
def load_byte(address, *, loc=None, ip=None):
    """A byte from a global address, zero-extended."""
    return Uint32(
        asm(T.i32(), [Int64(address).ir_value(loc=loc, ip=ip)], "ld.global.u8 $0, [$1];", "=r,l", loc, ip, True)
    )


@dsl_user_op
def load_f32(address, *, loc=None, ip=None):
    """An fp32 value from a global address."""
    return Float32(
        asm(T.f32(), [Int64(address).ir_value(loc=loc, ip=ip)], "ld.global.f32 $0, [$1];", "=f,l", loc, ip, True)
    )


@dsl_user_op
def store_words(address, words, *, loc=None, ip=None):
    """1, 2 or 4 words to a global address aligned to their size."""
    count = len(words)
    operands = [Int64(address).ir_value(loc=loc, ip=ip), *_u32(words, loc, ip)]
    registers = ", ".join(f"${i + 1}" for i in range(count))
    vector = "" if count == 1 else f".v{count}"
    target = registers if count == 1 else f"{{{registers}}}"
    asm(None, operands, f"st.global{vector}.b32 [$0], {target};", "l" + ",r" * count, loc, ip, True)


@dsl_user_op
def raise_shared(address, word, *, loc=None, ip=None):
    """Makes a word in shared memory the larger of itself and another one."""
    asm(None, _u32([address, word], loc, ip), "red.shared.max.u32 [$0], $1;", "r,r", loc, ip, True)


@dsl_user_op
def store_to_cluster(address, rank, word, *, loc=None, ip=None):
    """A word to a shared address of CTA ``rank`` of the cluster; the address is that of this CTA's own copy."""
    text = "{ .reg .b32 a; mapa.shared::cluster.u32 a, $0, $1; st.shared::cluster.b32 [a], $2; }"
    asm(None, _u32([address, rank, word], loc, ip), text, "r,r,r", loc, ip, True)


@dsl_user_op
def store_byte(address, word, *, loc=None, ip=None):
    """The low byte of a word to a global address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), *_u32([word], loc, ip)]
    asm(None, operands, "st.global.u8 [$0], $1;", "l,r", loc, ip, True)


@dsl_user_op
def store_f32(address, value, *, loc=None, ip=None):
    """An fp32 value to a global address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Float32(value).ir_value(loc=loc, ip=ip)]
    asm(None, operands, "st.global.f32 [$0], $1;", "l,f", loc, ip, True)


def address_of(tensor):
    """The address of a tensor's first element."""
    return tensor.iterator.toint()


def quotient(n, multiplier, shift):
    """``n // d`` of a 31-bit n, for the multiplier and shift that ``dispatch.division.magic`` makes of d."""
    return Int32(multiply_high(Uint32(n) << 1, multiplier) >> Uint32(shift))


def decode_e2m1x8(word, factor):
    """Eight codes of a word to four bf16x2 words in order, each ``code * scale``.

    A code's magnitude goes to the lowest two exponent bits and the highest mantissa bit of a bf16, which then is its
    value times 2^-126, 0.5 being a subnormal; ``factor`` holds ``scale * 2^112`` twice. Both products are exact.
    """
    low = word << 4  # moves the even code of each byte to its upper nibble
    rest = Uint32(0x46804680)  # 2^14 twice
    scaled = []
    for j in range(4):
        pair = permute(low, word, (j << 4) | ((4 + j) << 12) | 0x0000)
        encoded = (pair & 0x80008000) | ((pair >> 6) & 0x01C001C0)
        scaled.append(multiply_bf16x2(multiply_bf16x2(encoded, factor), rest))
    return scaled


def scale_factor(byte):
    """``scale * 2^112`` twice in a word of bf16 for an E4M3 byte, exact; NaN stays."""
    value = multiply(e4m3_value(byte), 2.0**112)
    return pack_bf16x2(value, value)
