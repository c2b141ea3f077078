"""One graph of a model's two: where train() and eval() differ in a number or a flag, the module's own mode chooses."""

from collections.abc import Mapping
from typing import Any, cast

from torch import fx
from torch.fx.node import map_arg

from peftc.graph.lineage import module_of


def by_mode(training: bool, train: Any, evaluate: Any) -> Any:
    """`train` under train(), else `evaluate`."""
    return train if training else evaluate


class _OtherGraphError(Exception):
    """The two differ in more than literals."""


def both_modes(train: fx.Graph, evaluate: fx.Graph) -> fx.Graph | None:
    """The graph that does what `train` does where `training` of a node's module is true, and what `evaluate` does else.

    None if they differ in more than literals.
    """
    try:
        return _both(train, evaluate)
    except _OtherGraphError:
        return None


def _both(train: fx.Graph, evaluate: fx.Graph) -> fx.Graph:
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    others: dict[fx.Node, fx.Node] = {}  # By a node of `train`, that of `evaluate`.
    theirs = (node for node in evaluate.nodes if node.op != "get_attr")
    modes: dict[str, fx.Node] = {}
    for node in train.nodes:
        if node.op == "get_attr":
            new[node] = graph.node_copy(node)
            continue
        if node.op == "output":
            _require_same(_literals(node.args, others), _literals(next(theirs).args))
            graph.output(map_arg(node.args[0], new.__getitem__))
            return graph
        if _counts(node):
            new[node] = _only_in_training(graph, node, new, modes)
            continue
        other = next(theirs)  # As many as here, or the last is the output.
        if (node.op, node.target) != (other.op, other.target):
            raise _OtherGraphError
        others[node] = other
        new[node] = _joined(graph, node, other, new, others, modes)
    raise AssertionError("a graph has an output")


def _counts(node: fx.Node) -> bool:
    """Whether this adds a number to a tensor in place and is used by nobody: batches that a norm has seen."""
    return str(node.target) == "aten.add_.Tensor" and not node.users and isinstance(node.args[1], int)


def _only_in_training(
    graph: fx.Graph, node: fx.Node, new: Mapping[fx.Node, fx.Node], modes: dict[str, fx.Node]
) -> fx.Node:
    tensor, number = node.args[:2]
    count = _choice(graph, node, number, 0, modes)
    made = graph.call_function(cast(Any, node.target), (new[cast(fx.Node, tensor)], count), dict(node.kwargs))
    made.meta = dict(node.meta)
    return made


def _joined(
    graph: fx.Graph,
    node: fx.Node,
    other: fx.Node,
    new: Mapping[fx.Node, fx.Node],
    others: Mapping[fx.Node, fx.Node],
    modes: dict[str, fx.Node],
) -> fx.Node:
    """The node in the joined graph, with a choice for every literal in which the two differ."""
    places, theirs = _arguments(node, other), _arguments(other, node)
    if places.keys() != theirs.keys():
        raise _OtherGraphError
    made: dict[Any, Any] = {}
    for place, own in places.items():
        their = theirs[place]
        plain = not isinstance(own, fx.Node | tuple | list) and not isinstance(their, fx.Node | tuple | list)
        if plain and (own != their or type(own) is not type(their)):
            made[place] = _choice(graph, node, own, their, modes)
            continue
        _require_same(_literals(own, others), _literals(their))
        made[place] = map_arg(own, new.__getitem__)
    args = tuple(value for place, value in made.items() if type(place) is int)
    kwargs = {place: value for place, value in made.items() if type(place) is str}
    joined = graph.create_node(node.op, node.target, args, kwargs, node.name)
    joined.meta = dict(node.meta)
    return joined


def _arguments(node: fx.Node, other: fx.Node) -> dict[int | str, Any]:
    """The arguments by position or name, with the defaults of those that only `other` gives."""
    found: dict[int | str, Any] = {**dict(enumerate(node.args)), **node.kwargs}
    schema = getattr(node.target, "_schema", None)
    for place, argument in enumerate(schema.arguments if schema is not None else ()):
        key: Any = argument.name if argument.kwarg_only else place
        if key not in found and (key in other.kwargs or (type(key) is int and key < len(other.args))):
            found[key] = argument.default_value
    return found


def _choice(graph: fx.Graph, node: fx.Node, train: Any, evaluate: Any, modes: dict[str, fx.Node]) -> fx.Node:
    """What picks one of two literals by the mode of the module that `node` was traced in."""
    module = module_of(node)
    if module not in modes:
        first = next((n for n in graph.nodes if n.op != "placeholder"), None)
        with graph.inserting_before(first) if first is not None else graph.inserting_after(None):
            modes[module] = graph.get_attr(f"{module}.training" if module else "training")
    return graph.call_function(by_mode, (modes[module], train, evaluate))


def _literals(value: Any, others: Mapping[fx.Node, fx.Node] | None = None) -> Any:
    """`value` with its nodes as those of the other graph, and attributes by their names."""

    def plain(node: fx.Node) -> Any:
        return f"attribute {node.target}" if node.op == "get_attr" else node if others is None else others[node]

    return map_arg(value, plain)


def _require_same(own: Any, theirs: Any) -> None:
    if own != theirs:
        raise _OtherGraphError
