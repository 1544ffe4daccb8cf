"""``Nvfp4Tensor``: a packed weight that stands in for a parameter of an eager model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from dsv4_compile import nvfp4
from dsv4_compile.ops.dequantize_nvfp4 import dequantize_nvfp4
from dsv4_compile.ops.registration import FLOAT_DTYPES, check_packed

aten = torch.ops.aten

_PARTS = ("codes", "block_scales", "global_scale")


class Nvfp4Tensor(torch.Tensor):
    """An NVFP4 weight [N, K] or stacked experts [E, N, K] that behaves as a tensor of ``dtype``.

    In eager mode every operation on it dequantises, so a model that holds such parameters stays runnable and is the
    weight-dequantised reference. ``torch.compile(backend="dsv4")`` reads the packed parts instead. Moving, cloning,
    copying into, slicing along the first dimension and indexing experts keep it packed.

    Args:
        codes: uint8 [..., N, K/2], even k in the low nibble.
        block_scales: float8_e4m3fn [..., N, K/16], row-major.
        global_scale: fp32, 0-d for one matrix; [E] for experts; [S] or [E, S] for S equal row segments (gate and up
            merged in one weight, each with its own).
        dtype: the dtype it stands for: bf16, fp16 or fp32.

    Raises:
        RuntimeError: dtypes or shapes that do not belong together.
    """

    codes: Tensor
    block_scales: Tensor
    global_scale: Tensor
    # A part of a weight whose global scale also holds for the rest: copying into it would change the rest.
    shares_global_scale = False

    @staticmethod
    def __new__(
        cls, codes: Tensor, block_scales: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> Nvfp4Tensor:
        check_packed("Nvfp4Tensor", "", codes, block_scales, global_scale)
        torch._check(
            codes.dim() in (2, 3), lambda: f"Nvfp4Tensor: codes must be 2-D or 3-D, got shape {tuple(codes.shape)}"
        )
        torch._check(
            dtype in FLOAT_DTYPES, lambda: f"Nvfp4Tensor: dtype must be bfloat16, float16 or float32, got {dtype}"
        )
        shape = (*codes.shape[:-1], 2 * codes.shape[-1])
        wrapper: Nvfp4Tensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=codes.device, requires_grad=False
        )
        return wrapper

    def __init__(
        self, codes: Tensor, block_scales: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.codes = codes
        self.block_scales = block_scales
        self.global_scale = global_scale

    @classmethod
    def from_float(cls, weight: Tensor) -> Nvfp4Tensor:
        """Quantises a weight [N, K] or experts [E, N, K] with ``max|w| / 2688`` as each matrix's global scale.

        Raises:
            ValueError: not a bf16, fp16 or fp32 tensor of 2 or 3 dimensions with K % 16 == 0, or NaN or Inf in it.
        """
        if weight.dtype not in FLOAT_DTYPES or weight.dim() not in (2, 3) or weight.shape[-1] % nvfp4.BLOCK_SIZE:
            raise ValueError(
                "Nvfp4Tensor.from_float: weight must be a bf16, fp16 or fp32 tensor [N, K] or [E, N, K] with K "
                f"divisible by {nvfp4.BLOCK_SIZE}, got {weight.dtype} {tuple(weight.shape)}"
            )
        with torch.no_grad():
            return cls(*nvfp4.quantize_weight(weight.detach()), dtype=weight.dtype)

    def dequantize(self) -> Tensor:
        """The plain tensor of ``self.dtype`` that this weight stands for."""
        return dequantize_nvfp4(self.codes, self.block_scales, self.global_scale, self.dtype)

    @property
    def packed_bytes(self) -> int:
        """Bytes that codes, block scales and global scale take."""
        return sum(part.numel() * part.element_size() for part in self._parts())

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.block_scales, self.global_scale

    def _map(self, fn: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Nvfp4Tensor:
        codes, block_scales, global_scale = (fn(part) for part in self._parts())
        return Nvfp4Tensor(codes, block_scales, global_scale, dtype=dtype or self.dtype)

    def _part(self, fn: Callable[[Tensor], Tensor]) -> Nvfp4Tensor:
        # fn views along the first dimension, which a 0-d global scale has not: that one stays the whole weight's.
        scale = fn(self.global_scale) if self.global_scale.dim() else self.global_scale
        part = Nvfp4Tensor(fn(self.codes), fn(self.block_scales), scale, dtype=self.dtype)
        is_borrowed = self.global_scale.dim() == 0 and part.shape != self.shape
        part.shares_global_scale = self.shares_global_scale or is_borrowed
        return part

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = "Parameter(Nvfp4Tensor" if getattr(self, "_is_param", False) else "Nvfp4Tensor"
        scale = (
            "one global scale" if self.global_scale.dim() == 0 else f"{tuple(self.global_scale.shape)} global scales"
        )
        closing = "))" if kind.startswith("Parameter") else ")"
        return f"{kind}({tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r}, {scale}{closing}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Block scales travel as bytes: torch 2.13 writes fp8 storages into a plain pickle that it cannot read back.
        state = (self.codes, self.block_scales.view(torch.uint8), self.global_scale, self.dtype)
        return _unpickle, (*state, isinstance(self, torch.nn.Parameter))

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return list(_PARTS), {"dtype": self.dtype}

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: dict[str, Any], outer_size: Any, outer_stride: Any
    ) -> Nvfp4Tensor:
        codes, block_scales, global_scale = (inner[name] for name in _PARTS)
        return Nvfp4Tensor(codes, block_scales, global_scale, dtype=context["dtype"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and _is_view(func):
            # A view of a parameter made outside of inference mode must not be an inference tensor.
            with torch.inference_mode(False), torch.no_grad():
                return cls.__torch_dispatch__(func, types, args, kwargs)
        if getattr(func, "overloadpacket", None) is aten.to:  # inference mode hands it over whole, not as _to_copy
            return func.decompose(*args, **kwargs)
        handler = _PACKED_OPS.get(func)
        if handler is not None:
            out = handler(func, *args, **kwargs)
            if out is not NotImplemented:
                return return_and_correct_aliasing(func, args, kwargs, out)
        if _writes_packed(func, args, kwargs):
            raise RuntimeError(
                f"Nvfp4Tensor: {func} would write into a packed weight, which only copy_ may do; "
                "dequantize() it, change the copy, and quantise that with Nvfp4Tensor.from_float"
            )
        args, kwargs = torch.utils._pytree.tree_map_only(Nvfp4Tensor, Nvfp4Tensor.dequantize, (args, kwargs))
        return func(*args, **kwargs)


def _is_view(func: Any) -> bool:
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)


def _writes_packed(func: Any, args: Any, kwargs: Any) -> bool:
    written = [
        args[index] if index < len(args) else kwargs.get(argument.name)
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return any(isinstance(value, Nvfp4Tensor) for value in torch.utils._pytree.tree_leaves(written))


def _map_parts(func: Any, weight: Nvfp4Tensor, **kwargs: Any) -> Nvfp4Tensor:
    same = weight._map(func)
    same.shares_global_scale = weight.shares_global_scale
    return same


def _clone(func: Any, weight: Nvfp4Tensor, *, memory_format: Any = None) -> Nvfp4Tensor:
    return weight._map(torch.clone)


def _to_copy(
    func: Any, weight: Nvfp4Tensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **kwargs: Any
) -> Any:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        return NotImplemented
    return weight._map(lambda part: part.to(device=device, non_blocking=non_blocking, copy=True), dtype)


def _copy(func: Any, target: Any, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(target, Nvfp4Tensor):
        return NotImplemented
    if target.shares_global_scale:
        raise ValueError(
            "Nvfp4Tensor.copy_: target must have a global scale of its own, got a part of a weight that has one for "
            "all of it; copy into the whole weight"
        )
    packed = source if isinstance(source, Nvfp4Tensor) else _pack_like(target, source)
    global_scale = packed.global_scale
    if global_scale.dim() < target.global_scale.dim():
        global_scale = global_scale.unsqueeze(-1)
    if packed.shape != target.shape or not _broadcasts(global_scale.shape, target.global_scale.shape):
        raise ValueError(
            f"Nvfp4Tensor.copy_: source must have shape {tuple(target.shape)} and global scale "
            f"{tuple(target.global_scale.shape)}, got {tuple(packed.shape)} and {tuple(packed.global_scale.shape)}"
        )
    target.codes.copy_(packed.codes, non_blocking)
    target.block_scales.copy_(packed.block_scales, non_blocking)
    target.global_scale.copy_(global_scale, non_blocking)
    return target


def _broadcasts(shape: Any, target: Any) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in pairs)


def _pack_like(target: Nvfp4Tensor, source: Tensor) -> Nvfp4Tensor:
    if not _broadcasts(source.shape, target.shape):
        raise ValueError(f"Nvfp4Tensor.copy_: source must have shape {tuple(target.shape)}, got {tuple(source.shape)}")
    source = source.expand(target.shape)
    packed = Nvfp4Tensor.from_float(source)
    if target.global_scale.dim() == 0 and packed.global_scale.dim() == 1:  # experts with one global scale for all
        packed = Nvfp4Tensor(*nvfp4.quantize(source), dtype=source.dtype)
    return packed


def _select(func: Any, weight: Nvfp4Tensor, dim: int, index: int) -> Any:
    if weight.dim() != 3 or dim % weight.dim() != 0:
        return NotImplemented
    return weight._part(lambda part: part.select(0, index))


def _slice(func: Any, weight: Nvfp4Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if dim % weight.dim() != 0 or (weight.dim() == 2 and weight.global_scale.dim() != 0):
        return NotImplemented
    return weight._part(lambda part: func(part, 0, start, end, step))


def _index(func: Any, weight: Any, indices: list[Any]) -> Any:
    scalar_or_list = isinstance(weight, Nvfp4Tensor) and weight.dim() == 3 and len(indices) == 1
    if not scalar_or_list or indices[0].dim() > 1 or indices[0].dtype == torch.bool:
        return NotImplemented

    def gather(part: Tensor) -> Tensor:  # by bytes: fp8 tensors have no index kernel
        if part.dtype == torch.float8_e4m3fn:
            return gather(part.view(torch.uint8)).view(part.dtype)
        gathered: Tensor = func(part, indices) if part.dim() else part.clone()
        return gathered

    return weight._map(gather)


_PACKED_OPS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _map_parts,
    aten.alias.default: _map_parts,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
}


def _unpickle(
    codes: Tensor, scale_bytes: Tensor, global_scale: Tensor, dtype: torch.dtype, is_parameter: bool
) -> Tensor:
    weight = Nvfp4Tensor(codes, scale_bytes.view(torch.float8_e4m3fn), global_scale, dtype=dtype)
    return torch.nn.Parameter(weight, requires_grad=False) if is_parameter else weight


torch.serialization.add_safe_globals([Nvfp4Tensor, _unpickle])
