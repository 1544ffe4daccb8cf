"""HuggingFace's DeepSeek V4 compiled, its graph run with emulated Hopper kernels: every operator has the CPU's bits.

At one number of tokens every operator of the graph also runs by the compiled code of its kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from dsv4_compile import warming
from dsv4_compile.backend import compile_bound, prepare
from dsv4_compile.binding import runner
from dsv4_compile.demo import demo_model
from dsv4_compile.ops.dispatch import fresh_weights
from dsv4_compile.ops.registration import CUDA_IMPLEMENTATIONS
from dsv4_compile.options import Options
from tests.integration.test_gpu_model import WIDTHS
from tests.kernels.emulation import assert_as_on_cpu, assert_same, emulated_hopper
from tests.kernels.execution import Executions

TOKENS = 61  # a prime that divides no width, see warming.TRACED_TOKENS
TOKENS_BY_CODE = 7  # at which the compiled code of the kernels runs too
EXPERTS = 8
# One layer of each kind, in two models: what costs time here is tracing.
LAYERS: dict[str, dict[str, Any]] = {
    "narrow": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "mlp_layer_types": ["moe"]},
    "wide": {
        "num_hidden_layers": 2,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
}


class Checker(fx.Interpreter):
    """Runs a graph on the CPU, our operators by their CUDA implementations, and each once more by its CPU kernel."""

    def __init__(self, gm: fx.GraphModule, checked: Counter[str], calls: dict[str, warming.Call]) -> None:
        super().__init__(gm)
        self.checked, self.calls = checked, calls

    def run_node(self, node: fx.Node) -> Any:
        if not (isinstance(node.target, OpOverload) and node.target.namespace == "dsv4"):
            return super().run_node(node)
        arguments, _ = self.fetch_args_kwargs_from_env(node)
        actual = CUDA_IMPLEMENTATIONS[node.target](*arguments)
        with _disable_current_modes():
            assert_same(actual, node.target(*arguments), str(node.format_node()))
            call = warming.Call(node.target, pytree.tree_map_only(Tensor, as_meta, arguments))
            self.calls.setdefault(str(call), call)
        self.checked[node.target._schema.name.removeprefix("dsv4::")] += 1
        return actual


def as_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def filled(like: Tensor) -> Tensor:
    """A CPU tensor of the strides of one without data, and values that every operator takes."""
    x = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    if x.dtype == torch.uint8:
        return x.copy_(torch.randint(0, 256, x.shape))
    if x.dtype == torch.float8_e4m3fn:
        x.view(torch.uint8).copy_(torch.randint(0x30, 0x40, x.shape))
        return x
    return x.copy_(torch.rand(x.shape) if x.dtype.is_floating_point else torch.randint(0, EXPERTS, x.shape))


@pytest.mark.parametrize(("width", "gsa"), [("narrow", "tensor"), ("wide", "token")])
def test_every_operator_agrees_with_the_cpu(width: str, gsa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against operands of a real graph that a launch refuses, misreads or reads too early, at any number of
    tokens; against kernels whose code does something else; and against kernels that warming does not find."""
    monkeypatch.setattr(warming, "TRACED_TOKENS", TOKENS)
    options = Options.parse(None, {"gsa": gsa})
    checked: Counter[str] = Counter()
    calls: dict[str, warming.Call] = {}
    launched: list[warming.Kernel] = []

    def interpret(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        def run(inputs: list[Any]) -> Any:
            arguments = tuple(inputs)
            inputs.clear()
            fresh_weights.wrote()
            with emulated_hopper() as trace:
                result = Checker(gm, checked, calls).run(*arguments)
            launched.extend(trace.kernels)
            return result

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        bound = prepare(gm, example_inputs, options)
        inputs = [example_inputs[index] for index in bound.kept]
        return runner(compile_bound(bound, inputs, options, inner_compile=interpret), bound)

    with torch.inference_mode():
        ids = torch.randint(0, 512, (1, TOKENS))
        logits = torch.compile(demo_model(**WIDTHS[width], **LAYERS[width]), backend=backend)(
            ids, use_cache=False
        ).logits
    assert logits.isfinite().all()
    for name in ("nvfp4_mm", "nvfp4_grouped_mm", "nvfp4_moe", "rms_norm_quantize_nvfp4", "topk_router"):
        assert checked[name] >= 1, checked
    warmed, _ = warming.kernels_of(calls.values(), [TOKENS])
    assert set(launched) == set(warmed)

    by_code = Executions()
    for tokens in (1, 7, 33, 260):
        for call in calls.values():
            arguments = pytree.tree_map_only(Tensor, filled, call.at(tokens).arguments)
            assert_as_on_cpu(call.op, *arguments)
            if tokens == TOKENS_BY_CODE:
                assert_as_on_cpu(call.op, *arguments, sms=16, run=by_code)
    assert by_code.without == {}
    assert len(by_code.executed) > len(calls)
