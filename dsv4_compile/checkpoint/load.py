"""``load_checkpoint``: fills a model from a checkpoint, wholly or not at all, packed weights staying packed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.decode import BadScalesError, Packed, read_float, read_packed
from dsv4_compile.checkpoint.formats import FORMAT_NAMES, Contents, Source, is_float, recognise
from dsv4_compile.checkpoint.index import Checkpoint, CheckpointError, open_checkpoint
from dsv4_compile.checkpoint.names import STACKED, Slot, find_slot, mtp_names
from dsv4_compile.quantization import DEFAULT_EXCLUDE, ineligible_reason
from dsv4_compile.tensor import Nvfp4Tensor

FP8_TO = ("bfloat16", "nvfp4")
_HALVES = ("gate", "up")
_PACKED_FORMATS = ("nvfp4", "nvfp4_ct", "mxfp4")


@dataclass
class LoadReport:
    """What :func:`load_checkpoint` did.

    Attributes:
        parameters: parameters and buffers filled.
        formats: stored weights by format.
        num_bytes: stored bytes read.
        packed: parameters that are packed now.
        requantised: stored weights that were quantised anew, with the reason.
        ignored_activation_scales: static scales of activations: never used, whatever they say.
        ignored_mtp: weights of multi-token-prediction modules.
        ignored: weights of experts that were not asked for, of tied parameters, and, if not ``strict``, without a
            parameter.
        cast: parameters whose stored dtype differs from the model's.
        recomputed_buffers: buffers that no checkpoint holds, computed from the module's config.
    """

    parameters: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0
    packed: list[str] = field(default_factory=list)
    requantised: dict[str, str] = field(default_factory=dict)
    ignored_activation_scales: list[str] = field(default_factory=list)
    ignored_mtp: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    cast: list[str] = field(default_factory=list)
    recomputed_buffers: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        formats = ", ".join(f"{count} {FORMAT_NAMES[name]}" for name, count in sorted(self.formats.items()))
        notes = {
            "quantised anew": len(self.requantised),
            "activation scales ignored": len(self.ignored_activation_scales),
            "MTP tensors ignored": len(self.ignored_mtp),
            "other tensors ignored": len(self.ignored),
            "cast to the model's dtype": len(self.cast),
        }
        rest = "".join(f"; {count} {what}" for what, count in notes.items() if count)
        return f"{self.parameters} parameters from {formats} weights, {self.num_bytes / 2**20:.1f} MiB read{rest}"


@dataclass
class _Target:
    """A parameter or buffer of the model and the stored weights that fill it."""

    name: str
    tensor: Tensor
    owner: nn.Module
    sources: dict[Slot, Source] = field(default_factory=dict)


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    fp8: str = "bfloat16",
    experts: range | None = None,
    strict: bool = True,
) -> LoadReport:
    """Fills a model from a checkpoint; a model is loaded wholly or left as it was.

    Reads ModelOpt NVFP4 (full, or experts only with FP8 for the rest), compressed-tensors NVFP4 and FP8, DeepSeek's own
    MXFP4 and FP8, and plain floats; what each weight is, its own tensors say. NVFP4 and MXFP4 weights become packed
    parameters, :class:`Nvfp4Tensor`; the others plain ones. Static activation scales (``input_scale``) are reported and
    never used. Experts stored one by one are stacked into the model's 3-D parameters.

    The new tensors are allocated beside the model's and take their place at the end. A model on the meta device has
    none: then the memory needed is that of the packed weights and what one weight takes while it is converted.

    Args:
        model: any module tree whose names are HuggingFace's, on any device, meta too.
        path: a ``.safetensors`` file, an ``index.json``, or a folder with either.
        device: of the new tensors; by default that of the tensors they replace, the CPU for meta ones.
        fp8: what FP8 weights become: ``bfloat16`` (the parameter's dtype), or ``nvfp4``, quantised anew where
            :func:`quantize_` would pack them.
        experts: the experts that this model holds, for expert parallelism: its stacked parameters have ``len(experts)``
            rows, and the tensors of other experts are not read. None for all.
        strict: stored weights that have no parameter are an error; otherwise they are reported.

    Returns:
        A :class:`LoadReport`.

    Raises:
        CheckpointError: damaged or absent files, unknown formats, and every missing, unexpected, mis-shaped and
            mis-typed name, in one message; NaN or negative block scales, a global scale that is zero or not finite.
        ValueError: an argument outside its range.
    """
    if fp8 not in FP8_TO:
        raise ValueError(f"load_checkpoint: fp8 must be one of {', '.join(FP8_TO)}, got {fp8!r}")
    if experts is not None and (
        not isinstance(experts, range) or experts.step != 1 or not experts or experts.start < 0
    ):
        raise ValueError(f"load_checkpoint: experts must be a range of expert numbers with step 1, got {experts!r}")
    report = LoadReport()
    with open_checkpoint(path) as checkpoint:
        contents = recognise(checkpoint)
        problems = checkpoint.problems + contents.problems
        report.ignored_activation_scales = contents.activation_scales
        targets = _plan(model, contents, experts, strict, report, problems)
        fresh_buffers = _recompute_buffers(model, targets, device, report, problems)
        if problems:
            raise CheckpointError(f"load_checkpoint: {path}", problems)
        filled = _fill(checkpoint, targets, device, fp8, set(_tensors(model)), report)
    _replace(model, filled, fresh_buffers)
    return report


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones under every name; packed ones as they are."""
    return dict(model.state_dict(keep_vars=True))


def _plan(
    model: nn.Module,
    contents: Contents,
    experts: range | None,
    strict: bool,
    report: LoadReport,
    problems: list[str],
) -> list[_Target]:
    """Assigns each stored weight to a parameter; appends to ``problems`` what does not fit."""
    tensors = _tensors(model)
    first_name: dict[int, str] = {}
    tied = {identity for identity, count in Counter(map(id, tensors.values())).items() if count > 1}
    targets: dict[str, _Target] = {}
    for name, tensor in tensors.items():
        if first_name.setdefault(id(tensor), name) == name:
            targets[name] = _Target(name, tensor, model.get_submodule(name.rpartition(".")[0]))
    mtp = mtp_names(contents.sources)
    for name, source in contents.sources.items():
        slot = None if name in mtp else find_slot(name, tensors)
        if name in mtp:
            report.ignored_mtp.append(name)
        elif slot is None:
            (problems if strict else report.ignored).append(f"unexpected: {name} {source.shape}" if strict else name)
        else:
            target = targets[first_name[id(tensors[slot.parameter])]]
            if experts is not None and slot.expert is not None:
                if slot.expert not in experts:
                    report.ignored.append(name)
                    continue
                slot = slot._replace(expert=slot.expert - experts.start)
            slot = slot._replace(parameter=target.name)
            if slot not in target.sources:
                target.sources[slot] = source
            elif id(target.tensor) in tied:
                report.ignored.append(name)  # the other name of a tied parameter
            else:
                problems.append(f"twice: {name} and {target.sources[slot].name} are both for {_describe(slot)}")
    for target in targets.values():
        _check(target, problems)
    return list(targets.values())


def _describe(slot: Slot) -> str:
    expert = "" if slot.expert is None else f" expert {slot.expert}"
    return f"{slot.parameter}{expert}{' ' + slot.half if slot.half else ''}"


def _check(target: _Target, problems: list[str]) -> None:
    """That the sources of a target are all there, of the right shape and kind, and of one kind."""
    shape = tuple(target.tensor.shape)
    stacked = [slot for slot in target.sources if slot.expert is not None]
    if not target.sources:
        problems.append(f"missing: {target.name} {shape}")
        return
    if stacked and len(stacked) != len(target.sources):
        problems.append(f"twice: {target.name} is stored whole and expert by expert")
        return
    if stacked:
        has_halves = target.name.endswith(STACKED[0])
        wanted = [
            Slot(target.name, expert, half) for expert in range(shape[0]) for half in (_HALVES if has_halves else ("",))
        ]
        absent = [slot for slot in wanted if slot not in target.sources]
        for slot in absent[:4]:
            problems.append(f"missing: {_describe(slot)}")
        if len(absent) > 4:
            problems.append(f"missing: {len(absent) - 4} more of {target.name}, which has {shape[0]} experts")
        problems.extend(
            f"unexpected: {target.sources[slot].name}: {target.name} has {shape[0]} experts"
            for slot in stacked
            if slot not in wanted
        )
    for slot, source in target.sources.items():
        expected = shape if slot.expert is None else (shape[1] // 2 if slot.half else shape[1], *shape[2:])
        if source.shape != expected:
            problems.append(f"shape: {source.name} must be {expected} for {_describe(slot)}, got {source.shape}")
        if is_float(source) != target.tensor.is_floating_point():
            stored = source.parts["data"].dtype if source.format == "plain" else FORMAT_NAMES[source.format]
            problems.append(f"dtype: {source.name} must be {target.tensor.dtype} for {target.name}, got {stored}")
        if source.format in _PACKED_FORMATS:
            if target.tensor.dim() not in (2, 3) or shape[-1] % nvfp4.BLOCK_SIZE:
                problems.append(f"format: {source.name} is packed, {target.name} {shape} cannot be")
            elif getattr(target.owner, "is_transposed", False) and target.tensor.dim() == 3:
                problems.append(f"format: {source.name} is packed along K, {target.name} is stored as [E, K, N]")
    kinds = {source.format in _PACKED_FORMATS for source in target.sources.values()}
    if len(kinds) > 1:
        problems.append(f"format: {target.name} must have all its experts packed or none, got both")


def _recompute_buffers(
    model: nn.Module,
    targets: Iterable[_Target],
    device: torch.device | str | None,
    report: LoadReport,
    problems: list[str],
) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers on the meta device that no checkpoint holds (rotary frequencies), from a fresh module of that kind."""
    known = {id(target.tensor) for target in targets}
    fresh: list[tuple[nn.Module, str, Tensor]] = []
    for path, module in model.named_modules():
        absent = [
            name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta and id(buffer) not in known
        ]
        if not absent:
            continue
        config = getattr(module, "config", None)
        twin: nn.Module | None = None
        if config is not None and not list(module.parameters()):
            try:
                with torch.device("cpu"):
                    twin = type(module)(config)
            except TypeError:
                twin = None
        for name in absent:
            full_name = f"{path}.{name}".removeprefix(".")
            buffer = getattr(module, name)
            value = getattr(twin, name, None)
            if value is None or value.shape != buffer.shape:
                problems.append(
                    f"missing: buffer {full_name} is on the meta device, in no checkpoint, and cannot be computed from "
                    f"a config; build {type(module).__name__} with its buffers on a real device"
                )
            else:
                report.recomputed_buffers.append(full_name)
                fresh.append((module, name, value.to(device or "cpu")))  # in its own dtype, fp32
    return fresh


def _fill(
    checkpoint: Checkpoint,
    targets: list[_Target],
    device: torch.device | str | None,
    fp8: str,
    names: set[str],
    report: LoadReport,
) -> dict[int, tuple[_Target, Tensor]]:
    """The new tensors by the identity of those they replace, read in the order of the files."""
    filled: dict[int, tuple[_Target, Tensor]] = {}
    problems: list[str] = []
    order = sorted(targets, key=lambda target: min(str(s.parts["data"].file) for s in target.sources.values()))
    with Progress(transient=True, disable=not _is_long(checkpoint)) as progress:
        task = progress.add_task("loading", total=checkpoint.num_bytes)
        for target in order:
            where = torch.device(device) if device is not None else target.tensor.device
            where = torch.device("cpu") if where.type == "meta" else where
            try:
                if next(iter(target.sources.values())).format in _PACKED_FORMATS:
                    tensor: Tensor = _fill_packed(checkpoint, target, where, report)
                else:
                    tensor = _fill_plain(checkpoint, target, where, fp8, names, report)
            except BadScalesError as problem:
                problems.append(str(problem))
                continue
            filled[id(target.tensor)] = target, tensor
            report.parameters += 1
            for source in target.sources.values():
                report.formats[source.format] += 1
                report.num_bytes += source.num_bytes
            progress.update(task, completed=report.num_bytes)
    if problems:
        raise CheckpointError(f"load_checkpoint: {checkpoint.path}", problems)
    return filled


def _is_long(checkpoint: Checkpoint) -> bool:
    return checkpoint.num_bytes > 1 << 30


def _rows(slot: Slot, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """The index of a slot's rows in a stacked parameter."""
    if slot.expert is None:
        return (slice(None),)
    half = shape[1] // 2
    return (slot.expert, {"": slice(None), "gate": slice(0, half), "up": slice(half, None)}[slot.half])


def _fill_packed(checkpoint: Checkpoint, target: _Target, device: torch.device, report: LoadReport) -> Nvfp4Tensor:
    shape = tuple(target.tensor.shape)
    *lead, n, k = shape
    codes = torch.empty((*lead, n, k // 2), dtype=torch.uint8, device=device)
    block_scales = torch.empty((*lead, n, k // nvfp4.BLOCK_SIZE), dtype=torch.float8_e4m3fn, device=device)
    has_halves = any(slot.half for slot in target.sources)
    global_scale = torch.empty((*lead, 2) if has_halves else lead, dtype=torch.float32, device=device)
    for slot, source in target.sources.items():
        packed, is_exact = read_packed(checkpoint, source)
        if not is_exact:
            report.requantised[source.name] = "MXFP4 exponents span more than 17"
        rows = _rows(slot, shape)
        codes[rows].copy_(packed.codes)
        block_scales[rows].view(torch.uint8).copy_(packed.block_scales.view(torch.uint8))
        if slot.expert is None:
            if global_scale.shape != packed.global_scale.shape and packed.global_scale.numel() != 1:
                global_scale = torch.empty_like(packed.global_scale, device=device)
            global_scale.copy_(
                packed.global_scale.reshape(() if packed.global_scale.numel() == 1 else global_scale.shape)
            )
        else:
            index = (slot.expert, _HALVES.index(slot.half)) if has_halves else (slot.expert,)
            global_scale[index].copy_(packed.global_scale.reshape(()))
    report.packed.append(target.name)
    dtype = target.tensor.dtype
    return Nvfp4Tensor(codes, block_scales, global_scale, dtype=dtype)


def _fill_plain(
    checkpoint: Checkpoint, target: _Target, device: torch.device, fp8: str, names: set[str], report: LoadReport
) -> Tensor:
    shape, dtype = tuple(target.tensor.shape), target.tensor.dtype
    sources = target.sources
    is_fp8 = all(source.format == "fp8" for source in sources.values())
    if fp8 == "nvfp4" and is_fp8 and _would_pack(target, names):
        return _requantise(checkpoint, target, device, report)
    stored = {source.parts["data"].dtype for source in sources.values() if source.format == "plain"}
    if stored and stored != {_safetensors_dtype(dtype)}:
        report.cast.append(target.name)
    out = torch.empty(shape, dtype=dtype, device=device)
    for slot, source in sources.items():
        rows = out[_rows(slot, shape)] if slot.expert is not None else out
        if device.type == "cpu" or source.format == "plain":
            read_float(checkpoint, source, dtype, out=rows)
        else:
            rows.copy_(read_float(checkpoint, source, dtype))
    return out


def _would_pack(target: _Target, names: set[str]) -> bool:
    """Whether :func:`quantize_` packs a parameter, by its name and shape."""
    if isinstance(target.owner, nn.Embedding) or (target.tensor.dim() == 2 and not target.name.endswith("weight")):
        return False
    return ineligible_reason(target.name, target.tensor, None, DEFAULT_EXCLUDE, names) is None


def _requantise(checkpoint: Checkpoint, target: _Target, device: torch.device, report: LoadReport) -> Nvfp4Tensor:
    """FP8 weights quantised to NVFP4, one stored weight in fp32 at a time."""
    shape = tuple(target.tensor.shape)
    *lead, n, k = shape
    codes = torch.empty((*lead, n, k // 2), dtype=torch.uint8, device=device)
    block_scales = torch.empty((*lead, n, k // nvfp4.BLOCK_SIZE), dtype=torch.float8_e4m3fn, device=device)
    has_halves = any(slot.half for slot in target.sources)
    global_scale = torch.empty((*lead, 2) if has_halves else lead, dtype=torch.float32, device=device)
    for slot, source in target.sources.items():
        packed = Packed(*nvfp4.quantize_weight(read_float(checkpoint, source, torch.float32)))
        rows = _rows(slot, shape)
        codes[rows].copy_(packed.codes)
        block_scales[rows].view(torch.uint8).copy_(packed.block_scales.view(torch.uint8))
        if slot.expert is None:
            global_scale.copy_(packed.global_scale)
        else:
            index = (slot.expert, _HALVES.index(slot.half)) if has_halves else (slot.expert,)
            global_scale[index].copy_(packed.global_scale)
        report.requantised[source.name] = "FP8 to NVFP4, as asked for"
    report.packed.append(target.name)
    return Nvfp4Tensor(codes, block_scales, global_scale, dtype=target.tensor.dtype)


_TORCH_TO_SAFETENSORS: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _safetensors_dtype(dtype: torch.dtype) -> str:
    return _TORCH_TO_SAFETENSORS.get(dtype, str(dtype))


def _replace(
    model: nn.Module, filled: Mapping[int, tuple[_Target, Tensor]], buffers: list[tuple[nn.Module, str, Tensor]]
) -> None:
    """Puts the new tensors in the places of the old ones, tied ones in all of theirs. Nothing here can fail."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in filled:
                new = filled[id(old)][1]
                module._parameters[name] = parameters.setdefault(id(old), nn.Parameter(new, requires_grad=False))
        for name, old_buffer in list(module._buffers.items()):
            if old_buffer is not None and id(old_buffer) in filled:
                module._buffers[name] = filled[id(old_buffer)][1]
    for module, name, value in buffers:
        module._buffers[name] = value
