"""The router pass: the routers of known models become one operator; another selection or weight keeps its meaning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV4Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from dsv4_compile.testing import Rewritten, capture

T, E, TOP_K, H, VOCAB = 8, 8, 3, 32, 16  # as many tokens as experts: what is one a row could be taken for one a column
EPS, SCALE = 0.125, 2.5
BIAS = torch.linspace(-1, 1, E)[torch.tensor([3, 0, 6, 1, 7, 4, 2, 5])]


def capture_one(model: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Rewritten]:
    result, (graph,) = capture(model, *inputs, options={"quantize_weights": False})
    return result, graph


def by_expert(weights: Tensor, ids: Tensor) -> Tensor:
    """Weights in the place of their experts [T, E]: the order of a token's experts means nothing."""
    return torch.zeros(len(ids), E).scatter_add(1, ids, weights.float())


def assert_same_routing(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Fp32 on both sides, with scores that differ by far more than they round."""
    assert result[0].dtype == expected[0].dtype
    tolerance = 1e-5 if expected[0].dtype == torch.float32 else 2**-7
    torch.testing.assert_close(by_expert(*result), by_expert(*expected), rtol=tolerance, atol=1e-6)


def logits() -> Tensor:
    return 2 * torch.randn(T, E)


def softplus_sqrt(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


def router(
    score: Callable[[Tensor], Tensor] = softplus_sqrt,
    select: Callable[[Tensor], Tensor] = lambda s: torch.topk(s + BIAS, TOP_K, dim=-1, sorted=False).indices,
    gather: Callable[[Tensor, Tensor], Tensor] = lambda s, ids: s.gather(1, ids),
    norm: Callable[[Tensor], Tensor] = lambda w: w / (w.sum(dim=-1, keepdim=True) + EPS),
    scale: Callable[[Tensor], Tensor] = lambda w: w * SCALE,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = score(x)
        ids = select(scores)
        return scale(norm(gather(scores, ids))), ids

    return forward


V4 = router()


def test_deepseek_v4_written_out() -> None:
    """Guards against edits below that are tested against a program which would not match anyway."""
    x = logits()
    result, graph = capture_one(V4, x)
    assert_expected_inline(
        graph.after,
        """\
x0: f32[8, 8]
x1: f32[8]
%0: (f32[8, 3], i64[8, 3]) = dsv4.topk_router(x0, x1, None, None, 3, 'sqrtsoftplus', 'sum', 0.125, 2.5)
return %0[0], %0[1]""",
    )
    assert graph.counts["topk_router"] == 1
    assert_same_routing(result, V4(x))


def v4_config() -> Any:
    return DeepseekV4Config(
        hidden_size=H, n_routed_experts=E, num_experts_per_tok=TOP_K, vocab_size=VOCAB, num_hidden_layers=1
    )


MODULES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "DeepSeek V4": (DeepseekV4TopKRouter, v4_config),
    "Mixtral": (
        MixtralTopKRouter,
        lambda: MixtralConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=TOP_K),
    ),
    "Qwen3": (
        Qwen3MoeTopKRouter,
        lambda: Qwen3MoeConfig(hidden_size=H, num_experts=E, num_experts_per_tok=TOP_K, norm_topk_prob=True),
    ),
    "Qwen3, not normalised": (
        Qwen3MoeTopKRouter,
        lambda: Qwen3MoeConfig(hidden_size=H, num_experts=E, num_experts_per_tok=TOP_K, norm_topk_prob=False),
    ),
}


def fill(module: Any) -> Any:
    module.weight.data = torch.randn(E, H) / 4
    if hasattr(module, "e_score_correction_bias"):
        module.e_score_correction_bias.copy_(BIAS)
    if hasattr(module, "tid2eid"):
        module.tid2eid.copy_(torch.stack([torch.randperm(E)[:TOP_K] for _ in range(VOCAB)]))
    return module.eval()


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_transformers(name: str) -> None:
    """Guards against a router of transformers written in another way than the forms below."""
    kind, config = MODULES[name]
    module, x = fill(kind(config())), torch.randn(T, H)
    result, graph = capture_one(module, x)
    assert graph.counts["topk_router"] == 1
    assert "aten.topk" not in graph.after
    assert_same_routing(result[1:], module(x)[1:])


def test_hash_router() -> None:
    """Guards against selecting by score where a table selects."""
    module = fill(DeepseekV4HashRouter(v4_config()))
    x, token_ids = torch.randn(T, H), torch.randint(VOCAB, (2, T // 2))
    result, graph = capture_one(module, x, token_ids)
    assert_expected_inline(
        graph.after,
        """\
x0: f32[8, 32]
x1: f32[8, 32]
x2: i64[16, 3]
x3: i64[2, 4]
%0: f32[32, 8] = aten.permute(x1, [1, 0])
%1: f32[8, 8] = aten.mm(x0, %0)
%2: i64[8] = aten.view(x3, [-1])
%3: i64[8, 3] = aten.index(x2, [%2])
%4: (f32[8, 3], i64[8, 3]) = dsv4.topk_router(%1, None, x2, %2, 3, 'sqrtsoftplus', 'sum', 1e-20, 1.5)
return %1, %4[0], %3""",
    )
    assert graph.counts["topk_router"] == 1
    assert_same_routing(result[1:], module(x, token_ids)[1:])


def test_group_limited_selection_is_left_alone() -> None:
    """Guards against DeepSeek V3's selection, by groups first, being taken for a plain top-k."""
    config = DeepseekV3Config(
        hidden_size=H, n_routed_experts=E, num_experts_per_tok=TOP_K, n_group=4, topk_group=2, num_hidden_layers=1
    )
    module, x = fill(DeepseekV3TopkRouter(config)), torch.randn(T, H)
    result, graph = capture_one(module, x)
    assert "topk_router" not in graph.counts
    assert_same_routing(result[1:], module(x)[1:])


def values(score: Callable[[Tensor], Tensor], **options: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A router that takes topk's own values, normalised."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(score(x), TOP_K, **options)
        return weights / weights.sum(dim=-1, keepdim=True), ids

    return forward


def scores_read_elsewhere(x: Tensor) -> Any:
    scores = x.sigmoid()
    ids = scores.topk(TOP_K).indices
    return scores.gather(1, ids), ids, scores.mean(0)


def ids_read_before_the_gather(x: Tensor) -> Any:
    scores = x.sigmoid()
    ids = scores.topk(TOP_K).indices
    hits = F.one_hot(ids, E).sum((0, 1))
    return scores.gather(1, ids), ids, hits


def ids_cast_before_the_gather(x: Tensor) -> Any:
    scores = x.sigmoid()
    ids = scores.topk(TOP_K).indices
    narrow = ids.to(torch.int32)
    return scores.gather(1, narrow.long()), ids, narrow


def two_gathers(x: Tensor) -> Any:
    """The ids of both gathers must come in one order."""
    scores = x.sigmoid()
    ids = torch.topk(scores + BIAS, TOP_K, sorted=False).indices
    return scores.gather(1, ids) * x.gather(1, ids), ids


FIRES: dict[str, Callable[[Tensor], Any]] = {
    "softmax": values(lambda x: x.softmax(-1)),
    "softmax by its other name": values(lambda x: x.softmax(1)),
    "sigmoid": values(torch.sigmoid, dim=1),
    "sigmoid and bias": router(torch.sigmoid),
    "gather over the last": router(gather=lambda s, ids: s.gather(-1, ids)),
    "bias first": router(select=lambda s: torch.topk(BIAS + s, TOP_K).indices),
    "bias a row": router(select=lambda s: torch.topk(s + BIAS[None], TOP_K).indices),
    "no bias": router(select=lambda s: torch.topk(s, TOP_K).indices),
    "not normalised": router(norm=lambda w: w),
    "no eps": router(norm=lambda w: w / w.sum(1, keepdim=True)),
    "not scaled": router(scale=lambda w: w),
    "scores read elsewhere": scores_read_elsewhere,
    "ids read before the gather": ids_read_before_the_gather,
    "ids cast before the gather": ids_cast_before_the_gather,
    "two gathers": two_gathers,
}


@pytest.mark.parametrize("form", FIRES)
def test_forms(form: str) -> None:
    """Guards against a form that is not found, and against readers that get a result before it is there."""
    x = logits()
    result, graph = capture_one(FIRES[form], x)
    assert graph.counts["topk_router"] == 1
    expected = FIRES[form](x)
    assert_same_routing(result[:2], expected[:2])
    for other, wanted in zip(result[2:], expected[2:], strict=True):
        torch.testing.assert_close(other.sort(-1).values, wanted.sort(-1).values)


EDITS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "smallest": router(select=lambda s: torch.topk(s + BIAS, TOP_K, largest=False).indices),
    "over tokens": router(select=lambda s: torch.topk(s + BIAS, TOP_K, dim=0).indices.t()),
    "gathered over tokens": router(gather=lambda s, ids: s.gather(0, ids)),
    "softplus": router(F.softplus),
    "steeper softplus": router(lambda x: F.softplus(x, beta=3.0).sqrt()),
    "square root of sigmoid": router(lambda x: x.sigmoid().sqrt()),
    "softmax over tokens": router(lambda x: x.softmax(0)),
    "bias in the weights": router(gather=lambda s, ids: (s + BIAS).gather(1, ids)),
    "bias subtracted": router(select=lambda s: torch.topk(s - BIAS, TOP_K).indices),
    "bias twice": router(select=lambda s: torch.topk(torch.add(s, BIAS, alpha=3), TOP_K).indices),
    "bias a token": router(select=lambda s: torch.topk(s + BIAS.view(-1, 1), TOP_K).indices),
    "bias unsqueezed": router(select=lambda s: torch.topk(s + BIAS.unsqueeze(1), TOP_K).indices),
    "bias in whole numbers": router(select=lambda s: torch.topk(s + (4 * BIAS).long(), TOP_K).indices),
    "bias cut to whole numbers": router(select=lambda s: torch.topk(s + (BIAS * 1.5).long().float(), TOP_K).indices),
    "by something else": router(select=lambda s: torch.topk(s.flip(1), TOP_K).indices),
    "shifted ids": router(gather=lambda s, ids: s.gather(1, (ids + 1) % E)),
    "another k": router(select=lambda s: torch.topk(s + BIAS, TOP_K - 1).indices),
    "sum over tokens": router(
        select=lambda s: torch.topk(s + BIAS, TOP_K).indices, norm=lambda w: w / (w.sum(dim=0, keepdim=True) + EPS)
    ),
    "another sum": router(norm=lambda w: w / (w.roll(1, 0).sum(dim=-1, keepdim=True) + EPS)),
    "eps subtracted": router(norm=lambda w: w / (w.sum(dim=-1, keepdim=True) - EPS * 4)),
    "negative eps": router(norm=lambda w: w / (w.sum(dim=-1, keepdim=True) + -EPS * 4)),
    "eps three times": router(norm=lambda w: w / torch.add(w.sum(dim=-1, keepdim=True), EPS, alpha=6)),
    "sum over weights": router(norm=lambda w: (w.sum(dim=-1, keepdim=True) + EPS) / w),
    "rounded quotient": router(norm=lambda w: torch.div(8 * w, w.sum(-1, keepdim=True) + EPS, rounding_mode="floor")),
    "scaled twice": router(scale=lambda w: w * SCALE * SCALE),
    "scaled by a tensor": router(
        select=lambda s: torch.topk(s + BIAS, TOP_K).indices, scale=lambda w: w * BIAS[:TOP_K]
    ),
    "scale added": router(scale=lambda w: w + SCALE),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_router_gives_its_own_answer(edit: str) -> None:
    """Guards against a walk back that accepts another router."""
    x = logits()
    result, _ = capture_one(EDITS[edit], x)
    expected, unedited = EDITS[edit](x), V4(x)
    assert_same_routing(result, expected)
    assert (by_expert(*expected) - by_expert(*unedited)).abs().max() > 0.05
    assert (by_expert(*result) - by_expert(*unedited)).abs().max() > 0.05


LEFT_ALONE = ("smallest", "softplus", "softmax over tokens", "bias in the weights", "by something else", "bias a token")


@pytest.mark.parametrize("edit", LEFT_ALONE)
def test_left_alone(edit: str) -> None:
    """Guards against a rewrite of what only looks like a router."""
    _, graph = capture_one(EDITS[edit], logits())
    assert graph.counts == {}
    assert graph.after == graph.before


def test_smallest_is_left_alone() -> None:
    """Guards against reading ``largest=False`` as a plain top-k."""
    result, graph = capture_one(lambda x: torch.topk(x.sigmoid(), TOP_K, largest=False), x := logits())
    assert_expected_inline(
        graph.after,
        """\
x0: f32[8, 8]
%0: f32[8, 8] = aten.sigmoid(x0)
%1: (f32[8, 3], i64[8, 3]) = aten.topk(%0, 3, -1, False)
return %1[0], %1[1]""",
    )
    assert graph.counts == {}
    assert_same_routing(tuple(result), tuple(torch.topk(x.sigmoid(), TOP_K, largest=False)))
