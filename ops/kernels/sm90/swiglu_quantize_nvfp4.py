"""Quantises a clamped SwiGLU, computed in fp32 where it is needed: twice, where there are two passes."""

from cutlass import Int64

from dsv4_compile.ops.kernels.sm90 import blocks, quantizer
from dsv4_compile.ops.kernels.sm90 import numerics as nm


def silu(x):
    """:func:`nvfp4.silu`: ``x / (1 + exp(-x))``, ``x * 0`` below -87."""
    quotient = nm.divide(x, nm.add(nm.exponential(nm.negate(x)), 1.0))
    return nm.select(x < -nm.EXP_LIMIT, nm.multiply(x, 0.0), quotient)


class SwiGlu:
    """Source: blocks of gate and up, from which a block of fp32 products is made."""

    has_statistic = False
    kept_dtype = "float32"

    def __init__(self, dtype: str):
        self.dtype = self.second_dtype = dtype
        self.raw_words = 2 * blocks.words_of(dtype)

    def load(self, inputs, row, column):
        offset = Int64(column) * blocks.bytes_of(self.dtype)
        operands = (inputs.first, inputs.second)
        return [word for each in operands for word in blocks.load(inputs.row(each, row) + offset, self.dtype)]

    def prepare(self, inputs, raw, factor, column):
        half = self.raw_words // 2
        limit = inputs.scalar
        products = []
        for gate, up in zip(blocks.unpack(raw[:half], self.dtype), blocks.unpack(raw[half:], self.dtype), strict=True):
            clamped = nm.smaller_or_nan(nm.larger_or_nan(up, nm.negate(limit)), limit)
            products.append(nm.bits(nm.multiply(silu(nm.smaller_or_nan(gate, limit)), clamped)))
        return products


def build(config):
    """The ``cute.jit`` function for a configuration and its fake arguments."""
    return quantizer.build(config, SwiGlu(config.dtype))
