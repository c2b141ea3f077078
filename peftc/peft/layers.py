"""PEFT's layer classes: what an adapted module is an instance of, beside its own class.

Their attributes are computed from the compiled model. What is set or called on one layer counts for the whole model,
but for scales, which every layer has its own of.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from peftc.errors import AdapterError
from peftc.graph.sites import Site, WeightSite, canonical
from peftc.peft.methods import METHODS
from peftc.plan import Edit
from peftc.registry import rules
from peftc.rewrite.parts import Part, weight_of
from peftc.rewrite.scale import set_scale_at
from peftc.rewrite.views import as_it_was

__all__ = [
    "AdaLoraLayer",
    "AuxiliaryTrainingWrapper",
    "BaseTunerLayer",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "IA3Layer",
    "Linear",
    "LoraLayer",
    "ModulesToSaveWrapper",
    "ParamWrapper",
    "SVDConv2d",
    "SVDLinear",
    "ShiraLayer",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
    "VBLoRALayer",
]


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


class _OfModel:
    """What a module that adapters are on, or have copies of, knows and does of the whole model."""

    @Computed
    def active_adapters(self) -> list[str]:
        """The active adapters of the model, in load order."""
        return list(_program(self).active)

    @Computed
    def disable_adapters(self) -> bool:
        """Whether adapters are off."""
        return not _program(self).enabled

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


class BaseTunerLayer(_OfModel):
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
        return list(_program(self).active)

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


def _by_adapter(constant: str, doc: str, otherwise: Any = None) -> Computed:
    """An attribute with a constant of the edits at a module, by adapter; of those that lack it `otherwise`, if given."""

    def values(layer: Any) -> dict[str, Any]:
        found = {name: part.edit.constants.get(constant, otherwise) for name, part in _parts(layer).items()}
        return {name: value for name, value in found.items() if value is not None}

    values.__doc__ = doc
    return Computed(values)


class LoraLayer(BaseTunerLayer):
    """A module with LoRA on it: `lora_A`, `lora_B`, and by adapter `r`, `lora_alpha` and `scaling`."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    r = _by_adapter("r", "The ranks by adapter.")
    lora_alpha = _by_adapter("lora_alpha", "`lora_alpha` by adapter.")
    scaling = Computed(lambda layer: _Scaling(layer)).assigned(lambda layer, values: _Scaling(layer).take(values))
    lora_bias = _by_adapter("biased", "Whether B has a bias, by adapter.", otherwise=False)

    @Computed
    def use_dora(self) -> dict[str, bool]:
        """Whether a magnitude is trained, by adapter."""
        return {name: bool(part.edit.constants.get("kernel") is not None) for name, part in _parts(self).items()}

    @Computed
    def use_rslora(self) -> dict[str, bool]:
        """Whether the scaling goes by the root of the rank, by adapter."""
        specs = _program(self).plan.adapters
        return {name: bool(getattr(specs[name], "use_rslora", False)) for name in _parts(self)}

    @Computed
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored (in, out)."""
        sites = [part.site for part in _parts(self).values()]
        return any(isinstance(site, WeightSite) and site.op == "linear" and site.layout == "in_out" for site in sites)

    @Computed
    def lora_dropout(self) -> nn.ModuleDict:
        """Dropouts by adapter; identities where nothing is dropped."""
        return nn.ModuleDict({name: nn.Identity() for name in _parts(self)})

    # Nothing, where adapters have none of that name.
    lora_A = Computed(lambda layer: nn.ModuleDict())
    lora_B = Computed(lambda layer: nn.ModuleDict())
    lora_embedding_A = Computed(lambda layer: nn.ParameterDict())
    lora_embedding_B = Computed(lambda layer: nn.ParameterDict())

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let the scaling here be `scale` times what the adapter's spec says."""
        edits = _edits(self)
        if adapter in edits:
            set_scale_at(_program(self), edits[adapter], lambda planned, now: planned * scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scalings of active adapters here."""
        for edit in self._active_here():
            set_scale_at(_program(self), edit, lambda planned, now: now * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scalings of active adapters here; without `scale`, they are what their specs say again."""
        for edit in self._active_here():
            set_scale_at(_program(self), edit, lambda planned, now: planned if scale is None else now / scale)

    def _active_here(self) -> list[Edit]:
        edits = _edits(self)
        return [edits[name] for name in _program(self).active if name in edits]


class Linear(LoraLayer):
    """A linear with LoRA."""


class Embedding(LoraLayer):
    """An embedding with LoRA."""


class Conv1d(LoraLayer):
    """A 1d convolution with LoRA."""


class Conv2d(LoraLayer):
    """A 2d convolution with LoRA."""


class Conv3d(LoraLayer):
    """A 3d convolution with LoRA."""


class ParamWrapper(LoraLayer):
    """A module with LoRA on parameters of its own (experts)."""


class _MethodLayer(BaseTunerLayer):
    """A module with an adapter of a method that has no class of its own here: by adapter, its numbers."""

    r = _by_adapter("r", "The ranks by adapter.")
    alpha = _by_adapter("alpha", "Alpha by adapter.")
    scaling = _by_adapter("scaling", "The scalings by adapter.")


class AdaLoraLayer(LoraLayer):
    """A module with AdaLoRA: A, E and B by adapter."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")

    ranknum = _by_adapter("r", "The rank that the scaling goes by, by adapter: that of the start.")


class SVDLinear(AdaLoraLayer):
    """A linear with AdaLoRA."""


class SVDConv2d(AdaLoraLayer):
    """A 2d convolution with AdaLoRA."""


class FourierFTLayer(_MethodLayer):
    """A module with FourierFT: the spectrum by adapter."""

    adapter_layer_names = ("fourierft_spectrum",)
    other_param_names = ("fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed", "indices")

    fourierft_n_frequency = _by_adapter("n_frequency", "How many coefficients are trained, by adapter.")
    fourierft_scaling = _by_adapter("scaling", "The scaling by adapter.")
    fourierft_random_loc_seed = _by_adapter("random_loc_seed", "The seed of their places, by adapter.")


class VBLoRALayer(_MethodLayer):
    """A module with VB-LoRA: its logits by adapter."""

    adapter_layer_names = ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")
    other_param_names = ("r", "topk", "vblora_dropout")

    topk = _by_adapter("topk", "How many vectors are mixed, by adapter.")


class ShiraLayer(_MethodLayer):
    """A module with SHiRA: the values of its entries by adapter."""

    adapter_layer_names = ("shira_weight",)
    other_param_names = ("r", "scaling", "shira_indices")

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let the scaling here be `scale`, if the adapter is here."""
        edits = _edits(self)
        if adapter in edits:
            set_scale_at(_program(self), edits[adapter], lambda planned, now: scale)


class TrainableTokensLayer(BaseTunerLayer):
    """A module of which rows are trained: `trainable_tokens_delta` and `token_indices` by adapter."""

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original")

    @Computed
    def token_indices(self) -> dict[str, list[int]]:
        """The tokens by adapter."""
        return {name: list(cast(Any, part.edit.constants["token_indices"])) for name, part in _tokens(self).items()}

    @Computed
    def trainable_tokens_original(self) -> dict[str, Tensor]:
        """The base's rows of them by adapter."""
        weight = cast(Tensor, cast(nn.Module, self)._parameters["weight"]).detach()
        return {name: weight[tokens] for name, tokens in cast(Any, self).token_indices.items()}

    @Computed
    def trainable_tokens_delta(self) -> Mapping[str, Tensor]:
        """The rows by adapter, where they are those of a module that this one is tied to."""
        return {name: part.tensors()["rows"] for name, part in _tokens(self).items()}

    @Computed
    def tied_adapter(self) -> Any:
        """The module that has the rows, if another one does that this is tied to."""
        first = next((part.edit.follows for part in _tokens(self).values()), None)
        return None if first is None else _program(self).modules[first]

    def get_merged_weights(self, active_adapters: Sequence[str]) -> Tensor:
        """The weight with the rows of these adapters."""
        parts = _tokens(self)
        weight = cast(Tensor, cast(nn.Module, self)._parameters["weight"])
        for part in (parts[name] for name in active_adapters if name in parts):
            site = cast(WeightSite, part.site)
            weight = canonical(part.edit.rule.weight(canonical(weight, site), part.bound()), site)
        return weight


class IA3Layer(BaseTunerLayer):
    """A module with (IA)³: `ia3_l` by adapter."""

    adapter_layer_names = ("ia3_l",)

    @Computed
    def scaling(self) -> dict[str, float]:
        """Nothing to scale with."""
        return {}


class AuxiliaryTrainingWrapper(_OfModel):
    """A module of which adapters have trained copies."""

    @Computed
    def original_module(self) -> nn.Module:
        """The module as it was."""
        return as_it_was(cast(nn.Module, self))

    @Computed
    def active_adapter(self) -> str | None:
        """The active adapter whose copy is called."""
        saved = _parts(self)
        return next((name for name in _program(self).active if name in saved), None)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """Take an adapter off the model, if it is still there."""
        super().delete_adapter(adapter_name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """By the name of a tensor in files, its name here."""
        part = _parts(self).get(adapter_name)
        return {} if part is None else {key: f"modules_to_save.{adapter_name}.{key}" for key in part.owners}


def _keep_base(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Refuse to let the module as it was be exchanged alone: it is the adapted one itself."""
    if name == "base_layer" and isinstance(parent, BaseTunerLayer) and ROOT in parent.__dict__:
        raise AdapterError(
            "base_layer: is the adapted module itself, without its adapters. Exchange modules first, then adapt them; or"
            " change its weight"
        )


register_module_module_registration_hook(cast(Any, _keep_base))


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module that adapters save whole: `modules_to_save` has the copies by adapter."""


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """An embedding of which adapters of another method train some rows."""

    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    other_param_names = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    @Computed
    def token_adapter(self) -> "_TokenAdapter":
        """What has the rows."""
        return _TokenAdapter(cast(nn.Module, self))

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """By the name of a tensor in files, its name here."""
        part = _tokens(self).get(adapter_name)
        there = part is not None and part.edit.follows is None
        return {"token_adapter.trainable_tokens_delta": f"trainable_tokens_delta.{adapter_name}"} if there else {}


class _TokenAdapter:
    """The rows of a wrapped module, as a TrainableTokensLayer has them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        own = vars(TrainableTokensLayer).get(name)
        if isinstance(own, Computed):
            return own.__get__(self.module)
        return own.__get__(self.module) if callable(own) else getattr(self.module, name)


class _Scaling(dict[str, float]):
    """Scalings by adapter, live."""

    def __init__(self, layer: Any) -> None:
        super().__init__(
            {name: float(cast(float, part.edit.constants["scaling"])) for name, part in _parts(layer).items()}
        )
        self.layer = layer

    def take(self, values: Mapping[str, float]) -> None:
        """Let the scalings be these."""
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, adapter: str, value: float) -> None:
        super().__setitem__(adapter, value)
        set_scale_at(_program(self.layer), _edits(self.layer)[adapter], lambda planned, now: value)


# By rule and op, what an adapted module is called in PEFT.
_CLASSES: Mapping[tuple[str, str], type[Any]] = {
    ("lora", "linear"): Linear,
    ("lora", "embedding"): Embedding,
    ("lora", "conv1d"): Conv1d,
    ("lora", "conv2d"): Conv2d,
    ("lora", "conv3d"): Conv3d,
    ("lora", "parameter"): ParamWrapper,
    ("adalora", "linear"): SVDLinear,
    ("adalora", "conv2d"): SVDConv2d,
}
_BY_RULE: dict[str, type[Any]] = {
    "lora": LoraLayer,
    "ia3": IA3Layer,
    "adalora": AdaLoraLayer,
    "fourierft": FourierFTLayer,
    "vblora": VBLoRALayer,
    "shira": ShiraLayer,
    "trainable_tokens": TrainableTokensLayer,
}


def _make_classes() -> None:
    """A class for every method of the table that has none above, under PEFT's name."""
    keys = {rule.name: rule.keys for rule in rules()}
    for module, _, name, _ in METHODS.values():
        if module in keys and module not in _BY_RULE:
            names = {"adapter_layer_names": keys[module], "__module__": __name__, "__doc__": f"A module with {module}."}
            _BY_RULE[module] = globals()[name] = type(name, (_MethodLayer,), names)


_make_classes()


def classes_at(edits: Iterable[Edit], sites: Mapping[str, Site]) -> tuple[type[Any], ...]:
    """What a module with these edits is an instance of; a class is left out that a later one is a subclass of."""
    found: list[type[Any]] = []
    for edit in edits:
        if edit.whole:
            cls: type[Any] = ModulesToSaveWrapper
        elif sites[edit.site].op == "call":
            continue  # The model's own call, which virtual tokens change.
        else:
            general = _BY_RULE.get(edit.rule.name, BaseTunerLayer)
            cls = _CLASSES.get((edit.rule.name, sites[edit.site].op), general)
            cls = TrainableTokensWrapper if cls is TrainableTokensLayer and edit.saved_as is not None else cls
        if cls not in found:
            found.append(cls)
    return tuple(sorted(found, key=lambda cls: -len(cls.__mro__)))


def place_of(module: Any) -> tuple[Any, str]:
    """The root of an adapted module, and its fqn. Raises AdapterError if a pickle has lost it."""
    found = module.__dict__.get(ROOT)
    if found is None or found[0] is None:
        raise AdapterError(
            f"{type(module).__name__}: adapters are on it, but what they belong to is not known: pickle the PeftModel, not"
            " a part of it"
        )
    return found


def _program(layer: Any) -> Any:
    return place_of(layer)[0].program


def _edits(layer: Any) -> dict[str, Edit]:
    """The plan's edits at a module, by adapter; of several weights of the module, those at the first."""
    root, fqn = place_of(layer)
    return {edit.adapter: edit for edit in reversed(root.edits.get(fqn, ()))}


def _parts(layer: Any) -> dict[str, Part]:
    """The parts at a module, by adapter in load order."""
    adapters, edits = _program(layer).adapters, _edits(layer)
    return {name: adapters[name].part(edits[name]) for name in adapters if name in edits}


def _set_flags(layer: Any, names: str | Sequence[str], on: bool) -> None:
    """Let what these adapters have at a module train, or not; what others have does not."""
    program = _program(layer)
    wanted = [names] if isinstance(names, str) else list(names)
    for name, part in _parts(layer).items():
        for param in part.edit.params:
            if param.trainable:
                part.tensor(param.key).requires_grad_(on and name in wanted)
    learning = [name for name in program.learning if name in wanted] if not on else wanted
    program.learning = tuple(name for name in program.plan.adapters if name in learning and on)


def _tokens(layer: Any) -> dict[str, Part]:
    """Of `_parts`, those with rows of tokens."""
    return {name: part for name, part in _parts(layer).items() if "token_indices" in part.edit.constants}


def _part(layer: Any, adapter: str) -> Part:
    parts = _parts(layer)
    if adapter not in parts:
        raise AdapterError(
            f"{place_of(layer)[1]}: no adapter {adapter!r} is on it; there are {', '.join(parts) or 'none'}"
        )
    return parts[adapter]
