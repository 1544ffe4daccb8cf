"""What does not fit is refused: all of it in one message, by name, and the model is what it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv4_compile.checkpoint import CheckpointError, load, load_checkpoint
from tests.checkpoint import stored
from tests.checkpoint.models import Small, assert_refused, empty_model, small_tensors


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
        ({"quantized_layers": {"a": {"quant_algo": "INT4"}}}, "quant_algo must be one of .*, got 'INT4'"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"format": "marlin-24"}}},
            "format must be one of .*, got 'marlin-24'",
        ),
        ({"quant_method": "awq"}, "config.json: quant_method must be one of .*, got 'awq'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo must be one of .*, got 'W4A8_AWQ'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format must be one of"),
        ([1], "quantization section must be an object, got list"),
    ],
)
def test_unknown_algorithms(section: Any, message: str, tmp_path: Path) -> None:
    """Guards against a checkpoint of a format that nobody here can read, read all the same."""
    assert_refused(Small(), stored.write(tmp_path, small_tensors(), {"quantization_config": section}), message)


def test_unknown_algorithm_of_modelopt(tmp_path: Path) -> None:
    """Guards against ModelOpt's own file, hf_quant_config.json, left unread."""
    folder = stored.write(tmp_path, small_tensors())
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    assert_refused(Small(), folder, "hf_quant_config.json: quant_algo must be one of .*, got 'W4A8_AWQ'")


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


def test_listed_experts_and_a_range(tmp_path: Path) -> None:
    """Guards against rank 1 that loads the experts of rank 0: a list's numbers may be global ones or its own."""
    network = nn.Module()
    network.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(16, 4, bias=False)}) for _ in range(2))
    tensors = {f"experts.{index}.w1.weight": torch.randn(4, 16) for index in range(4)}
    message = "experts: must be None for experts that are not stacked in one parameter, got experts.0.w1.weight"
    assert_refused(network, stored.write(tmp_path, tensors), message, experts=range(2, 4))


def test_transposed_experts(tmp_path: Path) -> None:
    """Guards against [N, K] read as [K, N] where both fit."""
    network = nn.Module()
    network.experts = nn.Module()
    network.experts.is_transposed = True
    network.experts.down_proj = nn.Parameter(torch.zeros(2, 16, 16))
    tensors = {f"experts.{index}.down_proj.weight": torch.randn(16, 16) for index in range(2)}
    assert_refused(
        network, stored.write(tmp_path / "a", tensors), r"stored as \[N, K\], experts.down_proj is \[E, K, N\]"
    )
    stacked = {"experts.down_proj": torch.randn(2, 16, 16)}
    load_checkpoint(network, stored.write(tmp_path / "b", stacked))
    assert torch.equal(network.experts.down_proj, stacked["experts.down_proj"])


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    """Guards against token ids wrapped around in a narrower type, and against fp64 models with packed weights."""
    network = Small()
    network.table = network.table.to(torch.int16)
    assert_refused(
        network, stored.write(tmp_path / "a", small_tensors()), "table must be torch.int16 for table, got I64"
    )
    message = r"a.weight is packed, a.weight \(16, 32\) torch.float64 cannot be"
    assert_refused(Small().double(), stored.write(tmp_path / "b", small_tensors()), message)
    network.table = network.table.long()
    narrow = small_tensors() | {"table": torch.arange(4, dtype=torch.int16)}
    assert load_checkpoint(network, stored.write(tmp_path / "c", narrow)).cast == ["table"]
    assert network.table.tolist() == [0, 1, 2, 3]


def test_nan_in_fp8(tmp_path: Path) -> None:
    """Guards against the e4m3 byte 0x7F read as a weight, and a traceback without a name when it is quantised anew."""
    elements, scale = stored.fp8_parts(torch.randn(16, 32), 32, torch.float32)
    elements.view(torch.uint8)[3, 4] = 0x7F
    tensors = small_tensors() | {"b.weight": elements, "b.weight_scale_inv": scale}
    folder = stored.write(tmp_path, tensors)
    for fp8 in ("bfloat16", "nvfp4"):
        assert_refused(Small().bfloat16(), folder, "b.weight: FP8 weights must be finite", fp8=fp8)


def test_all_bad_scales_in_one_message(tmp_path: Path) -> None:
    """Guards against a day of loading, one bad scale a time."""
    tensors = small_tensors()
    tensors["a.weight_scale"].view(torch.uint8)[0, 0] = 0x7F
    tensors["b.weight"], tensors["b.weight_scale"] = stored.fp8_parts(torch.randn(16, 32), 32, torch.float32)
    tensors["b.weight_scale"].fill_(-1)
    error = assert_refused(Small(), stored.write(tmp_path, tensors), "got NaN", "b.weight_scale: scales must be finite")
    assert len(error.problems) == 2


@pytest.mark.parametrize("damage", ["shorter", "touched", "gone"])
def test_files_that_change_while_they_are_read(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against SIGBUS, or half of one checkpoint and half of another."""
    folder = stored.write(tmp_path, small_tensors())
    file = folder / "model.safetensors"

    def change(*arguments: Any) -> dict[int, nn.Parameter]:
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: -1 if damage == "shorter" else None])
            os.utime(file, (1, 1))
        return fill(*arguments)

    fill = load._fill
    monkeypatch.setattr(load, "_fill", change)
    message = "No such file" if damage == "gone" else "the file changed since its header was read"
    assert_refused(Small(), folder, rf"model.safetensors: .*{message}")


def test_out_of_memory_leaves_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a model that is half loaded when anything at all goes wrong in the middle."""
    network, done = Small(), []

    def fail(*arguments: Any) -> Tensor:
        if done:
            raise MemoryError
        done.append(1)
        return plain(*arguments)

    plain = load._plain
    monkeypatch.setattr(load, "_plain", fail)
    before = {name: id(value) for name, value in network.state_dict(keep_vars=True).items()}
    with pytest.raises(MemoryError):
        load_checkpoint(network, stored.write(tmp_path, small_tensors()))
    assert {name: id(value) for name, value in network.state_dict(keep_vars=True).items()} == before
