"""Dense MoE: all experts on all tokens become the top-k that count, where the graph proves that no other does."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.passes.moe_programs import emulated
from tests.passes.programs import capture_one, sqnr_db

E, T, H, I, TOP_K = 5, 8, 64, 32, 2  # noqa: E741
GRANULARITIES = ("tensor", "tensor_pow2", "token")


class Dense(nn.Module):
    """Every expert on every token, step by step, each step a method that an edit replaces."""

    def __init__(self, limit: float | None = None) -> None:
        super().__init__()
        self.limit = limit
        scale = torch.logspace(-0.2, 0.2, E).view(-1, 1, 1)
        self.gate_up = nn.Parameter((torch.randn(E, 2 * I, H) * scale / 4).bfloat16(), requires_grad=False)
        self.down = nn.Parameter((torch.randn(E, H, I) * scale / 4).bfloat16(), requires_grad=False)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(logits, TOP_K, dim=-1)

    def table(self, logits: Tensor) -> Tensor:
        weights, ids = self.route(logits)
        return torch.zeros_like(logits).scatter(1, ids, weights)

    def rows(self, x: Tensor) -> Tensor:
        return x.expand(E, -1, -1)

    def halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate, up

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return F.silu(gate) * up

    def weigh(self, y: Tensor, table: Tensor) -> Tensor:
        return y * table.t().unsqueeze(-1)

    def combine(self, y: Tensor) -> Tensor:
        return y.sum(dim=0)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        gate, up = self.halves(torch.bmm(self.rows(x), self.gate_up.transpose(1, 2)))
        y = torch.bmm(self.activate(gate, up), self.down.transpose(1, 2))
        return self.combine(self.weigh(y, self.table(logits)))


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(T, H, dtype=torch.bfloat16), torch.randn(T, E).softmax(dim=-1).bfloat16()


class Repeated(Dense):
    def rows(self, x: Tensor) -> Tensor:
        return x.repeat(E, 1).view(E, -1, H)


class Unsqueezed(Dense):
    def rows(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0).expand(E, -1, -1)


class TableFirst(Dense):
    def weigh(self, y: Tensor, table: Tensor) -> Tensor:
        return table.transpose(0, 1)[..., None] * y


class TableOfZeros(Repeated):
    def table(self, logits: Tensor) -> Tensor:
        weights, ids = self.route(logits)
        return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device).scatter_(-1, ids, weights)


def test_dense() -> None:
    """Guards against running every expert where the graph says that all but k count for nothing."""
    model, (x, logits) = Dense(limit=7.0), inputs()
    result, graph = capture_one(model, x, logits)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[5, 64, 64]
w1: nvfp4[5, 64, 32]
x0: bf16[8, 64]
x1: bf16[8, 5]
%0: (bf16[8, 2], i64[8, 2]) = aten.topk(x1, 2)
%1: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%2: bf16[8, 64] = dsv4.nvfp4_moe(*%1, %0[1], %0[0], *w0, *w1, 7.0, 'after_down', 'tensor', bf16)
return %2""",
    )
    weights, ids = model.route(logits)
    assert torch.equal(result, emulated(x, ids, weights, model.gate_up, model.down, 7.0))


@pytest.mark.parametrize("form", [Repeated, Unsqueezed, TableFirst, TableOfZeros])
def test_forms(form: type[Dense]) -> None:
    """Guards against one spelling that is found and another that runs every expert."""
    model, (x, logits) = form(), inputs()
    result, graph = capture_one(model, x, logits)
    assert graph.counts["dense_moe"] == 1
    assert "nvfp4_grouped_mm" not in graph.after
    weights, ids = model.route(logits)
    assert torch.equal(result, emulated(x, ids, weights, model.gate_up, model.down))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_granularity(granularity: str) -> None:
    """Guards against tokens or the input of down quantised with another granularity than was asked for."""
    model, (x, logits) = Dense(), inputs()
    result, graph = capture_one(model, x, logits, options={"gsa": granularity})
    assert graph.counts["dense_moe"] == 1
    weights, ids = model.route(logits)
    assert torch.equal(result, emulated(x, ids, weights, model.gate_up, model.down, float("inf"), granularity))


def test_dynamic_number_of_tokens() -> None:
    """Guards against a number of tokens that is not known when compiling."""
    model, (x, logits) = Dense(), inputs()
    result, graph = capture_one(model, x, logits, dynamic=True)
    assert graph.counts["dense_moe"] == 1
    weights, ids = model.route(logits)
    assert torch.equal(result, emulated(x, ids, weights, model.gate_up, model.down))


# Where nothing proves that the other experts count for nothing, or the function is another, all experts run.


class WeightsIntoInput(Dense):
    """Llama 4's order: the weight multiplies the input of the experts."""

    def rows(self, x: Tensor) -> Tensor:
        return x.expand(E, -1, -1) * self.column

    def weigh(self, y: Tensor, table: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        self.column = self.table(logits).t().unsqueeze(-1)
        return super().forward(x, logits)


class FullTable(Dense):
    def table(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=-1)


class TableOfOnes(Dense):
    def table(self, logits: Tensor) -> Tensor:
        weights, ids = self.route(logits)
        return torch.ones_like(logits).scatter(1, ids, weights)


class IdsThatMayRepeat(Dense):
    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits[:, :TOP_K], (logits[:, :TOP_K] > 0).long()


class TopkOverTokens(Dense):
    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(logits[:E], TOP_K, dim=0)
        return weights.t().repeat(2, 1)[:T], ids.t().repeat(2, 1)[:T]


class HalvesSwapped(Dense):
    def halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_up.chunk(2, dim=-1)
        return up, gate


class ClampOfOneSide(Dense):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=1.0)) * up


class WeightedTwice(Dense):
    def weigh(self, y: Tensor, table: Tensor) -> Tensor:
        column = table.t().unsqueeze(-1)
        return y * column * column


class ExpertsShifted(Dense):
    def weigh(self, y: Tensor, table: Tensor) -> Tensor:
        return y * table.roll(1, dims=1).t().unsqueeze(-1)


class SummedOverTokens(Dense):
    def combine(self, y: Tensor) -> Tensor:
        return y.sum(dim=1)


class IntermediateRead(Dense):
    def combine(self, y: Tensor) -> Tensor:
        return y.sum(dim=0) + 4 * y.amax(dim=0)


class OtherActivation(Dense):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.tanh(gate) * up


EDITS = [
    WeightsIntoInput,
    FullTable,
    TableOfOnes,
    IdsThatMayRepeat,
    TopkOverTokens,
    HalvesSwapped,
    ClampOfOneSide,
    WeightedTwice,
    ExpertsShifted,
    SummedOverTokens,
    IntermediateRead,
    OtherActivation,
]


@pytest.mark.parametrize("edited", EDITS)
def test_edited_model_gives_its_own_answer(edited: type[Dense]) -> None:
    """Guards against the unedited model's answer for a model that means something else."""
    model, (x, logits) = edited(), inputs()
    unedited = Dense()
    unedited.load_state_dict(model.state_dict())
    result, graph = capture_one(model, x, logits)
    assert "dense_moe" not in graph.counts
    own = sqnr_db(result, model(x, logits))
    assert own > 5  # NVFP4 against bf16, of outputs that partly cancel
    if edited is not SummedOverTokens:
        assert own > sqnr_db(result, unedited(x, logits)) + 3


def test_intermediate_read_runs_every_expert() -> None:
    """Guards against an output of an expert that disappears although something else reads it."""
    _, graph = capture_one(IntermediateRead(), *inputs())
    assert graph.after.count("dsv4.nvfp4_grouped_mm(") == 2
    assert "nvfp4_moe" not in graph.after
