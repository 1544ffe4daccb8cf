"""Which of several variants a product runs on: what was measured on this GPU, else what a table says.

Dispatch asks a :class:`Question`: a shape, the variants that can run it, and the one that the tables of this package
choose. The answer is the variant that ``dsv4-compile tune`` or ``mode="max-autotune"`` found to be the fastest on this
model of GPU (:mod:`dsv4_compile.tuning`), if they looked, else the table's. What they found lies beside the kernels,
one file for each model of GPU, named after the kernels' sources: other kernels make it void.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_compile.ops.dispatch.decode_choice import TOKEN_SLOTS
from dsv4_compile.ops.kernels import cache

log = logging.getLogger("dsv4_compile")

STEPS_A_DOUBLING = 8


def bucket(tokens: int) -> int:
    """The number of tokens or rows that an answer is filed under: the next of 1, 2, 4, 8, 16, 24, 32, 36, 40, 44..."""
    if tokens <= TOKEN_SLOTS[-1]:
        return next(size for size in TOKEN_SLOTS if size >= tokens)
    step = (1 << ((tokens - 1).bit_length() - 1)) // STEPS_A_DOUBLING
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Question:
    """What may run a product.

    Attributes:
        key: the shape, its number of tokens by :func:`bucket`; the same key means the same question.
        variants: name -> what the asker runs by it. Names mean the same for every shape.
        default: the name of the table's choice.
    """

    key: str
    variants: Mapping[str, Any]
    default: str

    def __post_init__(self) -> None:
        assert self.default in self.variants, (self.key, self.default)


@dataclass(frozen=True)
class Answer:
    """What was measured for a question.

    Attributes:
        variant: the fastest, or the table's where none is clearly faster.
        us: its time, of the whole operator.
        default: the table's variant.
        default_us: its time in the same run.
    """

    variant: str
    us: float
    default: str
    default_us: float


_asked: list[dict[str, Question]] = []
_forced: list[tuple[str, str]] = []


def answer(question: Question, like: Tensor) -> Any:
    """The variant that runs on the device of ``like``; on the meta device the table's."""
    if _asked:
        _asked[-1][question.key] = question
    for key, name in reversed(_forced):
        if key == question.key:
            return question.variants[name]
    if like.is_cuda:
        found = answers(_gpu(like.get_device())).get(question.key)
        if found is not None and found.variant in question.variants:
            return question.variants[found.variant]
    return question.variants[question.default]


@contextlib.contextmanager
def asking() -> Iterator[dict[str, Question]]:
    """Collects the questions that are asked, by their keys."""
    asked: dict[str, Question] = {}
    _asked.append(asked)
    try:
        yield asked
    finally:
        _asked.remove(asked)


@contextlib.contextmanager
def forced(key: str, name: str) -> Iterator[None]:
    """Answers one question by this variant whatever was measured."""
    _forced.append((key, name))
    try:
        yield
    finally:
        _forced.remove((key, name))


@functools.cache
def _gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def answers(gpu: str) -> dict[str, Answer]:
    """What was measured on a model of GPU, read once a process."""
    return _read(path_of(gpu))


def path_of(gpu: str) -> Path:
    """The file of a model of GPU, which need not exist."""
    name = re.sub(r"\W+", "-", gpu).strip("-")
    return cache.folder() / f"tuned-{name}-{sources_digest()}.json"


@functools.cache
def sources_digest() -> str:
    """Digest over the kernels and over what chooses and launches them."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for source in sorted([*root.glob("kernels/sm90/*.py"), *root.glob("dispatch/*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def _read(path: Path) -> dict[str, Answer]:
    try:
        return {key: Answer(**found) for key, found in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("tuning: %s cannot be read and counts as empty: %s", path, error)
        return {}


def record(gpu: str, found: Mapping[str, Answer]) -> Path:
    """Adds answers to the file of a model of GPU, whole or not at all, and to what this process uses.

    Safe under concurrent processes: what another one recorded meanwhile stays.
    """
    path = path_of(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        merged = {**_read(path), **found}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
            with open(Path(scratch) / path.name, "w", encoding="utf-8") as file:
                json.dump({key: asdict(merged[key]) for key in sorted(merged)}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            Path(file.name).replace(path)
    answers(gpu).update(merged)
    return path
