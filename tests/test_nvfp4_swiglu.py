"""exp, SiLU and SwiGLU of the number format: bounds, bits, and an oracle that shares no code with them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_compile import nvfp4
from tests import nvfp4_oracle as oracle
from tests.nvfp4_oracle import bits_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INF, NAN = math.inf, math.nan


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
