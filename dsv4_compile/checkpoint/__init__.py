"""Checkpoints: what exists is loaded packed, what is plain is packed, and both are checked before anything changes.

``index`` opens files, ``formats`` says what each weight is stored as, ``names`` which parameter it belongs to and
``decode`` turns it into NVFP4 or bf16; ``plan`` lists all that does not fit. ``load`` and ``inspection`` are what users
call.
"""

from dsv4_compile.checkpoint.index import CheckpointError
from dsv4_compile.checkpoint.inspection import Inspection, inspect
from dsv4_compile.checkpoint.load import load_checkpoint
from dsv4_compile.checkpoint.plan import LoadReport

__all__ = ["CheckpointError", "Inspection", "LoadReport", "inspect", "load_checkpoint"]
