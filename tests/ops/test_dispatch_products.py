"""Dense and grouped products as dispatch launches them: bit for bit the CPU's on emulated kernels, on every path."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_compile.ops.dispatch import fresh_weights, nvfp4_mm
from dsv4_compile.ops.registration import CUDA_IMPLEMENTATIONS
from tests.kernels.emulation import (
    LAYOUTS,
    assert_as_on_cpu,
    assert_every_variant_as_on_cpu,
    emulated_hopper,
    stored,
)
from tests.ops import test_nvfp4_grouped_mm_gpu as grouped

Packed = tuple[Tensor, Tensor, Tensor]
ops = torch.ops.dsv4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def any_packed(*lead: int, k: int, scale_shape: tuple[int, ...] = (), nan_share: float = 0.0) -> Packed:
    """Any codes; block scales from 2^-4 to 2^4, a share of them NaN."""
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8)
    block_scales = torch.randint(0x18, 0x58, (*lead, k // 16), dtype=torch.uint8)
    block_scales[torch.rand(block_scales.shape) < nan_share] = 0x7F
    return codes, block_scales.view(torch.float8_e4m3fn), torch.rand(scale_shape) + 0.1


def lists(weights: list[Packed]) -> list[list[Tensor]]:
    return [[weight[i] for weight in weights] for i in range(3)]


def scale_shape(rows: int) -> tuple[int, ...]:
    """0-d, one segment, one a row, or segments between."""
    divisors = [count for count in (1, 2, 3, 4, 8) if rows % count == 0]
    return random.choice([(), (), (1,), (max(1, rows),), (random.choice(divisors),)])


def in_any_layout(parts: tuple[Tensor, ...], share: float) -> list[Tensor]:
    return [stored(part, random.choice(LAYOUTS) if random.random() < share else "contiguous") for part in parts]


def dense_case(step: int, most_tokens: int) -> tuple[list[Tensor], list[list[Tensor]], Tensor | None, torch.dtype]:
    """An activation, weights, bias and dtype: sizes around the edges of tiles, any number of weights, any layout."""
    tokens, k = random.randint(0, most_tokens), step * random.choice([1, 2, 3])
    share = random.choice([0.0, 0.0, 0.3])
    unit = random.choice([1, 8, 8, 16])
    rows = [unit * random.randint(0, 10) for _ in range(random.choice([1, 1, 2, 3, 5, 9]))]
    lead = random.choice([(tokens,), (1, tokens), (2, tokens // 2, 1)])
    a = any_packed(*lead, k=k, scale_shape=random.choice([(), lead]), nan_share=random.choice([0.0, 0.01]))
    weights = [any_packed(n, k=k, scale_shape=scale_shape(n), nan_share=random.choice([0.0, 0.002])) for n in rows]
    bias = torch.randn(sum(rows)).to(random.choice(DTYPES)) if random.random() < 0.5 else None
    if bias is not None:
        bias = stored(bias, random.choice(LAYOUTS))
    b = lists([tuple(in_any_layout(weight, share)) for weight in weights])  # type: ignore[misc]
    return in_any_layout(a, share), b, bias, random.choice(DTYPES)


@pytest.mark.parametrize(("step", "most_tokens"), [(256, 33), (256, 300), (16, 70)])
def test_dense(step: int, most_tokens: int) -> None:
    """Guards against a slice, scale, segment, bias or stride of another part, and against operands a launch refuses."""
    launched: set[str] = set()
    for _ in range(40):
        a, b, bias, dtype = dense_case(step, most_tokens)
        sms = random.choice([16, 78, 132])
        launched.update(assert_as_on_cpu(ops.nvfp4_mm.default, *a, *b, bias, dtype, sms=sms).names)
        x = torch.randn(*a[0].shape[:-1], 2 * a[0].shape[-1]).bfloat16()
        if x.numel() and random.random() < 0.2:
            x.view(-1)[random.randrange(x.numel())] = random.choice([float("nan"), float("inf"), float("-inf")])
        x = stored(x, random.choice(LAYOUTS))
        launched.update(assert_as_on_cpu(ops.nvfp4_weight_mm.default, x, *b, bias, dtype, sms=sms).names)
    wanted = {(256, 33): "decode_mm.dense", (256, 300): "wgmma_w4.dense", (16, 70): "expand"}
    assert wanted[step, most_tokens] in launched


@pytest.mark.parametrize("operand", range(6))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_operand_in_a_layout(layout: str, operand: int) -> None:
    """Guards against one operand that is taken as it lies, on each path: few tokens, many, widths that TMA cannot map."""
    for tokens, rows, k in ((1, 16, 16), (3, 24, 256), (1, 8, 256), (40, 24, 256), (40, 7, 256), (3, 24, 48)):
        parts = [*any_packed(tokens, k=k, scale_shape=(tokens,)), *any_packed(rows, k=k, scale_shape=(rows,))]
        parts[operand] = stored(parts[operand], layout)
        b = [[part] for part in parts[3:]]
        assert_as_on_cpu(ops.nvfp4_mm.default, *parts[:3], *b, None, torch.bfloat16)
        if operand >= 3:
            x = torch.randn(tokens, k).bfloat16()
            assert_as_on_cpu(ops.nvfp4_weight_mm.default, x, *b, None, torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 32, 33, 130, 300])
def test_every_dense_variant(tokens: int) -> None:
    """Guards against a variant that tuning may choose and a launch refuses, or that does not fit: any splits, any tile."""
    names: set[str] = set()
    for rows, k in (((200,), 256), ((1000,), 1024), ((40, 8, 136, 16, 24), 2048)):
        a = any_packed(tokens, k=k, scale_shape=random.choice([(), (tokens,)]))
        b = lists([any_packed(n, k=k, scale_shape=scale_shape(n)) for n in rows])
        bias = random.choice([None, torch.randn(sum(rows))])
        x = torch.randn(tokens, k).bfloat16()
        names |= assert_every_variant_as_on_cpu(ops.nvfp4_mm.default, *a, *b, bias, torch.bfloat16)
        names |= assert_every_variant_as_on_cpu(ops.nvfp4_weight_mm.default, x, *b, bias, torch.float32)
    assert len(names) >= 4


@pytest.mark.parametrize("shape", [(0, (8,), 256), (3, (0, 0), 256), (3, (8,), 0), (40, (0, 8, 0, 16), 256)])
def test_dense_without_some_of_it(shape: tuple[int, tuple[int, ...], int]) -> None:
    """Guards against a launch of nothing, and sums of nothing that are not written."""
    tokens, rows, k = shape
    b = lists([any_packed(n, k=k, scale_shape=(1,) if n else ()) for n in rows])
    bias = torch.randn(sum(rows))
    assert_as_on_cpu(ops.nvfp4_mm.default, *any_packed(tokens, k=k), *b, bias, torch.float32)
    assert_as_on_cpu(ops.nvfp4_weight_mm.default, torch.randn(tokens, k).bfloat16(), *b, bias, torch.float32)


def test_dense_in_two_launches() -> None:
    """Guards against tokens, scales a token or bias of the other part, where a wave would be mostly idle."""
    most = 0
    for tokens in (300, 520, 700):
        for sms in (5, 8):
            a = any_packed(tokens, k=512, scale_shape=(tokens,))
            b = lists([any_packed(n, k=512) for n in (136, 256)])
            trace = assert_as_on_cpu(ops.nvfp4_mm.default, *a, *b, torch.randn(392), torch.bfloat16, sms=sms)
            most = max(most, trace.names.count("wgmma_w4.dense"))
    assert most > 1


def test_dense_expanded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against scales, columns or bias of another chunk of a weight that is expanded piece by piece."""
    for elements in (1, 48 * 5, 48 * 7 + 1):
        monkeypatch.setattr(nvfp4_mm, "EXPANDED_ELEMENTS", elements)
        a = any_packed(33, k=48, scale_shape=(33,))
        b = lists([any_packed(n, k=48, scale_shape=shape) for n, shape in ((10, (2,)), (21, (21,)), (3, ()))])
        assert_as_on_cpu(ops.nvfp4_mm.default, *a, *b, torch.randn(34), torch.bfloat16)


def in_layouts(args: list[Any], share: float) -> list[Any]:
    """Operands of the grouped product in any layout; offsets keep their values."""
    layouts = [random.choice(LAYOUTS) if random.random() < share else "contiguous" for _ in args]
    if layouts[6] == "repeated":
        layouts[6] = "rows apart"
    return [stored(arg, layout) if isinstance(arg, Tensor) else arg for arg, layout in zip(args, layouts, strict=True)]


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("step", [256, 16])
def test_grouped(step: int, is_static: bool) -> None:
    """Guards against another group's rows, weight or scale, rows of no group, and operands that a launch refuses."""
    launched: set[str] = set()
    for kind in range(60):
        groups, rows = random.randint(1, 9), random.choice([1, 2, 7, 8, 9, 20, 64, 65, 130, 200])
        n = random.choice([16, 32, 48, 80, 144] if random.random() < 0.8 else [1, 8, 10, 75])
        shape = groups, -(-rows // groups) if is_static else rows, n, step * random.choice([1, 2, 3])
        is_exact = random.random() < 0.5
        args = grouped.arguments(shape, is_static, DTYPES[kind % 3], is_exact, random.randrange(6))
        if random.random() < 0.1:
            args[1].view(torch.uint8).view(-1)[random.randrange(args[1].numel())] = 0x7F
        args = in_layouts(args, random.choice([0.0, 0.3]))
        sms = random.choice([16, 78, 132])
        launched.update(assert_as_on_cpu(ops.nvfp4_grouped_mm.default, *args, sms=sms).names)
    assert launched >= ({"decode_mm.grouped", "wgmma_w4.grouped"} if step == 256 else {"grouped_unaligned"})


@pytest.mark.parametrize("operand", range(7))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_operand_in_a_layout(layout: str, operand: int) -> None:
    """Guards against one operand that is taken as it lies, on each path and with each shape of the scales."""
    offsets_repeat = operand == 6 and layout == "repeated"
    cases = [(6, 11, 16, 256), (3, 100, 16, 256), (4, 9, 10, 48), (1, 1, 1, 16), (1, 3, 16, 256)]
    static = [(3, 2, 16, 256), (2, 40, 16, 256), (3, 5, 10, 48), (1, 1, 16, 16), (1, 5, 16, 256)]
    for kind in (1, 2, 3):
        for shape in [*cases, *static]:
            args = grouped.arguments(shape, shape in static, torch.bfloat16, True, kind)
            if isinstance(args[operand], Tensor) and not offsets_repeat:
                args[operand] = stored(args[operand], layout)
                assert_as_on_cpu(ops.nvfp4_grouped_mm.default, *args)


@pytest.mark.parametrize("is_static", [False, True])
def test_every_grouped_variant(is_static: bool) -> None:
    """Guards against a variant that tuning may choose whose tiles are not those of the schedule."""
    names: set[str] = set()
    for groups, rows in ((1, 1), (3, 12), (5, 65), (2, 300)):
        shape = groups, -(-rows // groups) if is_static else rows, 48, 512
        for kind in (1, 2):
            args = grouped.arguments(shape, is_static, torch.bfloat16, False, kind)
            names |= assert_every_variant_as_on_cpu(ops.nvfp4_grouped_mm.default, *args)
            args[:2] = (part.contiguous() for part in args[:2])
            names |= assert_every_variant_as_on_cpu(ops.nvfp4_grouped_mm.default, *args)
    assert len(names) >= 6


@pytest.mark.parametrize("ends", [[0, 0, 0], [7, 7, 7], [0, 0, 7], [1, 1, 2]])
def test_grouped_with_empty_groups(ends: list[int]) -> None:
    """Guards against rows left unwritten, or that go to an empty group."""
    for n, k in ((16, 256), (6, 48)):
        args = grouped.arguments((3, 7, n, k), False, torch.float32, False, 1)
        args[6] = torch.tensor(ends, dtype=torch.int32)
        assert_as_on_cpu(ops.nvfp4_grouped_mm.default, *args)


@pytest.mark.parametrize("shape", [(5, 0, 16, 256), (0, 4, 16, 256), (2, 4, 0, 256), (2, 4, 16, 0), (0, 0, 0, 0)])
def test_grouped_without_some_of_it(shape: tuple[int, int, int, int]) -> None:
    """Guards against a launch of nothing, and sums of nothing that are not written."""
    groups, rows, n, k = shape
    for is_static in (False, True):
        lead = (groups, rows) if is_static else (rows,)
        offsets = None if is_static else torch.full((groups,), rows, dtype=torch.int32)
        args = *any_packed(*lead, k=k), *any_packed(groups, n, k=k), offsets, torch.bfloat16
        assert_as_on_cpu(ops.nvfp4_grouped_mm.default, *args)


def test_grouped_wrong_offsets_stay_inside() -> None:
    """Guards against tiles outside the rows where the CPU would raise: the emulation checks each tile."""
    for n, k in ((16, 256), (6, 48)):
        args = grouped.arguments((5, 20, n, k), False, torch.float32, True, 1)
        args[6] = torch.tensor([9, -4, 300, 2, 30], dtype=torch.int32)
        with emulated_hopper():
            assert CUDA_IMPLEMENTATIONS[ops.nvfp4_grouped_mm.default](*args).shape == (20, n)


def products(tokens: int) -> list[Callable[[Packed], tuple[Any, ...]]]:
    """Calls of every operator that multiplies with a weight [N, 256], their other operands made beforehand."""
    a, x = any_packed(tokens, k=256), torch.randn(tokens, 256).bfloat16()
    stack = a[0].unsqueeze(0), a[1].unsqueeze(0), a[2]
    offsets, dtype = torch.tensor([tokens], dtype=torch.int32), torch.bfloat16

    def experts(weight: Packed) -> tuple[Tensor, ...]:
        return weight[0].unsqueeze(0), weight[1].unsqueeze(0), weight[2]

    return [
        lambda weight: (ops.nvfp4_mm.default, *a, *lists([weight]), None, dtype),
        lambda weight: (ops.nvfp4_weight_mm.default, x, *lists([weight]), None, dtype),
        lambda weight: (ops.nvfp4_grouped_mm.default, *stack, *experts(weight), None, dtype),
        lambda weight: (ops.nvfp4_grouped_mm.default, *a, *experts(weight), offsets, dtype),
    ]


def call(op: Any, *arguments: Any) -> Any:
    return CUDA_IMPLEMENTATIONS[op](*arguments)


@pytest.mark.parametrize("between", ["nothing", "products", "a quantiser", "a torch operator"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_fresh_weight_is_complete(tokens: int, between: str) -> None:
    """Guards against a product that starts before the quantiser of its weight has ended, launches between or not."""
    other = any_packed(16, k=256)
    for rows in (16, 400):  # one launch, two
        matrix = torch.randn(rows, 256).bfloat16()
        for product in products(tokens):
            others = [] if between != "products" else products(tokens)
            with emulated_hopper():
                fresh_weights.wrote()
                weight = call(ops.quantize_nvfp4.default, matrix, "tensor")
                for another in others:
                    call(*another(other))
                if between == "a quantiser":
                    call(ops.quantize_nvfp4.default, matrix[:3], "token")
                elif between == "a torch operator":
                    matrix.add(1)
                call(*product(weight))


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_fresh_weight_is_not_complete_by_itself(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the test above seeing nothing: without the ordinary launch, these read too early."""
    monkeypatch.setattr(fresh_weights, "_launch_ordinary", lambda device: None)
    matrix = torch.randn(16, 256).bfloat16()
    reads_early = products(tokens)[1:2] if tokens > 1 else products(tokens)[:3]
    for product in reads_early:
        with emulated_hopper():
            weight = call(ops.quantize_nvfp4.default, matrix, "tensor")
            with pytest.raises(AssertionError, match="may not have written yet"):
                call(*product(weight))
