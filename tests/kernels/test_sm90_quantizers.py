"""What ptxas makes of the memory-bound kernels: registers, no spills, wide accesses, no contraction. No GPU needed."""

import functools

import pytest

from dsv4_compile.ops.dispatch.dequantize_nvfp4 import DequantizeConfig
from dsv4_compile.ops.dispatch.expand import ExpandConfig
from dsv4_compile.ops.dispatch.quantizer import CTA_THREADS, ROW_SHAPES, AmaxConfig, FlatConfig, RowsConfig
from dsv4_compile.ops.dispatch.topk_router import LANE_EXPERTS, RouterConfig
from dsv4_compile.ops.kernels.compilation import MachineCode, machine_code

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
