"""``quantize_``: replaces the weights of an eager model by packed ones, in place; and the rule of what is eligible."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from dsv4_compile import nvfp4
from dsv4_compile.tensor import Nvfp4Tensor

log = logging.getLogger("dsv4_compile")

# Left alone unless asked for: the vocabulary projections and the routers, whose error decides tokens and experts.
DEFAULT_EXCLUDE: tuple[str, ...] = (
    "*lm_head*",
    "*embed*",
    "head.weight",
    "*router*",
    "mlp.gate.weight",
    "*.mlp.gate.weight",
    "*.ffn.gate.weight",
    "*.block_sparse_moe.gate.weight",
)


def matching_pattern(name: str, patterns: Iterable[str]) -> str | None:
    """The first of the shell-style patterns that matches a parameter's full name, or None."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def is_router(name: str, names: Iterable[str]) -> bool:
    """Whether a parameter is the gate of a mixture of experts: ``gate.weight`` with ``experts`` next to it."""
    block, found, rest = name.rpartition("gate.weight")
    return found != "" and rest == "" and any(other.startswith(f"{block}experts") for other in names)


def ineligible_reason(
    name: str, weight: Tensor, include: Iterable[str] | None, exclude: Iterable[str], names: Iterable[str] = ()
) -> str | None:
    """Why a parameter is not quantised, or None when it is.

    Args:
        name: its full name, such as ``model.layers.0.self_attn.q_a_proj.weight``.
        weight: the parameter.
        include: patterns asked for by name, which also admits fp32 weights; None for every eligible one.
        exclude: patterns left alone.
        names: of the model's parameters, by which a router is known.
    """
    if include is not None and matching_pattern(name, include) is None:
        return "not included"
    if (pattern := matching_pattern(name, exclude)) is not None:
        return f"excluded by {pattern!r}"
    if include is None and exclude and is_router(name, names):
        return "router: it stands next to experts"
    if weight.dim() not in (2, 3):
        return f"{weight.dim()}-D"
    if weight.dtype not in (torch.bfloat16, torch.float16) and not (
        include is not None and weight.dtype == torch.float32
    ):
        return f"{str(weight.dtype).removeprefix('torch.')} weight"
    if weight.shape[-1] % nvfp4.BLOCK_SIZE:
        return f"K = {weight.shape[-1]} is not divisible by {nvfp4.BLOCK_SIZE}"
    return None


@dataclass
class QuantizeReport:
    """What :func:`quantize_` did: names of packed weights, and the reason for each weight it left alone."""

    quantized: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        return (
            f"{len(self.quantized)} weights packed to NVFP4, {self.bytes_before / 2**20:.1f} MiB -> "
            f"{self.bytes_after / 2**20:.1f} MiB; {len(self.skipped)} left alone"
        )


def quantize_(
    model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
) -> QuantizeReport:
    """Replaces the weights of linear layers and stacked experts by :class:`Nvfp4Tensor` parameters, in place.

    Eligible are 2-D parameters named ``weight`` of modules that are no embedding, and 3-D expert parameters
    [E, N, K], in bf16 or fp16, with K % 16 == 0. The eager model stays runnable: it dequantises.

    Args:
        model: any module tree; its weights stay on their device.
        include: shell-style patterns of full parameter names, or one; given, only these are packed, whatever their
            attribute is called, fp32 ones, routers and embeddings too.
        exclude: patterns left alone, or one; by default ``DEFAULT_EXCLUDE``, vocabulary projections and routers, and
            nothing when ``include`` asks for weights by name.

    Returns:
        A report of what was packed and what was not, with reasons.

    Raises:
        ValueError: a pattern of ``include`` matches no parameter, or a weight to pack holds NaN or Inf; the model is
            left as it was.
    """
    include = (include,) if isinstance(include, str) else None if include is None else tuple(include)
    if exclude is None:
        exclude = DEFAULT_EXCLUDE if include is None else ()
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pattern in include or ():
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise ValueError(f"quantize_: include must match a parameter, got {pattern!r} which matches none")

    report = QuantizeReport()
    packed: dict[int, Nvfp4Tensor] = {}
    for name, weight in parameters.items():
        reason = _skip_reason(model, name, weight, include, exclude, parameters)
        if reason is not None:
            report.skipped[name] = reason
            continue
        report.quantized.append(name)
        if id(weight) not in packed:
            packed[id(weight)] = _pack(name, weight)
            report.bytes_before += weight.numel() * weight.element_size()
            report.bytes_after += packed[id(weight)].packed_bytes

    replacements: dict[int, nn.Parameter] = {}
    for name in report.quantized:
        weight = parameters[name]
        owner, attribute = _owner(model, name)
        replacement = replacements.setdefault(id(weight), nn.Parameter(packed[id(weight)], requires_grad=False))
        setattr(owner, attribute, replacement)
    log.info("quantize_: %s", report)
    return report


def _pack(name: str, weight: Tensor) -> Nvfp4Tensor:
    try:
        return Nvfp4Tensor.from_float(weight)
    except ValueError as error:
        raise ValueError(f"quantize_: {name}: {error}") from error


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _skip_reason(
    model: nn.Module,
    name: str,
    weight: Tensor,
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...],
    parameters: Mapping[str, Tensor],
) -> str | None:
    owner, attribute = _owner(model, name)
    if isinstance(weight, Nvfp4Tensor):
        return "packed already"
    if include is None and weight.dim() == 2 and attribute != "weight":
        return "2-D, but not named weight"
    if include is None and weight.dim() == 3 and getattr(owner, "is_transposed", False):
        return "experts stored as [E, K, N]"
    owners = [_owner(model, other)[0] for other, value in parameters.items() if value is weight]
    if include is None and any(isinstance(module, nn.Embedding) for module in owners):
        return "embedding, or tied to one"
    return ineligible_reason(name, weight, include, exclude, parameters)


def flatten_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits packed weights into plain tensors under ModelOpt's names, so that safetensors can store them.

    ``x.weight`` becomes ``x.weight``, ``x.weight_scale`` and ``x.weight_scale_2``; a packed parameter with another
    name, ``x.gate_up_proj``, becomes ``x.gate_up_proj``, ``x.gate_up_proj_scale`` and ``x.gate_up_proj_scale_2``.
    """
    flat: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if isinstance(value, Nvfp4Tensor):
            flat[name] = value.codes
            flat[f"{name}_scale"] = value.block_scales
            flat[f"{name}_scale_2"] = value.global_scale
        else:
            flat[name] = value
    return flat


def unflatten_state_dict(flat: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Inverse of :func:`flatten_state_dict`; ``dtype`` is what the packed weights stand for.

    Raises:
        RuntimeError: the three parts of a weight do not belong together.
        ValueError: a weight has a global scale but no block scales.
    """
    state_dict: dict[str, Tensor] = {}
    parts = {f"{name}{suffix}" for name in flat if f"{name}_scale_2" in flat for suffix in ("_scale", "_scale_2")}
    for name, value in flat.items():
        if name in parts:
            continue
        if f"{name}_scale_2" in flat:
            if f"{name}_scale" not in flat:
                raise ValueError(f"unflatten_state_dict: flat must hold {name}_scale, as it holds {name}_scale_2")
            state_dict[name] = Nvfp4Tensor(value, flat[f"{name}_scale"], flat[f"{name}_scale_2"], dtype=dtype)
        else:
            state_dict[name] = value
    return state_dict
