"""What the producer warps of ``sm90.wgmma_w4`` load, by TMA: codes and block scales of weights, and activations."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint8
from cutlass.cute.nvgpu import cpasync

from dsv4_compile.ops.kernels.sm90.wgmma_geometry import (
    BLOCK_ROWS,
    HALF_CODE_BYTES,
    HALF_ROWS,
    SCALE_BYTES,
    STEP_K,
    STEPS,
)


class Loads:
    """The two producer warps of a configuration."""

    def __init__(self, config, geometry):
        self.config = config
        self.geometry = geometry

    @cute.jit
    def weights(
        self, code_atoms, code_tensors, scale_atoms, scale_tensors, schedule, base, full, empty, block_ends,
        first_stage, stages, cluster_id, num_clusters, out,
    ):  # fmt: skip
        """One warp: by TMA codes, each stage in two halves of 64 rows of two halves of K, and block scales."""
        config = self.config
        code_ring = cute.make_tensor(
            cute.recast_ptr(
                (base + self.geometry.code_offset).align(1024), swizzle_=cute.make_swizzle(2, 4, 3), dtype=Uint8
            ),
            cute.make_layout(  # row halves of each half of K of each stage
                (HALF_ROWS, HALF_CODE_BYTES, 4 * self.geometry.weight_stages),
                stride=(HALF_CODE_BYTES, 1, HALF_ROWS * HALF_CODE_BYTES),
            ),
        )
        scale_ring = cute.make_tensor(
            (base + self.geometry.scale_offset).align(128),
            cute.make_layout(
                (HALF_ROWS, SCALE_BYTES, 2 * self.geometry.weight_stages),
                stride=(SCALE_BYTES, 1, HALF_ROWS * SCALE_BYTES),
            ),
        )
        if cutlass.const_expr(self.geometry.is_grouped):
            cute.arch.griddepcontrol_wait()  # for the schedule
        slot = Int32(0)
        phase = Int32(1)  # an empty barrier nobody has waited for yet counts as completed
        tiles = self.geometry.num_tiles(schedule, block_ends, out)
        for index in cutlass.range(cluster_id, tiles, num_clusters, unroll=1):
            block, _, _, expert = self.geometry.tile(index, schedule, block_ends, out)
            start = Int32(0)
            for i in cutlass.range_constexpr(config.num_weights):
                if block >= start and block < block_ends[i]:
                    row = (block - start) * (HALF_ROWS if self.geometry.is_swiglu else BLOCK_ROWS)
                    second = Int32(HALF_ROWS)
                    if cutlass.const_expr(self.geometry.is_swiglu):
                        second = Int32(code_tensors[i].shape[0]) // 2
                    halves = []
                    for half in cutlass.range_constexpr(2):
                        pair = []
                        for tensor, smem, width, atom in (
                            (code_tensors[i], code_ring, HALF_CODE_BYTES, code_atoms[i]),
                            (scale_tensors[i], scale_ring, SCALE_BYTES, scale_atoms[i]),
                        ):
                            if cutlass.const_expr(self.geometry.is_grouped):
                                moved = cute.domain_offset((row + half * second, 0, 0), tensor)
                                tiled = cute.local_tile(moved, (HALF_ROWS, width), (0, None, expert))
                            else:
                                moved = cute.domain_offset((row + half * second, 0), tensor)
                                tiled = cute.local_tile(moved, (HALF_ROWS, width), (0, None))
                            pair.append(
                                cpasync.tma_partition(
                                    atom,
                                    0,
                                    cute.make_layout(1),
                                    cute.group_modes(smem, 0, 2),
                                    cute.group_modes(tiled, 0, 2),
                                )
                            )
                        halves.append(pair)
                    for stage in cutlass.range(stages, unroll=1):
                        cute.arch.mbarrier_wait(empty + slot, phase)
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive_and_expect_tx(full + slot, self.geometry.weight_bytes)
                        for half in cutlass.range_constexpr(2):
                            (code_smem, code_gmem), (scale_smem, scale_gmem) = halves[half]
                            for half_k in cutlass.range_constexpr(2):
                                cute.copy(
                                    code_atoms[i],
                                    code_gmem[(None, (first_stage + stage) * 2 + half_k)],
                                    code_smem[(None, (slot * 2 + half_k) * 2 + half)],
                                    tma_bar_ptr=full + slot,
                                )
                            cute.copy(
                                scale_atoms[i],
                                scale_gmem[(None, first_stage + stage)],
                                scale_smem[(None, slot * 2 + half)],
                                tma_bar_ptr=full + slot,
                            )
                        slot = slot + 1
                        if slot == self.geometry.weight_stages:
                            slot = Int32(0)
                            phase = phase ^ 1
                start = block_ends[i]

    @cute.jit
    def activations(
        self, atom, tensor, schedule, base, full, empty, block_ends, first_stage, stages, cluster_id, num_clusters,
        out,
    ):  # fmt: skip
        """One warp: activations, 64 of K of a tile a stage."""
        k_groups = self.config.k_groups
        cute.arch.griddepcontrol_wait()
        slots = [Int32(0) for _ in range(k_groups)]  # each k group's next stage
        phases = [Int32(1) for _ in range(k_groups)]
        tiles = self.geometry.num_tiles(schedule, block_ends, out)
        for index in cutlass.range(cluster_id, tiles, num_clusters, unroll=1):
            _, first, _, _ = self.geometry.tile(index, schedule, block_ends, out)
            moved = cute.domain_offset((first, 0), tensor)
            tiles_of_k = cute.local_tile(moved, (self.geometry.tokens, STEP_K), (0, None))
            smem, gmem = cpasync.tma_partition(
                atom,
                0,
                cute.make_layout(1),
                cute.group_modes(self.geometry.activation_ring(base), 0, 2),
                cute.group_modes(tiles_of_k, 0, 2),
            )
            for first_step in cutlass.range(first_stage * STEPS, (first_stage + stages) * STEPS, STEPS, unroll=1):
                for in_stage in cutlass.range_constexpr(STEPS):
                    k_group = in_stage * k_groups // STEPS
                    slot = k_group * self.geometry.group_stages + slots[k_group]
                    cute.arch.mbarrier_wait(empty + slot, phases[k_group])
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(full + slot, self.geometry.activation_bytes)
                    cute.copy(atom, gmem[(None, first_step + in_stage)], smem[(None, slot)], tma_bar_ptr=full + slot)
                    slots[k_group] = slots[k_group] + 1
                    if slots[k_group] == self.geometry.group_stages:
                        slots[k_group] = Int32(0)
                        phases[k_group] = phases[k_group] ^ 1
