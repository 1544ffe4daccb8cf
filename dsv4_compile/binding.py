"""Binds packed weights to the compiled graph, so that no weight travels through AOT's wrapper on every call.

Dynamo hands the backend a graph whose parameters are inputs. Here a copy of that graph is made in which each packed
weight is three buffers and one ``dequantize_nvfp4`` call for each user; Inductor's freezing then turns the buffers
into constants. Plain weights that only feed contractions are packed first. Dynamo reads its own graph afterwards, so
that one is left as it is.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import LocalSource, UnspecializedNNModuleSource
from torch._guards import ChainedSource, Guard, Source, TracingContext
from torch.utils.weak import WeakTensorKeyDictionary

from dsv4_compile.options import Options
from dsv4_compile.quantization import ineligible_reason
from dsv4_compile.tensor import Nvfp4Tensor

INVOKE_SUBGRAPH = torch.ops.higher_order.invoke_subgraph

Parts = tuple[fx.Node, fx.Node, fx.Node]
Kind = tuple[torch.dtype, torch.Size]  # the dtype a packed weight stands for, and the shape of its global scale


@dataclass
class Weight:
    """One weight of a compiled graph.

    Attributes:
        name: its full parameter name.
        shape: [N, K] or [E, N, K].
        packed: its packed form, None when it was left alone.
        reason: why it was left alone.
        eligible: whether a matrix product reads it, so that it could run as an NVFP4 operator.
    """

    name: str
    shape: tuple[int, ...]
    packed: Nvfp4Tensor | None
    reason: str = ""
    eligible: bool = True


@dataclass
class BoundGraph:
    """A copy of Dynamo's graph with its packed weights bound, and how to call what is compiled from it.

    Attributes:
        gm: the copy; buffers named ``dsv4_weight_<i>_<part>`` hold the packed parts.
        kept: indices of Dynamo's inputs that remain inputs.
        weights: the bound weights by ``<i>``, then the plain ones that were left alone, with reasons.
        packed_here: plain parameters that were packed at compile time, for this graph or an earlier one.
        newly_packed: how many of those no earlier graph had packed.
        replaced: the weights that stand in the compiled code, by the index of Dynamo's input they came as.
    """

    gm: fx.GraphModule
    kept: list[int]
    weights: list[Weight] = field(default_factory=list)
    packed_here: list[Tensor] = field(default_factory=list)
    newly_packed: int = 0
    replaced: dict[int, Tensor] = field(default_factory=dict)


def bind_weights(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> BoundGraph:
    """Returns a copy of ``gm`` with every packed or packable weight bound as buffers.

    Args:
        gm: the graph Dynamo captured, parameters as placeholders.
        example_inputs: the real inputs, parameters included.
        options: which plain weights to pack.

    Raises:
        RuntimeError: the graph writes into a packed weight.
    """
    bound = BoundGraph(_copy_graph(gm), [])
    left_alone: list[Weight] = []
    operands: dict[fx.Node, Parts] = {}
    kinds: dict[fx.Node, Kind] = {}
    placeholders = bound.gm.graph.find_nodes(op="placeholder")
    names = [parameter_name(node) for node in placeholders]
    body = next(node for node in bound.gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
    for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        packed = value if isinstance(value, Nvfp4Tensor) else None
        name = names[index]
        if packed is None and isinstance(value, torch.nn.Parameter) and value.dim() in (2, 3):
            reason, eligible = _reason_to_leave(bound.gm, node, name, value, options, names)
            if reason:
                left_alone.append(Weight(name, tuple(value.shape), None, reason, eligible))
            else:
                bound.newly_packed += value not in _packed_parameters
                packed = _pack_once(value)
                bound.packed_here.append(value)
        if packed is None:
            bound.kept.append(index)
            continue
        bound.replaced[index] = value
        operands[node] = _register(bound.gm, body, len(bound.weights), packed)
        kinds[node] = (packed.dtype, packed.global_scale.shape)
        bound.weights.append(Weight(name, tuple(packed.shape), packed))
    _guard_identity(operands)
    _replace_by_parts(bound.gm, operands, kinds)
    for node in operands:
        bound.gm.graph.erase_node(node)
    bound.weights.extend(left_alone)
    bound.gm.graph.lint()
    bound.gm.recompile()
    return bound


def _guard_identity(placeholders: Iterable[fx.Node]) -> None:
    """Has Dynamo compile again for another weight in the place of a bound one.

    Dynamo guards a parameter's shape and dtype only, so the code of one layer would serve all layers of its class, and
    a weight that was replaced (``load_state_dict(assign=True)``) would go unnoticed. The guard on the module makes
    Dynamo count recompiles for each module by itself. Dynamo's five guards on the parts of a packed weight go: what
    they ask holds of the same object, and :func:`runner` looks at its codes.
    """
    context = TracingContext.try_get()
    for node in placeholders:
        source = getattr(node, "_dynamo_source", None)
        if context is None or source is None:
            continue
        guards = context.guards_context.dynamo_guards
        guards.inner -= {guard for guard in guards.inner if _is_of_parts(guard, source)}
        guards.add(source.make_guard(GuardBuilder.ID_MATCH))
        while isinstance(source, ChainedSource):
            if isinstance(source, UnspecializedNNModuleSource) and isinstance(source.base, LocalSource):
                guards.add(source.base.make_guard(GuardBuilder.ID_MATCH))
            source = source.base


def _is_of_parts(guard: Guard, weight: Source) -> bool:
    """Whether a guard asks about the parts of a packed weight, or about how it is made of them."""
    source = guard.originating_source
    if source == weight:
        return guard.create_fn_name() == "TENSOR_SUBCLASS_METADATA_MATCH"
    while isinstance(source, ChainedSource):
        source = source.base
        if source == weight:
            return True
    return False


def parameter_name(placeholder: fx.Node) -> str:
    """``L['self']._modules['layers']._modules['0']._parameters['weight']`` as ``layers.0.weight``."""
    source = getattr(placeholder, "_dynamo_source", None)
    text = placeholder.name if source is None else source.name
    text = text() if callable(text) else text
    text = re.sub(r"^L\['(\w+)'\]", "", text)
    text = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", text)
    text = re.sub(r"\[(\d+)\]", r".\1", text)
    return text.removeprefix(".").removeprefix("_orig_mod.")


def _copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Copies a graph and the subgraphs it calls; parameters and buffers are shared."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copies)
    original_output = next(iter(gm.graph.find_nodes(op="output")))
    graph.output(output).meta.update(original_output.meta)
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    for original, node in copies.items():
        if original.op == "placeholder" and hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(copy, name, _copy_graph(child))
    return copy


def _register(gm: fx.GraphModule, body: fx.Node, number: int, packed: Nvfp4Tensor) -> Parts:
    """Gives ``gm`` the parts as buffers and reads them before ``body``, its first node that is no input.

    The reads stand in the order of the buffers, because AOT's inputs have the order of the reads in torch 2.11 and that
    of the buffers in torch 2.13.
    """
    nodes = []
    with gm.graph.inserting_before(body):
        for part in ("codes", "block_scales", "global_scale"):
            name = f"dsv4_weight_{number}_{part}"
            gm.register_buffer(name, getattr(packed, part))
            nodes.append(gm.graph.get_attr(name))
    return nodes[0], nodes[1], nodes[2]


def _replace_by_parts(
    gm: fx.GraphModule,
    operands: dict[fx.Node, Parts],
    kinds: dict[fx.Node, Kind],
) -> None:
    """Gives each user of a packed node its own dequantize call, and subgraphs the parts as operands."""
    calls = list(gm.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH))
    by_subgraph: dict[str, list[fx.Node]] = {}
    for call in calls:
        by_subgraph.setdefault(call.args[0].target, []).append(call)
    for target, group in by_subgraph.items():
        _pass_parts_to_subgraph(getattr(gm, target), group, operands, kinds)
    for node, parts in operands.items():
        for user in list(node.users):
            if _writes(user, node):
                raise RuntimeError(
                    f"dsv4: {parameter_name(node)} must not be written to by the compiled function, got "
                    f"{_name(user)}: a packed weight may be updated between calls, with copy_"
                )
            with gm.graph.inserting_before(user):
                weight = gm.graph.call_function(torch.ops.dsv4.dequantize_nvfp4.default, (*parts, kinds[node][0]))
            weight.meta.update(user.meta)
            weight.meta.pop("example_value", None)
            user.replace_input_with(node, weight)


def _writes(user: fx.Node, weight: fx.Node) -> bool:
    name = _name(user)
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS
    return (in_place and user.args[:1] == (weight,)) or user.kwargs.get("out") is weight


_IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "setitem"}


def _pass_parts_to_subgraph(
    subgraph: fx.GraphModule,
    calls: list[fx.Node],
    operands: dict[fx.Node, Parts],
    kinds: dict[fx.Node, Kind],
) -> None:
    """Replaces operands that are packed in every call by their three parts, inside and outside.

    An operand that is packed in some calls only, or differently, is dequantised outside those calls.
    """
    inner: dict[fx.Node, Parts] = {}
    inner_kinds: dict[fx.Node, Kind] = {}
    new_arguments: list[list[Any]] = [list(call.args[:2]) for call in calls]
    for position, placeholder in enumerate(subgraph.graph.find_nodes(op="placeholder")):
        arguments = [call.args[2 + position] for call in calls]
        packed = all(argument in operands for argument in arguments) and len({kinds[node] for node in arguments}) == 1
        for call_arguments, argument in zip(new_arguments, arguments, strict=True):
            call_arguments.extend(operands[argument] if packed else (argument,))
        if packed:
            with subgraph.graph.inserting_before(placeholder):
                names = [f"{placeholder.name}_{part}" for part in ("codes", "block_scales", "global_scale")]
                codes, block_scales, global_scale = (subgraph.graph.placeholder(name) for name in names)
                inner[placeholder] = (codes, block_scales, global_scale)
            inner_kinds[placeholder] = kinds[arguments[0]]
    for call, call_arguments in zip(calls, new_arguments, strict=True):
        call.args = tuple(call_arguments)
    _replace_by_parts(subgraph, inner, inner_kinds)
    for placeholder in inner:
        subgraph.graph.erase_node(placeholder)
    subgraph.graph.lint()
    subgraph.recompile()


@dataclass
class _PackedParameter:
    packed: Nvfp4Tensor
    version: int


_packed_parameters: Any = WeakTensorKeyDictionary()


def _pack_once(parameter: Tensor) -> Nvfp4Tensor:
    """Packs a plain parameter, once for all the graphs that share it; again, in place, when its values changed."""
    version = -1 if parameter.is_inference() else parameter._version
    entry: _PackedParameter | None = _packed_parameters.get(parameter)
    with torch.inference_mode(False), torch.no_grad():
        if entry is None:
            entry = _PackedParameter(Nvfp4Tensor.from_float(parameter), version)
            _packed_parameters[parameter] = entry
        elif entry.version != version:
            entry.packed.copy_(parameter)
            entry.version = version
    return entry.packed


def runner(compiled: Callable[..., Any], bound: BoundGraph) -> Callable[..., Any]:
    """Wraps the compiled function so that it takes Dynamo's inputs, and so that updated weights are packed again.

    A plain parameter that was packed at compile time and is written to in place afterwards (``load_state_dict``,
    an optimiser) is packed again, into the same buffers, before the next call. Reading the version counters costs
    0.05 us a weight. Writing through ``.data`` or to a parameter made under inference_mode moves no counter. A packed
    weight that was given other parts gets its own back, with the others' values.

    Raises:
        RuntimeError: when called with other weights than the compiled code holds, which only happens where
            ``guard_filter_fn`` has removed the guards that would have made Dynamo compile again.
    """
    select = _selector(bound.kept)
    select_weights = _selector(bound.replaced)
    weights = tuple(bound.replaced.values())
    packed_weights = [weight for weight in weights if isinstance(weight, Nvfp4Tensor)]
    read_codes = operator.attrgetter("codes")
    parts = [(weight.codes, weight.block_scales, weight.global_scale) for weight in packed_weights]
    codes = [bound_parts[0] for bound_parts in parts]
    plain_weights = [plain for plain in bound.packed_here if not plain.is_inference()]
    read_version = operator.attrgetter("_version")
    versions = list(map(read_version, plain_weights))

    def call(*inputs: Any) -> Any:
        nonlocal versions
        if any(map(operator.is_not, select_weights(inputs), weights)):
            raise RuntimeError(
                "dsv4: weights must be the ones this code was compiled with, got others and no guard that compiles "
                "again: leave out guard_filter_fn, or do not replace weights, nor share one compiled code object "
                "between layers"
            )
        if any(map(operator.is_not, map(read_codes, packed_weights), codes)):
            for weight, bound_parts in zip(packed_weights, parts, strict=True):
                _return_to(bound_parts, weight)
        if plain_weights:
            current = list(map(read_version, plain_weights))
            if current != versions:
                for plain in plain_weights:
                    _pack_once(plain)
                versions = current
        return compiled(*select(inputs))

    return call


def _return_to(parts: tuple[Tensor, Tensor, Tensor], weight: Nvfp4Tensor) -> None:
    """Copies a packed weight's values into the parts that compiled code holds, and makes these the weight's parts."""
    if weight.codes is parts[0]:
        return
    current = (weight.codes, weight.block_scales, weight.global_scale)
    if [part.shape for part in parts] != [part.shape for part in current]:
        raise RuntimeError(
            f"dsv4: parts of a packed weight must keep their shapes {[tuple(part.shape) for part in parts]}, "
            f"got {[tuple(part.shape) for part in current]}: call torch._dynamo.reset()"
        )
    with torch.inference_mode(False), torch.no_grad():
        for part, value in zip(parts, current, strict=True):
            part.copy_(value)
    weight.codes, weight.block_scales, weight.global_scale = parts


def _selector(indices: Iterable[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that picks the items at ``indices`` of a sequence, as a tuple."""
    chosen = tuple(indices)
    if len(chosen) > 1:
        return operator.itemgetter(*chosen)
    return lambda inputs: tuple(inputs[index] for index in chosen)


# How a weight may reach the contraction that reads it. Anything else (an embedding look-up, arithmetic on the weight,
# a returned weight) means that its plain values matter, and it is left alone.
_TRANSPOSES_LAST_TWO = {"t", "T", "mT"}
_TRANSPOSE_ARGUMENTS = {"permute": ("input", "dims"), "transpose": ("input", "dim0", "dim1")}
_LINEAR_FUNCTIONS = {torch._C._nn.linear, torch.nn.functional.linear}
_MATMUL_FUNCTIONS = {torch.matmul, operator.matmul, torch.mm}
# Matrix products that have no pass: what they read is eligible, and explain lists it as not covered.
_GROUPED_FUNCTIONS = {"_grouped_mm", "grouped_mm"}
_OTHER_PRODUCTS = {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "grouped_mm", "_grouped_mm"}
_VIEWS = {"view", "reshape", "transpose", "permute", "getitem", "contiguous", "flatten", "unflatten", "unsqueeze"}


def _reason_to_leave(
    gm: fx.GraphModule, node: fx.Node, name: str, weight: Tensor, options: Options, names: Sequence[str]
) -> tuple[str, bool]:
    """Why a plain weight is left alone, "" when it is not; and whether an NVFP4 operator could read it all the same."""
    if not options.quantize_weights:
        return "plain weight, and quantize_weights is off", False
    if (reason := ineligible_reason(name, weight, options.include, options.exclude, names)) is not None:
        return reason, False
    for reader, reads_as_linear in _readers(gm, node, transposed=False):
        if not reads_as_linear:
            product = _name(reader) in _OTHER_PRODUCTS
            return f"read by {_name(reader)}, " + (
                "a form no pass matches" if product else "no matrix product"
            ), product
    return ("", True) if node.users else ("not used", False)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _readers(gm: fx.GraphModule, node: fx.Node, transposed: bool) -> Iterator[tuple[fx.Node, bool]]:
    """What reads a weight [N, K] behind views of it, and whether it does so as a linear that contracts K."""
    for user in node.users:
        if user.target is INVOKE_SUBGRAPH:
            subgraph = getattr(gm, user.args[0].target)
            placeholders = subgraph.graph.find_nodes(op="placeholder")
            for position, argument in enumerate(user.args[2:]):
                if argument is node:
                    yield from _readers(subgraph, placeholders[position], transposed)
        elif _swaps_last_two(user, node):
            yield from _readers(gm, user, not transposed)
        elif _contracts(user, node, transposed):
            yield user, True
        elif _splits_rows(user, node, transposed) or _gathers_experts(user, node):
            yield from _readers(gm, user, transposed)
        elif _name(user) in _VIEWS and user.users:
            yield from ((reader, False) for reader, _ in _readers(gm, user, transposed))
        else:
            yield user, False


def _swaps_last_two(user: fx.Node, weight: fx.Node) -> bool:
    if user.op == "call_method" and user.target in _TRANSPOSES_LAST_TWO:
        return True
    if user.target is getattr and user.args[1:] and user.args[1] in _TRANSPOSES_LAST_TWO:
        return True
    if user.target is torch.t:
        return True
    if _name(user) not in _TRANSPOSE_ARGUMENTS:
        return False
    rank = weight.meta["example_value"].dim()
    _, *dims = _arguments(user, *_TRANSPOSE_ARGUMENTS[_name(user)])
    dims = [dim % rank for dim in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    if _name(user) == "transpose":
        return sorted(dims) == [rank - 2, rank - 1]
    return dims == [*range(rank - 2), rank - 1, rank - 2]


def _splits_rows(user: fx.Node, weight: fx.Node, transposed: bool) -> bool:
    """A view of [G * N, K] as [G, N, K], as DeepSeek V4's grouped output projection takes it."""
    shapes = [tuple(node.meta["example_value"].shape) for node in (weight, user) if "example_value" in node.meta]
    if _name(user) not in ("view", "reshape", "unflatten") or transposed or len(shapes) != 2:
        return False
    return len(shapes[0]) == 2 and len(shapes[1]) == 3 and shapes[0][-1] == shapes[1][-1]


def _gathers_experts(user: fx.Node, weight: fx.Node) -> bool:
    """``weight[ids]`` of stacked experts [E, N, K] with a tensor of ids [S]."""
    is_index = user.target is operator.getitem and weight.meta["example_value"].dim() == 3
    ids = user.args[1] if is_index else None
    return isinstance(ids, fx.Node) and getattr(ids.meta.get("example_value"), "ndim", 0) == 1


def _contracts(user: fx.Node, weight: fx.Node, transposed: bool) -> bool:
    example = weight.meta.get("example_value")
    if example is None:
        return False
    name = _name(user)
    if user.target in _LINEAR_FUNCTIONS and example.dim() == 2:
        operands, position, wanted = _arguments(user, "input", "weight", "bias"), 1, False
    elif user.target in _MATMUL_FUNCTIONS or (user.op == "call_method" and name in ("matmul", "mm")):
        operands, position, wanted = _arguments(user, "input", "mat2" if name == "mm" else "other"), 1, True
    elif user.target in (torch.addmm, "addmm"):
        operands, position, wanted = _arguments(user, "input", "mat1", "mat2"), 2, True
    elif user.target in (torch.bmm, "bmm"):
        operands = _arguments(user, "input", "mat2")
        position, wanted = (1, True) if transposed else (0, False)
        if not transposed and not _gathers_experts(weight, weight.args[0]):
            return False  # only gathered experts stand on the left: weight[ids] @ x.unsqueeze(-1)
    elif name in _GROUPED_FUNCTIONS and example.dim() == 3:
        operands, position, wanted = _arguments(user, "mat_a", "mat_b", "offs"), 1, True
    else:
        return False
    return transposed == wanted and [i for i, operand in enumerate(operands) if operand is weight] == [position]


def _arguments(user: fx.Node, *names: str) -> list[Any]:
    """The arguments of a call, however they were passed: positional ones, then those of ``names`` that remain."""
    return [*user.args, *(user.kwargs.get(name) for name in names[len(user.args) :])]
