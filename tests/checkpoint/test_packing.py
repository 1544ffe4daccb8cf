"""``pack_weight``: the codes of the reference, an honest error, and a search that never does worse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.packing import SEARCHES, Workers, finite_amax, pack_weight, sqnr_db


def ties(n: int, k: int) -> Tensor:
    """Every midpoint between two E2M1 values, its neighbours in fp32, both signs; gs and block scales exactly 1."""
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    around = torch.cat([midpoints, midpoints.nextafter(torch.tensor(9.0)), midpoints.nextafter(torch.tensor(0.0))])
    values = torch.cat([around, -around, torch.tensor([0.0, -0.0, 6.0, -6.0, 1e-30, -1e-30])])
    weight = values[torch.randint(len(values), (n, k))]
    weight[:, ::16] = 6.0
    weight[0, 1] = 2688.0
    return weight


def heavy_tailed(n: int, k: int) -> Tensor:
    return torch.randn(n, k) * torch.exp(3 * torch.randn(n, 1)) * (torch.rand(n, k) < 0.9)


def with_zeros(n: int, k: int) -> Tensor:
    """Blocks of zeros, of negative zeros, and blocks too small for any block scale."""
    weight = torch.randn(n, k)
    weight[0] = 0.0
    weight[-1] = -0.0
    weight[n // 2] *= 1e-7
    weight[:, :16] *= -1e-9
    return weight


WEIGHTS = {"gaussian": torch.randn, "ties": ties, "heavy_tailed": heavy_tailed, "with_zeros": with_zeros}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", [(1, 16), (33, 272), (300, 2048)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_matches_reference(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Guards against one code, sign or scale that is not the reference's, ties and parts of a weight included."""
    weight = WEIGHTS[kind](*shape).to(dtype)
    packing = pack_weight(weight, finite_amax(weight))
    codes, block_scales, global_scale = nvfp4.quantize_weight(weight)
    assert torch.equal(packing.packed.codes, codes)
    assert torch.equal(packing.packed.block_scales.view(torch.uint8), block_scales.view(torch.uint8))
    assert torch.equal(packing.packed.global_scale, global_scale)


@pytest.mark.parametrize("search", SEARCHES)
def test_workers_change_nothing(search: str) -> None:
    """Guards against sums, and so reports, that depend on the number of cores, and against threads left changed."""
    weight = torch.randn(1000, 1024)
    alone = pack_weight(weight, finite_amax(weight), search)
    before = torch.get_num_threads()
    with Workers(3) as workers:
        shared = pack_weight(weight, finite_amax(weight, workers), search, workers)
    assert torch.get_num_threads() == before
    assert (shared.signal, shared.noise, shared.nearest_noise) == (alone.signal, alone.noise, alone.nearest_noise)
    for ours, theirs in zip(shared.packed, alone.packed, strict=True):
        assert torch.equal(ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))


def test_all_zeros() -> None:
    packing = pack_weight(torch.zeros(4, 32), torch.zeros(()), "wide")
    assert not packing.packed.codes.any()
    assert not packing.packed.block_scales.view(torch.uint8).any()
    assert sqnr_db(packing.signal, packing.noise) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rejects_non_finite(bad: float) -> None:
    weight = torch.randn(8, 16)
    weight[5, 3] = bad
    with pytest.raises(ValueError, match="weight must be finite, got NaN or Inf"):
        finite_amax(weight)


def block_errors(weight: Tensor, packed: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    error = nvfp4.dequantize(*packed).double() - weight.double()
    return error.square().unflatten(-1, (-1, 16)).sum(-1)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_error_is_what_is_stored(kind: str, search: str) -> None:
    """Guards against an SQNR that is not that of the codes and scales written; fp32 sums of 16 lose 1e-6 at most."""
    weight = WEIGHTS[kind](70, 512)
    packing = pack_weight(weight, finite_amax(weight), search)
    assert packing.signal == pytest.approx(weight.double().square().sum().item(), rel=1e-5)
    noise = block_errors(weight, packing.packed).sum().item()
    assert packing.noise == pytest.approx(noise, rel=1e-4, abs=1e-12 * packing.signal)
    nearest = block_errors(weight, nvfp4.quantize_weight(weight)).sum().item()
    assert packing.nearest_noise == pytest.approx(nearest, rel=1e-4, abs=1e-12 * packing.signal)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("search", ["six_four", "wide"])
def test_search_is_never_worse(kind: str, search: str) -> None:
    """Guards against a block whose chosen scale has more squared error than the nearest one, and against NaN scales."""
    weight = WEIGHTS[kind](70, 512)
    packing = pack_weight(weight, finite_amax(weight), search)
    assert bool((packing.packed.block_scales.view(torch.uint8) < 0x7F).all())
    nearest = block_errors(weight, nvfp4.quantize_weight(weight))
    # Errors are compared in fp32: where two scales are equally good, the worse one by a rounding may be taken.
    assert bool((block_errors(weight, packing.packed) <= nearest * (1 + 1e-5)).all())


@pytest.mark.parametrize(("search", "least", "most"), [("six_four", 0.6, 0.9), ("wide", 1.2, 1.5)])
def test_gain_on_gaussian_weights(search: str, least: float, most: float) -> None:
    """Guards against a search that finds nothing: 0.77 and 1.37 dB were measured."""
    weight = torch.randn(512, 1024, dtype=torch.float32).bfloat16()
    packing = pack_weight(weight, finite_amax(weight), search)
    assert least < 10 * math.log10(packing.nearest_noise / packing.noise) < most


def test_six_or_four_by_hand() -> None:
    """gs is 1. (6, 5, 5 ...) with scale 1: 5 is a tie and becomes 4, error 1. With 1.5: 6 is 4, 5 is 3 * 1.5, error 1/4.

    (6, 4, 4 ...) has no error with scale 1, so the search leaves it.
    """
    weight = torch.full((2, 16), 5.0)
    weight[1] = 4.0
    weight[:, 0] = 6.0
    amax = torch.tensor(2688.0)
    nearest, searched = (pack_weight(weight, amax, search) for search in ("none", "six_four"))
    assert nearest.packed.block_scales.float().flatten().tolist() == [1.0, 1.0]
    assert nearest.packed.codes[0].tolist() == [0x67] + [0x66] * 7  # the first element is in the low nibble
    assert (nearest.noise, nearest.nearest_noise) == pytest.approx((15.0, 15.0), rel=1e-6)
    assert searched.packed.block_scales.float().flatten().tolist() == [1.5, 1.0]
    assert searched.packed.codes[0].tolist() == [0x56] + [0x55] * 7
    assert searched.packed.codes[1].tolist() == nearest.packed.codes[1].tolist()
    assert (searched.noise, searched.nearest_noise) == pytest.approx((3.75, 15.0), rel=1e-5)  # 1 / 1.5 was rounded


def test_shared_amax() -> None:
    """Guards against a global scale of the weight's own where another weight's is larger."""
    weight = torch.randn(8, 64)
    amax = 3 * finite_amax(weight)
    packed = pack_weight(weight, amax).packed
    codes, block_scales = nvfp4.quantize_with_global_scale(weight, amax / 2688)
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.block_scales.view(torch.uint8), block_scales.view(torch.uint8))
    assert packed.global_scale.item() == (amax / 2688).item()
