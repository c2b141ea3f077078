"""Mixed batches at run time: which rows use which adapter, and what hosts and generated code call for it.

A call with `adapter_names` enters a Route. Sites whose terms are products sort their rows into groups of one adapter each,
so that all groups take two batched products; at all other sites every adapter's own code runs on its own rows.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils import checkpoint as checkpoint_module
from torch.utils._pytree import tree_flatten, tree_unflatten

from peftc.errors import AdapterError
from peftc.memory import Room
from peftc.rewrite.acting import subset
from peftc.rewrite.batched import batched_products
from peftc.rewrite.hosts import Binding, base_of
from peftc.rewrite.lent import not_lent
from peftc.rewrite.parts import Part, asks
from peftc.rewrite.products import is_plain

BASE = "__base__"


@dataclass
class Route:
    """The adapters of a batch, one name per row (`__base__`: none), while the call they were given to lasts.

    `runs`: by the id of a host, what runs there. `learns`: whether gradients are wanted. `rows_first`: whether all modules
    are known to have the batch first; `several`: whether a call may have several rows for each name. `rows`, `lengths`
    and `inputs` are of the model's present call: its batch, the lengths of its sequences, the addresses of its tensors.
    `bound`: in checkpointed layers whose second run is given this route too. `gathered`: the last input, which the next
    site (k_proj after q_proj) may have too, its version, and its rows in groups. `room`: where `stacks` lie. The
    rest is computed once per route.
    """

    names: tuple[str, ...]
    runs: Mapping[int, Any]
    learns: bool
    rows_first: bool
    several: bool
    rows: int = 0
    lengths: frozenset[int] = frozenset()
    inputs: frozenset[int] = frozenset()
    bound: bool = False
    partitions: dict[Any, "Partition"] = field(default_factory=dict[Any, "Partition"])
    stacks: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict[Any, tuple[Tensor, Tensor]])
    room: Room = field(default_factory=Room)
    gathered: "tuple[Tensor, int, Partition, Tensor] | None" = None

    def note(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note the batch and the lengths of a call of the model. Raises AdapterError for a batch of another size."""
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values()]
        first = next((value for value in given if isinstance(value, Tensor) and value.dim()), None)
        rows, count = (0 if first is None else first.shape[0]), len(self.names)
        if first is None or rows % count or (rows != count and not self.several):
            raise AdapterError(f"adapter_names: {count} names for a batch of {rows}")
        tensors = [value for value in given if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows]
        self.rows, self.lengths = rows, frozenset(tensor.shape[1] for tensor in tensors)
        self.inputs = frozenset(tensor.data_ptr() for tensor in tensors)

    def each(self, x: Tensor, rows_first: bool = False) -> int:
        """How many rows `x` has of every sequence in turn: one, several (beams), or all its tokens.

        Raises AdapterError if that can't be told.
        """
        if not (self.rows_first and x.dim() == 3 and x.shape[0] == self.rows) and not self._known(
            x, rows_first or self.rows_first
        ):
            raise AdapterError(
                f"adapter_names: a module is called with a tensor of shape {tuple(x.shape)} for a batch of {self.rows}, and"
                " which sequence each part belongs to can't be told. Run the adapters one after the other (set_adapter)."
            )
        if self.learns and not self.bound:
            _refuse_checkpoint()
        return x.shape[0] // len(self.names)

    def _known(self, x: Tensor, rows_first: bool) -> bool:
        rows, first = self.rows or len(self.names), x.shape[0] if x.dim() else 0
        square = x.dim() > 1 and x.shape[1] == rows  # The batch may be the other dimension.
        if not x.is_floating_point():
            return x.dim() > 1 and first == rows and (not square or x.data_ptr() in self.inputs)
        if first == rows:
            return rows_first or x.dim() != 3 or not square
        return x.dim() == 2 and any(first == rows * length for length in self.lengths)


current: ContextVar[Route] = ContextVar("current")


class Routed:
    """What a host is bound to while there are calls with adapter_names: in one, what its route says; else as before.

    `plain`: what the host was bound to; `root`: it is the model itself, whose calls a route takes note of.
    """

    def __init__(self, host: nn.Module, plain: Binding | None, root: bool) -> None:
        self.base, self.plain, self.root = base_of(host), plain, root
        self.run = _routed

    def lent(self, path: str, own: Tensor) -> Tensor:
        """As of a Binding; AdapterError in a call with adapter_names, where every row would need a weight of its own."""
        route = current.get(None)
        if route is not None and id(self.base.host) in route.runs:
            where = f"{path!r} of {type(self.base.host).__name__}"
            return not_lent(
                own,
                f"adapter_names: the model reads {where} itself, for all rows at once. Run the adapters one after the other"
                " (set_adapter).",
            )
        return own if self.plain is None else self.plain.lent(path, own)


def _routed(self: Routed, *args: Any, **kwargs: Any) -> Any:
    route = current.get(None)
    if route is None:
        bound: Any = self.plain
    else:
        if self.root:
            route.note(args, kwargs)
        bound = route.runs.get(id(self.base.host))
    return self.base(*args, **kwargs) if bound is None else bound.run(bound, *args, **kwargs)


@dataclass(frozen=True)
class Partition:
    """Rows in groups of one adapter each and equal size; short groups are filled up with one of their own rows.

    `adapters`: of every group. `gather` (groups · size): the rows in group order; None if that is their own. `scatter`:
    where each row that has an adapter is in that order, `rows` which row that is; None if all are there, in order.
    `whole`: no group was filled up.
    """

    adapters: tuple[str, ...]
    gather: Tensor | None
    scatter: Tensor | None
    rows: Tensor | None
    whole: bool


def partition(route: Route, each: int, parts: Mapping[str, Part], device: torch.device) -> Partition:
    """The groups of rows at a site whose adapters have `parts`; rows of others are in none."""
    quick = (each, id(parts))
    if quick not in route.partitions:
        key = (each, device, tuple(parts))
        if key not in route.partitions:
            names = [name for name in route.names for _ in range(each)]
            route.partitions[key] = _partition(names, frozenset(parts), device)
        route.partitions[quick] = route.partitions[key]
    return route.partitions[quick]


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
    whole = len(gather) == count
    return Partition(adapters, index(gather, len(names)), index(scatter, len(gather)), index(order, len(names)), whole)


def batched(own: Mapping[str, Sequence[Part]]) -> bool:
    """Whether the terms of all adapters at a site, by adapter, are products of one family, which `add_products` adds."""
    families = {_family(parts) for parts in own.values()}
    return len(families) == 1 and None not in families


def _family(parts: Sequence[Part]) -> Any | None:
    """What parts of several adapters must have in common for their products to be batched; None if they can't be."""
    edit = parts[0].edit
    if len(parts) > 1 or edit.slots != ("output",) or edit.opaque or parts[0].site.op != "linear":
        return None
    if not edit.rule.additive or not edit.rule.offers("factors") or asks(edit.rule):
        return None
    if edit.rule.factors(parts[0].bound()) is None or parts[0].changes_bias:
        return None  # What is added is no product, or not that alone.
    return edit.rule, {param.dtype for param in edit.params}.pop(), tuple(edit.dropouts.items())


def add_products(y: Tensor, x: Tensor, parts: Mapping[str, Part], fresh: bool) -> Tensor:
    """`y` (rows, …, out) with every row's own `scale · up @ down @ x` added, for x (rows, …, in).

    `fresh`: nobody else has `y`, so that it may be added to in place.
    """
    route = current.get()
    each = route.each(x)
    part = partition(route, each, parts, x.device)
    groups, first = len(part.adapters), parts[part.adapters[0]]
    grouped = _gathered(route, x, part).reshape(groups, -1, x.shape[-1])
    for name, probability in first.edit.dropouts.items():
        if probability > 0:  # The same for all adapters here.
            grouped = getattr(first, name)(grouped)
    in_order = part.whole and part.gather is None and y.is_contiguous()
    if torch.is_grad_enabled():
        downs, ups, scale = _factors(part, parts)
        grouped = grouped.to(downs[0].dtype)
        together = in_order and y.dtype is grouped.dtype
        delta = batched_products(
            y.view(groups, -1, y.shape[-1]) if together else None, grouped, scale, downs, ups
        ).view(-1, *y.shape[1:])
        return delta if together else _scattered(y, delta, part)
    up, down = _stacked(route, part, parts)
    inner = torch.bmm(grouped.to(down.dtype), down)
    if not (fresh and part.whole and y.dtype is inner.dtype and y.is_contiguous()):
        return _scattered(y, torch.bmm(inner, up).view(-1, *y.shape[1:]), part)
    if part.gather is not None:
        return y.index_add_(0, part.gather, torch.bmm(inner, up).view(-1, *y.shape[1:]))
    y.view(groups, -1, y.shape[-1]).baddbmm_(inner, up)
    return y


def _scattered(y: Tensor, delta: Tensor, part: Partition) -> Tensor:
    """`y` with the rows of `delta`, in group order, added to those that they are of."""
    delta = delta if part.scatter is None else delta.index_select(0, part.scatter)
    added = y + delta if part.rows is None else _promoted(y, delta).index_add(0, part.rows, _promoted(delta, y))
    return added.to(y.dtype)


def _promoted(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, other.dtype))


def _gathered(route: Route, x: Tensor, part: Partition) -> Tensor:
    """The rows of `x` in groups."""
    if part.gather is None:
        return x
    last, grad = route.gathered, torch.is_grad_enabled()
    if last is not None and last[0] is x and last[1] == x._version and last[2] is part and not grad:
        return last[3]
    gathered = x.index_select(0, part.gather)
    route.gathered = None if grad or x.is_inference() else (x, x._version, part, gathered)
    return gathered


def _stacked(route: Route, part: Partition, parts: Mapping[str, Part]) -> tuple[Tensor, Tensor]:
    """scale · upᵀ (groups, r, out) and downᵀ (groups, in, r) without gradients, kept as long as the call lasts."""
    key = (id(parts), id(part))
    if key not in route.stacks:
        downs, ups, scale = _factors(part, parts)
        stack = route.room.stack if is_plain(downs[0]) else torch.stack
        # So they lie best for groups of a few rows.
        route.stacks[key] = stack([up.mT for up in ups]).mul_(scale), stack(downs).mT
    return route.stacks[key]


def _factors(part: Partition, parts: Mapping[str, Part]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """down (r, in) and up (out, r) of every group, lower ranks filled up with zeros, and scale (groups, 1, 1)."""
    found = [parts[name].edit.rule.factors(parts[name].bound()) for name in part.adapters]
    factors = [own for own in found if own is not None]
    assert len(factors) == len(found), "that decides which parts come here"
    r = max(own.down.shape[0] for own in factors)
    like = factors[0].down
    scale = torch.tensor([own.scale for own in factors], dtype=like.dtype, device=like.device)[:, None, None]
    downs = [
        own.down if own.down.shape[0] == r else F.pad(own.down, (0, 0, 0, r - own.down.shape[0])) for own in factors
    ]
    ups = [own.up if own.up.shape[1] == r else F.pad(own.up, (0, r - own.up.shape[1])) for own in factors]
    return downs, ups, scale


@dataclass(frozen=True)
class ByRow:
    """An op, or a host, that runs for every adapter on its own rows, with that adapter's own code: `bindings` by name.

    `base`: what other rows get. `what`: its name in errors. `rows_first`: whether its input has rows first for certain.
    """

    base: Callable[..., Any]
    bindings: Mapping[str, Binding]
    what: str
    rows_first: bool

    @property
    def run(self) -> Callable[..., Any]:
        """What a host does that is bound to it."""
        return _by_row


def host_by_row(host: nn.Module, bindings: Mapping[str, Binding]) -> ByRow:
    """A host that is called for every adapter on its own rows."""
    return ByRow(base_of(host), bindings, type(host).__name__, isinstance(host, _ConvNd))


def by_rows(own: ByRow, x: Tensor) -> Any:
    """What an op of a program gives, for each row with its own adapter."""
    return _by_row(own, x)


def _by_row(self: ByRow, *args: Any, **kwargs: Any) -> Any:
    """Raises AdapterError if it is called with more than one tensor, or anything that holds tensors (a cache)."""
    leaves, tree = tree_flatten((args, kwargs))
    route = current.get()
    places = [position for position, leaf in enumerate(leaves) if not isinstance(leaf, _PLAIN)]
    if len(places) != 1 or not isinstance(leaves[places[0]], Tensor):
        raise AdapterError(
            f"adapter_names: {self.what}, which an adapter changes or saves whole, is called with other than one"
            " tensor, and which rows the rest belongs to can't be told. Run the adapters one after the other (set_adapter)."
        )
    x: Tensor = leaves[places[0]]
    if x.dim() and x.shape[0] == 1 < len(route.names) and not x.is_floating_point():
        x = x.expand(len(route.names), *x.shape[1:])  # One row of positions for all sequences: each gets its own.
        each = 1
    else:
        each = route.each(x, rows_first=self.rows_first)
    groups: dict[str | None, list[int]] = {}
    for position, name in enumerate(route.names):
        rows = range(position * each, (position + 1) * each)
        groups.setdefault(name if name in self.bindings else None, []).extend(rows)
    outputs: list[Any] = []
    for name, rows in groups.items():
        leaves[places[0]] = x.index_select(0, torch.tensor(rows, device=x.device))
        own_args, own_kwargs = tree_unflatten(leaves, tree)
        if name is None:
            outputs.append(self.base(*own_args, **own_kwargs))
            continue
        binding, token = self.bindings[name], subset.set((rows, x.shape[0]))
        try:
            outputs.append(binding.run(binding, *own_args, **own_kwargs))
        finally:
            subset.reset(token)
    return _joined(outputs, list(groups.values()))


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def _joined(outputs: Sequence[Any], rows: Sequence[Sequence[int]]) -> Any:
    """The outputs of the groups as one, its rows in the order of the batch. Raises AdapterError if one has no rows."""
    flat = [tree_flatten(output) for output in outputs]
    order = torch.tensor([row for own in rows for row in own])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    joined: list[Any] = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if all(isinstance(leaf, _PLAIN) for leaf in leaves) and len(set(leaves)) == 1:
            joined.append(leaves[0])
        elif all(_has_rows(leaf, len(own)) for leaf, own in zip(leaves, rows, strict=True)):
            joined.append(torch.cat(leaves).index_select(0, back.to(leaves[0].device)))
        else:
            raise AdapterError(
                "adapter_names: a module that an adapter saves whole returns something without a row for every sequence,"
                " so the adapters' results can't be put together. Run the adapters one after the other (set_adapter)."
            )
    return tree_unflatten(joined, flat[0][1])


def _has_rows(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count


def refuse_names(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keyword arguments of a model, which would pass `adapter_names` over in silence."""
    if "adapter_names" in kwargs:
        raise AdapterError("adapter_names: call the model itself, not its forward")
    return kwargs


def _refuse_checkpoint() -> None:
    """A checkpoint of the model's own runs this once more in the backward pass, where the route is gone."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint_module.__file__:
            raise AdapterError(
                "adapter_names under torch.utils.checkpoint, which would run the layer again without them. transformers'"
                " gradient_checkpointing_enable() can be used; else train without checkpoints, or one adapter at a time."
            )
        frame = frame.f_back
