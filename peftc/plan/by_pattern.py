"""Patterns over dataflow as selectors: which sites they mean, and what nearly was."""

from collections.abc import Callable, Iterator

from torch import Tensor, fx, nn

from peftc.edits import Miss
from peftc.graph.finding import parameter_at
from peftc.graph.patterns import Dataflow, of_weight, unmet
from peftc.graph.sites import SiteIndex, WeightSite
from peftc.registry import ops_of
from peftc.specs import AdapterSpec, ParameterSelection, Pattern
from peftc.specs.selection import shortest_names

_SHOWN = 4


def dataflow(graph: fx.Graph, model: nn.Module) -> Dataflow:
    """What patterns are matched in, of a flat graph of `model`."""

    def shape_of(node: fx.Node) -> tuple[int, ...]:
        found: Tensor | None = _tensor(model, str(node.target))
        return tuple(found.shape) if found is not None else ()

    return Dataflow(graph, shape_of)


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    try:
        return parameter_at(model, name)
    except (AttributeError, KeyError):
        return None  # A buffer, or a constant.


def with_names(
    adapter: str, spec: AdapterSpec, index: SiteIndex, flow: Dataflow | None, misses: list[Miss]
) -> AdapterSpec:
    """`spec` with the names that its pattern stands for in this model; a miss, with the nearest, if it means nothing."""
    pattern = spec.target_modules
    if not isinstance(pattern, Pattern):
        return spec
    if flow is None and pattern.needs_dataflow:
        reason = (
            "asks for dataflow, which capture='modules' has not (it keeps the model's Python); use capture='export'"
        )
        misses.append(Miss(adapter, "target_modules", str(pattern), reason, fatal=True))
        return spec.model_copy(update={"target_modules": ()})
    own = ops_of(spec)
    sites = {fqn: site for fqn, site in (*index.sites.items(), *index.inner.items()) if site.op in own}
    asks = _reasons_of_nodes(pattern, flow) if flow is not None else _reasons_of_sites(pattern)
    why = {fqn: asks(site) for fqn, site in sites.items()}
    chosen = [fqn for fqn, reasons in why.items() if not reasons]
    if not chosen:
        misses.append(Miss(adapter, "target_modules", str(pattern), _nearly(why), fatal=True))
    return _named(spec, chosen, index)


def _reasons_of_nodes(pattern: Pattern, flow: Dataflow) -> Callable[[WeightSite], list[str]]:
    uses: dict[str, list[fx.Node]] = {}
    for node in flow.graph.nodes:
        use = flow.use(node)
        if use is not None:
            uses.setdefault(str(use.weight.target), []).append(node)

    def reasons(site: WeightSite) -> list[str]:
        found = [list(unmet(pattern, node, flow)) for node in uses.get(str(site.weight), ())]
        return min(found, key=len) if found else ["is used by no op that is known"]

    return reasons


def _reasons_of_sites(pattern: Pattern) -> Callable[[WeightSite], list[str]]:
    def found(site: WeightSite) -> Iterator[str]:
        if pattern.op is not None and pattern.op != site.op:
            yield f"is {site.op}, not {pattern.op}"
        dims = 2 + len(site.kernel_size) + (site.experts is not None)
        yield from of_weight(pattern, site.name, dims, site.in_features, site.out_features)

    return lambda site: list(found(site))


def _nearly(why: dict[str, list[str]]) -> str:
    """What lacks least, and what that is."""
    order = sorted(why, key=lambda fqn: len(why[fqn]))
    told = [f"{fqn} ({'; '.join(why[fqn])})" for fqn in order[:_SHOWN] if len(why[fqn]) == len(why[order[0]])]
    return f"means none of {len(why)} sites." + (f" Nearest: {', '.join(told)}." if told else "")


def _named(spec: AdapterSpec, chosen: list[str], index: SiteIndex) -> AdapterSpec:
    """The spec by names: ends of fqns where they select the same, else whole ones; parameters by theirs."""
    update = {"target_modules": shortest_names([fqn for fqn in chosen if fqn in index.sites], index.modules)}
    inner = tuple(fqn for fqn in chosen if fqn in index.inner)
    if inner and isinstance(spec, ParameterSelection):
        update["target_parameters"] = (*(spec.target_parameters or ()), *inner)
    return spec.model_copy(update=update)
