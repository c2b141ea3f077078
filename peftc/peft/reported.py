"""What a PeftModel says of itself: what is active, merged and learning, how much trains, and what it is made of."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftc.compiled_graph import trainable, trainable_line
from peftc.peft.rooted import Rooted, root_in
from peftc.peft.tuner import BaseTuner
from peftc.status import LayerStatus, ModelStatus

__all__ = ["get_layer_status", "get_model_status"]

# What PEFT's models take whatever the method is.
TASKS = "task_ids"


class Reported(Rooted):
    """A module around a base, as PEFT's models describe themselves."""

    base_model: Any

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or the list of several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def peft_type(self) -> Any:
        """The method of the first adapter."""
        return next(iter(self.peft_config.values())).peft_type

    @property
    def active_peft_config(self) -> Any:
        """The config of the first active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter has an effect now."""
        return self.root.program.enabled and bool(self.root.program.active)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The last parts of the names of modules that adapters save whole."""
        saved = {edit.site.rpartition(".")[2] for edit in self.root.program.plan.edits if edit.whole}
        return saved or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype of the base."""
        return getattr(self._base(), "dtype", None)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, adapters included."""
        return trainable(self)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers and their ratio."""
        print(trainable_line(self))  # noqa: T201 (what it is for)

    def get_layer_status(self) -> list[LayerStatus]:
        """What is active, merged and learning at every adapted module, by its name in the tuner model."""
        above = "model." if isinstance(self.base_model, BaseTuner) else ""
        return [replace(one, name=f"{above}{one.name}") for one in self.root.compiled.get_layer_status()]

    def get_model_status(self) -> ModelStatus:
        """What is active, merged and learning in the whole model."""
        return replace(self.root.compiled.get_model_status(), adapter_model_type=type(self.base_model).__name__)

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """The numbers of the virtual tokens of prompt adapters, by adapter."""
        rows = {name: getattr(spec, "rows", None) for name, spec in self.root.program.plan.adapters.items()}
        return {name: torch.arange(count) for name, count in rows.items() if count is not None}

    @property
    def word_embeddings(self) -> nn.Module:
        """The input embeddings of the base."""
        base: Any = self._base()
        return base.get_input_embeddings()

    @property
    def transformer_backbone_name(self) -> str | None:
        """The name of the base's backbone, if it is a child of it."""
        base = self._base()
        name = getattr(base, "base_model_prefix", "")
        return name if name in base._modules else None

    @property
    def cls_layer_name(self) -> str:
        """The name of the head that the active adapter trains. Raises AttributeError if it trains none."""
        active = self.active_adapters
        heads = [edit.site for edit in self.root.program.plan.edits if edit.whole and edit.adapter in active]
        if not heads:
            raise AttributeError("cls_layer_name: no active adapter trains a head")
        return heads[0].rpartition(".")[2]

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Tensor:
        """The rows of the active prompt adapter for every sequence. Raises AdapterError if there is none."""
        return self.root.compiled.get_prompt(batch_size, **({} if task_ids is None else {TASKS: task_ids}))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The rows of a prompt adapter as saved. Raises AdapterError if it is none."""
        return self.root.compiled.get_prompt_embedding_to_save(adapter_name)


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """What is active, merged and learning at every adapted module of a model. Raises AdapterError if it has none."""
    return model.get_layer_status() if isinstance(model, Reported) else root_in(model).compiled.get_layer_status()


def get_model_status(model: nn.Module) -> ModelStatus:
    """What is active, merged and learning in a model. Raises AdapterError if it has no adapters."""
    return model.get_model_status() if isinstance(model, Reported) else root_in(model).compiled.get_model_status()
