"""Times the variants of the decode kernel that a table in ops/dispatch/decode_choice.py is chosen from.

    python benchmarks/sweep_decode_mm.py --warm             # no GPU: compiles them into the kernel cache
    python benchmarks/sweep_decode_mm.py [--tokens 1 16]    # on the GPU: checks and times them, the fastest first

Dense products of three shapes of DeepSeek V4 against cuBLAS bf16 in the same run, and the two grouped products of
Flash's experts (256, top-6) for a number of tokens. Weights rotate through more than the L2.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from harness import measure_peaks, record
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import decode_choice, decode_mm
from dsv4_compile.ops.dispatch.decode_mm import Config
from dsv4_compile.ops.dispatch.moe_align import align
from dsv4_compile.timing import copies_beyond_l2, time_variants

SHAPES = ((4096, 4096), (32768, 1024), (7168, 16384))
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 256, 6, 4096, 2048
BYTES_A_WEIGHT = 0.5625
Activation = Literal["packed", "bf16"]
SMS = 132


def dense_variants(rows: int, k: int, tokens: int, activation: Activation) -> list[Config]:
    """The table's variant, and those that ``dsv4-compile tune`` tries."""
    shape = (tokens, (rows,), k, activation, False, torch.bfloat16, activation == "packed")
    chosen = decode_choice.choose(*shape)
    return list(dict.fromkeys([*([] if chosen is None else [chosen]), *decode_choice.variants(*shape)]))


def grouped_variants(is_gate_up: bool) -> Iterator[Config]:
    """Variants of one of the two products of experts."""
    k, out_dtype = (HIDDEN, torch.bfloat16) if is_gate_up else (INTERMEDIATE, torch.float32)
    for block in decode_choice.GROUPED_BLOCKS:
        config = decode_choice.choose_grouped(block, k, is_gate_up, is_gate_up, False, out_dtype)
        if config is not None:
            yield config


def name_of(variant: Any) -> str:
    """What a shape leaves open of a variant."""
    return variant.block_name if isinstance(variant, Config) else str(variant)


def random_weights(*shape: int) -> tuple[Tensor, Tensor]:
    """Codes [..., N, K/2] and block scales of moderate size for a weight [..., N, K]."""
    *lead, k = shape
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(0x28, 0x48, (*lead, k // 16), dtype=torch.uint8, device="cuda")
    return codes, scales.view(torch.float8_e4m3fn)


def sweep_dense(rows: int, k: int, tokens: int, activation: Activation) -> list[dict[str, Any]]:
    """Times of all variants of a shape, each first compared with float64 on the first weight."""
    copies = copies_beyond_l2(int(rows * k * BYTES_A_WEIGHT))
    weights = [random_weights(rows, k) for _ in range(copies)]
    one = torch.ones(1, device="cuda")
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    operands: tuple[Tensor, Tensor | None, Tensor | None] = (x, None, None)
    exact = x.double()
    if activation == "packed":
        a_codes, a_scales, a_scale = nvfp4.quantize(x)
        operands, exact = (a_codes, a_scales, a_scale.reshape(1)), nvfp4.scaled_codes(a_codes, a_scales).double()
        exact *= a_scale
    out = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")

    def call(config: Config, weight: tuple[Tensor, Tensor]) -> None:
        codes, scales = weight
        decode_mm.decode_mm(config, *operands, [codes], [scales], [one], None, out)

    expected = exact @ nvfp4.scaled_codes(*weights[0]).double().T
    variants: dict[Any, list[Callable[[], Any]]] = {}
    for config in dense_variants(rows, k, tokens, activation):
        out.fill_(float("nan"))
        call(config, weights[0])
        error = float((out.double() - expected).norm() / expected.norm())
        assert error < 4e-3, f"{config}: relative error {error}"
        variants[config] = [lambda c=config, w=weight: call(c, w) for weight in weights]
    plain = [torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, copies // 4))]
    variants["cublas_bf16"] = [lambda w=weight: torch.mm(x, w.T) for weight in plain]
    timings = time_variants(variants, replays=10)
    return [
        {"op": "nvfp4_mm", "activation": activation, "rows": rows, "k": k, "tokens": tokens, "variant": name_of(name)}
        | {"median_us": t.median_us, "min_us": t.min_us, "max_us": t.max_us}
        for name, t in sorted(timings.items(), key=lambda item: item[1].median_us)
    ]


def sweep_grouped(tokens: int) -> list[dict[str, Any]]:
    """Times of the two products of Flash's experts, each token's experts drawn at random."""
    gate_up, down = random_weights(EXPERTS, 2 * INTERMEDIATE, HIDDEN), random_weights(EXPERTS, HIDDEN, INTERMEDIATE)
    scale = torch.full((EXPERTS, 1), 1e-3, device="cuda")
    slots = tokens * TOP_K
    variants: dict[Any, list[Callable[[], Any]]] = {}
    for _ in range(4):
        ids = torch.stack([torch.randperm(EXPERTS, device="cuda")[:TOP_K] for _ in range(tokens)])
        alignment = align(ids, EXPERTS, decode_choice.GROUPED_TILE_ROWS)
        x, x_scales, x_scale = nvfp4.quantize(torch.randn(tokens, HIDDEN, device="cuda"))
        h = torch.randn(slots, INTERMEDIATE, device="cuda").bfloat16()
        y = torch.empty(slots, HIDDEN, device="cuda")
        amax = torch.empty(SMS, device="cuda")
        for config in grouped_variants(True):
            variants.setdefault(("gate_up", config), []).append(
                lambda c=config, a=alignment, x=x, s=x_scales, g=x_scale, h=h, m=amax: decode_mm.grouped_decode_mm(
                    c,
                    x,
                    s,
                    g.reshape(1),
                    *gate_up,
                    scale,
                    a.schedule,
                    h,
                    sorted_slots=a.sorted_slots,
                    top_k=TOP_K,
                    swiglu_limit=10.0,
                    partial_amax=m,
                )
            )
        for config in grouped_variants(False):
            variants.setdefault(("down", config), []).append(
                lambda c=config, a=alignment, h=h, y=y: decode_mm.grouped_decode_mm(
                    c, h, None, scale[0], *down, scale, a.schedule, y
                )
            )
    timings = time_variants(variants, replays=10)
    return [
        {"op": "nvfp4_moe", "product": product, "tokens": tokens, "variant": name_of(config)}
        | {"median_us": t.median_us, "min_us": t.min_us, "max_us": t.max_us}
        for (product, config), t in sorted(timings.items(), key=lambda item: (item[0][0], item[1].median_us))
    ]


def warm(tokens: list[int], activations: list[Activation]) -> None:
    """Compiles every variant; the routing kernel of the grouped sweep comes with ``dsv4-compile warm``."""
    from rich.console import Console

    from dsv4_compile.warming import compile_all

    shapes = itertools.product(SHAPES, tokens, activations)
    dense = [config for (rows, k), count, kind in shapes for config in dense_variants(rows, k, count, kind)]
    configs = dict.fromkeys([*dense, *grouped_variants(True), *grouped_variants(False)])
    compile_all([("sm90.decode_mm", config) for config in configs], 2, Console())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--activations", nargs="+", choices=("packed", "bf16"), default=["packed", "bf16"])
    parser.add_argument("--warm", action="store_true", help="compile only")
    arguments = parser.parse_args()
    if arguments.warm:
        warm(arguments.tokens, arguments.activations)
        return
    peaks = measure_peaks()
    shapes = itertools.product(SHAPES, arguments.tokens, arguments.activations)
    rows = [row for (n, k), tokens, activation in shapes for row in sweep_dense(n, k, tokens, activation)]
    for tokens in arguments.tokens:
        rows += sweep_grouped(tokens)
    for row in rows:
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
    record("decode_mm_sweep", rows, peaks)


if __name__ == "__main__":
    main()
