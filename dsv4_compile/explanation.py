"""``explain``: which weights of a model NVFP4 operators read, and for every other one the reason why none does."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from dsv4_compile.backend import compile_bound, prepare
from dsv4_compile.binding import INVOKE_SUBGRAPH, BoundGraph, Weight, runner
from dsv4_compile.meta_device import meta_constants
from dsv4_compile.options import Options
from dsv4_compile.passes.graph import (
    DEQUANTIZE,
    GROUPED_MM,
    MM,
    MOE,
    QUANTIZE,
    SWIGLU_QUANTIZE,
    VIEWS,
    WEIGHT_MM,
)
from dsv4_compile.printing import packed_part
from dsv4_compile.quantization import ineligible_reason
from dsv4_compile.tensor import Nvfp4Tensor

RMS_NORM_QUANTIZE = torch.ops.dsv4.rms_norm_quantize_nvfp4.default
RMS_NORM_QUANTIZE_WITH_NORM = torch.ops.dsv4.rms_norm_quantize_nvfp4.with_norm
# For each quantiser, the index of its codes among its results.
QUANTIZERS = {QUANTIZE: 0, SWIGLU_QUANTIZE: 0, RMS_NORM_QUANTIZE: 0, RMS_NORM_QUANTIZE_WITH_NORM: 1}
# For each product, the positions of its activation (its codes) and of its weights' codes among its arguments.
PRODUCTS = {MM: (0, (3,)), WEIGHT_MM: (0, (1,)), GROUPED_MM: (0, (3,)), MOE: (0, (5, 8))}


@dataclass(frozen=True)
class Region:
    """One weight of the model.

    Attributes:
        module: full name of the parameter.
        kind: ``linear`` for a matrix, ``experts`` for a stack of them.
        shape: N x K, or E x N x K.
        operator: the NVFP4 operator that reads it, or "" when none does.
        kernel: what runs that operator on the device of the weight.
        reason: why no operator reads it.
        eligible: whether one could: it is packed, or a plain contraction that no pass matched.
        num_bytes: size in bf16.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    operator: str
    kernel: str
    reason: str
    eligible: bool
    num_bytes: int


@dataclass(frozen=True)
class QuantizedActivation:
    """One quantisation of an activation.

    Attributes:
        operator: what quantises it.
        readers: names of the weights that read it.
        shape: of the activation.
        global_scales: its gsa: one value, or least and greatest for one a row; empty on the meta device.
    """

    operator: str
    readers: tuple[str, ...]
    shape: tuple[int, ...]
    global_scales: tuple[float, ...]


@dataclass
class Explanation:
    """What :func:`explain` found; ``print`` it for the tables.

    Attributes:
        regions: every weight, in the order in which the model reads them.
        activations: every quantised activation.
        graphs: number of graphs that were compiled.
        graph_breaks: reasons for breaks between them.
    """

    regions: list[Region] = field(default_factory=list)
    activations: list[QuantizedActivation] = field(default_factory=list)
    graphs: int = 0
    graph_breaks: list[str] = field(default_factory=list)

    @property
    def covered(self) -> list[Region]:
        """Weights that an NVFP4 operator reads."""
        return [region for region in self.regions if region.operator]

    @property
    def eligible(self) -> list[Region]:
        """Weights that an NVFP4 operator reads or could read."""
        return [region for region in self.regions if region.eligible]

    @property
    def covered_fraction(self) -> float:
        """Share of the eligible weight bytes that NVFP4 operators read; 1.0 where nothing is eligible."""
        eligible = sum(region.num_bytes for region in self.eligible)
        return sum(region.num_bytes for region in self.covered) / eligible if eligible else 1.0

    @property
    def quantizations_per_layer(self) -> dict[str, int]:
        """Number of quantised activations by layer, ``model.layers.0`` for one; "" for those outside of layers."""
        layers = [re.match(r"(.*?\blayers\.\d+)\.", (*activation.readers, "")[0]) for activation in self.activations]
        return dict(Counter(layer[1] if layer else "" for layer in layers))

    def table(self) -> Table:
        """The regions as a rich table."""
        table = Table(title="Regions", title_justify="left")
        for column in ("parameter", "kind", "shape", "operator", "kernel / reason"):
            table.add_column(column, overflow="fold")
        for region in self.regions:
            shape = "x".join(map(str, region.shape))
            style = None if region.operator else ("yellow" if region.eligible else "dim")
            detail = region.kernel if region.operator else region.reason
            table.add_row(region.module, region.kind, shape, region.operator or "-", detail, style=style)
        return table

    def activation_table(self) -> Table:
        """The quantised activations as a rich table."""
        table = Table(title="Quantised activations", title_justify="left")
        for column in ("read by", "shape", "quantised by", "gsa"):
            table.add_column(column, overflow="fold")
        for activation in self.activations:
            scales = " .. ".join(f"{scale:.3e}" for scale in activation.global_scales) or "-"
            readers = ", ".join(_shorten(activation.readers))
            table.add_row(readers, "x".join(map(str, activation.shape)), activation.operator, scales)
        return table

    def summary(self) -> str:
        """Totals in one line."""
        covered, eligible = self.covered, self.eligible
        per_layer = [count for layer, count in self.quantizations_per_layer.items() if layer]
        spread = f" ({min(per_layer)} to {max(per_layer)} a layer)" if per_layer else ""
        mib = [sum(region.num_bytes for region in regions) / 2**20 for regions in (covered, eligible, self.regions)]
        return (
            f"{len(covered)} of {len(eligible)} eligible weights ({self.covered_fraction:.1%} of {mib[1]:.1f} MiB in "
            f"bf16) run through NVFP4 operators; {len(self.regions) - len(eligible)} weights ({mib[2] - mib[1]:.1f} "
            f"MiB) left alone; {len(self.activations)} quantisations{spread}, {self.graphs} graphs, "
            f"{len(self.graph_breaks)} graph breaks"
        )

    def __str__(self) -> str:
        console = Console(width=160)
        with console.capture() as text:
            console.print(self.table(), self.activation_table(), self.summary())
        return text.get()


def explain(
    model: Callable[..., Any], *inputs: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """Runs a model once through the passes and reports what they did with each weight.

    No code is generated: the rewritten graphs are run node by node, which takes seconds. On the meta device nothing
    is allocated either, so a full-size model can be explained from its config alone.

    Args:
        model: any callable that ``torch.compile`` takes; not changed.
        inputs, kwargs: of one call.
        options: of the dsv4 backend.

    Returns:
        An :class:`Explanation`; ``print`` shows it as tables.

    Raises:
        ValueError, TypeError: an option that is unknown or has a value it may not have.
    """
    explanation = Explanation()
    parsed = Options.parse(None, options)
    torch._dynamo.reset()
    breaks_before = dict(torch._dynamo.utils.counters["graph_break"])

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        bound = prepare(gm, example_inputs, parsed)
        reports: list[_GraphReport] = []
        scales: dict[str, tuple[float, ...]] = {}

        def observe(graph: fx.Graph, before: str, counts: dict[str, int]) -> None:
            reports.append(_GraphReport(bound))
            reports[-1].read(graph, {})

        inputs = [example_inputs[index] for index in bound.kept]
        compiled = compile_bound(bound, inputs, parsed, observe, inner_compile=_Recorder(scales))
        report = reports[-1]  # subgraphs of repeated regions come first; the last graph is the one that calls them
        explanation.graphs += 1
        _merge(explanation, report)
        run = runner(compiled, bound)

        def call(*arguments: Any) -> Any:
            results = run(*arguments)
            for quantizer, position in report.quantizers.items():
                if quantizer in scales:
                    found = explanation.activations[report.first_activation + position]
                    values = {**found.__dict__, "global_scales": scales[quantizer]}
                    explanation.activations[report.first_activation + position] = QuantizedActivation(**values)
            return results

        return call

    with torch.inference_mode(), meta_constants(inputs, kwargs):
        torch.compile(model, backend=backend)(*inputs, **kwargs)
    for reason, count in torch._dynamo.utils.counters["graph_break"].items():
        if count > breaks_before.get(reason, 0):
            explanation.graph_breaks.append(reason)
    torch._dynamo.reset()
    if isinstance(model, nn.Module):
        _add_unseen(explanation, model, parsed)
    return explanation


def _add_unseen(explanation: Explanation, model: nn.Module, options: Options) -> None:
    """Lists the weights that no graph reads: what stands in a frame that Dynamo gave up on runs eagerly."""
    parameters = dict(model.named_parameters())
    seen = {region.module for region in explanation.regions}
    for name, weight in parameters.items():
        if name in seen or weight.dim() not in (2, 3):
            continue
        packed = weight if isinstance(weight, Nvfp4Tensor) else None
        excluded = ineligible_reason(name, weight, options.include, options.exclude, parameters)
        reason = "in no graph: what reads it was not compiled, or did not run"
        unseen = Weight(name, tuple(weight.shape), packed, reason, packed is not None or excluded is None)
        explanation.regions.append(_region(unseen, "", reason))


class _Recorder:
    """An ``inner_compile`` that runs the graph node by node and keeps the global scales it sees."""

    def __init__(self, scales: dict[str, tuple[float, ...]]) -> None:
        self.scales = scales

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        scales = self.scales

        class Interpreter(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                result = super().run_node(node)
                if node.target in QUANTIZERS and not result[-1].is_meta and result[-1].numel():
                    low, high = result[-1].aminmax()
                    scales[node.name] = (float(low),) if result[-1].dim() == 0 else (float(low), float(high))
                return result

        def run(inputs: list[Any]) -> Any:
            arguments = tuple(inputs)
            inputs.clear()
            return Interpreter(gm).run(*arguments)

        run._boxed_call = True
        return run


class _GraphReport:
    """Reads a rewritten graph: which operator reads each weight, and which weights read each quantisation."""

    def __init__(self, bound: BoundGraph) -> None:
        self.bound = bound
        self.operators: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.activations: list[QuantizedActivation] = []
        self.quantizers: dict[str, int] = {}
        self.first_activation = 0

    def read(self, graph: fx.Graph, operands: dict[fx.Node, int]) -> None:
        """Reads a graph whose placeholders ``operands`` are codes of the weights with those numbers."""
        numbers = dict(operands)
        for node in graph.find_nodes(op="placeholder"):
            part = packed_part(node)
            if part is not None and part[1] == "codes":
                numbers[node] = int(part[0])
        for node in graph.nodes:
            if node.target is INVOKE_SUBGRAPH:
                subgraph = getattr(graph.owning_module, node.args[0].target).graph
                inner = zip(subgraph.find_nodes(op="placeholder"), node.args[2:], strict=True)
                self.read(subgraph, {placeholder: numbers[outer] for placeholder, outer in inner if outer in numbers})
            elif node.target in PRODUCTS:
                for codes in _weight_codes(node):
                    if codes in numbers:
                        self.operators.setdefault(numbers[codes], _operator_name(node))
            elif node.target is DEQUANTIZE and node.args[0] in numbers:
                self.reasons[numbers[node.args[0]]] = (
                    f"dequantised: read by {_first_reader(node)}, which no pass matched"
                )
            elif node.target in QUANTIZERS:
                self.quantizers.setdefault(node.name, len(self.activations))
                readers = self._readers(node, numbers)
                self.activations.append(QuantizedActivation(_operator_name(node), readers, _shape(node.args[0]), ()))

    def _readers(self, quantizer: fx.Node, numbers: dict[fx.Node, int]) -> tuple[str, ...]:
        codes = {user for user in quantizer.users if user.args[1] == QUANTIZERS[quantizer.target]}
        waiting, products = list(codes), set()
        while waiting:  # through views, and through the gathering of rows for experts that no pass made one of
            node = waiting.pop()
            for user in node.users:
                if user.target in PRODUCTS:
                    products.add(user)
                elif user.target in (*VIEWS, torch.ops.aten.index.Tensor, torch.ops.aten.permute.default):
                    waiting.append(user)
        weights = [codes for product in sorted(products) for codes in _weight_codes(product)]
        if any(product.target is MOE for product in products):  # its second weight reads what it quantises itself
            downs = {_root(product.args[8]) for product in products if product.target is MOE}
            weights = [node for node in weights if node not in downs]
        return tuple(self.bound.weights[numbers[node]].name for node in weights if node in numbers)


def _operator_name(node: fx.Node) -> str:
    return str(node.target._schema.name).removeprefix("dsv4::")


def _weight_codes(product: fx.Node) -> list[fx.Node]:
    """The codes of the weights that a product reads, views of them undone."""
    arguments = [product.args[position] for position in PRODUCTS[product.target][1]]
    return [_root(node) for argument in arguments for node in (argument if isinstance(argument, list) else [argument])]


def _root(node: Any) -> fx.Node:
    while node.target in VIEWS:
        node = node.args[0]
    root: fx.Node = node
    return root


def _first_reader(node: fx.Node) -> str:
    """The first operation behind a dequantised weight that is more than a view or a cast of it."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.op == "output":
            return "the caller"
        name = str(getattr(user.target, "__name__", user.target)).removesuffix(".default")
        if name not in ("permute", "view", "transpose", "t", "convert_element_type", "expand", "clone", "_unsafe_view"):
            return f"aten.{name}"
        node = user
    return f"{len(node.users)} operations"


def _shape(node: Any) -> tuple[int, ...]:
    value: Tensor = node.meta["val"]
    return tuple(int(size) if isinstance(size, int) else size for size in value.shape)


def _merge(explanation: Explanation, report: _GraphReport) -> None:
    """Adds a graph's weights and activations; a weight that several graphs read is listed once a way of reading."""
    known = {(region.module, region.operator) for region in explanation.regions}
    for number, weight in enumerate(report.bound.weights):
        region = _region(weight, report.operators.get(number, ""), report.reasons.get(number, weight.reason))
        if (region.module, region.operator) not in known:
            explanation.regions.append(region)
    report.first_activation = len(explanation.activations)
    explanation.activations.extend(report.activations)


def _region(weight: Weight, operator: str, reason: str) -> Region:
    kind = "experts" if len(weight.shape) == 3 else "linear"
    if "embedding" in reason or "embed" in weight.name:
        kind = "embedding"
    return Region(
        module=weight.name,
        kind=kind,
        shape=weight.shape,
        operator=operator,
        kernel=kernel_name(weight.packed.device) if operator and weight.packed is not None else "",
        reason="" if operator else reason or "not read",
        eligible=weight.eligible,
        num_bytes=2 * math.prod(weight.shape),
    )


def kernel_name(device: torch.device) -> str:
    """What runs the NVFP4 operators on a device."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return "sm_90 kernels" if major == 9 else f"no kernel for sm_{major}{minor}"
    return {"cpu": "CPU reference", "meta": "none (meta device)"}.get(device.type, f"no kernel for {device.type}")


def _shorten(names: Sequence[str]) -> list[str]:
    """Full name for the first reader, only what differs for the others."""
    if not names:
        return []
    first = names[0].removesuffix(".weight")
    prefix = first.rpartition(".")[0] + "."
    return [first, *(name.removesuffix(".weight").removeprefix(prefix) for name in names[1:])]
