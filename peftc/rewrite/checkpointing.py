"""Reentrant gradient checkpointing: it passes a gradient on only if an input of a layer has one."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.graph.sites import transformers_config

# The attribute of transformers' layers that runs them under gradient checkpointing.
CHECKPOINT = "_gradient_checkpointing_func"


class _WithGradient(partial[Any]):
    """A reentrant checkpointing function that lets the first input of a layer that trains require a gradient."""

    def __call__(self, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, as the function does."""
        tensors = [value for value in args if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and _trains(run) and not any(tensor.requires_grad for tensor in tensors):
            first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
            if first is not None:
                args = tuple(first.detach().requires_grad_() if value is first else value for value in args)
        return super().__call__(run, *args, **kwargs)


def _trains(run: Any) -> bool:
    """Whether the layer that `run` calls has parameters that train."""
    layer = run.args[0] if isinstance(run, partial) and run.args else getattr(run, "__self__", None)
    return not isinstance(layer, nn.Module) or any(parameter.requires_grad for parameter in layer.parameters())


# Architectures whose layers run in an autograd function of their own, which passes a gradient on to an input that has one.
_REVERSIBLE = ("reformer",)


def let_gradients_through(model: nn.Module, on: bool = True) -> None:
    """Let reentrant checkpointing work in a model whose layers get inputs without gradients; `on=False` undoes it."""
    config = transformers_config(model)
    if config is not None and config.model_type in _REVERSIBLE:
        base: Any = model
        (base.enable_input_require_grads if on else base.disable_input_require_grads)()
    for module in model.modules():
        function = module.__dict__.get(CHECKPOINT)
        if isinstance(function, partial) and function.keywords.get("use_reentrant", False):
            kind = cast(Any, _WithGradient if on else partial)
            module.__dict__[CHECKPOINT] = kind(function.func, *function.args, **function.keywords)
