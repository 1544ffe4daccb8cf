"""NVFP4 codes and block scales to bf16 ``code * scale``, exact, rows optionally gathered by an index.

A thread makes 16 bytes of output out of 4 bytes of codes and one scale, so that a warp stores whole lines; it has four
such pieces in flight. Memory bound: 0.5625 bytes read and 2 written an element.
"""

import cutlass
from cutlass import BFloat16, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.expand import PIECE_ELEMENTS, THREADS, UNROLL, ExpandConfig
from dsv4_compile.ops.kernels.sm90 import numerics
from dsv4_compile.ops.kernels.sm90.gathering import gathered_piece


@cute.kernel
def expand_kernel(
    codes: cute.Tensor,
    scales: cute.Tensor,
    rows: cute.Tensor,
    out: cute.Tensor,
    pieces: Int32,
    row_pieces: Int32,
    row_multiplier: Uint32,
    row_shift: Int32,
    index_multiplier: Uint32,
    index_shift: Int32,
    config: cutlass.Constexpr,
):
    if cutlass.const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
    codes_at, scales_at = numerics.address_of(codes), numerics.address_of(scales)
    rows_at, out_at = numerics.address_of(rows), numerics.address_of(out)
    block, _, _ = cute.arch.block_idx()
    thread, _, _ = cute.arch.thread_idx()
    first = block * (THREADS * UNROLL) + thread
    sources = cute.make_rmem_tensor(UNROLL, Int64)
    words = cute.make_rmem_tensor(UNROLL, Uint32)
    scale_bytes = cute.make_rmem_tensor(UNROLL, Uint32)
    for i in cutlass.range_constexpr(UNROLL):
        piece = first + i * THREADS
        sources[i] = Int64(-1)
        if piece < pieces:
            sources[i] = Int64(piece)
            if cutlass.const_expr(config.gather):
                sources[i] = gathered_piece(
                    piece, row_pieces, rows_at, row_multiplier, row_shift, index_multiplier, index_shift
                )
    for i in cutlass.range_constexpr(UNROLL):
        words[i], scale_bytes[i] = Uint32(0), Uint32(0)
        if sources[i] >= 0:
            words[i] = numerics.load_words(codes_at + sources[i] * 4, 1)[0]
            scale_bytes[i] = numerics.load_byte(scales_at + (sources[i] >> 1))
    for i in cutlass.range_constexpr(UNROLL):
        if sources[i] >= 0:
            values = numerics.decode_e2m1x8(words[i], numerics.scale_factor(scale_bytes[i]))
            numerics.store_words(out_at + Int64(first + i * THREADS) * 16, values)


def build(config: ExpandConfig):
    """The ``cute.jit`` function for a configuration and its fake arguments."""

    @cute.jit
    def launch(
        codes: cute.Tensor,
        scales: cute.Tensor,
        rows: cute.Tensor,
        out: cute.Tensor,
        pieces: Int32,
        row_pieces: Int32,
        row_multiplier: Uint32,
        row_shift: Int32,
        index_multiplier: Uint32,
        index_shift: Int32,
        stream,
    ):
        expand_kernel(
            codes,
            scales,
            rows,
            out,
            pieces,
            row_pieces,
            row_multiplier,
            row_shift,
            index_multiplier,
            index_shift,
            config,
        ).launch(
            grid=(cute.ceil_div(pieces, THREADS * UNROLL), 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            use_pdl=config.pdl,
        )

    def matrix(dtype, divisibility, align):
        columns = cute.sym_int64(divisibility=divisibility)
        return make_fake_tensor(dtype, (cute.sym_int64(), columns), (columns, 1), assumed_align=align)

    return launch, (
        matrix(Uint8, PIECE_ELEMENTS, 16),
        matrix(Uint8, 1, 1),
        make_fake_tensor(Int32, (cute.sym_int64(),), (1,), assumed_align=4),
        matrix(BFloat16, 2 * PIECE_ELEMENTS, 16),
        Int32(1),
        Int32(1),
        Uint32(1),
        Int32(0),
        Uint32(1),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
