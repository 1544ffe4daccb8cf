"""Activations for ``wgmma_w4``: NVFP4 to fp16 ``code * scale``, exact, or bf16 as it is, in its order of K.

Rows are optionally gathered by an index. A thread makes 64 bytes of output out of four words of codes and their scales,
or four times 16 bytes; four threads cover whole lines. Memory bound.
"""

import cutlass
from cutlass import BFloat16, Float16, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.interleave import CHUNK, PIECE_ELEMENTS, THREADS, InterleaveConfig
from dsv4_compile.ops.kernels.sm90 import numerics
from dsv4_compile.ops.kernels.sm90.interleaving import copy_piece, expand_piece


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
    piece = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
    row = numerics.quotient(piece, row_multiplier, row_shift)
    source = row
    if piece < pieces:
        if cutlass.const_expr(config.has_gather):
            index = Int32(numerics.load_words(numerics.address_of(rows) + Int64(row) * 4, 1)[0])
            source = Int32(-1)
            if index >= 0:
                source = numerics.quotient(index, index_multiplier, index_shift)
        if source >= 0:
            place = piece - row * row_pieces
            out_at = numerics.address_of(out) + Int64(piece) * (2 * PIECE_ELEMENTS)
            first_piece = Int64(source) * row_pieces  # of the row
            if cutlass.const_expr(config.is_packed):
                expand_piece(
                    x_at + first_piece * (PIECE_ELEMENTS // 2), scales_at + first_piece * (PIECE_ELEMENTS // 16), place,
                    out_at, cute.arch.grid_dim()[1],
                )  # fmt: skip
            else:
                copy_piece(x_at + first_piece * (2 * PIECE_ELEMENTS), place, out_at)


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
        ).launch(grid=(cute.ceil_div(pieces, THREADS), 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=config.pdl)

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
