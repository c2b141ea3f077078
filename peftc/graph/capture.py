"""Capture: a model and the places to rewrite → regions."""

from collections.abc import Collection

from torch import nn

from peftc.graph.copying import structural_copy
from peftc.graph.region import Capture, Region, SourceCache, opaque_source, parameters_of
from peftc.graph.symbolic import trace_model


def capture(model: nn.Module, level: Capture, sites: Collection[str], saved: Collection[str]) -> tuple[Region, ...]:
    """The regions of `model` that hold the given sites and the modules saved whole.

    `modules`: one region for each, hosted by the module itself. `symbolic`: one region, hosted by the model; traced on
    a structural copy, so the model's own flags are not touched. Raises CaptureError if `symbolic` does not trace.
    """
    if level == "symbolic":
        return (trace_model(structural_copy(model), sites, saved),)
    cache, modules = SourceCache(), dict(model.named_modules())
    regions = [Region(fqn, cache.get(modules[fqn])) for fqn in sites]
    whole = [Region(fqn, opaque_source(parameters_of(modules[fqn].forward))) for fqn in saved]
    return (*regions, *whole)
