"""Kernels compiled before they are needed: which a model needs is found on the meta device, and all of them are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dsv4_compile.demo import demo_model
from dsv4_compile.ops.dispatch.wgmma_choice import INTERLEAVED_TOKENS, plan
from dsv4_compile.ops.kernels import cache
from dsv4_compile.warming import MAX_TOKENS, kernels_of, model_calls, token_counts, warm

WIDE = {"hidden_size": 512, "moe_intermediate_size": 256, "head_dim": 128, "q_lora_rank": 256, "o_lora_rank": 256}


@pytest.fixture(scope="module")
def calls() -> list[Any]:
    """The operator calls of a small DeepSeek V4 with one layer of each kind, at widths of the tensor-core kernels."""
    return model_calls(demo_model(**WIDE).to("meta"))


def test_every_operator_has_a_kernel(calls: list[Any]) -> None:
    """Guards against an operator of the graph that nothing runs on a GPU, and against a kernel that is not looked for."""
    kernels, without = kernels_of(calls, [1, 64, 4096])
    assert without == set()
    names = {name for name, _ in kernels}
    assert {"sm90.decode_mm", "sm90.wgmma_w4", "sm90.moe_align", "sm90.rms_norm_quantize_nvfp4"} <= names
    assert len(set(kernels)) == len(kernels)


def test_kernels_do_not_grow_with_token_counts(calls: list[Any]) -> None:
    """Guards against a configuration that holds a number of tokens: a cache without an end."""
    few, _ = kernels_of(calls, token_counts(MAX_TOKENS))
    every, _ = kernels_of(calls, sorted({*token_counts(MAX_TOKENS), *range(65, 400), *range(4000, 4100)}))
    assert set(every) == set(few)
    assert len(few) < 150


def test_token_counts() -> None:
    """Guards against a count that is skipped: every small one, one of each tile of 32 beyond, and the last."""
    assert token_counts(5) == [1, 2, 3, 4, 5]
    counts = token_counts(1000)
    assert counts[:64] == list(range(1, 65))
    assert counts[-1] == 1000
    assert all(later - earlier <= 32 for earlier, later in pairwise(counts[63:]))


@pytest.mark.parametrize("activation", ["f16", "bf16"])
def test_variants_between_token_counts(activation: Any) -> None:
    """Guards against a variant that is the fastest for a few numbers of tokens only, none of them looked up.

    A bf16 activation of many tokens is not interleaved: that is another kernel, which the last tokens of 280 take.
    """

    def kernels(counts: Iterable[int], n: int, k: int) -> set[Any]:
        return {
            (part.variant, activation == "f16" or count <= INTERLEAVED_TOKENS)
            for count in counts
            for part in plan(count, (n,), k, 132, activation)
        }

    for n, k in itertools.product((512, 1024, 1536, 4096, 8192, 32768), (1024, 2048, 4096, 8192)):
        assert kernels(range(17, 4096, 7), n, k) <= kernels(token_counts(4096), n, k)


def test_warms_once(calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a second run that compiles again, and against a report that counts wrongly."""
    compiled: list[Any] = []

    def compile_kernel(name: str, config: Any, shared_object: Path) -> None:
        compiled.append((name, config))
        shared_object.write_bytes(b"code")

    runtime = tmp_path / "dsl" / cache.RUNTIME_NAME
    runtime.parent.mkdir()
    runtime.write_bytes(b"runtime")
    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "runtime_library", lambda: runtime)
    monkeypatch.setattr(cache, "compile_kernel", compile_kernel)
    monkeypatch.setattr("dsv4_compile.warming.model_calls", lambda model, options: calls)
    quiet = Console(quiet=True)
    first = warm(None, max_tokens=3, jobs=1, console=quiet)
    second = warm(None, max_tokens=3, jobs=1, console=quiet)
    assert (first.compiled, first.found) == (len(compiled), 0)
    assert (second.compiled, second.found) == (0, len(compiled))
    assert {path.name for path in (tmp_path / "cache").glob("*.so")} >= {cache.RUNTIME_NAME}
    assert len(list((tmp_path / "cache").glob("sm90.*.so"))) == len(compiled) == len(set(compiled))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "sm_100a"}, "arch must be sm_90a, the only one with kernels, got 'sm_100a'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
    ],
)
def test_rejects(arguments: dict[str, Any], message: str) -> None:
    """Guards against a run of minutes that ends in a traceback."""
    with pytest.raises(ValueError, match=message):
        warm(torch.nn.Identity(), **arguments)
