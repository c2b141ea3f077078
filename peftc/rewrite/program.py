"""The rewritten model and its journal, and the one mutator: build, activate, remove, undo."""

import copy
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from peftc.errors import ConflictError, NoMatchError
from peftc.graph.copying import structural_copy
from peftc.graph.region import Anchor, Region
from peftc.graph.sites import parameter_name
from peftc.plan import Edit, Plan
from peftc.plan.make import MODULES_TO_SAVE
from peftc.registry import find_rule
from peftc.rewrite.attach import attach, check_names, containers, detach
from peftc.rewrite.host import Code, install, original_class, uninstall
from peftc.rewrite.splice import Active, splice
from peftc.rule import Rule, live_name


@dataclass
class Journal:
    """What it takes to give the base model back exactly: original tensors, flags, attributes and references."""

    requires_grad: dict[str, bool] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    merged: dict[str, Tensor] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    fast_paths: dict[tuple[str, str], Any] = field(default_factory=dict)


@dataclass
class Program:
    """A base model with adapters: what is attached, active and merged, and the codes made so far.

    `owners`: the modules of sites and hosts by fqn. `codes`: by what they are made of, so equal hosts share one.
    `variants`: by host and adapters active there.
    """

    base: nn.Module
    plan: Plan
    regions: tuple[Region, ...]
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    enabled: bool = True
    journal: Journal = field(default_factory=Journal)
    owners: dict[str, nn.Module] = field(default_factory=dict)
    codes: dict[Any, Code] = field(default_factory=dict)
    variants: dict[tuple[str, tuple[str, ...]], Code | None] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        # The kept originals are never written to, so both journals may hold them.
        journal = replace(self.journal, merged=dict(self.journal.merged), untied=dict(self.journal.untied))
        base = copy.deepcopy(self.base, memo)
        new = replace(self, base=base, journal=journal, codes=dict(self.codes), variants=dict(self.variants))
        new.find_owners()
        return new

    def __getstate__(self) -> dict[str, Any]:
        # Codes are keyed by identity, which a pickle does not keep; they are made again on the next switch.
        return {**self.__dict__, "owners": {}, "codes": {}, "variants": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.find_owners()

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
    """Raise NoMatchError or ConflictError if the plan holds misses (unless `on_unmatched="warn"`) or conflicts."""
    if plan.conflicts:
        lines = "; ".join(f"{conflict.site or 'the model'}: {conflict.reason}" for conflict in plan.conflicts)
        raise ConflictError(f"{len(plan.conflicts)} conflicts between adapters: {lines}")
    errors = [miss for miss in plan.misses if miss.error]
    if errors and on_unmatched == "error":
        name = type(plan.adapters[errors[0].adapter]).__name__
        lines = " ".join(f"{name}.{miss}" for miss in errors[:8])
        more = f" (and {len(errors) - 8} more)" if len(errors) > 8 else ""
        raise NoMatchError(f"{lines}{more} Mend the spec, or pass on_unmatched='warn' to go on without them.")
    for name in plan.adapters:
        if not any(edit.adapter == name for edit in plan.edits) and on_unmatched == "error":
            raise NoMatchError(f"adapter {name!r}: nothing to adapt; its spec selects no site of {plan.model}")


def build(model: nn.Module, plan: Plan, regions: tuple[Region, ...], inplace: bool) -> Program:
    """Attach every adapter of `plan` to a structural copy of `model` (or to itself) and activate the first.

    The model given is not changed unless `inplace`, and then given back intact if anything fails.
    """
    check_names(model, plan, plan.adapters)
    base = model if inplace else structural_copy(model)
    program = Program(base, plan, regions)
    program.journal.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    try:
        extend(program, plan, regions, list(plan.adapters))
        activate(program, list(plan.adapters)[:1])
    except BaseException:
        undo(program)
        raise
    return program


def extend(program: Program, plan: Plan, regions: tuple[Region, ...], adapters: Collection[str]) -> None:
    """Attach the parameters of `adapters`, which are new in `plan`. They start inactive."""
    # A host that is there already keeps its region, and with it its code.
    known = {region.host: region for region in program.regions} if plan.capture == "modules" else {}
    program.plan, program.regions = plan, tuple(known.get(region.host, region) for region in regions)
    program.variants.clear()
    _close_fast_paths(program, program.find_owners())
    for edit in plan.edits:
        if edit.adapter in adapters:
            attach(program.owners[edit.site], edit, plan)
    for tensor in plan.trained:
        if tensor.adapter in adapters:
            parameter = program.base.get_parameter(tensor.name)
            program.journal.tensors[tensor.name] = parameter.data
            parameter.data = parameter.data.clone()


def activate(program: Program, names: Iterable[str], trainable: bool = True) -> None:
    """Make `names` the active adapters: edits spliced in load order, their parameters trainable, all others frozen."""
    chosen = set(names)
    order = [name for name in program.plan.adapters if name in chosen]
    emit(program, order)
    program.active = tuple(order)
    learning = {n for n in order if trainable and not program.plan.adapters[n].inference_mode}
    for edit in program.plan.edits:
        for param in edit.params:
            learns = edit.adapter in learning and param.trainable
            program.tensor(edit, param.key).requires_grad_(learns)
    for tensor in program.plan.trained:
        program.base.get_parameter(tensor.name).requires_grad_(tensor.adapter in learning)


def emit(program: Program, names: Sequence[str]) -> None:
    """Let every host run its region with the edits of `names` spliced in; without any it is its old self again.

    None is while the program is disabled. All codes are made before the first host is changed, so a rule that does not
    trace changes nothing.
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
    for module, region, code in chosen:
        if code is None:
            uninstall(module)
        elif type(module) is not code.cls:
            install(module, code, region.source.opaque)


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
        program.codes[key] = Code(cls, splice(region.source, active))
    return program.codes[key]


def _rule_of(plan: Plan, edit: Edit) -> Rule[Any] | None:
    return None if edit.rule == MODULES_TO_SAVE else find_rule(plan.adapters[edit.adapter], plan.sites[edit.site])


def _signature(edit: Edit) -> Any:
    """What the spliced code depends on."""
    dropouts = tuple((name, probability > 0) for name, probability in edit.dropouts.items())
    params = tuple((param.name, param.key) for param in edit.params)
    return edit.adapter, edit.rule, edit.slot, params, tuple(edit.constants.items()), dropouts


def remove(program: Program, adapter: str) -> None:
    """Take an inactive adapter off: its parameters, and the biases it trained."""
    for edit in program.plan.edits:
        if edit.adapter == adapter:
            detach(program.owners[edit.site], edit)
    for tensor in program.plan.trained:
        original = program.journal.tensors.pop(tensor.name, None) if tensor.adapter == adapter else None
        if original is not None:
            _restore_data(program.base.get_parameter(tensor.name), original)


def undo(program: Program) -> nn.Module:
    """The base model as it was: classes, tensors, flags and attributes. The program is empty afterwards."""
    for region in program.regions:
        uninstall(program.owners[region.host])
    for adapter in program.plan.adapters:
        remove(program, adapter)
    for name, original in program.journal.tensors.items():
        _restore_data(program.base.get_parameter(name), original)
    for (fqn, flag), value in program.journal.fast_paths.items():
        setattr(program.base.get_submodule(fqn), flag, value)
    for name, flag in program.journal.requires_grad.items():
        program.base.get_parameter(name).requires_grad_(flag)
    return program.base


def _restore_data(parameter: nn.Parameter, original: Tensor) -> None:
    """Point `parameter` at its original tensor again, moved along if the model was moved or cast since."""
    parameter.data = original.to(device=parameter.device, dtype=parameter.dtype)


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
