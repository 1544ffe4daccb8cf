"""What the emulation of the Hopper kernels sees: each mistake of a host that it is there for, made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsv4_compile import nvfp4
from dsv4_compile.ops.dispatch import decode_choice, decode_mm, fresh_weights, grouped_wgmma
from dsv4_compile.ops.dispatch.decode_choice import choose
from dsv4_compile.ops.dispatch.expand import expand
from dsv4_compile.ops.dispatch.moe_align import align
from dsv4_compile.ops.dispatch.moe_combine import combine
from dsv4_compile.ops.dispatch.moe_requantize import requantize
from dsv4_compile.ops.dispatch.quantizer import RowsConfig
from dsv4_compile.ops.kernels import cache
from dsv4_compile.ops.registration import CUDA_IMPLEMENTATIONS
from tests.kernels.emulation import LAYOUTS, emulated_hopper, stored

ops = torch.ops.dsv4
BF16 = torch.bfloat16


def test_arguments_that_a_launch_refuses() -> None:
    """Guards against checks that let pass what TVM FFI does not: alignment, dtype, rank, sizes, strides, range."""
    config = choose(2, (16,), 256, "packed", False, BF16, True)
    a, b = nvfp4.quantize(torch.randn(2, 256)), nvfp4.quantize(torch.randn(16, 256))
    given = [*a[:2], a[2].view(1), [b[0]], [b[1]], [b[2].view(1)], b[2].view(1), torch.empty(2, 16, dtype=BF16), 1]
    wrong = [
        (0, a[0].int(), "must be .*Uint8"),
        (0, stored(a[0], "offset"), "aligned to 16 bytes"),
        (0, a[0].view(1, 2, 128), "must have rank 2"),
        (0, a[0][:, :64], r"shape\[1\] must be divisible by 128"),
        (0, stored(a[0], "padded"), r"stride\[0\] must be 128, got 144"),
        (1, a[1][:, :8].contiguous(), r"shape\[1\] must be divisible by 16"),
        (3, [b[0], b[0]], "must hold 1 tensors"),
        (5, [b[2]], "must have rank 1"),
        (8, 1 << 31, "must be Int32"),
        (8, 1.0, "must be Int32"),
    ]
    with emulated_hopper() as trace:
        launch = cache.kernel("sm90.decode_mm", config)
        launch(*given)
        for place, value, message in wrong:
            with pytest.raises(AssertionError, match=message):
                launch(*given[:place], value, *given[place + 1 :])
        with pytest.raises(AssertionError, match="takes 9 arguments, got 8"):
            launch(*given[:8])
    assert trace.names == ["decode_mm.dense"]


def test_strides_of_one_row_do_not_matter() -> None:
    """Guards against operands refused that a launch takes: torch leaves any stride to a size of 1."""
    config = choose(1, (16,), 256, "packed", False, BF16, True)
    a, b = nvfp4.quantize(torch.randn(1, 256)), nvfp4.quantize(torch.randn(16, 256))
    x = a[0].as_strided((1, 128), (7, 1))
    with emulated_hopper():
        out = torch.empty(1, 16, dtype=BF16)
        decode_mm.decode_mm(config, x, a[1], a[2].view(1), [b[0]], [b[1]], [b[2].view(1)], None, out)
    assert torch.equal(out, nvfp4.matmul(nvfp4.scaled_codes(*a[:2], torch.float64), a[2], *b).to(BF16))


def test_host_reads() -> None:
    """Guards against a value that the host waits for."""
    x = torch.ones(3)
    for read in (lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x.nonzero(), lambda: x.tolist()):
        with emulated_hopper(), pytest.raises(AssertionError, match="the host reads a value"):
            read()


def test_memory_is_poisoned() -> None:
    """Guards against results that are right because memory happened to be."""
    with emulated_hopper():
        fresh = [
            torch.empty(3),
            torch.ones(2).new_empty(4, dtype=torch.int32),
            torch.empty_like(torch.ones(2, dtype=BF16)),
        ]
        codes, scales, _ = nvfp4.quantize(torch.ones(2, 16))
        rows = expand(codes, scales, torch.tensor([1, -1], dtype=torch.int32))
    assert fresh[0].isnan().all()
    assert fresh[1].eq(-1).all()
    assert fresh[2].isnan().all()
    assert rows.isnan().all(1).tolist() == [False, True]


def test_tiles_outside() -> None:
    """Guards against a schedule that was made for more rows, more experts or other tiles, or not at all."""
    codes, scales, scale = nvfp4.quantize_weight(torch.randn(2, 16, 256))
    x, out = torch.randn(12, 256).to(BF16), torch.empty(12, 16)

    def multiply(rows: list[list[int]], tile_rows: int) -> None:
        schedule = torch.tensor([*rows, [-1] * 4], dtype=torch.int32)
        if tile_rows == 8:
            config = decode_choice.choose_grouped(decode_choice.GROUPED_FEW, 256, False, False, False, torch.float32)
            decode_mm.grouped_decode_mm(config, x, None, scale[:1], codes, scales, scale.view(2, 1), schedule, out)
        else:
            grouped_wgmma.grouped_wgmma(x.half(), None, codes, scales, scale, schedule, tile_rows, out)

    for tile_rows in (8, 16):
        with emulated_hopper():
            multiply([[1, 12, 0, 0], [1, 3, 8, 0]], tile_rows)
        assert out[3:11].isfinite().all()
        for tile in ([2, 3, 8, 0], [0, 5, 8, 0], [-1, 0, 1, 0], [0, 0, 0, 0]):
            with emulated_hopper(), pytest.raises(AssertionError, match="outside 2 experts, 12 rows"):
                multiply([[1, 12, 0, 0], tile], tile_rows)
        with emulated_hopper(), pytest.raises(AssertionError, match="schedule of 2 tiles says 3"):
            multiply([[3, 12, 0, 0], [1, 3, 8, 0]], tile_rows)
    with emulated_hopper(), pytest.raises(AssertionError, match="tile of 9 rows, room for 8"):
        multiply([[1, 12, 0, 0], [1, 3, 9, 0]], 8)


def test_rows_of_nobody_stay_as_they_are() -> None:
    """Guards against kernels that write more than those on a GPU do, which would hide a host that counts on it."""
    with emulated_hopper():
        alignment = align(torch.tensor([[4, 1], [1, -1]]), 3, 8, weights=torch.ones(2, 2))
        h = torch.ones(4, 16)
        scaled, _ = requantize(h, torch.ones(3), alignment.schedule, "tensor")
        out = torch.empty(2, 16)
        combine(torch.full((4, 16), 2.0), alignment.row_of_slot, torch.ones(2, 2), 2, out)
    assert alignment.sorted_slots.tolist() == [1, 2, -1, -1]
    assert alignment.row_of_slot.tolist() == [-1, 0, 1, -1]
    assert alignment.schedule.tolist() == [[1, 2, 0, 0], [1, 0, 2, 0], [-1] * 4, [-1] * 4]
    assert alignment.row_weight is not None
    assert alignment.row_weight.isnan().tolist() == [False, False, True, True]
    assert scaled.isnan().all(1).tolist() == [False, False, True, True]
    assert out[:, 0].tolist() == [2.0, 2.0]


def test_order_of_launches() -> None:
    """Guards against an ordering seen where there is none, and races seen where there are none.

    A quantiser lets the next kernel start after its own wait; a product before it, so that two launches later the
    quantiser may still run. An ordinary launch waits for all before it.
    """
    matrix, other = torch.randn(16, 256).to(BF16), nvfp4.quantize(torch.randn(16, 256))
    a = nvfp4.quantize(torch.randn(1, 256))
    out = torch.empty(1, 16, dtype=BF16)
    config = choose(1, (16,), 256, "packed", False, BF16, True)

    def multiply(weight: tuple[torch.Tensor, ...]) -> None:
        parts = [weight[0]], [weight[1]], [weight[2].view(1)]
        decode_mm.decode_mm(config, *a[:2], a[2].view(1), *parts, None, out)

    def quantized() -> tuple[torch.Tensor, ...]:
        return CUDA_IMPLEMENTATIONS[ops.quantize_nvfp4.default](matrix, "tensor")

    for between in ((), (lambda: multiply(other),), (lambda: multiply(other),) * 3):
        with emulated_hopper():
            weight = quantized()
            for launch in between:
                launch()
            with pytest.raises(
                AssertionError, match=r"decode_mm .* reads what sm90.quantize_nvfp4 .* not have written"
            ):
                multiply(weight)
    settling: list[Callable[[torch.Tensor], object]] = [
        lambda codes: quantized(), lambda codes: matrix.add(1), lambda codes: fresh_weights.settle(codes)
    ]  # fmt: skip
    for settle in settling:
        with emulated_hopper():
            weight = quantized()
            settle(weight[0])
            multiply(weight)


def test_one_maximum_over_all_rows() -> None:
    """Guards against rows of a second CTA that would take a maximum of their own, unseen."""
    x = torch.randn(9, 16).to(BF16)
    outputs = torch.empty(72, dtype=torch.uint8), torch.empty(9, dtype=torch.uint8), torch.empty(1)
    geometry = 9, 0x8E38E38F, 4, 0, 32, 0, 32
    kernel_arguments = x[0], x[0], *outputs, x.new_empty(0), 9, 1, *geometry, 0.0, 0
    with emulated_hopper(), pytest.raises(AssertionError, match="one maximum over 9 rows, 8 are held"):
        cache.kernel("sm90.quantize_nvfp4", RowsConfig("bfloat16", 64, 1))(*kernel_arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 16), (2, 3, 4), (0, 3), (3, 0)], ids=str)
def test_layouts(shape: tuple[int, ...], layout: str) -> None:
    """Guards against layouts that are all the same, and values that change."""
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.float32, torch.int64):
        x = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).to(dtype)
        y = stored(x, layout)
        assert torch.equal(y.float(), (x[:1].expand(shape) if layout == "repeated" and shape else x).float())
    if shape == (2, 3, 4):
        strides = {"contiguous": (12, 4, 1), "offset": (12, 4, 1), "columns apart": (24, 8, 2), "rows apart": (24, 4, 1), "padded": (60, 20, 1), "odd pitch": (15, 5, 1), "transposed": (1, 2, 6), "repeated": (0, 4, 1)}  # fmt: skip
        assert y.stride() == strides[layout]
        assert (y.data_ptr() % 16 == 0) == (layout != "offset")
