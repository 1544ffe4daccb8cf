"""The routed rows of a token, weighted and summed in fp32 in the order of its experts, then rounded once.

A thread owns four columns of a token and asks for the rows of up to eight experts before it adds the first: what bounds
this kernel is memory, read once.
"""

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.moe_combine import CombineConfig
from dsv4_compile.ops.kernels.sm90.numerics import add, multiply

THREADS = 256
COLUMNS = 4  # a thread
AHEAD = 8  # rows asked for before the first is added


@cute.kernel
def combine_kernel(
    y: cute.Tensor,
    row_of_slot: cute.Tensor,
    weights: cute.Tensor,
    out: cute.Tensor,
    top_k: Int32,
    has_weights: cutlass.Constexpr,
    pdl: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    token, block, _ = cute.arch.block_idx()
    vector = block * THREADS + thread
    if cutlass.const_expr(pdl):
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
    if vector < cute.size(out, mode=[1]):
        total = cute.make_rmem_tensor(COLUMNS, Float32)
        total.fill(0.0)
        for chunk in range(cute.ceil_div(top_k, AHEAD)):
            rows = cute.make_rmem_tensor(AHEAD, Int32)
            weight = cute.make_rmem_tensor(AHEAD, Float32)
            parts = cute.make_rmem_tensor((COLUMNS, AHEAD), Float32)
            for ahead in cutlass.range_constexpr(AHEAD):
                rank = chunk * AHEAD + ahead
                rows[ahead], weight[ahead] = Int32(-1), Float32(0.0)
                if rank < top_k:
                    slot = token * top_k + rank
                    rows[ahead] = row_of_slot[slot]
                    if cutlass.const_expr(has_weights):
                        weight[ahead] = Float32(weights[slot])
            for ahead in cutlass.range_constexpr(AHEAD):
                if rows[ahead] >= 0:
                    cute.autovec_copy(y[(Int64(rows[ahead]), vector, None)], parts[None, ahead])
            for ahead in cutlass.range_constexpr(AHEAD):
                if rows[ahead] >= 0:
                    for column in cutlass.range_constexpr(COLUMNS):
                        part = parts[column, ahead]
                        if cutlass.const_expr(has_weights):
                            part = multiply(part, weight[ahead])
                        total[column] = add(total[column], part)
        rounded = cute.make_rmem_tensor(COLUMNS, out.element_type)
        rounded.store(total.load().to(out.element_type))
        cute.autovec_copy(rounded, out[(Int64(token), vector, None)])


@cute.jit
def launch_combine(
    y: cute.Tensor,
    row_of_slot: cute.Tensor,
    weights: cute.Tensor,
    out: cute.Tensor,
    top_k: Int32,
    stream,
    has_weights: cutlass.Constexpr,
    pdl: cutlass.Constexpr,
):
    def vectors(matrix):
        return cute.make_tensor(
            matrix.iterator,
            cute.make_layout(
                (matrix.shape[0], matrix.shape[1] // COLUMNS, COLUMNS), stride=(matrix.stride[0], COLUMNS, 1)
            ),
        )

    blocks = cute.ceil_div(out.shape[1], THREADS * COLUMNS)
    combine_kernel(vectors(y), row_of_slot, weights, vectors(out), top_k, has_weights, pdl).launch(
        grid=(out.shape[0], blocks, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=pdl
    )


def build(config: CombineConfig):
    dtypes = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": Float32}
    out_dtype = dtypes[config.out_dtype]

    def vector(dtype):
        return make_fake_tensor(dtype, (cute.sym_int32(),), (1,), assumed_align=dtype.width // 8)

    def matrix(dtype):
        return make_fake_tensor(
            dtype, (cute.sym_int32(), cute.sym_int32(divisibility=COLUMNS)), (cute.sym_int64(divisibility=COLUMNS), 1),
            assumed_align=COLUMNS * dtype.width // 8,
        )  # fmt: skip

    weights = vector(dtypes[config.weight_dtype] if config.weight_dtype else Int32)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return launch_combine, (
        matrix(Float32), vector(Int32), weights, matrix(out_dtype), Int32(1), stream,
        bool(config.weight_dtype), config.pdl,
    )  # fmt: skip
