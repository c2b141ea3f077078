"""Splicing: a region's graph and the active edits of its sites → a new graph.

Edits compose in load order, each around what was there before, so that folding them into the weight in the same order
gives the same function: with f₀ the site's op, edit k makes fₖ(x) = output(x, fₖ₋₁(x)) or fₖ₋₁(input(x)).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer, TraceError
from torch.nn import functional as F

from peftc.errors import RuleError
from peftc.graph.calls import CallSlot
from peftc.graph.region import Anchor, Source, call_input, form_of, invoke, operand
from peftc.plan import MODULES_TO_SAVE, Edit
from peftc.rewrite.call import splice_call
from peftc.rewrite.host import Opaque
from peftc.rule import Bound, Rule, live_name

_POINTWISE: Mapping[str, Any] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}
_CONV_ARGS = ("stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Active:
    """An edit to splice, with its rule (None for modules_to_save). `turned`: the site stores its weight transposed."""

    edit: Edit
    rule: Rule[Any] | None
    turned: bool = False


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
    if edits[0].edit.slot == "weight":
        splice_weight(graph, node, anchor, edits)
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


def splice_weight(graph: fx.Graph, node: fx.Node, anchor: Anchor, edits: Sequence[Active]) -> None:
    """Let the call of an opaque host compute with a weight into which the edits are folded."""
    tracer = GraphAppendingTracer(graph)
    container = f"adapted_{anchor.site.replace('.', '_')}"
    before = node.args[0]
    assert isinstance(before, fx.Node), "invoke calls a module"
    with graph.inserting_before(before):
        stored = fx.Proxy(graph.get_attr(anchor.site), tracer)
        turned = edits[0].turned
        weight = stored.mT if turned else stored
        for active in edits:
            weight = _traced(active, "fold", weight, _bind(active, tracer, node, container)[0])
        weight = (weight.mT if turned else weight).to(stored.dtype)
    node.target = with_weights
    given = node.kwargs.get("weights")
    weights = {**given, anchor.site: weight.node} if isinstance(given, dict) else {anchor.site: weight.node}
    node.kwargs = {**node.kwargs, "weights": weights}


def with_weights(
    base: Opaque,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    more_args: tuple[Any, ...] = (),
    more_kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Any:
    """The call of `base`, while attributes of its host are these `weights` (by fqn relative to the host)."""
    host: nn.Module = base.__dict__["host"]
    places = [(host.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in weights or {}]
    for (module, leaf), weight in zip(places, (weights or {}).values(), strict=True):
        module.__dict__[leaf] = weight  # Found before the parameter of that name.
    try:
        return base(*args, *more_args, **kwargs, **(more_kwargs or {}))
    finally:
        for module, leaf in places:
            module.__dict__.pop(leaf, None)


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
    p, dtype = _bind(active, tracer, node, site)
    own = fx.Proxy(x, tracer)
    form = form_of(node)
    if form is None or form.kind != "embedding":  # token ids are no numbers to cast
        own = own.to(dtype)
    result = _traced(active, slot, own, *(fx.Proxy(node, tracer) for node in y), p)
    if slot == "input":
        result = result.to(fx.Proxy(x, tracer).dtype)
    return result.node


def _traced(active: Active, function: str, *args: Any) -> fx.Proxy:
    """What a function of the rule gives for proxies. Raises RuleError if it does not trace."""
    rule = active.rule
    assert rule is not None, "only modules_to_save has none"
    where = f"rule {rule.name!r} ({type(rule).__name__}.{function})"
    try:
        result = getattr(rule, function)(*args)
    except (TraceError, TypeError, AttributeError, RuntimeError, ValueError, LookupError) as error:
        raise RuleError(f"{where} does not trace: {error}") from error
    if not isinstance(result, fx.Proxy):
        raise RuleError(f"{where} returns {type(result).__name__}, no tensor")
    return result


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
