"""One decoder layer of DeepSeek V4 at Flash width: what NVFP4 costs its output and its choice of experts.

    python benchmarks/layer_accuracy.py [--tokens 64] [--experts 32]

HuggingFace's layer, bf16 eager against the rewritten graph run node by node (what the generated code computes but for
the order of sums). Hidden 4096, experts 2048 wide, compressed sparse attention at full width; 32 experts instead of
256, whose 13 GB would not fit beside their packed copies, so the layer's expert agreement is that of 32. The router by
itself is measured with all 256, on the bf16 layer's input of it. Random weights: gaussian with one input channel in 64
eight times as large, and norms that amplify one channel in 64 eight times, as those of trained models do. Such weights
show what rounding does to a layer, not what a trained model makes of it: `make accuracy` measures that.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accuracy import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dsv4_compile.demo import sqnr_db
from dsv4_compile.quantization import quantize_
from dsv4_compile.testing import capture

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "layer_accuracy.jsonl"
FLASH_EXPERTS = 256
OUTLIER, ONE_IN = 8.0, 64
SEED = 0


@dataclass
class LayerOutput:
    """What one layer computes: its residual streams, its two blocks, and the experts of each token."""

    layer: Tensor
    attention: Tensor
    moe: Tensor
    experts: Tensor


def make_model(num_experts: int) -> Any:
    """A one-layer DeepSeek V4 at Flash width with a small vocabulary, bf16, random weights with outlier channels."""
    from transformers import DeepseekV4Config, DeepseekV4Model

    config = DeepseekV4Config(
        vocab_size=1024,
        hidden_size=4096,
        moe_intermediate_size=2048,
        n_routed_experts=num_experts,
        num_experts_per_tok=6,
        num_hidden_layers=1,
        layer_types=["compressed_sparse_attention"],
        mlp_layer_types=["moe"],
    )
    with torch.device("meta"):
        model = DeepseekV4Model(config).to(torch.bfloat16).eval()
    model = model.to_empty(device="cpu")
    model.init_weights()  # rotary frequencies and the like
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "_hc" not in name and "position_bias" not in name:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if parameter.dim() >= 2 or name.endswith("layernorm.weight"):
            amplify(parameter)
    return model


def amplify(x: Tensor) -> Tensor:
    """Makes one channel in 64 eight times as large, in place."""
    x[..., torch.randperm(x.shape[-1])[: x.shape[-1] // ONE_IN]] *= OUTLIER
    return x


def run_layer(layer: nn.Module, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``DeepseekV4DecoderLayer.forward``, returning what it computes on the way, too; `main` compares it with that."""
    dtype = hidden.dtype
    post, comb, collapsed = layer.attn_hc(hidden)
    attention, _ = layer.self_attn(layer.input_layernorm(collapsed), **kwargs)
    hidden = post.to(dtype).unsqueeze(-1) * attention.unsqueeze(-2) + comb.to(dtype).transpose(-1, -2) @ hidden
    post, comb, collapsed = layer.ffn_hc(hidden)
    normed = layer.post_attention_layernorm(collapsed)
    _, weights, experts = layer.mlp.gate(normed)
    routed = layer.mlp.experts(normed.flatten(0, 1), experts, weights).view(normed.shape)
    moe = routed + layer.mlp.shared_experts(normed)
    hidden = post.to(dtype).unsqueeze(-1) * moe.unsqueeze(-2) + comb.to(dtype).transpose(-1, -2) @ hidden
    return hidden, attention, moe, experts


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of the experts in ``a`` [T, k] that ``b`` chose for the same token, in any order."""
    return (a.unsqueeze(-1) == b.unsqueeze(-2)).any(dim=-1).double().mean().item()


def router_agreement(normed: Tensor) -> dict[str, float]:
    """A router of all 256 experts on the bf16 layer's input: bf16 eager against rewritten, with each kind of gate."""
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

    config = DeepseekV4Config(hidden_size=normed.shape[-1], n_routed_experts=FLASH_EXPERTS, num_experts_per_tok=6)
    block = nn.ModuleDict({"gate": DeepseekV4TopKRouter(config).bfloat16()})
    amplify(block["gate"].weight.normal_(std=normed.shape[-1] ** -0.5))
    reference = block["gate"](normed)[2]
    found = {}
    for name, include in (("gate in bf16", ()), ("gate in NVFP4", ("gate.weight",))):
        if include:
            quantize_(block, include=include, exclude=())
        options = {"quantize_weights": False}
        experts, (graph,) = capture(lambda: block["gate"](normed)[2], options=options)
        if ("dsv4.nvfp4_mm" in graph.after) != bool(include):
            raise SystemExit(f"layer_accuracy: {name}: the router must run as named, got\n{graph.after}")
        found[name] = agreement(reference, experts)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the one sequence (default 64)")
    parser.add_argument("--experts", type=int, default=32, help="routed experts (default 32; Flash has 256)")
    args = parser.parse_args()
    started = time.perf_counter()
    progress = Console(stderr=True)

    def log(line: str) -> None:
        progress.print(f"{time.perf_counter() - started:5.0f} s  {line}", highlight=False)

    where = environment()
    torch.manual_seed(SEED)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    normed: list[Tensor] = []
    with torch.inference_mode():
        model = make_model(args.experts)
        log("model made")
        layer = model.layers[0]
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True),
            layer.mlp.register_forward_pre_hook(lambda _, args: normed.append(args[0])),
        ]
        model(torch.randint(0, 1024, (1, args.tokens)), use_cache=False)
        for hook in hooks:
            hook.remove()
        (hidden,), kwargs = calls[0]
        own = LayerOutput(*run_layer(layer, hidden, **kwargs))
        if not torch.equal(own.layer, layer(hidden, **kwargs)):
            raise SystemExit(
                "layer_accuracy: run_layer must compute what DeepseekV4DecoderLayer does, got another result"
            )
        log("bf16 layer run")

        figures: dict[str, dict[str, float]] = {}
        router = router_agreement(normed[0])
        log("router run")
        packed = copy.deepcopy(layer)
        report = quantize_(packed)
        log(str(report))
        for name, include in (("gate in bf16", ()), ("gate in NVFP4", ("mlp.gate.weight",))):
            if include:
                quantize_(packed, include=include, exclude=())
            results, (graph,) = capture(
                lambda: run_layer(packed, hidden, **kwargs), options={"quantize_weights": False}
            )
            if "dsv4.dequantize_nvfp4" in graph.after or graph.counts["moe"] != 1:
                raise SystemExit(f"layer_accuracy: every packed weight must be covered, got\n{graph.after}")
            found = LayerOutput(*results)
            figures[name] = {
                "layer_db": sqnr_db(own.layer, found.layer),
                "attention_db": sqnr_db(own.attention, found.attention),
                "moe_db": sqnr_db(own.moe, found.moe),
                "expert_agreement": agreement(own.experts, found.experts),
                "router_agreement_256": router[name],
            }
            log(f"compiled layer run, {name}")

    table = Table(
        title=f"DeepSeek V4 Flash layer, {args.experts} experts, {args.tokens} tokens: NVFP4 against bf16",
        title_justify="left",
    )
    header = (
        "",
        "layer, dB",
        "attention, dB",
        "MoE, dB",
        "same experts",
        f"same experts, router alone, {FLASH_EXPERTS}",
    )
    for index, column in enumerate(header):
        table.add_column(column, justify="right" if index else "left")
    for name, row in figures.items():
        decibels, shares = list(row.values())[:3], list(row.values())[3:]
        table.add_row(name, *(f"{value:.2f}" for value in decibels), *(f"{share:.1%}" for share in shares))
    Console().print(table)

    seconds = round(time.perf_counter() - started, 1)
    record = where | {
        "experts": args.experts,
        "tokens": args.tokens,
        "seed": SEED,
        "figures": figures,
        "seconds": seconds,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
