"""Quantises a clamped SwiGLU, computed in fp32 where it is needed: twice, where there are two passes."""

import cutlass
from cutlass import Float32, Int64, Uint32, cute

from dsv4_compile.ops.kernels.sm90 import blocks, quantizer
from dsv4_compile.ops.kernels.sm90 import numerics as nm


def _silu_about(x):
    """silu(x) within a relative error of 2^-14; what underflows, and below -87, is 0."""
    e = nm.exp2_about(nm.multiply(x, -nm.LOG2_E))
    return nm.multiply(x, nm.reciprocal_about(nm.add(e, 1.0)))


def _amax_about(raw, at, inputs, source):
    """The largest magnitude of a block's products within 2^-14, NaN or Inf where a product may be."""
    words = [raw[at + i] for i in range(source.raw_words)]
    half = source.raw_words // 2
    limit = inputs.scalar
    about = Float32(0.0)
    for gate, up in zip(
        blocks.unpack(words[:half], source.dtype), blocks.unpack(words[half:], source.dtype), strict=True
    ):
        clamped = nm.clamp(up, limit)
        product = nm.multiply(_silu_about(nm.smaller_or_nan(gate, limit)), clamped)
        about = nm.larger_or_nan(about, nm.absolute(product))
    return about


@cute.jit
def raise_bound(
    raw: cute.Tensor, at: cutlass.Constexpr, inputs: cutlass.Constexpr, known: cute.Tensor, source: cutlass.Constexpr
):
    """Makes ``known`` at least what the largest product of a block certainly reaches."""
    about = nm.bits(nm.multiply(_amax_about(raw, at, inputs, source), 1.0 - 2.0**-10))
    reached = nm.largest_of_warp(nm.select(about < Uint32(blocks.INF_BITS), about, 0))
    lane = cute.arch.lane_idx()
    if lane == 0:
        nm.raise_shared(known.iterator.toint(), reached)


@cute.jit
def top_of_products(
    raw: cute.Tensor,
    at: cutlass.Constexpr,
    inputs: cutlass.Constexpr,
    largest: Uint32,
    known: cute.Tensor,
    source: cutlass.Constexpr,
) -> Uint32:
    """The larger of ``largest`` and the largest finite product of a block, as bits.

    Products are computed exactly only where one may exceed what the CTA has seen, ``known``: where an approximation is
    not clearly below. The maximum starts at 1e-8, the least that counts.
    """
    seen = nm.larger_u32(largest, known[0])
    bound = nm.larger_or_nan(nm.multiply(_amax_about(raw, at, inputs, source), 1.0 + 2.0**-10), nm.from_bits(seen))
    prepare, words = source.prepare, [raw[at + i] for i in range(source.raw_words)]
    if nm.bits(bound) != seen:
        products = cute.make_rmem_tensor(16, Uint32)
        values = prepare(inputs, words, None, None)
        for i in cutlass.range_constexpr(16):
            products[i] = values[i]
        largest = nm.larger_u32(largest, blocks.finite_amax(products, 0, "float32"))
        nm.raise_shared(known.iterator.toint(), largest)
    return largest


class SwiGlu:
    """Source: blocks of gate and up, from which a block of fp32 products is made."""

    has_bound = True
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
            products.append(nm.bits(nm.swiglu(gate, up, limit)))
        return products

    def bound(self, raw, at, inputs, known):
        raise_bound(raw, at, inputs, known, self)

    def top(self, raw, at, inputs, largest, known):
        return top_of_products(raw, at, inputs, largest, known, self)


def build(config):
    """The ``cute.jit`` function for a configuration and its fake arguments."""
    return quantizer.build(config, SwiGlu(config.dtype))
