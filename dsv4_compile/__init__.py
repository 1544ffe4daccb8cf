"""NVFP4 compilation of eager PyTorch models: ``torch.compile(model, backend="dsv4")``."""

import importlib
from typing import TYPE_CHECKING, Any

from dsv4_compile import ops
from dsv4_compile.checkpoint import CheckpointError, LoadReport, load_checkpoint
from dsv4_compile.quantization import QuantizeReport, flatten_state_dict, quantize_, unflatten_state_dict
from dsv4_compile.tensor import Nvfp4Tensor

if TYPE_CHECKING:
    from dsv4_compile.checkpoint.quantize import quantize_checkpoint
    from dsv4_compile.comparison import Comparison, compare
    from dsv4_compile.explanation import Explanation, explain

__version__ = "0.1.0"

# Imported on first use: they bring Inductor, which takes seconds, or what only some need.
_ON_FIRST_USE = {
    "Comparison": "dsv4_compile.comparison",
    "Explanation": "dsv4_compile.explanation",
    "compare": "dsv4_compile.comparison",
    "explain": "dsv4_compile.explanation",
    "quantize_checkpoint": "dsv4_compile.checkpoint.quantize",
}

__all__ = [
    "CheckpointError",
    "Comparison",
    "Explanation",
    "LoadReport",
    "Nvfp4Tensor",
    "QuantizeReport",
    "compare",
    "explain",
    "flatten_state_dict",
    "load_checkpoint",
    "ops",
    "quantize_",
    "quantize_checkpoint",
    "unflatten_state_dict",
]


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
