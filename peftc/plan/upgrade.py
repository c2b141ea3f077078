"""Plans of earlier versions in the terms of this one.

Version 2 (peftc 0.2): `kind` of a site is its `op`, and a site has the fields of its sort only; a weight that stacks
experts counts them as `experts`, where `groups` did; an edit has `slots`, and its parameters say how they are used.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter

from peftc.errors import PlanError
from peftc.graph.ops import op_named
from peftc.graph.sites import WeightSite
from peftc.plan.saved import SAVED
from peftc.registry import find_rule, spec_classes
from peftc.specs import load_spec


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """The data of a plan, brought up to this version."""
    if data["version"] > 1:
        return data
    sites = {fqn: _site(site) for fqn, site in data["sites"].items()}
    specs = {name: load_spec(spec, spec_classes()) for name, spec in data["adapters"].items()}
    edits = [_edit(edit, specs[edit["adapter"]], sites[edit["site"]]) for edit in data["edits"]]
    misses = [{**miss, "fatal": miss["field"] in ("peft_type", "task_type")} for miss in data["misses"]]
    return {**data, "version": 2, "sites": sites, "edits": edits, "misses": misses}


def _site(old: Mapping[str, Any]) -> dict[str, Any]:
    op = old["kind"]
    new = {**old, "op": op}
    if op == "parameter":
        stacked = old["groups"] > 1
        new |= {"groups": 1, "experts": old["groups"] if stacked else None}
    cls = op_named(op).site or WeightSite
    return {field.name: new[field.name] for field in fields(cls) if field.name in new}


def _edit(old: Mapping[str, Any], spec: Any, site: Mapping[str, Any]) -> dict[str, Any]:
    cls = op_named(site["op"]).site or WeightSite
    made = TypeAdapter(cls).validate_python(site)
    rule = SAVED if old["rule"] == SAVED.name else find_rule(spec, made)
    if rule is None:
        raise PlanError(f"plan: there is no rule {old['rule']!r} for {spec.peft_type} any more")
    new = {**old, "rule": {"name": old["rule"], "version": 1}, "slots": [old["slot"]]}
    del new["slot"]
    if rule.container is None:
        declared = rule.params(spec, made)
        new["constants"] = rule.constants(spec, made)
        new["params"] = [
            {**param, "use": (d := declared[param["name"]]).use, "axes": d.axes, "stored": d.stored}
            for param in old["params"]
        ]
    else:
        start = f"{rule.container}."
        new["params"] = [{**param, "key": param["key"].removeprefix(start)} for param in old["params"]]
    return new
