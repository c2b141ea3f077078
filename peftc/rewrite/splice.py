"""Splicing: a region's graph and the active edits of its sites → a new graph.

Edits compose in load order, each around what was there before, so that folding them into the weight in the same order
gives the same function: with f₀ the site's op, edit k makes fₖ(x) = output(x, fₖ₋₁(x)) or fₖ₋₁(input(x)).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from torch import fx
from torch.fx.proxy import GraphAppendingTracer, TraceError
from torch.nn import functional as F

from peftc.errors import RuleError
from peftc.graph.calls import CallSlot
from peftc.graph.region import Anchor, Source, call_input, form_of, invoke, operand
from peftc.plan import MODULES_TO_SAVE, Edit
from peftc.rewrite.call import splice_call
from peftc.rule import Bound, Rule, live_name

_POINTWISE: Mapping[str, Any] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}
_CONV_ARGS = ("stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Active:
    """An edit to splice, with its rule (None for modules_to_save)."""

    edit: Edit
    rule: Rule[Any] | None


def splice(source: Source, active: Mapping[str, Sequence[Active]]) -> fx.Graph:
    """A copy of the source's graph with the edits in `active` (by the site's fqn relative to the host) spliced in.

    Raises RuleError, naming the rule, if one of its functions does not trace; the source is never changed.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(source.graph, copies)
    graph.output(output)
    by_name = {old.name: new for old, new in copies.items()}
    for anchor in source.anchors:
        edits = active.get(anchor.site, ())
        if edits:
            _splice_site(graph, by_name[anchor.node], anchor, edits)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph


def _splice_site(graph: fx.Graph, node: fx.Node, anchor: Anchor, edits: Sequence[Active]) -> None:
    saved = [active for active in edits if active.edit.rule == MODULES_TO_SAVE]
    if saved:
        _retarget(graph, node, _path(anchor.site, f"{MODULES_TO_SAVE}.{saved[-1].edit.adapter}"))
        return
    if edits[0].edit.slot in get_args(CallSlot):
        splice_call(graph, node, [active.edit for active in edits])
        return
    form = form_of(node)
    place = form.x if form is not None else None
    first: fx.Node = operand(node, place) if place is not None else call_input(graph, node)
    tracer = GraphAppendingTracer(graph)
    # Inputs from the outside in: the last edit sees the raw x, the op what all of them have made of it.
    seen: list[fx.Node] = []
    x = first
    for active in reversed(edits):
        seen.append(x)
        if active.edit.slot == "input":
            with graph.inserting_before(node):
                x = _apply(active, "input", tracer, node, anchor.site, x)
    seen.reverse()
    if x is not first:
        node.replace_input_with(first, x)
    y = node
    users = list(node.users)
    for active, own_x in zip(edits, seen, strict=True):
        if active.edit.slot == "output":
            with graph.inserting_before(y.next):
                y = _apply(active, "output", tracer, node, anchor.site, own_x, y)
    if y is not node:
        with graph.inserting_before(y.next):
            y = _cast(tracer, y, node)
        for user in users:
            user.replace_input_with(node, y)


def _retarget(graph: fx.Graph, node: fx.Node, target: str) -> None:
    """Let a call of a module call another one."""
    if node.target is invoke:
        with graph.inserting_before(node):
            node.update_arg(0, graph.get_attr(target))
    else:
        node.target = target


def _path(site: str, name: str) -> str:
    return f"{site}.{name}" if site else name


def _apply(
    active: Active, slot: str, tracer: GraphAppendingTracer, node: fx.Node, site: str, x: fx.Node, *y: fx.Node
) -> fx.Node:
    """Trace one slot function into the graph at the insertion point, with x in the adapter's dtype."""
    rule = active.rule
    assert rule is not None  # only modules_to_save has none, and it never gets here
    p, dtype = _bind(active, tracer, node, site)
    own = fx.Proxy(x, tracer)
    form = form_of(node)
    if form is None or form.kind != "embedding":  # token ids are no numbers to cast
        own = own.to(dtype)
    try:
        result = getattr(rule, slot)(own, *(fx.Proxy(node, tracer) for node in y), p)
    except (TraceError, TypeError, AttributeError, RuntimeError, ValueError, LookupError) as error:
        raise RuleError(f"rule {rule.name!r} ({type(rule).__name__}.{slot}) does not trace: {error}") from error
    if not isinstance(result, fx.Proxy):
        raise RuleError(f"rule {rule.name!r} ({type(rule).__name__}.{slot}) returns {type(result).__name__}, no tensor")
    if slot == "input":
        result = result.to(fx.Proxy(x, tracer).dtype)
    return result.node


def _cast(tracer: GraphAppendingTracer, y: fx.Node, like: fx.Node) -> fx.Node:
    """y in the dtype of the op's own output, whatever the adapter's."""
    return fx.Proxy(y, tracer).to(fx.Proxy(like, tracer).dtype).node


def _bind(active: Active, tracer: GraphAppendingTracer, node: fx.Node, site: str) -> tuple[Bound, Any]:
    """The rule's `p` for tracing, and the dtype of the adapter."""
    edit, graph = active.edit, node.graph

    def attribute(key: str) -> fx.Proxy:
        return fx.Proxy(graph.get_attr(_path(site, live_name(key, edit.adapter))), tracer)

    def dropout(name: str, probability: float) -> Any:
        if probability == 0:
            return _same
        target = _path(site, f"{name}.{edit.adapter}")

        def call(x: fx.Proxy) -> fx.Proxy:
            return fx.Proxy(graph.call_module(target, (x.node,)), tracer)

        return call

    values: dict[str, Any] = {param.name: attribute(param.key) for param in edit.params}
    dtype = values[edit.params[0].name].dtype
    values.update(edit.constants)
    values.update({name: dropout(name, probability) for name, probability in edit.dropouts.items()})
    values["op"] = _site_op(node)
    form = form_of(node)
    if form is not None and form.kind in _POINTWISE:
        values["pointwise"] = _POINTWISE[form.kind]
    return Bound(values), dtype


def _site_op(node: fx.Node) -> Any:
    """`p.op`: the op at `node` on another weight, in canonical layout, without bias."""
    form = form_of(node)
    if form is None or form.kind == "linear":
        return F.linear
    if form.kind == "embedding":
        # max_norm would renormalise the adapter's weight in place.
        options: dict[str, Any] = {name: value for name, value in node.kwargs.items() if name != "max_norm"}
        return partial(F.embedding, **options)
    conv = _POINTWISE[form.kind]
    geometry = dict(zip(_CONV_ARGS, node.args[3:], strict=False))
    geometry.update({name: node.kwargs[name] for name in _CONV_ARGS if name in node.kwargs})
    return partial(conv, **geometry)


def _same(x: fx.Proxy) -> fx.Proxy:
    return x
