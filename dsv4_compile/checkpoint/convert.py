"""Converts the weights of one unit of a plan, and reads back what was written."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.conversion import Piece, Unit
from dsv4_compile.checkpoint.decode import (
    BEYOND_SPAN,
    E8M0_BIAS,
    BadScalesError,
    check_scales,
    mxfp4_to_nvfp4,
    read_float,
    read_packed,
)
from dsv4_compile.checkpoint.formats import MXFP4_BLOCK, Source
from dsv4_compile.checkpoint.index import Checkpoint, CheckpointError
from dsv4_compile.checkpoint.packing import Packing, Workers, finite_amax, pack_weight


@dataclass
class WeightRecord:
    """What became of one weight.

    Attributes:
        name: in the result.
        source: format it was stored in.
        action: ``quantize``, ``take_over``, ``keep`` or ``copy``.
        reason: why it was left alone, or why a 4-bit weight was quantised anew.
        shape: of the weight.
        signal, noise: sums of squared elements and of squared errors of quantised ones, else 0.
        nearest_noise: ``noise`` with the nearest block scales.
        is_finite: False where a weight left alone holds NaN or Inf.
    """

    name: str
    source: str
    action: str
    reason: str
    shape: tuple[int, ...]
    signal: float = 0.0
    noise: float = 0.0
    nearest_noise: float = 0.0
    is_finite: bool = True

    def as_json(self) -> dict[str, Any]:
        """The fields, sums to nine digits."""
        fields = asdict(self) | {"shape": list(self.shape)}
        for name in ("signal", "noise", "nearest_noise"):
            fields[name] = float(f"{fields[name]:.9g}")
        return fields

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> WeightRecord:
        """Inverse of :meth:`as_json`; further keys are ignored."""
        known = {name: value[name] for name in WeightRecord.__dataclass_fields__}
        return WeightRecord(**known | {"shape": tuple(value["shape"])})


def convert(
    checkpoint: Checkpoint, unit: Unit, search: str, workers: Workers | None = None
) -> tuple[dict[str, Tensor], list[WeightRecord]]:
    """The tensors of a unit by their names in the result, and a record of each weight.

    Raises:
        CheckpointError: a weight to pack holds NaN or Inf, or scales that no intact checkpoint has.
    """
    try:
        if unit.action == "copy":
            return _copy(checkpoint, unit)
        if unit.action == "keep":
            return _keep(checkpoint, unit)
        if unit.pieces[0].source.format == "mxfp4":
            return _take_over_mxfp4(checkpoint, unit, search, workers)
        if unit.action == "take_over":
            return _take_over(checkpoint, unit)
        return _quantize(checkpoint, unit, search, workers)
    except BadScalesError as error:
        raise CheckpointError(f"quantize: {checkpoint.path}", [str(error)]) from error


def _record(unit: Unit, piece: Piece, **fields: Any) -> WeightRecord:
    return WeightRecord(
        piece.name, piece.source.format, unit.action, fields.pop("reason", unit.reason), piece.shape, **fields
    )


def _copy(checkpoint: Checkpoint, unit: Unit) -> tuple[dict[str, Tensor], list[WeightRecord]]:
    tensors = {entry.name: checkpoint.read(entry.name) for entry in unit.pieces[0].source.parts.values()}
    return tensors, [_record(unit, unit.pieces[0])]


def _keep(checkpoint: Checkpoint, unit: Unit) -> tuple[dict[str, Tensor], list[WeightRecord]]:
    piece = unit.pieces[0]
    if piece.source.format == "plain":
        value = checkpoint.read(piece.source.name)
    else:
        value = read_float(checkpoint, piece.source, torch.bfloat16)
    is_finite = not value.is_floating_point() or bool(value.isfinite().all())
    return {piece.name: value}, [_record(unit, piece, is_finite=is_finite)]


def _take_over(checkpoint: Checkpoint, unit: Unit) -> tuple[dict[str, Tensor], list[WeightRecord]]:
    piece = unit.pieces[0]
    packed, _ = read_packed(checkpoint, piece.source)
    return _named(piece.name, *packed), [_record(unit, piece)]


def _take_over_mxfp4(
    checkpoint: Checkpoint, unit: Unit, search: str, workers: Workers | None
) -> tuple[dict[str, Tensor], list[WeightRecord]]:
    """Codes as they are where the exponents allow it, gate and up together if both fit one global scale."""
    stored = [_mxfp4_parts(checkpoint, piece.source) for piece in unit.pieces]
    joint, is_exact = mxfp4_to_nvfp4(*(torch.cat(parts) for parts in zip(*stored, strict=True)))
    tensors: dict[str, Tensor] = {}
    records = []
    start = 0
    for piece, parts in zip(unit.pieces, stored, strict=True):
        rows = slice(start, start + piece.shape[0])
        start = rows.stop
        if is_exact:
            own, own_is_exact = joint._replace(codes=joint.codes[rows], block_scales=joint.block_scales[rows]), True
        else:
            own, own_is_exact = mxfp4_to_nvfp4(*parts)
        if own_is_exact:
            tensors |= _named(piece.name, own.codes.clone(), own.block_scales.clone(), own.global_scale.clone())
            records.append(_record(unit, piece))
            continue
        weight = _mxfp4_values(*parts)
        packing = pack_weight(weight, finite_amax(weight, workers), search, workers)
        tensors |= _named(piece.name, *packing.packed)
        records.append(_quantized_record(unit, piece, packing, BEYOND_SPAN))
    return tensors, records


def _mxfp4_parts(checkpoint: Checkpoint, source: Source) -> tuple[Tensor, Tensor]:
    codes, exponents = (checkpoint.read(source.parts[role].name) for role in ("data", "scale"))
    check_scales(source, "scale", exponents)
    return codes.view(torch.uint8), exponents.view(torch.uint8)


def _mxfp4_values(codes: Tensor, exponents: Tensor) -> Tensor:
    values = nvfp4.decode_codes(codes).unflatten(-1, (-1, MXFP4_BLOCK))
    return torch.ldexp(values, exponents.to(torch.int32).sub_(E8M0_BIAS).unsqueeze(-1)).flatten(-2)


def _quantize(
    checkpoint: Checkpoint, unit: Unit, search: str, workers: Workers | None
) -> tuple[dict[str, Tensor], list[WeightRecord]]:
    weights = [_read_weight(checkpoint, piece) for piece in unit.pieces]
    amaxes = []
    for piece, weight in zip(unit.pieces, weights, strict=True):
        try:
            amaxes.append(finite_amax(weight, workers))
        except ValueError as error:
            raise CheckpointError(f"quantize: {checkpoint.path}", [f"{piece.source.name}: {error}"]) from error
    amax = torch.stack(amaxes).amax()  # one weight, or gate and up, which share a global scale
    tensors: dict[str, Tensor] = {}
    records = []
    for piece, weight in zip(unit.pieces, weights, strict=True):
        packing = pack_weight(weight, amax, search, workers)
        tensors |= _named(piece.name, *packing.packed)
        records.append(_quantized_record(unit, piece, packing, ""))
    return tensors, records


def _read_weight(checkpoint: Checkpoint, piece: Piece) -> Tensor:
    """The matrix of a piece, in fp32 where it is FP8."""
    if piece.source.format != "plain":
        return read_float(checkpoint, piece.source, torch.float32)
    return checkpoint.read_entry(piece.entries()[0])


def _quantized_record(unit: Unit, piece: Piece, packing: Packing, reason: str) -> WeightRecord:
    record = _record(unit, piece, reason=reason)
    record.action = "quantize"
    record.signal, record.noise, record.nearest_noise = packing.signal, packing.noise, packing.nearest_noise
    return record


def _named(name: str, codes: Tensor, block_scales: Tensor, global_scale: Tensor) -> dict[str, Tensor]:
    return {name: codes, f"{name}_scale": block_scales, f"{name}_scale_2": global_scale}


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes."""
    num_bytes = tensor.numel() * tensor.element_size()
    view = (ctypes.c_char * num_bytes).from_address(tensor.data_ptr()) if num_bytes else b""
    return hashlib.sha256(view).hexdigest()
