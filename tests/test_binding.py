"""Binding: weights stand in the compiled code once, uncopied, and it is always the caller's own weights that are read."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx_inner

from dsv4_compile import Nvfp4Tensor, nvfp4, quantize_
from dsv4_compile.backend import compile_bound, prepare
from dsv4_compile.binding import BoundGraph, bind_weights, runner
from dsv4_compile.options import Options
from dsv4_compile.testing import Capture, Rewritten, capture
from tests import torch_2_11

K = 64
PARTS = ("codes", "block_scales", "global_scale")


def linear(n: int = K, k: int = K, bias: bool = False) -> nn.Linear:
    return nn.Linear(k, n, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


def activation() -> Tensor:
    return torch.randn(8, K, dtype=torch.bfloat16)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` on NVFP4 operands; a packed weight as it is, a plain one packed first."""
    is_packed = isinstance(weight, Nvfp4Tensor)
    b_codes, b_scales, gsb = (getattr(weight, part) for part in PARTS) if is_packed else nvfp4.quantize_weight(weight)
    a_codes, a_scales, gsa = nvfp4.quantize(x)
    a, b = (nvfp4.scaled_codes(*packed, torch.float64) for packed in ((a_codes, a_scales), (b_codes, b_scales)))
    return ((a @ b.mT).to(torch.float32) * (gsa * gsb)).to(x.dtype)


def compile_recording(model: Callable[..., Any], **kwargs: Any) -> tuple[Callable[..., Any], list[Rewritten]]:
    recorder = Capture(kwargs.pop("options", None))
    return torch.compile(model, backend=recorder, **kwargs), recorder.graphs


class Function(nn.Module):
    """A module that computes a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def bind(
    model: Callable[..., Any], *inputs: Tensor, options: Options | None = None
) -> tuple[fx.GraphModule, BoundGraph]:
    """Dynamo's graph of a model, and what bind_weights makes of it."""
    found: list[tuple[fx.GraphModule, BoundGraph]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        bound = bind_weights(gm, example_inputs, options or Options())
        found.append((gm, bound))
        return runner(bound.gm, bound)

    with torch.inference_mode():
        torch.compile(model, backend=backend)(*inputs)
    ((gm, bound),) = found
    return gm, bound


# What binding leaves alone.


def test_dynamos_graph_is_not_modified() -> None:
    """Guards against rewriting the graph that Dynamo reads after the backend has returned."""
    model = nn.Sequential(linear(), nn.SiLU(), linear(bias=True))
    quantize_(model[0])
    before: list[Any] = []

    def describe(gm: fx.GraphModule) -> list[Any]:
        nodes = [
            (node.op, node.name, node.target, str(node.args), node.type, sorted(node.meta), list(node.users))
            for node in gm.graph.nodes
        ]
        return [nodes, gm.code, [name for name, _ in gm.named_buffers()], [name for name, _ in gm.named_children()]]

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        before.extend(describe(gm))
        bind_weights(gm, example_inputs, Options())
        assert describe(gm) == before
        return gm

    x = activation()
    with torch.inference_mode():
        result = torch.compile(model, backend=backend)(x)
    assert before
    assert torch.equal(result, model(x))


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


def test_users_model_is_not_modified() -> None:
    """Guards against new buffers, or packed weights in the place of plain ones, in the user's state dict."""
    model = nn.Sequential(linear(), nn.SiLU(), linear(bias=True), linear())
    quantize_(model[3])
    model.register_buffer("table", torch.ones(3))
    before = {name: (value, copy.deepcopy(value)) for name, value in model.state_dict(keep_vars=True).items()}
    with torch.inference_mode():
        torch.compile(model, backend=Capture())(activation())
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (value, values_before) in before.items():
        assert after[name] is value
        if isinstance(value, Nvfp4Tensor):
            assert all(
                torch.equal(getattr(value, part).view(torch.uint8), getattr(values_before, part).view(torch.uint8))
                for part in ("codes", "block_scales")
            )
        else:
            assert torch.equal(value, values_before)


def test_what_is_kept() -> None:
    """Guards against binding a bias or an input, or handing a bound weight over on every call."""
    model = nn.Sequential(linear(bias=True), linear())
    gm, bound = bind(model, activation())
    placeholders = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    kept = [placeholders[index] for index in bound.kept]
    assert [name for name in placeholders if "weight" in name] == [name for name in placeholders if name not in kept]
    assert [str(node.target) for node in bound.gm.graph.find_nodes(op="placeholder")] == kept
    assert sorted([*bound.kept, *bound.replaced]) == list(range(len(placeholders)))


def test_parameter_names() -> None:
    """Guards against reports and patterns with Dynamo's names of parameters instead of the model's."""
    model = Function(
        lambda self, x: F.linear(self.layers["one"][0](x), self.weights[1]),
        layers=nn.ModuleDict({"one": nn.ModuleList([linear()])}),
        weights=nn.ParameterList([torch.ones(3), linear().weight]),
    )
    _, bound = bind(model, activation())
    assert [weight.name for weight in bound.weights] == ["layers.one.0.weight", "weights.1"]


# Nothing is copied, nothing is packed twice.


def test_buffers_are_the_weights_parts() -> None:
    """Guards against copies of packed weights."""
    model = nn.Sequential(linear(), linear())
    quantize_(model)
    _, bound = bind(model, activation())
    buffers = dict(bound.gm.named_buffers())
    assert len(buffers) == 6
    for number, layer in enumerate(model):
        for part in PARTS:
            assert buffers[f"dsv4_weight_{number}_{part}"] is getattr(layer.weight, part)


def test_constants_of_the_generated_code_are_the_weights_parts() -> None:
    """Guards against a compiler that copies, lays out anew or inlines the weights that were bound."""
    model = nn.Sequential(linear(), linear(32))
    quantize_(model)
    compiled: list[Any] = []

    def inner_compile(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        compiled.append(compile_fx_inner(gm, inputs, **kwargs))
        return compiled[-1]

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        bound = prepare(gm, example_inputs, Options())
        inputs = [example_inputs[index] for index in bound.kept]
        return runner(compile_bound(bound, inputs, Options(), inner_compile=inner_compile), bound)

    x = activation()
    with torch.inference_mode():
        result = torch.compile(model, backend=backend)(x)
    module = compiled[0].current_callable.__globals__
    held = {value.data_ptr() for value in module.values() if isinstance(value, Tensor)}
    parts = {getattr(layer.weight, part).data_ptr() for layer in model for part in PARTS}
    assert held == parts
    assert torch.equal(result, product(product(x, model[0].weight), model[1].weight))


def test_graphs_share_one_packed_weight() -> None:
    """Guards against packing a weight anew for every graph that a graph break makes."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.layer(x)
        torch._dynamo.graph_break()
        return self.layer(x)

    model, x = Function(forward, layer=linear()), activation()
    result, graphs = capture(model, x)
    first, second = (graph.bound.weights[0].packed for graph in graphs)
    assert first is second
    assert [graph.bound.newly_packed for graph in graphs] == [1, 0]
    assert torch.equal(result, product(product(x, model.layer.weight), model.layer.weight))


def test_recompiles_share_one_packed_weight() -> None:
    """Guards against packing a weight anew when a call has other shapes."""
    model = linear()
    compiled, graphs = compile_recording(model)
    with torch.inference_mode():
        for rows in (8, 5, 3, 1):
            x = torch.randn(rows, K, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), product(x, model.weight))
    assert len(graphs) >= 2
    assert len({id(graph.bound.weights[0].packed) for graph in graphs}) == 1


def test_a_tied_weight_is_bound_once() -> None:
    """Guards against two copies of a weight that two modules share."""
    first, second = linear(), linear()
    second.weight = first.weight
    x = activation()
    result, (graph,) = capture(nn.Sequential(first, second), x)
    assert len(graph.bound.weights) == 1
    assert torch.equal(result, product(product(x, first.weight), first.weight))


# Updates in place.


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_update_of_a_packed_weight(context: Callable[[], Any]) -> None:
    """Guards against compiled code that keeps the values of a packed weight at compile time."""
    model, x, new = linear(), activation(), torch.randn(K, K, dtype=torch.bfloat16)
    quantize_(model)
    compiled, graphs = compile_recording(model)
    with context():
        before = compiled(x)
        model.weight.copy_(new)
        after = compiled(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, product(x, new))
    assert len(graphs) == 1


UPDATES: dict[str, Callable[[nn.Linear, Tensor], Any]] = {
    "copy_": lambda model, new: model.weight.copy_(new),
    "load_state_dict": lambda model, new: model.load_state_dict({"weight": new}),
    "arithmetic": lambda model, new: model.weight.zero_().add_(new),
    "part of it": lambda model, new: (model.weight[:32].copy_(new[:32]), model.weight[32:].copy_(new[32:])),
    "replaced": lambda model, new: setattr(model, "weight", nn.Parameter(new, requires_grad=False)),
    "load_state_dict, assigned": lambda model, new: model.load_state_dict({"weight": new}, assign=True),
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("update", UPDATES)
def test_update_of_a_plain_weight(update: str, context: Callable[[], Any]) -> None:
    """Guards against the packed copy of a plain weight outliving its values."""
    model, x, new = linear(), activation(), torch.randn(K, K, dtype=torch.bfloat16)
    compiled, _ = compile_recording(model)
    with context():
        before = compiled(x)
        UPDATES[update](model, new)
        after = compiled(x)
        again = compiled(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, product(x, new))
    assert torch.equal(again, after)


def test_update_reaches_every_graph() -> None:
    """Guards against an update that only the first graph to run again sees."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.layer(x)
        torch._dynamo.graph_break()
        return self.layer(x)

    model, x = Function(forward, layer=linear()), activation()
    compiled, graphs = compile_recording(model)
    with torch.no_grad():
        compiled(x)
        model.layer.weight.copy_(torch.randn(K, K))
        assert torch.equal(compiled(x), product(product(x, model.layer.weight), model.layer.weight))
    assert len(graphs) == 2


def test_update_before_a_recompile() -> None:
    """Guards against a recompile that takes the packed values of the first compilation."""
    model, new = linear(), torch.randn(K, K, dtype=torch.bfloat16)
    compiled, graphs = compile_recording(model, dynamic=False)
    x, longer = activation(), torch.randn(9, K, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled(x)
        model.weight.copy_(new)
        assert torch.equal(compiled(longer), product(longer, new))
        assert torch.equal(compiled(x), product(x, new))
    assert len(graphs) == 2


def test_update_that_is_not_finite_is_loud() -> None:
    """Guards against serving old values when the new ones cannot be packed."""
    model, x = linear(), activation()
    compiled, _ = compile_recording(model)
    with torch.no_grad():
        compiled(x)
        model.weight[0, 0] = float("nan")
        for _ in range(2):
            with pytest.raises(ValueError, match="must be finite"):
                compiled(x)
        model.weight[0, 0] = 1.0
        assert torch.equal(compiled(x), product(x, model.weight))


def test_update_of_what_was_left_alone() -> None:
    """Guards against freezing biases and unpacked weights along with the packed ones."""
    model = nn.Sequential(linear(bias=True), linear())
    x = activation()
    compiled, graphs = compile_recording(model, options={"exclude": ["1.weight"]})
    with torch.no_grad():
        compiled(x)
        model[0].bias.add_(1)
        model[1].weight.copy_(torch.eye(K))
        result = compiled(x)
        hidden = product(x, model[0].weight).float()
    torch.testing.assert_close(result.float(), hidden + model[0].bias.float(), rtol=2**-7, atol=2**-7)
    assert len(graphs) == 1


# The weights of this call, never another's.


def test_modules_of_one_class_keep_their_own_weights() -> None:
    """Guards against Dynamo reusing the code of one module, whose weights it holds, for another of the same class."""
    x = activation()
    with torch.inference_mode():
        for model in (linear(), linear(), linear()):
            compiled, _ = compile_recording(model)
            assert torch.equal(compiled(x), product(x, model.weight))


class Broken(nn.Module):
    """A layer that Dynamo cannot capture whole, so that each of its instances runs the same code objects."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.layer(x)


@pytest.mark.parametrize("packed", [False, True])
def test_layers_behind_graph_breaks_keep_their_own_weights(packed: bool) -> None:
    """Guards against every layer of a model computing with the weights of the first; and against Dynamo's limit of
    8 recompiles, behind which layers would run in eager mode."""
    model = nn.Sequential(*(Broken() for _ in range(2 if packed else 10)))
    if packed:
        quantize_(model)
    x = expected = activation()
    for layer in model:
        expected = product(expected, layer.layer.weight)
    counters.clear()
    result, graphs = capture(model, x)
    assert torch.equal(result, expected)
    assert len(graphs) == len(model)
    assert not any("recompile_limit" in reason for reason in counters["graph_break"])


@pytest.mark.parametrize("packed", [False, True])
def test_weight_as_an_argument(packed: bool) -> None:
    """Guards against a function of a weight that answers for the weight of its first call."""
    weights = [linear() for _ in range(3)]
    for layer in weights if packed else ():
        quantize_(layer)
    compiled, _ = compile_recording(lambda x, weight: F.linear(x, weight))
    x = activation()
    with torch.inference_mode():
        for layer in [*weights, weights[0]]:
            assert torch.equal(compiled(x, layer.weight), product(x, layer.weight))


def test_weights_in_a_new_dict_each_time() -> None:
    """Guards against compiling again because something around the weights is another object."""
    layer, x = linear(), activation()
    compiled, graphs = compile_recording(lambda x, weights: F.linear(x, weights["w"]))
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(compiled(x, {"w": layer.weight}), product(x, layer.weight))
    assert len(graphs) == 1


def test_packed_after_the_first_call() -> None:
    """Guards against code for plain weights going on after quantize_ has replaced them."""
    model, x = linear(), activation()
    compiled, graphs = compile_recording(model, options={"quantize_weights": False})
    with torch.inference_mode():
        assert torch.equal(compiled(x), F.linear(x, model.weight))
        quantize_(model)
        assert torch.equal(compiled(x), product(x, model.weight))
    assert len(graphs) == 2


def test_other_parts_of_a_packed_weight_are_seen() -> None:
    """A packed weight that is given other parts stays the same object: the compiled code would go on with the parts it
    holds, then be deaf to what is written into the new ones."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).bfloat16()
    quantize_(model)
    compiled = torch.compile(model, backend=Capture())
    x = torch.randn(2, 32).bfloat16()
    with torch.no_grad():
        compiled(x)
        weight = model[0].weight
        codes, other = weight.codes, Nvfp4Tensor.from_float(torch.randn(32, 32).bfloat16())
        weight.codes, weight.block_scales, weight.global_scale = other.codes, other.block_scales, other.global_scale
        expected = model(x)
        torch.testing.assert_close(
            compiled(x).float(), expected.float(), rtol=0.5, atol=float(expected.abs().max()) / 4
        )
        assert weight.codes is codes
        first = compiled(x)
        weight.global_scale.mul_(2)
        assert torch.equal(compiled(x), 2 * first)
        weight.codes, weight.block_scales = other.codes[:16], other.block_scales[:16]
        with pytest.raises(RuntimeError, match="must keep their shapes"):
            compiled(x)


def test_without_guards_another_weight_is_an_error() -> None:
    """Guards against the wrong weights where the user has switched off what makes Dynamo compile again."""
    model, x = linear(), activation()
    skip_guards = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    compiled = torch.compile(model, backend=Capture(), options=skip_guards)
    with torch.inference_mode():
        compiled(x)
        model.weight = linear().weight
        with pytest.raises(RuntimeError, match="leave out guard_filter_fn"):
            compiled(x)


def test_write_inside_the_graph_is_an_error() -> None:
    """Guards against an update of a packed weight that only a copy of it sees."""
    model, other = linear(), linear()
    quantize_(model)
    quantize_(other)

    def forward(x: Tensor) -> Tensor:
        model.weight.copy_(other.weight)
        return model(x)

    with (
        torch.inference_mode(),
        pytest.raises(Exception, match=r"weight must not be written to by the compiled function, got copy_"),
    ):
        torch.compile(forward, backend=Capture())(activation())


# Repeated regions.


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
