"""``nvfp4_mm``: the product, bit for bit against integer arithmetic, and what one row may know of another."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dsv4_compile.nvfp4 import GRANULARITIES
from dsv4_compile.ops import dequantize_nvfp4, nvfp4_mm, quantize_nvfp4
from tests import nvfp4_oracle as oracle

OP = torch.ops.dsv4.nvfp4_mm.default
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema fails on fp8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAN, INF = math.nan, math.inf

Packed = tuple[Tensor, Tensor, Tensor]


def any_packed(*lead: int, k: int = 64, scale_shape: tuple[int, ...] = ()) -> Packed:
    """Any codes and finite block scales, all magnitudes mixed in one row; global scales no powers of two."""
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8)
    block_scales = torch.randint(0, 127, (*lead, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes, block_scales, torch.rand(scale_shape) * 1e-3 + 1e-5


def mm(a: Packed, *weights: Packed, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32) -> Tensor:
    codes, block_scales, global_scales = (list(parts) for parts in zip(*weights, strict=True))
    return nvfp4_mm(*a, codes, block_scales, global_scales, bias, out_dtype)


def expected(a: Packed, *weights: Packed, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """The oracle's product of 2-D operands."""
    bias64 = None if bias is None else oracle.as_float64(bias)
    return oracle.to_dtype(oracle.mm(oracle.as_packed(a), [oracle.as_packed(w) for w in weights], bias64), out_dtype)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
@pytest.mark.parametrize("a_scale", [(), (5,)], ids=["tensor", "token"])
def test_matches_reference(a_scale: tuple[int, ...], bias_dtype: torch.dtype | None, out_dtype: torch.dtype) -> None:
    """Guards against another order of sum, alpha and bias, a second rounding, and an alpha on the wrong columns.

    Three weights: one global scale, one for each of two segments, one for each row.
    """
    a = any_packed(5, scale_shape=a_scale)
    weights = any_packed(7), any_packed(6, scale_shape=(2,)), any_packed(3, scale_shape=(3,))
    bias = None if bias_dtype is None else torch.randn(16).to(bias_dtype)
    actual = mm(a, *weights, bias=bias, out_dtype=out_dtype)
    assert actual.shape == (5, 16)
    oracle.assert_same_bits(actual, expected(a, *weights, bias=bias, out_dtype=out_dtype))


@settings(max_examples=40)
@given(a=oracle.activations(torch.bfloat16, max_blocks=1), b=oracle.activations(torch.bfloat16, max_blocks=1))
def test_matches_reference_for_any_values(a: Tensor, b: Tensor) -> None:
    """Guards against a sum that is not exact: blocks of all magnitudes, as quantised from any bf16 values."""
    for granularity in GRANULARITIES:
        quantized = quantize_nvfp4(a, granularity), quantize_nvfp4(b)
        oracle.assert_same_bits(mm(*quantized), expected(*quantized))


def test_sum_is_exact() -> None:
    """Guards against fp32 accumulation: 2688 * 2688 * 8 + 2^-20 - 2688 * 2688 * 8 = 2^-20, 43 bits below.

    Codes 6 with scale 448 are 2688; code 0.5 with scale 2^-9 is 2^-10, its square 2^-20.
    """
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    codes[:, :8] = 0x77  # 16 elements of 6
    codes[1, :8] = torch.tensor([0x77] * 4 + [0xFF] * 4, dtype=torch.uint8)  # 8 of 6, then 8 of -6
    codes[:, 8] = 0x01  # block 1: 0.5
    block_scales = torch.tensor([[448.0, 2.0**-9]] * 2).to(torch.float8_e4m3fn)
    packed = codes, block_scales, torch.ones(())
    a, b = [part[:1] if part.dim() else part for part in packed], [part[1:] if part.dim() else part for part in packed]
    assert mm(tuple(a), tuple(b)).item() == 2.0**-20


def test_known_values() -> None:
    """Guards against global scales that are divided by, or a bias that is scaled.

    a: code 3 (5), block scale 2, gsa 0.5; b rows: codes 4 (6) and -1.5 (11), block scale 8; gsb 0.25 and 4.
    Sum (3 * 2)(4 * 8) = 192 and (3 * 2)(-1.5 * 8) = -72; times 0.125 and 2: 24 and -144; plus bias 1 and 2.
    """
    a = (
        torch.tensor([[5, *[0] * 7]], dtype=torch.uint8),
        torch.tensor([[2.0]]).to(torch.float8_e4m3fn),
        torch.tensor(0.5),
    )
    b_codes = torch.tensor([[6, *[0] * 7], [11, *[0] * 7]], dtype=torch.uint8)
    b = b_codes, torch.tensor([[8.0], [8.0]]).to(torch.float8_e4m3fn), torch.tensor([0.25, 4.0])
    assert mm(a, b).tolist() == [[24.0, -144.0]]
    assert mm(a, b, bias=torch.tensor([1.0, 2.0])).tolist() == [[25.0, -142.0]]
    assert mm(a, b, out_dtype=torch.bfloat16).tolist() == [[24.0, -144.0]]


def test_rounds_once_to_bf16() -> None:
    """Guards against a bias added in bf16: 256 + 1 + 2^-8 rounds to 258 at once, 256 + 1 alone ties down to 256."""
    a = (
        torch.tensor([[2, *[0] * 7]], dtype=torch.uint8),
        torch.tensor([[1.0]]).to(torch.float8_e4m3fn),
        torch.tensor(1.0),
    )
    b = a[0], torch.tensor([[256.0]]).to(torch.float8_e4m3fn), torch.tensor(1.0)
    assert mm(a, b, bias=torch.tensor([1.00390625]), out_dtype=torch.bfloat16).item() == 258.0
    assert mm(a, b, bias=torch.tensor([1.0]), out_dtype=torch.bfloat16).item() == 256.0


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (3, 1, 2), (0,), (2, 0)])
@pytest.mark.parametrize("is_token", [False, True])
def test_leading_shapes(lead: tuple[int, ...], is_token: bool) -> None:
    """Guards against a global scale a row that is matched to the wrong row of a rank-3 activation."""
    a = any_packed(*lead, scale_shape=lead if is_token else ())
    b = any_packed(5)
    rows = math.prod(lead)
    flat = a[0].reshape(rows, 32), a[1].reshape(rows, 4), a[2].reshape(rows) if is_token else a[2]
    actual = mm(a, b)
    assert actual.is_contiguous()
    oracle.assert_same_bits(actual, expected(flat, b).view(*lead, 5))


def test_no_columns() -> None:
    """Guards against a reshape to [-1, 0], which is ambiguous."""
    assert mm(any_packed(2, 3), any_packed(0)).shape == (2, 3, 0)
    a, b = any_packed(3), any_packed(4)
    oracle.assert_same_bits(mm(a, any_packed(0), b), mm(a, b))


def test_weights_side_by_side_equal_single_calls() -> None:
    """Guards against a merged call that is not what its parts are, column by column."""
    a, weights = any_packed(4), [any_packed(3), any_packed(4, scale_shape=(2,))]
    bias = torch.randn(7)
    apart = [mm(a, weight, bias=part) for weight, part in zip(weights, bias.split([3, 4]), strict=True)]
    oracle.assert_same_bits(mm(a, *weights, bias=bias), torch.cat(apart, dim=1))


def test_weight_larger_than_a_chunk_of_the_cpu_kernel() -> None:
    """Guards against an error at the seam of two chunks: a full 4096 x 4096 weight times 64 rows, against float64."""
    a, b = any_packed(64, k=4096, scale_shape=(64,)), any_packed(4096, k=4096, scale_shape=(4096,))
    actual = mm(a, b)
    left = dequantize_nvfp4(a[0], a[1], torch.ones(()), torch.float32).double()
    for start in range(0, 4096, 1024):
        rows = slice(start, start + 1024)
        right = dequantize_nvfp4(b[0][rows], b[1][rows], torch.ones(()), torch.float32).double()
        alpha = a[2][:, None] * b[2][rows]
        assert torch.equal(actual[:, rows], (left @ right.T).float() * alpha)


@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,)])
@pytest.mark.parametrize("is_token", [False, True])
def test_opcheck(lead: tuple[int, ...], is_token: bool) -> None:
    """Guards against a fake that differs from the kernel: several weights, segments, bias, non-contiguous operands."""
    a = any_packed(*lead, scale_shape=lead if is_token else ())
    first, second = any_packed(4), any_packed(6, scale_shape=(2,))
    lists = [[x, y] for x, y in zip(first, second, strict=True)]
    torch.library.opcheck(OP, (*a, *lists, torch.randn(10), torch.bfloat16), test_utils=OPCHECKS)


def test_non_contiguous() -> None:
    """Guards against bytes read in storage order, for activation and weight."""
    a, b = any_packed(8, k=128), any_packed(10, k=128)
    a, b = ((codes[::2, 32:], block_scales[::2, 4:], scale) for codes, block_scales, scale in (a, b))
    oracle.assert_same_bits(mm(a, b), expected(a, b))
    torch.library.opcheck(OP, (*a, *([part] for part in b), None, torch.float32), test_utils=OPCHECKS)


def test_leaves_its_inputs_alone() -> None:
    """Guards against a kernel that expands in place (opcheck's test_schema, which would tell, fails on fp8)."""
    a, weights, bias = any_packed(3), [any_packed(4), any_packed(2)], torch.randn(6)
    tensors = [*a, *itertools.chain(*weights), bias]
    before = [tensor.clone() for tensor in tensors]
    mm(a, *weights, bias=bias)
    for tensor, clone in zip(tensors, before, strict=True):
        oracle.assert_same_bits(tensor, clone)


A, B = any_packed(2, 3), any_packed(4)


def replace(parts: Packed, index: int, value: Tensor) -> Packed:
    codes, block_scales, global_scale = (value if i == index else part for i, part in enumerate(parts))
    return codes, block_scales, global_scale


@pytest.mark.parametrize(
    ("a", "weights", "bias", "out_dtype", "message"),
    [
        (replace(A, 0, A[0].int()), [B], None, torch.float32, "a_codes must be uint8, got int32"),
        (
            replace(A, 1, A[1].float()),
            [B],
            None,
            torch.float32,
            "a_block_scales must be float8_e4m3fn, got float32",
        ),
        (
            replace(A, 2, torch.ones(2)),
            [B],
            None,
            torch.float32,
            r"a_global_scale must be 0-d or one a row \(2, 3\), got shape \(2,\)",
        ),
        (
            replace(A, 2, torch.ones(5)),
            [B],
            None,
            torch.float32,
            r"a_global_scale must be 0-d, one a matrix, or segments that divide the rows of a_codes \(2, 3, 32\), "
            r"got shape \(5,\)",
        ),
        (A, [replace(B, 1, B[1].float())], None, torch.float32, "b_block_scales must be float8_e4m3fn, got float32"),
        (
            A,
            [B, any_packed(4, k=32)],
            None,
            torch.float32,
            r"b_codes must be \[N, 32\] as a_codes has that many bytes a row, got shape \(4, 16\)",
        ),
        (
            A,
            [any_packed(2, 4)],
            None,
            torch.float32,
            r"b_codes must be \[N, 32\] as a_codes has that many bytes a row, got shape \(2, 4, 32\)",
        ),
        (
            A,
            [replace(B, 2, torch.ones(3))],
            None,
            torch.float32,
            r"b_global_scale must be 0-d, one a matrix, or segments that divide the rows of b_codes \(4, 32\), "
            r"got shape \(3,\)",
        ),
        (A, [B], torch.zeros(5), torch.float32, r"bias must have shape \(4,\), got \(5,\)"),
        (A, [B, B], torch.zeros(4), torch.float32, r"bias must have shape \(8,\), got \(4,\)"),
        (A, [B], torch.zeros(4).double(), torch.float32, "bias must be bfloat16 or float16 or float32, got float64"),
        (A, [B], None, torch.int32, "out_dtype must be a float dtype, got torch.int32"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects(
    a: Packed, weights: list[Packed], bias: Tensor | None, out_dtype: torch.dtype, message: str, device: str
) -> None:
    """Guards against operands that do not belong together, multiplied without a word."""
    moved = [tuple(part.to(device) for part in weight) for weight in weights]
    bias = None if bias is None else bias.to(device)
    with pytest.raises(RuntimeError, match=f"^nvfp4_mm: {message}$"):
        mm(tuple(part.to(device) for part in a), *moved, bias=bias, out_dtype=out_dtype)


def test_rejects_lists_of_different_lengths() -> None:
    """Guards against a weight that is dropped by zip."""
    message = r"^nvfp4_mm: b_codes, b_block_scales and b_global_scales must be lists of one length > 0, got "
    with pytest.raises(RuntimeError, match=message + "2, 1, 1$"):
        nvfp4_mm(*A, [B[0], B[0]], [B[1]], [B[2]])
    with pytest.raises(RuntimeError, match=message + "0, 0, 0$"):
        nvfp4_mm(*A, [], [], [])


def quantized_linear(x: Tensor, weights: list[Packed], granularity: str) -> Tensor:
    return mm(quantize_nvfp4(x, granularity), *weights, out_dtype=torch.bfloat16)


@pytest.mark.parametrize(("backend", "granularity"), [("aot_eager", "token"), ("inductor", "tensor")])
def test_compiles(backend: str, granularity: str) -> None:
    """Guards against a graph break, and against a second compilation for another number of rows.

    Under Inductor too, which may hand an operator an input of other strides than eager mode has.
    """
    counter = CompileCounterWithBackend(backend)
    weights = [any_packed(4), any_packed(6, scale_shape=(2,))]
    compiled = torch.compile(lambda x: quantized_linear(x, weights, granularity), fullgraph=True, backend=counter)
    for rows in (5, 9):
        x = torch.randn(rows, 2, 64, dtype=torch.bfloat16).transpose(0, 1)
        torch._dynamo.mark_dynamic(x, 1)
        oracle.assert_same_bits(compiled(x), quantized_linear(x, weights, granularity))
    assert counter.frame_count == 1


@settings(max_examples=40)
@given(x=oracle.activations(torch.bfloat16), companion=oracle.activations(torch.bfloat16, finite=False))
def test_token_row_never_depends_on_its_batch(x: Tensor, companion: Tensor) -> None:
    """Guards against any value taken across rows, whatever the companions hold, NaN included."""
    columns = min(x.shape[1], companion.shape[1])
    x, companion = x[:, :columns], companion[:, :columns]
    weights = [quantize_nvfp4(torch.linspace(-1, 1, 4 * columns).view(4, columns))]
    together = quantized_linear(torch.cat([companion, x]), weights, "token")[companion.shape[0] :]
    oracle.assert_same_bits(together, quantized_linear(x, weights, "token"))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**16), ratios=st.lists(st.floats(1 / 14336, 1), min_size=1, max_size=4))
def test_tensor_pow2_row_does_not_depend_on_its_batch(seed: int, ratios: list[float]) -> None:
    """Guards against a row whose output changes with its neighbours while its block scales stay normal in E4M3.

    Range, see nvfp4.quantize: each block's largest element is at least 1/14336 of the batch's.
    """
    generator = torch.Generator().manual_seed(seed)
    largest = torch.rand((), generator=generator).item() + 1
    row = torch.empty(len(ratios), 16).uniform_(-1, 1, generator=generator)
    row[:, 3] = 1
    row = (row * torch.tensor(ratios)[:, None] * (largest * 1.000001)).view(1, -1)
    companions = torch.empty(3, row.shape[1]).uniform_(-largest, largest, generator=generator)
    companions[1, 5] = -largest * 1.000001
    weights = [quantize_nvfp4(torch.randn(8, row.shape[1], generator=generator))]
    together, alone = (mm(quantize_nvfp4(x, "tensor_pow2"), *weights)[-1] for x in (torch.cat([companions, row]), row))
    oracle.assert_same_bits(together, alone)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_row_is_nan_and_others_are_untouched(value: float, granularity: str) -> None:
    """Guards against silent zeros in the bad row and against any changed bit in another: also where the weight is 0."""
    weight = torch.randn(8, 64)
    weight[3] = 0
    weights = [quantize_nvfp4(weight), quantize_nvfp4(torch.zeros(2, 64))]
    x = torch.randn(3, 4, 64, dtype=torch.bfloat16)
    x[1, 2, 33] = 0
    before = quantized_linear(x, weights, granularity)
    assert before.isfinite().all()
    x[1, 2, 33] = value
    after = quantized_linear(x, weights, granularity)
    assert after[1, 2].isnan().all()
    after[1, 2] = before[1, 2]
    oracle.assert_same_bits(after, before)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_give_zeros(granularity: str) -> None:
    """Guards against 0 / 0 for an activation, a row or a weight of zeros."""
    x, weight = torch.randn(3, 32), torch.randn(4, 32)
    x[1], weight[2] = 0, 0
    y = mm(quantize_nvfp4(x, granularity), quantize_nvfp4(weight))
    assert (y == 0).nonzero().tolist() == [[0, 2], [1, 0], [1, 1], [1, 2], [1, 3], [2, 2]]
    zeros = mm(quantize_nvfp4(torch.zeros(3, 32), granularity), quantize_nvfp4(torch.zeros(4, 32)))
    assert zeros.count_nonzero() == 0
