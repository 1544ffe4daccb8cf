"""The linear pass: every way to write a product with a weight is found, and nothing that only looks like one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from dsv4_compile import nvfp4, quantize_
from dsv4_compile.testing import Rewritten, capture

M, N, K = 8, 32, 64


class Model(nn.Module):
    """A function of itself and its inputs, with parameters by name."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, granularity: str = "tensor") -> Tensor:
    """``x @ weight.T + bias`` on NVFP4 operands: the exact sum, scaled in fp32, rounded once to ``x``'s dtype."""
    a_codes, a_scales, gsa = nvfp4.quantize(x, granularity)
    b_codes, b_scales, gsb = nvfp4.quantize_weight(weight)
    a, b = (nvfp4.scaled_codes(*packed, torch.float64) for packed in ((a_codes, a_scales), (b_codes, b_scales)))
    y = (a @ b.mT).to(torch.float32) * ((gsa.unsqueeze(-1) if gsa.dim() else gsa) * gsb)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def dequantized(weight: Tensor) -> Tensor:
    return nvfp4.dequantize(*nvfp4.quantize_weight(weight), weight.dtype)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def capture_one(model: Callable[..., Any], *inputs: Tensor, **kwargs: Any) -> tuple[Any, Rewritten]:
    result, (graph,) = capture(model, *inputs, **kwargs)
    return result, graph


def reasons(graph: Rewritten) -> dict[str, str]:
    """The plain weights that were left alone, and why."""
    return {weight.name: weight.reason for weight in graph.bound.weights if weight.packed is None}


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.linear": lambda self, x: F.linear(x, self.weight),
    "F.linear by keywords": lambda self, x: F.linear(input=x, weight=self.weight),
    "x @ w.t()": lambda self, x: x @ self.weight.t(),
    "x @ w.T": lambda self, x: x @ self.weight.T,
    "x @ w.mT": lambda self, x: x @ self.weight.mT,
    "torch.mm": lambda self, x: torch.mm(x, self.weight.t()),
    "x.mm by keyword": lambda self, x: x.mm(mat2=self.weight.t()),
    "matmul of transpose": lambda self, x: torch.matmul(x, self.weight.transpose(0, 1)),
    "matmul of transpose from the end": lambda self, x: x.matmul(self.weight.transpose(-1, -2)),
    "matmul of transpose by keywords": lambda self, x: x.matmul(self.weight.transpose(dim0=0, dim1=1)),
    "matmul of permute": lambda self, x: torch.matmul(x, torch.permute(self.weight, (1, 0))),
    "matmul of permute by keyword": lambda self, x: x.matmul(self.weight.permute(dims=(1, 0))),
}


@pytest.mark.parametrize("form", FORMS)
def test_form_without_bias(form: str) -> None:
    """Guards against a spelling of a linear that runs in bf16, or that stops the compilation."""
    x, weight = randn(M, K), randn(N, K)
    result, graph = capture_one(Model(FORMS[form], weight=weight), x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
return %1""",
    )
    assert graph.counts == {"linear": 1}
    assert torch.equal(result, product(x, weight))


FORMS_WITH_BIAS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.linear": lambda self, x: F.linear(x, self.weight, self.bias),
    "F.linear by keywords": lambda self, x: F.linear(x, bias=self.bias, weight=self.weight),
    "torch.addmm": lambda self, x: torch.addmm(self.bias, x, self.weight.t()),
    "bias.addmm by keywords": lambda self, x: self.bias.addmm(mat1=x, mat2=self.weight.t()),
}


@pytest.mark.parametrize("form", FORMS_WITH_BIAS)
def test_form_with_bias(form: str) -> None:
    """Guards against a bias that is dropped, added twice, or rounded before it is added."""
    x, weight, bias = randn(M, K), randn(N, K), 100 * randn(N)
    result, graph = capture_one(Model(FORMS_WITH_BIAS[form], weight=weight, bias=bias), x)
    assert graph.after.splitlines()[-3:] == [
        "%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x1, 'tensor')",
        "%1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], x0, bf16)",
        "return %1",
    ]
    assert graph.counts == {"linear_bias": 1}
    assert torch.equal(result, product(x, weight, bias))


def test_3d_input() -> None:
    """Guards against views around the product that keep activations from sharing one quantisation."""
    x, weight, bias = randn(2, 4, K), randn(N, K), randn(N)
    result, graph = capture_one(Model(FORMS_WITH_BIAS["F.linear"], weight=weight, bias=bias), x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: bf16[32]
x1: bf16[2, 4, 64]
%0: (u8[2, 4, 32], f8e4m3[2, 4, 4], f32[]) = dsv4.quantize_nvfp4(x1, 'tensor')
%1: bf16[2, 4, 32] = dsv4.nvfp4_mm(*%0, *[w0], x0, bf16)
return %1""",
    )
    assert torch.equal(result, product(x, weight, bias))


def test_1d_input() -> None:
    """Guards against a vector times a weight, which decomposes differently, going wrong."""
    x, weight = randn(K), randn(N, K)
    result, graph = capture_one(Model(FORMS["F.linear"], weight=weight), x)
    assert graph.counts == {"linear": 1}
    assert torch.equal(result, product(x, weight))


def test_zero_rows() -> None:
    """Guards against a batch of no rows, whose maximum does not exist."""
    result, graph = capture_one(Model(FORMS["F.linear"], weight=randn(N, K)), randn(0, K))
    assert graph.counts == {"linear": 1}
    assert result.shape == (0, N)


@pytest.mark.parametrize("form", ["F.linear", "x @ w.t()"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float32])
def test_autocast(form: str, dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    """Guards against the casts of autocast, before the transpose or after it, hiding the weight."""

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return FORMS[form](self, x)

    x, weight = randn(M, K, dtype=torch.float32), randn(N, K, dtype=model_dtype)
    result, graph = capture_one(Model(forward, weight=weight), x, options={"include": ["weight"]})
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    assert graph.after.splitlines()[2:] == [
        f"%0: {name}[8, 64] = prims.convert_element_type(x0, {name})",
        "%1: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(%0, 'tensor')",
        f"%2: {name}[8, 32] = dsv4.nvfp4_mm(*%1, *[w0], None, {name})",
        "return %2",
    ]
    assert graph.counts == {"linear": 1}
    assert torch.equal(result, product(x.to(dtype), weight))


def test_autocast_with_bias() -> None:
    """Guards against the cast of the bias hiding the product."""

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, self.weight, self.bias) + torch.addmm(self.bias, x, self.weight.t())

    x, weight, bias = randn(M, K), randn(N, K, dtype=torch.float32), randn(N, dtype=torch.float32)
    result, graph = capture_one(Model(forward, weight=weight, bias=bias), x, options={"include": ["weight"]})
    assert graph.counts == {"linear_bias": 2, "share_quantization": 1}
    assert torch.equal(result, 2 * product(x, weight, bias.to(torch.bfloat16)))


def test_fp32_model() -> None:
    """Guards against fp32 weights packed on request being read in another dtype than the model's."""
    x, weight = randn(M, K, dtype=torch.float32), randn(N, K, dtype=torch.float32)
    result, graph = capture_one(Model(FORMS["F.linear"], weight=weight), x, options={"include": ["weight"]})
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: f32[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: f32[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, f32)
return %1""",
    )
    assert torch.equal(result, product(x, weight))


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
def test_granularity(granularity: str) -> None:
    """Guards against an option that is accepted and does not reach the operator."""
    x, weight = randn(M, K) * torch.logspace(-3, 3, M).bfloat16().unsqueeze(-1), randn(N, K)
    result, graph = capture_one(Model(FORMS["F.linear"], weight=weight), x, options={"gsa": granularity})
    assert f"dsv4.quantize_nvfp4(x0, '{granularity}')" in graph.after
    assert torch.equal(result, product(x, weight, granularity=granularity))


def test_dynamic_shapes() -> None:
    """Guards against a pattern that only fits the sizes it was traced with."""
    x, weight = randn(2, 4, K), randn(N, K)
    result, graph = capture_one(Model(FORMS["F.linear"], weight=weight), x, dynamic=True)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: bf16[s0, s1, 64]
%0: (u8[s0, s1, 32], f8e4m3[s0, s1, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[s0, s1, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
return %1""",
    )
    assert torch.equal(result, product(x, weight))


def test_one_transpose_for_two_products() -> None:
    """Guards against a second reader of w.t() keeping both products from matching."""

    def forward(self: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        transposed = self.weight.t()
        return x @ transposed, y @ transposed

    x, y, weight = randn(M, K), randn(M, K), randn(N, K)
    result, graph = capture_one(Model(forward, weight=weight), x, y)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: bf16[8, 64]
x1: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
%2: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x1, 'tensor')
%3: bf16[8, 32] = dsv4.nvfp4_mm(*%2, *[w0], None, bf16)
return %1, %3""",
    )
    assert graph.counts == {"linear": 2}
    assert torch.equal(result[0], product(x, weight))
    assert torch.equal(result[1], product(y, weight))


def test_module_called_twice() -> None:
    """Guards against a weight that is bound twice when its module runs twice."""
    x, weight = randn(M, K), randn(K, K) / 8
    model = Model(lambda self, x: F.linear(F.linear(x, self.weight), self.weight), weight=weight)
    result, graph = capture_one(model, x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[64, 64]
x0: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[8, 64] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
%2: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(%1, 'tensor')
%3: bf16[8, 64] = dsv4.nvfp4_mm(*%2, *[w0], None, bf16)
return %3""",
    )
    assert graph.counts == {"linear": 2}
    assert torch.equal(result, product(product(x, weight), weight))


@pytest.mark.parametrize("form", ["F.linear", "x @ w.t()"])
def test_packed_beforehand(form: str) -> None:
    """Guards against a difference between weights packed by quantize_ and those packed by the backend."""
    x, weight = randn(2, 4, K), randn(N, K)
    model = Model(FORMS[form], weight=weight)
    plain_result, plain = capture_one(model, x)
    quantize_(model)
    packed_result, packed = capture_one(model, x)
    assert packed.after == plain.after
    assert torch.equal(packed_result, plain_result)


def test_several_global_scales_in_one_weight() -> None:
    """Guards against a merged gate and up projection being read with the global scale of one of them."""
    halves = randn(N, K), 50 * randn(N, K)
    model = Model(FORMS["F.linear"], weight=torch.cat(halves))
    quantize_(model)
    parts = [nvfp4.quantize_weight(half) for half in halves]
    for name, values in zip(("codes", "block_scales", "global_scale"), zip(*parts, strict=True), strict=True):
        setattr(model.weight, name, torch.stack(values) if name == "global_scale" else torch.cat(values))
    x = randn(M, K)
    result, graph = capture_one(model, x)
    assert graph.counts == {"linear": 1}
    assert torch.equal(result, torch.cat([product(x, half) for half in halves], dim=-1))


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
