"""``quantize_checkpoint``: the numbers of ``quantize_``, in files that load."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4_compile import Nvfp4Tensor, cli, nvfp4, quantize_
from dsv4_compile.checkpoint import CheckpointError, inspect, load_checkpoint
from dsv4_compile.checkpoint.quantize import quantize_checkpoint
from tests.checkpoint import peak_memory, stored
from tests.checkpoint.models import empty_model


def tensors_of(folder: Path) -> stored.Tensors:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(*(tensor.flatten().contiguous().view(torch.uint8) for tensor in (ours, theirs)))


SOURCES: dict[str, Callable[[Any, stored.Tensors], stored.Tensors]] = {
    "huggingface": lambda model, native: stored.huggingface_tensors(model),
    "stacked": lambda model, native: dict(model.state_dict()),
    "native": lambda model, native: native,
}


@pytest.mark.parametrize("names", SOURCES)
def test_same_codes_as_quantize_(
    model: Any, native: stored.Tensors, config: dict[str, Any], names: str, tmp_path: Path
) -> None:
    """Guards against a checkpoint whose model is not the one that ``quantize_`` makes of the same bf16 weights."""
    source = stored.write(tmp_path / "bf16", SOURCES[names](model, native), config, shards=3)
    report = quantize_checkpoint(source, tmp_path / "nvfp4", shard_bytes=1 << 20)
    loaded, expected = empty_model(model), copy.deepcopy(model)
    load_checkpoint(loaded, tmp_path / "nvfp4")
    packed = quantize_(expected).quantized
    theirs = dict(expected.named_parameters())
    for name, ours in loaded.named_parameters():
        if name not in packed:
            assert_same_bits(ours.data, theirs[name].data.to(ours.dtype))
            continue
        assert_same_bits(ours.codes, theirs[name].codes)
        assert_same_bits(ours.block_scales, theirs[name].block_scales)
        scales = ours.global_scale if ours.global_scale.dim() < 2 else ours.global_scale[:, 0]
        assert_same_bits(scales, theirs[name].global_scale)
        if ours.global_scale.dim() == 2:  # gate and up
            assert_same_bits(ours.global_scale[:, 1], theirs[name].global_scale)
    assert {name for name, value in loaded.named_parameters() if isinstance(value.data, Nvfp4Tensor)} == set(packed)
    assert len(report.quantized) == len(packed) - 6 + 3 * 8 * 3  # three layers, 8 experts, 3 projections
    assert not inspect(tmp_path / "nvfp4").problems


def test_native_is_taken_over(model: Any, native: stored.Tensors, config: dict[str, Any], tmp_path: Path) -> None:
    """Guards against a loss in MXFP4 experts, and FP8 quantised from values rounded to bf16 on the way."""
    source = stored.write(tmp_path / "native", stored.native(native), config, shards=2)
    report = quantize_checkpoint(source, tmp_path / "nvfp4")
    converted, direct = empty_model(model), empty_model(model)
    load_checkpoint(converted, tmp_path / "nvfp4")
    load_checkpoint(direct, source, fp8="nvfp4")
    theirs = dict(direct.named_parameters())
    for name, ours in converted.named_parameters():
        if isinstance(ours.data, Nvfp4Tensor):
            packed = theirs[name].data
            packed = packed if isinstance(packed, Nvfp4Tensor) else Nvfp4Tensor.from_float(packed)
            assert_same_bits(ours.codes, packed.codes)
            assert torch.equal(ours.dequantize(), packed.dequantize())
        else:
            assert_same_bits(ours.data, theirs[name].data)
    assert len(report.taken_over) == 3 * 8 * 3
    assert {weight.source for weight in report.quantized} == {"fp8", "plain"}
    tensors = tensors_of(tmp_path / "nvfp4")
    expert = "model.layers.1.mlp.experts.2"
    assert_same_bits(tensors[f"{expert}.gate_proj.weight_scale_2"], tensors[f"{expert}.up_proj.weight_scale_2"])


def test_mxfp4_outside_the_span(native: stored.Tensors, tmp_path: Path) -> None:
    """Guards against block scales that E4M3 cannot hold: such a weight is quantised anew, and says so."""
    tensors = stored.native({name: value for name, value in native.items() if name.startswith("layers.0.")})
    tensors["layers.0.ffn.experts.0.w1.scale"].view(torch.uint8)[0] = 200
    report = quantize_checkpoint(stored.write(tmp_path / "native", tensors), tmp_path / "nvfp4")
    anew = [weight for weight in report.quantized if weight.source == "mxfp4"]
    assert [weight.name for weight in anew] == ["model.layers.0.mlp.experts.0.gate_proj.weight"]
    assert anew[0].reason == "MXFP4 exponents span more than 17"
    up = "layers.0.ffn.experts.0.w3.weight"
    assert_same_bits(
        tensors_of(tmp_path / "nvfp4")["model.layers.0.mlp.experts.0.up_proj.weight"].view(torch.int8), tensors[up]
    )


def test_mixed_precision_source(model: Any, native: stored.Tensors, config: dict[str, Any], tmp_path: Path) -> None:
    """Guards against NVFP4 quantised twice, MTP misread, and a static activation scale carried over."""
    written = stored.nvidia_mixed(native)
    source = stored.write(tmp_path / "mixed", written, config)
    report = quantize_checkpoint(source, tmp_path / "nvfp4")
    tensors = tensors_of(tmp_path / "nvfp4")
    assert_same_bits(
        tensors["model.layers.0.mlp.experts.3.down_proj.weight"], written["layers.0.ffn.experts.3.w2.weight"]
    )
    for name in ("mtp.0.ffn.experts.0.w1.weight", "mtp.0.ffn.experts.0.w1.scale"):
        assert_same_bits(tensors[name], written[name])
    assert not [name for name in tensors if name.endswith("input_scale")]
    assert (report.mtp, report.dropped_activation_scales) == (3, 72)
    assert len(load_checkpoint(empty_model(model), tmp_path / "nvfp4").ignored_mtp) == 3


def test_left_alone_fp8_becomes_bf16(native: stored.Tensors, config: dict[str, Any], tmp_path: Path) -> None:
    """Guards against an excluded weight in a form that a reader of this layout does not expect."""
    written = stored.native(native)
    source = stored.write(tmp_path / "native", written, config)
    report = quantize_checkpoint(
        source, tmp_path / "nvfp4", exclude=["*.self_attn.*", "*.mlp.gate.weight", "*embed*", "*head*"]
    )
    kept = tensors_of(tmp_path / "nvfp4")["model.layers.0.self_attn.q_a_proj.weight"]
    assert_same_bits(
        kept, stored.fp8_values(written["layers.0.attn.wq_a.weight"], written["layers.0.attn.wq_a.scale"], 128)
    )
    assert report.left_alone["model.layers.0.self_attn.q_a_proj.weight"] == "excluded by '*.self_attn.*'"
    excluded = json.loads((tmp_path / "nvfp4" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert "model.layers.*.self_attn.q_a_proj" in excluded


@pytest.mark.parametrize(
    ("share", "experts_share", "linears_share"),
    [("experts", True, False), ("merged", True, True), ("none", False, False)],
)
def test_share(small: Path, tmp_path: Path, share: str, experts_share: bool, linears_share: bool) -> None:
    """Guards against gate and up with two global scales where engines read one (vLLM issue 54150)."""
    quantize_checkpoint(small, tmp_path / "nvfp4", share=share)
    tensors = tensors_of(tmp_path / "nvfp4")
    layer = "model.layers.0"
    gate, up = (tensors[f"{layer}.mlp.experts.0.{name}_proj.weight_scale_2"] for name in ("gate", "up"))
    q, kv = (tensors[f"{layer}.self_attn.{name}_proj.weight_scale_2"] for name in ("q_a", "kv"))
    assert torch.equal(gate, up) == experts_share
    assert torch.equal(q, kv) == linears_share
    original = tensors_of(small)
    amax = max(original[f"{layer}.mlp.experts.0.{name}_proj.weight"].abs().max().item() for name in ("gate", "up"))
    assert up.item() == torch.tensor(amax).div(2688).item()


def test_layout(small: Path, tmp_path: Path) -> None:
    """Guards against a folder that others cannot read: names, dtypes, configs, index, permissions, other files."""
    report = quantize_checkpoint(small, tmp_path / "nvfp4", shard_bytes=4096)
    folder = tmp_path / "nvfp4"
    original, tensors = tensors_of(small), tensors_of(folder)
    name = "model.layers.0.self_attn.q_a_proj.weight"
    parts = nvfp4.quantize_weight(original[name])
    for suffix, part in zip(("", "_scale", "_scale_2"), parts, strict=True):
        assert_same_bits(tensors[f"{name}{suffix}"], part)
    assert_same_bits(tensors["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    assert report.left_alone == {
        "model.embed_tokens.weight": "excluded by '*embed*'",
        "model.layers.0.mlp.gate.weight": "excluded by '*.mlp.gate.weight'",
        "model.layers.0.mlp.odd.weight": "K = 24 is not divisible by 16",
        "model.layers.0.mlp.wide.weight": "float32 weight",
    }
    config = json.loads((folder / "config.json").read_text())
    quant = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    left = ["model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.0.mlp.odd", "model.layers.0.mlp.wide"]
    assert quant["exclude_modules"] == config["quantization_config"]["ignore"] == left
    assert (quant["quant_algo"], quant["group_size"], config["model_type"]) == ("NVFP4", 16, "toy")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert {file: sorted(load_file(folder / file)) for file in set(index["weight_map"].values())} == {
        file.name: sorted(n for n, f in index["weight_map"].items() if f == file.name)
        for file in folder.glob("*.safetensors")
    }
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert {path.name for path in folder.iterdir() if path.suffix != ".safetensors"} == {
        "config.json", "hf_quant_config.json", "model.safetensors.index.json", "quantization_report.json", "tokenizer.json",
    }  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        (folder / "config.json").stat().st_mode & 0o777
    }


def test_others_read_it(small: Path, tmp_path: Path) -> None:
    """Guards against a writer and a reader of ours that are wrong alike: compressed-tensors' own code unpacks."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    report = quantize_checkpoint(small, tmp_path / "nvfp4", search="six_four")
    original, tensors = tensors_of(small), tensors_of(tmp_path / "nvfp4")
    for weight in report.quantized:
        codes, scales, scale = (tensors[f"{weight.name}{suffix}"] for suffix in ("", "_scale", "_scale_2"))
        values = unpack_fp4_from_uint8(codes, *weight.shape, dtype=torch.float32).unflatten(1, (-1, 16))
        exact = original[weight.name].float()
        error = (values * scales.float().unsqueeze(-1) * scale).flatten(1) - exact
        assert error.norm() / exact.norm() < 0.11
    assert len(report.quantized) == 5


def test_patterns(small: Path, tmp_path: Path) -> None:
    """Patterns hold for the names of the result and of the model's stacked parameters; ``include`` admits fp32."""
    report = quantize_checkpoint(small, tmp_path / "a", include=["*.experts.gate_up_proj", "*.wide.weight"])
    assert sorted(weight.name for weight in report.quantized) == [
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.wide.weight",
    ]
    report = quantize_checkpoint(small, tmp_path / "b", exclude="*.down_proj*")
    assert report.left_alone["model.layers.0.mlp.experts.0.down_proj.weight"] == "excluded by '*.down_proj*'"
    assert report.left_alone["model.layers.0.mlp.gate.weight"] == "router: it stands next to experts"
    assert report.left_alone["model.embed_tokens.weight"] == "embedding, by its name"


def test_report(small: Path, tmp_path: Path) -> None:
    """Guards against figures that are not those of the stored weights."""
    report = quantize_checkpoint(small, tmp_path / "nvfp4", search="wide")
    original, tensors = tensors_of(small), tensors_of(tmp_path / "nvfp4")
    found = json.loads((tmp_path / "nvfp4" / "quantization_report.json").read_text())
    by_name = {weight["name"]: weight for weight in found["weights"]}
    for weight in report.quantized:
        exact = original[weight.name].double()
        parts = (tensors[f"{weight.name}{suffix}"] for suffix in ("", "_scale", "_scale_2"))
        error = nvfp4.dequantize(*parts).double() - exact
        sqnr = 10 * torch.log10(exact.square().sum() / error.square().sum()).item()
        assert by_name[weight.name]["sqnr_db"] == pytest.approx(sqnr, abs=2e-3)
    groups = report.by_layer()
    assert [group.name for group in groups] == ["model.layers.0"]
    assert groups[0].gain_db > 1
    text = str(report)
    assert "5 weights quantised" in text
    assert "by the search" in text
    assert report.as_json() == report.from_json(found).as_json()


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "search": ({"search": "best"}, "search must be one of none, six_four, wide, got 'best'"),
    "share": ({"share": "all"}, "share must be one of experts, merged, none, got 'all'"),
    "shard_bytes": ({"shard_bytes": 0}, "shard_bytes must be positive, got 0"),
    "include": ({"include": "*.nothing"}, r"include must match a weight, got '\*.nothing' which matches none"),
    "nothing to do": ({"exclude": "*"}, "source must hold weights to quantise, got none"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_rejects_arguments(small: Path, tmp_path: Path, case: str) -> None:
    arguments, message = ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(small, tmp_path / "nvfp4", **arguments)
    assert not (tmp_path / "nvfp4").exists()


def test_rejects_sources(small: Path, tmp_path: Path) -> None:
    quantize_checkpoint(small, tmp_path / "nvfp4", include="*_proj.weight")
    with pytest.raises(CheckpointError, match="source must hold weights to quantise, got only NVFP4"):
        quantize_checkpoint(tmp_path / "nvfp4", tmp_path / "again")
    name = "model.layers.0.self_attn.q_a_proj.weight"
    bad = {name: torch.full((16, 32), float("inf")).bfloat16()}
    with pytest.raises(CheckpointError, match=f"{name}: weight must be finite, got NaN or Inf"):
        quantize_checkpoint(stored.write(tmp_path / "inf", bad), tmp_path / "from_inf")
    truncated = shutil.copytree(small, tmp_path / "truncated")
    file = truncated / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: no valid safetensors file"):
        quantize_checkpoint(truncated, tmp_path / "from_truncated")


def test_non_finite_left_alone_is_reported(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(16, 16).bfloat16(), "a.bias": torch.tensor([float("nan"), 1.0])}
    report = quantize_checkpoint(stored.write(tmp_path / "source", tensors), tmp_path / "nvfp4")
    assert "a.bias holds NaN or Inf, as in the source" in report.summary()


QUANTIZE = """
import sys
from dsv4_compile.checkpoint.quantize import quantize_checkpoint
from tests.checkpoint.peak_memory import peak_bytes

quantize_checkpoint(sys.argv[1], sys.argv[2] + "/small")  # libraries are not the quantiser's
print(peak_bytes(lambda: quantize_checkpoint(sys.argv[3], sys.argv[2] + "/large", shard_bytes=8 << 20)))
"""


@pytest.mark.skipif(not peak_memory.RESET.exists(), reason="reads Linux's accounts of memory")
def test_peak_memory(small: Path, tmp_path: Path) -> None:
    """Guards against a stacked parameter that is read whole, files kept in memory, and sources mapped and kept."""
    experts = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(48, 1024, 1024).bfloat16(),
        "model.layers.0.mlp.experts.down_proj": torch.randn(48, 1024, 512).bfloat16(),
    }
    large = stored.write(tmp_path / "source", experts)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", QUANTIZE, str(small), str(tmp_path), str(large)]
    environment = os.environ | peak_memory.ENVIRONMENT | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=root)
    # Two files, one weight of 1 MiB and its half of the read-ahead, two threads' buffers of 2.5 MiB each: 24 MiB.
    # The lower bound is one of the files: less, and something else was measured.
    assert 8 << 20 < int(output.stdout) < 40 << 20 < sum(value.nbytes for value in experts.values()) / 3


def test_command(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "quantize",
        str(small),
        str(tmp_path / "nvfp4"),
        "--search",
        "six_four",
        "--layers",
        "--shard-gib",
        "0.5",
    ]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    for text in (
        "SQNR of the quantised weights by kind",
        "by layer",
        "self_attn.q_a_proj",
        "dB by the search",
        "float32 weight",
    ):
        assert text in output
    assert cli.main(["quantize", str(small), str(small)]) == 1
    assert "dsv4-compile quantize: quantize: destination must differ" in capsys.readouterr().err
