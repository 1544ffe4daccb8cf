"""``nvfp4_grouped_mm`` on a GPU: against the CPU reference within the bound of fp32 sums, bitwise where they are exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops import nvfp4_grouped_mm, quantize_nvfp4
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.nvfp4_grouped_mm import on_hopper, reference

Packed = tuple[Tensor, Tensor, Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
# Groups, rows in all (static: rows a group), N, K.
SHAPES = [(6, 11, 32, 256), (8, 200, 256, 512), (256, 96, 64, 256), (3, 700, 272, 768), (6, 11, 10, 64), (5, 90, 75, 272), (1, 1, 1, 16)]  # fmt: skip
STATIC_SHAPES = [(8, 1, 1024, 4096), (2, 64, 64, 256), (16, 33, 128, 512), (2, 24, 64, 256), (3, 5, 10, 48), (1, 300, 48, 80)]  # fmt: skip


def any_packed(*lead: int, k: int, scale_shape: tuple[int, ...], is_exact: bool) -> Packed:
    """Any codes; block scales of all magnitudes, or 1/2, 1 and 2, which make every sum exact in fp32 up to K = 4096."""
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8)
    if is_exact:
        block_scales = torch.exp2(torch.randint(-1, 2, (*lead, k // 16)).float()).to(torch.float8_e4m3fn)
    else:
        block_scales = torch.randint(0, 127, (*lead, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes, block_scales, torch.rand(scale_shape) * 1e-3 + 1e-5


def arguments(
    shape: tuple[int, int, int, int], is_static: bool, out_dtype: torch.dtype, is_exact: bool, kind: int
) -> list[Any]:
    """What the operator takes, on the CPU; ``kind`` chooses the shapes of the global scales."""
    groups, rows, n, k = shape
    lead = (groups, rows) if is_static else (rows,)
    segments = 2 if n % 32 == 0 else n
    b_scale = [(), (groups,), (groups, segments)][kind % 3]
    a = any_packed(*lead, k=k, scale_shape=lead if kind % 2 else (), is_exact=is_exact)
    if is_static:  # as o_a_proj has them: the groups inside the rows
        a = a[0].transpose(0, 1).contiguous().transpose(0, 1), a[1], a[2]
    offsets = None if is_static else torch.randint(0, rows + 1, (groups,)).sort().values.int()
    return [*a, *any_packed(groups, n, k=k, scale_shape=b_scale, is_exact=is_exact), offsets, out_dtype]


def check(args: list[Any], is_exact: bool) -> None:
    args = given = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
    expected = reference(*given)  # torch's CUDA kernels run it with the bits of the CPU, faster
    actual = nvfp4_grouped_mm(*given)
    again = nvfp4_grouped_mm(*given)
    assert torch.equal(actual, again)
    if is_exact:
        assert torch.equal(actual, expected)
        return
    k = 2 * args[0].shape[-1]
    magnitudes = reference(args[0] & 0x77, *args[1:3], args[3] & 0x77, *args[4:7], torch.float32)
    limit = k * 2.0**-22 * magnitudes.double() + 2 * ROUNDING[args[-1]] * expected.double().abs()
    error = (actual.double() - expected.double()).abs()
    if args[-1] == torch.float16:  # beyond its range, both are infinite
        error[actual == expected] = 0
    assert (error <= limit).all(), f"{(error / limit).nan_to_num().max():.3g} of the bound"


@pytest.mark.gpu
@pytest.mark.parametrize("is_static", [False, True])
def test_reference_has_the_same_bits_on_a_gpu(is_static: bool) -> None:
    """Guards against a comparison with something else than the CPU reference."""
    for kind, shape in enumerate(STATIC_SHAPES[1:] if is_static else SHAPES):
        args = arguments(shape, is_static, DTYPES[kind % 3], False, kind)
        given = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
        assert torch.equal(reference(*given).cpu(), reference(*args))


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what `new_empty` returns, so that an element that no kernel writes is seen."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = new_empty(self, *args, **kwargs)
        if out.dtype.is_floating_point and out.dtype.itemsize > 1:
            return out.fill_(math.nan)
        return out.view(torch.uint8).fill_(0x7F).view(out.dtype) if out.numel() else out

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.mark.gpu
@pytest.mark.parametrize("is_exact", [True, False], ids=["exact", "random"])
@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("shape", SHAPES)
def test_offsets(shape: tuple[int, int, int, int], kind: int, is_exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a row that meets another group's weight or scale, and rows of no group that are not 0."""
    poison(monkeypatch)
    check(arguments(shape, False, DTYPES[kind % 3], is_exact, kind), is_exact)


@pytest.mark.gpu
@pytest.mark.parametrize("is_exact", [True, False], ids=["exact", "random"])
@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("shape", STATIC_SHAPES)
def test_static_groups(
    shape: tuple[int, int, int, int], kind: int, is_exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against bytes read in storage order, and a tile that reaches into the next group."""
    poison(monkeypatch)
    check(arguments(shape, True, DTYPES[kind % 3], is_exact, kind), is_exact)


def random_shape(chosen: torch.Generator, step: int) -> tuple[tuple[int, int, int, int], bool]:
    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=chosen))

    n = pick(1, 30) * (16 if step == 256 else 1)
    return (pick(1, 40), int(2 ** (pick(0, 80) / 10)), n, step * pick(1, 3)), bool(pick(0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("step", [256, 16])
def test_random_shapes(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an edge of some number of rows, groups or columns: a hundred shapes, bit for bit."""
    poison(monkeypatch)
    chosen = torch.Generator().manual_seed(step)
    for kind in range(100):
        shape, is_static = random_shape(chosen, step)
        with torch.device("cuda"):
            args = arguments(shape, is_static, torch.bfloat16, True, kind)
        check(args, True)


@pytest.mark.gpu
@pytest.mark.parametrize("ends", [[0, 0, 0], [7, 7, 7], [0, 0, 7], [1, 1, 2]])
@pytest.mark.parametrize("k", [256, 48])
def test_empty_groups(k: int, ends: list[int]) -> None:
    """Guards against rows left unwritten, or that go to an empty group."""
    args = arguments((3, 7, 16, k), False, torch.float32, True, 1)
    args[6] = torch.tensor(ends, dtype=torch.int32)
    check(args, True)


@pytest.mark.gpu
def test_wrong_offsets_stay_inside() -> None:
    """Guards against memory read or written out of bounds where the CPU would raise."""
    args = arguments((5, 20, 16, 256), False, torch.float32, True, 1)
    args[6] = torch.tensor([9, -4, 300, 2, 30], dtype=torch.int32)
    y = nvfp4_grouped_mm(*[arg.cuda() if isinstance(arg, Tensor) else arg for arg in args])
    torch.cuda.synchronize()
    assert y.shape == (20, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("lead", [(0,), (3,), (2, 0)])
def test_nothing_to_do(lead: tuple[int, ...]) -> None:
    """Guards against a failure without rows, columns or groups."""
    for groups, n in ((2, 16), (2, 0), (0, 16)):
        is_static = len(lead) == 2
        a = any_packed(*(groups, *lead[1:]) if is_static else lead, k=256, scale_shape=(), is_exact=True)
        b = any_packed(groups, n, k=256, scale_shape=(), is_exact=True)
        offsets = None if is_static else torch.zeros(groups, dtype=torch.int32)
        args = [*a, *b, offsets, torch.bfloat16]
        y = nvfp4_grouped_mm(*[arg.cuda() if isinstance(arg, Tensor) else arg for arg in args])
        assert torch.equal(y.cpu(), reference(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [256, 48])
def test_non_finite_row_is_nan_and_others_are_untouched(k: int) -> None:
    """Guards against NaN that reaches the other rows of a tile, and against silent zeros."""
    offsets = torch.tensor([10, 10, 30], dtype=torch.int32).cuda()
    b = [part.cuda() for part in any_packed(3, 16, k=k, scale_shape=(3,), is_exact=True)]
    for granularity in nvfp4.GRANULARITIES:
        x = torch.randn(40, k, dtype=torch.bfloat16)
        x[[5, 20], 33] = 0
        before = nvfp4_grouped_mm(*(part.cuda() for part in quantize_nvfp4(x, granularity)), *b, offsets)
        x[[5, 20, 35], 33] = torch.tensor([math.nan, math.inf, math.nan], dtype=torch.bfloat16)
        after = nvfp4_grouped_mm(*(part.cuda() for part in quantize_nvfp4(x, granularity)), *b, offsets)
        assert after[[5, 20]].isnan().all()
        after[[5, 20]] = before[[5, 20]]
        assert torch.equal(after, before)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Guards against a synchronisation, and against grids that the offsets of the capture decided."""
    args = arguments((8, 200, 64, 512), False, torch.bfloat16, True, 1)
    args = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
    nvfp4_grouped_mm(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nvfp4_grouped_mm(*args)
    for _ in range(5):
        args[6].copy_(torch.randint(0, 201, (8,)).sort().values)
        graph.replay()
        assert torch.equal(out, nvfp4_grouped_mm(*args))


def wanted_kernels() -> list[tuple[str, Any]]:
    """Every kernel that these tests run, found without a GPU."""
    cases = [(shape, False, DTYPES[kind % 3], kind) for shape in SHAPES for kind in range(6)]
    cases += [(shape, True, DTYPES[kind % 3], kind) for shape in STATIC_SHAPES for kind in range(6)]
    for step in (256, 16):
        chosen = torch.Generator().manual_seed(step)
        cases += [(*random_shape(chosen, step), torch.bfloat16, kind) for kind in range(100)]
    cases += [((3, 7, 16, k), False, torch.float32, 1) for k in (256, 48)]
    cases += [((5, 20, 16, 256), False, torch.float32, 1), ((8, 200, 64, 512), False, torch.bfloat16, 1)]
    cases += [((3, 40, 16, k), False, torch.bfloat16, kind) for k in (256, 48) for kind in (0, 1)]
    with cache.recording() as wanted:
        for shape, is_static, out_dtype, kind in cases:
            args = arguments(shape, is_static, out_dtype, True, kind)
            on_hopper(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
    return list(wanted)


def test_few_kernels_for_all_cases() -> None:
    """Guards against a configuration a shape: 300 shapes share some thirty kernels."""
    names = [name for name, _ in wanted_kernels()]
    assert 10 <= len(names) <= 40
    assert {"sm90.moe_align", "sm90.expand", "sm90.expand_groups", "sm90.zero_tail"} <= set(names)
