"""Turns stored weights into NVFP4 or into plain floats, and checks the scales while it reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.formats import MXFP4_BLOCK, Source
from dsv4_compile.checkpoint.index import TORCH_DTYPES, Checkpoint

# Exponents that an E4M3 block scale holds exactly: 2^-9, the smallest subnormal, to 2^8, the largest power below 448.
LOWEST_EXPONENT, HIGHEST_EXPONENT = -9, 8
MXFP4_SPAN = HIGHEST_EXPONENT - LOWEST_EXPONENT
E8M0_BIAS, E8M0_NAN = 127, 255
BEYOND_SPAN = f"MXFP4 exponents span more than {MXFP4_SPAN}"
FROM_FP8 = "FP8 to NVFP4, as asked for"
_E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)  # twice as fast as to()
_ELEMENTS_AT_ONCE = 1 << 20  # of a weight that are expanded to fp32 at a time


class Packed(NamedTuple):
    """NVFP4 parts of one weight: codes uint8 [..., K/2], block scales e4m3 [..., K/16], global scale fp32."""

    codes: Tensor
    block_scales: Tensor
    global_scale: Tensor

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], global_scale_shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> Packed:
        """Parts of a weight of this shape, uninitialised."""
        *lead, k = shape
        return cls(
            torch.empty((*lead, k // 2), dtype=torch.uint8, device=device),
            torch.empty((*lead, k // nvfp4.BLOCK_SIZE), dtype=torch.float8_e4m3fn, device=device),
            torch.empty(global_scale_shape, dtype=torch.float32, device=device),
        )

    def copy_(self, source: Packed) -> None:
        """Writes the parts of another weight of this shape into these."""
        for mine, other in zip(self, source, strict=True):
            mine.copy_(other)


class BadScalesError(ValueError):
    """Scales, or FP8 elements, that no intact checkpoint has."""


def read_packed(checkpoint: Checkpoint, source: Source) -> tuple[Packed, bool]:
    """A 4-bit source as NVFP4.

    Returns:
        The parts, and whether each value is exactly the stored one: always for NVFP4, for MXFP4 unless the exponents
        of its non-zero blocks span more than 17.

    Raises:
        BadScalesError: NaN or negative block scales, or a global scale that is not positive and finite.
    """
    packed = Packed.empty(source.shape, global_scale_shape(source))
    return packed, not fill_packed(checkpoint, source, packed)


def global_scale_shape(source: Source) -> tuple[int, ...]:
    """One a matrix; for stacked gate and up with one each, as they are stored, two."""
    lead = source.shape[:-2]
    stored = source.parts.get("global_scale")
    return (*lead, 2) if stored is not None and lead and stored.shape == (*lead, 2) else lead


def fill_packed(checkpoint: Checkpoint, source: Source, out: Packed) -> str:
    """Writes a 4-bit or FP8 source into NVFP4 parts.

    Args:
        checkpoint, source: what to read.
        out: parts on the CPU, contiguous; the global scale has the shape that :func:`global_scale_shape` says.

    Returns:
        Why the weight had to be quantised anew; "" where each value is exactly the stored one.

    Raises:
        BadScalesError: NaN or negative scales, a global scale that is not positive and finite, NaN in an FP8 weight.
    """
    data, scale = source.parts["data"].name, source.parts["scale"].name
    matrices = [out] if len(source.shape) == 2 else [Packed(*parts) for parts in zip(*out, strict=True)]
    if source.format == "fp8":
        weight = _Fp8(checkpoint, source)
        for index, matrix in enumerate(matrices):
            matrix.copy_(_quantize(partial(weight.rows, index), *source.shape[-2:]))
        return FROM_FP8
    checkpoint.read(data, out.codes)
    if source.format == "mxfp4":
        exponents = checkpoint.read(scale)
        check_scales(source, "scale", exponents)
        is_exact = True
        for matrix, k in zip(matrices, exponents.view(torch.uint8).view(-1, *exponents.shape[-2:]), strict=True):
            converted, this_is_exact = mxfp4_to_nvfp4(matrix.codes, k)
            is_exact &= this_is_exact
            matrix.copy_(converted)
        return "" if is_exact else BEYOND_SPAN
    checkpoint.read(scale, out.block_scales)
    check_scales(source, "scale", out.block_scales)
    global_scale = checkpoint.read(source.parts["global_scale"].name)
    check_scales(source, "global_scale", global_scale)
    if source.format == "nvfp4_ct":  # stored as 2688 / amax, to divide by
        global_scale = 1.0 / global_scale
    out.global_scale.copy_(global_scale.reshape(()) if global_scale.numel() == 1 else global_scale)
    return ""


def check_scales(source: Source, role: str, scale: Tensor) -> None:
    """Raises :class:`BadScalesError` for scales that no intact checkpoint has.

    Args:
        source: the weight that they belong to.
        role: ``scale`` or ``global_scale``.
        scale: what is stored for it.
    """
    name = source.parts[role].name
    if role == "global_scale":
        is_bad = ~(scale.isfinite() & (scale > 0))
        if bool(is_bad.any()):
            raise BadScalesError(f"{name}: must be positive and finite, got {scale[is_bad].flatten()[0].item()}")
        if source.format == "nvfp4_ct" and not bool((1.0 / scale).isfinite().all()):
            raise BadScalesError(f"{name}: its reciprocal must be finite, got {scale.min().item()}")
    elif scale.dtype == torch.float8_e8m0fnu:
        if _largest(scale.view(torch.uint8)) == E8M0_NAN:
            raise BadScalesError(f"{name}: exponents must be numbers, got NaN")
    elif scale.dtype == torch.float8_e4m3fn:
        as_bytes = scale.view(torch.uint8)
        if _largest(as_bytes) <= 0x7E:  # the byte of 448; above it are NaN and what has a sign
            return
        if bool(((as_bytes & 0x7F) == 0x7F).any()):
            raise BadScalesError(f"{name}: block scales must be numbers, got NaN")
        if bool((as_bytes > 0x80).any()):
            raise BadScalesError(f"{name}: block scales must not be negative, got {scale.float().min().item()}")
    elif not bool((scale.isfinite() & (scale >= 0)).all()):
        raise BadScalesError(f"{name}: scales must be finite and not negative")


def _largest(values: Tensor) -> int:
    return int(values.max()) if values.numel() else 0


def mxfp4_to_nvfp4(codes: Tensor, exponents: Tensor) -> tuple[Packed, bool]:
    """E2M1 codes with one power of two for 32 elements, as NVFP4 with two E4M3 scales for them.

    With ``k`` the exponents, ``global scale = 2^(max k - 8)`` and ``block scale = 2^(k - max k + 8)``, both exact while
    ``max k - min k <= 17``; codes are taken over as they are. Beyond that, blocks of zeros are left out of account.

    Args:
        codes: uint8 [N, K/2].
        exponents: uint8 [N, K/32], biased by 127, no NaN (255).

    Returns:
        The parts, ``codes`` itself among them where it can be, and whether every value is exactly that of MXFP4. Where
        the span is larger, the weight is quantised anew from its fp32 values.
    """
    lowest, highest = _bounds(exponents)
    if highest - lowest > MXFP4_SPAN:  # blocks of zeros do not count: their exponents mean nothing
        used = (codes & 0x77).unflatten(-1, (-1, MXFP4_BLOCK // 2)).amax(dim=-1) > 0
        lowest, highest = _bounds(exponents[used])
    if highest - lowest > MXFP4_SPAN:
        n, half_k = codes.shape
        return _quantize(lambda rows: _mxfp4_to_float(codes[rows], exponents[rows]), n, 2 * half_k), False
    relative = torch.arange(256, dtype=torch.float32) - highest + HIGHEST_EXPONENT
    table = relative.clamp(LOWEST_EXPONENT, HIGHEST_EXPONENT).exp2().to(torch.float8_e4m3fn).view(torch.uint8)
    scales = table.index_select(0, exponents.int().flatten()).view(exponents.shape)
    block_scales = torch.stack((scales, scales), dim=-1).flatten(-2).view(torch.float8_e4m3fn)
    global_scale = torch.tensor(2.0 ** (highest - E8M0_BIAS - HIGHEST_EXPONENT), dtype=torch.float32)
    return Packed(codes, block_scales, global_scale), True


def _bounds(exponents: Tensor) -> tuple[int, int]:
    """Lowest and highest of some bytes; that of a scale of 1 where there are none."""
    if not exponents.numel():
        return E8M0_BIAS, E8M0_BIAS
    lowest, highest = exponents.aminmax()
    return int(lowest), int(highest)


def _mxfp4_to_float(codes: Tensor, exponents: Tensor) -> Tensor:
    k = exponents.to(torch.int32).sub_(E8M0_BIAS).unsqueeze(-1)
    return torch.ldexp(nvfp4.decode_codes(codes).unflatten(-1, (-1, MXFP4_BLOCK)), k).flatten(-2)


def _quantize(rows_of: Callable[[slice], Tensor], n: int, k: int) -> Packed:
    """What ``nvfp4.quantize`` makes of a weight [N, K] whose rows come a few at a time, in fp32: the same bits."""
    out = Packed.empty((n, k), ())
    chunks = _row_chunks(n, k)
    amax = torch.zeros((), dtype=torch.float32)
    for rows in chunks:
        amax = torch.maximum(amax, rows_of(rows).abs().amax())
    out.global_scale.copy_(nvfp4.global_scale_from_amax(amax, "tensor"))
    for rows in chunks:
        codes, block_scales = nvfp4.quantize_with_global_scale(rows_of(rows), out.global_scale)
        out.codes[rows].copy_(codes)
        out.block_scales[rows].copy_(block_scales)
    return out


def _row_chunks(n: int, k: int) -> list[slice]:
    step = max(1, _ELEMENTS_AT_ONCE // max(1, k))
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


def read_float(checkpoint: Checkpoint, source: Source, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A source in ``dtype``: plain and FP8 ones rounded once, packed ones dequantised.

    Args:
        checkpoint, source: what to read.
        dtype: of the result.
        out: where to write it, contiguous and on the CPU; new without.

    Raises:
        BadScalesError: scales that are NaN, infinite or negative, NaN in an FP8 weight.
    """
    if out is None:
        out = torch.empty(source.shape, dtype=dtype)
    if source.format == "plain":
        if TORCH_DTYPES[source.parts["data"].dtype] == dtype:
            return checkpoint.read(source.name, out)
        return out.copy_(checkpoint.read(source.name))
    if source.format == "fp8":
        weight = _Fp8(checkpoint, source)
        for index, matrix in enumerate(out.view(-1, *source.shape[-2:])):
            for rows in _row_chunks(*source.shape[-2:]):
                matrix[rows].copy_(weight.rows(index, rows))
        return out
    packed, _ = read_packed(checkpoint, source)
    return out.copy_(nvfp4.dequantize(*packed, dtype))


class _Fp8:
    """An FP8 weight, or a stack of them, that is expanded a few rows at a time."""

    def __init__(self, checkpoint: Checkpoint, source: Source) -> None:
        n, k = source.shape[-2:]
        self.name = source.name
        self.block_rows, self.block_columns = source.block
        self.data = checkpoint.read(source.parts["data"].name).view(-1, n, k)
        scale = checkpoint.read(source.parts["scale"].name)
        check_scales(source, "scale", scale)
        self.scale = scale.to(torch.float32).view(-1, -(-n // self.block_rows), -(-k // self.block_columns))

    def rows(self, index: int, rows: slice) -> Tensor:
        """``element * scale of its block`` in fp32, of some rows of matrix ``index``."""
        elements = self.data[index, rows]
        part = _E4M3_VALUES.index_select(0, elements.view(torch.uint8).int().flatten()).view(elements.shape)
        scale = self.scale[min(index, len(self.scale) - 1)]  # one for all of a stack, or one each
        blocks = scale[torch.arange(rows.start, rows.stop) // self.block_rows]
        if part.shape[1] % self.block_columns == 0:
            part.unflatten(1, (-1, self.block_columns)).mul_(blocks.unsqueeze(-1))
        else:
            part.mul_(blocks.repeat_interleave(self.block_columns, dim=1)[:, : part.shape[1]])
        if part.numel() and not bool(torch.stack(part.aminmax()).isfinite().all()):
            raise BadScalesError(f"{self.name}: FP8 weights must be finite, got NaN, or a product beyond fp32")
        return part
