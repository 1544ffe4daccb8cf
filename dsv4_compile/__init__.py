"""NVFP4 compilation of eager PyTorch models: ``torch.compile(model, backend="dsv4")``."""

from typing import TYPE_CHECKING, Any

from dsv4_compile import ops
from dsv4_compile.checkpoint import CheckpointError, LoadReport, load_checkpoint
from dsv4_compile.quantization import QuantizeReport, flatten_state_dict, quantize_, unflatten_state_dict
from dsv4_compile.tensor import Nvfp4Tensor

if TYPE_CHECKING:
    from dsv4_compile.explanation import Explanation, explain

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Explanation",
    "LoadReport",
    "Nvfp4Tensor",
    "QuantizeReport",
    "explain",
    "flatten_state_dict",
    "load_checkpoint",
    "ops",
    "quantize_",
    "unflatten_state_dict",
]


def __getattr__(name: str) -> Any:
    # On first use: these bring Inductor, which takes seconds to import.
    if name in ("Explanation", "explain"):
        from dsv4_compile import explanation

        return getattr(explanation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
