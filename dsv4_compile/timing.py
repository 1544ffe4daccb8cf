"""Times short GPU kernels: CUDA-graph replay, inputs rotated through more than the L2, variants interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

L2_BYTES = 64 << 20  # more than the 50 MB of an H100 and the 60 MB of an H200


@dataclass(frozen=True)
class Timing:
    """Time of one call in us over the replays: median, lowest and highest."""

    median_us: float
    min_us: float
    max_us: float


def copies_beyond_l2(num_bytes: int, most: int = 64) -> int:
    """How many copies of inputs of ``num_bytes`` leave no call an input that the L2 still holds."""
    return max(2, min(most, -(-3 * L2_BYTES // max(1, num_bytes))))


def time_variants(
    variants: Mapping[str, list[Callable[[], Any]]], replays: int = 20, warm_up: int = 3
) -> dict[str, Timing]:
    """Times each variant by replaying a CUDA graph of all its calls, the variants interleaved.

    Args:
        variants: name -> its calls, one for each copy of the inputs; a graph holds them one after the other.
        replays: timed replays a variant.
        warm_up: replays before those.

    Returns:
        name -> time of one call.
    """
    graphs = {name: _capture(calls) for name, calls in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for replay in range(warm_up + replays):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= warm_up:
                times[name].append(start.elapsed_time(end) * 1e3 / len(variants[name]))
    return {name: Timing(statistics.median(t), min(t), max(t)) for name, t in times.items()}


def _capture(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph
