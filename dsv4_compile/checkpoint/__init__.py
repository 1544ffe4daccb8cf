"""Checkpoints: what exists is loaded packed, what is plain is packed, and both are checked before anything changes.

``index`` opens files, ``formats`` says what each weight is stored as, ``names`` which parameter it belongs to and
``decode`` turns it into NVFP4 or bf16. ``load`` fills a model, ``plan`` lists all that does not fit. ``quantize``
writes a checkpoint anew: ``conversion`` plans it, ``convert`` and ``packing`` do it. ``inspection`` looks at one.
"""

from dsv4_compile.checkpoint.index import CheckpointError
from dsv4_compile.checkpoint.inspection import Inspection, inspect
from dsv4_compile.checkpoint.load import load_checkpoint
from dsv4_compile.checkpoint.plan import LoadReport
from dsv4_compile.checkpoint.quantization_report import QuantizationReport
from dsv4_compile.checkpoint.quantize import quantize_checkpoint

__all__ = [
    "CheckpointError",
    "Inspection",
    "LoadReport",
    "QuantizationReport",
    "inspect",
    "load_checkpoint",
    "quantize_checkpoint",
]
