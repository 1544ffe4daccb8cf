"""Compiles what ``pytest -m gpu`` and the benchmarks run, on a machine without a GPU, for one without a compiler.

    DSV4_CACHE_DIR=kernels python -m tests.warm_gpu [--list] [--jobs 2]

The kernels are found on meta tensors at the shapes of the tests. What a test draws at random is covered by a grid of
shapes; a kernel that is missed all the same is named by the test that wants it.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.cli import model_on_meta
from dsv4_compile.demo import CONTEXT, demo_model
from dsv4_compile.ops.dispatch import quantizer
from dsv4_compile.ops.dispatch.interleave import InterleaveConfig
from dsv4_compile.ops.dispatch.moe_combine import DTYPE_NAMES
from dsv4_compile.ops.dispatch.moe_requantize import RequantizeConfig
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.registration import CUDA_IMPLEMENTATIONS
from dsv4_compile.tuning import kernels_of_variant, questions_of
from dsv4_compile.warming import Kernel, compile_all, kernels_of, model_calls
from tests import test_tuning
from tests.integration import test_gpu_model
from tests.kernels import test_sm90_decode, test_sm90_moe, test_sm90_quantizers, test_sm90_wgmma
from tests.ops import (
    test_nvfp4_grouped_mm_gpu,
    test_nvfp4_mm_gpu,
    test_nvfp4_moe_gpu,
    test_quantize_nvfp4,
    test_rms_norm_quantize_nvfp4,
    test_swiglu_quantize_nvfp4,
    test_topk_router,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BENCHMARK_TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
BENCHMARK_SHAPES = ((4096, 4096), (32768, 1024), (7168, 16384))
QUANTIZER_SHAPES = ((1, 4096), (16, 4096), (64, 4096), (256, 4096), (1024, 4096), (16384, 4096), (16384, 7168))
dsv4 = torch.ops.dsv4


def meta(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(rows: int, k: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    scale = meta(rows, k // 16, dtype=torch.float8_e4m3fn)
    return [meta(rows, k // 2)], [scale], [meta(dtype=torch.float32)]


def product_calls() -> Iterator[tuple[Any, ...]]:
    """``nvfp4_mm`` and ``nvfp4_weight_mm``: the tests' own shapes, a grid, and those of the benchmarks."""
    shapes = [(tokens, rows, k) for tokens, rows, k in test_nvfp4_mm_gpu.GPU_SHAPES]
    shapes += [(tokens, (rows,), k) for rows, k in BENCHMARK_SHAPES for tokens in BENCHMARK_TOKENS]
    grid = itertools.product(
        (*range(1, 41), 60, 64, 90, 100, 120, 200, 300, 400), range(8, 720, 32), (256, 512, 1024, 1280)
    )
    shapes += [(tokens, (rows,), k) for tokens, rows, k in grid]
    shapes += [
        (tokens, (rows,), k) for tokens in (1, 3, 7, 70, 100) for rows in (60, 64, 72, 4096) for k in (256, 512, 1024)
    ]
    for tokens, rows, k in shapes:
        parts = [weight(n, k) for n in rows]
        weights = tuple([part[i][0] for part in parts] for i in range(3))
        is_own = len(rows) > 1 or tokens in (1, 7, 64, 70, 1030)
        for out_dtype, has_bias in itertools.product(
            DTYPES[::2] if is_own else DTYPES[:1], (False, True) if is_own else (False,)
        ):
            bias = meta(sum(rows), dtype=torch.float32) if has_bias else None
            a = meta(tokens, k // 2), meta(tokens, k // 16, dtype=torch.float8_e4m3fn)
            yield dsv4.nvfp4_mm.default, *a, meta(dtype=torch.float32), *weights, bias, out_dtype
            yield dsv4.nvfp4_weight_mm.default, meta(tokens, k, dtype=torch.bfloat16), *weights, bias, out_dtype


def quantizer_calls() -> Iterator[tuple[Any, ...]]:
    """Quantisers at the shapes of their tests and benchmarks; ``quantize_nvfp4``, whose tests draw shapes, in every schedule."""
    bf16, _, fp32 = DTYPES
    plain = [(shape, bf16) for shape in test_quantize_nvfp4.GPU_SHAPES]
    for shape in test_quantize_nvfp4.GPU_SHAPES_OF_OTHER_DTYPES:
        plain += [(shape, dtype) for dtype in DTYPES]
    plain += [(tuple(x.shape), x.dtype) for x in test_quantize_nvfp4.layouts().values()]
    plain += [((tokens, k), bf16) for _, k in BENCHMARK_SHAPES for tokens in BENCHMARK_TOKENS]
    for row_blocks, threads, _ in quantizer.ROW_SHAPES:
        at_once = quantizer.CTA_THREADS // threads
        plain += [((rows, 16 * row_blocks), bf16) for rows in (1, at_once + 1, 8 * at_once + 1)]
    gated = [(shape, bf16) for shape in (*test_swiglu_quantize_nvfp4.GPU_SHAPES, *QUANTIZER_SHAPES)]
    gated += [(shape, dtype) for shape in ((300, 256), (4096, 16)) for dtype in DTYPES]
    gated += [((rows, 64), fp32) for rows in (1, 5, 30)]
    normed = [
        (shape, bf16, w)
        for shape in test_rms_norm_quantize_nvfp4.GPU_SHAPES
        for w in test_rms_norm_quantize_nvfp4.GPU_WEIGHTS
    ]
    normed += [(shape, bf16, fp32) for shape in QUANTIZER_SHAPES]
    normed += [((rows, 4096), dtype, fp32) for rows in (2, 300) for dtype in DTYPES[1:]]
    normed += [((rows, 64), fp32, fp32) for rows in (1, 5, 15)]
    for granularity in nvfp4.GRANULARITIES:
        for shape, dtype in plain:
            yield dsv4.quantize_nvfp4.default, meta(*shape, dtype=dtype), granularity
        for shape, dtype in gated:
            yield dsv4.swiglu_quantize_nvfp4.default, *[meta(*shape, dtype=dtype)] * 2, 10.0, granularity
        for shape, dtype, weight_dtype in normed:
            norm_weight = None if weight_dtype is None else meta(shape[-1], dtype=weight_dtype)
            yield dsv4.rms_norm_quantize_nvfp4.default, meta(*shape, dtype=dtype), norm_weight, 1e-6, granularity
            yield dsv4.rms_norm_quantize_nvfp4.with_norm, meta(*shape, dtype=dtype), norm_weight, 1e-6, granularity
    yield dsv4.rms_norm_quantize_nvfp4.with_norm, meta(8192, 256, dtype=fp32), None, 1e-6, "token"


def other_calls() -> Iterator[tuple[Any, ...]]:
    """Router and dequantisation, as their tests call them."""

    def route(experts: int, dtype: torch.dtype, function: str, bias: Any = None, *table: Tensor) -> tuple[Any, ...]:
        given = None if bias is None else meta(experts, dtype=bias)
        return (
            dsv4.topk_router.default, meta(33, experts, dtype=dtype), given, *(table or (None, None)), 1, function, "sum", 1e-20, 1.0,
        )  # fmt: skip

    for experts, function in itertools.product((1, *test_topk_router.GPU_EXPERTS), test_topk_router.SCORE_FUNCTIONS):
        for bias in (None, torch.float32):
            yield route(experts, torch.float32, function, bias)
    for experts, dtype in itertools.product((31, 64), DTYPES):
        yield route(experts, dtype, "sqrtsoftplus", dtype)
        for table_dtype, id_dtype in ((torch.int32, torch.int64), (torch.int64, torch.int32)):
            yield route(experts, dtype, "sqrtsoftplus", None, meta(50, 1, dtype=table_dtype), meta(33, dtype=id_dtype))
    codes, scales, scale = (part[0] for part in weight(64, 256))
    for dtype in DTYPES:
        yield dsv4.dequantize_nvfp4.default, codes, scales, scale, dtype


def recorded(calls: Iterator[tuple[Any, ...]]) -> list[Kernel]:
    with cache.recording() as wanted:
        for op, *arguments in calls:
            CUDA_IMPLEMENTATIONS[op](*arguments)
    return list(wanted)


def tuned_kernels() -> Iterator[Kernel]:
    """The variants that the GPU test of tuning times."""
    for call, question in questions_of(test_tuning.GPU_CALLS).values():
        for name in question.variants:
            yield from kernels_of_variant(call, question, name)


def model_kernels() -> Iterator[Kernel]:
    """The models of the GPU test in each granularity, and V4 Flash at the benchmarks' numbers of tokens."""
    for changes, granularity in itertools.product(test_gpu_model.WIDTHS.values(), nvfp4.GRANULARITIES):
        model = demo_model(**changes).to("meta")
        yield from kernels_of(model_calls(model, {"gsa": granularity}), [CONTEXT])[0]
    yield from kernels_of(model_calls(model_on_meta(None, "every kind")), BENCHMARK_TOKENS)[0]


def all_kernels() -> list[Kernel]:
    """Every kernel, once."""
    wgmma = test_sm90_wgmma
    listed: Sequence[Kernel] = [
        *test_sm90_decode.gpu_kernels(),
        *test_sm90_moe.CONFIGS,
        *(
            ("sm90.moe_requantize", RequantizeConfig(DTYPE_NAMES[dtype], granularity, True))
            for dtype, granularity in itertools.product(DTYPES, nvfp4.GRANULARITIES)
        ),
        *(("sm90.interleave", InterleaveConfig(*kind)) for kind in ((True, False), (True, True), (False, False))),
        *test_nvfp4_moe_gpu.wanted_kernels(),
        *test_nvfp4_grouped_mm_gpu.wanted_kernels(),
        *((f"sm90.{op}", config) for op, config in test_sm90_quantizers.quantizers()),
        *(("sm90.wgmma_w4", config) for config in wgmma.launched()),
    ]
    return list(
        dict.fromkeys(
            [
                *listed,
                *recorded(product_calls()),
                *recorded(quantizer_calls()),
                *recorded(other_calls()),
                *tuned_kernels(),
                *model_kernels(),
            ]
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="count them by name, compile nothing")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    logging.getLogger("dsv4_compile").setLevel(logging.ERROR)
    kernels = all_kernels()
    if arguments.list:
        for name in sorted({name for name, _ in kernels}):
            print(f"{sum(other == name for other, _ in kernels):5} {name}")
        return
    compile_all([kernel for kernel in kernels if cache.find(*kernel) is None], arguments.jobs, Console())
    print(f"{len(kernels)} kernels in {cache.folder()}")


if __name__ == "__main__":
    main()
