"""Binding: the caller's graph and model stay as they are; weights stand in the compiled code once, uncopied."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx_inner

from dsv4_compile import Nvfp4Tensor, quantize_
from dsv4_compile.backend import compile_bound, prepare
from dsv4_compile.binding import bind_weights, runner
from dsv4_compile.options import Options
from dsv4_compile.testing import Capture, capture
from tests.bound_layers import PARTS, Function, K, activation, bind, compile_recording, linear, product

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
