"""The command ``dsv4-compile``: ``demo`` and ``explain``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from dsv4_compile import nvfp4


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="dsv4-compile", description="NVFP4 compilation of eager PyTorch models")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="compile a small DeepSeek V4 of HuggingFace's and show what was rewritten")
    demo.add_argument("--gsa", choices=nvfp4.GRANULARITIES, default="tensor", help="granularity of the global scale")
    demo.add_argument("--tokens", type=int, default=8, help="tokens to generate (default 8)")

    explain = commands.add_parser("explain", help="show which regions of a HuggingFace model become NVFP4 operators")
    explain.add_argument("config", help="folder of a model, or its config.json; no weights are read or allocated")
    explain.add_argument("--layers", type=int, help="look at the first layers only")
    explain.add_argument("--tokens", type=int, default=64, help="length of the input (default 64)")
    explain.add_argument("--gsa", choices=nvfp4.GRANULARITIES, default="tensor", help="granularity of the global scale")
    explain.add_argument("--dump", metavar="FILE", default="", help="write the graphs before and after; - for stderr")

    parsed = parser.parse_args(arguments)
    try:
        return _COMMANDS[parsed.command](parsed)
    except (ValueError, OSError, ImportError) as error:
        print(f"dsv4-compile {parsed.command}: {error}", file=sys.stderr)
        return 1


def _demo(parsed: argparse.Namespace) -> int:
    from dsv4_compile.demo import run_demo

    if parsed.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {parsed.tokens}")
    run_demo(Console(), gsa=parsed.gsa, num_tokens=parsed.tokens)
    return 0


def _explain(parsed: argparse.Namespace) -> int:
    from dsv4_compile.explanation import explain

    logging.getLogger("dsv4_compile").setLevel(logging.ERROR)  # that weights are packed is what the table says
    console = Console()
    model = model_on_meta(parsed.config, parsed.layers)
    input_ids = torch.zeros((1, parsed.tokens), dtype=torch.long, device="meta")
    with console.status("tracing the model"):
        found = explain(model, input_ids, use_cache=False, options={"gsa": parsed.gsa, "dump": parsed.dump})
    console.print(found.table(), found.activation_table(), found.summary())
    return 0


def model_on_meta(config_path: str, num_layers: int | None = None) -> Any:
    """Builds a HuggingFace causal language model on the meta device, in bf16, from its config alone.

    Args:
        config_path: folder of a model or path of its ``config.json``.
        num_layers: keep only that many layers; None for all.

    Raises:
        ImportError: transformers is not installed.
        OSError, ValueError: no config there, or transformers does not know the model.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("explain needs transformers to build the model: pip install 'transformers>=5.17'") from error

    config = AutoConfig.from_pretrained(config_path, local_files_only=True)
    if num_layers is not None:
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise ValueError(f"--layers must be between 1 and {config.num_hidden_layers}, got {num_layers}")
        config.num_hidden_layers = num_layers
        for name in ("layer_types", "mlp_layer_types"):
            if getattr(config, name, None):
                setattr(config, name, getattr(config, name)[:num_layers])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


_COMMANDS = {"demo": _demo, "explain": _explain}

if __name__ == "__main__":
    sys.exit(main())
