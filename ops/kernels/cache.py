"""The kernel cache: a callable from memory, else from a shared object on disk, else compiled and stored.

An entry is one file, ``<name>-<key>-dsl<version>.so``: a TVM-FFI shared object followed by the SHA-256 of what
precedes it. The key covers the sources of the kernel and of the kernel and dispatch modules that it imports, its
configuration and the architecture. Where the DSL is installed its version must match too; a machine without it takes
any version. Beside the entries lies ``libcute_dsl_runtime.so``, so that the folder can be copied to a machine with
neither cutlass nor a compiler. Entries are written to a temporary file and renamed, one process a key at a time; one
that is damaged is rebuilt, or named in an error where there is no compiler; the least recently used go when the
folder exceeds its limit.

    DSV4_CACHE_DIR        the folder; default ``$XDG_CACHE_HOME/dsv4_compile/kernels`` (``~/.cache`` without it)
    DSV4_CACHE_MAX_BYTES  its limit for entries; default 1 GiB
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsv4_compile.ops.kernels.compilation import (
    PACKAGE,
    SYMBOL,
    CompilerMissingError,
    architecture,
    compile_kernel,
    runtime_library,
)

log = logging.getLogger("dsv4_compile")

FORMAT_VERSION = 1
DISPATCH_PACKAGE = "dsv4_compile.ops.dispatch"  # configurations, and constants that a kernel and its launch share
HOST_MODULES = ("cache", "compilation", "device")  # of this package: nothing of theirs is compiled into a kernel
RUNTIME_NAME = "libcute_dsl_runtime.so"
DEFAULT_MAX_BYTES = 1 << 30
DIGEST_BYTES = 32
SLOW_COMPILE_SECONDS = 1.0

_loaded: dict[tuple[str, Any], Callable[..., Any]] = {}
_load_lock = threading.Lock()
_recorded: list[dict[tuple[str, Any], None]] = []


def folder() -> Path:
    """The folder of the cache, created when it is first written to."""
    if (chosen := os.environ.get("DSV4_CACHE_DIR")) is not None:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dsv4_compile" / "kernels"


def kernel(name: str, config: Any) -> Callable[..., Any]:
    """The compiled kernel ``name`` for a configuration.

    Args:
        name: module below ``dsv4_compile.ops.kernels``: ``sm90.quantize_nvfp4``.
        config: hashable, its ``repr`` names all of it: a frozen dataclass.

    Returns:
        A function of tensors and numbers that launches on torch's current stream.

    Raises:
        RuntimeError: the entry is missing or damaged, and cutlass or a C compiler to build it is missing too.
    """
    if _recorded:
        _recorded[-1][name, config] = None
        return _launch_nothing
    function = _loaded.get((name, config))
    if function is None:
        with _load_lock:
            function = _loaded.get((name, config))
            if function is None:
                function = _loaded[name, config] = _load(ensure(name, config))
    return function


@contextlib.contextmanager
def recording() -> Iterator[dict[tuple[str, Any], None]]:
    """Collects the kernels that are asked for, in order, in place of loading them; they launch nothing.

    The CUDA implementation of an operator, called on meta tensors under this, tells which kernels it would run.
    """
    wanted: dict[tuple[str, Any], None] = {}
    _recorded.append(wanted)
    try:
        yield wanted
    finally:
        _recorded.remove(wanted)


def _launch_nothing(*arguments: Any) -> None:
    pass


def ensure(name: str, config: Any) -> Path:
    """The valid entry on disk of a kernel, compiled if need be. Safe under concurrent processes.

    Raises:
        RuntimeError: as :func:`kernel`.
    """
    if (entry := find(name, config)) is not None:
        return entry
    directory = folder()
    directory.mkdir(parents=True, exist_ok=True)
    key = _key(name, config)
    with _locked(directory, key):
        if (entry := find(name, config)) is not None:  # another process built it meanwhile
            return entry
        entry = directory / _entry_name(name, key, _dsl_version() or "")
        try:
            _build(name, config, entry)
        except CompilerMissingError as error:
            raise RuntimeError(
                f"{name}: kernel {config} must be in the cache {directory} or be compiled, and neither is possible: "
                f"{error}. `dsv4-compile warm` on a machine that can compile makes a folder that can be copied here"
            ) from error
    _evict(directory, keep=entry)
    return entry


def find(name: str, config: Any) -> Path | None:
    """The entry on disk of a kernel, or None; a damaged one is reported and counts as none."""
    directory, key = folder(), _key(name, config)
    version = _dsl_version()
    pattern = _entry_name(name, key, "*" if version is None else version)
    for entry in sorted(directory.glob(pattern), reverse=True):
        if _is_intact(entry):
            with contextlib.suppress(OSError):  # a read-only folder serves too
                os.utime(entry)
            return entry
        log.warning("kernel cache: %s is damaged and will be rebuilt", entry)
    return None


def _entry_name(name: str, key: str, dsl_version: str) -> str:
    return f"{name}-{key}-dsl{dsl_version}.so"


def _key(name: str, config: Any) -> str:
    text = "\n".join((str(FORMAT_VERSION), architecture(name), repr(config), _sources_digest(f"{PACKAGE}.{name}")))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@functools.cache
def _sources_digest(module: str) -> str:
    """Digest over the sources of a kernel module and of the kernel and dispatch modules that it imports."""
    digest = hashlib.sha256()
    for source in _sources(module, {}).values():
        digest.update(source)
    return digest.hexdigest()


def _sources(module: str, seen: dict[str, bytes]) -> dict[str, bytes]:
    is_kernel = module.startswith(f"{PACKAGE}.") and module.removeprefix(f"{PACKAGE}.") not in HOST_MODULES
    if module in seen or not (is_kernel or module.startswith(f"{DISPATCH_PACKAGE}.")):
        return seen
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return seen
    seen[module] = source = Path(spec.origin).read_bytes()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            _sources(node.module, seen)
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if (
                    node.module.startswith((PACKAGE, DISPATCH_PACKAGE))
                    and importlib.util.find_spec(node.module).submodule_search_locations
                ):  # type: ignore[union-attr]
                    _sources(submodule, seen)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                _sources(alias.name, seen)
    return seen


@functools.cache
def _dsl_version() -> str | None:
    try:
        return importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_intact(entry: Path) -> bool:
    data = entry.read_bytes()
    return hashlib.sha256(data[:-DIGEST_BYTES]).digest() == data[-DIGEST_BYTES:]


@contextlib.contextmanager
def _locked(directory: Path, key: str) -> Iterator[None]:
    locks = directory / "locks"
    locks.mkdir(exist_ok=True)
    with open(locks / key[:2], "w") as handle:  # never deleted: at most 256 of them
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(name: str, config: Any, entry: Path) -> None:
    _provide_runtime(entry.parent)
    announcement = threading.Timer(
        SLOW_COMPILE_SECONDS,
        lambda: log.warning("compiling kernel %s for %s: %s", name, architecture(name), config),
    )
    announcement.daemon = True
    announcement.start()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix="build-") as scratch:
        shared_object = Path(scratch) / entry.name
        try:
            compile_kernel(name, config, shared_object)
        finally:
            announcement.cancel()
        data = shared_object.read_bytes()
        with open(shared_object, "ab") as handle:
            handle.write(hashlib.sha256(data).digest())
            handle.flush()
            os.fsync(handle.fileno())
        shared_object.replace(entry)
    log.info("compiled kernel %s %s in %.1f s", name, config, time.monotonic() - start)


def _provide_runtime(directory: Path) -> None:
    """Puts the DSL's runtime library beside the entries, which look for it in their own folder."""
    target, source = directory / RUNTIME_NAME, runtime_library()
    if target.exists() and target.stat().st_size == source.stat().st_size:
        return
    with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as scratch:
        copy = Path(scratch) / RUNTIME_NAME
        try:
            os.link(source, copy)
        except OSError:  # another file system
            shutil.copyfile(source, copy)
        copy.replace(target)


def _load(entry: Path) -> Callable[..., Any]:
    import tvm_ffi

    function: Callable[..., Any] = tvm_ffi.load_module(str(entry))[SYMBOL]
    return function


def _evict(directory: Path, keep: Path) -> None:
    """Deletes the least recently used entries until the rest fits the limit."""
    limit = int(os.environ.get("DSV4_CACHE_MAX_BYTES", DEFAULT_MAX_BYTES))
    entries = []
    for entry in directory.glob("*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process evicts too
            if entry.name != RUNTIME_NAME:
                stat = entry.stat()
                entries.append((stat.st_mtime, stat.st_size, entry))
    excess = sum(size for _, size, _ in entries) - limit
    for _, size, entry in sorted(entries):
        if excess <= 0:
            break
        if entry != keep:
            entry.unlink(missing_ok=True)
            excess -= size
