"""Switching: which adapters are spliced in, and which train.

What the hosts run for a choice of adapters is made once. After that a switch is one assignment per site of the adapters
that go and come, and one per parameter that starts or stops training; other adapters do not count.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

from peftc.errors import AdapterError
from peftc.graph.finding import parameter_at
from peftc.graph.region import Anchor, Region
from peftc.graph.sites import WeightSite, parameter_name
from peftc.rewrite.averaging import Averaging
from peftc.rewrite.hosts import BOUND, Binding, Code
from peftc.rewrite.parts import Adapter, Part
from peftc.rewrite.passes import rewritten
from peftc.rewrite.program import Made, Program, require_idle
from peftc.rewrite.sharding import data_mesh, follow_flags, managed, reshard
from peftc.rewrite.splice import Active
from peftc.rewrite.verify import example_for

_LOG = logging.getLogger(__name__)


def activate(program: Program, names: Iterable[str], learning: Iterable[str]) -> None:
    """Make `names` the active adapters, spliced in load order; parameters of those in `learning` train, others do not.

    Raises RuleError (a rule does not trace) or AdapterError (edits exclude each other); nothing is changed then.
    """
    chosen, before = set(names), program.active
    _require_one_saver(adapter for name, adapter in program.adapters.items() if name in chosen)
    program.active = tuple(name for name in program.plan.adapters if name in chosen)
    try:
        emit(program)
    except BaseException:
        program.active = before
        raise
    train(program, learning)
    _LOG.debug("active: %s", program.active)


def _require_one_saver(adapters: Iterable[Adapter]) -> None:
    """Raise AdapterError if two of the adapters save the same module: only one of the copies could be called."""
    savers: dict[str, str] = {}
    for adapter in adapters:
        for edit in adapter.edits:
            other = savers.setdefault(edit.site, adapter.name) if edit.whole else adapter.name
            if other != adapter.name:
                raise AdapterError(
                    f"{edit.site}: {other!r} and {adapter.name!r} both save it (modules_to_save), and only one copy of it"
                    " can be called. Activate one of them; rows of a batch may use both (adapter_names)."
                )


def train(program: Program, names: Iterable[str]) -> None:
    """Let the parameters of `names` train, and those that were training before stop."""
    chosen = tuple(dict.fromkeys(names))
    reshard(program.base)
    for name in (*(name for name in program.learning if name not in chosen), *chosen):
        on = name in chosen
        for parameters, leaf in program.adapters[name].trained if name in program.adapters else ():
            if parameters[leaf].requires_grad is not on:
                parameters[leaf].requires_grad_(on)
        for tensor in program.plan.trained:
            if tensor.adapter == name:
                parameter_at(program.base, tensor.name).requires_grad_(on)
    follow_flags(program.base)
    program.learning = chosen
    _average(program)


def _average(program: Program) -> None:
    """Let the gradients of what learns be averaged over processes, where FSDP2 leaves that to others."""
    stop_averaging(program.made)
    mesh = data_mesh(program.base)
    if mesh is None or mesh.size() == 1:
        return
    known = managed(program.base)
    adapters = [own for name, own in program.adapters.items() if name in program.learning]
    trained = [parameters[leaf] for own in adapters for parameters, leaf in own.trained]
    names = [tensor.name for tensor in program.plan.trained if tensor.adapter in program.learning]
    trained += [parameter_at(program.base, name) for name in names]
    left = {id(parameter): parameter for parameter in trained if id(parameter) not in known}
    if left:
        program.made.averaging = Averaging(mesh, left.values())


def stop_averaging(made: Made) -> None:
    """Leave gradients to each process."""
    if made.averaging is not None:
        made.averaging.stop()
        made.averaging = None


def emit(program: Program) -> None:
    """Let the model run what its state says: the graphs of the spliced adapters, and the tensors that they brought."""
    require_idle(program)
    install_layout(program, layout(program, program.spliced))
    program.overlay.show(program.base, program.active if program.enabled else ())


def install_layout(program: Program, new: Mapping[str, Binding]) -> None:
    """Let the hosts run the bindings `new`, and all others be their old selves."""
    old, modules = program.installed, program.modules
    for host in old.keys() - new.keys():
        modules[host].__dict__[BOUND] = None
    for host, binding in new.items():
        modules[host].__dict__[BOUND] = binding
    program.installed = dict(new)


def layout(program: Program, names: Sequence[str]) -> dict[str, Binding]:
    """What every host runs that the adapters `names` change, spliced in this order."""
    key = tuple(names)
    layouts = program.made.layouts
    if key not in layouts:
        parts: dict[str, list[Part]] = {}
        for name in key:
            for part in program.adapters[name].parts.values():
                parts.setdefault(part.edit.site, []).append(part)
        pairs = ((region, at(region, parts)) for region in program.regions)
        # A whole program runs as such also without any.
        layouts[key] = {
            region.host: binding_of(program, region, here) for region, here in pairs if here or region.source.signature
        }
    return layouts[key]


def at(region: Region, parts: Mapping[str, list[Part]]) -> dict[str, list[Part]]:
    """The parts at the anchors of `region`, by the site's fqn relative to the host."""
    if len(region.source.anchors) == 1:  # By far the most.
        anchor = region.source.anchors[0]
        here = parts.get(_site_of(region, anchor))
        return {anchor.site: here} if here else {}
    found = {anchor.site: parts.get(_site_of(region, anchor)) for anchor in region.source.anchors}
    return {site: group for site, group in found.items() if group}


def _site_of(region: Region, anchor: Anchor) -> str:
    return parameter_name(region.host, anchor.site) if anchor.site else region.host


def binding_of(program: Program, region: Region, parts: Mapping[str, Sequence[Part]]) -> Binding:
    """What the host of `region` runs with `parts` active; equal hosts share the code."""
    host, flat = program.modules[region.host], [part for group in parts.values() for part in group]
    key = (region.source, tuple((site, tuple(part.form for part in group)) for site, group in parts.items()))
    found = program.made.codes.get(key)
    if found is not None:
        return Binding(found, host, flat)
    numbered = iter(range(len(flat)))
    active = {
        site: [Active(part.edit, part.site, f"a{next(numbered)}") for part in group] for site, group in parts.items()
    }
    # A binding without code is what the verifier looks attributes up on.
    root = Binding.__new__(Binding)
    root.__dict__.update(host=host, **{f"a{number}": part for number, part in enumerate(flat)})
    single = flat[0].site if flat and len(region.source.anchors) == 1 and not region.source.opaque else None
    example = example_for(single) if isinstance(single, WeightSite) else None
    source = region.source
    training = None
    if source.training is not None:
        training = Code(*rewritten(source.training, active, program.passes, root, None), source.training.signature)
    code = Code(*rewritten(source, active, program.passes, root, example), source.signature, training)
    # Constants that the rule does not use, and names, make no other code.
    code = program.made.codes[key] = program.made.codes.setdefault((region.source, code.text), code)
    return Binding(code, host, flat)
