"""``expand``: packed rows to bf16 on the GPU, bit for bit what the reference's ``scaled_codes`` gives."""

import pytest
import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch.division import magic
from dsv4_compile.ops.dispatch.expand import expand
from tests import nvfp4_oracle as oracle


def packed(rows: int, k: int) -> tuple[Tensor, Tensor]:
    """Any codes and any block scales, NaN and zero among them."""
    codes = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8)
    return codes, torch.randint(0, 128, (rows, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.gpu
def test_every_code_with_every_scale() -> None:
    """Guards against one wrong entry of the 16 x 256 products, signs of zeros and NaN scales included."""
    codes = torch.arange(16, dtype=torch.uint8).view(8, 2)
    codes = (codes[:, 0] | codes[:, 1] << 4).expand(256, 8).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).view(torch.float8_e4m3fn)
    expected = nvfp4.scaled_codes(codes, scales).bfloat16()
    oracle.assert_same_bits(expand(codes.cuda(), scales.cuda()).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "k"), [(0, 64), (3, 0), (1, 16), (7, 48), (5, 4096), (131, 528), (300, 7168)])
def test_matches_reference(rows: int, k: int) -> None:
    """Guards against a piece at the end that is left out, and a scale of the neighbouring block."""
    codes, scales = packed(rows, k)
    torch.full((rows, k), 7.0, dtype=torch.bfloat16, device="cuda")  # what the allocator hands out next
    oracle.assert_same_bits(expand(codes.cuda(), scales.cuda()).cpu(), nvfp4.scaled_codes(codes, scales).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("divisor", [1, 6, 8])
def test_gathers_rows(divisor: int) -> None:
    """Guards against a wrong source row, and against rows of negative indices that are written."""
    codes, scales = packed(40, 272)
    index = torch.randint(0, 40 * divisor, (501,), dtype=torch.int32)
    expected = nvfp4.scaled_codes(codes, scales).bfloat16()[index.long() // divisor]
    oracle.assert_same_bits(expand(codes.cuda(), scales.cuda(), index.cuda(), divisor).cpu(), expected)
    kept = torch.arange(501) % 3 > 0
    index[~kept] = -torch.randint(1, 2**31, (int((~kept).sum()),)).int()
    oracle.assert_same_bits(expand(codes.cuda(), scales.cuda(), index.cuda(), divisor).cpu()[kept], expected[kept])


def test_division_by_multiplication() -> None:
    """Guards against a quotient that is one off next to a multiple of the divisor, up to the largest numerator."""
    divisors = torch.cat([torch.arange(1, 600), torch.randint(1, 2**31, (600,)), 2 ** torch.arange(31)]).tolist()
    for divisor in divisors:
        multiplier, shift = magic(divisor)
        assert multiplier < 1 << 32
        last = (2**31 - 1) // divisor * divisor
        for n in (0, divisor - 1, divisor, last - 1, last, 2**31 - 1):
            if 0 <= n < 1 << 31:
                assert (2 * n * multiplier >> 32) >> shift == n // divisor
