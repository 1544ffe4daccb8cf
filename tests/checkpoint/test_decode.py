"""MXFP4 as NVFP4 without loss, and what a weight becomes where that is impossible."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint import decode, load_checkpoint
from dsv4_compile.checkpoint.decode import MXFP4_SPAN, mxfp4_to_nvfp4
from tests.checkpoint import stored

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("span", range(MXFP4_SPAN + 1))
def test_mxfp4_is_lossless_within_the_span(span: int) -> None:
    """All 16 codes in both nibbles under every pair of exponents whose distance is ``span``: the same fp32 values.

    All pairs there are: from exponent byte 0, 2^-127, to 252, above which a code of 6 leaves fp32.
    """
    codes = ALL_BYTES.repeat(2).view(2, 256)  # each byte under both exponents, 16 blocks of 32 in a row
    for low in range(253 - span):
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


def test_mxfp4_beyond_the_span_is_loaded_and_reported(tmp_path: Path) -> None:
    """Guards against one expert with a wide span that makes the others lossy, or that nobody hears of."""
    weights = torch.randn(2, 16, 64)
    weights[1, 0] *= 2.0**-40
    parts = [stored.mxfp4_parts(weight) for weight in weights]
    codes, exponents = (torch.stack([part.view(torch.uint8) for part in role]) for role in zip(*parts, strict=True))
    stacked = {"experts.down_proj": codes, "experts.down_proj_scale": exponents.view(torch.float8_e8m0fnu)}
    one_by_one = {}
    for expert, (code, exponent) in enumerate(parts):
        one_by_one |= {f"experts.{expert}.w2.weight": code, f"experts.{expert}.w2.scale": exponent}
    values = [stored.mxfp4_values(*part) for part in parts]
    for tensors, reported in ((one_by_one, "experts.1.w2.weight"), (stacked, "experts.down_proj")):
        model = nn.Module()
        model.experts = nn.Module()
        model.experts.down_proj = nn.Parameter(torch.empty(2, 16, 64, device="meta"))
        report = load_checkpoint(model, stored.write(tmp_path / reported, tensors))
        assert report.requantised == {reported: "MXFP4 exponents span more than 17"}
        loaded = model.experts.down_proj.dequantize()
        assert torch.equal(loaded[0], values[0])
        assert torch.equal(loaded[1], nvfp4.dequantize(*nvfp4.quantize_weight(values[1])))


@pytest.mark.parametrize("rows", [1, 3, 700], ids=str)
def test_a_few_rows_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a global scale of a part of the rows: chunks give the bits that the whole weight gives."""
    monkeypatch.setattr(decode, "_ELEMENTS_AT_ONCE", 64 * rows)
    codes, exponents = stored.mxfp4_parts(torch.randn(20, 64) * torch.logspace(0, -30, 20, base=2.0).unsqueeze(-1))
    packed, is_exact = mxfp4_to_nvfp4(codes.view(torch.uint8), exponents.view(torch.uint8))
    assert not is_exact
    expected = nvfp4.quantize_weight(stored.mxfp4_values(codes, exponents))
    assert all(torch.equal(part.float(), whole.float()) for part, whole in zip(packed, expected, strict=True))


FP8_SCALES = {
    "one": lambda n, k: torch.rand(1)[0] + 0.5,
    "one, in a list": lambda n, k: torch.rand(1) + 0.5,
    "a row": lambda n, k: torch.rand(n, 1) + 0.5,
    "a row, flat": lambda n, k: torch.rand(n).bfloat16() + 0.5,
    "64x64": lambda n, k: torch.rand(-(-n // 64), -(-k // 64)) + 0.5,
    "32x32": lambda n, k: torch.rand(-(-n // 32), -(-k // 32)).bfloat16() + 0.5,
}


@pytest.mark.parametrize(
    ("kind", "stack"),
    [(kind, stack) for kind in FP8_SCALES for stack in ((), (3,)) if not (stack and "row" in kind)],
)
def test_fp8_scales_of_every_shape(kind: str, stack: tuple[int, ...], tmp_path: Path) -> None:
    """Guards against a scale spread over the wrong rows, and against chunks that cut a block of 128 rows in two."""
    n, k = 200, 96
    elements = torch.randn(*stack, n, k).to(torch.float8_e4m3fn)
    one = FP8_SCALES[kind](n, k)
    scale = one if "one" in kind or not stack else torch.stack([one * (i + 1) for i in range(3)])
    spread = scale.float()
    if "x" in kind:
        size = int(kind.partition("x")[0])
        spread = spread.repeat_interleave(size, -2).repeat_interleave(size, -1)[..., :n, :k]
    elif kind == "a row, flat":
        spread = spread.unsqueeze(-1)
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(*stack, n, k, device="meta"))
    folder = stored.write(tmp_path, {"weight": elements, "weight_scale": scale})
    assert decode._ELEMENTS_AT_ONCE // k > n
    for elements_at_once in (1 << 20, 7 * k):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "_ELEMENTS_AT_ONCE", elements_at_once)
            load_checkpoint(model, folder)
        assert torch.equal(model.weight, elements.float() * spread)
