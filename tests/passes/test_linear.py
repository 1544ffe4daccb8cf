"""The linear pass: every way to write a product with a weight is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from dsv4_compile import nvfp4, quantize_
from tests.passes.linear_programs import FORMS, K, M, N, product, randn
from tests.passes.programs import Model, capture_one


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
