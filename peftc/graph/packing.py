"""Graphs as plain data, to be pickled: torch's op overloads can't be, and go by their names."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload


@dataclass(frozen=True)
class _Node:
    """Another node, by its name."""

    name: str


@dataclass(frozen=True)
class _Overload:
    """An op, by its name: `aten.linear.default`."""

    path: str


Rows = tuple[tuple[Any, ...], ...]


def packed(graph: fx.Graph) -> Rows:
    """The nodes of `graph` as (op, target, args, kwargs, name, type, meta)."""
    return tuple(
        (
            node.op,
            _Overload(str(node.target)) if isinstance(node.target, OpOverload) else node.target,
            *_plain((node.args, node.kwargs)),
            node.name,
            node.type,
            dict(node.meta),
        )
        for node in graph.nodes
    )


def unpacked(rows: Rows) -> fx.Graph:
    """The graph of what `packed` gave."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for op, target, args, kwargs, name, kind, meta in rows:
        if isinstance(target, _Overload):
            namespace, function, overload = target.path.split(".")
            target = getattr(getattr(getattr(torch.ops, namespace), function), overload)
        node = nodes[name] = graph.create_node(op, target, _linked(args, nodes), _linked(kwargs, nodes), name, kind)
        node.meta = dict(meta)
    return graph


def _plain(value: Any) -> Any:
    """`value` in Python's own containers, with nodes by name."""
    if isinstance(value, fx.Node):
        return _Node(value.name)
    if isinstance(value, slice):
        return slice(*(_plain(end) for end in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(_plain(item) for item in value)
    return value


def _linked(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, _Node):
        return nodes[value.name]
    if isinstance(value, slice):
        return slice(*(_linked(end, nodes) for end in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: _linked(item, nodes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_linked(item, nodes) for item in value)
    return value
