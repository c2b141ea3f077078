"""The model's call, while it lasts, for rules that ask about it; also where layers run again in the backward pass."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftc.rewrite.acting import Call, current, remember
from peftc.rewrite.checkpointing import CHECKPOINT
from peftc.rewrite.program import Program


@contextmanager
def calling(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Iterable[str] | None = None
) -> Generator[Callable[[Any], None]]:
    """Let adapters see the call of the model with these arguments, if one of them asks; give what is to be told its result.

    `names`: the adapters of its rows, if they are named.
    """
    own = program.spliced if names is None else {name for name in names if name in program.adapters}
    if not any(program.adapters[name].asks for name in own):
        yield _ignore
        return
    given = [kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]]
    ids = next((value for value in given if isinstance(value, Tensor) and not value.is_floating_point()), None)
    call = Call(ids if ids is None or ids.dim() > 1 else ids[None], kwargs.get("past_key_values"))
    token = current.set(call)
    handle = program.base.register_forward_pre_hook(_step, with_kwargs=True)
    carried = _carry(program.base) if torch.is_grad_enabled() else []
    try:
        yield partial(remember, call)
    finally:
        for layer in carried:
            layer.__dict__[CHECKPOINT] = layer.__dict__[CHECKPOINT].function
        handle.remove()
        current.reset(token)


def _step(base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Note how many rows and tokens the model's own call has."""
    call = current.get(None)
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    first = next((value for value in given if isinstance(value, Tensor) and value.dim() > 1), None)
    if call is not None and first is not None:
        call.step = (first.shape[0], first.shape[1])


def _ignore(output: Any) -> None:
    pass


class _Carried:
    """A checkpointing function that takes the call along to the backward pass, where layers run again."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = current.get(None)
        return self.function(run if call is None else partial(_within, call, run), *args, **kwargs)


def _within(call: Call, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token = current.set(call)
    try:
        return run(*args, **kwargs)
    finally:
        current.reset(token)


def _carry(base: nn.Module) -> list[nn.Module]:
    layers = [layer for layer in base.modules() if CHECKPOINT in layer.__dict__]
    for layer in layers:
        layer.__dict__[CHECKPOINT] = _Carried(layer.__dict__[CHECKPOINT])
    return layers
