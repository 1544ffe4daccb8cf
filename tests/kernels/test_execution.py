"""The compiled code of kernels, run on the CPU: whole operators against the CPU reference, launch by launch.

Shapes are small, as an instruction of a warp takes microseconds; the code is the one that large shapes run. The order in
which warps run is drawn from a seed, so a barrier that is missing shows in some of them.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_compile.ops.dispatch import decode_choice
from dsv4_compile.ops.kernels import cache
from tests.kernels import execution
from tests.kernels.emulation import assert_as_on_cpu
from tests.kernels.execution import Executions
from tests.ops.test_dispatch_products import Packed, any_packed, lists
from tests.ops.test_nvfp4_moe_gpu import Case, arguments

ops = torch.ops.dsv4
SMS = 8


def assert_code_agrees(op: Any, *args: Any, seeds: tuple[int, ...] = (0,)) -> list[str]:
    """Runs an operator on the CPU by the code of its kernels; returns their names. None may lack an instruction."""
    for seed in seeds:
        run = Executions(seed)
        trace = assert_as_on_cpu(op, *args, sms=SMS, run=run)
        assert run.without == {}
        assert len(run.executed) >= len(trace.kernels)
    return run.executed


def dense_operands(tokens: int, rows: list[int], k: int, nan_share: float = 0.0) -> tuple[Packed, list[list[Tensor]]]:
    activation = any_packed(tokens, k=k, scale_shape=(tokens,), nan_share=nan_share)
    return activation, lists([any_packed(n, k=k, nan_share=nan_share / 10) for n in rows])


@pytest.mark.parametrize(
    ("tokens", "rows", "k"),
    [(1, [40], 768), (2, [33, 7], 512), (7, [64], 256), (16, [100], 512), (24, [40, 8, 8], 256)],
    ids=str,
)
def test_products_of_few_tokens(tokens: int, rows: list[int], k: int) -> None:
    """Guards against a fragment, slot, barrier or row that the kernel mixes up; NaN must stay in its rows."""
    activation, weights = dense_operands(tokens, rows, k, nan_share=0.01)
    bias = torch.randn(sum(rows)).bfloat16()
    seeds = (0, 1, 2) if tokens == 1 else (tokens,)
    executed = assert_code_agrees(ops.nvfp4_mm.default, *activation, *weights, bias, torch.bfloat16, seeds=seeds)
    assert executed == ["sm90.decode_mm"]


@pytest.mark.parametrize(("tokens", "rows", "k"), [(40, [72], 512), (70, [136, 8], 512), (200, [64], 256)], ids=str)
def test_products_of_many_tokens(tokens: int, rows: list[int], k: int) -> None:
    """Guards against descriptors, swizzles and fragments that do not fit each other, and tiles past an edge."""
    activation, weights = dense_operands(tokens, rows, k, nan_share=0.001)
    bias = torch.randn(sum(rows)).bfloat16()
    executed = assert_code_agrees(
        ops.nvfp4_mm.default, *activation, *weights, bias, torch.bfloat16, seeds=(0, 1) if tokens == 40 else (2,)
    )
    assert set(executed) == {"sm90.interleave", "sm90.wgmma_w4"}


@pytest.mark.parametrize(
    ("tokens", "rows", "k"), [(1, [40], 1280), (3, [40], 512), (11, [33, 8], 1024), (27, [24], 768)], ids=str
)
def test_products_with_bf16_activations(tokens: int, rows: list[int], k: int) -> None:
    """Guards against another order of K of codes and activations, a chunk that is read early, infinities that spread."""
    _, weights = dense_operands(1, rows, k, nan_share=0.01)
    x = torch.randn(tokens, k).bfloat16()
    if tokens > 1:
        x[1, 7] = float("inf")
    assert_code_agrees(ops.nvfp4_weight_mm.default, x, *weights, None, torch.float32, seeds=(0, 1))


@pytest.mark.parametrize("exponent", [-105, -60, 0, 100, 126])
def test_magnitudes_of_one_bf16_token(exponent: int) -> None:
    """Guards against a power of two that leaves bf16 or is not taken back, and sums that overflow before they are scaled."""
    _, weights = dense_operands(1, [24], 512)
    weights[2][0].fill_(2.0 ** (20 if exponent < 0 else -40))
    x = (torch.randn(1, 512).double().clamp(-1.9, 1.9) * 2.0**exponent).bfloat16()
    assert_code_agrees(ops.nvfp4_weight_mm.default, x, *weights, None, torch.float32)
    if exponent == 0:
        for value in (0.0, float("inf"), float("nan")):
            x[0, 300] = value
            assert_code_agrees(ops.nvfp4_weight_mm.default, x, *weights, None, torch.float32)
        assert_code_agrees(ops.nvfp4_weight_mm.default, torch.zeros_like(x), *weights, None, torch.float32)


@pytest.mark.parametrize("tokens", [40, 70])
def test_many_tokens_with_bf16_activations(tokens: int) -> None:
    """Guards against an order of K, interleaved for few tokens, that is not the one in which codes decode to bf16."""
    _, weights = dense_operands(3, [72], 512)
    executed = assert_code_agrees(
        ops.nvfp4_weight_mm.default, torch.randn(tokens, 512).bfloat16(), *weights, None, torch.bfloat16
    )
    assert executed == (["sm90.interleave", "sm90.wgmma_w4"] if tokens == 40 else ["sm90.wgmma_w4"])


def test_a_cluster_that_shares_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against sums of CTAs that arrive late or twice: shared memory of other CTAs, cluster barriers."""
    monkeypatch.setattr(decode_choice, "SPLITS", (2,))
    activation, weights = dense_operands(4, [40], 1024)
    assert_code_agrees(ops.nvfp4_mm.default, *activation, *weights, None, torch.bfloat16, seeds=(0, 5))
    for tokens in (1, 9):
        x = torch.randn(tokens, 1024).bfloat16()
        assert_code_agrees(ops.nvfp4_weight_mm.default, x, *weights, None, torch.float32, seeds=(0, 5))


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 3, 8, 256, 256),
        Case(3, 2, 4, 512, 256, "any", "before_down", "token", True, True),
        Case(9, 2, 3, 48, 32, "nobody", granularity="tensor_pow2"),
        Case(40, 2, 3, 256, 256, has_halves=True),
    ],
    ids=str,
)
def test_experts(case: Case) -> None:
    """Guards against a tile, slot or schedule that one kernel writes and another one reads otherwise."""
    executed = assert_code_agrees(ops.nvfp4_moe.default, *arguments(case))
    assert executed[0] == "sm90.moe_align"
    assert executed[-1] == "sm90.moe_combine"
    assert "sm90.moe_requantize" in executed


@pytest.mark.parametrize(("n", "k"), [(48, 512), (24, 48)], ids=str)
def test_groups_that_end_at_offsets(n: int, k: int) -> None:
    """Guards against rows of a group that another one's weight multiplies, and rows behind the last that keep what memory
    held."""
    activation = any_packed(20, k=k, scale_shape=(20,))
    weights = any_packed(4, n, k=k, scale_shape=(4,))
    offsets = torch.tensor([3, 3, 11, 17], dtype=torch.int32)
    executed = assert_code_agrees(ops.nvfp4_grouped_mm.default, *activation, *weights, offsets, torch.bfloat16)
    assert {"sm90.moe_align", "sm90.zero_tail"} < set(executed)


def test_router() -> None:
    """Guards against a score that is one bit off, and a tie broken another way."""
    logits = torch.randn(5, 64) * 4
    logits[::2] = logits[::2].round()
    bias = torch.randint(-2, 3, (64,)) / 4
    assert_code_agrees(ops.topk_router.default, logits, bias, None, None, 6, "sqrtsoftplus", "sum", 1e-20, 2.5)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_quantisers(granularity: str) -> None:
    """Guards against a code, scale or global scale that differs: the arithmetic itself, bit for bit."""
    x, y = (torch.randn(5, 256).bfloat16() * 2.0 ** torch.randint(-30, 30, (5, 1)) for _ in range(2))
    x[1] = 0
    x[2, 16:32] = float("nan")
    weight = torch.randn(256).bfloat16()
    assert_code_agrees(ops.quantize_nvfp4.default, x, granularity)
    assert_code_agrees(ops.swiglu_quantize_nvfp4.default, x, y, 10.0, granularity)
    assert_code_agrees(ops.rms_norm_quantize_nvfp4.default, y, weight, 1e-6, granularity)


def test_dequantise() -> None:
    """Guards against a product rounded in another order."""
    assert_code_agrees(ops.dequantize_nvfp4.default, *any_packed(5, k=256, scale_shape=(5,)), torch.bfloat16)


@pytest.mark.parametrize(
    ("tokens", "old", "new"),
    [
        (2, r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, )\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}"),
        (2, r"mul\.rn\.f16x2 (%r\d+), (%r\d+), (%r\d+);", r"mov.b32 \1, \2;"),
        (2, r"bar\.sync\s+1, \d+;", ""),
        (40, r"(wgmma\.mma_async\S+ \{[^}]*\}, )\{(%r\d+), (%r\d+)", r"\1{\3, \2"),
        (40, r"(stmatrix\S+)\.trans", r"\1"),
    ],
    ids=[
        "halves of K exchanged",
        "no block scales",
        "no barrier behind the activations",
        "rows exchanged",
        "a tile that is not transposed",
    ],
)
def test_sees_code_that_is_wrong(tokens: int, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a check that cannot fail: one kind of instruction changed, and the product differs."""
    real = execution.launches
    changed = 0

    def launches(*given: Any) -> Any:
        nonlocal changed
        found = real(*given)
        for launch in found:
            text, count = re.subn(old, new, launch.ptx)
            object.__setattr__(launch, "ptx", text)
            changed += count
        return found

    monkeypatch.setattr(execution, "launches", launches)
    activation, weights = dense_operands(tokens, [40], 256)
    with pytest.raises(AssertionError, match=r"sm90\.(decode_mm|wgmma_w4)"):
        assert_code_agrees(ops.nvfp4_mm.default, *activation, *weights, None, torch.bfloat16, seeds=(0, 1, 2, 3))
    assert changed > 0


def test_stands_beside_the_cache() -> None:
    """Guards against a run that loads kernels for a GPU: nothing is asked of the kernel cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "ensure", lambda *kernel: pytest.fail("the kernel cache was asked"))
        assert_code_agrees(ops.quantize_nvfp4.default, torch.randn(2, 64).bfloat16(), "tensor")
