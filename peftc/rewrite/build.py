"""The one mutator of models: build, extend, remove, undo; and the base by itself for a while."""

import warnings
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftc.errors import ConflictError, NoMatchError
from peftc.graph.copying import structural_copy
from peftc.graph.region import Region
from peftc.graph.sites import is_lazy, modules_at
from peftc.plan import Edit, Plan, PlannedParam, without
from peftc.rewrite.attach import attach, check_names, container_of, containers, detach, start
from peftc.rewrite.host import install, uninstall
from peftc.rewrite.program import Journal, Program
from peftc.rewrite.switch import activate, brings, place, set_bias


def require_applicable(plan: Plan, on_unmatched: str) -> None:
    """Raise ConflictError on conflicts, and NoMatchError on misses; `on_unmatched="warn"` makes those a warning."""
    if on_unmatched not in ("error", "warn"):
        raise NoMatchError(f"on_unmatched={on_unmatched!r}: valid are 'error' and 'warn'")
    if plan.conflicts:
        lines = "; ".join(f"{conflict.site or 'the model'}: {conflict.reason}" for conflict in plan.conflicts)
        raise ConflictError(f"{len(plan.conflicts)} conflicts between adapters: {lines}")
    errors = [miss for miss in plan.misses if miss.error]
    if not errors:
        return
    lines = " ".join(f"{type(plan.adapters[miss.adapter]).__name__}.{miss}" for miss in errors[:8])
    more = f" (and {len(errors) - 8} more)" if len(errors) > 8 else ""
    # A prompt method has one place to go; without it nothing of the adapter would be left.
    if any(miss.field in ("peft_type", "task_type") for miss in errors):
        raise NoMatchError(f"{lines.rstrip('.')}{more}. Nothing of the adapter would be left.")
    if on_unmatched == "error":
        raise NoMatchError(f"{lines}{more} Mend the spec, or pass on_unmatched='warn' to go on without them.")
    warnings.warn(f"{lines}{more}", stacklevel=4)


def build(model: nn.Module, plan: Plan, regions: tuple[Region, ...], inplace: bool, fresh: bool) -> Program:
    """Attach every adapter of `plan` to a structural copy of `model` (or to itself) and activate the first.

    `fresh=False`: their values are about to be loaded, and `start_alone` is for the rest. The model given is not changed
    unless `inplace`, and then given back intact if anything fails.
    """
    check_names(model, plan, plan.adapters)
    base = model if inplace else structural_copy(model)
    program = Program(base, plan, regions, inplace=inplace)
    program.journal.requires_grad = {
        name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False) if not is_lazy(p)
    }
    for parameter in base.parameters():
        if not is_lazy(parameter):
            parameter.requires_grad_(False)
    try:
        extend(program, plan, regions, list(plan.adapters), fresh)
        first = list(plan.adapters)[:1]
        activate(program, first, [name for name in first if not plan.adapters[name].inference_mode])
    except BaseException:
        undo(program)
        raise
    return program


def extend(
    program: Program, plan: Plan, regions: tuple[Region, ...], adapters: Collection[str], fresh: bool = True
) -> None:
    """Attach the parameters of `adapters`, which are new in `plan`. They start inactive. `fresh` as in `build`."""
    program.plan, program.regions = plan, regions
    program.layouts.clear()
    for site in plan.sites.values():
        if site.kind == "parameter":
            host, child = container_of(site)
            module = program.base.get_submodule(host)
            module._modules.setdefault(child, nn.Module().train(module.training))
    program.look_up()
    _close_fast_paths(program)
    for name in adapters:
        for edit in program.edits[name]:
            attach(program.owners[edit.site], edit, plan, _weight(program, edit), fresh)
            program.children |= dict.fromkeys(containers(edit))
    for tensor in plan.trained:
        if tensor.adapter in adapters:
            program.journal.trained[tensor.name] = program.base.get_parameter(tensor.name).data.clone()


def start_alone(program: Program, edit: Edit, params: Collection[PlannedParam]) -> None:
    """Initialise these parameters of an edit that was attached with `fresh=False`."""
    tensors = {param.name: program.tensor(edit, param.key) for param in params}
    start(edit, tensors, _weight(program, edit), program.plan)


def _weight(program: Program, edit: Edit) -> nn.Parameter | None:
    site = program.plan.sites[edit.site]
    if site.kind == "parameter":
        return program.base.get_parameter(str(site.weight))
    return program.owners[edit.site]._parameters.get("weight")


def remove(program: Program, adapter: str) -> None:
    """Take an adapter off: its parameters, and the biases it trained."""
    program.journal.encoders.pop(adapter, None)
    for edit in program.edits.get(adapter, ()):
        detach(program.owners[edit.site], edit)
        if edit.slot == "weight" and not program.owners[edit.site]._modules:
            host, child = container_of(program.plan.sites[edit.site])
            program.base.get_submodule(host)._modules.pop(child, None)
    for tensor in program.plan.trained:
        if tensor.adapter == adapter:
            set_bias(program, tensor.name, False)
            program.journal.trained.pop(tensor.name, None)
    for name in [name for name in program.journal.present if brings(program, name, adapter)]:
        if program.journal.present[name] == adapter:
            place(program, name, None)
        program.journal.brought.pop((name, adapter), None)


def undo(program: Program) -> nn.Module:
    """The base model as it was: classes, tensors, flags and attributes. The program is spent afterwards."""
    for host in program.installed:
        uninstall(program.owners[host])
    program.installed = {}
    for adapter in program.plan.adapters:
        remove(program, adapter)
    for (fqn, flag), value in program.journal.fast_paths.items():
        setattr(program.base.get_submodule(fqn), flag, value)
    for name, flag in program.journal.requires_grad.items():
        program.base.get_parameter(name).requires_grad_(flag)
    for adapter in program.plan.adapters:
        program.plan = without(program.plan, adapter)
    program.regions, program.active, program.learning, program.journal = (), (), (), Journal()
    program.look_up()
    program.unloaded = True
    return program.base


@contextmanager
def parked(program: Program) -> Generator[nn.Module]:
    """The base model without its adapters for a while, to be planned on: no rewritten class, no added child."""
    base = program.base
    for host in program.installed:
        uninstall(program.owners[host])
    children = [(module, first, module._modules.pop(first)) for module, first in _added(program)]
    try:
        yield base
    finally:
        for module, first, child in children:
            module._modules[first] = child
        for host, code in program.installed.items():
            install(program.owners[host], code)


def _added(program: Program) -> list[tuple[nn.Module, str]]:
    """(module, name) of the children that adapters have added."""
    sites = program.plan.sites
    places = [container_of(site) for site in sites.values() if site.kind == "parameter"]
    held = [(program.base.get_submodule(host), child) for host, child in places]
    owners = [program.owners[fqn] for fqn, site in sites.items() if site.kind != "parameter"]
    return [*held, *((module, name) for module in owners for name in program.children if name in module._modules)]


# Flags that these classes ask before taking their fused inference path, which reads weights and skips spliced ops.
_FAST_PATHS: Mapping[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def _close_fast_paths(program: Program) -> None:
    """Turn the fused paths around adapted sites off."""
    around = dict.fromkeys(fqn for site in program.plan.sites for fqn in _above(site))
    for fqn, module in modules_at(program.base, around).items():
        for cls, (flag, off) in _FAST_PATHS.items():
            if isinstance(module, cls):
                program.journal.fast_paths.setdefault((fqn, flag), getattr(module, flag))
                setattr(module, flag, off)


def _above(fqn: str) -> list[str]:
    """The fqns of the modules that `fqn` is in, the whole model first."""
    parts = fqn.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]
