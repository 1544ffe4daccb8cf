"""The experts pass: sorted and gathered rows times their expert's weight, on their own, whatever stands between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from dsv4_compile import nvfp4, quantize_
from tests.passes.programs import capture_one

S, E, N, K = 6, 4, 48, 32
IDS = torch.tensor([2, 0, 3, 3, 2, 0])  # no row for expert 1
SORTED = IDS.sort().values
OFFSETS = torch.tensor([2, 2, 4, 6], dtype=torch.int32)


class Model(nn.Module):
    """A function of weights and inputs."""

    def __init__(self, function: Callable[..., Any], *weights: Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = [f"w{index}" for index in range(len(weights))]  # no ParameterList: Dynamo 2.11 cannot unpack one
        for name, weight in zip(self.names, weights, strict=True):
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*[getattr(self, name) for name in self.names], *inputs)


def product(x: Tensor, weight: Tensor, ids: Tensor, granularity: str = "tensor") -> Tensor:
    """``x[s] @ weight[ids[s]].T`` on NVFP4 operands: the exact sum, scaled in fp32, rounded once."""
    a, b = nvfp4.quantize(x, granularity), nvfp4.quantize_weight(weight)
    left, right = (nvfp4.scaled_codes(*packed[:2], torch.float64) for packed in (a, b))
    total = torch.einsum("sk,snk->sn", left, right[ids]).float()
    gsa = a[2].unsqueeze(-1) if a[2].dim() else a[2]
    return (total * (gsa * b[2][ids].unsqueeze(-1))).to(x.dtype)


def experts(n: int = N, k: int = K) -> Tensor:
    """Experts of different size, so that reading another one's shows."""
    return (torch.randn(E, n, k) * torch.logspace(-0.5, 0.5, E).view(-1, 1, 1)).bfloat16()


def rows() -> Tensor:
    return torch.randn(S, K, dtype=torch.bfloat16)


def grouped(w: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return torch._grouped_mm(x, w.transpose(-2, -1), offsets)


def gathered(w: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("packed", [False, True])
def test_grouped(packed: bool) -> None:
    """Guards against sorted rows whose experts' weights are dequantised."""
    x, weight = rows(), experts()
    model = Model(grouped, weight)
    if packed:
        quantize_(model)
    result, graph = capture_one(model, x, OFFSETS)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[4, 48, 32]
x0: bf16[6, 32]
x1: i32[4]
%0: (u8[6, 16], f8e4m3[6, 2], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[6, 48] = dsv4.nvfp4_grouped_mm(*%0, *w0, x1, bf16)
return %1""",
    )
    assert graph.counts == {"experts_grouped": 1}
    assert torch.equal(result, product(x, weight, SORTED))


def test_gathered() -> None:
    """Guards against a copy of a weight for each row, and against rows that do not come back to their place."""
    x, weight = rows(), experts()
    result, graph = capture_one(Model(gathered, weight), x, IDS)
    assert_expected_inline(
        graph.after,
        """\
w0: nvfp4[4, 48, 32]
x0: i64[6]
x1: bf16[6, 32]
%0: (u8[6, 16], f8e4m3[6, 2], f32[]) = dsv4.quantize_nvfp4(x1, 'tensor')
%1: (i64[6], i64[6]) = aten.sort(x0)
%2: i64[4] = prims.iota(4, start=0, step=1, dtype=i64, device=device(type='cpu'), requires_grad=False)
%3: i32[4] = aten.searchsorted(%1[0], %2, out_int32=True, right=True)
%4: u8[6, 2] = aten.view(%0[1], u8)
%5: u8[6, 2] = aten.index(%4, [%1[1]])
%6: f8e4m3[6, 2] = aten.view(%5, f8e4m3)
%7: u8[6, 16] = aten.index(%0[0], [%1[1]])
%8: bf16[6, 48] = dsv4.nvfp4_grouped_mm(%7, %6, %0[2], *w0, %3, bf16)
%9: (i64[6], i64[6]) = aten.sort(%1[1])
%10: bf16[6, 48] = aten.index(%8, [%9[1]])
return %10""",
    )
    assert graph.counts == {"experts_gathered": 1}
    assert torch.equal(result, product(x, weight, IDS))


@pytest.mark.parametrize("granularity", ["token", "tensor_pow2"])
def test_gathered_granularity(granularity: str) -> None:
    """Guards against global scales that stay in the order of the rows while the rows are sorted."""
    x, weight = rows() * torch.logspace(-2, 2, S).unsqueeze(-1).bfloat16(), experts()
    result, _ = capture_one(Model(gathered, weight), x, IDS, options={"gsa": granularity})
    assert torch.equal(result, product(x, weight, IDS, granularity))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "squared relu": lambda h: torch.relu(h).square(),
    "none": lambda h: h * 1,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", [grouped, gathered])
def test_other_activation_between(form: Callable[..., Tensor], activation: str) -> None:
    """Guards against experts that are no SwiGLU becoming one, or losing their operators."""
    act, x, up, down = ACTIVATIONS[activation], rows(), experts(), experts(K, N)
    index, ids = (OFFSETS, SORTED) if form is grouped else (IDS, IDS)
    result, graph = capture_one(Model(lambda up, down, x, i: form(down, act(form(up, x, i)), i), up, down), x, index)
    assert graph.counts == {f"experts_{form.__name__}": 2}
    assert torch.equal(result, product(act(product(x, up, ids)), down, ids))


EDITS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "offsets shifted": (lambda w, x, o: grouped(w, x, o - 1), OFFSETS),
    "ids shifted": (lambda w, x, i: gathered(w, x, (i + 1) % E), IDS),
    "ids reversed": (lambda w, x, i: gathered(w, x, i.flip(0)), IDS.roll(1)),  # another expert in each row
    "weight twice": (lambda w, x, i: gathered(2 * w, x, i), IDS),
    "experts reversed": (lambda w, x, i: gathered(w.flip(0), x, i), IDS),
    "rows reversed": (lambda w, x, i: gathered(w, x.flip(0), i), IDS),
}


@pytest.mark.parametrize("edit", list(EDITS)[1:])
def test_edited_model_gives_its_own_answer(edit: str) -> None:
    """Guards against ids or weights other than those that the model names."""
    form, index = EDITS[edit]
    x, weight = rows(), experts()
    result, _ = capture_one(Model(form, weight), x, index)
    # Quantised operands against exact ones: 4 bits, about 10 % of each factor. Over all rows, which no single sum decides:
    # of 2000 draws, 0.19 at most, and 0.99 at least from the model that was not edited.
    expected, unedited = form(weight, x, index), product(x, weight, index)
    assert (result - expected).norm() < 0.25 * expected.norm()
    assert (result - unedited).norm() > 0.5 * unedited.norm()


def test_offsets_shifted() -> None:
    """Guards against offsets other than those given: the last row belongs to no expert."""
    x, weight = rows(), experts()
    result, graph = capture_one(Model(EDITS["offsets shifted"][0], weight), x, OFFSETS)
    assert graph.counts == {"experts_grouped": 1}
    assert torch.equal(result[:-1], product(x, weight, torch.tensor([0, 2, 2, 3, 3, 3]))[:-1])
