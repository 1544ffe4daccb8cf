"""HuggingFace's DeepSeek V4 through its own ``generate``: prefill, then decode on its dynamic cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_compile.demo import CONTEXT, demo_model
from dsv4_compile.printing import packed_part
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
    eager: Generated
    compiled: Generated
    graphs: list[Rewritten]
    graph_breaks: dict[str, int]
    packed: list[str]


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
        eager = generate(model, prompt)
        torch._dynamo.reset()
        torch._dynamo.utils.counters["graph_break"].clear()
        model.forward = torch.compile(model.forward, backend=recorder, dynamic=False)
        compiled = generate(model, prompt)
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    return Runs(eager, compiled, recorder.graphs, breaks, report.quantized)


def test_every_graph_is_covered(runs: Runs) -> None:
    """Prefill, each decode step and the uncached forward read all packed weights, and none of them dequantised."""
    assert len(runs.graphs) == 1 + (NEW_TOKENS - 1) + 1
    for graph in runs.graphs:
        assert "dsv4.dequantize_nvfp4" not in graph.after
        read = {int(part[0]) for node in graph.graph.find_nodes(op="placeholder") if (part := packed_part(node))}
        assert sorted(graph.bound.weights[number].name for number in read) == sorted(runs.packed)
        assert graph.counts["moe"] == 3
        assert graph.counts["grouped_linear"] == 3


def test_no_graph_breaks(runs: Runs) -> None:
    """The cache is the model's own, a Python object: it must not break what Dynamo traces without this backend."""
    assert runs.graph_breaks == {}


def test_cached_decode_is_the_uncached_forward(runs: Runs, sqnr_db: Any) -> None:
    """A graph that kept the activation of another step, or another layer's weight, would differ as bf16 does."""
    print("compiled", [round(sqnr_db(a, b), 1) for a, b in zip(runs.compiled.uncached, runs.compiled.cached)])
    print("eager", [round(sqnr_db(a, b), 1) for a, b in zip(runs.eager.uncached, runs.eager.cached)])
    print(runs.compiled.tokens, runs.compiled.uncached.argmax(-1), runs.eager.tokens, runs.eager.uncached.argmax(-1))
    assert torch.equal(runs.compiled.tokens, runs.compiled.cached.argmax(dim=-1))
    assert torch.equal(runs.compiled.tokens, runs.compiled.uncached.argmax(dim=-1))
