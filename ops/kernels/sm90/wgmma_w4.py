"""Activations of 16 bits times packed weights with wgmma, weights decoded in registers from the checkpoint's layout.

Operands are swapped: 64 weight rows are the M side of a warpgroup's wgmma, with A in registers, and the tokens are its
N side, read from shared memory as TMA wrote them. A CTA has two such warpgroups (128 weight rows) and one whose first
two warps load: one the weights (codes and block scales, 256 of K a stage), one the activations (64 of K a stage).

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
from dsv4_compile.ops.kernels.sm90.wgmma_epilogue import Epilogue
from dsv4_compile.ops.kernels.sm90.wgmma_instructions import load_global_i32

STAGE_K = 256  # of a weight stage
CODE_BYTES = STAGE_K // 2
SCALE_BYTES = STAGE_K // 16
HALF_K = STAGE_K // 2  # of which a lane has 32 in one piece; 64 bytes of codes, rows of a swizzle of four pieces
HALF_CODE_BYTES = CODE_BYTES // 2
STEP_K = 64  # of an activation stage: 128 bytes a token, one swizzle atom
STEPS = STAGE_K // STEP_K
WORD_STEPS = 2  # k16 steps that a word of codes is
HALF_ROWS = 64
BLOCK_ROWS = 2 * HALF_ROWS
CONSUMER_WARPS = 8  # of one k group
TOKEN_BAND = 8  # token tiles that are walked before the next weight rows
SHARED_BYTES = 227 * 1024
BARRIER_BYTES = 1024
MAX_WEIGHT_STAGES, MAX_ACTIVATION_STAGES = 8, 12
OUT_DTYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}
DTYPES = {"bf16": BFloat16, "f16": Float16}

PRODUCER_THREADS = 128
PRODUCER_REGISTERS = 24
REGISTERS = 64 * 1024  # of a multiprocessor


class WgmmaW4:
    def __init__(self, config):
        self.config = config
        self.tokens = config.tile_tokens
        self.is_grouped = config.mode != "dense"
        self.is_swiglu = config.mode == "swiglu"
        self.cluster = config.multicast * config.splits
        self.epilogue = Epilogue(config)
        self.consumer_warps = CONSUMER_WARPS * config.k_groups
        # A CTA shares out what its threads got at the launch, no more: setmaxnreg waits for registers that are free.
        consumers = 32 * self.consumer_warps
        self.threads = consumers + PRODUCER_THREADS
        launch_registers = REGISTERS // config.ctas_per_sm // self.threads // 8 * 8
        spare = launch_registers * self.threads - PRODUCER_REGISTERS * PRODUCER_THREADS
        self.consumer_registers = min(240, spare // consumers // 8 * 8)
        self.dtype = DTYPES[config.activation]
        self.halves = 2 // config.k_groups  # of a weight stage, that a k group takes
        # What is loaded at a time: the codes of eight k16 steps, or of two.
        self.piece_steps = HALF_K // 16 if config.is_interleaved else WORD_STEPS
        self.pieces = self.halves * (HALF_K // 16) // self.piece_steps
        assert config.is_interleaved or config.group == WORD_STEPS
        self.load_tokens = self.tokens // config.multicast  # that one CTA loads
        self.activation_bytes = self.tokens * STEP_K * 2
        self.weight_bytes = BLOCK_ROWS * (CODE_BYTES + SCALE_BYTES)
        room = SHARED_BYTES // config.ctas_per_sm // 1024 * 1024 - BARRIER_BYTES - self.epilogue.shared_bytes
        # Both rings reach equally far ahead in K, at least 128 of activations and one weight stage beyond the first.
        self.weight_stages = min(MAX_WEIGHT_STAGES, max(2, room // (self.weight_bytes + STEPS * self.activation_bytes)))
        if self.tokens == 256:
            self.weight_stages = 3 if room >= 3 * self.weight_bytes + 4 * self.activation_bytes else 2
        self.activation_stages = min(
            MAX_ACTIVATION_STAGES, (room - self.weight_stages * self.weight_bytes) // self.activation_bytes
        )
        self.activation_offset = BARRIER_BYTES
        # The stages of each k group are its own: it sees every use of them, as the parity of a barrier needs.
        self.group_stages = self.activation_stages // config.k_groups
        self.activation_stages = self.group_stages * config.k_groups
        self.code_offset = self.activation_offset + self.activation_stages * self.activation_bytes
        self.scale_offset = self.code_offset + self.weight_stages * BLOCK_ROWS * CODE_BYTES
        self.epilogue_offset = self.scale_offset + self.weight_stages * BLOCK_ROWS * SCALE_BYTES
        if self.epilogue.reuses_ring:
            self.epilogue.partial_offset = self.activation_offset
        else:
            self.epilogue.partial_offset = self.epilogue_offset + self.epilogue.row_scale_bytes
        self.exchange_offset = self.epilogue_offset + self.epilogue.shared_bytes - self.epilogue.exchange_bytes
        if config.splits > 1:  # one after the other in the same place
            self.exchange_offset = self.epilogue.partial_offset
        self.shared_bytes = self.epilogue_offset + self.epilogue.shared_bytes
        assert self.group_stages >= 2
        assert self.shared_bytes <= SHARED_BYTES // config.ctas_per_sm

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
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        load_layout = cute.tile_to_shape(atom, (self.load_tokens, STEP_K), order=(0, 1))
        load = cpasync.CopyBulkTensorTileG2SOp()
        x_load = cpasync.CopyBulkTensorTileG2SMulticastOp() if config.multicast > 1 else load
        x_map = cpasync.make_tiled_tma_atom(x_load, x, load_layout, (self.load_tokens, STEP_K))
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
                self.dtype,
                Float32,
                (HALF_ROWS, self.tokens, 16),
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
            grid=[num_ctas // self.cluster * self.cluster, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.cluster, 1, 1],
            smem=self.shared_bytes,
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
        rank = cute.arch.block_idx()[0] % self.cluster
        base = cute.arch.get_dyn_smem(Uint8, alignment=1024)
        barriers = cute.recast_ptr(base, dtype=Int64)  # weights full, empty; activations full, empty
        weight_full, weight_empty = barriers, barriers + self.weight_stages
        x_full = weight_empty + self.weight_stages
        x_empty = x_full + self.activation_stages

        cute.arch.griddepcontrol_launch_dependents()
        if thread == 0:
            for i in cutlass.range_constexpr(self.weight_stages):
                cute.arch.mbarrier_init(weight_full + i, 1)
                cute.arch.mbarrier_init(weight_empty + i, self.consumer_warps)
            for i in cutlass.range_constexpr(self.activation_stages):
                cute.arch.mbarrier_init(x_full + i, 1)
                cute.arch.mbarrier_init(x_empty + i, CONSUMER_WARPS * config.multicast)
            cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

        # Row blocks (of a cluster), those of all weights one after the other.
        block_ends = []
        blocks = Int32(0)
        rows_per_block = (HALF_ROWS if self.is_swiglu else BLOCK_ROWS) * config.multicast
        for i in cutlass.range_constexpr(config.num_weights):
            rows = Int32(code_tensors[i].shape[0])
            if cutlass.const_expr(self.is_swiglu):
                rows = rows // 2
            blocks = blocks + (rows + rows_per_block - 1) // rows_per_block
            block_ends.append(blocks)
        stages = Int32(x_tensor.shape[1]) // STAGE_K
        first_stage = Int32(0)
        if cutlass.const_expr(config.splits > 1):
            split = rank // config.multicast
            first_stage = stages * split // config.splits
            stages = stages * (split + 1) // config.splits - first_stage
        cluster_id = cute.arch.block_idx()[0] // self.cluster
        num_clusters = cute.arch.grid_dim()[0] // self.cluster

        if warp >= self.consumer_warps:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp == self.consumer_warps:
                self.load_weights(
                    code_atoms, code_tensors, scale_atoms, scale_tensors, schedule, base, weight_full, weight_empty,
                    block_ends, first_stage, stages, cluster_id, num_clusters, rank, out,
                )  # fmt: skip
            if warp == self.consumer_warps + 1:
                self.load_activations(
                    x_atom, x_tensor, schedule, base, x_full, x_empty, block_ends, first_stage, stages, cluster_id,
                    num_clusters, rank, out,
                )  # fmt: skip
            if cutlass.const_expr(config.splits > 1):
                self.epilogue.wait_for_partial_sums()
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            self.consume(
                mma, code_tensors, row_scale, global_scales, schedule, bias, row_weight, partial_amax, out, limit, base,
                weight_full, weight_empty, x_full, x_empty, block_ends, stages, cluster_id,
                num_clusters, rank, thread, warp,
            )  # fmt: skip
        if cutlass.const_expr(self.cluster > 1):  # no CTA leaves while another may write to it
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    # Tiles

    @cute.jit
    def num_tiles(self, schedule, block_ends, out):
        """Tiles of all clusters. With a schedule: reads it."""
        if cutlass.const_expr(self.is_grouped):
            count = load_global_i32(schedule.iterator.toint())
        else:
            count = (Int32(out.shape[0]) + self.tokens - 1) // self.tokens
        return count * block_ends[-1]

    @cute.jit
    def tile(self, index, schedule, block_ends, out):
        """(row block, first token, number of tokens, expert) of a tile."""
        blocks = block_ends[-1]
        if cutlass.const_expr(self.is_grouped):
            entry = schedule.iterator.toint() + Int64(index // blocks + 1) * 16
            expert = load_global_i32(entry)
            first = load_global_i32(entry + 4)
            count = load_global_i32(entry + 8)
            block = index % blocks
        else:
            tokens = Int32(out.shape[0])
            token_tiles = (tokens + self.tokens - 1) // self.tokens
            band = index // (TOKEN_BAND * blocks)
            rest = index - band * (TOKEN_BAND * blocks)
            width = cutlass.min(Int32(TOKEN_BAND), token_tiles - band * TOKEN_BAND)
            block = rest // width
            first = (band * TOKEN_BAND + rest % width) * self.tokens
            count = cutlass.min(Int32(self.tokens), tokens - first)
            expert = Int32(0)
        return block, first, count, expert

    # Loads

    @cute.jit
    def load_weights(
        self, code_atoms, code_tensors, scale_atoms, scale_tensors, schedule, base, full, empty, block_ends,
        first_stage, stages, cluster_id, num_clusters, rank, out,
    ):  # fmt: skip
        """One warp: by TMA codes, each stage in two halves of 64 rows of two halves of K, and block scales."""
        config = self.config
        code_ring = cute.make_tensor(
            cute.recast_ptr((base + self.code_offset).align(1024), swizzle_=cute.make_swizzle(2, 4, 3), dtype=Uint8),
            cute.make_layout(  # row halves of each half of K of each stage
                (HALF_ROWS, HALF_CODE_BYTES, 4 * self.weight_stages),
                stride=(HALF_CODE_BYTES, 1, HALF_ROWS * HALF_CODE_BYTES),
            ),
        )
        scale_ring = cute.make_tensor(
            (base + self.scale_offset).align(128),
            cute.make_layout(
                (HALF_ROWS, SCALE_BYTES, 2 * self.weight_stages), stride=(SCALE_BYTES, 1, HALF_ROWS * SCALE_BYTES)
            ),
        )
        if cutlass.const_expr(self.is_grouped):
            cute.arch.griddepcontrol_wait()  # for the schedule
        slot = Int32(0)
        phase = Int32(1)  # an empty barrier nobody has waited for yet counts as completed
        tiles = self.num_tiles(schedule, block_ends, out)
        for index in cutlass.range(cluster_id, tiles, num_clusters, unroll=1):
            block, _, _, expert = self.tile(index, schedule, block_ends, out)
            start = Int32(0)
            for i in cutlass.range_constexpr(config.num_weights):
                if block >= start and block < block_ends[i]:
                    row = ((block - start) * config.multicast + rank % config.multicast) * (
                        HALF_ROWS if self.is_swiglu else BLOCK_ROWS
                    )
                    second = Int32(HALF_ROWS)
                    if cutlass.const_expr(self.is_swiglu):
                        second = Int32(code_tensors[i].shape[0]) // 2
                    halves = []
                    for half in cutlass.range_constexpr(2):
                        pair = []
                        for tensor, smem, width, atom in (
                            (code_tensors[i], code_ring, HALF_CODE_BYTES, code_atoms[i]),
                            (scale_tensors[i], scale_ring, SCALE_BYTES, scale_atoms[i]),
                        ):
                            if cutlass.const_expr(self.is_grouped):
                                moved = cute.domain_offset((row + half * second, 0, 0), tensor)
                                tiled = cute.local_tile(moved, (HALF_ROWS, width), (0, None, expert))
                            else:
                                moved = cute.domain_offset((row + half * second, 0), tensor)
                                tiled = cute.local_tile(moved, (HALF_ROWS, width), (0, None))
                            pair.append(
                                cpasync.tma_partition(
                                    atom,
                                    0,
                                    cute.make_layout(1),
                                    cute.group_modes(smem, 0, 2),
                                    cute.group_modes(tiled, 0, 2),
                                )
                            )
                        halves.append(pair)
                    for stage in cutlass.range(stages, unroll=1):
                        cute.arch.mbarrier_wait(empty + slot, phase)
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive_and_expect_tx(full + slot, self.weight_bytes)
                        for half in cutlass.range_constexpr(2):
                            (code_smem, code_gmem), (scale_smem, scale_gmem) = halves[half]
                            for half_k in cutlass.range_constexpr(2):
                                cute.copy(
                                    code_atoms[i],
                                    code_gmem[(None, (first_stage + stage) * 2 + half_k)],
                                    code_smem[(None, (slot * 2 + half_k) * 2 + half)],
                                    tma_bar_ptr=full + slot,
                                )
                            cute.copy(
                                scale_atoms[i],
                                scale_gmem[(None, first_stage + stage)],
                                scale_smem[(None, slot * 2 + half)],
                                tma_bar_ptr=full + slot,
                            )
                        slot = slot + 1
                        if slot == self.weight_stages:
                            slot = Int32(0)
                            phase = phase ^ 1
                start = block_ends[i]

    @cute.jit
    def load_activations(
        self, x_atom, x_tensor, schedule, base, full, empty, block_ends, first_stage, stages, cluster_id, num_clusters,
        rank, out,
    ):  # fmt: skip
        """One warp: activations by TMA; with multicast each CTA of a pair loads half the tokens for both."""
        config = self.config
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        layout = cute.tile_to_shape(
            atom, (self.load_tokens, STEP_K, self.activation_stages * config.multicast), order=(0, 1, 2)
        )
        ring = cute.make_tensor(
            cute.recast_ptr((base + self.activation_offset).align(1024), swizzle_=layout.inner, dtype=self.dtype),
            layout.outer,
        )
        member = rank % config.multicast
        mask = Int32((1 << config.multicast) - 1) << (rank - member)
        cute.arch.griddepcontrol_wait()
        k_groups = config.k_groups
        index_of = [Int32(0) for _ in range(k_groups)]  # each k group's next stage
        phase_of = [Int32(1) for _ in range(k_groups)]
        tiles = self.num_tiles(schedule, block_ends, out)
        for index in cutlass.range(cluster_id, tiles, num_clusters, unroll=1):
            _, first, _, _ = self.tile(index, schedule, block_ends, out)
            moved = cute.domain_offset((first + member * self.load_tokens, 0), x_tensor)
            smem, gmem = cpasync.tma_partition(
                x_atom,
                0,
                cute.make_layout(1),
                cute.group_modes(ring, 0, 2),
                cute.group_modes(cute.local_tile(moved, (self.load_tokens, STEP_K), (0, None)), 0, 2),
            )
            for first_step in cutlass.range(first_stage * STEPS, (first_stage + stages) * STEPS, STEPS, unroll=1):
                for in_stage in cutlass.range_constexpr(STEPS):
                    k_group = in_stage * k_groups // STEPS
                    slot = k_group * self.group_stages + index_of[k_group]
                    cute.arch.mbarrier_wait(empty + slot, phase_of[k_group])
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(full + slot, self.activation_bytes)
                    source = gmem[(None, first_step + in_stage)]
                    if cutlass.const_expr(config.multicast > 1):
                        target = smem[(None, slot * config.multicast + member)]
                        cute.copy(x_atom, source, target, tma_bar_ptr=full + slot, mcast_mask=cutlass.Int16(mask))
                    else:
                        cute.copy(x_atom, source, smem[(None, slot)], tma_bar_ptr=full + slot)
                    index_of[k_group] = index_of[k_group] + 1
                    if index_of[k_group] == self.group_stages:
                        index_of[k_group] = Int32(0)
                        phase_of[k_group] = phase_of[k_group] ^ 1

    # Products

    @cute.jit
    def consume(
        self, mma, code_tensors, row_scale, global_scales, schedule, bias, row_weight, partial_amax, out, limit, base,
        weight_full, weight_empty, x_full, x_empty, block_ends, stages, cluster_id, num_clusters, rank,
        thread, warp,
    ):  # fmt: skip
        """Two warpgroups, or two pairs of them: decode, multiply, store."""
        config = self.config
        lane = thread % 32
        k_group = Int32(0)
        if cutlass.const_expr(config.k_groups > 1):
            k_group = warp // CONSUMER_WARPS
            warp = warp % CONSUMER_WARPS
        g, t = lane // 4, lane % 4
        # The shared rows of the fragment's rows g and g + 8: neighbouring groups of eight, or a gate and its up row.
        if cutlass.const_expr(self.is_swiglu):
            row = warp * 8 + g
            second = HALF_ROWS
        else:
            row = warp * 16 + g
            second = 8
        # A lane's 16 bytes of a row's 64, where the swizzle of four has put them, or the quad's first; and its scales.
        first_piece, first_scale = g // 2, Int32(0)
        if cutlass.const_expr(config.is_interleaved):
            first_piece, first_scale = t ^ first_piece, t * 2
        code_lane = Int32((base + self.code_offset).toint()) + row * HALF_CODE_BYTES + first_piece * 16
        code_lane = code_lane + k_group * (BLOCK_ROWS * HALF_CODE_BYTES)
        scale_lane = Int32((base + self.scale_offset).toint()) + row * SCALE_BYTES + first_scale
        scale_lane = scale_lane + k_group * (SCALE_BYTES // 2)
        if cutlass.const_expr(config.is_interleaved):
            decoder = Decoder(config.activation, cute.arch.grid_dim()[1])
        else:
            decoder = e2m1_decoding.byte_selector(t)

        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        layout = cute.tile_to_shape(atom, (self.tokens, STEP_K, self.activation_stages), order=(0, 1, 2))
        ring = cute.make_tensor(
            cute.recast_ptr((base + self.activation_offset).align(1024), swizzle_=layout.inner, dtype=self.dtype),
            layout.outer,
        )
        thread_mma = mma.get_slice(thread % 128)
        b = thread_mma.make_fragment_B(thread_mma.partition_B(ring))
        accumulators = cute.make_rmem_tensor(mma.partition_shape_C((HALF_ROWS, self.tokens)), Float32)
        fragments = []
        fragment_words = []
        for _ in cutlass.range_constexpr(2):
            fragment = cute.make_rmem_tensor(mma.partition_shape_A((HALF_ROWS, 16 * config.group)), self.dtype)
            fragments.append(fragment)
            fragment_words.append(cute.recast_tensor(fragment, Int32))

        weight_slot, weight_phase = Int32(0), Int32(0)
        x_first = k_group * self.group_stages
        x_index, x_phase = Int32(0), Int32(0)
        tile_count = Int32(0)
        largest = Float32(0.0)
        if cutlass.const_expr(self.is_grouped):
            cute.arch.griddepcontrol_wait()
        tiles = self.num_tiles(schedule, block_ends, out)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        for index in cutlass.range(cluster_id, tiles, num_clusters, unroll=1):
            block, first, count, expert = self.tile(index, schedule, block_ends, out)
            scale_address, segments, rows, first_row, first_column = self.weight_of(
                code_tensors, global_scales, block_ends, block, expert, rank
            )
            low_factor, high_factor = self.epilogue.row_factors(scale_address, segments, rows, first_row, warp, lane)
            accumulators.fill(0.0)
            last_slot = Int32(0)
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
                            if first_step > 0 or stage > 0:
                                self.release(x_empty + last_slot, rank)
                            last_slot = x_slot
                        if cutlass.const_expr(first_k + config.group == STEP_K // 16):
                            x_index = x_index + 1
                            if x_index == self.group_stages:
                                x_index = Int32(0)
                                x_phase = x_phase ^ 1
                weight_slot = weight_slot + 1
                if weight_slot == self.weight_stages:
                    weight_slot = Int32(0)
                    weight_phase = weight_phase ^ 1
            warpgroup.wait_group(0)
            if stages > 0:
                self.release(x_empty + last_slot, rank)

            if cutlass.const_expr(config.k_groups > 1):
                self.epilogue.exchange(accumulators, base, self.exchange_offset, k_group, thread, tile_count)
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
                    accumulators, base, self.epilogue_offset, row_scale, low_factor, high_factor, bias, row_weight,
                    out, limit, rows, first_row, first_column, first, count, thread, warp, largest,
                )  # fmt: skip
            tile_count = tile_count + 1
        if cutlass.const_expr(config.has_amax):
            self.epilogue.store_amax(largest, partial_amax, base, self.epilogue_offset, k_group, thread, warp)

    @cute.jit
    def weight_of(self, code_tensors, global_scales, block_ends, block, expert, rank):
        """(address of its global scales, their number, its rows, first row and first column) of a tile's weight."""
        config = self.config
        start = Int32(0)
        column = Int32(0)
        scale_address = Int64(0)
        segments = Int32(1)
        rows = Int32(0)
        first_column = Int32(0)
        first_row = Int32(0)
        for i in cutlass.range_constexpr(config.num_weights):
            weight_rows = Int32(code_tensors[i].shape[0])
            if block >= start and block < block_ends[i]:
                scale_address = global_scales[i].iterator.toint()
                segments = Int32(global_scales[i].shape[1]) if self.is_grouped else Int32(global_scales[i].shape[0])
                rows = weight_rows
                first_column = column
                first_row = ((block - start) * config.multicast + rank % config.multicast) * (
                    HALF_ROWS if self.is_swiglu else BLOCK_ROWS
                )
            start = block_ends[i]
            column = column + weight_rows
        if cutlass.const_expr(self.is_grouped):
            scale_address = (
                scale_address + Int64(cutlass.min(expert, Int32(global_scales[0].shape[0]) - 1) * segments) * 4
            )
        return scale_address, segments, rows, first_row, first_column

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
    def release(self, barrier, rank):
        """A warp is done with an activation stage: tells every CTA that loads into it."""
        if cutlass.const_expr(self.config.multicast > 1):
            lane = cute.arch.lane_idx()
            if lane < self.config.multicast:
                peer = rank // self.config.multicast * self.config.multicast + lane
                cute.arch.mbarrier_arrive(barrier, peer)
        else:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barrier)


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
