"""The demo: HuggingFace's DeepSeek V4, small and with random weights, eager and compiled to NVFP4."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from torch import Tensor, nn

from dsv4_compile.explanation import explain
from dsv4_compile.quantization import quantize_
from dsv4_compile.testing import capture

CONTEXT = 24
SEED = 0


def demo_model(**changes: int) -> Any:
    """DeepSeek V4 with one layer of each kind: sliding, CSA and HCA attention; hash-routed and top-k experts.

    Args:
        changes: other values of HuggingFace's configuration than the small ones here.

    Raises:
        ImportError: transformers 5.17 or newer is not installed.
    """
    try:
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    except ImportError as error:
        raise ImportError("the demo needs transformers with DeepSeek V4: pip install 'transformers>=5.17'") from error

    small = {
        "vocab_size": 512,
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "num_attention_heads": 8,
        "head_dim": 64,
        "q_lora_rank": 64,
        "o_groups": 2,
        "o_lora_rank": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 4,
        "sliding_window": 16,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
        "max_position_embeddings": 1024,
    }
    config = DeepseekV4Config(**{**small, **changes})
    torch.manual_seed(SEED)
    model = DeepseekV4ForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            table = getattr(layer.mlp.gate, "tid2eid", None)
            if table is not None:  # each token id its own experts, where a checkpoint would bring the table
                for token in range(table.shape[0]):
                    table[token] = torch.randperm(config.n_routed_experts)[: config.num_experts_per_tok]
    return model


def generate(model: Any, prompt: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy continuation in a window of fixed length, so that one compiled graph serves every step.

    Returns:
        The generated token ids [num_tokens] and the logits [num_tokens, vocab] they were taken from.
    """
    window = torch.zeros((1, CONTEXT + num_tokens), dtype=torch.long)
    window[:, :CONTEXT] = prompt
    logits = []
    for position in range(CONTEXT, CONTEXT + num_tokens):
        # Attention is causal: what lies behind the last known token does not reach its logits.
        step = model(window, use_cache=False).logits[0, position - 1].float()
        window[0, position] = step.argmax()
        logits.append(step)
    return window[0, CONTEXT:], torch.stack(logits)


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantisation-noise ratio in dB, ``10 log10(|reference|^2 / |reference - other|^2)``."""
    reference, other = reference.double(), other.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


def run_demo(console: Console, gsa: str = "tensor", num_tokens: int = 8) -> None:
    """Prints the tables, one expert's graph before and after, generated tokens and how to go on."""
    logging.getLogger("dsv4_compile").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="(?s).*functools.lru_cache", module="torch._dynamo")  # transformers' own
    started = time.perf_counter()
    model = demo_model()
    prompt = torch.randint(0, model.config.vocab_size, (1, CONTEXT))
    window = torch.nn.functional.pad(prompt, (0, num_tokens))
    options = {"gsa": gsa}

    console.rule("1. What becomes NVFP4")
    console.print(
        "HuggingFace's DeepseekV4ForCausalLM, unchanged: one layer of each kind, seeded random weights, bf16.\n"
    )
    with console.status("tracing the model"):
        found = explain(model, window, use_cache=False, options=options)
    console.print(found.table(), "", found.activation_table(), "", found.summary(), "")

    console.rule("2. One shared expert, before and after the passes")
    _show_expert(console, model.model.layers[0].mlp.shared_experts, options)

    console.rule("3. Tokens")
    with torch.inference_mode():
        eager_tokens, eager_logits = generate(model, prompt, num_tokens)
        quantize_(model)  # 4.5 bits a weight; the eager model still runs, on dequantised weights
        weight_only_tokens, _ = generate(model, prompt, num_tokens)
        with console.status("compiling: Inductor writes C++ for everything between the NVFP4 operators"):
            compile_started = time.perf_counter()
            compiled = torch.compile(model, backend="dsv4", options=dict(options))
            compiled(window, use_cache=False)
            compile_seconds = time.perf_counter() - compile_started
        compiled_tokens, compiled_logits = generate(compiled, prompt, num_tokens)
    console.print(f"eager, bf16                  {eager_tokens.tolist()}")
    console.print(f"eager, NVFP4 weights         {weight_only_tokens.tolist()}")
    console.print(f"compiled, NVFP4 throughout   {compiled_tokens.tolist()}")
    console.print(
        f"\nLogits of the first step against bf16: {sqnr_db(eager_logits[0], compiled_logits[0]):.1f} dB SQNR. Random "
        "weights make the\nlogits of a deep model chaotic; `make accuracy` measures a trained one.\n"
        f"Compiled in {compile_seconds:.0f} s, the whole demo took {time.perf_counter() - started:.0f} s.\n"
    )
    console.print(Panel(_HOW_TO_GO_ON, title="How to go on", title_align="left"))


def _show_expert(console: Console, expert: nn.Module, options: dict[str, Any]) -> None:
    hidden = torch.randn(4, expert.gate_proj.in_features, dtype=torch.bfloat16)  # type: ignore[union-attr, arg-type]
    _, (graph,) = capture(expert, hidden, options=options)
    console.print("[bold]before[/bold]")
    console.print(graph.before, markup=False, highlight=False)
    console.print("\n[bold]after[/bold]")
    console.print(graph.after, markup=False, highlight=False)
    console.print()


_HOW_TO_GO_ON = """\
Your own model, unchanged; its weights are packed when it is compiled:
  torch.compile(model, backend="dsv4", mode="reduce-overhead")
Packed before, which frees the bf16 originals:
  dsv4_compile.quantize_(model)
What runs as NVFP4, and why the rest does not:
  print(dsv4_compile.explain(model, input_ids))
The same for a full-size model, from its config alone:
  dsv4-compile explain path/to/config.json --layers 4"""
