"""Weights that a quantiser wrote in the launch before: products read weights earlier than everything else.

With programmatic dependent launch a kernel may start before the one in front of it has stored its results.
Activations are read after ``griddepcontrol.wait``; weights before it, as constants. So a product whose weight comes
from a quantiser of this package in the very launch before has to be kept behind it, by an ordinary launch between
the two.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_state = threading.local()


def wrote(*tensors: Tensor) -> None:
    """Remembers what the launch that was just made writes: contiguous tensors."""
    _state.spans = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if not tensor.is_meta and tensor.nbytes]


def settle(*weights: Tensor) -> None:
    """Makes an ordinary launch if a weight lies in what was last written, so that it is complete before it is read."""
    spans: list[tuple[int, int]] = getattr(_state, "spans", [])
    if spans and any(0 <= weight.data_ptr() - start < num_bytes for weight in weights for start, num_bytes in spans):
        _launch_ordinary(weights[0].device)
        _state.spans = []


def _launch_ordinary(device: torch.device) -> None:
    torch.ones(1, device=device)  # waits for all before it, and the next launch for all of it
