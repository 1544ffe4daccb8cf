"""``nvfp4_moe``: routing, both products and every rounding between them, bit for bit; and HuggingFace's experts."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

from dsv4_compile import nvfp4
from dsv4_compile.nvfp4 import GRANULARITIES
from dsv4_compile.ops import dequantize_nvfp4, nvfp4_moe, quantize_nvfp4
from dsv4_compile.ops.nvfp4_moe import WEIGHT_POSITIONS
from tests import nvfp4_oracle as oracle

OP = torch.ops.dsv4.nvfp4_moe.default
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema fails on fp8
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 5, 64, 32, 3
NAN, INF = math.nan, math.inf

Packed = tuple[Tensor, Tensor, Tensor]


def any_experts(n: int, k: int, has_halves: bool = False, experts: int = EXPERTS) -> Packed:
    """Random weights of a size that keeps activations near 1; with halves, gate and up differ in scale by 3."""
    codes, block_scales, global_scale = nvfp4.quantize_weight(torch.randn(experts, n, k) / math.sqrt(k))
    if has_halves:
        global_scale = torch.stack((global_scale, global_scale * 3), dim=1)
    return codes, block_scales, global_scale


def any_weights(has_halves: bool = False) -> tuple[Packed, Packed]:
    return any_experts(2 * INTERMEDIATE, HIDDEN, has_halves), any_experts(HIDDEN, INTERMEDIATE)


def any_routing(tokens: int, top_k: int = TOP_K, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Ids from -1 to E + 1, repetitions included, and weights."""
    return torch.randint(-1, EXPERTS + 2, (tokens, top_k)), torch.rand(tokens, top_k).to(dtype)


def select(packed: Packed, index: Any) -> oracle.Packed:
    """One matrix, or some rows, with their global scales if they have their own."""
    codes, block_scales, global_scale = packed
    return oracle.as_packed((codes[index], block_scales[index], global_scale[index] if global_scale.dim() else global_scale))  # fmt: skip


def expected(
    a: Packed, ids: Tensor, weights: Tensor, gate_up: Packed, down: Packed,
    limit: float, weight_position: str, granularity: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The routed rows one at a time, by the oracle."""
    f32 = oracle.f32
    routed = [(t, j, int(e)) for (t, j), e in np.ndenumerate(ids.numpy()) if 0 <= e < len(down[0])]
    rows = []
    for t, j, e in routed:
        gate, up = np.split(oracle.mm(select(a, [t]), [select(gate_up, e)]), 2, axis=1)
        h = oracle.swiglu(gate, up, limit)
        if weight_position == "before_down":
            h = f32(h * oracle.as_float64(weights[t, j]))
        rows.append(oracle.as_float64(oracle.to_dtype(h, out_dtype)))
    h = np.concatenate(rows) if rows else np.zeros((0, 2 * down[0].shape[2]))
    h_codes, h_block_scales, h_scale = oracle.quantize(h, granularity)
    total = np.zeros((len(ids), down[0].shape[1]))
    for row, (t, j, e) in enumerate(routed):
        packed = oracle.Packed(h_codes[[row]], h_block_scales[[row]], h_scale[[row]] if h_scale.ndim else h_scale)
        y = oracle.mm(packed, [select(down, e)])[0]
        total[t] = f32(total[t] + (f32(y * oracle.as_float64(weights[t, j])) if weight_position == "after_down" else y))
    return oracle.to_dtype(total, out_dtype)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("weight_position", WEIGHT_POSITIONS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_matches_reference(out_dtype: torch.dtype, weight_position: str, granularity: str) -> None:
    """Guards against any rounding too many or missing, a global scale of the wrong rows, half or expert, and the order of k.

    The limit bites: gates and ups are of size 1 and 3.
    """
    for a_granularity, has_halves, id_dtype in (("tensor", False, torch.int32), ("token", True, torch.int64)):
        a = quantize_nvfp4(torch.randn(9, HIDDEN), a_granularity)
        gate_up, down = any_weights(has_halves)
        ids, weights = any_routing(9, dtype=out_dtype)
        args = (a, ids.to(id_dtype), weights, gate_up, down, 1.25, weight_position, granularity, out_dtype)
        oracle.assert_same_bits(nvfp4_moe(*a, *args[1:3], *gate_up, *down, *args[5:]), expected(*args))


class QuantizedHidden(DeepseekV4Experts):
    """HuggingFace's experts with the one step they lack: what is left of the activation in NVFP4, row by row."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return dequantize_nvfp4(*quantize_nvfp4(super()._apply_gate(gate_up), "token"), torch.float32)


def test_is_the_experts_of_transformers() -> None:
    """Guards against other routing, clamps or halves: transformers' fp32 experts on the dequantised operands.

    Only fp32 sums and exp differ, by a few of 2^-24 times at most 64 terms; 1e-5 of the largest output covers both.
    The sentinel E is one more expert of theirs, all zeros: in eager mode transformers 5.17 takes no id above its experts.
    """
    config = SimpleNamespace(
        num_local_experts=EXPERTS + 1,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        hidden_act="silu",
        swiglu_limit=1.0,
        _experts_implementation="eager",
    )
    a, (gate_up, down) = quantize_nvfp4(torch.randn(40, HIDDEN)), any_weights()
    experts = QuantizedHidden(config)
    for parameter, packed in ((experts.gate_up_proj, gate_up), (experts.down_proj, down)):
        parameter.data = F.pad(dequantize_nvfp4(*packed, torch.float32), (0, 0, 0, 0, 0, 1))
    ids, weights = torch.rand(40, EXPERTS + 1).argsort(-1)[:, :TOP_K], torch.rand(40, TOP_K)
    with torch.no_grad():
        theirs = experts(dequantize_nvfp4(*a, torch.float32), ids, weights)
    ours = nvfp4_moe(*a, ids, weights, *gate_up, *down, 1.0, "after_down", "token", torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("weight_position", WEIGHT_POSITIONS)
def test_known_values(weight_position: str) -> None:
    """Guards against gate and up that change places, a clamp that is missing, and a weight applied twice.

    Token: 1 in column 0. Expert 1: gate 3 * 8, clamped to 10; up -3 * 1; silu(10) = 9.99954602. Down 2; weight 0.5.
    """
    one = torch.tensor(1.0)
    a = torch.tensor([[2, *[0] * 7]], dtype=torch.uint8), torch.ones(1, 1).to(torch.float8_e4m3fn), one
    gate_up_codes, down_codes = torch.zeros(2, 32, 8, dtype=torch.uint8), torch.zeros(2, 16, 8, dtype=torch.uint8)
    gate_up_codes[1, 0, 0], gate_up_codes[1, 16, 0], down_codes[1, 5, 0] = 5, 13, 4
    gate_up = gate_up_codes, torch.ones(2, 32, 1).to(torch.float8_e4m3fn), torch.tensor([[1.0, 1.0], [8.0, 1.0]])
    down = down_codes, torch.ones(2, 16, 1).to(torch.float8_e4m3fn), torch.ones(2)
    y = nvfp4_moe(
        *a, torch.tensor([[1]]), torch.tensor([[0.5]]), *gate_up, *down, 10.0, weight_position, "tensor", torch.float32
    )
    assert y.nonzero().tolist() == [[0, 5]]
    assert y[0, 5].item() == pytest.approx(9.99954602 * -3 * 2 * 0.5, rel=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sentinels_contribute_nothing(granularity: str) -> None:
    """Guards against a sentinel that wraps to another expert, counts in the global scale, or lets its weight through."""
    a, (gate_up, down) = quantize_nvfp4(torch.randn(4, HIDDEN)), any_weights()
    args = (*gate_up, *down, 10.0, "after_down", granularity, torch.float32)
    ids, weights = torch.randint(0, EXPERTS, (4, 2)), torch.rand(4, 2)
    plain = nvfp4_moe(*a, ids, weights, *args)
    sentinels = torch.tensor([[-1, EXPERTS], [-EXPERTS, EXPERTS + 3], [2**31 - 1, -(2**31)], [-2, EXPERTS]])
    with_sentinels = torch.stack((sentinels[:, 0], ids[:, 0], sentinels[:, 1], ids[:, 1]), dim=1)
    poisoned = torch.tensor([NAN, 0.0, INF, 0.0]).repeat(4, 1)
    poisoned[:, [1, 3]] = weights
    oracle.assert_same_bits(nvfp4_moe(*a, with_sentinels, poisoned, *args), plain)
    oracle.assert_same_bits(nvfp4_moe(*a, with_sentinels.int(), poisoned, *args), plain)


def test_token_without_valid_expert_is_zero() -> None:
    """Guards against uninitialised rows, and NaN of a token that goes nowhere; also where no token goes anywhere."""
    x = torch.randn(3, HIDDEN)
    x[1] = NAN
    a, (gate_up, down) = quantize_nvfp4(x), any_weights()
    ids, weights = torch.tensor([[0, 1], [-1, EXPERTS], [2, -1]]), torch.rand(3, 2)
    y = nvfp4_moe(*a, ids, weights, *gate_up, *down)
    assert y.count_nonzero(dim=1).gt(0).tolist() == [True, False, True]
    assert y.isfinite().all()
    for granularity in GRANULARITIES:
        nowhere = nvfp4_moe(*a, torch.full((3, 2), -1), weights, *gate_up, *down, granularity=granularity)
        oracle.assert_same_bits(nowhere, torch.zeros(3, HIDDEN, dtype=torch.bfloat16))


@pytest.mark.parametrize("weight_position", WEIGHT_POSITIONS)
def test_repeated_expert_counts_twice(weight_position: str) -> None:
    """Guards against a scatter in which the second of two equal ids overwrites the first."""
    a, (gate_up, down) = quantize_nvfp4(torch.randn(4, HIDDEN)), any_weights()
    args = (*gate_up, *down, 10.0, weight_position, "tensor", torch.float32)
    ids = torch.tensor([[3], [0], [3], [1]])
    weights = torch.rand(4, 1)
    once = nvfp4_moe(*a, ids, weights, *args)
    oracle.assert_same_bits(nvfp4_moe(*a, ids.expand(4, 2), weights.expand(4, 2), *args), once + once)


def test_all_tokens_on_one_expert_expand_one_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a CPU kernel that expands experts no token goes to: two products, whatever the number of experts."""
    a, (gate_up, down) = quantize_nvfp4(torch.randn(6, HIDDEN)), any_weights()
    ids, weights = torch.full((6, 2), EXPERTS - 1), torch.rand(6, 2)
    args = (a, ids, weights, gate_up, down, 10.0, "after_down", "tensor", torch.float32)
    seen = []
    matmul = nvfp4.matmul

    def recording(a: Tensor, a_scale: Tensor, b_codes: Tensor, *rest: Tensor) -> Tensor:
        seen.append((a.shape[0], b_codes.data_ptr()))
        return matmul(a, a_scale, b_codes, *rest)

    monkeypatch.setattr(nvfp4, "matmul", recording)
    oracle.assert_same_bits(nvfp4_moe(*a, ids, weights, *gate_up, *down, *args[5:]), expected(*args))
    assert seen == [(12, gate_up[0][-1].data_ptr()), (12, down[0][-1].data_ptr())]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("weight_position", WEIGHT_POSITIONS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_token_is_nan_and_others_are_untouched(value: float, weight_position: str, granularity: str) -> None:
    """Guards against silent zeros in the bad token, and against any changed bit in a token that shares its experts."""
    gate_up, down = any_weights()
    ids = torch.randint(0, EXPERTS, (4, TOP_K))
    weights = torch.rand(4, TOP_K)

    def run(x: Tensor) -> Tensor:
        return nvfp4_moe(*quantize_nvfp4(x, granularity), ids, weights, *gate_up, *down, 10.0, weight_position, granularity)  # fmt: skip

    x = torch.randn(4, HIDDEN)
    x[2] = 0  # so that its values take no part in the global scales before either
    before = run(x)
    x[2, 20] = value
    after = run(x)
    assert after[2].isnan().all()
    after[2] = before[2]
    oracle.assert_same_bits(after, before)


@pytest.mark.parametrize("weight_position", WEIGHT_POSITIONS)
def test_non_finite_weight_is_loud(weight_position: str) -> None:
    """Guards against a router's NaN that is lost on the way: its token is NaN, and no other."""
    a, (gate_up, down) = quantize_nvfp4(torch.randn(3, HIDDEN)), any_weights()
    weights = torch.rand(3, 2)
    weights[1, 1] = NAN
    y = nvfp4_moe(*a, torch.randint(0, EXPERTS, (3, 2)), weights, *gate_up, *down, weight_position=weight_position)
    assert y.isnan().all(-1).tolist() == [False, True, False]
    assert y[[0, 2]].isfinite().all()


def test_zeros_give_zeros() -> None:
    """Guards against 0 / 0: tokens of zeros, an expert of zeros, weights of zero."""
    gate_up, down = any_weights()
    zeros = nvfp4.quantize_weight(torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN))
    a, (ids, weights) = quantize_nvfp4(torch.randn(4, HIDDEN)), any_routing(4)
    for granularity in GRANULARITIES:
        args = (*down, 10.0, "before_down", granularity)
        assert nvfp4_moe(*quantize_nvfp4(torch.zeros(4, HIDDEN)), ids, weights, *gate_up, *args).eq(0).all()
        assert nvfp4_moe(*a, ids, weights, *zeros, *args).eq(0).all()
        assert nvfp4_moe(*a, ids, weights * 0, *gate_up, *args).eq(0).all()


def test_token_row_never_depends_on_its_batch() -> None:
    """Guards against any value taken across rows with granularity token: each token alone gives the same bits."""
    gate_up, down = any_weights()
    codes, block_scales, scale = quantize_nvfp4(torch.randn(5, HIDDEN) * torch.logspace(-3, 3, 5)[:, None], "token")
    ids, weights = any_routing(5)
    args = (*gate_up, *down, 10.0, "before_down", "token")
    together = nvfp4_moe(codes, block_scales, scale, ids, weights, *args)
    for row in (slice(t, t + 1) for t in range(5)):
        alone = nvfp4_moe(codes[row], block_scales[row], scale[row], ids[row], weights[row], *args)
        oracle.assert_same_bits(together[row], alone)


@pytest.mark.parametrize(("tokens", "top_k"), [(0, TOP_K), (1, 1), (3, 0), (0, 0)])
def test_nothing_to_do(tokens: int, top_k: int) -> None:
    """Guards against a failure without tokens, or without a k."""
    gate_up, down = any_weights()
    for granularity in GRANULARITIES:
        a = quantize_nvfp4(torch.randn(tokens, HIDDEN), granularity)
        args = (*a, *any_routing(tokens, top_k), *gate_up, *down, 10.0, "after_down", granularity, torch.bfloat16)
        assert OP(*args).shape == (tokens, HIDDEN)
    torch.library.opcheck(OP, args, test_utils=OPCHECKS)


@pytest.mark.parametrize("is_token", [False, True])
def test_opcheck(is_token: bool) -> None:
    """Guards against a fake that differs from the kernel, and operands read in storage order: everything strided."""
    codes, block_scales, _ = quantize_nvfp4(torch.randn(4, 2 * HIDDEN))
    scale = torch.rand(8)[::2] if is_token else torch.tensor(0.01)
    a = codes[:, HIDDEN // 2 :], block_scales[:, HIDDEN // 16 :], scale
    ids, weights = (part.t() for part in any_routing(TOP_K, 4, torch.bfloat16))
    gate_up, down = ((w[0][::2, :], w[1][::2, :], w[2][::2]) for w in (
        any_experts(2 * INTERMEDIATE, HIDDEN, is_token, 2 * EXPERTS), any_experts(HIDDEN, INTERMEDIATE, False, 2 * EXPERTS)
    ))  # fmt: skip
    args = (*a, ids, weights, *gate_up, *down, 10.0, "before_down", "token" if is_token else "tensor", torch.bfloat16)
    torch.library.opcheck(OP, args, test_utils=OPCHECKS)
    dense = [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]
    actual = OP(*args)
    assert actual.is_contiguous()
    oracle.assert_same_bits(actual, OP(*dense))


def test_leaves_its_inputs_alone() -> None:
    """Guards against a kernel that expands or sorts in place (opcheck's test_schema, which would tell, fails on fp8)."""
    gate_up, down = any_weights()
    tensors = [*quantize_nvfp4(torch.randn(6, HIDDEN)), *any_routing(6), *gate_up, *down]
    before = [tensor.clone() for tensor in tensors]
    nvfp4_moe(*tensors, 10.0)
    for tensor, clone in zip(tensors, before, strict=True):
        oracle.assert_same_bits(tensor, clone)


def test_at_the_width_of_v4_flash() -> None:
    """Guards against an error at the seam of two chunks, or sums exact for small K only: against float64 for one token.

    4096 / 2048 wide, weights of random bytes; granularity token, so that the one token can be computed alone.
    """
    tokens, experts, hidden, intermediate, top_k = 8, 3, 4096, 2048, 2

    def random_bytes(n: int, k: int) -> Packed:
        codes = torch.empty(experts, n, k // 2, dtype=torch.uint8).random_(0, 256)
        block_scales = torch.empty(experts, n, k // 16, dtype=torch.uint8).random_(0, 127).view(torch.float8_e4m3fn)
        return codes, block_scales, torch.rand(experts) * 1e-4

    gate_up, down = random_bytes(2 * intermediate, hidden), random_bytes(hidden, intermediate)
    a = quantize_nvfp4(torch.randn(tokens, hidden, dtype=torch.bfloat16), "token")
    ids, weights = torch.rand(tokens, experts).argsort(-1)[:, :top_k], torch.rand(tokens, top_k)
    actual = nvfp4_moe(*a, ids, weights, *gate_up, *down, 10.0, "after_down", "token")
    assert actual.isfinite().all()

    def product(x: tuple[Tensor, Tensor, Tensor], weight: Packed, e: int) -> Tensor:
        one = torch.ones(())
        left = dequantize_nvfp4(*x[:2], one, torch.float32).double()
        right = dequantize_nvfp4(weight[0][e], weight[1][e], one, torch.float32).double()
        return (left @ right.T).float() * (x[2].unsqueeze(-1) * weight[2][e])

    token = a[0][:1], a[1][:1], a[2][:1]
    total = torch.zeros(1, hidden)
    for e, weight in zip(ids[0].tolist(), weights[0], strict=True):
        h = nvfp4.swiglu(*product(token, gate_up, e).chunk(2, dim=1), 10.0).bfloat16()
        total += product(quantize_nvfp4(h, "token"), down, e) * weight
    oracle.assert_same_bits(actual[:1], total.bfloat16())


GATE_UP, DOWN = any_weights()
ARGUMENTS: dict[str, Any] = {
    **dict(zip(("a_codes", "a_block_scales", "a_global_scale"), quantize_nvfp4(torch.randn(4, HIDDEN)), strict=True)),
    "topk_ids": torch.zeros(4, 2, dtype=torch.int64),
    "topk_weights": torch.ones(4, 2),
    **dict(zip(("gate_up_codes", "gate_up_block_scales", "gate_up_global_scale"), GATE_UP, strict=True)),
    **dict(zip(("down_codes", "down_block_scales", "down_global_scale"), DOWN, strict=True)),
}


def parts(prefix: str, *lead: int, k: int, scale_shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
    return {
        f"{prefix}_codes": torch.zeros(*lead, k // 2, dtype=torch.uint8),
        f"{prefix}_block_scales": torch.zeros(*lead, k // 16).to(torch.float8_e4m3fn),
        f"{prefix}_global_scale": torch.ones(scale_shape),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a_codes": ARGUMENTS["a_codes"].int()}, "a_codes must be uint8, got int32"),
        (parts("a", 2, 2, k=64), r"a_codes must be \[T, H/2\], got shape \(2, 2, 32\)"),
        ({"a_global_scale": torch.ones(2)}, r"a_global_scale must be 0-d or one a row \(4,\), got shape \(2,\)"),
        ({"topk_ids": torch.zeros(4, 2)}, "topk_ids must be int32 or int64, got float32"),
        ({"topk_ids": torch.zeros(3, 2).int()}, r"topk_ids must be \[4, k\], got shape \(3, 2\)"),
        ({"topk_ids": torch.zeros(4).int()}, r"topk_ids must be \[4, k\], got shape \(4,\)"),
        ({"topk_weights": torch.ones(4, 2).int()}, "topk_weights must be bfloat16 or float16 or float32, got int32"),
        ({"topk_weights": torch.ones(4, 1)}, r"topk_weights must have the shape of topk_ids \(4, 2\), got \(4, 1\)"),
        ({"gate_up_block_scales": torch.ones(EXPERTS, 64, 4)}, "gate_up_block_scales must be float8_e4m3fn, got float32"),
        (parts("gate_up", 64, k=64), r"gate_up_codes must be \[E, 2 I, 32\], I % 16 == 0, as a_codes has that many bytes a row, got shape \(64, 32\)"),
        (parts("gate_up", 5, 64, k=32), r"gate_up_codes must be \[E, 2 I, 32\], I % 16 == 0, as a_codes has that many bytes a row, got shape \(5, 64, 16\)"),
        (parts("gate_up", 5, 48, k=64), r"gate_up_codes must be \[E, 2 I, 32\], I % 16 == 0, as a_codes has that many bytes a row, got shape \(5, 48, 32\)"),
        ({"gate_up_global_scale": torch.ones(())}, r"gate_up_global_scale must have shape \(5,\) or \(5, 2\), got \(\)"),
        ({"gate_up_global_scale": torch.ones(5, 4)}, r"gate_up_global_scale must have shape \(5,\) or \(5, 2\), got \(5, 4\)"),
        (parts("down", 5, 64, k=64, scale_shape=(5,)), r"down_codes must be \[E, H, I/2\] = \(5, 64, 16\), as a_codes and gate_up_codes have it, got shape \(5, 64, 32\)"),
        (parts("down", 4, 64, k=32, scale_shape=(4,)), r"down_codes must be \[E, H, I/2\] = \(5, 64, 16\), as a_codes and gate_up_codes have it, got shape \(4, 64, 16\)"),
        ({"down_global_scale": torch.ones(5, 2)}, r"down_global_scale must have shape \(5,\), got \(5, 2\)"),
        ({"limit": 0.0}, r"limit must be positive \(inf for none\), got 0\.0"),
        ({"limit": NAN}, r"limit must be positive \(inf for none\), got nan"),
        ({"weight_position": "down"}, "weight_position must be one of before_down, after_down, got 'down'"),
        ({"granularity": "row"}, "granularity must be one of tensor, tensor_pow2, token, got 'row'"),
        ({"out_dtype": torch.int32}, "out_dtype must be a float dtype, got torch.int32"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rejects(changes: dict[str, Any], message: str, device: str) -> None:
    """Guards against operands that do not belong together, multiplied without a word."""
    arguments = {**ARGUMENTS, **changes}
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with pytest.raises(RuntimeError, match=f"^nvfp4_moe: {message}$"):
        nvfp4_moe(**moved)


@pytest.mark.parametrize(("backend", "granularity"), [("aot_eager", "tensor"), ("inductor", "token")])
def test_compiles(backend: str, granularity: str) -> None:
    """Guards against a graph break, and against a second compilation for another number of tokens or other routing."""
    counter = CompileCounterWithBackend(backend)
    gate_up, down = any_weights(has_halves=True)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        a = quantize_nvfp4(x, granularity)
        return nvfp4_moe(*a, ids, weights, *gate_up, *down, 10.0, "after_down", granularity)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for tokens in (5, 9):
        args = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16), *any_routing(tokens)
        for arg in args:
            torch._dynamo.mark_dynamic(arg, 0)
        oracle.assert_same_bits(compiled(*args), run(*args))
    assert counter.frame_count == 1
