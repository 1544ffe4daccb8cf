"""Plans a conversion to NVFP4: what each stored weight becomes, under which name, and in which file it goes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.formats import Contents, Source
from dsv4_compile.checkpoint.index import FLOATS, TORCH_DTYPES, Entry
from dsv4_compile.checkpoint.names import STACKED, huggingface_name, mtp_names
from dsv4_compile.quantization import ineligible_reason, matching_pattern

# quantize: plain or FP8 to NVFP4. take_over: 4-bit weights, codes as they are. keep: plain, FP8 and MXFP4 as bf16.
# copy: every stored part as it is, under its own name.
Action = Literal["quantize", "take_over", "keep", "copy"]
SHARES = ("experts", "merged", "none")

PACKED_NVFP4 = ("nvfp4", "nvfp4_ct")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
_EXPERT_HALF = re.compile(r"^(.*\.experts\.\d+)\.(gate_proj|up_proj)\.weight$")
# Linears of one module that engines run as one GEMM, which then has one global scale.
_MERGED = tuple(
    re.compile(pattern)
    for pattern in (
        r"^(.*\.(?:compressor|indexer))\.(kv_proj|gate_proj)\.weight$",
        r"^(.*)\.(gate_proj|up_proj)\.weight$",
        r"^(.*)\.(q_a_proj|kv_proj)\.weight$",
        r"^(.*)\.(q_proj|k_proj|v_proj)\.weight$",
    )
)


@dataclass(frozen=True)
class Piece:
    """One weight of the result.

    Attributes:
        name: in the result.
        source: the stored weight it comes from.
        shape: of the weight.
        expert: index in a stacked source, None for all of it.
        rows: of that expert's rows, the first and the one after the last.
    """

    name: str
    source: Source
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] = (0, 0)

    def entries(self) -> list[Entry]:
        """What is read for it: the stored parts, of a stacked source its own rows only."""
        if self.expert is None:
            return list(self.source.parts.values())
        data = self.source.parts["data"]
        _, n, k = data.shape
        skipped = (self.expert * n + self.rows[0]) * k * TORCH_DTYPES[data.dtype].itemsize
        return [replace(data, shape=(self.rows[1] - self.rows[0], k), offset=data.offset + skipped)]


@dataclass(frozen=True)
class Unit:
    """Weights that are converted together: one, or several that share a global scale.

    Attributes:
        action: what happens to them.
        pieces: the weights.
        reason: why they are left alone; "" for what is packed.
    """

    action: Action
    pieces: tuple[Piece, ...]
    reason: str = ""

    @property
    def is_packed(self) -> bool:
        """Whether the result is NVFP4."""
        return self.action in ("quantize", "take_over")

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name, safetensors dtype and shape of what is written."""
        written: dict[str, tuple[str, tuple[int, ...]]] = {}
        for piece in self.pieces:
            if self.is_packed:
                *lead, k = piece.shape
                written[piece.name] = "U8", (*lead, k // 2)
                written[f"{piece.name}_scale"] = "F8_E4M3", (*lead, k // nvfp4.BLOCK_SIZE)
                written[f"{piece.name}_scale_2"] = "F32", ()
            elif self.action == "copy":
                written |= {entry.name: (entry.dtype, entry.shape) for entry in piece.source.parts.values()}
            else:
                data = piece.source.parts["data"]
                written[piece.name] = data.dtype if piece.source.format == "plain" else "BF16", piece.shape
        return written

    @property
    def bytes_read(self) -> int:
        """Stored bytes that are read."""
        return sum(entry.num_bytes for piece in self.pieces for entry in piece.entries())

    @property
    def bytes_written(self) -> int:
        """Bytes of the result."""
        return sum(TORCH_DTYPES[dtype].itemsize * torch.Size(shape).numel() for dtype, shape in self.tensors().values())


@dataclass
class Plan:
    """Every unit, file by file.

    Attributes:
        shards: the units of each output file.
        problems: what makes the conversion impossible, one line each.
        dropped: activation scales, which are not written.
        mtp: weights of multi-token-prediction modules, copied.
    """

    shards: list[list[Unit]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    mtp: list[str] = field(default_factory=list)

    @property
    def units(self) -> list[Unit]:
        """All units, in the order in which they are written."""
        return [unit for shard in self.shards for unit in shard]

    @property
    def files(self) -> list[str]:
        """Names of the output files."""
        count = len(self.shards)
        return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def plan_conversion(
    contents: Contents,
    include: Sequence[str] | None,
    exclude: Sequence[str],
    share: str,
    shard_bytes: int,
) -> Plan:
    """Decides about every weight of a checkpoint by the rule of :func:`dsv4_compile.quantize_`.

    Args:
        contents: of the checkpoint.
        include: patterns to pack, None for every eligible weight.
        exclude: patterns to leave alone. Patterns are held against the name in the result, the stored name, and, for an
            expert, the name of the stacked parameter of the model.
        share: which weights get one global scale: gate and up of a routed expert (``experts``), all that engines merge
            into one GEMM (``merged``), or none (``none``).
        shard_bytes: size at which a file ends.
    """
    plan = Plan(dropped=list(contents.activation_scales))
    mtp = mtp_names(contents.sources)
    is_native = _is_native(contents.sources)
    names = {name: name if name in mtp else _result_name(name, is_native) for name in contents.sources}
    all_names = set(names.values())
    matched: set[str] = set()
    units: list[Unit] = []
    for name in sorted(contents.sources, key=natural_key):
        source = contents.sources[name]
        if name in mtp:
            plan.mtp.append(name)
            units.append(Unit("copy", (Piece(name, source, source.shape),), "multi-token prediction"))
            continue
        spellings = [names[name], name, _parameter_name(names[name])]
        matched |= {pattern for pattern in include or () if _matching(spellings, (pattern,)) is not None}
        reason = _reason(source, spellings, include, exclude, all_names)
        whole = Piece(names[name], source, source.shape)
        if len(source.shape) == 3 and source.format != "plain":
            plan.problems.append(f"{name}: stacked experts must be stored plain, got {source.format}")
        elif source.format in PACKED_NVFP4:
            units.append(Unit("take_over", (whole,)))
        elif reason is None and len(source.shape) == 3:
            stacked, reason = _stacked(names, name, contents.sources)
            units.extend(stacked or [Unit("keep", (whole,), reason or "")])
        elif reason is None:
            units.append(Unit("take_over" if source.format == "mxfp4" else "quantize", (whole,)))
        else:
            units.append(Unit("keep", (whole,), reason))
    for pattern in include or ():
        if pattern not in matched:
            plan.problems.append(f"include must match a weight, got {pattern!r} which matches none")
    units = _share(units, share)
    duplicates = [name for name, count in Counter(n for unit in units for n in unit.tensors()).items() if count > 1]
    plan.problems.extend(f"{name}: must come from one stored weight, comes from several" for name in duplicates)
    if not any(unit.action == "quantize" or _is_mxfp4(unit) for unit in units) and not plan.problems:
        held = "only NVFP4" if any(unit.is_packed for unit in units) else "none"
        plan.problems.append(f"source must hold weights to quantise, got {held}")
    units.sort(key=lambda unit: min((str(entry.file), entry.offset) for p in unit.pieces for entry in p.entries()))
    plan.shards = _shards(units, shard_bytes)
    return plan


def _is_native(names: Iterable[str]) -> bool:
    """Whether the names are DeepSeek's own. Others are left as they are: their q_norm is not DeepSeek's."""
    names = list(names)
    return not any(name.startswith("model.") for name in names) and any(huggingface_name(n) != n for n in names)


def _result_name(name: str, is_native: bool) -> str:
    if not is_native:
        return name
    renamed = huggingface_name(name)
    return renamed if renamed.startswith("lm_head.") else f"model.{renamed}"


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _parameter_name(name: str) -> str:
    """The parameter of HuggingFace's module that holds an expert's weight; any other name as it is."""
    match = _EXPERT.match(name)
    if match is None:
        return name
    return f"{match[1]}.{STACKED[1] if match[3] == 'down_proj' else STACKED[0]}"


def _reason(
    source: Source,
    spellings: Sequence[str],
    include: Sequence[str] | None,
    exclude: Sequence[str],
    names: Iterable[str],
) -> str | None:
    """Why a weight is left alone, or None."""
    data = source.parts["data"]
    if source.format == "plain" and data.dtype not in FLOATS:
        return f"{data.dtype} tensor"
    if include is not None and _matching(spellings, include) is None:
        return "not included"
    if (pattern := _matching(spellings, exclude)) is not None:
        return f"excluded by {pattern!r}"
    if include is None and len(source.shape) == 2 and not spellings[0].endswith("weight"):
        return "2-D, but not named weight"
    if include is None and "embed" in spellings[0]:
        return "embedding, by its name"
    dtype = TORCH_DTYPES[data.dtype] if source.format == "plain" else torch.bfloat16
    meta = torch.empty(source.shape, dtype=dtype, device="meta")
    return ineligible_reason(spellings[0], meta, None if include is None else ("*",), exclude, names)


def _matching(spellings: Iterable[str], patterns: Iterable[str]) -> str | None:
    return next((pattern for s in spellings if (pattern := matching_pattern(s, patterns)) is not None), None)


def _stacked(names: Mapping[str, str], name: str, sources: Mapping[str, Source]) -> tuple[list[Unit], str | None]:
    """Experts [E, N, K] as one weight each, or why they are left alone."""
    block, _, projection = names[name].rpartition(".")
    source = sources[name]
    if projection not in STACKED:
        return [], f"3-D, but not named {' or '.join(STACKED)}"
    pair = [sources.get(f"{name.rpartition('.')[0]}.{other}") for other in STACKED]
    if pair[0] is None or pair[1] is None or len(pair[0].shape) != 3 or len(pair[1].shape) != 3:
        return [], "stacked experts without both gate_up_proj and down_proj"
    (_, rows, hidden), (_, down_rows, intermediate) = pair[0].shape, pair[1].shape
    if rows != 2 * intermediate or hidden != down_rows:
        return [], "experts stored as [E, K, N]"
    units: list[Unit] = []
    for expert in range(source.shape[0]):
        if projection == STACKED[1]:
            piece = Piece(f"{block}.{expert}.down_proj.weight", source, source.shape[1:], expert, (0, down_rows))
            units.append(Unit("quantize", (piece,)))
        else:
            shape = (intermediate, hidden)
            gate = Piece(f"{block}.{expert}.gate_proj.weight", source, shape, expert, (0, intermediate))
            up = Piece(f"{block}.{expert}.up_proj.weight", source, shape, expert, (intermediate, rows))
            units.extend([Unit("quantize", (gate,)), Unit("quantize", (up,))])
    return units, None


def _share(units: Iterable[Unit], share: str) -> list[Unit]:
    """Puts weights that share a global scale into one unit, where they are converted in the same way."""
    patterns = {"none": (), "experts": (_EXPERT_HALF,), "merged": _MERGED}[share]
    joined: dict[tuple[object, ...], Unit] = {}
    for number, unit in enumerate(units):
        name = unit.pieces[0].name
        found = next(((kind, m[1]) for kind, pattern in enumerate(patterns) if (m := pattern.match(name))), None)
        if found is None or not (unit.action == "quantize" or _is_mxfp4(unit)):
            joined[(number,)] = unit
            continue
        key = (*found, unit.pieces[0].source.format)
        pieces = (*joined[key].pieces, *unit.pieces) if key in joined else unit.pieces
        joined[key] = Unit(unit.action, pieces)
    return list(joined.values())


def _is_mxfp4(unit: Unit) -> bool:
    return unit.action == "take_over" and unit.pieces[0].source.format == "mxfp4"


def _shards(units: Iterable[Unit], shard_bytes: int) -> list[list[Unit]]:
    shards: list[list[Unit]] = []
    filled = 0
    for unit in units:
        size = unit.bytes_written
        if not shards or filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(unit)
        filled += size
    return shards
