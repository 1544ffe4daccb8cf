"""``Nvfp4Tensor``: a packed weight in the place of a parameter, in everything that an eager model does with parameters."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dsv4_compile import nvfp4
from dsv4_compile.quantization import quantize_
from dsv4_compile.tensor import Nvfp4Tensor
from tests import nvfp4_oracle as oracle

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# name -> leading shape, shape of the global scale
KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "matrix": ((8,), ()),
    "segments": ((8,), (2,)),
    "experts": ((3, 8), (3,)),
    "experts, one scale": ((3, 8), ()),
    "experts with segments": ((3, 8), (3, 2)),
}


def packed(kind: str, dtype: torch.dtype = torch.bfloat16, k: int = 32) -> Nvfp4Tensor:
    """Any codes and finite block scales; global scales that are no powers of two."""
    lead, scale_shape = KINDS[kind]
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8)
    block_scales = torch.randint(0, 127, (*lead, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return Nvfp4Tensor(codes, block_scales, torch.rand(scale_shape) * 1e-3 + 1e-4, dtype=dtype)


def parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(weight, Nvfp4Tensor)
    return weight.codes, weight.block_scales, weight.global_scale


def snapshot(weight: Tensor) -> list[Tensor]:
    return [part.clone() for part in parts(weight)]


def assert_same_weight(actual: Tensor, expected: Tensor) -> None:
    """Packed, the same dtype and shape, and every part bitwise the same."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    for left, right in zip(parts(actual), parts(expected), strict=True):
        oracle.assert_same_bits(left, right)


def assert_unchanged(weight: Tensor, before: list[Tensor]) -> None:
    for left, right in zip(parts(weight), before, strict=True):
        oracle.assert_same_bits(left, right)


def parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


# --- making one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_stands_for_its_dequantised_values(kind: str, dtype: torch.dtype) -> None:
    """Guards against a wrapper whose shape, dtype or values are not those of the weight."""
    weight = packed(kind, dtype)
    assert (tuple(weight.shape), weight.dtype, weight.requires_grad) == ((*KINDS[kind][0], 32), dtype, False)
    expected = oracle.to_dtype(oracle.dequantize(*oracle.as_packed(parts(weight))), dtype)
    oracle.assert_same_bits(weight.dequantize(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 32), (3, 4, 32)])
def test_from_float_quantises(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Guards against one scale for all experts, another dtype, and a graph kept alive by a weight that wants gradients."""
    weight = torch.randn(shape, dtype=dtype, requires_grad=True)
    quantised = Nvfp4Tensor.from_float(weight)
    assert quantised.dtype == dtype
    assert not quantised.requires_grad
    assert quantised.global_scale.shape == shape[:-2]
    for index in range(shape[0]) if len(shape) == 3 else [...]:
        expected = oracle.quantize(oracle.as_float64(weight.detach()[index]), "tensor")
        oracle.assert_packed_equal(tuple(part[index] for part in parts(quantised)), expected)
    assert quantised.packed_bytes == weight.numel() // 2 + weight.numel() // 16 + 4 * math.prod(shape[:-2])


@pytest.mark.parametrize("shape", [(32,), (4, 24), (2, 2, 2, 32)])
def test_from_float_rejects_shapes(shape: tuple[int, ...]) -> None:
    """Guards against a block that spans two rows."""
    message = r"^Nvfp4Tensor.from_float: weight must be a bf16, fp16 or fp32 tensor \[N, K\] or \[E, N, K\] with K "
    with pytest.raises(ValueError, match=message + r"divisible by 16, got torch.float32 \("):
        Nvfp4Tensor.from_float(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_from_float_rejects_dtypes(dtype: torch.dtype) -> None:
    """Guards against a packed weight that stands for a dtype which nothing dequantises to."""
    with pytest.raises(ValueError, match=r"^Nvfp4Tensor.from_float: weight must be a bf16, .*, got torch"):
        Nvfp4Tensor.from_float(torch.zeros(4, 32, dtype=dtype))


def test_rejects_parts_that_do_not_belong_together() -> None:
    """Guards against an error that first appears in the forward pass, far from the loader that made it."""
    codes, block_scales, global_scale = parts(packed("matrix"))
    with pytest.raises(RuntimeError, match=r"^Nvfp4Tensor: block_scales must be float8_e4m3fn, got uint8$"):
        Nvfp4Tensor(codes, block_scales.view(torch.uint8), global_scale)
    with pytest.raises(RuntimeError, match=r"^Nvfp4Tensor: codes must have 8 bytes for each of the 1 block scales"):
        Nvfp4Tensor(codes, block_scales[:, :1], global_scale)
    with pytest.raises(RuntimeError, match=r"^Nvfp4Tensor: global_scale must be 0-d, .*, got shape \(3,\)$"):
        Nvfp4Tensor(codes, block_scales, torch.ones(3))
    with pytest.raises(RuntimeError, match=r"^Nvfp4Tensor: codes must be 2-D or 3-D, got shape \(16,\)$"):
        Nvfp4Tensor(codes[0], block_scales[0], global_scale)
    with pytest.raises(
        RuntimeError, match=r"^Nvfp4Tensor: dtype must be bfloat16, float16 or float32, got torch.float64$"
    ):
        Nvfp4Tensor(codes, block_scales, global_scale, dtype=torch.float64)


def test_repr() -> None:
    """Guards against a repr that prints the dequantised values of a whole weight, or hides what it is."""
    assert repr(packed("matrix")) == ("Nvfp4Tensor((8, 32), dtype=torch.bfloat16, device='cpu', one global scale)")
    assert repr(parameter(packed("experts with segments", torch.float16))) == (
        "Parameter(Nvfp4Tensor((3, 8, 32), dtype=torch.float16, device='cpu', (3, 2) global scales))"
    )
    layer = nn.Linear(32, 8)
    layer.weight = parameter(packed("matrix"))
    assert repr(layer) == "Linear(in_features=32, out_features=8, bias=True)"


# --- eager operations ------------------------------------------------------------------------------------------------

EAGER_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda w, x: F.linear(x, w[-1] if w.dim() == 3 else w),
    "matmul": lambda w, x: x @ w.transpose(-1, -2),
    "t": lambda w, x: w.mT,
    "view": lambda w, x: w.reshape(-1, 2, 16),
    "add": lambda w, x: w + 1,
    "column": lambda w, x: w[..., 5],
    "row range and column": lambda w, x: w[..., 2:4, :7],
    "mask": lambda w, x: w[torch.arange(w.shape[0]) % 2 == 0],
    "unsqueeze": lambda w, x: w[None],
    "cat": lambda w, x: torch.cat([w, w]),
    "stack": lambda w, x: torch.stack(list(w)),
    "norm": lambda w, x: w.norm(),
}


@pytest.mark.parametrize("op", EAGER_OPS)
@pytest.mark.parametrize("kind", KINDS)
def test_eager_operations_dequantise(kind: str, op: str) -> None:
    """Guards against an operation that fails, or computes with codes: each gives what it gives on plain values."""
    weight, x = packed(kind), torch.randn(5, 32, dtype=torch.bfloat16)
    actual, expected = EAGER_OPS[op](weight, x), EAGER_OPS[op](weight.dequantize(), x)
    assert type(actual) is Tensor
    oracle.assert_same_bits(actual, expected)


# Whether the weight was made, and is used, under inference mode.
MODES = [(False, False), (False, True), (True, True), (True, False)]


@pytest.mark.parametrize(("is_made_under", "is_used_under"), MODES)
def test_grouped_linear_of_o_a_proj(is_made_under: bool, is_used_under: bool) -> None:
    """Guards against the view → transpose → bmm of V4's o_a_proj, which reads one weight as [groups, N, K].

    A view of a parameter that was made outside of inference mode must not be an inference tensor.
    """
    with torch.inference_mode(is_made_under):
        layer = nn.Linear(32, 8, bias=False, dtype=torch.bfloat16)
        layer.weight = parameter(packed("matrix"))
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    with torch.inference_mode(is_used_under):
        grouped = layer.weight.view(2, -1, 32).transpose(1, 2)
        actual = torch.bmm(x, grouped)
        expected = torch.bmm(x, layer.weight.dequantize().view(2, 4, 32).transpose(1, 2))
    oracle.assert_same_bits(actual, expected)


def test_gradients_of_the_input_flow() -> None:
    """Guards against a frozen packed weight that cuts the graph of what lies before it."""
    weight, x = packed("matrix", torch.float32), torch.randn(3, 32, requires_grad=True)
    F.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 32))


def test_compiles_as_a_graph_input() -> None:
    """Guards against a wrapper that Dynamo and AOT cannot take apart, under a backend that knows nothing of it."""
    assert is_traceable_wrapper_subclass(packed("matrix"))
    layer = nn.Linear(32, 8, bias=False, dtype=torch.bfloat16)
    layer.weight = parameter(packed("segments"))
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        oracle.assert_same_bits(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


# --- experts and rows ------------------------------------------------------------------------------------------------

INDICES: dict[str, Any] = {
    "int": 1,
    "negative": -1,
    "0-d tensor": torch.tensor(2),
    "list": [2, 0],
    "tensor": torch.tensor([1, -1, 1]),
    "slice": slice(1, 3),
    "slice with a step": slice(0, 3, 2),
    "empty slice": slice(3, 3),
    "all": slice(None),
}


@pytest.mark.parametrize(("is_made_under", "is_used_under"), MODES)
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("kind", ["experts", "experts, one scale", "experts with segments"])
def test_indexing_experts_stays_packed(kind: str, index: str, is_made_under: bool, is_used_under: bool) -> None:
    """Guards against an expert with its neighbour's global scale, and against dequantising all to read one."""
    with torch.inference_mode(is_made_under):
        weight = parameter(packed(kind))
    with torch.inference_mode(is_used_under):
        expert = weight[INDICES[index]]
        assert isinstance(expert, Nvfp4Tensor)
        oracle.assert_same_bits(expert.dequantize(), weight.dequantize()[INDICES[index]])


def test_indexing_one_expert_copies_nothing() -> None:
    """Guards against a copy of every expert on every token of a loop over experts."""
    weight = packed("experts with segments")
    for part, whole in zip(parts(weight[1]), parts(weight), strict=True):
        assert part.data_ptr() == whole[1].data_ptr()


@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, None), slice(1, 8, 3), slice(-2, None)])
def test_slicing_rows(rows: slice) -> None:
    """Guards against rows with the scale of another segment: packed with one global scale, dequantised with several."""
    weight = packed("matrix")
    assert isinstance(weight[rows], Nvfp4Tensor)
    oracle.assert_same_bits(weight[rows].dequantize(), weight.dequantize()[rows])
    weight = packed("segments")
    oracle.assert_same_bits(weight[rows], weight.dequantize()[rows])
    weight = packed("experts with segments")
    oracle.assert_same_bits(weight[1][rows], weight.dequantize()[1, rows])


# --- writing ---------------------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(1.0),
    "normal_": lambda w: nn.init.normal_(w),
    "out": lambda w: torch.add(w.dequantize(), 1, out=w),
    "index_put_": lambda w: w.__setitem__([0, 1], torch.zeros(32, dtype=w.dtype)),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", KINDS)
def test_in_place_operations_are_refused(kind: str, write: str) -> None:
    """Guards against a write into a dequantised copy, which would vanish: out= and foreach too."""
    weight = packed(kind)
    before = snapshot(weight)
    with pytest.raises(
        RuntimeError,
        match=r"^Nvfp4Tensor: aten\.\S+ would write into a packed weight, which only copy_ may do; dequantize",
    ):
        WRITES[write](weight)
    assert_unchanged(weight, before)


def test_in_place_operations_on_others_read_a_packed_weight() -> None:
    """Guards against a check that refuses an operand for being in the same call as a written tensor."""
    weight, total = packed("matrix"), torch.ones(8, 32, dtype=torch.bfloat16)
    total.add_(weight)
    torch.add(total, weight, out=total)
    oracle.assert_same_bits(total, 1 + weight.dequantize() + weight.dequantize())


@pytest.mark.parametrize("kind", KINDS)
def test_copy_of_a_packed_weight_is_bitwise(kind: str) -> None:
    """Guards against dequantising and quantising again on the way."""
    target, source = packed(kind), packed(kind)
    addresses = [part.data_ptr() for part in parts(target)]
    assert target.copy_(source) is target
    assert_same_weight(target, source)
    assert [part.data_ptr() for part in parts(target)] == addresses  # an in-place update stays visible


@pytest.mark.parametrize("kind", KINDS)
def test_copy_of_a_plain_weight_quantises(kind: str) -> None:
    """Guards against a plain checkpoint that cannot be loaded into a packed model, or lands under stale scales."""
    target, source = packed(kind), torch.randn(*KINDS[kind][0], 32)
    target.copy_(source)
    assert target.dtype == torch.bfloat16
    matrices = source if target.global_scale.dim() and source.dim() == 3 else [source]
    rows = [target] if len(matrices) == 1 else list(range(3))
    for matrix, index in zip(matrices, rows, strict=True):
        expected = oracle.quantize(oracle.as_float64(matrix), "tensor")
        codes, block_scales, global_scale = parts(target) if index is target else parts(target[index])
        assert (global_scale == global_scale.flatten()[0]).all()
        oracle.assert_packed_equal((codes, block_scales, global_scale.flatten()[0]), expected)


def test_copy_into_an_expert() -> None:
    """Guards against a write into a copy of the expert: what a loader does expert by expert."""
    weight, source = parameter(packed("experts with segments")), torch.randn(8, 32, dtype=torch.bfloat16)
    before = snapshot(weight)
    weight[1].copy_(source)
    oracle.assert_same_bits(weight[1].dequantize(), Nvfp4Tensor.from_float(source).dequantize())
    weight[2] = torch.zeros(8, 32)
    assert weight.dequantize()[2].count_nonzero() == 0
    for part, clone in zip(parts(weight), before, strict=True):
        oracle.assert_same_bits(part[0], clone[0])


@pytest.mark.parametrize(
    "part_of",
    [
        lambda: packed("matrix")[:4],
        lambda: packed("matrix")[:4].detach(),
        lambda: packed("experts, one scale")[1],
        lambda: packed("experts")[1][2:6],
    ],
)
def test_copy_into_a_part_with_a_shared_global_scale_is_refused(part_of: Callable[[], Tensor]) -> None:
    """Guards against a new global scale for a few rows, which silently rescales all others (merged gate and up)."""
    target = part_of()
    before = snapshot(target)
    with pytest.raises(
        ValueError, match=r"^Nvfp4Tensor.copy_: target must have a global scale of its own, got a part of"
    ):
        target.copy_(torch.ones(target.shape))
    assert_unchanged(target, before)


def test_copy_into_the_whole_through_a_slice() -> None:
    """Guards against refusing param[:] = value, a slice that leaves nothing out."""
    weight, source = packed("matrix"), packed("matrix")
    weight[:8] = source
    assert_same_weight(weight, source)
    gathered = weight[[0, 1]] if weight.dim() == 3 else packed("experts, one scale")[[0, 2]]
    gathered.copy_(torch.ones(2, 8, 32))  # a copy, with a global scale of its own
    assert (gathered.dequantize() == 1).all()


def test_copy_into_a_plain_tensor_dequantises() -> None:
    """Guards against codes copied as numbers."""
    weight, target = packed("matrix"), torch.zeros(8, 32)
    target.copy_(weight)
    oracle.assert_same_bits(target, weight.dequantize().float())


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("matrix", torch.zeros(8, 16), r"shape \(8, 32\), got \(8, 16\)"),
        ("matrix", torch.zeros(1, 8, 32), r"shape \(8, 32\), got \(1, 8, 32\)"),
        ("matrix", packed("experts"), r"shape \(8, 32\) and global scale \(\), got \(3, 8, 32\) and \(3,\)"),
        ("matrix", packed("segments"), r"shape \(8, 32\) and global scale \(\), got \(8, 32\) and \(2,\)"),
        (
            "segments",
            Nvfp4Tensor(*parts(packed("segments"))[:2], torch.ones(4)),
            r"shape \(8, 32\) and global scale \(2,\), got \(8, 32\) and \(4,\)",
        ),
        (
            "experts",
            packed("experts with segments"),
            r"shape \(3, 8, 32\) and global scale \(3,\), got \(3, 8, 32\) and \(3, 2\)",
        ),
    ],
)
def test_copy_rejects(kind: str, source: Tensor, message: str) -> None:
    """Guards against a weight that is half overwritten when its global scales do not fit."""
    target = packed(kind)
    before = snapshot(target)
    with pytest.raises(ValueError, match=f"^Nvfp4Tensor.copy_: source must have {message}$"):
        target.copy_(source)
    assert_unchanged(target, before)


@pytest.mark.parametrize("kind", KINDS)
def test_copy_of_nan_is_refused(kind: str) -> None:
    """Guards against a damaged checkpoint that overwrites half of a weight before it is noticed."""
    target, source = packed(kind), torch.randn(*KINDS[kind][0], 32)
    source.view(-1)[-1] = math.nan
    before = snapshot(target)
    with pytest.raises(ValueError, match="must be finite"):
        target.copy_(source)
    assert_unchanged(target, before)


# --- moving, copying, storing ----------------------------------------------------------------------------------------


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


def test_global_scale_of_an_expert_is_its_own() -> None:
    """Guards against expand_global_scale's two readings of one dimension: [E] of experts, [S] of a matrix's rows."""
    codes = torch.full((2, 2, 8), 0x22, dtype=torch.uint8)  # every code 2: 1.0
    block_scales = torch.ones(2, 2, 1).to(torch.float8_e4m3fn)
    experts = Nvfp4Tensor(codes, block_scales, torch.tensor([1.0, 3.0]))
    assert experts.dequantize()[:, :, 0].tolist() == [[1.0, 1.0], [3.0, 3.0]]
    segments = Nvfp4Tensor(codes[0], block_scales[0], torch.tensor([1.0, 3.0]))
    assert segments.dequantize()[:, 0].tolist() == [1.0, 3.0]
    assert nvfp4.expand_global_scale(torch.tensor([[1.0, 3.0]] * 2), (2,), 2).tolist() == [[[1.0], [3.0]]] * 2
