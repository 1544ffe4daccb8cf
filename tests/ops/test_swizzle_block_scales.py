"""``swizzle_block_scales`` and its inverse as operators. The layout itself is checked in test_nvfp4.py."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsv4_compile.ops import swizzle_block_scales, unswizzle_block_scales
from tests import gpu
from tests import nvfp4_oracle as oracle

OP = torch.ops.dsv4.swizzle_block_scales.default
INVERSE_OP = torch.ops.dsv4.unswizzle_block_scales.default
FP8_OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = (torch.uint8, torch.float8_e4m3fn)


def random_scales(rows: int, cols: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(1, 127, (rows, cols), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype: torch.dtype) -> None:
    """Guards against a wrong offset: element by element by the formula, R = 300, C = 33, padding zero."""
    scales = random_scales(300, 33, dtype)
    swizzled = swizzle_block_scales(scales)
    assert swizzled.shape == (384, 36)
    assert swizzled.dtype == dtype
    flat, plain = oracle.as_bytes(swizzled).reshape(-1), oracle.as_bytes(scales)
    for r in range(300):
        for c in range(33):
            tile = (r // 128) * 9 + c // 4
            assert flat[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] == plain[r, c]
    assert (flat == 0).sum() == 384 * 36 - 300 * 33


def test_known_values() -> None:
    """Guards against rows and row groups swapped: the first 16 bytes hold 4 columns of rows 0, 32, 64 and 96."""
    rows = torch.arange(128, dtype=torch.uint8).repeat_interleave(4).view(128, 4)
    swizzled = swizzle_block_scales(rows).flatten()
    assert swizzled[:16].tolist() == [*[0] * 4, *[32] * 4, *[64] * 4, *[96] * 4]
    assert swizzled[-4:].tolist() == [127] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(300, 33), (128, 4), (129, 5), (1, 1), (0, 4), (3, 0)])
def test_round_trip(rows: int, cols: int, dtype: torch.dtype) -> None:
    """Guards against an inverse that keeps padding or drops the last tile."""
    scales = random_scales(rows, cols, dtype)
    oracle.assert_same_bits(unswizzle_block_scales(swizzle_block_scales(scales), rows, cols), scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    """Guards against a fake that differs from the kernel: padded, exact and no rows, non-contiguous."""
    names = FP8_OPCHECKS if dtype == torch.float8_e4m3fn else (*FP8_OPCHECKS, "test_schema")
    scales = random_scales(300, 33, dtype)
    for view in (scales, scales[:0], scales[::2, 1:], scales.t()):
        torch.library.opcheck(OP, (view,), test_utils=names)
    torch.library.opcheck(INVERSE_OP, (swizzle_block_scales(scales), 300, 33), test_utils=names)
    transposed = swizzle_block_scales(scales).t().contiguous().t()
    torch.library.opcheck(INVERSE_OP, (transposed, 300, 33), test_utils=names)
    oracle.assert_same_bits(unswizzle_block_scales(transposed, 300, 33), scales)


def test_leaves_its_inputs_alone() -> None:
    """Guards against an output that shares memory with a scale tensor which needs no padding."""
    scales = random_scales(128, 4, torch.float8_e4m3fn)
    before = scales.clone()
    swizzled = swizzle_block_scales(scales)
    swizzled.view(torch.uint8).zero_()
    oracle.assert_same_bits(scales, before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects(device: str) -> None:
    """Guards against scales of another rank, dtype or size reshaped without a word."""
    scales = random_scales(130, 5).to(device)
    with pytest.raises(RuntimeError, match=r"^swizzle_block_scales: block_scales must be 2-D, got shape \(650,\)$"):
        swizzle_block_scales(scales.flatten())
    with pytest.raises(
        RuntimeError, match=r"^swizzle_block_scales: block_scales must be float8_e4m3fn or uint8, got float32$"
    ):
        swizzle_block_scales(scales.float())
    with pytest.raises(
        RuntimeError, match=r"^unswizzle_block_scales: swizzled must be float8_e4m3fn or uint8, got int32$"
    ):
        unswizzle_block_scales(swizzle_block_scales(scales).int(), 130, 5)
    with pytest.raises(
        RuntimeError,
        match=r"^unswizzle_block_scales: swizzled must have shape \(128, 8\) for rows=128, cols=5, got \(256, 8\)$",
    ):
        unswizzle_block_scales(swizzle_block_scales(scales), 128, 5)


def test_compiles() -> None:
    """Guards against a graph break, and against a second compilation for another number of rows."""
    counter = CompileCounterWithBackend("aot_eager")

    def round_trip(scales: Tensor) -> tuple[Tensor, Tensor]:
        swizzled = swizzle_block_scales(scales)
        return swizzled, unswizzle_block_scales(swizzled, scales.shape[0], scales.shape[1])

    compiled = torch.compile(round_trip, fullgraph=True, dynamic=True, backend=counter)
    for rows in (130, 300):
        scales = random_scales(rows, 6)
        swizzled, back = compiled(scales)
        assert torch.equal(swizzled, swizzle_block_scales(scales))
        assert torch.equal(back, scales)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_matches_the_cpu(dtype: torch.dtype) -> None:
    """Guards against a layout of its own, or a wait for the GPU."""
    for rows, cols in ((300, 33), (128, 4), (1, 1), (0, 4)):
        scales = random_scales(rows, cols, dtype)
        (swizzled,) = gpu.on_gpu(swizzle_block_scales, scales)
        oracle.assert_same_bits(swizzled, swizzle_block_scales(scales))
        oracle.assert_same_bits(gpu.on_gpu(unswizzle_block_scales, swizzled, rows, cols)[0], scales)
