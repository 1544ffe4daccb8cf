"""The SwiGLU pass: every way to write it and its clamps is found, wherever gate and up come from."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from dsv4_compile import nvfp4
from tests.passes.programs import Model, capture_one
from tests.passes.swiglu_programs import K, L, M, N, down, gate_and_up, product

# Clamped, each clamp written in another way.

CLAMPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clamp": lambda g, u: F.silu(g.clamp(max=L)) * u.clamp(-L, L),
    "torch.clamp": lambda g, u: F.silu(torch.clamp(g, None, L)) * torch.clamp(u, min=-L, max=L),
    "integer bounds": lambda g, u: F.silu(g.clamp(max=2)) * u.clamp(-2, 2),
    "clamp_max, clamp_min": lambda g, u: F.silu(g.clamp_max(L)) * u.clamp_max(L).clamp_min(-L),
    "clamp twice": lambda g, u: F.silu(g.clamp(max=2 * L).clamp(max=L)) * u.clamp(min=-L).clamp(max=L),
    "minimum of tensors": lambda g, u: (
        F.silu(torch.minimum(g, torch.tensor(L))) * torch.maximum(torch.minimum(u, torch.tensor(L)), torch.tensor(-L))
    ),
    "minimum of full": lambda g, u: F.silu(torch.minimum(g, torch.full((), L))) * u.clamp(-L, L),
    "minimum of full_like": lambda g, u: F.silu(torch.minimum(g, torch.full_like(g, L))) * u.clamp(-L, L),
    "minimum of new_tensor": lambda g, u: F.silu(torch.minimum(g, g.new_tensor(L))) * u.clamp(-L, L),
    "up first": lambda g, u: (lambda activated: u.clamp(-L, L) * activated)(F.silu(g.clamp(max=L))),
    "fp32 and back": lambda g, u: (F.silu(g.float().clamp(max=L)) * u.float().clamp(-L, L)).to(g.dtype),
    "clamped, then fp32": lambda g, u: (F.silu(g.clamp(max=L).float()) * u.clamp(-L, L).float()).to(g.dtype),
}


@pytest.mark.parametrize("form", CLAMPED)
def test_clamped(form: str) -> None:
    """Guards against a clamp that is lost, or that keeps the fusion from firing."""
    gate, up = gate_and_up()
    model, weight = down(CLAMPED[form])
    result, graph = capture_one(model, gate, up)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: bf16[8, 64]
x1: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.swiglu_quantize_nvfp4(x0, x1, 2.0, 'tensor')
%1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
return %1""",
    )
    assert graph.counts == {"linear": 1, "swiglu": 1}
    assert torch.equal(result, product(nvfp4.swiglu(gate, up, L), weight))


UNCLAMPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda g, u: F.silu(g) * u,
    "up first": lambda g, u: u * F.silu(g),
    "in-place silu": lambda g, u: F.silu(g + 0, inplace=True) * u,
    "x * sigmoid(x)": lambda g, u: g * torch.sigmoid(g) * u,
    "sigmoid(x) * x": lambda g, u: torch.sigmoid(g) * g * u,
    "up first, x * sigmoid(x)": lambda g, u: u * (g * g.sigmoid()),
    "up first, sigmoid(x) * x": lambda g, u: u * (F.sigmoid(g) * g),
    "fp32 and back": lambda g, u: (F.silu(g.float()) * u.float()).to(g.dtype),
    "fp32 gate": lambda g, u: (F.silu(g.float()) * u).to(g.dtype),
    "fp32 silu": lambda g, u: F.silu(g.float()).to(g.dtype) * u,
    "fp32 x * sigmoid(x)": lambda g, u: (lambda g32: (g32 * g32.sigmoid() * u).to(g.dtype))(g.float()),
}


@pytest.mark.parametrize("form", UNCLAMPED)
def test_without_clamp(form: str) -> None:
    """Guards against a limit that was never asked for."""
    gate, up = gate_and_up()
    model, weight = down(UNCLAMPED[form])
    result, graph = capture_one(model, gate, up)
    assert graph.after.count("dsv4.swiglu_quantize_nvfp4(") == graph.after.count(", inf, 'tensor')") == 1
    assert "aten.mul" not in graph.after
    assert graph.counts == {"linear": 1, "swiglu": 1}
    assert torch.equal(result, product(nvfp4.swiglu(gate, up, math.inf), weight))


@pytest.mark.parametrize("granularity", nvfp4.GRANULARITIES)
def test_granularity(granularity: str) -> None:
    """Guards against the fused operator taking another granularity than the quantisation it replaces."""
    gate, up = gate_and_up()
    gate[0] /= 1024
    model, weight = down(CLAMPED["clamp"])
    result, graph = capture_one(model, gate, up, options={"gsa": granularity})
    assert f"dsv4.swiglu_quantize_nvfp4(x0, x1, 2.0, '{granularity}')" in graph.after
    assert torch.equal(result, product(nvfp4.swiglu(gate, up, L), weight, granularity=granularity))


def test_fp32_model() -> None:
    """Guards against patterns traced in bf16 only, whose casts an fp32 model does not have."""
    gate, up = gate_and_up(torch.float32)
    weight = torch.randn(N, K)
    model = Model(lambda self, g, u: F.linear(CLAMPED["clamp"](g, u), self.weight), weight=weight)
    result, graph = capture_one(model, gate, up, options={"include": ["weight"]})
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[32, 64]
x0: f32[8, 64]
x1: f32[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.swiglu_quantize_nvfp4(x0, x1, 2.0, 'tensor')
%1: f32[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, f32)
return %1""",
    )
    assert torch.equal(result, product(nvfp4.swiglu(gate, up, L), weight, torch.float32))


def test_computed_in_fp32_and_quantised_in_fp32() -> None:
    """Guards against requiring the cast back to the model's dtype: here the next linear is fp32 itself."""
    gate, up = gate_and_up()
    weight = torch.randn(N, K)
    model = Model(lambda self, g, u: F.linear(F.silu(g.float()) * u.float(), self.weight), weight=weight)
    result, graph = capture_one(model, gate, up, options={"include": ["weight"]})
    assert graph.counts == {"linear": 1, "swiglu": 1}
    assert torch.equal(result, product(nvfp4.swiglu(gate, up, math.inf), weight, torch.float32))


def test_autocast() -> None:
    """Guards against autocast's casts, of an fp32 SwiGLU to the bf16 of the product that reads it."""

    def forward(self: Any, gate: Tensor, up: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(CLAMPED["clamp"](gate, up), self.weight)

    gate, up = gate_and_up(torch.float32)
    weight = torch.randn(N, K)
    result, graph = capture_one(Model(forward, weight=weight), gate, up, options={"include": ["weight"]})
    assert graph.counts == {"linear": 1, "swiglu": 1}
    assert torch.equal(result, product(nvfp4.swiglu(gate, up, L), weight))


# Where gate and up come from.


def mlp(gate_and_up_of: Callable[[Any, Tensor], tuple[Tensor, Tensor]], **parameters: Tensor) -> Model:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = gate_and_up_of(self, x)
        return F.linear(CLAMPED["clamp"](gate, up), self.w2)

    return Model(forward, w2=torch.randn(N, K, dtype=torch.bfloat16), **parameters)


def test_gate_and_up_apart() -> None:
    """Guards against gate and up, each a linear of its own, not becoming one product read in place."""
    w1, w3 = (torch.randn(K, K, dtype=torch.bfloat16) for _ in range(2))
    model = mlp(lambda self, x: (F.linear(x, self.w1), F.linear(x, self.w3)), w1=w1, w3=w3)
    x = torch.randn(2, 4, K, dtype=torch.bfloat16)
    result, graph = capture_one(model, x)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[64, 64]
w1: nvfp4[64, 64]
w2: nvfp4[32, 64]
x0: bf16[2, 4, 64]
%0: (u8[2, 4, 32], f8e4m3[2, 4, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[2, 4, 128] = dsv4.nvfp4_mm(*%0, *[w0, w1], None, bf16)
%2: bf16[2, 4, 64] = aten.slice(%1, 2, 0, 64)
%3: bf16[2, 4, 64] = aten.slice(%1, 2, 64, 128)
%4: (u8[2, 4, 32], f8e4m3[2, 4, 4], f32[]) = dsv4.swiglu_quantize_nvfp4(%2, %3, 2.0, 'tensor')
%5: bf16[2, 4, 32] = dsv4.nvfp4_mm(*%4, *[w2], None, bf16)
return %5""",
    )
    assert torch.equal(result, product(nvfp4.swiglu(product(x, w1), product(x, w3), L), model.w2))


MERGED: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    "chunk": lambda self, x: F.linear(x, self.w13).chunk(2, dim=-1),
    "split": lambda self, x: torch.split(F.linear(x, self.w13), K, dim=-1),
    "slices": lambda self, x: (lambda h: (h[..., :K], h[..., K:]))(F.linear(x, self.w13)),
    "unflatten and unbind": lambda self, x: F.linear(x, self.w13).unflatten(-1, (2, K)).unbind(-2),
}


@pytest.mark.parametrize("form", MERGED)
def test_merged_gate_and_up(form: str) -> None:
    """Guards against the two halves of one projection, however they are cut, being copied or mixed up."""
    w13 = torch.randn(2 * K, K, dtype=torch.bfloat16)
    model = mlp(MERGED[form], w13=w13)
    x = torch.randn(2, 4, K, dtype=torch.bfloat16)
    result, graph = capture_one(model, x)
    assert (graph.counts["linear"], graph.counts["swiglu"]) == (2, 1)
    assert ", 2.0, 'tensor')" in graph.after
    gate, up = product(x, w13).chunk(2, dim=-1)
    assert torch.equal(result, product(nvfp4.swiglu(gate, up, L), model.w2))


def test_merged_and_chunked() -> None:
    """Guards against copies between a merged projection and the operator that reads its halves."""
    model = mlp(MERGED["chunk"], w13=torch.randn(2 * K, K, dtype=torch.bfloat16))
    _, graph = capture_one(model, torch.randn(M, K, dtype=torch.bfloat16))
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[128, 64]
w1: nvfp4[32, 64]
x0: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[8, 128] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
%2: (bf16[8, 64], bf16[8, 64]) = aten.split(%1, 64, -1)
%3: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.swiglu_quantize_nvfp4(%2[0], %2[1], 2.0, 'tensor')
%4: bf16[8, 32] = dsv4.nvfp4_mm(*%3, *[w1], None, bf16)
return %4""",
    )


def test_dynamic_shapes() -> None:
    """Guards against a symbolic batch and length that are not seen to be the same for gate and up."""
    w1, w3 = (torch.randn(K, K, dtype=torch.bfloat16) for _ in range(2))
    model = mlp(lambda self, x: (F.linear(x, self.w1), F.linear(x, self.w3)), w1=w1, w3=w3)
    x = torch.randn(2, 4, K, dtype=torch.bfloat16)
    result, graph = capture_one(model, x, dynamic=True)
    assert_expected_inline(
        "\n".join(graph.after.splitlines()[3:]),
        """\
x0: bf16[s0, s1, 64]
%0: (u8[s0, s1, 32], f8e4m3[s0, s1, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[s0, s1, 128] = dsv4.nvfp4_mm(*%0, *[w0, w1], None, bf16)
%2: bf16[s0, s1, 64] = aten.slice(%1, 2, 0, 64)
%3: bf16[s0, s1, 64] = aten.slice(%1, 2, 64, 128)
%4: (u8[s0, s1, 32], f8e4m3[s0, s1, 4], f32[]) = dsv4.swiglu_quantize_nvfp4(%2, %3, 2.0, 'tensor')
%5: bf16[s0, s1, 32] = dsv4.nvfp4_mm(*%4, *[w2], None, bf16)
return %5""",
    )
    assert torch.equal(result, product(nvfp4.swiglu(product(x, w1), product(x, w3), L), model.w2))


def test_two_linears_read_the_product() -> None:
    """Guards against counting two products that read one quantisation as a second reader of what is quantised."""
    weights = [torch.randn(N, K, dtype=torch.bfloat16) for _ in range(2)]

    def forward(self: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(gate) * up
        return -F.linear(hidden, self.w0), -F.linear(hidden, self.w1)

    gate, up = gate_and_up()
    result, graph = capture_one(Model(forward, w0=weights[0], w1=weights[1]), gate, up)
    assert graph.counts == {"linear": 2, "share_quantization": 1, "swiglu": 1, "merge_gemms": 1}
    for half, weight in zip(result, weights, strict=True):
        assert torch.equal(half, -product(nvfp4.swiglu(gate, up, math.inf), weight))
