"""Tracing models on the meta device, which ``explain`` and ``warm`` do to look at one without allocating it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import fake_tensor_tls
from torch.utils import _pytree as pytree


@contextmanager
def meta_constants(*inputs: Any) -> Iterator[None]:
    """Where an input is on the meta device, lets the traced function make constants there.

    ``torch.tensor(0.0, device="meta")`` in a compiled function (transformers 5.17 makes attention masks of it) is a
    tensor that Dynamo refuses as a real one, from torch 2.11 to 2.13. It holds no values and is safe to take for fake.
    """
    is_meta = any(leaf.device.type == "meta" for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    before = fake_tensor_tls.allow_non_fake_inputs_override
    if is_meta:
        fake_tensor_tls.allow_non_fake_inputs_override = True
    try:
        yield
    finally:
        fake_tensor_tls.allow_non_fake_inputs_override = before
