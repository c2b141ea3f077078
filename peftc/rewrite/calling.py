"""The model's call, while it lasts, for rules that ask about it; also where layers run again in the backward pass."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.graph.region import parameters_of
from peftc.rewrite.acting import Call, current, remember
from peftc.rewrite.checkpointing import CHECKPOINT
from peftc.rewrite.parts import Adapter
from peftc.rewrite.program import Program


@contextmanager
def calling(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str] | None
) -> Generator[Callable[[Any], None]]:
    """Let adapters see the call of the model with these arguments, if one of them asks; give what is to be told its result.

    `names`: the adapters of its rows, if they are named. What is not the model's is taken out of `kwargs`. Raises
    AdapterError if an argument is missing or wrong that an adapter asks for.
    """
    if not program.asking:
        yield _ignore
        return
    taken = _taken(program, kwargs)
    own = program.spliced if names is None else [name for name in dict.fromkeys(names) if name in program.adapters]
    if not any(name in program.asking for name in own):
        yield _ignore
        return
    given = [kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]]
    ids = next((value for value in given if isinstance(value, Tensor) and not value.is_floating_point()), None)
    call = Call(ids if ids is None or ids.dim() > 1 else ids[None], kwargs.get("past_key_values"))
    call.arguments = _numbers([program.adapters[name] for name in own], taken, names, _rows(args, kwargs))
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


def _taken(program: Program, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What adapters, active or not, take of a call. The model gets it only if it has an argument of that name."""
    asked = {key for adapter in program.adapters.values() for key in adapter.arguments}
    its = {parameter.name for parameter in parameters_of(program.base.forward)} if asked & kwargs.keys() else ()
    return {key: kwargs.get(key) if key in its else kwargs.pop(key, None) for key in asked}


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many rows the call has."""
    values = (*args[:1], *kwargs.values())
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.dim() > 1), None)


def _numbers(
    own: Iterable[Adapter], taken: Mapping[str, Any], names: Sequence[str] | None, rows: int | None
) -> dict[str, Tensor]:
    """The arguments that the adapters `own` ask for: one integer for every row, or every token of it."""
    found: dict[str, Tensor] = {}
    for adapter in own:
        for key, (one, below) in adapter.arguments.items():
            kind = "of at least 0" if below is None else f"from 0 to {below - 1}"
            each = "row of the batch" if one.each == "row" else "token of every row"
            wanted = f"{key}, which adapter {adapter.name!r} asks for: an integer {kind} for every {each}"
            if taken[key] is None:
                if one.needed:
                    raise AdapterError(
                        f"the call has no {wanted}. Call the model with {key}=…, or disable the adapter."
                    )
                continue
            found[key] = numbers = _integers(taken[key], 1 if one.each == "row" else 2, wanted)
            if rows is not None and len(numbers) != rows:
                raise AdapterError(f"{wanted}; got {len(numbers)} for {rows} rows")
            its = numbers if names is None else numbers[[row == adapter.name for row in names]]
            over = its < 0 if below is None else (its < 0) | (its >= below)
            if not torch.compiler.is_compiling() and bool(over.any()):
                raise AdapterError(f"{wanted}; got {its.tolist()}")
    return found


def _integers(value: Any, dims: int, wanted: str) -> Tensor:
    """`value`, a tensor or a list of integers, as a tensor of so many `dims`."""
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise AdapterError(f"{wanted}; got {value!r}") from None
    if numbers.dim() != dims or numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise AdapterError(f"{wanted}; got {numbers.dtype} of shape {tuple(numbers.shape)}")
    return numbers.long()


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
