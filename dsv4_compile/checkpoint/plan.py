"""Plans a load: which stored weights fill which tensor of a model, and everything that does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.formats import FORMAT_NAMES, PACKED_FORMATS, Contents, Source, is_float
from dsv4_compile.checkpoint.index import TORCH_DTYPES
from dsv4_compile.checkpoint.names import LISTED_EXPERT, STACKED, Slot, find_slot, mtp_names
from dsv4_compile.ops.registration import FLOAT_DTYPES

HALVES = ("gate", "up")


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
class Target:
    """A parameter or buffer of the model and the stored weights that fill it."""

    name: str
    tensor: Tensor
    owner: nn.Module
    sources: dict[Slot, Source] = field(default_factory=dict)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones under every name; packed ones as they are."""
    return dict(model.state_dict(keep_vars=True))


def plan(
    model: nn.Module,
    contents: Contents,
    experts: range | None,
    strict: bool,
    report: LoadReport,
    problems: list[str],
) -> list[Target]:
    """Assigns each stored weight to a parameter; appends to ``problems`` what does not fit."""
    tensors = tensors_of(model)
    first_name: dict[int, str] = {}
    tied = {identity for identity, count in Counter(map(id, tensors.values())).items() if count > 1}
    targets: dict[str, Target] = {}
    for name, tensor in tensors.items():
        if first_name.setdefault(id(tensor), name) == name:
            targets[name] = Target(name, tensor, model.get_submodule(name.rpartition(".")[0]))
    mtp = set() if mtp_names(tensors) else mtp_names(contents.sources)
    if experts is not None and (listed := next(filter(LISTED_EXPERT.search, tensors), None)) is not None:
        problems.append(f"experts: must be None for experts that are not stacked in one parameter, got {listed}")
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


def _check(target: Target, problems: list[str]) -> None:
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
            Slot(target.name, expert, half) for expert in range(shape[0]) for half in (HALVES if has_halves else ("",))
        ]
        for half in HALVES if has_halves else ("",):
            absent = [slot.expert for slot in wanted if slot.half == half and slot not in target.sources]
            if absent:
                kind = f"{half} of " if half else ""
                problems.append(f"missing: {target.name}: {kind}expert {', '.join(map(str, absent))}")
        problems.extend(
            f"unexpected: {target.sources[slot].name}: {target.name} has {shape[0]} experts"
            for slot in stacked
            if slot not in wanted
        )
    is_transposed = target.tensor.dim() == 3 and getattr(target.owner, "is_transposed", False)
    for slot, source in target.sources.items():
        problems.extend(_misfits(target, slot, source, shape))
        if is_transposed and (stacked or source.format != "plain"):
            problems.append(f"format: {source.name} is stored as [N, K], {target.name} is [E, K, N]")
    kinds = {source.format in PACKED_FORMATS for source in target.sources.values()}
    if len(kinds) > 1:
        problems.append(f"format: {target.name} must have all its experts packed or none, got both")


def _misfits(target: Target, slot: Slot, source: Source, shape: tuple[int, ...]) -> Iterable[str]:
    """What is wrong with one source of a target: its shape, its dtype, or that it is packed."""
    expected = shape if slot.expert is None else (shape[1] // 2 if slot.half else shape[1], *shape[2:])
    if source.shape != expected:
        yield f"shape: {source.name} must be {expected} for {_describe(slot)}, got {source.shape}"
    stored, wanted = TORCH_DTYPES[source.parts["data"].dtype], target.tensor.dtype
    is_number_cut = not wanted.is_floating_point and torch.promote_types(stored, wanted) != wanted
    if is_float(source) != wanted.is_floating_point or is_number_cut:
        named = source.parts["data"].dtype if source.format == "plain" else FORMAT_NAMES[source.format]
        yield f"dtype: {source.name} must be {wanted} for {target.name}, got {named}"
    elif source.format in PACKED_FORMATS and (
        len(shape) not in (2, 3) or shape[-1] % nvfp4.BLOCK_SIZE or wanted not in FLOAT_DTYPES
    ):
        yield f"format: {source.name} is packed, {target.name} {shape} {wanted} cannot be"


def other_buffers(
    model: nn.Module,
    targets: Iterable[Target],
    device: torch.device | str | None,
    report: LoadReport,
    problems: list[str],
) -> list[tuple[nn.Module, str, Tensor]]:
    """New values of buffers that no checkpoint holds (rotary frequencies), where they need any.

    One on the meta device is computed by a fresh module of its kind, from the config; others move to ``device``.
    """
    known = {id(target.tensor) for target in targets}
    fresh: list[tuple[nn.Module, str, Tensor]] = []
    for path, module in model.named_modules():
        twin: nn.Module | None = None
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) in known:
                continue
            if not buffer.is_meta:
                if device is not None and buffer.device != torch.device(device):
                    fresh.append((module, name, buffer.to(device)))
                continue
            full_name = f"{path}.{name}".removeprefix(".")
            twin = twin or _from_config(module)
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


def _from_config(module: nn.Module) -> nn.Module | None:
    """The same module on the CPU, where it takes a config and nothing else and holds no parameters."""
    config = getattr(module, "config", None)
    if config is None or list(module.parameters()):
        return None
    try:
        with torch.device("cpu"):
            return type(module)(config)
    except TypeError:
        return None
