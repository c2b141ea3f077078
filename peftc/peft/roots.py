"""What stands behind the classes of this package: the compiled model of a base, found from any of its modules.

A model that was given adapters here holds a Root; so does every module that they are on, with its name. Adapters are
attached in place, and everything else is asked of the CompiledModel.
"""

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from peftc.api import compile
from peftc.compiled import CompiledModel
from peftc.errors import AdapterError, NoMatchError
from peftc.graph.finding import module_at
from peftc.lifecycle import describe, named, require_known
from peftc.peft.adapted import ROOT, BaseTunerLayer
from peftc.peft.configs import as_config, config_from, resolve, spec_of
from peftc.peft.experts import with_experts
from peftc.peft.layers import classes_at
from peftc.plan import Edit
from peftc.registry import is_own
from peftc.rewrite.calibration import Calibration
from peftc.rewrite.hosts import be_also, is_host
from peftc.rewrite.parts import containers
from peftc.rewrite.program import Program
from peftc.rewrite.switch import activate

# Where a model has what was found out for adapters that start from data; those that are told of data later, and before.
CALIBRATED = "_peftc_calibrated"
_LATER = "eva"
_BEFORE = {"corda": "preprocess_corda", "lora_ga": "preprocess_loraga"}
# Methods whose scripts say when a step is over (update_and_allocate).
_BY_HAND = ("ADALORA", "ADAMSS")


class Root:
    """A compiled model and its configs by adapter, which scripts may change.

    `modules` and `edits`: by fqn, those that adapters are on, and the edits there. `merging`: layers told to merge so far;
    `before`: who was active and learning before others were merged.
    """

    def __init__(self, compiled: CompiledModel, configs: dict[str, Any]) -> None:
        self.made: Any = compiled
        self.configs = configs
        self.merging: set[str] = set()
        self.before: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self.modules: dict[str, nn.Module] = {}
        self.edits: dict[str, list[Edit]] = {}

    @property
    def compiled(self) -> CompiledModel:
        """The compiled model; that of a copied base is copied at its first use, when the base is whole."""
        if isinstance(self.made, _Pending):
            program = copy.deepcopy(self.made.program, self.made.memo)
            self.made = CompiledModel(program)
            adopt(self)
        return self.made

    @property
    def program(self) -> Program:
        """The program of the compiled model."""
        return self.compiled.program

    def activate(self, adapter_names: str | Sequence[str], inference_mode: bool = False, *, flags: bool = True) -> None:
        """Activate exactly these adapters, and train them unless `inference_mode`. `flags`: of all parameters, again."""
        names, program = named(adapter_names), self.program
        if set(names) != set(program.active):
            self.compiled.set_adapter(names)
        # Also where nothing changes: scripts set flags themselves.
        if flags:
            self.compiled.set_requires_grad(names, not inference_mode)

    def merge_at(self, fqn: str, adapter_names: list[str] | None) -> None:
        """Merge, if all layers were told to with this one."""
        self.merging.add(fqn)
        if self.merging >= self._layers:
            self.merging.clear()
            self.merge(adapter_names)

    def unmerge_at(self, fqn: str) -> None:
        """Unmerge, at the first layer that is told to."""
        if self.program.merged:
            self.unmerge()
            self.merging = set(self._layers)
        self.merging.discard(fqn)

    @property
    def _layers(self) -> set[str]:
        return {fqn for fqn, module in self.modules.items() if isinstance(module, BaseTunerLayer)}

    def merge(self, adapter_names: Sequence[str] | None, progressbar: bool = False) -> None:
        """Merge these adapters (default: the active ones) beside those that are, whether they are active or not."""
        program = self.program
        wanted = list(program.active if adapter_names is None else named(adapter_names))
        require_known(program.plan, wanted)
        total = [name for name in program.plan.adapters if name in {*wanted, *program.merged}]
        if set(total) == set(program.merged):
            return
        self.unmerge()
        self.compiled.enable_adapters(True)
        if total != list(program.active):
            self.before = (program.active, program.learning)
            self.compiled.set_adapter(total)
        self.compiled.merge_adapter(total, untie=True, progressbar=progressbar)

    def unmerge(self) -> None:
        """Unmerge what is merged, and let the adapters be active that were."""
        if self.program.merged:
            self.compiled.unmerge_adapter()
        if self.before is not None:
            (active, learning), self.before = self.before, None
            activate(self.program, active, learning)

    def learn(self, adapter_name: str) -> None:
        """Know an adapter that was attached to the compiled model itself."""
        take(self, adapter_name)
        adopt(self)

    def delete(self, adapter_name: str | Sequence[str]) -> None:
        """Take adapters off, and let modules that have none any more be what they were."""
        self.unmerge()
        self.compiled.delete_adapter(adapter_name)
        for name in named(adapter_name):
            self.configs.pop(name, None)
        adopt(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Root":
        new = memo[id(self)] = Root(_Pending(_still(self.program), memo), copy.deepcopy(self.configs, memo))  # type: ignore[arg-type]
        return new

    def __reduce__(self) -> Any:
        return _lost, ()


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A program to be copied with what `memo` has copied already."""

    program: Program
    memo: dict[int, Any]


def _still(program: Program) -> Program:
    """The program as it is now, whatever changes later."""
    return dataclasses.replace(
        program,
        adapters=dict(program.adapters),
        overlay=copy.copy(program.overlay),
        merge=dataclasses.replace(program.merge, replaced=list(program.merge.replaced)),
    )


def _lost() -> None:
    """What a pickle has for a root; a PeftModel that comes out of one makes it anew."""


def root_of(module: Any) -> Root | None:
    """The root of a model, or of a module in it, that has adapters of this package; None if it has none."""
    found = module.__dict__.get(ROOT) if isinstance(module, nn.Module) else None
    return found[0] if found is not None else None


def require_root(module: Any) -> Root:
    """As `root_of`. Raises AdapterError if there is none."""
    root = root_of(module)
    if root is None:
        raise AdapterError(
            f"{type(module).__name__} has no adapters (any more: unload() and merge_and_unload() take them off);"
            " get_peft_model gives it some"
        )
    return root


def attach(
    model: nn.Module, configs: Mapping[str, Any], *, autocast: bool, calibration: Calibration | None = None
) -> Root:
    """Give `model`, in place, the adapters that `configs` describe. The first is active if there was none before.

    `calibration`: what they start from, if that is data; else what preprocess_… has kept.
    """
    _require_module(model)
    configs = {name: as_config(config) for name, config in configs.items()}
    specs = {name: with_experts(model, spec_of(config)) for name, config in configs.items()}
    for name, spec in specs.items():
        calibration = _found(model, spec) if calibration is None else replace(calibration, given=spec, spec=spec)
        if calibration is None and getattr(spec, "init_lora_weights", None) == _LATER:
            specs[name] = spec.model_copy(update={"init_lora_weights": True})
    root = root_of(model)
    if root is not None and _is_left(root):
        release(root)
        root = None
    if root is None:
        compiled = compile(
            model,
            specs,
            inplace=True,
            on_unmatched="warn",
            autocast_adapter_dtype=autocast,
            calibration=calibration,
        )
        root = Root(compiled, {})
    else:
        root.unmerge()
        for name, spec in specs.items():
            # A config alone may be there before: `inject_adapter` is told by its name.
            if name in root.program.plan.adapters:
                warnings.warn(f"adapter {name!r} is there already; the new one takes its place", stacklevel=4)
                root.delete(name)
            root.compiled.add_adapter(
                name, spec, on_unmatched="warn", autocast_adapter_dtype=autocast, calibration=calibration
            )
    for name, config in configs.items():
        _require_some(root, name)
        take(root, name, config)
        _let_drop(root, name)
    adopt(root)
    return root


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module to adapt, got a {type(model).__name__}")


def _found(model: nn.Module, spec: Any) -> Calibration | None:
    """What was kept on the model for adapters that start so, which is used once."""
    kept: list[Calibration] = model.__dict__.get(CALIBRATED, [])
    start = getattr(spec, "init_lora_weights", None)
    found = next((one for one in reversed(kept) if getattr(one.spec, "init_lora_weights", True) == start), None)
    if found is not None:
        kept.remove(found)
    elif start in _BEFORE:
        raise AdapterError(f"init_lora_weights={start!r}: call {_BEFORE[start]} first, which runs the model on data")
    return None if found is None else replace(found, given=spec, spec=spec)


def _let_drop(root: Root, name: str) -> None:
    """Let what is new be in train(), as new modules are, whatever the base is in."""
    for part in root.program.adapters[name].parts.values():
        for dropout, probability in part.edit.dropouts.items():
            if probability > 0:
                getattr(part, dropout).train()
        if part.edit.rule.container is not None and containers(part.edit):
            part.module.train()


def _is_left(root: Root) -> bool:
    """Whether somebody has put the modules as they were in the place of those with adapters, which takes these off."""
    base = root.program.base
    return any(fqn and module_at(base, fqn) is not module for fqn, module in root.modules.items())


def _require_some(root: Root, name: str) -> None:
    """Raise NoMatchError, with the adapter off again, if it changes nothing at all: PEFT goes on without some targets,
    but not without any.
    """
    plan = root.program.plan
    if any(edit.adapter == name and not edit.whole for edit in plan.edits):
        return
    misses = " ".join(f"{type(plan.adapters[name]).__name__}.{miss}" for miss in plan.misses if miss.adapter == name)
    if len(plan.adapters) == 1:
        root.compiled.unload()
    else:
        root.compiled.delete_adapter(name)
    told = misses.rstrip(".") or f"{name}: it adapts no module; peftc.compile takes modules_to_save alone"
    raise NoMatchError(f"{told}. Nothing of the adapter would be left.")


def take(root: Root, name: str, config: Any = None) -> None:
    """Remember the config of an adapter that was attached, with what compiling has found out."""
    spec = root.program.plan.adapters[name]
    root.program.adapters[name].by_hand = spec.peft_type in _BY_HAND
    root.configs[name] = config_from(spec) if config is None else config
    resolve(root.configs[name], spec)
    own, edits = root.configs[name], [edit for edit in root.program.plan.edits if edit.adapter == name]
    if getattr(own, "modules_to_save", None) is None and any(edit.whole for edit in edits):
        own.modules_to_save = list(spec.heads) or None
    if getattr(own, "target_modules", None) == "all-linear":
        own.target_modules = {edit.site.rpartition(".")[2] for edit in edits if is_own(spec, edit.rule)}
    if spec.inference_mode:
        root.compiled.set_requires_grad(name, False)


def adopt(root: Root) -> None:
    """Let the modules that adapters are on now be instances of PEFT's layers too, and know their root."""
    program = root.program
    sites: dict[str, list[Edit]] = {}
    for edit in program.plan.edits:
        sites.setdefault(program.plan.sites[edit.site].owner, []).append(edit)
    modules = {"": program.base, **{fqn: program.modules[fqn] for fqn in sites}}
    for fqn, module in root.modules.items():
        if fqn not in modules:
            leave(module)
    for fqn, module in modules.items():
        module.__dict__[ROOT] = (root, fqn)
        if fqn in sites and is_host(module):
            be_also(module, classes_at(sites[fqn], program.plan.sites))
    root.modules, root.edits = modules, sites


def leave(module: nn.Module) -> None:
    """Let a module be what it was."""
    module.__dict__.pop(ROOT, None)
    if is_host(module):
        be_also(module, ())


def release(root: Root) -> None:
    """Let go of the base, which has no adapters any more."""
    for module in root.modules.values():
        leave(module)
    root.modules, root.edits = {}, {}


def tell(root: Root) -> None:
    """Let what files say of where an adapter is from be what the configs say now, which scripts change."""
    for name, config in root.configs.items():
        describe(root.program, name, spec_of(config))
