"""Heads of tasks: modules that a model has beside its body, which an adapter must save to be of use elsewhere."""

from collections.abc import Iterable
from typing import Any, TypeVar, cast

from torch import nn

from peftc.graph.sites import is_pretrained, parameter_name
from peftc.plan.plan import Plan
from peftc.specs import AdapterSpec

S = TypeVar("S", bound=AdapterSpec)


def with_heads(model: nn.Module, spec: S) -> S:
    """`spec` with all heads of a transformers model in `modules_to_save`, whatever they are called, if its task trains one.

    They are the modules beside the body, and those in it that `from_pretrained` had to make anew (a pooler).
    """
    if not spec.heads or not is_pretrained(model):
        return spec
    named = (*(spec.modules_to_save or ()), *spec.heads)
    own = dict.fromkeys([*_heads(model), *_owners(new_parameters(model))])
    inside = tuple(f"{fqn}." for fqn in own)
    missing = [fqn for fqn in own if not fqn.startswith(inside) and not any(fqn.endswith(name) for name in named)]
    return spec.model_copy(update={"modules_to_save": (*(spec.modules_to_save or ()), *missing)}) if missing else spec


def _heads(model: Any) -> list[str]:
    """The modules with parameters that a transformers model has beside its body."""
    if model.base_model is model:
        return []
    children = ((name, child) for name, child in model.named_children() if child is not model.base_model)
    return [name for name, child in children if next(child.parameters(), None) is not None]


def _owners(parameters: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


def new_parameters(model: nn.Module) -> list[str]:
    """The parameters that `from_pretrained` had no values for and made anew; none if the model is not from there."""
    if not is_pretrained(model):
        return []
    loaded: dict[str, bool] = {}
    for fqn, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                loaded[parameter_name(fqn, leaf)] = cast(Any, vars(parameter)).get("_is_hf_initialized", False)
    return [name for name, known in loaded.items() if not known] if any(loaded.values()) else []


def unsaved(model: nn.Module, plan: Plan) -> str | None:
    """What to know of parameters made anew that no adapter of the plan saves: another process will make others."""
    kept = tuple(f"{edit.site}." for edit in plan.edits if edit.whole)
    lost = [name for name in new_parameters(model) if not name.startswith(kept)]
    modules = _owners(lost)
    if not modules:
        return None
    more = f" (and {len(modules) - 1} more)" if len(modules) > 1 else ""
    return (
        f"{modules[0]}{more} got new, random weights when the model was loaded, and no adapter saves them: elsewhere they"
        f" will be others. Give modules_to_save={modules[:8]}{' …' if len(modules) > 8 else ''}"
    )
