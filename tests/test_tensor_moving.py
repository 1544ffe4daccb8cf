"""An ``Nvfp4Tensor`` that is cast, moved, cloned, stored and loaded, alone and as a parameter of a module."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv4_compile.quantization import quantize_
from dsv4_compile.tensor import Nvfp4Tensor
from tests import nvfp4_oracle as oracle
from tests.packed_weights import KINDS, assert_same_weight, assert_unchanged, packed, parameter, parts, snapshot

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_to_dtype_stays_packed(kind: str, dtype: torch.dtype) -> None:
    """Guards against model.half() that unpacks the model, or changes a code."""
    weight = packed(kind)
    moved = weight.to(dtype)
    assert moved.dtype == dtype
    assert_unchanged(moved, snapshot(weight))
    assert (moved is weight) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_to_any_other_dtype_dequantises(dtype: torch.dtype) -> None:
    """Guards against a packed weight that stands for float64 and fails at its first use."""
    weight = packed("matrix")
    moved = weight.to(dtype)
    assert type(moved) is Tensor
    oracle.assert_same_bits(moved, weight.dequantize().to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_to_device(kind: str) -> None:
    """Guards against a part left behind on the old device."""
    weight = parameter(packed(kind))
    moved = weight.to("meta")
    assert {part.device.type for part in (moved, *parts(moved))} == {"meta"}
    assert (moved.shape, moved.dtype) == (weight.shape, weight.dtype)
    module = nn.Module()
    module.weight = weight
    module.to("meta", torch.float16)
    assert isinstance(module.weight, nn.Parameter)
    assert (parts(module.weight)[0].device.type, module.weight.dtype) == ("meta", torch.float16)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_module_moves_packed(mode: Any) -> None:
    """Guards against a module that is moved or copied under inference mode and comes out dequantised, or stays behind."""
    with mode():
        module = nn.Sequential(nn.Linear(64, 32, bias=False)).bfloat16()
        quantize_(module)
        copied = copy.deepcopy(module).to("meta")
        halved = copy.deepcopy(module).half()
    for moved, device, dtype in ((copied, "meta", torch.bfloat16), (halved, "cpu", torch.float16)):
        weight = moved[0].weight
        assert isinstance(weight, Nvfp4Tensor)
        assert (weight.device.type, weight.codes.device.type, weight.dtype) == (device, device, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_clone_and_detach(kind: str) -> None:
    """Guards against a clone that shares memory, and a detach that does not."""
    weight = packed(kind)
    clone, alias = weight.clone(), weight.detach()
    assert_same_weight(clone, weight)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(parts(clone), parts(weight), strict=True))
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(parts(alias), parts(weight), strict=True))


def saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


ROUND_TRIPS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", ROUND_TRIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, way: str) -> None:
    """Guards against a copy that is no parameter any more, has other bits, or shares memory with the original."""
    for weight in (packed(kind, torch.float16), parameter(packed(kind))):
        again = ROUND_TRIPS[way](weight)
        assert_same_weight(again, weight)
        assert isinstance(again, nn.Parameter) == isinstance(weight, nn.Parameter)
        assert not again.requires_grad
        assert again.codes.data_ptr() != weight.codes.data_ptr()


def test_deepcopy_keeps_ties() -> None:
    """Guards against a weight shared by two modules that becomes two, at twice the memory."""
    model = nn.ModuleList([nn.Linear(32, 8), nn.Linear(32, 8)])
    model[0].weight = model[1].weight = parameter(packed("matrix"))
    again = copy.deepcopy(model)
    assert again[0].weight is again[1].weight
    assert_same_weight(again[0].weight, model[0].weight)


class Experts(nn.Module):
    """A linear layer and stacked experts, as a mixture-of-experts block holds them."""

    def __init__(self, is_packed: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 8, dtype=torch.bfloat16)
        self.experts = parameter(torch.randn(3, 8, 32, dtype=torch.bfloat16))
        if is_packed:
            self.proj.weight = parameter(Nvfp4Tensor.from_float(self.proj.weight))
            self.experts = parameter(Nvfp4Tensor.from_float(self.experts))

    def weights(self) -> list[Tensor]:
        return [self.proj.weight, self.experts]


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_packed_into_packed(assign: bool) -> None:
    """Guards against a checkpoint that loses a bit on its way into a packed model."""
    source, target = Experts(is_packed=True), Experts(is_packed=True)
    before = target.weights()
    assert not target.load_state_dict(source.state_dict(), assign=assign).missing_keys
    for old, actual, expected in zip(before, target.weights(), source.weights(), strict=True):
        assert_same_weight(actual, expected)
        assert isinstance(actual, nn.Parameter)
        assert (actual is old) != assign


def test_load_state_dict_plain_into_packed() -> None:
    """Guards against plain values that are refused or not quantised; with assign=True the plain ones take over."""
    source, target = Experts(is_packed=False), Experts(is_packed=True)
    target.load_state_dict(source.state_dict())
    for actual, plain in zip(target.weights(), source.weights(), strict=True):
        assert_same_weight(actual, Nvfp4Tensor.from_float(plain))
    target.load_state_dict(source.state_dict(), assign=True)
    for actual, plain in zip(target.weights(), source.weights(), strict=True):
        assert not isinstance(actual, Nvfp4Tensor)
        oracle.assert_same_bits(actual.detach(), plain.detach())


def test_load_state_dict_packed_into_plain() -> None:
    """Guards against codes read as numbers; with assign=True the packed weights take over."""
    source, target = Experts(is_packed=True), Experts(is_packed=False)
    target.load_state_dict(source.state_dict())
    for actual, weight in zip(target.weights(), source.weights(), strict=True):
        assert isinstance(weight, Nvfp4Tensor)
        oracle.assert_same_bits(actual.detach(), weight.dequantize())
    target.load_state_dict(source.state_dict(), assign=True)
    for actual, weight in zip(target.weights(), source.weights(), strict=True):
        assert_same_weight(actual, weight)


def test_load_state_dict_of_another_shape() -> None:
    """Guards against experts of another model, loaded by broadcasting."""
    target, state = Experts(is_packed=True), Experts(is_packed=False).state_dict()
    state["experts"] = state["experts"][:1]
    before = snapshot(target.experts)
    with pytest.raises(RuntimeError, match="size mismatch for experts"):
        target.load_state_dict(state)
    assert_unchanged(target.experts, before)


def test_module_to_dtype_and_back() -> None:
    """Guards against model.half() that leaves weights of two dtypes in one layer; biases and values follow."""
    model = Experts(is_packed=True)
    before = [snapshot(weight) for weight in model.weights()]
    model.half()
    y = model.proj(torch.randn(2, 32, dtype=torch.float16))
    assert y.dtype == torch.float16
    model.bfloat16()
    for weight, clones in zip(model.weights(), before, strict=True):
        assert weight.dtype == torch.bfloat16
        assert_unchanged(weight, clones)
