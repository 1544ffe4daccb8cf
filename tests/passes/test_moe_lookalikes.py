"""What only looks like HuggingFace's experts keeps its meaning: edits of both forms written out, and other clamps."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from dsv4_compile.testing import Rewritten
from tests.passes.moe_programs import (
    IMPLEMENTATIONS,
    INTERMEDIATE,
    E,
    H,
    L,
    Model,
    Steps,
    emulated,
    routing,
    v4_experts,
)
from tests.passes.programs import capture_one, sqnr_db


def run(steps: type[Steps], implementation: str, *, fires: bool) -> tuple[Any, Any, Tensor, Rewritten]:
    """The compiled model's result, its emulation, the emulation of the unedited one, and the graph."""
    for _ in range(60):  # until the edit shows: that the smallest expert is left out, one draw in four shows
        module, inputs = v4_experts(implementation), routing()
        gate_up, down = module.gate_up_proj.data, module.down_proj.data
        edited, unedited = (
            getattr(kind(gate_up, down, emulate=True), implementation)(*inputs) for kind in (steps, Steps)
        )
        if steps is Steps or sqnr_db(edited, unedited) < OTHER_DB:
            break
    result, graph = capture_one(Model(steps, implementation, gate_up, down), *inputs)
    assert ("moe" in graph.counts) == ("dsv4.nvfp4_moe(" in graph.after) == fires
    assert graph.counts.get("experts_grouped", 0) + graph.counts.get("experts_gathered", 0) == 2
    return result, edited, unedited, graph


# With NVFP4 operands fixed, what is left is bf16 against fp32 between the products: 2^-9 of gate and up. It moves few codes
# of the second quantisation, around 40 dB, or the global scale, and with it many: of 4350 draws, 15.9 dB at least. An edited
# model is tested where it is below 7 dB of the other: who gives the other's answer is then below 10.2 dB of its own,
# 0.447 / 1.447.
SAME_DB, OTHER_DB = 14.0, 7.0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_written_out(implementation: str) -> None:
    """Guards against edits below that are tested against a program which would not match anyway."""
    result, edited, unedited, _ = run(Steps, implementation, fires=True)
    assert torch.equal(edited, unedited)
    assert sqnr_db(result, edited) > SAME_DB


class IdsClamped(Steps):
    def row_ids(self, ids: Tensor) -> Tensor:
        return ids.clamp(0, len(self.gate_up) - 1)


def test_ids_clamped() -> None:
    """Guards against leaving out a clamp that is no mask: without it the operator skips ids out of range."""
    module = v4_experts("batched_mm")
    x, ids, weights = routing()
    ids[0, 0], ids[1, 1] = E, -1
    gate_up, down = module.gate_up_proj.data, module.down_proj.data
    result, graph = capture_one(Model(IdsClamped, "batched_mm", gate_up, down), x, ids, weights)
    assert graph.counts["moe"] == 1
    assert torch.equal(result, emulated(x, ids.clamp(0, E - 1), weights, gate_up, down, L))


class SecondReaderOfDown(Steps):
    def weighted(self, y: Tensor, weights: Tensor) -> Tensor:
        self.read = y
        return super().weighted(y, weights)

    def total(self, y: Tensor) -> Tensor:
        return super().total(y) + self.read.norm()  # a sum may be nearly 0


class SecondReaderOfGateAndUp(Steps):
    def halves(self, gate_and_up: Tensor) -> tuple[Tensor, Tensor]:
        self.read = gate_and_up
        return super().halves(gate_and_up)

    def total(self, y: Tensor) -> Tensor:
        return super().total(y) + self.read.norm()  # a sum may be nearly 0


class OtherActivation(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.cos(gate.clamp(max=L)) * up.clamp(-L, L)


class GateAndUpSwapped(Steps):
    def halves(self, gate_and_up: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return up, gate


class Interleaved(Steps):
    def halves(self, gate_and_up: Tensor) -> tuple[Tensor, Tensor]:
        return gate_and_up[..., 0::2], gate_and_up[..., 1::2]


class WeightTwice(Steps):
    def weighted(self, y: Tensor, weights: Tensor) -> Tensor:
        return y * weights.unsqueeze(-1) * weights.unsqueeze(-1)


class NoWeight(Steps):
    def weighted(self, y: Tensor, weights: Tensor) -> Tensor:
        return y


class WeightsOfOtherTokens(Steps):
    def routing_weights(self, weights: Tensor) -> Tensor:
        return weights.t().reshape(-1)


class FirstExpertOnly(Steps):
    def total(self, y: Tensor) -> Tensor:
        return y[:, :1].sum(dim=1)


class OtherDownExpert(Steps):
    def down_ids(self, ids: Tensor) -> Tensor:
        return ids.roll(1)


BOTH = (
    SecondReaderOfDown,
    SecondReaderOfGateAndUp,
    OtherActivation,
    GateAndUpSwapped,
    Interleaved,
    WeightTwice,
    NoWeight,
    WeightsOfOtherTokens,
    FirstExpertOnly,
)


class OffsetsShifted(Steps):
    def offsets(self, ids: Tensor) -> Tensor:
        return (super().offsets(ids) - 2).clamp(min=0)


class OffsetsOfOtherIds(Steps):
    def offsets(self, ids: Tensor) -> Tensor:
        return super().offsets((ids + 1) % E)


class OffsetsOfOtherBins(Steps):
    def offsets(self, ids: Tensor) -> Tensor:
        counts = torch.histc(ids.float(), bins=len(self.gate_up), min=1, max=len(self.gate_up) - 1)
        return torch.cumsum(counts, dim=0, dtype=torch.int32)


class OffsetsOfOneDownOtherwise(Steps):
    def down_ids(self, ids: Tensor) -> Tensor:
        return (ids - 2).clamp(min=0)


class NoInverse(Steps):
    def inverse(self, order: Tensor) -> Tensor:
        return order


class InverseReversed(Steps):
    def inverse(self, order: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0] - 1, -1, -1)
        return inverse


class OtherTopK(Steps):
    def top_k(self, ids: Tensor) -> int:
        return ids.shape[1] + 1


class SortedDown(Steps):
    def sort(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids, descending=True)


GROUPED = (
    OffsetsShifted,
    OffsetsOfOtherIds,
    OffsetsOfOtherBins,
    OffsetsOfOneDownOtherwise,
    NoInverse,
    InverseReversed,
    OtherTopK,
    SortedDown,
)


class RowsRepeated(Steps):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x.repeat(top_k, 1)


class RowsExpanded(Steps):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x.unsqueeze(0).expand(top_k, -1, -1).reshape(-1, x.shape[1])


class LastExpertLeftOut(Steps):
    def row_ids(self, ids: Tensor) -> Tensor:
        return ids.clamp(0, len(self.gate_up) - 2)


class FirstExpertLeftOut(Steps):
    def row_ids(self, ids: Tensor) -> Tensor:
        return ids.clamp(1, len(self.gate_up) - 1)


BATCHED = (RowsRepeated, RowsExpanded, OtherDownExpert, LastExpertLeftOut, FirstExpertLeftOut)

EDITS = [
    *[(IMPLEMENTATIONS[index % 2], steps) for index, steps in enumerate(BOTH)],
    *[("grouped_mm", steps) for steps in GROUPED],
    *[("batched_mm", steps) for steps in BATCHED],
]


@pytest.mark.parametrize(("implementation", "steps"), EDITS)
def test_edited_model_gives_its_own_answer(implementation: str, steps: type[Steps]) -> None:
    """Guards against a pattern that accepts a program that means something else."""
    result, edited, unedited, graph = run(steps, implementation, fires=False)
    assert graph.after.count("dsv4.nvfp4_grouped_mm(") == 2
    assert sqnr_db(result, edited) > SAME_DB
    assert sqnr_db(edited, unedited) < OTHER_DB
    assert sqnr_db(result, unedited) < SAME_DB


def test_weights_of_another_shape() -> None:
    """Guards against a down projection to another width than the tokens have."""
    down = torch.randn(E, 2 * H, INTERMEDIATE).bfloat16()
    gate_up = torch.randn(E, 2 * INTERMEDIATE, H).bfloat16() / 4
    inputs = routing()
    result, graph = capture_one(Model(Steps, "grouped_mm", gate_up, down), *inputs)
    assert "moe" not in graph.counts
    assert_expected_inline(
        "\n".join(line for line in graph.after.splitlines() if "dsv4." in line),
        """\
%9: (u8[12, 32], f8e4m3[12, 4], f32[]) = dsv4.quantize_nvfp4(%3, 'tensor')
%10: bf16[12, 64] = dsv4.nvfp4_grouped_mm(*%9, *w0, %8, bf16)
%12: (u8[12, 16], f8e4m3[12, 2], f32[]) = dsv4.swiglu_quantize_nvfp4(%11[0], %11[1], 2.0, 'tensor')
%13: bf16[12, 128] = dsv4.nvfp4_grouped_mm(*%12, *w1, %8, bf16)""",
    )
    assert sqnr_db(result, Steps(gate_up, down, emulate=True).grouped_mm(*inputs)) > SAME_DB


# A clamp that is not DeepSeek's stays in the graph. Between the product and the SwiGLU it keeps the whole from
# matching; the parts are still operators.


class NoClamp(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class GateNotClamped(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up.clamp(-L, L)


class UpClampedOnOneSide(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=L)) * up.clamp(max=L)


class ClampSideSwapped(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(min=-L)) * up.clamp(-L, L)


class OtherLimitOnUp(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=L)) * up.clamp(-L / 8, L / 8)


class OtherLimit(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=L / 8)) * up.clamp(-L / 8, L / 8)


CLAMPS = {
    NoClamp: "inf",
    OtherLimit: "0.25",
    GateNotClamped: None,
    UpClampedOnOneSide: None,
    ClampSideSwapped: None,
    OtherLimitOnUp: None,
}


@pytest.mark.parametrize(
    ("implementation", "steps"), [(IMPLEMENTATIONS[index % 2], steps) for index, steps in enumerate(CLAMPS)]
)
def test_clamps(implementation: str, steps: type[Steps]) -> None:
    """Guards against the limit of the model this was copied from, and against a clamp that is lost."""
    limit = CLAMPS[steps]
    result, edited, unedited, graph = run(steps, implementation, fires=limit is not None)
    if limit is None:
        assert graph.after.count("dsv4.nvfp4_grouped_mm(") == 2
        assert graph.after.count(", inf, 'tensor')") == 1
        assert "aten.clamp" in graph.after
    else:
        assert f", {limit}, 'after_down', 'tensor', bf16)" in graph.after
    assert sqnr_db(result, edited) > SAME_DB
    assert sqnr_db(edited, unedited) < OTHER_DB
    assert sqnr_db(result, unedited) < SAME_DB
