"""Routing for the MoE: a stable counting sort of slots by expert, and the tile list of a grouped product.

A warp owns consecutive slots, so that order within an expert is the order of slots with no atomics: ``match.any`` finds
the lanes that hold one expert, and a warp's counter of that expert grows by their number. Slots are walked twice, to
count and to place. With several CTAs, those of one cluster, each reads the counts of the others in their shared memory
between the two walks.
"""

import cutlass
from cutlass import Float32, Int32, Uint16, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.moe_align import MAX_EXPERTS, SMALL_SLOTS, AlignConfig, ScheduleConfig

THREADS = 1024
WARPS = THREADS // 32
SMALL_WARPS = SMALL_SLOTS // 32
FULL = 0xFFFFFFFF
AHEAD = 4  # loads in flight a lane


@cute.jit
def write_row(schedule: cute.Tensor, row: Int32, a: Int32, b: Int32, c: Int32):
    """One 16-byte store of (a, b, c, 0)."""
    values = cute.make_rmem_tensor(4, Int32)
    values[0], values[1], values[2], values[3] = a, b, c, Int32(0)
    cute.autovec_copy(values, schedule[row, None])


@cute.jit
def scan_warp(value: Int32) -> Int32:
    """Inclusive sum over the lanes up to this one."""
    lane = cute.arch.lane_idx()
    for step in cutlass.range_constexpr(5):
        other = cute.arch.shuffle_sync_up(value, 1 << step)
        if lane >= (1 << step):
            value += other
    return value


@cute.jit
def scan_block(value: Int32, totals: cute.Tensor) -> Int32:
    """Inclusive sum over the threads of the CTA; ``totals`` [32] in shared memory, which must not be in use."""
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    inclusive = scan_warp(value)
    if lane == 31:
        totals[warp] = inclusive
    cute.arch.sync_threads()
    of_warps = scan_warp(totals[lane])
    before = cute.arch.shuffle_sync(of_warps, cutlass.max(warp - 1, 0))
    if warp > 0:
        inclusive += before
    return inclusive


@cute.jit
def write_tiles(
    schedule: cute.Tensor,
    row_start: cute.Tensor,
    tile_start: cute.Tensor,
    groups: Int32,
    group_base: Int32,
    tile_base: Int32,
    tile_rows: Int32,
    first: Int32,
    stride: Int32,
):
    """Writes the tiles of up to 1024 groups, a thread each ``stride``-th; group g has rows row_start[g] and on.

    A tile's group is found by bisection in the exclusive sums ``tile_start`` [groups + 1], so one expert with all rows
    costs no more than many with a few.
    """
    tiles = tile_start[groups]
    rows_of_schedule = Int32(cute.size(schedule, mode=[0]))
    tile = first
    while tile < tiles:
        low, high = Int32(0), groups  # tile_start[low] <= tile < tile_start[high]
        while high - low > 1:
            middle = (low + high) // 2
            if tile_start[middle] <= tile:
                low = middle
            else:
                high = middle
        begin = (tile - tile_start[low]) * tile_rows
        rows = row_start[MAX_EXPERTS + low] - begin
        row = tile_base + tile + 1
        if row < rows_of_schedule:
            write_row(schedule, row, group_base + low, row_start[low] + begin, cutlass.min(rows, tile_rows))
        tile += stride


@cute.jit
def count_or_place(
    ids: cute.Tensor,
    counters: cute.Tensor,
    start: cute.Tensor,
    sorted_slots: cute.Tensor,
    row_of_slot: cute.Tensor,
    weights: cute.Tensor,
    row_weight: cute.Tensor,
    token_scale: cute.Tensor,
    row_scale: cute.Tensor,
    experts: Int32,
    top_k: Int32,
    first: Int32,
    steps: Int32,
    is_placing: cutlass.Constexpr,
    has_weights: cutlass.Constexpr,
    has_token_scale: cutlass.Constexpr,
):
    """A warp's walk over ``32 steps`` slots from ``first`` on; ``counters`` are the warp's own [E]."""
    lane = cute.arch.lane_idx()
    slots = Int32(cute.size(ids))
    for chunk in range(cute.ceil_div(steps, AHEAD)):
        chunk_first = first + chunk * AHEAD * 32 + lane
        chosen = cute.make_rmem_tensor(AHEAD, Int32)
        for ahead in cutlass.range_constexpr(AHEAD):  # all loads before the first use
            chosen[ahead] = Int32(-1)
            slot = chunk_first + ahead * 32
            if (slot < slots) & (chunk * AHEAD + ahead < steps):
                value = ids[slot]
                if (value >= 0) & (value < experts):
                    chosen[ahead] = Int32(value)
        for ahead in cutlass.range_constexpr(AHEAD):
            if chunk * AHEAD + ahead < steps:
                slot = chunk_first + ahead * 32
                expert = chosen[ahead]
                same = cute.arch.match_sync(FULL, expert)
                lower = cute.arch.popc(same & cute.arch.lanemask_lt())
                if cutlass.const_expr(is_placing):
                    if expert >= 0:
                        row = start[expert] + Int32(counters[expert]) + Int32(lower)
                        sorted_slots[row] = slot
                        row_of_slot[slot] = row
                        if cutlass.const_expr(has_weights):
                            row_weight[row] = Float32(weights[slot])
                        if cutlass.const_expr(has_token_scale):
                            row_scale[row] = token_scale[slot // top_k]
                    elif slot < slots:
                        row_of_slot[slot] = Int32(-1)
                    cute.arch.sync_warp()
                if (expert >= 0) & (lower == 0):
                    counters[expert] = Uint16(Int32(counters[expert]) + Int32(cute.arch.popc(same)))
                cute.arch.sync_warp()


@cute.kernel
def align_kernel(
    ids: cute.Tensor,
    sorted_slots: cute.Tensor,
    row_of_slot: cute.Tensor,
    schedule: cute.Tensor,
    zeroed: cute.Tensor,
    weights: cute.Tensor,
    row_weight: cute.Tensor,
    token_scale: cute.Tensor,
    row_scale: cute.Tensor,
    experts: Int32,
    top_k: Int32,
    tile_rows: Int32,
    has_weights: cutlass.Constexpr,
    has_token_scale: cutlass.Constexpr,
    ctas: cutlass.Constexpr,
    pdl: cutlass.Constexpr,
):
    smem = cutlass.memory.SmemAllocator()
    counters = smem.allocate_tensor(Uint16, cute.make_layout((WARPS, MAX_EXPERTS), stride=(MAX_EXPERTS, 1)), 16)
    counts = smem.allocate_tensor(Int32, cute.make_layout(MAX_EXPERTS), 16)  # of this CTA
    start = smem.allocate_tensor(Int32, cute.make_layout(MAX_EXPERTS), 16)  # first row of this CTA's slots
    row_start = smem.allocate_tensor(Int32, cute.make_layout(2 * MAX_EXPERTS), 16)  # then number of rows
    tile_start = smem.allocate_tensor(Int32, cute.make_layout(MAX_EXPERTS + 1), 16)
    row_totals = smem.allocate_tensor(Int32, cute.make_layout(32), 16)
    tile_totals = smem.allocate_tensor(Int32, cute.make_layout(32), 16)

    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    warp = cute.arch.warp_idx()
    slots = Int32(cute.size(ids))
    steps = cute.ceil_div(slots, 32 * WARPS * ctas)
    first = (cta * WARPS + warp) * steps * 32
    # Warps with no slots are the last ones; nobody reads their counters.
    warps = cutlass.min(cute.ceil_div(cutlass.max(slots - cta * WARPS * steps * 32, 0), steps * 32), WARPS)

    words = cute.recast_tensor(counters, Int32)
    expert_words = (experts + 1) // 2
    word = cute.arch.lane_idx()
    while word < expert_words:
        words[warp, word] = Int32(0)
        word += 32
    cute.arch.sync_warp()
    if cutlass.const_expr(pdl):
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

    count_or_place(
        ids, counters[warp, None], start, sorted_slots, row_of_slot, weights, row_weight, token_scale, row_scale,
        experts, top_k, first, steps, False, has_weights, has_token_scale,
    )  # fmt: skip
    cute.arch.sync_threads()

    expert = thread
    count = Int32(0)
    if expert < experts:
        for other in range(warps):
            of_warp = Int32(counters[other, expert])
            counters[other, expert] = Uint16(count)
            count += of_warp
    before, total = Int32(0), count
    if cutlass.const_expr(ctas > 1):
        counts[thread] = count
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        total = Int32(0)
        for other in cutlass.range_constexpr(ctas):
            address = cute.arch.map_dsmem_ptr(counts.iterator, Int32(other)) + thread
            theirs = cute.arch.inline_ptx(
                "ld.shared::cluster.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address.toint()]
            )
            total += theirs
            if other < cta:
                before += theirs
    tiles = cute.ceil_div(total, tile_rows)
    rows_until = scan_block(total, row_totals)
    tiles_until = scan_block(tiles, tile_totals)
    if cutlass.const_expr(ctas > 1):
        cute.arch.cluster_arrive_relaxed()  # this CTA has read; at the end it waits for those that read from it
    row_start[expert] = rows_until - total
    row_start[MAX_EXPERTS + expert] = total
    start[expert] = rows_until - total + before
    tile_start[expert + 1] = tiles_until
    if thread == 0:
        tile_start[0] = Int32(0)
    cute.arch.sync_threads()

    count_or_place(
        ids, counters[warp, None], start, sorted_slots, row_of_slot, weights, row_weight, token_scale, row_scale,
        experts, top_k, first, steps, True, has_weights, has_token_scale,
    )  # fmt: skip
    first_of_all = cta * THREADS + thread
    write_tiles(
        schedule, row_start, tile_start, experts, Int32(0), Int32(0), tile_rows, first_of_all, Int32(ctas * THREADS)
    )
    valid = row_start[MAX_EXPERTS - 1] + row_start[2 * MAX_EXPERTS - 1]
    if first_of_all == 0:
        write_row(schedule, Int32(0), tile_start[experts], valid, Int32(0))
    row = valid + first_of_all
    while row < slots:
        sorted_slots[row] = Int32(-1)
        row += ctas * THREADS
    index = first_of_all
    while index < Int32(cute.size(zeroed)):
        zeroed[index] = Int32(0)
        index += ctas * THREADS
    if cutlass.const_expr(ctas > 1):
        cute.arch.cluster_wait()


@cute.kernel
def align_small_kernel(
    ids: cute.Tensor,
    sorted_slots: cute.Tensor,
    row_of_slot: cute.Tensor,
    schedule: cute.Tensor,
    zeroed: cute.Tensor,
    weights: cute.Tensor,
    row_weight: cute.Tensor,
    token_scale: cute.Tensor,
    row_scale: cute.Tensor,
    experts: Int32,
    top_k: Int32,
    tile_rows: Int32,
    has_weights: cutlass.Constexpr,
    has_token_scale: cutlass.Constexpr,
    pdl: cutlass.Constexpr,
):
    """Up to 128 slots, a thread each: a slot's row is the number of smaller keys (expert, slot).

    Then a thread owns a row: where its expert's rows begin and end follows from the rows at which experts change, and
    the number of its tile from the rows at which tiles begin; both are masks of 32 rows a warp.
    """
    smem = cutlass.memory.SmemAllocator()
    keys = smem.allocate_tensor(Int32, cute.make_layout((4, SMALL_SLOTS // 4)), 16)
    in_order = smem.allocate_tensor(Int32, cute.make_layout(SMALL_SLOTS), 16)
    heads = smem.allocate_tensor(Uint32, cute.make_layout(SMALL_WARPS), 16)
    leaders = smem.allocate_tensor(Uint32, cute.make_layout(SMALL_WARPS), 16)
    valids = smem.allocate_tensor(Uint32, cute.make_layout(SMALL_WARPS), 16)
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.warp_idx()
    slots = Int32(cute.size(ids))
    if cutlass.const_expr(pdl):
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

    expert = experts + 1  # behind those of slots that go nowhere
    if thread < slots:
        value = ids[thread]
        expert = experts
        if (value >= 0) & (value < experts):
            expert = Int32(value)
    key = expert * SMALL_SLOTS + thread
    keys[thread % 4, thread // 4] = key
    cute.arch.sync_threads()
    row = thread
    if thread < slots:
        row = Int32(0)
        for part in cutlass.range(cute.ceil_div(slots, 4), unroll=4):
            others = cute.make_rmem_tensor(4, Int32)
            cute.autovec_copy(keys[None, part], others)
            for i in cutlass.range_constexpr(4):
                row += Int32(others[i] < key)
    in_order[row] = key
    cute.arch.sync_threads()

    row = thread
    expert, slot = in_order[row] // SMALL_SLOTS, in_order[row] % SMALL_SLOTS
    before = Int32(-1)
    if row > 0:
        before = in_order[row - 1] // SMALL_SLOTS
    is_valid = expert < experts
    mask = cute.arch.vote_ballot_sync(expert != before)
    heads[warp] = Uint32(mask)
    valids[warp] = Uint32(cute.arch.vote_ballot_sync(is_valid))
    cute.arch.sync_threads()
    begin, end, valid = Int32(0), Int32(SMALL_SLOTS), Int32(0)
    for i in cutlass.range_constexpr(SMALL_WARPS):
        until, after = heads[i], Uint32(0)
        if i == warp:
            until, after = heads[i] & cute.arch.lanemask_le(), heads[i] & cute.arch.lanemask_gt()
        elif i > warp:
            until, after = Uint32(0), heads[i]
        if until != 0:
            begin = i * 32 + 31 - Int32(cute.arch.clz(until))
        if (after != 0) & (end == SMALL_SLOTS):
            end = i * 32 + 31 - Int32(cute.arch.clz(after & (Uint32(0) - after)))
        valid += Int32(cute.arch.popc(valids[i]))
    is_leader = is_valid & ((row - begin) % tile_rows == 0)
    mask = Uint32(cute.arch.vote_ballot_sync(is_leader))
    leaders[warp] = mask
    cute.arch.sync_threads()
    tile, tiles = Int32(cute.arch.popc(mask & cute.arch.lanemask_lt())), Int32(0)
    for i in cutlass.range_constexpr(SMALL_WARPS):
        of_warp = Int32(cute.arch.popc(leaders[i]))
        tiles += of_warp
        if i < warp:
            tile += of_warp

    if row < slots:
        if is_valid:
            sorted_slots[row] = slot
            row_of_slot[slot] = row
            if cutlass.const_expr(has_weights):
                row_weight[row] = Float32(weights[slot])
            if cutlass.const_expr(has_token_scale):
                row_scale[row] = token_scale[slot // top_k]
        else:
            sorted_slots[row] = Int32(-1)
            row_of_slot[slot] = Int32(-1)
    if is_leader:
        write_row(schedule, tile + 1, expert, row, cutlass.min(end - row, tile_rows))
    if thread == 0:
        write_row(schedule, Int32(0), tiles, valid, Int32(0))
    index = thread
    while index < Int32(cute.size(zeroed)):
        zeroed[index] = Int32(0)
        index += SMALL_SLOTS


@cute.kernel
def schedule_kernel(
    offsets: cute.Tensor,
    schedule: cute.Tensor,
    groups: Int32,
    rows: Int32,
    tile_rows: Int32,
    pdl: cutlass.Constexpr,
):
    smem = cutlass.memory.SmemAllocator()
    row_start = smem.allocate_tensor(Int32, cute.make_layout(2 * MAX_EXPERTS), 16)
    tile_start = smem.allocate_tensor(Int32, cute.make_layout(MAX_EXPERTS + 1), 16)
    tile_totals = smem.allocate_tensor(Int32, cute.make_layout(32), 16)

    thread, _, _ = cute.arch.thread_idx()
    if cutlass.const_expr(pdl):
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
    tile_base = Int32(0)
    for chunk in range(cute.ceil_div(groups, THREADS)):
        group = chunk * THREADS + thread
        begin, count = Int32(0), Int32(0)
        if group < groups:
            if group > 0:
                begin = cutlass.min(cutlass.max(offsets[group - 1], 0), rows)
            end = cutlass.min(cutlass.max(offsets[group], 0), rows)
            count = cutlass.max(end - begin, 0)
        tiles_until = scan_block(cute.ceil_div(count, tile_rows), tile_totals)
        row_start[thread] = begin
        row_start[MAX_EXPERTS + thread] = count
        tile_start[thread + 1] = tiles_until
        if thread == 0:
            tile_start[0] = Int32(0)
        cute.arch.sync_threads()
        of_chunk = cutlass.min(groups - chunk * THREADS, THREADS)
        write_tiles(
            schedule, row_start, tile_start, of_chunk, chunk * THREADS, tile_base, tile_rows, thread, Int32(THREADS)
        )
        tile_base += tile_start[of_chunk]
        cute.arch.sync_threads()
    if thread == 0:
        valid = Int32(0)
        if groups > 0:
            valid = cutlass.min(cutlass.max(offsets[groups - 1], 0), rows)
        write_row(schedule, Int32(0), cutlass.min(tile_base, Int32(cute.size(schedule, mode=[0])) - 1), valid, Int32(0))


@cute.jit
def launch_align(
    ids: cute.Tensor,
    sorted_slots: cute.Tensor,
    row_of_slot: cute.Tensor,
    schedule: cute.Tensor,
    zeroed: cute.Tensor,
    weights: cute.Tensor,
    row_weight: cute.Tensor,
    token_scale: cute.Tensor,
    row_scale: cute.Tensor,
    experts: Int32,
    top_k: Int32,
    tile_rows: Int32,
    stream,
    has_weights: cutlass.Constexpr,
    has_token_scale: cutlass.Constexpr,
    ctas: cutlass.Constexpr,
    pdl: cutlass.Constexpr,
):
    if cutlass.const_expr(ctas == 0):
        align_small_kernel(
            ids, sorted_slots, row_of_slot, schedule, zeroed, weights, row_weight, token_scale, row_scale,
            experts, top_k, tile_rows, has_weights, has_token_scale, pdl,
        ).launch(grid=(1, 1, 1), block=(SMALL_SLOTS, 1, 1), stream=stream, use_pdl=pdl)  # fmt: skip
        return
    align_kernel(
        ids, sorted_slots, row_of_slot, schedule, zeroed, weights, row_weight, token_scale, row_scale,
        experts, top_k, tile_rows, has_weights, has_token_scale, ctas, pdl,
    ).launch(grid=(ctas, 1, 1), block=(THREADS, 1, 1), cluster=(ctas, 1, 1), stream=stream, use_pdl=pdl)  # fmt: skip


@cute.jit
def launch_schedule(
    offsets: cute.Tensor,
    schedule: cute.Tensor,
    groups: Int32,
    rows: Int32,
    tile_rows: Int32,
    stream,
    pdl: cutlass.Constexpr,
):
    schedule_kernel(offsets, schedule, groups, rows, tile_rows, pdl).launch(
        grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=pdl
    )


def _vector(dtype, alignment=4):
    return make_fake_tensor(dtype, (cute.sym_int32(),), (1,), assumed_align=alignment)


def _schedule():
    return make_fake_tensor(Int32, (cute.sym_int32(), 4), (4, 1), assumed_align=16)


def build(config):
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    if isinstance(config, ScheduleConfig):
        return launch_schedule, (
            _vector(Int32), _schedule(), Int32(1), Int32(1), Int32(1), stream, config.pdl,
        )  # fmt: skip
    assert isinstance(config, AlignConfig)
    index_dtype = cutlass.Int64 if config.index_dtype == "int64" else Int32
    dtypes = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": Float32, "": Float32}
    weight_dtype = dtypes[config.weight_dtype]
    return launch_align, (
        _vector(index_dtype, index_dtype.width // 8), _vector(Int32), _vector(Int32), _schedule(), _vector(Int32),
        _vector(weight_dtype, weight_dtype.width // 8), _vector(Float32), _vector(Float32), _vector(Float32),
        Int32(1), Int32(1), Int32(1), stream,
        bool(config.weight_dtype), config.has_token_scale, config.ctas, config.pdl,
    )  # fmt: skip
