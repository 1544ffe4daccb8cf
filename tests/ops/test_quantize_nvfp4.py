"""``quantize_nvfp4`` as an operator: shapes, strides, dtypes, errors, compilation. The format is in test_nvfp4.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsv4_compile.nvfp4 import GRANULARITIES
from dsv4_compile.ops import quantize_nvfp4
from tests import nvfp4_oracle as oracle

OP = torch.ops.dsv4.quantize_nvfp4.default
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def layouts() -> dict[str, Tensor]:
    """One tensor of each rank and stride pattern that a model can hand over."""
    x = torch.randn(6, 4, 64)
    return {
        "rank 1": x[0, 0],
        "rank 2": x[0],
        "rank 3": x,
        "rank 4": x.view(3, 2, 4, 64),
        "zero rows": x[:0],
        "zero columns": x[..., :0],
        "transposed": torch.randn(64, 5).t(),
        "every second row": x[::2],
        "column slice": x[..., 16:48],
        "last step 2": torch.randn(4, 64)[:, ::2],
        "expanded": x[0, :1].expand(3, 64),
    }


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", layouts())
def test_matches_reference(layout: str, granularity: str) -> None:
    """Guards against blocks cut across rows, or read by storage order instead of strides; outputs are contiguous."""
    x = layouts()[layout]
    parts = quantize_nvfp4(x, granularity)
    oracle.assert_packed_equal(parts, oracle.quantize(oracle.as_float64(x), granularity))
    fake = torch.ops.dsv4.quantize_nvfp4(x.to("meta"), granularity)
    for part, meta in zip(parts, fake, strict=True):
        assert part.is_contiguous()
        assert (part.shape, part.stride(), part.dtype) == (meta.shape, meta.stride(), meta.dtype)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)
@given(data=st.data())
def test_matches_reference_for_any_values(dtype: torch.dtype, granularity: str, data: st.DataObject) -> None:
    """Guards against an operator that computes in its input's dtype: any bits, NaN and Inf among them."""
    x = data.draw(oracle.activations(dtype, finite=False))
    oracle.assert_packed_equal(quantize_nvfp4(x, granularity), oracle.quantize(oracle.as_float64(x), granularity))


def test_known_values() -> None:
    """Guards against a scale that is divided where it should multiply; amax 2688, so gsa = 2688 / (6 * 448) = 1.

    Block 0: s = 2688 / 6 = 448, codes 6 (7) and 448 / 448 = 1 (2). Block 1: s = 12 / 6 = 2, codes -6 (15), 3 / 2 (3).
    """
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0], x[0, 1], x[0, 16], x[0, 31] = 2688.0, 448.0, -12.0, 3.0
    codes, block_scales, global_scale = quantize_nvfp4(x)
    assert codes.tolist() == [[0x27, *[0] * 7, 0x0F, *[0] * 6, 0x30]]
    assert block_scales.float().tolist() == [[448.0, 2.0]]
    assert global_scale.item() == 1.0


def test_default_granularity_is_tensor() -> None:
    """Guards against a default that changes what a model computes."""
    x = torch.randn(3, 32)
    oracle.assert_packed_equal(quantize_nvfp4(x), oracle.quantize(oracle.as_float64(x), "tensor"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", ["rank 1", "rank 2", "rank 3", "zero rows", "transposed"])
def test_opcheck(layout: str, granularity: str) -> None:
    """Guards against a fake that differs from the kernel, a mutated input and an output that aliases one."""
    torch.library.opcheck(OP, (layouts()[layout], granularity))


@pytest.mark.parametrize(
    ("x", "granularity", "message"),
    [
        (torch.zeros(2, 32, dtype=torch.float64), "tensor", "x must be bfloat16 or float16 or float32, got float64"),
        (torch.zeros(2, 32, dtype=torch.int32), "tensor", "x must be bfloat16 or float16 or float32, got int32"),
        (torch.zeros(2, 24), "tensor", r"x must have a last dimension divisible by 16, got shape \(2, 24\)"),
        (torch.zeros(()), "tensor", r"x must have a last dimension divisible by 16, got shape \(\)"),
        (torch.zeros(2, 32), "row", "granularity must be one of tensor, tensor_pow2, token, got 'row'"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects(x: Tensor, granularity: str, message: str, device: str) -> None:
    """Guards against a check that only one of fake and real makes."""
    with pytest.raises(RuntimeError, match=f"^quantize_nvfp4: {message}$"):
        quantize_nvfp4(x.to(device), granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compiles(granularity: str) -> None:
    """Guards against a graph break, and against a second compilation for another number of rows."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: quantize_nvfp4(x * 2, granularity), fullgraph=True, dynamic=True, backend=counter
    )
    for rows in (5, 9):
        x = torch.randn(rows, 32)
        oracle.assert_packed_equal(compiled(x), oracle.quantize(oracle.as_float64(x * 2), granularity))
    assert counter.frame_count == 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_contains_non_finite_values(value: float, granularity: str) -> None:
    """Guards against one bad row that changes any bit of another row."""
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    x[2, 7] = 0.0
    expected = quantize_nvfp4(x, granularity)
    x[2, 7] = value
    codes, block_scales, global_scale = quantize_nvfp4(x, granularity)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(codes[others], expected[0][others])
    assert torch.equal(block_scales.view(torch.uint8)[others], expected[1].view(torch.uint8)[others])
    assert torch.equal(global_scale, expected[2])
    assert block_scales[2].float().isnan().tolist() == [True, False, False, False]
