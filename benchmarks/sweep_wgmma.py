"""Times the variants of the wgmma kernel that the tables in ops/dispatch/wgmma_choice.py and nvfp4_moe.py come from.

    python benchmarks/sweep_wgmma.py --warm                                # no GPU: compiles them into the kernel cache
    python benchmarks/sweep_wgmma.py [--tokens 64 256] [--experts-tokens 256]   # on the GPU: the fastest first

Dense products of three shapes of DeepSeek V4 with bf16 and with quantised activations, the interleaving launch in front
included, against cuBLAS bf16 in the same run; ``nvfp4_grouped_mm`` of 8 groups; and ``nvfp4_moe`` of Flash's experts
(256, top-6), by tile and by how a multiprocessor is shared. Each variant is first compared with the first one. Weights
rotate through more than the L2.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from harness import measure_peaks, record
from sweep_decode_mm import EXPERTS, HIDDEN, INTERMEDIATE, SHAPES, TOP_K, random_weights

from dsv4_compile import nvfp4
from dsv4_compile.ops import nvfp4_grouped_mm, nvfp4_mm, nvfp4_moe, nvfp4_weight_mm
from dsv4_compile.ops.dispatch import grouped_wgmma, tuning
from dsv4_compile.ops.dispatch.interleave import InterleaveConfig, interleave
from dsv4_compile.ops.dispatch.nvfp4_moe import Plan
from dsv4_compile.ops.dispatch.wgmma_w4 import Config, fits, launch_dense
from dsv4_compile.timing import copies_beyond_l2, time_variants

BYTES_A_WEIGHT = 0.5625
# Tile, k groups, CTAs a multiprocessor, teams: those whose rings and registers fit.
SHARES = (
    (16, 1, 3, 1), (16, 2, 1, 1), (32, 1, 2, 1), (32, 2, 1, 1), (64, 1, 2, 1), (64, 2, 1, 1), (128, 2, 1, 1),
    (128, 1, 1, 1), (128, 1, 1, 2), (256, 1, 1, 1),
)  # fmt: skip
SPLITS = {16: (1, 2, 3, 4), 32: (1, 2, 3, 4), 64: (1, 2, 3, 4), 128: (1, 2, 3), 256: (1, 2)}
EXPERT_SHARES = (
    (16, 1, 3, 1), (16, 2, 1, 1), (32, 1, 2, 1), (32, 2, 1, 1), (64, 1, 2, 1), (64, 2, 1, 1), (64, 1, 1, 2),
    (128, 2, 1, 1), (128, 1, 1, 1), (128, 1, 1, 2), (256, 1, 1, 1),
)  # fmt: skip
GROUPS = (2, 4)


def dense_configs(activation: str) -> Iterator[Config]:
    """Variants of a dense product."""
    for (tile, k_groups, ctas, teams), group, is_interleaved in itertools.product(SHARES, GROUPS, (True, False)):
        if not is_interleaved and (group > 2 or activation == "f16"):
            continue
        for splits in SPLITS[tile] if teams == 1 else (1,):
            yield Config(
                "dense", tile, splits=splits, has_row_scale=activation == "f16", ctas_per_sm=ctas, k_groups=k_groups,
                teams=teams, group=group, activation=activation, is_interleaved=is_interleaved,  # type: ignore[arg-type]
            )  # fmt: skip


def name_of(config: Config) -> str:
    return (
        f"{config.tile_tokens} tokens, {config.k_groups} k groups, {config.ctas_per_sm} CTAs, "
        f"{config.teams} teams, {config.splits} splits, "
        f"groups of {config.group}{'' if config.is_interleaved else ', in order'}"
    )


def sweep_dense(rows: int, k: int, tokens: int, activation: str) -> list[dict[str, Any]]:
    """Times of all variants of a shape."""
    copies = copies_beyond_l2(int(rows * k * BYTES_A_WEIGHT), 16)
    weights = [random_weights(rows, k) for _ in range(copies)]
    one = torch.ones(1, device="cuda")
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    operand: tuple[Any, Any, Any] = (x, None, None)
    if activation == "f16":
        codes, scales, scale = nvfp4.quantize(x)
        operand = codes, scales, scale.reshape(1)
    out = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")

    def call(config: Config, weight: Any) -> None:
        ready = interleave(*operand[:2]) if config.is_interleaved else x
        launch_dense(config, ready, operand[2], [weight[0]], [weight[1]], [one], None, out)

    variants: dict[Any, list[Callable[[], Any]]] = {}
    expected = None
    for config in dense_configs(activation):
        is_near = tokens / 8 <= config.tile_tokens <= max(64, 1.5 * tokens)
        if not is_near or not fits(config, tokens, [rows], x) or k // 256 < config.splits:
            continue
        out.fill_(float("nan"))
        call(config, weights[0])
        expected = out.clone() if expected is None else expected
        error = float((out.double() - expected.double()).norm() / expected.double().norm())
        assert error < 4e-3, f"{config}: relative error {error}"
        variants[name_of(config)] = [lambda c=config, w=weight: call(c, w) for weight in weights]
    op = nvfp4_weight_mm if activation == "bf16" else functools.partial(nvfp4_mm, codes, scales, scale)
    given = (x,) if activation == "bf16" else ()
    variants["as dispatched"] = [lambda w=w: op(*given, [w[0]], [w[1]], [one]) for w in weights]
    variants["interleaving alone"] = [lambda: interleave(*operand[:2])] * 8
    plain = [torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, copies // 4))]
    variants["cublas_bf16"] = [lambda w=weight: torch.mm(x, w.T) for weight in plain]
    timings = time_variants(variants, replays=8)
    return [
        {"op": "nvfp4_mm", "activation": activation, "rows": rows, "k": k, "tokens": tokens, "variant": name}
        | {"median_us": t.median_us, "min_us": t.min_us, "max_us": t.max_us}
        for name, t in sorted(timings.items(), key=lambda item: item[1].median_us)
    ]


@contextlib.contextmanager
def changed(changes: dict[str, Any]) -> Iterator[None]:
    """Grouped launches run on other variants than the table's."""
    original = grouped_wgmma.config_of

    def config_of(*args: Any, **kwargs: Any) -> Config:
        return replace(original(*args, **kwargs), **changes)

    with mock.patch.object(grouped_wgmma, "config_of", config_of):
        yield


def grouped_choices() -> Iterator[tuple[int, dict[str, Any]]]:
    """(tile, changes) of grouped launches."""
    for (tile, k_groups, ctas, teams), group in itertools.product(EXPERT_SHARES, GROUPS):
        yield tile, {"k_groups": k_groups, "ctas_per_sm": ctas, "teams": teams, "group": group}


def name_of_choice(tile: int, changes: dict[str, Any]) -> str:
    return f"wgmma {tile}, " + ", ".join(f"{name} {int(value)}" for name, value in changes.items())


def grouped_configs() -> Iterator[Config]:
    """Variants of both products of experts and of groups."""
    for tile, changes in grouped_choices():
        for mode, out_dtype in (("swiglu", "bf16"), ("grouped", "fp32"), ("grouped", "bf16")):
            yield replace(grouped_wgmma.config_of(mode, tile, out_dtype, has_amax=mode == "swiglu"), **changes)


def sweep_experts(tokens: int, weights: Any, scale: Any) -> list[dict[str, Any]]:
    """Times of ``nvfp4_moe`` by variant, each token's experts drawn at random."""
    (gate_up, gate_up_scales), (down, down_scales) = weights
    variants: dict[Any, list[Callable[[], Any]]] = {}
    expected: list[Any] = []
    for draw in range(2):
        ids = torch.stack([torch.randperm(EXPERTS, device="cuda")[:TOP_K] for _ in range(tokens)])
        topk_weights = torch.rand(tokens, TOP_K, device="cuda")
        x = nvfp4.quantize(torch.randn(tokens, HIDDEN, device="cuda").bfloat16())
        arguments = (*x, ids, topk_weights, gate_up, gate_up_scales, scale, down, down_scales, scale)
        with tuning.asking() as asked:
            nvfp4_moe(*arguments, limit=10.0)
        ((key, question),) = asked.items()

        def call(plan: str, changes: dict[str, Any] | None, arguments: Any = arguments, key: str = key) -> Any:
            with tuning.forced(key, plan), changed(changes or {}):
                return nvfp4_moe(*arguments, limit=10.0)

        choices: list[tuple[str, str, dict[str, Any] | None]] = [
            (plan, plan, None) for plan in question.variants if plan.startswith("decode")
        ]
        for tile, changes in grouped_choices():
            if tokens * TOP_K / EXPERTS / 8 <= tile <= tokens * TOP_K / EXPERTS * 8:
                choices.append((name_of_choice(tile, changes), Plan("wgmma", tile).name, changes))
        for name, plan, wanted in choices:
            y = call(plan, wanted).double()
            if len(expected) == draw:
                expected.append(y)
            error = float((y - expected[draw]).norm() / expected[draw].norm())
            assert error < 2e-2, f"{name}: relative error {error}"
            variants.setdefault(name, []).append(lambda p=plan, w=wanted, c=call: c(p, w))
    timings = time_variants(variants, replays=5)
    return [
        {"op": "nvfp4_moe", "tokens": tokens, "variant": name}
        | {"median_us": t.median_us, "min_us": t.min_us, "max_us": t.max_us}
        for name, t in sorted(timings.items(), key=lambda item: item[1].median_us)
    ]


def sweep_groups(tokens: int) -> list[dict[str, Any]]:
    """Times of ``nvfp4_grouped_mm`` by variant: V4 Flash's 8 groups of the attention's output."""
    groups, n, k = 8, 1024, 4096
    copies = copies_beyond_l2(int(groups * n * k * BYTES_A_WEIGHT), 8)
    weights = [random_weights(groups, n, k) for _ in range(copies)]
    scale = torch.full((groups,), 1e-3, device="cuda")
    x = nvfp4.quantize(torch.randn(groups, tokens, k, device="cuda").bfloat16())
    variants: dict[Any, list[Callable[[], Any]]] = {}
    with tuning.asking() as asked:
        expected = nvfp4_grouped_mm(*x, *weights[0], scale).double()
    ((key, _),) = asked.items()

    def call(tile: int, changes: dict[str, Any], weight: Any) -> Any:
        with tuning.forced(key, Plan("wgmma", tile).name), changed(changes):
            return nvfp4_grouped_mm(*x, *weight, scale)

    for tile, changes in grouped_choices():
        if not tokens / 4 <= tile <= max(tokens * 4, 64):
            continue
        error = float((call(tile, changes, weights[0]).double() - expected).norm() / expected.norm())
        assert error < 2e-2, f"{tile} {changes}: relative error {error}"
        variants[name_of_choice(tile, changes)] = [lambda t=tile, c=changes, w=w: call(t, c, w) for w in weights]
    timings = time_variants(variants, replays=5)
    return [
        {"op": "nvfp4_grouped_mm", "groups": groups, "tokens": tokens, "variant": name}
        | {"median_us": t.median_us, "min_us": t.min_us, "max_us": t.max_us}
        for name, t in sorted(timings.items(), key=lambda item: item[1].median_us)
    ]


def report(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints rows as they come."""
    for row in rows:
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--experts-tokens", type=int, nargs="*", default=[64, 256, 1024, 4096])
    parser.add_argument("--groups-tokens", type=int, nargs="*", default=[16, 32, 64, 128, 256, 512, 4096])
    parser.add_argument("--activations", nargs="+", choices=("f16", "bf16"), default=["f16", "bf16"])
    parser.add_argument("--warm", action="store_true", help="compile only; the kernels around come with `warm`")
    arguments = parser.parse_args()
    if arguments.warm:
        from rich.console import Console

        from dsv4_compile.warming import compile_all

        configs = [config for activation in arguments.activations for config in dense_configs(activation)]
        kernels: list[tuple[str, Any]] = [("sm90.wgmma_w4", config) for config in [*configs, *grouped_configs()]]
        kernels += [
            ("sm90.interleave", InterleaveConfig(*kind)) for kind in ((True, False), (True, True), (False, False))
        ]
        compile_all(list(dict.fromkeys(kernels)), 2, Console())
        return
    peaks = measure_peaks()
    shapes = itertools.product(SHAPES, arguments.tokens, arguments.activations)
    rows: list[dict[str, Any]] = []
    for (n, k), tokens, activation in shapes:
        rows += report(sweep_dense(n, k, tokens, activation))
    for tokens in arguments.groups_tokens:
        rows += report(sweep_groups(tokens))
    if arguments.experts_tokens:
        weights = random_weights(EXPERTS, 2 * INTERMEDIATE, HIDDEN), random_weights(EXPERTS, HIDDEN, INTERMEDIATE)
        scale = torch.full((EXPERTS,), 1e-3, device="cuda")
        for tokens in arguments.experts_tokens:
            rows += report(sweep_experts(tokens, weights, scale))
    record("wgmma_sweep", rows, peaks)


if __name__ == "__main__":
    main()
