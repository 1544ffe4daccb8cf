"""Router logits to experts and weights: a warp a token, the scores of a token in its registers.

Lane l holds experts l, l + 32 and so on. Each round of the selection takes the largest key of the warp, and of the
experts that have it the lowest id. A key is the selection value as an integer that orders as the reference sorts: NaN
above everything, zeros of both signs equal; 0 stands for no expert.
"""

import cutlass
from cutlass import BFloat16, Float16, Float32, Float64, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.cutlass_dsl import T, dsl_user_op

from dsv4_compile.ops.dispatch.topk_router import WARPS, RouterConfig
from dsv4_compile.ops.kernels.sm90 import numerics as nm

DTYPES = {"bfloat16": BFloat16, "float16": Float16, "float32": Float32, "int32": Int32, "int64": Int64}
EXP_LOWEST = -87.0
ATANH_COEFFICIENTS = tuple(1.0 / n for n in range(1, 17, 2))
NAN_BITS = 0x7FFFFFFF
LAST = 0xFFFFFFFF


@dsl_user_op
def _smallest_of_warp(a, *, loc=None, ip=None):
    """The smallest unsigned word of the 32 lanes, in each of them."""
    return Uint32(
        llvm.inline_asm(
            T.i32(),
            [Uint32(a).ir_value(loc=loc, ip=ip)],
            "redux.sync.min.u32 $0, $1, 0xffffffff;",
            "=r,r",
            has_side_effects=True,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
            loc=loc,
            ip=ip,
        )
    )


def _is_nan(a):
    return (nm.bits(a) & Uint32(0x7FFFFFFF)) > Uint32(0x7F800000)


def _exp(y):
    """exp of y <= 0; 0 below -87."""
    return nm.select(y < EXP_LOWEST, Float32(0.0), nm.exponential(y))


def _log1p(u):
    """log(1 + u) for u in 0..1, as 2 atanh(u / (2 + u))."""
    s = nm.divide(u, nm.add(u, 2.0))
    square = nm.multiply(s, s)
    p = Float32(ATANH_COEFFICIENTS[-1])
    for coefficient in reversed(ATANH_COEFFICIENTS[:-1]):
        p = nm.add(nm.multiply(p, square), coefficient)
    return nm.multiply(nm.add(s, s), p)


def _score(x, score_function):
    u = _exp(nm.negate(nm.absolute(x)))
    if score_function == "sigmoid":
        return nm.divide(nm.select(x >= 0.0, Float32(1.0), u), nm.add(u, 1.0))
    return nm.square_root(nm.add(nm.larger_or_nan(x, 0.0), _log1p(u)))


def _key(value):
    """Orders as the value does, NaN first of all."""
    word = nm.bits(nm.add(value, 0.0))  # -0 becomes +0
    ordered = nm.select(word >= Uint32(0x80000000), ~word, word | Uint32(0x80000000))
    return nm.select(_is_nan(value), Uint32(LAST), ordered)


@cute.kernel
def router_kernel(
    logits: cute.Tensor,
    bias: cute.Tensor,
    table: cute.Tensor,
    token_ids: cute.Tensor,
    weights: cute.Tensor,
    ids: cute.Tensor,
    tokens: Int32,
    experts: Int32,
    top_k: Int32,
    is_normalized: Int32,
    norm_eps: Float32,
    route_scale: Float32,
    config: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    lane = cute.arch.lane_idx()
    token = cta * WARPS + thread // 32
    score = cute.make_rmem_tensor(config.lane_experts, Float32)
    key = cute.make_rmem_tensor(config.lane_experts, Uint32)
    biases = cute.make_rmem_tensor(config.lane_experts, Float32)
    weights_at, ids_at = nm.address_of(weights), nm.address_of(ids)
    table_at, token_ids_at = nm.address_of(table), nm.address_of(token_ids)
    id_bytes, table_bytes = config.index_bytes
    if cutlass.const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
    if token < tokens:
        for j in cutlass.range_constexpr(config.lane_experts):
            expert = lane + 32 * j
            score[j], biases[j] = Float32(-Float32.inf), Float32(0.0)
            if expert < experts:
                score[j] = Float32(logits[token, expert])
                if cutlass.const_expr(config.bias is not None):
                    biases[j] = Float32(bias[expert])

        if cutlass.const_expr(config.score_function == "softmax"):
            largest = Float32(-Float32.inf)
            for j in cutlass.range_constexpr(config.lane_experts):
                largest = nm.larger_or_nan(largest, score[j])
            for step in cutlass.range_constexpr(5):
                largest = nm.larger_or_nan(largest, cute.arch.shuffle_sync_bfly(largest, offset=16 >> step))
            total = Float64(0.0)
            for j in cutlass.range_constexpr(config.lane_experts):
                value = _exp(nm.subtract(score[j], largest))
                score[j] = nm.select(lane + 32 * j < experts, value, Float32(0.0))
                total = nm.add_f64(total, Float64(score[j]))
            for step in cutlass.range_constexpr(5):
                total = nm.add_f64(total, cute.arch.shuffle_sync_bfly(total, offset=16 >> step))
            sum_of_row = nm.round_f64(total)
            for j in cutlass.range_constexpr(config.lane_experts):
                score[j] = nm.divide(score[j], sum_of_row)
        else:
            for j in cutlass.range_constexpr(config.lane_experts):
                score[j] = _score(score[j], config.score_function)

        nan_seen = Uint32(0)
        for j in cutlass.range_constexpr(config.lane_experts):
            selection = score[j]
            if cutlass.const_expr(config.bias is not None):
                selection = nm.add(selection, biases[j])
            is_expert = lane + 32 * j < experts
            key[j] = nm.select(is_expert, _key(selection), Uint32(0))
            nan_seen = nm.larger_u32(nan_seen, nm.select(key[j] == Uint32(LAST), Uint32(1), Uint32(0)))
        has_nan = nm.largest_of_warp(nan_seen) > Uint32(0)

        table_row = Int64(0)
        if cutlass.const_expr(config.is_hash):
            token_id = Int64(nm.load_words(token_ids_at + Int64(token) * id_bytes, 1)[0])
            table_row = table_at + token_id * (Int64(top_k) * table_bytes)
        total_weight = Float32(0.0)
        first = Int64(token) * top_k
        rank = Int32(0)
        while rank < top_k:
            chosen = Int32(0)
            if cutlass.const_expr(config.is_hash):
                chosen = Int32(nm.load_words(table_row + Int64(rank) * table_bytes, 1)[0])
            else:
                best, best_expert = Uint32(0), Uint32(LAST)
                for j in cutlass.range_constexpr(config.lane_experts):
                    is_better = key[j] > best
                    best = nm.select(is_better, key[j], best)
                    best_expert = nm.select(is_better, Uint32(lane + 32 * j), best_expert)
                largest_key = nm.largest_of_warp(best)
                chosen = Int32(_smallest_of_warp(nm.select(best == largest_key, best_expert, Uint32(LAST))))
            weight = Float32(0.0)
            for j in cutlass.range_constexpr(config.lane_experts):
                is_chosen = chosen == lane + 32 * j
                weight = nm.select(is_chosen, score[j], weight)
                key[j] = nm.select(is_chosen, Uint32(0), key[j])
            weight = cute.arch.shuffle_sync(weight, chosen % 32)
            total_weight = nm.select(rank == 0, weight, nm.add(total_weight, weight))
            if lane == rank % 32:
                nm.store_f32(weights_at + (first + rank) * 4, weight)
                nm.store_words(ids_at + (first + rank) * 8, [Uint32(chosen), Uint32(0)])
            rank += 1

        divisor = nm.add(total_weight, norm_eps)
        rank = Int32(lane)
        while rank < top_k:
            weight = nm.load_f32(weights_at + (first + rank) * 4)  # stored by this lane
            if is_normalized != 0:
                weight = nm.divide(weight, divisor)
            weight = nm.multiply(weight, route_scale)
            weight = nm.select(has_nan, nm.from_bits(Uint32(NAN_BITS)), weight)
            nm.store_f32(weights_at + (first + rank) * 4, weight)
            rank += 32


def build(config: RouterConfig):
    """The ``cute.jit`` function for a configuration and its fake arguments."""

    @cute.jit
    def launch(
        logits: cute.Tensor,
        bias: cute.Tensor,
        table: cute.Tensor,
        token_ids: cute.Tensor,
        weights: cute.Tensor,
        ids: cute.Tensor,
        tokens: Int32,
        experts: Int32,
        top_k: Int32,
        is_normalized: Int32,
        norm_eps: Float32,
        route_scale: Float32,
        stream,
    ):
        router_kernel(
            logits,
            bias,
            table,
            token_ids,
            weights,
            ids,
            tokens,
            experts,
            top_k,
            is_normalized,
            norm_eps,
            route_scale,
            config,
        ).launch(grid=(cute.ceil_div(tokens, WARPS), 1, 1), block=(32 * WARPS, 1, 1), stream=stream, use_pdl=config.pdl)

    def vector(dtype):
        element = DTYPES[dtype]
        return make_fake_tensor(element, (cute.sym_int64(),), (1,), assumed_align=element.width // 8)

    element = DTYPES[config.dtype]
    shape = (cute.sym_int64(), cute.sym_int64())
    logits = make_fake_tensor(element, shape, (cute.sym_int64(), 1), assumed_align=element.width // 8)
    return launch, (
        logits,
        vector(config.bias or config.dtype),
        vector(config.table or "int32"),
        vector(config.token_ids or "int32"),
        vector("float32"),
        vector("int64"),
        Int32(1),
        Int32(1),
        Int32(1),
        Int32(1),
        Float32(1.0),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
