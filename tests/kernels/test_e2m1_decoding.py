"""The integer steps by which kernels decode e2m1 codes, run with NumPy on every combination of codes and scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from dsv4_compile.ops.kernels.sm90 import e2m1_decoding
from tests import nvfp4_oracle as oracle

Words = npt.NDArray[np.uint32]
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
CODES = np.array([*oracle.E2M1_TABLE, *(-value for value in oracle.E2M1_TABLE)])
HALVES = np.arange(1 << 16, dtype=np.uint32)


class Machine:
    """32-bit registers that wrap around, as ``instructions.Decoder`` has them."""

    def __init__(self, dtype: str) -> None:
        self.multipliers = e2m1_decoding.MULTIPLIERS[dtype]

    def mask(self, word: Words, bits: int) -> Words:
        return word & np.uint32(bits)

    def multiply_add(self, word: Words, multiplier: int, addend: int) -> Words:
        assert multiplier in self.multipliers
        return word * np.uint32(multiplier) + np.uint32(addend)

    def subtract(self, a: Words, b: Words) -> Words:
        assert e2m1_decoding.MINUS_ONE in self.multipliers
        return a - b

    def shift_left(self, word: Words, bits: int) -> Words:
        return word << np.uint32(bits)

    def permute(self, a: Words, b: Words, selector: int) -> Words:
        """prmt: a byte of the eight of (b, a) for each of the selector's nibbles, or its sign in all bits."""
        result = np.zeros_like(a)
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = (b if nibble & 4 else a) >> np.uint32(8 * (nibble & 3)) & np.uint32(0xFF)
            if nibble & 8:
                byte = (byte >> np.uint32(7)) * np.uint32(0xFF)
            result |= byte << np.uint32(8 * i)
        return result

    def shift_right(self, word: Words, bits: int) -> Words:
        return word >> np.uint32(bits)

    def shift_right_add(self, word: Words, bits: int, addend: int) -> Words:
        return (word >> np.uint32(bits)) + np.uint32(addend)


def all_words() -> Words:
    """Each four codes as either half of a word, beside halves that could carry into them or take from them."""
    rng = np.random.default_rng(0)
    others = [0, 0xFFFF, 0x8888, 0x7777, 0xF0F0, 0x0F0F, HALVES, HALVES ^ 0xFFFF, rng.permutation(HALVES)]
    words = [HALVES | other << 16 for other in others] + [HALVES << 16 | other for other in others]
    return np.concatenate(words).astype(np.uint32)


def values_of(register: Words, dtype: str) -> tuple[Tensor, Tensor]:
    """The two values of each register, the low half first."""
    halves = (register & np.uint32(0xFFFF), register >> np.uint32(16))
    low, high = (torch.from_numpy(half.astype(np.uint16).view(np.int16)).view(DTYPES[dtype]) for half in halves)
    return low, high


def code_values(words: Words, position: int) -> Tensor:
    return torch.from_numpy(CODES[words >> np.uint32(4 * position) & np.uint32(15)])


def scale_factor(byte: int, dtype: str) -> Tensor:
    """``instructions.decode_two_scales``."""
    scale = torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float16)
    if dtype == "f16":
        return scale
    factor = np.array([e2m1_decoding.BF16_SCALE_FACTOR], dtype=np.uint32)
    low, high = values_of(factor, dtype)
    assert torch.equal(low, high)
    return scale.float().bfloat16() * low


def decode(words: Words, dtype: str) -> Sequence[Words]:
    machine: Any = Machine(dtype)
    with np.errstate(over="ignore"):
        decoded: Sequence[Words] = e2m1_decoding.DECODE[dtype](machine, words)
    return decoded


def position(register: int, half: int, dtype: str) -> int:
    """Of the code in a half of a register: words decode to pairs (0, 4) (1, 5) (2, 6) (3, 7), or as they lie."""
    return register + 4 * half if dtype == "f16" else 2 * register + half


@pytest.mark.parametrize(("dtype", "exponent"), [("f16", -14), ("bf16", -126)])
def test_codes(dtype: str, exponent: int) -> None:
    """Guards against a carry that reaches a neighbour, a sign that is lost and a bit that a mask keeps."""
    words = all_words()
    for i, register in enumerate(decode(words, dtype)):
        for half, value in enumerate(values_of(register, dtype)):
            expected = code_values(words, position(i, half, dtype))
            assert torch.equal(value.double(), expected * 2.0**exponent)
            assert torch.equal(value.signbit(), expected.signbit())  # -0 too


@pytest.mark.parametrize("byte", range(4))
def test_byte_of_a_word(byte: int) -> None:
    """Guards against a neighbour's nibble that a permutation or a shift brings along."""
    words, machine = all_words(), Machine("bf16")
    register = e2m1_decoding.decode_byte_of(machine, words, e2m1_decoding.byte_selector(byte))
    assert np.array_equal(register & np.uint32(e2m1_decoding.SIGN | e2m1_decoding.BF16_MAGNITUDE), register)
    for half, value in enumerate(values_of(register, "bf16")):
        expected = code_values(words, 2 * byte + half)
        assert torch.equal(value.double(), expected * 2.0**-126)
        assert torch.equal(value.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_products(dtype: str) -> None:
    """Guards against a product of code and scale that is rounded, flushed to zero or overflows, and against a lost NaN."""
    words = HALVES | (HALVES[::-1] << np.uint32(16))
    decoded = [value for register in decode(words, dtype) for value in values_of(register, dtype)]
    codes = [code_values(words, position(i, half, dtype)) for i in range(4) for half in range(2)]
    for byte in range(256):
        factor = scale_factor(byte, dtype)
        scale = oracle.E4M3_TABLE[byte & 127] if byte & 127 < 127 else float("nan")
        scale = -scale if byte > 127 else scale
        for value, code in zip(decoded, codes, strict=True):
            product = value * factor
            if np.isnan(scale):
                assert product.isnan().all()
            else:
                assert torch.equal(product.double(), code * (scale * 2.0**-14)), f"scale byte {byte:#x}"


def test_bf16_rows_of_grouped_products_are_exact_in_f16() -> None:
    """Guards against a block scale at which code * scale leaves f16: every code times every scale, both ways."""
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    exact = scales[:, None] * torch.cat([codes, -codes])
    stored = exact.bfloat16()
    is_number = ~exact.isnan()
    assert torch.equal(stored.float()[is_number], exact[is_number])
    assert torch.equal(stored.half().float()[is_number], exact[is_number])
    assert stored.half().isnan().equal(exact.isnan())
