"""Independent readers: other packages' own code reads the same numbers from the same tensors."""

from pathlib import Path

import torch
from torch import nn

from dsv4_compile.checkpoint import load_checkpoint
from tests.checkpoint import stored


def test_compressed_tensors_reads_the_same(tmp_path: Path) -> None:
    """The compressed-tensors package's own decompressor is the oracle: what it reads is what is loaded."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    weight = torch.randn(16, 64).bfloat16()
    codes, scales, scale = stored.nvfp4_parts(weight)
    parts = {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": (1 / scale).reshape(1)}
    network = nn.Linear(64, 16, bias=False)
    load_checkpoint(network, stored.write(tmp_path, parts))
    values = unpack_fp4_from_uint8(codes, 16, 64, dtype=torch.float32)
    expected = values.unflatten(1, (-1, 16)) * (scales.float() / parts["weight_global_scale"]).unsqueeze(-1)
    torch.testing.assert_close(network.weight.dequantize(), expected.flatten(1), rtol=2**-22, atol=0)


def test_modelopt_formula(tmp_path: Path) -> None:
    """ModelOpt's and torchao's convention, written out: value(nibble) * e4m3 scale * weight_scale_2, low nibble first."""
    codes = torch.tensor([[0x21, 0x43, 0x65, 0x97, 0xBA, 0xDC, 0xFE, 0x08]], dtype=torch.uint8)
    parts = {
        "weight": codes,
        "weight_scale": torch.tensor([[2.0]]).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.25),
    }
    network = nn.Linear(16, 1, bias=False)
    load_checkpoint(network, stored.write(tmp_path, parts))
    magnitudes = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, -0.0, 0.0]
    assert network.weight.dequantize().tolist() == [[value * 0.5 for value in magnitudes]]
