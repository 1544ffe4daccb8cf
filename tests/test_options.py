"""Options: what is accepted reaches the compilation, and what is not is refused with the way out."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from dsv4_compile import backend, nvfp4, quantize_
from dsv4_compile.options import MODES, Options
from dsv4_compile.quantization import DEFAULT_EXCLUDE
from dsv4_compile.testing import capture

OWN = "gsa, activations, quantize_weights, include, exclude, merge_gemms, dump, mode"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)).bfloat16()


def activation() -> Tensor:
    return torch.randn(8, 64, dtype=torch.bfloat16)


def test_defaults() -> None:
    """Guards against a default that changes unnoticed."""
    assert Options.parse() == Options()
    assert Options() == Options(
        gsa="tensor",
        activations="nvfp4",
        quantize_weights=True,
        include=None,
        exclude=DEFAULT_EXCLUDE,
        merge_gemms=True,
        dump="",
        mode="default",
        inductor={},
    )


REFUSED: dict[str, tuple[dict[Any, Any], type[Exception], str]] = {
    "unknown": (
        {"qsa": "token"},
        ValueError,
        f"dsv4: option must be one of {OWN} or an option of torch._inductor.config, got 'qsa'; did you mean gsa?",
    ),
    "unknown, close to Inductor's": ({"max_autotun": True}, ValueError, "'max_autotun'; did you mean max_autotune"),
    "unknown, like nothing": ({"zzzzzz": 1}, ValueError, "or an option of torch._inductor.config, got 'zzzzzz'$"),
    "no string": ({1: 2}, ValueError, f"dsv4: option must be one of {OWN} or"),
    "field, but no option": ({"inductor": {}}, ValueError, "got 'inductor'"),
    "gsa": ({"gsa": "row"}, ValueError, "dsv4: option gsa must be one of tensor, tensor_pow2, token, got 'row'"),
    "gsa, type": ({"gsa": 1}, TypeError, "dsv4: option gsa must be a str, got 1"),
    "activations": (
        {"activations": "int8"},
        ValueError,
        "dsv4: option activations must be one of nvfp4, bf16, got 'int8'",
    ),
    "mode": ({"mode": "fast"}, ValueError, f"dsv4: option mode must be one of {', '.join(MODES)}, got 'fast'"),
    "mode, type": ({"mode": None}, TypeError, "dsv4: option mode must be a str, got None"),
    "quantize_weights": ({"quantize_weights": 1}, TypeError, "option quantize_weights must be a bool, got 1"),
    "merge_gemms": ({"merge_gemms": "no"}, TypeError, "dsv4: option merge_gemms must be a bool, got 'no'"),
    "dump": ({"dump": True}, TypeError, "dsv4: option dump must be a str, got True"),
    "include, a string": (
        {"include": "*.weight"},
        TypeError,
        re.escape("dsv4: option include must be a list of parameter-name patterns, got '*.weight'"),
    ),
    "include, not names": ({"include": [1]}, TypeError, r"option include must be a list .*, got \(1,\)"),
    "exclude, None": ({"exclude": None}, TypeError, "option exclude must be a list of .*, got None"),
    "Inductor's, type": ({"max_autotune": "yes"}, TypeError, "dsv4: option max_autotune must be a bool, got 'yes'"),
    "freezing": ({"freezing": False}, ValueError, "dsv4: option freezing must be True for this backend, got False"),
    "constants": ({"always_keep_tensor_constants": False}, ValueError, "option always_keep_tensor_constants must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    """Guards against an option that is passed over, and against a message that does not say what would be right."""
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        Options.parse(None, options)


def test_refused_through_torch_compile() -> None:
    """Guards against an error of ours that Dynamo turns into a fall-back to eager."""
    compiled = torch.compile(model(), backend="dsv4", options={"gsaa": "token"})
    with torch.inference_mode(), pytest.raises(Exception, match=r"'gsaa'; did you mean gsa\?"):
        compiled(activation())


def test_dashes_for_underscores() -> None:
    """Guards against refusing a spelling that Inductor's own options have."""
    assert not Options.parse(None, {"merge-gemms": False}).merge_gemms
    assert Options.parse(None, {"max-autotune": True}).inductor == {"max_autotune": True}


def test_lists_and_tuples() -> None:
    """Guards against patterns that cannot be hashed, or are taken apart letter by letter."""
    assert Options.parse(None, {"include": ["a", "b"], "exclude": ("c",)}).include == ("a", "b")
    assert Options.parse(None, {"exclude": []}).exclude == ()


def test_every_current_value_of_inductor_is_accepted() -> None:
    """Guards against a type check that refuses what Inductor itself has set."""
    config = torch._inductor.config.get_config_copy()
    required = {"freezing": True, "always_keep_tensor_constants": True}
    assert Options.parse(None, {**config, **required}).inductor == {**config, **required}


@pytest.mark.parametrize("mode", MODES)
def test_mode_amounts_to_inductors_settings(mode: str) -> None:
    """Guards against a mode that is accepted and changes nothing."""
    expected = {} if mode == "default" else torch._inductor.list_mode_options(mode)
    assert mode == "default" or expected
    assert Options.parse(mode).inductor_config() == expected
    assert Options.parse(None, {"mode": mode}).inductor_config() == expected


def test_options_win_over_the_mode() -> None:
    """Guards against a mode that overwrites what was asked for by name."""
    parsed = Options.parse(None, {"mode": "max-autotune", "max_autotune": False})
    assert parsed.inductor_config()["max_autotune"] is False
    assert parsed.inductor_config()["triton.cudagraphs"] is True


class SeenConfig:
    """A pass that notes settings of Inductor while it compiles."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.seen: list[dict[str, Any]] = []

    def __call__(self, graph: fx.Graph) -> None:
        config = torch._inductor.config.get_config_copy()
        self.seen.append({name: config[name] for name in self.names})


def test_inductor_options_hold_while_compiling() -> None:
    """Guards against options that are checked and then dropped."""
    config = torch._inductor.config.get_config_copy()
    flipped = {name: not config[name] for name in ("epilogue_fusion", "max_autotune", "cpp.enable_kernel_profile")}
    look = SeenConfig(*flipped, "freezing", "always_keep_tensor_constants")
    capture(model(), activation(), options={**flipped, "joint_custom_pre_pass": look})
    assert look.seen == [{**flipped, "freezing": True, "always_keep_tensor_constants": True}]
    assert torch._inductor.config.get_config_copy() == config


@pytest.mark.parametrize("as_option", [False, True])
def test_mode_reaches_inductor_through_torch_compile(as_option: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against losing the mode between torch.compile, which hands it over as a keyword, and Inductor."""
    patches: list[dict[str, Any]] = []

    def compile_fx(gm: fx.GraphModule, inputs: Any, config_patches: dict[str, Any]) -> Any:
        patches.append(config_patches)
        return gm

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    how = {"options": {"mode": "reduce-overhead"}} if as_option else {"mode": "reduce-overhead"}
    with torch.inference_mode():
        torch.compile(model(), backend="dsv4", **how)(activation())
    assert patches[0]["triton.cudagraphs"] is True
    assert patches[0]["freezing"] is True


def test_passes_of_the_user_still_run() -> None:
    """Guards against taking the place of a pass that was set already, by option or in Inductor's config."""
    seen: list[str] = []

    def look(graph: fx.Graph) -> None:
        seen.append(str(graph))

    capture(model(), activation(), options={"joint_custom_pre_pass": look})
    with torch._inductor.config.patch(joint_custom_pre_pass=look):
        capture(model(), activation())
    assert len(seen) == 2
    assert all("dsv4.nvfp4_mm" in graph for graph in seen)


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
def test_granularity_shows_in_the_graph(granularity: str) -> None:
    """Guards against a granularity that only some of the operators get."""
    _, (graph,) = capture(model(), activation(), options={"gsa": granularity})
    assert graph.after.count("dsv4.quantize_nvfp4(") == graph.after.count(f", '{granularity}')") == 2


def packed_names(options: dict[str, Any], network: nn.Module | None = None) -> tuple[set[str], dict[str, str]]:
    """Names of the weights that were packed, and of the others with the reason."""
    _, (graph,) = capture(network or model(), activation(), options=options)
    weights = graph.bound.weights
    packed = {weight.name for weight in weights if weight.packed is not None}
    return packed, {weight.name: weight.reason for weight in weights if weight.packed is None}


def test_include() -> None:
    """Guards against patterns matched against other names than the parameters' own."""
    assert packed_names({"include": ["1.*"]}) == ({"1.weight"}, {"0.weight": "not included"})
    assert packed_names({"include": []}) == (set(), {"0.weight": "not included", "1.weight": "not included"})


def test_include_admits_fp32() -> None:
    """Guards against fp32 weights that are packed unasked, or left alone when asked for."""
    network = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False))
    x = activation().float()
    _, (unasked,) = capture(network, x)
    assert {w.name: w.reason for w in unasked.bound.weights} == {
        "0.weight": "float32 weight",
        "1.weight": "float32 weight",
    }
    _, (asked,) = capture(network, x, options={"include": ["0.weight"]})
    assert [weight.name for weight in asked.bound.weights if weight.packed is not None] == ["0.weight"]


def test_exclude() -> None:
    """Guards against an exclusion that is passed over, or that replaces the default only in part."""
    assert packed_names({"exclude": ["0.*"]}) == ({"1.weight"}, {"0.weight": "excluded by '0.*'"})
    network = nn.ModuleDict({"lm_head": nn.Linear(64, 64, bias=False)}).bfloat16()

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = network["lm_head"]

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(x)

    assert packed_names({}, Head()) == (set(), {"lm_head.weight": "excluded by '*lm_head*'"})
    assert packed_names({"exclude": []}, Head()) == ({"lm_head.weight"}, {})


def test_quantize_weights_off() -> None:
    """Guards against rounding weights that nobody asked to round."""
    packed, reasons = packed_names({"quantize_weights": False})
    assert packed == set()
    assert set(reasons.values()) == {"plain weight, and quantize_weights is off"}


def test_dump_to_a_file(tmp_path: Path) -> None:
    """Guards against a dump that lacks one of the graphs, or the program before."""
    target = tmp_path / "graphs.txt"
    network, x = model(), activation()
    for _ in range(2):
        _, (graph,) = capture(network, x, options={"dump": str(target)})
    once = f"# before dsv4 passes\n{graph.before}\n\n# after dsv4 passes: linear 2\n{graph.after}\n\n"
    assert target.read_text() == 2 * once
    assert "aten.mm" in graph.before
    assert "aten.mm" not in graph.after


def test_dump_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a dump in the program's own output."""
    capture(lambda x: x + 1, activation(), options={"dump": "-"})
    captured = capsys.readouterr()
    assert captured.err.startswith("# before dsv4 passes\nx0: bf16[8, 64]\n")
    assert "# after dsv4 passes: no rewrite\n" in captured.err
    assert captured.out == ""


def test_bf16_activations_show_in_the_graph() -> None:
    """Guards against an activation that is quantised although it was asked not to be, and against numbers to match."""
    network, x = model(), activation()
    result, (graph,) = capture(network, x, options={"activations": "bf16"})
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[64, 64]
w1: nvfp4[32, 64]
x0: bf16[8, 64]
%0: bf16[8, 64] = dsv4.nvfp4_weight_mm(x0, *[w0], None, bf16)
%1: bf16[8, 32] = dsv4.nvfp4_weight_mm(%0, *[w1], None, bf16)
return %1""",
    )
    quantize_(network)
    assert sqnr(result, network(x)) > 45  # the eager model on dequantised weights rounds them to bf16 once more


def test_bf16_activations_merge_and_leave_experts_dequantised() -> None:
    """Guards against experts whose activations are quantised unasked, and linears that no longer merge."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(64, 32, bias=False)
            self.up = nn.Linear(64, 32, bias=False)
            self.groups = nn.Parameter(torch.randn(2, 16, 32), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.silu(self.gate(x)) * self.up(x)
            return torch.bmm(h.view(2, -1, 32), self.groups.mT)

    network, x = Gated().bfloat16(), activation()
    result, (graph,) = capture(network, x, options={"activations": "bf16"})
    assert graph.counts == {"linear": 2, "merge_gemms": 1}
    assert "quantize_nvfp4(" not in graph.after.replace("dequantize_nvfp4(", "")
    assert "aten.bmm" in graph.after
    quantize_(network)
    assert sqnr(result, network(x)) > 40


def sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal to error in dB."""
    error = (actual.double() - expected.double()).square().mean()
    return float(10 * torch.log10(expected.double().square().mean() / error))
