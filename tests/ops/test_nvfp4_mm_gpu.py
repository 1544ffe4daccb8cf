"""``nvfp4_mm`` on a GPU, every kernel it may choose, against the CPU kernel's exact sums."""

import importlib

import pytest
import torch
from torch import Tensor

from tests import nvfp4_oracle as oracle
from tests.ops.test_nvfp4_mm import Packed, any_packed, mm

pytestmark = pytest.mark.gpu


def gpu_error(k: int) -> float:
    """Error of a sum of K products on tensor cores, as a share of the sum of their magnitudes: see test_sm90_wgmma.py.

    Twice that: the products are added in any order, and the partial sums of several warps or CTAs again.
    """
    return (k / 16 + 16) * 2.0**-21


def assert_matches_cpu(actual: Tensor, a: Packed, *weights: Packed, bias: Tensor | None = None) -> None:
    """Compares a GPU result with the exact sum, which also gives the sum of magnitudes (no sign bits).

    Both by the CPU kernel's function, run where the result is: its products are exact in fp64 on a GPU too.
    """

    def exactly(operands: list[Packed], bias: Tensor | None) -> Tensor:
        moved = [tuple(part.to(actual.device) for part in parts) for parts in operands]
        lists = (list(parts) for parts in zip(*moved[1:], strict=True))
        return (
            importlib.import_module("dsv4_compile.ops.nvfp4_mm")
            .reference(*moved[0], *lists, None if bias is None else bias.to(actual.device), torch.float32)
            .double()
        )

    unsigned = [(codes & 0x77, block_scales, scale) for codes, block_scales, scale in (a, *weights)]
    exact = exactly([a, *weights], bias)
    magnitude = exactly(unsigned, None if bias is None else bias.abs())
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}[actual.dtype]
    error = magnitude * gpu_error(2 * a[0].shape[-1])
    allowed = error + (exact.abs() + error) * rounding + 2.0**-24 * (actual.dtype == torch.float16)
    wrong = ~((actual.double() - exact).abs() <= allowed)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, first {wrong.nonzero()[:3].tolist()}"


def on_gpu(parts: Packed) -> Packed:
    codes, block_scales, scale = (part.cuda() for part in parts)
    return codes, block_scales, scale


def modest_packed(*lead: int, k: int, scale_shape: tuple[int, ...] = ()) -> Packed:
    """Block scales from 2^-4 to 2^4, so that bf16 and fp16 hold every result."""
    codes, block_scales, scale = any_packed(*lead, k=k, scale_shape=scale_shape)
    block_scales.view(torch.uint8).copy_(torch.randint(0x18, 0x58, block_scales.shape, dtype=torch.uint8))
    return codes, block_scales, scale


# M, the rows of each weight, K: few and many tokens, edges of tiles, and what TMA cannot map (K % 256, N % 8).
GPU_SHAPES = [
    (1, (64,), 256),
    (7, (136, 8), 512),
    (33, (264,), 1024),
    (64, (512, 72, 128), 768),
    (200, (1000,), 1536),
    (300, (384, 16, 8, 64, 256), 512),
    (1030, (2048,), 256),
    (3, (60, 7), 256),
    (70, (64,), 272),
    (5, (1, 2), 16),
]


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_token", [False, True])
@pytest.mark.parametrize(("tokens", "rows", "k"), GPU_SHAPES)
def test_gpu_matches_cpu(tokens: int, rows: tuple[int, ...], k: int, is_token: bool, out_dtype: torch.dtype) -> None:
    """Guards against a kernel chosen for a shape that it does not fit, and a scale on the wrong row or column."""
    a = modest_packed(tokens, k=k, scale_shape=(tokens,) if is_token else ())
    weights = [modest_packed(n, k=k, scale_shape=() if i % 2 else (n,)) for i, n in enumerate(rows)]
    bias = torch.randn(sum(rows)) if is_token else None
    operands = on_gpu(a), *map(on_gpu, weights)
    first, second = (mm(*operands, bias=None if bias is None else bias.cuda(), out_dtype=out_dtype) for _ in range(2))
    oracle.assert_same_bits(first.cpu(), second.cpu())
    assert_matches_cpu(first, a, *weights, bias=bias)


def test_gpu_random_shapes() -> None:
    """Guards against shapes nobody thought of: a hundred, tokens and rows at random, K in steps of 16 or 256."""
    for case in range(100):
        tokens, n = int(torch.randint(1, 400, ())), int(torch.randint(1, 90, ())) * (8 if case % 4 else 1)
        k = int(torch.randint(1, 6, ())) * (256 if case % 3 else 16)
        a, weight = modest_packed(tokens, k=k), modest_packed(n, k=k)
        assert_matches_cpu(mm(on_gpu(a), on_gpu(weight), out_dtype=torch.bfloat16), a, weight)


def test_gpu_strides_and_ranks() -> None:
    """Guards against bytes read in storage order: a transposed rank-3 activation, sliced weights."""
    a = modest_packed(3, 40, k=512, scale_shape=(3, 40))
    weight = modest_packed(96, k=1024)
    codes, block_scales, scale = on_gpu(weight)
    sliced = codes[::2, 256:], block_scales[::2, 32:], scale
    transposed = tuple(part.transpose(0, 1) for part in on_gpu(a))
    flat = tuple(part.transpose(0, 1).flatten(0, 1) for part in a)
    actual = mm(transposed, sliced, out_dtype=torch.bfloat16)
    assert actual.shape == (40, 3, 48)
    assert_matches_cpu(actual.flatten(0, 1), flat, (weight[0][::2, 256:], weight[1][::2, 32:], weight[2]))


@pytest.mark.parametrize("shape", [(0, 64, 256), (3, 0, 256), (3, 64, 0)])
def test_gpu_empty(shape: tuple[int, int, int]) -> None:
    """Guards against a launch of no CTAs, and against a sum of nothing that is not written."""
    tokens, n, k = shape
    y = mm(on_gpu(any_packed(tokens, k=k)), on_gpu(any_packed(n, k=k)))
    assert y.shape == (tokens, n)
    assert not y.any()


@pytest.mark.parametrize("tokens", [5, 60, 300])
def test_gpu_non_finite_row(tokens: int) -> None:
    """Guards against a NaN that is lost, or that leaves its row."""
    a, weight = modest_packed(tokens, k=512), on_gpu(modest_packed(264, k=512))
    before = mm(on_gpu(a), weight)
    a[1].view(torch.uint8)[3, 17] = 0x7F
    a[0][3, 17 * 8 : 18 * 8] = 0
    after = mm(on_gpu(a), weight)
    assert after[3].isnan().all()
    after[3] = before[3]
    oracle.assert_same_bits(after.cpu(), before.cpu())


@pytest.mark.parametrize(("tokens", "k"), [(2, 512), (90, 512), (90, 272)])
def test_gpu_graph_without_sync(tokens: int, k: int) -> None:
    """Guards against a host read, and against a graph whose replay computes something else."""
    a, weight = on_gpu(modest_packed(tokens, k=k)), on_gpu(modest_packed(64, k=k))
    eager = mm(a, weight, out_dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mm(a, weight, out_dtype=torch.bfloat16)
        y.fill_(-1)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    oracle.assert_same_bits(y.cpu(), eager.cpu())
