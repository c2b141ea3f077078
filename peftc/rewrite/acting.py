"""What rules may ask about the model's call: which of its tokens an adapter acts on, and some of its arguments.

A method that acts from some place in the text on (`Rule.begins`) reads it off the call's token ids. What a cache holds of a
row that has begun is remembered with the cache, so that later tokens are acted on, too. A method that takes arguments
of the call (`Rule.arguments`) has those of the rows that a module gets.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from peftc.errors import AdapterError
from peftc.rewrite.parts import Part
from peftc.rule import Bound


@dataclass
class Call:
    """A call of a model, or of its `generate`: its token `ids` (rows, tokens) and its cache. `begun`: by adapter, where in
    them each row begins to be acted on. `step`: rows and tokens of the model's own present call. `arguments`: what was
    taken of the call, one number for each of its rows.
    """

    ids: Tensor | None
    cache: Any
    step: tuple[int, int] = (0, 0)
    begun: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    arguments: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def length(self) -> int:
        """The number of its tokens."""
        return 0 if self.ids is None else self.ids.shape[1]

    def begins(self, part: Part) -> Tensor:
        """Where each row begins to be acted on by the adapter of `part`. Raises AdapterError without token ids."""
        name = part.edit.adapter
        if name not in self.begun:
            if self.ids is None:
                raise AdapterError(
                    f"{name!r} acts from some tokens of the text on: call the model with input_ids, not inputs_embeds"
                )
            found = part.edit.rule.begins(self.ids, Bound(part.edit.constants))
            before = _known(self.cache).get(name)
            if before is not None:
                found = found.masked_fill(before.repeat_interleave(len(found) // len(before)), 0)
            self.begun[name] = found
        return self.begun[name]


current: ContextVar[Call] = ContextVar("current")
# Which rows of a batch `each` adapter's own code runs on now, of how many.
subset: ContextVar[tuple[list[int], int] | None] = ContextVar("subset", default=None)
# By cache, the rows that an adapter has begun to act on.
_BEGUN: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()


def _known(cache: Any) -> dict[str, Tensor]:
    try:
        return {} if cache is None else _BEGUN.get(cache, {})
    except TypeError:  # A tuple of tensors, as it was once.
        return {}


def remember(call: Call, output: Any) -> None:
    """Remember with its cache which rows have begun."""
    cache = getattr(output, "past_key_values", None) if call.cache is None else call.cache
    if cache is None or not call.begun:
        return
    try:
        _BEGUN[cache] = {**_known(cache), **{name: begins < call.length for name, begins in call.begun.items()}}
    except TypeError:
        return


def acting(part: Part, x: Tensor) -> Tensor:
    """Which positions of `x` (rows, tokens, …), or of both in one dimension, the adapter of `part` acts on: (…, 1)."""
    if x.is_meta:  # The verifier's.
        return torch.ones((*x.shape[:-1], 1), dtype=torch.bool, device=x.device)
    call, own = current.get(None), subset.get()
    if call is None:
        raise AdapterError(
            f"{part.edit.adapter!r} acts from some tokens of the text on, which only calls of the compiled model, or of its"
            " generate, show: call that, not its base or a part of it"
        )
    begins = call.begins(part).to(x.device)
    rows, tokens = call.step
    begins = begins.repeat_interleave(rows // len(begins))
    if own is not None and own[1] == rows:  # Of these sequences; else of these tokens.
        begins, rows = begins[own[0]], len(own[0])
    count = rows * tokens if own is None or own[1] != rows * tokens else len(own[0])
    flat = x.dim() == 2 and x.shape[0] == count
    if not flat and (x.shape[0] != rows or (x.dim() > 2 and x.shape[1] > tokens)):
        raise AdapterError(
            f"{part.edit.adapter!r} acts from some tokens of the text on, and a module gets a tensor of shape"
            f" {tuple(x.shape)} in a call of {rows} × {tokens} tokens: which of them its parts are can't be told"
        )
    # In a step with a cache, and where a head looks at some, these are the last ones.
    last = tokens if flat else x.shape[1] if x.dim() > 2 else 1
    places = torch.arange(last, device=x.device) + (tokens - last) + max(call.length - tokens, 0)
    acts = (places >= begins[:, None]) & (begins < call.length)[:, None]
    acts = acts.flatten() if x.dim() == 2 else acts
    acts = acts if own is None or own[1] != rows * tokens else acts[own[0]]
    return acts.view(*acts.shape, *(1 for _ in range(x.dim() - acts.dim())))


def given(part: Part, name: str, x: Tensor) -> Tensor:
    """The argument `name` of the call for each of the rows of `x` (rows, …), which may be tokens: (rows,).

    Raises AdapterError outside of a call of the compiled model, or if it can't be told which rows of the call those are.
    """
    if x.is_meta:  # The verifier's.
        return torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    own = subset.get()
    numbers = of_rows(part, name, x.shape[0] if own is None else own[1]).to(x.device)
    return numbers if own is None else numbers[own[0]]


def of_rows(part: Part, name: str, count: int) -> Tensor:
    """The argument `name` of the call for each of `count` rows, or tokens, of all that are in the batch: (count,)."""
    call = current.get(None)
    if call is None or name not in call.arguments:
        raise AdapterError(
            f"{part.edit.adapter!r} takes {name} of the call, which only calls of the compiled model, or of its generate,"
            " show: call that, not its base or a part of it"
        )
    numbers, (rows, tokens) = call.arguments[name], call.step
    if count % len(numbers) or (rows and count not in (rows, rows * tokens)):
        raise AdapterError(
            f"{part.edit.adapter!r} takes {name} of the call, and a module gets {count} rows in a call of"
            f" {rows or len(numbers)}: which of them are which can't be told. Leave that module out (exclude_modules)."
        )
    return numbers.repeat_interleave(count // len(numbers))  # A row's beams, and its tokens, follow each other.


def given_beside(part: Part) -> dict[str, Tensor]:
    """What the call has of the arguments that the rule of `part` takes for every token: (batch, tokens) each."""
    call, rule = current.get(None), part.edit.rule
    known = {} if call is None else call.arguments
    return {name: known[name] for name, one in rule.arguments.items() if one.each == "token" and name in known}
