"""The destination of ``quantize_checkpoint`` survives anything, and nothing of the user's is overwritten."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4_compile.checkpoint import CheckpointError, durable, quantize
from dsv4_compile.checkpoint.quantize import quantize_checkpoint
from tests.checkpoint import killed, stored


def test_rejects_places(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against hours of work that end in a full disk, and against anything of the user's overwritten."""
    with pytest.raises(ValueError, match=r"source must exist, got .*absent"):
        quantize_checkpoint(tmp_path / "absent", tmp_path / "nvfp4")
    with pytest.raises(ValueError, match="destination must differ from the source"):
        quantize_checkpoint(small, small)
    with pytest.raises(ValueError, match="destination must differ from the source"):
        quantize_checkpoint(small / "model.safetensors.index.json", small)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="destination must be a folder, got the file"):
        quantize_checkpoint(small, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(
        ValueError, match=r"destination must be absent, empty or left by the same job, got .* other files"
    ):
        quantize_checkpoint(small, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"destination must have 0.02 GiB of disk space, got 0.00 GiB free"):
        quantize_checkpoint(small, tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()


def test_finished_destination_is_not_written_again(small: Path, tmp_path: Path) -> None:
    first = quantize_checkpoint(small, tmp_path / "nvfp4")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "nvfp4").iterdir()}
    again = quantize_checkpoint(small, tmp_path / "nvfp4")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "nvfp4").iterdir()}
    assert again.as_json() == first.as_json()
    with pytest.raises(ValueError, match="which holds the result of another job"):
        quantize_checkpoint(small, tmp_path / "nvfp4", search="six_four")


class _StopError(Exception):
    pass


def stopped_run(small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A run that ends before its file number ``after``."""
    write = durable.write_tensors
    files: list[Path] = []

    def stop(file: Path, *rest: Any) -> None:
        files.append(file)
        if len(files) == after:
            raise _StopError
        write(file, *rest)

    monkeypatch.setattr(durable, "write_tensors", stop)
    with pytest.raises(_StopError):
        quantize_checkpoint(small, folder, shard_bytes=4096)
    monkeypatch.setattr(durable, "write_tensors", write)


def test_goes_on(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a second run that starts over, goes on with other options, or trusts a file that is damaged."""
    stopped_run(small, tmp_path / "nvfp4", monkeypatch, after=3)
    with pytest.raises(ValueError, match=r"left by the same job, got .* whose job differs in search \('none'\)"):
        quantize_checkpoint(small, tmp_path / "nvfp4", shard_bytes=4096, search="wide")
    other = shutil.copytree(small, tmp_path / "other", copy_function=shutil.copy)
    with pytest.raises(ValueError, match="whose job differs in files"):
        quantize_checkpoint(other, tmp_path / "nvfp4", shard_bytes=4096)
    file = sorted((tmp_path / "nvfp4").glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name}: .* must have the checksum it had in memory"):
        quantize_checkpoint(small, tmp_path / "nvfp4", shard_bytes=4096)
    report = quantize_checkpoint(small, tmp_path / "nvfp4", shard_bytes=4096)
    quantize_checkpoint(small, tmp_path / "undisturbed", shard_bytes=4096)
    assert report.resumed == len(list((tmp_path / "nvfp4").glob("*.safetensors"))) - 1
    assert killed.tree(tmp_path / "nvfp4") == killed.tree(tmp_path / "undisturbed")


def test_wrong_dtype_on_disk(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a verification that looks at checksums only."""
    save = save_file

    def other_shape(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        save({name: value.flatten() for name, value in tensors.items()}, file, metadata)

    monkeypatch.setattr(durable, "save_file", other_shape)
    with pytest.raises(CheckpointError, match=r"q_a_proj.weight must be U8 \(48, 32\), got U8 \(1536,\)"):
        quantize_checkpoint(small, tmp_path / "nvfp4")


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a file under its name before it is whole and on the disk; a kill rarely hits that moment."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(part: Path, file: Path) -> None:
        calls.append(f"rename to {file.name}")
        assert not file.exists()
        replace(part, file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    folder, work = tmp_path / "folder", tmp_path / "folder" / "work"
    work.mkdir(parents=True)
    durable.write_json(folder / "a.json", {"x": 1}, work)
    durable.copy_file(folder / "a.json", folder / "b.json", work)
    durable.write_tensors(folder / "c.safetensors", {"x": torch.ones(2)}, work)
    assert calls == [
        call
        for name in ("a.json", "b.json", "c.safetensors")
        for call in (f"fsync {name}.part", f"rename to {name}", "fsync folder")
    ]
    assert (folder / "b.json").read_bytes() == (folder / "a.json").read_bytes()
    assert not list(work.iterdir())


def test_two_at_once(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against two processes that write one destination."""
    stopped_run(small, tmp_path / "nvfp4", monkeypatch, after=2)
    import fcntl

    with open(tmp_path / "nvfp4" / quantize.WORK / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(ValueError, match=r"destination must be free, got .*, which a process writes"):
            quantize_checkpoint(small, tmp_path / "nvfp4", shard_bytes=4096)


def test_killed_twenty_times(
    native: stored.Tensors, config: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Guards against any moment at which SIGKILL leaves a destination that cannot be finished, or another result."""
    source = stored.write(tmp_path / "source", stored.nvidia_mixed(native), config, shards=2)
    (source / "tokenizer.json").write_text("{}")
    runs = tmp_path / "runs"
    runs.mkdir()
    seed = zlib.crc32(request.node.nodeid.encode())
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", killed.__file__, str(source), str(runs), "20", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=root)
    result = json.loads(output.stdout)
    assert result["different"] == []
    assert result["kills"] >= 20
    assert sum(resumed > 0 for resumed in result["resumed"]) >= 3
    assert result["shards"] >= 8
