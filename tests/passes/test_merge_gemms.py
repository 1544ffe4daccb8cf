"""Merged GEMMs: products of one activation become one call, whose slices are what the products were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from dsv4_compile import nvfp4, quantize_
from dsv4_compile.testing import capture
from tests.passes.programs import Model, capture_one

K = 64


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` on NVFP4 operands: the exact sum, scaled in fp32, rounded once to ``x``'s dtype."""
    a_codes, a_scales, gsa = nvfp4.quantize(x)
    b_codes, b_scales, gsb = nvfp4.quantize_weight(weight)
    a, b = (nvfp4.scaled_codes(*packed, torch.float64) for packed in ((a_codes, a_scales), (b_codes, b_scales)))
    y = (a @ b.mT).to(torch.float32) * (gsa * gsb)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def two_linears(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    # Negated, because what leaves the graph is not merged; exact.
    return -F.linear(x, self.w0), -F.linear(x, self.w1)


def two_linears_with_bias(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return -F.linear(x, self.w0, self.b0), -F.linear(x, self.w1, self.b1)


def assert_negated(results: Any, *expected: Tensor) -> None:
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, -value)


def test_without_bias() -> None:
    """Guards against columns that end up with the other weight, of another size and magnitude."""
    w0, w1, x = randn(32, K), 100 * randn(48, K), randn(8, K)
    result, graph = capture_one(Model(two_linears, w0=w0, w1=w1), x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
w1: nvfp4[48, 64]
x0: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[8, 80] = dsv4.nvfp4_mm(*%0, *[w0, w1], None, bf16)
%2: bf16[8, 32] = aten.slice(%1, 1, 0, 32)
%3: bf16[8, 48] = aten.slice(%1, 1, 32, 80)
%4: bf16[8, 32] = aten.neg(%2)
%5: bf16[8, 48] = aten.neg(%3)
return %4, %5""",
    )
    assert graph.counts == {"linear": 2, "share_quantization": 1, "merge_gemms": 1}
    assert_negated(result, product(x, w0), product(x, w1))


def test_with_biases() -> None:
    """Guards against biases that end up under the columns of the other weight."""
    w0, w1, b0, b1, x = randn(32, K), randn(48, K), 10 * randn(32), 10 * randn(48), randn(8, K)
    result, graph = capture_one(Model(two_linears_with_bias, w0=w0, w1=w1, b0=b0, b1=b1), x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
w1: nvfp4[48, 64]
x0: bf16[32]
x1: bf16[8, 64]
x2: bf16[48]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x1, 'tensor')
%1: bf16[80] = aten.cat([x0, x2])
%2: bf16[8, 80] = dsv4.nvfp4_mm(*%0, *[w0, w1], %1, bf16)
%3: bf16[8, 32] = aten.slice(%2, 1, 0, 32)
%4: bf16[8, 48] = aten.slice(%2, 1, 32, 80)
%5: bf16[8, 32] = aten.neg(%3)
%6: bf16[8, 48] = aten.neg(%4)
return %5, %6""",
    )
    assert_negated(result, product(x, w0, b0), product(x, w1, b1))


def test_option_switches_it_off() -> None:
    """Guards against an option without effect."""
    model = Model(two_linears, w0=randn(32, K), w1=randn(48, K))
    x = randn(8, K)
    merged, _ = capture_one(model, x)
    apart, graph = capture_one(model, x, options={"merge_gemms": False})
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
w1: nvfp4[48, 64]
x0: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
%2: bf16[8, 32] = aten.neg(%1)
%3: bf16[8, 48] = dsv4.nvfp4_mm(*%0, *[w1], None, bf16)
%4: bf16[8, 48] = aten.neg(%3)
return %2, %4""",
    )
    assert "merge_gemms" not in graph.counts
    assert torch.equal(apart[0], merged[0])
    assert torch.equal(apart[1], merged[1])


def test_one_with_bias_and_one_without() -> None:
    """Guards against giving a product without a bias one, or taking the bias of the other away."""
    w0, w1, bias, x = randn(32, K), randn(48, K), 10 * randn(32), randn(8, K)
    model = Model(lambda self, x: (-F.linear(x, self.w0, self.bias), -F.linear(x, self.w1)), w0=w0, w1=w1, bias=bias)
    result, graph = capture_one(model, x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
w1: nvfp4[48, 64]
x0: bf16[32]
x1: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x1, 'tensor')
%1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], x0, bf16)
%2: bf16[8, 32] = aten.neg(%1)
%3: bf16[8, 48] = dsv4.nvfp4_mm(*%0, *[w1], None, bf16)
%4: bf16[8, 48] = aten.neg(%3)
return %2, %4""",
    )
    assert "merge_gemms" not in graph.counts
    assert_negated(result, product(x, w0, bias), product(x, w1))


def test_two_with_bias_and_two_without() -> None:
    """Guards against one group where there are two."""
    names = ("w0", "w1", "w2", "w3")
    w = {name: randn(32, K) for name in names}
    b = {name.replace("w", "b"): 10 * randn(32) for name in names}

    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        biases = self.b0, None, self.b2, None
        return tuple(-F.linear(x, getattr(self, name), bias) for name, bias in zip(names, biases, strict=True))

    x = randn(8, K)
    result, graph = capture_one(Model(forward, **w, **b), x)
    assert graph.counts["merge_gemms"] == 2
    assert graph.after.count("dsv4.nvfp4_mm(") == 2
    expected = [product(x, w[f"w{index}"], b[f"b{index}"] if index in (0, 2) else None) for index in range(4)]
    assert_negated(result, *expected)


def test_different_output_dtypes() -> None:
    """Guards against rounding one product to the dtype of the other."""

    w0, x = randn(32, K), randn(8, K)
    parts = [[part] for part in nvfp4.quantize_weight(w0)]

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        packed = torch.ops.dsv4.quantize_nvfp4(x, "tensor")
        return (
            -torch.ops.dsv4.nvfp4_mm(*packed, *parts, None, torch.bfloat16),
            -torch.ops.dsv4.nvfp4_mm(*packed, *parts, None, torch.float32),
        )

    result, graph = capture_one(Model(forward), x)
    assert graph.counts == {}
    assert graph.after.count("dsv4.nvfp4_mm(") == 2
    assert [part.dtype for part in result] == [torch.bfloat16, torch.float32]
    assert_negated((result[0], result[1].bfloat16()), product(x, w0), product(x, w0))


def test_bias_computed_in_the_graph() -> None:
    """Guards against moving a product before the bias that it reads."""
    w0, w1, x = randn(32, K), randn(32, K), randn(8, K)

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        first = -F.linear(x, self.w0, x[0, :32] * 2)
        return first, -F.linear(x, self.w1, first[0])

    result, graph = capture_one(Model(forward, w0=w0, w1=w1), x)
    assert "merge_gemms" not in graph.counts
    assert_negated(result, product(x, w0, x[0, :32] * 2), product(x, w1, result[0][0]))


def test_later_product_read_before_it_stood() -> None:
    """Guards against a merged call that stands after a reader of one of its parts, or before what they all read."""
    w0, w1, w2, x = randn(K, K) / 8, randn(K, K) / 8, randn(K, K) / 8, randn(8, K)

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = F.linear(F.linear(x, self.w0), self.w1)
        return hidden + F.linear(x, self.w2)

    result, graph = capture_one(Model(forward, w0=w0, w1=w1, w2=w2), x)
    assert graph.counts["merge_gemms"] == 1
    assert torch.equal(result, product(product(x, w0), w1) + product(x, w2))


def test_merged_results_can_be_viewed() -> None:
    """Guards against views that a slice of columns does not allow: the model's own products are contiguous."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return -F.linear(x, self.w0).view(2, 4, 2, 16).transpose(1, 2), -F.linear(x, self.w1).view(-1)

    w0, w1, x = randn(32, K), randn(48, K), randn(2, 4, K)
    result, graph = capture_one(Model(forward, w0=w0, w1=w1), x)
    assert graph.counts["merge_gemms"] == 1
    assert_negated(result, product(x, w0).view(2, 4, 2, 16).transpose(1, 2), product(x, w1).view(-1))


def test_weights_with_several_global_scales() -> None:
    """Guards against losing one weight's row segments when another has a single global scale."""
    halves, w1, x = (randn(32, K), 50 * randn(32, K)), randn(48, K), randn(8, K)
    model = Model(two_linears, w0=torch.cat(halves), w1=w1)
    quantize_(model, include=["w0", "w1"])
    parts = [nvfp4.quantize_weight(half) for half in halves]
    model.w0.codes, model.w0.block_scales = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    model.w0.global_scale = torch.stack([part[2] for part in parts])
    result, graph = capture_one(model, x)
    assert graph.counts["merge_gemms"] == 1
    assert_negated(result, torch.cat([product(x, half) for half in halves], dim=-1), product(x, w1))


@pytest.mark.parametrize("count", [3, 5])
def test_many(count: int) -> None:
    """Guards against offsets that go wrong from the third weight on."""
    w = {f"w{index}": randn(16 * (index + 1), K) for index in range(count)}

    def forward(self: Any, x: Tensor) -> list[Tensor]:
        return [-F.linear(x, getattr(self, name)) for name in w]

    x = randn(8, K)
    result, graph = capture_one(Model(forward, **w), x)
    assert graph.counts["merge_gemms"] == count - 1
    assert_negated(result, *(product(x, weight) for weight in w.values()))


RETURNED: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda y: y,
    "viewed": lambda y: y.view(2, 4, -1),
    "transposed": lambda y: y.t(),
    "sliced": lambda y: y[2:4],
    "chunked": lambda y: y.chunk(2, dim=-1)[1],
    "viewed, then split": lambda y: y.unflatten(-1, (2, 16)).unbind(1)[1],
}


@pytest.mark.parametrize("form", RETURNED)
def test_product_that_leaves_the_graph(form: str) -> None:
    """Guards against strides other than eager's: ``.view(-1)`` behind a graph break raised."""
    view = RETURNED[form]
    w0, w1, w2, x = randn(32, K), randn(32, K), randn(32, K), randn(8, K)
    model = Model(
        lambda self, x: (view(F.linear(x, self.w0)), -F.linear(x, self.w1), -F.linear(x, self.w2)), w0=w0, w1=w1, w2=w2
    )
    (returned, *others), graph = capture_one(model, x)
    assert graph.counts["merge_gemms"] == 1  # the other two
    eager = model(x)[0]
    assert (returned.shape, returned.stride()) == (eager.shape, eager.stride())
    assert torch.equal(returned, view(product(x, w0)))
    assert_negated(others, product(x, w1), product(x, w2))


def test_returned_products_stay_apart() -> None:
    """Guards against a merge of products that leave the graph."""
    model = Model(lambda self, x: (F.linear(x, self.w0), F.linear(x, self.w1)), w0=randn(32, K), w1=randn(48, K))
    _, graph = capture_one(model, randn(8, K))
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
w1: nvfp4[48, 64]
x0: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
%2: bf16[8, 48] = dsv4.nvfp4_mm(*%0, *[w1], None, bf16)
return %1, %2""",
    )
    assert "merge_gemms" not in graph.counts


class Region(nn.Module):
    """Two linears of one activation in a region that is compiled once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(K, K, bias=False, dtype=torch.bfloat16) for _ in range(2))

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def test_products_returned_from_a_repeated_region() -> None:
    """Guards against the generated caller reading a region's results with strides they do not have: NaN, or worse."""

    def forward(self: Any, x: Tensor) -> Tensor:
        first, x = self.regions[0](x)
        second, x = self.regions[1](x)
        return torch.mm(first, second.t()), torch.mm(x, first.t())

    model = Model(forward)
    model.regions = nn.ModuleList(Region() for _ in range(2))
    x = randn(8, K)
    result, _ = capture(model, x, codegen=True)
    first, x = product(x, model.regions[0].a.weight), product(x, model.regions[0].b.weight)
    second, x = product(x, model.regions[1].a.weight), product(x, model.regions[1].b.weight)
    torch.testing.assert_close(result, (torch.mm(first, second.t()), torch.mm(x, first.t())))


# Small edits of `two_linears` for a square x: what each output is, as a function of the products' emulation.
EDITS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "one reads x + 1": (
        lambda self, x: (-F.linear(x, self.w0), -F.linear(x + 1, self.w1)),
        lambda x, w0, w1: (product(x, w0), product(x + 1, w1)),
    ),
    "one reads x transposed": (
        lambda self, x: (-F.linear(x, self.w0), -F.linear(x.t(), self.w1)),
        lambda x, w0, w1: (product(x, w0), product(x.t(), w1)),
    ),
    "one reads the rows turned round": (
        lambda self, x: (-F.linear(x, self.w0), -F.linear(x.flip(0), self.w1)),
        lambda x, w0, w1: (product(x, w0), product(x.flip(0), w1)),
    ),
    "weights swapped": (
        lambda self, x: (-F.linear(x, self.w1), -F.linear(x, self.w0)),
        lambda x, w0, w1: (product(x, w1), product(x, w0)),
    ),
    "one weight twice": (
        lambda self, x: (-F.linear(x, self.w0), -F.linear(x, self.w0)),
        lambda x, w0, w1: (product(x, w0), product(x, w0)),
    ),
    "one weight transposed": (
        lambda self, x: (-F.linear(x, self.w0), -(x @ self.w1)),
        lambda x, w0, w1: (product(x, w0), x @ w1),  # no linear, so its plain weight is not packed
    ),
    "one reads the other's result": (
        lambda self, x: (-F.linear(x, self.w0), -F.linear(F.linear(x, self.w0), self.w1)),
        lambda x, w0, w1: (product(x, w0), product(product(x, w0), w1)),
    ),
    "x changed in place between": (
        lambda self, x: (-F.linear(x, self.w0), -F.linear(x.mul_(3), self.w1)),
        lambda x, w0, w1: (product(x, w0), product(x * 3, w1)),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_model_gives_its_own_answer(edit: str) -> None:
    """Guards against a merge that is blind to a small change of the model: never the unedited model's answer."""
    function, emulation = EDITS[edit]
    w0, w1, x = randn(K, K), 10 * randn(K, K), randn(K, K)
    expected = emulation(x, w0, w1)
    unedited = product(x, w0), product(x, w1)
    assert not all(torch.equal(left, right) for left, right in zip(expected, unedited, strict=True))
    result, graph = capture_one(Model(function, w0=w0, w1=w1), x.clone())
    assert graph.counts["linear"] >= 1
    assert_negated(result, *expected)
