"""``nvfp4_moe`` on a GPU against the CPU reference.

The input of the second product is quantised, so a last bit of the first product can move a code, and with it much more
than any bound on sums allows. Here the first product is exact in fp32 in any order: codes of multiples of 1/2, block
scales 1/2, 1 or 2, so that every partial sum is a multiple of 2^-4 below 4096 * 144 < 2^20. What remains is bounded: the
second product by K 2^-22 of the sum of its magnitudes (fp32 in any order, tensor cores that truncate), the combination
and the two scalings by 2^-20 of the sum of theirs, and two roundings of the result, one each side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops import nvfp4_moe, quantize_nvfp4
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.nvfp4_moe import on_hopper, reference
from tests import nvfp4_oracle as oracle

Packed = tuple[Tensor, Tensor, Tensor]


class Case(NamedTuple):
    """One call: sizes, routing and options."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    routing: str = "any"
    weight_position: str = "after_down"
    granularity: str = "tensor"
    is_token: bool = False
    has_halves: bool = False
    out_dtype: torch.dtype = torch.bfloat16
    id_dtype: torch.dtype = torch.int64
    limit: float = 10.0


ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
ROUTINGS = ("any", "one", "nobody", "distinct")
WIDE = [
    Case(1, 6, 16, 512, 256),
    Case(3, 2, 8, 256, 256, has_halves=True),
    Case(16, 6, 64, 512, 512, "distinct", "before_down"),
    Case(33, 6, 16, 256, 768, "any", "after_down", "token", True),
    Case(64, 8, 8, 512, 256, "one", "before_down", "tensor_pow2"),
    Case(130, 4, 4, 256, 512, "any", "before_down", "token", True, True),
    Case(200, 6, 8, 512, 256, "distinct", id_dtype=torch.int32),
    Case(700, 3, 3, 256, 256, "any", "after_down", "tensor_pow2"),
    Case(700, 6, 1, 256, 256, "one"),
    Case(5, 2, 300, 256, 256, "nobody"),
    Case(20, 2, 4, 256, 256, out_dtype=torch.float32),
    Case(20, 2, 4, 256, 256, "any", "before_down", out_dtype=torch.float16),
]
NARROW = [
    Case(7, 2, 8, 48, 16),
    Case(1, 1, 1, 16, 16, has_halves=True),
    Case(40, 3, 5, 272, 144, "any", "before_down", "token", True, True),
    Case(90, 6, 7, 64, 272, "one", "after_down", "tensor_pow2", id_dtype=torch.int32),
    Case(12, 2, 300, 80, 48, "nobody", out_dtype=torch.float16),
    Case(30, 8, 16, 256, 128, "distinct", out_dtype=torch.float32),
    Case(30, 8, 16, 256, 128, "any", "before_down", out_dtype=torch.float16),
    Case(30, 8, 16, 256, 128, "any", "before_down", out_dtype=torch.float32),
]


def random_cases(count: int, step: int) -> Iterator[Case]:
    """Cases whose widths are multiples of ``step``."""
    chosen = torch.Generator().manual_seed(step)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=chosen))

    for _ in range(count):
        tokens = int(2 ** (pick(0, 80) / 10))
        yield Case(
            tokens, pick(1, 8), pick(1, 40), step * pick(1, 3), step * pick(1, 3), ROUTINGS[pick(0, 3)],
            ("before_down", "after_down")[pick(0, 1)], nvfp4.GRANULARITIES[pick(0, 2)], bool(pick(0, 1)),
            bool(pick(0, 1)), limit=(10.0, math.inf, 0.5)[pick(0, 2)],
        )  # fmt: skip


ALL_CASES = [*WIDE, *NARROW, *random_cases(100, 256), *random_cases(100, 16)]


def exact_packed(*lead: int, k: int, scale_shape: tuple[int, ...]) -> Packed:
    """Random codes with block scales 1/2, 1 or 2: products of two are multiples of 2^-4 of at most 144; their sums near 3."""
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8)
    block_scales = torch.exp2(torch.randint(-1, 2, (*lead, k // 16)).float()).to(torch.float8_e4m3fn)
    return codes, block_scales, (torch.rand(scale_shape) + 0.5) / (4 if len(lead) == 1 else math.sqrt(k))


def any_packed(*lead: int, k: int, scale_shape: tuple[int, ...]) -> Packed:
    """Weights of random normal numbers."""
    codes, block_scales, scale = nvfp4.quantize(torch.randn(*lead, k) / math.sqrt(k))
    return codes, block_scales, scale.expand(scale_shape).contiguous()


def any_ids(case: Case) -> Tensor:
    shape = case.tokens, case.top_k
    if case.routing == "one":
        return torch.full(shape, case.experts - 1, dtype=case.id_dtype)
    if case.routing == "nobody":
        return torch.where(torch.rand(shape) < 0.5, -1, case.experts).to(case.id_dtype)
    if case.routing == "distinct" and case.top_k <= case.experts:
        return torch.rand(case.tokens, case.experts).argsort(-1)[:, : case.top_k].to(case.id_dtype)
    return torch.randint(-1, case.experts + 2, shape).to(case.id_dtype)


def arguments(case: Case, packed: Any = exact_packed) -> list[Any]:
    """What the operator takes, on the CPU."""
    experts, hidden, intermediate = case.experts, case.hidden, case.intermediate
    a = packed(case.tokens, k=hidden, scale_shape=(case.tokens,) if case.is_token else ())
    gate_up_scale = (experts, 2) if case.has_halves else (experts,)
    return [
        *a, any_ids(case), torch.rand(case.tokens, case.top_k),
        *packed(experts, 2 * intermediate, k=hidden, scale_shape=gate_up_scale),
        *any_packed(experts, hidden, k=intermediate, scale_shape=(experts,)),
        case.limit, case.weight_position, case.granularity, case.out_dtype,
    ]  # fmt: skip


def on_gpu(args: list[Any]) -> list[Any]:
    return [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]


def bound(args: list[Any], expected: Tensor) -> Tensor:
    """How far another order of the sums of the second product may lead, see the module's docstring."""
    with Magnitudes():
        total = reference(*args).double() * (1 + ROUNDING[args[-1]])
    intermediate = 2 * args[8].shape[2]
    return (intermediate * 2.0**-22 + 2.0**-20) * total + 2 * ROUNDING[args[-1]] * expected.double().abs() + 1e-38


class Magnitudes:
    """While active, the reference's second product adds magnitudes: its operands lose their signs."""

    def __enter__(self) -> None:
        self.matmul, self.calls = nvfp4.matmul, 0
        self.quantize = nvfp4.quantize
        self.is_second = False

        def matmul(a: Tensor, a_scale: Tensor, codes: Tensor, *rest: Tensor) -> Tensor:
            if self.is_second:
                return self.matmul(a.abs(), a_scale, codes & 0x77, *rest)
            return self.matmul(a, a_scale, codes, *rest)

        def quantize(*given: Any) -> Packed:
            self.is_second = True  # the input of the second product is quantised after the first
            return self.quantize(*given)

        nvfp4.matmul, nvfp4.quantize = matmul, quantize  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        nvfp4.matmul, nvfp4.quantize = self.matmul, self.quantize


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what `new_empty` returns with what no kernel writes, so that an element left unwritten is seen."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = new_empty(self, *args, **kwargs)
        if out.dtype.is_floating_point and out.dtype.itemsize > 1:
            return out.fill_(math.nan)
        return out.view(torch.uint8).fill_(0x7F).view(out.dtype) if out.numel() else out

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def check(case: Case) -> None:
    with torch.device("cuda"):
        given = arguments(case)
    expected = reference(*given)
    actual = nvfp4_moe(*given)
    limit = bound(given, expected)
    error = (actual.double() - expected.double()).abs()
    assert (error <= limit).all(), f"{case}: {(error / limit).max():.3g} of the bound, {(error > limit).sum()} elements"
    again = nvfp4_moe(*given)
    assert torch.equal(again, actual), f"{case}: other bits on the second run"


@pytest.mark.gpu
@pytest.mark.parametrize("case", NARROW, ids=str)
def test_reference_has_the_same_bits_on_a_gpu(case: Case) -> None:
    """Guards against a comparison with something else than the CPU reference: torch's CUDA kernels run it here, faster."""
    args = arguments(case)
    assert torch.equal(reference(*on_gpu(args)).cpu(), reference(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("case", WIDE + NARROW, ids=str)
def test_matches_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a row, expert, scale or weight that is another's, and anything read before it is written."""
    poison(monkeypatch)
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("step", [256, 16])
def test_random_shapes(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an edge of some number of tokens, experts or columns: a hundred shapes."""
    poison(monkeypatch)
    for case in random_cases(100, step):
        check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
@pytest.mark.parametrize("width", [256, 48])
def test_close_on_ordinary_data(width: int, granularity: str) -> None:
    """Guards against an error that exact sums hide: random normal numbers, where fp32 sums differ in the last bits.

    An input of ``down`` moves to the next code, by 2^-2 of itself, with probability about its relative error, 2^-20,
    over that distance: noise of 2^-22, 66 dB down.
    """
    case = Case(64, 4, 8, width, width, granularity=granularity, out_dtype=torch.float32)
    args = arguments(case, any_packed)
    args[:3] = quantize_nvfp4(torch.randn(64, width), granularity)
    given = on_gpu(args)
    expected, actual = reference(*given).double(), nvfp4_moe(*given).double()
    assert 10 * torch.log10(expected.square().sum() / (expected - actual).square().sum()) >= 50


@pytest.mark.gpu
@pytest.mark.parametrize("weight_position", ["before_down", "after_down"])
@pytest.mark.parametrize("width", [256, 48])
def test_non_finite_token_is_nan_and_others_are_untouched(width: int, weight_position: str) -> None:
    """Guards against NaN that spreads in a tile or to the global scale, and against silent zeros."""
    case = Case(40, 4, 4, width, width, weight_position=weight_position)
    for granularity, value in itertools.product(nvfp4.GRANULARITIES, (math.nan, math.inf, -math.inf)):
        args = on_gpu(arguments(case))
        args[-2] = granularity
        args[3].clamp_(0, 3)
        x = torch.randn(40, width)
        x[2] = 0
        args[:3] = (part.cuda() for part in quantize_nvfp4(x, granularity))
        before = nvfp4_moe(*args)
        x[2, 20] = value
        args[:3] = (part.cuda() for part in quantize_nvfp4(x, granularity))
        after = nvfp4_moe(*args)
        assert after[2].isnan().all()
        after[2] = before[2]
        assert torch.equal(after, before)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [256, 48])
def test_non_finite_weight_is_loud(width: int) -> None:
    """Guards against a router's NaN that is lost, or reaches another token, and that of a sentinel which counts."""
    for weight_position in ("before_down", "after_down"):
        args = arguments(Case(30, 2, 4, width, width, weight_position=weight_position))
        args[3].clamp_(0, 3)
        args[4][7, 1] = math.nan
        args[3][9, 0], args[4][9, 0] = -1, math.nan
        y = nvfp4_moe(*on_gpu(args))
        assert y.isnan().all(-1).nonzero().flatten().tolist() == [7]
        assert y.isnan().any(-1).nonzero().flatten().tolist() == [7]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [256, 48])
def test_zeros_give_zeros(width: int) -> None:
    """Guards against 0 / 0: tokens of zeros, experts of zeros, weights of zero."""
    for granularity in nvfp4.GRANULARITIES:
        for index in (0, 5, 8, 4):
            args = arguments(Case(9, 2, 4, width, width, granularity=granularity, weight_position="before_down"))
            args[index].zero_()
            assert nvfp4_moe(*on_gpu(args)).eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [256, 48])
def test_repeated_expert_counts_twice(width: int) -> None:
    """Guards against a scatter in which the second of two equal ids overwrites the first."""
    args = arguments(Case(8, 1, 4, width, width, "distinct", out_dtype=torch.float32))
    once = nvfp4_moe(*on_gpu(args))
    args[3], args[4] = args[3].expand(8, 2), args[4].expand(8, 2)
    assert torch.equal(nvfp4_moe(*on_gpu(args)), once + once)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [256, 48])
def test_strided_operands(width: int) -> None:
    """Guards against operands read in storage order."""
    for is_token in (False, True):
        args = on_gpu(arguments(Case(12, 3, 4, width, width, is_token=is_token, has_halves=is_token)))
        tensors, options = args[:11], args[11:]
        expected = nvfp4_moe(*args)
        columns_apart = [torch.stack((x, x), -1)[..., 0] if x.dim() else x for x in tensors]
        assert torch.equal(nvfp4_moe(*columns_apart, *options), expected)
        every_second_expert = [torch.stack((x, x), 1).flatten(0, 1)[::2] for x in tensors[5:]]
        assert torch.equal(nvfp4_moe(*tensors[:5], *every_second_expert, *options), expected)


@pytest.mark.gpu
def test_nothing_to_do() -> None:
    """Guards against a failure without tokens, or without a k."""
    for tokens, top_k in ((0, 3), (3, 0), (0, 0)):
        args = arguments(Case(tokens, top_k, 4, 256, 256))
        assert torch.equal(nvfp4_moe(*on_gpu(args)).cpu(), torch.zeros(tokens, 256, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Guards against a synchronisation, and against grids or allocations that the routing of the capture decided."""
    case = Case(16, 6, 64, 512, 256)
    args = on_gpu(arguments(case))
    nvfp4_moe(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nvfp4_moe(*args)
    for routing in ROUTINGS:
        args[3].copy_(any_ids(case._replace(routing=routing)))
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")
        try:
            direct = nvfp4_moe(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out, direct)


@pytest.mark.gpu
def test_at_the_width_of_v4_flash() -> None:
    """Guards against an error that only long sums or many tiles show: 4096 / 2048 wide, from 1 to 300 tokens."""
    for tokens in (1, 5, 40, 300):
        check(Case(tokens, 6, 12, 4096, 2048, "distinct"))


def wanted_kernels() -> list[tuple[str, Any]]:
    """Every kernel that these tests run, found without a GPU."""
    meta = list(ALL_CASES)
    meta += [Case(tokens, 6, 12, 4096, 2048) for tokens in (1, 5, 40, 300)]
    meta += [Case(64, 4, 8, w, w, granularity=g, out_dtype=torch.float32) for w in (256, 48) for g in nvfp4.GRANULARITIES]  # fmt: skip
    meta += [
        Case(tokens, top_k, 4, w, w, weight_position=p, granularity=g, is_token=g == "token", out_dtype=d)
        for tokens, top_k in ((40, 4), (30, 2), (9, 2), (8, 1), (8, 2), (12, 3))
        for w in (256, 48)
        for p in ("before_down", "after_down")
        for g in nvfp4.GRANULARITIES
        for d in (torch.bfloat16, torch.float32)
    ]
    meta.append(Case(16, 6, 64, 512, 256))
    with cache.recording() as wanted:
        for case in meta:
            small = arguments(case._replace(tokens=case.tokens, experts=1, hidden=16, intermediate=16))
            on_hopper(*meta_arguments(case, small))
    return list(wanted)


def meta_arguments(case: Case, small: list[Any]) -> list[Any]:
    """Arguments without data of the sizes of a case."""

    def meta(like: int, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=small[like].dtype, device="meta")

    e, h, i = case.experts, case.hidden, case.intermediate
    return [
        meta(0, case.tokens, h // 2), meta(1, case.tokens, h // 16), meta(2, *((case.tokens,) if case.is_token else ())),
        meta(3, case.tokens, case.top_k), meta(4, case.tokens, case.top_k),
        meta(5, e, 2 * i, h // 2), meta(6, e, 2 * i, h // 16), meta(7, *((e, 2) if case.has_halves else (e,))),
        meta(8, e, h, i // 2), meta(9, e, h, i // 16), meta(10, e), *small[11:],
    ]  # fmt: skip


def test_few_kernels_for_all_cases() -> None:
    """Guards against a configuration a shape: 200 random shapes share some seventy kernels."""
    names = [name for name, _ in wanted_kernels()]
    assert 20 <= len(names) <= 80
    assert {"sm90.moe_align", "sm90.interleave", "sm90.moe_requantize", "sm90.moe_combine"} <= set(names)


def test_bound_is_of_magnitudes() -> None:
    """Guards against a bound that is zero or includes everything: above the spread of sums, far below their size."""
    args = arguments(Case(6, 2, 4, 256, 256, "distinct"))
    expected = reference(*args)
    limit = bound(args, expected)
    assert (limit > 0).all()
    assert limit.mean() < 0.02 * expected.double().abs().mean()
    oracle.assert_same_bits(reference(*args), expected)  # and nothing stays patched
