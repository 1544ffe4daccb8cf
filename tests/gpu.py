"""Runs an operator on the GPU the way a mistake would show, and values that hit every branch of its arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STYLES = ("bits", "finite", "ties", "midpoints", "gaussian", "non-finite", "zeros", "tiny", "powers")
_INTS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def on_gpu(op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    """Results, on the CPU, of an operator called with its tensors on the GPU, strides and offsets kept.

    What the allocator hands out holds NaN before the call, which must not wait for the GPU, changes no input and gives
    the same bits a second time.
    """
    moved = [_move(arg) if isinstance(arg, Tensor) else arg for arg in args]
    before = [arg.clone() if isinstance(arg, Tensor) else None for arg in moved]
    num_bytes = sum(arg.numel() * 4 for arg in args if isinstance(arg, Tensor))
    runs = []
    for _ in range(2):
        poison = [torch.full((max(512, num_bytes >> shift),), 0xFF, dtype=torch.uint8).cuda() for shift in range(8)]
        del poison
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = op(*moved)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runs.append(tuple(part.cpu() for part in (result if isinstance(result, (tuple, list)) else (result,))))
    for left, right in zip(*runs, strict=True):
        assert torch.equal(bytes_of(left), bytes_of(right))
    for arg, clone in zip(moved, before, strict=True):
        if clone is not None:
            assert torch.equal(bytes_of(arg), bytes_of(clone))
    return runs[0]


def bytes_of(x: Tensor) -> Tensor:
    """The bytes of a tensor's elements in logical order."""
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _move(x: Tensor) -> Tensor:
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def values(shape: tuple[int, ...], dtype: torch.dtype, style: str) -> Tensor:
    """Values [..., K] of one of :data:`STYLES`, from torch's generator.

    ``bits`` is any bit pattern, ``finite`` those that are finite; ``ties`` multiples of a quarter with a power of two a
    block, ``midpoints`` the midpoints between E2M1 values and the neighbours of those; ``powers`` powers of two.
    """
    if style in ("bits", "finite"):
        limit = 1 << (8 * dtype.itemsize - 1)
        x = torch.randint(-limit, limit, shape).to(_INTS[dtype]).view(dtype)
        return x if style == "bits" else torch.where(x.isfinite(), x, torch.ones((), dtype=dtype))
    if style == "zeros":
        return torch.randint(0, 2, shape).mul(-1).to(dtype) * 0
    exponents = torch.randint(-12, 9, (*shape[:-1], shape[-1] // 16, 1)).expand(*shape[:-1], -1, 16).reshape(shape)
    if style == "ties":
        return (torch.randint(-24, 25, shape) * 0.25 * exponents.float().exp2()).to(dtype)
    if style == "midpoints":
        points = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])[torch.randint(0, 8, shape)].to(dtype)
        points = (points.view(_INTS[dtype]) + torch.randint(-1, 2, shape).to(_INTS[dtype])).view(dtype)
        points.view(-1, 16)[:, 0] = 6.0  # so that the block scale is a power of two
        return (points.float() * exponents.float().exp2() * (1 - 2 * torch.randint(0, 2, shape))).to(dtype)
    if style == "powers":
        return torch.randint(-20, 14, shape).float().exp2().to(dtype)
    x = torch.randn(shape)
    if style == "non-finite":
        x[torch.rand(shape) < 2e-3] = float("nan")
        x[torch.rand(shape) < 2e-3] = float("inf")
        x[torch.rand(shape) < 2e-3] = float("-inf")
    if style == "tiny":
        x *= 1e-12 if dtype != torch.float16 else 1e-7
    return x.to(dtype)
