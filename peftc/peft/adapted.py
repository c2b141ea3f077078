"""Adapted modules: what all of PEFT's layer classes have in common.

Their attributes are computed from the compiled model. What is set or called on one layer counts for the whole model,
but for scales, which every layer has its own of.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from peftc.errors import AdapterError
from peftc.graph.sites import WeightSite, canonical
from peftc.plan import Edit
from peftc.rewrite.parts import Part, weight_of
from peftc.rewrite.views import as_it_was

__all__ = ["BaseTunerLayer"]

# The attribute of a module that holds its root (see there) and its fqn.
ROOT = "peftc_root"


class Computed:
    """An attribute that is computed, unless the module has one of that name itself."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make
        self.__doc__ = make.__doc__

    def assigned(self, assign: Callable[[Any, Any], None]) -> "Computed":
        """The same attribute, which can be assigned to."""
        made = _Assigned(self.make)
        made.assign = assign
        return made

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        for held in ("_parameters", "_buffers", "_modules"):
            own = module.__dict__.get(held, {})
            if self.name in own:
                return own[self.name]
        return self.make(module)


class _Assigned(Computed):
    """One that can be assigned to, but where the module has one of that name itself."""

    assign: Callable[[Any, Any], None]

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is not None and self.name in module.__dict__:
            return module.__dict__[self.name]
        return super().__get__(module, owner)

    def __set__(self, module: Any, value: Any) -> None:
        if isinstance(value, Mapping) and self.name not in module.__dict__ and ROOT in module.__dict__:
            self.assign(module, value)
        else:
            module.__dict__[self.name] = value


class OfModel:
    """What a module that adapters are on, or have copies of, knows and does of the whole model."""

    @Computed
    def active_adapters(self) -> list[str]:
        """The active adapters of the model, in load order."""
        return list(program_of(self).active)

    @Computed
    def disable_adapters(self) -> bool:
        """Whether adapters are off."""
        return not program_of(self).enabled

    def enable_adapters(self, enabled: bool) -> None:
        """Turn the adapters of the model on or off."""
        compiled = place_of(self)[0].compiled
        if compiled.program.enabled is not enabled:
            compiled.enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate exactly these adapters of the model, and train what they have here unless `inference_mode`."""
        place_of(self)[0].activate(adapter_names, inference_mode, flags=False)
        _set_flags(self, adapter_names, not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the model, if it is still there."""
        root = place_of(self)[0]
        if adapter_name in root.program.plan.adapters:
            root.delete(adapter_name)


class BaseTunerLayer(OfModel):
    """A module that adapters are on. Made by compiling; `isinstance(module, BaseTunerLayer)` finds such modules.

    Example: [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AdapterError(
            f"{type(self).__name__} is what an adapted module is, and is not made alone: adapt the model that has the"
            " module in it (get_peft_model, or inject_adapter_in_model)"
        )

    @Computed
    def base_layer(self) -> nn.Module:
        """The module as it was: its class, its parameters, its own children."""
        return as_it_was(cast(nn.Module, self))

    @Computed
    def active_adapter(self) -> list[str]:
        """As `active_adapters`."""
        return list(program_of(self).active)

    @Computed
    def merged_adapters(self) -> list[str]:
        """The adapters that are merged here, or will be once all layers were told to."""
        root, fqn = place_of(self)
        return list(root.program.active if fqn in root.merging else root.program.merged)

    @Computed
    def merged(self) -> bool:
        """Whether any is merged."""
        return bool(cast(Any, self).merged_adapters)

    def get_base_layer(self) -> nn.Module:
        """The module as it was."""
        return as_it_was(cast(nn.Module, self))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters of the model train, or freeze them."""
        place_of(self)[0].compiled.set_requires_grad(adapter_names, requires_grad)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the active adapters here: that happens when all layers were told to, as diffusers does."""
        root, fqn = place_of(self)
        if not root.program.merged:
            root.merge_at(fqn, adapter_names)

    def unmerge(self) -> None:
        """Undo `merge`."""
        root, fqn = place_of(self)
        root.unmerge_at(fqn)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight, of its shape and in the adapter's dtype.

        Raises AdapterError if the method does not add to it.
        """
        part = _part(self, adapter)
        site = part.site
        if not isinstance(site, WeightSite) or not part.edit.rule.additive:
            raise AdapterError(f"{part.edit.site}: {part.edit.rule.name} does not add to the weight")
        like = next(iter(part.tensors().values()))
        weight = weight_of(cast(nn.Module, self), site)
        assert weight is not None, "an additive rule has one"
        zeros = torch.zeros(canonical(weight, site).shape, dtype=like.dtype, device=like.device)
        return canonical(part.edit.rule.weight(zeros, part.bound()), site)


def _keep_base(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Refuse to let the module as it was be exchanged alone: it is the adapted one itself."""
    if name == "base_layer" and isinstance(parent, BaseTunerLayer) and ROOT in parent.__dict__:
        raise AdapterError(
            "base_layer: is the adapted module itself, without its adapters. Exchange modules first, then adapt them; or"
            " change its weight"
        )


register_module_module_registration_hook(cast(Any, _keep_base))


def by_adapter(constant: str, doc: str, otherwise: Any = None) -> Computed:
    """An attribute with a constant of the edits at a module, by adapter; of those that lack it `otherwise`, if given."""

    def values(layer: Any) -> dict[str, Any]:
        found = {name: part.edit.constants.get(constant, otherwise) for name, part in parts_of(layer).items()}
        return {name: value for name, value in found.items() if value is not None}

    values.__doc__ = doc
    return Computed(values)


def place_of(module: Any) -> tuple[Any, str]:
    """The root of an adapted module, and its fqn. Raises AdapterError if a pickle has lost it."""
    found = module.__dict__.get(ROOT)
    if found is None or found[0] is None:
        raise AdapterError(
            f"{type(module).__name__}: adapters are on it, but what they belong to is not known: pickle the PeftModel, not"
            " a part of it"
        )
    return found


def program_of(layer: Any) -> Any:
    return place_of(layer)[0].program


def edits_of(layer: Any) -> dict[str, Edit]:
    """The plan's edits at a module, by adapter; of several weights of the module, those at the first."""
    root, fqn = place_of(layer)
    return {edit.adapter: edit for edit in reversed(root.edits.get(fqn, ()))}


def parts_of(layer: Any) -> dict[str, Part]:
    """The parts at a module, by adapter in load order."""
    adapters, edits = program_of(layer).adapters, edits_of(layer)
    return {name: adapters[name].part(edits[name]) for name in adapters if name in edits}


def _set_flags(layer: Any, names: str | Sequence[str], on: bool) -> None:
    """Let what these adapters have at a module train, or not; what others have does not."""
    program = program_of(layer)
    wanted = [names] if isinstance(names, str) else list(names)
    for name, part in parts_of(layer).items():
        for param in part.edit.params:
            if param.trainable:
                part.tensor(param.key).requires_grad_(on and name in wanted)
    learning = [name for name in program.learning if name in wanted] if not on else wanted
    program.learning = tuple(name for name in program.plan.adapters if name in learning and on)


def _part(layer: Any, adapter: str) -> Part:
    parts = parts_of(layer)
    if adapter not in parts:
        raise AdapterError(
            f"{place_of(layer)[1]}: no adapter {adapter!r} is on it; there are {', '.join(parts) or 'none'}"
        )
    return parts[adapter]
