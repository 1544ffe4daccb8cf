"""Opens a checkpoint: one safetensors file, a folder of them, or a folder with an index; headers are read, no data."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_SUFFIX = ".safetensors.index.json"

# Of safetensors' dtypes those that the formats are made of.
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is, or not for this model.

    Attributes:
        problems: one line each; the message lists them all.
    """

    def __init__(self, what: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{what}: {len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}:{lines}")


@dataclass(frozen=True)
class Entry:
    """One stored tensor, as the header describes it.

    Attributes:
        name: in the checkpoint.
        dtype: safetensors' name: ``BF16``, ``U8``, ``F8_E4M3`` ...
        shape: its sizes.
        file: the safetensors file that holds it.
        offset: where its data begin in the file, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return torch.Size(self.shape).numel() * TORCH_DTYPES[self.dtype].itemsize


@dataclass
class Checkpoint:
    """The tensors of a checkpoint by name; :func:`open_checkpoint` makes one.

    Attributes:
        path: file or folder that was opened.
        files: its safetensors files, in the order of their names.
        entries: every tensor.
        config: ``config.json``, or {}.
        quant_config: ``hf_quant_config.json``, or {}.
        problems: what is wrong with files, index and headers, one line each.
    """

    path: Path
    files: list[Path] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    quant_config: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    _descriptors: dict[Path, int] = field(default_factory=dict, repr=False)
    _stamps: dict[Path, tuple[int, int]] = field(default_factory=dict, repr=False)

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """Reads the tensor ``name``.

        Not through a mapping: mapped pages count as this process's memory until somebody needs them, and a file that
        shrinks under a mapping kills the process.

        Args:
            name: in the checkpoint.
            out: where to put it: on the CPU, contiguous, of its shape and of a dtype that is as wide; new without.

        Raises:
            CheckpointError: the file changed since it was opened, or cannot be read.
        """
        return self.read_entry(self.entries[name], out)

    def read_entry(self, entry: Entry, out: Tensor | None = None) -> Tensor:
        """Reads what an entry describes, be it a part of a stored tensor; see :meth:`read`."""
        if out is None:
            out = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        assert out.is_contiguous()
        assert (out.shape, out.nbytes) == (entry.shape, entry.num_bytes)
        data: memoryview = out.detach().view(-1).view(torch.uint8).numpy().data
        done = 0
        try:
            descriptor = self._descriptor(entry.file)
            while done < len(data):
                count = os.preadv(descriptor, [data[done:]], entry.offset + done)
                if count == 0:
                    raise OSError("the file ends before its data")
                done += count
        except OSError as error:
            raise CheckpointError(str(self.path), [f"{entry.file.name}: {entry.name}: {error}"]) from error
        return out

    def read_ahead(self, entry: Entry) -> None:
        """Has the system bring an entry's data from the disk while other work is done."""
        if hasattr(os, "posix_fadvise") and entry.file.is_file():
            os.posix_fadvise(self._descriptor(entry.file), entry.offset, entry.num_bytes, os.POSIX_FADV_WILLNEED)

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        if _stamp(os.fstat(self._descriptors[file])) != self._stamps[file]:
            raise OSError("the file changed since its header was read")
        return self._descriptors[file]

    def close(self) -> None:
        """Closes the files that were read from."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the headers of a checkpoint; what is wrong with them is listed in ``problems``, not raised.

    Args:
        path: a ``.safetensors`` file, an ``index.json``, or a folder that holds either.

    Raises:
        CheckpointError: nothing is there, or nothing that is a safetensors checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(str(path), ["path must be a safetensors file or a folder of them, got nothing there"])
    folder = path if path.is_dir() else path.parent
    checkpoint = Checkpoint(path)
    if path.is_dir():
        for name, target in (("config.json", "config"), ("hf_quant_config.json", "quant_config")):
            if (folder / name).is_file():
                setattr(checkpoint, target, _read_json(checkpoint, folder / name))
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}")) if path.is_dir() else [path] if path.suffix == ".json" else []
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise CheckpointError(str(path), [f"path must hold one index, got {names}; name the one to load"])
    if indices:
        _open_indexed(checkpoint, indices[0])
    else:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise CheckpointError(str(path), ["path must hold .safetensors files, got none"])
        for file in files:
            _add_file(checkpoint, file)
    return checkpoint


def _read_json(checkpoint: Checkpoint, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        checkpoint.problems.append(f"{file.name}: must be JSON, got {error}")
        return {}
    if not isinstance(value, dict):
        checkpoint.problems.append(f"{file.name}: must be a JSON object, got {type(value).__name__}")
        return {}
    return value


def _open_indexed(checkpoint: Checkpoint, index: Path) -> None:
    weight_map = _read_json(checkpoint, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        checkpoint.problems.append(f"{index.name}: must have a weight_map from tensor names to file names")
        return
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            checkpoint.problems.append(f"{index.name}: file names must be plain, got {name!r}")
        elif not (index.parent / name).is_file():
            checkpoint.problems.append(f"{index.name}: shard {name} is absent")
        else:
            _add_file(checkpoint, index.parent / name)
    unreadable = {file for file in weight_map.values() if not any(file == found.name for found in checkpoint.files)}
    for name, file in weight_map.items():
        entry = checkpoint.entries.get(name)
        if file in unreadable:
            continue
        if entry is None:
            checkpoint.problems.append(f"{index.name}: {name} is not in {file}, nor in another shard")
        elif entry.file.name != file:
            checkpoint.problems.append(f"{index.name}: {name} is in {entry.file.name}, not in {file}")
    unlisted = [name for name in checkpoint.entries if name not in weight_map]
    checkpoint.problems.extend(
        f"{index.name}: {name} is in {checkpoint.entries[name].file.name}, but not in the index" for name in unlisted
    )


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _add_file(checkpoint: Checkpoint, file: Path) -> None:
    try:
        stamp = _stamp(file.stat())
        with safe_open(file, "pt"):  # checks that the header is whole, and that sizes and offsets fit the file
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, OverflowError, struct.error) as error:
        checkpoint.problems.append(f"{file.name}: no valid safetensors file: {error}")
        return
    checkpoint.files.append(file)
    checkpoint._stamps[file] = stamp
    header.pop("__metadata__", None)
    for name, described in header.items():
        dtype, shape, (start, _) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
        if name in checkpoint.entries:
            other = checkpoint.entries[name].file.name
            checkpoint.problems.append(f"{name}: must stand once, is in {other} and in {file.name}")
        elif dtype not in TORCH_DTYPES:
            checkpoint.problems.append(f"{file.name}: {name}: unknown dtype {dtype}")
        else:
            checkpoint.entries[name] = Entry(name, dtype, shape, file, 8 + length + start)
