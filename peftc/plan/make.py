"""Making a plan: match every adapter's spec, let the rules declare, add up."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import nn

from peftc.architectures import families
from peftc.errors import CaptureError, PlanError
from peftc.graph.capture import capture
from peftc.graph.fingerprint import fingerprint
from peftc.graph.region import Capture, Region
from peftc.graph.sites import Site, SiteIndex, dtype_name, dtype_of, index_sites
from peftc.plan.calls import call_edits, match_call
from peftc.plan.join import add_costs, added_costs, joined
from peftc.plan.match import Match, match
from peftc.plan.plan import MODULES_TO_SAVE, Costs, Edit, Plan, PlannedParam, TrainedTensor
from peftc.registry import find_prompt_rule, find_rule
from peftc.rule import Param, Rule, flops_per_token, validate
from peftc.specs import AdapterSpec, PromptSpec


def make_plan(
    model: nn.Module,
    specs: Mapping[str, AdapterSpec],
    level: Capture,
    autocast_adapter_dtype: bool,
    among: Plan | None = None,
) -> tuple[Plan, tuple[Region, ...]]:
    """The plan of adapting `model` with `specs` (by adapter name, in order), and the regions it was made on.

    `among`: the plan of the adapters that the model has already; the new plan is of all, the regions are those of the new
    sites (of all, with `symbolic`). Misses and conflicts are in the plan, not raised. Raises NoMatchError (no defaults
    for the model type), CaptureError.
    """
    _require_capturable(model, level)
    index = index_sites(model)
    matches = {name: _match(name, spec, model, level, index) for name, spec in specs.items()}
    touched = {site.fqn for found in matches.values() for site in found.sites}
    calls = {call.site.fqn: call.site for found in matches.values() for call in found.calls}
    saved = {fqn for found in matches.values() for fqn in found.saved}
    sites = {fqn: site for fqn, site in (*index.sites.items(), *index.inner.items()) if fqn in touched}
    # A site inside a module that another adapter saves is a conflict; it is captured as the site it also is.
    whole = saved - touched
    hosts = {site.host: _weights(index, site.host) for site in sites.values() if site.host is not None}
    if hosts and level != "modules":
        raise CaptureError(f"{next(iter(hosts))}: its weights can be adapted with capture='modules' only")
    own = [fqn for fqn, site in sites.items() if site.host is None]
    inlined, called = _captured(among if level == "symbolic" else None, own, sorted(whole | set(calls)))
    regions = capture(model, level, inlined, called, hosts)
    opaque = _opaque(level, regions)
    edits = _edits(matches, model, opaque, partial(_adapter_dtype, autocast=autocast_adapter_dtype))
    trained = tuple(t for name, found in matches.items() for t in _trained(name, found, index))
    plan = Plan(
        model=type(model).__name__,
        capture=level,
        fingerprint=fingerprint(model, index),
        adapters={name: found.spec for name, found in matches.items()},
        sites=_with_roles({**sites, **{fqn: _whole(model, fqn) for fqn in whole}, **calls}, index),
        edits=tuple(edits),
        trained=trained,
        misses=tuple(miss for found in matches.values() for miss in found.misses),
        conflicts=(),
        ties=index.ties,
        cautions=(),
        autocast_adapter_dtype=autocast_adapter_dtype,
        costs=add_costs(_base_costs(index), added_costs(edits, trained)),
    )
    order = [name for fqn in index.modules for name in (fqn, *index.hosted.get(fqn, ()))]
    return joined(among, plan, order), regions


def _require_capturable(model: Any, level: str) -> None:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {model!r}")
    if level not in ("modules", "symbolic"):
        raise CaptureError(f"capture={level!r}: valid are 'modules' and 'symbolic'")


def _weights(index: SiteIndex, host: str) -> tuple[str, ...]:
    """The names, relative to `host`, of the parameters that it computes with and that could be adapted."""
    prefix = f"{host}." if host else ""
    return tuple(fqn.removeprefix(prefix) for fqn in index.hosted.get(host, ()))


def _captured(among: Plan | None, sites: list[str], saved: list[str]) -> tuple[list[str], list[str]]:
    """The sites to inline and the modules to leave as calls, with those of the plan that is there."""
    if among is None:
        return sites, saved
    before = {fqn: site.kind in ("module", "call") for fqn, site in among.sites.items()}
    inlined = dict.fromkeys([*(fqn for fqn, whole in before.items() if not whole), *sites])
    called = {*saved, *(fqn for fqn, whole in before.items() if whole)}
    return list(inlined), sorted(called - set(inlined))


def _edits(
    matches: Mapping[str, Match], model: nn.Module, opaque: Collection[str], adapted: Callable[[str], str]
) -> list[Edit]:
    edits: list[Edit] = []
    for name, found in matches.items():
        paths = _saved_as(found.sites)
        for site in found.sites:
            path = paths.get(site.fqn)
            edits.append(_edit(name, found.spec, site, site.fqn in opaque, adapted(site.dtype), path))
        edits += call_edits(name, found, adapted)
    # Copies come last: what they copy is the module before any rewrite.
    return edits + [_save(name, model, fqn) for name, found in matches.items() for fqn in found.saved]


def _saved_as(sites: Sequence[Site]) -> dict[str, str]:
    """What PEFT's keys have for sites that are parameters: it wraps their host once for each, the first innermost."""
    paths: dict[str, str] = {}
    hosts: dict[str, list[Site]] = {}
    for site in sites:
        if site.host is not None:
            hosts.setdefault(site.host, []).append(site)
    for host, own in hosts.items():
        if own[0].known_as is not None:
            paths |= {f"{host}.in_proj_weight": host, f"{host}.out_proj.weight": f"{host}.base_layer.out_proj"}
            continue
        for depth, site in enumerate(reversed(own)):
            paths[site.fqn] = host + ".base_layer" * depth
    return paths


def _match(adapter: str, spec: AdapterSpec, model: nn.Module, level: Capture, index: SiteIndex) -> Match:
    rule = find_prompt_rule(spec)
    if rule is None:
        return match(adapter, spec, index)
    return match_call(adapter, cast(PromptSpec, spec), rule, model, level, index)


def require_same(planned: Plan, made: Plan) -> None:
    """Refuse a model whose plan is another one. Misses do not count: a shorthand is resolved in the plan."""
    # A plan made on the meta device or the CPU holds wherever the weights are.
    here = replace(made, sites={fqn: replace(site, device="") for fqn, site in made.sites.items()})
    there = replace(planned, sites={fqn: replace(site, device="") for fqn, site in planned.sites.items()})
    for name in ("model", "fingerprint", "sites", "edits", "trained", "autocast_adapter_dtype"):
        if getattr(there, name) != getattr(here, name):
            lines = there.diff(replace(here, misses=there.misses)).split("\n")
            more = f"\n… and {len(lines) - 10} more" if len(lines) > 10 else ""
            raise PlanError(
                f"the plan does not hold for this {made.model}: its {name} differs. Make a new plan, or change the spec"
                " instead of the plan. From the plan to this model:\n" + "\n".join(lines[:10]) + more
            )


def _opaque(level: Capture, regions: Sequence[Region]) -> set[str]:
    """Sites whose own forward is called as it is."""
    if level == "modules":
        return {region.host for region in regions if region.source.opaque}
    nodes = {node.name: node for region in regions for node in region.source.graph.nodes}
    return {a.site for region in regions for a in region.source.anchors if nodes[a.node].op == "call_module"}


def _edit(adapter: str, spec: AdapterSpec, site: Site, opaque: bool, dtype: str, saved_as: str | None) -> Edit:
    rule = find_rule(spec, site)
    assert rule is not None  # match() keeps only sites that have a rule
    if opaque and site.kind != "linear":
        raise CaptureError(
            f"{site.fqn}: torch.fx can't trace the forward of this {site.module}, or it uses its weight in other ways"
            f" than one {site.kind} op, so there is no op to adapt. Leave it out (exclude_modules)."
        )
    params, constants, dropouts = rule.params(spec, site), rule.constants(spec, site), rule.dropouts(spec, site)
    slot = rule.slot(spec, site)
    validate(rule, slot, params, constants, dropouts)
    return Edit(
        site=site.fqn,
        adapter=adapter,
        rule=rule.name,
        slot=slot,
        params=tuple(_planned(name, param, dtype) for name, param in params.items()),
        constants=constants,
        dropouts=dropouts,
        flops_per_token=0 if slot == "weight" else flops_per_token(params),
        opaque=opaque,
        unmergeable=_unmergeable(rule, spec, site, opaque),
        saved_as=saved_as,
    )


def _adapter_dtype(weight: str, autocast: bool) -> str:
    """float32 for half precision (if `autocast`) and for everything that is no dtype to train in (int8, float8)."""
    dtype = dtype_of(weight)
    trainable = dtype.is_floating_point and dtype.itemsize > 1
    return "float32" if not trainable or (autocast and dtype.itemsize == 2) else weight


def _planned(name: str, param: Param, dtype: str) -> PlannedParam:
    return PlannedParam(name, param.key or name, param.shape, dtype, param.init, param.trainable)


def _unmergeable(rule: Rule[AdapterSpec], spec: AdapterSpec, site: Site, opaque: bool) -> str | None:
    if opaque:
        return f"the forward of {site.module} can't be traced, so what it does with its weight is not known"
    if site.weight is None or not dtype_of(site.dtype).is_floating_point or dtype_of(site.dtype).itemsize == 1:
        return f"its weight is {'no plain parameter' if site.weight is None else site.dtype}"
    return site.no_fold or rule.cannot_fold(spec, site)


def _save(adapter: str, model: nn.Module, fqn: str) -> Edit:
    """modules_to_save: a copy of every parameter of module `fqn`, trained, and of every persistent buffer."""
    module = model.get_submodule(fqn)
    trained = dict(module.named_parameters())
    tensors = {**trained, **dict(module.named_buffers())}
    persistent = module.state_dict(keep_vars=True)
    params = tuple(
        PlannedParam(name, name, tuple(t.shape), dtype_name(t.dtype), "copy", name in trained and t.is_floating_point())
        for name, t in tensors.items()
        if name in persistent
    )
    return Edit(fqn, adapter, MODULES_TO_SAVE, "module", params, {}, {})


def _whole(model: nn.Module, fqn: str) -> Site:
    """A module saved whole, as a site."""
    module = model.get_submodule(fqn)
    first = next(module.parameters(), None)
    return Site(
        fqn=fqn,
        kind="module",
        module=type(module).__name__,
        in_features=0,
        out_features=0,
        dtype=dtype_name(first.dtype) if first is not None else "float32",
        device=str(first.device) if first is not None else "cpu",
    )


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


def _with_roles(sites: dict[str, Site], index: SiteIndex) -> dict[str, Site]:
    family = families().get(index.model_type or "")
    if family is None:
        return sites
    return {fqn: replace(site, role=family.role_of(fqn)) for fqn, site in sites.items()}


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
