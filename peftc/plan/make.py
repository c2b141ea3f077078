"""Making a plan: match every adapter's spec, let the rules declare, add up."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx, nn

from peftc.architectures import role_of
from peftc.edits import Costs, Edit, Miss, PlannedParam, TrainedTensor
from peftc.errors import CaptureError, RuleError
from peftc.graph.capture import capture
from peftc.graph.copying import structural_copy
from peftc.graph.dry_run import unused
from peftc.graph.finding import modules_at
from peftc.graph.fingerprint import fingerprint
from peftc.graph.hooked import given_class, is_offloaded, parallel_style
from peftc.graph.lineage import with_ops
from peftc.graph.ops import op_named
from peftc.graph.patterns import Dataflow, feeds
from peftc.graph.region import Capture, Region, Source
from peftc.graph.rows import is_known_linear
from peftc.graph.sites import Site, SiteIndex, WeightSite, dtype_name, index_sites
from peftc.graph.symbolic import flat_graph_of, graph_of
from peftc.plan.by_pattern import dataflow
from peftc.plan.claims import Access, adapter_dtype, weight_edit
from peftc.plan.companions import with_companions
from peftc.plan.join import add_costs, added_costs, joined
from peftc.plan.match import Match, match, match_saved
from peftc.plan.plan import Plan
from peftc.plan.saved import SAVED, saved_site
from peftc.registry import find_rule, rules_of
from peftc.rule import Placed, Rule
from peftc.specs import AdapterSpec, ParameterSelection, Pattern


def make_plan(
    model: nn.Module,
    specs: Mapping[str, AdapterSpec],
    level: Capture,
    autocast_adapter_dtype: bool,
    among: Plan | None = None,
    fresh: bool = True,
    flat: Source | None = None,
) -> tuple[Plan, tuple[Region, ...]]:
    """The plan of adapting `model` with `specs` (by adapter name, in order), and the regions it was made on.

    `among`: the plan of the adapters that the model has already; the new plan is of all, the regions are those of the new
    sites (of all, where one graph is the whole model). `flat`: the program that `export` captured. Misses and conflicts
    are in the plan, not raised. Raises NoMatchError (no defaults for the model type), CaptureError.
    """
    dtype_for = partial(adapter_dtype, autocast=autocast_adapter_dtype)
    index = _indexed(model, level, specs, flat)
    flow = _dataflow(model, level, specs, flat)
    matches: dict[str, list[Match]] = {}
    for name, spec in specs.items():
        all_ = with_companions(name, _match(name, spec, model, level, index, flow, dtype_for, flat), index)
        matches[name] = [_without_unused(name, one, model, index) for one in all_] if fresh else _that_is_why(all_)
    found = [(name, own) for name, all_ in matches.items() for own in all_]
    touched = {site.fqn for _, own in found for site in own.sites}
    sites = {fqn: site for fqn, site in {**index.sites, **index.inner}.items() if fqn in touched}
    # A site inside a module that another adapter saves is a conflict; it is captured as the site it also is.
    others: dict[str, Site] = {fqn: saved_site(model, fqn) for _, own in found for fqn in own.saved if fqn not in sites}
    others |= {claim.site.fqn: claim.site for _, own in found for claim in own.claims}
    regions = _captured(model, level, sites, {*others}, index, among, flat)
    access = _access(level, regions, sites, model)
    edits = [edit for name, own in found for edit in _edits(name, own, access, dtype_for)]
    edits += [_save(name, model, fqn, own.follows.get(fqn)) for name, own in found for fqn in own.saved]
    trained = tuple(t for name, own in found for t in _trained(name, own, index))
    plan = Plan(
        model=given_class(type(model)).__name__,
        capture=level,
        fingerprint=fingerprint(model, index),
        adapters={name: all_[0].spec for name, all_ in matches.items()},
        sites={**sites, **others},
        edits=tuple(edits),
        trained=trained,
        misses=tuple(miss for _, own in found for miss in own.misses),
        conflicts=(),
        ties=index.ties,
        cautions=(),
        autocast_adapter_dtype=autocast_adapter_dtype,
        costs=add_costs(_base_costs(index), added_costs(edits, trained)),
        flows=feeds(flow) if flow is not None else (),
    )
    return joined(among, plan, [name for fqn in index.modules for name in (fqn, *index.hosted.get(fqn, ()))]), regions


def _indexed(model: nn.Module, level: Capture, specs: Mapping[str, AdapterSpec], flat: Source | None) -> SiteIndex:
    index = index_sites(model, role_of(model))
    if flat is not None:
        return with_ops(index, flat.graph, model)
    by_weight = any(isinstance(spec, ParameterSelection) and spec.target_parameters for spec in specs.values())
    return with_ops(index, graph_of(structural_copy(model)), model) if level == "symbolic" and by_weight else index


def _dataflow(
    model: nn.Module, level: Capture, specs: Mapping[str, AdapterSpec], flat: Source | None
) -> Dataflow | None:
    """What patterns are matched in: the program, or a trace, if a spec asks for one."""
    if flat is not None:
        return dataflow(flat.graph, model)
    asked = any(isinstance(spec.target_modules, Pattern) for spec in specs.values())
    return dataflow(flat_graph_of(structural_copy(model)), model) if level == "symbolic" and asked else None


def _match(
    adapter: str,
    spec: AdapterSpec,
    model: nn.Module,
    level: Capture,
    index: SiteIndex,
    flow: Dataflow | None,
    dtype_for: Callable[[str], str],
    flat: Source | None,
) -> Match:
    for rule in rules_of(spec):
        find = next((row.find for row in map(op_named, rule.ops) if row.find is not None), None)
        if find is not None:
            saved, misses = match_saved(adapter, spec, index)
            found = find(model, spec, rule, index, level, dtype_for, flat)
            if isinstance(found, Miss):
                return Match(spec, (), saved, (*misses, replace(found, adapter=adapter)))
            spec, claims = found
            return Match(spec, (), saved, tuple(misses), claims)
    return match(adapter, spec, index, flow)


def _that_is_why(matches: list[Match]) -> list[Match]:
    """The matches of an adapter from a file: if nothing is left of it, then for want of what can't be adapted."""
    if any(found.sites or found.saved or found.claims for found in matches):
        return matches
    return [replace(one, misses=tuple(replace(miss, fatal=miss.error) for miss in one.misses)) for one in matches]


def _without_unused(adapter: str, found: Match, model: nn.Module, index: SiteIndex) -> Match:
    """The match without embeddings that only lend their weight to others by a tie: an adapter there would have no effect.

    T5's `shared` is one, which nobody calls. Only ends of such ties are tried: everything else is called or read.
    """
    chosen = [("target_modules", site.fqn) for site in found.sites if site.op == "embedding"]
    chosen += [("modules_to_save", fqn) for fqn in found.saved]
    leading = {*found.follows, *found.follows.values()}
    ends = {fqn: others for _, fqn in chosen if fqn not in leading and (others := _embeddings_tied(fqn, index))}
    unused_ones = unused(model, [f"{fqn}.weight" for fqn in ends])
    gone = {fqn for fqn in ends if f"{fqn}.weight" in unused_ones}
    if not gone:
        return found
    misses = [
        Miss(
            adapter, field, fqn, f"is called nowhere, it only shares its weight: name {' and '.join(ends[fqn])} instead"
        )
        for field, fqn in chosen
        if fqn in gone
    ]
    sites = tuple(site for site in found.sites if site.fqn not in gone)
    saved = tuple(fqn for fqn in found.saved if fqn not in gone)
    return replace(found, sites=sites, saved=saved, misses=(*found.misses, *misses))


def _embeddings_tied(fqn: str, index: SiteIndex) -> list[str]:
    """The other embeddings whose weight is that of `fqn`."""
    site = index.sites.get(fqn)
    owners = [name.removesuffix(".weight") for name in site.tied] if site is not None and site.op == "embedding" else []
    return [name for name in owners if name != fqn and name in index.sites and index.sites[name].op == "embedding"]


def _captured(
    model: nn.Module,
    level: Capture,
    sites: Mapping[str, WeightSite],
    called: set[str],
    index: SiteIndex,
    among: Plan | None,
    flat: Source | None,
) -> tuple[Region, ...]:
    """The regions of sites and modules that are called as they are; of one graph, with those that are there already."""
    hosts = {
        site.host: _weights(index, site.host)
        for site in sites.values()
        if site.op == "parameter" and site.host is not None
    }
    if among is not None and level != "modules":
        before = {fqn: site for fqn, site in among.sites.items() if isinstance(site, WeightSite)}
        called |= among.sites.keys() - before.keys()
        sites = {**before, **sites}
    return capture(model, level, sites, sorted(called - sites.keys()), hosts, flat)


def _weights(index: SiteIndex, host: str) -> tuple[str, ...]:
    """The names, relative to `host`, of the parameters that it computes with and that could be adapted."""
    prefix = f"{host}." if host else ""
    return tuple(fqn.removeprefix(prefix) for fqn in index.hosted.get(host, ()))


def _access(
    level: Capture, regions: Sequence[Region], sites: Mapping[str, WeightSite], model: nn.Module
) -> dict[str, Access]:
    """How every site can be reached in the regions."""
    if level != "modules":
        return _access_in_one(regions[0].source, sites, model)
    sources = {region.host: region.source for region in regions}
    found: dict[str, Access] = {}
    modules = modules_at(model, [fqn for fqn, site in sites.items() if site.host is None and sources[fqn].opaque])
    for fqn, site in sites.items():
        if site.host is not None:
            found[fqn] = Access(operands=False)
            continue
        source = sources[fqn]
        operands = not source.opaque and source.anchors[0].node is not None
        known = source.opaque and is_known_linear(modules[fqn])
        parallel = known and parallel_style(modules[fqn].__dict__.get("forward")) is not None
        found[fqn] = Access(operands, source.opaque, known, parallel=parallel)
    return found


def _access_in_one(source: Source, sites: Mapping[str, WeightSite], model: nn.Module) -> dict[str, Access]:
    """The same in the graph of the whole model: the op of a site, a call of its module, or reads of its weight."""
    by_site: dict[str, list[fx.Node | None]] = {}
    for one in (source, source.training) if source.training is not None else (source,):
        nodes = {node.name: node for node in one.graph.nodes}
        for anchor in one.anchors:
            by_site.setdefault(anchor.site, []).append(nodes.get(anchor.node or ""))
    opaque = [fqn for fqn in sites if any(node is not None and node.op == "call_module" for node in by_site[fqn])]
    known = {fqn: is_known_linear(module) for fqn, module in modules_at(model, opaque).items()}
    return {
        fqn: Access(
            operands=None not in by_site[fqn] and fqn not in known,
            opaque=fqn in known,
            known=known.get(fqn, False),
            weights=fqn not in known,
        )
        for fqn in sites
    }


def _edits(adapter: str, found: Match, access: Mapping[str, Access], dtype_for: Callable[[str], str]) -> list[Edit]:
    paths, placed = _saved_as(found.sites), _placed(found)
    edits: list[Edit] = []
    for site in found.sites:
        first, inside = found.follows.get(site.fqn), found.spec.kept_in
        rule = _rule_of(found.spec, site, first is not None)
        own, dtype = access[site.fqn], dtype_for(site.dtype)
        # What patterns say of the first end counts for all.
        asked = site if first is None else replace(site, known_as=first)
        edits.append(weight_edit(adapter, found.spec, rule, asked, own, dtype, placed[site.fqn], paths.get(site.fqn)))
        if inside is not None:
            edits[-1] = replace(edits[-1], saved_as=f"{first or site.fqn}.{inside}")
        elif rule.again:
            edits[-1] = replace(edits[-1], saved_as=first)
        if first is not None:
            edits[-1] = replace(edits[-1], follows=first)
    return edits + [claim.edit(adapter) for claim in found.claims]


def _rule_of(spec: AdapterSpec, site: WeightSite, end: bool) -> Rule[Any]:
    rule = find_rule(spec, site, end)
    if rule is None:
        raise RuleError(f"{site.fqn}: no rule of {spec.peft_type} serves {site.op}")
    return rule


def _placed(found: Match) -> dict[str, Placed]:
    """By site, what it has in common with others of its rule, and what depends on them."""
    spec, groups = found.spec, dict[Rule[Any], list[WeightSite]]()
    for site in found.sites:
        groups.setdefault(_rule_of(spec, site, site.fqn in found.follows), []).append(site)
    placed: dict[str, Placed] = {}
    for rule, own in groups.items():
        shared, each = rule.shared(spec, own), rule.placed(spec, own) or [Placed()] * len(own)
        for site, one in zip(own, each, strict=True):
            placed[site.fqn] = Placed({**shared, **one.shared}, one.constants)
    return placed


def _saved_as(sites: Sequence[WeightSite]) -> dict[str, str]:
    """What PEFT's keys have for sites that are parameters: it wraps their host once for each, the first innermost."""
    paths: dict[str, str] = {}
    hosts: dict[str, list[WeightSite]] = {}
    for site in sites:
        if site.host is not None and site.op == "parameter":
            hosts.setdefault(site.host, []).append(site)
    for host, own in hosts.items():
        if own[0].known_as is not None:
            paths |= {f"{host}.in_proj_weight": host, f"{host}.out_proj.weight": f"{host}.base_layer.out_proj"}
            continue
        for depth, site in enumerate(reversed(own)):
            paths[site.fqn] = host + ".base_layer" * depth
    return paths


def _save(adapter: str, model: nn.Module, fqn: str, first: str | None) -> Edit:
    """modules_to_save: a copy of every parameter of module `fqn`, trained, and of every persistent buffer; its weight is
    that of the copy of `first`, if there is one.
    """
    module = model.get_submodule(fqn)
    if isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward:
        inner = [f"{fqn}.{name}" for name in module._modules]
        raise CaptureError(
            f"{fqn}: is a {type(module).__name__}, which is never called itself, so a trained copy would never run."
            f" Name what is called instead: modules_to_save={inner[:8]}{' …' if len(inner) > 8 else ''}."
        )
    if any(is_offloaded(inner, p) for inner in module.modules() for p in inner._parameters.values()):
        raise CaptureError(
            f"{fqn}: accelerate has offloaded it, so there is nothing to train a copy of; keep it in memory (device_map)"
        )
    trained = dict(module.named_parameters())
    tensors = {**trained, **dict(module.named_buffers())}
    persistent = module.state_dict(keep_vars=True)
    params = tuple(
        PlannedParam(name, name, tuple(t.shape), dtype_name(t.dtype), "copy", name in trained and t.is_floating_point())
        for name, t in tensors.items()
        if name in persistent
    )
    return Edit(fqn, adapter, SAVED, ("module",), params, {}, {}, follows=first)


def _trained(adapter: str, found: Match, index: SiteIndex) -> list[TrainedTensor]:
    """The biases that `bias` trains in place: those of the adapted sites, or every parameter called bias."""
    mode = found.spec.trained_biases
    if mode == "none":
        return []
    first = {name: group[0] for group in index.ties for name in group}
    adapted = {first.get(site.bias, site.bias) for site in found.sites if site.bias is not None}
    saved = tuple(f"{fqn}." for fqn in found.saved)
    biases: list[TrainedTensor] = []
    for name, shape, dtype in index.parameters:
        if name.rpartition(".")[2] != "bias" or name.startswith(saved):
            continue
        if mode == "all" or name in adapted:
            key = name.removesuffix("bias") + "base_layer.bias" if name in adapted else name
            biases.append(TrainedTensor(name, adapter, shape, dtype_name(dtype), key))
    return biases


def _base_costs(index: SiteIndex) -> Costs:
    """Those of the model itself; a tensor that is shared counts once."""
    base = [(math.prod(shape), dtype) for _, shape, dtype in index.parameters]
    return Costs(
        trainable=0,
        total=sum(numel for numel, _ in base),
        weight_bytes=sum(numel * dtype.itemsize for numel, dtype in base),
        gradient_bytes=0,
        adam_bytes=0,
        flops_per_token=0,
    )
