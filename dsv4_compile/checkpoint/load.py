"""``load_checkpoint``: fills a model from a checkpoint, wholly or not at all, packed weights staying packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from dsv4_compile.checkpoint.decode import BadScalesError, Packed, fill_packed, global_scale_shape, read_float
from dsv4_compile.checkpoint.formats import PACKED_FORMATS, Source, recognise
from dsv4_compile.checkpoint.index import TORCH_DTYPES, Checkpoint, CheckpointError, open_checkpoint
from dsv4_compile.checkpoint.names import Slot
from dsv4_compile.checkpoint.plan import HALVES, LoadReport, Target, other_buffers, plan, tensors_of
from dsv4_compile.quantization import DEFAULT_EXCLUDE, ineligible_reason
from dsv4_compile.tensor import Nvfp4Tensor

FP8_TO = ("bfloat16", "nvfp4")
_LONG_BYTES = 1 << 30  # from here on there is a progress bar


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
    never used, weights of multi-token-prediction modules are reported and left out unless the model has such modules.
    Experts stored one by one are stacked into the model's 3-D parameters.

    The new tensors are allocated beside the model's and take their place at the end. A model on the meta device has
    none: then the memory needed is that of the loaded weights and at most two stored tensors.

    Args:
        model: any module tree whose names are HuggingFace's, on any device, meta too.
        path: a ``.safetensors`` file, an ``index.json``, or a folder with either.
        device: of the model afterwards; by default that of the tensors that are replaced, the CPU for meta ones.
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
    if device is not None and torch.device(device).type == "meta":
        raise ValueError("load_checkpoint: device must be one that holds data, got meta")
    report = LoadReport()
    with open_checkpoint(path) as checkpoint:
        contents = recognise(checkpoint)
        problems = checkpoint.problems + contents.problems
        report.ignored_activation_scales = contents.activation_scales
        targets = plan(model, contents, experts, strict, report, problems)
        buffers = other_buffers(model, targets, device, report, problems)
        if problems:
            raise CheckpointError(f"load_checkpoint: {path}", problems)
        filled = _fill(checkpoint, targets, device, fp8, set(tensors_of(model)), report)
    _replace(model, filled, buffers)
    return report


def _fill(
    checkpoint: Checkpoint,
    targets: list[Target],
    device: torch.device | str | None,
    fp8: str,
    names: set[str],
    report: LoadReport,
) -> dict[int, nn.Parameter]:
    """The new tensors by the identity of those they replace, read in the order of the files."""
    filled: dict[int, nn.Parameter] = {}
    problems: list[str] = []
    order = sorted(targets, key=lambda target: min(_position(source) for source in target.sources.values()))
    total = sum(source.num_bytes for target in targets for source in target.sources.values())
    with Progress(console=Console(stderr=True), transient=True, disable=total < _LONG_BYTES) as progress:
        task = progress.add_task("loading", total=total)
        for target in order:
            where = torch.device(device) if device is not None else target.tensor.device
            where = torch.device("cpu") if where.type == "meta" else where
            formats = {source.format for source in target.sources.values()}
            try:
                if formats & set(PACKED_FORMATS) or (
                    fp8 == "nvfp4" and formats == {"fp8"} and _would_pack(target, names)
                ):
                    tensor: Tensor = _packed(checkpoint, target, where, report)
                else:
                    tensor = _plain(checkpoint, target, where, report)
            except BadScalesError as problem:
                problems.append(str(problem))
                continue
            filled[id(target.tensor)] = nn.Parameter(tensor, requires_grad=False)
            report.parameters += 1
            for source in target.sources.values():
                report.formats[source.format] += 1
                report.num_bytes += source.num_bytes
            progress.update(task, completed=report.num_bytes)
    if problems:
        raise CheckpointError(f"load_checkpoint: {checkpoint.path}", problems)
    return filled


def _position(source: Source) -> tuple[str, int]:
    data = source.parts["data"]
    return data.file.name, data.offset


def _would_pack(target: Target, names: set[str]) -> bool:
    """Whether :func:`quantize_` packs a parameter, by its name and shape."""
    if isinstance(target.owner, nn.Embedding) or (target.tensor.dim() == 2 and not target.name.endswith("weight")):
        return False
    return ineligible_reason(target.name, target.tensor, None, DEFAULT_EXCLUDE, names) is None


def _rows(slot: Slot, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """The index of a slot's rows in a stacked parameter."""
    if slot.expert is None:
        return (slice(None),)
    half = shape[1] // 2
    return (slot.expert, {"": slice(None), "gate": slice(0, half), "up": slice(half, None)}[slot.half])


def _packed(checkpoint: Checkpoint, target: Target, device: torch.device, report: LoadReport) -> Nvfp4Tensor:
    """Reads 4-bit and FP8 sources into the parts of one packed parameter."""
    shape = tuple(target.tensor.shape)
    slots = target.sources
    has_halves = any(slot.half for slot in slots)
    is_whole = all(slot.expert is None for slot in slots)
    scales = global_scale_shape(next(iter(slots.values()))) if is_whole else (shape[0], 2) if has_halves else shape[:1]
    parts = Packed.empty(shape, scales, device)
    for slot, source in slots.items():
        rows = _rows(slot, shape)
        scale = ... if slot.expert is None else (slot.expert, HALVES.index(slot.half)) if slot.half else slot.expert
        out = Packed(parts.codes[rows], parts.block_scales[rows], parts.global_scale[scale])
        here = out if device.type == "cpu" else Packed.empty(source.shape, global_scale_shape(source))
        if reason := fill_packed(checkpoint, source, here):
            report.requantised[source.name] = reason
        if here is not out:
            out.copy_(here)
    report.packed.append(target.name)
    return Nvfp4Tensor(*parts, dtype=target.tensor.dtype)


def _plain(checkpoint: Checkpoint, target: Target, device: torch.device, report: LoadReport) -> Tensor:
    """Reads plain and FP8 sources into one plain parameter or buffer."""
    shape, dtype = tuple(target.tensor.shape), target.tensor.dtype
    stored = {
        TORCH_DTYPES[source.parts["data"].dtype] for source in target.sources.values() if source.format == "plain"
    }
    if stored and stored != {dtype}:
        report.cast.append(target.name)
    out = torch.empty(shape, dtype=dtype, device=device)
    for slot, source in target.sources.items():
        rows = out[_rows(slot, shape)] if slot.expert is not None else out
        if device.type == "cpu":
            read_float(checkpoint, source, dtype, out=rows)
        else:
            rows.copy_(read_float(checkpoint, source, dtype))
    return out


def _replace(
    model: nn.Module, filled: Mapping[int, nn.Parameter], buffers: list[tuple[nn.Module, str, Tensor]]
) -> None:
    """Puts the new tensors in the places of the old ones, tied ones in all of theirs. Nothing here can fail."""
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in filled:
                module._parameters[name] = filled[id(old)]
        for name, old_buffer in list(module._buffers.items()):
            if old_buffer is not None and id(old_buffer) in filled:
                module._buffers[name] = filled[id(old_buffer)].data
    for module, name, value in buffers:
        module._buffers[name] = value
