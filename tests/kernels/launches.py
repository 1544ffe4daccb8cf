"""What the host code of a compiled kernel launches, caught without a GPU.

The shared object of a kernel, the very code that runs on a GPU machine, calls a dozen functions of the CUDA runtime. A
small C library loaded before it stands for them: it hands each launch to Python in place of starting it. Tensors are
CPU tensors that say they are on a GPU. So what is tested is the real host code: argument checks, grids, the parameters
of the kernel and the descriptors of the tensor memory accelerator.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_compile.ops.kernels import compilation

RUNTIME = r"""
#include <string.h>
typedef void (*launch_t)(const void *config, const char *kernel, void **arguments);
static launch_t on_launch;
static char names[4096][512];
static int count;
void dsv4_set_launch(launch_t function) { on_launch = function; }
int _cudaLibraryLoadData(void **library, void *code) { *library = code; return 0; }
int _cudaLibraryGetKernel(char **kernel, void *library, const char *name) {
  *kernel = strncpy(names[count++ % 4096], name, 511);
  return 0;
}
int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) { return *value = 0; }
int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) { return 0; }
int _cudaFuncSetAttribute(void *kernel, int attribute, int value) { return 0; }
int _cudaDeviceGetAttribute(int *value, int attribute, int device) { return *value = 0; }
int _cudaGetDevice(int *device) { return *device = 0; }
int _cudaSetDevice(int device) { return 0; }
int _cudaLaunchKernelEx(const void *config, const char *kernel, void **arguments) {
  on_launch(config, kernel, arguments);
  return 0;
}
int cuda_dialect_init_library_once(void **slot, int (*load)(void **), int (*prepare)(void **, int), void *raise_error) {
  void *library = 0;
  int error = *slot ? 0 : load(&library);
  if (*slot || error) return error;
  if (prepare && (error = prepare(&library, 0))) return error;
  *slot = library;
  return 0;
}
int cuda_dialect_unload_library_once(void **slot) { *slot = 0; return 0; }
"""
CUDA = 2  # DLPack's code of the device
CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # cudaLaunchAttributeID
ATTRIBUTE_BYTES = 72
DLPACK_CODES = {  # code and bits
    torch.uint8: (1, 8), torch.int16: (0, 16), torch.int32: (0, 32), torch.int64: (0, 64), torch.float32: (2, 32), torch.float16: (2, 16),
    torch.bfloat16: (4, 16), torch.float8_e4m3fn: (10, 8), torch.bool: (6, 8),
}  # fmt: skip


@dataclass(frozen=True)
class TensorMap:
    """What a descriptor of the tensor memory accelerator says.

    Attributes:
        address: of the tensor.
        element_bytes: 1, 2 or 4.
        dims: elements of each dimension, the innermost first.
        strides_bytes: of all dimensions but the innermost.
        box: elements of each dimension that one copy moves.
        swizzle: bytes of the pattern, 0 for none.
    """

    address: int
    element_bytes: int
    dims: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


def tensor_map(raw: bytes) -> TensorMap:
    """Reads a descriptor; the places of its fields were found by encoding known tensors."""
    flags = int.from_bytes(raw[8:12], "little")
    rank = (flags >> 4 & 7) + 1
    element_bytes = {0: 1, 1: 2, 2: 4, 3: 4, 6: 2, 7: 4, 10: 2}[flags >> 7 & 15]
    return TensorMap(
        address=int.from_bytes(raw[:8], "little"),
        element_bytes=element_bytes,
        dims=tuple(int.from_bytes(raw[32 + 4 * i : 36 + 4 * i], "little") + 1 for i in range(rank)),
        strides_bytes=tuple(16 * int.from_bytes(raw[12 + 4 * i : 16 + 4 * i], "little") for i in range(rank - 1)),
        box=tuple(raw[55 + i] + 1 for i in range(rank)),
        swizzle=(0, 32, 64, 128)[flags >> 13 & 3],
    )


@dataclass(frozen=True)
class Launch:
    """One launch: the text of the kernel, how it starts, and the bytes of each of its parameters."""

    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    is_dependent: bool
    parameters: tuple[bytes, ...]


@dataclass(frozen=True)
class Compiled:
    """A kernel's host function and the PTX of its device code."""

    function: Callable[..., Any]
    ptx: str


@functools.cache
def _runtime() -> Any:
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "a C compiler links the kernels too"
    folder = Path(tempfile.mkdtemp(prefix="dsv4-runtime-"))
    source, library = folder / "runtime.c", folder / "runtime.so"
    source.write_text(RUNTIME)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def compiled(name: str, config: Any) -> Compiled:
    """Compiles a kernel and loads its host code over the library that stands for CUDA's."""
    import tvm_ffi

    _runtime()
    folder = Path(tempfile.mkdtemp(prefix="dsv4-kernel-"))
    function = compilation._compile(name, config, f" --keep-ptx --keep-cubin --dump-dir {folder}")
    function.export_to_c(object_file_path=str(folder / "kernel.o"), function_name=compilation.SYMBOL)
    runtime = compilation.runtime_library()
    command = ["cc", "-shared", "-o", folder / "kernel.so", folder / "kernel.o", f"-L{runtime.parent}"]
    subprocess.run([*command, "-lcute_dsl_runtime", f"-Wl,-rpath,{runtime.parent}"], check=True)
    (ptx,) = folder.glob("*.ptx")
    return Compiled(tvm_ffi.load_module(str(folder / "kernel.so"))[compilation.SYMBOL], ptx.read_text())


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("num_attributes", ctypes.c_uint),
    ]  # fmt: skip


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]  # fmt: skip


class _OnGpu:
    """A CPU tensor that DLPack takes for one on a GPU, for as long as this object lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        extents = ctypes.c_int64 * max(1, tensor.dim())
        self.shape, self.strides = extents(*tensor.shape), extents(*tensor.stride())
        code, bits = DLPACK_CODES[tensor.dtype]
        self.managed = _DLTensor(
            tensor.data_ptr(), CUDA, 0, tensor.dim(), code, bits, 1, self.shape, self.strides, 0, None, None
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, **kwargs: Any) -> Any:
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype, new_capsule.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return new_capsule(ctypes.addressof(self.managed), b"dltensor", None)


@contextmanager
def _handed_to(function: Callable[[Any, bytes, Any], None]) -> Iterator[None]:
    callback = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Config), ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))(
        function
    )
    _runtime().dsv4_set_launch(callback)
    yield


def launches(name: str, config: Any, arguments: Sequence[Any]) -> list[Launch]:
    """The launches of one call of a kernel, none of which runs; arguments as dispatch hands them over, on the CPU."""
    import tvm_ffi

    kernel = compiled(name, config)
    found: list[Launch] = []
    keep: list[_OnGpu] = []

    def on_gpu(value: Any) -> Any:
        if isinstance(value, Tensor):
            keep.append(_OnGpu(value))
            return tvm_ffi.from_dlpack(keep[-1])
        return [on_gpu(item) for item in value] if isinstance(value, (list, tuple)) else value

    def caught(config_pointer: Any, symbol: bytes, values: Any) -> None:
        launch = config_pointer[0]
        attributes = [
            ctypes.string_at(launch.attributes + i * ATTRIBUTE_BYTES, ATTRIBUTE_BYTES)
            for i in range(launch.num_attributes)
        ]
        by_id = {int.from_bytes(raw[:4], "little"): raw[8:] for raw in attributes}
        cluster = by_id.get(CLUSTER_DIMENSION, b"\x01\0\0\0" * 3)
        text = entry_of(kernel.ptx, symbol.decode())
        found.append(
            Launch(
                ptx=text,
                grid=tuple(launch.grid),
                block=tuple(launch.block),
                cluster=tuple(int.from_bytes(cluster[4 * i : 4 * i + 4], "little") for i in range(3)),  # type: ignore[arg-type]
                shared_bytes=launch.shared_bytes,
                is_dependent=bool(
                    int.from_bytes(by_id.get(PROGRAMMATIC_STREAM_SERIALIZATION, b"\0\0\0\0")[:4], "little")
                ),
                parameters=tuple(ctypes.string_at(values[i], size) for i, size in enumerate(parameter_sizes(text))),
            )
        )

    with _handed_to(caught):
        kernel.function(*(on_gpu(value) for value in arguments))
    return found


def entry_of(ptx: str, symbol: str) -> str:
    """The text with one entry of those it has."""
    first = ptx.index(".visible .entry") if ".visible .entry" in ptx else ptx.index(".entry")
    entries = re.split(r"(?=^\.visible \.entry)", ptx[first:], flags=re.M)
    (mine,) = [entry for entry in entries if re.match(rf"\.visible \.entry {re.escape(symbol)}\s*\(", entry)]
    return ptx[:first] + mine


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the entry."""
    head = ptx[ptx.index(".entry") :].split("{", 1)[0]
    sizes = []
    for kind, size in re.findall(r"\.param (?:\.align \d+ )?\.(\w+) \S+?(?:\[(\d+)\])?,?\s*\n", head):
        sizes.append(int(size) if size else int(kind[1:]) // 8)
    return sizes
