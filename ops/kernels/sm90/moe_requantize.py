"""Quantises rows to NVFP4 and expands them at once to ``code * block scale``, which is exact in bf16 and in fp16.

The tensor cores of Hopper multiply that product, so codes and scales themselves are never stored. A thread takes eight
values, half a block: 16 bytes in bf16, so that a warp's accesses are whole lines; two lanes share a block's maximum.
For the wgmma kernel, four lanes then exchange pairs until each has 16 bytes in the order of ``interleave``.
"""

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.interleave import CHUNK
from dsv4_compile.ops.dispatch.moe_requantize import THREADS, VALUES, RequantizeConfig
from dsv4_compile.ops.kernels.sm90.interleaving import exchange, place_of
from dsv4_compile.ops.kernels.sm90.numerics import (
    absolute,
    add,
    address_of,
    bits,
    divide,
    e4m3_byte,
    e4m3_value,
    from_bits,
    larger_or_nan,
    load_words,
    multiply,
    pack_bf16x2,
    pack_f16x2,
    store_f32,
    store_words,
    subtract,
    unpack_bf16x2,
    unpack_f16x2,
)

WARPS = THREADS // 32
AHEAD = 4  # loads in flight a thread
NOT_FINITE = 0x7F800000
AMAX_FLOOR = 1e-8
GLOBAL_SCALE_DIVISOR = 2688.0


@cute.jit
def global_scale_of(amax: Float32, is_pow2: cutlass.Constexpr) -> Float32:
    """:func:`nvfp4.global_scale_from_amax`."""
    scale = divide(larger_or_nan(amax, AMAX_FLOOR), GLOBAL_SCALE_DIVISOR)
    if cutlass.const_expr(is_pow2):
        scale = from_bits((bits(scale) + Uint32(0x007FFFFF)) & Uint32(0xFF800000))
    return scale


@cute.jit
def scale_and_inverse(amax: Float32, global_scale: Float32, six_global_scales: Float32):
    """Block scale (NaN where ``amax`` is not finite), ``1 / (s gs)`` or 0 for s = 0, and the mask of signs kept."""
    byte = e4m3_byte(divide(amax, six_global_scales))
    if bits(amax) >= NOT_FINITE:
        byte = Uint32(0x7F)
    scale = e4m3_value(byte)
    inverse, signs = divide(1.0, multiply(scale, global_scale)), Uint32(0x80000000)
    if byte == 0:
        inverse, signs = Float32(0.0), Uint32(0)
    return scale, inverse, signs


def scaled_code(x, scale, inverse, signs):
    """``e2m1(x * inverse) * scale``: the code's magnitude by adding and subtracting 2^22 of its steps."""
    magnitude = cutlass.min(absolute(multiply(x, inverse)), Float32(6.0))
    exponent = cutlass.max(bits(magnitude) & NOT_FINITE, Uint32(0x3F800000))  # below 1, steps are as in 1..2
    grid = from_bits(exponent + Uint32(22 << 23))
    rounded = multiply(subtract(add(magnitude, grid), grid), scale)
    return from_bits(bits(rounded) | (bits(x) & signs))


@cute.jit
def unpack_vector(words: cute.Tensor, values: cute.Tensor, dtype: cutlass.Constexpr):
    """Eight fp32 values from their words."""
    for i in cutlass.range_constexpr(VALUES * dtype.width // 32):
        if cutlass.const_expr(dtype == Float32):
            values[i] = from_bits(words[i])
        elif cutlass.const_expr(dtype == cutlass.BFloat16):
            values[2 * i], values[2 * i + 1] = unpack_bf16x2(words[i])
        else:
            values[2 * i], values[2 * i + 1] = unpack_f16x2(words[i])


@cute.jit
def load_vector(address: Int64, words: cute.Tensor, is_valid, dtype: cutlass.Constexpr):
    """The words of eight values, zeros where there are none."""
    for part in cutlass.range_constexpr(dtype.width // 16):
        for i in cutlass.range_constexpr(4):
            words[4 * part + i] = Uint32(0)
        if is_valid:
            loaded = load_words(address + 16 * part, 4)
            for i in cutlass.range_constexpr(4):
                words[4 * part + i] = loaded[i]


@cute.jit
def largest_finite(words: cute.Tensor, so_far: Uint32, dtype: cutlass.Constexpr) -> Uint32:
    """Bits of the largest finite magnitude of a vector, or of what was found before."""
    values = cute.make_rmem_tensor(VALUES, Float32)
    unpack_vector(words, values, dtype)
    for i in cutlass.range_constexpr(VALUES):
        magnitude = bits(absolute(values[i]))
        if magnitude < NOT_FINITE:
            so_far = cutlass.max(so_far, magnitude)
    return so_far


@cute.jit
def quantize_vector(
    source: cute.Tensor,
    global_scale: Float32,
    six_global_scales: Float32,
    words: cute.Tensor,
    dtype: cutlass.Constexpr,
    is_interleaved: cutlass.Constexpr,
):
    """Eight values, half of the block shared with the neighbouring lane, to four words of ``code * block scale``."""
    values = cute.make_rmem_tensor(VALUES, Float32)
    unpack_vector(source, values, dtype)
    amax = absolute(values[0])
    for i in cutlass.range_constexpr(1, VALUES):
        amax = larger_or_nan(amax, absolute(values[i]))
    amax = larger_or_nan(amax, cute.arch.shuffle_sync_bfly(amax, 1))
    scale, inverse, signs = scale_and_inverse(amax, global_scale, six_global_scales)
    result = [scaled_code(values[i], scale, inverse, signs) for i in range(VALUES)]
    if cutlass.const_expr(is_interleaved):
        exchanged = exchange([pack_f16x2(result[i], result[i + 4]) for i in range(4)])
        for i in cutlass.range_constexpr(4):
            words[i] = exchanged[i]
    else:
        for i in cutlass.range_constexpr(4):
            words[i] = pack_bf16x2(result[2 * i], result[2 * i + 1])


def unchanged(vector):
    """Where the 16 bytes of a vector go that is not interleaved."""
    return vector


@cute.jit
def store_vector(address: Int64, words: cute.Tensor, is_valid):
    """Four words to a 16-byte aligned address."""
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    if is_valid:
        store_words(address, [w0, w1, w2, w3])


@cute.jit
def maximum_of_block(word: Uint32, partial: cute.Tensor) -> Uint32:
    """The largest word of the CTA, known to all threads; ``partial`` [WARPS] in shared memory."""
    word = cute.arch.warp_redux_sync(word, "max")
    warp = cute.arch.warp_idx()  # a shuffle: not where lanes diverge
    if cute.arch.lane_idx() == 0:
        partial[warp] = word
    cute.arch.sync_threads()
    result = partial[0]
    for i in cutlass.range_constexpr(1, WARPS):
        result = cutlass.max(result, partial[i])
    cute.arch.sync_threads()
    return result


@cute.kernel
def requantize_kernel(
    h: cute.Tensor,
    partial_amax: cute.Tensor,
    schedule: cute.Tensor,
    scaled: cute.Tensor,
    global_scales: cute.Tensor,
    config: cutlass.Constexpr,
):
    dtype = h.element_type
    is_interleaved = config.is_interleaved
    place = place_of if cutlass.const_expr(is_interleaved) else unchanged
    num_words = VALUES * dtype.width // 32
    num_bytes = VALUES * dtype.width // 8
    smem = cutlass.memory.SmemAllocator()
    partial = smem.allocate_tensor(Uint32, cute.make_layout(WARPS), 16)
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    row_vectors = Int32(cute.size(h, mode=[1])) // VALUES
    if cutlass.const_expr(config.pdl):
        # In this order: the next product reads the schedule without waiting for this kernel, see has_old_schedule.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
    rows = schedule[0, 1]
    source, target = address_of(h), address_of(scaled)
    if cutlass.const_expr(config.granularity == "token"):
        row = cta
        while row < rows:
            row_source = source + Int64(row) * row_vectors * num_bytes
            row_target = target + Int64(row) * row_vectors * 16
            kept = cute.make_rmem_tensor(num_words, Uint32)  # the first vector of the thread, often its only one
            load_vector(row_source + Int64(thread) * num_bytes, kept, thread < row_vectors, dtype)
            amax = largest_finite(kept, Uint32(0), dtype)
            for vector in cutlass.range(thread + THREADS, row_vectors, THREADS, unroll=1):
                words = cute.make_rmem_tensor(num_words, Uint32)
                load_vector(row_source + Int64(vector) * num_bytes, words, True, dtype)
                amax = largest_finite(words, amax, dtype)
            global_scale = global_scale_of(from_bits(maximum_of_block(amax, partial)), False)
            six_global_scales = multiply(global_scale, 6.0)
            if thread == 0:
                store_f32(address_of(global_scales) + Int64(row) * 4, global_scale)
            result = cute.make_rmem_tensor(4, Uint32)
            quantize_vector(kept, global_scale, six_global_scales, result, dtype, is_interleaved)
            store_vector(row_target + Int64(place(thread)) * 16, result, thread < row_vectors)
            for step in cutlass.range(1, cute.ceil_div(row_vectors, THREADS), unroll=1):  # whole warps: lanes exchange
                vector = step * THREADS + thread
                words = cute.make_rmem_tensor(num_words, Uint32)
                load_vector(row_source + Int64(vector) * num_bytes, words, vector < row_vectors, dtype)
                quantize_vector(words, global_scale, six_global_scales, result, dtype, is_interleaved)
                store_vector(row_target + Int64(place(vector)) * 16, result, vector < row_vectors)
            row += ctas
    else:
        vectors = Int64(rows) * row_vectors
        stride = Int64(ctas) * THREADS
        first = Int64(cta) * THREADS + thread
        words = cute.make_rmem_tensor((num_words, AHEAD), Uint32)
        for ahead in cutlass.range_constexpr(AHEAD):  # under way while the maximum is found
            vector = first + ahead * stride
            load_vector(source + vector * num_bytes, words[None, ahead], vector < vectors, dtype)
        amax = Uint32(0)
        for index in cutlass.range(thread, Int32(cute.size(partial_amax)), THREADS, unroll=1):
            amax = cutlass.max(amax, bits(partial_amax[index]))
        amax = maximum_of_block(amax, partial)
        global_scale = global_scale_of(from_bits(amax), config.granularity == "tensor_pow2")
        six_global_scales = multiply(global_scale, 6.0)
        if (thread == 0) & (cta == 0):
            store_f32(address_of(global_scales), global_scale)
        while first - thread < vectors:  # the same for the whole CTA: lanes exchange values
            for ahead in cutlass.range_constexpr(AHEAD):
                vector = first + ahead * stride
                result = cute.make_rmem_tensor(4, Uint32)
                quantize_vector(words[None, ahead], global_scale, six_global_scales, result, dtype, is_interleaved)
                store_vector(target + place(vector) * 16, result, vector < vectors)
            first += AHEAD * stride
            for ahead in cutlass.range_constexpr(AHEAD):
                vector = first + ahead * stride
                load_vector(source + vector * num_bytes, words[None, ahead], vector < vectors, dtype)


@cute.jit
def launch_requantize(
    h: cute.Tensor,
    partial_amax: cute.Tensor,
    schedule: cute.Tensor,
    scaled: cute.Tensor,
    global_scales: cute.Tensor,
    ctas: Int32,
    stream,
    config: cutlass.Constexpr,
):
    requantize_kernel(h, partial_amax, schedule, scaled, global_scales, config).launch(
        grid=(ctas, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=config.pdl
    )


def build(config: RequantizeConfig):
    dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": Float32}[config.dtype]
    k = cute.sym_int32(divisibility=CHUNK if config.is_interleaved else 16)

    def matrix(dtype):
        return make_fake_tensor(dtype, (cute.sym_int32(), k), (k, 1), assumed_align=16)

    def vector():
        return make_fake_tensor(Float32, (cute.sym_int32(),), (1,), assumed_align=4)

    schedule = make_fake_tensor(Int32, (cute.sym_int32(), 4), (4, 1), assumed_align=16)
    return launch_requantize, (
        matrix(dtype), vector(), schedule, matrix(cutlass.Float16 if config.is_interleaved else cutlass.BFloat16),
        vector(), Int32(1), make_fake_stream(use_tvm_ffi_env_stream=True), config,
    )  # fmt: skip
