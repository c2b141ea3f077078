"""PEFT's layer classes by method: what an adapted module is an instance of, beside its own class."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from peftc.errors import AdapterError
from peftc.graph.sites import Site, WeightSite
from peftc.peft.adapted import BaseTunerLayer, Computed, by_adapter, edits_of, parts_of, program_of
from peftc.peft.methods import METHODS
from peftc.peft.wrappers import ModulesToSaveWrapper, TrainableTokensLayer, TrainableTokensWrapper
from peftc.plan import Edit
from peftc.registry import rules
from peftc.rewrite.build import start_alone
from peftc.rewrite.scale import set_scale_at

__all__ = [
    "AdaLoraLayer",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "IA3Layer",
    "Linear",
    "LoraLayer",
    "ParamWrapper",
    "SVDConv2d",
    "SVDLinear",
    "ShiraLayer",
    "VBLoRALayer",
]


class _Scaling(dict[str, float]):
    """Scalings by adapter, live."""

    def __init__(self, layer: Any) -> None:
        super().__init__(
            {name: float(cast(float, part.edit.constants["scaling"])) for name, part in parts_of(layer).items()}
        )
        self.layer = layer

    def take(self, values: Mapping[str, float]) -> None:
        """Let the scalings be these."""
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, adapter: str, value: float) -> None:
        super().__setitem__(adapter, value)
        set_scale_at(
            program_of(self.layer).adapters[adapter], edits_of(self.layer)[adapter], lambda planned, now: value
        )


# By what `reset_lora_parameters` is told, how factors start; `{}` is for one over the rank.
_ZEROS = {"lora_B": "zeros", "lora_B_bias": "zeros", "lora_embedding_A": "zeros", "lora_embedding_B": "normal"}
_STARTS: Mapping[str, Mapping[str, str]] = {
    "true": {"lora_A": "kaiming_uniform", **_ZEROS},
    "gaussian": {"lora_A": "normal:{}", **_ZEROS},
}


def _size(name: str, doc: str) -> Computed:
    """A size that modules have which are no linears (Conv1D, embeddings, convolutions): of their weight's first edit."""

    def size(layer: Any) -> int:
        part = next(iter(parts_of(layer).values()))
        return int(getattr(part.site, name))

    size.__doc__ = doc
    return Computed(size)


class _Sized(BaseTunerLayer):
    """A module whose weight maps `in_features` to `out_features`."""

    in_features = _size("in_features", "What it takes: of an embedding the number of rows, of a convolution channels.")
    out_features = _size("out_features", "What it gives.")


class LoraLayer(_Sized):
    """A module with LoRA on it: `lora_A`, `lora_B`, and by adapter `r`, `lora_alpha` and `scaling`."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    r = by_adapter("r", "The ranks by adapter.")
    lora_alpha = by_adapter("lora_alpha", "`lora_alpha` by adapter.")
    scaling = Computed(lambda layer: _Scaling(layer)).assigned(lambda layer, values: _Scaling(layer).take(values))
    lora_bias = by_adapter("biased", "Whether B has a bias, by adapter.", otherwise=False)

    @Computed
    def use_dora(self) -> dict[str, bool]:
        """Whether a magnitude is trained, by adapter."""
        return {name: bool(part.edit.constants.get("kernel") is not None) for name, part in parts_of(self).items()}

    @Computed
    def use_rslora(self) -> dict[str, bool]:
        """Whether the scaling goes by the root of the rank, by adapter."""
        specs = program_of(self).plan.adapters
        return {name: bool(getattr(specs[name], "use_rslora", False)) for name in parts_of(self)}

    @Computed
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored (in, out)."""
        sites = [part.site for part in parts_of(self).values()]
        return any(isinstance(site, WeightSite) and site.op == "linear" and site.layout == "in_out" for site in sites)

    @Computed
    def lora_dropout(self) -> nn.ModuleDict:
        """Dropouts by adapter; identities where nothing is dropped."""
        return nn.ModuleDict({name: nn.Identity() for name in parts_of(self)})

    # Nothing, where adapters have none of that name.
    lora_A = Computed(lambda layer: nn.ModuleDict())
    lora_B = Computed(lambda layer: nn.ModuleDict())
    lora_embedding_A = Computed(lambda layer: nn.ParameterDict())
    lora_embedding_B = Computed(lambda layer: nn.ParameterDict())

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let the scaling here be `scale` times what the adapter's spec says."""
        edits = edits_of(self)
        if adapter in edits:
            set_scale_at(program_of(self).adapters[adapter], edits[adapter], lambda planned, now: planned * scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scalings of active adapters here."""
        for edit in self._active_here():
            set_scale_at(program_of(self).adapters[edit.adapter], edit, lambda planned, now: now * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scalings of active adapters here; without `scale`, they are what their specs say again."""
        for edit in self._active_here():
            set_scale_at(
                program_of(self).adapters[edit.adapter],
                edit,
                lambda planned, now: planned if scale is None else now / scale,
            )

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Let an adapter's factors here start again, as `init_lora_weights` says: true or `gaussian`; false: as they are.

        Raises AdapterError (a ValueError) on another start.
        """
        edits = edits_of(self)
        if init_lora_weights is False or adapter_name not in edits:
            return
        starts = _STARTS.get(str(init_lora_weights).lower())
        if starts is None:
            raise AdapterError(
                f"reset_lora_parameters: init_lora_weights={init_lora_weights!r}; give True or 'gaussian'"
            )
        edit = edits[adapter_name]
        inits = {**starts, "lora_A": starts["lora_A"].format(1 / cast(int, edit.constants["r"]))}
        params = [replace(param, init=inits[param.name]) for param in edit.params if param.name in inits]
        start_alone(program_of(self), edit, params)

    def _active_here(self) -> list[Edit]:
        edits = edits_of(self)
        return [edits[name] for name in program_of(self).active if name in edits]


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

    r = by_adapter("r", "The ranks by adapter.")
    alpha = by_adapter("alpha", "Alpha by adapter.")
    scaling = by_adapter("scaling", "The scalings by adapter.")


class AdaLoraLayer(LoraLayer):
    """A module with AdaLoRA: A, E and B by adapter."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")

    ranknum = by_adapter("r", "The rank that the scaling goes by, by adapter: that of the start.")


class SVDLinear(AdaLoraLayer):
    """A linear with AdaLoRA."""


class SVDConv2d(AdaLoraLayer):
    """A 2d convolution with AdaLoRA."""


class FourierFTLayer(_MethodLayer):
    """A module with FourierFT: the spectrum by adapter."""

    adapter_layer_names = ("fourierft_spectrum",)
    other_param_names = ("fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed", "indices")

    fourierft_n_frequency = by_adapter("n_frequency", "How many coefficients are trained, by adapter.")
    fourierft_scaling = by_adapter("scaling", "The scaling by adapter.")
    fourierft_random_loc_seed = by_adapter("random_loc_seed", "The seed of their places, by adapter.")


class VBLoRALayer(_MethodLayer):
    """A module with VB-LoRA: its logits by adapter."""

    adapter_layer_names = ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")
    other_param_names = ("r", "topk", "vblora_dropout")

    topk = by_adapter("topk", "How many vectors are mixed, by adapter.")


class ShiraLayer(_MethodLayer):
    """A module with SHiRA: the values of its entries by adapter."""

    adapter_layer_names = ("shira_weight",)
    other_param_names = ("r", "scaling", "shira_indices")

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let the scaling here be `scale`, if the adapter is here."""
        edits = edits_of(self)
        if adapter in edits:
            set_scale_at(program_of(self).adapters[adapter], edits[adapter], lambda planned, now: scale)


class IA3Layer(_Sized):
    """A module with (IA)³: `ia3_l` by adapter."""

    adapter_layer_names = ("ia3_l",)

    @Computed
    def is_feedforward(self) -> bool:
        """Whether its input is scaled, not its output."""
        return any(bool(part.edit.constants["feedforward"]) for part in parts_of(self).values())

    @Computed
    def scaling(self) -> dict[str, float]:
        """Nothing to scale with."""
        return {}


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
