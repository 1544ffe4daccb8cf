"""Writes a DeepSeek V4 as each kind of checkpoint stores it, by the formats' own rules and by no code of the loader."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsv4_compile import nvfp4

Tensors = dict[str, Tensor]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def native_tensors(model: Any, folder: Path) -> Tensors:
    """The model under DeepSeek's own names: what transformers' save_pretrained makes of it, without ``model.``."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix("model.").replace("embed_tokens.", "embed."): value for name, value in tensors.items()}


def huggingface_tensors(model: nn.Module) -> Tensors:
    """The model under HuggingFace's names, experts one by one, as ModelOpt writes them."""
    tensors: Tensors = {}
    for name, value in model.state_dict().items():
        block, _, projection = name.rpartition(".")
        if projection == "gate_up_proj":
            for expert, weight in enumerate(value):
                gate, up = weight.chunk(2)
                tensors[f"{block}.{expert}.gate_proj.weight"] = gate
                tensors[f"{block}.{expert}.up_proj.weight"] = up
        elif projection == "down_proj":
            for expert, weight in enumerate(value):
                tensors[f"{block}.{expert}.down_proj.weight"] = weight
        else:
            tensors[name] = value
    return tensors


def is_linear(name: str, value: Tensor) -> bool:
    kept = ("embed", "head.", "lm_head", "norm", "hc_", ".gate.weight", "scorer", "weights_proj")
    return name.endswith(".weight") and value.dim() == 2 and not any(part in name for part in kept)


def is_expert(name: str) -> bool:
    return ".experts." in name


def nvfp4_parts(weight: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and global scale of a weight; the quantiser has tests of its own."""
    if global_scale is None:
        return nvfp4.quantize_weight(weight)
    return *nvfp4.quantize_with_global_scale(weight.float(), global_scale), global_scale


def mxfp4_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes stored as int8, and e8m0 exponents, one for 32 elements: the largest element lands in 4 to 8."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1).clamp(min=2.0**-60))) - 2
    scaled = blocks / torch.exp2(exponent).unsqueeze(-1)
    codes = (scaled.abs().clamp(max=6).unsqueeze(-1) - E2M1).abs().argmin(-1).to(torch.uint8)
    codes = (codes | ((scaled < 0).to(torch.uint8) << 3)).flatten(-2)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.view(torch.int8), (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def mxfp4_values(codes: Tensor, exponents: Tensor) -> Tensor:
    """What MXFP4 parts stand for, in fp32."""
    table = torch.cat([E2M1, -E2M1])
    both = torch.stack((codes.view(torch.uint8) & 15, codes.view(torch.uint8) >> 4), dim=-1).flatten(-2)
    scale = torch.exp2(exponents.view(torch.uint8).float() - 127)
    return (table[both.long()].unflatten(-1, (-1, 32)) * scale.unsqueeze(-1)).flatten(-2)


def fp8_parts(weight: Tensor, block: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """e4m3 elements and one scale a block of ``block`` x ``block``; powers of two for e8m0."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -k % block, 0, -n % block))
    tiles = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2)
    scale = tiles.abs().amax((-1, -2)).clamp(min=1e-8) / 448
    if scale_dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
        stored = (torch.log2(scale) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        stored = scale.to(scale_dtype)
        scale = stored.float()
    elements = (tiles / scale[..., None, None]).transpose(1, 2).flatten(2, 3).flatten(0, 1)[:n, :k]
    return elements.to(torch.float8_e4m3fn), stored


def fp8_values(elements: Tensor, scale: Tensor, block: int) -> Tensor:
    """What FP8 parts stand for, in bf16."""
    wide = torch.exp2(scale.view(torch.uint8).float() - 127) if scale.dtype == torch.float8_e8m0fnu else scale.float()
    n, k = elements.shape
    rows, columns = torch.arange(n) // block, torch.arange(k) // block
    return (elements.float() * wide[rows][:, columns]).bfloat16()


def write(folder: Path, tensors: Mapping[str, Tensor], config: dict[str, Any] | None = None, shards: int = 1) -> Path:
    """Writes one file, or shards with an index, and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file({name: tensors[name].contiguous() for name in names}, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def modelopt(tensors: Tensors, select: Callable[[str, Tensor], bool]) -> Tensors:
    """ModelOpt NVFP4 for what is selected, with an ``input_scale`` that would ruin the activations."""
    stored: Tensors = {}
    for name, value in tensors.items():
        if not select(name, value):
            stored[name] = value
            continue
        codes, scales, scale = nvfp4_parts(value)
        stored |= {name: codes, f"{name}_scale": scales, f"{name}_scale_2": scale}
        stored[f"{name.removesuffix('.weight')}.input_scale"] = torch.tensor(1e-9)
    return stored


def nvidia_mixed(tensors: Tensors) -> Tensors:
    """nvidia's V4: experts NVFP4 with one global scale for w1 and w3, linears FP8 by 128x128, MTP still MXFP4."""
    stored: Tensors = {}
    for name, value in tensors.items():
        base = name.removesuffix(".weight")
        if is_expert(name):
            other = name.replace(".w1.", ".w3.") if ".w1." in name else name.replace(".w3.", ".w1.")
            amax = torch.maximum(value.abs().max(), tensors[other].abs().max()).float()
            codes, scales, scale = nvfp4_parts(value, amax / 2688)
            stored |= {name: codes, f"{name}_scale": scales, f"{name}_scale_2": scale}
            stored[f"{base}.input_scale"] = torch.tensor(1e-9)
        elif is_linear(name, value):
            stored[name], stored[f"{base}.scale"] = fp8_parts(value, 128, torch.float8_e8m0fnu)
        else:
            stored[name] = value
    for projection in ("w1", "w2", "w3"):
        name = f"layers.1.ffn.experts.0.{projection}"
        stored[f"mtp.0.ffn.experts.0.{projection}.weight"], stored[f"mtp.0.ffn.experts.0.{projection}.scale"] = (
            mxfp4_parts(tensors[f"{name}.weight"])
        )
    return stored


def compressed_tensors(tensors: Tensors) -> Tensors:
    """compressed-tensors: experts NVFP4 with the reciprocal global scale (1,), linears FP8 blocks with bf16 scales."""
    stored: Tensors = {}
    for name, value in tensors.items():
        base = name.removesuffix(".weight")
        if is_expert(name):
            codes, scales, scale = nvfp4_parts(value)
            stored |= {f"{base}.weight_packed": codes, f"{base}.weight_scale": scales}
            stored[f"{base}.weight_global_scale"] = (1 / scale).reshape(1)
            stored[f"{base}.input_global_scale"] = torch.tensor([1e9])
        elif is_linear(name, value):
            stored[name], stored[f"{base}.weight_scale"] = fp8_parts(value, 128, torch.bfloat16)
        else:
            stored[name] = value
    return stored


def native(tensors: Tensors, block: int = 128, scale_dtype: torch.dtype = torch.float8_e8m0fnu) -> Tensors:
    """DeepSeek's own: experts MXFP4, linears FP8."""
    stored: Tensors = {}
    for name, value in tensors.items():
        base = name.removesuffix(".weight")
        if is_expert(name):
            stored[name], stored[f"{base}.scale"] = mxfp4_parts(value)
        elif is_linear(name, value):
            stored[name], stored[f"{base}.scale"] = fp8_parts(value, block, scale_dtype)
        else:
            stored[name] = value
    return stored
