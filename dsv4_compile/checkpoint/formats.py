"""Says what each weight of a checkpoint is stored as, tensor by tensor: by dtypes and names, never by a global flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.index import FLOATS, Checkpoint, Entry

Format = Literal["plain", "nvfp4", "nvfp4_ct", "mxfp4", "fp8"]
FORMATS: tuple[str, ...] = get_args(Format)
FORMAT_NAMES: Mapping[str, str] = {
    "plain": "plain",
    "nvfp4": "NVFP4 (ModelOpt)",
    "nvfp4_ct": "NVFP4 (compressed-tensors)",
    "mxfp4": "MXFP4",
    "fp8": "FP8",
}
PACKED_FORMATS = ("nvfp4", "nvfp4_ct", "mxfp4")
MXFP4_BLOCK = 32
FP8_BLOCKS = (128, 64, 32)

# Static scales of activations, and of attention caches: read by nobody here.
ACTIVATION_SCALES = ("input_scale", "input_global_scale", "k_scale", "v_scale", "q_scale", "output_scale")

KNOWN_ALGORITHMS = ("NVFP4", "MIXED_PRECISION", "FP8", "FP8_PB_WO", "NONE")
KNOWN_METHODS = ("fp8", "modelopt", "modelopt_fp4", "modelopt_mixed", "compressed-tensors")
KNOWN_CT_FORMATS = ("nvfp4-pack-quantized", "float-quantized", "mixed-precision", "dense", "naive-quantized")


@dataclass(frozen=True)
class Source:
    """One weight as it is stored.

    Attributes:
        name: of the weight, without the suffixes of its parts: ``layers.0.attn.wq_a.weight``.
        format: one of :data:`FORMATS`.
        shape: of the weight that it stands for, [N, K] or any shape for plain ones.
        parts: role -> stored tensor: ``data``, and ``scale`` and ``global_scale`` where the format has them.
        block: rows and columns that share one scale; (0, 0) for plain ones, K or N where it is the whole axis.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    parts: Mapping[str, Entry]
    block: tuple[int, int] = (0, 0)

    @property
    def num_bytes(self) -> int:
        """Stored size of all parts."""
        return sum(entry.num_bytes for entry in self.parts.values())


@dataclass
class Contents:
    """What a checkpoint holds.

    Attributes:
        sources: weight by name.
        activation_scales: tensors that hold static scales of activations; ignored, whatever they say.
        problems: weights that are no format of ours, one line each.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    activation_scales: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def recognise(checkpoint: Checkpoint) -> Contents:
    """Groups the tensors of a checkpoint into weights and says in which format each is."""
    contents = Contents(problems=_config_problems(checkpoint))
    entries = checkpoint.entries
    for name, entry in entries.items():
        if name.rsplit(".", 1)[-1] in ACTIVATION_SCALES:
            contents.activation_scales.append(name)
        elif not _is_scale_of_another(name, entries):
            try:
                source = _source(name, entry, entries)
            except _UnknownFormatError as problem:
                contents.problems.append(str(problem))
            else:
                contents.sources[source.name] = source
    return contents


class _UnknownFormatError(Exception):
    pass


def _is_scale_of_another(name: str, entries: Mapping[str, Entry]) -> bool:
    if name.rpartition(".")[2] == "scale":
        return f"{name.removesuffix('scale')}weight" in entries
    for suffix in ("_scale_2", "_scale_inv", "_global_scale", "_scale"):
        if name.endswith(suffix):
            base = name.removesuffix(suffix)
            return base in entries or f"{base}_packed" in entries
    return False


def _source(name: str, entry: Entry, entries: Mapping[str, Entry]) -> Source:
    base = name.removesuffix("_packed") if f"{name.removesuffix('_packed')}_scale" in entries else name
    is_weight = name.rpartition(".")[2] == "weight"
    native_scale = entries.get(f"{name.removesuffix('weight')}scale") if is_weight else None
    scale = native_scale or entries.get(f"{base}_scale") or entries.get(f"{base}_scale_inv")
    if entry.dtype in ("U8", "I8"):
        if scale is None:
            raise _UnknownFormatError(f"{name}: packed codes ({entry.dtype}) must have block scales, got none")
        return _four_bit(name, base, entry, scale, entries)
    if entry.dtype == "F8_E4M3":
        if scale is None:
            raise _UnknownFormatError(f"{name}: an FP8 weight must have a scale, got none")
        return Source(base, "fp8", entry.shape, {"data": entry, "scale": scale}, _fp8_block(name, entry, scale))
    if entry.dtype == "F8_E8M0":
        raise _UnknownFormatError(f"{name}: a tensor of exponents (F8_E8M0) must be the scale of a weight")
    if scale is not None:
        raise _UnknownFormatError(f"{name}: a {entry.dtype} weight must have no scale, got {scale.name}")
    return Source(name, "plain", entry.shape, {"data": entry})


def _four_bit(name: str, base: str, codes: Entry, scale: Entry, entries: Mapping[str, Entry]) -> Source:
    if len(codes.shape) not in (2, 3):
        raise _UnknownFormatError(f"{name}: packed codes must be 2-D or 3-D, got shape {codes.shape}")
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if scale.dtype == "F8_E8M0":
        _require_shape(scale, (*shape[:-1], shape[-1] // MXFP4_BLOCK), shape[-1] % MXFP4_BLOCK == 0)
        return Source(base, "mxfp4", shape, {"data": codes, "scale": scale}, (1, MXFP4_BLOCK))
    if scale.dtype != "F8_E4M3":
        raise _UnknownFormatError(f"{scale.name}: block scales must be F8_E4M3 or F8_E8M0, got {scale.dtype}")
    _require_shape(scale, (*shape[:-1], shape[-1] // nvfp4.BLOCK_SIZE), shape[-1] % nvfp4.BLOCK_SIZE == 0)
    is_ct = base != name
    global_name = f"{base}_global_scale" if is_ct else f"{base}_scale_2"
    global_scale = entries.get(global_name)
    if global_scale is None:
        raise _UnknownFormatError(f"{name}: an NVFP4 weight must have a global scale, got no {global_name}")
    if global_scale.dtype != "F32":
        raise _UnknownFormatError(f"{global_name}: must be F32, got {global_scale.dtype}")
    lead = shape[:-2]
    fits = global_scale.shape in ((), (1,), lead) or (bool(lead) and global_scale.shape == (*lead, 2))
    if not fits:
        raise _UnknownFormatError(f"{global_name}: must hold one value a matrix, got shape {global_scale.shape}")
    parts = {"data": codes, "scale": scale, "global_scale": global_scale}
    return Source(base, "nvfp4_ct" if is_ct else "nvfp4", shape, parts, (1, nvfp4.BLOCK_SIZE))


def _require_shape(scale: Entry, expected: tuple[int, ...], divides: bool) -> None:
    if not divides or scale.shape != expected:
        raise _UnknownFormatError(f"{scale.name}: block scales must have shape {expected}, got {scale.shape}")


def _fp8_block(name: str, weight: Entry, scale: Entry) -> tuple[int, int]:
    if scale.dtype not in ("F8_E8M0", "F32", "BF16", "F16"):
        raise _UnknownFormatError(f"{scale.name}: scales of FP8 must be F8_E8M0, F32, BF16 or F16, got {scale.dtype}")
    if len(weight.shape) not in (2, 3):
        raise _UnknownFormatError(f"{name}: an FP8 weight must be 2-D or 3-D, got shape {weight.shape}")
    *lead, n, k = weight.shape
    if scale.shape in ((), (1,)):
        return n, k
    if scale.shape in ((n,), (n, 1)) and not lead:
        return 1, k
    for size in FP8_BLOCKS:
        if scale.shape == (*lead, -(-n // size), -(-k // size)):
            return size, size
    raise _UnknownFormatError(
        f"{scale.name}: scales of an FP8 weight {weight.shape} must be one, one a row, or one for each block of "
        f"{' or '.join(f'{size}x{size}' for size in FP8_BLOCKS)}, got shape {scale.shape}"
    )


def _config_problems(checkpoint: Checkpoint) -> list[str]:
    """What the configs announce and nothing here reads; each tensor is judged by itself all the same."""
    found: list[str] = []
    quantization = checkpoint.config.get("quantization_config") or {}
    modelopt = checkpoint.quant_config.get("quantization") or {}
    for file, section in (("config.json", quantization), ("hf_quant_config.json", modelopt)):
        if not isinstance(section, Mapping):
            found.append(f"{file}: the quantization section must be an object, got {type(section).__name__}")
            continue
        found.extend(_unknown(file, section, "quant_method", KNOWN_METHODS))
        layers, groups = section.get("quantized_layers"), section.get("config_groups")
        for part in (section, *_objects(layers)):
            found.extend(_unknown(file, part, "quant_algo", KNOWN_ALGORITHMS))
            found.extend(_unknown(file, part, "moe_quant_algo", KNOWN_ALGORITHMS))
        if section.get("quant_method") == "compressed-tensors":
            for part in (section, *_objects(groups)):
                found.extend(_unknown(file, part, "format", KNOWN_CT_FORMATS))
    return list(dict.fromkeys(found))


def _objects(value: Any) -> list[Mapping[str, Any]]:
    """The objects among the values of an object (``quantized_layers`` of nvidia, ``config_groups`` of vLLM)."""
    return [item for item in value.values() if isinstance(item, Mapping)] if isinstance(value, Mapping) else []


def _unknown(file: str, section: Mapping[str, Any], key: str, known: tuple[str, ...]) -> list[str]:
    value = section.get(key)
    if value is None or value in known:
        return []
    return [f"{file}: {key} must be one of {', '.join(known)}, got {value!r}"]


def is_float(source: Source) -> bool:
    """Whether a source stands for floating-point values."""
    return source.format != "plain" or source.parts["data"].dtype in FLOATS
