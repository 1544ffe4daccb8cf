"""Files that are wholly there or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(file: Path, tensors: Mapping[str, Tensor], temporary: Path) -> None:
    """Writes a safetensors file; ``temporary`` is a folder of the same file system."""
    part = temporary / f"{file.name}.part"
    save_file(dict(tensors), part, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    part.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
    _publish(part, file)


def write_json(file: Path, value: Any, temporary: Path) -> None:
    """Writes JSON, keys in the order they have."""
    part = temporary / f"{file.name}.part"
    part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _publish(part, file)


def copy_file(source: Path, file: Path, temporary: Path) -> None:
    """Copies a file's bytes."""
    part = temporary / f"{file.name}.part"
    shutil.copyfile(source, part)
    _publish(part, file)


def _publish(part: Path, file: Path) -> None:
    with open(part, "rb+") as handle:
        os.fsync(handle.fileno())
        if hasattr(os, "posix_fadvise"):  # so that what is read to verify comes from the disk
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.replace(part, file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
