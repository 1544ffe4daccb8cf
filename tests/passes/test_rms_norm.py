"""The RMSNorm pass: a norm in front of a quantisation is part of it, however it is written; nothing else is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm, DeepseekV4UnweightedRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dsv4_compile import nvfp4
from tests.passes.programs import capture_one

M, N, K = 8, 32, 64
EPS = 0.25  # large, so that leaving it out, or putting it elsewhere, changes the answer


class Model(nn.Module):
    """A norm, as a function of ``x`` and a weight, and the linear that reads it."""

    def __init__(self, norm: Callable[..., Tensor], weight: Tensor, linear: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.linear = nn.Parameter(linear, requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        return F.linear(self.norm(x, self.weight), self.linear)


def product(x: Tensor, weight: Tensor, granularity: str = "tensor") -> Tensor:
    """``x @ weight.T`` on NVFP4 operands: the exact sum, scaled in fp32, rounded once to ``x``'s dtype."""
    a_codes, a_scales, gsa = nvfp4.quantize(x, granularity)
    b_codes, b_scales, gsb = nvfp4.quantize_weight(weight)
    a, b = (nvfp4.scaled_codes(*packed, torch.float64) for packed in ((a_codes, a_scales), (b_codes, b_scales)))
    return ((a @ b.mT).to(torch.float32) * ((gsa.unsqueeze(-1) if gsa.dim() else gsa) * gsb)).to(x.dtype)


def normalized(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """The norm in fp64, rounded once."""
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    return (y if weight is None else y * weight.double()).to(x.dtype)


def inputs(weight_dtype: torch.dtype = torch.float32, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Rows of very different size, a weight that differs by channel, and the linear's weight."""
    x = torch.randn(M, K) * torch.logspace(-1, 1, M).unsqueeze(-1)
    return x.to(dtype), (0.5 + 2 * torch.rand(K)).to(weight_dtype), torch.randn(N, K, dtype=dtype)


def assert_close(result: Tensor, expected: Tensor) -> None:
    """As close as norms that round in fp32 in another order.

    They differ by an fp32 rounding, which moves the norm's bf16 rounding in few elements, and by that a code: an
    eighth of a block's largest element at most, in one of K terms of a sum.
    """
    scale = expected.double().square().mean().sqrt()
    assert (result.double() - expected.double()).abs().max() < 0.08 * scale


def variance(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def in_fp32(x: Tensor, eps: float = EPS) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(variance(x) + eps)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "DeepSeek V4": lambda x, w: (w * in_fp32(x)).to(x.dtype),
    "weight last": lambda x, w: (in_fp32(x) * w).to(x.dtype),
    "Llama": lambda x, w: w * in_fp32(x).to(x.dtype),
    "F.rms_norm": lambda x, w: F.rms_norm(x, (K,), w, EPS),
}


@pytest.mark.parametrize(
    ("form", "weight_dtype"),
    # An fp32 weight makes Llama's norm fp32, and torch refuses it in F.rms_norm.
    [*[(form, torch.bfloat16) for form in FORMS], ("DeepSeek V4", torch.float32), ("weight last", torch.float32)],
    ids=str,
)
def test_weighted(form: str, weight_dtype: torch.dtype) -> None:
    """Guards against a way to write the norm that stays in the graph, and against a weight that is left out."""
    x, weight, linear = inputs(weight_dtype)
    result, graph = capture_one(Model(FORMS[form], weight, linear), x)
    assert_expected_inline(
        graph.after.replace("x0: f32[64]", "x0: bf16[64]"),
        """\
w0: nvfp4[32, 64]
x0: bf16[64]
x1: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.rms_norm_quantize_nvfp4(x1, x0, 0.25, 'tensor')
%1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
return %1""",
    )
    assert graph.counts == {"linear": 1, "rms_norm": 1}
    assert_close(result, product(normalized(x, weight), linear))


@pytest.mark.parametrize("form", ["no weight", "F.rms_norm"])
def test_unweighted(form: str) -> None:
    """Guards against a norm without a weight that is not found."""
    x, weight, linear = inputs()
    norm = (lambda x, _: in_fp32(x).to(x.dtype)) if form == "no weight" else (lambda x, _: F.rms_norm(x, (K,), eps=EPS))
    result, graph = capture_one(Model(norm, weight, linear), x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.rms_norm_quantize_nvfp4(x0, None, 0.25, 'tensor')
%1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
return %1""",
    )
    assert graph.counts == {"linear": 1, "rms_norm_unweighted": 1}
    assert_close(result, product(normalized(x, None), linear))


@pytest.mark.parametrize("kind", [DeepseekV4RMSNorm, LlamaRMSNorm])
def test_modules_of_transformers(kind: Any) -> None:
    """Guards against transformers writing its norms in another way than the forms above."""
    x, weight, linear = inputs(torch.bfloat16)
    module = kind(K, eps=EPS).bfloat16()
    module.weight.data = weight
    result, graph = capture_one(nn.Sequential(module, Model(lambda x, _: x, weight, linear)), x)
    assert graph.counts == {"linear": 1, "rms_norm": 1}
    assert_close(result, product(normalized(x, weight), linear))


def test_deepseek_v4_unweighted_rounds_in_between() -> None:
    """Guards against taking for one rounding what is three: V4's unweighted norm multiplies in bf16."""
    x, weight, linear = inputs()
    module = DeepseekV4UnweightedRMSNorm(EPS)
    result, graph = capture_one(Model(lambda x, _: module(x), weight, linear), x)
    assert graph.counts == {"linear": 1}
    assert_close(result, product(module(x), linear))


def test_second_reader() -> None:
    """Guards against computing the norm twice, or losing it, when a residual reads it too."""
    x, weight, linear = inputs()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        norm = FORMS["DeepSeek V4"](x, model.weight)
        return F.linear(norm, model.linear), norm + x

    model = Model(FORMS["DeepSeek V4"], weight, linear)
    (result, residual), graph = capture_one(forward, x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: f32[64]
x1: bf16[8, 64]
%0: (bf16[8, 64], u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.rms_norm_quantize_nvfp4(x1, x0, 0.25, 'tensor')
%1: bf16[8, 32] = dsv4.nvfp4_mm(%0[1], %0[2], %0[3], *[w0], None, bf16)
%2: bf16[8, 64] = aten.add(%0[0], x1)
return %1, %2""",
    )
    assert graph.counts == {"linear": 1, "rms_norm_kept": 1}
    assert_close(result, product(normalized(x, weight), linear))
    torch.testing.assert_close(residual, normalized(x, weight) + x)


def test_two_linears_read_the_norm() -> None:
    """Guards against counting two products that read one quantisation as a second reader of the norm."""
    x, weight, linear = inputs()
    other = nn.Parameter(torch.randn(N, K).bfloat16(), requires_grad=False)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        norm = FORMS["DeepSeek V4"](x, model.weight)
        return -F.linear(norm, model.linear), -F.linear(norm, other)

    model = Model(FORMS["DeepSeek V4"], weight, linear)
    result, graph = capture_one(forward, x)
    assert graph.counts == {"linear": 2, "share_quantization": 1, "rms_norm": 1, "merge_gemms": 1}
    for half, read in zip(result, (linear, other), strict=True):
        assert_close(half, -product(normalized(x, weight), read))


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
def test_granularity_and_shape(granularity: str) -> None:
    """Guards against another granularity than asked for, and against rows of a 3-D activation going astray."""
    x, weight, linear = inputs()
    x = x.view(2, 4, K)
    result, graph = capture_one(Model(FORMS["DeepSeek V4"], weight, linear), x, options={"gsa": granularity})
    assert graph.after.count(f", 0.25, '{granularity}')") == 1
    assert_close(result, product(normalized(x, weight), linear, granularity))


def test_fp32_model() -> None:
    """Guards against patterns traced in bf16 only, whose casts an fp32 model does not have."""
    x, weight, linear = inputs(dtype=torch.float32)
    result, graph = capture_one(Model(FORMS["DeepSeek V4"], weight, linear), x, options={"include": ["linear"]})
    assert graph.counts == {"linear": 1, "rms_norm": 1}
    assert_close(result, product(normalized(x, weight), linear))


# What is not this norm: the emulation is the norm as written, in eager mode, in front of the product.


def edited(rsqrt: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The norm of V4 with another factor, a function of ``x`` in fp32 and the weight."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        x32 = x.float()
        return (weight * (x32 * rsqrt(x32, weight))).to(x.dtype)

    return norm


def centered(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    x32 = x32 - x32.mean(-1, keepdim=True) - 1
    return (weight * (x32 * torch.rsqrt(variance(x32) + EPS))).to(x.dtype)


EDITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean subtracted": centered,
    "F.layer_norm": lambda x, w: F.layer_norm(x.float() ** 2, (K,), w, eps=EPS).to(x.dtype),
    "mean over rows": edited(lambda x, w: torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS)),
    "third power": edited(lambda x, w: torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + EPS)),
    "fourth power": edited(lambda x, w: torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS)),
    "sum": edited(lambda x, w: torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)),
    "eps outside": edited(lambda x, w: torch.rsqrt(variance(x)) + EPS),
    "eps subtracted": edited(lambda x, w: torch.rsqrt(variance(x) - 1e-4)),
    "negative eps": edited(lambda x, w: torch.rsqrt(variance(x) + -1e-4)),
    "eps a tensor": edited(lambda x, w: torch.rsqrt(variance(x) + w[0])),
    "eps 16 times": edited(lambda x, w: torch.rsqrt(torch.add(variance(x), EPS, alpha=16))),
    "sqrt": edited(lambda x, w: torch.sqrt(variance(x) + EPS)),
    "of another row": edited(lambda x, w: torch.rsqrt(variance(x.flip(0)) + EPS)),
    "no weight": lambda x, w: in_fp32(x).to(x.dtype),
    "weight twice": lambda x, w: (w * (w * in_fp32(x))).to(x.dtype),
    "weight plus one": lambda x, w: ((1 + w) * in_fp32(x)).to(x.dtype),
    "weight reversed": lambda x, w: (w.flip(0) * in_fp32(x)).to(x.dtype),
    "weight a row": lambda x, w: (w[:M].unsqueeze(-1) * in_fp32(x)).to(x.dtype),
    "weight an element": lambda x, w: (w[0] * in_fp32(x)).to(x.dtype),
    "rounded to whole numbers": lambda x, w: (w * in_fp32(x)).to(torch.int32).to(x.dtype),
    "rounded before": lambda x, w: (w * in_fp32(x.to(torch.int32))).to(x.dtype),
}
STILL_A_NORM = {"no weight", "weight plus one", "weight reversed"}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_norm_gives_its_own_answer(edit: str) -> None:
    """Guards against a pattern that accepts another norm."""
    x, weight, linear = inputs()
    result, graph = capture_one(Model(EDITS[edit], weight, linear), x)
    assert any(name.startswith("rms_norm") for name in graph.counts) == (edit in STILL_A_NORM)
    expected, unedited = (product(norm(x, weight), linear) for norm in (EDITS[edit], FORMS["DeepSeek V4"]))
    assert_close(result, expected)
    if edit not in ("eps subtracted", "negative eps"):
        scale = unedited.double().square().mean().sqrt()
    else:
        scale = product(normalized(x, weight, 1e-4), linear).double().square().mean().sqrt()
    assert (result.double() - unedited.double()).square().mean().sqrt() > 0.1 * scale


def test_fp32_result_of_a_bf16_input() -> None:
    """Guards against rounding to bf16 a norm that an fp32 linear reads in fp32."""
    x, weight, _ = inputs()
    linear = torch.randn(N, K)
    norm: Callable[..., Tensor] = lambda x, w: w * in_fp32(x)  # noqa: E731
    result, graph = capture_one(Model(norm, weight, linear), x, options={"include": ["linear"]})
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: f32[64]
x1: bf16[8, 64]
%0: f32[8, 64] = prims.convert_element_type(x1, f32)
%1: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.rms_norm_quantize_nvfp4(%0, x0, 0.25, 'tensor')
%2: f32[8, 32] = dsv4.nvfp4_mm(*%1, *[w0], None, f32)
return %2""",
    )
    assert graph.counts == {"linear": 1, "rms_norm": 1}
    assert_close(result, product(norm(x, weight), linear))


def test_sum_instead_of_mean() -> None:
    """Guards against taking a sum for a mean; the graph is what it was but for the product."""
    x, weight, linear = inputs()
    _, graph = capture_one(Model(EDITS["sum"], weight, linear), x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: f32[64]
x1: bf16[8, 64]
%0: f32[8, 64] = prims.convert_element_type(x1, f32)
%1: f32[8, 64] = aten.pow(%0, 2)
%2: f32[8, 1] = aten.sum(%1, [-1], True)
%3: f32[8, 1] = aten.add(%2, 0.25)
%4: f32[8, 1] = aten.rsqrt(%3)
%5: f32[8, 64] = aten.mul(%0, %4)
%6: f32[8, 64] = aten.mul(x0, %5)
%7: bf16[8, 64] = prims.convert_element_type(%6, bf16)
%8: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(%7, 'tensor')
%9: bf16[8, 32] = dsv4.nvfp4_mm(*%8, *[w0], None, bf16)
return %9""",
    )
    assert graph.counts == {"linear": 1}
