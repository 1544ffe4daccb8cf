"""Opens a checkpoint: one safetensors file, a folder of them, or a folder with an index; headers are read, no data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_SUFFIX = ".safetensors.index.json"

# Of safetensors' dtypes those that the formats are made of; bytes an element.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
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
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return torch.Size(self.shape).numel() * DTYPE_BYTES.get(self.dtype, 1)


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
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU; its memory is the file's, mapped, until :meth:`close`.

        Raises:
            CheckpointError: the file changed since it was opened, or cannot be read.
        """
        entry = self.entries[name]
        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(entry.file, "pt").__enter__()
            tensor: Tensor = self._open[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(str(self.path), [f"{entry.file.name}: {name}: {error}"]) from error
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(str(self.path), [f"{entry.file.name}: {name}: changed while it was being read"])
        return tensor

    def close(self) -> None:
        """Closes the files that were read from."""
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()

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


def _add_file(checkpoint: Checkpoint, file: Path) -> None:
    try:
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 -- no mapping
                part = handle.get_slice(name)
                dtype, shape = str(part.get_dtype()), tuple(part.get_shape())
                if name in checkpoint.entries:
                    other = checkpoint.entries[name].file.name
                    checkpoint.problems.append(f"{name}: must stand once, is in {other} and in {file.name}")
                elif dtype not in DTYPE_BYTES:
                    checkpoint.problems.append(f"{file.name}: {name}: unknown dtype {dtype}")
                else:
                    checkpoint.entries[name] = Entry(name, dtype, shape, file)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        checkpoint.problems.append(f"{file.name}: no valid safetensors file: {error}")
        return
    checkpoint.files.append(file)
