"""What the rules of each registered method offer, and what a model does: its sites, their roles, default targets."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peftc import registry
from peftc.architectures import family_of, role_of
from peftc.graph.sites import SiteIndex, index_sites
from peftc.rule import Rule


def methods() -> list[dict[str, Any]]:
    """The registered methods by name: their ops, what they offer, and where they are written."""
    return [_described(name, own) for name, own in sorted(_by_method().items())]


def offered(model: nn.Module) -> dict[str, Any]:
    """What a model offers: every weight that can be adapted, and by method the targets that it has by default."""
    index = index_sites(model, role_of(model))
    return {
        "model": type(model).__name__,
        "model_type": index.model_type,
        "sites": [
            {
                "name": site.fqn,
                "op": site.op,
                "in_features": site.in_features,
                "out_features": site.out_features,
                "dtype": site.dtype,
                "role": site.role,
                "tied": list(site.tied),
            }
            for site in (*index.sites.values(), *index.inner.values())
        ],
        "defaults": _defaults(model, index),
    }


def _defaults(model: nn.Module, index: SiteIndex) -> dict[str, Mapping[str, Any]]:
    family = family_of(model)
    found: dict[str, Mapping[str, Any]] = {}
    for name, cls in sorted(registry.spec_classes().items()):
        known = family.defaults_for(cls) if family is not None else None
        if cls.on_embedding and index.input_embedding is not None:
            found[name] = {"target_modules": [index.input_embedding]}
        elif known is not None:
            found[name] = {field: value if isinstance(value, str) else list(value) for field, value in known.items()}
    return found


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
