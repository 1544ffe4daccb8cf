"""``load_checkpoint``: each format gives the numbers it stands for, and what does not fit changes nothing."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv4_compile import Nvfp4Tensor, nvfp4
from dsv4_compile.checkpoint import CheckpointError, LoadReport, load_checkpoint
from dsv4_compile.demo import demo_model
from tests.checkpoint import stored

IDS = torch.arange(24).view(1, 24) * 17 % 512


@pytest.fixture(scope="module")
def model() -> Any:
    """Weights multiples of what survives a bf16 rounding; buffers in fp32, as from_pretrained leaves them."""
    network = demo_model()
    for name, buffer in demo_model_buffers(network.config).items():
        owner, _, attribute = name.rpartition(".")
        network.get_submodule(owner)._buffers[attribute] = buffer
    for parameter in network.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return network


def demo_model_buffers(config: Any) -> dict[str, Tensor]:
    from transformers import DeepseekV4ForCausalLM

    fresh = DeepseekV4ForCausalLM(config)
    persistent = set(fresh.state_dict())
    return {name: buffer for name, buffer in fresh.named_buffers() if name not in persistent}


@pytest.fixture(scope="module")
def native(model: Any, tmp_path_factory: pytest.TempPathFactory) -> stored.Tensors:
    return stored.native_tensors(model, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def huggingface(model: Any) -> stored.Tensors:
    return stored.huggingface_tensors(model)


def empty_model(model: Any) -> Any:
    """The same architecture on the meta device."""
    from transformers import DeepseekV4ForCausalLM

    with torch.device("meta"):
        return DeepseekV4ForCausalLM(model.config).to(torch.bfloat16).eval()


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(IDS, use_cache=False).logits
    return result


def with_values(model: Any, value_of: Callable[[str, Tensor], Tensor]) -> Any:
    """A copy whose parameters are ``value_of`` HuggingFace's per-expert name and value."""
    network = copy.deepcopy(model)
    for name, parameter in network.named_parameters():
        block, _, projection = name.rpartition(".")
        for expert in range(parameter.shape[0]) if projection in ("gate_up_proj", "down_proj") else ():
            if projection == "down_proj":
                key = f"{block}.{expert}.down_proj.weight"
                parameter.data[expert] = value_of(key, parameter.data[expert])
            else:
                for half, rows in zip(("gate", "up"), parameter.data[expert].chunk(2), strict=True):
                    rows.copy_(value_of(f"{block}.{expert}.{half}_proj.weight", rows.clone()))
        if projection not in ("gate_up_proj", "down_proj"):
            parameter.data.copy_(value_of(name, parameter.data.clone()))
    return network


def unpacked(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.dequantize() if isinstance(p, Nvfp4Tensor) else p for name, p in network.state_dict().items()}


def assert_same_model(actual: Any, expected: Any) -> None:
    """Every tensor stands for the same values, and the models compute the same bits."""
    left, right = unpacked(actual), unpacked(expected)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    assert torch.equal(logits(actual), logits(expected))


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


def nvfp4_values(weight: Tensor) -> Tensor:
    return nvfp4.dequantize(*nvfp4.quantize_weight(weight), weight.dtype)


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


def fp8_values(weight: Tensor, block: int, scale_dtype: torch.dtype) -> Tensor:
    return stored.fp8_values(*stored.fp8_parts(weight, block, scale_dtype), block)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fp8": "int8"}, "fp8 must be one of bfloat16, nvfp4, got 'int8'"),
        ({"experts": [1, 2]}, r"experts must be a range of expert numbers with step 1, got \[1, 2\]"),
        ({"experts": range(0)}, "experts must be a range"),
        ({"experts": range(-1, 2)}, "experts must be a range"),
    ],
)
def test_rejects_arguments(arguments: dict[str, Any], message: str) -> None:
    """Guards against options that are silently without effect."""
    with pytest.raises(ValueError, match=f"^load_checkpoint: {message}"):
        load_checkpoint(nn.Linear(16, 16), "nowhere", **arguments)


# Other models, by the same rules.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 16)
        self.lm_head = nn.Linear(16, 8, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


@pytest.mark.parametrize(
    "names", [["embed_tokens.weight"], ["lm_head.weight"], ["embed_tokens.weight", "lm_head.weight"]]
)
def test_tied_weights(names: list[str], tmp_path: Path) -> None:
    """Guards against weights that are no longer tied after loading, and a demand for both names."""
    network, value = Tied(), torch.randn(8, 16)
    load_checkpoint(network, stored.write(tmp_path, {name: value.clone() for name in names}))
    assert network.lm_head.weight is network.embed_tokens.weight
    assert torch.equal(network.lm_head.weight, value)


class Mixtral(nn.Module):
    """Experts in a list, as many models have them: no stacking."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(32, 16, bias=False)}) for _ in range(2))


def test_experts_in_a_list(tmp_path: Path) -> None:
    """Guards against rules that only know stacked experts."""
    network = Mixtral()
    values = {f"experts.{i}.gate_proj.weight": torch.randn(16, 32) for i in range(2)}
    report = load_checkpoint(network, stored.write(tmp_path, stored.modelopt(values, lambda *_: True)))
    assert len(report.packed) == 2
    for index in range(2):
        weight = network.experts[index]["gate_proj"].weight
        assert torch.equal(weight.dequantize(), nvfp4_values(values[f"experts.{index}.gate_proj.weight"]).float())


def test_own_flat_state_dict(model: Any, tmp_path: Path) -> None:
    """Guards against our own way to store a packed model that we cannot read back."""
    from dsv4_compile import quantize_
    from dsv4_compile.quantization import flatten_state_dict

    network, again = copy.deepcopy(model), empty_model(model)
    quantize_(network)
    load_checkpoint(again, stored.write(tmp_path, flatten_state_dict(network.state_dict())))
    assert_same_model(again, network)


def test_casts_are_reported(tmp_path: Path) -> None:
    """Guards against an fp32 checkpoint rounded to bf16 without a word."""
    network = nn.Linear(16, 4).bfloat16()
    values = {"weight": torch.randn(4, 16), "bias": torch.randn(4).bfloat16()}
    report = load_checkpoint(network, stored.write(tmp_path, values))
    assert report.cast == ["weight"]
    assert torch.equal(network.weight, values["weight"].bfloat16())


def test_quantised_model_is_filled_again(tmp_path: Path) -> None:
    """Guards against a packed model that cannot take a plain checkpoint, or one of other global scales."""
    from dsv4_compile import quantize_

    network = nn.Sequential(nn.Linear(32, 16, bias=False)).bfloat16()
    quantize_(network)
    value = {"0.weight": torch.randn(16, 32).bfloat16()}
    load_checkpoint(network, stored.write(tmp_path / "plain", value))
    assert torch.equal(network[0].weight, value["0.weight"])
    load_checkpoint(network, stored.write(tmp_path / "packed", stored.modelopt(value, lambda *_: True)))
    assert torch.equal(network[0].weight.dequantize(), nvfp4_values(value["0.weight"]))


# Independent readers.


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


# Errors: all of them at once, and nothing changed.


def assert_refused(network: nn.Module, path: Path, *messages: str, **arguments: Any) -> CheckpointError:
    """The load fails with these problems, and every tensor of the model is the one it was."""
    before = {name: (id(value), value.clone()) for name, value in network.state_dict(keep_vars=True).items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(network, path, **arguments)
    for message in messages:
        assert re.search(message, str(caught.value)), (message, str(caught.value))
    for name, value in network.state_dict(keep_vars=True).items():
        assert id(value) == before[name][0]
        assert torch.equal(value, before[name][1])
    return caught.value


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 16, bias=False)
        self.b = nn.Linear(32, 16)
        self.register_buffer("table", torch.zeros(4, dtype=torch.int64))


def small_tensors() -> stored.Tensors:
    packed = stored.modelopt({"a.weight": torch.randn(16, 32)}, lambda *_: True)
    return {
        **packed,
        "b.weight": torch.randn(16, 32),
        "b.bias": torch.randn(16),
        "table": torch.arange(4),
    }


def test_all_problems_in_one_message(tmp_path: Path) -> None:
    """Guards against one error a run."""
    tensors = small_tensors()
    del tensors["b.bias"]
    tensors["b.weight"] = torch.randn(16, 16)
    tensors["table"] = torch.rand(4)
    tensors["c.weight"] = torch.randn(2)
    error = assert_refused(
        Small(),
        stored.write(tmp_path, tensors),
        r"missing: b.bias \(16,\)",
        r"shape: b.weight must be \(16, 32\) for b.weight, got \(16, 16\)",
        "dtype: table must be torch.int64 for table, got F32",
        r"unexpected: c.weight \(2,\)",
    )
    assert len(error.problems) == 4
    assert str(error).startswith(f"load_checkpoint: {tmp_path}: 4 problems:")


def test_not_strict(tmp_path: Path) -> None:
    """Guards against strict=False forgiving more than weights without a parameter."""
    tensors = small_tensors() | {"c.weight": torch.randn(2)}
    assert load_checkpoint(Small(), stored.write(tmp_path / "a", tensors), strict=False).ignored == ["c.weight"]
    del tensors["b.bias"]
    assert_refused(Small(), stored.write(tmp_path / "b", tensors), "missing: b.bias", strict=False)


def set_byte(value: int) -> Callable[[Tensor], Tensor]:
    def change(scales: Tensor) -> Tensor:
        scales.view(torch.uint8)[3, 1] = value
        return scales

    return change


DAMAGED: dict[str, tuple[str, Any, str]] = {
    "NaN block scale": ("a.weight_scale", set_byte(0x7F), "a.weight_scale: block scales must be numbers, got NaN"),
    "negative NaN": ("a.weight_scale", set_byte(0xFF), "a.weight_scale: block scales must be numbers, got NaN"),
    "negative block scale": ("a.weight_scale", set_byte(0xB8), "block scales must not be negative, got -1.0"),
    "zero global scale": (
        "a.weight_scale_2",
        torch.zeros(()),
        "a.weight_scale_2: must be positive and finite, got 0.0",
    ),
    "infinite global scale": ("a.weight_scale_2", torch.tensor(torch.inf), "must be positive and finite, got inf"),
    "NaN global scale": ("a.weight_scale_2", torch.tensor(torch.nan), "must be positive and finite, got nan"),
    "global scale in bf16": ("a.weight_scale_2", torch.ones((), dtype=torch.bfloat16), "must be F32, got BF16"),
    "global scale of another shape": ("a.weight_scale_2", torch.ones(3), r"must hold one value a matrix, got .*\(3,\)"),
    "swizzled block scales": (
        "a.weight_scale",
        torch.ones(128, 4).to(torch.float8_e4m3fn),
        r"block scales must have shape \(16, 2\), got \(128, 4\)",
    ),
    "block scales in fp32": ("a.weight_scale", torch.ones(16, 2), "must be F8_E4M3 or F8_E8M0, got F32"),
    "scale of a plain weight": ("b.weight_scale", torch.ones(16, 2), "a F32 weight must have no scale"),
    "exponents alone": (
        "d.weight",
        torch.ones(2, 2).to(torch.float8_e8m0fnu),
        r"a tensor of exponents \(F8_E8M0\) must be the scale of a weight",
    ),
    "codes alone": ("b.weight", torch.zeros(16, 16, dtype=torch.uint8), r"packed codes \(U8\) must have block scales"),
    "FP8 alone": ("b.weight", torch.zeros(16, 32).to(torch.float8_e4m3fn), "an FP8 weight must have a scale"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_tensors(damage: str, tmp_path: Path) -> None:
    """Guards against scales that become NaN weights, or a format that is guessed."""
    name, change, message = DAMAGED[damage]
    tensors = small_tensors()
    tensors[name] = change(tensors[name]) if callable(change) else change
    assert_refused(Small(), stored.write(tmp_path, tensors), message)


def test_mxfp4_nan_exponent(tmp_path: Path) -> None:
    """Guards against exponent byte 255, which is NaN, read as 2^128."""
    codes, exponents = stored.mxfp4_parts(torch.randn(16, 32))
    exponents.view(torch.uint8)[2, 0] = 255
    tensors = small_tensors() | {"a.weight": codes, "a.scale": exponents}
    for part in ("a.weight_scale", "a.weight_scale_2"):
        del tensors[part]
    assert_refused(Small(), stored.write(tmp_path, tensors), "a.scale: exponents must be numbers, got NaN")


def test_missing_global_scale(tmp_path: Path) -> None:
    """Guards against a global scale of 1 where none is stored."""
    tensors = small_tensors()
    del tensors["a.weight_scale_2"]
    assert_refused(Small(), stored.write(tmp_path, tensors), "must have a global scale, got no a.weight_scale_2")


def test_damaged_files(tmp_path: Path) -> None:
    """Guards against a crash, or half a model, from absent, cut, empty and foreign files and indices."""

    def fresh(name: str, shards: int = 2) -> Path:
        return stored.write(tmp_path / name, small_tensors(), shards=shards)

    shard = "model-00002-of-00002.safetensors"
    index = "model.safetensors.index.json"
    folder = fresh("absent")
    (folder / shard).unlink()
    assert_refused(Small(), folder, f"shard {shard} is absent")
    folder = fresh("cut")
    data = (folder / shard).read_bytes()
    (folder / shard).write_bytes(data[:-1])
    assert_refused(Small(), folder, f"{shard}: no valid safetensors file")
    (folder / shard).write_bytes(b"")
    assert_refused(Small(), folder, f"{shard}: no valid safetensors file")
    (folder / shard).write_bytes(b"\xff" * 8 + data[8:])
    assert_refused(Small(), folder, f"{shard}: no valid safetensors file")
    folder = fresh("index")
    weight_map = json.loads((folder / index).read_text())["weight_map"]
    for text, message in {
        "{": "must be JSON",
        "[]": "must be a JSON object, got list",
        "{}": "must have a weight_map",
        json.dumps({"weight_map": {"a": 1}}): "must have a weight_map from tensor names to file names",
        json.dumps({"weight_map": weight_map | {"x": "../x.safetensors"}}): "file names must be plain",
        json.dumps({"weight_map": weight_map | {"x": shard}}): "x is not in .*, nor in another shard",
        json.dumps({"weight_map": weight_map | {"b.weight": "model-00001-of-00002.safetensors"}}): "b.weight is in",
        json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != "table"}}): "table is in .* not in the",
    }.items():
        (folder / index).write_text(text)
        assert_refused(Small(), folder, message)
    folder = fresh("twice", shards=1)
    save_file({"table": torch.arange(4)}, folder / "other.safetensors")
    assert_refused(Small(), folder, "table: must stand once, is in model.safetensors and in other.safetensors")
    assert_refused(Small(), tmp_path / "nowhere", "got nothing there")
    (tmp_path / "empty").mkdir()
    assert_refused(Small(), tmp_path / "empty", "must hold .safetensors files, got none")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "awq"}, "config.json: quant_method must be one of .*, got 'awq'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo must be one of .*, got 'W4A8_AWQ'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format must be one of"),
        ([1], "quantization section must be an object, got list"),
    ],
)
def test_unknown_algorithms(section: Any, message: str, tmp_path: Path) -> None:
    """Guards against a checkpoint of a format that nobody here can read, read all the same."""
    assert_refused(Small(), stored.write(tmp_path, small_tensors(), {"quantization_config": section}), message)


def test_experts_packed_and_not(model: Any, huggingface: stored.Tensors, tmp_path: Path) -> None:
    """Guards against one expert in bf16 among packed ones."""
    written = stored.modelopt(huggingface, lambda name, value: stored.is_linear(name, value) and ".3.up" not in name)
    with pytest.raises(CheckpointError, match="must have all its experts packed or none, got both"):
        load_checkpoint(empty_model(model), stored.write(tmp_path, written))


def test_buffers_that_nothing_computes(tmp_path: Path) -> None:
    """Guards against a model that is left with meta buffers and fails at its first call."""

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 4, bias=False)
            self.register_buffer("inv_freq", torch.ones(4), persistent=False)

    with torch.device("meta"):
        network = Rotary()
    with pytest.raises(CheckpointError, match=r"missing: buffer inv_freq is on the meta device"):
        load_checkpoint(network, stored.write(tmp_path, {"proj.weight": torch.randn(4, 16)}))


def test_report_says_what_happened(model: Any, native: stored.Tensors, tmp_path: Path) -> None:
    """Guards against a report that hides what was ignored."""
    report = load_checkpoint(empty_model(model), stored.write(tmp_path, stored.nvidia_mixed(native)))
    assert isinstance(report, LoadReport)
    text = str(report)
    assert "NVFP4 (ModelOpt)" in text
    assert "72 activation scales ignored" in text
    assert "3 MTP tensors ignored" in text
