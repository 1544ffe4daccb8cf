"""Binding: it is always the caller's own weights that are read, with the values that they have at the call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dsv4_compile import Nvfp4Tensor, quantize_
from dsv4_compile.testing import Capture, capture
from tests.bound_layers import Function, K, activation, compile_recording, linear, product

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
