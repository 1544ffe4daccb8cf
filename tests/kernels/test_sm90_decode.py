"""The decode kernels on Hopper: variants that fit the machine, their machine code, and their products against float64."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import decode_choice, decode_mm
from dsv4_compile.ops.dispatch.decode_choice import choose, choose_grouped, grouped_block
from dsv4_compile.ops.dispatch.decode_mm import Config
from dsv4_compile.ops.kernels import compilation

Packed = tuple[Tensor, Tensor, Tensor]

# Weight rows and K of DeepSeek V4 Flash and Pro, merged projections among them.
V4_SHAPES = [
    ((1024, 512), 4096), ((32768,), 1024), ((4096,), 8192), ((2048, 2048), 4096), ((4096,), 2048), ((256,), 4096),
    ((1536, 512), 7168), ((65536,), 1536), ((7168,), 16384), ((3072, 3072), 7168), ((7168,), 3072), ((384,), 7168),
]  # fmt: skip


@pytest.mark.parametrize("activation", ["packed", "bf16"])
@pytest.mark.parametrize(("rows", "k"), V4_SHAPES)
def test_variant_fits(rows: tuple[int, ...], k: int, activation: str) -> None:
    """Guards against a variant that a launch refuses, and against a shape of V4 that decodes on no variant at all."""
    for tokens in range(1, decode_choice.MAX_TOKENS + 1):
        config = choose(tokens, rows, k, activation, False, torch.bfloat16, True)  # type: ignore[arg-type]
        if config is None:
            assert tokens > 16
            continue
        assert config.class_slots(k) >= 1
        assert config.token_slots >= tokens
        assert 32 * (config.row_warps * config.k_warps + 1) <= 1024
        blocks = -(-sum(rows) // config.block_rows)
        assert blocks * config.splits <= 132 or (config.splits == 1 and config.block_rows == 256)


def test_refuses() -> None:
    """Guards against a kernel asked for what it does not read."""
    assert choose(decode_choice.MAX_TOKENS + 1, [4096], 4096, "packed", False, torch.bfloat16, True) is None
    assert choose(1, [4096], 4096 + 16, "packed", False, torch.bfloat16, True) is None
    assert choose(0, [4096], 4096, "packed", False, torch.bfloat16, True) is None
    assert choose_grouped(grouped_block(8), 4096 + 128, True, True, False, torch.bfloat16) is None
    inside = torch.empty(64, 384, dtype=torch.uint8, device="meta")
    assert decode_mm.is_mappable(inside)
    assert not decode_mm.is_mappable(inside[:, :256])
    assert not decode_mm.is_mappable(inside[:, ::2])


def compiled_variants() -> list[Config]:
    """One of each block shape, number of token slots, activation and mode that dispatch hands out."""
    dense = [
        choose(tokens, rows, k, activation, has_bias, torch.bfloat16, activation == "packed")  # type: ignore[arg-type]
        for tokens in (1, 2, 4, 8, 16, 24, 32)
        for rows, k in (((512,), 1024), ((4096,), 4096), ((7168,), 16384), ((16384,), 1024), ((32768, 512), 1024))
        for activation, has_bias in (("packed", False), ("bf16", True))
    ]
    grouped = [
        choose_grouped(
            grouped_block(rows), 4096, is_packed, is_swiglu, is_swiglu, torch.bfloat16, has_schedule, tile_rows, is_old
        )
        for rows, tile_rows in ((6, 1), (6, 8), (96, 8))
        for is_packed, is_swiglu, has_schedule, is_old in (
            (True, True, True, False), (False, False, True, True), (True, False, False, False),
        )
    ]  # fmt: skip
    return list(dict.fromkeys(config for config in [*dense, *grouped] if config is not None))


@pytest.mark.parametrize("config", random.Random(0).sample(compiled_variants(), 12), ids=str)
def test_machine_code(config: Config) -> None:
    """Guards against registers that spill, and against a main loop off the tensor cores or with narrow loads."""
    from dsv4_compile.ops.kernels.sm90.decode_mm import DecodeMM

    code = compilation.machine_code("sm90.decode_mm", config)
    threads = 32 * (config.row_warps * config.k_warps + 1)
    assert code.spill_bytes == 0
    assert code.registers * threads <= 65536
    # 16 a tile of 16 rows and 8 tokens: 256 values of K, 16 a product; half of them where the halves are a loop
    is_rolled = DecodeMM(config).has_rolled_halves
    assert code.count(r"HMMA\.16816") == (8 if is_rolled else 16) * config.row_tiles * max(1, config.token_slots // 8)
    assert code.count("UTMALDG") > 0
    assert (code.count("UBLKCP") > 0) == (config.activation == "bf16" and config.mode == "dense")
    assert code.count(r"LDS\.128") >= (2 if is_rolled else 4) * config.row_tiles
    assert code.count("LDL|STL") == 0


def test_same_products_for_both_activations() -> None:
    """Guards against a variant chosen for one activation whose block is not that of the other: merged weights differ."""
    packed = choose(4, (4096,), 4096, "packed", False, torch.bfloat16, True)
    bf16 = choose(4, (4096,), 4096, "bf16", False, torch.bfloat16, False)
    assert packed is not None
    assert bf16 == replace(packed, activation="bf16", has_row_scale=False)


# (tokens, rows of each weight, K, activation, bias, dtype, one scale a row)
DENSE_CASES = [
    (1, (512,), 1024, "packed", False, torch.bfloat16, False),
    (1, (4096,), 4096, "packed", False, torch.bfloat16, False),
    (3, (200,), 1024, "packed", False, torch.float32, True),
    (8, (1000, 264, 72), 2048, "packed", True, torch.bfloat16, False),
    (13, (1000,), 4096, "packed", False, torch.float16, True),
    (16, (7168,), 16384, "packed", False, torch.bfloat16, False),
    (32, (2048, 2048), 4096, "packed", False, torch.bfloat16, False),
    (24, (32768,), 1024, "packed", False, torch.bfloat16, False),
    (1, (4096,), 4096, "bf16", False, torch.bfloat16, False),
    (7, (40, 5000), 1280, "bf16", True, torch.float32, False),
    (16, (7168,), 3072, "bf16", False, torch.bfloat16, False),
    (32, (300,), 256, "bf16", False, torch.float16, False),
]


def config_of(case: tuple[object, ...]) -> Config:
    tokens, rows, k, activation, has_bias, dtype, _ = case
    config = choose(tokens, rows, k, activation, has_bias, dtype, activation == "packed")  # type: ignore[arg-type]
    assert config is not None
    return config


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def packed(*shape: int, scale: float = 1.0) -> Packed:
    return nvfp4.quantize(torch.randn(shape, device="cuda") * scale)


def assert_within_bound(actual: Tensor, a: Tensor, b: Tensor, alpha: Tensor, bias: Tensor | None) -> None:
    """Any order of fp32 sums of exact products errs by at most K 2^-22 of the sum of their magnitudes, then one rounding."""
    expected = (a @ b.T) * alpha
    bound = (a.abs() @ b.abs().T) * alpha.abs() * (a.shape[1] * 2.0**-22)
    if bias is not None:
        expected, bound = expected + bias, bound + 2.0**-23 * (expected.abs() + bias.abs())
    bound += torch.finfo(actual.dtype).eps * expected.abs() + torch.finfo(actual.dtype).tiny
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_dense(case: tuple[object, ...]) -> None:
    """Guards against a wrong index map, a row nobody wrote, and bits that change from run to run, launches back to back."""
    tokens, rows, k, activation, has_bias, dtype, is_token = case
    config = config_of(case)
    x = torch.randn(tokens, k, device="cuda").bfloat16()  # type: ignore[call-overload]
    x_scales, row_scale, a = None, None, x.double()
    if activation == "packed":
        x, x_scales, row_scale = nvfp4.quantize(x, "token" if is_token else "tensor")
        row_scale = row_scale.reshape(-1)
        a = nvfp4.scaled_codes(x, x_scales).double()
    weights = [packed(n, k) for n in rows]  # type: ignore[attr-defined]
    bias = torch.randn(sum(rows), device="cuda") if has_bias else None  # type: ignore[call-overload]
    outs = [poisoned(tokens, sum(rows), dtype=dtype) for _ in range(4)]  # type: ignore[arg-type, call-overload]
    for out in outs:  # no synchronisation between: programmatic launches overlap
        decode_mm.decode_mm(
            config, x, x_scales, row_scale, [w[0] for w in weights], [w[1] for w in weights],
            [w[2].reshape(1) for w in weights], bias, out,
        )  # fmt: skip
    assert all(torch.equal(out, outs[0]) for out in outs)
    b = torch.cat([nvfp4.scaled_codes(*w[:2]).double() for w in weights])
    b_scale = torch.cat([w[2].expand(n) for w, n in zip(weights, rows, strict=True)])  # type: ignore[call-overload]
    alpha = b_scale.expand(tokens, -1) if row_scale is None else row_scale[:, None] * b_scale  # type: ignore[arg-type]
    assert_within_bound(outs[0], a, b, alpha.double(), bias)


# (tokens, experts, top-k, hidden, intermediate)
MOE_CASES = [
    (1, 8, 2, 512, 256),
    (3, 8, 2, 512, 256),
    (40, 8, 2, 1024, 768),
    (17, 300, 6, 768, 512),
    (64, 4, 3, 256, 256),
]


def moe_configs(tokens: int, experts: int, top_k: int, hidden: int, intermediate: int) -> tuple[Config, Config]:
    block, tile_rows = grouped_block(tokens * top_k), moe_tile_rows(tokens)
    gate_up = choose_grouped(block, hidden, True, True, False, torch.bfloat16, tile_rows=tile_rows)
    down = choose_grouped(
        block, intermediate, False, False, False, torch.float32, tile_rows=tile_rows, has_old_schedule=True
    )
    assert gate_up is not None
    assert down is not None
    return gate_up, down


def moe_tile_rows(tokens: int) -> int:
    return 1 if tokens == 1 else decode_choice.GROUPED_TILE_ROWS


def schedule_of(ids: Tensor, experts: int, tile_rows: int) -> tuple[Tensor, Tensor, list[tuple[int, slice]]]:
    """Sorted slots, the schedule, and each expert's rows, by plain loops."""
    slots, tiles, groups, start = [], [], [], 0
    for expert in range(experts):
        mine = (ids.flatten() == expert).nonzero().flatten().tolist()
        tiles += [[expert, start + i, min(tile_rows, len(mine) - i), 0] for i in range(0, len(mine), tile_rows)]
        groups.append((expert, slice(start, start + len(mine))))
        start += len(mine)
        slots += mine
    sorted_slots = torch.tensor(slots + [-1] * (ids.numel() - start), dtype=torch.int32, device="cuda")
    schedule = torch.tensor([[len(tiles), start, 0, 0], *tiles], dtype=torch.int32, device="cuda")
    return sorted_slots, schedule, groups


@pytest.mark.gpu
@pytest.mark.parametrize("case", MOE_CASES, ids=str)
def test_grouped(case: tuple[int, int, int, int, int]) -> None:
    """Guards against a row of another expert or token, a tail that is written, and a maximum that misses a CTA."""
    tokens, experts, top_k, hidden, intermediate = case
    gate_up_config, down_config = moe_configs(*case)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    ids[0, 0] = -1 if tokens > 1 else ids[0, 0]
    sorted_slots, schedule, groups = schedule_of(ids, experts, moe_tile_rows(tokens))
    routed = groups[-1][1].stop
    x, x_scales, x_scale = packed(tokens, hidden, scale=2.0)
    gate_up = [packed(2 * intermediate, hidden, scale=0.05) for _ in range(experts)]
    codes, scales, scale = (torch.stack([w[i] for w in gate_up]) for i in range(3))
    scale = torch.stack([scale, 1.5 * scale], dim=1)  # gate and up apart
    h = poisoned(tokens * top_k, intermediate, dtype=torch.bfloat16)
    partial = poisoned(torch.cuda.get_device_properties(0).multi_processor_count, dtype=torch.float32)
    decode_mm.grouped_decode_mm(
        gate_up_config, x, x_scales, x_scale.reshape(1), codes, scales, scale, schedule, h,
        sorted_slots=sorted_slots, top_k=top_k, swiglu_limit=10.0, partial_amax=partial,
    )  # fmt: skip
    a = nvfp4.scaled_codes(x, x_scales).double()
    for expert, rows in groups:
        token = sorted_slots[rows].long() // top_k
        y = a[token] @ nvfp4.scaled_codes(codes[expert], scales[expert]).double().T
        alpha = x_scale * scale[expert].repeat_interleave(intermediate)
        gate, up = (y * alpha).float().chunk(2, dim=-1)
        expected = nvfp4.swiglu(gate, up, 10.0)
        # An error of K 2^-22 of the magnitudes of gate and up moves their product by as much of theirs, times 1.1 of silu.
        magnitude = a[token].abs() @ nvfp4.scaled_codes(codes[expert], scales[expert]).double().abs().T
        error = (magnitude * alpha * (hidden * 2.0**-22)).float()
        slack = 1.1 * (error[:, :intermediate] * up.abs().clamp(max=10) + error[:, intermediate:] * gate.abs())
        assert ((h[rows].float() - expected).abs() <= slack + 2.0**-8 * expected.abs() + 1e-30).all()
    assert h[routed:].isnan().all()
    assert partial.max() == h[:routed].float().abs().max()

    down = [packed(hidden, intermediate) for _ in range(experts)]
    codes, scales, scale = (torch.stack([w[i] for w in down]) for i in range(3))
    y = poisoned(tokens * top_k, hidden, dtype=torch.float32)
    row_scale = torch.rand(tokens * top_k, device="cuda")
    decode_mm.grouped_decode_mm(
        down_config, h.nan_to_num(), None, row_scale, codes, scales, scale.reshape(-1, 1), schedule, y
    )
    for expert, rows in groups:
        b = nvfp4.scaled_codes(codes[expert], scales[expert]).double()
        assert_within_bound(y[rows], h[rows].double(), b, (row_scale[rows, None] * scale[expert]).double(), None)
    assert y[routed:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 11])
def test_groups_of_one_size(rows: int) -> None:
    """Guards against a tile that reaches into the next group."""
    groups, n, k = 5, 192, 512
    config = choose_grouped(grouped_block(groups * rows), k, True, False, False, torch.bfloat16, has_schedule=False)
    assert config is not None
    x, x_scales, x_scale = packed(groups * rows, k)
    weights = [packed(n, k) for _ in range(groups)]
    codes, scales, scale = (torch.stack([w[i] for w in weights]) for i in range(3))
    out = poisoned(groups * rows, n, dtype=torch.bfloat16)
    decode_mm.grouped_decode_mm(
        config, x, x_scales, x_scale.reshape(1), codes, scales, scale.reshape(-1, 1), None, out, group_rows=rows
    )
    a = nvfp4.scaled_codes(x, x_scales).double()
    for group in range(groups):
        mine = slice(group * rows, (group + 1) * rows)
        b = nvfp4.scaled_codes(codes[group], scales[group]).double()
        assert_within_bound(out[mine], a[mine], b, (x_scale * scale[group]).double(), None)


@pytest.mark.gpu
def test_non_finite_stays_in_its_row() -> None:
    """Guards against a NaN that reaches another token through shared memory, and against one that is lost."""
    case = (8, (264,), 1024, "packed", False, torch.bfloat16, False)
    x, x_scales, x_scale = packed(8, 1024)
    x_scales.view(torch.uint8)[3, 17] = 0x7F
    codes, scales, scale = packed(264, 1024)
    scales.view(torch.uint8)[100, 5] = 0x7F
    out = torch.zeros(8, 264, dtype=torch.bfloat16, device="cuda")
    decode_mm.decode_mm(
        config_of(case), x, x_scales, x_scale.reshape(1), [codes], [scales], [scale.reshape(1)], None, out
    )
    expected = torch.zeros(8, 264, dtype=torch.bool, device="cuda")
    expected[3], expected[:, 100] = True, True
    assert torch.equal(out.isnan(), expected)


def gpu_kernels() -> list[tuple[str, Config]]:
    """What the tests above run on a GPU, to be compiled before."""
    configs = [config_of(case) for case in DENSE_CASES]
    configs += [config for case in MOE_CASES for config in moe_configs(*case)]
    configs += [config_of((8, (264,), 1024, "packed", False, torch.bfloat16, False))]
    for rows in (1, 8, 11):
        static = choose_grouped(grouped_block(5 * rows), 512, True, False, False, torch.bfloat16, has_schedule=False)
        assert static is not None
        configs.append(static)
    return [("sm90.decode_mm", config) for config in dict.fromkeys(configs)]
