"""Adapters coming and going: what `CompiledModel`'s methods do to its program, all of it or nothing."""

import logging
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import nn

from peftc.checkpoint import AdapterFiles, LoadResult, load_state, require_base, respelled_spec
from peftc.checkpoint.heads import fit_heads
from peftc.compiled_graph import CompiledGraph
from peftc.errors import AdapterError, MergeError, nearest_hint
from peftc.graph.capture import whole
from peftc.graph.copying import structural_copy
from peftc.graph.hooked import compiled_inside
from peftc.graph.region import Capture, Region
from peftc.merge.combine import checked, combined_spec, fill, pairs
from peftc.plan import Plan, make_plan, require_applicable, without
from peftc.plan.heads import with_heads
from peftc.rewrite.build import check_names, extend, parked, remove
from peftc.rewrite.calibration import Calibration, needs_data, observe, require_data
from peftc.rewrite.processes import require_growable
from peftc.rewrite.program import Program, require_idle
from peftc.rewrite.switch import activate, emit
from peftc.rule import Combination
from peftc.specs import AdapterSpec

_LOG = logging.getLogger(__name__)
# Batches to calibrate on, or what came of it before.
Batches = Calibration | Iterable[Any] | None


def looked_through(model: nn.Module) -> nn.Module:
    """The module that torch.compile has wrapped, with a warning; any other is itself."""
    inner = compiled_inside(model) if isinstance(cast(Any, model), nn.Module) else None
    if inner is None:
        return model
    warnings.warn(
        f"the {type(inner).__name__} went through torch.compile, whose code knows no adapters. What is inside is"
        " adapted, and runs as it is; compile the result: torch.compile(compiled).",
        stacklevel=3,
    )
    return looked_through(inner)


def planned(
    model: nn.Module,
    specs: Mapping[str, AdapterSpec],
    capture: Capture,
    autocast: bool,
    fresh: bool = True,
    inputs: Any = None,
) -> tuple[Plan, tuple[Region, ...]]:
    """The plan of a model that has no adapters yet, and its regions. Raises AdapterError if it has.

    `fresh`: the adapters are new, and heads of their tasks are theirs; of a file that says what it holds, they are not.
    `inputs`: what the model is called with, for `export` to trace.
    """
    if isinstance(model, CompiledGraph):
        raise AdapterError("the model is compiled already: use its add_adapter or its .plan, or unload it first")
    if isinstance(cast(Any, model), nn.Module):
        require_growable(model)
    _require_shape(model, specs)
    if fresh:
        specs = {name: with_heads(model, spec) for name, spec in specs.items()}
    return make_plan(model, specs, capture, autocast, fresh=fresh, flat=whole(model, capture, inputs))


@contextmanager
def reshaped(model: nn.Module, specs: Mapping[str, AdapterSpec], inplace: bool = False) -> Generator[nn.Module]:
    """The model that adapters of `specs` are put on, which may have other modules: `model`, a copy, or, with `inplace`,
    `model` itself with these modules, which has its own again if anything fails.
    """
    new = model
    for spec in specs.values() if not isinstance(model, CompiledGraph) else ():
        new = spec.reshaped(new)
    if new is model or not inplace:
        yield new
        return
    before = dict(model.__dict__)
    _become(model, new.__dict__)
    try:
        yield model
    except BaseException:
        _become(model, before)
        raise


def _become(model: nn.Module, state: Mapping[str, Any]) -> None:
    model.__dict__.clear()
    model.__dict__.update(state)


def _require_shape(model: nn.Module, specs: Mapping[str, AdapterSpec]) -> None:
    """Raise AdapterError if `specs` are for a model with other modules than `model` has."""
    for name, spec in specs.items():
        if spec.reshaped(model) is not model:
            raise AdapterError(
                f"adapter {name!r} is for a model with other layers than this one has, which peftc.compile and peftc.load"
                " make of its base. It can't be added to this one, nor merged on disk"
            )


def named(names: str | Iterable[str]) -> list[str]:
    """One adapter's name or several as a list. Raises AdapterError on what is neither."""
    if isinstance(names, str):
        return [names]
    several = list(names) if isinstance(cast(Any, names), Iterable) else [cast(Any, None)]
    if not all(isinstance(cast(Any, name), str) for name in several):
        raise AdapterError(f"expected an adapter's name, or a list of names, got {names!r}")
    return several


def require_known(plan: Plan, names: Iterable[str]) -> None:
    """Raise AdapterError, with the nearest name, if one of `names` is no adapter."""
    for name in names:
        if name not in plan.adapters:
            hint = nearest_hint(name, plan.adapters)
            raise AdapterError(f"no adapter {name!r}; there are {', '.join(plan.adapters) or 'none'}.{hint}")


def require_unmerged(program: Program, what: str) -> None:
    """Raise MergeError if adapters are merged, which `what` can't work on."""
    if program.merged:
        raise MergeError(f"{what}: {', '.join(program.merged)} merged; call unmerge_adapter() first")


def add(
    program: Program,
    name: str,
    spec: AdapterSpec,
    on_unmatched: str,
    fresh: bool = True,
    autocast: bool | None = None,
    calibration: Batches = None,
) -> None:
    """Attach a new adapter, inactive. `fresh=False`: its values are about to be loaded. `autocast`: in float32 where
    weights are of half precision; None: as the first adapters were. `calibration`: as in `calibrated`.
    """
    require_idle(program)
    if name in program.plan.adapters:
        raise AdapterError(f"adapter {name!r} exists already; choose another name, or delete it first")
    require_unmerged(program, "add_adapter")
    require_growable(program.base)
    with parked(program) as base:
        _require_shape(base, {name: spec})
        specs = {name: with_heads(base, spec) if fresh else spec}
        before = program.plan
        upcast = before.autocast_adapter_dtype if autocast is None else autocast
        flat = program.regions[0].source if before.capture == "export" else None
        plan_of = partial(
            make_plan, base, level=before.capture, autocast_adapter_dtype=upcast, among=before, fresh=fresh, flat=flat
        )
        plan, regions, starts = calibrated(plan_of, base, specs, calibration, on_unmatched)
        plan = replace(plan, autocast_adapter_dtype=before.autocast_adapter_dtype)
        require_applicable(plan, on_unmatched)
        check_names(base, plan, [name])
        if fresh:
            require_data(plan, [name], starts)
    if plan.capture == "modules":
        # A host that is there already keeps its region, and with it its code.
        known = {region.host for region in program.regions}
        regions = (*program.regions, *(region for region in regions if region.host not in known))
    try:
        extend(program, plan, regions, [name], fresh, starts)
        emit(program)
    except BaseException:
        _shrink(program, name)
        raise
    _LOG.info("added %s (%s): %d edits", name, spec.peft_type, len(program.adapters[name].edits))


def calibrated(
    plan_of: Callable[[Mapping[str, AdapterSpec]], tuple[Plan, tuple[Region, ...]]],
    base: nn.Module,
    specs: Mapping[str, AdapterSpec],
    calibration: Batches,
    on_unmatched: str,
    on_copy: bool = False,
) -> tuple[Plan, tuple[Region, ...], Mapping[str, Mapping[str, Any]]]:
    """The plan of `specs` as data decide them, its regions, and what the adapters start from, by adapter and site.

    `plan_of` plans specs on `base`; `calibration`: batches to run that on, or a copy of it, or what came of that before.
    Raises AdapterError if it is given and nothing starts from data, or it is of another spec.
    """
    plan, regions = plan_of(specs)
    if calibration is None:
        return plan, regions, {}
    require_applicable(plan, on_unmatched)  # Before the model is run.
    own = {name: spec for name, spec in specs.items() if needs_data(plan.adapters[name], plan.edits_of(name))}
    if not own:
        raise AdapterError("calibration: no adapter here starts from data; leave it out")
    if isinstance(calibration, Calibration):
        if any(spec not in (calibration.given, calibration.spec) for spec in own.values()):
            raise AdapterError("calibration: it was made with another spec; calibrate again, with this one")
        found = dict.fromkeys(own, calibration)
    else:
        if len(own) > 1 and isinstance(calibration, Iterator):
            raise AdapterError("calibration: an iterator can be gone through for one adapter only; give a list")
        model = structural_copy(base) if on_copy else base
        found = {name: observe(model, plan, name, spec, calibration) for name, spec in own.items()}
    plan, regions = plan_of({**specs, **{name: one.spec for name, one in found.items()}})
    return plan, regions, {name: one.data for name, one in found.items()}


def load(
    program: Program,
    name: str,
    files: AdapterFiles,
    strict: bool,
    autocast: bool | None = None,
) -> LoadResult:
    """Attach an adapter, inactive, with the tensors of its files; one of the same spec that is there gets their values."""
    files = files.on(program.base)
    spec = respelled_spec(program.base, files.spec, files.tensors)
    if name in program.plan.adapters:
        require_idle(program)
        require_unmerged(program, "load_adapter")
        _require_same_adapter(program.plan, name, spec)
        return fill_from(program, name, files, strict, attached=False)
    add(program, name, spec, "warn", fresh=False, autocast=autocast)
    try:
        return fill_from(program, name, files, strict)
    except BaseException:
        _shrink(program, name)
        raise


# What two specs of adapters that are interchangeable may differ in: where they are from, and how modules are named.
_ORIGIN = frozenset({"base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version"})


def _require_same_adapter(plan: Plan, name: str, spec: AdapterSpec) -> None:
    """Raise AdapterError unless a file of `spec` can give its values to adapter `name`."""
    own, other = (
        {key: value for key, value in one.to_dict().items() if key not in _ORIGIN and key not in one.selectors}
        for one in (plan.adapters[name], spec)
    )
    saved = "modules_to_save"  # Resolved in one, as given in the other; the files' keys say.
    differing = [key for key in {**own, **other} if key != saved and own.get(key) != other.get(key)]
    if differing:
        raise AdapterError(
            f"adapter {name!r} exists already, with another {', '.join(differing)}; choose another name, or delete it first"
        )


def describe(program: Program, name: str, spec: AdapterSpec) -> None:
    """Let adapter `name` say that it is from where `spec` says (base, revision, task). Nothing else changes."""
    fields = {key: getattr(spec, key) for key in ("base_model_name_or_path", "revision", "task_type", "auto_mapping")}
    own = program.plan.adapters[name].model_copy(update=fields)
    program.adapters[name].spec = own
    program.plan = replace(program.plan, adapters={**program.plan.adapters, name: own})


def fill_from(program: Program, name: str, files: AdapterFiles, strict: bool, attached: bool = True) -> LoadResult:
    """Give an adapter that is attached the tensors of its files, if the base is theirs. Raises CheckpointError."""
    differs = require_base(program, files.base) if files.base is not None else None
    if attached:
        fit_heads(program, name, files.tensors)
    result = load_state(
        program, name, files.tensors, files.encoder, where=files.where, strict=strict, attached=attached
    )
    if differs is not None:
        warnings.warn(f"{files.where}: {differs}", stacklevel=4)
    _LOG.info("loaded %s: %d tensors of %s", name, len(files.tensors), files.where)
    return result


def combine(program: Program, name: str, adapters: Any, numbers: Any, how: Combination) -> None:
    """Attach an adapter, inactive and frozen, that is the combination of others."""
    weights = pairs(adapters, numbers)
    require_known(program.plan, weights)
    how = checked(program, weights, how)
    add(program, name, combined_spec(program, weights, how), "error", fresh=False)
    try:
        fill(program, name, weights, how)
    except BaseException:
        _shrink(program, name)
        raise


def delete(program: Program, name: str) -> None:
    """Take an adapter off. If only that was active, the one loaded first becomes so, and learns if that one did."""
    require_known(program.plan, [name])
    require_unmerged(program, "delete_adapter")
    left = [other for other in program.plan.adapters if other != name]
    active = [other for other in program.active if other != name]
    learning = [other for other in program.learning if other != name]
    if not active and name in program.active:
        active = left[:1]
        learning += active if name in program.learning else []
    activate(program, active, learning)
    _shrink(program, name)
    _LOG.info("deleted %s", name)


def _shrink(program: Program, name: str) -> None:
    """Take an inactive adapter off, and plan what is left."""
    remove(program, name)
    plan = without(program.plan, name)
    hosts = {site.owner for site in plan.sites.values()}
    used = [region for region in program.regions if plan.capture != "modules" or region.host in hosts]
    extend(program, plan, tuple(used), [])
    emit(program)
