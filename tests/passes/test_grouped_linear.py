"""The grouped linear pass: products by group are found; other views and orders of the weight keep their meaning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

from dsv4_compile import nvfp4, quantize_
from tests.passes.programs import capture_one

G, M, N, K = 4, 3, 16, 32


class Model(nn.Module):
    """A function of a weight and an input."""

    def __init__(self, function: Callable[..., Any], weight: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.weight, *inputs)


def product(x: Tensor, weight: Tensor, granularity: str = "tensor") -> Tensor:
    """``x[g] @ w[g].T`` on NVFP4 operands; ``weight`` [G * N, K] with one global scale, or [G, N, K] with one each."""
    a, b = nvfp4.quantize(x, granularity), nvfp4.quantize_weight(weight)
    w = nvfp4.scaled_codes(*b[:2], torch.float64).view(len(x), -1, x.shape[-1])
    total = torch.einsum("gmk,gnk->gmn", nvfp4.scaled_codes(*a[:2], torch.float64), w).float()
    gsa = a[2].unsqueeze(-1) if a[2].dim() else a[2]
    return (total * (gsa * (b[2].view(-1, 1, 1) if b[2].dim() else b[2]))).to(x.dtype)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def rows() -> Tensor:
    """Groups of different size, so that reading another group's shows."""
    return (randn(G, N, K) * torch.logspace(-0.5, 0.5, G).view(-1, 1, 1)).bfloat16().view(G * N, K)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "view": lambda w, x: torch.bmm(x, w.view(G, -1, K).transpose(1, 2)),
    "mT": lambda w, x: torch.bmm(x, w.view(G, N, K).mT),
    "unflatten": lambda w, x: x.bmm(w.unflatten(0, (G, N)).transpose(-1, -2)),
    "permute": lambda w, x: torch.bmm(x, w.reshape(G, N, K).permute(0, 2, 1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows(form: str) -> None:
    """Guards against groups that lie one under the other in a 2-D weight being dequantised."""
    x, weight = randn(G, M, K), rows()
    result, graph = capture_one(Model(FORMS[form], weight), x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[64, 32]
x0: bf16[4, 3, 32]
%0: u8[4, 16, 16] = aten.view(w0.codes, [4, -1, 16])
%1: f8e4m3[4, 16, 2] = aten.view(w0.block_scales, [4, -1, 2])
%2: (u8[4, 3, 16], f8e4m3[4, 3, 2], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%3: bf16[4, 3, 16] = dsv4.nvfp4_grouped_mm(*%2, %0, %1, w0.global_scale, None, bf16)
return %3""",
    )
    assert graph.counts == {"grouped_linear": 1}
    assert torch.equal(result, product(x, weight))


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
def test_deepseek_v4(granularity: str) -> None:
    """Guards against V4's o_a_proj, whose input is a transposed view, being written in another way."""
    module = DeepseekV4GroupedLinear(K, G * N, G).bfloat16()
    module.weight.data = rows()
    x = randn(2, M, G, K)
    result, graph = capture_one(module, x, options={"gsa": granularity})
    assert graph.counts["grouped_linear"] == 1
    expected = product(x.reshape(-1, G, K).transpose(0, 1), module.weight.data, granularity)
    assert torch.equal(result, expected.transpose(0, 1).reshape(2, M, G, N))


@pytest.mark.parametrize("packed", [False, True])
def test_stack(packed: bool) -> None:
    """Guards against experts that all run on every token being dequantised, or sharing one global scale."""
    x, weight = randn(G, M, K), rows().view(G, N, K)
    model = Model(lambda w, x: torch.bmm(x, w.transpose(1, 2)), weight)
    if packed:
        quantize_(model)
    result, graph = capture_one(model, x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[4, 16, 32]
x0: bf16[4, 3, 32]
%0: (u8[4, 3, 16], f8e4m3[4, 3, 2], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[4, 3, 16] = dsv4.nvfp4_grouped_mm(*%0, *w0, None, bf16)
return %1""",
    )
    assert graph.counts == {"grouped_linear_stack": 1}
    assert torch.equal(result, product(x, weight))


@pytest.mark.parametrize("stack", [False, True])
def test_autocast(stack: bool) -> None:
    """Guards against autocast's cast of an fp32 weight, which stands between the weight and the product."""
    weight = rows().float()

    def forward(w: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.bmm(x, (w if stack else w.view(G, N, K)).transpose(1, 2))

    x, weight = randn(G, M, K), weight.view(G, N, K) if stack else weight
    result, graph = capture_one(Model(forward, weight), x, options={"include": ["weight"]})
    assert graph.counts == {"grouped_linear_stack" if stack else "grouped_linear": 1}
    assert graph.after.count("dsv4.nvfp4_grouped_mm(") == 1
    assert torch.equal(result, product(x, weight))


# Small edits. The emulation is the edited model in eager mode, on the values that the packed weight stands for where
# it is packed all the same.

EDITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "K changed": lambda w, x: torch.bmm(x[..., : K // 2], w.view(G, -1, K // 2).transpose(1, 2))[..., :N],
    "not transposed": lambda w, x: torch.bmm(x, w.view(G, K, N)),
    "groups permuted": lambda w, x: torch.bmm(x, w.view(G, N, K).transpose(1, 2).flip(0)),
    "rows interleaved": lambda w, x: torch.bmm(x, w.view(N, G, K).transpose(0, 1).transpose(1, 2)),
    "weight twice": lambda w, x: torch.bmm(x, (2 * w).view(G, N, K).transpose(1, 2)),
    "one group for all": lambda w, x: torch.bmm(x, w.view(G, N, K)[:1].expand(G, N, K).transpose(1, 2)),
    "inputs permuted": lambda w, x: torch.bmm(x.flip(0), w.view(G, N, K).transpose(1, 2)),
    "transposed by a view": lambda w, x: torch.bmm(x, w.view(G, N, K).reshape(G, K, N)),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("edit", EDITS)
def test_edited_model_gives_its_own_answer(edit: str, packed: bool) -> None:
    """Guards against a view or an order of the weight that no operator reads."""
    x, weight = randn(G, M, K), rows()
    model = Model(EDITS[edit], weight)
    if packed:
        quantize_(model)
    result, graph = capture_one(model, x)
    if edit == "inputs permuted":
        assert graph.counts == {"grouped_linear": 1}
        expected = product(x.flip(0), weight)
    else:
        assert not any(name.startswith("grouped_linear") for name in graph.counts)
        values = nvfp4.dequantize(*nvfp4.quantize_weight(weight), torch.bfloat16) if "w0" in graph.after else weight
        expected = EDITS[edit](values, x)
    # bf16 products of K terms: an ulp, 2^-8, of the largest.
    assert (result - expected).abs().max() <= 2**-7 * expected.abs().max()
    assert (result - product(x, weight)).abs().max() > 0.1 * expected.abs().max()


def test_stack_viewed_as_other_groups() -> None:
    """Guards against a stack [E, N, K] that is read as [2 E, N / 2, K], with the global scales of [E]."""
    x, weight = randn(2 * G, M, K), rows().view(G, N, K)
    model = Model(lambda w, x: torch.bmm(x, w.view(2 * G, N // 2, K).transpose(1, 2)), weight)
    quantize_(model)
    result, graph = capture_one(model, x)
    assert graph.counts == {}
    values = nvfp4.dequantize(*nvfp4.quantize_weight(weight), torch.bfloat16)
    torch.testing.assert_close(result, torch.bmm(x, values.view(2 * G, N // 2, K).transpose(1, 2)))


def test_not_transposed() -> None:
    """Guards against contracting N; the packed weight is dequantised and read as the model reads it."""
    x, weight = randn(G, M, K), rows()
    model = Model(EDITS["not transposed"], weight)
    quantize_(model)
    _, graph = capture_one(model, x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[64, 32]
x0: bf16[4, 3, 32]
%0: bf16[64, 32] = dsv4.dequantize_nvfp4(*w0, bf16)
%1: bf16[4, 32, 16] = aten.view(%0, [4, 32, 16])
%2: bf16[4, 3, 16] = aten.bmm(x0, %1)
return %2""",
    )
