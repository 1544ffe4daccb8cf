"""The command ``dsv4-compile``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from dsv4_compile import nvfp4
from dsv4_compile.options import ACTIVATIONS


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

    warm = commands.add_parser("warm", help="compile the GPU kernels that a HuggingFace model needs; no GPU required")
    warm.add_argument(
        "--config", metavar="PATH", help="folder of a model, or its config.json; default DeepSeek V4 Flash"
    )
    warm.add_argument("--arch", default="sm_90a", help="GPU architecture (default sm_90a)")
    warm.add_argument("--layers", type=int, help="look at the first layers only (default: until every kind was seen)")
    warm.add_argument("--max-tokens", type=int, default=16384, help="most tokens of one call (default 16384)")
    warm.add_argument("--gsa", choices=nvfp4.GRANULARITIES, default="tensor", help="granularity of the global scale")
    warm.add_argument("--activations", choices=ACTIVATIONS, default="nvfp4", help="bf16 for W4A16")
    warm.add_argument("--jobs", type=int, help="compiling processes (default one a core, at most 8)")

    tune = commands.add_parser(
        "tune", help="time the variants of each product of a model on this GPU; keep the fastest"
    )
    tune.add_argument(
        "--config", metavar="PATH", help="folder of a model, or its config.json; default DeepSeek V4 Flash"
    )
    tune.add_argument("--layers", type=int, help="look at the first layers only (default: until every kind was seen)")
    tune.add_argument(
        "--tokens", type=int, nargs="+", metavar="N", help="numbers of tokens of a call (default 1 to 4096)"
    )
    tune.add_argument("--gsa", choices=nvfp4.GRANULARITIES, default="tensor", help="granularity of the global scale")
    tune.add_argument("--activations", choices=ACTIVATIONS, default="nvfp4", help="bf16 for W4A16")
    tune.add_argument("--again", action="store_true", help="time what was timed before too")
    tune.add_argument("--compile-only", action="store_true", help="compile the variants, for a GPU without a compiler")
    tune.add_argument("--jobs", type=int, help="compiling processes (default one a core, at most 8)")

    quantize = commands.add_parser("quantize", help="write a checkpoint as NVFP4 in ModelOpt's layout")
    quantize.add_argument("source", help="a .safetensors file, an index.json, or a folder with either")
    quantize.add_argument("destination", help="folder to write; one that an interrupted run left is gone on with")
    for option, meaning in (
        ("--include", "names to pack, such as '*.experts.*'"),
        ("--exclude", "names to leave alone"),
    ):
        quantize.add_argument(option, action="append", metavar="PATTERN", help=f"{meaning}; may be repeated")
    quantize.add_argument(
        "--search",
        choices=("none", "six_four", "wide"),
        default="none",
        help="how block scales are chosen (default none)",
    )
    quantize.add_argument(
        "--share",
        choices=("experts", "merged", "none"),
        default="experts",
        help="weights with one global scale: gate and up of an expert (default), all that engines merge, none",
    )
    quantize.add_argument("--shard-gib", type=float, default=1.0, help="size at which an output file ends (default 1)")
    quantize.add_argument("--layers", action="store_true", help="show the SQNR of each layer too")

    compare = commands.add_parser("compare", help="show module by module how far two checkpoints are apart")
    compare.add_argument("reference", help="folder of a HuggingFace model: config.json and weights")
    compare.add_argument(
        "other", nargs="?", help="checkpoint of the same model; without it, the reference packed to NVFP4"
    )
    compare.add_argument("--layers", type=int, help="look at the first layers only")
    compare.add_argument(
        "--text", metavar="FILE", help="run on this text, by the reference's tokenizer, not on random ids"
    )
    compare.add_argument("--tokens", type=int, default=64, help="most tokens of the input (default 64)")
    compare.add_argument("--limit", type=int, default=30, help="modules to show, 0 for all (default 30)")
    compare.add_argument("--plot", metavar="FILE", help="draw a PNG, SVG or PDF")
    compare.add_argument("--json", metavar="FILE", help="write all figures")
    inspect = commands.add_parser("inspect", help="show what a checkpoint holds, in which formats, and its problems")
    inspect.add_argument("path", help="a .safetensors file, an index.json, or a folder with either")
    inspect.add_argument("--headers-only", action="store_true", help="do not read the scales")

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


def _warm(parsed: argparse.Namespace) -> int:
    from dsv4_compile.warming import warm

    logging.getLogger("dsv4_compile").setLevel(logging.ERROR)  # the progress bar says what is compiled
    console = Console()
    report = warm(
        model_on_meta(parsed.config, parsed.layers or "every kind"),
        arch=parsed.arch,
        max_tokens=parsed.max_tokens,
        options={"gsa": parsed.gsa, "activations": parsed.activations},
        jobs=parsed.jobs,
        console=console,
    )
    size = f"{report.num_bytes / 2**20:.1f} MiB"
    console.print(f"{report.compiled} kernels compiled, {report.found} found, {size} in {report.folder}")
    if report.without_kernel:
        console.print(f"no kernel for {parsed.arch} yet: {', '.join(report.without_kernel)}")
    return 0


def _tune(parsed: argparse.Namespace) -> int:
    from dsv4_compile.tuning import TOKENS, tune

    console = Console()
    report = tune(
        model_on_meta(parsed.config, parsed.layers or "every kind"),
        tokens=parsed.tokens or TOKENS,
        options={"gsa": parsed.gsa, "activations": parsed.activations},
        compile_only=parsed.compile_only,
        again=parsed.again,
        jobs=parsed.jobs,
        console=console,
    )
    if report.answers:
        console.print(report.table())
    console.print(report.summary())
    return 1 if report.wrong else 0


def _quantize(parsed: argparse.Namespace) -> int:
    from dsv4_compile.checkpoint.quantize import quantize_checkpoint

    console = Console()
    report = quantize_checkpoint(
        parsed.source,
        parsed.destination,
        include=parsed.include,
        exclude=parsed.exclude,
        search=parsed.search,
        share=parsed.share,
        shard_bytes=int(parsed.shard_gib * 2**30),
        console=console,
    )
    if report.resumed:
        console.print(f"{report.resumed} files of an interrupted run were kept")
    if report.quantized:
        console.print(report.table("kind"), *([report.table("layer")] if parsed.layers else []))
    console.print(report.summary(), markup=False, highlight=False)
    return 0


def _compare(parsed: argparse.Namespace) -> int:
    from dsv4_compile.checkpoint import load_checkpoint
    from dsv4_compile.comparison import compare
    from dsv4_compile.quantization import quantize_

    for option in ("tokens", "limit"):
        if getattr(parsed, option) < (option == "tokens"):
            raise ValueError(f"--{option} must be at least {int(option == 'tokens')}, got {getattr(parsed, option)}")
    logging.getLogger("dsv4_compile").setLevel(logging.ERROR)
    console = Console()
    with console.status("reading the reference") as status:
        models = [model_on_meta(parsed.reference, parsed.layers) for _ in range(2)]
        load_checkpoint(models[0], parsed.reference, strict=parsed.layers is None)
        status.update("reading the other model")
        load_checkpoint(models[1], parsed.other or parsed.reference, strict=parsed.layers is None)
        if parsed.other is None:
            status.update("packing its copy to NVFP4")
            quantize_(models[1])
        input_ids = _input_ids(parsed, models[0].config)
        found = compare(models[0], models[1], {"input_ids": input_ids, "use_cache": False}, progress=status.update)
    console.print(found.table(parsed.limit or None))
    console.print(found.summary(), markup=False, highlight=False)
    if parsed.json:
        found.save(parsed.json)
    if parsed.plot:
        found.plot(parsed.plot)
    return 0


def _input_ids(parsed: argparse.Namespace, config: Any) -> torch.Tensor:
    """Ids [1, tokens]: those of a text, or random ones, always the same."""
    if parsed.text is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (1, parsed.tokens), generator=generator)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parsed.reference, local_files_only=True)
    ids = tokenizer(Path(parsed.text).read_text(encoding="utf-8"))["input_ids"][: parsed.tokens]
    if not ids:
        raise ValueError(f"--text must hold at least one token, got {parsed.text}")
    return torch.tensor([ids])


def _inspect(parsed: argparse.Namespace) -> int:
    from dsv4_compile.checkpoint import inspect

    console = Console()
    with console.status("reading headers" if parsed.headers_only else "reading headers and scales"):
        found = inspect(parsed.path, scales=not parsed.headers_only)
    console.print(found.table())
    console.print(found.summary(), markup=False, highlight=False)
    return 1 if found.problems else 0


def model_on_meta(config_path: str | None, num_layers: int | Literal["every kind"] | None = None) -> Any:
    """Builds a HuggingFace causal language model on the meta device, in bf16, from its config alone.

    Args:
        config_path: folder of a model or path of its ``config.json``; None for transformers' default DeepSeek V4.
        num_layers: keep only that many layers; as many as hold one of every kind; None for all.

    Raises:
        ImportError: transformers is not installed.
        OSError, ValueError: no config there, or transformers does not know the model.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError("explain needs transformers to build the model: pip install 'transformers>=5.17'") from error

    if config_path is None:
        config = AutoConfig.for_model("deepseek_v4")
    else:
        config = AutoConfig.from_pretrained(config_path, local_files_only=True)
    if num_layers == "every kind":
        num_layers = _layers_of_every_kind(config)
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


def _layers_of_every_kind(config: Any) -> int:
    """The number of first layers among which every kind of attention and of MLP occurs."""
    kinds = [getattr(config, name, None) or [] for name in ("layer_types", "mlp_layer_types")]
    return max([1, *(values.index(kind) + 1 for values in kinds for kind in set(values))])


_COMMANDS = {
    "demo": _demo,
    "explain": _explain,
    "warm": _warm,
    "tune": _tune,
    "inspect": _inspect,
    "quantize": _quantize,
    "compare": _compare,
}

if __name__ == "__main__":
    sys.exit(main())
