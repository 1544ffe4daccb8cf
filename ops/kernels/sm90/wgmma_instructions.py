"""Instructions of the wgmma kernels: words of shared memory of this and other CTAs, stmatrix, stores."""

from cutlass import Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from dsv4_compile.ops.kernels.sm90.inline_asm import asm, struct_of


def _i32(values, loc, ip):
    return [Int32(value).ir_value(loc=loc, ip=ip) for value in values]


@dsl_user_op
def recomputed(value, *, loc=None, ip=None):
    """The same int32, of which the compiler does not know it: what depends on it is not computed ahead and kept."""
    return Int32(asm(T.i32(), _i32([value], loc, ip), "mov.b32 $0, $1;", "=r,r", loc, ip, True))


@dsl_user_op
def load_shared_f32(address, offset, *, loc=None, ip=None):
    """The fp32 at a shared address plus a constant."""
    text = f"ld.shared.f32 $0, [$1+{offset}];"
    return Float32(asm(T.f32(), _i32([address], loc, ip), text, "=f,r", loc, ip, True))


@dsl_user_op
def load_shared_f32x2(address, offset, *, loc=None, ip=None):
    """Two fp32 at an 8-byte aligned shared address plus a constant."""
    pair = asm(
        struct_of("f32", 2),
        _i32([address], loc, ip),
        f"ld.shared.v2.f32 {{$0, $1}}, [$2+{offset}];",
        "=f,=f,r",
        loc,
        ip,
        True,
    )
    return tuple(Float32(llvm.extractvalue(T.f32(), pair, [i], loc=loc, ip=ip)) for i in range(2))


@dsl_user_op
def map_to_cluster(address, rank, *, loc=None, ip=None):
    """The address of a shared address in another CTA of the cluster."""
    return Int32(
        asm(T.i32(), _i32([address, rank], loc, ip), "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", loc, ip)
    )


@dsl_user_op
def load_cluster_f32x4(address, *, loc=None, ip=None):
    """Four fp32 from a 16-byte aligned address that :func:`map_to_cluster` made."""
    values = asm(
        struct_of("f32", 4),
        _i32([address], loc, ip),
        "ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [$4];",
        "=f,=f,=f,=f,r",
        loc,
        ip,
        True,
    )
    return tuple(Float32(llvm.extractvalue(T.f32(), values, [i], loc=loc, ip=ip)) for i in range(4))


@dsl_user_op
def store_shared_f32(address, offset, value, *, loc=None, ip=None):
    """One fp32 to a shared address plus a constant."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip), Float32(value).ir_value(loc=loc, ip=ip)]
    asm(None, operands, f"st.shared.f32 [$0+{offset}], $1;", "r,f", loc, ip, True)


@dsl_user_op
def store_matrices_transposed(address, registers, *, loc=None, ip=None):
    """stmatrix of 2 or 4 8x8 matrices of 16 bits, transposed; lane i addresses row i % 8 of matrix i // 8."""
    count = len(registers)
    listed = ", ".join(f"${i + 1}" for i in range(count))
    text = f"stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [$0], {{{listed}}};"
    asm(None, _i32([address, *registers], loc, ip), text, "r" + ",r" * count, loc, ip, True)


@dsl_user_op
def load_global_i32(address, *, loc=None, ip=None):
    """One int32 from a global address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Int32(asm(T.i32(), operands, "ld.global.b32 $0, [$1];", "=r,l", loc, ip, True))


@dsl_user_op
def load_global_f32(address, *, loc=None, ip=None):
    """One fp32 from a global address."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Float32(asm(T.f32(), operands, "ld.global.f32 $0, [$1];", "=f,l", loc, ip, True))


@dsl_user_op
def store_global_words(address, words, *, loc=None, ip=None):
    """1, 2 or 4 words to a global address aligned to their size."""
    count = len(words)
    operands = [Int64(address).ir_value(loc=loc, ip=ip), *_i32(words, loc, ip)]
    registers = ", ".join(f"${i + 1}" for i in range(count))
    vector = "" if count == 1 else f".v{count}"
    target = registers if count == 1 else f"{{{registers}}}"
    asm(None, operands, f"st.global{vector}.b32 [$0], {target};", "l" + ",r" * count, loc, ip, True)
