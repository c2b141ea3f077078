"""PEFT's callbacks of transformers' Trainer."""

from typing import Any

from transformers.trainer_callback import TrainerCallback

__all__ = ["AdamssAsaCallback"]


class AdamssAsaCallback(TrainerCallback):
    """Calls `update_and_allocate` of the tuner model after every step of the optimiser."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """As the Trainer calls it."""
        tuner = getattr(model, "base_model", model)
        if tuner is not None and callable(getattr(tuner, "update_and_allocate", None)):
            tuner.update_and_allocate(state.global_step)
