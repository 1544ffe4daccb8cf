"""Binding of weights that a repeated region reads: the region is rewritten once, its callers hand parts over."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from dsv4_compile import nvfp4, quantize_
from dsv4_compile.testing import capture
from tests import torch_2_11
from tests.bound_layers import activation, bind, linear, product


class Region(nn.Module):
    """A block that is compiled once for all its instances."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def emulate_regions(model: nn.Sequential, x: Tensor) -> Tensor:
    for region in model:
        x = product(x, region.layer.weight)
    return x


@pytest.mark.parametrize("packed", [False, True])
def test_subgraphs_of_dynamos_graph_are_not_modified(packed: bool) -> None:
    """Guards against rewriting a repeated region in place, where Dynamo's graph calls the same module."""
    model = nn.Sequential(Region(), Region())
    if packed:
        quantize_(model)
    with torch_2_11.packed_region() if packed else nullcontext():
        gm, bound = bind(model, activation())
    (region,) = gm.children()
    (copied,) = bound.gm.children()
    assert "dequantize_nvfp4" not in region.code
    assert "dequantize_nvfp4" in copied.code
    assert len(region.graph.find_nodes(op="placeholder")) == 2
    assert len(copied.graph.find_nodes(op="placeholder")) == 4


@pytest.mark.parametrize("packed", [False, True])
def test_repeated_region(packed: bool) -> None:
    """Guards against weights that are dequantised outside a region, or passes that run once for each instance."""
    model = nn.Sequential(Region(), Region(), Region())
    if packed:
        quantize_(model)
    x = activation()
    with torch_2_11.packed_region() if packed else nullcontext():
        result, graphs = capture(model, x)
    region, whole = graphs
    assert region.counts == {"linear": 1}
    assert_expected_inline(
        region.after,
        """\
x0: bf16[8, 64]
x1: u8[64, 32]
x2: f8e4m3[64, 4]
x3: f32[]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[8, 64] = dsv4.nvfp4_mm(*%0, [x1], [x2], [x3], None, bf16)
return %1""",
    )
    assert whole.counts == {}
    assert_expected_inline(
        whole.after,
        """\
w0: nvfp4[64, 64]
w1: nvfp4[64, 64]
w2: nvfp4[64, 64]
x0: bf16[8, 64]
%0: (bf16[8, 64]) = invoke_subgraph(repeated_subgraph0, 'subgraph_0', x0, *w0)
%1: (bf16[8, 64]) = invoke_subgraph(repeated_subgraph0, 'subgraph_0', %0[0], *w1)
%2: (bf16[8, 64]) = invoke_subgraph(repeated_subgraph0, 'subgraph_0', %1[0], *w2)
return %2[0]""",
    )
    assert torch.equal(result, emulate_regions(model, x))


def test_repeated_region_generated_code() -> None:
    """Guards against operands of a region that the generated caller hands over in another order."""
    model, x = nn.Sequential(Region(), Region(), Region()), activation()
    result, _ = capture(model, x, codegen=True)
    assert torch.equal(result, emulate_regions(model, x))


def test_region_with_packed_and_plain_calls() -> None:
    """Guards against a region that expects packed parts being called with a plain weight: that weight stays plain."""
    model, x = nn.Sequential(Region(), Region(), Region()), activation()
    result, graphs = capture(model, x, options={"exclude": ["1.*"]})
    region, whole = graphs
    assert region.counts == {}
    assert [weight.name for weight in whole.bound.weights if weight.packed is not None] == [
        "0.layer.weight",
        "2.layer.weight",
    ]
    assert_expected_inline(
        whole.after,
        """\
w0: nvfp4[64, 64]
w1: nvfp4[64, 64]
x0: bf16[8, 64]
x1: bf16[64, 64]
%0: bf16[64, 64] = dsv4.dequantize_nvfp4(*w0, bf16)
%1: (bf16[8, 64]) = invoke_subgraph(repeated_subgraph0, 'subgraph_0', x0, %0)
%2: (bf16[8, 64]) = invoke_subgraph(repeated_subgraph0, 'subgraph_0', %1[0], x1)
%3: bf16[64, 64] = dsv4.dequantize_nvfp4(*w1, bf16)
%4: (bf16[8, 64]) = invoke_subgraph(repeated_subgraph0, 'subgraph_0', %2[0], %3)
return %4[0]""",
    )
    expected = x
    for index, module in enumerate(model):
        weight = module.layer.weight
        expected = F.linear(
            expected, weight if index == 1 else nvfp4.dequantize(*nvfp4.quantize_weight(weight), x.dtype)
        )
    torch.testing.assert_close(result, expected, rtol=2**-6, atol=2**-6)


def test_region_with_differently_packed_calls() -> None:
    """Guards against one region for weights with one global scale and weights with one for each half."""
    model, x = nn.Sequential(Region(), Region()), activation()
    quantize_(model)
    weight = model[0].layer.weight
    weight.global_scale = weight.global_scale.expand(2).clone()
    expected = x
    for module in model:
        expected = F.linear(expected, module.layer.weight.dequantize())
    with torch_2_11.packed_region():
        result, _ = capture(model, x, codegen=True)
    torch.testing.assert_close(result, expected, rtol=2**-6, atol=2**-6)


class Outer(nn.Module):
    """A region around a region."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.layer = Region(), linear()

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.inner(x))


def test_region_in_a_region() -> None:
    """Guards against weights that are bound one level deep only."""
    model, x = nn.Sequential(Outer(), Outer()), activation()
    torch_2_11.region_in_a_region(model, x)
    result, graphs = capture(model, x)
    expected = x
    for outer in model:
        expected = product(product(expected, outer.inner.layer.weight), outer.layer.weight)
    assert torch.equal(result, expected)
    assert sum(graph.counts.get("linear", 0) for graph in graphs) == 2
    assert not any("dequantize" in graph.after for graph in graphs)


def test_region_whose_weight_is_read_otherwise() -> None:
    """Guards against judging a weight by its readers outside a region only."""

    class Added(Region):
        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer.weight[:8]

    model, x = nn.Sequential(Added(), Added()), activation()
    result, graphs = capture(model, x)
    assert all("nvfp4" not in graph.after for graph in graphs)
    torch.testing.assert_close(result, model(x))
