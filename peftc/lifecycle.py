"""Adapters coming and going: what `CompiledModel`'s methods do to its program, all of it or nothing."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from peftc.checkpoint import load_state
from peftc.errors import AdapterError, MergeError, nearest
from peftc.plan import make_plan
from peftc.rewrite import program as rewrite
from peftc.rewrite.attach import check_names
from peftc.rewrite.program import Program
from peftc.specs import AdapterSpec


def require_known(program: Program, names: Iterable[str]) -> None:
    """Raise AdapterError, with the nearest name, if one of `names` is no adapter."""
    for name in names:
        if name not in program.plan.adapters:
            near = nearest(name, program.plan.adapters)
            hint = f" Nearest: {near[0]!r}." if near else ""
            raise AdapterError(f"no adapter {name!r}; there are {', '.join(program.plan.adapters) or 'none'}.{hint}")


def require_unmerged(program: Program, what: str) -> None:
    """Raise MergeError if adapters are merged, which `what` can't work on."""
    if program.merged:
        raise MergeError(f"{what}: {', '.join(program.merged)} merged; call unmerge_adapter() first")


def add(program: Program, name: str, spec: AdapterSpec, on_unmatched: str, fresh: bool = True) -> None:
    """Attach a new adapter, inactive. `fresh=False`: its values are about to be loaded."""
    if program.unloaded:
        raise AdapterError("the model was unloaded; compile it again to give it adapters")
    if name in program.plan.adapters:
        raise AdapterError(f"adapter {name!r} exists already; choose another name, or delete it first")
    require_unmerged(program, "add_adapter")
    active, learning = program.active, program.learning
    with rewrite.parked(program) as base:
        plan, regions = _plan(program, {**program.plan.adapters, name: spec})
        rewrite.require_applicable(plan, on_unmatched)
        check_names(base, plan, [name])
    try:
        rewrite.extend(program, plan, regions, [name], fresh)
    except BaseException:
        _shrink(program, name)
        raise
    rewrite.activate(program, active, learning)


def load(
    program: Program, name: str, spec: AdapterSpec, tensors: Mapping[str, Tensor], encoder: Mapping[str, Tensor]
) -> None:
    """Attach an adapter, inactive, with the tensors of its files."""
    add(program, name, spec, "warn", fresh=False)
    try:
        load_state(program, name, tensors, encoder)
    except BaseException:
        _shrink(program, name)
        raise


def delete(program: Program, name: str) -> None:
    """Take an adapter off. If no other was active, the one loaded first becomes so."""
    require_known(program, [name])
    require_unmerged(program, "delete_adapter")
    left = [other for other in program.plan.adapters if other != name]
    active = [other for other in program.active if other != name]
    rewrite.activate(program, active or left[:1], program.learning if active else left[:1])
    _shrink(program, name)


def _shrink(program: Program, name: str) -> None:
    """Take an inactive adapter off, and plan what is left."""
    rewrite.remove(program, name)
    active, learning = program.active, program.learning
    with rewrite.parked(program):
        plan, regions = _plan(program, {n: spec for n, spec in program.plan.adapters.items() if n != name})
    rewrite.extend(program, plan, regions, [])
    rewrite.activate(program, active, learning)


def _plan(program: Program, specs: Mapping[str, AdapterSpec]) -> Any:
    return make_plan(program.base, specs, program.plan.capture, program.plan.autocast_adapter_dtype)
