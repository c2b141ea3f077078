"""How two plans differ, a line for each place."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from peftc.edits import Planned
from peftc.rule import Rule
from peftc.specs import AdapterSpec


def difference(old: Planned, new: Planned) -> str:
    """`+` what only `new` has, `-` what only `old` has, `~` what both have otherwise; empty if they are equal."""
    lines: list[str] = []
    for name in ("model", "capture", "fingerprint", "autocast_adapter_dtype", "costs", "ties", "cautions"):
        ours, theirs = getattr(old, name), getattr(new, name)
        if ours != theirs:
            lines.append(f"~ {name}: {ours} → {theirs}")
    parts = zip(_places(old), _places(new), strict=True)
    return "\n".join([*lines, *(line for (label, a), (_, b) in parts for line in _compare(label, a, b))])


def _places(plan: Planned) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        ("spec", plan.adapters),
        ("site", plan.sites),
        ("edit", {f"{edit.site} {edit.adapter} {edit.rule.name}": edit for edit in plan.edits}),
        ("trained", {tensor.name: tensor for tensor in plan.trained}),
        ("miss", {str(miss): miss for miss in plan.misses}),
        ("conflict", {str(conflict): conflict for conflict in plan.conflicts}),
    ]


def _compare(label: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    lines = [f"- {label} {key}" for key in ours if key not in theirs]
    lines += [f"+ {label} {key}" for key in theirs if key not in ours]
    for key in ours:
        if key in theirs and ours[key] != theirs[key]:
            old, new = _as_dict(ours[key]), _as_dict(theirs[key])
            changed = [name for name in old if old[name] != new.get(name)]
            lines.append(f"~ {label} {key}: " + ", ".join(f"{n} {old[n]} → {new.get(n)}" for n in changed))
    return lines


def _as_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, AdapterSpec):
        return value.to_dict()
    return {field.name: _shown(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _shown(value: Any) -> Any:
    """A rule by its name, all else as it is."""
    return value.name if isinstance(value, Rule) else value
