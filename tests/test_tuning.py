"""Variants timed on request: what is asked, what is believed, what is kept on disk, and who uses it."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from dsv4_compile import nvfp4, ops, tuning
from dsv4_compile.cli import main
from dsv4_compile.demo import demo_model
from dsv4_compile.ops.dispatch import decode_choice, nvfp4_mm, nvfp4_moe
from dsv4_compile.ops.dispatch import tuning as answers
from dsv4_compile.ops.dispatch.tuning import Answer, Question
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.registration import CUDA_IMPLEMENTATIONS
from dsv4_compile.timing import Timing
from dsv4_compile.tuning import operands, questions_of, tune_calls
from dsv4_compile.warming import Call, calls_of, model_calls

GPU = "Some GPU (80 GB)"
WIDE = {"hidden_size": 512, "moe_intermediate_size": 256, "head_dim": 128, "q_lora_rank": 256, "o_lora_rank": 256}
QUIET = Console(quiet=True)
USERS_CACHE = cache.folder()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty kernel cache, and no answers in memory."""
    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path / "cache"))
    answers.answers.cache_clear()
    yield tmp_path / "cache"
    answers.answers.cache_clear()


@pytest.fixture
def kernels(folder: Path) -> Path:
    """The folder with the kernels of the user's cache: the GPU's machine need not have a compiler."""
    if USERS_CACHE.is_dir():
        folder.mkdir(parents=True)
        for kernel in USERS_CACHE.glob("*.so"):
            (folder / kernel.name).symlink_to(kernel.resolve())
    return folder


@pytest.fixture(scope="module")
def traced() -> list[Call]:
    """The operator calls of a small DeepSeek V4 with one layer of each kind, at widths of the tensor-core kernels."""
    return model_calls(demo_model(**WIDE).to("meta"))


class OnGpu:
    """What dispatch looks at in a CUDA tensor."""

    is_cuda = True

    def get_device(self) -> int:
        return 0


def meta(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product(tokens: int, *rows: int, k: int = 512) -> Call:
    """``nvfp4_mm`` of packed operands."""
    e4m3, fp32 = torch.float8_e4m3fn, torch.float32
    weights = [[meta(n, k // 2) for n in rows], [meta(n, k // 16, dtype=e4m3) for n in rows]]
    scales = [meta(dtype=fp32) for _ in rows]
    activation = meta(tokens, k // 2), meta(tokens, k // 16, dtype=e4m3), meta(dtype=fp32)
    return Call(torch.ops.dsv4.nvfp4_mm.default, (*activation, *weights, scales, None, torch.bfloat16))


GPU_CALLS = [product(1, 256), product(64, 256), product(300, 256)]


def test_buckets() -> None:
    """Guards against answers for one count used far away, and against a count in a bucket below it."""
    buckets = [answers.bucket(tokens) for tokens in range(1, 20000)]
    assert all(tokens <= found for tokens, found in enumerate(buckets, 1))
    assert all(found < tokens * 9 / 8 + 8 for tokens, found in enumerate(buckets, 1))
    assert all(left <= right for left, right in pairwise(buckets))
    assert [answers.bucket(tokens) for tokens in (1, 3, 9, 25, 33, 64, 65, 2048, 2049)] == [
        1, 4, 16, 32, 36, 64, 72, 2048, 2304,
    ]  # fmt: skip


def test_every_product_asks(traced: list[Call]) -> None:
    """Guards against a product that tuning does not see, and against one question with two lists of variants."""
    asked = questions_of([call.at(tokens) for call in traced for tokens in (1, 64, 2048)])
    kinds = {key.split()[0] for key in asked}
    assert kinds == {"product", "experts", "groups"}
    for call in traced:
        if call.op in (torch.ops.dsv4.nvfp4_mm.default, torch.ops.dsv4.nvfp4_moe.default):
            assert questions_of([call.at(1)])
    for _, question in asked.values():
        assert question.default in question.variants
    at_one = questions_of([call.at(1) for call in traced])
    assert any(len(question.variants) > 5 for _, question in at_one.values())


def test_a_variant_decides_what_runs() -> None:
    """Guards against variants that are timed under different names and run the same kernels."""
    for tokens in (1, 20, 64, 2000):
        ((call, question),) = questions_of([product(tokens, 4096, k=4096)]).values()
        launched = {name: tuple(tuning.kernels_of_variant(call, question, name)) for name in question.variants}
        one_part = {name: kernels for name, kernels in launched.items() if name != nvfp4_mm.PLAN}
        assert len(set(one_part.values())) == len(one_part) > 3
        decode = {
            name for name, kernels in launched.items() if any(kernel == "sm90.decode_mm" for kernel, _ in kernels)
        }
        assert decode == {name for name in question.variants if name.startswith("decode")}
        assert bool(decode) == (tokens <= decode_choice.MAX_TOKENS)


def test_variants_of_experts() -> None:
    """Guards against tuning that cannot leave the table's path, and against the decode kernel for many rows."""
    few = nvfp4_moe._question(96, False, 256, 4096, 2048, True, 132)
    many = nvfp4_moe._question(24576, False, 256, 4096, 2048, True, 132)
    assert {plan.path for plan in few.variants.values()} == {"decode", "wgmma"}
    assert {plan.path for plan in many.variants.values()} == {"wgmma"}
    assert {plan.path for plan in nvfp4_moe._question(96, False, 256, 4096, 2048, False, 132).variants.values()} == {
        "wgmma"
    }
    assert few.default == "decode 2x4x2, tiles of 8"
    assert many.default == "wgmma 128"


def test_answers_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a file that nobody reads, another GPU's answers, and answers that a shape cannot run."""
    question = Question("a shape", {"table": 1, "other": 2}, "table")
    like: Any = OnGpu()
    name = GPU
    monkeypatch.setattr(answers, "_gpu", lambda index: name)
    assert answers.answer(question, like) == 1
    answers.record(GPU, {"a shape": Answer("other", 1.0, "table", 2.0)})
    answers.answers.cache_clear()  # as another process
    assert answers.answer(question, like) == 2
    assert answers.answer(question, torch.empty(0, device="meta")) == 1
    assert answers.answer(Question("another", {"table": 1, "other": 2}, "table"), like) == 1
    assert answers.answer(Question("a shape", {"table": 1}, "table"), like) == 1
    with answers.forced("a shape", "table"):
        assert answers.answer(question, like) == 1
    name = "Another GPU"
    assert answers.answer(question, like) == 1


def test_other_kernels_make_answers_void(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against times of kernels that are no longer there."""
    path = answers.record(GPU, {"a shape": Answer("other", 1.0, "table", 2.0)})
    monkeypatch.setattr(answers, "sources_digest", lambda: "0" * 20)
    assert answers.path_of(GPU) != path
    answers.answers.cache_clear()
    assert answers.answers(GPU) == {}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}', '{"a": {"variant": "x"}}', "\x00\xff"], ids=str)
def test_damaged_files(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a run that ends because a file of times is cut off, and against one that stays damaged."""
    path = answers.record(GPU, {"a": Answer("other", 1.0, "table", 2.0)})
    path.write_text(damage, encoding="latin-1")
    answers.answers.cache_clear()
    with caplog.at_level(logging.WARNING, "dsv4_compile"):
        assert answers.answers(GPU) == {}
    assert "cannot be read" in caplog.text
    answers.record(GPU, {"b": Answer("other", 1.0, "table", 2.0)})
    assert set(json.loads(path.read_text(encoding="utf-8"))) == {"b"}


def _record_many(first: int) -> None:
    for number in range(first, first + 20):
        answers.record(GPU, {str(number): Answer("other", 1.0, "table", float(number))})


def test_processes_that_record_at_once() -> None:
    """Guards against a process that overwrites what another one found."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_record_many, args=(20 * worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    answers.answers.cache_clear()
    assert set(answers.answers(GPU)) == {str(number) for number in range(80)}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU made of CPU operators: the time of each variant is given, and which ones compute something else."""
    state: dict[str, Any] = {"us": {}, "wrong": (), "unwritten": (), "timed": [], "compiled": []}

    def implementation_of(op: Any, on_gpu: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Tensor:
            if any(isinstance(x, Tensor) and x.is_meta for x in arguments):
                result: Tensor = on_gpu(*arguments)
                return result
            result = op(*arguments)
            ((_, name), *_) = reversed(answers._forced)
            if name in state["wrong"]:
                result[-1] *= 1.1
            if name in state["unwritten"]:
                result[0, 0] = torch.empty_like(result)[0, 0]
            return result

        return run

    def time_variants(variants: dict[str, list[Callable[[], Any]]]) -> dict[str, Timing]:
        state["timed"].append(list(variants))
        for calls in variants.values():
            assert len(calls) > 1
            calls[0]()
        times = {name: state["us"].get(name, 10.0) for name in variants}
        return {name: Timing(us, us, us) for name, us in times.items()}

    def compile_all(kernels: list[Any], jobs: int, console: Console) -> None:
        state["compiled"].append(list(kernels))
        for name, config in kernels:
            state["cached"].add((name, config))

    state["cached"] = set()
    for op, on_gpu in CUDA_IMPLEMENTATIONS.items():
        monkeypatch.setitem(CUDA_IMPLEMENTATIONS, op, implementation_of(op, on_gpu))
    monkeypatch.setattr(tuning, "time_variants", time_variants)
    monkeypatch.setattr(tuning, "copies_beyond_l2", lambda num_bytes: 2)
    monkeypatch.setattr(tuning, "compile_all", compile_all)
    monkeypatch.setattr(tuning, "_gpu", lambda: GPU)
    monkeypatch.setattr(tuning, "operands", lambda call, seed: operands(call, seed, "cpu"))
    monkeypatch.setattr(cache, "find", lambda *kernel: Path("there") if kernel in state["cached"] else None)
    return state


def test_the_fastest_is_kept(measured: dict[str, Any]) -> None:
    """Guards against any choice but the fastest, and against times taken again."""
    call = product(1, 256)
    ((_, question),) = questions_of([call]).values()
    fastest = next(name for name in question.variants if name.startswith("wgmma 64"))
    measured["us"] = {fastest: 3.0}
    report = tune_calls([call], console=QUIET)
    assert measured["timed"] == [list(question.variants)]
    assert report.answers == {question.key: Answer(fastest, 3.0, question.default, 10.0)}
    assert report.path is not None
    assert json.loads(report.path.read_text(encoding="utf-8"))[question.key]["variant"] == fastest
    second = tune_calls([call], console=QUIET)
    assert (len(measured["timed"]), second.found, second.answers) == (1, 1, {})
    assert len(tune_calls([call], again=True, console=QUIET).answers) == 1
    assert len(measured["timed"]) == 2
    assert "1 products timed, 1 of them changed" in report.summary()
    assert report.table().row_count == 1


def test_noise_changes_nothing(measured: dict[str, Any]) -> None:
    """Guards against a variant that is chosen for a hundredth."""
    call = product(1, 256)
    ((_, question),) = questions_of([call]).values()
    measured["us"] = {next(name for name in question.variants if name != question.default): 9.9}
    report = tune_calls([call], console=QUIET)
    assert report.answers[question.key].variant == question.default
    assert report.table().row_count == 0


@pytest.mark.parametrize("fault", ["wrong", "unwritten"])
def test_wrong_results_are_never_chosen(fault: str, measured: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a fast variant that gets one row wrong, or leaves an element of it as memory was."""
    call = product(64, 256)
    ((_, question),) = questions_of([call]).values()
    bad = next(name for name in question.variants if name != question.default)
    measured["us"], measured[fault] = {bad: 1.0}, (bad,)
    with caplog.at_level(logging.ERROR, "dsv4_compile"):
        report = tune_calls([call], console=QUIET)
    assert report.answers[question.key].variant == question.default
    assert report.wrong == (f"{question.key}: {bad}",)
    assert bad in caplog.text
    assert bad in report.summary()


def test_every_kernel_is_compiled_before(measured: dict[str, Any]) -> None:
    """Guards against a compile in the middle of a measurement, and against one that needs a GPU."""
    calls = [product(tokens, 256) for tokens in (1, 64)]
    report = tune_calls(calls, compile_only=True, console=QUIET)
    (compiled,) = measured["compiled"]
    assert (report.compiled, report.path, measured["timed"]) == (len(compiled), None, [])
    assert {name for name, _ in compiled} >= {"sm90.decode_mm", "sm90.wgmma_w4", "sm90.interleave"}
    again = tune_calls(calls, console=QUIET)
    assert again.compiled == 0
    assert len(again.answers) == 2


def test_without_a_compiler(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against nothing tuned on a machine that has some of the kernels only."""
    call = product(64, 256)
    ((_, question),) = questions_of([call]).values()
    known = [question.default, next(name for name in question.variants if name != question.default)]
    measured["cached"] = {kernel for name in known for kernel in tuning.kernels_of_variant(call, question, name)}
    available = [
        name
        for name in question.variants
        if measured["cached"].issuperset(tuning.kernels_of_variant(call, question, name))
    ]

    def compile_all(kernels: list[Any], jobs: int, console: Console) -> None:
        raise RuntimeError("cutlass is missing")

    monkeypatch.setattr(tuning, "compile_all", compile_all)
    report = tune_calls([call], console=QUIET)
    assert measured["timed"] == [available]
    assert report.untried == len(question.variants) - len(available) > 0
    assert "not tried" in report.summary()
    with pytest.raises(RuntimeError, match="cutlass is missing"):
        tune_calls([call], compile_only=True, console=QUIET)


def test_too_little_memory(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against one product that does not fit ending the tuning of all."""

    def no_memory(call: Call, seed: int) -> Any:
        if call.arguments[0].shape[0] == 64:
            raise torch.OutOfMemoryError("too little")
        return operands(call, seed, "cpu")

    monkeypatch.setattr(tuning, "operands", no_memory)
    report = tune_calls([product(64, 256), product(1, 256)], console=QUIET)
    assert [key.split()[1] for key in report.answers] == ["1"]


def test_operands_are_legal(traced: list[Call]) -> None:
    """Guards against operands that an operator refuses, and against a routing that no model has."""
    kinds = set()
    for call in traced:
        if not questions_of([call.at(7)]):
            continue
        kinds.add(call.op)
        arguments = operands(call.at(7), 3, "cpu")
        result = call.op(*arguments)
        assert result.isfinite().all()
        assert (result != 0).any(-1).all()
        again = operands(call.at(7), 3, "cpu")
        assert torch.equal(call.op(*again), result)
        if call.op is torch.ops.dsv4.nvfp4_moe.default:
            ids = arguments[3]
            assert all(len(set(row.tolist())) == ids.shape[1] for row in ids)
    assert kinds == {getattr(torch.ops.dsv4, name).default for name in ("nvfp4_mm", "nvfp4_moe", "nvfp4_grouped_mm")}


def test_offsets_end_at_the_last_row() -> None:
    """Guards against groups that leave rows out: a kernel that skips them would look fast."""
    e4m3, fp32 = torch.float8_e4m3fn, torch.float32
    activation = meta(100, 256), meta(100, 32, dtype=e4m3), meta(dtype=fp32)
    weights = meta(5, 64, 256), meta(5, 64, 32, dtype=e4m3), meta(5, dtype=fp32)
    call = Call(
        torch.ops.dsv4.nvfp4_grouped_mm.default, (*activation, *weights, meta(5, dtype=torch.int32), torch.bfloat16)
    )
    offsets = operands(call, 0, "cpu")[6]
    assert offsets[-1] == 100
    assert (offsets.diff() >= 0).all()
    assert questions_of([call])


def test_max_autotune_tunes_graphs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against tuning without request, and against a request that is not heard."""
    tuned: list[int] = []
    monkeypatch.setattr(tuning, "tune_graph", lambda graph: tuned.append(len(graph.nodes)))
    linear = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        for mode in ("default", "max-autotune-no-cudagraphs"):
            torch._dynamo.reset()
            compiled = torch.compile(linear, backend="dsv4", options={"mode": mode, "fx_graph_cache": False})
            compiled(x)
            assert bool(tuned) == (mode != "default")
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "tune_calls", lambda calls, **_: tuned.append(-len(calls)))
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    tuning.tune_graph(graph)
    assert tuned[-1] == 0  # nothing of it is on a GPU


def test_calls_of_a_graph_with_symbolic_sizes() -> None:
    """Guards against a dynamic shape that tuning cannot ask about: its hint stands for it."""
    found: list[Call] = []
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    linear = torch.nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)

    def observe(graph: torch.fx.Graph) -> None:
        found.extend(calls_of(graph.nodes))

    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "tune_graph", observe)
        torch._dynamo.reset()
        options = {"mode": "max-autotune-no-cudagraphs", "fx_graph_cache": False}
        torch.compile(linear, backend="dsv4", dynamic=True, options=options)(x)
    (call,) = [call for call in found if call.op is torch.ops.dsv4.nvfp4_mm.default]
    assert call.arguments[0].is_meta
    assert tuple(call.arguments[0].shape) == (5, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [0]}, r"tune: tokens must be at least 1, got \[0\]"),
        ({"tokens": []}, r"tune: tokens must be at least 1, got \[\]"),
        ({"jobs": 0}, r"tune: jobs must be at least 1, got \[0\]"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    """Guards against a number that becomes no work at all."""
    with pytest.raises(ValueError, match=message):
        tuning.tune(None, **arguments)


def test_command_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback where nothing can be timed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--layers", "1", "--tokens", "1"]) == 1
    assert "compile_only (--compile-only) must be set where no CUDA device is" in capsys.readouterr().err


@pytest.mark.gpu
def test_tunes_on_a_gpu(kernels: Path) -> None:
    """Guards against variants that differ on the hardware, and against an answer that changes results."""
    torch.manual_seed(0)
    x = ops.quantize_nvfp4(torch.randn(1, 512, device="cuda"), "tensor")
    weight = nvfp4.quantize_weight(torch.randn(256, 512, device="cuda"))
    before = ops.nvfp4_mm(*x, *([part] for part in weight))
    report = tune_calls(GPU_CALLS, console=QUIET)
    assert report.wrong == ()
    assert len(report.answers) == 3
    assert all(answer.us <= answer.default_us for answer in report.answers.values())
    after = ops.nvfp4_mm(*x, *([part] for part in weight))
    assert (after.float() - before.float()).norm() <= 2**-8 * before.float().norm()
