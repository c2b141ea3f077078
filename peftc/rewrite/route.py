"""Mixed batches at run time: which rows use which adapter, and the ops that generated code calls for it.

A call with `adapter_names` enters a Route. Sites that were fused sort their rows into groups of one adapter each, so that
all groups take two batched matrix products; at all other sites every adapter's own code runs on its own rows.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointFunction

from peftc.errors import AdapterError
from peftc.rewrite.host import Code, Opaque

BASE = "__base__"


@dataclass
class Route:
    """The adapters of a batch, one name per row (`__base__`: none), while the call they were given to lasts.

    `codes`: by module and name, what runs on that adapter's rows at sites that are not fused. `rows` and `tokens`: of the
    model's present call, to tell flattened tokens from rows. `learns`: whether gradients are wanted.
    `bound`: in checkpointed layers whose second run is given this route too. The rest is computed once per route.
    """

    names: tuple[str, ...]
    codes: Mapping[int, Mapping[str, Code]]
    learns: bool
    rows: int | None = None
    tokens: int | None = None
    bound: bool = False
    partitions: dict[Any, "Partition"] = field(default_factory=dict)
    stacks: dict[Any, Tensor] = field(default_factory=dict)

    def each(self, x: Tensor) -> int:
        """How many rows `x` has of every sequence in turn: one, several (beams), or all tokens.

        Raises AdapterError if that can't be told.
        """
        rows, each = x.shape[0], x.shape[0] // len(self.names)
        flat = x.dim() < 3 and x.is_floating_point() and rows not in (len(self.names), self.rows)
        known = not flat or (self.tokens is not None and each % self.tokens == 0)
        if rows % len(self.names) or not known:
            raise AdapterError(
                f"adapter_names: a module is called with {rows} rows for a batch of {len(self.names)}, and which sequence"
                " each belongs to can't be told. Run the adapters one after the other (set_adapter)."
            )
        if self.learns and not self.bound and not torch.is_grad_enabled():
            _refuse_reentrant()
        return each


current: ContextVar[Route] = ContextVar("current")


@dataclass(frozen=True)
class Partition:
    """Rows in groups of one adapter each and equal size; short groups are filled up with one of their own rows.

    `adapters`: of every group. `gather` (groups · size): the rows in group order. `scatter`: where each row that has an
    adapter is in that order, `rows` which row that is; None if all are there, in order.
    """

    adapters: tuple[str, ...]
    gather: Tensor | None
    scatter: Tensor | None
    rows: Tensor | None


def partition(x: Tensor, present: Sequence[str]) -> Partition:
    """The groups of the rows of `x` at a site with the adapters `present`; rows of others are in none."""
    route = current.get()
    each = route.each(x)
    key = (each, x.device, tuple(present))
    if key not in route.partitions:
        names = [name for name in route.names for _ in range(each)]
        route.partitions[key] = _partition(names, frozenset(present), x.device)
    return route.partitions[key]


def _partition(names: Sequence[str], present: frozenset[str], device: torch.device) -> Partition:
    own: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name in present:
            own.setdefault(name, []).append(row)
    count = sum(map(len, own.values()))
    # Groups of the mean size: at most twice as many as adapters, so neither a long nor a short one costs much.
    size = -(-count // len(own))
    parts = [(name, rows[i : i + size]) for name, rows in own.items() for i in range(0, len(rows), size)]
    gather = [rows[min(i, len(rows) - 1)] for _, rows in parts for i in range(size)]
    places = {row: g * size + i for g, (_, rows) in enumerate(parts) for i, row in enumerate(rows)}
    order = sorted(places)
    scatter = [places[row] for row in order]

    def index(values: list[int], length: int) -> Tensor | None:
        return None if values == list(range(length)) else torch.tensor(values, device=device)

    adapters = tuple(name for name, _ in parts)
    return Partition(adapters, index(gather, len(names)), index(scatter, len(gather)), index(order, len(names)))


def group(part: Partition, x: Tensor) -> Tensor:
    """`x` (rows, …, features) → (groups, tokens, features)."""
    gathered = x if part.gather is None else x.index_select(0, part.gather)
    return gathered.reshape(len(part.adapters), -1, x.shape[-1])


def add_groups(part: Partition, y: Tensor, delta: Tensor) -> Tensor:
    """`y` (rows, …, features) with `delta` (groups, tokens, features) added to the rows that have an adapter."""
    delta = delta.reshape(-1, *y.shape[1:])
    delta = delta if part.scatter is None else delta.index_select(0, part.scatter)
    return y + delta if part.rows is None else y.to(delta.dtype).index_add(0, part.rows, delta)


def stack(part: Partition, container: nn.Module, leaf: str) -> Tensor:
    """The parameters of every group's adapter, one above the other; lower ranks are filled up with zeros.

    `container`: holds them by adapter name, as modules with a parameter `leaf` or, if that is empty, themselves.
    """
    stacks = current.get().stacks
    key = (id(container), leaf, id(part))
    if torch.is_grad_enabled() or key not in stacks:
        made = _stack([_parameter(container, name, leaf) for name in part.adapters])
        if torch.is_grad_enabled():
            return made
        stacks[key] = made
    return stacks[key]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded: list[Tensor] = []
    for tensor in tensors:
        missing = [(0, full - own) for full, own in zip(shape, tensor.shape, strict=True)]
        padding = [number for pair in reversed(missing) for number in pair]
        padded.append(nn.functional.pad(tensor, padding) if any(padding) else tensor)
    return torch.stack(padded)


def _parameter(container: nn.Module, name: str, leaf: str) -> Tensor:
    if leaf:
        holder = container._modules[name]
        assert holder is not None, "the adapter is attached"
        return cast(Tensor, holder._parameters[leaf])
    return cast(nn.ParameterDict, container)[name]


def constants(part: Partition, values: Mapping[str, float], like: Tensor) -> Tensor:
    """The number of every group's adapter, (groups, 1, 1)."""
    numbers = tuple(values[name] for name in part.adapters)
    stacks, key = current.get().stacks, (numbers, like.dtype, like.device)
    if key not in stacks:
        stacks[key] = torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None, None]
    return stacks[key]


def drop(x: Tensor, dropouts: nn.ModuleDict) -> Tensor:
    """Dropout, which has one probability for all adapters here."""
    return next(iter(dropouts.values()))(x)


def by_row(
    base: Opaque,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    more_args: tuple[Any, ...] = (),
    more_kwargs: Any = None,
) -> Any:
    """The host that `base` stands for, called for every adapter on its own rows, with that adapter's own code."""
    leaves, tree = tree_flatten(((*args, *more_args), {**kwargs, **(more_kwargs or {})}))
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
    if first is None:
        raise AdapterError("adapter_names: a module with an adapter is called without a tensor")
    route, host = current.get(), base.__dict__["host"]
    count = first.shape[0]
    if count == 1 < len(route.names):
        # One row for all sequences (positions): every sequence gets its own.
        count = len(route.names)
        leaves = [leaf.expand(count, *leaf.shape[1:]) if _is_rows(leaf, 1) else leaf for leaf in leaves]
        first = next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim())
    codes, groups = route.codes[id(host)], dict[int, tuple[Code | None, list[int]]]()
    each = route.each(first)
    for position, name in enumerate(route.names):
        rows = range(position * each, (position + 1) * each)
        groups.setdefault(id(codes.get(name)), (codes.get(name), []))[1].extend(rows)
    outputs: list[Any] = []
    for code, rows in groups.values():
        index = torch.tensor(rows, device=first.device)
        own = [leaf.index_select(0, index) if _is_rows(leaf, count) else leaf for leaf in leaves]
        own_args, own_kwargs = tree_unflatten(own, tree)
        outputs.append(_run(base, host, code, own_args, own_kwargs))
    return _joined(outputs, [rows for _, rows in groups.values()])


def _is_rows(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count


def _run(base: Opaque, host: nn.Module, code: Code | None, args: Any, kwargs: Any) -> Any:
    """The forward of `host` as it is with `code`, or as it was before any rewrite."""
    if code is None:
        return base(*args, **kwargs)
    mixed = type(host)
    object.__setattr__(host, "__class__", code.cls)
    try:
        return code.cls.forward(host, *args, **kwargs)
    finally:
        object.__setattr__(host, "__class__", mixed)


def _joined(outputs: Sequence[Any], rows: Sequence[Sequence[int]]) -> Any:
    """The outputs of the groups as one, its rows in the order of the batch."""
    if len(outputs) == 1:
        return outputs[0]
    flat = [tree_flatten(output) for output in outputs]
    order = torch.tensor([row for own in rows for row in own])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    joined: list[Any] = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        whole = all(_is_rows(leaf, len(own)) for leaf, own in zip(leaves, rows, strict=True))
        joined.append(torch.cat(leaves).index_select(0, back.to(leaves[0].device)) if whole else leaves[0])
    return tree_unflatten(joined, flat[0][1])


def _refuse_reentrant() -> None:
    """A reentrant checkpoint runs this once more in the backward pass, where the route is gone."""
    frame: Any = sys._getframe()
    forward: Callable[..., Any] = CheckpointFunction.forward
    while frame is not None:
        if frame.f_code is forward.__code__:
            raise AdapterError(
                "adapter_names under torch.utils.checkpoint(use_reentrant=True), which runs the layer again without them;"
                " use transformers' gradient_checkpointing_enable(), or use_reentrant=False"
            )
        frame = frame.f_back
