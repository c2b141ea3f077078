"""Passes on whole programs: what changes nothing goes, so do casts to the dtype that is there, siblings share a product."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from peftc.graph.finding import attribute_at
from peftc.graph.patterns import Dataflow, matching
from peftc.graph.unlifted import VALUE, changes_something
from peftc.rewrite.splice import ORIGIN
from peftc.specs import Pattern

aten = torch.ops.aten
_END = 2**63 - 1


@dataclass(frozen=True)
class NoOpsRemoved:
    """Slices of all of a dimension, integers plus zero, and products with one."""

    name: str = "no-ops-removed"

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        """The graph without them; its values are the same bits."""
        changed = _changed_in_place(graph)
        for node in list(graph.nodes):
            # What is not changed may be the other's alias.
            if _is_no_op(node) and not changed & {node, node.args[0]} and not any(u.op == "output" for u in node.users):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        graph.eliminate_dead_code(changes_something)
        return graph


def _changed_in_place(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values may be changed in place, by themselves or by what reads them: a view of them, say."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if changes_something(node) and node.op == "call_function":
            found.update(node.all_input_nodes)
        elif any(user in found for user in node.users):
            found.add(node)
    return found


def _is_no_op(node: fx.Node) -> bool:
    args = node.args
    if node.target is aten.slice.Tensor:
        return args[2:4] == (0, _END) and len(args) == 4
    if node.target is aten.add.Tensor:
        return type(args[1]) is int and args[1] == 0 and not node.kwargs and _same_dtype(node)
    if node.target is aten.mul.Tensor:
        return type(args[1]) in (int, float) and bool(args[1] == 1) and _same_dtype(node)
    return False


def _same_dtype(node: fx.Node) -> bool:
    """Whether a node's first operand has its dtype; minus zero plus zero is another number, so that is for integers."""
    own, first = dtype_of_node(node, {}), dtype_of_node(node.args[0], {})
    return own is not None and own == first and (node.target is not aten.add.Tensor or not own.is_floating_point)


@dataclass(frozen=True)
class CastsRemoved:
    """Casts to the dtype that a tensor has, as it was when the graph was made: the program is for these dtypes."""

    name: str = "casts-removed"

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        """The graph without them; its values are the same bits."""
        known: dict[fx.Node, torch.dtype | None] = {}
        for node in list(graph.nodes):
            if not _is_cast(node) or node.args[0].op == "output":
                continue
            wanted, own = dtype_of_node(node, known), dtype_of_node(node.args[0], known)
            if wanted is not None and wanted == own:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        graph.eliminate_dead_code(changes_something)
        return graph


def _is_cast(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target == "to":
        return len(node.args) == 2
    return node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs


def dtype_of_node(node: Any, known: dict[fx.Node, torch.dtype | None]) -> torch.dtype | None:
    """The dtype of what a node gives, as far as it can be told: from the trace, a live tensor, or its operands."""
    if not isinstance(node, fx.Node):
        return None
    if node not in known:
        known[node] = None  # Until it is found.
        known[node] = _dtype(node, known)
    return known[node]


def _dtype(node: fx.Node, known: dict[fx.Node, torch.dtype | None]) -> torch.dtype | None:
    value = node.meta.get(VALUE)
    if value is not None:
        return value[0]
    if _is_cast(node):
        wanted: Any = node.args[1]
        if isinstance(wanted, torch.dtype):
            return wanted
        asked = isinstance(wanted, fx.Node) and wanted.target is getattr and wanted.args[1] == "dtype"
        return dtype_of_node(wanted.args[0], known) if asked else None
    if node.op == "call_module" and ORIGIN in node.meta:
        return dtype_of_node(node.args[0], known)  # A dropout.
    if node.op != "call_function" or ORIGIN not in node.meta or node.target is getattr:
        return None
    # Numbers, and tensors without dimensions, leave the dtype of the others.
    tensors = [one for one in node.all_input_nodes if one.meta.get(VALUE, (None, None))[1] != ()]
    found = {dtype_of_node(one, known) for one in tensors}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class SiblingsFused:
    """The first products of adapters that read one input (q/k/v, gate/up) are one: x·[A₁ A₂ A₃]ᵀ, taken apart again."""

    name: str = "siblings-fused"

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        """The graph in which each such group is one product; equal within rounding."""
        groups: dict[Any, list[fx.Node]] = {}
        dtypes: dict[fx.Node, torch.dtype | None] = {}
        changed = _changed_in_place(graph)
        for node in matching(SIBLING, _dataflow(graph)):
            if _is_plain_product(node) and node.args[0] not in changed:
                key = (node.args[0], dtype_of_node(node.args[1], dtypes))
                groups.setdefault(key, []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                _fuse(graph, nodes)
        graph.eliminate_dead_code(changes_something)
        return graph


# x·Aᵀ of an adapter, of what came into its graph before, beside another one.
_FIRST = Pattern(op="linear", made_by="adapter", input=Pattern(made_by="model"))
SIBLING = _FIRST.model_copy(update={"beside": (_FIRST,)})


def _dataflow(graph: fx.Graph) -> Dataflow:
    return Dataflow(
        graph, lambda node: node.meta.get(VALUE, (None, ()))[1], by_adapter=lambda node: ORIGIN in node.meta
    )


def _is_plain_product(node: fx.Node) -> bool:
    """Whether a product is F.linear of a tensor that belongs to the adapter, and nothing else."""
    weight: Any = node.args[1] if len(node.args) == 2 and node.target is F.linear and not node.kwargs else None
    return weight is not None and weight.op == "get_attr" and str(weight.target).startswith(f"{_part(node)}.")


def _part(node: fx.Node) -> str:
    return node.meta[ORIGIN].part


def _fuse(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    x: Any = nodes[0].args[0]
    reads: list[Any] = [node.args[1] for node in nodes]
    with graph.inserting_before(nodes[0]):
        # Each again, in front of all.
        weights = [graph.node_copy(read) for read in reads]
        stacked = graph.call_function(torch.cat, (weights,))
        product = graph.call_function(F.linear, (x, stacked))
        # Read where it runs: other ranks run the same code.
        ranks = [graph.call_function(torch.ops.aten.sym_size.int, (weight, 0)) for weight in weights]
        pieces = graph.call_function(torch.split, (product, ranks, -1))
    for made in (stacked, product, pieces, *ranks):
        made.meta[ORIGIN] = nodes[0].meta[ORIGIN]
    for number, node in enumerate(nodes):
        with graph.inserting_before(node):
            piece = graph.call_function(operator.getitem, (pieces, number))
        piece.meta = dict(node.meta)
        node.replace_all_uses_with(piece)
        graph.erase_node(node)


def program_passes() -> tuple[NoOpsRemoved, CastsRemoved, SiblingsFused]:
    """The passes for whole programs, in their order: no-ops and casts removed (the same bits), siblings fused (within
    rounding). A program is then for the dtypes that its tensors had.

    Example: peftc.compile(model, spec, capture="export", inputs=inputs, passes=peftc.program_passes())
    """
    return NoOpsRemoved(), CastsRemoved(), SiblingsFused()


def annotate(graph: fx.Graph, root: Any) -> None:
    """Let the reads of live tensors in `graph` say their dtype and sizes, as those of a trace do."""
    for node in graph.nodes:
        if node.op == "get_attr" and VALUE not in node.meta:
            value = attribute_at(root, str(node.target))
            if isinstance(value, torch.Tensor):
                node.meta[VALUE] = (value.dtype, tuple(value.shape))
