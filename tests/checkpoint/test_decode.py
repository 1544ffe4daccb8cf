"""MXFP4 as NVFP4 without loss, and what a weight becomes where that is impossible."""

import pytest
import torch

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.decode import MXFP4_SPAN, mxfp4_to_nvfp4
from tests.checkpoint import stored

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("span", range(MXFP4_SPAN + 1))
def test_mxfp4_is_lossless_within_the_span(span: int) -> None:
    """All 16 codes in both nibbles with every pair of exponents whose distance is ``span``: the same fp32 values.

    Exponents from 10 to 200, beyond anything a weight has; outside of that the global scale leaves fp32's normals.
    """
    codes = ALL_BYTES.repeat(2).view(2, 256)  # each byte under both exponents, 16 blocks of 32 in a row
    for low in range(10, 200 - span, 7):
        exponents = torch.tensor([[low], [low + span]], dtype=torch.uint8).expand(2, 16).contiguous()
        packed, is_exact = mxfp4_to_nvfp4(codes, exponents)
        assert is_exact
        assert torch.equal(packed.codes, codes)
        values = stored.mxfp4_values(codes, exponents.view(torch.float8_e8m0fnu))
        assert torch.equal(nvfp4.dequantize(*packed), values)


def test_mxfp4_beyond_the_span_is_quantised_anew() -> None:
    """Guards against small blocks that silently become 0: the result is what quantising the values gives, and said."""
    codes = ALL_BYTES.repeat(2).view(2, 256)
    exponents = torch.tensor([[100], [100 + MXFP4_SPAN + 1]], dtype=torch.uint8).expand(2, 16).contiguous()
    packed, is_exact = mxfp4_to_nvfp4(codes, exponents)
    assert not is_exact
    values = stored.mxfp4_values(codes, exponents.view(torch.float8_e8m0fnu))
    for part, expected in zip(packed, nvfp4.quantize_weight(values), strict=True):
        assert part.dtype == expected.dtype
        assert torch.equal(part.float(), expected.float())


def test_blocks_of_zeros_do_not_count() -> None:
    """Guards against an all-zero block, whose exponent means nothing, that forces a loss on the others."""
    codes, exponents = stored.mxfp4_parts(torch.randn(4, 64))
    bits = exponents.view(torch.uint8).clone()
    codes = codes.view(torch.uint8).clone()
    codes[1, :16], bits[1, 0] = 0, 1
    codes[2, 16:], bits[2, 1] = 0x80, 250
    packed, is_exact = mxfp4_to_nvfp4(codes, bits)
    assert is_exact
    values = stored.mxfp4_values(codes, bits.view(torch.float8_e8m0fnu))
    assert torch.equal(nvfp4.dequantize(*packed), values)
    packed, is_exact = mxfp4_to_nvfp4(torch.zeros(2, 16, dtype=torch.uint8), torch.full((2, 1), 7, dtype=torch.uint8))
    assert is_exact
    assert not nvfp4.dequantize(*packed).any()
