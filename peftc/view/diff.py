"""How two plans differ, a line for each place; layers that differ alike are in one."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peftc.edits import Edit, Planned, PlannedParam
from peftc.specs import AdapterSpec
from peftc.view.groups import span, unnumbered
from peftc.view.words import flops, in_bytes, number, shape


def difference(old: Planned, new: Planned) -> str:
    """`+` what only `new` has, `-` what only `old` has, `~` what both have otherwise; empty if they are equal.

    `~ edit layers.{0–3}.q_proj default lora: lora_A 4×32 → 8×32, …` is of four edits.
    """
    lines = [f"~ {name}: {told}" for name, told in heads_apart([old, new])]
    if old.costs != new.costs:
        lines.append(f"~ costs: {_apart(_costs(old), _costs(new))}")
    parts = zip(_places(old), _places(new), strict=True)
    return "\n".join([*lines, *(line for (label, a), (_, b) in parts for line in _compare(label, a, b))])


def heads_apart(plans: Sequence[Planned]) -> list[tuple[str, str]]:
    """What plans say otherwise of the model and how it is captured: `capture`, `modules → symbolic`."""
    told = ("model", "capture", "fingerprint", "autocast_adapter_dtype")
    pairs = [(name, [str(getattr(plan, name)) for plan in plans]) for name in told]
    return [(name, " → ".join(own)) for name, own in pairs if len(set(own)) > 1]


def _places(plan: Planned) -> list[tuple[str, Mapping[tuple[str, str], Any]]]:
    """What there is of each kind, by the name of a site (or all of a name) and what follows it in a line."""
    return [
        ("spec", {(name, ""): spec for name, spec in plan.adapters.items()}),
        ("site", {(fqn, ""): site for fqn, site in plan.sites.items()}),
        ("edit", {(edit.site, f" {edit.adapter} {edit.rule.name}"): edit for edit in plan.edits}),
        ("trained", {(tensor.name, f" {tensor.adapter}"): tensor for tensor in plan.trained}),
        ("tie", {("", " = ".join(group)): None for group in plan.ties}),
        ("caution", {("", caution): None for caution in plan.cautions}),
        ("miss", {("", str(miss)): miss for miss in plan.misses}),
        ("conflict", {("", f"{one.site or 'the model'}: {one.reason}"): one for one in plan.conflicts}),
    ]


def _compare(label: str, ours: Mapping[tuple[str, str], Any], theirs: Mapping[tuple[str, str], Any]) -> Iterator[str]:
    found = [("-", key, "") for key in ours if key not in theirs]
    found += [("+", key, "") for key in theirs if key not in ours]
    for key in ours:
        if key in theirs and ours[key] != theirs[key]:
            found.append(("~", key, ": " + _apart(_facts(ours[key]), _facts(theirs[key]))))
    groups: dict[tuple[str, ...], list[str]] = {}
    for mark, (name, after), text in found:
        groups.setdefault((mark, unnumbered(name), after, text), []).append(name)
    for (mark, _, after, text), names in groups.items():
        yield f"{mark} {label} {span(names)}{after}{text}"


def _apart(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """`r 4 → 8, …`; a dash stands for what one of them has not."""
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return ", ".join(f"{name} {ours.get(name, '–')} → {theirs.get(name, '–')}" for name in names) or "differs"


def _costs(plan: Planned) -> dict[str, str]:
    costs = plan.costs
    return {
        "trainable": f"{costs.trainable:,}",
        "total": f"{costs.total:,}",
        "weights": in_bytes(costs.weight_bytes),
        "gradients": in_bytes(costs.gradient_bytes),
        "Adam states": in_bytes(costs.adam_bytes),
        "compute": flops(costs.flops_per_token),
    }


def _facts(value: Any) -> dict[str, str]:
    """What there is to say of a part of a plan, by name."""
    if isinstance(value, AdapterSpec):
        return {name: str(own) for name, own in value.to_dict().items()}
    if isinstance(value, PlannedParam):
        return {"": shape(value.shape), **{name: text for name, text in _fields(value).items() if name != "shape"}}
    if not isinstance(value, Edit):
        return _fields(value)
    params = {f"{param.name} {name}".strip(): text for param in value.params for name, text in _facts(param).items()}
    constants = {name: number(own) for name, own in value.constants.items()}
    dropouts = {f"{name} p": number(own) for name, own in value.dropouts.items()}
    rule = {"rule": f"{value.rule.name} {value.rule.version}", "compute": flops(value.flops_per_token)}
    shown = ("params", "constants", "dropouts", "rule", "flops_per_token")
    others = {name: text for name, text in _fields(value).items() if name not in shown}
    return {**params, **constants, **dropouts, **rule, **others}


def _fields(value: Any) -> dict[str, str]:
    return {field.name: number(getattr(value, field.name)) for field in dataclasses.fields(value)}
