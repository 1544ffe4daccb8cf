"""The backend as torch.compile sees it: found by name, for inference only, cached between processes, never on the host."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from dsv4_compile import backend, nvfp4, quantize_
from dsv4_compile.backend import RewriteGraph
from dsv4_compile.ops.dispatch import tuning
from dsv4_compile.options import Options
from dsv4_compile.testing import Capture, capture

K = 64


class Mlp(nn.Module):
    """A SwiGLU MLP. Rewritten, it is made of our operators and views only: generating its code compiles no C++."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(K, K, bias=False, dtype=torch.bfloat16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` on NVFP4 operands: the exact sum, scaled in fp32, rounded once to bf16."""
    (a_codes, a_scales, gsa), (b_codes, b_scales, gsb) = nvfp4.quantize(x), nvfp4.quantize_weight(weight)
    a, b = (nvfp4.scaled_codes(*packed, torch.float64) for packed in ((a_codes, a_scales), (b_codes, b_scales)))
    return ((a @ b.mT).to(torch.float32) * (gsa * gsb)).bfloat16()


def emulate(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up = (product(x, weights[f"{name}.weight"]) for name in ("gate", "up"))
    return product(nvfp4.swiglu(gate, up, float("inf")), weights["down.weight"])


def activation(*shape: int) -> Tensor:
    return torch.randn(*(shape or (8, K)), dtype=torch.bfloat16)


# Modes of autograd.


@pytest.mark.parametrize("who", ["parameters", "input"])
def test_gradients_wanted(who: str) -> None:
    """Guards against a compiled model that silently has no gradients."""
    model, x = Mlp(), activation()
    if who == "input":
        model.requires_grad_(False)
        x.requires_grad_()
    message = r"gradients enabled; .* under torch\.inference_mode\(\) or torch\.no_grad\(\)"
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="dsv4")(x)


def test_gradients_wanted_after_the_first_call() -> None:
    """Guards against code compiled for inference being reused where gradients are wanted."""
    compiled, x = torch.compile(Mlp(), backend=Capture()), activation()
    with torch.no_grad():
        compiled(x)
    with pytest.raises(Exception, match="inputs must not require gradients"):
        compiled(x)


def test_grad_mode_without_anything_that_wants_gradients() -> None:
    """Guards against demanding inference_mode from a model that is frozen already."""
    model, x = Mlp().requires_grad_(False), activation()
    result = torch.compile(model, backend=Capture())(x)
    assert not result.requires_grad
    assert torch.equal(result, emulate(model.state_dict(), x))


def test_no_grad_and_inference_mode() -> None:
    """Guards against weights packed in one mode that the other may not use."""
    model, x, recorder = Mlp(), activation(), Capture()
    compiled = torch.compile(model, backend=recorder)
    for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(compiled(x), emulate(model.state_dict(), x))
    assert len({id(weight.packed) for graph in recorder.graphs for weight in graph.bound.weights}) == 3


@pytest.mark.parametrize("packed", [False, True])
def test_model_made_under_inference_mode(packed: bool) -> None:
    """Guards against inference tensors, which have no version counter."""
    with torch.inference_mode():
        model, x = Mlp(), activation()
        weights = {name: value.clone() for name, value in model.named_parameters()}
        if packed:
            quantize_(model)
    for context in (torch.inference_mode, torch.no_grad):
        torch._dynamo.reset()
        with context():
            assert torch.equal(torch.compile(model, backend=Capture())(x), emulate(weights, x))


# Generated code.


def test_generated_code_computes_what_the_graph_says() -> None:
    """Guards against a code generator that reorders operands or rounds between the operators."""
    model, x = Mlp(), activation(2, 4, K)
    with torch.inference_mode():
        result = torch.compile(model, backend="dsv4", fullgraph=True)(x)
    assert torch.equal(result, emulate(model.state_dict(), x))


def test_dynamic_shapes() -> None:
    """Guards against sizes of the first call in the generated code."""
    model, calls = Mlp(), []

    def counting(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        calls.append(gm)
        return backend.dsv4(gm, inputs)

    compiled = torch.compile(model, backend=counting, dynamic=True)
    with torch.inference_mode():
        for shape in ((2, 4, K), (3, 5, K), (7, 2, K)):
            x = activation(*shape)
            assert torch.equal(compiled(x), emulate(model.state_dict(), x))
    assert len(calls) == 1


def test_other_shapes_compile_again() -> None:
    """Guards against a second compilation that misses weights, or the first one's sizes in it."""
    model, recorder = Mlp(), Capture()
    compiled = torch.compile(model, backend=recorder)
    with torch.inference_mode():
        for rows in (8, 5, 1, 17, 8):
            x = activation(rows, K)
            assert torch.equal(compiled(x), emulate(model.state_dict(), x))
    assert 2 <= len(recorder.graphs) <= 3
    assert all(graph.counts == recorder.graphs[0].counts for graph in recorder.graphs)


def test_strided_input() -> None:
    """Guards against an operator that takes a transposed activation for a contiguous one."""
    model, x = Mlp(), activation(K, 8).t()
    with torch.inference_mode():
        assert torch.equal(torch.compile(model, backend="dsv4")(x), emulate(model.state_dict(), x))


def test_graph_break() -> None:
    """Guards against losing the rest of a model behind a graph break."""

    class Broken(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate(x), self.up(x)
            torch._dynamo.graph_break()
            return self.down(F.silu(gate.view(-1).view_as(up)) * up)

    model, x = Broken(), activation()
    result, graphs = capture(model, x)
    assert [graph.counts["linear"] for graph in graphs] == [2, 1]
    assert torch.equal(result, emulate(model.state_dict(), x))


def test_autocast() -> None:
    """Guards against a context of autocast that the compiled graph loses: the model is fp32, its result is not."""
    model, x = Mlp().float(), activation().float()
    with torch.autocast("cpu", torch.bfloat16):
        result, (graph,) = capture(model, x, options={"include": ["*.weight"]})
    assert result.dtype == torch.bfloat16
    assert graph.counts["linear"] == 3
    gate, up = (product(x.bfloat16(), layer.weight) for layer in (model.gate, model.up))
    assert torch.equal(result, product(nvfp4.swiglu(gate, up, float("inf")), model.down.weight))


def test_one_log_line_for_what_was_packed(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against rounding a model's weights without a word, and against a word for every graph."""
    model, x = Mlp(), activation()
    with caplog.at_level(logging.WARNING, "dsv4_compile"):
        for shape in ((8, K), (2, 4, K)):
            capture(model, x.view(shape))
        assert [record.message.split(";")[0] for record in caplog.records] == [
            "dsv4: packed 3 plain weights to NVFP4 at compile time"
        ]
        caplog.clear()
        quantize_(model)
        capture(model, x)
        assert not caplog.records


# Nothing is read on the host.


def host_reads(graph: fx.Graph) -> list[str]:
    """The nodes of a graph whose result, or whose size, depends on values that the host would have to know."""
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return [
        str(node)
        for node in graph.nodes
        if (isinstance(node.target, torch._ops.OpOverload) and tags & set(node.target.tags))
        or free_unbacked_symbols(node.meta.get("val"))
    ]


READS: dict[str, Callable[[Tensor], Any]] = {
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "item": lambda x: x.sum().item() + 1.0,
    "tolist": lambda x: x.view(-1)[:2].long().tolist(),
    "size of data": lambda x: torch.zeros(x.abs().sum().long().item()),
}


@pytest.mark.parametrize("case", READS)
def test_a_host_read_would_be_found(case: str) -> None:
    """Guards against the next tests being unable to fail."""
    config = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    with torch._dynamo.config.patch(**config):
        _, (graph,) = capture(READS[case], torch.ones(4, 6))
    assert host_reads(graph.graph)


def biased(self: Mlp, x: Tensor) -> Tensor:
    gate, up = self.gate(x).clamp(max=10), self.up(x).clamp(-10, 10)
    return torch.addmm(x[0], (F.silu(gate.float()) * up.float()).to(x.dtype), self.down.weight.t())


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
def test_no_host_read_in_any_graph(granularity: str) -> None:
    """Guards against a global scale, or a size, that a call has to wait for: it would break CUDA graphs."""
    model, x = Mlp(), activation()
    for forward in (model, lambda x: biased(model, x)):
        _, graphs = capture(forward, x, dynamic=True, options={"gsa": granularity})
        for graph in graphs:
            assert graph.counts["linear"] >= 2
            assert host_reads(graph.graph) == []


def test_no_host_read_in_the_generated_code() -> None:
    """Guards against a read on the host that only code generation adds."""
    with torch.inference_mode():
        _, codes = run_and_get_code(torch.compile(Mlp(), backend="dsv4", dynamic=True), activation())
    code = "\n".join(codes)
    assert code.count("torch.ops.dsv4.nvfp4_mm.default(") == 2
    assert code.count("torch.ops.dsv4.swiglu_quantize_nvfp4.default(") == 1
    for read in (".item(", ".tolist(", "_local_scalar_dense", "nonzero", ".cpu(", "synchronize", "float(", "int("):
        assert read not in code.split("def call(")[1].split("def benchmark_compiled_module")[0], read
    assert "= u0" not in code


# Inductor's cache of compiled graphs.


def uuid(**options: Any) -> Any:
    return RewriteGraph(Options.parse(None, options)).uuid()


def test_options_are_part_of_the_cache_key() -> None:
    """Guards against code compiled with other options out of the cache."""
    assert uuid() == uuid() == uuid(exclude=["x"], mode="reduce-overhead")
    uuids = [uuid(), uuid(mode="max-autotune"), uuid(gsa="token"), uuid(gsa="tensor_pow2"), uuid(merge_gemms=False)]
    uuids.append(uuid(gsa="token", merge_gemms=False))
    assert len(set(uuids)) == len(uuids)
    assert None not in uuids


def test_kernels_are_part_of_the_cache_key_of_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a graph out of the cache whose products were timed with other kernels, or never."""
    before = uuid(), uuid(mode="max-autotune")
    monkeypatch.setattr(tuning, "sources_digest", lambda: "others")
    after = uuid(), uuid(mode="max-autotune")
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_a_graph_that_someone_wants_to_see_is_not_cached() -> None:
    """Guards against a dump, or a test, that sees nothing because the code came out of the cache."""
    assert uuid(dump="-") is None
    assert RewriteGraph(Options(), observe=lambda graph, before, counts: None).uuid() is None


def test_passes_of_the_user_are_part_of_the_cache_key() -> None:
    """Guards against code that another version of the user's own pass has made."""

    class Other(CustomGraphPass):
        def __init__(self, version: str) -> None:
            self.version = version

        def __call__(self, graph: fx.Graph) -> None:
            pass

        def uuid(self) -> str:
            return self.version

    uuids = [uuid(), uuid(joint_custom_pre_pass=Other("1")), uuid(joint_custom_pre_pass=Other("2"))]
    assert len(set(uuids)) == 3
    assert uuid(joint_custom_pre_pass=lambda graph: None) is None


def test_every_source_file_is_part_of_the_cache_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against code that an older version of a pass or an operator has made."""
    files = [Path(file) for file in backend._source_files()]
    package = Path(backend.__file__).resolve().parent
    assert {package / "nvfp4.py", package / "backend.py", package / "binding.py"} <= set(files)
    for folder in ("passes", "ops"):
        assert set((package / folder).resolve().glob("*.py")) <= set(files)

    copies = [tmp_path / f"{index}.py" for index in range(len(files))]
    monkeypatch.setattr(backend, "_source_files", lambda: tuple(map(str, copies)))

    def fresh_uuid() -> Any:
        get_hash_for_files.cache_clear()
        return uuid()

    for copy, file in zip(copies, files, strict=True):
        copy.write_bytes(file.read_bytes())
    original = fresh_uuid()
    for copy, file in zip(copies, files, strict=True):
        copy.write_bytes(file.read_bytes() + b"#")
        assert fresh_uuid() != original, file
        copy.write_bytes(file.read_bytes())
    assert fresh_uuid() == original


PROGRAM = """
import sys, torch
import torch.nn.functional as F
from torch import nn

seed, spread, path = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(3))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))

torch.manual_seed(seed)
model = Mlp().requires_grad_(False)
for index, parameter in enumerate(model.parameters()):
    parameter[0, 0] = 1  # the largest: with spread 1 all global scales are equal
    parameter *= spread ** index
assert not [name for name in sys.modules if name.startswith("dsv4")]
assert "dsv4" in torch._dynamo.list_backends()
x = torch.randn(8, 64, dtype=torch.bfloat16)
result = torch.compile(model, backend="dsv4")(x)
inductor = dict(torch._dynamo.utils.counters["inductor"])
torch.save({"x": x, "result": result, "weights": model.state_dict(), "inductor": inductor}, path)
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes computed, one after the other, with one cache and different weights."""
    folder = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    runs = []
    for seed, spread in ((1, 1.0), (2, 4.0)):
        path = folder / f"{seed}.pt"
        command = [sys.executable, "-c", PROGRAM, str(seed), str(spread), str(path)]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert process.returncode == 0, process.stderr
        runs.append(torch.load(path))
    return runs


def test_found_by_name(two_processes: list[dict[str, Any]]) -> None:
    """Guards against an entry point that is missing: the program imports nothing of ours before it compiles."""
    run = two_processes[0]
    assert torch.equal(run["result"], emulate(run["weights"], run["x"]))


def test_second_process_reuses_the_compiled_graph(two_processes: list[dict[str, Any]]) -> None:
    """Guards against compiling anew in every process."""
    counts = [run["inductor"] for run in two_processes]
    assert [count.get("fxgraph_cache_hit", 0) for count in counts] == [0, 1]
    assert [count.get("fxgraph_cache_miss", 0) for count in counts] == [1, 0]
    assert not any(count.get("fxgraph_cache_bypass", 0) for count in counts)


def test_cached_code_has_no_weights_in_it(two_processes: list[dict[str, Any]]) -> None:
    """Guards against global scales written into the code as literals: they would be those of the first checkpoint."""
    first, second = two_processes
    scales = [nvfp4.quantize_weight(weight)[2] for run in (first, second) for weight in run["weights"].values()]
    assert [float(scale * 2688) for scale in scales] == [1, 1, 1, 1, 4, 16]
    assert torch.equal(second["result"], emulate(second["weights"], second["x"]))
