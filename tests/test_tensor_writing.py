"""What is written to an ``Nvfp4Tensor``: ``copy_`` arrives whole or not at all, anything else is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv4_compile.tensor import Nvfp4Tensor
from tests import nvfp4_oracle as oracle
from tests.packed_weights import KINDS, assert_same_weight, assert_unchanged, packed, parameter, parts, snapshot

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(1.0),
    "normal_": lambda w: nn.init.normal_(w),
    "out": lambda w: torch.add(w.dequantize(), 1, out=w),
    "index_put_": lambda w: w.__setitem__([0, 1], torch.zeros(32, dtype=w.dtype)),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", KINDS)
def test_in_place_operations_are_refused(kind: str, write: str) -> None:
    """Guards against a write into a dequantised copy, which would vanish: out= and foreach too."""
    weight = packed(kind)
    before = snapshot(weight)
    with pytest.raises(
        RuntimeError,
        match=r"^Nvfp4Tensor: aten\.\S+ would write into a packed weight, which only copy_ may do; dequantize",
    ):
        WRITES[write](weight)
    assert_unchanged(weight, before)


def test_in_place_operations_on_others_read_a_packed_weight() -> None:
    """Guards against a check that refuses an operand for being in the same call as a written tensor."""
    weight, total = packed("matrix"), torch.ones(8, 32, dtype=torch.bfloat16)
    total.add_(weight)
    torch.add(total, weight, out=total)
    oracle.assert_same_bits(total, 1 + weight.dequantize() + weight.dequantize())


@pytest.mark.parametrize("kind", KINDS)
def test_copy_of_a_packed_weight_is_bitwise(kind: str) -> None:
    """Guards against dequantising and quantising again on the way."""
    target, source = packed(kind), packed(kind)
    addresses = [part.data_ptr() for part in parts(target)]
    assert target.copy_(source) is target
    assert_same_weight(target, source)
    assert [part.data_ptr() for part in parts(target)] == addresses  # an in-place update stays visible


@pytest.mark.parametrize("kind", KINDS)
def test_copy_of_a_plain_weight_quantises(kind: str) -> None:
    """Guards against a plain checkpoint that cannot be loaded into a packed model, or lands under stale scales."""
    target, source = packed(kind), torch.randn(*KINDS[kind][0], 32)
    target.copy_(source)
    assert target.dtype == torch.bfloat16
    matrices = source if target.global_scale.dim() and source.dim() == 3 else [source]
    rows = [target] if len(matrices) == 1 else list(range(3))
    for matrix, index in zip(matrices, rows, strict=True):
        expected = oracle.quantize(oracle.as_float64(matrix), "tensor")
        codes, block_scales, global_scale = parts(target) if index is target else parts(target[index])
        assert (global_scale == global_scale.flatten()[0]).all()
        oracle.assert_packed_equal((codes, block_scales, global_scale.flatten()[0]), expected)


def test_copy_into_an_expert() -> None:
    """Guards against a write into a copy of the expert: what a loader does expert by expert."""
    weight, source = parameter(packed("experts with segments")), torch.randn(8, 32, dtype=torch.bfloat16)
    before = snapshot(weight)
    weight[1].copy_(source)
    oracle.assert_same_bits(weight[1].dequantize(), Nvfp4Tensor.from_float(source).dequantize())
    weight[2] = torch.zeros(8, 32)
    assert weight.dequantize()[2].count_nonzero() == 0
    for part, clone in zip(parts(weight), before, strict=True):
        oracle.assert_same_bits(part[0], clone[0])


@pytest.mark.parametrize(
    "part_of",
    [
        lambda: packed("matrix")[:4],
        lambda: packed("matrix")[:4].detach(),
        lambda: packed("experts, one scale")[1],
        lambda: packed("experts")[1][2:6],
    ],
)
def test_copy_into_a_part_with_a_shared_global_scale_is_refused(part_of: Callable[[], Tensor]) -> None:
    """Guards against a new global scale for a few rows, which silently rescales all others (merged gate and up)."""
    target = part_of()
    before = snapshot(target)
    with pytest.raises(
        ValueError, match=r"^Nvfp4Tensor.copy_: target must have a global scale of its own, got a part of"
    ):
        target.copy_(torch.ones(target.shape))
    assert_unchanged(target, before)


def test_copy_into_the_whole_through_a_slice() -> None:
    """Guards against refusing param[:] = value, a slice that leaves nothing out."""
    weight, source = packed("matrix"), packed("matrix")
    weight[:8] = source
    assert_same_weight(weight, source)
    gathered = weight[[0, 1]] if weight.dim() == 3 else packed("experts, one scale")[[0, 2]]
    gathered.copy_(torch.ones(2, 8, 32))  # a copy, with a global scale of its own
    assert (gathered.dequantize() == 1).all()


def test_copy_into_a_plain_tensor_dequantises() -> None:
    """Guards against codes copied as numbers."""
    weight, target = packed("matrix"), torch.zeros(8, 32)
    target.copy_(weight)
    oracle.assert_same_bits(target, weight.dequantize().float())


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("matrix", torch.zeros(8, 16), r"shape \(8, 32\), got \(8, 16\)"),
        ("matrix", torch.zeros(1, 8, 32), r"shape \(8, 32\), got \(1, 8, 32\)"),
        ("matrix", packed("experts"), r"shape \(8, 32\) and global scale \(\), got \(3, 8, 32\) and \(3,\)"),
        ("matrix", packed("segments"), r"shape \(8, 32\) and global scale \(\), got \(8, 32\) and \(2,\)"),
        (
            "segments",
            Nvfp4Tensor(*parts(packed("segments"))[:2], torch.ones(4)),
            r"shape \(8, 32\) and global scale \(2,\), got \(8, 32\) and \(4,\)",
        ),
        (
            "experts",
            packed("experts with segments"),
            r"shape \(3, 8, 32\) and global scale \(3,\), got \(3, 8, 32\) and \(3, 2\)",
        ),
    ],
)
def test_copy_rejects(kind: str, source: Tensor, message: str) -> None:
    """Guards against a weight that is half overwritten when its global scales do not fit."""
    target = packed(kind)
    before = snapshot(target)
    with pytest.raises(ValueError, match=f"^Nvfp4Tensor.copy_: source must have {message}$"):
        target.copy_(source)
    assert_unchanged(target, before)


@pytest.mark.parametrize("kind", KINDS)
def test_copy_of_nan_is_refused(kind: str) -> None:
    """Guards against a damaged checkpoint that overwrites half of a weight before it is noticed."""
    target, source = packed(kind), torch.randn(*KINDS[kind][0], 32)
    source.view(-1)[-1] = math.nan
    before = snapshot(target)
    with pytest.raises(ValueError, match="must be finite"):
        target.copy_(source)
    assert_unchanged(target, before)
