"""Activations for ``wgmma_w4``: NVFP4 to fp16 ``code * scale``, exact, or bf16 as it is, in its order of K.

Rows are optionally gathered by an index. A thread takes four pieces of eight elements; lanes exchange pairs, so that a
warp loads and stores whole lines. Memory bound.
"""

import cutlass
from cutlass import BFloat16, Float16, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.interleave import CHUNK, PIECE_ELEMENTS, THREADS, UNROLL, InterleaveConfig
from dsv4_compile.ops.kernels.sm90 import numerics
from dsv4_compile.ops.kernels.sm90.gathering import gathered_piece
from dsv4_compile.ops.kernels.sm90.interleaving import exchange, expanded_pairs, place_of


@cute.kernel
def interleave_kernel(
    x: cute.Tensor,
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
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
    x_at, scales_at = numerics.address_of(x), numerics.address_of(scales)
    rows_at, out_at = numerics.address_of(rows), numerics.address_of(out)
    first = cute.arch.block_idx()[0] * (THREADS * UNROLL) + cute.arch.thread_idx()[0]
    words_a_piece = 1 if config.is_packed else 4
    sources = cute.make_rmem_tensor(UNROLL, Int64)
    words = cute.make_rmem_tensor((words_a_piece, UNROLL), Uint32)
    scale_bytes = cute.make_rmem_tensor(UNROLL, Uint32)
    for i in cutlass.range_constexpr(UNROLL):
        piece = first + i * THREADS
        sources[i] = Int64(-1)
        if piece < pieces:
            sources[i] = Int64(piece)
            if cutlass.const_expr(config.has_gather):
                sources[i] = gathered_piece(
                    piece, row_pieces, rows_at, row_multiplier, row_shift, index_multiplier, index_shift
                )
    for i in cutlass.range_constexpr(UNROLL):
        scale_bytes[i] = Uint32(0)
        for word in cutlass.range_constexpr(words_a_piece):
            words[word, i] = Uint32(0)
        if sources[i] >= 0:
            loaded = numerics.load_words(x_at + sources[i] * (4 * words_a_piece), words_a_piece)
            for word in cutlass.range_constexpr(words_a_piece):
                words[word, i] = loaded[word]
            if cutlass.const_expr(config.is_packed):
                scale_bytes[i] = numerics.load_byte(scales_at + (sources[i] >> 1))
    for i in cutlass.range_constexpr(UNROLL):
        if cutlass.const_expr(config.is_packed):
            pairs = expanded_pairs(words[0, i], scale_bytes[i], cute.arch.grid_dim()[1])
        else:
            pairs = [words[word, i] for word in range(4)]
        values = exchange(pairs)
        if sources[i] >= 0:  # the same for 16 lanes
            numerics.store_words(out_at + Int64(place_of(first + i * THREADS)) * (2 * PIECE_ELEMENTS), values)


def build(config: InterleaveConfig):
    """The ``cute.jit`` function for a configuration and its fake arguments."""

    @cute.jit
    def launch(
        x: cute.Tensor,
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
        interleave_kernel(
            x, scales, rows, out, pieces, row_pieces, row_multiplier, row_shift, index_multiplier, index_shift, config
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
        matrix(Uint8, CHUNK // 2, 16) if config.is_packed else matrix(BFloat16, CHUNK, 16),
        matrix(Uint8, CHUNK // 16, 1) if config.is_packed else matrix(BFloat16, CHUNK, 16),
        make_fake_tensor(Int32, (cute.sym_int64(),), (1,), assumed_align=4),
        matrix(Float16 if config.is_packed else BFloat16, CHUNK, 16),
        Int32(1),
        Int32(1),
        Uint32(1),
        Int32(0),
        Uint32(1),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )  # fmt: skip
