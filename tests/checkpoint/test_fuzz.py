"""500 damaged checkpoints: each loads right or is refused by name; none crashes, hangs or loads wrong without a word.

Damage that turns valid data into other valid data (a flipped bit in a code) leaves no trace in a format without
checksums, so what is damaged here is structure: headers, index, config, lengths, names, dtypes, shards, and scales.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsv4_compile.checkpoint import CheckpointError, inspect, load_checkpoint
from tests.checkpoint import stored

CASES = 500
HANGS_AFTER = 600  # seconds for 50 cases that take one; a hang ends with every thread's traceback
INDEX = "model.safetensors.index.json"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(32, 16, bias=False)
        self.mx = nn.Linear(64, 16, bias=False)
        self.eight = nn.Linear(48, 40, bias=False)
        self.plain = nn.Linear(16, 8)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 32, 32))


def tensors() -> stored.Tensors:
    torch.manual_seed(0)
    values = stored.modelopt({"packed.weight": torch.randn(16, 32)}, lambda *_: True)
    values["mx.weight"], values["mx.scale"] = stored.mxfp4_parts(torch.randn(16, 64))
    values["eight.weight"], values["eight.weight_scale_inv"] = stored.fp8_parts(torch.randn(40, 48), 32, torch.float32)
    for expert in range(2):
        for projection in ("gate", "up"):
            codes, scales, scale = stored.nvfp4_parts(torch.randn(16, 32))
            parts = {"packed": codes, "scale": scales, "global_scale": (1 / scale).reshape(1)}
            values |= {f"experts.{expert}.{projection}_proj.weight_{role}": part for role, part in parts.items()}
    return values | {"plain.weight": torch.randn(8, 16), "plain.bias": torch.randn(8)}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.dequantize() if hasattr(value, "dequantize") and hasattr(value, "codes") else value.clone()
        for name, value in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored.write(tmp_path_factory.mktemp("original"), tensors(), {"model_type": "x"}, shards=3)


@pytest.fixture(scope="module")
def expected(original: Path) -> dict[str, Tensor]:
    model = Model()
    load_checkpoint(model, original)
    return values_of(model)


def any_shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def header_of(data: bytes) -> int:
    """Number of bytes in front of the data."""
    (length,) = struct.unpack("<Q", data[:8])
    return 8 + int(length)


def flip_header_bits(folder: Path, rng: random.Random) -> None:
    shard = any_shard(folder, rng)
    data = bytearray(shard.read_bytes())
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(header_of(bytes(data)) if len(data) > 8 else 8)
        data[min(position, len(data) - 1)] ^= 1 << rng.randrange(8)
    shard.write_bytes(bytes(data))


def cut(folder: Path, rng: random.Random) -> None:
    shard = any_shard(folder, rng)
    data = shard.read_bytes()
    shard.write_bytes(data[: rng.randrange(len(data))])


def lengthen(folder: Path, rng: random.Random) -> None:
    shard = any_shard(folder, rng)
    shard.write_bytes(shard.read_bytes() + rng.randbytes(rng.randint(1, 64)))


def absurd_header_length(folder: Path, rng: random.Random) -> None:
    shard = any_shard(folder, rng)
    length = rng.choice([0, 1, 7, 2**31, 2**32, 2**63 - 1, 2**64 - 1, rng.randrange(2**64)])
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])


def swap_shards(folder: Path, rng: random.Random) -> None:
    left, right = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    a, b = left.read_bytes(), right.read_bytes()
    left.write_bytes(b)
    right.write_bytes(a)


def one_shard_twice(folder: Path, rng: random.Random) -> None:
    left, right = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    shutil.copyfile(left, right)


def drop_shard(folder: Path, rng: random.Random) -> None:
    any_shard(folder, rng).unlink()


def shard_is_a_folder(folder: Path, rng: random.Random) -> None:
    shard = any_shard(folder, rng)
    shard.unlink()
    shard.mkdir()


def flip_index_bits(folder: Path, rng: random.Random) -> None:
    data = bytearray((folder / INDEX).read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (folder / INDEX).write_bytes(bytes(data))


def cut_index(folder: Path, rng: random.Random) -> None:
    data = (folder / INDEX).read_bytes()
    (folder / INDEX).write_bytes(data[: rng.randrange(len(data))])


def nonsense_config(folder: Path, rng: random.Random) -> None:
    text = rng.choice(["{", "[]", "null", '{"quantization_config": 3}', '{"quantization_config": {"quant_algo": "x"}}'])
    (folder / "config.json").write_text(text)


def rewrite(folder: Path, rng: random.Random, change: Callable[[stored.Tensors, str], None]) -> None:
    """Changes one tensor of a shard and writes the shard anew, the index with it."""
    shard = any_shard(folder, rng)
    values = load_file(shard)
    change(values, rng.choice(sorted(values)))
    save_file(values, shard)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if file != shard.name
    } | dict.fromkeys(values, shard.name)
    (folder / INDEX).write_text(json.dumps(index))


def rename(folder: Path, rng: random.Random) -> None:
    def change(values: stored.Tensors, name: str) -> None:
        values[name[:-1] + rng.choice("xyz_.")] = values.pop(name)

    rewrite(folder, rng, change)


def drop_tensor(folder: Path, rng: random.Random) -> None:
    def change(values: stored.Tensors, name: str) -> None:
        values["left.alone"] = torch.zeros(1)
        del values[name]

    rewrite(folder, rng, change)


def other_dtype(folder: Path, rng: random.Random) -> None:
    dtypes = [
        torch.float16,
        torch.int64,
        torch.uint8,
        torch.float8_e4m3fn,
        torch.bool,
        torch.float8_e8m0fnu,
        torch.int8,
    ]

    def change(values: stored.Tensors, name: str) -> None:
        size = values[name].shape
        dtype = rng.choice([dtype for dtype in dtypes if dtype != values[name].dtype])
        keeps_bytes = values[name].dtype.itemsize == dtype.itemsize and values[name].dim() > 0
        values[name] = values[name].view(dtype) if keeps_bytes else torch.ones(size).to(dtype)

    rewrite(folder, rng, change)


def other_shape(folder: Path, rng: random.Random) -> None:
    def change(values: stored.Tensors, name: str) -> None:
        value = values[name]
        shapes = [(0,), (value.numel() + 1,), (3, *value.shape), (*value.shape, 2)]
        values[name] = torch.ones(rng.choice(shapes)).to(value.dtype)

    rewrite(folder, rng, change)


def bad_scales(folder: Path, rng: random.Random) -> None:
    def change(values: stored.Tensors, name: str) -> None:
        scales = [name for name in values if "scale" in name and "input" not in name]
        for name in scales or list(values):
            if values[name].dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
                bits = values[name].view(torch.uint8).view(-1)
                bits[rng.randrange(bits.numel())] = 0xFF
            elif values[name].dtype == torch.float32:
                values[name] = values[name] * rng.choice([torch.nan, torch.inf, -1.0])

    rewrite(folder, rng, change)


DAMAGE: list[Callable[[Path, random.Random], None]] = [
    flip_header_bits, flip_header_bits, flip_header_bits, cut, lengthen, absurd_header_length, swap_shards,
    one_shard_twice, drop_shard, shard_is_a_folder, flip_index_bits, flip_index_bits, cut_index, nonsense_config, rename,
    drop_tensor, other_dtype, other_shape, bad_scales,
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("batch", range(10))
def test_damaged_checkpoints(batch: int, original: Path, expected: dict[str, Tensor], tmp_path: Path) -> None:
    """Guards against a traceback that is no CheckpointError, a model half loaded, and wrong numbers."""
    refused = 0
    for case in range(batch * CASES // 10, (batch + 1) * CASES // 10):
        rng = random.Random(case)
        folder = tmp_path / str(case)
        shutil.copytree(original, folder)
        damage = DAMAGE[case % len(DAMAGE)]
        damage(folder, rng)
        model = Model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            load_checkpoint(model, folder)
        except CheckpointError as raised:
            refused += 1
            problems = raised.problems
            assert problems
            assert all(problem.strip() for problem in problems)
            after = model.state_dict()
            assert all(torch.equal(value, after[name]) for name, value in before.items()), (case, damage)
        else:
            loaded = values_of(model)
            changed = [name for name in expected if not same(loaded[name], expected[name])]
            # Plain numbers of another float dtype or value, and FP8 scales of another dtype, are a valid checkpoint.
            plain = {"plain.weight", "plain.bias"} if damage in (bad_scales, other_dtype) else set()
            plain |= {"eight.weight"} if damage is other_dtype else set()
            assert set(changed) <= plain, (case, damage, changed)
        with contextlib.suppress(CheckpointError):  # raised for what is no checkpoint at all; the rest is reported
            inspect(folder)
        shutil.rmtree(folder)
    assert refused > CASES // 10 // 2


def same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)
