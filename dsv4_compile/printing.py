"""Prints an FX graph as a program, one operation a line: for dumps, the demo and snapshot tests."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

_DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float8_e4m3fn: "f8e4m3",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}


def format_graph(graph: fx.Graph) -> str:
    """Formats a graph: inputs with their types, numbered results, tuple results indexed where they are read.

    Inputs are x0, x1 ... and weights w0, w1 ... in order; ``*%0`` stands for the three results of ``%0``, ``*w0`` for
    the three parts of a packed weight, ``*[w0, w1]`` for the three lists of theirs. Unused inputs are not shown.

    Example:
        >>> print(format_graph(graph))
        w0: nvfp4[32, 64]
        x0: bf16[8, 64]
        %0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x0, 'tensor')
        %1: bf16[8, 32] = dsv4.nvfp4_mm(*%0, *[w0], None, bf16)
        return %1
    """
    printer = _Printer()
    lines = [line for node in graph.nodes if (line := printer.line(node)) is not None]
    return "\n".join(lines)


class _Printer:
    def __init__(self) -> None:
        self.names: dict[fx.Node, str] = {}
        self.symbols: dict[str, str] = {}
        self.weights: dict[str, str] = {}
        self.num_inputs = 0
        self.num_results = 0

    def line(self, node: fx.Node) -> str | None:
        if node.op == "output":
            results = node.args[0]
            results = results if isinstance(results, (tuple, list)) else (results,)
            return "return " + ", ".join(self.argument(result) for result in results)
        if node.op in ("placeholder", "get_attr"):
            return self.input(node)
        if node.target is operator.getitem:
            self.names[node] = f"{self.argument(node.args[0])}[{node.args[1]}]"
            return None
        arguments = [self.argument(argument) for argument in node.args]
        arguments += [f"{name}={self.argument(argument)}" for name, argument in node.kwargs.items()]
        self.names[node] = f"%{self.num_results}"
        self.num_results += 1
        call = f"{_target(node.target)}({_abbreviate(', '.join(arguments))})"
        return f"{self.names[node]}: {self.type_of(node.meta.get('val'))} = {call}"

    def input(self, node: fx.Node) -> str | None:
        part = packed_part(node)
        if part is not None:
            number, name = part
            weight = self.weights.setdefault(number, f"w{len(self.weights)}")
            self.names[node] = f"{weight}.{name}"
            if name != "codes" or not node.users:
                return None
            *lead, half = node.meta["val"].shape
            return f"{weight}: nvfp4[{', '.join(str(size) for size in (*lead, 2 * half))}]"
        if "val" not in node.meta:
            self.names[node] = str(node.target)
            return None
        if not node.users:
            return None
        self.names[node] = f"x{self.num_inputs}"
        self.num_inputs += 1
        return f"{self.names[node]}: {self.type_of(node.meta['val'])}"

    def argument(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return self.names[argument]
        if isinstance(argument, (list, tuple)):
            return "[" + ", ".join(self.argument(item) for item in argument) + "]"
        if isinstance(argument, torch.dtype):
            return _DTYPES.get(argument, str(argument))
        if isinstance(argument, torch.SymInt):
            return self.symbol(argument)
        return repr(argument)

    def type_of(self, value: Any) -> str:
        if isinstance(value, Tensor):
            shape: list[Any] = list(value.shape)
            sizes = ", ".join(self.symbol(size) if isinstance(size, torch.SymInt) else str(size) for size in shape)
            return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(self.type_of(item) for item in value) + ")"
        if isinstance(value, torch.SymInt):
            return f"Sym({self.symbol(value)})"
        return type(value).__name__

    def symbol(self, size: Any) -> str:
        """Numbers symbols in the order they appear: s0, s1 ... for sizes, u0, u1 ... for values read on the host."""

        def number(match: re.Match[str]) -> str:
            known = sum(name.startswith(match[1]) for name in self.symbols.values())
            return self.symbols.setdefault(match[0], f"{match[1]}{known}")

        return re.sub(r"\b([su])\d+\b", number, str(size))


def packed_part(node: fx.Node) -> tuple[str, str] | None:
    """Number and part name of a bound weight's buffer, ``("3", "codes")``; None for any other node."""
    target = getattr(node.meta.get("desc"), "target", node.target)
    match = re.fullmatch(r"dsv4_weight_(\d+)_(codes|block_scales|global_scale)", str(target))
    return (match[1], match[2]) if match else None


def _abbreviate(arguments: str) -> str:
    """Writes three results, or the three parts of packed weights, as one starred name."""
    arguments = re.sub(r"(%\d+)\[0\], \1\[1\], \1\[2\]", r"*\1", arguments)
    arguments = re.sub(r"(w\d+)\.codes, \1\.block_scales, \1\.global_scale", r"*\1", arguments)

    def lists(match: re.Match[str]) -> str:
        names = [re.findall(r"\w+(?=\.)", part) for part in match.groups()]
        return f"*[{', '.join(names[0])}]" if names[0] == names[1] == names[2] else match[0]

    return re.sub(
        r"\[((?:w\d+\.codes(?:, )?)+)\], \[((?:w\d+\.block_scales(?:, )?)+)\], \[((?:w\d+\.global_scale(?:, )?)+)\]",
        lists,
        arguments,
    )


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))
