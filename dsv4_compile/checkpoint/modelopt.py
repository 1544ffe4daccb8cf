"""The config files of an NVFP4 checkpoint in ModelOpt's layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from dsv4_compile import nvfp4
from dsv4_compile.checkpoint.conversion import Unit
from dsv4_compile.checkpoint.names import layer_pattern


def excluded_modules(units: Iterable[Unit]) -> list[str]:
    """Modules whose weights are not NVFP4, layers and experts as ``*`` where all of a kind are left alone.

    Norms, biases and tables are no modules that a reader would quantise: they are not listed.
    """
    left: dict[str, list[str]] = defaultdict(list)
    packed: set[str] = set()
    for unit in units:
        for piece in unit.pieces:
            module = piece.name.removesuffix(".weight")
            if unit.is_packed:
                packed.add(layer_pattern(f"{module}."))
            elif len(piece.shape) >= 2 and (module != piece.name or len(piece.shape) == 3):
                left[layer_pattern(f"{module}.")].append(module)
    names: list[str] = []
    for pattern, modules in left.items():
        names.extend(modules if pattern in packed or len(modules) == 1 else [pattern.removesuffix(".")])
    return sorted(set(names))


def model_config(config: Mapping[str, Any], excluded: list[str], version: str) -> dict[str, Any]:
    """``config.json``: the source's with its quantisation replaced.

    Weights are said to be NVFP4 and activations to be quantised at run time: no static scale is written.
    """
    parts = {"num_bits": 4, "type": "float", "group_size": nvfp4.BLOCK_SIZE}
    group = {
        "input_activations": {"dynamic": True, **parts},
        "weights": {"dynamic": False, **parts},
        "targets": ["Linear"],
    }
    return {
        **config,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "group_size": nvfp4.BLOCK_SIZE,
            "kv_cache_scheme": None,
            "config_groups": {"group_0": group},
            "ignore": excluded,
            "producer": {"name": "dsv4-compile", "version": version},
        },
    }


def quantization_config(excluded: list[str], version: str) -> dict[str, Any]:
    """``hf_quant_config.json``."""
    return {
        "producer": {"name": "dsv4-compile", "version": version},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": nvfp4.BLOCK_SIZE,
            "exclude_modules": excluded,
        },
    }
