"""The PTX interpreter: barriers, copies and clusters, and the mistakes in them that it must see."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.ptx import Deadlock, PtxError, TensorMap
from tests.kernels.ptx_bodies import execute

RING = """
  mov.u32 %r1, %tid.x; mov.b32 %r2, smem; setp.ne.s32 %p1, %r1, 0; @%p1 bra READY;
  mbarrier.init.shared.b64 [smem], 1; mbarrier.init.shared.b64 [smem+8], 32;
  fence.mbarrier_init.release.cluster;
READY:
  bar.sync 0;
  mov.b32 %r3, 0; ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1];
  setp.ge.s32 %p2, %r1, 32; @%p2 bra CONSUMER;
PRODUCER:
  and.b32 %r4, %r3, 1; xor.b32 %r4, %r4, 1;
  { .reg .pred P1; LAB_WAIT: mbarrier.try_wait.parity.shared.b64 P1, [smem+8], %r4, 10000000; @P1 bra.uni DONE;
    bra.uni LAB_WAIT; DONE: }
  elect.sync %r5|%p3, -1; @!%p3 bra NEXT;
  mbarrier.arrive.expect_tx.shared.b64 _, [smem], 1024;
  mov.b64 %rd3, p2; cvta.param.u64 %rd4, %rd3; add.s32 %r6, %r2, 1024; mov.b32 %r7, -8;
  cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r6], [%rd4, {%r7, %r3}], [%r2];
NEXT:
  add.s32 %r3, %r3, 1; setp.lt.s32 %p4, %r3, STEPS; @%p4 bra PRODUCER;
  bra END;
CONSUMER:
  and.b32 %r4, %r3, 1;
  { .reg .pred P1; LAB_WAIT: mbarrier.try_wait.parity.shared.b64 P1, [smem], %r4, 10000000; @P1 bra.uni DONE;
    bra.uni LAB_WAIT; DONE: }
  and.b32 %r8, %r1, 31; shl.b32 %r9, %r8, 4; add.s32 %r9, %r9, %r2;
  mad.lo.s32 %r10, %r3, 64, %r8; mul.wide.u32 %rd5, %r10, 16; add.s64 %rd5, %rd5, %rd2;
  ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r9+1024]; st.global.v4.b32 [%rd5], {%r20, %r21, %r22, %r23};
  ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r9+1536]; st.global.v4.b32 [%rd5+512], {%r20, %r21, %r22, %r23};
  ARRIVE
  add.s32 %r3, %r3, 1; setp.lt.s32 %p4, %r3, STEPS; @%p4 bra CONSUMER;
END:
"""


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_ring(swizzle: int) -> None:
    """Guards against a barrier whose phases mix, a copy that lands elsewhere, and elements outside that are not zero."""
    inner = swizzle or 64
    rows, steps = 1024 // inner, 5
    x, out = np.arange(40 * (inner // 2 + 16), dtype="u2").reshape(40, -1), np.zeros((steps, rows, inner // 2), "u2")
    width = inner // 2 - 10
    tensor = TensorMap(x.ctypes.data, 2, (width, rows + 2), (x.strides[0],), (inner // 2, rows), swizzle)
    body = RING.replace("STEPS", str(steps)).replace("ARRIVE", "mbarrier.arrive.shared.b64 %rd9, [smem+8];")
    expected = np.zeros_like(out)
    for step in range(steps):
        dense = np.zeros((rows, inner // 2), "u2")
        for row in range(min(rows, rows + 2 - step)):
            dense[row, 8 : 8 + width] = x[step + row, :width][: inner // 2 - 8]
        chunks = dense.reshape(-1, 8)
        for i in range(64):  # 16-byte chunk i of the box lies at chunk j
            mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
            j = i ^ (i >> 3 & mask)
            expected[step].reshape(-1, 8)[j] = chunks[i]
    for seed in range(6):
        out[:] = 1
        execute(body, [x, out], block=64, shared=2048, extra=[bytes(128)], tensor_map=lambda raw: tensor, seed=seed)
        assert np.array_equal(out, expected), seed
    broken = body.replace("mbarrier.arrive.shared.b64 %rd9, [smem+8];", "")
    with pytest.raises(Deadlock, match=r"mbarrier.try_wait"):
        execute(broken, [x, out], block=64, shared=2048, extra=[bytes(128)], tensor_map=lambda raw: tensor)
    inside = body.replace("add.s32 %r6, %r2, 1024", "add.s32 %r6, %r2, 0")
    with pytest.raises(PtxError, match=r"overwrites an mbarrier.*cp.async.bulk"):
        execute(inside, [x, out], block=64, shared=2048, extra=[bytes(128)], tensor_map=lambda raw: tensor)
    early = body.replace("[smem+8], %r4, 10000000", "[smem+8], 1, 10000000").replace("[smem], %r4, 1", "[smem], 1, 1")
    results = []
    for seed in range(6):  # nobody waits: some order shows it
        try:
            execute(
                early, [x, out], block=64, shared=2048, extra=[bytes(128)], tensor_map=lambda raw: tensor, seed=seed
            )
            results.append(np.array_equal(out, expected))
        except PtxError:
            results.append(False)
    assert not all(results)


def test_early_read() -> None:
    """Guards against copies that are there at once: a read that does not wait must find 0xFF in some orders."""
    x, out = np.arange(512, dtype="u2"), np.zeros(2, "u4")
    tensor = TensorMap(x.ctypes.data, 2, (64, 8), (128,), (64, 8))
    body = """
      mov.u32 %r1, %tid.x; setp.ne.s32 %p1, %r1, 0; @%p1 bra END; mbarrier.init.shared.b64 [smem], 1;
      st.shared.b32 [smem+1024], 5; mov.b32 %r2, smem; add.s32 %r3, %r2, 1024; ld.param.b64 %rd1, [p1]; mov.b32 %r4, 0;
      mbarrier.arrive.expect_tx.shared.b64 _, [smem], 1024; mov.b64 %rd2, p2;
      cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r3], [%rd2, {%r4, %r4}], [%r2];
      ld.shared.b32 %r5, [smem+1024]; st.global.b32 [%rd1], %r5;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [smem], 0; @!%p3 bra WAIT;
      ld.shared.b32 %r5, [smem+1024]; st.global.b32 [%rd1+4], %r5;
    END:
    """
    seen = set()
    for seed in range(10):
        execute(body, [x, out], shared=2048, extra=[bytes(128)], tensor_map=lambda raw: tensor, seed=seed)
        assert out[1] == 1 << 16
        seen.add(int(out[0]))
    assert seen == {0xFFFFFFFF, 1 << 16}


def test_copy_of_bytes() -> None:
    """Guards against a copy that misses its bytes or its barrier, or is there before the barrier says so."""
    x, out = np.arange(64, dtype="u4"), np.zeros(40, "u4")
    body = """
      mov.u32 %r1, %tid.x; setp.ne.s32 %p1, %r1, 0; @%p1 bra JOIN; mbarrier.init.shared.b64 [smem], 1;
      mbarrier.arrive.expect_tx.shared.b64 _, [smem], 160;
    JOIN: bar.sync 0; mov.b32 %r2, smem; ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1]; shl.b32 %r3, %r1, 4;
      add.s32 %r4, %r2, 64; add.s32 %r4, %r4, %r3; mul.wide.u32 %rd3, %r1, 16; add.s64 %rd4, %rd1, %rd3;
      setp.ge.s32 %p2, %r1, 10; @%p2 bra WAIT; mov.b32 %r5, 16;
      cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd4+32], %r5, [%r2];
    WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [smem], 0; @!%p3 bra WAIT;
      setp.ge.s32 %p2, %r1, 10; @%p2 bra END;
      ld.shared.v4.b32 {%r6, %r7, %r8, %r9}, [%r4]; add.s64 %rd5, %rd2, %rd3;
      st.global.v4.b32 [%rd5], {%r6, %r7, %r8, %r9};
    END:
    """
    for seed in range(4):
        out[:] = 0
        execute(body, [x, out], shared=1024, seed=seed)
        assert np.array_equal(out, x[8:48])
    with pytest.raises(Deadlock, match=r"mbarrier.try_wait"):
        execute(body.replace("[smem], 160", "[smem], 176"), [x, out], shared=1024)
    with pytest.raises(PtxError, match=r"units of 16.*cp.async.bulk"):
        execute(body.replace("[%rd4+32]", "[%rd4+36]"), [x, out], shared=1024)
    with pytest.raises(PtxError, match=r"outside of the memory"):
        execute(body.replace("[%rd4+32]", "[%rd4+128]"), [x, out], shared=1024)
    early = body.replace("[smem], 160", "[smem], 0")
    seen = set()
    for seed in range(8):
        execute(early, [x, out], shared=1024, seed=seed)
        seen.add(bool(np.array_equal(out, x[8:48])))
    assert False in seen


def test_barriers() -> None:
    """Guards against named barriers that let warps pass too early, and waits that never end unseen."""
    out = np.zeros(96, "u4")
    body = """
      mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.b32 %r3, smem; add.s32 %r2, %r2, %r3;
      setp.ge.s32 %p1, %r1, 64; @%p1 bra OTHERS;
      add.s32 %r4, %r1, 100; st.shared.b32 [%r2], %r4; bar.arrive 1, 96; bra END;
    OTHERS:
      bar.sync 1, 96; ld.shared.b32 %r4, [%r2+-256]; ld.shared.b32 %r5, [%r2+-128]; ld.param.b64 %rd1, [p0];
      mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2; st.global.b32 [%rd1+-256], %r4; st.global.b32 [%rd1+-128], %r5;
    END:
    """
    for seed in range(4):
        out[:] = 0
        execute(body, [out], block=96, shared=512, seed=seed)
        assert out[:64].tolist() == list(range(100, 164))
    with pytest.raises(
        PtxError, match=r"128 threads for one warp, 96 for another|96 threads for one warp, 128 for another"
    ):
        execute(body.replace("sync 1, 96", "sync 1, 128"), [out], block=96, shared=512)
    with pytest.raises(Deadlock, match=r"bar.sync 2, 96"):
        execute(body.replace("sync 1, 96", "sync 2, 96"), [out], block=96, shared=512)
    part = "mov.u32 %r1, %tid.x; setp.lt.s32 %p1, %r1, 7; @%p1 bra A; bar.sync 0; A: "
    with pytest.raises(Deadlock, match=r"bar.sync 0"):
        execute(part.replace("A: ", "A: bar.sync 0;"), [out], block=32, max_steps=1000)


def test_lanes_that_wait_for_each_other() -> None:
    """Guards against a hang: lanes at a shuffle need some that wait, first in vain and then not."""
    out = np.zeros(64, "u4")
    body = """
      mov.u32 %r1, %tid.x; setp.ne.s32 %p1, %r1, 0; @%p1 bra A; mbarrier.init.shared.b64 [smem], 1;
    A: bar.sync 0; mov.b32 %r2, 1; setp.ge.s32 %p1, %r1, 32; @%p1 bra SECOND; and.b32 %r3, %r1, 1;
      setp.eq.s32 %p2, %r3, 0; @%p2 bra MEET;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [smem], 0; @!%p3 bra WAIT;
      mov.b32 %r2, 2;
    MEET: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; mul.wide.u32 %rd1, %r1, 4; ld.param.b64 %rd2, [p0];
      add.s64 %rd2, %rd2, %rd1; st.global.b32 [%rd2], %r4; ret;
    SECOND: setp.lt.s32 %p4, %r1, 40; @%p4 ret; elect.sync %r5|%p5, 0xFFFFFF00; @%p5 mbarrier.arrive.shared.b64 _, [smem];
    """
    for seed in range(4):
        out[:] = 0
        execute(body, [out], block=64, shared=16, seed=seed)
        assert out.tolist() == [2, 1] * 16 + [0] * 32
    with pytest.raises(Deadlock, match=r"16 lanes at .*shfl"):
        execute(
            body.replace("@%p5 mbarrier.arrive.shared.b64 _, [smem];", ""), [out], block=64, shared=16, max_steps=10**5
        )


def test_cluster() -> None:
    """Guards against shared memory of another CTA that is one's own, and a cluster's barrier that does not wait."""
    out = np.zeros(4 * 32, "u4")
    body = """
      mov.u32 %r1, %tid.x; mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, %ctaid.x; shl.b32 %r4, %r1, 2;
      mov.b32 %r5, smem; add.s32 %r5, %r5, %r4; xor.b32 %r6, %r2, 1; mad.lo.s32 %r7, %r3, 1000, %r1;
      { .reg .b32 a; mapa.shared::cluster.u32 a, %r5, %r6; st.shared::cluster.b32 [a], %r7; }
      barrier.cluster.arrive; barrier.cluster.wait;
      ld.shared.b32 %r8, [%r5];
      mad.lo.s32 %r9, %r3, 32, %r1; mul.wide.u32 %rd1, %r9, 4; ld.param.b64 %rd2, [p0]; add.s64 %rd2, %rd2, %rd1;
      st.global.b32 [%rd2], %r8;
    """
    for seed in range(4):
        execute(body, [out], grid=4, cluster=2, shared=128, seed=seed)
        assert out.tolist() == [1000 * (cta ^ 1) + lane for cta in range(4) for lane in range(32)]
