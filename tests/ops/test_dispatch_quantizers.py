"""Quantisers, router and dequantisation as dispatch launches them: bit for bit the CPU's on emulated kernels."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import quantizer
from dsv4_compile.ops.topk_router import NORMALIZATIONS, SCORE_FUNCTIONS
from tests import gpu
from tests.kernels.emulation import LAYOUTS, assert_as_on_cpu, emulated, stored

ops = torch.ops.dsv4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MULTIPROCESSORS = (7, 78, 132, 200)  # of which 2 each would be more than the maxima that are read

# One CTA, a cluster, two launches; rows that 64 threads to 512 own; one that needs two launches where rows are owned.
SHAPES = [(1, 16), (3, 48), (9, 1024), (33, 16), (70, 16), (140, 16), (300, 64), (1100, 16), (5, 2064), (9, 16384), (1, 32768)]  # fmt: skip


def calls(x: Tensor, y: Tensor, weight: Tensor | None, granularity: str) -> list[tuple[Any, ...]]:
    """Each quantiser."""
    return [
        (ops.quantize_nvfp4.default, x, granularity),
        (ops.swiglu_quantize_nvfp4.default, x, y, 10.0, granularity),
        (ops.rms_norm_quantize_nvfp4.default, x, weight, 1e-6, granularity),
        (ops.rms_norm_quantize_nvfp4.with_norm, x, weight, 1e-6, granularity),
    ]


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantisers(shape: tuple[int, int], granularity: str) -> None:
    """Guards against rows that no CTA has, a maximum of some CTAs, and a launch of another tensor's sizes."""
    for dtype in DTYPES:
        x, y = (gpu.values(shape, dtype, random.choice(gpu.STYLES)) for _ in range(2))
        weight = random.choice([None, torch.randn(shape[1]).to(random.choice(DTYPES))])
        for op, *arguments in calls(x, y, weight, granularity):
            assert_as_on_cpu(op, *arguments, sms=random.choice(MULTIPROCESSORS))


def test_quantiser_of_long_rows() -> None:
    """Guards against a row longer than threads can hold, where none needs to be held: in two launches."""
    x, y = torch.randn(2, 32784).bfloat16(), torch.randn(2, 32784).bfloat16()
    for granularity in ("tensor", "tensor_pow2"):
        for op, *arguments in calls(x, y, None, granularity)[:2]:
            assert_as_on_cpu(op, *arguments)
    for op, *arguments in [*calls(x, y, None, "token"), *calls(x, y, None, "tensor")[2:]]:
        with pytest.raises(RuntimeError, match="K must be at most 32768"):
            emulated(op, *arguments)


def test_quantisers_at_every_number_of_ctas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a grid, or a number of maxima, that some number of multiprocessors makes too small or too large."""
    monkeypatch.setattr(quantizer, "LEAST_BLOCKS", 300)
    for rows in (129, 600):
        x = torch.randn(rows, 64).bfloat16()
        for sms in (1, 2, 3, 33, 132, 191, 192, 193, 500):
            for op, *arguments in calls(x, x.flip(0), None, "tensor"):
                assert_as_on_cpu(op, *arguments, sms=sms)


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_quantiser_operands_in_layouts(first: str, second: str) -> None:
    """Guards against storage order and rows that do not start at 16 bytes; gate and up may lie differently."""
    for shape in ((1, 16), (5, 32), (2, 3, 32), (3, 1, 2, 48), (2, 70, 16), (64,), (2, 2, 2, 16)):
        dtype, granularity = random.choice(DTYPES), random.choice(nvfp4.GRANULARITIES)
        x, y = stored(torch.randn(shape).to(dtype), first), stored(torch.randn(shape).to(dtype), second)
        weight = stored(torch.randn(shape[-1]).to(random.choice(DTYPES)), second)
        for op, *arguments in calls(x, y, weight, granularity):
            assert_as_on_cpu(op, *arguments)


def test_quantiser_of_halves_and_groups() -> None:
    """Guards against the other half of a merged projection, and groups inside the rows of an activation."""
    for rows in (3, 200):
        merged = torch.randn(rows, 2 * 64).bfloat16()
        gate, up = merged.chunk(2, dim=-1)
        inside = torch.randn(rows, 4, 32).bfloat16().transpose(0, 1)
        for granularity in nvfp4.GRANULARITIES:
            assert_as_on_cpu(ops.swiglu_quantize_nvfp4.default, gate, up, 10.0, granularity)
            assert_as_on_cpu(ops.swiglu_quantize_nvfp4.default, inside, inside.flip(0), float("inf"), granularity)
            assert_as_on_cpu(ops.quantize_nvfp4.default, inside, granularity)
            assert_as_on_cpu(ops.quantize_nvfp4.default, up, granularity)


@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (0,), (0, 0), (2, 0, 16)], ids=str)
def test_quantisers_of_nothing(shape: tuple[int, ...]) -> None:
    """Guards against a launch of nothing, a scale that is not written, and a value that the host reads for it."""
    for granularity in nvfp4.GRANULARITIES:
        x = torch.zeros(shape, dtype=torch.bfloat16)
        for op, *arguments in calls(x, x, None, granularity):
            trace = assert_as_on_cpu(op, *arguments)
            assert trace.names == []


@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (2, 3, 4), (0, 3), (1, 1), (70, 8)], ids=str)
def test_dequantize(lead: tuple[int, ...]) -> None:
    """Guards against a scale of another matrix or segment, and operands that a launch refuses."""
    rows = lead[-1] if lead else 1
    shapes: list[tuple[int, ...]] = [()] if not lead else [(), lead[:-1], (*lead[:-1], rows), (*lead[:-1], 1)]
    for k in (0, 16, 48, 256):
        for shape in shapes:
            codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8)
            block_scales = torch.randint(0, 128, (*lead, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
            parts = [codes, block_scales, torch.rand(shape)]
            assert_as_on_cpu(ops.dequantize_nvfp4.default, *parts, random.choice(DTYPES))
            for layout in LAYOUTS:
                given = [stored(part, random.choice(["contiguous", layout])) for part in parts]
                assert_as_on_cpu(ops.dequantize_nvfp4.default, *given, random.choice(DTYPES))


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (0, 8, 2), (5, 8, 3), (3, 256, 6), (7, 33, 33), (2, 2048, 8)])  # fmt: skip
def test_router(tokens: int, experts: int, top_k: int, score_function: str) -> None:
    """Guards against logits, biases, tables and ids of any dtype that are read with another's size or strides."""
    for layout in LAYOUTS:
        for style in ("gaussian", "ties", "bits"):
            logits = gpu.values((tokens, 16 * -(-experts // 16)), random.choice(DTYPES), style)[:, :experts]
            bias = random.choice([None, torch.randn(experts).to(random.choice(DTYPES))])
            options = top_k, score_function, random.choice(NORMALIZATIONS), random.choice([0.0, 1e-20]), 2.5
            given = stored(logits, layout), None if bias is None else stored(bias, random.choice(LAYOUTS))
            assert_as_on_cpu(ops.topk_router.default, *given, None, None, *options)
            index = random.choice([torch.int32, torch.int64])
            table = torch.stack([torch.randperm(experts)[:top_k] for _ in range(9)]).to(index)
            ids = torch.randint(0, 9, (tokens,)).to(random.choice([torch.int32, torch.int64]))
            hashed = stored(table, random.choice(LAYOUTS)), stored(ids, random.choice(LAYOUTS))
            assert_as_on_cpu(ops.topk_router.default, stored(logits, layout), None, *hashed, *options)


def test_router_of_too_many_experts() -> None:
    """Guards against experts that no lane holds."""
    with pytest.raises(RuntimeError, match="at most 2048 experts"):
        emulated(ops.topk_router.default, torch.zeros(1, 2049), None, None, None, 1, "sigmoid", "sum", 0.0, 1.0)
