"""Zeros the rows from a number on that is known on the device only; ends at once where there are none."""

import cutlass
from cutlass import Int32, Int64, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from dsv4_compile.ops.dispatch.zero_tail import Config

THREADS = 256


@cute.kernel
def zero_tail_kernel(out: cute.Tensor, schedule: cute.Tensor, columns: Int32, pdl: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    if cutlass.const_expr(pdl):
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
    element = Int64(schedule[0, 1]) * columns + block * THREADS + thread
    while element < cute.size(out):
        out[element] = out.element_type(0)
        element += Int64(ctas) * THREADS


@cute.jit
def launch(out: cute.Tensor, schedule: cute.Tensor, columns: Int32, ctas: Int32, stream, pdl: cutlass.Constexpr):
    zero_tail_kernel(out, schedule, columns, pdl).launch(
        grid=(ctas, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=pdl
    )


def build(config: Config):
    dtype = cutlass.Int16 if config.element_bytes == 2 else Int32
    return launch, (
        make_fake_tensor(dtype, (cute.sym_int64(),), (1,), assumed_align=config.element_bytes),
        make_fake_tensor(Int32, (cute.sym_int32(), 4), (4, 1), assumed_align=16),
        Int32(1),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        config.pdl,
    )
