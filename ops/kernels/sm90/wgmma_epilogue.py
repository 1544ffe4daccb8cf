"""The epilogue of ``sm90.wgmma_w4``: scales, bias, SwiGLU, rounding, and the transposition to rows of tokens."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from dsv4_compile.ops.kernels.sm90 import numerics
from dsv4_compile.ops.kernels.sm90.instructions import load_shared_v4
from dsv4_compile.ops.kernels.sm90.numerics import add, multiply
from dsv4_compile.ops.kernels.sm90.wgmma_instructions import (
    load_cluster_f32x4,
    load_global_f32,
    load_shared_f32,
    load_shared_f32x2,
    map_to_cluster,
    store_global_words,
    store_matrices_transposed,
    store_shared_f32,
)

WARPGROUP = 128
CONSUMER_WARPS = 8
WARPGROUP_BARRIER = 1  # named barriers: 1 to 4 are those of the warpgroups
CONSUMERS_BARRIER = 5
EXCHANGE_WRITTEN_BARRIER, EXCHANGE_READ_BARRIER = 6, 7
TURN_BARRIER = 8  # and 9, of the two teams
BATCH = 2  # tokens of a warp whose partial sums are loaded together
DECODED_EXPONENT = 2.0**14  # the products of decoded weights carry its inverse
INFINITY = float("inf")


class Epilogue:
    def __init__(self, config):
        self.config = config
        self.tokens = config.tile_tokens
        self.is_swiglu = config.mode == "swiglu"
        self.columns = 32 if self.is_swiglu else 64  # that a warpgroup stores
        self.chunk = min(64, self.tokens)  # tokens that are transposed at a time
        self.element_bytes = 4 if config.out_dtype == "fp32" else 2
        self.row_scale_bytes = 4 * self.tokens  # of each warpgroup
        self.staging_bytes = self.chunk * self.columns * 2
        self.pitch = 128 + 4  # floats between tokens of a partial sum: no bank conflicts
        # 256 tokens leave no room for partial sums beside the rings: one tile a CTA, over when they are written.
        self.reuses_ring = config.splits > 1 and self.tokens == 256
        self.exchange_bytes = 4 * self.tokens * 128 if config.k_groups > 1 else 0
        if self.reuses_ring:
            self.shared_bytes = 0
        elif config.splits > 1:
            self.shared_bytes = self.row_scale_bytes + 4 * self.tokens * self.pitch
        else:
            self.shared_bytes = 2 * config.teams * (self.row_scale_bytes + self.staging_bytes) + self.exchange_bytes

    def place(self, geometry):
        """Where its memory begins."""
        config = self.config
        self.offset = geometry.epilogue_offset
        self.partial_offset = geometry.activation_offset if self.reuses_ring else self.offset + self.row_scale_bytes
        self.exchange_offset = self.offset + self.shared_bytes - self.exchange_bytes
        if config.splits > 1:  # one after the other in the same place
            self.exchange_offset = self.partial_offset

    @cute.jit
    def exchange(self, accumulators, base, k_group, thread, is_later):
        """Adds the sums of the second k group to those of the first, which alone goes on with the tile."""
        config = self.config
        address = Int32(base.toint()) + self.exchange_offset + thread % (32 * CONSUMER_WARPS) * 4
        both = 2 * 32 * CONSUMER_WARPS
        if k_group == 1:
            if is_later:
                cute.arch.barrier(barrier_id=EXCHANGE_READ_BARRIER, number_of_threads=both)
            for i in cutlass.range_constexpr(self.tokens // 2):
                store_shared_f32(address, i * 128 * CONSUMER_WARPS, accumulators[i])
            cute.arch.barrier_arrive(barrier_id=EXCHANGE_WRITTEN_BARRIER, number_of_threads=both)
        else:
            cute.arch.barrier(barrier_id=EXCHANGE_WRITTEN_BARRIER, number_of_threads=both)
            for i in cutlass.range_constexpr(self.tokens // 2):
                accumulators[i] = add(accumulators[i], load_shared_f32(address, i * 128 * CONSUMER_WARPS))
            if cutlass.const_expr(config.splits > 1):
                cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=32 * CONSUMER_WARPS)
            else:
                cute.arch.barrier_arrive(barrier_id=EXCHANGE_READ_BARRIER, number_of_threads=both)

    @cute.jit
    def row_factors(self, scale_address, segments, rows, first_row, warp, lane):
        """Those of the two weight rows of a lane, loaded long before they are needed; a split needs others."""
        low, high = Float32(0.0), Float32(0.0)
        if cutlass.const_expr(self.config.splits == 1):
            if cutlass.const_expr(self.is_swiglu):
                row = cutlass.min(first_row + warp * 8 + lane // 4, rows // 2 - 1)
                low = self.row_factor(scale_address, segments, rows, row)
                high = self.row_factor(scale_address, segments, rows, row + rows // 2)
            else:
                row = first_row + warp * 16 + lane // 4
                low = self.row_factor(scale_address, segments, rows, row)
                high = self.row_factor(scale_address, segments, rows, row + 8)
        return low, high

    @cute.jit
    def row_factor(self, scale_address, segments, rows, row):
        """The global scale of a weight row, times what the decoded weights lack."""
        inside = cutlass.min(row, rows - 1)
        return multiply(load_global_f32(scale_address + Int64(inside // (rows // segments)) * 4), DECODED_EXPONENT)

    @cute.jit
    def store_whole(
        self,
        accumulators,
        base,
        row_scale,
        factors,
        bias,
        row_weight,
        out,
        limit,
        rows,
        first_row,
        first_column,
        first,
        count,
        thread,
        warp,
        team,
        largest,
    ):
        """The epilogue without a split of K; each warpgroup by itself."""
        config = self.config
        low_factor, high_factor = factors
        lane = thread % 32
        g, t = lane // 4, lane % 4
        group = warp // 4
        local_warp = warp % 4
        local_thread = thread % WARPGROUP
        warpgroup = 2 * team + group
        base_address = Int32(base.toint()) + self.offset + warpgroup * (self.row_scale_bytes + self.staging_bytes)
        staging = base_address + self.row_scale_bytes
        width = rows // 2 if cutlass.const_expr(self.is_swiglu) else rows  # columns of the weight in the output
        row = first_row + warp * (8 if self.is_swiglu else 16) + g
        low_bias, high_bias = Float32(0.0), Float32(0.0)
        if cutlass.const_expr(config.has_bias):
            low_bias = bias[first_column + cutlass.min(row, rows - 1)]
            high_bias = bias[first_column + cutlass.min(row + 8, rows - 1)]

        self.barrier(warpgroup)  # the last reads of this memory are over
        if cutlass.const_expr(config.has_row_scale):
            for i in cutlass.range(local_thread, self.tokens, WARPGROUP, unroll=1):
                scale = row_scale[cutlass.min(first + i, Int32(row_scale.shape[0]) - 1)]
                store_shared_f32(base_address + 4 * i, 0, scale)
            self.barrier(warpgroup)

        for part in cutlass.range_constexpr(self.tokens // self.chunk):
            packed = []
            for j in cutlass.range_constexpr(part * self.chunk // 8, (part + 1) * self.chunk // 8):
                c = [accumulators[4 * j + i] for i in range(4)]
                token = 8 * j + 2 * t
                if cutlass.const_expr(config.has_row_scale):
                    r0, r1 = load_shared_f32x2(base_address + 8 * t, 32 * j)
                    c = [
                        multiply(c[0], multiply(r0, low_factor)),
                        multiply(c[1], multiply(r1, low_factor)),
                        multiply(c[2], multiply(r0, high_factor)),
                        multiply(c[3], multiply(r1, high_factor)),
                    ]
                else:
                    c = [multiply(c[i], low_factor if i < 2 else high_factor) for i in range(4)]
                if cutlass.const_expr(config.has_bias):
                    c = [add(c[i], low_bias if i < 2 else high_bias) for i in range(4)]
                if cutlass.const_expr(self.is_swiglu):
                    c = [numerics.swiglu(c[i], c[i + 2], limit) for i in range(2)]
                    if cutlass.const_expr(config.has_row_weight):
                        last = Int32(row_weight.shape[0]) - 1
                        c = [multiply(c[i], row_weight[cutlass.min(first + token + i, last)]) for i in range(2)]
                if cutlass.const_expr(config.out_dtype == "fp32"):
                    for i in cutlass.range_constexpr(len(c)):
                        column = row + 8 * (i // 2)
                        if token + i % 2 < count and column < width:
                            self.store_value(out, first + token + i % 2, first_column + column, c[i])
                    if cutlass.const_expr(config.has_amax):
                        largest = self.track(largest, c, token, count, row < width)
                else:
                    words = [self.pack(c[i], c[i + 1]) for i in range(0, len(c), 2)]
                    packed.extend(words)
                    if cutlass.const_expr(config.has_amax):
                        largest = self.track(largest, self.unpack(words[0]), token, count, row < width)
            if cutlass.const_expr(config.out_dtype != "fp32"):
                if cutlass.const_expr(part > 0):
                    self.barrier(warpgroup)
                self.transpose(packed, staging, lane, local_warp)
                self.barrier(warpgroup)
                self.copy_out(
                    out, staging, first, count, first_column, first_row + group * self.columns, width, local_thread,
                    part * self.chunk,
                )  # fmt: skip
        return largest

    def barrier(self, warpgroup):
        cute.arch.barrier(barrier_id=WARPGROUP_BARRIER + warpgroup, number_of_threads=WARPGROUP)

    def swizzled(self, token, chunk):
        """Offset in the staging buffer of 16 bytes (eight columns) of a token: no bank conflicts either way."""
        if self.is_swiglu:
            return token * 64 + ((chunk ^ ((token >> 1) & 3)) << 4)
        return token * 128 + ((chunk ^ (token & 7)) << 4)

    def transpose(self, packed, staging, lane, local_warp):
        """stmatrix: the lanes' pairs of tokens to rows of eight columns."""
        matrix = lane // 8
        if self.is_swiglu:  # a register holds eight tokens of the warp's eight columns
            count = min(4, len(packed))
            for i in range(0, len(packed), count):
                token = 8 * i + (matrix % count) * 8 + lane % 8
                store_matrices_transposed(
                    staging + self.swizzled(token, local_warp), [packed[i + k] for k in range(count)]
                )
        else:  # registers alternate between the warp's first and last eight columns
            for i in range(0, len(packed), 4):
                token = 4 * i + (matrix // 2) * 8 + lane % 8
                store_matrices_transposed(
                    staging + self.swizzled(token, local_warp * 2 + matrix % 2), [packed[i + k] for k in range(4)]
                )

    @cute.jit
    def copy_out(
        self, out, staging, first, count, first_column, column, width, local_thread, first_token: cutlass.Constexpr
    ):
        """Rows of the staging buffer to the output, 16 bytes at a time."""
        chunks = self.columns // 8
        pieces = self.chunk * chunks
        for i in cutlass.range_constexpr((pieces + WARPGROUP - 1) // WARPGROUP):
            piece = local_thread + i * WARPGROUP
            token = piece // chunks
            chunk = piece % chunks
            words = load_shared_v4(staging + self.swizzled(cutlass.min(token, Int32(self.chunk - 1)), chunk))
            if first_token + token < count and column + chunk * 8 < width and piece < pieces:
                position = Int64(first + first_token + token) * Int64(out.stride[0]) + (
                    first_column + column + chunk * 8
                )
                store_global_words(out.iterator.toint() + position * 2, words)

    def store_value(self, out, token, column, value):
        position = Int64(token) * Int64(out.stride[0]) + column
        store_global_words(out.iterator.toint() + position * 4, [Int32(numerics.bits(value))])

    def pack(self, low, high):
        if self.config.out_dtype == "bf16":
            return Int32(numerics.pack_bf16x2(low, high))
        return Int32(numerics.pack_f16x2(low, high))

    def unpack(self, word):
        if self.config.out_dtype == "bf16":
            return numerics.unpack_bf16x2(cutlass.Uint32(word))
        return numerics.unpack_f16x2(cutlass.Uint32(word))

    @cute.jit
    def track(self, largest, values, token, count, is_inside):
        """The largest finite magnitude of two neighbouring tokens' values and those before."""
        for i in cutlass.range_constexpr(2):
            magnitude = numerics.absolute(values[i])
            if magnitude < INFINITY and token + i < count and is_inside:
                largest = numerics.larger(largest, magnitude)
        return largest

    @cute.jit
    def store_amax(self, largest, partial_amax, base, k_group, thread, warp):
        """The largest of all threads that stored, those of the first k group, to this CTA's element."""
        warps = CONSUMER_WARPS * self.config.teams
        if k_group == 0:
            for shift in cutlass.range_constexpr(5):
                largest = numerics.larger(largest, cute.arch.shuffle_sync_bfly(largest, 1 << shift))
            address = Int32(base.toint()) + self.offset
            cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=32 * warps)
            if thread % 32 == 0:
                store_shared_f32(address + warp * 4, 0, largest)
            cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=32 * warps)
            if thread == 0:
                for i in cutlass.range_constexpr(warps // 2):
                    a, b = load_shared_f32x2(address, 8 * i)
                    largest = numerics.larger(largest, numerics.larger(a, b))
                cute.arch.griddepcontrol_wait()
                for i in cutlass.range(
                    cute.arch.block_idx()[0], Int32(partial_amax.shape[0]), cute.arch.grid_dim()[0], unroll=1
                ):
                    partial_amax[i] = largest

    @cute.jit
    def store_partial_sums(self, accumulators, base, thread, warp):
        """Sums over this CTA's part of K to its shared memory."""
        lane = thread % 32
        g, t = lane // 4, lane % 4
        partial = Int32(base.toint()) + self.partial_offset
        if cutlass.const_expr(self.reuses_ring):
            cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=32 * CONSUMER_WARPS)
        row = warp * 16 + g
        for j in cutlass.range_constexpr(self.tokens // 8):
            address = partial + 4 * ((8 * j + 2 * t) * self.pitch + row)
            for i in cutlass.range_constexpr(4):
                store_shared_f32(address, 4 * (i % 2 * self.pitch + 8 * (i // 2)), accumulators[4 * j + i])

    def wait_for_partial_sums(self):
        """Every thread of the cluster: until those of all its CTAs are there."""
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    @cute.jit
    def store_split(
        self,
        base,
        row_scale,
        scale_address,
        segments,
        bias,
        out,
        rows,
        first_row,
        first_column,
        first,
        count,
        rank,
        thread,
        warp,
    ):
        """Adds the partial sums of all CTAs, in order, for this CTA's share of the tokens, and stores."""
        config = self.config
        lane = thread % 32
        partial = Int32(base.toint()) + self.partial_offset
        share = (self.tokens + config.splits - 1) // config.splits
        local_row = lane * 4
        row = first_row + local_row
        factors = [self.row_factor(scale_address, segments, rows, row + i) for i in range(4)]
        addends = [Float32(0.0)] * 4
        if cutlass.const_expr(config.has_bias):
            addends = [bias[first_column + cutlass.min(row + i, rows - 1)] for i in range(4)]
        peers = [map_to_cluster(partial, peer) for peer in range(config.splits)]
        last_token = cutlass.min(count, cutlass.min((rank + 1) * share, Int32(self.tokens)))
        for batch in cutlass.range_constexpr((share + BATCH * CONSUMER_WARPS - 1) // (BATCH * CONSUMER_WARPS)):
            tokens = [rank * share + (batch * BATCH + i) * CONSUMER_WARPS + warp for i in range(BATCH)]
            parts = []
            scales = []
            for token in tokens:  # all loads first: those of other CTAs take long
                inside = cutlass.min(token, Int32(self.tokens - 1))
                parts.append([load_cluster_f32x4(peer + 4 * (inside * self.pitch + local_row)) for peer in peers])
                if cutlass.const_expr(config.has_row_scale):
                    scales.append(row_scale[cutlass.min(first + inside, Int32(row_scale.shape[0]) - 1)])
            for i in cutlass.range_constexpr(BATCH):
                total = parts[i][0]
                for peer in cutlass.range_constexpr(1, config.splits):
                    total = [add(total[k], parts[i][peer][k]) for k in range(4)]
                if cutlass.const_expr(config.has_row_scale):
                    total = [multiply(total[k], multiply(scales[i], factors[k])) for k in range(4)]
                else:
                    total = [multiply(total[k], factors[k]) for k in range(4)]
                if cutlass.const_expr(config.has_bias):
                    total = [add(total[k], addends[k]) for k in range(4)]
                if cutlass.const_expr(config.out_dtype == "fp32"):
                    words = [Int32(numerics.bits(value)) for value in total]
                else:
                    words = [self.pack(total[0], total[1]), self.pack(total[2], total[3])]
                if tokens[i] < last_token and row < rows:
                    position = Int64(first + tokens[i]) * Int64(out.stride[0]) + (first_column + row)
                    store_global_words(out.iterator.toint() + position * self.element_bytes, words)
