"""Shared quantisation: linears that read one activation read one quantisation of it.

Matches: ``quantize_nvfp4`` of an activation, or of views of it that keep the last dimension.
Rewrites to: one ``quantize_nvfp4`` of the activation in its own shape. ``nvfp4_mm`` takes and gives that shape; what
else reads the parts, such as experts, reads views of them.
Exact, because neither global scale, block nor row depends on how the leading dimensions are arranged.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dsv4_compile.passes.graph import MM, QUANTIZE, VIEWS, aten, calls, insert, outputs, value

NAME = "share_quantization"


def apply_to_products(graph: fx.Graph) -> int:
    """Runs the pass on quantisations that only ``nvfp4_mm`` reads: experts are recognised as the model wrote them."""
    return apply(graph, only_products=True)


def apply(graph: fx.Graph, only_products: bool = False) -> int:
    """Runs the pass; returns the number of quantisations that disappeared or lost a view in front."""
    count = 0
    shared: dict[tuple[fx.Node, str], fx.Node] = {}
    for node in calls(graph, QUANTIZE):
        x, granularity = node.args
        base = _without_views(x)
        key = (base, granularity)
        if base is x and key not in shared:
            shared[key] = node
            continue
        if only_products and not _read_by_products_only(node):
            continue
        if key not in shared:
            with graph.inserting_before(node):
                shared[key] = insert(graph, QUANTIZE, key, like=node)
        for product in _products(node):
            _read_from(graph, product, shared[key], x)
        _replace_parts(graph, node, shared[key], x)
        count += 1
    graph.eliminate_dead_code()
    return count


def _without_views(x: fx.Node) -> fx.Node:
    while x.target in VIEWS:
        source: Any = x.args[0]
        if value(source).dim() == 0 or not statically_known_true(value(source).shape[-1] == value(x).shape[-1]):
            break
        x = source
    return x


def _products(quantize: fx.Node) -> list[fx.Node]:
    """The ``nvfp4_mm`` nodes that read a quantisation; they take it in any shape."""
    items = [item for item in outputs(quantize) if item is not None]
    readers = {reader for item in items for reader in item.users}
    return sorted(reader for reader in readers if reader.target is MM and list(reader.args[:3]) == items)


def _read_by_products_only(quantize: fx.Node) -> bool:
    products = _products(quantize)
    return all(reader in products for item in outputs(quantize) if item is not None for reader in item.users)


def parts(graph: fx.Graph, quantize: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Codes, block scales and global scale of a quantisation, made right after it where they do not exist."""
    items = outputs(quantize)
    for index in (2, 1, 0):
        if items[index] is None:
            with graph.inserting_after(quantize):
                items[index] = insert(graph, operator.getitem, (quantize, index), like=quantize)
    codes, block_scales, global_scale = items
    assert codes is not None
    assert block_scales is not None
    assert global_scale is not None
    return codes, block_scales, global_scale


def _read_from(graph: fx.Graph, product: fx.Node, quantize: fx.Node, old_x: fx.Node) -> None:
    base: Any = quantize.args[0]
    with graph.inserting_before(product):
        new = insert(graph, MM, (*parts(graph, quantize), *product.args[3:]), like=product)
        if old_x is not base:
            shape: Any = old_x.args[1]
            new = insert(graph, aten.view.default, (new, [*shape[:-1], value(product).shape[-1]]), like=product)
    product.replace_all_uses_with(new)
    graph.erase_node(product)


def _replace_parts(graph: fx.Graph, old: fx.Node, quantize: fx.Node, old_x: fx.Node) -> None:
    """Gives what else reads ``old``, such as experts, the parts of ``quantize`` in the shapes it knows."""
    for index, item in enumerate(outputs(old)):
        if item is None or not item.users:
            continue
        part = parts(graph, quantize)[index]
        if old_x is not quantize.args[0] and value(item).dim() > 0:
            shape: Any = old_x.args[1]
            last = () if index == 2 else (value(item).shape[-1],)
            with graph.inserting_before(item):
                part = insert(graph, aten.view.default, (part, [*shape[:-1], *last]), like=item)
        item.replace_all_uses_with(part)
