"""Activations of 16 bits times packed weights with wgmma, weights decoded in registers from the checkpoint's layout.

Operands are swapped: 64 weight rows are the M side of a warpgroup's wgmma, with A in registers, and the tokens are its
N side, read from shared memory as TMA wrote them. A CTA has two such warpgroups (128 weight rows) and one whose first
two warps load: one the weights (codes and block scales, 256 of K a stage), one the activations (64 of K a stage). Where
registers allow, it has two pairs: K groups, which share a tile, each with half of every stage; or teams, which take
tiles in turn, so that one stores while the other multiplies.

A lane (g, t) of a warp holds rows g and g + 8 of the fragment, of every 16 values of K four in two pairs. The order of
K is free as long as both operands agree: activations come interleaved (``ops/dispatch/interleave.py``), so that of each
128 of K a lane has 32 in one piece, two whole blocks. A load of 16 bytes gives them; a word of eight codes decodes to
the pairs of two steps with the same scale. All of that overlaps with the wgmmas before it. Activations that were
quantised are f16, in which ``code * scale`` is exact and which is the cheaper to decode to; others are bf16. Where
interleaving many of those would cost more than it saves, a quad loads the same 16 bytes, two blocks, and each lane
decodes its byte of every word: two of its values in two steps with scales of their own.

The accumulators hold weight rows along the lanes; the epilogue transposes them through shared memory, so that a token's
outputs are stored 16 bytes at a time.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int32, Int64, Uint8
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.kernels.sm90 import e2m1_decoding
from dsv4_compile.ops.kernels.sm90.instructions import (
    ByteDecoder,
    Decoder,
    decode_two_scales,
    load_shared_u16,
    load_shared_v4,
    multiply_pair,
)
from dsv4_compile.ops.kernels.sm90.wgmma_epilogue import TURN_BARRIER, Epilogue
from dsv4_compile.ops.kernels.sm90.wgmma_geometry import (
    BLOCK_ROWS,
    CODE_BYTES,
    CONSUMER_WARPS,
    DTYPES,
    HALF_CODE_BYTES,
    HALF_K,
    HALF_ROWS,
    PRODUCER_REGISTERS,
    SCALE_BYTES,
    STAGE_K,
    STEP_K,
    STEPS,
    Geometry,
)
from dsv4_compile.ops.kernels.sm90.wgmma_instructions import recomputed
from dsv4_compile.ops.kernels.sm90.wgmma_loads import Loads

WORD_STEPS = 2  # k16 steps that a word of codes is
OUT_DTYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}


class WgmmaW4:
    """The kernel of a configuration: entry points, launch, and the products of the consumer warps."""

    def __init__(self, config):
        self.config = config
        self.is_grouped = config.mode != "dense"
        self.is_swiglu = config.mode == "swiglu"
        self.epilogue = Epilogue(config)
        self.geometry = Geometry(config, self.epilogue)
        self.loads = Loads(config, self.geometry)
        self.epilogue.place(self.geometry)
        self.halves = 2 // config.k_groups  # of a weight stage, that a k group takes
        # What is loaded at a time: the codes of eight k16 steps, or of two.
        self.piece_steps = HALF_K // 16 if config.is_interleaved else WORD_STEPS
        self.pieces = self.halves * (HALF_K // 16) // self.piece_steps
        assert config.is_interleaved or config.group == WORD_STEPS
        assert config.teams * config.k_groups <= 2

    # Entry points

    @cute.jit
    def dense(
        self,
        x: cute.Tensor,
        row_scale: cute.Tensor,
        codes: list,
        scales: list,
        global_scales: list,
        bias: cute.Tensor,
        out: cute.Tensor,
        num_ctas: Int32,
        stream,
    ):
        """See ``ops/dispatch/nvfp4_mm.py``."""
        self.launch(
            x, row_scale, codes, scales, global_scales, x, bias, bias, bias, out, Float32(0.0), num_ctas, stream
        )

    @cute.jit
    def grouped(
        self,
        x: cute.Tensor,
        row_scale: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        global_scale: cute.Tensor,
        schedule: cute.Tensor,
        out: cute.Tensor,
        row_weight: cute.Tensor,
        partial_amax: cute.Tensor,
        limit: Float32,
        num_ctas: Int32,
        stream,
    ):
        """See ``ops/dispatch/grouped_wgmma.py``."""
        experts_last = [1, 2, 0]
        self.launch(
            x,
            row_scale,
            [cute.make_tensor(codes.iterator, cute.select(codes.layout, mode=experts_last))],
            [cute.make_tensor(scales.iterator, cute.select(scales.layout, mode=experts_last))],
            [global_scale],
            schedule,
            row_scale,
            row_weight,
            partial_amax,
            out,
            limit,
            num_ctas,
            stream,
        )

    @cute.jit
    def launch(
        self,
        x,
        row_scale,
        codes,
        scales,
        global_scales,
        schedule,
        bias,
        row_weight,
        partial_amax,
        out,
        limit,
        num_ctas,
        stream,
    ):
        config = self.config
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.geometry.dtype)
        load = cpasync.CopyBulkTensorTileG2SOp()
        tokens = self.geometry.tokens
        x_layout = cute.tile_to_shape(atom, (tokens, STEP_K), order=(0, 1))
        x_map = cpasync.make_tiled_tma_atom(load, x, x_layout, (tokens, STEP_K))
        code_layout = cute.make_composed_layout(
            cute.make_swizzle(2, 4, 3), 0, cute.make_layout((HALF_ROWS, HALF_CODE_BYTES), stride=(HALF_CODE_BYTES, 1))
        )
        scale_layout = cute.make_layout((HALF_ROWS, SCALE_BYTES), stride=(SCALE_BYTES, 1))
        code_maps = []
        scale_maps = []
        for i in cutlass.range_constexpr(config.num_weights):
            code_maps.append(cpasync.make_tiled_tma_atom(load, codes[i], code_layout, (HALF_ROWS, HALF_CODE_BYTES)))
            scale_maps.append(
                cpasync.make_tiled_tma_atom(
                    load, cute.recast_tensor(scales[i], Uint8), scale_layout, (HALF_ROWS, SCALE_BYTES)
                )
            )
        mma = cute.make_tiled_mma(
            warpgroup.MmaF16BF16Op(
                self.geometry.dtype,
                Float32,
                (HALF_ROWS, self.geometry.tokens, 16),
                warpgroup.OperandSource.RMEM,
                OperandMajorMode.K,
                OperandMajorMode.K,
            )
        )
        self.kernel(
            mma,
            x_map[0],
            x_map[1],
            [m[0] for m in code_maps],
            [m[1] for m in code_maps],
            [m[0] for m in scale_maps],
            [m[1] for m in scale_maps],
            row_scale,
            global_scales,
            schedule,
            bias,
            row_weight,
            partial_amax,
            out,
            limit,
        ).launch(
            grid=[num_ctas // config.splits * config.splits, 1, 1],
            block=[self.geometry.threads, 1, 1],
            cluster=[config.splits, 1, 1],
            smem=self.geometry.shared_bytes,
            min_blocks_per_mp=config.ctas_per_sm,
            preferred_smem_carveout=100,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        x_atom: cute.CopyAtom,
        x_tensor: cute.Tensor,
        code_atoms: list,
        code_tensors: list,
        scale_atoms: list,
        scale_tensors: list,
        row_scale: cute.Tensor,
        global_scales: list,
        schedule: cute.Tensor,
        bias: cute.Tensor,
        row_weight: cute.Tensor,
        partial_amax: cute.Tensor,
        out: cute.Tensor,
        limit: Float32,
    ):
        config = self.config
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank = cute.arch.block_idx()[0] % config.splits
        base = cute.arch.get_dyn_smem(Uint8, alignment=1024)
        barriers = cute.recast_ptr(base, dtype=Int64)  # weights full, empty; activations full, empty
        weight_full, weight_empty = barriers, barriers + self.geometry.weight_stages
        x_full = weight_empty + self.geometry.weight_stages
        x_empty = x_full + self.geometry.activation_stages

        cute.arch.griddepcontrol_launch_dependents()
        if thread == 0:
            for i in cutlass.range_constexpr(self.geometry.weight_stages):
                cute.arch.mbarrier_init(weight_full + i, 1)
                cute.arch.mbarrier_init(weight_empty + i, CONSUMER_WARPS * config.k_groups)
            for i in cutlass.range_constexpr(self.geometry.activation_stages):
                cute.arch.mbarrier_init(x_full + i, 1)
                cute.arch.mbarrier_init(x_empty + i, CONSUMER_WARPS)
            cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(config.splits > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

        # Row blocks, those of all weights one after the other.
        block_ends = []
        blocks = Int32(0)
        rows_per_block = HALF_ROWS if self.is_swiglu else BLOCK_ROWS
        for i in cutlass.range_constexpr(config.num_weights):
            rows = Int32(code_tensors[i].shape[0])
            if cutlass.const_expr(self.is_swiglu):
                rows = rows // 2
            blocks = blocks + (rows + rows_per_block - 1) // rows_per_block
            block_ends.append(blocks)
        stages = Int32(x_tensor.shape[1]) // STAGE_K
        first_stage = Int32(0)
        if cutlass.const_expr(config.splits > 1):
            first_stage = stages * rank // config.splits
            stages = stages * (rank + 1) // config.splits - first_stage
        cluster_id = cute.arch.block_idx()[0] // config.splits
        num_clusters = cute.arch.grid_dim()[0] // config.splits

        if warp >= self.geometry.consumer_warps:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp == self.geometry.consumer_warps:
                self.loads.weights(
                    code_atoms, code_tensors, scale_atoms, scale_tensors, schedule, base, weight_full, weight_empty,
                    block_ends, first_stage, stages, cluster_id, num_clusters, out,
                )  # fmt: skip
            if warp == self.geometry.consumer_warps + 1:
                self.loads.activations(
                    x_atom, x_tensor, schedule, base, x_full, x_empty, block_ends, first_stage, stages, cluster_id,
                    num_clusters, out,
                )  # fmt: skip
            if cutlass.const_expr(config.splits > 1):
                self.epilogue.wait_for_partial_sums()
        else:
            cute.arch.setmaxregister_increase(self.geometry.consumer_registers)
            self.consume(
                mma, code_tensors, row_scale, global_scales, schedule, bias, row_weight, partial_amax, out, limit,
                base, weight_full, weight_empty, x_full, x_empty, block_ends, stages, cluster_id, num_clusters, rank,
                thread, warp,
            )  # fmt: skip
        if cutlass.const_expr(config.splits > 1):  # no CTA leaves while another may write to it
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    # Products

    @cute.jit
    def consume(
        self, mma, code_tensors, row_scale, global_scales, schedule, bias, row_weight, partial_amax, out, limit, base,
        weight_full, weight_empty, x_full, x_empty, block_ends, stages, cluster_id, num_clusters, rank, thread, warp,
    ):  # fmt: skip
        """Two warpgroups, or two pairs of them that share a tile or take tiles in turn: decode, multiply, store."""
        config = self.config
        lane = thread % 32
        k_group, team = Int32(0), Int32(0)
        if cutlass.const_expr(config.k_groups > 1):
            k_group = warp // CONSUMER_WARPS
        if cutlass.const_expr(config.teams > 1):
            team = warp // CONSUMER_WARPS
        warp = warp % CONSUMER_WARPS
        g, t = lane // 4, lane % 4
        # The shared rows of the fragment's rows g and g + 8: neighbouring groups of eight, or a gate and its up row.
        row = warp * (8 if self.is_swiglu else 16) + g
        # A lane's 16 bytes of a row's 64, where the swizzle of four has put them, or the quad's first; and its scales.
        first_piece, first_scale = g // 2, Int32(0)
        if cutlass.const_expr(config.is_interleaved):
            first_piece, first_scale = t ^ first_piece, t * 2
        code_lane = Int32((base + self.geometry.code_offset).toint()) + row * HALF_CODE_BYTES + first_piece * 16
        code_lane = code_lane + k_group * (BLOCK_ROWS * HALF_CODE_BYTES)
        scale_lane = Int32((base + self.geometry.scale_offset).toint()) + row * SCALE_BYTES + first_scale
        scale_lane = scale_lane + k_group * (SCALE_BYTES // 2)
        if cutlass.const_expr(config.is_interleaved):
            decoder = Decoder(config.activation, cute.arch.grid_dim()[1])
        else:
            decoder = e2m1_decoding.byte_selector(t)

        accumulators = cute.make_rmem_tensor(mma.partition_shape_C((HALF_ROWS, self.geometry.tokens)), Float32)
        ring = Int32(0), Int32(0), Int32(0), Int32(0)  # (slot, phase) of weights and of activations
        if team == 1:
            ring = self.skip(stages, ring)
        largest = Float32(0.0)
        if cutlass.const_expr(self.is_grouped):
            cute.arch.griddepcontrol_wait()
        tiles = self.geometry.num_tiles(schedule, block_ends, out)
        for index in cutlass.range(cluster_id + team * num_clusters, tiles, config.teams * num_clusters, unroll=1):
            if cutlass.const_expr(config.teams > 1):
                self.turn(team, index >= num_clusters)
            else:
                block, first, count, expert = self.geometry.tile(index, schedule, block_ends, out)
                scale_address, segments, rows, first_row, first_column = self.geometry.weight_of(
                    code_tensors, global_scales, block_ends, block, expert
                )
                factors = self.epilogue.row_factors(scale_address, segments, rows, first_row, warp, lane)
            ring = self.multiply(
                mma, accumulators, base, code_lane, scale_lane, decoder, weight_full, weight_empty, x_full,
                x_empty, stages, thread, k_group, team, index, num_clusters, tiles, ring,
            )  # fmt: skip
            if cutlass.const_expr(config.teams > 1):  # only now, for the sake of registers: the other team multiplies
                ring = self.skip(stages, ring)
                thread = recomputed(thread)
                block, first, count, expert = self.geometry.tile(index, schedule, block_ends, out)
                scale_address, segments, rows, first_row, first_column = self.geometry.weight_of(
                    code_tensors, global_scales, block_ends, block, expert
                )
                factors = self.epilogue.row_factors(scale_address, segments, rows, first_row, warp, lane)

            if cutlass.const_expr(config.k_groups > 1):
                self.epilogue.exchange(accumulators, base, k_group, thread, index >= num_clusters)
            if cutlass.const_expr(not self.is_grouped):
                cute.arch.griddepcontrol_wait()  # before anything but the weights is read or written
            if cutlass.const_expr(config.splits > 1):
                if k_group == 0:
                    self.epilogue.store_partial_sums(accumulators, base, thread, warp)
                self.epilogue.wait_for_partial_sums()
                if k_group == 0:
                    self.epilogue.store_split(
                        base, row_scale, scale_address, segments, bias, out, rows, first_row, first_column, first,
                        count, rank, thread, warp,
                    )  # fmt: skip
            elif k_group == 0:
                largest = self.epilogue.store_whole(
                    accumulators, base, row_scale, factors, bias, row_weight, out, limit, rows, first_row,
                    first_column, first, count, thread, warp, team, largest,
                )  # fmt: skip
        if cutlass.const_expr(config.has_amax):
            self.epilogue.store_amax(largest, partial_amax, base, k_group, thread, team * CONSUMER_WARPS + warp)

    @cute.jit
    def multiply(
        self, mma, accumulators, base, code_lane, scale_lane, decoder, weight_full,
        weight_empty, x_full, x_empty, stages, thread, k_group, team, index, num_clusters, tiles, ring,
    ):  # fmt: skip
        """The products of a tile, summed over its K; where its rings go on."""
        config = self.config
        second = HALF_ROWS if self.is_swiglu else 8  # rows from the fragment's row g to its row g + 8
        thread_mma = mma.get_slice(thread % 128)
        b = thread_mma.make_fragment_B(thread_mma.partition_B(self.geometry.activation_ring(base)))
        mma.set(warpgroup.Field.ACCUMULATE, True)
        accumulators.fill(0.0)
        fragments = []
        fragment_words = []
        for _ in cutlass.range_constexpr(2):
            fragment = cute.make_rmem_tensor(mma.partition_shape_A((HALF_ROWS, 16 * config.group)), self.geometry.dtype)
            fragments.append(fragment)
            fragment_words.append(cute.recast_tensor(fragment, Int32))
        weight_slot, weight_phase, x_index, x_phase = ring
        x_first = k_group * self.geometry.group_stages
        for stage in cutlass.range(stages, unroll=1):
            cute.arch.mbarrier_wait(weight_full + weight_slot, weight_phase)
            codes = code_lane + weight_slot * (BLOCK_ROWS * CODE_BYTES)
            scales = scale_lane + weight_slot * (BLOCK_ROWS * SCALE_BYTES)
            loaded = self.load_piece(codes, scales, second, 0)
            for piece in cutlass.range_constexpr(self.pieces):
                words, factors = loaded
                if cutlass.const_expr(piece + 1 < self.pieces):
                    loaded = self.load_piece(codes, scales, second, piece + 1)
                for group in cutlass.range_constexpr(self.piece_steps // config.group):
                    first_step = piece * self.piece_steps + group * config.group
                    buffer = first_step // config.group % 2
                    if cutlass.const_expr(config.is_interleaved):
                        self.decode_words(decoder, words, factors, group, fragment_words[buffer])
                    else:
                        self.decode_bytes(decoder, words, factors, fragment_words[buffer])
                    if cutlass.const_expr(piece + 1 == self.pieces and group == 0):  # all of the stage is read
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive(weight_empty + weight_slot)
                    first_k = first_step % (STEP_K // 16)
                    x_slot = x_first + x_index
                    if cutlass.const_expr(first_k == 0):
                        cute.arch.mbarrier_wait(x_full + x_slot, x_phase)
                        if cutlass.const_expr(config.teams > 1 and first_step + STEP_K // 16 == STAGE_K // 16):
                            self.pass_turn(team, (stage + 1 == stages) & (index + num_clusters < tiles))
                    warpgroup.fence()
                    for k in cutlass.range_constexpr(config.group):
                        cute.gemm(
                            mma,
                            accumulators,
                            fragments[buffer][None, None, k],
                            b[None, None, first_k + k, x_slot],
                            accumulators,
                        )
                    warpgroup.commit_group()
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(first_k == 0):  # the wgmmas of the step before are done
                        self.release(x_empty, x_index, k_group, first_step > 0 or stage > 0)
                    if cutlass.const_expr(first_k + config.group == STEP_K // 16):
                        x_index = x_index + 1
                        if x_index == self.geometry.group_stages:
                            x_index = Int32(0)
                            x_phase = x_phase ^ 1
            weight_slot = weight_slot + 1
            if weight_slot == self.geometry.weight_stages:
                weight_slot = Int32(0)
                weight_phase = weight_phase ^ 1
        warpgroup.wait_group(0)
        self.release(x_empty, x_index, k_group, stages > 0)
        return weight_slot, weight_phase, x_index, x_phase

    @cute.jit
    def skip(self, stages, ring):
        """Where the rings go on after a tile of the other team."""
        weight_slot, weight_phase, x_index, x_phase = ring
        weight_stages, x_stages = self.geometry.weight_stages, self.geometry.activation_stages
        weight_slot = weight_slot + stages
        weight_phase = weight_phase ^ (weight_slot // weight_stages % 2)
        x_index = x_index + stages * STEPS
        x_phase = x_phase ^ (x_index // x_stages % 2)
        return weight_slot % weight_stages, weight_phase, x_index % x_stages, x_phase

    @cute.jit
    def turn(self, team, is_later):
        """Waits, but for the first tile, until the other team has waited for all that it multiplies."""
        if is_later:
            cute.arch.barrier(barrier_id=TURN_BARRIER + team, number_of_threads=2 * 32 * CONSUMER_WARPS)

    @cute.jit
    def pass_turn(self, team, is_due):
        """Lets the other team multiply: due in the last stage of a tile, if another follows."""
        if is_due:
            cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + 1 - team, number_of_threads=2 * 32 * CONSUMER_WARPS)

    def load_piece(self, codes, scales, second, piece):
        """Four words of codes of both rows of a lane, and the factors that go with them.

        Interleaved: the lane's 32 codes of half a stage, two blocks, eight steps. Else the quad's two, two steps.
        """
        half, in_half = divmod(piece, self.pieces // self.halves)
        codes = codes + half * (BLOCK_ROWS * HALF_CODE_BYTES)
        scales = scales + half * (SCALE_BYTES // 2) + 2 * in_half
        words, factors = [], []
        for i in range(2):
            words.append(load_shared_v4((codes + i * second * HALF_CODE_BYTES) ^ Int32(16 * in_half)))
            pair = load_shared_u16(scales + i * second * SCALE_BYTES)
            factors.append(decode_two_scales(pair, self.config.activation))
        return words, factors

    def decode_words(self, decoder, words, factors, group, target):
        """Words of each row to the registers of the A fragments of two k16 steps each."""
        count = self.config.group // WORD_STEPS
        for i in range(count):
            word = group * count + i
            for row in range(2):
                for j, pair in enumerate(decoder.decode(words[row][word])):
                    place = 4 * (WORD_STEPS * i + j // 2) + 2 * (j % 2) + row
                    target[place] = multiply_pair(pair, factors[row][word // 2], self.config.activation)

    def decode_bytes(self, selector, words, factors, target):
        """A byte of each word to the registers of the A fragments of two k16 steps."""
        for step in range(WORD_STEPS):
            for high in range(2):
                for row in range(2):
                    word = words[row][2 * step + high]
                    pair = e2m1_decoding.decode_byte_of(ByteDecoder, word, selector)
                    target[4 * step + 2 * high + row] = multiply_pair(pair, factors[row][step], self.config.activation)

    @cute.jit
    def release(self, empty, x_index, k_group, is_used):
        """A warp is done with the activation stage before ``x_index``."""
        stages = self.geometry.group_stages
        slot = k_group * stages + x_index - 1
        if x_index == 0:
            slot = slot + stages
        if is_used:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty + slot)


def build(config):
    """The jit function of a configuration and fake arguments: see ``ops/dispatch/wgmma_w4.py``."""
    kernel = WgmmaW4(config)
    out_dtype = OUT_DTYPES[config.out_dtype]
    columns = cute.sym_int32(divisibility=8)
    rows = cute.sym_int32()
    k = cute.sym_int32(divisibility=STAGE_K)
    x = make_fake_tensor(DTYPES[config.activation], (rows, k), (cute.sym_int64(divisibility=8), 1), assumed_align=16)
    out = make_fake_tensor(
        out_dtype, (cute.sym_int32(), columns), (cute.sym_int64(divisibility=8), 1), assumed_align=16
    )
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)

    def vector():
        return make_fake_tensor(Float32, (cute.sym_int32(),), (1,), assumed_align=4)

    def matrix(dtype, width, lead):
        strides = tuple(cute.sym_int64(divisibility=16) for _ in range(lead + 1))
        shape = tuple(cute.sym_int32() for _ in range(lead + 1))
        return make_fake_tensor(dtype, (*shape, cute.sym_int32(divisibility=width)), (*strides, 1), assumed_align=16)

    if config.mode == "dense":
        count = range(config.num_weights)
        codes = [matrix(Uint8, CODE_BYTES, 0) for _ in count]
        scales = [matrix(Float8E4M3FN, SCALE_BYTES, 0) for _ in count]
        return kernel.dense, (x, vector(), codes, scales, [vector() for _ in count], vector(), out, Int32(1), stream)
    schedule = make_fake_tensor(Int32, (cute.sym_int32(), 4), (4, 1), assumed_align=16)
    segments = cute.sym_int32()
    global_scale = make_fake_tensor(Float32, (cute.sym_int32(), segments), (segments, 1), assumed_align=4)
    return kernel.grouped, (
        x, vector(), matrix(Uint8, CODE_BYTES, 1), matrix(Float8E4M3FN, SCALE_BYTES, 1), global_scale, schedule, out,
        vector(), vector(), Float32(0.0), Int32(1), stream,
    )  # fmt: skip
