"""``load_checkpoint``: fills a model from a checkpoint, wholly or not at all, packed weights staying packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.decode import BadScalesError, Packed, read_float, read_packed
from dsv4_compile.checkpoint.formats import PACKED_FORMATS, recognise
from dsv4_compile.checkpoint.index import Checkpoint, CheckpointError, open_checkpoint
from dsv4_compile.checkpoint.names import Slot
from dsv4_compile.checkpoint.plan import HALVES, LoadReport, Target, plan, recompute_buffers, tensors_of
from dsv4_compile.quantization import DEFAULT_EXCLUDE, ineligible_reason
from dsv4_compile.tensor import Nvfp4Tensor

FP8_TO = ("bfloat16", "nvfp4")


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
        targets = plan(model, contents, experts, strict, report, problems)
        fresh_buffers = recompute_buffers(model, targets, device, report, problems)
        if problems:
            raise CheckpointError(f"load_checkpoint: {path}", problems)
        filled = _fill(checkpoint, targets, device, fp8, set(tensors_of(model)), report)
    _replace(model, filled, fresh_buffers)
    return report


def _fill(
    checkpoint: Checkpoint,
    targets: list[Target],
    device: torch.device | str | None,
    fp8: str,
    names: set[str],
    report: LoadReport,
) -> dict[int, tuple[Target, Tensor]]:
    """The new tensors by the identity of those they replace, read in the order of the files."""
    filled: dict[int, tuple[Target, Tensor]] = {}
    problems: list[str] = []
    order = sorted(targets, key=lambda target: min(str(s.parts["data"].file) for s in target.sources.values()))
    with Progress(transient=True, disable=not _is_long(checkpoint)) as progress:
        task = progress.add_task("loading", total=checkpoint.num_bytes)
        for target in order:
            where = torch.device(device) if device is not None else target.tensor.device
            where = torch.device("cpu") if where.type == "meta" else where
            try:
                if next(iter(target.sources.values())).format in PACKED_FORMATS:
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


def _fill_packed(checkpoint: Checkpoint, target: Target, device: torch.device, report: LoadReport) -> Nvfp4Tensor:
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
            index = (slot.expert, HALVES.index(slot.half)) if has_halves else (slot.expert,)
            global_scale[index].copy_(packed.global_scale.reshape(()))
    report.packed.append(target.name)
    dtype = target.tensor.dtype
    return Nvfp4Tensor(codes, block_scales, global_scale, dtype=dtype)


def _fill_plain(
    checkpoint: Checkpoint, target: Target, device: torch.device, fp8: str, names: set[str], report: LoadReport
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


def _would_pack(target: Target, names: set[str]) -> bool:
    """Whether :func:`quantize_` packs a parameter, by its name and shape."""
    if isinstance(target.owner, nn.Embedding) or (target.tensor.dim() == 2 and not target.name.endswith("weight")):
        return False
    return ineligible_reason(target.name, target.tensor, None, DEFAULT_EXCLUDE, names) is None


def _requantise(checkpoint: Checkpoint, target: Target, device: torch.device, report: LoadReport) -> Nvfp4Tensor:
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
            index = (slot.expert, HALVES.index(slot.half)) if has_halves else (slot.expert,)
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
    model: nn.Module, filled: Mapping[int, tuple[Target, Tensor]], buffers: list[tuple[nn.Module, str, Tensor]]
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
