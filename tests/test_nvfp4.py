"""The number format: every rounding by hand and against an oracle that shares no code with it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4_compile import nvfp4
from tests import nvfp4_oracle as oracle

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INF, NAN = math.inf, math.nan


def block(*values: float) -> list[float]:
    """One block of 16, filled up with zeros."""
    return [*values, *[0.0] * (16 - len(values))]


def codes_of(packed: Tensor) -> list[int]:
    return nvfp4.unpack_codes(packed).flatten().tolist()


def bits_of(x: Tensor) -> list[int]:
    """fp32 bits, sign bit included, as unsigned integers."""
    return [bits & 0xFFFFFFFF for bits in x.flatten().view(torch.int32).tolist()]


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


# --- the quantiser by hand -------------------------------------------------------------------------------------------


def test_quantize_known_values() -> None:
    """Guards against any change of the order of roundings that these literals were worked out with.

    The largest element is 2688, so gs = 1 and block scales are amax_block / 6 rounded to E4M3.
    """
    x = [
        # amax 2688 -> s = 448. 2688/448 = 6, 1344/448 = 3, 672/448 = 1.5, -448/448 = -1.
        block(2688.0, 1344.0, 672.0, -448.0),
        # amax 1536 -> s = 256: every midpoint, each to the even code.
        # 64 -> .25 -> 0; 192 -> .75 -> 1 (code 2); 320 -> 1.25 -> 1 (2); 448 -> 1.75 -> 2 (4); 640 -> 2.5 -> 2 (4);
        # 896 -> 3.5 -> 4 (6); 1280 -> 5 -> 4 (6); negative ones with bit 3; -64 -> -0 (8).
        block(1536.0, 64.0, 192.0, 320.0, 448.0, 640.0, 896.0, 1280.0, -64.0, -192.0, -320.0, -1280.0),
        # amax 6 -> s = 1: the magnitudes themselves; negative zero keeps its sign.
        block(6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5, -0.0, -6.0),
        # amax 6.375 -> 1.0625, a tie between 1 and 1.125, to the even 1: 6.375 saturates at 6.
        block(6.375, -6.375, 3.0),
        # amax 6 * 2^-9 -> the smallest subnormal E4M3, byte 0x01.
        block(6 / 512, -3 / 512),
        # amax 6 * 2^-10 -> a tie between 0 and 2^-9, to 0: block scale and codes 0, no sign left.
        block(6 / 1024, -6 / 1024),
        # just above that tie -> 2^-9; x / 2^-9 = 3.005 -> 3 (code 5).
        block(6 / 1024 * 1.001),
        block(),
    ]
    codes, block_scales, global_scale = nvfp4.quantize(torch.tensor(x).flatten().unsqueeze(0))
    assert global_scale.item() == 1.0
    # 448 = 1.75 * 2^8: 0x7E; 256 = 2^8: 0x78; 1 = 2^0: 0x38.
    assert oracle.as_bytes(block_scales).tolist() == [[0x7E, 0x78, 0x38, 0x38, 0x01, 0x00, 0x01, 0x00]]
    assert codes_of(codes) == [
        *(7, 5, 3, 10, *[0] * 12),
        *(7, 0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 14, *[0] * 4),
        *(7, 6, 5, 4, 3, 2, 1, 8, 15, *[0] * 7),
        *(7, 15, 5, *[0] * 13),
        *(7, 13, *[0] * 14),
        *[0] * 16,
        *(5, *[0] * 15),
        *[0] * 16,
    ]
    assert codes[0, 0].item() == 0x57  # k = 0 is 7, in the low nibble


def test_quantize_known_values_of_tensor_pow2() -> None:
    """Guards against a block scale that is still taken from the exact global scale.

    amax 4032 = 1.5 * 2688 -> gs = 1.5, rounded up to 2. s = 4032 / 12 = 336, a tie between 320 (10 * 2^5) and 352
    (11 * 2^5), to the even 320. 4032 / 640 = 6.3 -> 6 (7); 1280 / 640 = 2 (4); 160 / 640 = 0.25 -> 0; 480 / 640 -> 1 (2).
    """
    x = torch.tensor([block(4032.0, 1280.0, 160.0, 480.0)])
    codes, block_scales, global_scale = nvfp4.quantize(x, "tensor_pow2")
    assert (global_scale.item(), block_scales.float().item()) == (2.0, 320.0)
    assert codes_of(codes) == [7, 4, 0, 2, *[0] * 12]


def test_quantize_known_values_of_token() -> None:
    """Guards against one row's maximum in another row's scale."""
    x = torch.tensor([block(2688.0, -448.0), block(5376.0, 448.0), block()])
    codes, block_scales, global_scale = nvfp4.quantize(x, "token")
    assert global_scale[:2].tolist() == [1.0, 2.0]
    assert bits_of(global_scale[2]) == [0x2C82E4ED]
    assert block_scales.float().tolist() == [[448.0], [448.0], [0.0]]
    assert codes_of(codes) == [7, 10, *[0] * 14, 7, 1, *[0] * 14, *[0] * 16]


def test_quantize_order_of_roundings() -> None:
    """Guards against (amax_block / gs) / 6 for amax_block / (6 gs), and x / (s gs) for x * (1 / (s gs)).

    amax 129, so gs = fp32(129 / 2688). Block 1: amax_block / (6 gs) is 17/64 in fp32, a tie between 0.25 (byte 0x28)
    and 0.28125, to the even 0.25; in the other order it is an ulp more, 0.28125. Block 2: s = 256 and x / (s gs) is
    1.25 in fp32, a tie to 1 (code 2); the product with the rounded inverse is 1.25 + 2^-23, which goes to 1.5 (3).
    """
    x = torch.tensor([block(129.0), block(float.fromhex("0x1.394926p-4")), block(74.0, float.fromhex("0x1.eb6db8p+3"))])
    codes, block_scales, _ = nvfp4.quantize(x.view(1, -1))
    assert oracle.as_bytes(block_scales).tolist() == [[0x7E, 0x28, 0x78]]
    assert codes_of(codes)[32:34] == [7, 3]


def test_quantize_with_a_global_scale_too_small_saturates() -> None:
    """Guards against a NaN block scale where x / gs exceeds 2688: 448 and codes ±6, as a static scale gives.

    gs = 1: 26880 / 6 = 4480 -> 448 and 26880 / 448 = 60 -> 6 (7); -1344 / 448 = -3 (13); 111 / 448 < 0.25 -> 0.
    """
    x = torch.tensor([block(26880.0, -26880.0, -1344.0, 111.0)])
    codes, block_scales = nvfp4.quantize_with_global_scale(x, torch.ones(()))
    assert block_scales.float().tolist() == [[448.0]]
    assert codes_of(codes) == [7, 15, 13, 0, *[0] * 12]


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
def test_quantize_largest_bf16(granularity: str) -> None:
    """Guards against an overflow of gs * 6 or an inverse that is flushed as a denormal, at ±max bf16."""
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([block(largest, -largest, largest / 2)], dtype=torch.bfloat16)
    parts = nvfp4.quantize(x, granularity)
    assert codes_of(parts[0])[:2] == [7, 15]
    assert parts[2].isfinite().all()
    # In fp64: tensor_pow2 rounds 341 up to 352, so 6 * 352 * gs lies 3 % above the input, where fp32 ends.
    value = 6 * parts[1].double()[0, 0] * parts[2].double().flatten()[0]
    assert value.item() == pytest.approx(largest, rel=1 / 16)
    oracle.assert_packed_equal(parts, oracle.quantize(oracle.as_float64(x), granularity))


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
def test_quantize_all_zeros(granularity: str) -> None:
    """Guards against 0 / 0: global scale of the floor, everything else zero, output zero."""
    x = torch.tensor([block(-0.0), block()])
    codes, block_scales, global_scale = nvfp4.quantize(x, granularity)
    assert codes.count_nonzero() == 0
    assert oracle.as_bytes(block_scales).tolist() == [[0], [0]]
    assert global_scale.shape == ((2,) if granularity == "token" else ())
    expected = (
        torch.tensor([2.0**-37]) if granularity == "tensor_pow2" else torch.tensor([0x2C82E4ED], dtype=torch.int32)
    )
    assert (global_scale.view(torch.int32) == expected.view(torch.int32)).all()
    oracle.assert_same_bits(nvfp4.dequantize(codes, block_scales, global_scale), torch.zeros(2, 16))


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_quantize_one_non_finite_value(value: float, granularity: str) -> None:
    """Guards against a NaN that vanishes (silent zeros) and against one that spreads to other blocks."""
    x = torch.randn(3, 48)
    with_zero, with_value = x.clone(), x
    with_zero[1, 20], with_value[1, 20] = 0.0, value
    codes, block_scales, global_scale = nvfp4.quantize(with_value, granularity)
    expected = nvfp4.quantize(with_zero, granularity)
    oracle.assert_same_bits(global_scale, expected[2])
    scale_bytes, expected_bytes = block_scales.view(torch.uint8), expected[1].view(torch.uint8).clone()
    expected_bytes[1, 1] = 0x7F
    assert torch.equal(scale_bytes, expected_bytes)
    expected_codes = expected[0].clone()
    expected_codes[1, 8:16] = 0
    assert torch.equal(codes, expected_codes)
    is_nan = nvfp4.dequantize(codes, block_scales, global_scale).isnan().unflatten(-1, (3, 16))
    assert is_nan.all(-1).nonzero().tolist() == [[1, 1]]
    assert is_nan.sum() == 16


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
@pytest.mark.parametrize("value", [NAN, INF])
def test_quantize_nothing_finite(value: float, granularity: str) -> None:
    """Guards against a global scale of 0, NaN or Inf where no finite value is left: it is the floor's."""
    codes, block_scales, global_scale = nvfp4.quantize(torch.full((2, 32), value), granularity)
    assert codes.count_nonzero() == 0
    assert (block_scales.view(torch.uint8) == 0x7F).all()
    oracle.assert_same_bits(global_scale, nvfp4.quantize(torch.zeros(2, 32), granularity)[2])


# --- the quantiser against the oracle --------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60)
@given(data=st.data())
def test_quantize_matches_oracle(dtype: torch.dtype, granularity: str, data: st.DataObject) -> None:
    """Guards against any bit that differs from the documented order: denormals, zeros, ±max, huge ranges, ties."""
    x = data.draw(oracle.activations(dtype))
    oracle.assert_packed_equal(nvfp4.quantize(x, granularity), oracle.quantize(oracle.as_float64(x), granularity))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(data=st.data())
def test_quantize_matches_oracle_on_non_finite(dtype: torch.dtype, data: st.DataObject) -> None:
    """Guards against a NaN payload or a sign of Inf that is treated as a number."""
    x = data.draw(oracle.activations(dtype, finite=False))
    for granularity in nvfp4.GRANULARITIES:
        oracle.assert_packed_equal(nvfp4.quantize(x, granularity), oracle.quantize(oracle.as_float64(x), granularity))


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
@settings(max_examples=80)
@given(x=oracle.activations(torch.float32), k=st.integers(-60, 60))
def test_quantize_scales_with_powers_of_two(granularity: str, x: Tensor, k: int) -> None:
    """Guards against an absolute threshold anywhere but in the floor of amax.

    Range: x * 2^k is exact (no overflow, no denormal cut off), and amax >= 1e-8 before and after, for each group
    that shares a global scale. A group of zeros stays at the floor.
    """
    scaled = x * 2.0**k
    assume(scaled.isfinite().all() and torch.equal(scaled.double(), x.double() * 2.0**k))
    before, after = nvfp4.finite_amax(x, granularity), nvfp4.finite_amax(scaled, granularity)
    is_floored = (before < 1e-8) | (after < 1e-8)
    assume(bool((~is_floored | (before == 0)).all()))
    codes, block_scales, global_scale = nvfp4.quantize(scaled, granularity)
    expected = nvfp4.quantize(x, granularity)
    assert torch.equal(codes, expected[0])
    oracle.assert_same_bits(block_scales, expected[1])
    assert torch.equal(global_scale.double(), expected[2].double() * torch.where(before == 0, 1.0, 2.0**k).double())


# --- tensor_pow2: the range in which a row does not depend on its batch ----------------------------------------------


@st.composite
def rows_and_companions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A row and a companion: each block of the row is zero or has amax_block / amax of the batch in [1/14336, 1]."""
    low = 1 / 14336
    exponent = draw(st.integers(-20, 60))
    largest = draw(st.floats(1, 2, exclude_max=True, width=32)) * 2.0**exponent  # batch amax >= 1e-8
    fractions = draw(
        st.lists(
            st.one_of(st.just(0.0), st.just(low), st.floats(low, 2 * low), st.floats(low, 1)), min_size=1, max_size=4
        )
    )
    amaxes = torch.tensor(fractions, dtype=torch.float64) * largest
    smallest = torch.nextafter(amaxes.float(), torch.tensor(INF))
    amaxes = torch.where(amaxes.float().double() < amaxes, smallest, amaxes.float())  # rounded up: not below the bound
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    row = torch.empty(len(fractions), 16).uniform_(-1, 1, generator=generator) * amaxes[:, None]
    row[:, draw(st.integers(0, 15))] = amaxes
    companion = torch.empty_like(row).uniform_(-1, 1, generator=generator) * largest
    companion[0, 0] = largest
    return row.view(1, -1), companion.view(1, -1)


def depends_on_companion(row: Tensor, companion: Tensor) -> bool:
    alone = nvfp4.dequantize(*nvfp4.quantize(row, "tensor_pow2"))
    together = nvfp4.dequantize(*nvfp4.quantize(torch.cat([companion, row]), "tensor_pow2"))[1:]
    return not torch.equal(alone.view(torch.int32), together.view(torch.int32))


@settings(max_examples=100)
@given(rows_and_companions())
def test_tensor_pow2_row_does_not_depend_on_its_batch(case: tuple[Tensor, Tensor]) -> None:
    """Guards against a rounding that does not commute with a power of two, down to the documented amax / 14336."""
    assert not depends_on_companion(*case)


@pytest.mark.parametrize(("factor", "changes"), [(1.0, False), (0.967, True)])
def test_tensor_pow2_bound_is_tight(factor: float, changes: bool) -> None:
    """Guards against a documented bound that is needlessly wide: 3.3 % below it a row does depend on its batch.

    amax = 2688 (1 + 2^-10), so gs = 2, nearly 2 amax / 2688. With amax_block = 0.967 amax / 14336 the block scale is
    e4m3(0.967 (1 + 2^-10) 2^-6) = e4m3(7.744 * 2^-9): among subnormals 8 * 2^-9. Alone, gs is smaller by a power of two
    and the scale normal: 7.744 * 2^-9 = 15.487/16 * 2^-6 goes to 15/16 (the tie with 16/16 is at 15.5).
    """
    companion = torch.tensor([block(2688 * (1 + 2**-10))])
    row = torch.tensor([block(factor * 2688 * (1 + 2**-10) / 14336)])
    assert depends_on_companion(row, companion) == changes


@settings(max_examples=60)
@given(x=oracle.activations(torch.bfloat16), companion=oracle.activations(torch.bfloat16, finite=False))
def test_token_row_never_depends_on_its_batch(x: Tensor, companion: Tensor) -> None:
    """Guards against any maximum taken across rows, whatever the companion holds."""
    blocks = min(x.shape[1], companion.shape[1])
    x, companion = x[:, :blocks], companion[:, :blocks]
    together = nvfp4.quantize(torch.cat([companion, x]), "token")
    for part, alone in zip(together, nvfp4.quantize(x, "token"), strict=True):
        oracle.assert_same_bits(part[companion.shape[0] :], alone)


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


# --- exp, SiLU, SwiGLU -----------------------------------------------------------------------------------------------


def test_exp_within_two_ulp() -> None:
    """Guards against a wrong coefficient: 1 ulp is 2^-23 of the power of two at or below the result."""
    y = torch.cat([torch.linspace(-87, 87, 400_001), torch.linspace(-1e-3, 1e-3, 20_001)])
    exact = y.double().exp()
    ulp = torch.exp2(exact.log2().floor() - 23)
    assert ((nvfp4.exp(y).double() - exact).abs() / ulp).max() <= 2


def test_silu_within_its_bound() -> None:
    """Guards against a loss of relative accuracy on the negative side.

    exp is within 2 ulp, at most 2 * 2^-23 of it; the sum and the quotient add half an ulp, 2^-24, each: 3 * 2^-23.
    """
    x = torch.cat([torch.linspace(-87, 87, 400_001), torch.tensor([-1e-6, 1e-6, 1e-38, 100.0, 3e38])])
    exact = x.double() / (1 + torch.exp(-x.double()))
    assert ((nvfp4.silu(x).double() - exact).abs() <= 3 * 2.0**-23 * exact.abs()).all()


@settings(max_examples=50)
@given(st.lists(st.floats(-87, 87, width=32), min_size=1, max_size=64))
def test_exp_and_silu_match_oracle(values: list[float]) -> None:
    """Guards against a contraction into fused multiply-adds, whose bits another device would not give."""
    y = torch.tensor(values)
    expected = oracle.as_float64(y)
    oracle.assert_same_bits(nvfp4.exp(y), oracle.to_dtype(oracle.exp(expected), torch.float32))
    oracle.assert_same_bits(nvfp4.silu(y), oracle.to_dtype(oracle.silu(expected), torch.float32))


def test_exp_and_silu_pinned_bits() -> None:
    """Guards against another formula that is just as accurate: a GPU kernel is held to these very bits.

    e = 0x402DF854, 1/e = 0x3EBC5AB2 and sqrt(2) = exp(ln2 / 2) = 0x3FB504F3 are the correctly rounded ones;
    exp(3.3), silu(-10) and silu(3.3) are one ulp off.
    """
    y = torch.tensor([0.0, 1.0, -1.0, 0.34657359, 3.3, 87.0, -87.0])
    assert bits_of(nvfp4.exp(y)) == [
        0x3F800000, 0x402DF854, 0x3EBC5AB2, 0x3FB504F3, 0x41D8E6AE, 0x7E36D809, 0x00B33687,
    ]  # fmt: skip
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 10.0, -10.0, 3.3, -87.0])
    assert bits_of(nvfp4.silu(x)) == [
        0x00000000, 0x80000000, 0x3F3B26A8, 0xBE89B2B1, 0x411FFE24, 0xB9EE03FE, 0x404BAFF8, 0x83F39E1F,
    ]  # fmt: skip


def test_exp_outside_its_range() -> None:
    """Guards against an integer overflow of the exponent: clamped to ±87, NaN stays."""
    y = nvfp4.exp(torch.tensor([88.0, INF, -88.0, -INF, NAN]))
    assert bits_of(y[:4]) == [0x7E36D809, 0x7E36D809, 0x00B33687, 0x00B33687]
    assert y[4].isnan()


def test_silu_outside_the_range_of_exp() -> None:
    """Guards against x / (1 + exp(87)), which for x = -3e38 is -4.9 instead of 0; NaN and Inf as in torch's silu."""
    x = torch.tensor([-87.5, -1e10, -3.4e38, INF, -INF, NAN])
    expected = torch.nn.functional.silu(x)
    assert expected[3] == INF
    assert expected[4:].isnan().all()
    expected[0] = -0.0  # torch has -8.6e-37 here
    oracle.assert_same_bits(nvfp4.silu(x), expected)


@pytest.mark.parametrize(
    ("gate", "up", "limit", "expected"),
    [
        (20.0, 1.0, 10.0, 9.999546),  # silu(10): the gate is clamped from above
        (20.0, 1.0, INF, 20.0),
        (-20.0, 1.0, 10.0, -4.1223074e-08),  # silu(-20): the gate is not clamped from below, silu(-10) is -4.5e-4
        (20.0, 30.0, 10.0, 99.99546),
        (20.0, -30.0, 10.0, -99.99546),  # up is clamped both ways
        (0.0, 5.0, 10.0, 0.0),
    ],
)
def test_swiglu_known_values(gate: float, up: float, limit: float, expected: float) -> None:
    """Guards against a missing clamp, the wrong side of it, or a clamp after SiLU instead of before."""
    actual = nvfp4.swiglu(torch.tensor([gate]), torch.tensor([up]), limit)
    assert actual.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(data=st.data())
def test_swiglu_matches_oracle(dtype: torch.dtype, data: st.DataObject) -> None:
    """Guards against a rounding to the input dtype between SiLU and the product."""
    gate, up = data.draw(oracle.activations(dtype)), data.draw(oracle.activations(dtype))
    up = up.flatten()[: gate.numel()].repeat(9)[: gate.numel()].view_as(gate)
    for limit in (10.0, INF):
        expected = oracle.swiglu(oracle.as_float64(gate), oracle.as_float64(up), limit)
        oracle.assert_same_bits(nvfp4.swiglu(gate, up, limit), oracle.to_dtype(expected, torch.float32))


def test_swiglu_non_finite() -> None:
    """Guards against a clamp that turns NaN into its limit; Inf is clamped to the limit, as the eager model does."""
    gate = torch.tensor([NAN, 1.0, INF, -INF, 1.0, INF])
    up = torch.tensor([1.0, NAN, 1.0, 1.0, -INF, 1.0])
    clamped = nvfp4.swiglu(gate, up, 10.0)
    assert clamped.isnan().tolist() == [True, True, False, True, False, False]
    assert clamped[2].item() == nvfp4.silu(torch.tensor(10.0)).item()
    assert nvfp4.swiglu(gate, up, INF).isfinite().tolist() == [False] * 6


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
