"""What an edit computes at its site, as a graph to draw: traced from the rule's own functions, without casts."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import networkx as nx
from torch import fx, promote_types
from torch.fx.proxy import GraphAppendingTracer, TraceError

from peftc.edits import Edit
from peftc.errors import RuleError
from peftc.graph.ops import op_named
from peftc.graph.sites import Site, WeightSite
from peftc.rule import Bound
from peftc.view.words import number

Kind = Literal["base", "inserted", "trained", "frozen", "constant"]
Flow: TypeAlias = "nx.DiGraph[str]"
# What changes no value, and what tells of a tensor without being one.
_CASTS = frozenset({"to", "float", "type_as", "contiguous"})
_FACTS = frozenset({"shape", "dtype", "device", "ndim", "size", "dim"})
_SIGNS = {
    "add": "+", "iadd": "+", "sub": "−", "neg": "−", "mul": "×", "truediv": "÷", "div": "÷", "matmul": "@", "pow": "^",
    "mT": "transpose", "T": "transpose", "getitem": "[ ]",
}  # fmt: skip


class _Label(NamedTuple):
    text: str
    kind: Kind


def dataflow(edit: Edit, site: Site) -> "Flow | None":
    """Nodes with a `label` and a `kind`, edges from what is read to what reads it; None if there is nothing to draw.

    `base`: what is there without the adapter. Edits of other operands than input, weight and output (virtual tokens,
    copies of modules) have no functions to trace.
    """
    if not isinstance(site, WeightSite) or op_named(site.op).splice is not None:
        return None
    traced = _Traced(edit, site)
    try:
        return traced.flow(traced.result())
    except (TraceError, TypeError, AttributeError, RuntimeError, ValueError, LookupError, RuleError):
        return None  # A rule that does not trace is told of by compiling, with the line.


class _Traced:
    """A graph in the making, and what its nodes are called."""

    def __init__(self, edit: Edit, site: WeightSite) -> None:
        self.edit, self.site = edit, site
        self.graph = fx.Graph()
        self.tracer = GraphAppendingTracer(self.graph)
        self.labels: dict[fx.Node, _Label] = {}

    def result(self) -> fx.Proxy:
        """The output of the adapted site."""
        rule: Any = self.edit.rule
        slots, p = self.edit.slots, self._bound()
        x = self._given("x", "base")
        weights: tuple[Any, ...] = ()
        if "weight" in slots:
            weights = (rule.weight(p.weight, p),)
            if self.site.bias is not None and self.edit.rule.offers("bias"):
                weights += (rule.bias(p.bias, p),)
        y = self._op(rule.input(x, p) if "input" in slots else x, *weights)
        self.labels[y.node] = _Label(self.site.op, "base")
        return rule.output(x, y, p) if "output" in slots else y

    def _bound(self) -> Bound:
        edit = self.edit
        values: dict[str, Any] = {
            param.name: self._given(param.name, "trained" if param.trainable else "frozen") for param in edit.params
        }
        for name, value in edit.constants.items():
            shown = f"{name} = {number(value)}"
            values[name] = self._given(shown, "constant") if type(value) is float else value
        for name, probability in edit.dropouts.items():
            values[name] = self._dropout(f"dropout {probability:g}") if probability else _same
        values["op"] = values["pointwise"] = self._op
        values["padding_idx"] = None
        weight, bias = partial(self._given, "weight", "base"), partial(self._given, "bias", "base")
        return Bound(values, {"weight": weight, "bias": bias if self.site.bias is not None else _nothing})

    def _given(self, text: str, kind: Kind) -> fx.Proxy:
        """A tensor that is there."""
        node = self.graph.placeholder("given")
        self.labels[node] = _Label(text, kind)
        return fx.Proxy(node, self.tracer)

    def _op(self, *args: Any, **_: Any) -> fx.Proxy:
        """The site's op on other operands; geometry is not drawn."""
        return self._call(self.site.op, *args)

    def _dropout(self, text: str) -> Any:
        return partial(self._call, text)

    def _call(self, text: str, *args: Any) -> fx.Proxy:
        tensors = tuple(arg.node for arg in args if isinstance(arg, fx.Proxy))
        proxy = fx.Proxy(self.graph.call_function(_same, tensors), self.tracer)
        self.labels[proxy.node] = _Label(text, "inserted")
        return proxy

    def flow(self, result: fx.Proxy) -> Flow:
        """The nodes that `result` comes from."""
        found: Flow = nx.DiGraph()
        found.add_node("out", label="output", kind="base")
        waiting = [(_value(result.node), "out")]
        while waiting:
            node, reader = waiting.pop()
            known = node.name in found
            found.add_edge(node.name, reader)
            if not known:
                label = self.labels.get(node) or _Label(_text(node), "inserted")
                found.add_node(node.name, label=label.text, kind=label.kind)
                waiting += [(operand, node.name) for operand in reversed([*_operands(node)])]
        return found


def _same(x: Any, *_: Any) -> Any:
    return x


def _nothing() -> None:
    return None


def _value(node: fx.Node) -> fx.Node:
    """The node without the casts around it."""
    while _name(node) in _CASTS and node.op == "call_method":
        node = node.all_input_nodes[0]
    return node


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that a node reads, each once."""
    yield from dict.fromkeys(_value(read) for read in node.all_input_nodes if not _is_fact(read))


def _is_fact(node: fx.Node) -> bool:
    """Whether a node is a size or a dtype of something, or a number or dtype computed from such."""
    if _name(node) in _FACTS:
        return True
    plain = node.op == "call_function" and (node.target is promote_types or node.target.__module__ == "_operator")
    return plain and bool(node.all_input_nodes) and all(map(_is_fact, node.all_input_nodes))


def _name(node: fx.Node) -> str:
    """What a node calls; of an attribute its name."""
    if node.op == "call_function" and node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "__name__", node.target)).strip("_")


def _text(node: fx.Node) -> str:
    """`flatten 1`, `einsum bi,or->…`: what a node calls, and its arguments that are no tensors."""
    name = _name(node)
    attribute = node.op == "call_function" and node.target is getattr
    literals = [value for value in node.args if isinstance(value, int | float | str)] if not attribute else []
    told = " ".join([_SIGNS.get(name, name), *(number(value) for value in literals)])
    return re.sub(r"(?<=^.{23}).{2,}", "…", told)
