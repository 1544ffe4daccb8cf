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

    Example:
        >>> print(format_graph(graph))
        x: bf16[8, 64]
        %0: (u8[8, 32], f8e4m3[8, 4], f32[]) = dsv4.quantize_nvfp4(x, 'tensor')
        ...
        return %5
    """
    printer = _Printer()
    lines = [line for node in graph.nodes if (line := printer.line(node)) is not None]
    return "\n".join(lines)


class _Printer:
    def __init__(self) -> None:
        self.names: dict[fx.Node, str] = {}
        self.symbols: dict[str, str] = {}

    def line(self, node: fx.Node) -> str | None:
        if node.op == "output":
            results = node.args[0]
            results = results if isinstance(results, (tuple, list)) else (results,)
            return "return " + ", ".join(self.argument(result) for result in results)
        if node.op in ("placeholder", "get_attr"):
            self.names[node] = str(node.target)
            kind = self.type_of(node.meta["val"]) if "val" in node.meta else "graph"
            return f"{node.target}: {kind}"
        if node.target is operator.getitem:
            self.names[node] = f"{self.argument(node.args[0])}[{node.args[1]}]"
            return None
        arguments = [self.argument(argument) for argument in node.args]
        arguments += [f"{name}={self.argument(argument)}" for name, argument in node.kwargs.items()]
        number = sum(1 for name in self.names.values() if re.fullmatch(r"%\d+", name))
        self.names[node] = f"%{number}"
        return f"%{number}: {self.type_of(node.meta.get('val'))} = {_target(node.target)}({', '.join(arguments)})"

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
            sizes = ", ".join(self.symbol(size) if isinstance(size, torch.SymInt) else str(size) for size in value.shape)
            return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(self.type_of(item) for item in value) + ")"
        if isinstance(value, torch.SymInt):
            return f"Sym({self.symbol(value)})"
        return type(value).__name__

    def symbol(self, size: Any) -> str:
        """Symbols are numbered s0, s1 ... in the order they appear, whatever Dynamo called them."""
        return re.sub(r"\b[su]\d+\b", lambda m: self.symbols.setdefault(m[0], f"s{len(self.symbols)}"), str(size))


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))
