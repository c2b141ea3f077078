"""Weighted combination of adapters into a new one."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.merge.fold import is_finite
from peftc.plan import Edit, Plan
from peftc.registry import is_own
from peftc.rewrite.parts import Adapter
from peftc.rewrite.program import Program
from peftc.rule import Bound, Combination, Part, Rule
from peftc.specs import AdapterSpec
from peftc.specs.selection import shortest_names

_WHAT = "add_weighted_adapter"


def pairs(adapters: Any, weights: Any) -> dict[str, float]:
    """Weight by adapter. Raises AdapterError unless there is one number for every adapter, each named once."""
    lists = isinstance(adapters, list | tuple) and isinstance(weights, list | tuple)
    names, numbers = (list(cast("list[Any]", adapters)), list(cast("list[Any]", weights))) if lists else ([], [])
    plain = all(isinstance(n, str) for n in names) and all(isinstance(w, int | float) for w in numbers)
    if not lists or not plain or len(names) != len(numbers) or len(set(names)) != len(names):
        raise AdapterError(
            f"{_WHAT}: adapters {adapters!r} with weights {weights!r}: give a list of names, each once, and"
            " a list of as many numbers"
        )
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}


def checked(program: Program, weights: Mapping[str, float], how: Combination) -> Combination:
    """`how` with its default, and for a single adapter the exact way. Raises AdapterError on what makes no sense."""
    if not weights:
        raise AdapterError(f"{_WHAT}: no adapter given")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise AdapterError(f"{_WHAT}: the weight of {name!r} is {weight}")
        if any(tensor.adapter == name for tensor in program.plan.trained):
            raise AdapterError(f"{_WHAT}: {name!r} trains biases of the base model, which a combination does not hold")
        own, edits = program.plan.adapters[name], program.adapters[name].edits
        other = next((edit for edit in edits if not edit.whole and not is_own(own, edit.rule)), None)
        if other is not None:
            raise AdapterError(
                f"{_WHAT}: {name!r} has {other.rule.name} at {other.site} beside {own.peft_type}, which can't be combined"
            )
    methods = {name: program.plan.adapters[name].peft_type for name in weights}
    if len(set(methods.values())) > 1:
        raise AdapterError(f"{_WHAT}: {methods}: adapters of one method can be combined, not of several")
    _require_apart(program.adapters[name] for name in weights)
    return _resolved(
        _rule(program.adapters[next(iter(weights))]), how, [program.plan.adapters[name] for name in weights]
    )


def _require_apart(adapters: Iterable[Adapter]) -> None:
    """Modules that are saved whole can't be added up."""
    savers: dict[str, str] = {}
    for adapter in adapters:
        for edit in adapter.edits:
            if edit.whole and savers.setdefault(edit.site, adapter.name) != adapter.name:
                raise AdapterError(
                    f"{_WHAT}: {savers[edit.site]!r} and {adapter.name!r} both save {edit.site} whole (modules_to_save),"
                    " and whole modules can't be combined"
                )


def _resolved(rule: Rule[Any], how: Combination, specs: Sequence[AdapterSpec]) -> Combination:
    if not rule.combinations:
        raise AdapterError(f"{_WHAT}: adapters of few methods have a weighted sum; {rule.name} has none")
    kind = how.combination_type or next(iter(rule.combinations))
    if kind not in rule.combinations:
        raise AdapterError(f"{_WHAT}: combination_type={kind!r}: {rule.name} has {', '.join(rule.combinations)}")
    return rule.combination(replace(how, combination_type=kind), specs)


def combined_spec(program: Program, weights: Mapping[str, float], how: Combination) -> AdapterSpec:
    """The spec of the combination: exactly the sites and saved modules of its parts."""
    groups = _groups(program.plan, weights, lambda edit: not edit.whole)
    saved = tuple(_groups(program.plan, weights, lambda edit: edit.whole))
    selectors = ("exclude_modules", "layers_to_transform", "layers_pattern")
    update: dict[str, Any] = {
        "target_modules": target_names(program.base, list(groups)),
        "modules_to_save": saved or None,
        "inference_mode": True,
    }
    specs = {
        name: spec.model_copy(update={**update, **{f: None for f in selectors if f in type(spec).model_fields}})
        for name, spec in program.plan.adapters.items()
        if name in weights
    }
    return _rule(program.adapters[next(iter(weights))]).combined({name: specs[name] for name in weights}, groups, how)


def fill(program: Program, adapter: str, weights: Mapping[str, float], how: Combination) -> None:
    """Give the fresh `adapter` the values of the combination."""
    for edit in program.adapters[adapter].edits:
        sources = [
            (e, weights[name])
            for name in weights
            for e in program.adapters[name].edits
            if e.site == edit.site and e.rule == edit.rule
        ]
        if edit.whole:
            values = _tensors(program.adapters, sources[0][0])
        else:
            parts = [
                Part(weight, Bound({**_tensors(program.adapters, own), **own.constants})) for own, weight in sources
            ]
            values = edit.rule.combine(program.plan.sites[edit.site], parts, how)
        for param in edit.params:
            target = program.adapters[adapter].tensor(edit, param.key)
            _require_result(edit, target, values[param.name])
            with torch.no_grad():
                target.copy_(values[param.name])


def _require_result(edit: Edit, target: Tensor, value: Tensor) -> None:
    if value.shape != target.shape:
        raise AdapterError(
            f"{edit.site}: combining gives shape {tuple(value.shape)}, planned was {tuple(target.shape)}"
        )
    if not value.is_meta and value.is_floating_point() and not is_finite(value.to(target.dtype)):
        raise AdapterError(f"{edit.site}: combining gives NaN or Inf (a broken adapter, or weights too large)")


def _tensors(adapters: Mapping[str, Adapter], edit: Edit) -> dict[str, Tensor]:
    tensors = adapters[edit.adapter].part(edit).tensors()
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _groups(plan: Plan, weights: Mapping[str, float], wanted: Callable[[Edit], bool]) -> dict[str, list[str]]:
    """Site → the adapters that have an edit there, in module order."""
    groups: dict[str, list[str]] = {}
    for edit in plan.edits:
        if edit.adapter in weights and wanted(edit):
            groups.setdefault(edit.site, []).append(edit.adapter)
    order = list(weights)
    return {site: sorted(names, key=order.index) for site, names in groups.items()}


def _rule(adapter: Adapter) -> Rule[Any]:
    """The rule of the first edit of `adapter` that changes a site."""
    rule = next((edit.rule for edit in adapter.edits if not edit.whole), None)
    if rule is None:
        raise AdapterError(f"{_WHAT}: {adapter.name!r} adapts no module, so there is nothing to combine")
    return rule


def target_names(base: nn.Module, sites: Sequence[str]) -> tuple[str, ...]:
    """The sites' last names, if these mean no other module of `base`; else the sites themselves."""
    return shortest_names(sites, [fqn for fqn, _ in base.named_modules()])
