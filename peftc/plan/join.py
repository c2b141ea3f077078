"""Plans of several adapters: joined from those of each, and without one of them again."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from peftc.edits import Conflict, Costs, Edit, TrainedTensor
from peftc.graph.sites import Site, WeightSite, dtype_of, is_inside
from peftc.plan.plan import Plan
from peftc.specs import AdapterSpec


def joined(among: Plan | None, new: Plan, order: Sequence[str]) -> Plan:
    """The plan of the adapters of `among`, if given, and then those of `new`, in the `order` of the model's modules."""
    old = among or replace(new, adapters={}, sites={}, edits=(), trained=(), misses=())
    position = {fqn: at for at, fqn in enumerate(order)}
    adapters = {**old.adapters, **new.adapters}
    loaded, count = {name: at for at, name in enumerate(adapters)}, len(adapters)
    edits = sorted(
        (*old.edits, *new.edits),
        # By site, copies last (what they copy is the module before any rewrite), by adapter: as one number, for speed.
        key=lambda edit: (2 * position[edit.site] + edit.rule.whole) * count + loaded[edit.adapter],
    )
    sites = {**old.sites, **new.sites}
    trained = (*old.trained, *new.trained)
    return replace(
        new,
        adapters=adapters,
        sites={fqn: sites[fqn] for fqn in sorted(sites, key=position.__getitem__)},
        edits=tuple(edits),
        trained=trained,
        misses=(*old.misses, *new.misses),
        conflicts=_conflicts(adapters, new.adapters, edits),
        cautions=_cautions([*sites.values()], edits),
        costs=new.costs if among is None else add_costs(among.costs, added_costs(new.edits, new.trained), 1),
    )


def without(plan: Plan, adapter: str) -> Plan:
    """The plan of the other adapters of `plan`."""
    gone = [edit for edit in plan.edits if edit.adapter == adapter]
    edits = tuple(edit for edit in plan.edits if edit.adapter != adapter)
    left = {edit.site for edit in edits}
    sites = {fqn: site for fqn, site in plan.sites.items() if fqn in left}
    lost = tuple(tensor for tensor in plan.trained if tensor.adapter == adapter)
    return replace(
        plan,
        adapters={name: spec for name, spec in plan.adapters.items() if name != adapter},
        sites=sites,
        edits=edits,
        trained=tuple(tensor for tensor in plan.trained if tensor.adapter != adapter),
        misses=tuple(miss for miss in plan.misses if miss.adapter != adapter),
        cautions=_cautions([*sites.values()], edits),
        costs=add_costs(plan.costs, added_costs(gone, lost), -1),
    )


def _conflicts(
    adapters: Mapping[str, AdapterSpec], new: Collection[str], edits: Sequence[Edit]
) -> tuple[Conflict, ...]:
    """Between each of `new` and the adapters before it."""
    saved: dict[str, list[str]] = {name: [] for name in adapters}
    adapted: dict[str, list[str]] = {name: [] for name in adapters}
    if any(rule.whole for rule in {edit.rule for edit in edits}):
        for edit in edits:
            (saved if edit.whole else adapted)[edit.adapter].append(edit.site)
    found: list[Conflict] = []
    names = list(adapters)
    for position, second in enumerate(names):
        for first in names[:position] if second in new else ():
            for saver, other in ((first, second), (second, first)):
                nested = [fqn for fqn in saved[other] if fqn not in saved[saver]]
                found += _between(saver, other, saved[saver], [*adapted[other], *nested])
            if adapters[first].trained_biases != "none" and adapters[second].trained_biases != "none":
                reason = "both train biases of the base model; set bias='none' in one"
                found.append(Conflict("", (first, second), reason))
    return tuple(found)


def _between(saver: str, other: str, whole: Sequence[str], places: Sequence[str]) -> list[Conflict]:
    """Modules that `saver` saves `whole`, around or inside of which `other` adapts or saves something else."""
    return [
        Conflict(fqn, (saver, other), f"{saver!r} saves it whole (modules_to_save), {other!r} changes {inner!r} in it")
        for fqn in whole
        for inner in places
        if is_inside(inner, (fqn,))
    ]


def _cautions(sites: Sequence[Site], edits: Sequence[Edit]) -> tuple[str, ...]:
    """What a reviewer should know: ties, layouts a spec gets wrong, what can't be merged."""
    found: dict[str, list[str]] = {}
    going = {fqn for edit in edits if edit.follows is not None for fqn in (edit.site, edit.follows)}
    for site in sites:
        others = [name for name in site.tied if name != site.weight] if isinstance(site, WeightSite) else []
        others = [name for name in others if site.fqn not in going or name.rpartition(".")[0] not in going]
        if others:
            text = f"is tied to {', '.join(others)}: that end keeps its weight; merging here needs untie=True"
            found.setdefault(text, []).append(site.fqn)
    for edit in edits:
        if "weight" in edit.slots:
            found.setdefault("is adapted as a weight, computed anew in every call", []).append(edit.site)
            dropped = [name for name, probability in edit.dropouts.items() if probability > 0]
            if dropped:
                text = f"is adapted as a weight, to which {', '.join(dropped)} of its input can't apply"
                found.setdefault(text, []).append(edit.site)
        if edit.unmergeable and edit.params:
            found.setdefault(f"can't be merged: {edit.unmergeable}", []).append(edit.site or "the model")
        for text in edit.rule.cautions(edit.constants, edit.slots):
            found.setdefault(text, []).append(edit.site or "the model")
    return tuple(
        f"{fqns[0]}{f' (and {len(fqns) - 1} more)' if len(fqns) > 1 else ''} {text}" for text, fqns in found.items()
    )


def added_costs(edits: Sequence[Edit], trained: Sequence[TrainedTensor]) -> Costs:
    """What edits and trained biases add to the costs of the model itself."""
    pairs = [(edit, param) for edit in edits if edit.follows is None for param in edit.params]
    shared = {(edit.adapter, param.key): param for edit, param in pairs if param.shared}
    added = [*(param for _, param in pairs if not param.shared), *shared.values()]
    biases = [(math.prod(tensor.shape), dtype_of(tensor.dtype).itemsize) for tensor in trained]
    trainable = [(param.numel, dtype_of(param.dtype).itemsize) for param in added if param.trainable] + biases
    count = sum(numel for numel, _ in trainable)
    return Costs(
        trainable=count,
        total=sum(param.numel for param in added),
        weight_bytes=sum(param.numel * dtype_of(param.dtype).itemsize for param in added),
        gradient_bytes=sum(numel * itemsize for numel, itemsize in trainable),
        adam_bytes=8 * count,
        flops_per_token=sum(edit.flops_per_token for edit in edits),
    )


def add_costs(costs: Costs, more: Costs, sign: int = 1) -> Costs:
    """`costs` with `more` added, or with sign -1 taken off."""
    a, b = dataclasses.astuple(costs), dataclasses.astuple(more)
    return Costs(*(own + sign * other for own, other in zip(a, b, strict=True)))
