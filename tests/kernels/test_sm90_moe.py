"""The kernels of the MoE around its products: routing, requantisation, combination; compiled here, run on a GPU."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import expand_groups, grouped_unaligned, zero_tail
from dsv4_compile.ops.dispatch.interleave import CHUNK
from dsv4_compile.ops.dispatch.moe_align import (
    MAX_SLOTS,
    AlignConfig,
    ScheduleConfig,
    align,
    max_tiles,
    schedule_of_offsets,
)
from dsv4_compile.ops.dispatch.moe_combine import CombineConfig, combine
from dsv4_compile.ops.dispatch.moe_requantize import RequantizeConfig, requantize
from dsv4_compile.ops.kernels import cache, compilation
from tests.interleaved import in_order

Integers = NDArray[np.int64]
POISON = -559038737


def expected_alignment(ids: Integers, experts: int, tile_rows: int) -> tuple[Integers, Integers, Integers]:
    """sorted_slots, row_of_slot and the written rows of the schedule, by sorting."""
    slots = np.flatnonzero((ids >= 0) & (ids < experts))
    order = slots[np.argsort(ids[slots], kind="stable")]
    sorted_slots, row_of_slot = np.full(len(ids), -1), np.full(len(ids), -1)
    sorted_slots[: len(order)] = order
    row_of_slot[order] = np.arange(len(order))
    tiles, begin = [], 0
    for expert, count in enumerate(np.bincount(ids[slots], minlength=experts)):
        tiles += expected_tiles(expert, begin, int(count), tile_rows)
        begin += count
    return sorted_slots, row_of_slot, np.array([[len(tiles), begin, 0, 0], *tiles])


def expected_tiles(group: int, begin: int, count: int, tile_rows: int) -> list[list[int]]:
    return [[group, begin + i, min(tile_rows, count - i), 0] for i in range(0, count, tile_rows)]


def model_of_align(ids: Integers, experts: int, ctas: int, warps: int = 32) -> tuple[Integers, Integers]:
    """The kernel's own algorithm, warp by warp: consecutive slots a warp, counted, summed over warps and CTAs, placed."""
    steps = -(-len(ids) // (32 * warps * ctas))
    chosen = np.where((ids >= 0) & (ids < experts), ids, -1)
    walks = chosen.copy()
    walks.resize(ctas * warps * steps * 32)
    walks[len(ids) :] = -1
    walks = walks.reshape(ctas, warps, steps * 32)
    counters = np.zeros((ctas, warps, experts), np.int64)
    for cta, warp in np.ndindex(ctas, warps):
        held = walks[cta, warp]
        counters[cta, warp] = np.bincount(held[held >= 0], minlength=experts)
    counts = counters.sum(axis=1)
    before_warp = counters.cumsum(axis=1) - counters
    before_cta = counts.cumsum(axis=0) - counts
    row_start = counts.sum(axis=0).cumsum() - counts.sum(axis=0)
    sorted_slots, row_of_slot = np.full(len(ids), -1), np.full(len(ids), -1)
    for cta, warp in np.ndindex(ctas, warps):
        placed = before_warp[cta, warp].copy()
        for step in range(steps):
            lanes = walks[cta, warp, step * 32 : step * 32 + 32]
            for lane, expert in enumerate(lanes):
                if expert >= 0:
                    lower = int((lanes[:lane] == expert).sum())
                    slot = ((cta * warps + warp) * steps + step) * 32 + lane
                    row = row_start[expert] + before_cta[cta, expert] + placed[expert] + lower
                    sorted_slots[row], row_of_slot[slot] = slot, row
            placed += np.bincount(lanes[lanes >= 0], minlength=experts)
    return sorted_slots, row_of_slot


def model_of_small_align(ids: Integers, experts: int, tile_rows: int) -> tuple[Integers, Integers, Integers]:
    """The other algorithm of the kernel, up to 128 slots: ranks of keys, then tiles from masks of 32 rows."""
    chosen = np.full(128, experts + 1)
    chosen[: len(ids)] = np.where((ids >= 0) & (ids < experts), ids, experts)
    keys = chosen * 128 + np.arange(128)
    in_order = np.empty(128, np.int64)
    in_order[(keys[None, :] < keys[:, None]).sum(axis=1)] = keys
    expert, slot = in_order // 128, in_order % 128
    heads = (expert != np.append(-1, expert[:-1])).reshape(4, 32)
    begin, end = np.zeros(128, np.int64), np.full(128, 128)
    for row in range(128):
        warp, lane = divmod(row, 32)
        for i in range(4):
            until = np.flatnonzero(heads[i, : (32 if i < warp else lane + 1 if i == warp else 0)])
            after = np.flatnonzero(heads[i] & (np.arange(32) > (-1 if i > warp else lane if i == warp else 31)))
            if len(until):
                begin[row] = i * 32 + until[-1]
            if len(after) and end[row] == 128:
                end[row] = i * 32 + after[0]
    rows = np.arange(128)
    is_leader = (expert < experts) & ((rows - begin) % tile_rows == 0)
    tiles = [[expert[r], r, min(end[r] - r, tile_rows), 0] for r in rows if is_leader[r]]
    sorted_slots, row_of_slot = np.full(len(ids), -1), np.full(len(ids), -1)
    for row in range(len(ids)):
        if expert[row] < experts:
            sorted_slots[row], row_of_slot[slot[row]] = slot[row], row
    return sorted_slots, row_of_slot, np.array([[len(tiles), (expert < experts).sum(), 0, 0], *tiles])


def any_ids(slots: int, experts: int, skew: str) -> Integers:
    """Routing with sentinels: uniform, all to one expert, half of them to one, or to nobody."""
    ids = np.random.randint(-1, experts + 1, slots)
    if skew == "one":
        ids[:] = np.random.randint(0, experts)
    elif skew == "half":
        ids[np.random.rand(slots) < 0.5] = experts // 2
    elif skew == "nobody":
        ids[:] = np.random.choice([-1, experts, -(2**31), 2**31 - 1], slots)
    return ids


SKEWS = ("uniform", "one", "half", "nobody")


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize(("slots", "experts"), [(0, 4), (1, 1), (6, 256), (97, 7), (1500, 384), (4097, 1024)])
@pytest.mark.parametrize("ctas", [1, 8])
def test_algorithm_of_align_is_a_stable_sort(slots: int, experts: int, skew: str, ctas: int) -> None:
    """Guards against an algorithm that is wrong before any kernel is: lanes, warps and CTAs against a sort."""
    ids = any_ids(slots, experts, skew)
    expected_slots, expected_rows, _ = expected_alignment(ids, experts, 8)
    actual_slots, actual_rows = model_of_align(ids, experts, ctas)
    np.testing.assert_array_equal(actual_slots, expected_slots)
    np.testing.assert_array_equal(actual_rows, expected_rows)


@pytest.mark.parametrize("skew", SKEWS)
def test_small_algorithm_of_align(skew: str) -> None:
    """Guards against a run of rows that crosses a mask, or ends where the slots end."""
    for slots in (0, 1, 6, 31, 32, 33, 96, 127, 128):
        for experts, tile_rows in ((1, 8), (3, 8), (40, 16), (256, 8), (1024, 5)):
            ids = any_ids(slots, experts, skew)
            expected = expected_alignment(ids, experts, tile_rows)
            for actual, wanted in zip(model_of_small_align(ids, experts, tile_rows), expected, strict=True):
                np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("skew", SKEWS)
def test_max_tiles_holds_every_routing(skew: str) -> None:
    """Guards against tiles that fall off the end of the schedule; reached where every expert has one row too many."""
    for _ in range(200):
        slots, experts, tile_rows = (int(np.random.randint(low, high)) for low, high in ((0, 300), (1, 40), (1, 33)))
        tiles = expected_alignment(any_ids(slots, experts, skew), experts, tile_rows)[2][0, 0]
        assert tiles <= max_tiles(slots, experts, tile_rows)
    full = expected_alignment(np.repeat(np.arange(5), 9), 5, 8)[2]
    assert full[0, 0] == max_tiles(45, 5, 8) == 10


CONFIGS: list[tuple[str, Any]] = [
    *(("sm90.moe_align", AlignConfig(dtype, ctas)) for dtype in ("int32", "int64") for ctas in (0, 1, 8)),
    ("sm90.moe_align", AlignConfig("int64", 0, "bfloat16", True)),
    ("sm90.moe_align", AlignConfig("int64", 1, "bfloat16", True)),
    ("sm90.moe_align", AlignConfig("int64", 8, "bfloat16", True)),
    *(("sm90.grouped_unaligned", grouped_unaligned.Config(dtype)) for dtype in ("bfloat16", "float16", "float32")),
    ("sm90.grouped_unaligned", grouped_unaligned.Config("bfloat16", True)),
    ("sm90.grouped_unaligned", grouped_unaligned.Config("float16", True, True)),
    ("sm90.grouped_unaligned", grouped_unaligned.Config("float32", True, True)),
    *(("sm90.zero_tail", zero_tail.Config(element_bytes)) for element_bytes in (2, 4)),
    ("sm90.moe_align", ScheduleConfig()),
    *(("sm90.expand_groups", expand_groups.Config(is_interleaved)) for is_interleaved in (False, True)),
    *(
        ("sm90.moe_combine", CombineConfig(out, weight))
        for out in ("bfloat16", "float16", "float32")
        for weight in ("", "bfloat16", "float16", "float32")
    ),
    *(
        ("sm90.moe_requantize", RequantizeConfig(dtype, granularity))
        for dtype in ("bfloat16", "float16", "float32")
        for granularity in nvfp4.GRANULARITIES
    ),
    *(("sm90.moe_requantize", RequantizeConfig("bfloat16", granularity, True)) for granularity in ("tensor", "token")),
]


@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=lambda value: re.sub(r"\W+", "-", str(value)))
def test_compiles_offline(name: str, config: Any) -> None:
    """Guards against spills, against more registers than the launch may have, and against narrow accesses."""
    code = compilation.machine_code(name, config)
    assert code.spill_bytes == 0
    if name == "sm90.moe_align":
        assert code.registers <= 64  # 1024 threads
        assert code.count(r"STG\.E\.128") >= 1
        assert code.count(r"UCGABAR_ARV") == (2 if getattr(config, "ctas", 1) > 1 else 0)
    elif name == "sm90.grouped_unaligned":
        assert code.count(r"HMMA\.16816\.F32\.BF16") == (2 if config.is_swiglu else 1)
    elif name == "sm90.expand_groups":
        assert code.registers <= 64
        assert code.count(r"STG\.E\.128") >= 4
    elif name == "sm90.zero_tail":
        assert code.registers <= 16
    elif name == "sm90.moe_requantize":
        assert code.registers <= 64  # four CTAs of 256 threads
        assert code.count(r"LDG\.E\.128") >= (2 if config.granularity == "token" else 4)
        assert code.count(r"STG\.E\.128") >= 1
    else:
        assert code.registers <= 80
        assert code.count(r"LDG\.E\.128") >= 8  # all rows before the first sum
        assert code.count(r"\bFFMA\b") == 0  # the product with the weight rounds by itself


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what `new_empty` returns, so that an element that a kernel does not write is seen."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = new_empty(self, *args, **kwargs)
        return out.fill_(POISON) if out.dtype == torch.int32 else out.fill_(float("nan"))

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


ALIGN_CASES = [(1, 1, 1), (1, 6, 256), (4, 6, 256), (16, 6, 256), (16, 8, 1024), (43, 3, 6), (33, 3, 5), (64, 6, 256), (0, 6, 256), (3, 0, 4), (600, 7, 384), (4096, 6, 256), (16384, 8, 384), (16384, 6, 1024)]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), ALIGN_CASES)
def test_align(
    tokens: int, top_k: int, experts: int, dtype: torch.dtype, skew: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a slot lost, doubled or out of order, a tile lost, and anything left unwritten."""
    poison(monkeypatch)
    for tile_rows in (8, 64):
        check_align(any_ids(tokens * top_k, experts, skew), (tokens, top_k), experts, tile_rows, dtype)


@pytest.mark.gpu
def test_align_random_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an edge of some number of slots, experts or tile rows: 300 of them."""
    poison(monkeypatch)
    for _ in range(300):
        top_k, experts = int(np.random.randint(1, 9)), int(np.random.randint(1, 1025))
        tokens, tile_rows = int(np.exp(np.random.uniform(0, 8.5))), int(2 ** np.random.randint(0, 8))
        ids = any_ids(tokens * top_k, experts, str(np.random.choice(SKEWS)))
        check_align(ids, (tokens, top_k), experts, tile_rows, torch.int32)


def check_align(ids: Integers, shape: tuple[int, int], experts: int, tile_rows: int, dtype: torch.dtype) -> None:
    given = torch.from_numpy(ids).to(dtype).reshape(shape).cuda()
    weights, scales = torch.rand(shape).to(torch.bfloat16), torch.rand(shape[0])
    carried = dtype == torch.int64
    more = (weights.cuda(), scales.cuda()) if carried else ()
    first = align(given, experts, tile_rows, 7, *more)
    sorted_slots, row_of_slot, schedule = expected_alignment(ids, experts, tile_rows)
    for result in (first, align(given, experts, tile_rows, 7, *more)):
        np.testing.assert_array_equal(result.sorted_slots.cpu().numpy(), sorted_slots)
        np.testing.assert_array_equal(result.row_of_slot.cpu().numpy(), row_of_slot)
        actual = result.schedule.cpu().numpy()
        np.testing.assert_array_equal(actual[: len(schedule)], schedule)
        assert (actual[len(schedule) :] == POISON).all()
        assert result.zeroed.tolist() == [0] * 7
        if carried:
            order = torch.from_numpy(sorted_slots[: schedule[0, 1]])
            assert torch.equal(result.row_weight[: len(order)].cpu(), weights.flatten()[order].float())
            assert torch.equal(result.row_scale[: len(order)].cpu(), scales[order // max(1, shape[1])])


@pytest.mark.gpu
def test_schedule_of_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against tiles lost between empty groups, also beyond the 1024 groups of one pass; wrong ends stay inside."""
    poison(monkeypatch)
    for groups, rows in ((1, 5), (6, 11), (1, 0), (300, 40), (1024, 5000), (3000, 2500), (2, 100000)):
        for tile_rows in (8, 128):
            ends = np.sort(np.random.randint(0, rows + 1, groups))
            tiles: list[list[int]] = []
            for group, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                tiles += expected_tiles(group, int(begin), int(end - begin), tile_rows)
            schedule = schedule_of_offsets(torch.from_numpy(ends).int().cuda(), rows, tile_rows).cpu().numpy()
            np.testing.assert_array_equal(schedule[: len(tiles) + 1], [[len(tiles), ends[-1], 0, 0], *tiles])
            assert (schedule[len(tiles) + 1 :] == POISON).all()
    wrong = torch.tensor([9, -4, 30, 2, 30], dtype=torch.int32, device="cuda")
    schedule = schedule_of_offsets(wrong, 20, 8).cpu().numpy()
    tiles = schedule[1 : 1 + schedule[0, 0]]
    assert (tiles[:, 1] >= 0).all()
    assert (tiles[:, 1] + tiles[:, 2] <= 20).all()


@pytest.mark.gpu
def test_expand_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a group that begins in another's rows, and bytes read in storage order."""
    poison(monkeypatch)
    for groups, rows, tile_rows, k in ((8, 1, 16, 4096), (16, 100, 64, 256), (8, 700, 128, 512), (2000, 3, 16, 16), (3, 5, 8, 48)):  # fmt: skip
        codes = torch.randint(0, 256, (rows, groups, k // 2), dtype=torch.uint8)
        block_scales = torch.randint(0, 128, (rows, groups, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
        expected = nvfp4.scaled_codes(codes, block_scales, torch.bfloat16).transpose(0, 1).reshape(-1, k)
        tiles = [tile for group in range(groups) for tile in expected_tiles(group, group * rows, rows, tile_rows)]
        inside, odd = (codes.cuda(), block_scales.cuda()), torch.zeros(codes.numel() + 1, dtype=torch.uint8).cuda()
        odd[1:] = codes.cuda().flatten()
        apart = inside[0].transpose(0, 1).contiguous(), inside[1].transpose(0, 1).contiguous()
        in_rows = inside[0].transpose(0, 1), inside[1].transpose(0, 1)
        at_odd_bytes = odd[1:].view(codes.shape).transpose(0, 1), inside[1].transpose(0, 1)
        for given, is_interleaved in itertools.product((in_rows, at_odd_bytes, apart), {False, k % CHUNK == 0}):
            actual, schedule = expand_groups.expand_groups(*given, tile_rows, is_interleaved)
            wanted = in_order(expected.half(), True) if is_interleaved else expected
            assert actual.dtype == wanted.dtype
            assert torch.equal(actual.isnan().cpu(), wanted.isnan())
            assert torch.equal(actual.nan_to_num().cpu(), wanted.nan_to_num())
            np.testing.assert_array_equal(schedule.cpu().numpy(), [[len(tiles), groups * rows, 0, 0], *tiles])


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_combine(out_dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    """Guards against another order of the sum, a contracted product, and rows of nobody that are read: bit for bit."""
    for tokens, top_k, hidden in ((1, 6, 4096), (5, 1, 16), (64, 8, 7168), (33, 13, 48), (300, 6, 2064), (4, 0, 32)):
        slots = tokens * top_k
        y = torch.randn(slots, hidden) * torch.logspace(-3, 3, max(1, hidden))
        rows = torch.randperm(slots).int()
        valid = torch.rand(slots) < 0.8
        y[rows[~valid].long()] = float("nan")
        rows[~valid] = -1
        weights = None if weight_dtype is None else torch.rand(tokens, top_k).to(weight_dtype)
        total = torch.zeros(tokens, hidden)
        for rank in range(top_k):
            row = rows.view(tokens, top_k)[:, rank]
            part = torch.where((row >= 0)[:, None], y[row.long().clamp(min=0)], 0.0)
            if weights is not None:
                part = part * weights[:, rank, None].float()
            total += part
        out = torch.full((tokens, hidden), float("nan"), dtype=out_dtype, device="cuda")
        combine(y.cuda(), rows.cuda(), None if weights is None else weights.cuda(), top_k, out)
        assert torch.equal(out.cpu(), total.to(out_dtype))


def any_hidden(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of all magnitudes, zeros, ties of codes and non-finite values among them."""
    h = torch.randn(rows, k) * torch.exp2(torch.randint(-12, 13, (rows, k // 16)).repeat_interleave(16, 1))
    h[torch.rand(rows) < 0.1] = 0
    h[torch.rand(rows, k) < 0.05] = 0
    kind = torch.rand(rows, k // 16)
    for low, value in ((0.0, float("nan")), (0.01, float("inf")), (0.02, -float("inf"))):
        at = ((kind >= low) & (kind < low + 0.005)).nonzero()
        h[at[:, 0], at[:, 1] * 16 + torch.randint(0, 16, (len(at),))] = value
    steps = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])[torch.randint(0, 8, (rows, k))]
    ties = (kind > 0.8).repeat_interleave(16, 1)  # with a global scale that is a power of two
    return torch.where(ties, steps * (torch.randint(0, 2, (rows, k)) * 2 - 1), h).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_requantize(dtype: torch.dtype, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against any rounding other than the reference's, and against rows of nobody that count or are written."""
    poison(monkeypatch)
    shapes = [(6, 2048), (96, 2048), (1, 16), (5, 48), (3, 4112), (700, 336), (1000, 2048), (2, 16384)]
    shapes += [(int(np.random.randint(1, 100)), 16 * int(np.random.randint(1, 100))) for _ in range(100)]
    for rows, k in shapes:
        h = any_hidden(rows, k, dtype)
        valid = rows if np.random.rand() < 0.5 else int(np.random.randint(0, rows + 1))
        routed = h[:valid].float()
        codes, block_scales, global_scale = nvfp4.quantize(routed, granularity)
        expected = nvfp4.scaled_codes(codes, block_scales, torch.bfloat16)
        partial_amax = torch.rand(int(np.random.randint(1, 700))) * nvfp4.finite_amax(routed, "tensor")
        partial_amax[np.random.randint(0, len(partial_amax))] = nvfp4.finite_amax(routed, "tensor")
        schedule = torch.tensor([[1, valid, 0, 0]] * 3, dtype=torch.int32).cuda()
        for in_place, is_interleaved in itertools.product({False, dtype.itemsize == 2}, {False, k % CHUNK == 0}):
            source = h.cuda()
            target = source if in_place else None
            scaled, scale = requantize(source, partial_amax.cuda(), schedule, granularity, target, is_interleaved)
            assert (scaled.data_ptr() == source.data_ptr()) == in_place
            wanted = in_order(expected.half(), True) if is_interleaved else expected
            assert scaled.dtype == wanted.dtype
            assert torch.equal(scale.cpu()[:valid] if granularity == "token" else scale.cpu()[0], global_scale)
            if not in_place:
                assert scaled[valid:].isnan().all()
            actual = scaled[:valid].cpu()
            assert torch.equal(actual.isnan(), wanted.isnan())
            assert torch.equal(actual.nan_to_num(), wanted.nan_to_num())
            assert torch.equal(actual.nan_to_num().signbit(), wanted.nan_to_num().signbit())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_tail(dtype: torch.dtype) -> None:
    """Guards against a row too many or too few."""
    for rows, columns, valid in ((5, 10, 3), (5, 10, 0), (5, 10, 5), (3000, 1001, 17)):
        out = torch.ones(rows, columns, dtype=dtype, device="cuda")
        schedule = torch.tensor([[0, valid, 0, 0]] * 2, dtype=torch.int32, device="cuda")
        zero_tail.zero_tail(out, schedule)
        assert out[:valid].eq(1).all()
        assert out[valid:].eq(0).all()


def test_records_kernels_on_meta_tensors() -> None:
    """Guards against kernels that `dsv4-compile warm` does not find: the same as on a GPU, without data."""
    with cache.recording() as wanted:
        alignment = align(torch.empty(4096, 6, dtype=torch.int64, device="meta"), 256, 128, 3)
        align(torch.empty(1, 6, dtype=torch.int32, device="meta"), 256, 8, 3)
        out = torch.empty(4096, 64, dtype=torch.bfloat16, device="meta")
        h = torch.empty(4096 * 6, 32, dtype=torch.bfloat16, device="meta")
        scaled, scale = requantize(h, torch.empty(4, device="meta"), alignment.schedule, "token", h)
        combine(torch.empty(4096 * 6, 64, device="meta"), alignment.row_of_slot, None, 6, out)
    assert list(wanted) == [
        ("sm90.moe_align", AlignConfig("int64", 8)),
        ("sm90.moe_align", AlignConfig("int32", 0)),
        ("sm90.moe_requantize", RequantizeConfig("bfloat16", "token")),
        ("sm90.moe_combine", CombineConfig("bfloat16", "")),
    ]
    assert scaled is h
    assert scale.shape == (4096 * 6,)
    assert alignment.schedule.shape == (min(24576, 192 + 256) + 1, 4)


def test_more_slots_than_are_counted() -> None:
    """Guards against 16-bit counters that start again at zero."""
    ids = torch.empty(MAX_SLOTS + 1, 1, dtype=torch.int64, device="meta")
    with cache.recording() as wanted:
        align(ids[1:], 256, 128)
        with pytest.raises(RuntimeError, match=r"topk_ids must have at most 262144 elements on a GPU, got 262145"):
            align(ids, 256, 128)
    assert len(wanted) == 1
