"""NVFP4 to bf16, fp16 or fp32: ``(code * scale) * global scale``, the first product exact, the second rounded in fp32.

Laid out as ``expand``: a thread makes eight elements, a warp stores whole lines.
"""

import cutlass
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.dequantize_nvfp4 import PIECE_ELEMENTS, THREADS, UNROLL, DequantizeConfig
from dsv4_compile.ops.kernels.sm90 import numerics as nm

DTYPES = {"bfloat16": BFloat16, "float16": Float16, "float32": Float32}


def _pack(values, dtype):
    if dtype == "float32":
        return [nm.bits(value) for value in values]
    pack = nm.pack_bf16x2 if dtype == "bfloat16" else nm.pack_f16x2
    return [pack(values[i], values[i + 1]) for i in range(0, PIECE_ELEMENTS, 2)]


@cute.kernel
def dequantize_kernel(
    codes: cute.Tensor,
    scales: cute.Tensor,
    global_scales: cute.Tensor,
    out: cute.Tensor,
    pieces: Int32,
    row_multiplier: Uint32,
    row_shift: Int32,
    scale_multiplier: Uint32,
    scale_shift: Int32,
    config: cutlass.Constexpr,
):
    if cutlass.const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
    codes_at, scales_at = nm.address_of(codes), nm.address_of(scales)
    global_at, out_at = nm.address_of(global_scales), nm.address_of(out)
    block, _, _ = cute.arch.block_idx()
    thread, _, _ = cute.arch.thread_idx()
    first = block * (THREADS * UNROLL) + thread
    words = cute.make_rmem_tensor(UNROLL, Uint32)
    scale_bytes = cute.make_rmem_tensor(UNROLL, Uint32)
    globals_of = cute.make_rmem_tensor(UNROLL, Float32)
    out_words = PIECE_ELEMENTS * DTYPES[config.dtype].width // 32
    for i in cutlass.range_constexpr(UNROLL):
        piece = first + i * THREADS
        words[i], scale_bytes[i], globals_of[i] = Uint32(0), Uint32(0), Float32(0.0)
        if piece < pieces:
            words[i] = nm.load_words(codes_at + Int64(piece) * 4, 1)[0]
            scale_bytes[i] = nm.load_byte(scales_at + (Int64(piece) >> 1))
            row = nm.quotient(piece, row_multiplier, row_shift)
            globals_of[i] = nm.load_f32(global_at + Int64(nm.quotient(row, scale_multiplier, scale_shift)) * 4)
    for i in cutlass.range_constexpr(UNROLL):
        piece = first + i * THREADS
        if piece < pieces:
            pairs = nm.decode_e2m1x8(words[i], nm.scale_factor(scale_bytes[i]))
            values = [nm.multiply(value, globals_of[i]) for pair in pairs for value in nm.unpack_bf16x2(pair)]
            packed = _pack(values, config.dtype)
            for part in cutlass.range_constexpr(out_words // 4):
                at = out_at + Int64(piece) * (4 * out_words) + 16 * part
                nm.store_words(at, packed[4 * part : 4 * part + 4])


def build(config: DequantizeConfig):
    """The ``cute.jit`` function for a configuration and its fake arguments."""

    @cute.jit
    def launch(
        codes: cute.Tensor,
        scales: cute.Tensor,
        global_scales: cute.Tensor,
        out: cute.Tensor,
        pieces: Int32,
        row_multiplier: Uint32,
        row_shift: Int32,
        scale_multiplier: Uint32,
        scale_shift: Int32,
        stream,
    ):
        dequantize_kernel(
            codes,
            scales,
            global_scales,
            out,
            pieces,
            row_multiplier,
            row_shift,
            scale_multiplier,
            scale_shift,
            config,
        ).launch(
            grid=(cute.ceil_div(pieces, THREADS * UNROLL), 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            use_pdl=config.pdl,
        )

    def vector(dtype, align):
        return make_fake_tensor(dtype, (cute.sym_int64(),), (1,), assumed_align=align)

    return launch, (
        vector(Uint8, 8),
        vector(Uint8, 1),
        vector(Float32, 4),
        vector(DTYPES[config.dtype], 16),
        Int32(1),
        Uint32(1),
        Int32(0),
        Uint32(1),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
