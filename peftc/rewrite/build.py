"""The one mutator of models: build, extend, remove, undo; and the base by itself for a while."""

import gc
import logging
import re
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.graph.copying import structural_copy
from peftc.graph.finding import module_at, modules_at, parameter_at
from peftc.graph.hooked import INNER, is_hooked
from peftc.graph.ops import op_named
from peftc.graph.region import Region
from peftc.graph.sites import WeightSite, canonical, is_lazy, parameter_name
from peftc.plan import Edit, Plan, PlannedParam, without
from peftc.rewrite.calibration import require_data
from peftc.rewrite.checkpointing import let_gradients_through
from peftc.rewrite.holders import Group
from peftc.rewrite.hosts import BOUND, install, is_host, original_class, reads, uninstall
from peftc.rewrite.learning import watch_steps
from peftc.rewrite.parts import Adapter, asks, attach, containers, detach, weight_of
from peftc.rewrite.passes import Pass
from peftc.rewrite.processes import require_placed
from peftc.rewrite.program import Program
from peftc.rewrite.route import BASE
from peftc.rewrite.sharding import Places, places_of, reshard, whole, widest_mesh
from peftc.rewrite.starting import require_there, start, wide
from peftc.rewrite.switch import activate, stop_averaging

_LOG = logging.getLogger(__name__)
# What adapters start from, by adapter and site.
Starts = Mapping[str, Mapping[str, Any]]
_NOTHING: Starts = {}
# What adapters may be called: words with single spaces or slashes between them.
_NAME = re.compile(r"[^\s./\\\x00-\x1f]+([ /][^\s./\\\x00-\x1f]+)*")


@contextmanager
def no_collection() -> Generator[None]:
    """Thousands of objects are made that stay; looking for garbage among them again and again takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_names(model: nn.Module, plan: Plan, adapters: Collection[str]) -> None:
    """Refuse adapter names that can't be part of a parameter's name, sites that have such a child already, and what can't
    be laid out over processes as the model is.
    """
    taken = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict()), BASE}
    for name in adapters:
        if not isinstance(cast(Any, name), str) or not _NAME.fullmatch(name) or name in taken:
            raise AdapterError(
                f"adapter name {name!r}: it becomes part of parameter names, and of paths; leave out dots, backslashes, and"
                f" spaces or slashes at its ends (nor can it be a method name of nn.ModuleDict, or {BASE!r}, which rows of"
                " a mixed batch say for no adapter)"
            )
    require_placed(model, plan, adapters)
    owners = {fqn: site.owner for fqn, site in plan.sites.items()}
    modules = modules_at(model, owners.values())
    for edit in (edit for edit in plan.edits if edit.adapter in adapters):
        site, module = plan.sites[edit.site], modules[owners[edit.site]]
        for first in containers(edit) if site.added is None else [site.added]:
            if first in module._modules or first in module._parameters or first in module.__dict__:
                raise AdapterError(
                    f"{edit.site}: has a child {first!r} already. A compiled or PEFT model can't be compiled again:"
                    " use add_adapter, or unload it first."
                )


def _flags(model: nn.Module) -> dict[str, bool]:
    """`requires_grad` by parameter name. Raises AdapterError if any module is a host of another compiled model."""
    flags: dict[str, bool] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if is_host(module):
            raise AdapterError(
                f"{fqn or 'the model'}: is part of a model that was compiled already, whose adapters would be taken for"
                " the base's weights. Use add_adapter there, or unload() it first."
            )
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter):
                flags[parameter_name(fqn, leaf)] = parameter.requires_grad
    return flags


def build(
    model: nn.Module,
    plan: Plan,
    regions: tuple[Region, ...],
    inplace: bool,
    fresh: bool,
    passes: Sequence[Pass] = (),
    starts: Starts = _NOTHING,
) -> Program:
    """Attach every adapter of `plan` to a structural copy of `model` (or to itself) and activate the first.

    `fresh=False`: their values are about to be loaded, and `start_alone` is for the rest. `starts`: the data that they
    start from, by adapter and site. The model given is not changed unless `inplace`, and then given back intact if anything
    fails.
    """
    check_names(model, plan, plan.adapters)
    if fresh:
        require_data(plan, plan.adapters, starts)
    flags = _flags(model)
    base = model if inplace else structural_copy(model)
    program = Program(base, plan, regions, inplace=inplace, passes=tuple(passes))
    program.given.requires_grad = flags
    for parameter in base.parameters() if inplace else ():  # a copy is frozen
        if not is_lazy(parameter):
            parameter.requires_grad_(False)
    try:
        extend(program, plan, regions, list(plan.adapters), fresh, starts)
        first = list(plan.adapters)[:1]
        activate(program, first, [name for name in first if not plan.adapters[name].inference_mode])
        let_gradients_through(base)
    except BaseException:
        undo(program)
        raise
    adapters, name = ", ".join(plan.adapters), original_class(base).__name__
    _LOG.info("%s with %s: %d edits on %d sites", name, adapters, len(plan.edits), len(plan.sites))
    return program


def extend(
    program: Program,
    plan: Plan,
    regions: tuple[Region, ...],
    adapters: Collection[str],
    fresh: bool = True,
    starts: Starts = _NOTHING,
) -> None:
    """Attach the parameters of `adapters`, new in `plan`. They start inactive. `fresh` and `starts` are as in `build`."""
    kept = {region.host for region in regions}
    for region in program.regions:
        if region.host not in kept:
            _uninstall(program, region)
    program.plan, program.regions = plan, regions
    program.made.layouts.clear()
    program.made.runs.clear()
    program.made.places.clear()
    for site in plan.sites.values():
        if site.added is not None:
            owner = module_at(program.base, site.owner)
            owner._modules.setdefault(site.added, Group().train(owner.training))
    program.look_up()
    _close_fast_paths(program)
    reshard(program.base)
    places = places_of(program.base)
    for name in adapters:
        adapter, shared = Adapter(name, plan.adapters[name]), set[str]()
        program.adapters[name] = adapter
        for edit in plan.edits:
            if edit.adapter == name:
                _attach(program, adapter, edit, starts.get(name, {}) if fresh else None, shared, places)
        _tie_copies(adapter)
    for region in regions:
        _install(program, region)
    watch_steps(program)
    for tensor in plan.trained:
        if tensor.adapter in adapters:
            program.overlay.bring(program.base, tensor.name, tensor.adapter)


def _attach(
    program: Program,
    adapter: Adapter,
    edit: Edit,
    starts: Mapping[str, Any] | None,
    shared: set[str],
    places: Places,
) -> None:
    """Attach one edit, to the module of the one that it follows if it does. `starts`: the data that a fresh adapter starts
    from, by site; None if it is not fresh.

    `shared` are the keys of tensors that the adapter's sites have in common and that are there.
    """
    site = program.plan.sites[edit.site]
    first = site if edit.follows is None or edit.whole else program.plan.sites[edit.follows]
    holder, weight = program.modules[first.holder], weight_of(program.modules[site.owner], site)
    part = attach(edit, site, holder, _common(program, edit.adapter), adapter.spec, weight, places)
    adapter.parts[edit.site, edit.rule.name] = part
    if asks(edit.rule) and edit.adapter not in program.asking:
        program.asking = (*program.asking, edit.adapter)
    for key, one in edit.rule.arguments.items():
        adapter.arguments[key] = one, None if one.below is None else cast(int, edit.constants[one.below])
    program.children |= dict.fromkeys([*containers(edit), *(p.key.partition(".")[0] for p in edit.params if p.shared)])
    if starts is not None and edit.follows is None:
        own = [param for param in edit.params if param.key not in shared]
        _start(program, edit, own, places.mesh, starts.get(edit.site))
    shared |= {param.key for param in edit.params if param.shared}


def _tie_copies(adapter: Adapter) -> None:
    """Let copies of modules that follow others have the weight of these."""
    for part in [part for part in adapter.parts.values() if part.edit.whole and part.edit.follows is not None]:
        first = adapter.parts[str(part.edit.follows), part.edit.rule.name]
        part.module._parameters["weight"] = first.module._parameters["weight"]


def _common(program: Program, adapter: str) -> nn.Module:
    """The module that holds what all sites of an adapter share: the model, or the first site if that runs its children."""
    if not isinstance(program.base, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return program.base
    first = next((edit.site for edit in program.plan.edits if edit.adapter == adapter), None)
    return program.base if first is None else program.modules[program.plan.sites[first].holder]


def _install(program: Program, region: Region) -> None:
    """Make the module of `region` a host, and let its weights be stood in for where it is called as it is."""
    module = program.modules[region.host]
    names = (parameter_name(region.host, a.site) if a.site else region.host for a in region.source.anchors)
    rows = (op_named(program.plan.sites[name].op) for name in names if name in program.plan.sites)
    methods = next((row.methods for row in rows if row.methods is not None), None)
    own_methods = methods(original_class(module)) if methods is not None else {}
    if not region.source.opaque:
        paths = (path for anchor in region.source.anchors for path in (anchor.weight, anchor.bias))
        install(module, [path for path in paths if _has(module, path)], own_methods)
        return
    leaves: dict[str, list[str]] = {"": []}
    for path in (path for anchor in region.source.anchors for path in (anchor.weight, anchor.bias)):
        prefix, _, leaf = path.rpartition(".")
        leaves.setdefault(prefix, []).append(leaf)
    for prefix, own in leaves.items():
        reader = module.get_submodule(prefix)
        own = [name for name in own if _has(reader, name)]
        if prefix == "" or own:
            install(reader, own, own_methods if prefix == "" else {})
        if own:
            reads(reader, module, f"{prefix}." if prefix else "")


def _has(module: nn.Module, leaf: str) -> bool:
    return module._parameters.get(leaf) is not None or module._buffers.get(leaf) is not None


def _uninstall(program: Program, region: Region) -> None:
    """Let the module of `region`, and those whose weights it lent, be what they were, if no other region needs them."""
    hosts = {id(program.modules[other.host]) for other in program.regions if other is not region}
    for reader in _readers(program.modules, region):
        if id(reader) not in hosts:
            uninstall(reader)


def _readers(modules: Mapping[str, nn.Module], region: Region) -> list[nn.Module]:
    """The module of `region`, and those inside whose weights it lends where it is called as it is."""
    module, inside = modules[region.host], region.source.anchors if region.source.opaque else ()
    prefixes = dict.fromkeys(["", *(anchor.weight.rpartition(".")[0] for anchor in inside)])
    return [module.get_submodule(prefix) for prefix in prefixes]


def start_alone(program: Program, edit: Edit, params: Collection[PlannedParam]) -> None:
    """Initialise these parameters of an edit that was attached with `fresh=False`."""
    _start(program, edit, params, widest_mesh(program.base))


def _start(program: Program, edit: Edit, params: Collection[PlannedParam], mesh: Any, data: Any = None) -> None:
    adapter, site = program.adapters[edit.adapter], program.plan.sites[edit.site]
    holder, weight = program.modules[site.holder], weight_of(program.modules[site.owner], site)
    start(adapter.part(edit), adapter.spec, params, holder, weight, mesh, partial(_sharing, program), data)


def _sharing(program: Program, edit: Edit, param: PlannedParam) -> dict[str, Tensor]:
    """The canonical weights, in float32 at least, of the sites that share a parameter of `edit`."""
    found: dict[str, Tensor] = {}
    for other in (other for other in program.plan.edits if other.adapter == edit.adapter):
        if any(own.shared and own.key == param.key for own in other.params):
            site = program.plan.sites[other.site]
            weight = weight_of(program.modules[site.owner], site)
            assert weight is not None, "the rule's check() asks for a weight"
            assert isinstance(site, WeightSite), "other rules declare modules"
            require_there(other, weight)
            found[other.site] = wide(canonical(whole(weight), site))
    return found


def remove(program: Program, adapter: str) -> None:
    """Take an adapter off: its tensors, and those that it brought in the place of the base's."""
    common = _common(program, adapter)
    gone = program.adapters.pop(adapter, None)
    program.asking = tuple(name for name in program.asking if name != adapter)
    for edit in gone.edits if gone is not None else ():
        site = program.plan.sites[edit.site]
        detach(edit, program.modules[site.holder], common)
        if site.added is not None and not program.modules[site.holder]._modules:
            program.modules[site.owner]._modules.pop(site.added, None)
    program.overlay.drop(program.base, adapter)


def undo(program: Program) -> nn.Module:
    """The base model as it was: classes, tensors, flags and attributes. The program is spent afterwards."""
    stop_averaging(program.made)
    for adapter in list(program.adapters):
        remove(program, adapter)
    for module in _hosts(program):
        uninstall(module)
    let_gradients_through(program.base, on=False)
    for (fqn, flag), value in program.given.fast_paths.items():
        setattr(module_at(program.base, fqn), flag, value)
    for name, flag in program.given.requires_grad.items():
        parameter_at(program.base, name).requires_grad_(flag)
    for adapter in program.plan.adapters:
        program.plan = without(program.plan, adapter)
    fresh = Program(program.base, program.plan, (), inplace=program.inplace, unloaded=True)
    program.__dict__.update(fresh.__dict__)
    return program.base


@contextmanager
def parked(program: Program) -> Generator[nn.Module]:
    """The base model without its adapters for a while, to be planned on: no rewritten class, no added child."""
    hosts = [(module, type(module), _state(module)) for module in _hosts(program) if is_host(module)]
    children = [(module, name, module._modules.pop(name)) for module, name in _added(program)]
    noted = {name: value for name, value in program.base.__dict__.items() if name.startswith(BOUND)}
    for module, _, state in hosts:
        uninstall(module)
        _forget(module, state)
    _forget(program.base, noted)
    try:
        yield program.base
    finally:
        program.base.__dict__.update(noted)
        for module, cls, state in hosts:
            module.__dict__.pop("forward", None)
            module.__dict__.update(state)
            object.__setattr__(module, "__class__", cls)
        for module, name, child in children:
            module._modules[name] = child


def _forget(module: nn.Module, names: Iterable[str]) -> None:
    """Take off what peftc has noted on a module, which is none of the module's own state."""
    for name in names:
        if name.startswith(BOUND):
            module.__dict__.pop(name, None)


def _state(module: nn.Module) -> dict[str, Any]:
    own = {name: value for name, value in module.__dict__.items() if name.startswith(BOUND) or name == "forward"}
    return own | ({INNER: module.__dict__[INNER]} if is_hooked(module) else {})


def _hosts(program: Program) -> list[nn.Module]:
    """The modules that are hosts, and those whose weights may be stood in for."""
    return [reader for region in program.regions for reader in _readers(program.modules, region)]


def _added(program: Program) -> list[tuple[nn.Module, str]]:
    """(module, name) of the children that adapters have added."""
    places = {(id(owner := program.modules[site.owner]), site.added): owner for site in program.plan.sites.values()}
    found: list[tuple[nn.Module, str]] = []
    for (_, added), module in places.items():
        names = program.children if added is None else [added]
        found += [(module, name) for name in names if name in module._modules]
    commons = {id(module): module for module in (_common(program, name) for name in program.adapters)}
    known = {(id(module), name) for module, name in found}
    for module in commons.values():
        found += [(module, n) for n in program.children if n in module._modules and (id(module), n) not in known]
    return found


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
                program.given.fast_paths.setdefault((fqn, flag), getattr(module, flag))
                setattr(module, flag, off)


def _above(fqn: str) -> list[str]:
    """The fqns of the modules that `fqn` is in, the whole model first."""
    parts = fqn.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]
