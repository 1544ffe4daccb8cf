"""``nvfp4_moe`` as dispatch launches it: bit for bit the CPU's on emulated kernels, on every path."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch.nvfp4_moe import tile_rows_of
from dsv4_compile.ops.registration import CUDA_IMPLEMENTATIONS
from tests.kernels.emulation import (
    LAYOUTS,
    assert_as_on_cpu,
    assert_every_variant_as_on_cpu,
    emulated_hopper,
    stored,
)
from tests.ops.test_nvfp4_moe_gpu import ROUTINGS, Case, any_ids

Packed = tuple[Tensor, Tensor, Tensor]

OP = torch.ops.dsv4.nvfp4_moe.default
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
POSITIONS = ("before_down", "after_down")
WIDTHS = (256, 48)  # on the tensor-core kernels; the kernel for any width


def packed(*lead: int, k: int, scale_shape: tuple[int, ...]) -> Packed:
    """Random codes and block scales from 1/2 to 2, sums near 1: quick to make, exact in fp64."""
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8)
    block_scales = torch.randint(0x30, 0x40, (*lead, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes, block_scales, (torch.rand(scale_shape) + 0.5) / max(1, 8 * k) ** 0.25


def arguments(case: Case) -> list[Any]:
    """What the operator takes."""
    experts, hidden, intermediate = case.experts, case.hidden, case.intermediate
    return [
        *packed(case.tokens, k=hidden, scale_shape=(case.tokens,) if case.is_token else ()),
        any_ids(case), torch.rand(case.tokens, case.top_k),
        *packed(experts, 2 * intermediate, k=hidden, scale_shape=(experts, 2) if case.has_halves else (experts,)),
        *packed(experts, hidden, k=intermediate, scale_shape=(experts,)),
        case.limit, case.weight_position, case.granularity, case.out_dtype,
    ]  # fmt: skip


def any_case(step: int, most_rows: int) -> Case:
    """A case of at most that many routed rows, its widths multiples of ``step``."""
    top_k = random.randint(1, 8)
    return Case(
        tokens=random.randint(1, max(1, most_rows // top_k)),
        top_k=top_k,
        experts=random.choice([1, 2, 3, 8] + [33] * (step < 256)),
        hidden=step * random.randint(1, 2),
        intermediate=step * random.randint(1, 2),
        routing=random.choice(ROUTINGS),
        weight_position=random.choice(POSITIONS),
        granularity=random.choice(nvfp4.GRANULARITIES),
        is_token=random.random() < 0.5,
        has_halves=random.random() < 0.5,
        out_dtype=random.choice(DTYPES),
        id_dtype=random.choice([torch.int32, torch.int64]),
        limit=random.choice([10.0, math.inf, 0.5]),
    )


@pytest.mark.parametrize("step", [256, 16])
@pytest.mark.parametrize("most_rows", [60, 400])
def test_any_case(step: int, most_rows: int) -> None:
    """Guards against a row, expert, scale or weight that is another's, and operands that a launch refuses."""
    launched: set[str] = set()
    for _ in range(20):
        case = any_case(step, most_rows)
        args = arguments(case)
        args[4] = args[4].to(random.choice(DTYPES))
        if random.random() < 0.3:
            args[random.choice([1, 6, 9])].view(torch.uint8).view(-1)[:1] = 0x7F
        if random.random() < 0.3:
            args[:11] = [stored(arg, random.choice(LAYOUTS)) if random.random() < 0.3 else arg for arg in args[:11]]
        try:
            launched.update(assert_as_on_cpu(OP, *args, sms=random.choice([16, 78, 132])).names)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
    if step == 16:
        assert "grouped_unaligned" in launched
    else:
        assert launched & {"decode_mm.swiglu", "wgmma_w4.swiglu"}


@pytest.mark.parametrize(
    ("rows", "groups", "row_blocks", "are_equal", "expected"),
    [
        *(
            (8 * rows, 8, 8, True, tile)
            for rows, tile in ((16, 16), (17, 16), (33, 32), (65, 64), (129, 128), (512, 256))
        ),
        (8 * 64, 8, 8, False, 64),  # tiles of 32 rows: 24 at most, of 8 blocks each
        (8 * 4096, 8, 8, True, 256),
        *((rows, 256, 32, False, tile) for rows, tile in ((1536, 16), (6144, 32), (12288, 64), (24576, 128))),
    ],
)
def test_tile_rows(rows: int, groups: int, row_blocks: int, are_equal: bool, expected: int) -> None:
    """Guards against few large tiles that leave most multiprocessors idle, and small ones that take several waves."""
    assert tile_rows_of(rows, groups, row_blocks, 132, are_equal) == expected


# Slots up to one CTA that compares all, one CTA that counts, a cluster; averages on both sides of each tile size.
@pytest.mark.parametrize("tokens", [1, 8, 32, 33, 65, 100, 520, 1100])
def test_every_size_of_tile(tokens: int) -> None:
    """Guards against a schedule made for other tiles than those that the products walk."""
    for width, position, sms in ((256, "before_down", 8), (256, "after_down", 132), (16, "after_down", 132)):
        case = Case(tokens, 2, 3, width, width, "any", position, is_token=True)
        assert_as_on_cpu(OP, *arguments(case), sms=sms)


@pytest.mark.parametrize("tokens", [1, 5, 40, 200])
def test_every_variant(tokens: int) -> None:
    """Guards against a variant that tuning may choose whose tiles are not those of the schedule, or that does not fit."""
    names: set[str] = set()
    for position in POSITIONS:
        case = Case(tokens, 2, 4, 256, 512, "any", position, has_halves=tokens > 5, is_token=tokens > 1)
        names |= assert_every_variant_as_on_cpu(OP, *arguments(case))
    assert len(names) >= 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operand_in_a_layout(layout: str) -> None:
    """Guards against one operand that is taken as it lies: few rows an expert, many, any width, one expert, one token."""
    cases = [Case(tokens, 2, 3, 256, 256, has_halves=tokens == 3) for tokens in (3, 30)]
    cases += [Case(1, 2, 1, 256, 256), Case(9, 1, 1, 256, 256, "any", "before_down", "token", True, True)]
    cases += [Case(7, 2, 4, 48, 16, "any", "before_down", "token", True, True), Case(1, 1, 1, 16, 16)]
    for case in cases:
        args = arguments(case)
        for operand in range(11):
            moved = [*args[:operand], stored(args[operand], layout), *args[operand + 1 :]]
            assert_as_on_cpu(OP, *moved)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_routings(tokens: int, width: int) -> None:
    """Guards against experts without rows, all rows in one, ids of nobody, and repeated ids."""
    for position in POSITIONS:
        case = Case(tokens, 3, 5, width, width, weight_position=position, granularity="tensor_pow2")
        for ids in (-1, 5, 0, 4, 2**31 - 1, -(2**31)):
            args = arguments(case)
            args[3].fill_(ids)
            assert_as_on_cpu(OP, *args)
            args[3][0, 1] = 1
            assert_as_on_cpu(OP, *args)


@pytest.mark.parametrize("shape", [(0, 3, 4, 256, 256), (3, 0, 4, 256, 256), (0, 0, 4, 16, 16), (3, 2, 4, 256, 0), (3, 2, 4, 0, 16), (3, 2, 0, 256, 256)])  # fmt: skip
def test_without_some_of_it(shape: tuple[int, int, int, int, int]) -> None:
    """Guards against a launch of nothing, and results that are not written."""
    tokens, top_k, experts, hidden, intermediate = shape
    case = Case(tokens, top_k, experts, hidden, intermediate)
    assert_as_on_cpu(OP, *arguments(case))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [4, 40])
def test_non_finite(tokens: int, width: int) -> None:
    """Guards against NaN that reaches the global scale, another row or nobody's: in tokens, weights and experts."""
    for granularity in nvfp4.GRANULARITIES:
        for position in POSITIONS:
            case = Case(tokens, 2, 4, width, width, weight_position=position, granularity=granularity)
            args = arguments(case)
            args[1].view(torch.uint8)[1, 0] = 0x7F
            args[4][2, 1] = random.choice([math.nan, math.inf])
            args[3][3, 0], args[4][3, 0] = -1, math.nan
            assert_as_on_cpu(OP, *args)
            args[9].view(torch.uint8)[0, 3, 0] = 0x7F
            args[7][1] = math.inf
            assert_as_on_cpu(OP, *args)


@pytest.mark.parametrize("width", WIDTHS)
def test_zeros(width: int) -> None:
    """Guards against a workspace whose maximum is what the allocator left: nothing but zeros, and nobody routed."""
    for granularity in nvfp4.GRANULARITIES:
        for tokens in (3, 40):
            args = arguments(Case(tokens, 2, 4, width, width, granularity=granularity))
            args[0].zero_()
            assert_as_on_cpu(OP, *args)


def test_too_many_experts() -> None:
    """Guards against an expert that no thread counts."""
    args = arguments(Case(2, 2, 1025, 16, 16))
    with emulated_hopper(), pytest.raises(RuntimeError, match="at most 1024 experts"):
        CUDA_IMPLEMENTATIONS[OP](*args)


def test_most_experts() -> None:
    """Guards against an edge at the number of threads that count."""
    case = Case(3, 2, 1024, 16, 16)
    args = arguments(case)
    args[3].copy_(torch.tensor([[1023, 0], [1024, 1023], [512, -1]]))
    assert_as_on_cpu(OP, *args)
