"""Quantises an RMSNorm rounded to the dtype of its input."""

from cutlass import Float32, Int64

from dsv4_compile.ops.kernels.sm90 import blocks, quantizer
from dsv4_compile.ops.kernels.sm90 import numerics as nm


class RmsNorm:
    """Source: blocks of x, scaled by the row's factor and the weight, rounded to the dtype of x."""

    has_bound = False
    has_statistic = True

    def __init__(self, dtype: str, weight: str | None):
        self.kept_dtype = dtype
        self.raw_words = blocks.words_of(dtype)
        self.weight = weight
        self.second_dtype = weight or dtype

    def load(self, inputs, row, column):
        at = inputs.row(inputs.first, row) + Int64(column) * blocks.bytes_of(self.kept_dtype)
        return blocks.load(at, self.kept_dtype)

    def row_sum(self, raw, totals):
        for i, value in enumerate(blocks.unpack(raw, self.kept_dtype)):
            totals[i % len(totals)] = nm.add_square_f64(totals[i % len(totals)], value)
        return totals

    def factor(self, inputs, total):
        mean = nm.divide(nm.round_f64(total), Float32(inputs.row_blocks * 16))
        return nm.reciprocal(nm.square_root(nm.add(mean, inputs.scalar)))

    def prepare(self, inputs, raw, factor, column):
        values = [nm.multiply(value, factor) for value in blocks.unpack(raw, self.kept_dtype)]
        if self.weight is not None:
            at = inputs.second.address + Int64(column) * blocks.bytes_of(self.weight)
            weights = blocks.unpack(blocks.load(at, self.weight), self.weight)
            values = [nm.multiply(value, weight) for value, weight in zip(values, weights, strict=True)]
        return blocks.pack(values, self.kept_dtype)


def build(config):
    """The ``cute.jit`` function for a configuration and its fake arguments."""
    return quantizer.build(config, RmsNorm(config.dtype, config.weight))
