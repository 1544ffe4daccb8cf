"""What every operator owes a device that has no kernel."""

import pytest
import torch

from dsv4_compile import ops
from dsv4_compile.ops import registration

OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dsv4::"))


def test_all_operators_are_found() -> None:
    """Guards against an operator that is not exported, and the parametrised test below running over nothing."""
    names = {name.removeprefix("dsv4::").partition(".")[0] for name in OPERATORS}
    assert len(names) >= 6
    assert names <= set(ops.__all__)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_declared_for_every_device(name: str) -> None:
    """Guards against a silent fall-back on a GPU: each has a CPU reference, a fake, and for CUDA a kernel or an error."""
    for key in ("CPU", "Meta", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), key


def test_missing_kernel_names_operator_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an error that leaves the user to guess what would run the operator."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"^nvfp4_mm: no kernel for Tesla T4 \(sm_75\) .* CPU reference runs when"):
        registration._no_kernel("nvfp4_mm")()
