"""Discovery: rules and architectures are found by entry point, peftc's own like anyone's."""

import functools
import inspect
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from peftc.errors import RuleError
from peftc.graph.ops import op_named
from peftc.graph.sites import Site
from peftc.rule import Rule
from peftc.specs.base import AdapterSpec
from peftc.specs.selection import SELECTIONS

GROUP = "peftc.rules"
_extra: list[Rule[Any]] = []


def register(rule: Rule[Any]) -> None:
    """Add a rule to this process, as an entry point `peftc.rules` does for an installed package.

    Raises RuleError if the rule is incomplete, or its method and op are taken by a rule that serves the same specs.
    Example: peftc.register(Gain())
    """
    _check(rule)
    for op in rule.ops:
        other = _clash(rule, _table().get((_peft_type(rule), op), ()))
        if other is not None:
            raise RuleError(f"{_where(rule)}: {_peft_type(rule)} on {op} sites is taken by {_where(other)}")
    _extra.append(rule)
    _table.cache_clear()


def unregister(rule: Rule[Any]) -> None:
    """Take a registered rule back.

    Example: peftc.unregister(rule)
    """
    if rule not in _extra:
        raise RuleError(f"{_where(rule)} is not registered")
    _extra.remove(rule)
    _table.cache_clear()


def rules() -> tuple[Rule[Any], ...]:
    """All rules, those of installed packages first."""
    return (*_installed(), *_extra)


def find_rule(spec: AdapterSpec, site: Site, end: bool = False) -> Rule[Any] | None:
    """The rule for the method and the flags of `spec` on the op of `site`, or None. `end`: of a tie, where a rule for such
    ends goes first.
    """
    every = _table().get((spec.peft_type, site.op), ())
    found = [rule for rule in every if rule.ends_only is end] or [rule for rule in every if not rule.ends_only]
    # A rule that says which specs it serves comes before one that serves all.
    chosen = [rule for rule in found if rule.serves(spec)]
    return next((rule for rule in chosen if rule.offers("serves")), chosen[0] if chosen else None)


def find_rules(spec: AdapterSpec, site: Site, end: bool) -> tuple[Rule[Any], ...]:
    """The rules for `site` of `spec` and of the specs that belong to it. `end`: as in `find_rule`."""
    found = (find_rule(one, site, end) for one in (spec, *companions_of(spec)))
    return tuple(dict.fromkeys(rule for rule in found if rule is not None))


def rules_of(spec: AdapterSpec) -> tuple[Rule[Any], ...]:
    """The rules of the method of `spec`, and of those that belong to it."""
    return tuple(dict.fromkeys(rule for one in (spec, *companions_of(spec)) for rule in own_rules(one)))


def own_rules(spec: AdapterSpec) -> tuple[Rule[Any], ...]:
    """The rules of the method of `spec` itself."""
    found = (rule for (peft_type, _), several in _table().items() if peft_type == spec.peft_type for rule in several)
    return tuple(dict.fromkeys(found))


def is_own(spec: AdapterSpec, rule: Rule[Any]) -> bool:
    """Whether `rule` is of the method of `spec` itself: not of a spec that belongs to it, nor a module saved whole."""
    return not rule.whole and isinstance(spec, rule.spec)


def companions_of(spec: AdapterSpec) -> tuple[AdapterSpec, ...]:
    """The specs that belong to `spec`."""
    return tuple(one for several in spec.companions().values() for one in several)


def ops_of(spec: AdapterSpec) -> tuple[str, ...]:
    """The ops that the method of `spec` can adapt."""
    return tuple(op for peft_type, op in _table() if peft_type == spec.peft_type)


def spec_classes() -> Mapping[str, type[AdapterSpec]]:
    """Spec class by `peft_type`."""
    return {_peft_type(rule): rule.spec for rule in rules()}


def spec_class_named(name: str) -> type[AdapterSpec] | None:
    """The spec class `name` (`LoraConfig`) of a registered method, or None."""
    return next((cls for cls in spec_classes().values() if cls.__name__ == name), None)


def _clash(rule: Rule[Any], others: Iterable[Rule[Any]]) -> Rule[Any] | None:
    """The one of `others`, for the same method and op, that serves all specs, as `rule` does."""
    return None if rule.offers("serves") else next((other for other in others if not other.offers("serves")), None)


@functools.cache
def _table() -> dict[tuple[str, str], list[Rule[Any]]]:
    table: dict[tuple[str, str], list[Rule[Any]]] = {}
    for rule in rules():
        for op in rule.ops:
            others = table.setdefault((_peft_type(rule), op), [])
            clash = _clash(rule, others)
            if clash is not None:
                raise RuleError(f"{_where(rule)} and {_where(clash)} both rewrite {_peft_type(rule)} on {op} sites")
            others.append(rule)
    return table


@functools.cache
def _installed() -> tuple[Rule[Any], ...]:
    found: list[Rule[Any]] = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        made: Any = point.load()
        if not isinstance(made, type):
            raise RuleError(f"entry point {point.name!r} = {point.value!r} is no class: name that of the rule")
        rule: Any = made()
        _check(rule)
        found.append(rule)
    if not found:
        raise RuleError("no rules are installed: install peftc with pip (`pip install -e .` in a checkout)")
    return tuple(found)


# What rules of peftc 0.1 declared, and what has come in its place.
_OLDER = {
    "kinds": "ops (the same names; parameters of experts are 'parameter')",
    "slot": "slots (a tuple), which is only needed where the forms that the rule has are not all to be used",
    "fold": "weight",
    "fold_bias": "bias",
}


def _check(rule: Rule[Any]) -> None:
    if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RuleError(f"{rule!r} is not an instance of a Rule: register LoraLinear(), not LoraLinear")
    for name, successor in _OLDER.items():
        if any(name in vars(cls) for cls in type(rule).__mro__):
            raise RuleError(f"{_where(rule)}: {name!r} is of peftc 0.1; declare {successor}")
    for attribute in ("name", "spec", "ops"):
        if not getattr(rule, attribute, None):
            raise RuleError(f"{_where(rule)}: a rule must set {attribute!r}")
    for op in rule.ops:
        try:
            op_named(op)
        except RuleError as error:
            raise RuleError(f"{_where(rule)}: {error}") from None
    if not set(rule.local) <= {"o", "i"}:
        raise RuleError(f"{_where(rule)}: local={rule.local!r}: valid are the axes 'o', 'i', both or none")
    rule.complete()
    for field, selection in SELECTIONS.items():
        if field in rule.spec.model_fields and field not in rule.spec.apart and not issubclass(rule.spec, selection):
            raise RuleError(
                f"{_where(rule)}: {rule.spec.__name__}.{field} would do nothing: the engine serves it for specs that"
                f" inherit {selection.__name__} (peftc.specs)"
            )


def _peft_type(rule: Rule[Any]) -> str:
    return str(rule.spec.model_fields["peft_type"].default)


def _where(rule: Rule[Any]) -> str:
    """`LoraLinear (…/lora.py:12)`, so that a reader can open it."""
    cls = type(rule)
    try:
        return f"{cls.__name__} ({inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]})"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__name__}"
