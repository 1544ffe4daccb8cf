"""Which launches quantise a tensor: what the three quantisers share on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import division, fresh_weights
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import require_hopper, sm_count
from dsv4_compile.ops.registration import allocate_packed

CTA_THREADS = 512  # of the kernels that own rows or look for a maximum
FLAT_THREADS = 256
MAX_PARTIALS = 384  # three words of four for each lane of a warp
# CTAs a multiprocessor of the first and of the second launch. For fewer blocks the first leaves room for the second,
# which loads its blocks while it waits (1024 x 4096: 9.3 us rather than 10.2; 16384 x 4096: 108.8 rather than 114.8).
LEAST_BLOCKS = 1 << 19
CTAS_PER_SM_FEW, CTAS_PER_SM_MANY = (1, 4), (2, 8)
# (CTAs of a cluster, rows a thread holds): the first that holds all rows is one launch. Measured, see docs/measured.md:
# from 64 rows of 4096 on two launches are as fast, unless much is computed for each element.
ONE_LAUNCH = ((1, 1), (8, 1))
ONE_LAUNCH_COSTLY = (*ONE_LAUNCH, (16, 1))
ALIGNMENT = 16  # bytes

# (blocks a row, threads a row, blocks a thread): the first that holds the row.
ROW_SHAPES = ((64, 64, 1), (128, 128, 1), (256, 128, 2), (512, 256, 2), (1024, 512, 2), (2048, 512, 4))
MAX_ROW_BLOCKS = ROW_SHAPES[-1][0]
MAX_HELD_BLOCKS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 4}  # that a thread's registers hold


@dataclass(frozen=True)
class RowsConfig:
    """Threads that own whole rows.

    Attributes:
        dtype: of the input.
        threads: threads a row.
        blocks: blocks a thread holds of a row.
        rows: rows a thread holds blocks of.
        cluster: CTAs that share one global scale.
        per_token: one global scale a row.
        is_partial: looks for the maximum only, and leaves it and the rows' factors in a workspace.
        weight: dtype of the norm's weight.
        norm: writes the normalised tensor too.
        pdl: launched by programmatic dependent launch.
    """

    dtype: str
    threads: int
    blocks: int
    rows: int = 1
    cluster: int = 1
    per_token: bool = False
    is_partial: bool = False
    weight: str | None = None
    norm: bool = False
    pdl: bool = True


@dataclass(frozen=True)
class AmaxConfig:
    """First of two launches: one maximum a CTA.

    Attributes:
        dtype, pdl: as of :class:`RowsConfig`.
        unroll: blocks a thread loads at a time, while it works on as many.
    """

    dtype: str
    unroll: int = 1
    pdl: bool = True


@dataclass(frozen=True)
class FlatConfig:
    """Second of two launches: the global scale from those maxima, then the blocks in any order.

    Attributes:
        dtype, weight, pdl: as of :class:`RowsConfig`.
        unroll: as of :class:`AmaxConfig`.
        early: the input was written before the first of the two launches, so that it can be read before that ends.
    """

    dtype: str
    weight: str | None = None
    unroll: int = 1
    early: bool = True
    pdl: bool = True


@dataclass(frozen=True)
class Source:
    """What a quantiser reads.

    Attributes:
        op: operator, the name of its kernel module too.
        first: see :func:`as_rows`.
        second: like it, with the same leading sizes, or the weight [K].
        held: blocks that a thread's registers hold.
        one_launch: clusters that may do it in one launch.
        scalar: limit or eps.
        weight: dtype of the weight, or None.
        has_statistic: the operator needs each row as a whole.
    """

    op: str
    first: Operand
    second: Operand
    held: int
    one_launch: tuple[tuple[int, int], ...]
    scalar: float = 0.0
    weight: str | None = None
    has_statistic: bool = False

    @property
    def kernel(self) -> str:
        return f"sm90.{self.op}"

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.first.start, self.second.start

    @property
    def geometry(self) -> tuple[int, ...]:
        """How rows divide into outer and inner, and the pitches of both operands."""
        inner = self.first.inner
        return inner, *division.magic(inner), *self.first.pitches, *self.second.pitches


def dtype_name(tensor: Tensor) -> str:
    """``bfloat16`` of a tensor of torch.bfloat16."""
    return str(tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Operand:
    """A tensor [outer, inner, K] with unit last stride, whose rows start at multiples of 16 bytes.

    Attributes:
        start: its first elements, 1-D: a tensor that a kernel takes the address of.
        outer, inner: sizes of the leading dimensions.
        pitches: bytes from one to the next of each.
    """

    start: Tensor
    outer: int
    inner: int
    pitches: tuple[int, int]


def as_rows(x: Tensor) -> Operand:
    """x [..., K] as it lies in memory, copied only where its leading dimensions do not make two, or misaligned."""
    *lead, k = x.shape
    merged: list[tuple[int, int]] = []  # size, stride
    for size, stride in zip(lead, x.stride(), strict=False):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    itemsize = x.itemsize
    is_readable = (k == 0 or x.stride(-1) == 1) and len(merged) <= 2 and is_aligned(x)
    if not is_readable or any(stride * itemsize % ALIGNMENT for _, stride in merged):
        x = x.clone(memory_format=torch.contiguous_format)
        merged = [(math.prod(lead), k)]
    (outer, outer_stride), (inner, inner_stride) = ([(1, 0)] * 2 + merged)[-2:]
    start = x.as_strided((k,), (1,)) if x.numel() else x.new_empty((0,))
    return Operand(start, outer, inner, (outer_stride * itemsize, inner_stride * itemsize))


def match(first: Operand, second: Operand) -> bool:
    """Whether two operands count their rows alike."""
    return (first.outer, first.inner) == (second.outer, second.inner)


def is_aligned(x: Tensor) -> bool:
    """Whether a tensor starts at a multiple of 16 bytes."""
    address = x.storage_offset() * x.itemsize if x.is_meta else x.data_ptr()
    return address % ALIGNMENT == 0


def row_shape(source: Source, row_blocks: int) -> tuple[int, int]:
    """Threads a row and blocks a thread."""
    for most, threads, blocks in ROW_SHAPES:
        if row_blocks <= most:
            return threads, blocks
    raise RuntimeError(
        f"{source.op}: K must be at most {MAX_ROW_BLOCKS * nvfp4.BLOCK_SIZE} where a kernel needs whole rows, "
        f"got {row_blocks * nvfp4.BLOCK_SIZE}"
    )


def quantize(source: Source, x: Tensor, granularity: str, norm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Launches what quantises a source.

    Args:
        source: what is quantised.
        x: the operator's input, for shape, dtype and device.
        granularity: see :data:`nvfp4.Granularity`.
        norm: where the normalised tensor goes too.

    Returns:
        codes, block_scales, global_scale.
    """
    require_hopper(source.op, x)
    packed = allocate_packed(x, granularity)
    k = x.shape[-1]
    rows = x.numel() // k if k else 0  # no columns: nothing but global scales
    if rows == 0:
        packed[2].copy_(nvfp4.global_scale_from_amax(torch.zeros_like(packed[2]), granularity))
        return packed
    row_blocks = k // nvfp4.BLOCK_SIZE
    if rows * row_blocks >= division.LIMIT:
        raise RuntimeError(f"{source.op}: rows times K must be below 2^35, got {rows} x {k}")
    is_pow2 = int(granularity == "tensor_pow2")
    flat = [packed[0].view(-1), packed[1].view(torch.uint8).view(-1), packed[2].view(-1)]
    base = RowsConfig(dtype_name(x), 0, 0, weight=source.weight, norm=norm is not None)
    norm_out = x.new_empty((0,)) if norm is None else norm.view(-1)
    config = _one_launch(source, base, rows, row_blocks, granularity)
    if config is not None:
        kernel = cache.kernel(source.kernel, config)
        kernel(*source.tensors, *flat, norm_out, rows, row_blocks, *source.geometry, source.scalar, is_pow2)
    else:
        _two_launches(source, base, flat, norm_out, rows, row_blocks, is_pow2)
    fresh_weights.wrote(*packed)
    return packed


def _one_launch(source: Source, base: RowsConfig, rows: int, row_blocks: int, granularity: str) -> RowsConfig | None:
    if granularity == "token":
        threads, blocks = row_shape(source, row_blocks)
        return replace(base, threads=threads, blocks=blocks, per_token=True)
    if row_blocks > MAX_ROW_BLOCKS:
        return None
    threads, blocks = row_shape(source, row_blocks)
    at_once = CTA_THREADS // threads
    for cluster, held_rows in source.one_launch:
        if rows <= cluster * at_once * held_rows and blocks * held_rows <= source.held:
            return replace(base, threads=threads, blocks=blocks, rows=held_rows, cluster=cluster)
    return None


def _two_launches(
    source: Source,
    base: RowsConfig,
    flat: list[Tensor],
    norm_out: Tensor,
    rows: int,
    row_blocks: int,
    is_pow2: int,
) -> None:
    num_blocks = rows * row_blocks
    sms = sm_count(norm_out)
    amax_per_sm, flat_per_sm = CTAS_PER_SM_MANY if num_blocks >= LEAST_BLOCKS else CTAS_PER_SM_FEW
    if source.has_statistic:
        amax_per_sm = 2  # a row at a time: latency, not room, is what counts
    most = min(MAX_PARTIALS, amax_per_sm * sms)
    row_division = division.magic(row_blocks)
    factors = norm_out.new_empty((rows if source.has_statistic else 0,), dtype=torch.float32)
    if source.has_statistic:
        threads, blocks = row_shape(source, row_blocks)
        ctas = _multiple_of_four(min(most, math.ceil(rows / (CTA_THREADS // threads))))
        partials = norm_out.new_empty((ctas,), dtype=torch.float32)
        kernel = cache.kernel(source.kernel, replace(base, threads=threads, blocks=blocks, is_partial=True))
        kernel(*source.tensors, partials, factors, norm_out, rows, ctas, row_blocks, *source.geometry, source.scalar)
    else:
        ctas = _multiple_of_four(min(most, math.ceil(num_blocks / CTA_THREADS)))
        partials = norm_out.new_empty((ctas,), dtype=torch.float32)
        kernel = cache.kernel(source.kernel, AmaxConfig(base.dtype))
        kernel(*source.tensors, partials, num_blocks, ctas, row_blocks, *row_division, *source.geometry, source.scalar)
    flat_ctas = min(flat_per_sm * sms, math.ceil(num_blocks / FLAT_THREADS))
    if base.norm:  # quantise what the first launch wrote
        kernel = cache.kernel("sm90.quantize_nvfp4", FlatConfig(base.dtype, early=False))
        operand = as_rows(norm_out.view(rows, -1))
        source = replace(source, first=operand, second=operand)
    else:
        kernel = cache.kernel(source.kernel, FlatConfig(base.dtype, base.weight))
    kernel(
        *source.tensors, partials, factors, *flat, num_blocks, ctas, flat_ctas, row_blocks, *row_division,
        *source.geometry, source.scalar, is_pow2,
    )  # fmt: skip


def _multiple_of_four(ctas: int) -> int:
    """Rounds up: maxima are read four at a time, and a CTA with nothing to do leaves one too."""
    return (ctas + 3) // 4 * 4
