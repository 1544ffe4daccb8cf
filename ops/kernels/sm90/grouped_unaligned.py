"""Grouped products of any K % 16 == 0 and any N, straight from global memory: right for every shape, fast for none.

A warp multiplies 16 weight rows with eight tokens at a time, one block of 16 along K a step. The order of K inside a
block is free as long as both operands agree: lane t of a quad takes elements 4 t to 4 t + 3, two bytes of codes.
"""

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.grouped_unaligned import BLOCK_ROWS, WARPS, Config
from dsv4_compile.ops.kernels.sm90 import numerics as nm
from dsv4_compile.ops.kernels.sm90.instructions import mma

TOKENS = 8  # a step
NOT_FINITE = 0x7F800000


def decode_row(codes, block_scales, row, block, member):
    """Four elements of one block of a weight row as two words of ``code * block scale``."""
    place = block * 8 + member * 2
    word = Uint32(codes[row, place]) | (Uint32(codes[row, place + 1]) << 8)
    return nm.decode_e2m1x8(word, nm.scale_factor(Uint32(block_scales[row, block])))[:2]


@cute.kernel
def grouped_kernel(
    x: cute.Tensor,
    row_scale: cute.Tensor,
    codes: cute.Tensor,
    block_scales: cute.Tensor,
    global_scales: cute.Tensor,
    schedule: cute.Tensor,
    out: cute.Tensor,
    row_weight: cute.Tensor,
    amax: cute.Tensor,
    limit: Float32,
    config: cutlass.Constexpr,
):
    lane = cute.arch.lane_idx()
    quad, member = lane // 4, lane % 4
    tile, block_of_rows, _ = cute.arch.block_idx()
    first = block_of_rows * BLOCK_ROWS + cute.arch.warp_idx() * 16
    columns = Int32(cute.size(out, mode=[1]))
    rows_of_weight = Int32(cute.size(codes, mode=[1]))
    segments = Int32(cute.size(global_scales, mode=[1]))
    k = Int32(cute.size(x, mode=[1]))
    parts = 2 if config.is_swiglu else 1
    if cutlass.const_expr(config.pdl):
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
    largest = Uint32(0)
    if tile < schedule[0, 0]:
        expert, begin, rows = schedule[tile + 1, 0], schedule[tile + 1, 1], schedule[tile + 1, 2]
        its_codes, its_scales = codes[expert, None, None], block_scales[expert, None, None]
        for chunk in cutlass.range(cute.ceil_div(rows, TOKENS), unroll=1):
            token = begin + cutlass.min(chunk * TOKENS + quad, rows - 1)
            sums = cute.make_rmem_tensor((4, parts), Float32)
            sums.fill(0.0)
            tokens_at = nm.address_of(x) + (Int64(token) * k + member * 4) * 2
            for block in cutlass.range(k // 16, unroll=1):
                columns_of_b = nm.load_words(tokens_at + Int64(block) * 32, 2)
                for part in cutlass.range_constexpr(parts):
                    row = part * columns + cutlass.min(first + quad, columns - 1)
                    low = decode_row(its_codes, its_scales, row, block, member)
                    row = part * columns + cutlass.min(first + quad + 8, columns - 1)
                    high = decode_row(its_codes, its_scales, row, block, member)
                    total = mma(
                        [sums[i, part] for i in range(4)], (low[0], high[0], low[1], high[1]), columns_of_b, "bf16"
                    )
                    for i in cutlass.range_constexpr(4):
                        sums[i, part] = total[i]
            for i in cutlass.range_constexpr(4):
                place = chunk * TOKENS + member * 2 + i % 2
                column = first + quad + i // 2 * 8
                if (place < rows) & (column < columns):
                    row = begin + place
                    scale = row_scale[cutlass.min(row, Int32(cute.size(row_scale)) - 1)]
                    value = Float32(0.0)
                    if cutlass.const_expr(config.is_swiglu):
                        gate = nm.multiply(sums[i, 0], nm.multiply(scale, global_scales[expert, 0]))
                        up = nm.multiply(sums[i, 1], nm.multiply(scale, global_scales[expert, segments - 1]))
                        value = nm.swiglu(gate, up, limit)
                        if cutlass.const_expr(config.has_row_weight):
                            value = nm.multiply(value, row_weight[row])
                    else:
                        segment = column // (rows_of_weight // segments)
                        value = nm.multiply(sums[i, 0], nm.multiply(scale, global_scales[expert, segment]))
                    rounded = value.to(out.element_type)
                    out[row, column] = rounded
                    if cutlass.const_expr(config.is_swiglu):
                        magnitude = nm.bits(nm.absolute(rounded.to(Float32)))
                        if magnitude < NOT_FINITE:
                            largest = cutlass.max(largest, magnitude)
    if cutlass.const_expr(config.is_swiglu):
        largest = cute.arch.warp_redux_sync(largest, "max")
        if (lane == 0) & (largest > 0):
            cute.arch.atomic_max(amax.iterator, Int32(largest))  # positive floats are ordered as their bits


@cute.jit
def launch(
    x: cute.Tensor,
    row_scale: cute.Tensor,
    codes: cute.Tensor,
    block_scales: cute.Tensor,
    global_scales: cute.Tensor,
    schedule: cute.Tensor,
    out: cute.Tensor,
    row_weight: cute.Tensor,
    amax: cute.Tensor,
    limit: Float32,
    max_tiles: Int32,
    blocks_of_rows: Int32,
    stream,
    config: cutlass.Constexpr,
):
    scale_bytes = cute.recast_tensor(block_scales, cutlass.Uint8)
    grouped_kernel(
        x, row_scale, codes, scale_bytes, global_scales, schedule, out, row_weight, amax, limit, config
    ).launch(
        grid=(max_tiles, blocks_of_rows, 1),
        block=(32 * WARPS, 1, 1),
        stream=stream,
        use_pdl=config.pdl,
        min_blocks_per_mp=1,
    )


def build(config: Config):
    out_dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": Float32}[config.out_dtype]
    rows, k, columns, experts = cute.sym_int32(), cute.sym_int32(divisibility=16), cute.sym_int32(), cute.sym_int32()

    def vector(dtype):
        return make_fake_tensor(dtype, (cute.sym_int32(),), (1,), assumed_align=4)

    def experts_of(dtype):
        shape, strides = (experts, cute.sym_int32(), cute.sym_int32()), (cute.sym_int64(), cute.sym_int64(), 1)
        return make_fake_tensor(dtype, shape, strides, assumed_align=1)

    segments = cute.sym_int32()
    return launch, (
        make_fake_tensor(cutlass.BFloat16, (rows, k), (k, 1), assumed_align=16),
        vector(Float32),
        experts_of(cutlass.Uint8),
        experts_of(cutlass.Float8E4M3FN),
        make_fake_tensor(Float32, (experts, segments), (segments, 1), assumed_align=4),
        make_fake_tensor(Int32, (cute.sym_int32(), 4), (4, 1), assumed_align=16),
        make_fake_tensor(out_dtype, (rows, columns), (cute.sym_int64(), 1), assumed_align=out_dtype.width // 8),
        vector(Float32),
        vector(Int32),
        Float32(0.0),
        Int32(1),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        config,
    )
