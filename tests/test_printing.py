"""format_graph: a snapshot shows everything that changes what the program means, and nothing else."""

import operator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

from dsv4_compile.printing import format_graph, packed_part
from dsv4_compile.testing import capture

QUANTIZE = torch.ops.dsv4.quantize_nvfp4.default
MM = torch.ops.dsv4.nvfp4_mm.default
PARTS = ("codes", "block_scales", "global_scale")


class Program:
    """Builds a graph node by node, with real tensors as their values."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, value: Any, name: str = "x") -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def weight(self, number: int, n: int = 32, k: int = 64) -> list[fx.Node]:
        values = (
            torch.empty(n, k // 2, dtype=torch.uint8),
            torch.empty(n, k // 16, dtype=torch.float8_e4m3fn),
            torch.empty(()),
        )
        return [self.input(value, f"dsv4_weight_{number}_{part}") for part, value in zip(PARTS, values, strict=True)]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = target(
            *fx.map_arg(args, lambda n: n.meta["val"]), **fx.map_arg(kwargs, lambda n: n.meta["val"])
        )
        return node

    def quantize(self, x: fx.Node) -> list[fx.Node]:
        quantized = self.call(QUANTIZE, x, "tensor")
        return [self.call(operator.getitem, quantized, index) for index in range(3)]

    def returning(self, *results: Any) -> str:
        self.graph.output(results)
        return format_graph(self.graph)


def activation() -> torch.Tensor:
    return torch.ones(8, 64, dtype=torch.bfloat16)


def test_product_with_one_weight() -> None:
    """Guards against three results, or three parts of a weight, taking three names each."""
    program = Program()
    codes, scales, gs = program.weight(7)
    x = program.input(activation())
    y = program.call(MM, *program.quantize(x), [codes], [scales], [gs], None, torch.bfloat16)
    assert_expected_inline(
        program.returning(y),
        """\
w0: nvfp4[32, 64]
x0: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
return %1""",
    )


def test_lists_of_weights_that_disagree_are_written_out() -> None:
    """Guards against hiding that a product reads the codes of one weight with the scales of another."""
    program = Program()
    first, second = program.weight(0), program.weight(1)
    packed = program.quantize(program.input(activation()))
    codes, scales, gs = zip(first, second, strict=True)
    right = program.call(MM, *packed, list(codes), list(scales), list(gs), None, torch.bfloat16)
    wrong = program.call(MM, *packed, list(codes), list(scales), list(gs[::-1]), None, torch.bfloat16)
    assert_expected_inline(
        program.returning(right, wrong),
        """\
w0: nvfp4[32, 64]
w1: nvfp4[32, 64]
x0: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
%1: bf16[8, 64] = dsv4.nvfp4_mm(*%0, *[w0, w1], None, bf16)
%2: bf16[8, 64] = dsv4.nvfp4_mm(*%0, [w0.codes, w1.codes], [w0.block_scales, w1.block_scales], [w1.global_scale, w0.global_scale], None, bf16)
return %1, %2""",
    )


def test_results_in_another_order_are_written_out() -> None:
    """Guards against ``*%0`` for codes and scales of two quantisations, or for results in another order."""
    program = Program()
    a, b = (program.quantize(program.input(activation())) for _ in range(2))
    mixed = program.call(torch.ops.dsv4.dequantize_nvfp4.default, a[0], b[1], a[2], torch.bfloat16)
    whole = program.call(torch.ops.dsv4.dequantize_nvfp4.default, *a, torch.bfloat16)
    assert_expected_inline(
        program.returning(mixed, whole, b[2]),
        """\
x0: bf16[8, 64]
%0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
x1: bf16[8, 64]
%1: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x1, 'tensor')
%2: bf16[8, 64] = dsv4.dequantize_nvfp4(%0[0], %1[1], %0[2], bf16)
%3: bf16[8, 64] = dsv4.dequantize_nvfp4(*%0, bf16)
return %2, %3, %1[2]""",
    )


def test_numbers_of_two_digits() -> None:
    """Guards against taking %10 for %1 where names are abbreviated."""
    program = Program()
    x = program.input(activation())
    for _ in range(9):
        x = program.call(torch.ops.aten.neg.default, x)
    packed = program.quantize(x)
    again = program.quantize(program.call(torch.ops.aten.neg.default, x))
    y = program.call(torch.ops.dsv4.dequantize_nvfp4.default, *packed, torch.bfloat16)
    z = program.call(torch.ops.dsv4.dequantize_nvfp4.default, *again, torch.bfloat16)
    assert_expected_inline(
        "\n".join(program.returning(y, z).splitlines()[-6:]),
        """\
%9: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(%8, 'tensor')
%10: bf16[8, 64] = aten.neg(%8)
%11: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(%10, 'tensor')
%12: bf16[8, 64] = dsv4.dequantize_nvfp4(*%9, bf16)
%13: bf16[8, 64] = dsv4.dequantize_nvfp4(*%11, bf16)
return %12, %13""",
    )


def test_unused_inputs_are_neither_shown_nor_counted() -> None:
    """Guards against a snapshot that changes with a size that nothing reads."""
    program = Program()
    program.input(torch.empty(3))
    program.weight(0)
    used = program.input(torch.empty(3))
    assert program.returning(used) == "x0: f32[3]\nreturn x0"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "bf16"),
        (torch.float16, "f16"),
        (torch.float32, "f32"),
        (torch.float64, "f64"),
        (torch.float8_e4m3fn, "f8e4m3"),
        (torch.uint8, "u8"),
        (torch.int64, "i64"),
        (torch.bool, "bool"),
        (torch.complex64, "torch.complex64"),
    ],
)
def test_dtype(dtype: torch.dtype, name: str) -> None:
    """Guards against two dtypes that read alike."""
    program = Program()
    assert program.returning(program.input(torch.empty(2, 3, dtype=dtype))).startswith(f"x0: {name}[2, 3]\n")


def test_arguments() -> None:
    """Guards against keyword arguments, lists, None and scalars that a snapshot leaves out."""
    program = Program()
    x = program.input(torch.ones(2, 3))
    y = program.call(torch.ops.aten.addmm.default, x, x, program.input(torch.ones(3, 3)), beta=0.5)
    halves = program.call(torch.ops.aten.split.Tensor, y, 1)
    z = program.call(torch.ops.aten.cat.default, [program.call(operator.getitem, halves, 1), y])
    assert_expected_inline(
        program.returning(z, None, (x, 2)),
        """\
x0: f32[2, 3]
x1: f32[3, 3]
%0: f32[2, 3] = aten.addmm(x0, x0, x1, beta=0.5)
%1: (f32[1, 3], f32[1, 3]) = aten.split(%0, 1)
%2: f32[3, 3] = aten.cat([%1[1], %0])
return %2, None, [x0, 2]""",
    )


def test_symbols_are_numbered_as_they_appear() -> None:
    """Guards against Dynamo's names of sizes, which change with everything, in a snapshot."""
    x, y = torch.ones(4, 6), torch.ones(6, 5)
    _, (graph,) = capture(lambda x, y: (x @ y).flatten(), x, y, dynamic=True)
    assert_expected_inline(
        graph.after,
        """\
x0: Sym(s0)
x1: f32[s0, s1]
x2: Sym(s2)
x3: f32[s1, s2]
%0: f32[s0, s2] = aten.mm(x1, x3)
%1: Sym(s0*s2) = mul(x0, x2)
%2: f32[s0*s2] = aten.view(%0, [%1])
return %2""",
    )


def test_sizes_read_on_the_host_look_different() -> None:
    """Guards against a data-dependent size, which costs a synchronisation, passing for an input's size."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        _, (graph,) = capture(lambda x: x.nonzero() + 1, torch.ones(4, 6), dynamic=True)
    assert_expected_inline(
        graph.after,
        """\
x0: f32[s0, s1]
%0: i64[u0, 2] = aten.nonzero(x0)
%1: Sym(u0) = aten.sym_size(%0, 0)
%2: SymBool = ge(%1, 0)
%3: NoneType = aten._assert_scalar(%2, "Runtime assertion failed for expression u0 >= 0 on node 'ge'")
%4: i64[u0, 2] = aten.add(%0, 1)
return %4""",
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dsv4_weight_3_codes", ("3", "codes")),
        ("dsv4_weight_12_block_scales", ("12", "block_scales")),
        ("dsv4_weight_0_global_scale", ("0", "global_scale")),
        ("dsv4_weight_0_codes_1", None),
        ("weight", None),
    ],
)
def test_packed_part(name: str, expected: tuple[str, str] | None) -> None:
    """Guards against taking a model's own buffer for a bound weight."""
    node = fx.Graph().placeholder(name)
    node.target = name
    assert packed_part(node) == expected
