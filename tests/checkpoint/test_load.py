"""``load_checkpoint``: each format gives the numbers that it stands for, and the logits of the model it was made from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv4_compile import Nvfp4Tensor, nvfp4
from dsv4_compile.checkpoint import CheckpointError, LoadReport, load_checkpoint
from tests.checkpoint import stored
from tests.checkpoint.models import assert_same_model, empty_model, fp8_values, logits, nvfp4_values, with_values


def test_plain_with_native_names(model: Any, native: stored.Tensors, tmp_path: Path) -> None:
    """Guards against a name of DeepSeek's that ends up elsewhere: names are those transformers itself writes."""
    network = empty_model(model)
    report = load_checkpoint(network, stored.write(tmp_path, native, shards=3))
    assert_same_model(network, model)
    assert report.parameters == len(model.state_dict())
    assert not report.packed
    assert report.formats == {"plain": len(native)}
    assert len(report.recomputed_buffers) == 16


def test_plain_as_saved_by_transformers(model: Any, tmp_path: Path) -> None:
    """Guards against ``model.`` in front of native names, which transformers writes and DeepSeek does not."""
    model.save_pretrained(tmp_path)
    network = empty_model(model)
    load_checkpoint(network, tmp_path)
    assert_same_model(network, model)


def test_one_file_and_an_index_as_path(model: Any, native: stored.Tensors, tmp_path: Path) -> None:
    """Guards against paths that must be folders."""
    for path in (
        stored.write(tmp_path / "one", native) / "model.safetensors",
        stored.write(tmp_path / "many", native, shards=2) / "model.safetensors.index.json",
    ):
        network = empty_model(model)
        load_checkpoint(network, path)
        assert_same_model(network, model)


def test_modelopt(model: Any, huggingface: stored.Tensors, tmp_path: Path) -> None:
    """Guards against a global scale of the wrong half or expert, and any use of ``input_scale``."""
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    folder = stored.write(tmp_path, stored.modelopt(huggingface, stored.is_linear), config, shards=2)
    network = empty_model(model)
    report = load_checkpoint(network, folder)
    expected = with_values(model, lambda name, w: nvfp4_values(w) if stored.is_linear(name, w) else w)
    assert_same_model(network, expected)
    selected = [name for name, value in huggingface.items() if stored.is_linear(name, value)]
    assert report.formats["nvfp4"] == len(report.ignored_activation_scales) == len(selected)
    assert isinstance(network.model.layers[0].mlp.experts.gate_up_proj, Nvfp4Tensor)
    assert network.model.layers[0].mlp.experts.gate_up_proj.global_scale.shape == (8, 2)
    assert network.lm_head.weight.dtype == torch.bfloat16


def test_nvidia_mixed_precision(model: Any, native: stored.Tensors, tmp_path: Path) -> None:
    """Guards against one global flag: experts are NVFP4, linears FP8, the router bf16, MTP MXFP4 and not loaded."""
    config = {
        "quantization_config": {
            "quant_method": "fp8",
            "quant_algo": "MIXED_PRECISION",
            "moe_quant_algo": "NVFP4",
            "weight_block_size": [128, 128],
        }
    }
    written = stored.nvidia_mixed(native)
    network = empty_model(model)
    report = load_checkpoint(network, stored.write(tmp_path, written, config, shards=3))
    amax: dict[str, Tensor] = {}
    for name, value in stored.huggingface_tensors(model).items():
        pair = re.sub(r"(gate|up)_proj", "gate_up", name)
        amax[pair] = torch.maximum(amax.get(pair, torch.zeros(())), value.abs().max().float())

    def value_of(name: str, weight: Tensor) -> Tensor:
        if stored.is_expert(name):
            parts = stored.nvfp4_parts(weight, amax[re.sub(r"(gate|up)_proj", "gate_up", name)] / 2688)
            return nvfp4.dequantize(*parts, weight.dtype)
        if stored.is_linear(name, weight):
            return fp8_values(weight, 128, torch.float8_e8m0fnu)
        return weight

    assert_same_model(network, with_values(model, value_of))
    assert report.formats["fp8"] > 0
    assert sorted(report.ignored_mtp) == [f"mtp.0.ffn.experts.0.w{index}.weight" for index in (1, 2, 3)]
    assert len(report.packed) == 6


def test_compressed_tensors(model: Any, huggingface: stored.Tensors, tmp_path: Path) -> None:
    """Guards against a global scale that is multiplied by where it must be divided by, and (1,) taken for a shape."""
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "mixed-precision"}}
    network = empty_model(model)
    report = load_checkpoint(network, stored.write(tmp_path, stored.compressed_tensors(huggingface), config))

    def value_of(name: str, weight: Tensor) -> Tensor:
        if stored.is_expert(name):
            codes, scales, scale = stored.nvfp4_parts(weight)
            return nvfp4.dequantize(codes, scales, 1 / (1 / scale), weight.dtype)
        return fp8_values(weight, 128, torch.bfloat16) if stored.is_linear(name, weight) else weight

    assert_same_model(network, with_values(model, value_of))
    assert report.formats["nvfp4_ct"] == len(report.ignored_activation_scales) > 0


@pytest.mark.parametrize(
    ("block", "scale_dtype"),
    [(128, torch.float8_e8m0fnu), (32, torch.float8_e8m0fnu), (128, torch.float32)],
    ids=["V4", "V4.1", "base"],
)
def test_native(model: Any, native: stored.Tensors, tmp_path: Path, block: int, scale_dtype: torch.dtype) -> None:
    """Guards against MXFP4 taken over with any loss: the bf16 model of the same values has the same logits."""
    network = empty_model(model)
    report = load_checkpoint(network, stored.write(tmp_path, stored.native(native, block, scale_dtype), shards=2))

    def value_of(name: str, weight: Tensor) -> Tensor:
        if stored.is_expert(name):
            return stored.mxfp4_values(*stored.mxfp4_parts(weight)).to(weight.dtype)
        return fp8_values(weight, block, scale_dtype) if stored.is_linear(name, weight) else weight

    assert_same_model(network, with_values(model, value_of))
    assert report.formats["mxfp4"] == 3 * 8 * 3
    assert not report.requantised


def test_fp8_to_nvfp4(model: Any, native: stored.Tensors, tmp_path: Path) -> None:
    """Guards against FP8 quantised anew from values already rounded to bf16, and against packing what must not be."""
    written = stored.native(native)
    network = empty_model(model)
    report = load_checkpoint(network, stored.write(tmp_path, written), fp8="nvfp4")
    weight = network.model.layers[0].self_attn.q_a_proj.weight
    elements, scale = written["layers.0.attn.wq_a.weight"], written["layers.0.attn.wq_a.scale"]
    exponents = torch.exp2(scale.view(torch.uint8).float() - 127)
    exact = elements.float() * exponents.repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(elements)]
    codes, scales, global_scale = nvfp4.quantize_weight(exact)
    assert torch.equal(weight.codes, codes)
    assert torch.equal(weight.block_scales.view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(weight.global_scale, global_scale)
    assert len(report.requantised) == report.formats["fp8"]
    assert logits(network).isfinite().all()


def test_expert_range(model: Any, huggingface: stored.Tensors, tmp_path: Path) -> None:
    """Guards against experts of another rank, and against reading what this rank does not hold."""
    folder = stored.write(tmp_path, stored.modelopt(huggingface, stored.is_linear), shards=4)
    whole, part = empty_model(model), empty_model(model)
    everything = load_checkpoint(whole, folder)
    for layer in part.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            setattr(layer.mlp.experts, name, nn.Parameter(getattr(layer.mlp.experts, name)[:3], requires_grad=False))
    report = load_checkpoint(part, folder, experts=range(4, 7))
    for left, right in zip(part.model.layers, whole.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            ours, theirs = getattr(left.mlp.experts, name), getattr(right.mlp.experts, name)
            assert torch.equal(ours.dequantize(), theirs.dequantize()[4:7])
    experts = 3 * (8 - 3) * 3
    assert len(report.ignored) == experts
    assert report.num_bytes < everything.num_bytes
    with pytest.raises(CheckpointError, match=r"missing: .* expert 3"):
        load_checkpoint(empty_model(model), folder, experts=range(3))


def test_report_says_what_happened(model: Any, native: stored.Tensors, tmp_path: Path) -> None:
    """Guards against a report that hides what was ignored."""
    report = load_checkpoint(empty_model(model), stored.write(tmp_path, stored.nvidia_mixed(native)))
    assert isinstance(report, LoadReport)
    text = str(report)
    assert "NVFP4 (ModelOpt)" in text
    assert "72 activation scales ignored" in text
    assert "3 MTP tensors ignored" in text
