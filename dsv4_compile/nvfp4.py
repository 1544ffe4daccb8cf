"""The NVFP4 number format and the one order of roundings that every kernel follows.

A value is ``e2m1 code x e4m3 block scale x fp32 global scale``; a block is 16 consecutive elements of the last axis.
Codes, block scales and global scales of every device agree bitwise with the functions below. All arithmetic is IEEE
fp32, round to nearest even, with no contraction into fused multiply-adds:

1. ``amax  = max(1e-8, max |x|)`` over the finite elements of the group that shares one global scale
2. ``gs    = amax / 2688``                                     (``tensor_pow2``: rounded up to a power of two)
3. ``s     = e4m3(min(amax_block / (6 * gs), 448))``           (a block that holds NaN or Inf: NaN)
4. ``inv   = 1 / (s * gs)``
5. ``code  = e2m1(x * inv)``, ties to the even code, saturating at 6   (all zero where ``s`` is 0 or NaN)

Source: the E2M1 and E4M3 encodings are those of OCP Microscaling Formats v1.0; block size, the e4m3 block scale and
the second-level fp32 scale are NVIDIA's NVFP4 as stored by ModelOpt.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

BLOCK_SIZE = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
GLOBAL_SCALE_DIVISOR = E2M1_MAX * E4M3_MAX  # 2688: the largest |x| / gs that the format holds
AMAX_FLOOR = 1e-8
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

Granularity = Literal["tensor", "tensor_pow2", "token"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)

SCALE_TILE_ROWS = 128
SCALE_TILE_COLS = 4

# Midpoints between neighbouring magnitudes. A tie goes to the even code, so a midpoint above an even code belongs to
# the lower one (strictly greater passes it) and a midpoint above an odd code to the upper one (equality passes it).
_MIDPOINTS_TIE_DOWN = (0.25, 1.25, 2.5, 5.0)
_MIDPOINTS_TIE_UP = (0.75, 1.75, 3.5)

# A dtype as wide as two elements of 2, 4 or 8 bytes.
_PAIR_DTYPES = {2: torch.int32, 4: torch.int64, 8: torch.complex128}

# Weight elements that matmul expands at a time: 4 MiB in fp64. Larger ones are slower, the allocator returns them.
_MATMUL_CHUNK_ELEMENTS = 1 << 19


def encode_e2m1(x: Tensor) -> Tensor:
    """Rounds to E2M1, ties to the even code, saturating at +-6.

    Args:
        x: fp32, any shape, no NaN.

    Returns:
        uint8 codes 0..15 of the same shape: sign in bit 3 (that of ``x``, zeros included), magnitude index below.
    """
    magnitude = x.abs()
    code = torch.signbit(x).to(torch.uint8) << 3
    for midpoint in _MIDPOINTS_TIE_DOWN:
        code += magnitude > midpoint
    for midpoint in _MIDPOINTS_TIE_UP:
        code += magnitude >= midpoint
    return code


def pack_codes(codes: Tensor) -> Tensor:
    """Packs E2M1 codes [..., K] (uint8, 0..15) two a byte to [..., K/2]; even k sits in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """Unpacks bytes [..., K/2] to E2M1 codes [..., K] (uint8, 0..15)."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode_codes(packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decodes packed E2M1 bytes [..., K/2] to their values [..., K] in ``dtype`` (exact in every float dtype)."""
    values = torch.tensor(E2M1_VALUES, dtype=dtype, device=packed.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # one row a byte: low, high nibble
    # A pair looked up as one wide element: a lookup of rows of two copies each row by itself, 3 times slower.
    table = pairs.view(_PAIR_DTYPES[dtype.itemsize]).flatten()
    return table.index_select(0, packed.int().flatten()).view(dtype).view(*packed.shape[:-1], 2 * packed.shape[-1])


def round_up_to_power_of_two(x: Tensor) -> Tensor:
    """Rounds positive normal fp32 values up to a power of two, exactly, by their bits."""
    bits = x.view(torch.int32)
    mantissa_mask = (1 << 23) - 1
    return ((bits + mantissa_mask) & ~mantissa_mask).view(torch.float32)


def global_scale_from_amax(amax: Tensor, granularity: str) -> Tensor:
    """``max(amax, 1e-8) / 2688`` in fp32, for ``tensor_pow2`` rounded up to a power of two."""
    # A tensor as divisor: CUDA divides by a Python scalar as a multiplication by its reciprocal, which rounds twice.
    scale = amax.clamp(min=AMAX_FLOOR) / torch.full_like(amax, GLOBAL_SCALE_DIVISOR)
    return round_up_to_power_of_two(scale) if granularity == "tensor_pow2" else scale


def finite_amax(x: Tensor, granularity: str) -> Tensor:
    """Largest finite |x|: a 0-d tensor, or one value a row [...] for ``token``. 0 where nothing is finite."""
    magnitude = torch.where(x.isfinite(), x.abs(), 0.0)
    if granularity == "token":
        return magnitude.amax(dim=-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    return magnitude.amax() if x.numel() else x.new_zeros(())


def quantize_with_global_scale(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Steps 3 to 5 of the rounding order, for a given global scale.

    Args:
        x: fp32 [..., K], K % 16 == 0.
        global_scale: fp32, broadcast against ``x``'s blocks [..., K/16].

    Returns:
        Packed codes uint8 [..., K/2] and block scales float8_e4m3fn [..., K/16].
    """
    blocks = x.unflatten(-1, (-1, BLOCK_SIZE))
    block_amax = blocks.abs().amax(dim=-1)
    scale = (block_amax / (global_scale * E2M1_MAX)).clamp(max=E4M3_MAX)
    scale = torch.where(block_amax.isfinite(), scale, float("nan"))
    block_scales = scale.to(torch.float8_e4m3fn)
    scale = block_scales.to(torch.float32)
    inverse = 1.0 / (scale * global_scale)
    codes = encode_e2m1(blocks * inverse.unsqueeze(-1))
    codes = torch.where((scale > 0).unsqueeze(-1), codes, 0)
    return pack_codes(codes.flatten(-2)), block_scales


def quantize(x: Tensor, granularity: str = "tensor") -> tuple[Tensor, Tensor, Tensor]:
    """Quantises a tensor to NVFP4 with the global scale taken from the tensor itself.

    With ``token`` a row depends on nothing but itself. With ``tensor_pow2`` a row that shares its batch dequantises
    bitwise as it does alone while each of its non-zero blocks has ``amax_block >= amax / 14336``, amax being that of
    the batch, at least 1e-8: from ``gs < 2 amax / 2688`` follows ``amax_block / (6 gs) > 224 amax_block / amax >=
    2^-6``, the smallest normal E4M3. Between normal block scales a power of two moves from ``gs`` into ``s`` with no
    rounding. Where ``gs`` comes near its bound, a block scale can change from ``0.968 amax / 14336`` downwards.

    Args:
        x: bf16, fp16 or fp32 [..., K], K % 16 == 0, any strides, zero rows allowed.
        granularity: ``tensor``, ``tensor_pow2`` (one global scale) or ``token`` (one a row).

    Returns:
        Packed codes uint8 [..., K/2], block scales float8_e4m3fn [..., K/16], global scale fp32 [] or [...].
    """
    x = x.to(torch.float32)
    global_scale = global_scale_from_amax(finite_amax(x, granularity), granularity)
    per_block = global_scale.unsqueeze(-1) if granularity == "token" else global_scale
    codes, block_scales = quantize_with_global_scale(x, per_block)
    return codes, block_scales, global_scale


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises a weight [N, K], or experts [E, N, K] one by one, with one global scale a matrix.

    Returns:
        Packed codes uint8 [..., N, K/2], block scales float8_e4m3fn [..., N, K/16], global scale fp32 [] or [E].

    Raises:
        ValueError: the weight holds NaN or Inf: a checkpoint like that is damaged, and packing it would hide it.
    """
    if weight.dim() == 2:
        if not weight.is_meta and not bool(weight.isfinite().all()):
            raise ValueError("quantize_weight: weight must be finite, got NaN or Inf elements")
        return quantize(weight)
    experts = [quantize_weight(expert) for expert in weight]
    codes, block_scales, global_scales = (torch.stack(parts) for parts in zip(*experts, strict=True))
    return codes, block_scales, global_scales


def expand_global_scale(global_scale: Tensor, lead: tuple[int, ...], rows: int) -> Tensor:
    """Views a global scale so that it broadcasts against [*lead, rows, K/16].

    Args:
        global_scale: fp32 [] (one for all), [*lead] (one a matrix) or [*lead, S] (S equal segments of the rows).
        lead: leading sizes of the packed tensor, those before its rows.
        rows: number of rows.
    """
    if global_scale.dim() == 0:
        return global_scale
    if global_scale.dim() == len(lead):
        return global_scale[..., None, None]
    return global_scale.repeat_interleave(rows // max(1, global_scale.shape[-1]), dim=-1).unsqueeze(-1)


def dequantize(codes: Tensor, block_scales: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(code * block scale) * global scale``: the first product is exact in fp32, the second rounds, then ``dtype``.

    Args:
        codes: uint8 [..., N, K/2].
        block_scales: float8_e4m3fn [..., N, K/16].
        global_scale: fp32 [], [...] or [..., S], see :func:`expand_global_scale`.
        dtype: of the result.

    Returns:
        [..., N, K] in ``dtype``.
    """
    scaled = scaled_codes(codes, block_scales)
    lead, rows = (tuple(codes.shape[:-2]), codes.shape[-2]) if codes.dim() > 1 else ((), 1)
    return (scaled * expand_global_scale(global_scale, lead, rows)).to(dtype)


def scaled_codes(codes: Tensor, block_scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``code * block scale`` [..., K]: at most 6 significant bits, so exact in fp32, in fp64 and in bf16."""
    values = decode_codes(codes, dtype).unflatten(-1, (-1, BLOCK_SIZE))
    return values.mul_(block_scales.to(dtype).unsqueeze(-1)).flatten(-2)


def matmul(
    a_scaled: Tensor, a_global_scale: Tensor, b_codes: Tensor, b_block_scales: Tensor, b_global_scale: Tensor
) -> Tensor:
    """``sum_k a b`` in fp64, rounded to fp32, times ``gsa * gsb`` in fp32: the product of every reference.

    A product of two scaled codes is a multiple of 2^-20 below 2^23, so fp64 adds them exactly while the sum of their
    magnitudes stays under 2^33 (always for K <= 1176, in practice for every K): the result does not depend on the
    order of summation, nor on which rows share the batch.

    Args:
        a_scaled: fp64 [M, K], from :func:`scaled_codes`.
        a_global_scale: fp32, 0-d or [M].
        b_codes, b_block_scales: uint8 [N, K/2] and float8_e4m3fn [N, K/16], expanded a chunk of rows at a time.
        b_global_scale: fp32, 0-d or [S], one for each of S equal segments of the N rows.

    Returns:
        fp32 [M, N].
    """
    n, k = b_codes.shape[0], a_scaled.shape[1]
    total = a_scaled.new_empty((a_scaled.shape[0], n), dtype=torch.float32)
    chunk_rows = max(1, _MATMUL_CHUNK_ELEMENTS // max(1, k))
    for start in range(0, n, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        b_scaled = scaled_codes(b_codes[chunk], b_block_scales[chunk])  # in fp32: half the bytes, as exact
        total[:, chunk] = a_scaled @ b_scaled.to(torch.float64).T
    a_scale = a_global_scale.unsqueeze(-1) if a_global_scale.dim() else a_global_scale
    return total.mul_(a_scale * expand_global_scale(b_global_scale, (), n).reshape(-1))


# exp(y) by Cody and Waite: y = n ln2 + r, a polynomial in r, times 2^n. Plain fp32 multiplies and adds in a fixed
# order, because the exp of two devices' math libraries differs in the last bit and the contract is bitwise.
_LOG2_E = 1.44269504
_LN2_HIGH = 0.693359375  # 9 significant bits: n * _LN2_HIGH is exact for |n| <= 2^15
_LN2_LOW = -2.12194440e-4
_EXP_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_EXP_LIMIT = 87.0


def exp(y: Tensor) -> Tensor:
    """exp(y) in fp32 within 2 ulp, from IEEE operations only, so that every device gives the same bits.

    ``y`` is clamped to [-87, 87]; NaN stays NaN.
    Source: the argument reduction and the minimax coefficients are those of Cephes' ``expf`` (S. L. Moshier).
    """
    y = y.clamp(-_EXP_LIMIT, _EXP_LIMIT)
    n = torch.round(y * _LOG2_E)
    r = (y - n * _LN2_HIGH) - n * _LN2_LOW
    p = torch.full_like(r, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        p = p * r + coefficient
    p = ((p * r) * r + r) + 1.0
    power = ((torch.nan_to_num(n).to(torch.int32) + 127) << 23).view(torch.float32)
    return p * power


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded fp32 square root: torch's own on the CPU is MKL's, one ulp off for a fifth of all arguments."""
    return x.to(torch.float64).sqrt().to(torch.float32)


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)) in fp32 within 3 * 2^-23 of its value, bitwise the same on every device.

    Below -87, where exp(-x) would leave fp32, it is ``x * 0``: -0, and NaN for -Inf, as in torch.nn.functional.silu.
    """
    return torch.where(x < -_EXP_LIMIT, x * 0.0, x / (1.0 + exp(-x)))


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """``silu(min(gate, limit)) * clamp(up, -limit, limit)`` in fp32; NaN passes both clamps, as torch.clamp does.

    Args:
        gate, up: bf16, fp16 or fp32, same shape.
        limit: swiglu_limit of the model config; ``inf`` for none.
    """
    gate = gate.to(torch.float32).clamp(max=limit)
    up = up.to(torch.float32).clamp(-limit, limit)
    return silu(gate) * up


def swizzle(block_scales: Tensor) -> Tensor:
    """Row-major block scales to the 128x4-tile 32x4x4 layout that cuBLAS, tcgen05 and torch's scaled_mm read.

    Args:
        block_scales: [R, C], any one-byte dtype; C = K/16.

    Returns:
        [ceil(R/128)*128, ceil(C/4)*4], contiguous, padding zero. Element (r, c) lies, in flat order, in tile
        (r // 128, c // 4) at offset (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4.

    Source: cuBLAS documentation, "1D Block Scaling Factors Layout".
    """
    rows, cols = block_scales.shape
    row_tiles, col_tiles = -(-rows // SCALE_TILE_ROWS), -(-cols // SCALE_TILE_COLS)
    padded_shape = (row_tiles * SCALE_TILE_ROWS, col_tiles * SCALE_TILE_COLS)
    padded = torch.zeros(padded_shape, dtype=torch.uint8, device=block_scales.device)
    padded[:rows, :cols] = block_scales.view(torch.uint8)
    tiles = padded.view(row_tiles, 4, 32, col_tiles, 4).permute(0, 3, 2, 1, 4)
    return tiles.contiguous().view(padded_shape).view(block_scales.dtype)


def unswizzle(swizzled: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of :func:`swizzle`: [ceil(R/128)*128, ceil(C/4)*4] back to row-major [rows, cols]."""
    row_tiles, col_tiles = swizzled.shape[0] // SCALE_TILE_ROWS, swizzled.shape[1] // SCALE_TILE_COLS
    tiles = swizzled.view(torch.uint8).reshape(row_tiles, col_tiles, 32, 4, 4).permute(0, 3, 2, 1, 4)
    plain = tiles.reshape(row_tiles * SCALE_TILE_ROWS, col_tiles * SCALE_TILE_COLS)[:rows, :cols]
    return plain.contiguous().view(swizzled.dtype)
