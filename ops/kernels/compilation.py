"""Compiles a CuTe DSL kernel to a TVM-FFI shared object, for any architecture, with or without a GPU."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "dsv4_compile.ops.kernels"
SYMBOL = "dsv4_kernel"  # the one function that each shared object exports through TVM FFI
ARCHITECTURES = {"sm90": "sm_90a", "sm100": "sm_100a"}

_COMPILE_LOCK = threading.Lock()  # the DSL's tracer keeps global state


class CompilerMissingError(RuntimeError):
    """cutlass or the C compiler that links its output is not installed."""


def architecture(name: str) -> str:
    """``sm90.quantize_nvfp4`` -> ``sm_90a``."""
    return ARCHITECTURES[name.split(".", 1)[0]]


def compile_kernel(name: str, config: Any, shared_object: Path) -> None:
    """Compiles ``dsv4_compile.ops.kernels.<name>`` for its architecture and links it.

    Args:
        name: module below this package: ``sm90.quantize_nvfp4``.
        config: handed to the module's ``build``, which returns a ``cute.jit`` function and its fake arguments.
        shared_object: file to write; its folder must hold, or come to hold, ``libcute_dsl_runtime.so``.

    Raises:
        CompilerMissingError: no nvidia-cutlass-dsl, or no C compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        object_file = Path(folder) / "kernel.o"
        compiled = _compile(name, config, "")
        with _COMPILE_LOCK:
            compiled.export_to_c(object_file_path=str(object_file), function_name=SYMBOL)
        linker = shutil.which("cc") or shutil.which("gcc")
        if linker is None:
            raise CompilerMissingError(f"{name}: a C compiler (cc or gcc) must be on the PATH to link a kernel")
        runtime = runtime_library()
        command = [linker, "-shared", "-o", str(shared_object), str(object_file)]
        subprocess.run(
            [*command, f"-L{runtime.parent}", "-lcute_dsl_runtime", "-Wl,-rpath,$ORIGIN"],
            check=True,
            capture_output=True,
        )


def _compile(name: str, config: Any, extra_options: str) -> Any:
    try:
        module = importlib.import_module(f"{PACKAGE}.{name}")
        from cutlass import cute
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in ("cutlass", "nvidia_cutlass_dsl"):
            raise
        raise CompilerMissingError(f"{name}: nvidia-cutlass-dsl must be installed to compile kernels") from error
    with _COMPILE_LOCK:
        function, arguments = module.build(config)
        return cute.compile(
            function, *arguments, options=f"--enable-tvm-ffi --gpu-arch {architecture(name)}{extra_options}"
        )


def runtime_library() -> Path:
    """``libcute_dsl_runtime.so`` of the installed DSL, which every shared object needs beside itself."""
    try:
        from cutlass.cute.runtime import find_runtime_libraries
    except ImportError as error:
        raise CompilerMissingError("libcute_dsl_runtime.so: nvidia-cutlass-dsl must be installed") from error
    return next(Path(path) for path in find_runtime_libraries(enable_tvm_ffi=True) if "cute_dsl_runtime" in path)


@dataclass(frozen=True)
class MachineCode:
    """What ptxas made of a kernel: read in tests, so that a spill or a lost tensor-core instruction is seen.

    Attributes:
        registers: registers a thread, the largest of the kernels in the object.
        spill_bytes: local memory a thread.
        sass: the disassembly.
    """

    registers: int
    spill_bytes: int
    sass: str

    def count(self, pattern: str) -> int:
        """Number of SASS instructions that match a regular expression."""
        return len(re.findall(pattern, self.sass))


def machine_code(name: str, config: Any) -> MachineCode:
    """Compiles a kernel and reads registers, spills and SASS out of it with ``cuobjdump``.

    Raises:
        CompilerMissingError: no nvidia-cutlass-dsl, or no ``cuobjdump`` (PyPI: nvidia-cuda-cuobjdump, and
            nvidia-cuda-nvdisasm, which it calls).
    """
    cuobjdump = find_tool("cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compile(name, config, f" --keep-cubin --dump-dir {folder}")
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.__cubin__)
        tools = {"PATH": f"{find_tool('nvdisasm').parent}:{cuobjdump.parent}:/usr/bin:/bin"}
        usage, sass = (
            subprocess.run([cuobjdump, flag, cubin], check=True, capture_output=True, text=True, env=tools).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    return MachineCode(
        registers=max(int(n) for n in re.findall(r"\bREG:(\d+)", usage)),
        spill_bytes=max(int(n) for n in re.findall(r"\bSTACK:(\d+)", usage)),
        sass=sass,
    )


def find_tool(tool: str) -> Path:
    """A CUDA binary tool on the PATH or in an installed ``nvidia`` wheel."""
    if (on_path := shutil.which(tool)) is not None:
        return Path(on_path)
    for folder in _wheel_folders():
        for candidate in sorted(folder.glob(f"*/bin/{tool}")):
            return candidate
    raise CompilerMissingError(f"{tool} must be installed to read machine code (PyPI: nvidia-cuda-{tool})")


def _wheel_folders() -> list[Path]:
    try:
        nvidia = importlib.import_module("nvidia")
    except ImportError:
        return []
    return [Path(folder) for folder in nvidia.__path__]
