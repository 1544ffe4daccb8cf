"""What only looks like DeepSeek's clamped SwiGLU keeps its meaning: other clamps, second readers, edits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from dsv4_compile import nvfp4
from tests.passes.programs import Model, capture_one, sqnr_db
from tests.passes.swiglu_programs import K, L, M, N, down, gate_and_up, product

# Clamps that are not DeepSeek's stay in the graph; the operator gets no limit.

OTHER_CLAMPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "up not clamped": (lambda g: g.clamp(max=L), lambda u: u),
    "gate not clamped": (lambda g: g, lambda u: u.clamp(-L, L)),
    "up from above only": (lambda g: g.clamp(max=L), lambda u: u.clamp(max=L)),
    "up from below only": (lambda g: g.clamp(max=L), lambda u: u.clamp(min=-L)),
    "up asymmetric": (lambda g: g.clamp(max=L), lambda u: u.clamp(-L / 2, L)),
    "gate from below too": (lambda g: g.clamp(-L, L), lambda u: u.clamp(-L, L)),
    "gate from below only": (lambda g: g.clamp(min=-L), lambda u: u.clamp(-L, L)),
    "different limits": (lambda g: g.clamp(max=L / 2), lambda u: u.clamp(-L, L)),
    "negative limit": (lambda g: g.clamp(max=-L), lambda u: u.clamp(-L, L)),
    "bounds that cross": (lambda g: g.clamp(max=L), lambda u: u.clamp(L, -L)),
    "sides swapped": (lambda g: g.clamp(-L, L), lambda u: u.clamp(max=L)),
    "clamped after a sign change": (lambda g: (-g).clamp(max=L), lambda u: -u.clamp(-L, L)),
    "limit rounded on the way": (lambda g: g.clamp(max=L).float() + 1, lambda u: u.clamp(-L, L).float()),
    "limits a tensor each row": (
        lambda g: torch.minimum(g, torch.linspace(0.5, 4, M).bfloat16().unsqueeze(-1)),
        lambda u: u.clamp(-L, L),
    ),
}


@pytest.mark.parametrize("case", OTHER_CLAMPS)
def test_other_clamps_stay_in_the_graph(case: str) -> None:
    """Guards against folding into one symmetric limit what is not one."""
    clamp_gate, clamp_up = OTHER_CLAMPS[case]
    gate, up = gate_and_up()
    model, weight = down(lambda g, u: (F.silu(clamp_gate(g)) * clamp_up(u)).to(torch.bfloat16))
    result, graph = capture_one(model, gate, up)
    assert graph.counts["swiglu"] == 1
    assert ", inf, 'tensor')" in graph.after
    assert torch.equal(result, product(nvfp4.swiglu(clamp_gate(gate), clamp_up(up), math.inf), weight))
    assert sqnr_db(result, product(nvfp4.swiglu(gate, up, L), weight)) < 25


def test_clamp_on_one_side_only() -> None:
    """Guards against dropping the clamp of one operand because the other has none."""
    model, _ = down(lambda g, u: (F.silu(g.float().clamp(max=L)) * u.float()).to(g.dtype))
    _, graph = capture_one(model, *gate_and_up())
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: bf16[8, 64]
x1: bf16[8, 64]
%0: f32[8, 64] = prims.convert_element_type(x0, f32)
%1: f32[8, 64] = aten.clamp_max(%0, 2.0)
%2: f32[8, 64] = prims.convert_element_type(x1, f32)
%3: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.swiglu_quantize_nvfp4(%1, %2, inf, 'tensor')
%4: bf16[8, 32] = dsv4.nvfp4_mm(*%3, *[w0], None, bf16)
return %4""",
    )


def test_limit_in_a_buffer() -> None:
    """Guards against baking a limit that the user may change between calls."""
    gate, up = gate_and_up()
    model, weight = down(lambda g, u: F.silu(torch.minimum(g, limit)) * u.clamp(-L, L))
    model.register_buffer("limit", torch.tensor(L))
    limit = model.limit
    result, graph = capture_one(model, gate, up)
    assert ", inf, 'tensor')" in graph.after
    assert "aten.minimum" in graph.after
    assert torch.equal(result, product(nvfp4.swiglu(gate, up, L), weight))


NARROWED: dict[str, Callable[[Tensor], Tensor]] = {
    "through bf16": lambda x: x.bfloat16().float(),
    "through fp16": lambda x: x.half().float(),
    "clamped, then through bf16": lambda x: x.clamp(-2.3, 2.3).bfloat16().float(),
}


@pytest.mark.parametrize("case", NARROWED)
def test_casts_that_round_are_kept(case: str) -> None:
    """Guards against walking over a cast that loses bits or range on the way to the unclamped operand."""
    narrow = NARROWED[case]
    gate, up = gate_and_up(torch.float32)
    model, weight = down(lambda g, u: (F.silu(narrow(g).clamp(max=L)) * narrow(u).clamp(-L, L)).bfloat16())
    result, graph = capture_one(model, gate, up)
    assert graph.counts["swiglu"] == 1
    expected = product(nvfp4.swiglu(narrow(gate), narrow(up), L), weight)
    assert torch.equal(result, expected)


def test_cast_that_loses_range_is_kept() -> None:
    """Guards against taking bf16 for narrower than fp16, which cannot hold 1e5."""
    model, _ = down(lambda g, u: (F.silu(g.half().float().clamp(max=L)) * u.half().float().clamp(-L, L)).bfloat16())
    _, graph = capture_one(model, *gate_and_up())
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: bf16[8, 64]
x1: bf16[8, 64]
%0: f16[8, 64] = prims.convert_element_type(x0, f16)
%1: f16[8, 64] = prims.convert_element_type(x1, f16)
%2: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.swiglu_quantize_nvfp4(%0, %1, 2.0, 'tensor')
%3: bf16[8, 32] = dsv4.nvfp4_mm(*%2, *[w0], None, bf16)
return %3""",
    )


def test_one_operand_rounded_more_than_the_other() -> None:
    """Guards against gate and up of different dtypes reaching the operator, which takes one.

    gate is rounded by the caller: Inductor 2.11 removes a cast and its way back from a graph, after the passes.
    """
    gate, up = gate_and_up(torch.float32)
    model, weight = down(lambda g, u: (F.silu(g.float().clamp(max=L)) * u.clamp(-L, L)).bfloat16())
    result, graph = capture_one(model, gate.bfloat16(), up)
    assert graph.counts["swiglu"] == 1
    assert torch.equal(result, product(nvfp4.swiglu(gate.bfloat16().float(), up, L), weight))


# What must not be rewritten.


def test_second_reader_of_the_product() -> None:
    """Guards against computing the product twice, or giving its second reader another rounding."""
    weight = torch.randn(N, K)

    def forward(self: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(gate) * up
        return F.linear(hidden, self.weight), hidden

    gate, up = gate_and_up(torch.float32)
    result, graph = capture_one(Model(forward, weight=weight), gate, up, options={"include": ["weight"]})
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: f32[8, 64]
x1: f32[8, 64]
%0: f32[8, 64] = aten.neg(x0)
%1: f32[8, 64] = aten.exp(%0)
%2: f32[8, 64] = aten.add(%1, 1)
%3: f32[8, 64] = aten.div(x0, %2)
%4: f32[8, 64] = aten.mul(%3, x1)
%5: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(%4, 'tensor')
%6: f32[8, 32] = dsv4.nvfp4_mm(*%5, *[w0], None, f32)
return %6, %4""",
    )
    assert graph.counts == {"linear": 1}
    torch.testing.assert_close(result[1], F.silu(gate) * up)
    assert torch.equal(result[0], product(result[1], weight, torch.float32))


def test_second_reader_of_the_activation() -> None:
    """Guards against losing silu(gate) when it is read by something else as well."""
    weight = torch.randn(N, K, dtype=torch.bfloat16)

    def forward(self: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        activated = F.silu(gate)
        return F.linear(activated * up, self.weight), activated

    gate, up = gate_and_up()
    result, graph = capture_one(Model(forward, weight=weight), gate, up)
    assert "swiglu" not in graph.counts
    torch.testing.assert_close(result[1], F.silu(gate))
    assert sqnr_db(result[0], product(F.silu(gate) * up, weight)) > 30


def test_product_that_is_not_quantised() -> None:
    """Guards against a fusion of SwiGLU alone, which Inductor does better."""
    gate, up = gate_and_up(torch.float32)
    result, graph = capture_one(lambda g, u: F.silu(g) * u, gate, up)
    assert_expected_inline(
        graph.after,
        """\
x0: f32[8, 64]
x1: f32[8, 64]
%0: f32[8, 64] = aten.neg(x0)
%1: f32[8, 64] = aten.exp(%0)
%2: f32[8, 64] = aten.add(%1, 1)
%3: f32[8, 64] = aten.div(x0, %2)
%4: f32[8, 64] = aten.mul(%3, x1)
return %4""",
    )
    assert graph.counts == {}
    torch.testing.assert_close(result, F.silu(gate) * up)


def test_up_that_broadcasts() -> None:
    """Guards against a scale a row or a column in the place of up, which has another shape."""
    gate, up = gate_and_up()
    for other in (up[:1], up[:, :1], up[0]):
        model, weight = down(lambda g, u: F.silu(g) * u)
        result, graph = capture_one(model, gate, other)
        assert graph.counts == {"linear": 1}
        assert sqnr_db(result, product(F.silu(gate) * other, weight)) > 30


def test_operands_broadcast_by_a_minimum() -> None:
    """Guards against walking back over a minimum that changed the shape: one row would be quantised, not eight."""
    gate, up = gate_and_up()
    limit = (M, 1), L
    model, weight = down(
        lambda g, u: (
            F.silu(torch.minimum(g, torch.full(*limit)).bfloat16())
            * torch.minimum(u, torch.full(*limit)).bfloat16().clamp(min=-L)
        )
    )
    result, _ = capture_one(model, gate[:1], up[:1])
    assert torch.equal(result, product(nvfp4.swiglu(gate[:1], up[:1], L).expand(M, K), weight))


# Small edits of the model: each must give its own answer, never that of the model it was edited from.

EDITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gate and up swapped": lambda g, u: F.silu(u.clamp(max=L)) * g.clamp(-L, L),
    "clamps swapped": lambda g, u: F.silu(g.clamp(-L, L)) * u.clamp(max=L),
    "clamps after silu": lambda g, u: F.silu(g).clamp(max=L) * u.clamp(-L, L),
    "clamp of the product": lambda g, u: (F.silu(g) * u).clamp(-L, L),
    "clamp by minimum of the other": lambda g, u: F.silu(torch.minimum(g, u)) * u.clamp(-L, L),
    "other limit": lambda g, u: F.silu(g.clamp(max=1.5)) * u.clamp(-1.5, 1.5),
    "gate for up": lambda g, u: F.silu(g.clamp(max=L)) * g.clamp(-L, L),
    "up for gate": lambda g, u: F.silu(u.clamp(max=L)) * u.clamp(-L, L),
    "up plus one": lambda g, u: F.silu(g.clamp(max=L)) * (u.clamp(-L, L) + 1),
    "up negated": lambda g, u: F.silu(g.clamp(max=L)) * -u.clamp(-L, L),
    "gate negated": lambda g, u: F.silu(-g.clamp(max=L)) * u.clamp(-L, L),
    "added, not multiplied": lambda g, u: F.silu(g.clamp(max=L)) + u.clamp(-L, L),
    "divided, not multiplied": lambda g, u: F.silu(g.clamp(max=L)) / (u.clamp(-L, L).abs() + 1),
    "silu twice": lambda g, u: F.silu(F.silu(g.clamp(max=L))) * u.clamp(-L, L),
    "silu of both": lambda g, u: F.silu(g.clamp(max=L)) * F.silu(u.clamp(-L, L)),
    "silu of the product": lambda g, u: F.silu(g.clamp(max=L) * u.clamp(-L, L)),
    "sigmoid, not silu": lambda g, u: torch.sigmoid(g.clamp(max=L)) * u.clamp(-L, L),
    "sigmoid of the other": lambda g, u: g * torch.sigmoid(u) * u,
    "sigmoid of the negative": lambda g, u: g * torch.sigmoid(-g) * u,
    "sigmoid of the unclamped": lambda g, u: g.clamp(max=L) * torch.sigmoid(g / 4) * u.clamp(-L, L),
    "sigmoid with a slope": lambda g, u: g * torch.sigmoid(1.702 * g) * u / 4,
    "gelu": lambda g, u: F.gelu(g.clamp(max=L)) * u.clamp(-L, L) + 1,
    "relu": lambda g, u: F.relu(g.clamp(max=L)) * u.clamp(-L, L) - 1,
    "tanh": lambda g, u: torch.tanh(g.clamp(max=L)) * u.clamp(-L, L),
    "times a number": lambda g, u: F.silu(g) * 2.0,
    "scaled afterwards": lambda g, u: F.silu(g.clamp(max=L)) * u.clamp(-L, L) * torch.arange(K).to(g.dtype),
    "multiplied by up twice": lambda g, u: F.silu(g.clamp(max=L)) * u.clamp(-L, L) * u,
    "rolled": lambda g, u: F.silu(g.clamp(max=L)) * u.clamp(-L, L).roll(1, -1),
    "transposed": lambda g, u: (F.silu(g.clamp(max=L)) * u.clamp(-L, L)).reshape(K, M).t().contiguous(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_model_gives_its_own_answer(edit: str) -> None:
    """Guards against a pattern that accepts a program that means something else."""
    form = EDITS[edit]
    gate, up = gate_and_up(torch.float32)  # in fp32 no rounding separates a fused product from the model's own
    weight = torch.randn(N, K)
    model = Model(lambda self, g, u: F.linear(form(g, u), self.weight), weight=weight)
    result, _ = capture_one(model, gate, up, options={"include": ["weight"]})
    assert sqnr_db(result, product(form(gate, up), weight, torch.float32)) > 40
    assert sqnr_db(result, product(nvfp4.swiglu(gate, up, L), weight, torch.float32)) < 25
