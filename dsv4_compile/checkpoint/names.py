"""Which parameter of a model a stored weight belongs to: rules on names, for any module tree that uses these names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

# DeepSeek's own names -> HuggingFace's, applied in this order to the name with a dot in front, so that a layer or a
# block by itself is named as it is within a model. What no rule touches is HuggingFace's already.
# Source: the weight names of deepseek-ai/DeepSeek-V4 and transformers' DeepseekV4 modules.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^\.embed\.weight$", ".embed_tokens.weight"),
        (r"^\.head\.weight$", ".lm_head.weight"),
        (r"\.hc_head_(fn|base|scale)$", r".hc_head.hc_\1"),
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.self_attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
        (r"\.self_attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
        (r"\.self_attn\.indexer\.", ".self_attn.compressor.indexer."),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
        (r"\.attn_sink$", ".sinks"),
        (r"(\.self_attn\.(?:.*\.)?)norm\.", r"\1kv_norm."),
        (r"\.ape$", ".position_bias"),
        (r"\.wq_a\.", ".q_a_proj."),
        (r"\.wq_b\.", ".q_b_proj."),
        (r"\.wkv\.", ".kv_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.wo_a\.", ".o_a_proj."),
        (r"\.wo_b\.", ".o_b_proj."),
        (r"\.q_norm\.", ".q_a_norm."),
        (r"\.mlp\.gate\.bias$", ".mlp.gate.e_score_correction_bias"),
        (r"(\.(?:shared_experts|experts\.\d+)\.)w1\.", r"\1gate_proj."),
        (r"(\.(?:shared_experts|experts\.\d+)\.)w2\.", r"\1down_proj."),
        (r"(\.(?:shared_experts|experts\.\d+)\.)w3\.", r"\1up_proj."),
    )
)
_EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
LISTED_EXPERT = re.compile(r"\bexperts\.\d+\.")
_MTP = re.compile(r"(^|\.)mtp\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_MTP_PARTS = re.compile(r"\.(eh_proj|e_proj|h_proj|enorm|hnorm|shared_head)\b")
STACKED = ("gate_up_proj", "down_proj")


class Slot(NamedTuple):
    """Where a stored weight goes.

    Attributes:
        parameter: name in the model.
        expert: index along the first dimension of a stacked parameter; None for the whole parameter.
        half: ``gate`` or ``up``, the first or second half of a stacked gate_up_proj's rows; "" for all rows.
    """

    parameter: str
    expert: int | None = None
    half: str = ""


def huggingface_name(name: str) -> str:
    """The name that HuggingFace's modules use, without regard to a leading ``model.``."""
    name = f".{name}"
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name[1:]


def find_slot(name: str, parameters: Collection[str]) -> Slot | None:
    """The slot of a stored weight in a model with these parameters, or None where it has none."""
    for candidate in _candidates(name):
        if candidate in parameters:
            return Slot(candidate)
        if (match := _EXPERT.match(candidate)) is not None:
            experts, index, projection = match.groups()
            if projection == "down_proj" and f"{experts}.down_proj" in parameters:
                return Slot(f"{experts}.down_proj", int(index))
            if projection != "down_proj" and f"{experts}.gate_up_proj" in parameters:
                return Slot(f"{experts}.gate_up_proj", int(index), projection.removesuffix("_proj"))
    return None


def _candidates(name: str) -> Iterable[str]:
    """The names a weight may have in a model: as it stands, renamed, with and without the ``model.`` in front."""
    for spelling in dict.fromkeys((name, huggingface_name(name), huggingface_name(name.removeprefix("model.")))):
        yield spelling
        yield f"model.{spelling}"
        yield spelling.removeprefix("model.")


def mtp_names(names: Iterable[str]) -> set[str]:
    """Stored weights of multi-token-prediction modules: named so, or in a layer with what only those have."""
    names = list(names)
    layers = {name: match[1] for name in names if (match := _LAYER.search(name)) is not None}
    mtp_layers = {layers[name] for name in layers if _MTP_PARTS.search(name)}
    return {name for name in names if _MTP.search(name) or layers.get(name) in mtp_layers}


def layer_number(name: str) -> int | None:
    """The number of the decoder layer that a stored weight belongs to, or None."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def layer_pattern(name: str) -> str:
    """A name with its layer and expert numbers replaced by ``*``, for reports."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
