"""Quantises a checkpoint again and again, kills each run with SIGKILL, starts it again, and compares what is left.

    python killed.py SOURCE FOLDER RUNS SEED

The work runs in forked children, so that torch is imported once. Half of the kills come at a random time, half at a
random call that makes something last (fsync, rename) or takes it away. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dsv4_compile.checkpoint.quantize import quantize_checkpoint

SHARD_BYTES = 240 << 10
KILLS_A_RUN = 2


def run(source: Path, destination: Path, kill_at_call: int = 0) -> int:
    """Quantises, in a child; kills itself at the n-th such call."""
    if kill_at_call:
        calls = 0

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def wrapper(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == kill_at_call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
    return quantize_checkpoint(source, destination, shard_bytes=SHARD_BYTES, search="six_four").resumed


def in_child(source: Path, destination: Path, kill_at_call: int = 0, delay_s: float = 0.0) -> tuple[bool, int]:
    """Whether the run was killed, and how many files it found finished."""
    child = os.fork()
    if child == 0:
        os._exit(run(source, destination, kill_at_call))
    if delay_s:
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), 0 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main(source: Path, folder: Path, runs: int, seed: int) -> None:
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    random.seed(seed)
    in_child(source, folder / "warm")
    start = time.perf_counter()
    in_child(source, folder / "undisturbed")
    duration_s = time.perf_counter() - start
    undisturbed = tree(folder / "undisturbed")
    shards = sum(name.endswith(".safetensors") for name in undisturbed)
    calls = 6 * shards  # those of an undisturbed run before it reads back
    result = {"shards": shards, "kills": 0, "resumed": [], "different": []}
    for number in range(runs):
        destination = folder / f"run{number}"
        latest = 1.0
        kills = 0
        while not kills:  # a run may end before its time comes
            shutil.rmtree(destination, ignore_errors=True)
            for attempt in range(KILLS_A_RUN):
                by_call = (number + attempt) % 2
                point = random.randint(1, calls >> attempt) if by_call else 0
                delay_s = 0.0 if by_call else random.uniform(0.001, latest * duration_s)
                kills += in_child(source, destination, point, delay_s)[0]
            latest /= 2
        killed, resumed = in_child(source, destination)
        result["kills"] += kills
        result["resumed"].append(resumed)
        if killed or tree(destination) != undisturbed:
            result["different"].append(number)
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
