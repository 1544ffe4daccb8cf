"""Shared quantisation: one activation is quantised once, and only one activation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from dsv4_compile import nvfp4
from dsv4_compile.testing import Rewritten, capture

N, K = 32, 64
APART = {"merge_gemms": False}  # merging would hide which quantisation each product reads


class Model(nn.Module):
    """A function of itself and its inputs, with weights ``w0``, ``w1`` ... [N, K]."""

    def __init__(self, function: Callable[..., Any], *weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for index, weight in enumerate(weights):
            self.register_parameter(f"w{index}", nn.Parameter(weight, requires_grad=False))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def product(x: Tensor, weight: Tensor, granularity: str = "tensor") -> Tensor:
    """``x @ weight.T`` on NVFP4 operands: the exact sum, scaled in fp32, rounded once to ``x``'s dtype."""
    a_codes, a_scales, gsa = nvfp4.quantize(x, granularity)
    b_codes, b_scales, gsb = nvfp4.quantize_weight(weight)
    a, b = (nvfp4.scaled_codes(*packed, torch.float64) for packed in ((a_codes, a_scales), (b_codes, b_scales)))
    return ((a @ b.mT).to(torch.float32) * ((gsa.unsqueeze(-1) if gsa.dim() else gsa) * gsb)).to(x.dtype)


def weights(count: int, n: int = N, k: int = K) -> list[Tensor]:
    return [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(count)]


def activation(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def capture_one(model: Callable[..., Any], *inputs: Tensor, **kwargs: Any) -> tuple[Any, Rewritten]:
    result, (graph,) = capture(model, *inputs, **{"options": APART, **kwargs})
    return result, graph


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
def test_query_key_value(granularity: str) -> None:
    """Guards against quantising a 3-D activation once for each linear that reads it."""
    w = weights(3)
    model = Model(lambda self, x: (F.linear(x, self.w0), F.linear(x, self.w1), F.linear(x, self.w2)), *w)
    x = activation(2, 4, K)
    result, graph = capture_one(model, x, options={**APART, "gsa": granularity})
    gsa = "f32[2, 4]" if granularity == "token" else "f32[]"
    assert_expected_inline(
        graph.after.replace(granularity, "GRANULARITY", 1).replace(gsa, "GSA"),
        """\
w0: nvfp4[32, 64]
w1: nvfp4[32, 64]
w2: nvfp4[32, 64]
x0: bf16[2, 4, 64]
%0: (u8[2, 4, 32], f8e4m3[2, 4, 4], GSA) = dsv4.quantize_nvfp4(x0, 'GRANULARITY')
%1: bf16[2, 4, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
%2: bf16[2, 4, 32] = dsv4.nvfp4_mm(*%0, *[w1], None, bf16)
%3: bf16[2, 4, 32] = dsv4.nvfp4_mm(*%0, *[w2], None, bf16)
return %1, %2, %3""",
    )
    assert graph.counts == {"linear": 3, "share_quantization": 3, "clean_up": 3}
    for actual, weight in zip(result, w, strict=True):
        assert torch.equal(actual, product(x, weight, granularity))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(8, K),
    "view with a size left out": lambda x: x.view(-1, K),
    "flatten": lambda x: x.flatten(0, 1),
    "reshape": lambda x: x.reshape(4, 2, K),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "view of a view": lambda x: x.view(8, K).view(2, 2, 2, K),
}


@pytest.mark.parametrize("form", VIEWS)
def test_views_in_between(form: str) -> None:
    """Guards against a view that keeps the rows apart hiding that it is the same activation."""
    view, w = VIEWS[form], weights(2)
    model = Model(lambda self, x: (F.linear(view(x), self.w0), F.linear(x, self.w1)), *w)
    x = activation(2, 4, K)
    result, graph = capture_one(model, x)
    assert graph.after.count("dsv4.quantize_nvfp4(") == 1
    assert "dsv4.quantize_nvfp4(x0, 'tensor')" in graph.after
    assert torch.equal(result[0], product(view(x), w[0]))
    assert torch.equal(result[1], product(x, w[1]))


def test_view_of_the_result() -> None:
    """Guards against giving a product the shape of the activation when the model asked for that of its view."""
    w = weights(2)
    model = Model(lambda self, x: (F.linear(x.view(8, K), self.w0), F.linear(x, self.w1)), *w)
    _, graph = capture_one(model, activation(2, 4, K))
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
w1: nvfp4[32, 64]
x0: bf16[2, 4, 64]
%0: (u8[2, 4, 32], f8e4m3[2, 4, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[2, 4, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
%2: bf16[8, 32] = aten.view(%1, [8, 32])
%3: bf16[2, 4, 32] = dsv4.nvfp4_mm(*%0, *[w1], None, bf16)
return %2, %3""",
    )


def test_dynamic_shapes() -> None:
    """Guards against losing the symbolic sizes of a view that is taken away."""
    w = weights(2)
    model = Model(lambda self, x: (F.linear(x.flatten(0, 1), self.w0), F.linear(x, self.w1)), *w)
    x = activation(2, 4, K)
    result, graph = capture_one(model, x, dynamic=True)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
w1: nvfp4[32, 64]
x0: Sym(s0)
x1: Sym(s1)
x2: bf16[s0, s1, 64]
%0: Sym(s0*s1) = mul(x0, x1)
%1: (u8[s0, s1, 32], f8e4m3[s0, s1, 4], f32[]) = dsv4.quantize_nvfp4(x2, 'tensor')
%2: bf16[s0, s1, 32] = dsv4.nvfp4_mm(*%1, *[w0], None, bf16)
%3: bf16[s0*s1, 32] = aten.view(%2, [%0, 32])
%4: bf16[s0, s1, 32] = dsv4.nvfp4_mm(*%1, *[w1], None, bf16)
return %3, %4""",
    )
    assert torch.equal(result[0], product(x.flatten(0, 1), w[0]))
    assert torch.equal(result[1], product(x, w[1]))


def test_same_weight_twice() -> None:
    """Guards against a product that is computed twice from one quantisation going astray."""
    (w,) = weights(1)
    model = Model(lambda self, x: F.linear(x, self.w0) + F.linear(x.view(8, K), self.w0).view(2, 4, N), w)
    x = activation(2, 4, K)
    result, graph = capture_one(model, x)
    assert graph.after.count("dsv4.quantize_nvfp4(") == 1
    assert torch.equal(result, 2 * product(x, w))


def test_different_activations_are_not_shared() -> None:
    """Guards against one quantisation for activations that only look alike."""
    w = weights(2)
    model = Model(lambda self, x, y: (F.linear(x, self.w0), F.linear(y, self.w1)), *w)
    x, y = activation(8, K), 100 * activation(8, K)
    result, graph = capture_one(model, x, y)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
w1: nvfp4[32, 64]
x0: bf16[8, 64]
x1: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
%2: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x1, 'tensor')
%3: bf16[8, 32] = dsv4.nvfp4_mm(*%2, *[w1], None, bf16)
return %1, %3""",
    )
    assert graph.counts == {"linear": 2}
    assert torch.equal(result[0], product(x, w[0]))
    assert torch.equal(result[1], product(y, w[1]))


OTHER_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "last dimension split": lambda x: x.view(2 * K, K // 2),
    "last dimension merged": lambda x: x.view(K // 2, 2 * K),
    "same last size, other elements": lambda x: x.t().reshape(K, K),
    "rows turned round": lambda x: x.flip(0),
    "part of the rows": lambda x: x[: K // 2],
    "rows gathered": lambda x: x[torch.arange(K - 1, -1, -1)],
    "scaled": lambda x: x * 2,
    "rows expanded": lambda x: x[:1].expand(K, K),
}


@pytest.mark.parametrize("form", OTHER_ROWS)
def test_other_rows_are_not_shared(form: str) -> None:
    """Guards against reading rows or blocks of an activation that are not those of the linear."""
    change = OTHER_ROWS[form]
    x = activation(K, K) * torch.logspace(-2, 2, K).bfloat16().unsqueeze(-1)
    w = weights(1)[0], torch.randn(N, change(x).shape[-1], dtype=torch.bfloat16)
    model = Model(lambda self, x: (F.linear(x, self.w0), F.linear(change(x), self.w1)), *w)
    result, graph = capture_one(model, x)
    assert graph.after.count("dsv4.quantize_nvfp4(") == 2
    if change(x).shape == x.shape:
        assert not torch.equal(result[1], product(x, w[1]))  # the unedited model's answer
    assert torch.equal(result[0], product(x, w[0]))
    assert torch.equal(result[1], product(change(x), w[1]))


def test_transposed_activation_is_not_shared() -> None:
    """Guards against blocks along the wrong dimension of a square activation."""
    w = weights(2)
    model = Model(lambda self, x: (F.linear(x, self.w0), F.linear(x.t(), self.w1)), *w)
    _, graph = capture_one(model, activation(K, K))
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
w1: nvfp4[32, 64]
x0: bf16[64, 64]
%0: (u8[64, 32], f8e4m3[64, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[64, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
%2: bf16[64, 64] = aten.permute(x0, [1, 0])
%3: (u8[64, 32], f8e4m3[64, 4], f32[]) = dsv4.quantize_nvfp4(%2, 'tensor')
%4: bf16[64, 32] = dsv4.nvfp4_mm(*%3, *[w1], None, bf16)
return %1, %4""",
    )


def test_quantisation_that_something_else_reads() -> None:
    """Guards against giving codes and scales the shape of the activation where those of a view were asked for."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, _, global_scale = torch.ops.dsv4.quantize_nvfp4(x.view(8, K), self.granularity)
        return F.linear(x, self.w0), codes, global_scale

    (w,) = weights(1)
    x = activation(2, 4, K)
    for granularity in nvfp4.GRANULARITIES:
        model = Model(forward, w)
        model.granularity = granularity
        result, graph = capture_one(model, x, options={"gsa": granularity})
        assert graph.after.count("dsv4.quantize_nvfp4(") == 1
        codes, _, global_scale = nvfp4.quantize(x.view(8, K), granularity)
        assert torch.equal(result[0], product(x, w, granularity))
        assert torch.equal(result[1], codes)
        assert torch.equal(result[2], global_scale)


def test_quantisations_of_two_granularities() -> None:
    """Guards against a product that reads a quantisation with another global scale than its own."""
    (w,) = weights(1)
    model = Model(lambda self, x: (F.linear(x, self.w0), torch.ops.dsv4.quantize_nvfp4(x, "token")[2]), w)
    x = activation(8, K)
    result, graph = capture_one(model, x)
    assert graph.after.count("dsv4.quantize_nvfp4(") == 2
    assert torch.equal(result[0], product(x, w))
    assert torch.equal(result[1], nvfp4.quantize(x, "token")[2])


def experts_and_linear(self: Any, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, self.w0), torch._grouped_mm(x.view(8, K), self.w1.transpose(1, 2), offsets)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_experts_read_the_quantisation_of_a_linear(granularity: str) -> None:
    """Guards against quantising rows once for a linear and once for experts, which read them through a view."""
    w = weights(1)[0], torch.randn(2, N, K, dtype=torch.bfloat16)
    x, offsets = activation(2, 4, K), torch.tensor([3, 8], dtype=torch.int32)
    result, graph = capture_one(Model(experts_and_linear, *w), x, offsets, options={**APART, "gsa": granularity})
    assert graph.after.count("dsv4.quantize_nvfp4(") == 1
    # Experts keep their own quantisation until they have been recognised: only the second run takes it away.
    assert graph.counts.get("share_quantization", 0) == 1  # the linear's view in front
    assert graph.counts["share_quantization_of_experts"] == 1
    assert torch.equal(result[0], product(x, w[0], granularity))
    a, b = nvfp4.quantize(x.view(8, K), granularity), nvfp4.quantize_weight(w[1])
    ids = torch.tensor([0] * 3 + [1] * 5)
    left, right = (nvfp4.scaled_codes(*packed[:2], torch.float64) for packed in (a, b))
    total = torch.einsum("sk,snk->sn", left, right[ids]).float()
    gsa = a[2].unsqueeze(-1) if granularity == "token" else a[2]
    assert torch.equal(result[1], (total * (gsa * b[2][ids].unsqueeze(-1))).bfloat16())
