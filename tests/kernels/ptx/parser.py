"""Parses PTX: types, declarations, instructions, literals."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Types

DTYPES: dict[str, Any] = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool),
    "bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "e4m3x2": np.dtype("u2"),
    "e5m2x2": np.dtype("u2"), "e2m1x2": np.dtype("u1"), "u16x2": np.dtype("u4"), "s16x2": np.dtype("u4"),
}  # fmt: skip
UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


def bits_dtype(kind: str) -> Any:
    """How a register of a type is stored."""
    return DTYPES["pred"] if kind == "pred" else UNSIGNED[DTYPES[kind].itemsize]


# Parsing


@dataclass
class Scope:
    parent: Scope | None
    names: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def find(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None

    def label(self, name: str) -> int | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None


@dataclass
class Instruction:
    pc: int
    text: str
    opcode: str
    parts: list[str]  # of the opcode
    operands: list[str]
    predicate: str | None
    negated: bool
    scope: Scope

    def __str__(self) -> str:
        return f"instruction {self.pc}: {self.text}"


@dataclass
class Program:
    instructions: list[Instruction]
    registers: list[Any]  # dtype of each
    parameters: list[tuple[str, int, int]]  # name, size, alignment
    shared: list[tuple[str, int, int]]
    local: list[tuple[str, int, int]]
    constants: list[tuple[str, bytes]]
    dynamic: list[str]
    threads: int | None
    scope: Scope


def split_operands(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _variable(text: str) -> tuple[str, int | None, int, str | None, str]:
    """Name, bytes (None if of any size), alignment and initializer of ``.shared .align 8 .b8 name[16]``."""
    alignment = re.search(r"\.align\s+(\d+)", text)
    bare = re.sub(r"\.align\s+\d+", "", text)
    match = re.search(r"\.([a-z]\w*)\s+([$%\w]+)\s*(\[(\d*)\])?\s*(=.*)?$", bare.strip(), re.S)
    if match is None:
        raise NotImplementedError(f"PTX: {text}")
    kind, name, brackets, count, value = match.groups()
    size = DTYPES[kind].itemsize
    num_bytes = size if not brackets else None if not count else size * int(count)
    return name, num_bytes, int(alignment[1]) if alignment else size, value, kind


def parse(ptx: str) -> Program:
    """The one entry of a PTX module."""
    text = re.sub(r"/\*.*?\*/", " ", ptx, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file|version|target|address_size)\b[^\n]*", "", text, flags=re.M)
    entries = list(re.finditer(r"\.entry\s+([$\w]+)\s*\((.*?)\)([^{;]*)\{", text, re.S))
    if len(entries) != 1:
        raise ValueError(f"PTX: must have one .entry, got {len(entries)}")
    entry = entries[0]
    program = Program([], [], [], [], [], [], [], None, Scope(None))
    for declaration in split_operands(entry[2]):
        name, size, alignment, _, _ = _variable(declaration)
        program.parameters.append((name, size or 0, alignment))
        program.scope.names[name] = ("symbol", name)
    if threads := re.search(r"\.reqntid\s+([\d, ]+)", entry[3]):
        program.threads = int(np.prod([int(n) for n in threads[1].split(",")]))
    for statement in re.sub(r"\.visible\s*$", "", text[: entry.start()]).split(";"):
        if statement.strip():
            _declare(program, program.scope, statement.strip())
    _parse_body(program, text[entry.end() :])
    return program


def _declare(program: Program, scope: Scope, statement: str) -> None:
    if statement.startswith(".reg"):
        _, kind, names = statement.split(None, 2)
        dtype = bits_dtype(kind.removeprefix("."))
        for name in names.split(","):
            name = name.strip()
            many = re.match(r"(.*)<(\d+)>$", name)
            for each in [name] if many is None else [f"{many[1]}{i}" for i in range(int(many[2]))]:
                scope.names[each] = ("register", len(program.registers))
                program.registers.append(dtype)
        return
    if statement.startswith((".pragma", ".section", ".noreturn")):
        return
    name, size, alignment, value, kind = _variable(statement)
    scope.names[name] = ("symbol", name)
    if ".shared" in statement:
        if size is None:
            program.dynamic.append(name)
        else:
            program.shared.append((name, size, alignment))
    elif ".local" in statement:
        program.local.append((name, size or 0, alignment))
    elif ".global" in statement or ".const" in statement:
        data = np.zeros((size or 0) // DTYPES[kind].itemsize, bits_dtype(kind))
        if value is not None:
            numbers = [number(n, kind) for n in re.sub(r"[={}]", "", value).split(",")]
            data[: len(numbers)] = numbers
        program.constants.append((name, data.tobytes()))
    else:
        raise NotImplementedError(f"PTX: {statement}")


def _parse_body(program: Program, text: str) -> None:
    scope, at = Scope(program.scope), 0
    visible, label = re.compile(r"\S"), re.compile(r"([$\w.]+)\s*:(?!:)")
    while True:
        first = visible.search(text, at)
        if first is None:
            raise ValueError("PTX: the entry does not end")
        at = first.start()
        if text[at] == "{":
            scope, at = Scope(scope), at + 1
        elif text[at] == "}":
            assert scope.parent is not None
            scope, at = scope.parent, at + 1
            if scope is program.scope:
                return
        elif found := label.match(text, at):
            scope.labels[found[1]] = len(program.instructions)
            at = found.end()
        else:
            end = text.index(";", at)
            statement, at = " ".join(text[at:end].split()), end + 1
            if statement.startswith("."):
                _declare(program, scope, statement)
            elif statement:
                program.instructions.append(_instruction(len(program.instructions), statement, scope))


def _instruction(pc: int, text: str, scope: Scope) -> Instruction:
    predicate, negated, rest = None, False, text
    if match := re.match(r"@(!?)\s*([%$\w]+)\s+(.*)$", text):
        negated, predicate, rest = bool(match[1]), match[2], match[3]
    opcode, _, operands = rest.partition(" ")
    if "[" in opcode:
        opcode, bracket, tail = rest.partition("[")
        operands = bracket + tail
    return Instruction(pc, text, opcode, opcode.split("."), split_operands(operands), predicate, negated, scope)


def number(text: str, kind: str) -> int:
    """The bits of a literal, as an unsigned integer of the type's width."""
    text = text.strip()
    dtype = bits_dtype(kind)
    if kind == "pred":
        return int(text, 0) & 1
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        bits = int(text[2:], 16)
        return bits if kind != "f64" else int(np.array(bits, "u4").view("f4").astype("f8").view("u8"))
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        bits = int(text[2:], 16)
        return bits if kind != "f32" else int(np.array(bits, "u8").view("f8").astype("f4").view("u4"))
    if kind in ("f32", "f64", "f16"):
        return int(np.array(float(text), DTYPES[kind]).view(dtype))
    negative = text.startswith("-")
    digits = text.lstrip("-").rstrip("uU")
    value = int(digits, 8) if re.match(r"0[0-7]+$", digits) else int(digits, 0)
    return (-value if negative else value) & ((1 << 8 * dtype.itemsize) - 1)


_NUMBER = re.compile(r"-?(\d|0[xXbBfFdD])[0-9a-fA-FxX.]*([eE][+-]?\d+)?[uU]?$")
