"""Where the nodes of a small dataflow graph lie: in layers from top to bottom, with few crossings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TypeAlias

import networkx as nx

Graph: TypeAlias = "nx.DiGraph[str]"
ROW, HEIGHT, GAP = 46.0, 26.0, 14.0


@dataclass(frozen=True)
class Box:
    """A node: its middle, its width, its data."""

    x: float
    y: float
    width: float
    label: str
    kind: str


@dataclass(frozen=True)
class Layout:
    """Boxes and the lines between them as paths of SVG, inside of `width` × `height`."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    lines: tuple[str, ...]


def layout(graph: Graph) -> Layout:
    """Places for the nodes of an acyclic `graph`, which have a `label` and a `kind`.

    Layers are the longest paths (networkx), long edges bend at every layer, the order within layers follows the mean of
    the neighbours (Sugiyama, Tagawa & Toda 1981), and so do the places in that order.
    """
    level = _levels(graph)
    bent, paths = _bent(graph, level)
    order = _ordered(bent, level)
    widths = {node: 7.0 * len(graph.nodes[node]["label"]) + 20 if node in graph else 2.0 for node in bent}
    x = _across(bent, order, widths)
    left = min(x[node] - widths[node] / 2 for node in bent) - 2
    right = max(x[node] + widths[node] / 2 for node in bent) + 2
    place = {node: (round(x[node] - left, 1), level[node] * ROW + HEIGHT / 2 + 2) for node in bent}
    boxes = tuple(Box(*place[node], widths[node], data["label"], data["kind"]) for node, data in graph.nodes(data=True))
    lines = tuple(_line([place[node] for node in path]) for path in paths)
    return Layout(round(right - left, 1), max(level.values()) * ROW + HEIGHT + 4, boxes, lines)


def _levels(graph: Graph) -> dict[str, int]:
    """The layer of every node: as early as can be; what is not computed from the input, as late as can be."""
    level = {node: depth for depth, layer in enumerate(nx.topological_generations(graph)) for node in layer}
    source = next(node for node, data in graph.nodes(data=True) if data["label"] == "x")
    early = {source, *nx.descendants(graph, source)}
    for node in reversed([*nx.topological_sort(graph)]):
        if node not in early:
            level[node] = min(level[reader] for reader in graph.successors(node)) - 1
    lowest = min(level.values())
    return {node: depth - lowest for node, depth in level.items()}


def _bent(graph: Graph, level: dict[str, int]) -> tuple[Graph, list[list[str]]]:
    """The graph with a node at every layer that an edge passes, and the path of every edge; `level` gets those too."""
    bent: Graph = nx.DiGraph()
    bent.add_nodes_from(graph)
    paths: list[list[str]] = []
    for first, last in graph.edges:
        between = [f"{first} {last} {depth}" for depth in range(level[first] + 1, level[last])]
        level.update({node: level[first] + 1 + at for at, node in enumerate(between)})
        paths.append([first, *between, last])
        nx.add_path(bent, paths[-1])
    return bent, paths


def _ordered(graph: Graph, level: Mapping[str, int]) -> list[list[str]]:
    """The nodes of every layer from left to right."""
    layers: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    for node in nx.dfs_preorder_nodes(graph.to_undirected(as_view=True)):
        layers[level[node]].append(node)
    for sweep in range(8):
        neighbours = graph.predecessors if sweep % 2 == 0 else graph.successors
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            at = {node: position for other in layers for position, node in enumerate(other)}
            own = {node: _mean((at[other] for other in neighbours(node)), at[node]) for node in layer}
            layer.sort(key=own.__getitem__)
    return layers


def _across(graph: Graph, layers: Sequence[Sequence[str]], widths: Mapping[str, float]) -> dict[str, float]:
    """The middle of every node: near its neighbours, in order, with a gap to the next."""
    x = {node: 60.0 * position for layer in layers for position, node in enumerate(layer)}
    for _ in range(24):
        for layer in (*layers, *reversed(layers)):
            wanted = {node: _mean((x[other] for other in nx.all_neighbors(graph, node)), x[node]) for node in layer}
            from_left, from_right = _apart(layer, wanted, widths, 1), _apart(layer[::-1], wanted, widths, -1)
            x.update({node: (from_left[node] + from_right[node]) / 2 for node in layer})
    return x


def _apart(
    layer: Sequence[str], wanted: Mapping[str, float], widths: Mapping[str, float], sign: int
) -> dict[str, float]:
    """Where they want to be, but each beyond the one before it."""
    placed = {node: wanted[node] for node in layer}
    for before, node in pairwise(layer):
        least = placed[before] + sign * ((widths[before] + widths[node]) / 2 + GAP)
        placed[node] = max(placed[node], least) if sign > 0 else min(placed[node], least)
    return placed


def _mean(values: Iterable[float], default: float) -> float:
    found = list(values)
    return fmean(found) if found else default


def _line(corners: Sequence[tuple[float, float]]) -> str:
    """From under the first box to over the last, upright at every layer."""
    (x0, y0), *between, (x1, y1) = corners
    points = [(x0, y0 + HEIGHT / 2), *between, (x1, y1 - HEIGHT / 2)]
    curves = (f"C{a:g} {(b + d) / 2:g} {c:g} {(b + d) / 2:g} {c:g} {d:g}" for (a, b), (c, d) in pairwise(points))
    return f"M{x0:g} {y0 + HEIGHT / 2:g}" + "".join(curves)
