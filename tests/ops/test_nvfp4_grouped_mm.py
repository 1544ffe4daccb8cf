"""``nvfp4_grouped_mm``: which row meets which weight, bit for bit against integer arithmetic."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsv4_compile import nvfp4
from dsv4_compile.nvfp4 import GRANULARITIES
from dsv4_compile.ops import dequantize_nvfp4, nvfp4_grouped_mm, nvfp4_mm, quantize_nvfp4
from tests import nvfp4_oracle as oracle

OP = torch.ops.dsv4.nvfp4_grouped_mm.default
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema fails on fp8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPS, ROWS, COLUMNS = 6, 11, 10
# Groups 0, 2 and 5 are empty, rows 9 and 10 belong to none.
OFFSETS = torch.tensor([0, 3, 3, 4, 9, 9], dtype=torch.int32)
GROUP_OF_ROW = [1, 1, 1, 3, 4, 4, 4, 4, 4]

Packed = tuple[Tensor, Tensor, Tensor]


def any_packed(*lead: int, k: int = 64, scale_shape: tuple[int, ...] = ()) -> Packed:
    """Any codes and finite block scales, all magnitudes mixed in one row; global scales no powers of two."""
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8)
    block_scales = torch.randint(0, 127, (*lead, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes, block_scales, torch.rand(scale_shape) * 1e-3 + 1e-5


def select(packed: Packed, index: Any) -> Packed:
    """One matrix, or some rows, with their global scales if they have their own."""
    codes, block_scales, global_scale = packed
    return codes[index], block_scales[index], global_scale[index] if global_scale.dim() else global_scale


def expected(a: Packed, b: Packed, out_dtype: torch.dtype) -> Tensor:
    """The oracle's product of two matrices."""
    return oracle.to_dtype(oracle.mm(oracle.as_packed(a), [oracle.as_packed(b)]), out_dtype)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("b_scale", [(), (GROUPS,), (GROUPS, 2)], ids=["one", "group", "segments"])
@pytest.mark.parametrize("a_scale", [(), (ROWS,)], ids=["tensor", "token"])
def test_matches_reference(a_scale: tuple[int, ...], b_scale: tuple[int, ...], out_dtype: torch.dtype) -> None:
    """Guards against a weight, or one of its global scales, that is the neighbour's: row by row, empty groups between."""
    a, b = any_packed(ROWS, scale_shape=a_scale), any_packed(GROUPS, COLUMNS, scale_shape=b_scale)
    actual = nvfp4_grouped_mm(*a, *b, OFFSETS, out_dtype)
    rows = [expected(select(a, [row]), select(b, group), out_dtype) for row, group in enumerate(GROUP_OF_ROW)]
    oracle.assert_same_bits(actual, torch.cat([*rows, torch.zeros(2, COLUMNS, dtype=out_dtype)]))


@pytest.mark.parametrize("b_scale", [(), (3,), (3, 5)], ids=["one", "group", "segments"])
@pytest.mark.parametrize("a_scale", [(), (3, 4)], ids=["tensor", "token"])
def test_static_groups_match_reference(a_scale: tuple[int, ...], b_scale: tuple[int, ...]) -> None:
    """Guards against bytes read in storage order: the groups as a view [G, M, K/2] of [M, G, K/2], as o_a_proj has them."""
    codes, block_scales, _ = any_packed(4, 3)
    a = codes.transpose(0, 1), block_scales.transpose(0, 1), torch.rand(tuple(reversed(a_scale))).t() * 1e-3
    assert not a[0].is_contiguous()
    b = any_packed(3, COLUMNS, scale_shape=b_scale)
    actual = nvfp4_grouped_mm(*a, *b, out_dtype=torch.float32)
    assert actual.is_contiguous()
    groups = [expected(select(a, group), select(b, group), torch.float32) for group in range(3)]
    oracle.assert_same_bits(actual, torch.stack(groups))


def test_offsets_mean_what_they_mean_to_torch() -> None:
    """Guards against offsets read as starts or counts: torch's grouped_mm of the dequantised operands.

    Powers of two as global scales make both operands exact in bf16. torch adds K = 64 terms in fp32 and rounds to
    bf16 once; 2^-8 for that rounding and 64 * 2^-24 of the sum of magnitudes for the sums.
    """
    a, b = quantize_nvfp4(torch.randn(9, 64), "tensor_pow2"), quantize_nvfp4(torch.randn(GROUPS, 16, 64), "tensor_pow2")
    left, right = dequantize_nvfp4(*a), dequantize_nvfp4(*b)
    theirs = F.grouped_mm(left, right.transpose(1, 2), offs=OFFSETS)
    ours = nvfp4_grouped_mm(*a, *b, OFFSETS)
    magnitudes = torch.stack([right[group].abs() @ left[row].abs() for row, group in enumerate(GROUP_OF_ROW)])
    error = (theirs.double() - ours.double()).abs()
    assert (error <= 2.0**-8 * ours.abs() + 2.0**-18 * magnitudes).all()


def test_known_values() -> None:
    """Guards against global scales that are divided by: 3 * 2 times 4 * 8 is 192, times 0.5 * 0.25 and 0.5 * 4."""
    a = (
        torch.tensor([[5, *[0] * 7]] * 3, dtype=torch.uint8),
        torch.full((3, 1), 2.0).to(torch.float8_e4m3fn),
        torch.tensor(0.5),
    )
    b_codes = torch.tensor([6, *[0] * 7], dtype=torch.uint8).expand(2, 1, 8)
    b = b_codes, torch.full((2, 1, 1), 8.0).to(torch.float8_e4m3fn), torch.tensor([0.25, 4.0])
    assert nvfp4_grouped_mm(*a, *b, torch.tensor([1, 2], dtype=torch.int32)).tolist() == [[24.0], [384.0], [0.0]]


@pytest.mark.parametrize("ends", [[0, 0, 0], [7, 7, 7], [0, 0, 7], [1, 1, 2]])
def test_empty_groups(ends: list[int]) -> None:
    """Guards against rows that are left uninitialised, or that go to an empty group."""
    a, b = any_packed(7), any_packed(3, 5, scale_shape=(3,))
    actual = nvfp4_grouped_mm(*a, *b, torch.tensor(ends, dtype=torch.int32), torch.float32)
    start = 0
    for group, end in enumerate(ends):
        oracle.assert_same_bits(actual[start:end], nvfp4_mm(*select(a, slice(start, end)), *([x] for x in select(b, group)), out_dtype=torch.float32))  # fmt: skip
        start = end
    assert actual[start:].eq(0).all()


def test_expands_only_groups_that_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a CPU kernel that expands 256 experts for one token."""
    seen = []
    matmul = nvfp4.matmul

    def recording(a: Tensor, a_scale: Tensor, b_codes: Tensor, *rest: Tensor) -> Tensor:
        seen.append(b_codes.data_ptr())
        return matmul(a, a_scale, b_codes, *rest)

    monkeypatch.setattr(nvfp4, "matmul", recording)
    b = any_packed(GROUPS, COLUMNS)
    nvfp4_grouped_mm(*any_packed(ROWS), *b, OFFSETS)
    assert seen == [b[0][group].data_ptr() for group in (1, 3, 4)]


@pytest.mark.parametrize(
    ("a_lead", "groups", "columns", "ends"),
    [
        ((0,), 2, 4, [0, 0]),
        ((3,), 0, 4, []),
        ((3,), 2, 0, [1, 3]),
        ((2, 0), 2, 4, None),
        ((0, 3), 0, 4, None),
        ((2, 3), 2, 0, None),
    ],
)
def test_nothing_to_do(a_lead: tuple[int, ...], groups: int, columns: int, ends: list[int] | None) -> None:
    """Guards against a failure where there are no rows, groups or columns."""
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    args = (*any_packed(*a_lead), *any_packed(groups, columns), offsets, torch.bfloat16)
    actual = nvfp4_grouped_mm(*args)
    assert actual.shape == (*a_lead, columns)
    assert actual.eq(0).all()
    torch.library.opcheck(OP, args, test_utils=OPCHECKS)


@pytest.mark.parametrize("is_token", [False, True])
@pytest.mark.parametrize("is_static", [False, True])
def test_opcheck(is_static: bool, is_token: bool) -> None:
    """Guards against a fake that differs from the kernel: both forms, segments, non-contiguous operands."""
    lead = (GROUPS, ROWS) if is_static else (ROWS,)
    codes, block_scales, scale = any_packed(*lead, k=128, scale_shape=lead if is_token else ())
    a = codes[..., 32:], block_scales[..., 4:], scale
    b_codes, b_block_scales, b_scale = any_packed(COLUMNS, GROUPS, scale_shape=(GROUPS, 2))
    b = b_codes.transpose(0, 1), b_block_scales.transpose(0, 1), b_scale
    args = (*a, *b, None if is_static else OFFSETS, torch.bfloat16)
    torch.library.opcheck(OP, args, test_utils=OPCHECKS)
    dense = [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]
    oracle.assert_same_bits(OP(*args), OP(*dense))


def test_leaves_its_inputs_alone() -> None:
    """Guards against a kernel that expands in place (opcheck's test_schema, which would tell, fails on fp8)."""
    tensors = [*any_packed(ROWS), *any_packed(GROUPS, COLUMNS), OFFSETS.clone()]
    before = [tensor.clone() for tensor in tensors]
    nvfp4_grouped_mm(*tensors)
    for tensor, clone in zip(tensors, before, strict=True):
        oracle.assert_same_bits(tensor, clone)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_row_is_nan_and_others_are_untouched(value: float, granularity: str) -> None:
    """Guards against silent zeros in the bad row, a changed bit in another, and NaN in rows of no group."""
    b = any_packed(GROUPS, COLUMNS, scale_shape=(GROUPS,))
    x = torch.randn(ROWS, 64, dtype=torch.bfloat16)
    x[[5, 10], 33] = 0
    before = nvfp4_grouped_mm(*quantize_nvfp4(x, granularity), *b, OFFSETS)
    x[[5, 10], 33] = value
    after = nvfp4_grouped_mm(*quantize_nvfp4(x, granularity), *b, OFFSETS)
    assert before.isfinite().all()
    assert after[5].isnan().all()
    after[5] = before[5]
    oracle.assert_same_bits(after, before)


A, A3 = any_packed(4), any_packed(2, 3)
B = any_packed(2, 6)
ENDS = torch.tensor([1, 4], dtype=torch.int32)


def replace(parts: Packed, index: int, value: Tensor) -> Packed:
    codes, block_scales, global_scale = (value if i == index else part for i, part in enumerate(parts))
    return codes, block_scales, global_scale


@pytest.mark.parametrize(
    ("a", "b", "offsets", "out_dtype", "message"),
    [
        (replace(A, 0, A[0].int()), B, ENDS, torch.float32, "a_codes must be uint8, got int32"),
        (A, replace(B, 1, B[1].float()), ENDS, torch.float32, "b_block_scales must be float8_e4m3fn, got float32"),
        (replace(A, 2, torch.ones(2)), B, ENDS, torch.float32, r"a_global_scale must be 0-d or one a row \(4,\), got shape \(2,\)"),
        (replace(A3, 2, torch.ones(2)), B, None, torch.float32, r"a_global_scale must be 0-d or one a row \(2, 3\), got shape \(2,\)"),
        (A, replace(B, 2, torch.ones(2, 4)), ENDS, torch.float32, r"b_global_scale must be 0-d, one a matrix, or segments that divide the rows of b_codes \(2, 6, 32\), got shape \(2, 4\)"),
        (A, any_packed(2, 6, k=32), ENDS, torch.float32, r"b_codes must be \[E, N, 32\] as a_codes has that many bytes a row, got shape \(2, 6, 16\)"),
        (A, any_packed(6), ENDS, torch.float32, r"b_codes must be \[E, N, 32\] as a_codes has that many bytes a row, got shape \(6, 32\)"),
        (A, B, None, torch.float32, r"a_codes must be \[2, M, K/2\], one matrix a group of b_codes, when there are no offsets, got shape \(4, 32\)"),
        (any_packed(3, 3), B, None, torch.float32, r"a_codes must be \[2, M, K/2\], one matrix a group of b_codes, when there are no offsets, got shape \(3, 3, 32\)"),
        (A3, B, ENDS, torch.float32, r"a_codes must be \[S, K/2\] with offsets, got \(2, 3, 32\)"),
        (A, B, ENDS.long(), torch.float32, "offsets must be int32, got int64"),
        (A, B, ENDS[:1], torch.float32, r"offsets must have shape \(2,\), got \(1,\)"),
        (A, B, ENDS, torch.int32, "out_dtype must be a float dtype, got torch.int32"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects(
    a: Packed, b: Packed, offsets: Tensor | None, out_dtype: torch.dtype, message: str, device: str
) -> None:
    """Guards against operands that do not belong together, multiplied without a word."""
    tensors = [None if x is None else x.to(device) for x in (*a, *b, offsets)]
    with pytest.raises(RuntimeError, match=f"^nvfp4_grouped_mm: {message}$"):
        nvfp4_grouped_mm(*tensors, out_dtype)


@pytest.mark.parametrize("ends", [[3, 2], [-1, 4], [1, 5]])
def test_rejects_wrong_offsets_on_the_cpu(ends: list[int]) -> None:
    """Guards against rows multiplied twice, or read from beyond the end."""
    message = rf"^nvfp4_grouped_mm: offsets must be non-decreasing within 0\.\.4, got \[{ends[0]}, {ends[1]}\]$"
    with pytest.raises(RuntimeError, match=message):
        nvfp4_grouped_mm(*A, *B, torch.tensor(ends, dtype=torch.int32))


@pytest.mark.parametrize(("backend", "is_static"), [("aot_eager", True), ("inductor", False)])
def test_compiles(backend: str, is_static: bool) -> None:
    """Guards against a graph break, and against a second compilation for another number of rows or other groups."""
    counter = CompileCounterWithBackend(backend)
    b = any_packed(3, COLUMNS, scale_shape=(3,))

    def run(x: Tensor, offsets: Tensor | None) -> Tensor:
        codes, block_scales, scale = quantize_nvfp4(x, "token")
        if offsets is None:
            codes, block_scales, scale = codes.transpose(0, 1), block_scales.transpose(0, 1), scale.transpose(0, 1)
        return nvfp4_grouped_mm(codes, block_scales, scale, *b, offsets)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for rows in (5, 9):
        x = torch.randn(rows, *((3,) if is_static else ()), 64, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        offsets = None if is_static else torch.tensor([2, 2, rows - 1], dtype=torch.int32)
        oracle.assert_same_bits(compiled(x, offsets), run(x, offsets))
    assert counter.frame_count == 1
