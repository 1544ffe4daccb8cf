"""``compare``: figures worked out by hand, a damaged layer that is named, and models that do not fit."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv4_compile import Nvfp4Tensor, cli, compare, quantize_
from dsv4_compile.comparison import Difference
from dsv4_compile.demo import demo_model
from tests.checkpoint import stored

IDS = {"input_ids": torch.arange(48).view(2, 24) * 17 % 512, "use_cache": False}


class Twice(nn.Module):
    """One layer that runs twice, and one that runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.repeated = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.repeated(torch.tanh(self.repeated(x))))
        return result


@pytest.fixture
def pair() -> tuple[Twice, Twice]:
    """Two models that differ in the layer that runs twice."""
    a = Twice().eval()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.repeated.weight += 0.1 * torch.randn(8, 8)
    return a, b


@pytest.fixture(scope="module")
def v4() -> Any:
    return demo_model()


def test_known_values() -> None:
    """(3, 4) and (3, 3): signal 25, noise 1, cosine 21 / (5 sqrt 18); ids 1 2 3 and 1 2 4 agree in two of three."""
    difference = Difference()
    difference.add(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    difference.add(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))
    assert difference.sqnr_db == pytest.approx(10 * math.log10(25))
    assert difference.cosine == pytest.approx(21 / (5 * math.sqrt(18)))
    assert difference.agreement == pytest.approx(2 / 3)


def test_own_and_accumulated(pair: tuple[Twice, Twice]) -> None:
    """Guards against outputs of one call held against those of another, and against errors blamed on the next module."""
    a, b = pair
    x = torch.randn(4, 8)
    found = {module.name: module for module in compare(a, b, x).modules}
    assert list(found) == ["repeated", "last", "(model)"]
    with torch.no_grad():
        first_a, first_b = a.repeated(x), b.repeated(x)
        second_a, second_b = a.repeated(first_a.tanh()), b.repeated(first_b.tanh())
        own = torch.cat([first_a - first_b, second_a - b.repeated(first_a.tanh())])
        accumulated = torch.cat([first_a - first_b, second_a - second_b])
        last_a, last_b = a.last(second_a), b.last(second_b)
    signal = torch.cat([first_a, second_a]).square().sum().item()
    repeated = found["repeated"]
    assert repeated.own is not None
    assert repeated.own.sqnr_db == pytest.approx(10 * math.log10(signal / own.square().sum().item()), abs=1e-4)
    expected = 10 * math.log10(signal / accumulated.square().sum().item())
    assert repeated.accumulated.sqnr_db == pytest.approx(expected, abs=1e-4)
    last = found["last"]
    assert last.own is not None
    assert last.own.sqnr_db == math.inf
    expected = 10 * math.log10((last_a.square().sum() / (last_a - last_b).square().sum()).item())
    assert last.accumulated.sqnr_db == pytest.approx(expected, abs=1e-4)
    cosine = torch.nn.functional.cosine_similarity(last_a.flatten(), last_b.flatten(), dim=0).item()
    assert last.accumulated.cosine == pytest.approx(cosine, abs=1e-6)
    assert found["(model)"].own is None
    assert found["(model)"].accumulated == last.accumulated


def test_forms_of_input(pair: tuple[Twice, Twice]) -> None:
    a, b = pair
    x = torch.randn(6, 8)
    whole = compare(a, b, x).as_json()
    assert compare(a, b, (x,)).as_json() == whole
    assert compare(a, b, {"x": x}).as_json() == whole
    for one, all_at_once in zip(compare(a, b, [x[:2], x[2:]]).modules, compare(a, b, x).modules, strict=True):
        assert one.accumulated.sqnr_db == pytest.approx(all_at_once.accumulated.sqnr_db, abs=1e-3)


def test_same_model_is_exact(v4: Any) -> None:
    found = compare(v4, copy.deepcopy(v4), IDS)
    assert len(found.modules) > 100
    assert {module.accumulated.sqnr_db for module in found.modules if module.accumulated.signal} == {math.inf}
    assert {module.own.sqnr_db for module in found.modules if module.own is not None} == {math.inf}
    assert found.worst(5) == []
    assert found.outliers() == []
    assert not found.skipped


@pytest.mark.parametrize("damaged", ["model.layers.1.self_attn.o_b_proj", "model.layers.2.mlp.shared_experts.up_proj"])
def test_damaged_layer_is_named(v4: Any, damaged: str) -> None:
    """Guards against a damage that hides among the errors of quantisation, or in those that it causes further on."""
    other = copy.deepcopy(v4)
    quantize_(other)
    linear = other.get_submodule(damaged)
    linear.weight = nn.Parameter(Nvfp4Tensor.from_float(1.3 * linear.weight.dequantize()), requires_grad=False)
    found = compare(v4, other, IDS)
    assert found.worst(1)[0].name == damaged
    assert [module.name for module, _ in found.outliers()] == [damaged]
    assert f"stands out: {damaged}" in found.summary()
    layers = [m.accumulated.sqnr_db for m in found.modules if m.name.rpartition(".")[0] == "model.layers"]
    assert layers == sorted(layers, reverse=True)


def test_nan_comes_first(pair: tuple[Twice, Twice]) -> None:
    """Guards against a NaN that sorts as the best or vanishes from a sum."""
    a, b = pair
    with torch.no_grad():
        b.last.weight[0, 0] = math.nan
    found = compare(a, b, torch.randn(4, 8))
    assert found.worst(1)[0].name == "last"
    assert "NaN or Inf" in str(found)
    assert found.as_json()["modules"][1]["own"]["sqnr_db"] == "nan"


def test_other_dtype(pair: tuple[Twice, Twice]) -> None:
    a, _ = pair
    found = compare(a, copy.deepcopy(a).bfloat16(), torch.randn(64, 8))
    for module in found.modules:
        assert 35 < module.accumulated.sqnr_db < 65  # bf16 rounds to 2^-9


def test_what_does_not_fit_is_skipped(pair: tuple[Twice, Twice]) -> None:
    """Guards against modules left out in silence."""
    a, b = pair
    b.repeated = nn.Sequential(b.repeated, nn.Linear(8, 8))
    b.last = nn.Linear(8, 4)
    a.only_here = nn.Linear(1, 1).eval()
    b.eval()
    found = compare(a, b, torch.randn(4, 8))
    assert found.skipped["only_here"] == "model_b has no such module"
    assert found.skipped["last"] == "its outputs have shapes [(4, 8)] and [(4, 4)]"
    assert [module.name for module in found.modules] == ["repeated"]
    assert "not compared: last: its outputs have shapes" in str(found)


def test_patterns(pair: tuple[Twice, Twice]) -> None:
    a, b = pair
    assert [module.name for module in compare(a, b, torch.randn(4, 8), modules="las*").modules] == ["last"]
    with pytest.raises(ValueError, match=r"compare: modules must name modules of both models, got \('x',\)"):
        compare(a, b, torch.randn(4, 8), modules="x")
    with pytest.raises(ValueError, match="compare: model_b must be in eval mode, got training mode"):
        compare(a, b.train(), torch.randn(4, 8))


def test_leaves_nothing_behind(pair: tuple[Twice, Twice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against hooks and files that stay, after an error too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    a, b = pair
    compare(a, b, torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        compare(a, b, torch.randn(4, 9))
    assert list(tmp_path.iterdir()) == []
    assert not any(module._forward_hooks for model in pair for module in model.modules())


def test_equal_infinities_are_no_error() -> None:
    """Guards against masks that make NaN of a comparison, and against an infinity that only one side has."""
    difference = Difference()
    difference.add(torch.tensor([-math.inf, 2.0]), torch.tensor([-math.inf, 1.0]))
    assert difference.sqnr_db == pytest.approx(10 * math.log10(4))
    difference.add(torch.tensor([1.0]), torch.tensor([-math.inf]))
    assert math.isnan(difference.sqnr_db)


def test_plot(pair: tuple[Twice, Twice], v4: Any, tmp_path: Path) -> None:
    """Guards against a picture that cannot be drawn for models with and without numbered layers."""
    from PIL import Image

    other = copy.deepcopy(v4)
    quantize_(other)
    sequence = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    changed = copy.deepcopy(sequence)
    with torch.no_grad():
        changed[0].weight.mul_(1.1)
        changed[1].weight.fill_(math.nan)
    x = torch.randn(4, 8)
    for number, found in enumerate([compare(v4, other, IDS), compare(*pair, x), compare(sequence, changed, x)]):
        found.plot(tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as image:
            assert image.size == (1680, 1200)
            colors = image.convert("RGB").getcolors(1 << 24)
            assert colors is not None
            assert len(colors) > 50
    with pytest.raises(ValueError, match="plot: comparison must hold a module whose outputs differ"):
        compare(pair[0], copy.deepcopy(pair[0]), x).plot(tmp_path / "none.png")


def test_matplotlib_is_optional(pair: tuple[Twice, Twice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "import sys, dsv4_compile; dsv4_compile.compare; sys.exit('matplotlib' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", command], cwd=root, check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot needs matplotlib: pip install 'dsv4-compile\[plot\]'"):
        compare(*pair, torch.randn(4, 8)).plot(tmp_path / "x.png")


def test_command(v4: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference against its own NVFP4, and against a checkpoint with one layer damaged."""
    tensors = stored.huggingface_tensors(v4)
    config = {**v4.config.to_dict(), "dtype": "bfloat16"}
    reference = stored.write(tmp_path / "reference", tensors, config)
    damaged = {
        **tensors,
        "model.layers.1.self_attn.q_b_proj.weight": tensors["model.layers.1.self_attn.q_b_proj.weight"] * 1.5,
    }
    other = stored.write(tmp_path / "other", damaged, config)
    picture, figures = tmp_path / "plot.png", tmp_path / "figures.json"
    options = ["--tokens", "16", "--plot", str(picture), "--json", str(figures)]
    assert cli.main(["compare", str(reference), str(other), *options]) == 0
    assert "most error of its own: model.layers.1.self_attn.q_b_proj, 6.02 dB" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    by_name = {module["name"]: module for module in json.loads(figures.read_text())["modules"]}
    assert by_name["model.layers.0"]["accumulated"]["sqnr_db"] == "inf"
    assert by_name["model.layers.1"]["accumulated"]["sqnr_db"] < 60
    assert cli.main(["compare", str(reference), "--tokens", "16", "--limit", "3"]) == 0
    output = capsys.readouterr().out
    assert "mlp.experts" in output
    assert "outputs of the model: SQNR" in output
    assert cli.main(["compare", str(reference), "--tokens", "0"]) == 1
    assert "--tokens must be at least 1, got 0" in capsys.readouterr().err
