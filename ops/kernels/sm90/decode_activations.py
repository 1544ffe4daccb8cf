"""The activations of ``sm90.decode_mm`` in shared memory: decoded on their way there, or copied as they lie."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from dsv4_compile.ops.dispatch.decode_mm import STEP_K
from dsv4_compile.ops.kernels.sm90 import numerics
from dsv4_compile.ops.kernels.sm90.instructions import (
    EXPONENTS,
    Decoder,
    copy_to_shared,
    decode_two_scales,
    f16_of_bf16,
    load_global_i32,
    load_global_u16,
    load_global_v4,
    load_shared_f32,
    load_shared_v4,
    multiply_pair,
    permute,
    store_shared_f32,
    store_shared_v4,
)

CONSUMERS_BARRIER = 1
CHUNKS = 4  # of K, each with a barrier: the first steps begin before the last values have arrived
FEWEST_CHUNK_STEPS = 2
STEP_BYTES = 2 * STEP_K  # of a token, as bf16
MAGNITUDES = 0x7FFF7FFF  # of two bf16 values
BIAS = 127
DECODED_EXPONENT = 126  # codes decode to bf16 times 2^-126
KEPT_EXPONENT = EXPONENTS["bf16"]  # that sums lack until they are complete, so as not to overflow before


class Activations:
    """What the consumers of :class:`DecodeMM` do before they multiply."""

    def chunk_steps(self, steps):
        """Steps of K that one barrier covers; all of them for one token, whose values are scaled first."""
        if self.slots == 1:
            return steps
        return cutlass.max((steps + CHUNKS - 1) // CHUNKS, FEWEST_CHUNK_STEPS)

    @cute.jit
    def copy_rows(self, x, activations, token_bytes, barriers, tokens, first_step, steps, k, warp):
        """Begins to copy this CTA's part of K of each token, as it lies, a chunk of all tokens after the other."""
        chunk_steps = self.chunk_steps(steps)
        with cute.arch.elect_one():
            for chunk in cutlass.range_constexpr(1 if self.slots == 1 else CHUNKS):
                first = chunk * chunk_steps
                num_bytes = cutlass.min(steps - first, chunk_steps) * STEP_BYTES
                if num_bytes > 0:
                    if warp == 0:
                        cute.arch.mbarrier_arrive_and_expect_tx(barriers + chunk, tokens * num_bytes)
                    barrier = Int32((barriers + chunk).toint())
                    source = x.iterator.toint() + Int64(first_step + first) * STEP_BYTES
                    for token in cutlass.range(warp, tokens, self.warps, unroll=1):
                        target = activations + token * token_bytes + first * STEP_BYTES
                        copy_to_shared(target, source + Int64(token) * (2 * k), num_bytes, barrier)

    @cute.jit
    def await_step(self, barriers, arrived, step, steps):
        """Waits for the chunk that has a step; returns the number of steps up to its end."""
        if step >= arrived:
            chunk_steps = self.chunk_steps(steps)
            chunk = step // chunk_steps
            cute.arch.mbarrier_wait(barriers + chunk, 0)
            arrived = (chunk + 1) * chunk_steps
        return arrived

    @cute.jit
    def scale_up(self, activations, steps, scratch, thread):
        """One token's values times the power of two that brings the largest to 2^126, from 1 to 2^127.

        Codes decode to bf16 times 2^-126, so products come out near one. A value stays exact, as it only grows. With an
        infinity or NaN the power is 1: then all results are infinities or NaN.

        Returns:
            What sums of products are to be multiplied by, to be those of the codes times 2^-14 and the given values.
        """
        pieces = steps * (STEP_BYTES // 16)
        largest = cutlass.Uint32(0)
        for piece in cutlass.range(thread, pieces, self.threads, unroll=1):
            for word in load_shared_v4(activations + piece * 16):
                largest = numerics.larger_u16x2(largest, cutlass.Uint32(word) & MAGNITUDES)
        largest = numerics.largest_of_warp(numerics.larger_u32(largest & 0xFFFF, largest >> 16))
        store_shared_f32(scratch + thread // 32 * 4, numerics.from_bits(largest))
        cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=self.threads)
        of_warp = load_shared_f32(scratch + thread % 32 % self.warps * 4)
        exponent = Int32(numerics.largest_of_warp(numerics.bits(of_warp)) >> 7)  # with its bias
        power = cutlass.max(cutlass.min(2 * BIAS + DECODED_EXPONENT - exponent, 2 * BIAS), BIAS)  # with its bias
        factor = power << 7 | power << 23
        for piece in cutlass.range(thread, pieces, self.threads, unroll=1):
            address = activations + piece * 16
            words = load_shared_v4(address)
            store_shared_v4(address, *[multiply_pair(word, factor, "bf16") for word in words])
        cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=self.threads)
        return numerics.from_bits((2 * BIAS + DECODED_EXPONENT - KEPT_EXPONENT - power) << 23)

    @cute.jit
    def fill(
        self, x, x_scales, sorted_slots, top_k, activations, first_row, tokens, first_step, steps, k, thread, warp
    ):
        """Activations of this CTA's part of K to shared memory, in the order in which weights decode to f16.

        A warp moves 1024 values of a token at a time, 32 a lane, with the loads of several such pieces under way before
        the first is used.
        """
        config = self.config
        lane = thread % 32
        chunks = steps * (STEP_K // 32)
        pieces = (chunks + 31) // 32  # of a token
        total = tokens * pieces
        batch = self.pieces_in_flight
        words_per_chunk = 4 if config.activation == "packed" else 16
        decoder = Decoder(self.dtype, cute.arch.grid_dim()[1])
        loaded = cute.make_rmem_tensor((words_per_chunk, batch), Int32)
        scales = cute.make_rmem_tensor((batch,), Int32)
        for start in cutlass.range(warp, total, self.warps * batch, unroll=1):
            for i in cutlass.range_constexpr(batch):
                piece = start + i * self.warps
                token = piece // pieces
                chunk = piece % pieces * 32 + lane
                if piece < total and chunk < chunks:
                    source_row = first_row + token
                    if cutlass.const_expr(config.has_gather):
                        source_row = load_global_i32(sorted_slots.iterator.toint() + Int64(source_row) * 4) // top_k
                    source = Int64(source_row) * k + (first_step * STEP_K + chunk * 32)
                    if cutlass.const_expr(config.activation == "packed"):
                        self.load_words(loaded, 0, i, x.iterator.toint() + source // 2)
                        scales[i] = load_global_u16(x_scales.iterator.toint() + source // 16)
                    else:
                        for j in cutlass.range_constexpr(4):
                            self.load_words(loaded, 4 * j, i, x.iterator.toint() + 2 * source + 16 * j)
            for i in cutlass.range_constexpr(batch):
                piece = start + i * self.warps
                token = piece // pieces
                chunk = piece % pieces * 32 + lane
                if piece < total and chunk < chunks:
                    target = activations + (chunk // 4) * (256 * self.slots) + (token * 4 + chunk % 4) * 16
                    if cutlass.const_expr(config.activation == "packed"):
                        factors = decode_two_scales(scales[i], self.dtype)
                        for j in cutlass.range_constexpr(4):
                            values = self.scaled(decoder, loaded[j, i], factors[j // 2])
                            store_shared_v4(target + j * (64 * self.slots), *values)
                    else:
                        for j in cutlass.range_constexpr(4):  # the exact rows of a grouped product
                            w0, w1, w2, w3 = [f16_of_bf16(loaded[4 * j + word, i]) for word in range(4)]
                            low, high = Int32(0x5410), Int32(0x7632)
                            store_shared_v4(
                                target + j * (64 * self.slots),
                                permute(w0, w2, low),
                                permute(w0, w2, high),
                                permute(w1, w3, low),
                                permute(w1, w3, high),
                            )

    def load_words(self, loaded, first, column, address):
        for word, value in enumerate(load_global_v4(address)):
            loaded[first + word, column] = value
