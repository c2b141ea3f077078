"""Capture: a model and the places to rewrite → regions."""

from collections.abc import Collection, Mapping

from torch import nn

from peftc.graph.copying import structural_copy
from peftc.graph.region import Capture, Region, SourceCache, opaque_source, parameters_of, weight_source
from peftc.graph.sites import modules_at
from peftc.graph.symbolic import trace_model


def capture(
    model: nn.Module,
    level: Capture,
    sites: Collection[str],
    saved: Collection[str],
    weights: Mapping[str, tuple[str, ...]],
) -> tuple[Region, ...]:
    """The regions of `model` that hold the given sites, the modules saved whole, and hosts with the names of weights.

    `modules`: one region for each, hosted by the module itself. `symbolic`: one region, hosted by the model; traced on
    a structural copy, so the model's own flags are not touched. Raises CaptureError if `symbolic` does not trace.
    """
    if level == "symbolic":
        return (trace_model(structural_copy(model), sites, saved),)
    cache, modules = SourceCache(), modules_at(model, [*sites, *saved])
    regions = [Region(fqn, cache.get(modules[fqn])) for fqn in sites]
    whole = [Region(fqn, opaque_source(parameters_of(modules[fqn].forward))) for fqn in saved]
    sources = {names: weight_source(names) for names in weights.values()}
    return (*regions, *whole, *(Region(host, sources[names]) for host, names in weights.items()))
