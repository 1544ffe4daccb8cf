"""``inspect`` and ``dsv4-compile inspect``: what a checkpoint holds, and what is wrong with it, without a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4_compile.checkpoint import inspect
from dsv4_compile.cli import main
from tests.checkpoint import stored

CONFIG = {"quantization_config": {"quant_method": "fp8", "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4"}}


def test_nvidia_mixed_precision(native: stored.Tensors, tmp_path: Path) -> None:
    """Guards against a format named after the config, against bytes counted twice, and MTP taken for a layer."""
    written = stored.nvidia_mixed(native)
    found = inspect(stored.write(tmp_path, written, CONFIG, shards=3))
    assert not found.problems
    assert (found.files, found.layers, found.mtp, found.activation_scales) == (3, 3, 3, 72)
    assert found.num_bytes == sum(value.nbytes for value in written.values())
    activation_scales = sum(value.nbytes for name, value in written.items() if name.endswith("input_scale"))
    assert sum(group.num_bytes for group in found.groups) == found.num_bytes - activation_scales
    assert found.announced == "fp8, MIXED_PRECISION"
    experts = next(group for group in found.groups if group.name == "layers.*.ffn.experts.*.w1.weight")
    assert (experts.format, experts.dtype) == ("nvfp4", "U8 + F8_E4M3 + F32")
    assert (experts.count, experts.layers, experts.shape) == (3 * 8, {0, 1, 2}, (128, 256))
    formats = {group.name: group.format for group in found.groups}
    assert formats["layers.*.attn.wq_a.weight"] == "fp8"
    assert formats["layers.*.ffn.gate.weight"] == "plain"
    assert formats["mtp.*.ffn.experts.*.w1.weight"] == "mxfp4"


def damaged(native: stored.Tensors) -> stored.Tensors:
    """Four things wrong: a NaN scale, a zero global scale, an expert that is not there, codes without scales."""
    written = {name: value.clone() for name, value in stored.nvidia_mixed(native).items()}
    written["layers.0.ffn.experts.1.w1.weight_scale"].view(torch.uint8)[2, 3] = 0x7F
    written["layers.1.ffn.experts.0.w2.weight_scale_2"].zero_()
    for part in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        del written[f"layers.2.ffn.experts.5.w3.{part}"]
    written["x.weight"] = torch.zeros(2, 8, dtype=torch.uint8)
    return written


def test_problems(native: stored.Tensors, tmp_path: Path) -> None:
    """Guards against a checkpoint called good that cannot be loaded, and one problem that hides the others."""
    folder = stored.write(tmp_path, damaged(native), {"quantization_config": {"quant_algo": "W4A8"}}, shards=2)
    headers_only = inspect(folder, scales=False)
    assert sorted(headers_only.problems) == [
        "config.json: quant_algo must be one of NVFP4, MIXED_PRECISION, FP8, FP8_PB_WO, NONE, got 'W4A8'",
        "layers.2.ffn: expert 5 lacks w3.weight",
        "x.weight: packed codes (U8) must have block scales, got none",
    ]
    assert set(inspect(folder).problems) - set(headers_only.problems) == {
        "layers.0.ffn.experts.1.w1.weight_scale: block scales must be numbers, got NaN",
        "layers.1.ffn.experts.0.w2.weight_scale_2: must be positive and finite, got 0.0",
    }


def test_command(native: stored.Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a command that ends in success whatever it found."""
    whole = stored.write(tmp_path / "whole", stored.nvidia_mixed(native), CONFIG)
    assert main(["inspect", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "1 file, 3 layers, " in printed
    assert "configs announce fp8, MIXED_PRECISION" in printed
    assert "0 problems" in printed
    assert main(["inspect", str(stored.write(tmp_path / "damaged", damaged(native)))]) == 1
    assert "4 problems\n" in capsys.readouterr().out
    assert main(["inspect", "--headers-only", str(tmp_path / "damaged")]) == 1
    assert "2 problems\n" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "must be a safetensors file or a folder of them, got nothing there" in capsys.readouterr().err


def test_layers_are_ranges(tmp_path: Path) -> None:
    """Guards against a table that says how many layers have a format and not which, and MTP counted."""
    layers = {f"layers.{index}.a.weight": torch.ones(2) for index in (0, 1, 2, 5, 7, 8)}
    found = inspect(stored.write(tmp_path, layers | {"layers.9.eh_proj.weight": torch.ones(2)}))
    assert found.mtp == 1
    text = str(found)
    assert "0-2, 5, 7-8" in text
    assert "1 file, 6 layers" in text
