"""``dequantize_nvfp4``: what eager mode and unmatched regions compute with."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsv4_compile.ops import dequantize_nvfp4
from tests import gpu
from tests import nvfp4_oracle as oracle

OP = torch.ops.dsv4.dequantize_nvfp4.default
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema fails on fp8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def packed(*lead: int, k: int = 32, scale_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Any codes, any finite block scales, global scales that are no powers of two."""
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8)
    block_scales = torch.randint(0, 127, (*lead, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes, block_scales, torch.rand(scale_shape) * 0.01 + 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lead", "scale_shape"),
    [
        ((6,), ()),
        ((6,), (3,)),  # gate, up and one more merged in one weight
        ((6,), (6,)),  # an activation with one scale a row
        ((3, 4), ()),
        ((3, 4), (3,)),
        ((3, 4), (3, 2)),
        ((2, 3, 4), (2, 3)),
        ((), ()),
        ((0,), ()),
        ((0,), (2,)),
        ((3, 0), (3,)),
    ],
)
def test_matches_reference(lead: tuple[int, ...], scale_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Guards against a product in bf16, a rounding before the global scale, and a scale on the wrong rows."""
    parts = packed(*lead, scale_shape=scale_shape)
    expected = oracle.to_dtype(oracle.dequantize(*oracle.as_packed(parts)), dtype)
    oracle.assert_same_bits(dequantize_nvfp4(*parts, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_known_values(dtype: torch.dtype) -> None:
    """Guards against swapped nibbles or scales: 6 * 2 * 0.25 = 3, -0.5 * 2 * 0.25 = -0.25; block 1: -1 * 448 / 4."""
    codes = torch.tensor([[0x97, *[0] * 7, 0x0A, *[0] * 7]], dtype=torch.uint8)
    block_scales = torch.tensor([[2.0, 448.0]]).to(torch.float8_e4m3fn)
    y = dequantize_nvfp4(codes, block_scales, torch.tensor(0.25), dtype)
    assert y.dtype == dtype
    assert y[0, [0, 1, 2, 16, 17]].tolist() == [3.0, -0.25, 0.0, -112.0, 0.0]


def test_nan_scale_is_loud() -> None:
    """Guards against codes of 0 that hide a NaN block scale: the block is NaN, its neighbour is not."""
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    block_scales = torch.ones(2, 2).to(torch.float8_e4m3fn)
    block_scales[0, 1] = float("nan")
    y = dequantize_nvfp4(codes, block_scales, torch.tensor(1.0))
    assert y.isnan().view(2, 2, 16).all(-1).tolist() == [[False, True], [False, False]]
    assert y.isnan().sum() == 16


@pytest.mark.parametrize(
    ("lead", "scale_shape"), [((6,), (2,)), ((2, 4), (2,)), ((2, 4), (2, 2)), ((0,), ()), ((), ())]
)
def test_opcheck(lead: tuple[int, ...], scale_shape: tuple[int, ...]) -> None:
    """Guards against a fake that differs from the kernel."""
    torch.library.opcheck(OP, (*packed(*lead, scale_shape=scale_shape), torch.bfloat16), test_utils=OPCHECKS)


def test_non_contiguous() -> None:
    """Guards against bytes read in storage order: every second row, every second column of codes."""
    codes, block_scales, global_scale = packed(8, k=64)
    views = codes[::2, ::2], block_scales[::2, ::2], global_scale
    torch.library.opcheck(OP, (*views, torch.float32), test_utils=OPCHECKS)
    expected = dequantize_nvfp4(*(view.contiguous() for view in views))
    oracle.assert_same_bits(dequantize_nvfp4(*views), expected)
    oracle.assert_same_bits(
        dequantize_nvfp4(*views, torch.float32),
        oracle.to_dtype(oracle.dequantize(*oracle.as_packed(views)), torch.float32),
    )


def test_leaves_its_inputs_alone() -> None:
    """Guards against a kernel that scales in place (opcheck's test_schema, which would tell, fails on fp8)."""
    parts = packed(2, 4, scale_shape=(2, 2))
    before = [part.clone() for part in parts]
    dequantize_nvfp4(*parts, torch.float32)
    for part, clone in zip(parts, before, strict=True):
        oracle.assert_same_bits(part, clone)


CODES, SCALES = torch.zeros(2, 4, 16, dtype=torch.uint8), torch.ones(2, 4, 2).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("parts", "dtype", "message"),
    [
        ((CODES.int(), SCALES, torch.ones(())), torch.float32, "codes must be uint8, got int32"),
        ((CODES, SCALES.float(), torch.ones(())), torch.float32, "block_scales must be float8_e4m3fn, got float32"),
        ((CODES, SCALES, torch.ones(()).double()), torch.float32, "global_scale must be float32, got float64"),
        (
            (CODES, SCALES[:1], torch.ones(())),
            torch.float32,
            r"block_scales must have the leading shape of codes \(2, 4, 16\), got \(1, 4, 2\)",
        ),
        (
            (CODES[..., :15], SCALES, torch.ones(())),
            torch.float32,
            "codes must have 8 bytes for each of the 2 block scales of a row, got 15",
        ),
        (
            (CODES, SCALES, torch.ones(3)),
            torch.float32,
            r"global_scale must be 0-d, one a matrix, or segments that divide the rows of codes \(2, 4, 16\), "
            r"got shape \(3,\)",
        ),
        (
            (CODES, SCALES, torch.ones(2, 3)),
            torch.float32,
            r"global_scale must be 0-d, one a matrix, or segments that divide the rows of codes \(2, 4, 16\), "
            r"got shape \(2, 3\)",
        ),
        (
            (CODES, SCALES, torch.ones(())),
            torch.float64,
            "dtype must be bfloat16, float16 or float32, got torch.float64",
        ),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects(parts: tuple[Tensor, ...], dtype: torch.dtype, message: str, device: str) -> None:
    """Guards against parts of different weights taken together without a word."""
    with pytest.raises(RuntimeError, match=f"^dequantize_nvfp4: {message}$"):
        dequantize_nvfp4(*(part.to(device) for part in parts), dtype)


def test_compiles() -> None:
    """Guards against a graph break, and against a second compilation for another number of rows."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *parts: dequantize_nvfp4(*parts) + 1, fullgraph=True, dynamic=True, backend=counter)
    for rows in (4, 6):
        parts = packed(rows)
        oracle.assert_same_bits(compiled(*parts), dequantize_nvfp4(*parts) + 1)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_matches_the_cpu(dtype: torch.dtype) -> None:
    """Guards against a scale of the wrong rows, NaN scales lost, fp16 overflow that saturates, strides and empty operands."""
    for lead, k, shape in (
        ((6,), 32, ()), ((6,), 4096, (3,)), ((300,), 48, (300,)), ((3, 4), 528, (3,)), ((3, 40), 528, (3, 2)),
        ((2, 3, 4), 32, (2, 3)), ((), 32, ()), ((0,), 32, ()), ((3, 0), 32, (3,)), ((5,), 0, ()),
    ):  # fmt: skip
        codes, block_scales, global_scale = packed(*lead, k=k, scale_shape=shape)
        block_scales.view(torch.uint8)[torch.rand(block_scales.shape) < 0.1] = 0x7F
        for scale in (global_scale, global_scale * 1e4):
            (out,) = gpu.on_gpu(dequantize_nvfp4, codes, block_scales, scale, dtype)
            oracle.assert_same_bits(out, dequantize_nvfp4(codes, block_scales, scale, dtype))
    codes, block_scales, global_scale = packed(8, k=64)
    views = codes[::2, ::2], block_scales[::2, ::2], global_scale
    oracle.assert_same_bits(gpu.on_gpu(dequantize_nvfp4, *views, dtype)[0], dequantize_nvfp4(*views, dtype))
