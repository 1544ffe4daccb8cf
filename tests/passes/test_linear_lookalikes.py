"""Nothing that only looks like a linear is rewritten, and an edited model gives its own answer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from dsv4_compile import quantize_
from tests.passes.linear_programs import FORMS, K, M, N, dequantized, product, randn, reasons
from tests.passes.programs import Model, capture_one

# What must not be rewritten.


def test_weight_stored_as_k_n_is_left_alone() -> None:
    """Guards against blocks of 16 along N, which no operator reads, for ``x @ w`` with w [K, N]."""
    x, weight = randn(M, K), randn(K, K)
    result, graph = capture_one(Model(lambda self, x: torch.matmul(x, self.weight), weight=weight), x)
    assert_expected_inline(
        graph.after,
        """\
x0: bf16[64, 64]
x1: bf16[8, 64]
%0: bf16[8, 64] = aten.mm(x1, x0)
return %0""",
    )
    assert graph.counts == {}
    assert reasons(graph) == {"weight": "read by matmul, a form no pass matches"}
    assert torch.equal(result, x @ weight)


@pytest.mark.parametrize("packed", [False, True])
def test_permute_that_permutes_nothing(packed: bool) -> None:
    """Guards against taking any permute for a transpose: with a square weight the answer would be ``x @ w.T``."""
    x, weight = randn(M, K), randn(K, K)
    model = Model(lambda self, x: x @ self.weight.permute(0, 1), weight=weight)
    if packed:
        quantize_(model)
    result, graph = capture_one(model, x)
    assert graph.counts == {}
    assert torch.equal(result, x @ (dequantized(weight) if packed else weight))


def test_packed_weight_as_left_operand() -> None:
    """Guards against a match where the weight is not what is contracted over its last dimension."""
    x, weight = randn(N, K), randn(M, N)
    model = Model(lambda self, x: self.weight @ x, weight=weight)
    quantize_(model)
    result, graph = capture_one(model, x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[8, 32]
x0: bf16[32, 64]
%0: bf16[8, 32] = dsv4.dequantize_nvfp4(*w0, bf16)
%1: bf16[8, 64] = aten.mm(%0, x0)
return %1""",
    )
    assert graph.counts == {}
    assert torch.equal(result, dequantized(weight) @ x)


def test_bias_that_is_a_matrix() -> None:
    """Guards against a residual written as addmm's first operand being read as one bias a column."""
    x, weight, residual = randn(M, K), randn(N, K), randn(M, N)
    result, graph = capture_one(
        Model(lambda self, x, r: torch.addmm(r, x, self.weight.t()), weight=weight), x, residual
    )
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: bf16[8, 32]
x1: bf16[8, 64]
%0: bf16[32, 64] = dsv4.dequantize_nvfp4(*w0, bf16)
%1: bf16[64, 32] = aten.permute(%0, [1, 0])
%2: bf16[8, 32] = aten.addmm(x0, x1, %1)
return %2""",
    )
    assert graph.counts == {}
    assert torch.equal(result, torch.addmm(residual, x, dequantized(weight).t()))


@pytest.mark.parametrize("length", [1, N])
def test_bias_that_broadcasts(length: int) -> None:
    """Guards against a bias [1] or [1, N] that addmm broadcasts and the operator does not take."""
    x, weight, bias = randn(M, K), randn(N, K), randn(length) if length == 1 else randn(1, length)
    result, graph = capture_one(Model(lambda self, x, b: torch.addmm(b, x, self.weight.t()), weight=weight), x, bias)
    assert graph.counts == {}
    assert torch.equal(result, torch.addmm(bias, x, dequantized(weight).t()))


@pytest.mark.parametrize("factors", [{"beta": -1}, {"alpha": 2}, {"beta": 0.5, "alpha": 3}], ids=str)
def test_addmm_with_factors(factors: dict[str, float]) -> None:
    """Guards against addmm's alpha and beta, which the pattern matcher passes over, being dropped."""
    x, weight, bias = randn(M, K), randn(N, K), 10 * randn(N)
    model = Model(lambda self, x: torch.addmm(self.bias, x, self.weight.t(), **factors), weight=weight, bias=bias)
    result, graph = capture_one(model, x)
    assert_expected_inline(
        graph.after.replace(", ".join(f"{name}={value}" for name, value in factors.items()), "FACTORS"),
        """\
w0: nvfp4[32, 64]
x0: bf16[32]
x1: bf16[8, 64]
%0: bf16[32, 64] = dsv4.dequantize_nvfp4(*w0, bf16)
%1: bf16[64, 32] = aten.permute(%0, [1, 0])
%2: bf16[8, 32] = aten.addmm(x0, x1, %1, FACTORS)
return %2""",
    )
    assert graph.counts == {}
    assert torch.equal(result, torch.addmm(bias, x, dequantized(weight).t(), **factors))


LEFT_ALONE: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "returned": (lambda self, x: (F.linear(x, self.weight), self.weight.t()), "read by output, no matrix product"),
    "added": (lambda self, x: F.linear(x, self.weight) + self.weight[:M, :N], "read by add, no matrix product"),
    "summed": (lambda self, x: F.linear(x, self.weight) * self.weight.sum(), "read by sum, no matrix product"),
    "bias of another": (lambda self, x: torch.addmm(self.weight, x.t()[:N], x), "read by addmm, a form no pass"),
    "activation": (lambda self, x: F.linear(self.weight, x), "read by linear, a form no pass matches"),
    "embedding": (lambda self, x: F.linear(F.embedding(x[:, 0].long().abs(), self.weight), self.weight), "embedding"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_weight_whose_plain_values_matter(case: str) -> None:
    """Guards against a weight that is packed although something other than a linear reads it."""
    function, reason = LEFT_ALONE[case]
    x, weight = randn(M, K), randn(N, K)
    model = Model(function, weight=weight)
    result, graph = capture_one(model, x)
    assert reason in reasons(graph)["weight"]
    assert "nvfp4" not in graph.after
    expected = model(x)
    torch.testing.assert_close(result, expected)


def test_weight_returned_as_it_is() -> None:
    """Guards against a model that returns its parameter getting the packed one, or a rounded copy."""
    x, weight = randn(M, K), randn(N, K)
    model = Model(lambda self, x: (F.linear(x, self.weight), self.weight), weight=weight)
    result, graph = capture_one(model, x)
    assert graph.counts == {"linear": 1}
    assert torch.equal(result[0], product(x, weight))
    assert result[1] is model.weight
    assert torch.equal(result[1], weight)


def test_rows_that_are_no_multiple_of_16() -> None:
    """Guards against a K that no block divides."""
    x, weight = randn(M, 24), randn(N, 24)
    result, graph = capture_one(Model(FORMS["F.linear"], weight=weight), x)
    assert reasons(graph) == {"weight": "K = 24 is not divisible by 16"}
    assert torch.equal(result, F.linear(x, weight))


# Small edits of the model: each must give its own answer, never that of the model it was edited from.

EDITS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "weight applied twice": (
        lambda self, x: F.linear(F.linear(x, self.w), self.w, self.b),
        lambda x, w, v, b: product(product(x, w), w, b),
    ),
    "bias subtracted": (
        lambda self, x: F.linear(x, self.w) - self.b,
        lambda x, w, v, b: product(x, w) - b,
    ),
    "bias negated inside": (
        lambda self, x: F.linear(x, self.w, -self.b),
        lambda x, w, v, b: product(x, w, -b),
    ),
    "bias added twice": (
        lambda self, x: F.linear(x, self.w, self.b) + self.b,
        lambda x, w, v, b: product(x, w, b) + b,
    ),
    "other weight": (
        lambda self, x: F.linear(x, self.v, self.b),
        lambda x, w, v, b: product(x, v, b),
    ),
    "weights in the other order": (
        lambda self, x: F.linear(F.linear(x, self.v), self.w, self.b),
        lambda x, w, v, b: product(product(x, v), w, b),
    ),
    "input negated": (
        lambda self, x: F.linear(-x, self.w, self.b),
        lambda x, w, v, b: product(-x, w, b),
    ),
    "weight negated": (
        lambda self, x: F.linear(x, -self.w, self.b),
        lambda x, w, v, b: F.linear(x, -w, b),
    ),
    "weight scaled": (
        lambda self, x: F.linear(x, self.w * 2, self.b),
        lambda x, w, v, b: F.linear(x, w * 2, b),
    ),
    "weight not transposed": (
        lambda self, x: x @ self.w + self.b,
        lambda x, w, v, b: x @ w + b,
    ),
    "weight transposed twice": (
        lambda self, x: x @ self.w.t().t() + self.b,
        lambda x, w, v, b: x @ w + b,
    ),
    "weight transposed three times": (
        lambda self, x: x @ self.w.t().t().t(),
        lambda x, w, v, b: F.linear(x, dequantized(w)),
    ),
    "rows flipped": (
        lambda self, x: F.linear(x, self.w.flip(0), self.b),
        lambda x, w, v, b: F.linear(x, w.flip(0), b),
    ),
    "columns flipped": (
        lambda self, x: F.linear(x, self.w.flip(1), self.b),
        lambda x, w, v, b: F.linear(x, w.flip(1), b),
    ),
    "half of the weight": (
        lambda self, x: F.linear(x[:, : K // 2], self.w[:, : K // 2], self.b),
        lambda x, w, v, b: F.linear(x[:, : K // 2], w[:, : K // 2], b),
    ),
    "shifted weight": (
        lambda self, x: F.linear(x, self.w.roll(1, 0), self.b),
        lambda x, w, v, b: F.linear(x, w.roll(1, 0), b),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_model_gives_its_own_answer(edit: str) -> None:
    """Guards against a pattern that accepts a program that means something else."""
    function, emulation = EDITS[edit]
    x, w, v, b = randn(M, K), randn(K, K) / 8, randn(K, K) / 8, randn(K)
    result, _ = capture_one(Model(function, w=w, v=v, b=b), x)
    expected = emulation(x, w, v, b)
    assert not torch.allclose(expected.float(), product(x, w, b).float(), rtol=0.1, atol=0.1)
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=1e-2)
