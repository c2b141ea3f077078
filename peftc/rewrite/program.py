"""The rewritten model and its journal, and the one mutator: build, activate, remove, undo."""

import copy
import warnings
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from peftc.errors import AdapterError, ConflictError, NoMatchError
from peftc.graph.copying import structural_copy
from peftc.graph.region import Anchor, Region
from peftc.graph.sites import is_lazy, parameter_name
from peftc.plan import Edit, Plan
from peftc.plan.make import MODULES_TO_SAVE
from peftc.registry import find_rule
from peftc.rewrite.attach import attach, check_names, containers, detach
from peftc.rewrite.generation import call_methods
from peftc.rewrite.host import Code, install, original_class, uninstall
from peftc.rewrite.splice import Active, splice
from peftc.rule import Rule, live_name


@dataclass
class Journal:
    """What it takes to give the base model back exactly.

    `replaced`: tensors a checkpoint brought its own of. `trained`: for a bias that an adapter trains, the value that is
    not in the model now: the original while its name is in `training`, else the trained one. `merged`: (owner, leaf,
    tensor object) of what merging put something else in the place of. `fast_paths`: (fqn, attribute) → value.
    `encoders`: for a prompt loaded for inference, its rows and the encoder they came from, to be saved with them again.
    """

    requires_grad: dict[str, bool] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    training: set[str] = field(default_factory=set)
    merged: list[tuple[str, str, Tensor]] = field(default_factory=list)
    tie_word_embeddings: bool = False
    fast_paths: dict[tuple[str, str], Any] = field(default_factory=dict)
    encoders: dict[str, tuple[Tensor, dict[str, Tensor]]] = field(default_factory=dict)


@dataclass
class Program:
    """A base model with adapters: what is attached, active, learning and merged, and the codes made so far.

    `owners`: the modules of sites and hosts by fqn. `codes`: by what they are made of, so equal hosts share one.
    `variants`: by host and adapters active there.
    """

    base: nn.Module
    plan: Plan
    regions: tuple[Region, ...]
    active: tuple[str, ...] = ()
    learning: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    enabled: bool = True
    unloaded: bool = False
    journal: Journal = field(default_factory=Journal)
    owners: dict[str, nn.Module] = field(default_factory=dict)
    codes: dict[Any, Code] = field(default_factory=dict)
    variants: dict[tuple[str, tuple[str, ...]], Code | None] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        base, journal = copy.deepcopy(self.base, memo), copy.deepcopy(self.journal, memo)
        new = replace(self, base=base, journal=journal, codes=dict(self.codes), variants=dict(self.variants))
        new.settle()
        return new

    def __getstate__(self) -> dict[str, Any]:
        # Codes are keyed by identity, which a pickle does not keep; they are made again on the next switch.
        return {**self.__dict__, "owners": {}, "codes": {}, "variants": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.settle()

    def settle(self) -> None:
        """Look the modules of a copy up, and end the disabling of the context that the copy was made in."""
        self.find_owners()
        if not self.enabled:
            self.enabled = True
            emit(self, self.active)

    def find_owners(self) -> dict[str, nn.Module]:
        """Look the modules of all sites and hosts up; all modules by fqn."""
        names = {*self.plan.sites, *(region.host for region in self.regions)}
        modules = dict(self.base.named_modules())
        self.owners = {fqn: modules[fqn] for fqn in names}
        return modules

    def tensor(self, edit: Edit, key: str) -> Tensor:
        """The live tensor of `edit` with checkpoint key `key`: a parameter, or a buffer of a module saved whole."""
        *path, leaf = live_path(edit, key)
        module = self.owners[edit.site]
        for name in path:
            module = cast(nn.Module, module._modules[name])
        return tensor_slots(module, leaf)[leaf]


def tensor_slots(module: nn.Module, leaf: str) -> dict[str, Any]:
    """The dict of `module` that holds its own tensor `leaf`: `_parameters` or `_buffers`."""
    return module._parameters if leaf in module._parameters else module._buffers


def live_path(edit: Edit, key: str) -> list[str]:
    """The path from the site to the live tensor of `edit` with checkpoint key `key`."""
    name = f"{MODULES_TO_SAVE}.{edit.adapter}.{key}" if edit.rule == MODULES_TO_SAVE else live_name(key, edit.adapter)
    return name.split(".")


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

    `fresh=False`: their values are about to be loaded. The model given is not changed unless `inplace`, and then given
    back intact if anything fails.
    """
    check_names(model, plan, plan.adapters)
    base = model if inplace else structural_copy(model)
    program = Program(base, plan, regions)
    program.journal.requires_grad = {n: p.requires_grad for n, p in model.named_parameters() if not is_lazy(p)}
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
    # A host that is there already keeps its region, and with it its code.
    known = {region.host: region for region in program.regions} if plan.capture == "modules" else {}
    program.plan, program.regions = plan, tuple(known.get(region.host, region) for region in regions)
    program.variants.clear()
    _close_fast_paths(program, program.find_owners())
    for edit in plan.edits:
        if edit.adapter in adapters:
            attach(program.owners[edit.site], edit, plan, fresh)
    for tensor in plan.trained:
        if tensor.adapter in adapters:
            program.journal.trained[tensor.name] = program.base.get_parameter(tensor.name).data.clone()


def activate(program: Program, names: Iterable[str], learning: Iterable[str]) -> None:
    """Make `names` the active adapters, spliced in load order; parameters of those in `learning` train, others do not.

    Raises RuleError (a rule does not trace) or AdapterError (a forward was wrapped); nothing is changed then.
    """
    chosen, before = set(names), program.active
    program.active = tuple(name for name in program.plan.adapters if name in chosen)
    try:
        emit(program, program.active)
    except BaseException:
        program.active = before
        raise
    program.learning = tuple(name for name in program.active if name in set(learning))
    for edit in program.plan.edits:
        for param in edit.params:
            learns = edit.adapter in program.learning and param.trainable
            program.tensor(edit, param.key).requires_grad_(learns)
    for tensor in program.plan.trained:
        program.base.get_parameter(tensor.name).requires_grad_(tensor.adapter in program.learning)


def emit(program: Program, names: Sequence[str]) -> None:
    """Let every host run its region with the edits of `names` spliced in; without any it is its old self again.

    None is while the program is disabled. All codes are made before the first host is changed, so a rule that does not
    trace changes nothing. The biases that active adapters train are put in, those of others taken out.
    """
    names = names if program.enabled else []
    owners: dict[str, list[Edit]] = {}
    for edit in program.plan.edits:
        owners.setdefault(edit.site, []).append(edit)
    chosen: list[tuple[nn.Module, Region, Code | None]] = []
    for region in program.regions:
        edits = {anchor.site: owners.get(_site_of(region, anchor), []) for anchor in region.source.anchors}
        here = {edit.adapter for group in edits.values() for edit in group}
        key = (region.host, tuple(name for name in names if name in here))
        module = program.owners[region.host]
        if key not in program.variants:
            program.variants[key] = _code(program, region, module, edits, key[1])
        chosen.append((module, region, program.variants[key]))
    require_unwrapped(program)
    for module, region, code in chosen:
        if code is None:
            uninstall(module)
        elif type(module) is not code.cls:
            install(module, code, region.source.opaque)
    for tensor in program.plan.trained:
        _set_bias(program, tensor.name, program.enabled and tensor.adapter in program.active)


def _set_bias(program: Program, name: str, on: bool) -> None:
    """Exchange the value of a bias that an adapter trains for its original one, or back."""
    journal = program.journal
    if name in journal.trained and on != (name in journal.training):
        parameter = program.base.get_parameter(name)
        other = journal.trained[name].to(device=parameter.device, dtype=parameter.dtype)
        journal.trained[name], parameter.data = parameter.data, other
        journal.training.symmetric_difference_update([name])


def require_unwrapped(program: Program) -> None:
    """Raise AdapterError if the forward of a host was replaced on the instance after compiling.

    The wrapper holds the code of that moment, which exchanging the class would not reach.
    """
    for region in program.regions:
        module = program.owners[region.host]
        if "forward" in module.__dict__ and (original_class(module) is not type(module) or not region.source.opaque):
            raise AdapterError(
                f"{region.host or 'the model'}: its forward was replaced after compiling (an accelerate hook?), so it"
                " can't be switched. Take the replacement off (accelerate.hooks.remove_hook_from_module), switch, and"
                " put it on again."
            )


def _site_of(region: Region, anchor: Anchor) -> str:
    return parameter_name(region.host, anchor.site) if anchor.site else region.host


def _code(
    program: Program, region: Region, module: nn.Module, edits: Mapping[str, Sequence[Edit]], names: Sequence[str]
) -> Code | None:
    """The code of `region` with the adapters `names` active, in this order; equal hosts get the same one."""
    if not names:
        return None
    active: dict[str, list[Active]] = {}
    for site, group in edits.items():
        for edit in sorted((e for e in group if e.adapter in names), key=lambda e: names.index(e.adapter)):
            active.setdefault(site, []).append(Active(edit, _rule_of(program.plan, edit)))
    cls = original_class(module)
    signature = tuple((site, tuple(_signature(a.edit) for a in group)) for site, group in active.items())
    key = (id(region.source), cls, signature)
    if key not in program.codes:
        methods = call_methods(cls, [item.edit for item in active.get("", ())])
        program.codes[key] = Code(cls, splice(region.source, active), methods)
    return program.codes[key]


def _rule_of(plan: Plan, edit: Edit) -> Rule[Any] | None:
    return None if edit.rule == MODULES_TO_SAVE else find_rule(plan.adapters[edit.adapter], plan.sites[edit.site])


def _signature(edit: Edit) -> Any:
    """What the spliced code depends on."""
    dropouts = tuple((name, probability > 0) for name, probability in edit.dropouts.items())
    params = tuple((param.name, param.key) for param in edit.params)
    return edit.adapter, edit.rule, edit.slot, params, tuple(edit.constants.items()), dropouts


def remove(program: Program, adapter: str) -> None:
    """Take an adapter off: its parameters, and the biases it trained."""
    program.journal.encoders.pop(adapter, None)
    for edit in program.plan.edits:
        if edit.adapter == adapter:
            detach(program.owners[edit.site], edit)
    for tensor in program.plan.trained:
        if tensor.adapter == adapter:
            _set_bias(program, tensor.name, False)
            program.journal.trained.pop(tensor.name, None)


def undo(program: Program) -> nn.Module:
    """The base model as it was: classes, tensors, flags and attributes. The program is spent afterwards."""
    for region in program.regions:
        uninstall(program.owners[region.host])
    for adapter in program.plan.adapters:
        remove(program, adapter)
    for name, original in program.journal.replaced.items():
        parameter = program.base.get_parameter(name)
        parameter.data = original.to(device=parameter.device, dtype=parameter.dtype)
    for (fqn, flag), value in program.journal.fast_paths.items():
        setattr(program.base.get_submodule(fqn), flag, value)
    for name, flag in program.journal.requires_grad.items():
        program.base.get_parameter(name).requires_grad_(flag)
    return program.base


@contextmanager
def parked(program: Program) -> Generator[nn.Module]:
    """The base model without its adapters for a while, to be planned on: no rewritten class, no added child."""
    base = program.base
    hosts = [(program.owners[region.host], region) for region in program.regions]
    codes = [(module, getattr(type(module), "code_object", None), region) for module, region in hosts]
    for module, _, _ in codes:
        uninstall(module)
    owners = [(program.owners[edit.site], first) for edit in program.plan.edits for first in containers(edit)]
    children = [(module, first, module._modules.pop(first)) for module, first in owners if first in module._modules]
    try:
        yield base
    finally:
        for module, first, child in children:
            module._modules[first] = child
        for module, code, region in codes:
            if code is not None:
                install(module, code, region.source.opaque)


# Flags that these classes ask before taking their fused inference path, which reads weights and skips spliced ops.
_FAST_PATHS: Mapping[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def _close_fast_paths(program: Program, modules: Mapping[str, nn.Module]) -> None:
    """Turn the fused paths around adapted sites off."""
    fused = [(fqn, module) for fqn, module in modules.items() if isinstance(module, tuple(_FAST_PATHS))]
    for fqn, module in fused:
        flag, off = next(value for cls, value in _FAST_PATHS.items() if isinstance(module, cls))
        prefix = f"{fqn}." if fqn else ""
        if any(edit.site.startswith(prefix) for edit in program.plan.edits):
            program.journal.fast_paths.setdefault((fqn, flag), getattr(module, flag))
            setattr(module, flag, off)
