"""Matching patterns over dataflow in a flat graph: which nodes they mean, and of others why not."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from peftc.graph.ops import Use, operand, use_of
from peftc.specs.pattern import Pattern, Size


@dataclass(frozen=True, eq=False)
class Dataflow:
    """A flat graph to match patterns in. `shape_of` gives the sizes of the tensor that a `get_attr` node reads, `name_of`
    what patterns call a weight by; `by_adapter` says whether an edit has inserted a node.
    """

    graph: fx.Graph
    shape_of: Callable[[fx.Node], tuple[int, ...]]
    name_of: Callable[[fx.Node], str] = lambda node: str(node.target)
    by_adapter: Callable[[fx.Node], bool] = lambda node: False
    uses: dict[fx.Node, Use | None] = field(default_factory=dict[fx.Node, "Use | None"])

    def use(self, node: fx.Node) -> Use | None:
        """What a node is as the op of a weight."""
        if node not in self.uses:
            self.uses[node] = use_of(node, lambda weight: len(self.shape_of(weight)))
        return self.uses[node]

    def input_of(self, node: fx.Node) -> fx.Node | None:
        """What gives the input of a node: of the op of a weight that operand, else the first."""
        use = self.use(node)
        value: Any = operand(node, use.form.x) if use is not None else next(iter(node.args), None)
        return value if isinstance(value, fx.Node) else None

    def ends(self, node: fx.Node) -> bool:
        """Whether a path stops at `node`: an op with a matrix. A norm's weight is on the way."""
        use = self.use(node)
        return use is not None and len(self.shape_of(use.weight)) > 1


def matching(pattern: Pattern, flow: Dataflow) -> list[fx.Node]:
    """The nodes that `pattern` means, in their order.

    Example: matching(Pattern(op="linear", feeds="attention.query"), Dataflow(graph, shape_of))
    """
    return [node for node in flow.graph.nodes if node.op != "output" and _is(pattern, node, flow)]


def _is(pattern: Pattern, node: fx.Node, flow: Dataflow) -> bool:
    return next(unmet(pattern, node, flow), None) is None


def unmet(pattern: Pattern, node: fx.Node, flow: Dataflow) -> Iterator[str]:
    """What `pattern` asks and `node` does not have, in words; none if it is meant."""
    use = flow.use(node)
    if pattern.op is not None and pattern.op not in _called(node, use):
        yield f"is {_called(node, use)[0]}, not {pattern.op}"
    if pattern.made_by is not None and (pattern.made_by == "adapter") != flow.by_adapter(node):
        yield f"was not made by the {pattern.made_by}"
    if pattern.name is not None or pattern.dims or pattern.in_features or pattern.out_features:
        yield from _of_weight(pattern, use, flow)
    given = flow.input_of(node)
    if pattern.input and not (given is not None and _any(pattern.input, given, flow)):
        yield f"its input is not given by {_told(pattern.input)}"
    if pattern.follows and not any(_any(pattern.follows, one, flow) for one in _before(node, flow)):
        yield f"follows no {_told(pattern.follows)}"
    if pattern.feeds and not any(_arrives(pattern.feeds, source, one, flow) for source, one in _after(node, flow)):
        yield f"feeds no {_told(pattern.feeds)}"
    if pattern.beside:
        others = [one for one in given.users if one is not node and flow.input_of(one) is given] if given else []
        if not any(_any(pattern.beside, one, flow) for one in others):
            yield f"shares its input with no {_told(pattern.beside)}"


def _of_weight(pattern: Pattern, use: Use | None, flow: Dataflow) -> Iterator[str]:
    if use is None:
        yield "has no weight"
        return
    name, shape = flow.name_of(use.weight), flow.shape_of(use.weight)
    yield from of_weight(pattern, name, len(shape), *(shape[1::-1] if use.layout == "out_in" else shape[:2]))


def of_weight(pattern: Pattern, name: str, dims: int, in_features: int, out_features: int) -> Iterator[str]:
    """What a pattern asks of a weight and this one does not have, in words."""
    owner = name.removesuffix(".weight")
    if pattern.name is not None and not any(re.fullmatch(pattern.name, one) for one in (owner, name)):
        yield f"is called {owner}"
    if pattern.dims is not None and pattern.dims != dims:
        yield f"has a weight of {dims} dimensions, not {pattern.dims}"
    for field_, own in (("in_features", in_features), ("out_features", out_features)):
        wanted: Size | None = getattr(pattern, field_)
        if wanted is not None and not _within(own, wanted):
            yield f"has {field_}={own}, not {wanted}"


def _within(own: int, wanted: Size) -> bool:
    least, most = (wanted, wanted) if isinstance(wanted, int) else wanted
    return (least is None or own >= least) and (most is None or own <= most)


def _called(node: fx.Node, use: Use | None) -> list[str]:
    """What a node may be called: the op of its weight, the name of its function."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = packet if isinstance(packet, str) else getattr(packet, "__name__", str(packet))
    return [*([use.op.name] if use is not None else []), str(name), node.op]


def _any(patterns: tuple[Pattern, ...], node: fx.Node, flow: Dataflow) -> bool:
    return any(_is(one, node, flow) for one in patterns)


def _arrives(patterns: tuple[Pattern, ...], source: fx.Node, node: fx.Node, flow: Dataflow) -> bool:
    """Whether `node`, which `source` goes into, is one of the patterns, as the operand that it asks for."""
    return any(
        (one.operand is None or (one.operand < len(node.args) and node.args[one.operand] is source))
        and _is(one, node, flow)
        for one in patterns
    )


def _after(node: fx.Node, flow: Dataflow) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The nodes that the value of `node` goes into, each with what it comes by, up to and with the next weight's op."""
    seen, queue = {node}, [node]
    while queue:
        source = queue.pop()
        for user in source.users:
            yield source, user
            if user not in seen and not flow.ends(user):
                seen.add(user)
                queue.append(user)


def _before(node: fx.Node, flow: Dataflow) -> Iterator[fx.Node]:
    """The nodes that the input of `node` comes from, up to and with the last weight's op."""
    seen, queue = {node}, [node]
    while queue:
        one = queue.pop()
        for given in one.all_input_nodes:
            if given not in seen:
                seen.add(given)
                yield given
                if not flow.ends(given):
                    queue.append(given)


def _told(patterns: tuple[Pattern, ...]) -> str:
    return " or ".join(_words(one) for one in patterns)


def _words(pattern: Pattern) -> str:
    said: Mapping[str, Any] = {key: value for key, value in pattern.to_dict().items() if key != "op"}
    more = ", ".join(f"{key} {value}" for key, value in said.items() if not isinstance(value, list))
    return f"{pattern.op or 'node'}{f' ({more})' if more else ''}"


def feeds(flow: Dataflow) -> tuple[tuple[str, str], ...]:
    """The matrices whose ops feed each other, by name: from, to, with no other matrix between."""
    found: dict[tuple[str, str], None] = {}
    for node in flow.graph.nodes:
        own = flow.use(node) if flow.ends(node) else None
        for _, user in _after(node, flow) if own is not None else ():
            other = flow.use(user) if flow.ends(user) else None
            if own is not None and other is not None:
                found[flow.name_of(own.weight), flow.name_of(other.weight)] = None
    return tuple(found)
