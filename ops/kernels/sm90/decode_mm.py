"""Few tokens times packed weights: mma.sync on weights decoded in registers, straight from the checkpoint's layout.

A CTA owns a block of weight rows (and, in a cluster, a part of K). One warp streams codes and block scales through a
ring in shared memory with TMA, beginning before the activations exist; the others decode them. A step is 256 values
of K of every row of the block; step ``i`` is the work of the ``row_warps`` warps of group ``i % k_warps``. A stage is
what one barrier covers: ``stage_steps`` steps, so that a row's scales come in pieces longer than a sector. Stages
that different groups read lie in slots of their own: a group sees every use of its slots, which is what the parity of
a barrier needs.

The order of K inside a step is free as long as both operands agree. Lane ``t`` of a quad owns 32 whole codes, two
blocks with their two scales, of each 128; activations are stored in that order, eight at a time as (0, 4) (1, 5) (2,
6) (3, 7), which is how a word of codes decodes to f16. Rows inside a group of eight are taken in the order 0 4 1 5 2 6
3 7, so that eight lanes read eight different banks of the 128-byte swizzle that TMA writes.

The bf16 activations of a dense product are copied as they lie, by bulk copies that pass no register, in chunks of K
with a barrier each. Codes decode to bf16 as they lie, too. Lane ``t`` owns the blocks ``t`` and ``t + 4`` of eight: a
quad's activations are then side by side, and with 16 bytes more between tokens eight lanes read different banks. For
the codes that takes the order of rows 0 2 4 6 1 3 5 7.

In the grouped modes a unit of work is a row block of one expert times the tokens of one tile of a schedule that an
earlier kernel made, and the CTAs share the units evenly. For SwiGLU half of a block are gate rows, half the matching
up rows.

One token fills the columns of a product differently: those of each member of a quad have that member's values of K and
zeros elsewhere. So the sums of different blocks stay apart, and are multiplied by the scales instead of the weights.
In bf16 the codes then still lack 2^126, which the activations get (:meth:`Activations.scale_up`).

``decode_activations.py`` brings the activations to shared memory; ``decode_epilogue.py`` adds what lanes, warps and
CTAs summed up, and stores.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.decode_mm import BARRIER_BYTES, MAX_STAGES, STEP_K
from dsv4_compile.ops.kernels.sm90 import numerics
from dsv4_compile.ops.kernels.sm90.decode_activations import CHUNKS, CONSUMERS_BARRIER, STEP_BYTES, Activations
from dsv4_compile.ops.kernels.sm90.decode_epilogue import OUT_DTYPES, Epilogue
from dsv4_compile.ops.kernels.sm90.instructions import (
    EXPONENTS,
    Decoder,
    decode_two_scales,
    load_global_f32,
    load_global_i32,
    load_shared_u16,
    load_shared_v2,
    load_shared_v4,
    mma,
    multiply_add_f32,
    multiply_pair,
    permute,
    store_shared_v4,
    two_scales_f32,
)

CODE_BYTES = STEP_K // 2  # of a row's step
SCALE_BYTES = STEP_K // 16
SHARED_KIB = 227  # of a multiprocessor, for CTAs
# Zeros between barriers and activations, for columns of other members: a step of one token.
ZERO_BYTES = STEP_BYTES
ZERO_OFFSET = BARRIER_BYTES - ZERO_BYTES
assert (2 * MAX_STAGES + CHUNKS) * 8 <= ZERO_OFFSET


class DecodeMM(Activations):
    """The kernel of a configuration: entry points, layout of shared memory, producer, and the products of consumers."""

    def __init__(self, config):
        self.config = config
        self.is_grouped = config.mode != "dense"
        self.is_swiglu = config.mode == "swiglu"
        self.slots = config.token_slots
        self.token_tiles = max(1, config.token_slots // 8)
        self.block_rows = config.block_rows
        self.parts = 2 if self.is_swiglu else 1  # gate rows and up rows are loaded apart
        self.part_rows = self.block_rows // self.parts
        self.warps = config.row_warps * config.k_warps
        self.threads = 32 * self.warps
        self.stage_scale_bytes = SCALE_BYTES * config.stage_steps  # of a row
        self.stage_bytes = self.block_rows * (CODE_BYTES * config.stage_steps + self.stage_scale_bytes)
        # Stages go round the classes of warp groups that read them; a class has slots of its own.
        self.classes = max(1, config.k_warps // config.stage_steps)
        self.readers = config.row_warps * min(config.k_warps, config.stage_steps)  # warps a stage
        few_warps = self.warps <= 8  # more warps have fewer pieces of the activations each, and fewer registers
        self.pieces_in_flight = 2 if few_warps else 1
        if config.activation == "packed":
            self.pieces_in_flight = max(1, min(8 if few_warps else 4, config.token_slots // 2))
        # q * s of NVFP4 operands is exact in f16, which is cheaper to decode to; activations of any value need bf16.
        # The bf16 rows of a grouped product are such q * s: multiples of 2^-10 up to 2688 with at most 6 bits.
        is_exact = config.activation == "packed" or self.is_grouped
        self.dtype = "f16" if is_exact else "bf16"
        self.is_copied = config.has_copied_activations
        decoded_operands = 2 if config.activation == "packed" else 1
        # One token leaves seven of a product's columns free. Each member of a quad gets columns of its own: a lane
        # then holds the sum of one block, and the scale multiplies that instead of sixteen values.
        self.has_columns_per_member = config.token_slots == 1
        # Found by trying, against spills: the halves of a step as a loop, and the least CTAs a multiprocessor that the
        # assembler is told, 0 for nothing.
        is_tight = self.has_columns_per_member and not few_warps
        self.has_rolled_halves = is_tight and config.row_tiles == 1 and not self.is_copied
        is_tightest = is_tight and config.row_tiles > 1 and (config.num_weights > 1 or not self.is_copied)
        self.min_blocks = 0 if is_tightest else SHARED_KIB // config.smem_kib
        self.is_scaled_up = self.is_copied and self.has_columns_per_member
        self.epilogue = Epilogue(config, 2.0 ** (decoded_operands * EXPONENTS[self.dtype]))

    @cute.jit
    def dense(
        self,
        x: cute.Tensor,
        x_scales: cute.Tensor,
        row_scale: cute.Tensor,
        codes: list,
        scales: list,
        global_scales: list,
        bias: cute.Tensor,
        out: cute.Tensor,
        num_ctas: Int32,
        stream,
    ):
        maps = [self.tensor_maps(codes[i], scales[i]) for i in range(self.config.num_weights)]
        self.launch(maps, x, x_scales, row_scale, global_scales, bias, out, num_ctas, stream)

    @cute.jit
    def grouped(
        self,
        x: cute.Tensor,
        x_scales: cute.Tensor,
        row_scale: cute.Tensor,
        sorted_slots: cute.Tensor,
        schedule: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        global_scale: cute.Tensor,
        row_weight: cute.Tensor,
        partial_amax: cute.Tensor,
        out: cute.Tensor,
        top_k: Int32,
        limit: Float32,
        group_rows: Int32,
        num_ctas: Int32,
        stream,
    ):
        maps = [self.tensor_maps(self.experts_last(codes), self.experts_last(scales))]
        routing = (sorted_slots, schedule, row_weight, partial_amax, top_k, limit, group_rows, codes.shape[0])
        self.launch(maps, x, x_scales, row_scale, [global_scale], None, out, num_ctas, stream, routing)

    def experts_last(self, tensor):
        """[E, N, C] as [N, C, E]."""
        return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, mode=[1, 2, 0]))

    def tensor_maps(self, codes, scales):
        """TMA of a part of a block's rows: a step of codes, and a stage of scales."""
        code_layout = cute.make_composed_layout(
            cute.make_swizzle(3, 4, 3), 0, cute.make_layout((self.part_rows, CODE_BYTES), stride=(CODE_BYTES, 1))
        )
        width = self.stage_scale_bytes
        scale_layout = cute.make_composed_layout(
            self.scale_swizzle(), 0, cute.make_layout((self.part_rows, width), stride=(width, 1))
        )
        load = cpasync.CopyBulkTensorTileG2SOp()
        extra = (1,) if self.is_grouped else ()
        if self.is_grouped:
            code_layout = cute.append(code_layout, cute.make_layout(1, stride=0))
            scale_layout = cute.append(scale_layout, cute.make_layout(1, stride=0))
        code_map = cpasync.make_tiled_tma_atom(load, codes, code_layout, (self.part_rows, CODE_BYTES, *extra))
        scale_map = cpasync.make_tiled_tma_atom(
            load, cute.recast_tensor(scales, Uint8), scale_layout, (self.part_rows, width, *extra)
        )
        return code_map[0], code_map[1], scale_map[0], scale_map[1]

    def scale_swizzle(self):
        """The TMA swizzle with which the scales of eight rows lie in different banks."""
        return cute.make_swizzle({1: 0, 2: 1, 4: 2}[self.config.stage_steps], 4, 3)

    def launch(self, maps, x, x_scales, row_scale, global_scales, bias, out, num_ctas, stream, routing=None):
        self.kernel(
            x,
            x_scales,
            row_scale,
            [m[0] for m in maps],
            [m[1] for m in maps],
            [m[2] for m in maps],
            [m[3] for m in maps],
            global_scales,
            bias,
            out,
            routing,
        ).launch(
            grid=[num_ctas, 1, 1],
            block=[self.threads + 32, 1, 1],
            cluster=[self.config.splits, 1, 1],
            smem=self.config.smem_kib * 1024,
            min_blocks_per_mp=self.min_blocks,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        x_scales: cute.Tensor,
        row_scale: cute.Tensor,
        code_atoms: list,
        code_tensors: list,
        scale_atoms: list,
        scale_tensors: list,
        global_scales: list,
        bias,
        out: cute.Tensor,
        routing,
    ):
        config = self.config
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        cta = cute.arch.block_idx()[0]
        rank = cta % config.splits
        cluster = cta // config.splits
        num_clusters = cute.arch.grid_dim()[0] // config.splits

        k = code_tensors[0].shape[1] * 2
        total_steps = k // STEP_K
        total_stages = (total_steps + config.stage_steps - 1) // config.stage_steps
        first_stage = total_stages * rank // config.splits
        last_stage = total_stages * (rank + 1) // config.splits
        first_step = first_stage * config.stage_steps
        steps = cutlass.min(last_stage * config.stage_steps, total_steps) - first_step
        most_steps = (total_stages + config.splits - 1) // config.splits * config.stage_steps

        # Shared memory: barriers, activations, reduction buffer, ring of stages.
        base = cute.arch.get_dyn_smem(Uint8, alignment=1024)
        barriers = cute.recast_ptr(base, dtype=Int64)
        activations = Int32(base.toint()) + BARRIER_BYTES
        token_bytes = most_steps * STEP_BYTES + config.token_gap_bytes
        activation_bytes = token_bytes * self.slots
        reduction = activations + activation_bytes
        ring_offset = (BARRIER_BYTES + activation_bytes + self.epilogue.reduction_bytes + 1023) // 1024 * 1024
        stages = (config.smem_kib * 1024 - ring_offset) // self.stage_bytes
        class_slots = cutlass.min(stages, MAX_STAGES) // self.classes
        ring = Int32(base.toint()) + ring_offset  # all code tiles, then all scale tiles
        scale_ring = ring + class_slots * (self.classes * self.block_rows * CODE_BYTES * config.stage_steps)

        # Row blocks of a tile of tokens: those of all weights one after the other.
        ends = []
        blocks = Int32(0)
        for i in cutlass.range_constexpr(config.num_weights):
            rows = code_tensors[i].shape[0] // self.parts
            blocks = blocks + (rows + self.part_rows - 1) // self.part_rows
            ends.append(blocks)

        cute.arch.griddepcontrol_launch_dependents()
        if warp == self.warps:
            for atom in [*code_atoms, *scale_atoms]:
                cpasync.prefetch_descriptor(atom)
        with cute.arch.elect_one():  # of each warp: by one thread they would take as long as a load
            for i in cutlass.range(warp, self.classes * class_slots, self.warps + 1, unroll=1):
                cute.arch.mbarrier_init(barriers + i, 1)
                cute.arch.mbarrier_init(barriers + MAX_STAGES + i, self.readers)
            for i in cutlass.range(warp, CHUNKS if self.is_copied else 0, self.warps + 1, unroll=1):
                cute.arch.mbarrier_init(barriers + 2 * MAX_STAGES + i, 1)
            cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(self.has_columns_per_member):  # noqa: SIM102 - known when compiling, the other is not
            if thread < ZERO_BYTES // 16:
                zero = Int32(0)
                store_shared_v4(Int32(base.toint()) + ZERO_OFFSET + thread * 16, zero, zero, zero, zero)
        cute.arch.sync_threads()

        units = blocks
        if cutlass.const_expr(self.is_grouped and config.has_schedule):
            if cutlass.const_expr(not config.has_old_schedule):
                cute.arch.griddepcontrol_wait()  # the schedule says which weights to read
            units = blocks * load_global_i32(routing[1].iterator.toint())
        elif cutlass.const_expr(self.is_grouped):
            units = blocks * routing[7] * ((routing[6] + self.slots - 1) // self.slots)
        first_unit, last_unit = cluster, cluster + 1
        if units != num_clusters:  # divisions of 64 bits take long
            first_unit = Int32(Int64(units) * cluster // num_clusters)
            last_unit = Int32(Int64(units) * (cluster + 1) // num_clusters)

        if warp == self.warps:
            self.produce(
                code_atoms, code_tensors, scale_atoms, scale_tensors, routing, base, ring_offset, barriers,
                class_slots, ends, blocks, first_unit, last_unit, first_stage, last_stage - first_stage,
            )  # fmt: skip
        else:
            self.consume(
                x, x_scales, row_scale, global_scales, code_tensors, bias, out, routing, activations, token_bytes,
                reduction, ring, scale_ring, barriers, class_slots, ends, blocks, first_unit, last_unit, first_step,
                steps, last_stage - first_stage, rank, k, thread, warp,
            )  # fmt: skip

    @cute.jit
    def produce(
        self,
        code_atoms,
        code_tensors,
        scale_atoms,
        scale_tensors,
        routing,
        base,
        ring_offset,
        barriers,
        class_slots,
        ends,
        blocks,
        first_unit,
        last_unit,
        first_stage,
        num_stages,
    ):
        """One warp: TMA of codes and block scales, a stage at a time."""
        config = self.config
        code_bytes = self.block_rows * CODE_BYTES
        scale_width = self.stage_scale_bytes
        scale_offset = ring_offset + class_slots * (self.classes * code_bytes * config.stage_steps)
        code_ring = cute.make_tensor(
            cute.recast_ptr((base + ring_offset).align(1024), swizzle_=cute.make_swizzle(3, 4, 3), dtype=Uint8),
            cute.make_layout(
                (self.part_rows, CODE_BYTES, self.parts, config.stage_steps, MAX_STAGES),
                stride=(CODE_BYTES, 1, self.part_rows * CODE_BYTES, code_bytes, code_bytes * config.stage_steps),
            ),
        )
        scale_ring = cute.make_tensor(
            cute.recast_ptr((base + scale_offset).align(1024), swizzle_=self.scale_swizzle(), dtype=Uint8),
            cute.make_layout(
                (self.part_rows, scale_width, self.parts, MAX_STAGES),
                stride=(scale_width, 1, self.part_rows * scale_width, self.block_rows * scale_width),
            ),
        )
        code_sources, scale_sources = [], []
        for i in cutlass.range_constexpr(config.num_weights):
            code_sources.append(self.partition(code_atoms[i], code_tensors[i], code_ring, CODE_BYTES))
            scale_sources.append(self.partition(scale_atoms[i], scale_tensors[i], scale_ring, scale_width))

        index = [Int32(0) for _ in range(self.classes)]  # each class's next slot
        parity = [Int32(1) for _ in range(self.classes)]  # an empty barrier that nobody completed lets the first pass
        for unit in cutlass.range(first_unit, last_unit, unroll=1):
            block = unit
            expert = Int32(0)
            if cutlass.const_expr(self.is_grouped):
                tile = unit // blocks
                block = unit - tile * blocks
                expert = self.tile(routing, tile)[0]
            for round_start in cutlass.range(0, num_stages, self.classes, unroll=1):
                for c in cutlass.range_constexpr(self.classes):
                    stage = round_start + c
                    if stage < num_stages:
                        slot = c * class_slots + index[c]
                        cute.arch.mbarrier_wait(barriers + MAX_STAGES + slot, parity[c])
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive_and_expect_tx(barriers + slot, self.stage_bytes)
                        start = Int32(0)
                        for i in cutlass.range_constexpr(config.num_weights):
                            if block >= start and block < ends[i]:
                                for part in cutlass.range_constexpr(self.parts):
                                    for step in cutlass.range_constexpr(config.stage_steps):
                                        self.copy(
                                            code_atoms[i],
                                            code_sources[i][part],
                                            (block - start, (first_stage + stage) * config.stage_steps + step, expert),
                                            (part, step, slot),
                                            barriers + slot,
                                        )
                                    self.copy(
                                        scale_atoms[i],
                                        scale_sources[i][part],
                                        (block - start, first_stage + stage, expert),
                                        (part, slot),
                                        barriers + slot,
                                    )
                            start = ends[i]
                        index[c] = index[c] + 1
                        if index[c] == class_slots:
                            index[c] = Int32(0)
                            parity[c] = parity[c] ^ 1

    def partition(self, atom, tensor, ring, width):
        """What a TMA copies, for each part of a block's rows: (shared, global)."""
        tiler = (self.part_rows, width, 1) if self.is_grouped else (self.part_rows, width)
        sources = []
        for part in range(self.parts):
            if part > 0:
                tensor = cute.domain_offset((tensor.shape[0] // 2, 0, 0), tensor)
            tiles = cute.local_tile(tensor, tiler, (None,) * len(tiler))
            sources.append(
                cpasync.tma_partition(
                    atom,
                    0,
                    cute.make_layout(1),
                    cute.group_modes(ring, 0, 2),
                    cute.group_modes(tiles, 0, len(tiler)),
                )
            )
        return sources

    def copy(self, atom, source, coordinates, place, barrier):
        shared, tiles = source
        if not self.is_grouped:
            coordinates = coordinates[:2]
        cute.copy(atom, tiles[(None, *coordinates)], shared[(None, *place)], tma_bar_ptr=barrier)

    @cute.jit
    def consume(
        self,
        x,
        x_scales,
        row_scale,
        global_scales,
        code_tensors,
        bias,
        out,
        routing,
        activations,
        token_bytes,
        reduction,
        ring,
        scale_ring,
        barriers,
        class_slots,
        ends,
        blocks,
        first_unit,
        last_unit,
        first_step,
        steps,
        num_stages,
        rank,
        k,
        thread,
        warp,
    ):
        """All other warps: decode, multiply, reduce, store."""
        config = self.config
        first_row, tokens, expert, current = Int32(0), out.shape[0], Int32(0), Int32(-1)
        first_scales = []
        arrivals = barriers + 2 * MAX_STAGES  # of chunks of copied activations
        arrived = Int32(0)  # steps
        undo = None  # what sums are multiplied by where activations are scaled up
        if cutlass.const_expr(not self.is_grouped):
            first_scales = [global_scales[i][0] for i in range(config.num_weights)]  # constants: before the wait
            cute.arch.griddepcontrol_wait()
            if cutlass.const_expr(self.is_copied):
                self.copy_rows(x, activations, token_bytes, arrivals, tokens, first_step, steps, k, warp)
            else:
                self.fill(x, x_scales, None, None, activations, first_row, tokens, first_step, steps, k, thread, warp)
                cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=self.threads)
        elif cutlass.const_expr(not config.has_schedule or config.has_old_schedule):
            cute.arch.griddepcontrol_wait()
        first_row_scale = Float32(1.0)
        if cutlass.const_expr(config.has_row_scale):
            first_row_scale = load_global_f32(row_scale.iterator.toint())

        lane = thread % 32
        quad, member = lane // 4, lane % 4
        row_warp, group = warp % config.row_warps, warp // config.row_warps
        stage_class, first_in_stage = group // config.stage_steps, group % config.stage_steps
        if cutlass.const_expr(self.classes == 1):
            stage_class, first_in_stage = Int32(0), group
        # Where the lane's codes lie in the 128 bytes of its row, in the first half of a step; and its scales.
        quad_row = quad // 2 + 4 * (quad % 2)  # 0 4 1 5 2 6 3 7
        lane_offset = (member ^ quad_row) * 16
        scale_offset = member * 2
        if cutlass.const_expr(self.is_copied):
            quad_row = quad % 4 * 2 + quad // 4  # 0 2 4 6 1 3 5 7
            lane_offset = (member // 2 ^ quad_row) * 16 + member % 2 * 8
            scale_offset = Int32(0)
        row = row_warp * (16 * config.row_tiles) + quad_row
        scale_selector = member * 17 + 64  # bytes t and t + 4 of eight
        lane_places = (lane_offset, scale_selector, token_bytes)
        scale_turn = quad_row // {1: 8, 2: 4, 4: 2}[config.stage_steps]
        token = quad % self.slots if cutlass.const_expr(self.slots < 8) else quad
        columns = activations + (token * 4 + member) * 16  # the lane's activations; and bytes of a step
        pitch = Int32(STEP_BYTES * self.slots)
        zero_pitch = 16
        if cutlass.const_expr(self.is_copied):
            columns = activations + token * token_bytes + member * 32
            pitch = Int32(STEP_BYTES)
            zero_pitch = 32
        if cutlass.const_expr(self.has_columns_per_member):
            # Columns 2 m and 2 m + 1 are member m's. The others read zeros, in other banks than those that do not.
            is_own = quad // 2 == member
            columns = numerics.select(is_own, columns, activations - ZERO_BYTES + (quad // 2 + 1) % 4 * zero_pitch)
            pitch = numerics.select(is_own, pitch, Int32(0))

        decoder = Decoder(self.dtype, cute.arch.grid_dim()[1])
        if cutlass.const_expr(self.is_scaled_up):
            if steps > 0:
                cute.arch.mbarrier_wait(arrivals, 0)
            undo = self.scale_up(activations, steps, reduction, thread)
        accumulators = cute.make_rmem_tensor((4, self.token_tiles, config.row_tiles), Float32)
        index, parity = Int32(0), Int32(0)  # the class's next slot
        largest = Float32(0.0)
        for unit in cutlass.range(first_unit, last_unit, unroll=1):
            block = unit
            if cutlass.const_expr(self.is_grouped):
                tile = unit // blocks
                block = unit - tile * blocks
                if tile != current:
                    current = tile
                    expert, first_row, tokens = self.tile(routing, tile)
                    self.fill(
                        x, x_scales, routing[0], routing[4], activations, first_row, tokens, first_step, steps, k,
                        thread, warp,
                    )  # fmt: skip
                    cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=self.threads)
            accumulators.fill(0.0)
            for stage in cutlass.range(stage_class, num_stages, self.classes, unroll=1):
                slot = stage_class * class_slots + index
                cute.arch.mbarrier_wait(barriers + slot, parity)
                index = index + 1
                if index == class_slots:
                    index = Int32(0)
                    parity = parity ^ 1
                codes = ring + slot * (self.block_rows * CODE_BYTES * config.stage_steps) + row * CODE_BYTES
                scales = scale_ring + (slot * self.block_rows + row) * self.stage_scale_bytes + scale_offset
                if cutlass.const_expr(config.stage_steps == 1):  # a stage that is there has its step
                    if cutlass.const_expr(self.is_copied and not self.is_scaled_up):
                        arrived = self.await_step(arrivals, arrived, stage, steps)
                    self.multiply_step(decoder, accumulators, codes, scales, columns + stage * pitch, lane_places)
                else:
                    for in_stage in cutlass.range(first_in_stage, config.stage_steps, config.k_warps, unroll=1):
                        step = stage * config.stage_steps + in_stage
                        if step < steps:
                            if cutlass.const_expr(self.is_copied and not self.is_scaled_up):
                                arrived = self.await_step(arrivals, arrived, step, steps)
                            step_codes = codes + in_stage * (self.block_rows * CODE_BYTES)
                            step_scales = scales + (in_stage ^ scale_turn) * SCALE_BYTES
                            self.multiply_step(
                                decoder, accumulators, step_codes, step_scales, columns + step * pitch, lane_places
                            )
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(barriers + MAX_STAGES + slot)

            self.epilogue.store_partial_sums(accumulators, undo, reduction, group, row, member)
            self.epilogue.synchronise()
            if cutlass.const_expr(self.is_swiglu):
                largest = self.epilogue.store_swiglu(
                    global_scales[0], row_scale, first_row_scale, routing[2], routing[5], out, reduction, block, expert,
                    first_row, tokens, thread, largest,
                )  # fmt: skip
            elif cutlass.const_expr(self.is_grouped):
                self.epilogue.store_grouped(
                    global_scales[0], row_scale, first_row_scale, out, reduction, block, code_tensors[0].shape[0],
                    expert, first_row, tokens, thread,
                )  # fmt: skip
            else:
                start = Int32(0)
                column = Int32(0)
                for i in cutlass.range_constexpr(config.num_weights):
                    rows = code_tensors[i].shape[0]
                    if block >= start and block < ends[i]:
                        self.epilogue.store(
                            global_scales[i], first_scales[i], row_scale, first_row_scale, bias, out, reduction,
                            (block - start) * self.block_rows, rows, column, tokens, rank, thread,
                        )  # fmt: skip
                    start = ends[i]
                    column = column + rows
            self.epilogue.synchronise()
        if cutlass.const_expr(self.is_swiglu):
            self.epilogue.store_amax(largest, routing[3], reduction, thread, warp)

    def tile(self, routing, tile):
        """Expert, first row and number of rows of a tile."""
        if self.config.has_schedule:
            entry = routing[1].iterator.toint() + Int64(tile + 1) * 16
            return load_global_i32(entry), load_global_i32(entry + 4), load_global_i32(entry + 8)
        group_rows = routing[6]
        tiles = (group_rows + self.slots - 1) // self.slots
        expert, start = tile // tiles, tile % tiles * self.slots
        return expert, expert * group_rows + start, cutlass.min(group_rows - start, self.slots)

    @cute.jit
    def multiply_step(self, decoder, accumulators, codes, scales, columns, lane_places):
        """256 values of K of this warp's rows times all tokens."""
        if cutlass.const_expr(self.has_rolled_halves):
            for half in cutlass.range(2, unroll=1):
                self.multiply(decoder, accumulators, codes, scales, columns, lane_places, half)
        else:
            for half in cutlass.range_constexpr(2):
                self.multiply(decoder, accumulators, codes, scales, columns, lane_places, half)

    def multiply(self, decoder, accumulators, codes, scales, columns_address, lane_places, half):
        """Half a step."""
        config = self.config
        lane_offset, scale_selector, token_bytes = lane_places
        words, scale_pairs = [], []
        for tile in range(2 * config.row_tiles):  # eight rows each
            of_tile = codes + tile * 8 * CODE_BYTES
            scales_of_tile = scales + tile * 8 * SCALE_BYTES * config.stage_steps + half * 8
            if self.is_copied:
                pairs = [load_shared_v2(of_tile + (lane_offset ^ (half * 64 + i * 32))) for i in range(2)]
                words.append(pairs[0] + pairs[1])
                scale_pairs.append(permute(*load_shared_v2(scales_of_tile), scale_selector))
            else:
                words.append(load_shared_v4(of_tile + (lane_offset ^ (half * 64))))
                scale_pairs.append(load_shared_u16(scales_of_tile))
        if self.has_columns_per_member:
            self.multiply_blocks(decoder, accumulators, words, scale_pairs, columns_address, half)
            return
        factors = [decode_two_scales(pair, self.dtype) for pair in scale_pairs]
        for j in range(4):
            address = columns_address + self.column_offset(half, j)
            pitch = 8 * token_bytes if self.is_copied else 512
            columns = [load_shared_v4(address + n * pitch) for n in range(self.token_tiles)]
            for tile in range(config.row_tiles):
                low = self.scaled(decoder, words[2 * tile][j], factors[2 * tile][j // 2])
                high = self.scaled(decoder, words[2 * tile + 1][j], factors[2 * tile + 1][j // 2])
                for n in range(self.token_tiles):
                    c = [accumulators[i, n, tile] for i in range(4)]
                    c = self.multiply_word(c, low, high, columns[n])
                    for i in range(4):
                        accumulators[i, n, tile] = c[i]

    def column_offset(self, half, word):
        """Where the activations for a word of codes lie, in those of a step."""
        if self.is_copied:
            return half * (STEP_BYTES // 2) + word // 2 * 128 + word % 2 * 16
        return (half * 256 + word * 64) * self.slots

    def multiply_blocks(self, decoder, accumulators, words, scale_pairs, columns_address, half):
        """Half a step of one token: a sum for each of the lane's two blocks and rows, then times the block's scale."""
        scales = [two_scales_f32(pair) for pair in scale_pairs]
        for block in range(2):
            columns = [load_shared_v4(columns_address + self.column_offset(half, 2 * block + j)) for j in range(2)]
            for tile in range(self.config.row_tiles):
                sums = [Float32(0.0)] * 4
                for j in range(2):
                    low, high = (decoder.decode(words[2 * tile + i][2 * block + j]) for i in range(2))
                    sums = self.multiply_word(sums, low, high, columns[j])
                for i in range(2):
                    total = multiply_add_f32(sums[2 * i], scales[2 * tile + i][block], accumulators[2 * i, 0, tile])
                    accumulators[2 * i, 0, tile] = total

    def multiply_word(self, c, low, high, columns):
        """``c`` and the products of eight codes a lane of 16 rows."""
        for p in range(2):
            rows = (low[2 * p], high[2 * p], low[2 * p + 1], high[2 * p + 1])
            c = mma(c, rows, (columns[2 * p], columns[2 * p + 1]), self.dtype)
        return c

    def scaled(self, decoder, word, factor):
        """A word of eight codes times their block scale, as four registers of two values."""
        return [multiply_pair(pair, factor, self.dtype) for pair in decoder.decode(word)]


def build(config):
    """The jit function of a configuration and fake arguments: see :class:`Config` in ``ops/dispatch/decode_mm.py``."""

    def integer(divisibility=1):
        return cute.sym_int32(divisibility=divisibility)

    def vector(dtype):
        return make_fake_tensor(dtype, (integer(),), (1,), assumed_align=4)

    tokens, x_rows = integer(), integer()
    k, half_k, blocks_k = integer(STEP_K), integer(CODE_BYTES), integer(SCALE_BYTES)
    if config.activation == "packed":
        x = make_fake_tensor(Uint8, (x_rows, half_k), (half_k, 1), assumed_align=16)
    else:
        x = make_fake_tensor(BFloat16, (x_rows, k), (k, 1), assumed_align=16)
    x_scales = make_fake_tensor(cutlass.Float8E4M3FN, (integer(), blocks_k), (blocks_k, 1), assumed_align=2)
    out_stride = cute.sym_int64()
    out = make_fake_tensor(OUT_DTYPES[config.out_dtype], (tokens, integer()), (out_stride, 1), assumed_align=2)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    kernel = DecodeMM(config)
    if config.mode == "dense":
        codes, scales, global_scales = [], [], []
        for _ in range(config.num_weights):
            rows = integer()
            codes.append(make_fake_tensor(Uint8, (rows, half_k), (half_k, 1), assumed_align=16))
            scales.append(make_fake_tensor(cutlass.Float8E4M3FN, (rows, blocks_k), (blocks_k, 1), assumed_align=16))
            global_scales.append(vector(Float32))
        arguments = (x, x_scales, vector(Float32), codes, scales, global_scales, vector(Float32), out)
        return kernel.dense, (*arguments, Int32(1), stream)
    experts, rows, segments = integer(), integer(), integer()
    code_stride, scale_stride = cute.sym_int64(divisibility=16), cute.sym_int64(divisibility=16)
    codes = make_fake_tensor(Uint8, (experts, rows, half_k), (code_stride, half_k, 1), assumed_align=16)
    scales = make_fake_tensor(
        cutlass.Float8E4M3FN, (experts, rows, blocks_k), (scale_stride, blocks_k, 1), assumed_align=16
    )
    global_scale = make_fake_tensor(Float32, (experts, segments), (segments, 1), assumed_align=4)
    schedule = make_fake_tensor(Int32, (integer(), 4), (4, 1), assumed_align=4)
    arguments = (x, x_scales, vector(Float32), vector(Int32), schedule, codes, scales, global_scale)
    routing = (vector(Float32), vector(Float32), out, Int32(1), Float32(0.0), Int32(1), Int32(1))
    return kernel.grouped, (*arguments, *routing, stream)
