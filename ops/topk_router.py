"""``topk_router``: router logits to the experts of each token and their weights."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import topk_router as dispatch
from dsv4_compile.ops.registration import FLOAT_DTYPES, INDEX_DTYPES, check_choice, check_dtype, define, require

OP = "topk_router"

ScoreFunction = Literal["sqrtsoftplus", "softmax", "sigmoid"]
SCORE_FUNCTIONS: tuple[str, ...] = get_args(ScoreFunction)
Normalization = Literal["sum", "none"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)

_EXP_LOWEST = -87.0
# Coefficients of s^0, s^2, ... in atanh(s) / s; the first one left out is below 2e-9 of the sum for s <= 1/3.
_ATANH_COEFFICIENTS = tuple(1.0 / n for n in range(1, 17, 2))


def check(
    logits: Tensor,
    selection_bias: Tensor | None,
    hash_table: Tensor | None,
    token_ids: Tensor | None,
    top_k: int,
    score_function: str,
    normalization: str,
    norm_eps: float,
    route_scale: float,
) -> None:
    """Checks the arguments."""
    check_dtype(OP, "logits", logits, FLOAT_DTYPES)
    require(logits.dim() == 2, lambda: f"{OP}: logits must be [T, E], got shape {tuple(logits.shape)}")
    tokens, experts = logits.shape
    require(1 <= top_k <= experts, lambda: f"{OP}: top_k must be in 1..{experts}, got {top_k}")
    if selection_bias is not None:
        check_dtype(OP, "selection_bias", selection_bias, FLOAT_DTYPES)
        require(
            tuple(selection_bias.shape) == (experts,),
            lambda: f"{OP}: selection_bias must have shape ({experts},), got {tuple(selection_bias.shape)}",
        )
        require(
            hash_table is None,
            lambda: f"{OP}: selection_bias must be None with a hash_table, which selects by itself, got a tensor",
        )
    require(
        (hash_table is None) == (token_ids is None),
        lambda: (
            f"{OP}: token_ids must be given exactly when hash_table is, got "
            f"{'none' if token_ids is None else 'token_ids without a hash_table'}"
        ),
    )
    if hash_table is not None and token_ids is not None:
        check_dtype(OP, "hash_table", hash_table, INDEX_DTYPES)
        require(
            hash_table.dim() == 2 and hash_table.shape[1] == top_k,
            lambda: f"{OP}: hash_table must be [V, {top_k}], got shape {tuple(hash_table.shape)}",
        )
        check_dtype(OP, "token_ids", token_ids, INDEX_DTYPES)
        require(
            tuple(token_ids.shape) == (tokens,),
            lambda: f"{OP}: token_ids must have shape ({tokens},), got {tuple(token_ids.shape)}",
        )
    check_choice(OP, "score_function", score_function, SCORE_FUNCTIONS)
    check_choice(OP, "normalization", normalization, NORMALIZATIONS)
    require(norm_eps >= 0, lambda: f"{OP}: norm_eps must be non-negative, got {norm_eps}")


def allocate(
    logits: Tensor,
    selection_bias: Tensor | None,
    hash_table: Tensor | None,
    token_ids: Tensor | None,
    top_k: int,
    score_function: str,
    normalization: str,
    norm_eps: float,
    route_scale: float,
) -> tuple[Tensor, Tensor]:
    """Checks the arguments and returns uninitialised outputs."""
    check(logits, selection_bias, hash_table, token_ids, top_k, score_function, normalization, norm_eps, route_scale)
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _exp(y: Tensor) -> Tensor:
    """exp of y <= 0; 0 below -87, so that a logit of -inf scores exactly 0."""
    return torch.where(y < _EXP_LOWEST, 0.0, nvfp4.exp(y))


def _log1p(u: Tensor) -> Tensor:
    """log(1 + u) for u in 0..1, as 2 atanh(u / (2 + u)): no cancellation, so small u keep their accuracy."""
    s = u / (2.0 + u)
    square = s * s
    p = torch.full_like(s, _ATANH_COEFFICIENTS[-1])
    for coefficient in reversed(_ATANH_COEFFICIENTS[:-1]):
        p = p * square + coefficient
    return (s + s) * p


def scores(logits: Tensor, score_function: str) -> Tensor:
    """Scores [T, E] of fp32 logits, from IEEE fp32 operations only: equal logits tie on every device.

    - ``sqrtsoftplus``: ``sqrt(max(x, 0) + log1p(exp(-|x|)))``
    - ``sigmoid``: with ``u = exp(-|x|)``, ``1 / (1 + u)`` for x >= 0, else ``u / (1 + u)``
    - ``softmax``: ``exp(x - max)`` over their sum, which is added in fp64 and rounded to fp32
    """
    if score_function == "softmax":
        exponentials = _exp(logits - logits.amax(dim=-1, keepdim=True))
        return exponentials / exponentials.sum(dim=-1, keepdim=True, dtype=torch.float64).to(torch.float32)
    u = _exp(-logits.abs())
    if score_function == "sigmoid":
        return torch.where(logits >= 0, 1.0, u) / (1.0 + u)
    return nvfp4.sqrt(logits.clamp(min=0.0) + _log1p(u))


def reference(
    logits: Tensor,
    selection_bias: Tensor | None,
    hash_table: Tensor | None,
    token_ids: Tensor | None,
    top_k: int,
    score_function: str,
    normalization: str,
    norm_eps: float,
    route_scale: float,
) -> tuple[Tensor, Tensor]:
    """CPU kernel: everything in fp32, the sum of the weights in their order, so the same bits on every device.

    ``weight = (score / (sum + norm_eps)) * route_scale``, each step rounded. NaN counts as the largest score.
    """
    check(logits, selection_bias, hash_table, token_ids, top_k, score_function, normalization, norm_eps, route_scale)
    score = scores(logits.to(torch.float32), score_function)
    selection = score if selection_bias is None else score + selection_bias.to(torch.float32)
    if hash_table is None or token_ids is None:
        ids = selection.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    else:
        ids = hash_table[token_ids.to(torch.int64)].to(torch.int64)
    weights = score.gather(1, ids)
    if normalization == "sum":
        total = weights[:, :1]
        for column in range(1, top_k):
            total = total + weights[:, column : column + 1]
        weights = weights / (total + norm_eps)
    weights = weights * route_scale
    return torch.where(selection.isnan().any(dim=-1, keepdim=True), float("nan"), weights), ids


def cuda(
    logits: Tensor,
    selection_bias: Tensor | None,
    hash_table: Tensor | None,
    token_ids: Tensor | None,
    top_k: int,
    score_function: str,
    normalization: str,
    norm_eps: float,
    route_scale: float,
) -> tuple[Tensor, Tensor]:
    """GPU kernel: bitwise the reference, but for what the order of softmax's fp64 sum does to a last bit of fp32."""
    check(logits, selection_bias, hash_table, token_ids, top_k, score_function, normalization, norm_eps, route_scale)
    return dispatch.topk_router(
        logits, selection_bias, hash_table, token_ids, top_k, score_function, normalization, norm_eps, route_scale
    )


_op = define(
    f"{OP}(Tensor logits, Tensor? selection_bias, Tensor? hash_table, Tensor? token_ids, int top_k,"
    " str score_function, str normalization, float norm_eps, float route_scale) -> (Tensor weights, Tensor ids)",
    fake=allocate,
    cpu=reference,
    cuda=cuda,
)


def topk_router(
    logits: Tensor,
    selection_bias: Tensor | None = None,
    hash_table: Tensor | None = None,
    token_ids: Tensor | None = None,
    *,
    top_k: int,
    score_function: str = "sqrtsoftplus",
    normalization: str = "sum",
    norm_eps: float = 1e-20,
    route_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``ids = top_k(score(logits) + selection_bias)``, ``weights = score[ids] / (sum + norm_eps) * route_scale``.

    Args:
        logits: bf16, fp16 or fp32 [T, E], any strides, zero tokens allowed.
        selection_bias: bf16, fp16 or fp32 [E] or None; moves the selection, never a weight.
        hash_table: int32 or int64 [V, top_k] of expert ids 0..E-1, or None. Given, the experts of a token are those
            of its row of the table and nothing is selected; ``selection_bias`` must be None.
        token_ids: int32 or int64 [T], each 0..V-1; exactly with a ``hash_table``.
        top_k: experts a token, 1..E.
        score_function: ``sqrtsoftplus`` (``sqrt(log(1 + exp(x)))``), ``softmax`` (over all experts) or ``sigmoid``.
        normalization: ``sum`` (divide by the sum of the token's weights plus ``norm_eps``) or ``none``.
        norm_eps: >= 0; used by ``sum`` only.
        route_scale: multiplies the weights last.

    Returns:
        weights fp32 [T, top_k] and ids int64 [T, top_k], contiguous. Selected ids come in descending order of
        ``score + selection_bias``, ties to the lower id; ids of a table in its order. A token with a NaN among its
        scores or biases has NaN for all its weights, and ids in range.

    Raises:
        RuntimeError: dtypes or shapes that do not belong together, top_k out of range, an unknown score function or
            normalization, negative norm_eps, a bias with a table, a table without token ids, or no kernel for the
            device; on the CPU also ids outside their range.

    Source: HuggingFace transformers, models/deepseek_v4/modeling_deepseek_v4.py, ``DeepseekV4TopKRouter`` (there in
    the dtype of the model) and ``DeepseekV4HashRouter``.
    """
    weights, ids = _op(
        logits, selection_bias, hash_table, token_ids, top_k, score_function, normalization, norm_eps, route_scale
    )
    return weights, ids
