"""Switching: which adapters are spliced in, and which train.

What the hosts run for a choice of adapters is made once. After that a switch is one assignment per site of the adapters
that go and come, and one per parameter that starts or stops training; other adapters do not count.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from peftc.errors import AdapterError
from peftc.graph.region import Anchor, Region
from peftc.graph.sites import parameter_name
from peftc.plan import MODULES_TO_SAVE, Edit, Plan
from peftc.registry import find_rule
from peftc.rewrite.generation import call_methods
from peftc.rewrite.host import Code, install, original_class, uninstall
from peftc.rewrite.program import Program
from peftc.rewrite.splice import Active, splice


def activate(program: Program, names: Iterable[str], learning: Iterable[str]) -> None:
    """Make `names` the active adapters, spliced in load order; parameters of those in `learning` train, others do not.

    Raises RuleError (a rule does not trace) or AdapterError (a forward was wrapped); nothing is changed then.
    """
    chosen, before = set(names), program.active
    program.active = tuple(name for name in program.plan.adapters if name in chosen)
    try:
        emit(program)
    except BaseException:
        program.active = before
        raise
    train(program, learning)


def train(program: Program, names: Iterable[str]) -> None:
    """Let the parameters of `names` train, and those that were training before stop."""
    chosen = tuple(dict.fromkeys(names))
    for name in (*(name for name in program.learning if name not in chosen), *chosen):
        on = name in chosen
        for slots, leaf in _trainable(program, name):
            if slots[leaf].requires_grad is not on:
                slots[leaf].requires_grad_(on)
        for tensor in program.plan.trained:
            if tensor.adapter == name:
                program.base.get_parameter(tensor.name).requires_grad_(on)
    program.learning = chosen


def _trainable(program: Program, adapter: str) -> list[tuple[dict[str, Any], str]]:
    if adapter not in program.slots:
        program.slots[adapter] = [
            program.slot(edit, param.key)
            for edit in program.edits.get(adapter, ())
            for param in edit.params
            if param.trainable
        ]
    return program.slots[adapter]


def emit(program: Program) -> None:
    """Let every host run its region with the edits of the spliced adapters; without any it is its old self again.

    All codes are made before the first host is changed, so a rule that does not trace changes nothing. The biases that
    spliced adapters train are put in, those of others taken out. Raises AdapterError inside a call with adapter_names.
    """
    require_idle(program)
    install_layout(program, layout(program, program.spliced))
    for tensor in program.plan.trained:
        set_bias(program, tensor.name, program.enabled and tensor.adapter in program.active)
    for name in program.journal.present:
        owners = [a for a in program.active if program.enabled and brings(program, name, a)]
        place(program, name, owners[-1] if owners else None)


def brings(program: Program, name: str, adapter: str) -> bool:
    """Whether `adapter` came with a tensor `name` of its own."""
    return program.journal.present.get(name) == adapter or (name, adapter) in program.journal.brought


def place(program: Program, name: str, adapter: str | None) -> None:
    """Put the tensor `name` that `adapter` brought into the model, or with None the original."""
    brought, present = program.journal.brought, program.journal.present
    if present[name] != adapter:
        parameter = program.base.get_parameter(name)
        value = brought.pop((name, adapter)).to(device=parameter.device, dtype=parameter.dtype)
        brought[name, present[name]], parameter.data = parameter.data, value
        present[name] = adapter


def require_idle(program: Program) -> None:
    """Raise AdapterError inside a call with adapter_names, or if the model was unloaded."""
    if program.routed:
        raise AdapterError("the model is in a call with adapter_names; adapters can't be changed before it is over")
    if program.unloaded:
        raise AdapterError("the model was unloaded; compile it again to give it adapters")


def install_layout(program: Program, new: dict[str, Code]) -> None:
    """Let the hosts run the codes `new`, and all others be their old selves."""
    old, owners = program.installed, program.owners
    gone = old.keys() - new.keys()
    require_unwrapped(program, (*gone, *new))
    try:
        for host in gone:
            uninstall(owners[host])
        for host, code in new.items():
            if old.get(host) is not code:
                install(owners[host], code)
    except BaseException:
        for host in new:
            uninstall(owners[host])
        for host, code in old.items():
            install(owners[host], code)
        raise
    program.installed = new


def layout(program: Program, names: Sequence[str]) -> dict[str, Code]:
    """The code of every host that the adapters `names` change, spliced in this order."""
    key = tuple(names)
    if key not in program.layouts:
        groups: dict[str, list[Active]] = {}
        for name in key:
            for edit in program.edits[name]:
                groups.setdefault(edit.site, []).append(_active(program.plan, edit))
        pairs = ((region, _at(region, groups)) for region in program.regions)
        program.layouts[key] = {region.host: _code(program, region, active) for region, active in pairs if active}
    return program.layouts[key]


def _at(region: Region, groups: Mapping[str, list[Active]]) -> dict[str, list[Active]]:
    """The edits at the anchors of `region`, by the site's fqn relative to the host."""
    found = {anchor.site: groups.get(_site_of(region, anchor)) for anchor in region.source.anchors}
    return {site: group for site, group in found.items() if group}


def _site_of(region: Region, anchor: Anchor) -> str:
    return parameter_name(region.host, anchor.site) if anchor.site else region.host


def _code(program: Program, region: Region, active: Mapping[str, Sequence[Active]]) -> Code:
    """The code of `region` with the edits `active`; equal hosts get the same one."""
    cls = original_class(program.owners[region.host])
    signature = tuple((site, tuple((a.turned, *_signature(a.edit)) for a in group)) for site, group in active.items())
    key = (region.source, cls, signature)
    if key not in program.codes:
        methods = call_methods(cls, [item.edit for item in active.get("", ())])
        program.codes[key] = Code(cls, splice(region.source, active), region.source.opaque, methods)
    return program.codes[key]


def _active(plan: Plan, edit: Edit) -> Active:
    site = plan.sites[edit.site]
    rule = None if edit.rule == MODULES_TO_SAVE else find_rule(plan.adapters[edit.adapter], site)
    return Active(edit, rule, turned=site.layout == "in_out")


def _signature(edit: Edit) -> Any:
    """What the spliced code depends on."""
    dropouts = tuple((name, probability > 0) for name, probability in edit.dropouts.items())
    params = tuple((param.name, param.key) for param in edit.params)
    return edit.adapter, edit.rule, edit.slot, params, tuple(edit.constants.items()), dropouts


def set_bias(program: Program, name: str, on: bool) -> None:
    """Exchange the value of a bias that an adapter trains for its original one, or back."""
    journal = program.journal
    if name in journal.trained and on != (name in journal.training):
        parameter = program.base.get_parameter(name)
        other = journal.trained[name].to(device=parameter.device, dtype=parameter.dtype)
        journal.trained[name], parameter.data = parameter.data, other
        journal.training.symmetric_difference_update([name])


def require_unwrapped(program: Program, hosts: Iterable[str]) -> None:
    """Raise AdapterError if the forward of one of `hosts` was replaced on the instance after compiling.

    The wrapper holds the code of that moment, which exchanging the class would not reach.
    """
    for host in hosts:
        if "forward" in program.owners[host].__dict__:
            _refuse_wrapped(program, host)


def _refuse_wrapped(program: Program, host: str) -> None:
    module: nn.Module = program.owners[host]
    opaque = next(region.source.opaque for region in program.regions if region.host == host)
    if opaque and original_class(module) is type(module):
        return  # A patched forward from before compiling, which opaque hosts may have.
    raise AdapterError(
        f"{host or 'the model'}: its forward was replaced after compiling (an accelerate hook?), so it can't be switched."
        " Take the replacement off (accelerate.hooks.remove_hook_from_module), switch, and put it on again."
    )
