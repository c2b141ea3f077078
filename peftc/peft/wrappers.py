"""PEFT's classes for modules of which adapters have copies, or rows of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftc.graph.sites import WeightSite, canonical
from peftc.peft.adapted import BaseTunerLayer, Computed, OfModel, parts_of, program_of
from peftc.rewrite.parts import Part
from peftc.rewrite.views import as_it_was

__all__ = ["AuxiliaryTrainingWrapper", "ModulesToSaveWrapper", "TrainableTokensLayer", "TrainableTokensWrapper"]


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
        return None if first is None else program_of(self).modules[first]

    def get_merged_weights(self, active_adapters: Sequence[str]) -> Tensor:
        """The weight with the rows of these adapters."""
        parts = _tokens(self)
        weight = cast(Tensor, cast(nn.Module, self)._parameters["weight"])
        for part in (parts[name] for name in active_adapters if name in parts):
            site = cast(WeightSite, part.site)
            weight = canonical(part.edit.rule.weight(canonical(weight, site), part.bound()), site)
        return weight


class AuxiliaryTrainingWrapper(OfModel):
    """A module of which adapters have trained copies."""

    @Computed
    def original_module(self) -> nn.Module:
        """The module as it was."""
        return as_it_was(cast(nn.Module, self))

    @Computed
    def active_adapter(self) -> str | None:
        """The active adapter whose copy is called."""
        saved = parts_of(self)
        return next((name for name in program_of(self).active if name in saved), None)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """Take an adapter off the model, if it is still there."""
        super().delete_adapter(adapter_name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """By the name of a tensor in files, its name here."""
        part = parts_of(self).get(adapter_name)
        return {} if part is None else {key: f"modules_to_save.{adapter_name}.{key}" for key in part.owners}


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


def _tokens(layer: Any) -> dict[str, Part]:
    """Of `_parts`, those with rows of tokens."""
    return {name: part for name, part in parts_of(layer).items() if "token_indices" in part.edit.constants}
