"""``Nvfp4Tensor``: what it stands for, in eager operations, and experts and rows of it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dsv4_compile import nvfp4
from dsv4_compile.tensor import Nvfp4Tensor
from tests import nvfp4_oracle as oracle
from tests.packed_weights import KINDS, packed, parameter, parts

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


def test_global_scale_of_an_expert_is_its_own() -> None:
    """Guards against expand_global_scale's two readings of one dimension: [E] of experts, [S] of a matrix's rows."""
    codes = torch.full((2, 2, 8), 0x22, dtype=torch.uint8)  # every code 2: 1.0
    block_scales = torch.ones(2, 2, 1).to(torch.float8_e4m3fn)
    experts = Nvfp4Tensor(codes, block_scales, torch.tensor([1.0, 3.0]))
    assert experts.dequantize()[:, :, 0].tolist() == [[1.0, 1.0], [3.0, 3.0]]
    segments = Nvfp4Tensor(codes[0], block_scales[0], torch.tensor([1.0, 3.0]))
    assert segments.dequantize()[:, 0].tolist() == [1.0, 3.0]
    assert nvfp4.expand_global_scale(torch.tensor([[1.0, 3.0]] * 2), (2,), 2).tolist() == [[[1.0], [3.0]]] * 2
