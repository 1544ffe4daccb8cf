"""Inline PTX, as the modules of device functions write it."""

from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm


def asm(result, operands, text, constraints, loc, ip, side_effects=False):
    """One piece of PTX; without side effects the compiler may move, merge and drop it."""
    return llvm.inline_asm(
        result,
        operands,
        text,
        constraints,
        has_side_effects=side_effects,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )


def struct_of(element, count):
    """The type of several results of one element type, ``i32`` or ``f32``."""
    return ir.Type.parse(f"!llvm.struct<({', '.join([element] * count)})>")
