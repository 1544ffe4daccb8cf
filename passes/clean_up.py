"""Clean-up: what the rewrites leave behind and Inductor would otherwise have to look at.

Rewrites: a view of a view to one view; a view to the shape a tensor has already to that tensor; dead nodes to nothing.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dsv4_compile.passes.graph import VIEWS, same_shape, value

NAME = "clean_up"


def apply(graph: fx.Graph) -> int:
    """Runs the pass; returns the number of views that disappeared."""
    count = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in VIEWS:
            continue
        source: Any = node.args[0]
        while source.target in VIEWS and len(source.users) == 1:
            source = source.args[0]
        if same_shape(value(source).shape, value(node).shape):
            node.replace_all_uses_with(source)
            count += 1
        elif source is not node.args[0]:
            node.update_arg(0, source)
            count += 1
    graph.eliminate_dead_code()
    return count
