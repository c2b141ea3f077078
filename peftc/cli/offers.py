"""What the rules of each registered method offer."""

import inspect
from collections.abc import Sequence
from typing import Any

from peftc import registry
from peftc.rule import Rule


def methods() -> list[dict[str, Any]]:
    """The registered methods by name: their ops, what they offer, and where they are written."""
    return [_described(name, own) for name, own in sorted(_by_method().items())]


def _by_method() -> dict[str, list[Rule[Any]]]:
    found: dict[str, list[Rule[Any]]] = {}
    for name, cls in registry.spec_classes().items():
        found[name] = [rule for rule in registry.rules() if rule.spec is cls]
    return found


def _described(name: str, own: Sequence[Rule[Any]]) -> dict[str, Any]:
    folds = any(rule.offers("weight") for rule in own)
    offers = {
        "same start": folds and any(rule.identity for rule in own),
        "merge": folds,
        "in pieces": folds and any(rule.local for rule in own),
        "factors": any(rule.offers("factors") for rule in own),
        "sums": any(rule.combinations for rule in own),
        "scale": any(rule.scale for rule in own),
    }
    return {
        "method": name,
        "config": own[0].spec.__name__,
        "ops": list(dict.fromkeys(op for rule in own for op in rule.ops)),
        "offers": [what for what, has in offers.items() if has],
        "rules": [
            {"name": rule.name, "class": type(rule).__name__, "version": rule.version, "file": _file(rule)}
            for rule in own
        ],
    }


def _file(rule: Rule[Any]) -> str | None:
    try:
        return inspect.getsourcefile(type(rule))
    except (OSError, TypeError):
        return None  # It was made where no file is.
