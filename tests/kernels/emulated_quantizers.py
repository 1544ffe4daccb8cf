"""What the Hopper kernels that quantise and dequantise do with the arguments of a launch, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch.dequantize_nvfp4 import DequantizeConfig
from dsv4_compile.ops.dispatch.quantizer import AmaxConfig, FlatConfig, RowsConfig
from tests.kernels.emulated_numerics import e4m3, finite_amax, quotient

CTA_THREADS = 512  # of the quantisers that own rows or look for a maximum
AMAX_FLOOR = 1e-8


def operand(start: Tensor, rows: int, row_blocks: int, inner: int, outer_pitch: int, inner_pitch: int) -> Tensor:
    """[outer, inner, K] at an address, its pitches in bytes."""
    k, size = 16 * row_blocks, start.itemsize
    assert outer_pitch % 16 == 0, "blocks are read 16 bytes at a time"
    assert inner_pitch % 16 == 0, "blocks are read 16 bytes at a time"
    assert rows % inner == 0
    return start.as_strided((rows // inner, inner, k), (outer_pitch // size, inner_pitch // size, 1))


@dataclass
class _Source:
    """The rows that a quantiser reads, and how it makes of them what is quantised."""

    op: str
    config: Any
    first: Tensor
    second: Tensor
    scalar: float
    row_blocks: int

    def factors(self) -> Tensor:
        """Of RMSNorm: ``1 / sqrt(mean(x^2) + eps)`` a row."""
        x = self.first.reshape(-1, 16 * self.row_blocks)
        total = x.double().square().sum(dim=1).float()
        mean = total / torch.full_like(total, 16.0 * self.row_blocks)
        return 1.0 / nvfp4.sqrt(mean + torch.tensor(self.scalar, dtype=torch.float32))

    def prepared(self, factors: Tensor | None = None) -> Tensor:
        """[rows, K] that are quantised."""
        k = 16 * self.row_blocks
        x = self.first.reshape(-1, k)
        if self.op == "swiglu_quantize_nvfp4":
            return nvfp4.swiglu(x, self.second.reshape(-1, k), self.scalar)
        if self.op == "rms_norm_quantize_nvfp4":
            if factors is None:
                raise ValueError(f"{self.op}: the factors of the rows are missing")
            y = x.float() * factors.unsqueeze(1)
            if self.config.weight is not None:
                y = y * self.second.as_strided((k,), (1,)).float()
            return y.to(x.dtype)
        return x


def _source(
    name: str, config: Any, first: Tensor, second: Tensor, rows: int, row_blocks: int, geometry: Sequence[int],
    scalar: float,
) -> _Source:  # fmt: skip
    op = name.removeprefix("sm90.")
    inner, multiplier, shift, first_outer, first_inner, second_outer, second_inner = geometry
    assert rows > 0
    row = torch.arange(rows)
    assert torch.equal(quotient(row, multiplier, shift), row // inner)
    if op == "swiglu_quantize_nvfp4":
        second = operand(second, rows, row_blocks, inner, second_outer, second_inner)
    return _Source(
        op, config, operand(first, rows, row_blocks, inner, first_outer, first_inner), second, scalar, row_blocks
    )


def _write_packed(x: Tensor, global_scale: Tensor, codes: Tensor, scales: Tensor) -> None:
    packed, block_scales = nvfp4.quantize_with_global_scale(x.float(), global_scale)
    assert codes.numel() == packed.numel()
    assert scales.numel() == block_scales.numel()
    codes.copy_(packed.flatten())
    scales.copy_(block_scales.view(torch.uint8).flatten())


def _rows(name: str, config: RowsConfig, first: Tensor, second: Tensor, *rest: Any) -> None:
    if config.is_partial:
        _rows_amax(name, config, first, second, *rest)
        return
    codes, scales, global_scale, norm, rows, row_blocks, *geometry, scalar, is_pow2 = rest
    groups = CTA_THREADS // config.threads
    assert config.cluster <= 16
    assert row_blocks <= config.threads * config.blocks, "a row that threads cannot hold"
    held = groups * config.rows * config.cluster
    assert config.per_token or rows <= held, f"one maximum over {rows} rows, {held} are held"
    assert config.cluster == 1 or rows <= held
    source = _source(name, config, first, second, rows, row_blocks, geometry, scalar)
    x = source.prepared(source.factors() if "rms_norm" in name else None)
    if config.per_token:
        scale = nvfp4.global_scale_from_amax(finite_amax(x, "token"), "tensor_pow2" if is_pow2 else "token")
        global_scale[torch.arange(rows)] = scale
        _write_packed(x, scale.unsqueeze(1), codes, scales)
    else:
        scale = nvfp4.global_scale_from_amax(finite_amax(x), "tensor_pow2" if is_pow2 else "tensor")
        global_scale[0] = scale
        _write_packed(x, scale, codes, scales)
    if config.norm:
        norm[: x.numel()] = x.flatten()


def _rows_amax(
    name: str, config: RowsConfig, first: Tensor, second: Tensor, partials: Tensor, factors: Tensor, norm: Tensor,
    rows: int, ctas: int, row_blocks: int, *rest: Any,
) -> None:  # fmt: skip
    *geometry, scalar = rest
    groups = CTA_THREADS // config.threads
    assert config.rows == 1
    assert ctas > 0
    assert row_blocks <= config.threads * config.blocks, "a row that threads cannot hold"
    source = _source(name, config, first, second, rows, row_blocks, geometry, scalar)
    factor = source.factors()
    x = source.prepared(factor)
    factors[torch.arange(rows)] = factor
    cta = torch.arange(rows) // groups % ctas
    partials[torch.arange(ctas)] = torch.zeros(ctas).scatter_reduce(0, cta, finite_amax(x, "token"), "amax")
    if config.norm:
        norm[: x.numel()] = x.flatten()


def _amax(
    name: str, config: AmaxConfig, first: Tensor, second: Tensor, partials: Tensor, num_blocks: int, ctas: int,
    row_blocks: int, multiplier: int, shift: int, *rest: Any,
) -> None:  # fmt: skip
    *geometry, scalar = rest
    assert ctas > 0
    rows = _rows_of(num_blocks, row_blocks, multiplier, shift)
    x = _source(name, config, first, second, rows, row_blocks, geometry, scalar).prepared()
    of_block = finite_amax(x.reshape(-1, 16), "token")
    cta = torch.arange(num_blocks) // (CTA_THREADS * config.unroll) % ctas
    partials[torch.arange(ctas)] = torch.full((ctas,), AMAX_FLOOR).scatter_reduce(0, cta, of_block, "amax")


def _rows_of(num_blocks: int, row_blocks: int, multiplier: int, shift: int) -> int:
    last = torch.tensor([num_blocks - 1])
    assert num_blocks % row_blocks == 0
    assert int(quotient(last, multiplier, shift)) == (num_blocks - 1) // row_blocks
    return num_blocks // row_blocks


def _flat(
    name: str, config: FlatConfig, first: Tensor, second: Tensor, partials: Tensor, factors: Tensor, codes: Tensor,
    scales: Tensor, global_scale: Tensor, num_blocks: int, num_partials: int, ctas: int, row_blocks: int,
    multiplier: int, shift: int, *rest: Any,
) -> None:  # fmt: skip
    *geometry, scalar, is_pow2 = rest
    assert ctas > 0
    assert 0 < num_partials <= 384, "maxima beyond three words of four a lane are not read"
    assert num_partials % 4 == 0
    assert partials.data_ptr() % 16 == 0
    rows = _rows_of(num_blocks, row_blocks, multiplier, shift)
    source = _source(name, config, first, second, rows, row_blocks, geometry, scalar)
    x = source.prepared(factors[torch.arange(rows)] if "rms_norm" in name else None)
    bits = partials[torch.arange(num_partials)].view(torch.int32).long() & 0xFFFFFFFF
    amax = bits.amax().to(torch.int32).view(torch.float32)
    scale = nvfp4.global_scale_from_amax(amax, "tensor_pow2" if is_pow2 else "tensor")
    global_scale[0] = scale
    _write_packed(x, scale, codes, scales)


def _dequantize(
    name: str, config: DequantizeConfig, codes: Tensor, scales: Tensor, global_scales: Tensor, out: Tensor,
    pieces: int, row_multiplier: int, row_shift: int, scale_multiplier: int, scale_shift: int,
) -> None:  # fmt: skip
    assert pieces > 0
    assert out.numel() == 8 * pieces
    piece = torch.arange(pieces)
    row = quotient(piece, row_multiplier, row_shift)
    factor = global_scales[quotient(row, scale_multiplier, scale_shift)]
    words = codes.view(pieces, 4)
    values = nvfp4.decode_codes(words) * e4m3(scales)[piece >> 1].float().unsqueeze(1)
    out.copy_((values * factor.unsqueeze(1)).flatten())


KERNELS: dict[type, Callable[..., None]] = {
    RowsConfig: _rows,
    AmaxConfig: _amax,
    FlatConfig: _flat,
    DequantizeConfig: _dequantize,
}
