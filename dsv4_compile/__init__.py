"""NVFP4 compilation of eager PyTorch models: ``torch.compile(model, backend="dsv4")``."""

from dsv4_compile import ops
from dsv4_compile.quantization import QuantizeReport, flatten_state_dict, quantize_, unflatten_state_dict
from dsv4_compile.tensor import Nvfp4Tensor

__version__ = "0.1.0"

__all__ = [
    "Nvfp4Tensor",
    "QuantizeReport",
    "flatten_state_dict",
    "ops",
    "quantize_",
    "unflatten_state_dict",
]
