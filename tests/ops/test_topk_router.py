"""``topk_router``: which experts a token goes to, ties included, and the weight each gets."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter

from dsv4_compile.ops import topk_router
from dsv4_compile.ops.topk_router import NORMALIZATIONS, SCORE_FUNCTIONS, scores
from tests import gpu
from tests import nvfp4_oracle as oracle

OP = torch.ops.dsv4.topk_router.default
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAN, INF = math.nan, math.inf
f32 = oracle.f32


def oracle_scores(logits: Tensor, score_function: str) -> oracle.Float64:
    """The documented fp32 operations one by one, each rounded from float64."""
    x = oracle.as_float64(logits)

    def exp(y: oracle.Float64) -> oracle.Float64:
        return np.where(y < -87, 0.0, oracle.exp(np.maximum(y, -87.0)))

    if score_function == "softmax":
        exponentials = exp(f32(x - x.max(-1, keepdims=True)))
        return f32(exponentials / f32(exponentials.sum(-1, keepdims=True)))
    u = exp(-np.abs(x))
    if score_function == "sigmoid":
        return f32(np.where(x >= 0, 1.0, u) / f32(1 + u))
    s = f32(u / f32(2 + u))
    square, p = f32(s * s), np.full_like(s, f32(1 / 15))
    for n in (13, 11, 9, 7, 5, 3, 1):
        p = f32(f32(p * square) + f32(1 / n))
    return f32(np.sqrt(f32(np.maximum(x, 0) + f32(f32(s + s) * p))))


def oracle_router(
    logits: Tensor, bias: Tensor | None, top_k: int, score_function: str, normalization: str, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Token by token with Python's sort: descending, ties to the lower id."""
    score = oracle_scores(logits, score_function)
    selection = score if bias is None else f32(score + oracle.as_float64(bias))
    ids = np.array([sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:top_k] for row in selection])
    weights = np.take_along_axis(score, ids, axis=1)
    if normalization == "sum":
        total = np.zeros(len(weights))
        for column in weights.T:
            total = f32(total + column)
        weights = f32(weights / f32(total + f32(eps))[:, None])
    return oracle.to_dtype(f32(weights * f32(scale)), torch.float32), torch.from_numpy(ids)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_matches_reference(has_bias: bool, dtype: torch.dtype, score_function: str, normalization: str) -> None:
    """Guards, bit by bit, against a bias that reaches the weights, scores in the dtype of the logits, and another order.

    Half of the logits are small integers, so that scores tie within most tokens.
    """
    logits = torch.randn(40, 37) * 4
    logits[::2] = logits[::2].round()
    logits = logits.to(dtype)
    bias = torch.randint(-2, 3, (37,)).to(dtype) / 4 if has_bias else None
    args = (5, score_function, normalization, 1e-3, 1.7)
    weights, ids = OP(logits, bias, None, None, *args)
    expected_weights, expected_ids = oracle_router(logits, bias, *args)
    assert torch.equal(ids, expected_ids)
    oracle.assert_same_bits(weights, expected_weights)


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_scores_are_accurate(score_function: str) -> None:
    """Guards against a wrong polynomial: within 4 ulp of float64, from -80 to 80 and down to tiny scores.

    softmax besides loses the rounding of x - max, up to 160 * 2^-24 of absolute error in the exponent.
    """
    logits = torch.cat([torch.linspace(-80, 80, 20001), torch.linspace(-1e-3, 1e-3, 999)]).view(100, 210)
    x = logits.double()
    exact = {
        "sqrtsoftplus": torch.log1p(x.exp()).sqrt(),
        "sigmoid": x.sigmoid(),
        "softmax": x.softmax(-1),
    }[score_function]
    error = (scores(logits, score_function).double() - exact).abs() / exact
    assert error.max() < (4 + (160 if score_function == "softmax" else 0)) * 2.0**-23


def test_known_values() -> None:
    """Guards against another function, a sum over all experts, and a scale that comes before the normalisation.

    softplus(log(e^y - 1)) = y, so logits of softplus 4 and 1 have scores 2 and 1.
    """
    logits = torch.tensor([[math.log(math.e - 1), -INF, math.log(math.e**4 - 1)]])
    weights, ids = topk_router(logits, top_k=2, route_scale=1.5)
    assert ids.tolist() == [[2, 0]]
    assert weights[0].tolist() == pytest.approx([1.0, 0.5], rel=1e-6)
    weights, ids = topk_router(logits, top_k=3, normalization="none")
    assert ids.tolist() == [[2, 0, 1]]
    assert weights[0].tolist() == pytest.approx([2.0, 1.0, 0.0], rel=1e-6)
    weights, _ = topk_router(torch.tensor([[0.0, math.log(3), -INF]]), top_k=3, score_function="softmax", normalization="none")  # fmt: skip
    assert weights[0].tolist() == pytest.approx([0.75, 0.25, 0.0], rel=1e-6)
    weights, _ = topk_router(torch.tensor([[0.0, math.log(3), -INF]]), top_k=3, score_function="sigmoid", norm_eps=0.75)
    assert weights[0].tolist() == pytest.approx([0.375, 0.25, 0.0], rel=1e-6)


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("experts", [7, 64, 257])
def test_ties_go_to_the_lower_id(experts: int, score_function: str) -> None:
    """Guards against an unstable selection, and equal logits whose scores differ with their place in a vector register."""
    logits = torch.full((9, experts), 1.2345)
    _, ids = topk_router(logits, top_k=6, score_function=score_function)
    assert torch.equal(ids, torch.arange(6).expand(9, 6))
    logits[:, -1] = 2
    _, ids = topk_router(logits, top_k=6, score_function=score_function)
    assert torch.equal(ids, torch.tensor([experts - 1, 0, 1, 2, 3, 4]).expand(9, 6))


def test_bias_only_selects() -> None:
    """Guards against a weight that contains the bias: an expert that only its bias brings in has its small score."""
    logits = torch.tensor([[0.0, 5.0, -1.0]])
    weights, ids = topk_router(logits, torch.tensor([0.0, 0.0, 9.0]), top_k=2, normalization="none")
    assert ids.tolist() == [[2, 1]]
    expected = F.softplus(torch.tensor([[-1.0, 5.0]])).sqrt()
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


ROUTER_CONFIG = SimpleNamespace(
    num_experts_per_tok=6,
    num_local_experts=64,
    hidden_size=64,
    scoring_func="sqrtsoftplus",
    routed_scaling_factor=1.5,
    vocab_size=100,
)


def test_is_the_topk_router_of_transformers() -> None:
    """Guards against another router: the same experts (whose order is free there), weights within 8 fp32 ulp."""
    router = DeepseekV4TopKRouter(ROUTER_CONFIG)
    router.weight.data.copy_(torch.eye(64))
    router.e_score_correction_bias.copy_(torch.randn(64))
    logits, theirs, their_ids = router(torch.randn(200, 64) * 3)
    weights, ids = topk_router(logits.detach(), router.e_score_correction_bias, top_k=6, norm_eps=1e-20, route_scale=1.5)  # fmt: skip
    order, their_order = ids.argsort(-1), their_ids.argsort(-1)
    assert torch.equal(ids.gather(1, order), their_ids.gather(1, their_order))
    ours, theirs = weights.gather(1, order), theirs.detach().gather(1, their_order)
    torch.testing.assert_close(ours, theirs, rtol=8 * 2.0**-23, atol=0)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_is_the_hash_router_of_transformers(id_dtype: torch.dtype) -> None:
    """Guards against ids that are selected, sorted or weighted in another order than the table's."""
    router = DeepseekV4HashRouter(ROUTER_CONFIG)
    router.weight.data.copy_(torch.eye(64))
    router.tid2eid.copy_(torch.rand(100, 64).argsort(-1)[:, :6])
    tokens = torch.randint(0, 100, (200,))
    logits, theirs, their_ids = router(torch.randn(200, 64) * 3, tokens)
    weights, ids = topk_router(
        logits.detach(), None, router.tid2eid.to(id_dtype), tokens.to(id_dtype), top_k=6, route_scale=1.5
    )
    assert ids.dtype == torch.int64
    assert torch.equal(ids, their_ids)
    torch.testing.assert_close(weights, theirs.detach(), rtol=8 * 2.0**-23, atol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_nan_is_contained_and_loud(score_function: str, normalization: str) -> None:
    """Guards against a token with a NaN logit that looks routed, an id out of range, and a changed bit in another token."""
    logits = torch.randn(4, 16)
    before = topk_router(logits, top_k=3, score_function=score_function, normalization=normalization)
    logits[1] = NAN
    logits[2, 15] = NAN
    weights, ids = topk_router(logits, top_k=3, score_function=score_function, normalization=normalization)
    assert weights[1:3].isnan().all()
    assert ((ids >= 0) & (ids < 16)).all()
    for part, other in zip((weights, ids), before, strict=True):
        oracle.assert_same_bits(part[[0, 3]], other[[0, 3]])
    table = torch.tensor([[0, 1, 2]])
    weights, ids = topk_router(logits, None, table, torch.zeros(4, dtype=torch.int64), top_k=3, score_function=score_function)  # fmt: skip
    assert weights.isnan().all(-1).tolist() == [False, True, True, False]
    assert torch.equal(ids, table.expand(4, 3))


def test_nan_bias_is_loud() -> None:
    """Guards against a damaged bias that sends every token to one expert without a word."""
    assert topk_router(torch.randn(2, 4), torch.tensor([0.0, NAN, 0.0, 0.0]), top_k=2)[0].isnan().all()


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_masked_experts_score_zero(score_function: str) -> None:
    """Guards against an expert masked by -inf that gets a weight, and a token with none left that gets NaN but in softmax."""
    logits = torch.full((2, 4), -INF)
    logits[0, 2] = 1
    weights, ids = topk_router(logits, top_k=2, score_function=score_function)
    assert ids[0].tolist() == [2, 0]
    assert weights[0].tolist() == [1.0, 0.0]
    assert weights[1].isnan().all() if score_function == "softmax" else weights[1].eq(0).all()


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("form", ["plain", "bias", "hash"])
def test_opcheck(form: str, tokens: int) -> None:
    """Guards against a fake that differs from the kernel: zero tokens, non-contiguous operands, every optional argument."""
    logits = torch.randn(12, tokens, dtype=torch.bfloat16).t()
    bias = torch.randn(24)[::2] if form == "bias" else None
    table = torch.randint(0, 12, (3, 50)).t() if form == "hash" else None
    token_ids = torch.randint(0, 50, (tokens, 2))[:, 0] if form == "hash" else None
    args = (logits, bias, table, token_ids, 3, "sqrtsoftplus", "sum", 1e-20, 2.5)
    torch.library.opcheck(OP, args)
    weights, ids = OP(*args)
    assert weights.shape == ids.shape == (tokens, 3)
    assert weights.is_contiguous()
    assert ids.is_contiguous()
    dense = [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]
    for part, other in zip((weights, ids), OP(*dense), strict=True):
        oracle.assert_same_bits(part, other)


LOGITS, TABLE, IDS = torch.zeros(3, 8), torch.zeros(9, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": LOGITS.double()}, "logits must be bfloat16 or float16 or float32, got float64"),
        ({"logits": LOGITS[0]}, r"logits must be \[T, E\], got shape \(8,\)"),
        ({"top_k": 0}, r"top_k must be in 1\.\.8, got 0"),
        ({"top_k": 9}, r"top_k must be in 1\.\.8, got 9"),
        ({"selection_bias": torch.zeros(8).int()}, "selection_bias must be bfloat16 or float16 or float32, got int32"),
        ({"selection_bias": torch.zeros(7)}, r"selection_bias must have shape \(8,\), got \(7,\)"),
        ({"selection_bias": torch.zeros(8), "hash_table": TABLE, "token_ids": IDS}, "selection_bias must be None with a hash_table, which selects by itself, got a tensor"),
        ({"hash_table": TABLE}, "token_ids must be given exactly when hash_table is, got none"),
        ({"token_ids": IDS}, "token_ids must be given exactly when hash_table is, got token_ids without a hash_table"),
        ({"hash_table": TABLE.float(), "token_ids": IDS}, "hash_table must be int32 or int64, got float32"),
        ({"hash_table": TABLE[:, :1], "token_ids": IDS}, r"hash_table must be \[V, 2\], got shape \(9, 1\)"),
        ({"hash_table": TABLE, "token_ids": IDS.float()}, "token_ids must be int32 or int64, got float32"),
        ({"hash_table": TABLE, "token_ids": IDS[:2]}, r"token_ids must have shape \(3,\), got \(2,\)"),
        ({"score_function": "relu"}, "score_function must be one of sqrtsoftplus, softmax, sigmoid, got 'relu'"),
        ({"normalization": "max"}, "normalization must be one of sum, none, got 'max'"),
        ({"norm_eps": -1e-3}, r"norm_eps must be non-negative, got -0\.001"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects(changes: dict[str, object], message: str, device: str) -> None:
    """Guards against arguments that do not belong together, and a name that falls through to another function."""
    arguments = {"logits": LOGITS, "top_k": 2, **changes}
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with pytest.raises(RuntimeError, match=f"^topk_router: {message}$"):
        topk_router(**moved)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    """Guards against a graph break, and against a second compilation for another number of tokens."""
    counter = CompileCounterWithBackend(backend)
    bias, table = torch.randn(12), torch.randint(0, 12, (50, 3))

    def run(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
        hashed = topk_router(logits, None, table, token_ids, top_k=3)
        return *topk_router(logits, bias, top_k=3, score_function="sigmoid"), *hashed

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for tokens in (5, 9):
        args = torch.randn(tokens, 12), torch.randint(0, 50, (tokens,))
        for arg in args:
            torch._dynamo.mark_dynamic(arg, 0)
        for part, other in zip(compiled(*args), run(*args), strict=True):
            oracle.assert_same_bits(part, other)
    assert counter.frame_count == 1


def check_on_gpu(*args: object) -> None:
    """Bit for bit the reference."""
    for part, value in zip(gpu.on_gpu(OP, *args), OP(*args), strict=True):
        oracle.assert_same_bits(part, value)


GPU_EXPERTS = (7, 64, 256, 384, 1024)


@pytest.mark.gpu
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("experts", GPU_EXPERTS)
def test_gpu_matches_the_cpu(experts: int, score_function: str, normalization: str) -> None:
    """Guards against one different bit of a score, a tie broken another way, and NaN that is not the largest."""
    logits = torch.randn(301, experts) * 4
    logits[::2] = logits[::2].round()
    logits[::7] = 1.2345
    logits[3::11, 5], logits[4::13, 2] = NAN, -INF
    for top_k in {1, min(8, experts), min(experts, 40)}:
        for bias in (None, torch.randint(-2, 3, (experts,)) / 4):
            check_on_gpu(logits, bias, None, None, top_k, score_function, normalization, 1e-20, 2.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_reads_any_operands(dtype: torch.dtype) -> None:
    """Guards against another dtype's bits, strides, no tokens, and entries of a table or of a bias of another token."""
    for tokens in (0, 1, 2, 77):
        logits = gpu.values((tokens, 64), dtype, "finite")
        for view in (logits, logits[:, ::2].contiguous()[:, :31], torch.randn(32, tokens).to(dtype).t()):
            experts = view.shape[1]
            check_on_gpu(view, torch.randn(experts).to(dtype), None, None, 6, "sqrtsoftplus", "sum", 1e-20, 1.0)
            for table_dtype, id_dtype in ((torch.int32, torch.int64), (torch.int64, torch.int32)):
                table = torch.randint(0, experts, (6, 50)).to(table_dtype).t()
                token_ids = torch.randint(0, 50, (tokens, 2)).to(id_dtype)[:, 0]
                check_on_gpu(view, None, table, token_ids, 6, "sqrtsoftplus", "sum", 1e-20, 1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_gpu_scores_every_magnitude(score_function: str) -> None:
    """Guards against a score that is one bit off somewhere: one expert, so that its score is its weight."""
    logits = torch.cat([torch.linspace(-95, 95, 60000), torch.randn(30000), gpu.values((9600,), torch.float32, "bits")])
    logits = logits.view(-1, 1) if score_function != "softmax" else logits.view(-1, 8)
    check_on_gpu(logits, None, None, None, logits.shape[1], score_function, "none", 0.0, 1.0)
