"""A weight that a quantiser wrote in the launch before: the product must not read it before it is there."""

from __future__ import annotations

import pytest
import torch

from dsv4_compile import nvfp4
from dsv4_compile.ops import nvfp4_mm, nvfp4_weight_mm, quantize_nvfp4
from dsv4_compile.ops.dispatch import fresh_weights


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The ordinary launches that are made."""
    made: list[torch.device] = []
    monkeypatch.setattr(fresh_weights, "_launch_ordinary", made.append)
    fresh_weights.wrote()
    return made


def test_only_what_was_just_written_waits(launches: list[torch.device]) -> None:
    """Guards against a fresh weight that is read at once, and against a launch in front of every product."""
    codes, scales, others = torch.zeros(8, 16), torch.zeros(8, 2), torch.zeros(8, 16)
    fresh_weights.settle(codes, scales)
    assert launches == []
    fresh_weights.wrote(codes, scales)
    fresh_weights.settle(others)
    assert launches == []
    fresh_weights.settle(others, codes[4:])  # a part of it
    assert len(launches) == 1
    fresh_weights.settle(codes, scales)  # it is complete by now
    assert len(launches) == 1


def test_the_next_launch_settles_the_one_before(launches: list[torch.device]) -> None:
    """Guards against a list that grows, and against memory that was freed and is a weight now."""
    weight, activation = torch.zeros(8, 16), torch.zeros(8, 16)
    fresh_weights.wrote(weight)
    fresh_weights.wrote(activation)
    fresh_weights.settle(weight)
    assert launches == []
    fresh_weights.wrote(torch.zeros(0), torch.zeros(4, device="meta"))
    fresh_weights.settle(weight, activation, torch.zeros(4, device="meta"))
    assert launches == []


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 100])
def test_gpu_quantised_in_front_of_the_product(tokens: int) -> None:
    """Guards against products of a weight that was not written yet: poisoned memory, many times, both operators."""
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()
    weight = torch.randn(4096, 1024, device="cuda").bfloat16()
    a, b = nvfp4.quantize(x), nvfp4.quantize(weight)
    expected = nvfp4_mm(*a, [b[0]], [b[1]], [b[2]]), nvfp4_weight_mm(x, [b[0]], [b[1]], [b[2]])
    for _ in range(20):
        for size in (weight.numel() // 2, weight.numel() // 16):
            torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")  # what the allocator hands out next
        a = quantize_nvfp4(x)
        b = quantize_nvfp4(weight)
        assert torch.equal(nvfp4_mm(*a, [b[0]], [b[1]], [b[2]]), expected[0])
        b = quantize_nvfp4(weight)
        assert torch.equal(nvfp4_weight_mm(x, [b[0]], [b[1]], [b[2]]), expected[1])
