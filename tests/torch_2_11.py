"""What torch 2.11 itself cannot do: the tests that need it check that this is the reason, and end as xfailed there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._inductor.exc import InductorError

IS_TORCH_2_11 = torch.__version__.startswith("2.11.")


@contextmanager
def packed_region() -> Iterator[None]:
    """Around the compilation of a repeated region that is called with a packed weight."""
    if not IS_TORCH_2_11:
        yield
        return
    with pytest.raises(AssertionError, match=r"Expected FakeTensor, got .*Nvfp4Tensor"):
        yield
    pytest.xfail("Dynamo 2.11 takes no tensor subclass into a repeated region")


def region_in_a_region(model: Callable[..., object], *inputs: object) -> None:
    """Before a model with a repeated region in a repeated region is compiled."""
    if IS_TORCH_2_11:
        with pytest.raises(InductorError, match="both a fallback and a decomp for same op"), torch.inference_mode():
            torch.compile(model, backend="inductor")(*inputs)
        pytest.xfail("Inductor 2.11 compiles no repeated region in a repeated region")
