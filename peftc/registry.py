"""Discovery: rules and architectures are found by entry point, peftc's own like anyone's."""

import functools
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, cast, get_args

from peftc.errors import RuleError
from peftc.graph.sites import Kind, Site
from peftc.rule import PromptRule, Rule
from peftc.specs import BUILTIN_SPECS, AdapterSpec

GROUP = "peftc.rules"
_extra: list[Rule[Any]] = []


def register(rule: Rule[Any]) -> None:
    """Add a rule to this process, as an entry point `peftc.rules` does for an installed package.

    Raises RuleError if the rule is incomplete, or its method and kind are taken.
    """
    _check(rule)
    taken = _table()
    for kind in rule.kinds:
        other = taken.get((_peft_type(rule), kind))
        if other is not None:
            raise RuleError(f"{_where(rule)}: {_peft_type(rule)} on {kind} sites is taken by {_where(other)}")
    _extra.append(rule)
    _table.cache_clear()


def unregister(rule: Rule[Any]) -> None:
    """Take a registered rule back."""
    if rule not in _extra:
        raise RuleError(f"{_where(rule)} is not registered")
    _extra.remove(rule)
    _table.cache_clear()


def find_rule(spec: AdapterSpec, site: Site) -> Rule[Any] | None:
    """The rule for the method of `spec` on the kind of `site`, or None."""
    return _table().get((spec.peft_type, site.kind))


def find_prompt_rule(spec: AdapterSpec) -> PromptRule[Any] | None:
    """The rule for the method of `spec`, if that is a prompt method."""
    rule = _table().get((spec.peft_type, "call"))
    return rule if isinstance(rule, PromptRule) else None


def kinds_of(spec: AdapterSpec) -> tuple[str, ...]:
    """The kinds of site that the method of `spec` can adapt."""
    return tuple(kind for peft_type, kind in _table() if peft_type == spec.peft_type)


def spec_classes() -> Mapping[str, type[AdapterSpec]]:
    """Spec class by `peft_type`: the built-in ones and those that rules bring along."""
    return {**BUILTIN_SPECS, **{_peft_type(rule): rule.spec for rule in _table().values()}}


@functools.cache
def _table() -> dict[tuple[str, str], Rule[Any]]:
    table: dict[tuple[str, str], Rule[Any]] = {}
    for rule in [*_installed(), *_extra]:
        for kind in rule.kinds:
            other = table.setdefault((_peft_type(rule), kind), rule)
            if other is not rule:
                raise RuleError(f"{_where(rule)} and {_where(other)} both rewrite {_peft_type(rule)} on {kind} sites")
    return table


@functools.cache
def _installed() -> tuple[Rule[Any], ...]:
    found: list[Rule[Any]] = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        for rule in cast("tuple[Rule[Any], ...]", point.load()):
            _check(rule)
            found.append(rule)
    if not found:
        raise RuleError("no rules are installed: install peftc with pip (`pip install -e .` in a checkout)")
    return tuple(found)


def _check(rule: Rule[Any]) -> None:
    if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RuleError(f"{rule!r} is not an instance of a Rule: register LoraLinear(), not LoraLinear")
    for attribute in ("name", "spec", "kinds"):
        if not getattr(rule, attribute, None):
            raise RuleError(f"{_where(rule)}: a rule must set {attribute!r}")
    if isinstance(rule, PromptRule) and getattr(rule, "at", None) not in ("embeds", "past"):
        raise RuleError(f"{_where(rule)}: a prompt rule must set 'at' to 'embeds' or 'past'")
    for kind in rule.kinds:
        if kind not in get_args(Kind):
            raise RuleError(f"{_where(rule)}: there is no kind {kind!r}; there are {', '.join(get_args(Kind))}")


def _peft_type(rule: Rule[Any]) -> str:
    return str(rule.spec.model_fields["peft_type"].default)


def _where(rule: Rule[Any]) -> str:
    """`LoraLinear (…/lora.py:12)`, so that a reader can open it."""
    cls = type(rule)
    try:
        return f"{cls.__name__} ({inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]})"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__name__}"
