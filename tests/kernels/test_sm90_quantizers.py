"""What ptxas makes of the memory-bound kernels: registers, no spills, wide accesses, no contraction. No GPU needed."""

import functools

import pytest
import torch

from dsv4_compile.nvfp4 import GRANULARITIES
from dsv4_compile.ops.dispatch.dequantize_nvfp4 import DequantizeConfig
from dsv4_compile.ops.dispatch.expand import ExpandConfig
from dsv4_compile.ops.dispatch.interleave import InterleaveConfig
from dsv4_compile.ops.dispatch.quantizer import CTA_THREADS, ROW_SHAPES, AmaxConfig, FlatConfig, RowsConfig, as_rows
from dsv4_compile.ops.dispatch.topk_router import LANE_EXPERTS, RouterConfig
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.compilation import MachineCode, machine_code
from dsv4_compile.ops.registration import CUDA_IMPLEMENTATIONS

DTYPES = ("bfloat16", "float16", "float32")
REGISTERS = 65536  # of a multiprocessor

compiled = functools.cache(machine_code)


def quantizers() -> list[tuple[str, object]]:
    """Every schedule of every source and dtype, and every way in which a row lies in threads."""
    configs: list[tuple[str, object]] = []
    for dtype in DTYPES:
        for op in ("quantize_nvfp4", "swiglu_quantize_nvfp4"):
            configs += [
                (op, AmaxConfig(dtype)),
                (op, FlatConfig(dtype)),
                (op, RowsConfig(dtype, 128, 2, per_token=True)),
                (op, RowsConfig(dtype, 128, 2, cluster=8)),
            ]
        op = "rms_norm_quantize_nvfp4"
        configs += [
            (op, FlatConfig(dtype, weight="float32")),
            (op, RowsConfig(dtype, 128, 2, is_partial=True, weight="float32", norm=True)),
            (op, RowsConfig(dtype, 128, 2, per_token=True, weight="bfloat16", norm=True)),
            (op, RowsConfig(dtype, 128, 2, cluster=16)),
        ]
    configs.append(("quantize_nvfp4", FlatConfig("bfloat16", early=False)))
    for _, threads, blocks in ROW_SHAPES:
        for op in ("quantize_nvfp4", "swiglu_quantize_nvfp4", "rms_norm_quantize_nvfp4"):
            configs.append((op, RowsConfig("bfloat16", threads, blocks, per_token=True)))
            configs.append((op, RowsConfig("bfloat16", threads, blocks)))
    return configs


def check(code: MachineCode, threads: int) -> None:
    """No spills, and at least one CTA fits."""
    assert code.spill_bytes == 0
    assert code.registers * threads <= REGISTERS


@pytest.mark.parametrize(("op", "config"), quantizers(), ids=str)
def test_quantizer(op: str, config: RowsConfig | AmaxConfig | FlatConfig) -> None:
    """Guards against a register array in local memory, narrow accesses, and an fp64 sum that is no longer one."""
    code = compiled(f"sm90.{op}", config)
    check(code, CTA_THREADS)
    assert code.count(r"LDG\.E\.(EF\.)?128") >= 2
    if not isinstance(config, AmaxConfig) and not getattr(config, "is_partial", False):
        assert code.count(r"STG\.E\.64") >= 1  # the codes of a block
    has_sum = op.startswith("rms") and isinstance(config, RowsConfig)
    assert (code.count(r"\bDFMA") > 0) == has_sum
    if config.pdl:
        assert code.count(r"ACQBULK") == 1
    if isinstance(config, RowsConfig) and config.cluster > 1:
        assert code.count(r"UCGABAR_ARV") == 2


@pytest.mark.parametrize("gather", [False, True])
def test_expand(gather: bool) -> None:
    """Guards against stores of less than 16 bytes, which take twice the traffic to the L2."""
    code = compiled("sm90.expand", ExpandConfig(gather))
    check(code, 256)
    assert code.count(r"STG\.E\.128") == 4
    assert code.registers <= 32


@pytest.mark.parametrize(
    "config", [InterleaveConfig(True), InterleaveConfig(True, True), InterleaveConfig(False)], ids=str
)
def test_interleave(config: InterleaveConfig) -> None:
    """Guards against narrow stores, and against lanes that keep their pairs."""
    code = compiled("sm90.interleave", config)
    check(code, 256)
    assert code.count(r"STG\.E\.128") == 4
    assert code.count(r"\bSHFL\.BFLY") == 16
    assert code.registers <= 40


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(dtype: str) -> None:
    """Guards against stores of less than 16 bytes."""
    code = compiled("sm90.dequantize_nvfp4", DequantizeConfig(dtype))
    check(code, 256)
    assert code.count(r"STG\.E\.128") == (8 if dtype == "float32" else 4)


@pytest.mark.parametrize("score_function", ["sqrtsoftplus", "softmax", "sigmoid"])
@pytest.mark.parametrize("lane_experts", LANE_EXPERTS)
def test_router(lane_experts: int, score_function: str) -> None:
    """Guards against scores in local memory, up to 2048 experts, and shuffles where one reduction does."""
    code = compiled("sm90.topk_router", RouterConfig("bfloat16", lane_experts, score_function, bias="float32"))
    check(code, 128)
    assert code.count(r"REDUX") >= 3


def test_exp_is_not_contracted() -> None:
    """Guards against a polynomial of fused multiply-adds, whose last bit differs: as many products as sums.

    Of a silu the exponential has 10 products and 11 sums; a compiler that fused would leave far fewer FADDs.
    """
    code = compiled("sm90.swiglu_quantize_nvfp4", FlatConfig("bfloat16"))
    assert code.count(r"\bFADD\b") >= 11 * 16
    assert code.count(r"\bFMUL\b") >= 10 * 16
    assert code.count(r"MUFU\.EX2") == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rows", [0, 1, 20, 60, 300])
def test_number_of_launches(rows: int, granularity: str) -> None:
    """Guards against a third launch, a second one for few rows or one scale a row, and a kernel that warming misses.

    Under ``cache.recording`` the implementation runs on meta tensors and launches nothing.
    """
    x = torch.empty(rows, 8192, dtype=torch.bfloat16, device="meta")
    ops = torch.ops.dsv4
    for op, arguments in (
        (ops.quantize_nvfp4.default, (x[:, :4096], granularity)),
        (ops.swiglu_quantize_nvfp4.default, (x[:, :2048], x[:, 2048:4096], 10.0, granularity)),
        (ops.rms_norm_quantize_nvfp4.default, (x[:, :4096], x.new_empty(4096), 1e-6, granularity)),
        (ops.rms_norm_quantize_nvfp4.with_norm, (x[:, :4096], None, 1e-6, granularity)),
    ):
        with cache.recording() as recorded:
            parts = CUDA_IMPLEMENTATIONS[op](*arguments)
        is_costly = op is not ops.quantize_nvfp4.default  # stays with one launch for longer
        few = 60 if is_costly else 20
        assert len(recorded) == (0 if rows == 0 else 1 if granularity == "token" or rows <= few else 2)
        assert [(part.shape, part.dtype) for part in parts] == [(fake.shape, fake.dtype) for fake in op(*arguments)]


def test_transposed_groups_are_read_where_they_lie() -> None:
    """Guards against a copy of an activation [groups, T, K] that lies as [T, groups, K], as in a grouped projection."""
    x = torch.empty(1009, 8, 4096, dtype=torch.bfloat16, device="meta").transpose(0, 1)
    operand = as_rows(x)
    assert operand.start.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert (operand.outer, operand.inner, operand.pitches) == (8, 1009, (8192, 65536))
    halves = [as_rows(half) for half in torch.empty(2, 5, 128, dtype=torch.bfloat16).chunk(2, dim=-1)]
    assert [(half.outer, half.inner, half.pitches[1]) for half in halves] == [(1, 10, 256)] * 2
    misaligned = torch.empty(8, 33, dtype=torch.bfloat16)[:, 1:]
    assert as_rows(misaligned).pitches[1] == 64  # copied
