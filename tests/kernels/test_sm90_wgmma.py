"""``sm90.wgmma_w4``: every kind of variant compiled here and its machine code read; run on a GPU against float64.

Bound of a product, used throughout: both operands are exact in 16 bits, and a wgmma adds 16 products of a step to the sum
with at least 23 bits of the largest, truncated; so the sum is off by at most ``(K / 16 + 16) 2^-22 sum |x w|``.
"""

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dsv4_compile.ops.dispatch.grouped_wgmma import config_of as grouped_config
from dsv4_compile.ops.dispatch.grouped_wgmma import grouped_wgmma, partial_amax_size
from dsv4_compile.ops.dispatch.wgmma_choice import VARIANTS
from dsv4_compile.ops.dispatch.wgmma_choice import config_of as dense_config
from dsv4_compile.ops.dispatch.wgmma_w4 import OUT_DTYPE_NAMES, Config, fits, launch_dense
from dsv4_compile.ops.kernels import compilation
from tests import nvfp4_oracle as oracle
from tests.interleaved import in_order

ACTIVATION_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
TORCH_DTYPES = {name: dtype for dtype, name in OUT_DTYPE_NAMES.items()}
UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-23}

CONFIGS = [
    *(dense_config(variant, 1, True, False, "bf16", "f16") for variant in VARIANTS),
    *(dense_config(VARIANTS[i], 1, False, False, "bf16", "bf16", is_interleaved=False) for i in (1, 3, 6, 8, 11, 13)),
    *(dense_config(VARIANTS[i], 1, False, False, "bf16", "bf16") for i in (1, 5, 7)),
    Config("dense", 16),
    Config("dense", 32, ctas_per_sm=3),
    Config("dense", 64, group=4),
    Config("dense", 256, activation="bf16"),
    Config("dense", 64, num_weights=3, has_bias=True, out_dtype="fp32"),
    Config("dense", 32, num_weights=4, splits=4, has_row_scale=False, has_bias=True, out_dtype="fp16"),
    *(grouped_config("grouped", rows) for rows in (16, 128)),
    *(grouped_config("grouped", rows, is_one_wave=True) for rows in (16, 64, 128)),
    *(grouped_config("swiglu", rows, is_one_wave=True, has_amax=True) for rows in (16, 32, 64, 128)),
    *(Config("dense", 128, teams=2, activation=activation) for activation in ("f16", "bf16")),
    grouped_config("grouped", 64, "fp16", has_row_scale=False),
    *(grouped_config("swiglu", rows, has_amax=True) for rows in (16, 64, 128, 256)),
    grouped_config("swiglu", 64, has_row_weight=True, has_amax=True),
    grouped_config("swiglu", 32, "fp32", has_row_weight=True, has_amax=True),
]


def launched() -> list[Config]:
    """What the GPU tests launch: grouped variants as they are for one wave of tiles, and for more."""
    grouped = [config for config in CONFIGS if config.mode != "dense"]
    grouped.append(grouped_config("swiglu", 64, has_row_scale=False, has_amax=True))
    both = [
        grouped_config(
            config.mode, config.tile_tokens, config.out_dtype, is_one_wave=is_one_wave,
            has_row_scale=config.has_row_scale, has_row_weight=config.has_row_weight, has_amax=config.has_amax,
        )
        for config in grouped
        for is_one_wave in (False, True)
    ]  # fmt: skip
    return [*CONFIGS, *ONE_HOT, *NON_FINITE, *both]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_machine_code(config: Config) -> None:
    """Guards against a spill, an accumulator in local memory, and wgmmas that the compiler serialises or splits.

    The k16 steps of a stage are unrolled. A kernel launched with fewer registers than its warpgroups then share out
    would wait for them for ever (seen), and a register above the share would be another thread's.
    """
    code = compilation.machine_code("sm90.wgmma_w4", config)
    assert code.spill_bytes == 0
    assert code.count(r"\b(LDL|STL)\b") == 0
    consumers = 256 * config.k_groups * config.teams
    assert code.registers == 65536 // config.ctas_per_sm // (consumers + 128) // 8 * 8
    share = (code.registers * (consumers + 128) - 24 * 128) // consumers
    assert max(int(register) for register in re.findall(r"\bR(\d+)\b", code.sass)) < share // 8 * 8
    steps = 16 // config.k_groups
    kind = r"\.F32\.BF16" if config.activation == "bf16" else r"\.F32 "
    assert code.count(rf"HGMMA\.64x{config.tile_tokens}x16{kind}") == code.count("HGMMA") == steps
    # One wait after each two wgmmas that leaves the last ones in flight, and one at the end of a tile that leaves none.
    assert code.count(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1") == steps // config.group
    assert code.count(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0") == 1
    assert code.count("UTMALDG") == (1 if config.mode != "dense" else config.num_weights) * 6 + 4
    assert code.count("USETMAXREG") == 2


def scaled(codes: Tensor, block_scales: Tensor) -> Tensor:
    """``code * block scale`` in float64 by the oracle's tables, on the device of the codes."""
    values = torch.tensor([*oracle.E2M1_TABLE, *-oracle.E2M1_TABLE], dtype=torch.float64, device=codes.device)
    scales = torch.tensor([*oracle.E4M3_TABLE, torch.nan], dtype=torch.float64, device=codes.device)
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()
    blocks = values[nibbles].unflatten(-1, (-1, 16)) * scales[block_scales.view(torch.uint8).int()].unsqueeze(-1)
    return blocks.flatten(-2)


def any_weight(*shape: int) -> tuple[Tensor, Tensor]:
    """Any codes, block scales of all magnitudes, [..., N, K] elements."""
    *lead, k = shape
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8, device="cuda")
    block_scales = torch.randint(0, 0x60, (*lead, k // 16), dtype=torch.uint8, device="cuda")
    block_scales[..., 1::5] = 0x7E
    return codes, block_scales.view(torch.float8_e4m3fn)


def assert_close(actual: Tensor, expected: Tensor, error: Tensor, out_dtype: str) -> None:
    """Each element within the error of its sum and one rounding."""
    distance = (actual.double() - expected).abs()
    allowed = error + (expected.abs() + error) * UNIT_ROUNDOFF[out_dtype] + 2.0**-140
    wrong = ~(distance <= allowed)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} wrong, first {wrong.nonzero()[:4].tolist()}: "
        f"{actual[wrong][:4].tolist()} not {expected[wrong][:4].tolist()}"
    )


def sum_error(k: int) -> float:
    return (k / 16 + 16) * 2.0**-22


def run_dense(config: Config, tokens: int, rows: Sequence[int], k: int) -> None:
    """One call with fresh operands into a poisoned output, checked in whole and repeated."""
    if not fits(config, tokens, rows):
        return
    weights = [any_weight(n, k) for n in rows]
    size = 2e-3 if config.out_dtype == "fp16" else 1.0  # fp16 ends at 65504
    global_scales = [(torch.rand(1 if n % 3 else n // 8, device="cuda") + 0.5) * size for n in rows]
    x = torch.randn(tokens, k, device="cuda").to(ACTIVATION_DTYPES[config.activation])
    apart = torch.full((tokens, 2 * k), torch.nan, device="cuda", dtype=x.dtype)[:, :k]  # rows that do not touch
    apart.copy_(in_order(x, config.activation == "f16") if config.is_interleaved else x)
    row_scale = torch.rand(tokens if tokens % 2 else 1, device="cuda") + 0.5 if config.has_row_scale else None
    bias = torch.randn(sum(rows), device="cuda") if config.has_bias else None
    outs = []
    for poison in (torch.nan, -1.0):
        padded = torch.full((tokens + 2, sum(rows) + 16), poison, device="cuda", dtype=TORCH_DTYPES[config.out_dtype])
        codes, block_scales = ([weight[i] for weight in weights] for i in range(2))
        launch_dense(config, apart, row_scale, codes, block_scales, global_scales, bias, padded[1:-1, 8:-8])
        outs.append(padded[1:-1, 8:-8].clone())
        padded[1:-1, 8:-8] = poison
        assert padded.isnan().all() if poison != -1.0 else (padded == poison).all(), "written outside"
    assert torch.equal(outs[0].view(torch.uint8), outs[1].view(torch.uint8)), "not the same bits twice"

    a = x.double() if row_scale is None else x.double() * row_scale.double().unsqueeze(1)
    w = torch.cat(
        [
            scaled(*weight) * scale.double().repeat_interleave(weight[0].shape[0] // scale.numel()).unsqueeze(1)
            for weight, scale in zip(weights, global_scales, strict=True)
        ]
    )
    expected, magnitude = a @ w.T, a.abs() @ w.abs().T
    error = magnitude * (sum_error(k) + 2.0**-22)  # two roundings of the scales
    if bias is not None:
        expected, error = expected + bias, error + (magnitude + bias.abs()) * 2.0**-23
    assert_close(outs[0], expected, error, config.out_dtype)


DENSE = [config for config in CONFIGS if config.mode == "dense"]


@pytest.mark.gpu
@pytest.mark.parametrize("config", DENSE, ids=str)
def test_dense(config: Config) -> None:
    """Guards against a wrong index map, an edge of tokens, rows or stages, and a ring that wraps wrongly."""
    torch.manual_seed(DENSE.index(config))
    t = config.tile_tokens
    for tokens, n, k in ((t, 256, 1024), (1, 8, 256), (t - 3, 264, 2048), (2 * t + 5, 1000, 1536), (9 * t, 2048, 512)):
        rows = [n, *(8 * (i + 2) * (i + 1) for i in range(config.num_weights - 1))]
        run_dense(config, tokens, rows, k)


@pytest.mark.gpu
def test_dense_random_shapes() -> None:
    """Guards against shapes nobody thought of: a hundred."""
    torch.manual_seed(1)
    for _ in range(100):
        config = DENSE[int(torch.randint(len(DENSE), ()))]
        tokens, k = int(torch.randint(1, 600, ())), 256 * int(torch.randint(1, 9, ()))
        rows = [8 * int(torch.randint(1, 130, ())) for _ in range(config.num_weights)]
        run_dense(config, tokens, rows, k)


ONE_HOT = [
    Config("dense", 64, out_dtype="fp32"),
    Config("dense", 64, out_dtype="fp32", k_groups=2, activation="bf16"),
    Config("dense", 64, out_dtype="fp32", activation="bf16", is_interleaved=False),
    Config("dense", 64, splits=4),
]


@pytest.mark.gpu
@pytest.mark.parametrize("config", ONE_HOT, ids=str)
def test_one_hot(config: Config) -> None:
    """Guards against a permutation along K that sums hide: each output is one element of the weight, exactly."""
    k, n = 1024, 256
    codes, block_scales = any_weight(n, k)
    w, one = scaled(codes, block_scales), torch.ones(1, device="cuda")
    for start in range(0, k, 64):
        x = torch.zeros(64, k, device="cuda", dtype=ACTIVATION_DTYPES[config.activation])
        x[torch.arange(64), torch.arange(64) + start] = 1
        out = torch.empty(64, n, device="cuda", dtype=TORCH_DTYPES[config.out_dtype])
        given = in_order(x, config.activation == "f16").contiguous() if config.is_interleaved else x
        launch_dense(config, given, one, [codes], [block_scales], [one], None, out)
        assert torch.equal(out.double(), w[:, start : start + 64].T)


NON_FINITE = [
    Config("dense", tokens, out_dtype="fp32", activation=activation, is_interleaved=ordered)
    for tokens in (64, 256)
    for activation, ordered in (("f16", True), ("bf16", True), ("bf16", False))
]


@pytest.mark.gpu
@pytest.mark.parametrize("config", NON_FINITE, ids=str)
def test_non_finite(config: Config) -> None:
    """Guards against a NaN scale that decodes to a number, and a NaN that leaves its row or column."""
    tokens, activation, is_interleaved = config.tile_tokens, config.activation, config.is_interleaved
    codes, block_scales = any_weight(384, 512)
    codes[:, :] |= 0x11  # no zero code: an infinite activation times zero is NaN
    block_scales.view(torch.uint8).clamp_(min=1)
    x = torch.randn(tokens, 512, device="cuda").to(ACTIVATION_DTYPES[activation])
    one, outs = torch.ones(1, device="cuda"), []
    for damaged in (False, True):
        if damaged:
            block_scales.view(torch.uint8)[77, 30] = 0x7F
            x[5, 100], x[9, 3], x[11, 511] = torch.nan, torch.inf, -torch.inf
        out = torch.empty(tokens, 384, device="cuda")
        given = in_order(x, activation == "f16").contiguous() if is_interleaved else x
        launch_dense(config, given, one, [codes], [block_scales], [one], None, out)
        outs.append(out)
    before, after = outs
    assert before.isfinite().all()
    assert after[5].isnan().all()
    assert after[:, 77].isnan().all()
    other_columns = [column for column in range(384) if column != 77]
    assert after[[9, 11]][:, other_columns].isinf().all()
    kept = [row for row in range(tokens) if row not in (5, 9, 11)]
    assert torch.equal(after[kept][:, other_columns], before[kept][:, other_columns])


def schedule_of(counts: Sequence[int], tile_rows: int) -> Tensor:
    """The tiles of groups side by side, and garbage after them."""
    tiles, begin = [], 0
    for expert, count in enumerate(counts):
        tiles += [(expert, begin + i, min(tile_rows, count - i), 0) for i in range(0, count, tile_rows)]
        begin += count
    garbage = [(-5, -5, 1 << 20, -5)] * 3
    return torch.tensor([(len(tiles), begin, 0, 0), *tiles, *garbage], dtype=torch.int32, device="cuda")


def run_grouped(config: Config, counts: Sequence[int], n: int, k: int, limit: float = 10.0) -> None:
    """One grouped call with fresh operands into a poisoned output, checked in whole and repeated."""
    is_swiglu = config.mode == "swiglu"
    experts, rows = len(counts), sum(counts)
    codes, block_scales = any_weight(experts, n, k)
    size = 2e-4 if is_swiglu or config.out_dtype == "fp16" else 1.0
    global_scale = (torch.rand(experts, 2, device="cuda") + 0.5) * size
    x = torch.randn(rows + 3, k, device="cuda").half()
    x[rows:] = torch.nan  # rows of no group
    interleaved = in_order(x, True).contiguous()
    row_scale = torch.rand(rows + 3, device="cuda") + 0.5 if config.has_row_scale else None
    row_weight = torch.rand(rows + 3, device="cuda") if config.has_row_weight else None
    outs = []
    for poison in (torch.nan, -1.0):
        out = torch.full(
            (rows + 3, n // 2 if is_swiglu else n), poison, device="cuda", dtype=TORCH_DTYPES[config.out_dtype]
        )
        amax = torch.full((partial_amax_size(x),), torch.nan, device="cuda") if config.has_amax else None
        grouped_wgmma(
            interleaved,
            row_scale,
            codes,
            block_scales,
            global_scale,
            schedule_of(counts, config.tile_tokens),
            config.tile_tokens,
            out,
            swiglu_limit=limit if is_swiglu else None,
            row_weight=row_weight,
            partial_amax=amax,
        )
        assert out[rows:].isnan().all() if poison != -1.0 else (out[rows:] == poison).all(), "written outside"
        if amax is not None:
            assert amax.max() == (out[:rows].abs().max().float() if rows else 0.0)
        outs.append(out[:rows])
    assert torch.equal(outs[0].view(torch.uint8), outs[1].view(torch.uint8)), "not the same bits twice"

    begin = 0
    for expert, count in enumerate(counts):
        group = slice(begin, begin + count)
        begin += count
        if count == 0:
            continue
        a = x[group].double() if row_scale is None else x[group].double() * row_scale[group].double().unsqueeze(1)
        w = scaled(codes[expert], block_scales[expert]) * global_scale[expert].double().repeat_interleave(
            n // 2
        ).unsqueeze(1)
        expected, error = a @ w.T, (a.abs() @ w.abs().T) * (sum_error(k) + 2.0**-22)
        if is_swiglu:  # |silu'| < 1.1; silu within 3 2^-23 of its value, and two products
            (gate, up), (gate_error, up_error) = expected.chunk(2, dim=1), error.chunk(2, dim=1)
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            silu = torch.nn.functional.silu(gate)
            error = 1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error
            expected = silu * up
            error = error + expected.abs() * 2.0**-20
            if row_weight is not None:
                weight = row_weight[group].double().unsqueeze(1)
                expected, error = expected * weight, error * weight
        assert_close(outs[0][group], expected, error, config.out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [config for config in CONFIGS if config.mode != "dense"], ids=str)
def test_grouped(config: Config) -> None:
    """Guards against a tile of the wrong expert, a row of a neighbour that is stored, and a schedule read too far."""
    torch.manual_seed(2)
    for counts, n, k in (
        ((5, 0, 33, 1, 0, 200, 64, 0), 416, 512),
        ((0, 0, 0), 64, 256),
        ((1,), 32, 256),
        ((300, 17), 1056, 1024),
        (tuple(range(40)), 256, 256),
    ):
        run_grouped(config, counts, n, k)


@pytest.mark.gpu
def test_grouped_without_limit() -> None:
    """Guards against an infinite limit that makes NaN."""
    run_grouped(grouped_config("swiglu", 64, has_amax=True), (70, 3), 128, 512, limit=float("inf"))


@pytest.mark.gpu
def test_amax_is_that_of_finite_values() -> None:
    """Guards against an amax of NaN or Inf, or of the rows of another group."""
    codes, block_scales = any_weight(2, 128, 256)
    x = torch.randn(40, 256, device="cuda").half()
    x[3, 0], x[35:] = torch.nan, 6e4
    out = torch.empty(40, 64, device="cuda", dtype=torch.bfloat16)
    amax = torch.full((partial_amax_size(x),), torch.nan, device="cuda")
    schedule = schedule_of((30, 5), 64)
    scale = torch.full((2,), 1e-3, device="cuda")
    grouped_wgmma(x, None, codes, block_scales, scale, schedule, 64, out, swiglu_limit=float("inf"), partial_amax=amax)
    assert out[3].isnan().all()
    finite = out[:35][out[:35].isfinite()]
    assert amax.max() == finite.abs().max().float()
