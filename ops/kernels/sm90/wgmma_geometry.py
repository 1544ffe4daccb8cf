"""What ``sm90.wgmma_w4`` is made of: its warps and registers, its rings in shared memory, and the tiles it walks."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Int32, Int64
from cutlass.cute.nvgpu import warpgroup

from dsv4_compile.ops.kernels.sm90.wgmma_instructions import load_global_i32

STAGE_K = 256  # of a weight stage
CODE_BYTES = STAGE_K // 2
SCALE_BYTES = STAGE_K // 16
HALF_K = STAGE_K // 2  # of which a lane has 32 in one piece; 64 bytes of codes, rows of a swizzle of four pieces
HALF_CODE_BYTES = CODE_BYTES // 2
STEP_K = 64  # of an activation stage: 128 bytes a token, one swizzle atom
STEPS = STAGE_K // STEP_K
HALF_ROWS = 64
BLOCK_ROWS = 2 * HALF_ROWS
CONSUMER_WARPS = 8  # of one k group, and of one team
TOKEN_BAND = 8  # token tiles that are walked before the next weight rows
SHARED_BYTES = 227 * 1024
BARRIER_BYTES = 1024
MAX_WEIGHT_STAGES, MAX_ACTIVATION_STAGES = 8, 12
DTYPES = {"bf16": BFloat16, "f16": Float16}

PRODUCER_THREADS = 128
PRODUCER_REGISTERS = 24
REGISTERS = 64 * 1024  # of a multiprocessor


class Geometry:
    """Sizes and offsets of a configuration, and which tile and weight an index stands for."""

    def __init__(self, config, epilogue):
        self.config = config
        self.tokens = config.tile_tokens
        self.is_grouped = config.mode != "dense"
        self.is_swiglu = config.mode == "swiglu"
        self.consumer_warps = CONSUMER_WARPS * config.k_groups * config.teams
        # A CTA shares out what its threads got at the launch, no more: setmaxnreg waits for registers that are free.
        consumers = 32 * self.consumer_warps
        self.threads = consumers + PRODUCER_THREADS
        launch_registers = REGISTERS // config.ctas_per_sm // self.threads // 8 * 8
        spare = launch_registers * self.threads - PRODUCER_REGISTERS * PRODUCER_THREADS
        self.consumer_registers = min(240, spare // consumers // 8 * 8)
        self.dtype = DTYPES[config.activation]
        self.activation_bytes = self.tokens * STEP_K * 2
        self.weight_bytes = BLOCK_ROWS * (CODE_BYTES + SCALE_BYTES)
        room = SHARED_BYTES // config.ctas_per_sm // 1024 * 1024 - BARRIER_BYTES - epilogue.shared_bytes
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
        self.shared_bytes = self.epilogue_offset + epilogue.shared_bytes
        assert self.group_stages >= 2
        assert self.shared_bytes <= SHARED_BYTES // config.ctas_per_sm

    def activation_ring(self, base):
        """Activation stages in shared memory: (token, 64 of K, stage)."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        layout = cute.tile_to_shape(atom, (self.tokens, STEP_K, self.activation_stages), order=(0, 1, 2))
        pointer = (base + self.activation_offset).align(1024)
        return cute.make_tensor(cute.recast_ptr(pointer, swizzle_=layout.inner, dtype=self.dtype), layout.outer)

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

    @cute.jit
    def weight_of(self, code_tensors, global_scales, block_ends, block, expert):
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
                first_row = (block - start) * (HALF_ROWS if self.is_swiglu else BLOCK_ROWS)
            start = block_ends[i]
            column = column + weight_rows
        if cutlass.const_expr(self.is_grouped):
            scale_address = (
                scale_address + Int64(cutlass.min(expert, Int32(global_scales[0].shape[0]) - 1) * segments) * 4
            )
        return scale_address, segments, rows, first_row, first_column
