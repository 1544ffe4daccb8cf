"""Clean-up: views that do nothing disappear, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from dsv4_compile.testing import capture


def test_view_of_a_view() -> None:
    """Guards against a chain of views that Inductor would have to look through."""
    x = torch.randn(2, 4, 6)
    result, (graph,) = capture(lambda x: (x + 1).view(8, 6).view(4, 12).view(48), x)
    assert_expected_inline(
        graph.after,
        """\
x0: f32[2, 4, 6]
%0: f32[2, 4, 6] = aten.add(x0, 1)
%1: f32[48] = aten.view(%0, [48])
return %1""",
    )
    assert torch.equal(result, (x + 1).view(48))


def test_view_back_to_the_same_shape() -> None:
    """Guards against the pair of views around a linear's product staying in the graph."""
    x = torch.randn(2, 4, 6)
    result, (graph,) = capture(lambda x: (x + 1).view(8, 6).view(2, 4, 6) * 2, x)
    assert_expected_inline(
        graph.after,
        """\
x0: f32[2, 4, 6]
%0: f32[2, 4, 6] = aten.add(x0, 1)
%1: f32[2, 4, 6] = aten.mul(%0, 2)
return %1""",
    )
    assert torch.equal(result, (x + 1) * 2)


def test_view_of_a_symbolic_shape() -> None:
    """Guards against sizes that are equal for every input not being seen to be."""
    x = torch.randn(2, 4, 6)
    result, (graph,) = capture(lambda x: (x + 1).flatten(0, 1).view(x.shape) * 2, x, dynamic=True)
    assert graph.after.splitlines()[-1] == "return %1"
    assert torch.equal(result, (x + 1) * 2)


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "view read twice": lambda x: (lambda v: v.sum(-1) + v.view(2, 4, 6).sum(-1).view(8))((x + 1).view(8, 6)),
    "transpose between": lambda x: (x + 1).view(8, 6).t().reshape(2, 4, 6),
    "same number of elements": lambda x: (x + 1).view(4, 2, 6),
    "other dtype": lambda x: (x + 1).view(torch.int32).view(8, 6).view(2, 4, 6).view(torch.float32),
    "view of the input": lambda x: x.view(8, 6).view(2, 4, 6) + 0,
    "scalar": lambda x: x.sum().view(1).view(1, 1).view(()),
    "one element": lambda x: x[:1, :1, :1].reshape(1).reshape(()).view(1),
}


@pytest.mark.parametrize("case", KEPT)
def test_result_is_unchanged(case: str) -> None:
    """Guards against taking away a view that means something."""
    x = torch.randn(2, 4, 6)
    result, _ = capture(KEPT[case], x)
    assert result.shape == KEPT[case](x).shape
    torch.testing.assert_close(result, KEPT[case](x))


def test_view_that_is_needed_stays() -> None:
    """Guards against a view that is dropped because its source is as large."""
    x = torch.randn(2, 4, 6)
    _, (graph,) = capture(lambda x: (x + 1).view(4, 2, 6), x)
    assert_expected_inline(
        graph.after,
        """\
x0: f32[2, 4, 6]
%0: f32[2, 4, 6] = aten.add(x0, 1)
%1: f32[4, 2, 6] = aten.view(%0, [4, 2, 6])
return %1""",
    )
    assert graph.counts == {}


def test_input_viewed_as_itself_and_returned() -> None:
    """Guards against returning the caller's own tensor where a view of it was asked for."""
    x = torch.randn(2, 4, 6)
    result, _ = capture(lambda x: x.view(8, 6).view(2, 4, 6), x)
    assert torch.equal(result, x)
    assert result is not x
    assert result.data_ptr() == x.data_ptr()
