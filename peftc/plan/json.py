"""Plans as JSON, both ways. Of an edit's rule it holds the name and the version, which are looked up once, in reading."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from peftc.edits import VERSION, Planned
from peftc.errors import PeftcError, PlanError
from peftc.graph.ops import op_named
from peftc.graph.sites import Site, WeightSite
from peftc.plan.saved import SAVED
from peftc.plan.upgrade import upgraded
from peftc.registry import find_rules, spec_classes
from peftc.rule import Rule
from peftc.specs import AdapterSpec, load_spec


def to_json(plan: Planned) -> str:
    """The plan as JSON text."""
    return json.dumps(plan, default=_terms, indent=1)


def _terms(value: Any) -> Any:
    if isinstance(value, AdapterSpec):
        return value.to_dict()
    if isinstance(value, Rule):
        return {"name": value.name, "version": value.version}
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def read_json(text: str) -> dict[str, Any]:
    """The fields of a plan from JSON text. Raises PlanError if it is none, or if a rule is not the same any more."""
    try:
        data: Any = json.loads(text)
        if not isinstance(data, dict) or data.get("version") not in range(1, VERSION + 1):
            raise PlanError(f"plan: version {VERSION} expected; print a new plan with this peftc")
        data = upgraded(cast("dict[str, Any]", data))
        known = spec_classes()
        data["adapters"] = {name: load_spec(spec, known) for name, spec in data["adapters"].items()}
        data["sites"] = {fqn: _site(site) for fqn, site in data["sites"].items()}
        data["edits"] = [_edit(edit, data["adapters"], data["sites"]) for edit in data["edits"]]
        fields = _fields()
        return {name: fields[name].validate_python(value) for name, value in data.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise PlanError(f"plan: not a plan that peftc wrote: {type(error).__name__}: {error}") from None
    except PlanError:
        raise
    except PeftcError as error:
        raise PlanError(f"plan: {error}") from None


@functools.cache
def _fields() -> dict[str, TypeAdapter[Any]]:
    """How to read each field; specs and sites are read before."""
    known = ("adapters", "sites")
    return {name: TypeAdapter(Any if name in known else kind) for name, kind in get_type_hints(Planned).items()}


@functools.cache
def _reader(cls: type[Site]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _site(data: Mapping[str, Any]) -> Site:
    return _reader(op_named(data["op"]).site or WeightSite).validate_python(data)


def _edit(data: dict[str, Any], adapters: Mapping[str, AdapterSpec], sites: Mapping[str, Site]) -> dict[str, Any]:
    name, version = data["rule"]["name"], data["rule"]["version"]
    found = find_rules(adapters[data["adapter"]], sites[data["site"]], data.get("follows") is not None)
    rule = SAVED if name == SAVED.name else next((one for one in found if one.name == name), next(iter(found), None))
    if rule is None or (rule.name, rule.version) != (name, version):
        here = f"is {rule.name!r}, version {rule.version}" if rule is not None else "is none"
        raise PlanError(
            f"plan: {data['site']} was planned with rule {name!r}, version {version}; here the rule for"
            f" {adapters[data['adapter']].peft_type} {here}. Print a new plan."
        )
    return {**data, "rule": rule}
