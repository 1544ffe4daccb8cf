"""NVFP4 matrices of static groups to ``code * scale``, exact, and the tile list of their grouped product.

As ``expand``, but with the strides of three dimensions: groups that lie inside the rows of an activation need no
copy before. The tiles of equal groups are arithmetic: the first threads write them.
"""

import cutlass
from cutlass import BFloat16, Float16, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.expand_groups import PIECE_ELEMENTS, THREADS, UNROLL, Config
from dsv4_compile.ops.dispatch.interleave import CHUNK
from dsv4_compile.ops.kernels.sm90 import numerics
from dsv4_compile.ops.kernels.sm90.interleaving import exchange, expanded_pairs, place_of


@cute.kernel
def expand_kernel(
    codes: cute.Tensor,
    scales: cute.Tensor,
    out: cute.Tensor,
    schedule: cute.Tensor,
    pieces: Int32,
    row_pieces: Int32,
    row_multiplier: Uint32,
    row_shift: Int32,
    group_multiplier: Uint32,
    group_shift: Int32,
    tiles_of_group: Int32,
    tile_rows: Int32,
    config: cutlass.Constexpr,
):
    groups, rows = Int32(cute.size(codes, mode=[0])), Int32(cute.size(codes, mode=[1]))
    codes_at, scales_at = numerics.address_of(codes), numerics.address_of(scales)
    out_at, schedule_at = numerics.address_of(out), numerics.address_of(schedule)
    if cutlass.const_expr(config.pdl):
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
    block, _, _ = cute.arch.block_idx()
    thread, _, _ = cute.arch.thread_idx()
    ctas, _, _ = cute.arch.grid_dim()
    first = block * (THREADS * UNROLL) + thread
    words = cute.make_rmem_tensor(UNROLL, Uint32)
    scale_bytes = cute.make_rmem_tensor(UNROLL, Uint32)
    for i in cutlass.range_constexpr(UNROLL):
        piece = first + i * THREADS
        words[i], scale_bytes[i] = Uint32(0), Uint32(0)
        if piece < pieces:
            flat_row = numerics.quotient(piece, row_multiplier, row_shift)
            group = numerics.quotient(flat_row, group_multiplier, group_shift)
            row, place = flat_row - group * rows, piece - flat_row * row_pieces
            code_row = Int64(group) * codes.stride[0] + Int64(row) * codes.stride[1]
            scale_row = Int64(group) * scales.stride[0] + Int64(row) * scales.stride[1]
            words[i] = numerics.load_words(codes_at + code_row + place * 4, 1)[0]
            scale_bytes[i] = numerics.load_byte(scales_at + scale_row + (place >> 1))
    for i in cutlass.range_constexpr(UNROLL):
        target = first + i * THREADS
        if cutlass.const_expr(config.is_interleaved):
            values = exchange(expanded_pairs(words[i], scale_bytes[i], cute.arch.grid_dim()[1]))
            if target < pieces:  # the same for 16 lanes
                numerics.store_words(out_at + Int64(place_of(target)) * 16, values)
        elif target < pieces:
            values = numerics.decode_e2m1x8(words[i], numerics.scale_factor(scale_bytes[i]))
            numerics.store_words(out_at + Int64(target) * 16, values)

    tiles = groups * tiles_of_group
    tile = block * THREADS + thread
    if tile == 0:
        numerics.store_words(schedule_at, [tiles, groups * rows, 0, 0])
    while tile < tiles:
        group = tile // tiles_of_group
        begin = (tile - group * tiles_of_group) * tile_rows
        numerics.store_words(
            schedule_at + Int64(tile + 1) * 16,
            [group, group * rows + begin, cutlass.min(rows - begin, tile_rows), 0],
        )
        tile += ctas * THREADS


@cute.jit
def launch_expand(
    codes: cute.Tensor,
    scales: cute.Tensor,
    out: cute.Tensor,
    schedule: cute.Tensor,
    pieces: Int32,
    row_pieces: Int32,
    row_multiplier: Uint32,
    row_shift: Int32,
    group_multiplier: Uint32,
    group_shift: Int32,
    tiles_of_group: Int32,
    tile_rows: Int32,
    stream,
    config: cutlass.Constexpr,
):
    expand_kernel(
        codes, scales, out, schedule, pieces, row_pieces, row_multiplier, row_shift, group_multiplier, group_shift,
        tiles_of_group, tile_rows, config,
    ).launch(
        grid=(cute.ceil_div(pieces, THREADS * UNROLL), 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=config.pdl
    )  # fmt: skip


def build(config: Config):
    def matrices(dtype):
        shape = tuple(cute.sym_int32() for _ in range(3))
        return make_fake_tensor(dtype, shape, (cute.sym_int64(), cute.sym_int64(), 1), assumed_align=1)

    columns = cute.sym_int64(divisibility=CHUNK if config.is_interleaved else 2 * PIECE_ELEMENTS)
    dtype = Float16 if config.is_interleaved else BFloat16
    return launch_expand, (
        matrices(Uint8),
        matrices(cutlass.Float8E4M3FN),
        make_fake_tensor(dtype, (cute.sym_int64(), columns), (columns, 1), assumed_align=16),
        make_fake_tensor(Int32, (cute.sym_int32(), 4), (4, 1), assumed_align=16),
        Int32(1), Int32(1), Uint32(1), Int32(0), Uint32(1), Int32(0), Int32(1), Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True), config,
    )  # fmt: skip
