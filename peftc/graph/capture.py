"""Capture: a model and the places to rewrite → regions."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, get_args

from torch import nn

from peftc.errors import CaptureError
from peftc.graph.copying import structural_copy
from peftc.graph.exported import export_model
from peftc.graph.finding import modules_at
from peftc.graph.lineage import anchors
from peftc.graph.region import Capture, Region, Source, SourceCache, opaque_source, parameters_of, weight_source
from peftc.graph.sites import WeightSite
from peftc.graph.symbolic import trace_model


def whole(model: Any, level: str, inputs: Any) -> Source | None:
    """The program of `model` that `export` captures with `inputs`; None for the other levels, which take none.

    Raises CaptureError: no module, no such level, no inputs or too many, what torch.export can't take.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {model!r}")
    if level not in get_args(Capture):
        raise CaptureError(f"capture={level!r}: valid are {', '.join(map(repr, get_args(Capture)))}")
    if level == "export":
        return export_model(model, inputs)
    if inputs is not None:
        raise CaptureError(f"inputs= is for capture='export'; capture={level!r} takes what the model itself takes")
    return None


def _anchored(flat: Source, model: nn.Module, sites: Mapping[str, WeightSite], saved: Collection[str]) -> Source:
    training = _anchored(flat.training, model, sites, saved) if flat.training is not None else None
    return replace(flat, anchors=anchors(flat.graph, model, sites, saved=saved), training=training)


def capture(
    model: nn.Module,
    level: Capture,
    sites: Mapping[str, WeightSite],
    called: Collection[str],
    weights: Mapping[str, tuple[str, ...]],
    flat: Source | None,
) -> tuple[Region, ...]:
    """The regions of `model` that hold the given `sites`, and modules that are `called` as they are.

    `modules`: one region for each, hosted by the module itself; `weights` names those of a host that computes with
    several. `symbolic`: one region, hosted by the model; traced on a structural copy, so the model's own flags are not
    touched. `export`: one region, the whole program `flat`, hosted by the model. Raises CaptureError if `symbolic` does
    not trace, or a flat graph does not use a site.
    """
    if flat is not None:
        return (Region("", _anchored(flat, model, sites, called)),)
    if level == "symbolic":
        return (trace_model(structural_copy(model), sites, called),)
    own = [fqn for fqn, site in sites.items() if site.host is None]
    cache, modules = SourceCache(), modules_at(model, [*own, *called])
    regions = [Region(fqn, cache.get(modules[fqn])) for fqn in own]
    whole = [Region(fqn, opaque_source(parameters_of(modules[fqn].forward))) for fqn in called]
    sources = {names: weight_source(names) for names in weights.values()}
    return (*regions, *whole, *(Region(host, sources[names]) for host, names in weights.items()))
