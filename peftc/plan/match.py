"""Matching: which sites a spec selects, and why the rest of it selects nothing.

The semantics are those of PEFT (see AdapterSpec), but nothing is skipped in silence: whatever matches nothing is a Miss.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peftc.architectures import Family, families
from peftc.edits import Miss
from peftc.errors import NoMatchError, describe_nearest, nearest
from peftc.graph.patterns import Dataflow
from peftc.graph.sites import SiteIndex, WeightSite, is_inside
from peftc.plan.by_pattern import with_names
from peftc.plan.claims import Claim
from peftc.plan.synonyms import same_meaning, stacked_as
from peftc.registry import find_rule, ops_of
from peftc.specs import AdapterSpec, LayerSelection, ParameterSelection
from peftc.specs.selection import LAYERS_PATTERN, pattern_matches, patterns_of, selects, shortest_names


@dataclass(frozen=True)
class Match:
    """A spec with its defaults resolved, the sites and whole modules it selects, and its misses.

    `claims`: of ops that are found for a spec (a model's call), what is asked for there. `follows`: of sites that another
    one takes along by a tie, which one that is. `beside`: the spec belongs to the adapter's own.
    """

    spec: AdapterSpec
    sites: tuple[WeightSite, ...]
    saved: tuple[str, ...]
    misses: tuple[Miss, ...]
    claims: tuple[Claim, ...] = ()
    follows: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    beside: bool = False


def match(adapter: str, spec: AdapterSpec, index: SiteIndex, flow: Dataflow | None = None) -> Match:
    """Resolve `spec` against the sites of a model, and in the dataflow of its program, if it is one.

    Raises NoMatchError if it needs defaults that are not known.
    """
    misses: list[Miss] = []
    spec = _with_defaults(with_names(adapter, spec, index, flow, misses), index)
    saved, saved_misses = match_saved(adapter, spec, index)
    misses += saved_misses
    names = _targets(adapter, spec, index, misses)
    excluded = _excluded(adapter, spec, index, misses)
    names = [name for name in names if name not in excluded and not is_inside(name, saved)]
    names = _in_layers(adapter, spec, names, misses)
    refused: list[Miss] = []
    unique: dict[str, WeightSite] = {}  # An attention, and one of its parameters by name, may both be given.
    chosen = [("target_modules", name, site) for name in names for site in _expanded(spec, index.sites[name], index)]
    chosen += _parameters(adapter, spec, index, misses)
    for field, name, site in chosen:
        reason = unfit(spec, site)
        if reason is None:
            unique.setdefault(site.weight or site.fqn, site)
        else:
            error = isinstance(spec.target_modules, tuple) or field == "target_parameters"
            misses.append(Miss(adapter, field, name, reason, error))
            refused.append(misses[-1])
    sites = list(unique.values())
    misses += _unused_patterns(adapter, spec, sites)
    if not sites and not saved and refused:
        misses = [dataclasses.replace(miss, error=True) if miss in refused else miss for miss in misses]
    elif not sites and not any(miss.error for miss in misses):
        misses += _nothing_left(adapter, spec, saved)
    return Match(_resolved(spec, sites, index), tuple(sites), saved, tuple(misses))


def _nothing_left(adapter: str, spec: AdapterSpec, saved: Sequence[str]) -> list[Miss]:
    """The miss of a spec that adapts nothing though no selector misses; saved modules may be all that was asked for."""
    targets = spec.named_targets
    if targets:
        value = targets if isinstance(targets, str) else ", ".join(targets)
        reason = "selects nothing: all it matches is excluded or in modules_to_save"
        return [Miss(adapter, "target_modules", value, reason)]
    reason = "is empty: name the modules to adapt, or 'all-linear' for all linear ones"
    return [] if saved else [Miss(adapter, "target_modules", "", reason)]


def _with_defaults(spec: AdapterSpec, index: SiteIndex) -> AdapterSpec:
    """Selectors that are None, by model type."""
    open_fields = [field for field in spec.defaulted if getattr(spec, field) is None]
    if not open_fields:
        return spec
    if spec.on_embedding:
        return spec.model_copy(update={"target_modules": (index.input_embedding or "embed_tokens",)})
    family: Family | None = families().get(index.model_type or "")
    defaults = family.defaults_for(type(spec)) if family else None
    if defaults is None and isinstance(spec, ParameterSelection) and spec.target_parameters:
        return spec.model_copy(update={"target_modules": ()})
    if defaults is None:
        raise NoMatchError(_no_defaults(spec, index))
    found = {field: defaults.get(field, ()) for field in open_fields}
    if isinstance(spec.target_modules, tuple):
        # Of other selectors' defaults, those that say something of the given targets; a file with more could not be read.
        found = {field: tuple(n for n in names if _names_one(n, spec.target_modules)) for field, names in found.items()}
    return spec.model_copy(update=found)


def _names_one(name: str, targets: Sequence[str]) -> bool:
    """Whether a module may have both the name and one of `targets`."""
    return any(f".{one}".endswith(f".{other}") for t in targets for one, other in ((name, t), (t, name)))


def _no_defaults(spec: AdapterSpec, index: SiteIndex) -> str:
    op = ops_of(spec)[0]  # What the method is for, before what else it can adapt.
    counts = Counter(fqn.rpartition(".")[2] for fqn, site in index.sites.items() if site.op == op)
    modules = ", ".join(f"{name} ({count})" for name, count in counts.most_common(12)) or "none"
    kind = f"model_type {index.model_type!r}" if index.model_type else "a model that is not of transformers"
    field = next(field for field in spec.defaulted if getattr(spec, field) is None)
    hint = "" if field == "target_modules" else " (use [] if no target is feed-forward)"
    return (
        f"{type(spec).__name__}.{field}: there is no default for {kind}; name them{hint}."
        f" {op.capitalize()} modules by frequency: {modules}."
    )


def _targets(adapter: str, spec: AdapterSpec, index: SiteIndex, misses: list[Miss]) -> list[str]:
    """The fqns that `target_modules` selects, in module order."""
    selector, adapted = spec.named_targets, _adaptable(spec, index)
    if isinstance(selector, str):
        if selector.lower() == "all-linear":
            return _all_linear(adapter, spec, index, misses)
        names = [fqn for fqn in index.modules if re.fullmatch(selector, fqn)]
        if not any(name in adapted for name in names):
            misses.append(Miss(adapter, "target_modules", selector, _no_match(selector, spec, index)))
        # A regular expression may take in containers on its way to the sites.
        return [name for name in names if name in adapted]
    found: set[str] = set()
    for name in selector:
        end = f".{name}"
        hits = [fqn for fqn in index.modules if fqn == name or fqn.endswith(end)]
        fit = [fqn for fqn in hits if fqn in adapted]
        if not fit:
            misses.append(Miss(adapter, "target_modules", name, _no_match(name, spec, index, hits)))
        found.update(fit)
    return [fqn for fqn in index.sites if fqn in found]


def _adaptable(spec: AdapterSpec, index: SiteIndex) -> set[str]:
    """The sites that a spec may name: those of the ops of its method, and others that it is told about by op."""
    own = ops_of(spec)
    return {fqn for fqn, site in index.sites.items() if site.op in own or site.op != "norm"}


def _all_linear(adapter: str, spec: AdapterSpec, index: SiteIndex, misses: list[Miss]) -> list[str]:
    """Every linear site but the output embedding and, for sequence classification, the head."""
    left_out = {index.output_embedding}
    if index.output_embedding is None and spec.task_type == "SEQ_CLS":
        left_out.add(next((head for head in spec.heads if head in index.modules), None))
    names: list[str] = []
    for fqn, site in index.sites.items():
        if site.op != "linear":
            continue
        if fqn not in left_out and any(_is_embedding(index, name) for name in site.tied):
            reason = "is tied to an embedding, not in 'all-linear'"
            misses.append(Miss(adapter, "target_modules", fqn, reason, error=False))
        elif fqn in left_out:
            misses.append(Miss(adapter, "target_modules", fqn, "is the output layer, not in 'all-linear'", error=False))
        else:
            names.append(fqn)
    if not names:
        misses.append(Miss(adapter, "target_modules", "all-linear", "matches nothing: the model has no linear sites"))
    return names


def _is_embedding(index: SiteIndex, weight: str) -> bool:
    owner = index.sites.get(weight.rpartition(".")[0])
    return owner is not None and owner.op == "embedding"


def _no_match(name: str, spec: AdapterSpec, index: SiteIndex, hits: Sequence[str] = ()) -> str:
    ops = ops_of(spec)
    fit = [fqn for fqn, site in index.sites.items() if site.op in ops]
    if hits:
        inside = Counter(fqn.rpartition(".")[2] for fqn in fit if fqn.startswith(f"{hits[0]}."))
        hint = f" Inside {hits[0]}: {', '.join(inside)}." if inside else ""
        return f"is a {index.modules[hits[0]]}, not one of {spec.peft_type}'s kinds ({', '.join(ops)}).{hint}"
    alias = next((alias for alias in index.aliases if selects((name,), alias)), None)
    if alias is not None:
        return f"is another name of {index.aliases[alias]!r}; use that one"
    counts = Counter(fqn.rpartition(".")[2] for fqn in fit)
    end = name.rpartition(".")[2]
    near = nearest(end, counts) or same_meaning(end, counts)
    stacked = [fqn for fqn in stacked_as(end, index.inner) if index.inner[fqn].experts]
    if stacked and "parameter" in ops:
        ends = list(dict.fromkeys(".".join(fqn.split(".")[-2:]) for fqn in stacked))
        return f"matches none of {len(fit)} sites. Experts hold theirs stacked: give target_parameters={ends}."
    regex = (
        " (a string is a regular expression that must match the whole fqn)"
        if isinstance(spec.target_modules, str)
        else ""
    )
    listing = describe_nearest(near, counts) or f" The sites are named: {', '.join(list(counts)[:8]) or 'none'}."
    return f"matches none of {len(fit)} sites{regex}.{listing}"


def _excluded(adapter: str, spec: AdapterSpec, index: SiteIndex, misses: list[Miss]) -> set[str]:
    selector = spec.exclude_modules
    if not selector:
        return set()
    for part in (selector,) if isinstance(selector, str) else selector:
        if not any(selects(part if isinstance(selector, str) else (part,), fqn) for fqn in index.modules):
            misses.append(Miss(adapter, "exclude_modules", part, f"matches no module.{_near(part, index.modules)}"))
    return {fqn for fqn in index.sites if selects(selector, fqn)}


def match_saved(adapter: str, spec: AdapterSpec, index: SiteIndex) -> tuple[tuple[str, ...], list[Miss]]:
    """The outermost modules that `modules_to_save` and the task's heads name (a name matches an fqn's end, as in PEFT)."""
    asked = spec.modules_to_save or ()
    names = dict.fromkeys((*asked, *spec.heads))
    found: list[str] = []
    misses: list[Miss] = []
    for name in names:
        hits = [fqn for fqn in index.modules if fqn.endswith(name)]
        if not hits and name in asked and name not in spec.heads:
            misses.append(Miss(adapter, "modules_to_save", name, f"matches no module.{_near(name, index.modules)}"))
        for hit in hits:
            site = index.sites.get(hit)
            if site is not None and site.refusal is not None:
                misses.append(Miss(adapter, "modules_to_save", hit, f"can't be trained apart: {site.refusal}"))
            else:
                found.append(hit)
    outer = [fqn for fqn in index.modules if fqn in found and not any(fqn.startswith(f"{other}.") for other in found)]
    return tuple(outer), misses


def _in_layers(adapter: str, spec: AdapterSpec, names: list[str], misses: list[Miss]) -> list[str]:
    """Those in the layers that `layers_to_transform` names; `layers_pattern` says which list is meant."""
    if not isinstance(spec, LayerSelection) or spec.layers_to_transform is None:
        return names
    layer_of = {name: _layer(name, spec.layers_pattern) for name in names}
    known = sorted({layer for layer in layer_of.values() if layer is not None})
    for layer in spec.layers_to_transform:
        if layer not in known:
            lists = f" of {', '.join(map(repr, spec.layers_pattern))} (layers_pattern)" if spec.layers_pattern else ""
            span = (
                f"the targets are in layers {known[0]}–{known[-1]}"
                if known
                else f"no target is in a numbered layer{lists}"
            )
            misses.append(Miss(adapter, "layers_to_transform", str(layer), f"matches no target: {span}"))
    return [name for name in names if layer_of[name] in spec.layers_to_transform]


def in_layer(spec: LayerSelection, fqn: str) -> bool:
    """Whether `fqn` is in a layer that `spec` is for."""
    return spec.layers_to_transform is None or _layer(fqn, spec.layers_pattern) in spec.layers_to_transform


def _layer(fqn: str, patterns: Sequence[str] | None) -> int | None:
    if not patterns:
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", fqn)
        return int(found[1]) if found else None
    for pattern in patterns:
        found = re.match(LAYERS_PATTERN.format(pattern), fqn)
        if found:
            return int(found["idx"])
    return None


def _expanded(spec: AdapterSpec, site: WeightSite, index: SiteIndex) -> list[WeightSite]:
    """The site, or the parameters it stands for, if the method adapts such."""
    if site.op != "attention" or "parameter" not in ops_of(spec):
        return [site]
    return [index.inner[fqn] for fqn in index.hosted[site.fqn]]


def _parameters(
    adapter: str, spec: AdapterSpec, index: SiteIndex, misses: list[Miss]
) -> list[tuple[str, str, WeightSite]]:
    """The sites of the parameters that `target_parameters` names (a name matches an fqn's end, as in PEFT), in module
    order; the weight of a linear is that linear, which is adapted alike.
    """
    wanted = spec.target_parameters or () if isinstance(spec, ParameterSelection) else ()
    if not wanted:
        return []
    linears = [site for site in index.sites.values() if site.op == "linear" and site.layout == "out_in"]
    known = {**{site.weight: site for site in linears if site.weight is not None}, **index.inner}
    found: set[str] = set()
    for name in wanted:
        hits = {fqn: shape for fqn, shape, _ in index.parameters if fqn == name or fqn.endswith(f".{name}")}
        fit = [fqn for fqn in hits if fqn in known]
        found.update(fit)
        if not fit:
            misses.append(Miss(adapter, "target_parameters", name, _no_parameter(name, hits, index)))
    return [("target_parameters", fqn, site) for fqn, site in known.items() if fqn in found]


def _no_parameter(name: str, hits: Mapping[str, tuple[int, ...]], index: SiteIndex) -> str:
    for fqn, shape in hits.items():
        module = fqn.rpartition(".")[0]
        if module in index.sites and len(shape) > 1:
            return f"is the weight of {index.sites[module].op} {module!r}: name that in target_modules"
        return f"is of shape {shape}; a matrix is expected, or one for each expert in three dimensions"
    return f"matches no parameter.{_near(name.rpartition('.')[2], index.inner, 'parameter')}"


def _near(name: str, fqns: Iterable[str], what: str = "module") -> str:
    """Which of these names are like `name`."""
    counts = Counter(fqn.rpartition(".")[2] for fqn in fqns if fqn)
    return describe_nearest(nearest(name, counts), counts, what)


def unfit(spec: AdapterSpec, site: WeightSite, end: bool = False) -> str | None:
    """The reason why `site` can't be adapted; `end`: as the end of a tie."""
    if site.refusal is not None:
        return f"can't be adapted: {site.refusal}"
    rule = find_rule(spec, site, end)
    if rule is None:
        return f"is {site.op}; {spec.peft_type} adapts {', '.join(ops_of(spec))}"
    reason = rule.refusal(spec, site)
    return f"can't be adapted: {reason}" if reason else None


def _unused_patterns(adapter: str, spec: AdapterSpec, sites: Sequence[WeightSite]) -> list[Miss]:
    return [
        Miss(adapter, field, key, f"matches none of the {len(sites)} adapted sites")
        for field, patterns in patterns_of(spec).items()
        for key in patterns
        if not any(pattern_matches(key, site.name) for site in sites)
    ]


def _resolved(spec: AdapterSpec, sites: Sequence[WeightSite], index: SiteIndex) -> AdapterSpec:
    """`all-linear` as the names it stands for here: last parts where they select the same sites, else whole fqns."""
    if not (isinstance(spec.target_modules, str) and spec.target_modules.lower() == "all-linear"):
        return spec
    return spec.model_copy(update={"target_modules": shortest_names([site.fqn for site in sites], index.modules)})
