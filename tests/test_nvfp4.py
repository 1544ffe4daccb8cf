"""The number format: codes, global scales, dequantisation and the swizzle of scales, by hand and against an oracle."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4_compile import nvfp4
from tests import nvfp4_oracle as oracle
from tests.nvfp4_oracle import bits_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INF, NAN = math.inf, math.nan


# --- E2M1 ------------------------------------------------------------------------------------------------------------

# value -> code. A tie between neighbours goes to the even code: 0.25 lies between 0.0 (code 0) and 0.5 (code 1).
E2M1_KNOWN = [
    (0.0, 0), (0.5, 1), (1.0, 2), (1.5, 3), (2.0, 4), (3.0, 5), (4.0, 6), (6.0, 7),
    (0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6),
    (6.5, 7), (1e30, 7), (INF, 7), (1e-45, 0),
]  # fmt: skip


@pytest.mark.parametrize(("value", "code"), E2M1_KNOWN)
def test_encode_e2m1_known_values(value: float, code: int) -> None:
    """Guards against a tie rounded away from the even code, and a sign lost on the way (also that of zero)."""
    assert nvfp4.encode_e2m1(torch.tensor([value, -value])).tolist() == [code, code + 8]


@pytest.mark.parametrize("lower_code", range(7))
def test_encode_e2m1_around_midpoints(lower_code: int) -> None:
    """Guards against a midpoint that is one ulp off: its two fp32 neighbours go to different codes."""
    lower, upper = oracle.E2M1_TABLE[lower_code : lower_code + 2]
    midpoint = torch.tensor((lower + upper) / 2, dtype=torch.float32)
    neighbours = torch.stack([midpoint.nextafter(torch.tensor(0.0)), midpoint.nextafter(torch.tensor(9.0))])
    assert nvfp4.encode_e2m1(neighbours).tolist() == [lower_code, lower_code + 1]


def test_pack_codes_puts_even_k_in_the_low_nibble() -> None:
    """Guards against swapped nibbles, which every self-consistent round trip would hide."""
    packed = nvfp4.pack_codes(torch.tensor([[0x1, 0xA, 0xF, 0x0]], dtype=torch.uint8))
    assert packed.tolist() == [[0xA1, 0x0F]]
    assert nvfp4.unpack_codes(packed).tolist() == [[0x1, 0xA, 0xF, 0x0]]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_decode_codes_of_every_byte(dtype: torch.dtype) -> None:
    """Guards against a table entry in the wrong place: all 256 bytes, both nibbles, negative zero included."""
    decoded = nvfp4.decode_codes(torch.arange(256, dtype=torch.uint8).view(16, 16), dtype)
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
    expected = [value for byte in range(256) for value in (values[byte & 15], values[byte >> 4])]
    oracle.assert_same_bits(decoded, torch.tensor(expected, dtype=dtype).view(16, 32))


# --- global scale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amax", "exact_bits", "pow2"),
    [
        (2688.0, 0x3F800000, 1.0),  # 2688 / 2688 = 1, a power of two already: stays
        (448.0, 0x3E2AAAAB, 0.25),  # 1/6 = 0x3E2AAAAA.AA rounds up; next power of two 1/4
        (2689.0, 0x3F800C31, 2.0),  # 1 + 1/2688 = 1 + 3120.76 * 2^-23, and 3121 = 0xC31
        (0.0, 0x2C82E4ED, 2.0**-37),  # floor: fp32(1e-8) / 2688 = 3.7202e-12 = 1.0226 * 2^-38
        (1e-8, 0x2C82E4ED, 2.0**-37),
        (1e-30, 0x2C82E4ED, 2.0**-37),
    ],
)
def test_global_scale_known_values(amax: float, exact_bits: int, pow2: float) -> None:
    """Guards against a multiplication by 1/2688 (rounds twice), a missing floor, and a power of two that is doubled."""
    assert bits_of(nvfp4.global_scale_from_amax(torch.tensor(amax), "tensor")) == [exact_bits]
    assert nvfp4.global_scale_from_amax(torch.tensor(amax), "tensor_pow2").item() == pow2


@given(st.integers(0x00800000, 0x7E800000))
def test_round_up_to_power_of_two(bits: int) -> None:
    """Guards against a float logarithm, which is off by one near powers of two."""
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    rounded = nvfp4.round_up_to_power_of_two(x).item()
    assert math.frexp(rounded)[0] == 0.5
    assert rounded / 2 < x.item() <= rounded


def test_finite_amax_ignores_non_finite_values() -> None:
    """Guards against an Inf that would make gsa infinite and every other block zero."""
    x = torch.tensor([[1.0, -3.0, NAN, INF], [NAN, -INF, NAN, INF], [0.5, -0.0, 2.0, -INF]])
    assert nvfp4.finite_amax(x, "tensor").item() == 3.0
    assert nvfp4.finite_amax(x, "token").tolist() == [3.0, 0.0, 2.0]
    assert nvfp4.finite_amax(x[:0], "tensor").item() == 0.0
    assert nvfp4.finite_amax(x[:0], "token").shape == (0,)


# --- weights and dequantisation --------------------------------------------------------------------------------------


def test_quantize_weight_gives_each_expert_its_own_scale() -> None:
    """Guards against one global scale for all experts, which would drown a small one; a zero expert stays zero."""
    experts = torch.randn(3, 4, 32) * torch.tensor([1.0, 1e-3, 0.0])[:, None, None]
    codes, block_scales, global_scale = nvfp4.quantize_weight(experts)
    assert global_scale.shape == (3,)
    for index, expert in enumerate(experts):
        expected = oracle.quantize(oracle.as_float64(expert), "tensor")
        oracle.assert_packed_equal((codes[index], block_scales[index], global_scale[index]), expected)
    assert codes[2].count_nonzero() == 0


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("shape", [(4, 32), (2, 4, 32)])
def test_quantize_weight_rejects_non_finite(shape: tuple[int, ...], value: float) -> None:
    """Guards against packing a damaged checkpoint, which would hide the damage in one NaN block."""
    weight = torch.randn(shape)
    weight.view(-1)[-1] = value
    with pytest.raises(ValueError, match="quantize_weight: weight must be finite, got NaN or Inf elements"):
        nvfp4.quantize_weight(weight)


@pytest.mark.parametrize("scale_shape", [(), (3,), (3, 2)])
def test_dequantize_spreads_global_scales(scale_shape: tuple[int, ...]) -> None:
    """Guards against a segment's scale on the neighbour's rows: [] for all, [E] a matrix, [E, S] a row segment."""
    codes = torch.randint(0, 256, (3, 6, 16), dtype=torch.uint8)
    block_scales = torch.randint(0, 127, (3, 6, 2), dtype=torch.uint8).view(torch.float8_e4m3fn)
    global_scale = torch.rand(scale_shape) + 0.1
    actual = nvfp4.dequantize(codes, block_scales, global_scale)
    expected = oracle.dequantize(*oracle.as_packed((codes, block_scales, global_scale)))
    oracle.assert_same_bits(actual, oracle.to_dtype(expected, torch.float32))


def test_dequantize_no_rows_with_segments() -> None:
    """Guards against segments spread over at least one row each where there is none."""
    codes, block_scales = torch.empty(0, 16, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.float8_e4m3fn)
    assert nvfp4.dequantize(codes, block_scales, torch.ones(2)).shape == (0, 32)
    assert nvfp4.dequantize(codes, block_scales, torch.ones(0)).shape == (0, 32)


# --- scale swizzle ---------------------------------------------------------------------------------------------------


def swizzle_by_loops(scales: np.ndarray) -> np.ndarray:
    """The documented offsets, one element at a time."""
    rows, cols = scales.shape
    row_tiles, col_tiles = (rows + 127) // 128, (cols + 3) // 4
    flat = np.zeros(row_tiles * col_tiles * 512, scales.dtype)
    for r in range(rows):
        for c in range(cols):
            tile = (r // 128) * col_tiles + c // 4
            flat[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] = scales[r, c]
    return flat.reshape(row_tiles * 128, col_tiles * 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rows", "cols"), [(300, 33), (128, 4), (1, 1), (0, 4)])
def test_swizzle_matches_the_offsets(rows: int, cols: int, dtype: torch.dtype) -> None:
    """Guards against row groups or tiles in the wrong order, and padding that is not zero."""
    scales = torch.randint(1, 127, (rows, cols), dtype=torch.uint8)  # no zero: what is zero is padding
    swizzled = nvfp4.swizzle(scales.view(dtype))
    assert swizzled.dtype == dtype
    assert swizzled.is_contiguous()
    np.testing.assert_array_equal(oracle.as_bytes(swizzled), swizzle_by_loops(scales.numpy()), strict=True)
    assert (oracle.as_bytes(swizzled) == 0).sum() == swizzled.numel() - rows * cols
    oracle.assert_same_bits(nvfp4.unswizzle(swizzled, rows, cols), scales.view(dtype))


def test_swizzle_known_offsets() -> None:
    """Guards against loops above that repeat a misread formula: numbers from cuBLAS' figure of one 128x4 tile.

    Row 0 takes bytes 0..3, row 32 bytes 4..7, row 64 bytes 8..11, row 96 bytes 12..15, row 1 bytes 16..19.
    """
    rows = torch.arange(128, dtype=torch.uint8).repeat_interleave(4).view(128, 4)
    assert nvfp4.swizzle(rows).flatten()[:32:4].tolist() == [0, 32, 64, 96, 1, 33, 65, 97]
    cols = torch.arange(8, dtype=torch.uint8).repeat(128, 1)
    assert nvfp4.swizzle(cols).flatten()[[0, 1, 2, 3, 4, 512, 515]].tolist() == [0, 1, 2, 3, 0, 4, 7]
