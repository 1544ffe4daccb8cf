"""The Hopper kernels in plain torch, so that what launches them, ``ops/dispatch``, runs and is tested without a GPU.

Under :func:`emulated_hopper` a CUDA implementation called with CPU tensors launches the functions of
``emulated_kernels.py``, ``emulated_moe.py`` and ``emulated_quantizers.py``. They take the arguments of a launch and do
what the kernel does with them: they were written from the kernels' sources, not from the code that launches them. What
a launch would not survive, or must not get, is an ``AssertionError`` that names the kernel:

- arguments that the compiled kernel refuses: dtype, rank, sizes that must agree or divide, strides, alignment, 32-bit
  range. The rules are those of the fake tensors of the kernel's ``build``, checked as TVM FFI checks them;
- arguments that it takes and must not get: a tile or row outside its tensors, more tokens than it has registers for;
- weights that it reads before an earlier kernel has written them (see :class:`_Order`);
- a value that the host reads.

What the allocator hands out is filled with 0xFF: NaN in every float dtype, -1 in integers.

Sums are exact (fp64, rounded once to fp32, as in the reference), so whole operators have the reference's bits whichever
variant dispatch chooses. The order of sums and the arithmetic on the chip are not emulated: those are tested on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

from dsv4_compile.ops.dispatch import fresh_weights, tuning
from dsv4_compile.ops.kernels import cache, compilation, device
from dsv4_compile.ops.registration import CUDA_IMPLEMENTATIONS
from tests.gpu import bytes_of
from tests.kernels.emulated_kernels import KERNELS, STARTS_NEXT_LATE, early_reads, span, writes

EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
HOST_READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_consecutive"}
NO_LAUNCH = {"detach", "alias", "_reshape_alias", "_unsafe_view", "set_"}
Run = Callable[[str, Any, Sequence[Any]], None]


@dataclass
class Trace:
    """What was launched under :func:`emulated_hopper`.

    Attributes:
        kernels: name and configuration of each launch, in order.
    """

    kernels: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Kernel names without the architecture; ``decode_mm.swiglu`` of a kernel that has modes."""
        return [_label(name, config) for name, config in self.kernels]


def _label(name: str, config: Any) -> str:
    mode = getattr(config, "mode", None)
    return name.removeprefix("sm90.") + ("" if mode is None else f".{mode}")


@contextlib.contextmanager
def emulated_hopper(sms: int = device.HOPPER_SM_COUNT, run: Run | None = None) -> Iterator[Trace]:
    """Makes CUDA implementations run on CPU tensors, as if on a Hopper GPU of ``sms`` multiprocessors.

    ``run`` is called for each launch in place of the function that stands for its kernel.
    """
    trace = Trace()
    order = _Order()

    def kernel(name: str, config: Any) -> Callable[..., None]:
        return functools.partial(_launch, trace, order, run or run_stand_in, name, config)

    def mm(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> Tensor:
        if "out_dtype" not in options:
            return real_mm(a, b, *rest, **options)
        assert a.dtype == b.dtype == torch.bfloat16, "cuBLAS: operands must have one dtype"
        with _disable_current_modes():  # CUDA only, in torch
            order.ordinary()
            return (a.double() @ b.double()).to(options["out_dtype"])

    def tolist(x: Tensor) -> Any:
        assert not isinstance(_get_current_dispatch_mode(), _Host), "the host reads a value: tolist"
        return real_tolist(x)

    real_mm, real_tolist = torch.mm, Tensor.tolist
    with pytest.MonkeyPatch.context() as patch, _Host(order):
        patch.setattr(cache, "kernel", kernel)
        patch.setattr(device, "_sm_count", lambda index: sms)
        patch.setattr(device, "_capability", lambda index: (9, 0))
        patch.setattr(torch, "mm", mm)
        patch.setattr(Tensor, "tolist", tolist)
        yield trace


def run_stand_in(name: str, config: Any, arguments: Sequence[Any]) -> None:
    """Runs the function that stands for a kernel."""
    KERNELS[type(config)](name, config, *arguments)


def _launch(trace: Trace, order: _Order, run: Run, name: str, config: Any, *arguments: Any) -> None:
    label = f"{name} {config}"
    with _disable_current_modes():
        check_arguments(label, _fakes(name, config), arguments)
        trace.kernels.append((name, config))
        order.launch(label, config, arguments)
        try:
            run(name, config, arguments)
        except (IndexError, RuntimeError) as error:
            raise AssertionError(f"{label}: {error}") from error


@functools.cache
def _fakes(name: str, config: Any) -> tuple[Any, ...]:
    """The fake arguments of a kernel that stand for those of a launch: those in front of the stream."""
    _, fakes = importlib.import_module(f"{compilation.PACKAGE}.{name}").build(config)
    stream = next(i for i, fake in enumerate(fakes) if "Stream" in type(fake).__name__)
    return tuple(fakes[:stream])


# What TVM FFI checks in front of a launch


def check_arguments(label: str, fakes: Sequence[Any], arguments: Sequence[Any]) -> None:
    """Checks arguments against a kernel's fake ones, as TVM FFI does: see ``cutlass/base_dsl/tvm_ffi_builder``."""
    bound: dict[int, int] = {}

    def check(condition: bool, what: str) -> None:
        assert condition, f"{label}: {what}"

    def match(symbol: Any, value: int, what: str, skip: bool = False) -> None:
        if isinstance(symbol, int):
            check(skip or value == symbol, f"{what} must be {symbol}, got {value}")
        elif id(symbol) in bound:
            check(skip or value == bound[id(symbol)], f"{what} must be {bound[id(symbol)]}, got {value}")
        else:
            limit = 1 << (symbol.width - 1)
            check(-limit <= value < limit, f"{what} must fit {symbol.width} bits, got {value}")
            divisible = skip or value % symbol.divisibility == 0
            check(divisible, f"{what} must be divisible by {symbol.divisibility}, got {value}")
            bound[id(symbol)] = value

    def visit(fake: Any, given: Any, what: str) -> None:
        if isinstance(fake, (list, tuple)):
            check(isinstance(given, (list, tuple)) and len(given) == len(fake), f"{what} must hold {len(fake)} tensors")
            for i, pair in enumerate(zip(fake, given, strict=True)):
                visit(*pair, f"{what}[{i}]")
        elif hasattr(fake, "stride"):
            check(isinstance(given, Tensor), f"{what} must be a tensor, got {type(given).__name__}")
            address, align = given.data_ptr(), fake._assumed_align
            check(address % align == 0, f"{what} must be aligned to {align} bytes, got {address % align}")
            check(given.dim() == len(fake.shape), f"{what} must have rank {len(fake.shape)}, got {given.dim()}")
            check(given.dtype in _torch_dtypes(fake), f"{what} must be {fake.element_type}, got {given.dtype}")
            for i, (symbol, size) in enumerate(zip(fake.shape, given.shape, strict=True)):
                match(symbol, size, f"{what}.shape[{i}]")
            for i, (symbol, stride) in enumerate(zip(fake.stride, given.stride(), strict=True)):
                match(symbol, stride, f"{what}.stride[{i}]", skip=given.shape[i] == 1)
        else:
            kind = type(fake).__name__
            if kind.startswith("Float"):
                check(isinstance(given, (int, float)), f"{what} must be a number, got {given!r}")
            else:
                bits = fake.width
                low, high = (0, 1 << bits) if kind.startswith("U") else (-(1 << (bits - 1)), 1 << (bits - 1))
                check(isinstance(given, int) and low <= given < high, f"{what} must be {kind}, got {given!r}")

    check(len(arguments) == len(fakes), f"takes {len(fakes)} arguments, got {len(arguments)}")
    for i, pair in enumerate(zip(fakes, arguments, strict=True)):
        visit(*pair, f"argument {i}")


def _torch_dtypes(fake: Any) -> tuple[torch.dtype, ...]:
    name = fake.element_type.__name__.lower()
    integers = {8: (torch.uint8, torch.int8), 16: (torch.int16,), 32: (torch.int32,), 64: (torch.int64,)}
    if "int" in name:
        return integers[fake.element_type.width]
    return ({"float8e4m3fn": torch.float8_e4m3fn}.get(name) or getattr(torch, name),)


# What runs before what


class _Order:
    """Which kernels may still run when one starts: with programmatic dependent launch, not only the one before it.

    A kernel may start when every CTA of the one before has called ``launch_dependents``. One that calls it before its
    own ``wait`` may itself have started early, so what was before it may still run too. What a kernel reads before its
    ``wait`` must not be what any of those writes. ``wait`` waits for all of them, and so does an ordinary launch.
    """

    def __init__(self) -> None:
        self.running: list[tuple[str, list[tuple[int, int]]]] = []  # at the end of the last launch
        self.starts_early = False  # the last one calls launch_dependents before its wait

    def ordinary(self) -> None:
        self.running, self.starts_early = [], False

    def launch(self, label: str, config: Any, arguments: Sequence[Any]) -> None:
        running = self.running if self.starts_early else self.running[-1:]
        for tensor in early_reads(config, arguments):
            begin, end = span(tensor)
            for other, written in running:
                for first, last in written:
                    assert end <= first or last <= begin, f"{label}: reads what {other} may not have written yet"
        spans = [span(tensor) for tensor in writes(config, arguments) if tensor.numel()]
        self.running = [*running, (label, spans)]
        self.starts_early = not isinstance(config, STARTS_NEXT_LATE)
        if not getattr(config, "pdl", True):
            self.ordinary()


class _Host(TorchDispatchMode):
    """Torch operators of the host code: allocations are poisoned, values are not read, all else is a launch."""

    def __init__(self, order: _Order) -> None:
        super().__init__()
        self.order = order

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in HOST_READS, f"the host reads a value: {func}"
        result = func(*args, **(kwargs or {}))
        if name in EMPTY:
            if not result.is_meta:
                poison(result)
        elif not (func.is_view or name in NO_LAUNCH or (isinstance(result, Tensor) and result.is_meta)):
            self.order.ordinary()
        return result


def poison(x: Tensor) -> None:
    """Fills a tensor's bytes with 0xFF."""
    torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).fill_(0xFF)


# Operators


def emulated(
    op: OpOverload, *arguments: Any, sms: int = device.HOPPER_SM_COUNT, run: Run | None = None
) -> tuple[tuple[Tensor, ...], Trace]:
    """Results and launches of an operator's CUDA implementation, called with CPU tensors, which must not change."""
    inputs = [part for part in pytree.tree_leaves(arguments) if isinstance(part, Tensor)]
    before = [bytes_of(part) for part in inputs]
    fresh_weights.wrote()
    with emulated_hopper(sms, run) as trace:
        results = CUDA_IMPLEMENTATIONS[op](*arguments)
    for part, content in zip(inputs, before, strict=True):
        assert torch.equal(bytes_of(part), content), "an input has changed"
    return (results if isinstance(results, tuple) else (results,)), trace


def assert_as_on_cpu(
    op: OpOverload, *arguments: Any, sms: int = device.HOPPER_SM_COUNT, run: Run | None = None
) -> Trace:
    """Checks that an operator's CUDA implementation has the bits and shapes of its CPU kernel; returns its launches."""
    actual, trace = emulated(op, *arguments, sms=sms, run=run)
    assert_same(actual, op(*arguments), f"after {trace.names}")
    return trace


def assert_every_variant_as_on_cpu(op: OpOverload, *arguments: Any, sms: int = device.HOPPER_SM_COUNT) -> set[str]:
    """:func:`assert_as_on_cpu` with each variant that tuning may choose; returns the names of those."""
    names = set()
    with tuning.asking() as asked:
        emulated(op, *arguments, sms=sms)
    expected = op(*arguments)
    for key, question in asked.items():
        for name in question.variants:
            with tuning.forced(key, name):
                actual, trace = emulated(op, *arguments, sms=sms)
            assert_same(actual, expected, f"with {name!r} for {key!r}, after {trace.names}")
            names.add(name)
    return names


def assert_same(actual: Any, expected: Any, where: str) -> None:
    """Checks that results have the same bits, but for the bits of NaN, and are contiguous."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    for i, (left, right) in enumerate(pairs):
        assert (left.shape, left.dtype) == (right.shape, right.dtype), f"result {i} {where}"
        assert left.is_contiguous(), f"result {i} {where}"
        wrong = (bytes_of(left) != bytes_of(right)).view(left.numel(), left.itemsize).any(1).view(left.shape)
        if left.dtype.is_floating_point and left.itemsize > 1:
            wrong &= ~(left.isnan() & right.isnan())
        first = wrong.nonzero()[:3].tolist()
        assert not first, f"result {i} {where}: {int(wrong.sum())} of {wrong.numel()} differ, first {first}"


LAYOUTS = ("contiguous", "offset", "columns apart", "rows apart", "padded", "odd pitch", "transposed", "repeated")


def stored(x: Tensor, layout: str) -> Tensor:
    """A tensor of the same values in another of :data:`LAYOUTS`; ``repeated`` shows its first element of dimension 0.

    ``offset`` begins one element behind an aligned address; ``padded`` has 16 elements between rows, ``odd pitch`` one.
    """
    if x.dim() == 0 or layout == "contiguous":
        return x.contiguous()
    if layout == "repeated":
        return x[:1].contiguous().expand(x.shape)
    sizes = list(x.shape)
    sizes[-1] += {"padded": 16, "odd pitch": 1}.get(layout, 0)
    order = list(range(x.dim()))
    if layout == "transposed":
        order.reverse()
    strides, step = [0] * x.dim(), 2 if layout == "columns apart" else 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(1, sizes[dim])
    if layout == "rows apart":
        strides[0] *= 2
        step *= 2
    offset = int(layout == "offset")
    storage = torch.zeros((step + offset) * x.itemsize, dtype=torch.uint8).view(x.dtype)
    return storage.as_strided(x.shape, strides, offset).copy_(x)
