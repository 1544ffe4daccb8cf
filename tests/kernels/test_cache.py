"""The kernel cache: compiled once by anyone, never served damaged, usable without a compiler, bounded."""

import importlib
import logging
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.compilation import CompilerMissingError

NAME = "sm90.example"


@dataclass(frozen=True)
class Config:
    tile: int


class Compiler:
    """Stands in for cutlass: writes its configuration and counts what it compiled."""

    def __init__(self, num_bytes: int = 100) -> None:
        self.compiled: list[Any] = []
        self.num_bytes = num_bytes

    def __call__(self, name: str, config: Any, shared_object: Path) -> None:
        self.compiled.append(config)
        shared_object.write_bytes(repr(config).encode().ljust(self.num_bytes))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    runtime = tmp_path / "dsl" / cache.RUNTIME_NAME
    runtime.parent.mkdir()
    runtime.write_bytes(b"runtime")
    monkeypatch.setattr(cache, "runtime_library", lambda: runtime)
    monkeypatch.setattr(cache, "_dsl_version", lambda: "4.8.1")
    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DSV4_CACHE_MAX_BYTES", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    stand_in = Compiler()
    monkeypatch.setattr(cache, "compile_kernel", stand_in)
    return stand_in


def no_compiler(name: str, config: Any, shared_object: Path) -> None:
    raise CompilerMissingError(f"{name}: nvidia-cutlass-dsl must be installed to compile kernels")


def test_compiles_once(compiler: Compiler, folder: Path) -> None:
    """Guards against a kernel that is compiled again, and against one configuration served for another."""
    first, second = cache.ensure(NAME, Config(1)), cache.ensure(NAME, Config(2))
    assert first != second
    assert cache.ensure(NAME, Config(1)) == first
    assert compiler.compiled == [Config(1), Config(2)]
    assert first.read_bytes().startswith(b"Config(tile=1)")
    assert (folder / cache.RUNTIME_NAME).read_bytes() == b"runtime"
    assert not list(folder.glob("build-*"))


def test_key_covers_the_sources(compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a stale kernel after an edit of its file or of one that it imports, and only then."""
    package, dispatch = tmp_path / "some_kernels", tmp_path / "some_dispatch"
    dispatch.mkdir()
    (dispatch / "__init__.py").write_text("")
    (dispatch / "example.py").write_text("from some_kernels import cache\nTHREADS = 256")
    for file, text in {
        "__init__.py": "",
        "sm90/__init__.py": "",
        "sm90/example.py": "from some_kernels.sm90 import shared\nfrom some_dispatch import example\nimport missing_module",
        "sm90/shared.py": "from some_kernels.sm90.deeper import x",
        "sm90/deeper.py": "x = 1",
        "sm90/other.py": "",
        "cache.py": "",
    }.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cache, "PACKAGE", "some_kernels")
    monkeypatch.setattr(cache, "DISPATCH_PACKAGE", "some_dispatch")

    def entry() -> Path:
        importlib.invalidate_caches()
        cache._sources_digest.cache_clear()
        return cache.ensure(NAME, Config(1))

    seen = [entry()]
    for unrelated in ("sm90/other.py", "cache.py"):
        (package / unrelated).write_text("changed = True")
    assert entry() == seen[0]
    for file in ("sm90/example", "sm90/shared", "sm90/deeper", "../some_dispatch/example"):
        with open(package / f"{file}.py", "a") as source:
            source.write("\n# edited")
        seen.append(entry())
    assert len(set(seen)) == 5
    cache._sources_digest.cache_clear()
    assert "missing_module" not in sys.modules


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_damaged_entry_is_rebuilt(
    compiler: Compiler, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against machine code with a flipped bit that runs, and against a crash of the loader."""
    entry = cache.ensure(NAME, Config(1))
    intact = entry.read_bytes()
    damaged = {"flipped": bytes([intact[0] ^ 1]) + intact[1:], "cut": intact[:-1], "emptied": b""}[damage]
    entry.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, "dsv4_compile"):
        assert cache.ensure(NAME, Config(1)).read_bytes() == intact
    assert f"{entry} is damaged" in caplog.text
    entry.write_bytes(damaged)
    monkeypatch.setattr(cache, "compile_kernel", no_compiler)
    with pytest.raises(RuntimeError, match="nvidia-cutlass-dsl must be installed"):
        cache.ensure(NAME, Config(1))


def test_serves_without_a_compiler(
    compiler: Compiler, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a copied folder that a machine without cutlass cannot use, be it read-only."""
    cache.ensure(NAME, Config(1))
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path / "copy"))
    monkeypatch.setattr(cache, "_dsl_version", lambda: None)
    monkeypatch.setattr(cache, "compile_kernel", no_compiler)
    monkeypatch.setattr(cache.os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError))
    assert cache.ensure(NAME, Config(1)).parent == tmp_path / "copy"
    with pytest.raises(RuntimeError, match=r"sm90.example: kernel Config\(tile=2\) must be in the cache .*copy or be"):
        cache.ensure(NAME, Config(2))


def test_another_dsl_version_compiles_again(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the code of another compiler where the installed one would have been asked for."""
    cache.ensure(NAME, Config(1))
    monkeypatch.setattr(cache, "_dsl_version", lambda: "4.9.0")
    cache.ensure(NAME, Config(1))
    assert compiler.compiled == [Config(1), Config(1)]


def test_is_bounded(compiler: Compiler, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a folder that grows for ever, and against the loss of the kernel in use."""
    size = compiler.num_bytes + cache.DIGEST_BYTES
    entries = [cache.ensure(NAME, Config(tile)) for tile in range(3)]
    for age, entry in zip((30, 10, 20), entries, strict=True):
        os.utime(entry, (time.time() - age,) * 2)
    cache.ensure(NAME, Config(0))  # used just now
    monkeypatch.setenv("DSV4_CACHE_MAX_BYTES", str(2 * size))
    newest = cache.ensure(NAME, Config(3))
    assert {entry for entry in [*entries, newest] if entry.exists()} == {entries[0], newest}
    monkeypatch.setenv("DSV4_CACHE_MAX_BYTES", "1")
    assert cache.ensure(NAME, Config(4)).exists()
    assert (folder / cache.RUNTIME_NAME).exists()


def _ensure_slowly(log: Path) -> None:
    def compile_slowly(name: str, config: Any, shared_object: Path) -> None:
        with open(log, "a") as handle:
            handle.write("compiled\n")
        time.sleep(0.3)
        shared_object.write_bytes(b"code")

    cache.compile_kernel = compile_slowly
    assert cache._is_intact(cache.ensure(NAME, Config(1)))


def test_concurrent_processes_compile_once(tmp_path: Path) -> None:
    """Guards against eight ranks that compile one kernel eight times, or read one half written."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_ensure_slowly, args=(tmp_path / "log",)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6
    assert (tmp_path / "log").read_text() == "compiled\n"


def test_failed_compilation_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against half an entry that later counts as one."""

    def fail(name: str, config: Any, shared_object: Path) -> None:
        shared_object.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "compile_kernel", fail)
    with pytest.raises(KeyboardInterrupt):
        cache.ensure(NAME, Config(1))
    assert not list(folder.glob("sm90*"))
    assert not list(folder.glob("build-*"))


def test_slow_compilation_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: Compiler
) -> None:
    """Guards against a process that seems to hang, and against a line for every fast one."""
    monkeypatch.setattr(cache, "SLOW_COMPILE_SECONDS", 0.05)
    with caplog.at_level(logging.WARNING, "dsv4_compile"):
        cache.ensure(NAME, Config(1))
        assert caplog.text == ""

        def compile_slowly(*arguments: Any) -> None:
            time.sleep(0.3)
            compiler(*arguments)

        monkeypatch.setattr(cache, "compile_kernel", compile_slowly)
        cache.ensure(NAME, Config(2))
    assert "compiling kernel sm90.example for sm_90a: Config(tile=2)" in caplog.text


def test_recording_launches_nothing(compiler: Compiler) -> None:
    """Guards against a look at what would run that compiles it."""
    with cache.recording() as wanted:
        cache.kernel(NAME, Config(1))(1, 2, 3)
        cache.kernel(NAME, Config(2))()
        cache.kernel(NAME, Config(1))()
    assert list(wanted) == [(NAME, Config(1)), (NAME, Config(2))]
    assert compiler.compiled == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DSV4_CACHE_DIR": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/dsv4_compile/kernels"),
        ({"HOME": "/c"}, "/c/.cache/dsv4_compile/kernels"),
    ],
)
def test_folder(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a cache in a place that nobody asked for."""
    for variable in ("DSV4_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert cache.folder() == Path(expected)
