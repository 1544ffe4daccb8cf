"""``quantize_``: which weights are packed, which are not and why, and how packed weights are stored."""

import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsv4_compile.quantization import (
    DEFAULT_EXCLUDE,
    flatten_state_dict,
    quantize_,
    unflatten_state_dict,
)
from dsv4_compile.tensor import Nvfp4Tensor
from tests import nvfp4_oracle as oracle

BF16 = torch.bfloat16


def experts(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=BF16))


class Mlp(nn.Module):
    """A mixture-of-experts block with the names of HuggingFace's models."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.Module()
        self.experts.gate_up_proj = experts(4, 64, 32)
        self.experts.down_proj = experts(4, 32, 32)
        self.shared_experts = nn.Module()
        self.shared_experts.gate_proj = nn.Linear(32, 32)


class Model(nn.Module):
    """One parameter for each reason not to pack it, and some to pack."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, 32)
        self.vocabulary = nn.Embedding(16, 32)
        self.mlp = Mlp()
        self.proj = nn.Linear(32, 32, bias=False)
        self.halved = nn.Linear(32, 16, bias=False)
        self.odd = nn.Linear(24, 32, bias=False)
        self.norm = nn.LayerNorm(32)
        self.mixing = nn.Parameter(torch.randn(4, 32))
        self.conv = nn.Conv2d(1, 1, 16)
        self.to(BF16)
        self.halved.half()
        self.full = nn.Linear(32, 32, bias=False)
        self.transposed = nn.Module()
        self.transposed.is_transposed = True
        self.transposed.gate_up_proj = experts(4, 32, 64)
        self.done = nn.Linear(32, 32, bias=False)
        self.done.weight = nn.Parameter(Nvfp4Tensor.from_float(torch.randn(32, 32)), requires_grad=False)
        self.tied_head = nn.Linear(32, 16, bias=False)
        self.tied_head.weight = self.vocabulary.weight
        self.lm_head = nn.Linear(32, 16, bias=False, dtype=BF16)


PACKED = [
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
    "mlp.shared_experts.gate_proj.weight",
    "proj.weight",
    "halved.weight",
]


def test_packs_what_is_eligible_and_says_why_the_rest_is_not() -> None:
    """Guards against a router, a vocabulary or a norm in 4 bits, and a projection forgotten without a reason."""
    model = Model()
    plain = {name: value.detach().clone() for name, value in model.named_parameters(remove_duplicate=False)}
    report = quantize_(model)
    assert report.quantized == PACKED
    assert report.skipped == {
        "embed_tokens.weight": "embedding, or tied to one",
        "vocabulary.weight": "embedding, or tied to one",
        "tied_head.weight": "embedding, or tied to one",
        "lm_head.weight": "excluded by '*lm_head*'",
        "mlp.gate.weight": "excluded by 'mlp.gate.weight'",
        "mlp.shared_experts.gate_proj.bias": "1-D",
        "odd.weight": "K = 24 is not divisible by 16",
        "norm.weight": "1-D",
        "norm.bias": "1-D",
        "mixing": "2-D, but not named weight",
        "conv.weight": "4-D",
        "conv.bias": "1-D",
        "full.weight": "float32 weight",
        "transposed.gate_up_proj": "experts stored as [E, K, N]",
        "done.weight": "packed already",
    }
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name in PACKED:
            expected = Nvfp4Tensor.from_float(plain[name])
            assert isinstance(weight, Nvfp4Tensor)
            assert isinstance(weight, nn.Parameter)
            assert (weight.dtype, weight.requires_grad) == (plain[name].dtype, False)
            oracle.assert_same_bits(weight.codes, expected.codes)
            oracle.assert_same_bits(weight.block_scales, expected.block_scales)
            oracle.assert_same_bits(weight.global_scale, expected.global_scale)
        elif name != "done.weight":
            oracle.assert_same_bits(weight.detach(), plain[name])
    assert model.tied_head.weight is model.vocabulary.weight


def test_eager_model_stays_runnable() -> None:
    """Guards against a packed model that only a compiler can run: it computes with the dequantised weights."""
    model = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)).to(BF16)
    x = torch.randn(3, 5, 32, dtype=BF16)
    quantize_(model)
    hidden = F.silu(F.linear(x, model[0].weight.dequantize(), model[0].bias))
    oracle.assert_same_bits(model(x), F.linear(hidden, model[2].weight.dequantize(), model[2].bias))


def test_report(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against sizes that count a shared weight twice; the one log line says them.

    Bytes before: 2 * 1024^2 = 2 MiB. After: 512 KiB of codes, 64 KiB of block scales, 4 bytes: 576 KiB, 0.6 MiB.
    """
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024, bias=False)).to(BF16)
    model[1].weight = model[0].weight
    with caplog.at_level(logging.INFO, logger="dsv4_compile"):
        report = quantize_(model)
    assert (report.bytes_before, report.bytes_after) == (2 * 2**20, 576 * 2**10 + 4)
    assert str(report) == "2 weights packed to NVFP4, 2.0 MiB -> 0.6 MiB; 1 left alone"
    assert caplog.messages == [f"quantize_: {report}"]


def test_shared_parameters_are_packed_once() -> None:
    """Guards against a tied weight that takes twice the memory after it was packed, and drifts apart."""
    model = nn.ModuleDict({name: nn.Linear(32, 32, bias=False, dtype=BF16) for name in "abc"})
    model["c"].weight = model["a"].weight
    report = quantize_(model)
    assert report.quantized == ["a.weight", "b.weight", "c.weight"]
    assert model["a"].weight is model["c"].weight
    assert model["a"].weight is not model["b"].weight
    assert len(list(model.parameters())) == 2


@pytest.mark.parametrize("tie_first", [False, True])
def test_tied_lm_head_follows_its_embedding(tie_first: bool) -> None:
    """Guards against packing the vocabulary through its other name, whichever is registered first."""
    embedding, head = nn.Embedding(16, 32, dtype=BF16), nn.Linear(32, 16, bias=False, dtype=BF16)
    head.weight = embedding.weight
    model = nn.ModuleDict({"output": head, "input": embedding} if tie_first else {"input": embedding, "output": head})
    report = quantize_(model)
    assert report.quantized == []
    assert report.skipped == dict.fromkeys(("input.weight", "output.weight"), "embedding, or tied to one")
    assert model["output"].weight is model["input"].weight


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [
        ("lm_head.weight", False),
        ("head.weight", False),
        ("model.embed_out.weight", False),
        ("model.layers.3.mlp.gate.weight", False),
        ("layers.3.ffn.gate.weight", False),
        ("layers.3.block_sparse_moe.gate.weight", False),
        ("layers.3.router.weight", False),
        ("layers.3.mlp.gate_proj.weight", True),
        ("layers.3.attn.head.weight", True),
        ("layers.3.attn.compressor.gate.weight", True),
    ],
)
def test_default_exclude(name: str, is_packed: bool) -> None:
    """Guards against a pattern that misses a router, or one so wide that it takes gate_proj with it."""
    model = nn.Module()
    *path, _ = name.split(".")
    owner = model
    for part in path[:-1]:
        owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.add_module(path[-1], nn.Linear(32, 32, bias=False, dtype=BF16))
    assert (name in quantize_(model).quantized) == is_packed


def test_include_packs_only_what_it_names() -> None:
    """Guards against include as an addition: given, nothing else is packed; fp32 and other attribute names are."""
    model = Model()
    report = quantize_(model, include=["full.weight", "mix*", "mlp.experts.*"])
    assert report.quantized == ["mixing", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "full.weight"]
    assert report.skipped["proj.weight"] == "not included"
    assert model.full.weight.dtype == torch.float32


def test_exclude_leaves_alone_what_it_names() -> None:
    """Guards against defaults that stay in force when exclude is given: with it empty, lm_head is packed too."""
    model = Model()
    report = quantize_(model, exclude=["mlp.*", "*halved*"])
    assert report.quantized == ["proj.weight", "lm_head.weight"]
    assert report.skipped["mlp.experts.down_proj"] == "excluded by 'mlp.*'"
    assert quantize_(model, exclude=[]).quantized == [
        "mlp.gate.weight",
        *(name for name in PACKED if name != "proj.weight"),
    ]


def test_exclude_wins_over_include() -> None:
    """Guards against an order of the two that depends on the caller."""
    report = quantize_(Model(), include=["mlp.*"], exclude=[*DEFAULT_EXCLUDE, "*.down_proj"])
    assert report.quantized == ["mlp.experts.gate_up_proj", "mlp.shared_experts.gate_proj.weight"]
    assert report.skipped["mlp.gate.weight"] == "excluded by 'mlp.gate.weight'"


def test_one_pattern_may_be_a_string() -> None:
    """Guards against a string taken as a list of one-letter patterns, of which "*" matches everything."""
    assert quantize_(Model(), include="proj.w*").quantized == ["proj.weight"]
    assert "halved.weight" not in quantize_(Model(), exclude="halved.weight").quantized


def test_again_packs_nothing() -> None:
    """Guards against packing packed weights a second time, which loses accuracy."""
    model = Model()
    quantize_(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    again = quantize_(model)
    assert again.quantized == []
    assert {again.skipped[name] for name in PACKED} == {"packed already"}
    assert all(weight is weights[name] for name, weight in model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["halved.weight", "mlp.experts.down_proj"])
def test_damaged_weight_leaves_the_model_untouched(name: str, value: float) -> None:
    """Guards against a model that is half packed when the last weight turns out to hold NaN."""
    model = Model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    before = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ValueError, match=f"^quantize_: {name}: quantize_weight: weight must be finite, got NaN or Inf"):
        quantize_(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)


def test_include_that_matches_nothing_leaves_the_model_untouched() -> None:
    """Guards against a misspelt pattern, which would leave a model in bf16 without a word."""
    model = Model()
    with pytest.raises(
        ValueError, match=r"^quantize_: include must match a parameter, got 'porj\.\*' which matches none$"
    ):
        quantize_(model, include=["proj.*", "porj.*"])
    assert not isinstance(model.proj.weight, Nvfp4Tensor)


# --- HuggingFace's model ---------------------------------------------------------------------------------------------

ATTENTION = ["q_a_proj", "q_b_proj", "kv_proj", "o_a_proj", "o_b_proj"]
COMPRESSOR = ["compressor.kv_proj", "compressor.gate_proj"]
INDEXER = [f"compressor.indexer.{name}" for name in ("kv_proj", "gate_proj", "q_b_proj", "scorer.weights_proj")]
MOE = ["experts.gate_up_proj", "experts.down_proj"]
SHARED = [f"shared_experts.{name}_proj" for name in ("gate", "up", "down")]


def test_huggingface_deepseek_v4() -> None:
    """Guards against a projection of V4 that no rule takes, or a hyper-connection, bias, sink or router that one does."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        num_attention_heads=4,
        head_dim=32,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        index_n_heads=2,
        index_head_dim=32,
        index_topk=4,
        sliding_window=16,
        hc_mult=2,
        hc_sinkhorn_iters=2,
    )
    model = DeepseekV4ForCausalLM(config).to(BF16).eval()
    report = quantize_(model)
    attention = [ATTENTION, [*ATTENTION, *COMPRESSOR, *INDEXER], [*ATTENTION, *COMPRESSOR]]
    assert sorted(report.quantized) == sorted(
        f"model.layers.{layer}.{name}"
        for layer in range(3)
        for name in (
            *(f"self_attn.{module}.weight" for module in attention[layer]),
            *(f"mlp.{parameter}" for parameter in MOE),
            *(f"mlp.{module}.weight" for module in SHARED),
        )
    )
    reasons = {name: reason for name, reason in report.skipped.items() if reason != "1-D"}
    not_named_weight = [f"model.layers.{layer}.{kind}_hc.fn" for layer in range(3) for kind in ("attn", "ffn")]
    not_named_weight += [f"model.layers.{layer}.self_attn.compressor.position_bias" for layer in (1, 2)]
    not_named_weight += ["model.layers.1.self_attn.compressor.indexer.position_bias", "model.hc_head.hc_fn"]
    assert reasons == {
        "model.embed_tokens.weight": "embedding, or tied to one",
        "lm_head.weight": "excluded by '*lm_head*'",
        **{f"model.layers.{layer}.mlp.gate.weight": "excluded by '*.mlp.gate.weight'" for layer in range(3)},
        **dict.fromkeys(not_named_weight, "2-D, but not named weight"),
    }
    with torch.inference_mode():
        logits = model(torch.arange(24).view(1, 24), use_cache=False).logits
    assert logits.isfinite().all()


# --- storing ---------------------------------------------------------------------------------------------------------


def packed_with_segments() -> Nvfp4Tensor:
    parts = (Nvfp4Tensor.from_float(torch.randn(16, 32, dtype=BF16)) for _ in range(2))
    first, second = ((part.codes, part.block_scales, part.global_scale.view(1)) for part in parts)
    merged = (
        torch.cat([left.view(torch.uint8), right.view(torch.uint8)]).view(left.dtype)
        for left, right in zip(first, second, strict=True)
    )
    return Nvfp4Tensor(*merged)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    """Guards against a byte that changes on disk, and against names that no ModelOpt reader knows."""
    model = Model()
    model.proj.weight = nn.Parameter(packed_with_segments(), requires_grad=False)
    quantize_(model)
    state = model.state_dict()
    state.pop("tied_head.weight")  # safetensors stores no memory twice
    state["done.weight"] = state["done.weight"].to(BF16)
    flat = flatten_state_dict(state)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in flat.items() if "gate_" in name} == {
        "mlp.experts.gate_up_proj": (torch.uint8, (4, 64, 16)),
        "mlp.experts.gate_up_proj_scale": (torch.float8_e4m3fn, (4, 64, 2)),
        "mlp.experts.gate_up_proj_scale_2": (torch.float32, (4,)),
        "mlp.shared_experts.gate_proj.weight": (torch.uint8, (32, 16)),
        "mlp.shared_experts.gate_proj.weight_scale": (torch.float8_e4m3fn, (32, 2)),
        "mlp.shared_experts.gate_proj.weight_scale_2": (torch.float32, ()),
        "mlp.shared_experts.gate_proj.bias": (BF16, (32,)),
        "transposed.gate_up_proj": (BF16, (4, 32, 64)),
    }
    assert not any(isinstance(value, Nvfp4Tensor) for value in flat.values())

    save_file(flat, tmp_path / "model.safetensors")
    again = unflatten_state_dict(load_file(tmp_path / "model.safetensors"))
    assert again.keys() == state.keys()
    for name, value in state.items():
        if isinstance(value, Nvfp4Tensor):
            assert isinstance(again[name], Nvfp4Tensor)
            assert again[name].dtype == BF16
            for part in ("codes", "block_scales", "global_scale"):
                oracle.assert_same_bits(getattr(again[name], part), getattr(value, part))
        else:
            oracle.assert_same_bits(again[name], value)

    fresh = Model()
    fresh.load_state_dict(again, assign=True, strict=False)
    x = torch.randn(2, 32, dtype=BF16)
    oracle.assert_same_bits(fresh.proj(x), model.proj(x))


def test_flatten_copies_nothing() -> None:
    """Guards against a second copy of a model of hundreds of gigabytes while it is saved."""
    weight = Nvfp4Tensor.from_float(torch.randn(16, 32))
    flat = flatten_state_dict({"w": weight})
    assert flat["w"] is weight.codes
    assert flat["w_scale"] is weight.block_scales
    assert flat["w_scale_2"] is weight.global_scale


def test_unflatten_leaves_plain_tensors_called_scale_alone() -> None:
    """Guards against a parameter that is swallowed for ending in _scale, such as a hyper-connection's."""
    flat = {"hc": torch.zeros(2), "hc_scale": torch.ones(3), "x_scale_2": torch.ones(())}
    assert unflatten_state_dict(flat).keys() == flat.keys()


def test_unflatten_rejects_parts_that_do_not_belong_together() -> None:
    """Guards against a shard that was saved without its block scales, and against another weight's."""
    flat: dict[str, Tensor] = flatten_state_dict({"w": Nvfp4Tensor.from_float(torch.randn(16, 32))})
    with pytest.raises(RuntimeError, match=r"^Nvfp4Tensor: block_scales must have the leading shape of codes"):
        unflatten_state_dict({**flat, "w_scale": flat["w_scale"][:8]})
    del flat["w_scale"]
    with pytest.raises(ValueError, match=r"^unflatten_state_dict: flat must hold w_scale, as it holds w_scale_2$"):
        unflatten_state_dict(flat)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_unflatten_dtype(dtype: torch.dtype) -> None:
    """Guards against weights that stand for bf16 in a model of another dtype."""
    flat = flatten_state_dict({"w": Nvfp4Tensor.from_float(torch.randn(16, 32))})
    assert unflatten_state_dict(flat, dtype)["w"].dtype == dtype


def test_include_asks_for_what_is_left_alone_by_default() -> None:
    """A router or an embedding that is asked for by name was silently left alone: the default exclude won."""
    model = nn.ModuleDict({"lm_head": nn.Linear(32, 48), "embed": nn.Embedding(16, 32)}).bfloat16()
    report = quantize_(model, include=["lm_head.weight", "embed.weight"])
    assert sorted(report.quantized) == ["embed.weight", "lm_head.weight"]
    rows = model["embed"](torch.tensor([3]))
    assert torch.equal(rows[0], model["embed"].weight.dequantize()[3])
    excluded = nn.ModuleDict({"lm_head": nn.Linear(32, 48)}).bfloat16()
    assert quantize_(excluded, include=["*"], exclude=["lm_head*"]).quantized == []


def test_router_is_known_by_the_experts_next_to_it() -> None:
    """A mixture of experts packed on its own calls its router ``gate.weight``, as an MLP may call its first linear: the
    router was packed, and other experts answered."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 4, bias=False)
            self.experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))

    report = quantize_(Mixture().bfloat16())
    assert report.skipped == {"gate.weight": "router: it stands next to experts"}
    mlp = nn.ModuleDict({"gate": nn.Linear(32, 64, bias=False), "up": nn.Linear(32, 64, bias=False)}).bfloat16()
    assert quantize_(mlp).quantized == ["gate.weight", "up.weight"]
