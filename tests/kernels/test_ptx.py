"""The PTX interpreter: warps, memory, and what the kernels need of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv4_compile.ops.dispatch import decode_choice
from dsv4_compile.ops.dispatch.expand import ExpandConfig
from dsv4_compile.ops.dispatch.moe_align import AlignConfig, ScheduleConfig
from dsv4_compile.ops.dispatch.moe_combine import CombineConfig
from dsv4_compile.ops.dispatch.moe_requantize import RequantizeConfig
from dsv4_compile.ops.dispatch.quantizer import AmaxConfig, FlatConfig, RowsConfig
from dsv4_compile.ops.dispatch.topk_router import RouterConfig
from dsv4_compile.ops.kernels import compilation
from tests.kernels.ptx import PtxError, run, unknown_instructions
from tests.kernels.ptx_bodies import HEAD, ONE, execute, lanes, numbers

# Warps


def test_divergent_loop() -> None:
    """Guards against lanes that do not meet again, and against a shuffle of those that did not."""
    start = np.arange(1, 65, dtype="u4")
    out = np.zeros(64, "u4")
    body = """
      mov.u32 %r1, %tid.x; mul.wide.u32 %rd1, %r1, 4;
      ld.param.b64 %rd2, [p0]; add.s64 %rd2, %rd2, %rd1; ld.global.nc.L1::no_allocate.b32 %r2, [%rd2];
      mov.b32 %r3, 0;
    LOOP:
      setp.eq.s32 %p1, %r2, 1; @%p1 bra DONE;
      and.b32 %r4, %r2, 1; setp.eq.s32 %p2, %r4, 0; @%p2 bra EVEN;
      mad.lo.s32 %r2, %r2, 3, 1; bra NEXT;
    EVEN:
      shr.u32 %r2, %r2, 1;
    NEXT:
      add.s32 %r3, %r3, 1; bra LOOP;
    DONE:
      shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
      ld.param.b64 %rd2, [p1]; add.s64 %rd2, %rd2, %rd1; st.global.b32 [%rd2], %r5;
    """
    execute(body, [start, out], block=64)

    def length(n: int) -> int:
        return 0 if n == 1 else 1 + length(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert out.tolist() == [length((i ^ 1) + 1) for i in range(64)]


def test_warp_instructions() -> None:
    """Guards against shuffles, votes and reductions over other lanes than the mask's."""
    x = numbers("u4", 32) % 5
    lane = np.arange(32)
    up = lanes("shfl.sync.up.b32 $0, $1, 3, 0, -1", "u4", x)
    assert np.array_equal(up, np.where(lane >= 3, x[lane - 3], x))
    down = lanes("shfl.sync.down.b32 $0|%p1, $1, 2, 0x181f, -1; selp.b32 $0, $0, 99, %p1", "u4", x)
    assert np.array_equal(down, np.where(lane % 8 < 6, x[(lane + 2) % 32], 99))
    index = lanes("shfl.sync.idx.b32 $0, $1, 5, 0x181f, -1", "u4", x)
    assert np.array_equal(index, x[lane // 8 * 8 + 5])
    ballot = lanes("setp.gt.u32 %p1, $1, 2; vote.sync.ballot.b32 $0, %p1, -1", "u4", x)
    assert (ballot == sum(1 << i for i in range(32) if x[i] > 2)).all()
    match = lanes("match.any.sync.b32 $0, $1, -1", "u4", x)
    assert match.tolist() == [sum(1 << j for j in range(32) if x[j] == x[i]) for i in range(32)]
    assert (lanes("redux.sync.max.u32 $0, $1, 0xffffffff", "u4", x) == x.max()).all()
    elected = lanes("elect.sync %r9|%p1, -1; selp.b32 $0, 1, 0, %p1", "u4", x)
    assert elected.tolist() == [1] + [0] * 31


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma(kind: str) -> None:
    """Guards against fragments whose elements lie elsewhere."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    lane = torch.arange(32)
    group, inner = lane // 4, lane % 4 * 2
    fragments = [
        torch.stack([a[group + row, inner + column], a[group + row, inner + column + 1]], 1)
        for row, column in ((0, 0), (8, 0), (0, 8), (8, 8))
    ] + [torch.stack([b[inner + row, group], b[inner + row + 1, group]], 1) for row in (0, 8)]
    words = [part.contiguous().view(torch.int32).reshape(32).numpy().view("u4").copy() for part in fragments]
    sums = [c[group + row, inner + column].numpy().view("u4").copy() for row in (0, 8) for column in (0, 1)]
    for i, (row, column) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
        targets = ["%r20", "%r21", "%r22", "%r23"]
        text = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{', '.join(targets)}}}, {{$1, $2, $3, $4}}, "
        text += f"{{$5, $6}}, {{$7, $8, $9, $9}}; mov.b32 $0, {targets[i]}"
        last = (
            "ld.param.b64 %rd20, [p9]; mov.u32 %r32, %tid.x; mul.wide.u32 %rd21, %r32, 4; add.s64 %rd20, %rd20, %rd21;"
        )
        del last
        text = text.replace("%r33", "$9") if i != 3 else text.replace("$9, %r33", "$8, $9")
        given = [*words, *(sums[:3] if i != 3 else [sums[0], sums[1], sums[3]])]
        actual = lanes(text, "u4", *given).view("f4")
        expected = (a.double() @ b.double() + c.double()).float()[group + row, inner + column].numpy()
        assert np.array_equal(actual, expected), (row, column)


def test_memory() -> None:
    """Guards against vectors in another order, and against accesses that a GPU refuses."""
    x, out = numbers("u4", 128), np.zeros(128, "u4")
    body = """
      mov.u32 %r1, %tid.x; mul.wide.u32 %rd1, %r1, 16; shl.b32 %r2, %r1, 4; mov.b32 %r3, smem; add.s32 %r2, %r2, %r3;
      ld.param.b64 %rd2, [p0]; cvta.to.global.u64 %rd2, %rd2; add.s64 %rd2, %rd2, %rd1;
      ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd2];
      st.shared.v2.b32 [%r2+8], {%r4, %r5}; st.shared.v2.b32 [%r2], {%r6, %r7};
      bar.warp.sync -1;
      ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2];
      ld.param.b64 %rd3, [p1]; add.s64 %rd3, %rd3, %rd1; st.global.v4.b32 [%rd3], {%r4, %r5, %r6, %r7};
    """
    execute(body, [x, out], shared=512)
    assert np.array_equal(out.reshape(-1, 4), x.reshape(-1, 4)[:, [2, 3, 0, 1]])
    with pytest.raises(PtxError, match=r"outside of the memory of the launch.*ld.global"):
        execute(body, [x[:-1], out], shared=512)
    with pytest.raises(PtxError, match=r"shared address .* outside .*st.shared"):
        execute(body, [x, out], shared=496)
    with pytest.raises(PtxError, match=r"no multiple"):
        execute(body.replace("[%r2+8]", "[%r2+4]"), [x, out], shared=512)


def test_atomics() -> None:
    """Guards against atomics that lose an update."""
    out = np.array([5, 1000, 0, 7], "u4")
    body = """
      ld.param.b64 %rd1, [p0]; mov.u32 %r1, %tid.x;
      atom.global.add.u32 %r2, [%rd1], 1; red.global.min.s32 [%rd1+4], %r1; atom.global.max.u32 %r3, [%rd1+8], %r1;
      setp.eq.s32 %p1, %r1, 3; @%p1 atom.global.cas.b32 %r4, [%rd1+12], 7, 9;
    """
    execute(body, [out], block=96)
    assert out.tolist() == [101, 0, 95, 9]


# Kernels

KERNELS: list[tuple[str, Any]] = [
    ("decode_mm", decode_choice.choose(1, (32,), 512, "packed", False, torch.bfloat16, True)),
    ("decode_mm", decode_choice.choose(8, (4096,), 4096, "bf16", True, torch.bfloat16, False)),
    ("expand", ExpandConfig(True)),
    ("quantize_nvfp4", AmaxConfig("bfloat16")),
    ("quantize_nvfp4", FlatConfig("float16")),
    ("swiglu_quantize_nvfp4", RowsConfig("bfloat16", 128, 2, cluster=8)),
    ("rms_norm_quantize_nvfp4", RowsConfig("bfloat16", 128, 2, per_token=True, weight="bfloat16", norm=True)),
    ("moe_align", AlignConfig("int64", 8, "bfloat16", True)),
    ("moe_align", ScheduleConfig()),
    ("moe_requantize", RequantizeConfig("bfloat16", "token")),
    ("moe_combine", CombineConfig("bfloat16", "float16")),
    ("topk_router", RouterConfig("bfloat16", 8, "sqrtsoftplus", bias="float32")),
]


@pytest.mark.parametrize(("name", "config"), KERNELS, ids=str)
def test_kernels_parse(name: str, config: Any) -> None:
    """Guards against a kernel that starts to use what the interpreter does not know."""
    with tempfile.TemporaryDirectory() as folder:
        compilation._compile(f"sm90.{name}", config, f" --keep-ptx --keep-cubin --dump-dir {folder}")
        (text,) = Path(folder).glob("*.ptx")
        assert unknown_instructions(text.read_text()) == []


def test_unknown() -> None:
    """Guards against an instruction that is taken for another one."""
    text = HEAD.format(
        parameters="",
        body="ldmatrix.sync.aligned.m8n8.x1.shared.b16 %r1, [%r1]; add.rz.f32 %f1, %f2, %f3; mov.b32 %r1, 0;",
    )
    assert unknown_instructions(text) == [
        "PTX: ldmatrix.sync.aligned.m8n8.x1.shared.b16 %r1, [%r1]",
        "PTX: add.rz.f32 %f1, %f2, %f3",
    ]
    with pytest.raises(NotImplementedError, match="ldmatrix"):
        run(text, ONE, (32, 1, 1), ONE, 0, [])
