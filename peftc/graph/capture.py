"""Capture: a model and the places to rewrite → regions."""

from collections.abc import Collection, Mapping

from torch import nn

from peftc.graph.copying import structural_copy
from peftc.graph.finding import modules_at
from peftc.graph.region import Capture, Region, SourceCache, opaque_source, parameters_of, weight_source
from peftc.graph.sites import WeightSite
from peftc.graph.symbolic import trace_model


def capture(
    model: nn.Module,
    level: Capture,
    sites: Mapping[str, WeightSite],
    called: Collection[str],
    weights: Mapping[str, tuple[str, ...]],
) -> tuple[Region, ...]:
    """The regions of `model` that hold the given `sites`, and modules that are `called` as they are.

    `modules`: one region for each, hosted by the module itself; `weights` names those of a host that computes with
    several. `symbolic`: one region, hosted by the model; traced on a structural copy, so the model's own flags are not
    touched. Raises CaptureError if `symbolic` does not trace.
    """
    if level == "symbolic":
        return (trace_model(structural_copy(model), sites, called),)
    own = [fqn for fqn, site in sites.items() if site.host is None]
    cache, modules = SourceCache(), modules_at(model, [*own, *called])
    regions = [Region(fqn, cache.get(modules[fqn])) for fqn in own]
    whole = [Region(fqn, opaque_source(parameters_of(modules[fqn].forward))) for fqn in called]
    sources = {names: weight_source(names) for names in weights.values()}
    return (*regions, *whole, *(Region(host, sources[names]) for host, names in weights.items()))
