"""Mixed batches in one flat graph: at every op that adapters change, each row with its own.

What `peftc.rewrite.mixed` does with hosts, done with the ops of a whole program: products of all adapters become two
batched ones; any other op is cut out, and what rules make of it for each adapter runs on that adapter's rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import fx, nn

from peftc.errors import AdapterError
from peftc.graph.finding import parameter_at
from peftc.graph.ops import Use, operand, use_of, users_of
from peftc.graph.region import Anchor, Region, Source
from peftc.graph.sites import ModuleSite
from peftc.rewrite import route
from peftc.rewrite.fusion import FRESH
from peftc.rewrite.hosts import Binding, Code
from peftc.rewrite.parts import Part
from peftc.rewrite.passes import piped
from peftc.rewrite.program import Program
from peftc.rewrite.splice import copied, follow
from peftc.rewrite.switch import at, binding_of
from peftc.rewrite.verify import verify

# By adapter, its parts at the sites of one op.
Parts = Mapping[str, Mapping[str, list[Part]]]


@dataclass(frozen=True)
class _Place:
    """An op that adapters change: its node, the sites that it is one of, and the parts there."""

    node: str
    sites: tuple[str, ...]
    parts: Parts

    @property
    def together(self) -> bool:
        """Whether the products of all adapters are batched."""
        flat = {name: [part for group in sites.values() for part in group] for name, sites in self.parts.items()}
        return route.batched(flat)


def program_run(program: Program, region: Region, own: Parts) -> Binding:
    """What the host of a whole program runs in batches of the adapters in `own`, by their parts by site.

    Raises AdapterError if an op can't be run for some rows alone.
    """
    source, host = region.source, program.modules[region.host]
    held: dict[str, Any] = {}
    sources = {"e": source, **({"t": source.training} if source.training is not None else {})}
    places = {letter: _places(program, each, own) for letter, each in sources.items()}
    for letter, found in places.items():
        for number, place in enumerate(found):
            held[f"{letter}{number}"] = _held(program, region.host, sources[letter], place)
    key = ("mixed", source, *((letter, p.node, p.together) for letter, found in places.items() for p in found))
    if key not in program.made.codes:
        codes = [_code(program, sources[letter], letter, places[letter]) for letter in reversed(sources)]
        training = codes[0] if len(codes) > 1 else None
        graph, ran = codes[-1].graph, codes[-1].ran
        program.made.codes[key] = Code(graph, ran, source.signature, training)
    binding = Binding(program.made.codes[key], host, ())
    binding.__dict__.update(held)
    return binding


def _places(program: Program, source: Source, own: Parts) -> list[_Place]:
    """The ops of a graph that the parts are at, in its order. Raises AdapterError for parts that are at none."""
    sites: dict[str, list[str]] = {}
    for site in dict.fromkeys(site for parts in own.values() for site in parts):
        for node in _nodes(program, source, site):
            sites.setdefault(node, []).append(site)
    found: list[_Place] = []
    for node in source.graph.nodes:
        if node.name in sites:
            here = tuple(sites[node.name])
            parts = {name: {site: by[site] for site in here if site in by} for name, by in own.items()}
            found.append(_Place(node.name, here, {name: by for name, by in parts.items() if by}))
    return found


def _nodes(program: Program, source: Source, site: str) -> list[str]:
    """The names of the nodes that compute with what is at `site`; of a module saved whole, with any of its tensors."""
    if not isinstance(program.plan.sites[site], ModuleSite):
        found = [anchor.node for anchor in source.anchors if anchor.site == site]
        if found and None not in found:
            return cast("list[str]", found)
        raise AdapterError(_alone(site, "is no operand of an op that is known"))
    reads = [n for n in source.graph.nodes if n.op == "get_attr" and str(n.target).startswith(f"{site}.")]
    users = list(dict.fromkeys(user for read in reads for user in users_of(read)))
    if any(_use(program.base, user) is None for user in users):
        raise AdapterError(_alone(site, "is saved whole, and is more than one op"))
    return [user.name for user in users]


def _use(base: nn.Module, node: fx.Node) -> Use | None:
    """What a node of a captured graph is as the op of a weight."""
    return use_of(node, lambda weight: parameter_at(base, str(weight.target)).dim())


def _alone(site: str, why: str) -> str:
    return (
        f"adapter_names: {site} {why}, so rows can't each have their own. Run the adapters one after the other"
        " (set_adapter)."
    )


def _code(program: Program, source: Source, letter: str, places: Sequence[_Place]) -> Code:
    """The graph of a program in which every place asks which rows are whose."""
    traced = {node.name: node for node in source.graph.nodes}
    graph, nodes = copied(source)
    for number, place in enumerate(places):
        node, use = nodes[place.node], _use(program.base, traced[place.node])
        assert use is not None, "a place is an op"
        x = operand(node, use.form.x)
        with graph.inserting_before(node):
            held = graph.get_attr(f"{letter}{number}")
        if place.together:
            follow(graph, node, route.add_products, x, held, node.target in FRESH)
        else:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(route.by_rows, (held, x)))
            graph.erase_node(node)
    for node in reversed(graph.nodes):  # What only the replaced ops read.
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph, ran = piped(graph, program.passes, lambda new, name: verify(new, None, None, None, name))
    return Code(graph, ran, source.signature)


def _held(program: Program, host: str, source: Source, place: _Place) -> Any:
    """What the graph reads at a place: the parts whose products are batched, or what runs rows one adapter at a time."""
    if place.together:
        return {name: next(iter(sites.values()))[0] for name, sites in place.parts.items()}
    key = (source, place.node, place.sites)
    places = program.made.places
    if key not in places:
        places[key] = Region(host, _cut(program.base, source, place))
    region = places[key]
    bare = binding_of(program, region, {})
    own = {name: binding_of(program, region, at(region, dict(sites))) for name, sites in place.parts.items()}
    first = program.plan.sites[place.sites[0]]
    return route.ByRow(lambda *args: bare.run(bare, *args), own, first.fqn, first.op.startswith("conv"))


def _cut(base: nn.Module, source: Source, place: _Place) -> Source:
    """One op of a graph as a graph of its own, of its input alone. Raises AdapterError if it takes more."""
    node = next(node for node in source.graph.nodes if node.name == place.node)
    use = _use(base, node)
    assert use is not None, "a place is an op"
    graph, x = fx.Graph(), operand(node, use.form.x)
    copies = {x: graph.placeholder("x")}

    def copied(old: fx.Node) -> fx.Node:
        if old not in copies:
            if old.op == "placeholder":
                raise AdapterError(_alone(place.sites[0], "is computed with other inputs of the model"))
            for other in old.all_input_nodes:
                copied(other)
            copies[old] = graph.node_copy(old, copies.__getitem__)
        return copies[old]

    new = copied(node)
    graph.output(new)
    own = [anchor for anchor in source.anchors if anchor.site in place.sites and anchor.node == place.node]
    anchors = tuple(Anchor(a.site, new.name, a.weight, a.bias) for a in own)
    known = {anchor.site for anchor in own}
    return Source(graph, (*anchors, *(Anchor(site, None) for site in place.sites if site not in known)))
