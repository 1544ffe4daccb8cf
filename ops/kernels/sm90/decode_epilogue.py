"""The epilogue of ``sm90.decode_mm``: partial sums, scales, bias, SwiGLU and rounding.

The sums in a lane's registers are those of its warp's steps of K. Every warp leaves them in shared memory; then each
output is the work of one thread, which adds them, CTA of the cluster by CTA and warp by warp. The order is fixed: the
same bits on every run. In a cluster each CTA stores a part of the block's rows.

A total lacks the powers of two of decoding (``e2m1_decoding.py``) and gets them first. The global scales of activation
and weight are multiplied with each other, then the total with their product, as in the CPU reference.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64

from dsv4_compile.ops.kernels.sm90 import numerics
from dsv4_compile.ops.kernels.sm90.decode_activations import CONSUMERS_BARRIER
from dsv4_compile.ops.kernels.sm90.instructions import (
    add_f32,
    load_cluster_f32,
    load_global_f32,
    load_shared_f32,
    multiply_f32,
    store_shared_f32,
)

OUT_DTYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}


class Epilogue:
    """What the consumers of :class:`DecodeMM` do after they have multiplied.

    ``reduction`` is everywhere the shared address of the partial sums, fp32 [k_warps, token_slots, pitch], one a row of
    the block. Between writing and reading them, and before the next ones, all consumers :meth:`synchronise`.
    """

    def __init__(self, config, correction):
        """``correction`` is the power of two that products of decoded values lack."""
        self.config = config
        self.correction = correction
        self.slots = config.token_slots
        self.token_tiles = max(1, config.token_slots // 8)
        self.block_rows = config.block_rows
        self.warps = config.row_warps * config.k_warps
        self.threads = 32 * self.warps
        self.out_dtype = OUT_DTYPES[config.out_dtype]
        self.pitch = config.block_rows + 4  # floats between tokens: no bank conflicts
        self.reduction_bytes = 4 * config.k_warps * self.slots * self.pitch

    @cute.jit
    def store_partial_sums(self, accumulators, undo, reduction, group, row, member):
        """The sums of a warp to shared memory; one token's first from the lanes of a quad to all of them.

        Args:
            accumulators: [4, token_tiles, row_tiles], as tensor cores hold them: two tokens of a row, two of that
                eight rows further on.
            undo: what sums are multiplied by, None for nothing: see :meth:`Activations.scale_up`.
            reduction: shared address of the partial sums.
            group: the warp's among those that share its rows.
            row: in the block, the lane's first.
            member: the lane's among the four of its quad.
        """
        config = self.config
        if cutlass.const_expr(self.slots == 1):  # each lane of a quad has other blocks
            for tile_row in cutlass.range_constexpr(config.row_tiles):
                for i in cutlass.range_constexpr(0, 4, 2):
                    total = accumulators[i, 0, tile_row]
                    for distance in cutlass.range_constexpr(1, 3):
                        total = add_f32(total, cute.arch.shuffle_sync_bfly(total, distance))
                    accumulators[i, 0, tile_row] = total
        for n in cutlass.range_constexpr(self.token_tiles):
            for tile_row in cutlass.range_constexpr(config.row_tiles):
                for i in cutlass.range_constexpr(4):
                    value = accumulators[i, n, tile_row]
                    if cutlass.const_expr(undo is not None):
                        value = multiply_f32(value, undo)
                    token = n * 8 + member * 2 + i % 2
                    if token < self.slots:
                        of_token = (group * self.slots + token) * self.pitch
                        store_shared_f32(reduction + 4 * (of_token + row + tile_row * 16 + i // 2 * 8), value)

    def synchronise(self):
        """All consumers of the CTA, or of the cluster."""
        if self.config.splits > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=self.threads)

    @cute.jit
    def store(
        self,
        global_scale,
        first_scale,
        row_scale,
        first_row_scale,
        bias,
        out,
        reduction,
        first_row,
        rows,
        first_column,
        tokens,
        rank,
        thread,
    ):
        """The columns of a block's rows, each CTA of a cluster those of a part of them."""
        config = self.config
        part = self.block_rows // config.splits
        segments = global_scale.shape[0]
        segment_rows = rows // segments
        for index in cutlass.range(thread, tokens * part, self.threads, unroll=1):
            token = index // part
            local = index % part + rank * part
            row = first_row + local
            if row < rows:
                weight_scale = first_scale
                if segments > 1:
                    weight_scale = global_scale[row // segment_rows]
                alpha = multiply_f32(self.scale_of_row(row_scale, first_row_scale, token), weight_scale)
                value = multiply_f32(self.total(reduction, token, local), alpha)
                if cutlass.const_expr(config.has_bias):
                    value = add_f32(value, bias[first_column + row].to(Float32))
                out[token, first_column + row] = value.to(self.out_dtype)

    @cute.jit
    def store_grouped(
        self, global_scale, row_scale, first_row_scale, out, reduction, block, rows, expert, first_row, tokens, thread
    ):
        """As :meth:`store`, for the rows of a tile and the weight of an expert."""
        segment_rows = rows // global_scale.shape[1]
        for index in cutlass.range(thread, tokens * self.block_rows, self.threads, unroll=1):
            token = index // self.block_rows
            local = index % self.block_rows
            row = block * self.block_rows + local
            if row < rows:
                scale = self.scale_of_row(row_scale, first_row_scale, first_row + token)
                alpha = multiply_f32(scale, global_scale[expert, row // segment_rows])
                value = multiply_f32(self.total(reduction, token, local), alpha)
                out[first_row + token, row] = value.to(self.out_dtype)

    @cute.jit
    def store_swiglu(
        self,
        global_scale,
        row_scale,
        first_row_scale,
        row_weight,
        limit,
        out,
        reduction,
        block,
        expert,
        first_row,
        tokens,
        thread,
        largest,
    ):
        """``silu(min(gate, L)) * clamp(up, -L, L)`` of a block; returns the largest finite result so far.

        Half of the block's rows are gate rows, the others up rows.
        """
        half_rows = self.block_rows // 2
        gate_scale = global_scale[expert, 0]
        up_scale = global_scale[expert, global_scale.shape[1] - 1]
        for index in cutlass.range(thread, tokens * half_rows, self.threads, unroll=1):
            token = index // half_rows
            local = index % half_rows
            column = block * half_rows + local
            if column < out.shape[1]:
                scale = self.scale_of_row(row_scale, first_row_scale, first_row + token)
                gate = multiply_f32(self.total(reduction, token, local), multiply_f32(scale, gate_scale))
                up = multiply_f32(self.total(reduction, token, half_rows + local), multiply_f32(scale, up_scale))
                value = numerics.swiglu(gate, up, limit)
                if cutlass.const_expr(self.config.has_row_weight):
                    value = multiply_f32(value, load_global_f32(row_weight.iterator.toint() + (first_row + token) * 4))
                rounded = value.to(self.out_dtype)
                out[first_row + token, column] = rounded
                magnitude = numerics.absolute(rounded.to(Float32))
                if magnitude < Float32(float("inf")):
                    largest = numerics.larger(largest, magnitude)
        return largest

    @cute.jit
    def store_amax(self, largest, partial_amax, reduction, thread, warp):
        """The largest of all consumer threads to this CTA's element."""
        # They are not negative: bits order as values.
        of_warp = numerics.from_bits(numerics.largest_of_warp(numerics.bits(largest)))
        if thread % 32 == 0:
            store_shared_f32(reduction + warp * 4, of_warp)
        cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=self.threads)
        if thread == 0:
            for i in cutlass.range_constexpr(self.warps):
                of_warp = numerics.larger(of_warp, load_shared_f32(reduction + i * 4))
            partial_amax[cute.arch.block_idx()[0]] = of_warp

    @cute.jit
    def scale_of_row(self, row_scale, first_row_scale, row):
        """The activation's global scale of a row: one a row, or one for all."""
        scale = first_row_scale
        if cutlass.const_expr(self.config.has_row_scale):  # noqa: SIM102 - known when compiling, the other is not
            if row_scale.shape[0] > 1:
                scale = load_global_f32(row_scale.iterator.toint() + Int64(row) * 4)
        return scale

    def total(self, reduction, token, local):
        """The partial sums of a token and a row of the block, added in order, with the powers of two they lack."""
        total = Float32(0.0)
        address = reduction + 4 * (token * self.pitch + local)
        for peer in range(self.config.splits):
            for k_warp in range(self.config.k_warps):
                place = address + 4 * k_warp * self.slots * self.pitch
                if self.config.splits > 1:
                    total = add_f32(total, load_cluster_f32(place, Int32(peer)))
                else:
                    total = add_f32(total, load_shared_f32(place))
        return multiply_f32(total, Float32(self.correction))
