"""A plan as a networkx graph."""

from itertools import pairwise
from typing import TypeAlias

import networkx as nx

from peftc.edits import Planned

Network: TypeAlias = "nx.MultiDiGraph[str]"


def network(plan: Planned) -> Network:
    """Nodes: modules by fqn, down to the sites (`site=True`, `op`, `role`, `layer`, `edits`).

    Edges, by their `relation`: `contains` (module to child), `tie` (between modules that share a tensor, `parameters`
    names it), `conflict` (from the contested module to itself, with the `reason`) and, of a program, `feeds` (between the
    modules whose `weights` feed each other, with no other matrix between).

    Example: nx.descendants(nx.subgraph_view(graph, filter_edge=lambda *e: graph.edges[e]["relation"] == "feeds"), fqn)
    """
    graph: Network = nx.MultiDiGraph(model=plan.model, fingerprint=plan.fingerprint)
    edits: dict[str, list[str]] = {}
    for edit in plan.edits:
        edits.setdefault(edit.site, []).append(f"{edit.adapter}:{edit.rule.name}")
    for fqn, site in plan.sites.items():
        _contain(graph, fqn)
        facts = {"op": site.op, "role": site.role, "layer": site.layer, "edits": edits.get(fqn, [])}
        graph.add_node(fqn, site=True, **facts)
    for group in plan.ties:
        owners = [name.rpartition(".")[0] for name in group]
        for owner in owners:
            _contain(graph, owner)
        for first, second in pairwise(owners):
            graph.add_edge(first, second, relation="tie", parameters=group)
    for weights in plan.flows:
        first, second = (name.removesuffix(".weight") for name in weights)
        for owner in (first, second):
            _contain(graph, owner)
        graph.add_edge(first, second, relation="feeds", weights=weights)
    for conflict in plan.conflicts:
        _contain(graph, conflict.site)
        graph.add_edge(conflict.site, conflict.site, relation="conflict", reason=conflict.reason)
    return graph


def _contain(graph: Network, fqn: str) -> None:
    """Add module `fqn` and the modules around it."""
    parent = ""
    graph.add_node("")
    for part in fqn.split(".") if fqn else ():
        child = f"{parent}.{part}" if parent else part
        if not graph.has_edge(parent, child, key="contains"):
            graph.add_edge(parent, child, key="contains", relation="contains")
        parent = child
