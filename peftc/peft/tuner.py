"""PEFT's tuner models: what stands between a PeftModel and its base, and can be made alone."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import peftc.peft.layers as layers
from peftc.checkpoint.state import saved_state_dict, spec_filed
from peftc.errors import AdapterError
from peftc.lifecycle import named
from peftc.peft.adapted import BaseTunerLayer
from peftc.peft.configs import PeftConfig, spec_of
from peftc.peft.methods import METHODS
from peftc.peft.rooted import Rooted, call, unloaded
from peftc.peft.roots import Root, attach, require_root
from peftc.peft.types import PeftType
from peftc.registry import is_own
from peftc.rewrite.learning import after_step, penalty, with_penalty

__all__ = ["BaseTuner", "MixedModel", "cast_adapter_dtype"]


class BaseTuner(Rooted):
    """A model with adapters, attached in place; `model` is the base with its names and class.

    `peft_config`: a config, or configs by adapter name. Attributes that are not found here are those of the base.
    Raises SpecError, NoMatchError, ConflictError; the model is as it was then.

    Example: lora_model = LoraModel(model, LoraConfig(target_modules=["q_proj"]), "default")
    """

    prefix: ClassVar[str] = ""
    tuner_layer_cls: ClassVar[type[Any]] = BaseTunerLayer
    _inner, _before = "model", "model."

    def __init__(
        self,
        model: Any,
        peft_config: Any,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        autocast_adapter_dtype: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(peft_config, nn.Module):  # The order of older documentation.
            model, peft_config = peft_config, model
        configs: Mapping[str, Any] = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        root = attach(model, configs, autocast=autocast_adapter_dtype)
        root.activate(adapter_name, inference_mode=bool(getattr(root.configs[adapter_name], "inference_mode", False)))
        self.model = root.program.base

    @classmethod
    def around(cls, root: Root) -> "BaseTuner":
        """One around a model that has its adapters already."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.model = root.program.base
        return new

    def _base(self) -> nn.Module:
        return self.model

    @property
    def targeted_module_names(self) -> list[str]:
        """The modules that are adapted, in module order."""
        program = self.root.program
        specs = program.plan.adapters
        own = (edit for edit in program.plan.edits if is_own(specs[edit.adapter], edit.rule) and not edit.follows)
        sites = [program.plan.sites[edit.site] for edit in own]
        return list(dict.fromkeys(site.owner if getattr(site, "host", None) is None else site.fqn for site in sites))

    @property
    def active_adapter(self) -> list[str]:
        """As `active_adapters`."""
        return self.active_adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call. `adapter_names`: the adapter of every row of the batch, `__base__` for none."""
        return call(self.model, args, kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Attach the adapter that `peft_config[adapter_name]` describes, inactive. Raises AdapterError if there is none."""
        root = self.root
        if adapter_name not in root.configs:
            raise AdapterError(
                f"inject_adapter: peft_config has no {adapter_name!r}; put its config there first, or use add_adapter"
            )
        if adapter_name not in root.program.plan.adapters:
            attach(root.program.base, {adapter_name: root.configs[adapter_name]}, autocast=autocast_adapter_dtype)

    def enable_adapter_layers(self) -> None:
        """Turn the adapters on again."""
        self.root.compiled.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Turn the adapters off."""
        self.root.compiled.enable_adapters(False)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (default: the active ones) into the weights; those merged already are left."""
        self.root.merge(adapter_names)

    def unmerge_adapter(self) -> None:
        """Put the weights back, bit for bit, if any adapter is merged."""
        self.root.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Fold adapters (default: the active ones) and return the plain model; once more returns it again."""

        def merged(root: Root) -> nn.Module:
            root.merge(adapter_names, progressbar)
            return root.compiled.merge_and_unload(untie=True)

        return unloaded(self.model, merged)

    def unload(self) -> nn.Module:
        """Take all adapters off and return the model as it was given."""
        return unloaded(self.model, lambda root: root.compiled.unload())

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "", **how: Any
    ) -> None:
        """Attach an adapter that combines others; see `CompiledModel.add_weighted_adapter`."""
        root = self.root
        root.unmerge()
        root.compiled.add_weighted_adapter(adapters, weights, adapter_name, combination_type, **how)
        root.learn(adapter_name)

    def get_model_config(self, model: Any) -> dict[str, Any]:
        """The config of a model as a dict."""
        config = getattr(model, "config", None)
        return config.to_dict() if config is not None else {"model_type": "custom"}


class _Steps(BaseTuner):
    """A model with a method that acts after every step."""

    def update_and_allocate(self, global_step: int) -> None:
        """Weigh what was learned and take out what is over the budget of this step: after `optimizer.step()` and before
        `zero_grad()`, with the number of the step.
        """
        root = self.root
        for name in root.program.learning:
            after_step(root.program.adapters[name], spec_of(root.configs[name]), global_step)


class _Allots(_Steps):
    """A model with AdaLoRA. In train(), the loss that it returns has the penalty of orthogonality in it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call."""
        output = super().forward(*args, **kwargs)
        return with_penalty(self.root.program, output) if self.training else output

    def update_and_allocate(self, global_step: int) -> None:
        """The same, and the configs say which ranks are left."""
        super().update_and_allocate(global_step)
        for name in self.root.program.learning:
            self.root.configs[name].rank_pattern = cast(Any, spec_filed(self.root.program, name)).rank_pattern

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: ranks that were allotted apart have no common sum."""
        raise AdapterError("AdaLoraModel: its adapters have no weighted sum; merge them one after the other instead")


class _Savable(BaseTuner):
    """A model with VB-LoRA."""

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """How many numbers of float32 the adapter's file has room for, and how many other parameters train."""
        root = self.root
        state = saved_state_dict(root.program, adapter)
        own = sum(value.numel() * min(value.itemsize, 4) for key, value in state.items() if "vblora_" in key)
        others = sum(p.numel() for n, p in self.named_parameters() if p.requires_grad and "vblora_" not in n)
        return own // 4, others

    def print_savable_parameters(self) -> None:
        """Print these numbers."""
        own, others = self.get_nb_savable_parameters()
        print(  # noqa: T201 (what it is for)
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}"
        )


class _Regularised(BaseTuner):
    """A model with LoRA, some forms of which have a penalty, which scripts add to the loss themselves."""

    def _get_kasa_loss(self, adapter_names: str | list[str] | None = None) -> Any:
        """What the active adapters add to the loss, or 0.0. Raises AdapterError if others are named."""
        program = self.root.program
        wanted = list(program.spliced if adapter_names is None else named(adapter_names))
        if set(wanted) != set(program.spliced):
            raise AdapterError(
                f"_get_kasa_loss: of the active adapters only, {list(program.spliced)}; set_adapter first"
            )
        found = penalty(program)
        return 0.0 if found is None else found


class MixedModel(BaseTuner):
    """A model with adapters of several methods."""


_CLASSES: dict[Any, type[BaseTuner]] = {}
# What some have beside the rest.
_WRITTEN: Mapping[Any, type[BaseTuner]] = {
    PeftType.ADALORA: _Allots,
    PeftType.ADAMSS: _Steps,
    PeftType.VBLORA: _Savable,
    PeftType.LORA: _Regularised,
}


def _make_classes() -> None:
    """A class for every method of the table, under PEFT's name."""
    for name, method in METHODS.items():
        layer = getattr(layers, method.layer, None)
        if layer is not None:
            own = {"prefix": method.prefix, "tuner_layer_cls": layer, "__module__": __name__}
            own["__doc__"] = f"A model with {method.module}."
            bases: tuple[type[Any], ...] = (_WRITTEN.get(name, BaseTuner),)
            if issubclass(layer, layers.LoraLayer) and name != PeftType.LORA:
                bases += (_CLASSES[PeftType.LORA],)
            _CLASSES[name] = globals()[method.model] = type(method.model, bases, own)


_make_classes()


def tuner_class(config: Any) -> type[BaseTuner]:
    """The class for a config; that of methods without one in PEFT's names is BaseTuner."""
    if isinstance(config, PeftConfig) and config.is_prompt_learning:
        raise AdapterError(f"{type(config).__name__}: virtual tokens have no tuner model; use get_peft_model")
    return tuner_class_of(config.peft_type)


def tuner_class_of(method: Any) -> type[BaseTuner]:
    """The class for a `peft_type`."""
    return _CLASSES.get(method, BaseTuner)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Let the adapter's half-precision parameters be float32. Raises AdapterError if there is no such adapter."""
    root = require_root(model)
    if adapter_name not in root.program.adapters:
        raise AdapterError(f"no adapter {adapter_name!r}; there are {', '.join(root.configs)}")
    if autocast_adapter_dtype:
        for parameters, leaf in root.program.adapters[adapter_name].trained:
            if parameters[leaf].dtype in (torch.float16, torch.bfloat16):
                parameters[leaf].data = parameters[leaf].data.float()
