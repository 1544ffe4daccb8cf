"""``topk_router`` on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.kernels.device import require_hopper

OP = "topk_router"
KERNEL = "sm90.topk_router"

WARPS = 4  # tokens a CTA
LANE_EXPERTS = (1, 2, 4, 8, 12, 16, 32, 64)
MAX_EXPERTS = 32 * LANE_EXPERTS[-1]


@dataclass(frozen=True)
class RouterConfig:
    """Configuration of the kernel.

    Attributes:
        dtype: of the logits.
        lane_experts: experts a lane holds.
        score_function: see the operator.
        bias: dtype of the selection bias, or None.
        table, token_ids: their dtypes with a hash table, or None.
        pdl: launched by programmatic dependent launch.
    """

    dtype: str
    lane_experts: int
    score_function: str
    bias: str | None = None
    table: str | None = None
    token_ids: str | None = None
    pdl: bool = True

    @property
    def is_hash(self) -> bool:
        return self.table is not None

    @property
    def index_bytes(self) -> tuple[int, int]:
        """Bytes of a token id and of an entry of the table; both little-endian, the values fit the low four."""
        return 8 if self.token_ids == "int64" else 4, 8 if self.table == "int64" else 4


def _name(tensor: Tensor | None) -> str | None:
    return None if tensor is None else str(tensor.dtype).removeprefix("torch.")


def topk_router(
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
    """Weights and ids; arguments as of the operator."""
    require_hopper(OP, logits)
    tokens, experts = logits.shape
    if experts > MAX_EXPERTS:
        raise RuntimeError(f"{OP}: logits must have at most {MAX_EXPERTS} experts on this device, got {experts}")
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    ids = logits.new_empty((tokens, top_k), dtype=torch.int64)
    if tokens == 0:
        return weights, ids
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    lane_experts = next(count for count in LANE_EXPERTS if 32 * count >= experts)
    config = RouterConfig(
        str(logits.dtype).removeprefix("torch."),
        lane_experts,
        score_function,
        _name(selection_bias),
        _name(hash_table),
        _name(token_ids),
    )
    nothing = logits.new_empty((0,))
    no_index = logits.new_empty((0,), dtype=torch.int32)
    cache.kernel(KERNEL, config)(
        logits,
        nothing if selection_bias is None else selection_bias.contiguous(),
        no_index if hash_table is None else hash_table.contiguous().view(-1),
        no_index if token_ids is None else token_ids.contiguous(),
        weights.view(-1),
        ids.view(-1),
        tokens,
        experts,
        top_k,
        int(normalization == "sum"),
        norm_eps,
        route_scale,
    )
    return weights, ids
