"""The schedules of the three quantisers; what they quantise comes from a source.

- rows: threads own whole rows, which stay in their registers. With a global scale a row there is nothing to wait for;
  with one for the tensor, a tensor small enough for one cluster is one launch: the CTAs exchange their maxima.
- amax, then flat: two launches for larger tensors. The first leaves one maximum a CTA in a workspace, no atomics and
  nothing to clear; each warp of the second reduces those. It walks backwards, so that it meets in the L2 what the first
  read last.

A source is an object with

- ``raw_words``, ``kept_dtype``: registers that a block takes as loaded, and the dtype it is quantised in;
- ``load(inputs, row, column)``: the words of one block as loaded;
- ``prepare(inputs, raw, factor, column)``: from those, the block that is quantised;
- ``top(raw, at, inputs, largest, known)``: the larger of ``largest`` and the largest finite magnitude of the block
  whose words start at ``at``, as bits; ``known`` is shared by the CTA, see SwiGlu;
- ``has_bound``: whether ``bound(raw, at, inputs, known)`` raises ``known`` before all that;
- ``has_statistic``: whether the whole row determines a factor: ``row_sum(raw, totals)`` adds a block to some fp64
  sums, ``factor(inputs, total)`` makes the factor of their sum, and flat passes read it from memory.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float16, Float32, Float64, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.quantizer import (
    CTA_THREADS,
    FLAT_THREADS,
    MAX_PARTIALS,
    AmaxConfig,
    FlatConfig,
    RowsConfig,
)
from dsv4_compile.ops.kernels.sm90 import blocks as bl
from dsv4_compile.ops.kernels.sm90 import numerics as nm

WARPS = CTA_THREADS // 32
AMAX_FLOOR_BITS = 0x322BCC77  # fp32 1e-8
DTYPES = {"bfloat16": BFloat16, "float16": Float16, "float32": Float32}


@dataclass
class Operand:
    """A tensor [outer, inner, K]: its address, and the bytes from one to the next of its leading dimensions."""

    address: Any
    outer_pitch: Any
    inner_pitch: Any


@dataclass
class Inputs:
    """What sources read: two operands, how rows divide into outer and inner, blocks a row, the operator's scalar."""

    first: Operand
    second: Operand
    inner_rows: Any
    inner_multiplier: Any
    inner_shift: Any
    row_blocks: Any
    scalar: Any

    def row(self, operand: Operand, row):
        """Address of a row."""
        outer = nm.quotient(row, self.inner_multiplier, self.inner_shift)
        inner = row - outer * self.inner_rows
        return operand.address + Int64(outer) * operand.outer_pitch + Int64(inner) * operand.inner_pitch


def _inputs(
    first, second, inner_rows, inner_multiplier, inner_shift,
    first_outer, first_inner, second_outer, second_inner, row_blocks, scalar,
):  # fmt: skip
    operands = (
        Operand(nm.address_of(first), first_outer, first_inner),
        Operand(nm.address_of(second), second_outer, second_inner),
    )
    return Inputs(*operands, inner_rows, inner_multiplier, inner_shift, row_blocks, scalar)


@cute.jit
def sum_rows(
    raw: cute.Tensor,
    sums: cute.Tensor,
    factors: cute.Tensor,
    inputs: cutlass.Constexpr,
    source: cutlass.Constexpr,
    config: cutlass.Constexpr,
    group: Int32,
):
    """The factor of each row of a group, into registers, through one barrier of the group."""
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    for s in cutlass.range_constexpr(config.rows):
        # Chains of additions: four where a row is waited for, one where registers matter more.
        totals = [Float64(0.0)] * (1 if config.is_partial else 4)
        for b in cutlass.range_constexpr(config.blocks):
            at = (s * config.blocks + b) * source.raw_words
            totals = source.row_sum([raw[at + i] for i in range(source.raw_words)], totals)
        total = totals[0]
        for other in totals[1:]:
            total = nm.add_f64(total, other)
        for step in cutlass.range_constexpr(5):
            total = nm.add_f64(total, cute.arch.shuffle_sync_bfly(total, offset=16 >> step))
        if lane == 0:
            sums[s * WARPS + warp] = total
    cute.arch.barrier(barrier_id=1 + group, number_of_threads=config.threads)
    first_warp = group * (config.threads // 32)
    for s in cutlass.range_constexpr(config.rows):
        total = sums[s * WARPS + first_warp]
        for w in cutlass.range_constexpr(1, config.threads // 32):
            total = nm.add_f64(total, sums[s * WARPS + first_warp + w])
        factors[s] = source.factor(inputs, total)


@cute.jit
def load_rows(
    raw: cute.Tensor,
    first_row: Int32,
    rows: Int32,
    lane: Int32,
    inputs: cutlass.Constexpr,
    source: cutlass.Constexpr,
    config: cutlass.Constexpr,
):
    """The blocks that a thread owns of the rows of its group, all loads before the first use; zeros beyond the end."""
    load, raw_words = source.load, source.raw_words
    for s in cutlass.range_constexpr(config.rows):
        for b in cutlass.range_constexpr(config.blocks):
            at = (s * config.blocks + b) * raw_words
            for i in cutlass.range_constexpr(raw_words):
                raw[at + i] = Uint32(0)
            column = lane + b * config.threads
            if (first_row + s < rows) & (column < inputs.row_blocks):
                words = load(inputs, first_row + s, column)
                for i in cutlass.range_constexpr(raw_words):
                    raw[at + i] = words[i]


@cute.jit
def prepare_rows(
    raw: cute.Tensor,
    kept: cute.Tensor,
    factors: cute.Tensor,
    tops: cute.Tensor,
    first_row: Int32,
    rows: Int32,
    lane: Int32,
    inputs: cutlass.Constexpr,
    source: cutlass.Constexpr,
    config: cutlass.Constexpr,
):
    """Makes the blocks that are quantised, and the largest finite magnitude of each row among this thread's."""
    prepare, raw_words, dtype = source.prepare, source.raw_words, source.kept_dtype
    kept_words = bl.words_of(dtype)
    for s in cutlass.range_constexpr(config.rows):
        tops[s] = Uint32(0)
        for b in cutlass.range_constexpr(config.blocks):
            at, to = (s * config.blocks + b) * raw_words, (s * config.blocks + b) * kept_words
            column = lane + b * config.threads
            for i in cutlass.range_constexpr(kept_words):
                kept[to + i] = Uint32(0)
            # Nothing is made of the zeros beyond the end: a division of zero takes the slow path, for the whole warp.
            if (first_row + s < rows) & (column < inputs.row_blocks):
                words = prepare(inputs, [raw[at + i] for i in range(raw_words)], factors[s], column)
                for i in cutlass.range_constexpr(kept_words):
                    kept[to + i] = words[i]
            tops[s] = nm.larger_u32(tops[s], bl.finite_amax(kept, to, dtype))


@cute.kernel
def rows_kernel(
    first: cute.Tensor,
    second: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    global_scale: cute.Tensor,
    norm: cute.Tensor,
    rows: Int32,
    row_blocks: Int32,
    inner_rows: Int32,
    inner_multiplier: Uint32,
    inner_shift: Int32,
    first_outer: Int64,
    first_inner: Int64,
    second_outer: Int64,
    second_inner: Int64,
    scalar: Float32,
    is_pow2: Int32,
    source: cutlass.Constexpr,
    config: cutlass.Constexpr,
):
    groups, row_warps = CTA_THREADS // config.threads, config.threads // 32
    kept_words = bl.words_of(source.kept_dtype)
    smem = cutlass.memory.SmemAllocator()
    shared_sums = smem.allocate_tensor(Float64, cute.make_layout(config.rows * WARPS), 16)
    shared_tops = smem.allocate_tensor(Uint32, cute.make_layout(config.rows * WARPS), 16)
    tops_of_ctas = smem.allocate_tensor(Uint32, cute.make_layout(32), 16)
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    lane_of_warp, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    group = thread // config.threads
    lane = thread - group * config.threads
    inputs = _inputs(
        first,
        second,
        inner_rows,
        inner_multiplier,
        inner_shift,
        first_outer,
        first_inner,
        second_outer,
        second_inner,
        row_blocks,
        scalar,
    )
    first_row = (cta * groups + group) * config.rows
    raw = cute.make_rmem_tensor(config.rows * config.blocks * source.raw_words, Uint32)
    kept = cute.make_rmem_tensor(config.rows * config.blocks * kept_words, Uint32)
    factors = cute.make_rmem_tensor(config.rows, Float32)
    tops = cute.make_rmem_tensor(config.rows, Uint32)
    if cutlass.const_expr(config.cluster > 1):
        cute.arch.cluster_arrive_relaxed()  # waited for before the first store to another CTA: it has started then
    if cutlass.const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()

    load_rows(raw, first_row, rows, lane, inputs, source, config)
    for s in cutlass.range_constexpr(config.rows):
        factors[s] = Float32(1.0)
    if cutlass.const_expr(source.has_statistic):
        sum_rows(raw, shared_sums, factors, inputs, source, config, group)
    prepare_rows(raw, kept, factors, tops, first_row, rows, lane, inputs, source, config)

    if cutlass.const_expr(config.per_token):
        for s in cutlass.range_constexpr(config.rows):
            top = nm.largest_of_warp(tops[s])
            if lane_of_warp == 0:
                shared_tops[s * WARPS + warp] = top
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=config.threads)
        for s in cutlass.range_constexpr(config.rows):
            top = Uint32(0)
            for w in cutlass.range_constexpr(row_warps):
                top = nm.larger_u32(top, shared_tops[s * WARPS + group * row_warps + w])
            tops[s] = top
    else:
        top = Uint32(0)
        for s in cutlass.range_constexpr(config.rows):
            top = nm.larger_u32(top, tops[s])
        top = nm.largest_of_warp(top)
        if lane_of_warp == 0:
            shared_tops[warp] = top
        cute.arch.sync_threads()
        top = nm.largest_of_warp(shared_tops[lane_of_warp % WARPS])
        if cutlass.const_expr(config.cluster > 1):
            cute.arch.cluster_wait()
            if thread < config.cluster:
                nm.store_to_cluster((tops_of_ctas.iterator + cta).toint(), thread, top)
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
            top = nm.largest_of_warp(tops_of_ctas[lane_of_warp % config.cluster])
        for s in cutlass.range_constexpr(config.rows):
            tops[s] = top

    codes_at, scales_at = nm.address_of(codes), nm.address_of(scales)
    global_scale_at, norm_at = nm.address_of(global_scale), nm.address_of(norm)
    for s in cutlass.range_constexpr(config.rows):
        row = first_row + s
        scale = bl.global_scale(tops[s], is_pow2)
        six_scales = nm.multiply(scale, bl.E2M1_MAX)
        if cutlass.const_expr(config.per_token):
            if (lane == 0) & (row < rows):
                nm.store_f32(global_scale_at + Int64(row) * 4, scale)
        elif cutlass.const_expr(s == 0):  # noqa: SIM102 - known when compiling, the other one when running
            if (thread == 0) & (cta == 0):
                nm.store_f32(global_scale_at, scale)
        for b in cutlass.range_constexpr(config.blocks):
            column = lane + b * config.threads
            if (row < rows) & (column < row_blocks):
                words = [kept[(s * config.blocks + b) * kept_words + i] for i in range(kept_words)]
                block = row * row_blocks + column
                block_codes, byte = bl.quantize(words, source.kept_dtype, scale, six_scales)
                bl.write(codes_at, scales_at, block, block_codes, byte)
                if cutlass.const_expr(config.norm):
                    bl.store(norm_at + Int64(block) * bl.bytes_of(source.kept_dtype), words)


@cute.jit
def write_partial(top: Uint32, shared_tops: cute.Tensor, partials: cute.Tensor):
    """The CTA's largest magnitude to its place in the workspace."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    top = nm.largest_of_warp(top)
    warp = cute.arch.warp_idx()  # a shuffle: all lanes take part
    if cute.arch.lane_idx() == 0:
        shared_tops[warp] = top
    cute.arch.sync_threads()
    if thread < 32:
        top = nm.largest_of_warp(shared_tops[thread % WARPS])
        if thread == 0:
            nm.store_f32(nm.address_of(partials) + Int64(cta) * 4, nm.from_bits(top))


@cute.kernel
def rows_amax_kernel(
    first: cute.Tensor,
    second: cute.Tensor,
    partials: cute.Tensor,
    row_factors: cute.Tensor,
    norm: cute.Tensor,
    rows: Int32,
    row_blocks: Int32,
    inner_rows: Int32,
    inner_multiplier: Uint32,
    inner_shift: Int32,
    first_outer: Int64,
    first_inner: Int64,
    second_outer: Int64,
    second_inner: Int64,
    scalar: Float32,
    source: cutlass.Constexpr,
    config: cutlass.Constexpr,
):
    groups = CTA_THREADS // config.threads
    kept_words = bl.words_of(source.kept_dtype)
    smem = cutlass.memory.SmemAllocator()
    shared_sums = smem.allocate_tensor(Float64, cute.make_layout(2 * WARPS), 16)
    shared_tops = smem.allocate_tensor(Uint32, cute.make_layout(WARPS), 16)
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    group = thread // config.threads
    lane = thread - group * config.threads
    inputs = _inputs(
        first,
        second,
        inner_rows,
        inner_multiplier,
        inner_shift,
        first_outer,
        first_inner,
        second_outer,
        second_inner,
        row_blocks,
        scalar,
    )
    raw = cute.make_rmem_tensor(config.blocks * source.raw_words, Uint32)
    kept = cute.make_rmem_tensor(config.blocks * kept_words, Uint32)
    factors = cute.make_rmem_tensor(1, Float32)
    tops = cute.make_rmem_tensor(1, Uint32)
    if cutlass.const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
    factors_at, norm_at = nm.address_of(row_factors), nm.address_of(norm)
    largest = Uint32(0)
    row = cta * groups + group
    parity = Int32(0)
    bytes_of_block, norm_too = bl.bytes_of(source.kept_dtype), config.norm
    while row < rows:
        load_rows(raw, row, rows, lane, inputs, source, config)
        # Two buffers in turn: the barrier of this row is passed only by those that have read the row before last.
        sum_rows(raw, cute.domain_offset(parity * WARPS, shared_sums), factors, inputs, source, config, group)
        parity = 1 - parity
        prepare_rows(raw, kept, factors, tops, row, rows, lane, inputs, source, config)
        largest = nm.larger_u32(largest, tops[0])
        if lane == 0:
            nm.store_f32(factors_at + Int64(row) * 4, factors[0])
        if cutlass.const_expr(norm_too):
            for b in cutlass.range_constexpr(config.blocks):
                column = lane + b * config.threads
                if column < row_blocks:
                    words = [kept[b * kept_words + i] for i in range(kept_words)]
                    block = row * row_blocks + column
                    bl.store(norm_at + Int64(block) * bytes_of_block, words)
        row += ctas * groups
    write_partial(largest, shared_tops, partials)


@cute.kernel
def amax_kernel(
    first: cute.Tensor,
    second: cute.Tensor,
    partials: cute.Tensor,
    num_blocks: Int32,
    row_blocks: Int32,
    multiplier: Uint32,
    shift: Int32,
    inner_rows: Int32,
    inner_multiplier: Uint32,
    inner_shift: Int32,
    first_outer: Int64,
    first_inner: Int64,
    second_outer: Int64,
    second_inner: Int64,
    scalar: Float32,
    source: cutlass.Constexpr,
    config: cutlass.Constexpr,
):
    smem = cutlass.memory.SmemAllocator()
    shared_tops = smem.allocate_tensor(Uint32, cute.make_layout(WARPS), 16)
    known = smem.allocate_tensor(
        Uint32, cute.make_layout(1), 16
    )  # a lower bound of the maximum, for sources that can use it
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    inputs = _inputs(
        first,
        second,
        inner_rows,
        inner_multiplier,
        inner_shift,
        first_outer,
        first_inner,
        second_outer,
        second_inner,
        row_blocks,
        scalar,
    )
    raw = cute.make_rmem_tensor(config.unroll * source.raw_words, Uint32)
    ahead = cute.make_rmem_tensor(config.unroll * source.raw_words, Uint32)
    chunk_blocks = CTA_THREADS * config.unroll
    top_of, raw_words, unroll = source.top, source.raw_words, config.unroll
    if thread == 0:
        known[0] = Uint32(AMAX_FLOOR_BITS)
    cute.arch.sync_threads()
    if cutlass.const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
    largest = Uint32(AMAX_FLOOR_BITS)
    block = cta * chunk_blocks + thread
    load_blocks(raw, block, CTA_THREADS, num_blocks, multiplier, shift, inputs, source)
    if cutlass.const_expr(source.has_bound):
        for u in cutlass.range_constexpr(unroll):
            source.bound(raw, u * raw_words, inputs, known)
        cute.arch.sync_threads()
    while block - thread < num_blocks:
        block += ctas * chunk_blocks
        load_blocks(ahead, block, CTA_THREADS, num_blocks, multiplier, shift, inputs, source)
        for u in cutlass.range_constexpr(unroll):
            largest = top_of(raw, u * raw_words, inputs, largest, known)
        for i in cutlass.range_constexpr(unroll * raw_words):
            raw[i] = ahead[i]
    write_partial(largest, shared_tops, partials)


@cute.jit
def load_blocks(
    raw: cute.Tensor,
    block: Int32,
    step: cutlass.Constexpr,
    num_blocks: Int32,
    multiplier: Uint32,
    shift: Int32,
    inputs: cutlass.Constexpr,
    source: cutlass.Constexpr,
):
    """Blocks ``step`` apart, as many as ``raw`` holds; zeros from the end on, and before the first."""
    load, raw_words = source.load, source.raw_words
    for u in cutlass.range_constexpr(cute.size(raw) // raw_words):
        for i in cutlass.range_constexpr(raw_words):
            raw[u * raw_words + i] = Uint32(0)
        number = block + u * step
        if (number >= 0) & (number < num_blocks):
            row = nm.quotient(number, multiplier, shift)
            words = load(inputs, row, number - row * inputs.row_blocks)
            for i in cutlass.range_constexpr(raw_words):
                raw[u * raw_words + i] = words[i]


@cute.kernel
def flat_kernel(
    first: cute.Tensor,
    second: cute.Tensor,
    partials: cute.Tensor,
    row_factors: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    global_scale: cute.Tensor,
    num_blocks: Int32,
    num_partials: Int32,
    row_blocks: Int32,
    multiplier: Uint32,
    shift: Int32,
    inner_rows: Int32,
    inner_multiplier: Uint32,
    inner_shift: Int32,
    first_outer: Int64,
    first_inner: Int64,
    second_outer: Int64,
    second_inner: Int64,
    scalar: Float32,
    is_pow2: Int32,
    source: cutlass.Constexpr,
    config: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    inputs = _inputs(
        first,
        second,
        inner_rows,
        inner_multiplier,
        inner_shift,
        first_outer,
        first_inner,
        second_outer,
        second_inner,
        row_blocks,
        scalar,
    )
    raw = cute.make_rmem_tensor(config.unroll * source.raw_words, Uint32)
    ahead = cute.make_rmem_tensor(config.unroll * source.raw_words, Uint32)
    chunk_blocks = FLAT_THREADS * config.unroll
    block = (cute.ceil_div(num_blocks, chunk_blocks) - 1 - cta) * chunk_blocks + thread
    # Early: whoever wrote these had finished when the amax pass, past its own wait, let this one start.
    if cutlass.const_expr(config.early):
        load_blocks(raw, block, FLAT_THREADS, num_blocks, multiplier, shift, inputs, source)
    if cutlass.const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
    if cutlass.const_expr(not config.early):
        load_blocks(raw, block, FLAT_THREADS, num_blocks, multiplier, shift, inputs, source)
    lane = cute.arch.lane_idx()
    top = Uint32(0)
    for i in cutlass.range_constexpr(MAX_PARTIALS // 128):
        index = 4 * lane + i * 128
        if index < num_partials:
            for word in nm.load_words_from_l2(nm.address_of(partials) + Int64(index) * 4):
                top = nm.larger_u32(top, word)
    scale = bl.global_scale(nm.largest_of_warp(top), is_pow2)
    six_scales = nm.multiply(scale, bl.E2M1_MAX)
    if (thread == 0) & (cta == 0):
        nm.store_f32(nm.address_of(global_scale), scale)
    codes_at, scales_at, factors_at = nm.address_of(codes), nm.address_of(scales), nm.address_of(row_factors)
    prepare, raw_words, kept_dtype = source.prepare, source.raw_words, source.kept_dtype
    has_statistic, unroll = source.has_statistic, config.unroll
    while block >= 0:
        load_blocks(ahead, block - ctas * chunk_blocks, FLAT_THREADS, num_blocks, multiplier, shift, inputs, source)
        for u in cutlass.range_constexpr(unroll):
            number = block + u * FLAT_THREADS
            if number < num_blocks:
                factor, column = Float32(1.0), Int32(0)
                if cutlass.const_expr(has_statistic):
                    row = nm.quotient(number, multiplier, shift)
                    column = number - row * row_blocks
                    factor = nm.load_f32_from_l2(factors_at + Int64(row) * 4)
                words = prepare(inputs, [raw[u * raw_words + i] for i in range(raw_words)], factor, column)
                block_codes, byte = bl.quantize(words, kept_dtype, scale, six_scales)
                bl.write(codes_at, scales_at, number, block_codes, byte)
        block -= ctas * chunk_blocks
        for i in cutlass.range_constexpr(unroll * raw_words):
            raw[i] = ahead[i]


def _vector(dtype, align: int = 4):
    return make_fake_tensor(dtype, (cute.sym_int64(),), (1,), assumed_align=align)


def _packed():
    return _vector(Uint8, 16), _vector(Uint8, 16), _vector(Float32)


def build(config, source):
    """The ``cute.jit`` function of a schedule for a source, and its fake arguments."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    operands = (_vector(DTYPES[config.dtype], 16), _vector(DTYPES[source.second_dtype], 16))
    division = (Int32(1), Uint32(1), Int32(0))  # divisor, multiplier, shift
    pitches = (Int64(1),) * 4
    if isinstance(config, RowsConfig) and config.is_partial:

        @cute.jit
        def launch(
            first: cute.Tensor,
            second: cute.Tensor,
            partials: cute.Tensor,
            row_factors: cute.Tensor,
            norm: cute.Tensor,
            rows: Int32,
            ctas: Int32,
            row_blocks: Int32,
            inner_rows: Int32,
            inner_multiplier: Uint32,
            inner_shift: Int32,
            first_outer: Int64,
            first_inner: Int64,
            second_outer: Int64,
            second_inner: Int64,
            scalar: Float32,
            stream,
        ):
            rows_amax_kernel(
                first,
                second,
                partials,
                row_factors,
                norm,
                rows,
                row_blocks,
                inner_rows,
                inner_multiplier,
                inner_shift,
                first_outer,
                first_inner,
                second_outer,
                second_inner,
                scalar,
                source,
                config,
            ).launch(
                grid=(ctas, 1, 1),
                block=(CTA_THREADS, 1, 1),
                stream=stream,
                use_pdl=config.pdl,
            )

        norm = _vector(DTYPES[config.dtype], 16)
        return launch, (
            *operands, _vector(Float32), _vector(Float32), norm, Int32(1), Int32(1), Int32(1), *division, *pitches,
            Float32(1.0), stream,
        )  # fmt: skip
    if isinstance(config, RowsConfig):

        @cute.jit
        def launch(
            first: cute.Tensor,
            second: cute.Tensor,
            codes: cute.Tensor,
            scales: cute.Tensor,
            global_scale: cute.Tensor,
            norm: cute.Tensor,
            rows: Int32,
            row_blocks: Int32,
            inner_rows: Int32,
            inner_multiplier: Uint32,
            inner_shift: Int32,
            first_outer: Int64,
            first_inner: Int64,
            second_outer: Int64,
            second_inner: Int64,
            scalar: Float32,
            is_pow2: Int32,
            stream,
        ):
            ctas = cute.ceil_div(rows, config.rows * (CTA_THREADS // config.threads))
            if cutlass.const_expr(config.cluster > 1):
                ctas = config.cluster
            rows_kernel(
                first,
                second,
                codes,
                scales,
                global_scale,
                norm,
                rows,
                row_blocks,
                inner_rows,
                inner_multiplier,
                inner_shift,
                first_outer,
                first_inner,
                second_outer,
                second_inner,
                scalar,
                is_pow2,
                source,
                config,
            ).launch(
                grid=(ctas, 1, 1),
                block=(CTA_THREADS, 1, 1),
                cluster=(config.cluster, 1, 1) if config.cluster > 1 else None,
                stream=stream,
                use_pdl=config.pdl,
            )

        norm = _vector(DTYPES[config.dtype], 16)
        return launch, (
            *operands,
            *_packed(),
            norm,
            Int32(1),
            Int32(1),
            *division,
            *pitches,
            Float32(1.0),
            Int32(0),
            stream,
        )
    if isinstance(config, AmaxConfig):

        @cute.jit
        def launch(
            first: cute.Tensor,
            second: cute.Tensor,
            partials: cute.Tensor,
            num_blocks: Int32,
            ctas: Int32,
            row_blocks: Int32,
            multiplier: Uint32,
            shift: Int32,
            inner_rows: Int32,
            inner_multiplier: Uint32,
            inner_shift: Int32,
            first_outer: Int64,
            first_inner: Int64,
            second_outer: Int64,
            second_inner: Int64,
            scalar: Float32,
            stream,
        ):
            amax_kernel(
                first,
                second,
                partials,
                num_blocks,
                row_blocks,
                multiplier,
                shift,
                inner_rows,
                inner_multiplier,
                inner_shift,
                first_outer,
                first_inner,
                second_outer,
                second_inner,
                scalar,
                source,
                config,
            ).launch(
                grid=(ctas, 1, 1),
                block=(CTA_THREADS, 1, 1),
                stream=stream,
                use_pdl=config.pdl,
            )

        return launch, (
            *operands,
            _vector(Float32),
            Int32(1),
            Int32(1),
            *division,
            *division,
            *pitches,
            Float32(1.0),
            stream,
        )
    assert isinstance(config, FlatConfig)

    @cute.jit
    def launch(
        first: cute.Tensor,
        second: cute.Tensor,
        partials: cute.Tensor,
        row_factors: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        global_scale: cute.Tensor,
        num_blocks: Int32,
        num_partials: Int32,
        ctas: Int32,
        row_blocks: Int32,
        multiplier: Uint32,
        shift: Int32,
        inner_rows: Int32,
        inner_multiplier: Uint32,
        inner_shift: Int32,
        first_outer: Int64,
        first_inner: Int64,
        second_outer: Int64,
        second_inner: Int64,
        scalar: Float32,
        is_pow2: Int32,
        stream,
    ):
        flat_kernel(
            first, second, partials, row_factors, codes, scales, global_scale, num_blocks, num_partials, row_blocks,
            multiplier, shift, inner_rows, inner_multiplier, inner_shift,
            first_outer, first_inner, second_outer, second_inner, scalar, is_pow2, source, config,
        ).launch(grid=(ctas, 1, 1), block=(FLAT_THREADS, 1, 1), stream=stream, use_pdl=config.pdl)  # fmt: skip

    return launch, (
        *operands, _vector(Float32), _vector(Float32), *_packed(), Int32(1), Int32(1), Int32(1), *division,
        *division, *pitches, Float32(1.0), Int32(0), stream,
    )  # fmt: skip
