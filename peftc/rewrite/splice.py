"""Splicing: a region's graph and the active edits of its sites → a new graph.

An edit replaces operands of its site's op. Edits compose in load order, each around what was there before, so that folding
them into the weight in the same order gives the same function: with f₀ the site's op, edit k makes
fₖ(x) = output(x, fₖ₋₁(x)) or fₖ₋₁(input(x)), or it gives f₀ another weight. What comes before such an edit must then be in
the weight too, so it is taken in that form.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer, TraceError
from torch.nn import functional as F

from peftc.errors import AdapterError, RuleError
from peftc.graph.ops import Use, op_named, operand, replace_operand, use_of
from peftc.graph.region import HOST, Anchor, Source, call_input, replace_call_input
from peftc.graph.rows import POINTWISE, dequantised
from peftc.graph.sites import Site, WeightSite, dtype_of
from peftc.plan import Edit
from peftc.rewrite.acting import acting, given
from peftc.rewrite.hosts import own_path, with_weights
from peftc.rewrite.parts import begins, code_path
from peftc.rule import Bound, Rule

# The key of node.meta under which an inserted node says where it is from.
ORIGIN = "peftc"


class Origin(NamedTuple):
    """Where an inserted node is from: the part (`a0`) whose rule's function made it."""

    part: str
    rule: str
    function: str


@dataclass(frozen=True)
class Active:
    """An edit to splice, its site, and the name by which code finds its part."""

    edit: Edit
    site: Site
    name: str


def splice(source: Source, active: Mapping[str, Sequence[Active]]) -> fx.Graph:
    """A copy of the source's graph with the edits in `active` (by the site's fqn relative to the host) spliced in.

    Raises RuleError, naming the rule, if one of its functions does not trace; AdapterError if edits of one site exclude
    each other. The source is never changed.
    """
    graph, by_name = copied(source)
    for anchors in _by_site(source.anchors):
        edits = active.get(anchors[0].site, ())
        op = op_named(edits[0].site.op) if edits else None
        own = op.splice if op is not None else None
        nodes = [by_name[anchor.node] if anchor.node is not None else None for anchor in anchors]
        if own is not None:
            for node in nodes:
                with marked(graph, edits[0], "splice"):
                    if node is None and op is not None and op.splice_inputs is not None:
                        op.splice_inputs(graph, edits, source.signature)
                    else:
                        own(graph, node, edits)
        elif edits:
            _splice_weight_site(graph, nodes, source, anchors[0], edits)
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or ORIGIN in node.meta) and node.op != "output":
            graph.erase_node(node)
    graph.lint()
    return graph


def copied(source: Source) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """A copy of the source's graph that reads of a host what that reads of the module, and its nodes by their old names."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(source.graph, copies))
    for node in copies.values() if not source.opaque else ():
        if node.op in ("get_attr", "call_module"):
            node.target = stored_path(source, str(node.target))
    return graph, {old.name: new for old, new in copies.items()}


def _by_site(anchors: Sequence[Anchor]) -> list[list[Anchor]]:
    """The anchors of every site: all uses of its weight."""
    found: dict[str, list[Anchor]] = {}
    for anchor in anchors:
        found.setdefault(anchor.site, []).append(anchor)
    return list(found.values())


def stored_path(source: Source, path: str) -> str:
    """How generated code reads what is at `path` of its host."""
    lent = any(path in (anchor.weight, anchor.bias) for anchor in source.anchors)
    # Under `symbolic`, the modules inside of the host are none themselves.
    return f"{HOST}.{own_path(path) if lent and (source.opaque or '.' not in path) else path}"


@contextmanager
def marked(graph: fx.Graph, active: Active, function: str) -> Generator[None]:
    """Let the nodes that are added in it say where they are from."""
    before = set(graph.nodes)
    yield
    rule = active.edit.rule
    place = type(rule).__name__ if function == "splice" else _source_of(rule, function)
    for node in graph.nodes:
        if node not in before:
            node.meta.setdefault(ORIGIN, Origin(active.name, rule.name, place))


def _source_of(rule: Rule[Any], function: str) -> str:
    """`LoraLinear.output (lora/linear.py:64)`: where a rule says what it does."""
    code = getattr(getattr(type(rule), function), "__code__", None)
    place = f" ({'/'.join(Path(code.co_filename).parts[-2:])}:{code.co_firstlineno})" if code is not None else ""
    return f"{type(rule).__name__}.{function}{place}"


def follow(graph: fx.Graph, node: fx.Node, function: Any, *more: Any) -> fx.Node:
    """Put `function` on the output of `node`, in front of everything that used it."""
    users = list(node.users)
    with graph.inserting_before(node.next):
        new = graph.call_function(function, (node, *more))
    for user in users:
        user.replace_input_with(node, new)
    return new


@dataclass(frozen=True)
class _Place:
    """A weight's site in a graph: the node of its op (or of a call of its module), and what that is as an op."""

    graph: fx.Graph
    node: fx.Node | None
    source: Source
    anchor: Anchor
    site: WeightSite
    use: Use | None
    tracer: GraphAppendingTracer

    @property
    def is_call(self) -> bool:
        """Whether the site's module is called as it is."""
        return self.node is not None and self.use is None


def _splice_weight_site(
    graph: fx.Graph, nodes: Sequence[fx.Node | None], source: Source, anchor: Anchor, edits: Sequence[Active]
) -> None:
    """Splice the edits of one site into all `nodes` that use its weight."""
    site = edits[0].site
    assert isinstance(site, WeightSite), "other ops have a splice of their own"
    by_weight = [number for number, active in enumerate(edits) if "weight" in active.edit.slots]
    cut = by_weight[-1] + 1 if by_weight else 0
    dims = len(site.kernel_size) + 2
    uses = [use_of(node, lambda _: dims) if node is not None else None for node in nodes]
    for number, (node, use) in enumerate(zip(nodes, uses, strict=True)):
        place = _Place(graph, node, source, anchor, site, use, GraphAppendingTracer(graph))
        # What reads the weight in this graph has the new one with the first use.
        if cut and (place.is_call or number == 0):
            place = _replace_weight(place, edits[:cut])
        if cut < len(edits):
            assert place.node is not None, "the planner asks for operands that can be reached"
            _replace_input_and_output(place, place.node, edits[cut:], edits[:cut])


def _replace_weight(place: _Place, edits: Sequence[Active]) -> _Place:
    """Let the op, or the module that is called as it is, have another weight and bias."""
    for active in edits:
        if active.edit.unmergeable:
            raise AdapterError(
                f"{place.site.fqn}: {active.edit.adapter!r} can't be active together with {edits[-1].edit.adapter!r}, which"
                f" was loaded after it and is adapted as a weight: {active.edit.unmergeable}"
            )
    paths = [place.anchor.weight]
    if place.site.bias is not None and any(a.edit.rule.offers("bias") for a in edits):
        paths.append(place.anchor.bias)
    new: dict[str, fx.Node] = {}
    for path, function in zip(paths, ("weight", "bias"), strict=False):
        stored = stored_path(place.source, path)
        readers = [node for node in place.graph.nodes if node.op == "get_attr" and node.target == stored]
        first = readers[0] if readers else place.node
        assert first is not None, "a traced weight is read"
        with place.graph.inserting_before(first):
            new[path] = _folded(place, edits, function, path)
        for reader in readers:
            reader.replace_all_uses_with(new[path])
    return _with_weights(place, new) if place.is_call else place


def _folded(place: _Place, edits: Sequence[Active], function: str, path: str) -> fx.Node:
    """The weight (or bias) at `path` as the edits make it, stored as it was."""
    stored = fx.Proxy(place.graph.get_attr(stored_path(place.source, path)), place.tracer)
    turned = function == "weight" and place.site.layout == "in_out"
    value = stored.mT if turned else stored
    if dtype_of(place.site.dtype).itemsize == 2:
        with marked(place.graph, edits[0], function):
            value = value.to(torch.float32)  # A fold is computed in float32 at least, and cast once.
    for number, active in enumerate(edits):
        lazy = {**_lazy(place, edits[:number]), function: lambda v=value: v}
        with marked(place.graph, active, function):
            value = traced(active, function, value, _bound(place, active, lazy, wide=True))
    # Stored as it was also in memory: the bits of a product depend on how its operands lie.
    return (value.mT.contiguous() if turned else value).to(stored.dtype).node


def _with_weights(place: _Place, new: Mapping[str, fx.Node]) -> _Place:
    """The call of a module as one in which `new` stand for its weights, by their paths."""
    node, graph = place.node, place.graph
    assert node is not None, "it is a call"
    if node.op == "call_module":
        with graph.inserting_before(node):
            base = graph.get_attr(str(node.target))
            call = graph.call_function(with_weights, (base, node.args, dict(node.kwargs)))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        node = call
    node.target = with_weights
    given = node.kwargs.get("weights")
    node.kwargs = {**node.kwargs, "weights": {**(given if isinstance(given, dict) else {}), **new}}
    return replace(place, node=node)


def _replace_input_and_output(place: _Place, node: fx.Node, edits: Sequence[Active], before: Sequence[Active]) -> None:
    graph, use = place.graph, place.use
    first: fx.Node = operand(node, use.form.x) if use is not None else call_input(graph, node)
    # Inputs from the outside in: the last edit sees the raw x, the op what all of them have made of it.
    seen: list[fx.Node] = []
    x = first
    for number, active in reversed([*enumerate(edits)]):
        seen.append(x)
        if "input" in active.edit.slots:
            with graph.inserting_before(node):
                x = _apply(place, active, [*before, *edits[:number]], "input", x)
    seen.reverse()
    if x is not first:
        if use is not None:
            replace_operand(node, use.form.x, x)
        else:
            replace_call_input(graph, node, first, x)
    users, y = list(node.users), node
    for number, (active, own_x) in enumerate(zip(edits, seen, strict=True)):
        if "output" in active.edit.slots:
            with graph.inserting_before(y.next):
                y = _apply(place, active, [*before, *edits[:number]], "output", own_x, y)
    if y is not node:
        last = next(active for active in reversed(edits) if "output" in active.edit.slots)
        with graph.inserting_before(y.next), marked(graph, last, "output"):
            # In the dtype of the op's own output, whatever the adapter's.
            y = fx.Proxy(y, place.tracer).to(fx.Proxy(node, place.tracer).dtype).node
        for user in users:
            user.replace_input_with(node, y)


def _apply(place: _Place, active: Active, before: Sequence[Active], slot: str, x: fx.Node, *y: fx.Node) -> fx.Node:
    """Trace one slot function into the graph at the insertion point, with x in the adapter's dtype."""
    with marked(place.graph, active, slot):
        p = _bound(place, active, _lazy(place, before))
        own = fx.Proxy(x, place.tracer)
        if not op_named(place.site.op).indices:  # Indices are no numbers to cast.
            own = own.to(getattr(p, active.edit.params[0].name).dtype)
        result = traced(active, slot, own, *(fx.Proxy(node, place.tracer) for node in y), p)
        if slot == "input":
            result = result.to(fx.Proxy(x, place.tracer).dtype)
    return result.node


def _lazy(place: _Place, before: Sequence[Active]) -> dict[str, Callable[[], Any]]:
    """The base's own weight and bias as they are after the edits `before`, canonical; read if a rule asks."""

    def weight() -> Any:
        if place.site.weight is None or not dtype_of(place.site.dtype).is_floating_point:
            value: Any = fx.Proxy(place.graph.call_function(dequantised, (place.graph.get_attr(HOST),)), place.tracer)
        else:
            value = fx.Proxy(place.graph.get_attr(stored_path(place.source, place.anchor.weight)), place.tracer)
            value = value.mT if place.site.layout == "in_out" else value
        for active in before:
            value = traced(active, "weight", value, _bound(place, active, {"weight": lambda v=value: v}, wide=True))
        return value

    def bias() -> Any:
        if place.site.bias is None:
            return None
        value: Any = fx.Proxy(place.graph.get_attr(stored_path(place.source, place.anchor.bias)), place.tracer)
        for number, active in enumerate(before):
            if active.edit.rule.offers("bias"):
                value = traced(active, "bias", value, _bound(place, active, _lazy(place, before[:number]), wide=True))
        return value

    return {"weight": weight, "bias": bias}


def traced(active: Active, function: str, *args: Any) -> fx.Proxy:
    """What a function of the rule gives for proxies. Raises RuleError if it does not trace."""
    rule = active.edit.rule
    where = f"rule {rule.name!r} ({type(rule).__name__}.{function})"
    try:
        result = getattr(rule, function)(*args)
    except (TraceError, TypeError, AttributeError, RuntimeError, ValueError, LookupError) as error:
        raise RuleError(f"{where} does not trace: {error}") from error
    if not isinstance(result, fx.Proxy):
        raise RuleError(f"{where} returns {type(result).__name__}, no tensor")
    return result


def _bound(place: _Place, active: Active, lazy: Mapping[str, Callable[[], Any]], wide: bool = False) -> Bound:
    """The rule's `p` for tracing. `wide`: with half-precision parameters as float32, as a fold wants them.

    Floats are read from the part, so that the code is the same for adapters that differ in them alone.
    """
    edit, graph = active.edit, place.graph

    def dropout(name: str, probability: float) -> Any:
        if probability == 0:
            return _same

        def drop(x: fx.Proxy) -> fx.Proxy:
            return fx.Proxy(graph.call_module(f"{active.name}.{name}", (x.node,)), place.tracer)

        return drop

    values: dict[str, Any] = {}
    for param in edit.params:
        own = fx.Proxy(graph.get_attr(f"{active.name}.{code_path(param.key)}"), place.tracer)
        half = wide and dtype_of(param.dtype).is_floating_point and dtype_of(param.dtype).itemsize == 2
        values[param.name] = own.to(torch.float32) if half else own
    for name, constant in edit.constants.items():
        number = type(constant) is float
        values[name] = fx.Proxy(graph.get_attr(f"{active.name}.{name}"), place.tracer) if number else constant
    values.update({name: dropout(name, probability) for name, probability in edit.dropouts.items()})
    row = op_named(place.site.op)
    if place.use is not None and row.apply is not None:
        values["op"] = row.apply(place.use.node)
    elif row.name == "linear":
        values["op"] = F.linear
    if row.indices and place.use is not None:
        values["padding_idx"] = cast(Any, values["op"]).keywords.get("padding_idx")
    if row.name in POINTWISE:
        values["pointwise"] = POINTWISE[row.name]
    return Bound({**values, **_of_the_call(place, active)}, lazy)


def _of_the_call(place: _Place, active: Active) -> dict[str, Any]:
    """What the rule has of the model's call: functions of `x`, for the rows that it is of."""

    def asked(function: Any, *which: str) -> Any:
        def ask(x: fx.Proxy) -> fx.Proxy:
            part = place.graph.get_attr(active.name)
            return fx.Proxy(place.graph.call_function(function, (part, *which, x.node)), place.tracer)

        return ask

    rule = active.edit.rule
    own = {name: asked(given, name) for name in rule.arguments}
    return {**own, "acts": asked(acting)} if begins(rule) else own


def _same(x: fx.Proxy) -> fx.Proxy:
    return x
