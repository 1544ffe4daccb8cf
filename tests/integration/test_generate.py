"""HuggingFace's DeepSeek V4 through its own ``generate``: prefill, then decode on its dynamic cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_compile.demo import CONTEXT, demo_model
from dsv4_compile.quantization import quantize_
from dsv4_compile.testing import Capture, Rewritten

NEW_TOKENS = 4


@dataclass
class Generated:
    """Tokens [n] and logits [n, vocab] of a greedy continuation, cached; the same logits from one uncached forward."""

    tokens: Tensor
    cached: Tensor
    uncached: Tensor


def generate(model: Any, prompt: Tensor) -> Generated:
    found = model.generate(
        prompt,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    logits = model(found.sequences[:, :-1], use_cache=False).logits[0, CONTEXT - 1 :]
    return Generated(found.sequences[0, CONTEXT:], torch.cat(found.logits), logits)


@dataclass
class Runs:
    compiled: Generated
    graphs: list[Rewritten]
    graph_breaks: dict[str, int]
    packed: list[str]
    shorter: Tensor  # logits of the eager model for all but the last tokens of a sequence, and for the whole of it
    longer: Tensor


@pytest.fixture(scope="module")
def runs() -> Runs:
    """One layer of each kind, every token with a global scale of its own: a row is then quantised alike in prefill, in
    decode and without a cache, which one scale for a whole prompt cannot promise."""
    model = demo_model()
    torch.manual_seed(1)
    prompt = torch.randint(0, model.config.vocab_size, (1, CONTEXT))
    recorder = Capture({"gsa": "token"})
    with torch.inference_mode():
        report = quantize_(model)
        sequence = torch.cat([prompt, prompt[:, :NEW_TOKENS]], dim=1)
        longer = model(sequence, use_cache=False).logits[0, :-NEW_TOKENS]
        shorter = model(sequence[:, :-NEW_TOKENS], use_cache=False).logits[0]
        torch._dynamo.reset()
        torch._dynamo.utils.counters["graph_break"].clear()
        model.forward = torch.compile(model.forward, backend=recorder, dynamic=False)
        compiled = generate(model, prompt)
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    return Runs(compiled, recorder.graphs, breaks, report.quantized, shorter, longer)


def test_every_graph_is_covered(runs: Runs) -> None:
    """Prefill, each decode step and the uncached forward read all packed weights, and none of them dequantised."""
    assert len(runs.graphs) == 1 + (NEW_TOKENS - 1) + 1
    for graph in runs.graphs:
        assert "dsv4.dequantize_nvfp4" not in graph.after
        assert sorted(weight.name for weight in graph.bound.weights if weight.packed is not None) == sorted(runs.packed)
        assert len(re.findall(r"^w\d+: nvfp4", graph.after, re.MULTILINE)) == len(runs.packed)  # inputs that are read
        assert graph.counts["moe"] == 3
        assert graph.counts["grouped_linear"] == 3


def test_no_graph_breaks(runs: Runs) -> None:
    """The cache is the model's own, a Python object: it must not break what Dynamo traces without this backend."""
    assert runs.graph_breaks == {}


def test_cached_decode_is_the_uncached_forward(runs: Runs, sqnr_db: Any) -> None:
    """A graph that kept an activation of another step, or read another layer's weight, would differ as bf16 does, by
    10 dB. On some processors the two agree in every bit; elsewhere sums are ordered by their length, and an activation
    code that tips over costs up to 8 dB more than the eager model loses by the length of its input alone."""
    compiled = runs.compiled
    by_length = min(sqnr_db(longer, shorter) for longer, shorter in zip(runs.longer, runs.shorter, strict=True))
    assert by_length >= 22  # else the bound below would let those mistakes pass
    steps = zip(compiled.uncached, compiled.cached, strict=True)
    assert min(sqnr_db(uncached, cached) for uncached, cached in steps) >= min(30, by_length - 8)
    assert torch.equal(compiled.tokens, compiled.cached.argmax(dim=-1))
    assert torch.equal(compiled.tokens, compiled.uncached.argmax(dim=-1))
