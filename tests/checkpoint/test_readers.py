"""Independent readers: what other packages' own code makes of the same tensors is what is loaded."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv4_compile.checkpoint import load_checkpoint
from tests.checkpoint import stored

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def loaded(folder: Path, tensors: stored.Tensors, *shape: int) -> Tensor:
    """The values of the only weight of a checkpoint, in fp32."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(*shape, device="meta"))
    load_checkpoint(model, stored.write(folder, tensors))
    return model.weight.dequantize()


def random_parts(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every byte of codes, block scales from subnormal to 448, and global scales that are no powers of two."""
    codes = torch.randint(0, 256, (*lead, 32, 64), dtype=torch.uint8)
    scales = torch.randint(0, 0x7F, (*lead, 32, 8), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes, scales, (torch.rand(lead) + 0.5) / 2688


def test_compressed_tensors_writes(tmp_path: Path) -> None:
    """Guards against our idea of compressed-tensors: its own compressor writes, its own decompressor says what it is.

    Its decompressor divides the block scale by the global scale and multiplies, in fp32, then rounds to bf16: an element
    may differ from ours by one bf16 rounding where the two fp32 values straddle it.
    """
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme: QuantizationScheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    weight = torch.randn(32, 128).bfloat16()
    global_scale = generate_gparam(weight.min(), weight.max())
    blocks = weight.unflatten(1, (-1, 16))
    scale, zero_point = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=global_scale)
    written = NVFP4PackedCompressor.compress(
        {
            "weight": weight,
            "weight_scale": scale,
            "weight_global_scale": global_scale,
            "weight_zero_point": zero_point,
        },
        scheme,
    )
    assert written.keys() == {"weight_packed", "weight_scale", "weight_global_scale"}
    values = loaded(tmp_path, written, 32, 128)
    theirs = NVFP4PackedCompressor.decompress(dict(written), scheme)["weight"]
    torch.testing.assert_close(values.bfloat16(), theirs.bfloat16(), rtol=2**-7, atol=0)
    assert (values.bfloat16() == theirs.bfloat16()).float().mean() > 0.99
    error = (values - weight.float()).norm() / weight.float().norm()
    assert error < 0.12  # NVFP4 of Gaussian values: 20 dB; an inverted or forgotten scale gives 1 or more


def test_compressed_tensors_unpacks_the_same(tmp_path: Path) -> None:
    """Guards against nibbles in the other order, over every byte and block scale there is."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    codes, scales, scale = random_parts()
    divisor = (1 / scale).reshape(1)
    parts = {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": divisor}
    theirs = unpack_fp4_from_uint8(codes, 32, 128, dtype=torch.float32).unflatten(1, (-1, 16))
    expected = (theirs * (scales.float() / divisor).unsqueeze(-1)).flatten(1)
    torch.testing.assert_close(loaded(tmp_path, parts, 32, 128), expected, rtol=2**-22, atol=0)


def modelopt_parts(*lead: int) -> tuple[stored.Tensors, tuple[Tensor, Tensor, Tensor]]:
    codes, scales, scale = random_parts(*lead)
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": scale}, (codes, scales, scale)


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_modelopt_convention(lead: tuple[int, ...], tmp_path: Path) -> None:
    """ModelOpt's convention in plain loops: value of the nibble, low one first, * block scale * weight_scale_2."""
    tensors, (codes, scales, scale) = modelopt_parts(*lead)
    expected = torch.empty(*lead, 32, 128)
    flat_out, flat_scales = expected.view(-1, 32, 128), scales.float().view(-1, 32, 8)
    for matrix, packed in enumerate(codes.view(-1, 32, 64).tolist()):
        factor = scale.view(-1)[matrix]
        for row, line in enumerate(packed):
            nibbles = [nibble for byte in line for nibble in (byte & 15, byte >> 4)]
            values = torch.tensor([MAGNITUDES[n & 7] * (-1.0 if n & 8 else 1.0) for n in nibbles])
            flat_out[matrix, row] = values * flat_scales[matrix, row].repeat_interleave(16) * factor
    assert torch.equal(loaded(tmp_path, tensors, *lead, 32, 128), expected)


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_torchao_reads_the_same(lead: tuple[int, ...], tmp_path: Path) -> None:
    """torchao's NVFP4Tensor as the reader. It rounds scale * global scale first, we code * scale: two fp32 roundings."""
    pytest.importorskip("torchao")
    torchao: Any = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")

    tensors, (codes, scales, scale) = modelopt_parts(*lead)
    per_matrix = scale.view(*lead, 1, 1) if lead else scale
    expected = torchao.NVFP4Tensor(codes, scales, 16, torch.float32, per_matrix).dequantize(torch.float32)
    torch.testing.assert_close(loaded(tmp_path, tensors, *lead, 32, 128), expected, rtol=2**-22, atol=0)


def test_torchao_writes(tmp_path: Path) -> None:
    """Guards against a reader and a writer of ours that are wrong alike: torchao quantises, we read."""
    pytest.importorskip("torchao")
    torchao: Any = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")

    weight = torch.randn(32, 128)
    theirs = torchao.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=weight.abs().amax() / 2688)
    tensors = {"weight": theirs.qdata, "weight_scale": theirs.scale, "weight_scale_2": theirs.per_tensor_scale}
    values = loaded(tmp_path, tensors, 32, 128)
    torch.testing.assert_close(values, theirs.dequantize(torch.float32), rtol=2**-22, atol=0)
    assert (values - weight).norm() / weight.norm() < 0.12
