"""``interleave``: activations in the order of K of the wgmma kernel, bit for bit, and the order itself."""

import pytest
import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch.interleave import interleave
from tests import nvfp4_oracle as oracle
from tests.interleaved import in_order
from tests.ops.test_expand import packed


@pytest.mark.parametrize("is_packed", [True, False])
def test_order(is_packed: bool) -> None:
    """Guards against an order that is not the one that a lane's codes decode in."""
    x = torch.arange(2 * 384).view(2, 384)
    result = in_order(x, is_packed)
    for chunk, t, w, i, b in ((0, 0, 0, 0, 0), (0, 3, 1, 2, 1), (1, 2, 3, 0, 1), (2, 1, 2, 3, 0)):
        within = 4 * b + i if is_packed else 2 * i + b
        assert result[1, 128 * chunk + 32 * w + 8 * i + 2 * t + b] == 384 + 128 * chunk + 32 * t + 8 * w + within
    assert torch.equal(result.view(2, 3, 128).sort(-1).values, x.view(2, 3, 128))


def on_gpu(x: Tensor, *arguments: Tensor | int | None) -> Tensor:
    return interleave(x.cuda(), *(part.cuda() if isinstance(part, Tensor) else part for part in arguments)).cpu()  # type: ignore[arg-type]


@pytest.mark.gpu
def test_every_code_with_every_scale() -> None:
    """Guards against one wrong entry of the 16 x 256 products, signs of zeros and NaN scales included."""
    codes = torch.arange(16, dtype=torch.uint8).view(8, 2)
    codes = (codes[:, 0] | codes[:, 1] << 4).repeat(256 * 8).view(256, 64)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 8).contiguous().view(torch.float8_e4m3fn)
    expected = in_order(nvfp4.scaled_codes(codes, scales, torch.float16), True)
    oracle.assert_same_bits(on_gpu(codes, scales), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "k"), [(0, 128), (1, 128), (7, 384), (5, 4096), (131, 640), (300, 7168)])
def test_matches_reference(rows: int, k: int) -> None:
    """Guards against lanes that exchange the wrong pairs, and a piece at the end that is left out."""
    codes, scales = packed(rows, k)
    torch.full((rows, k), 7.0, dtype=torch.float16, device="cuda")  # what the allocator hands out next
    expected = in_order(nvfp4.scaled_codes(codes, scales, torch.float16), True)
    oracle.assert_same_bits(on_gpu(codes, scales), expected)
    x = torch.randint(-(2**15), 2**15, (rows, k), dtype=torch.int16).view(torch.bfloat16)
    actual = on_gpu(x, None)
    assert torch.equal(actual.view(torch.int16), in_order(x.view(torch.int16), False))


@pytest.mark.gpu
@pytest.mark.parametrize("divisor", [1, 6])
def test_gathers_rows(divisor: int) -> None:
    """Guards against a wrong source row, and against rows of negative indices that are written."""
    codes, scales = packed(40, 256)
    index = torch.randint(0, 40 * divisor, (501,), dtype=torch.int32)
    kept = torch.arange(501) % 3 > 0
    index[~kept] = -torch.randint(1, 2**31, (int((~kept).sum()),)).int()
    expected = in_order(nvfp4.scaled_codes(codes, scales, torch.float16), True)[index.long()[kept] // divisor]
    oracle.assert_same_bits(on_gpu(codes, scales, index, divisor)[kept], expected)
