"""Stand-ins: what a forward may be traced on, so that nothing it does reaches the module that was given.

Modules keep state in attributes of any depth (bitsandbytes its quantisation state); a traced forward would leave its
proxies there.
"""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import nn

from peftc.graph.hooked import NAMES

# What cannot be changed, or is none of a forward's state. Tensors are shared: a trace changes no values.
_SHARED = (
    type(None), bool, int, float, complex, str, bytes, type, Enum, FunctionType, BuiltinFunctionType, ModuleType,
    torch.Tensor, torch.dtype, torch.device, torch.Size, torch.Generator, nn.Module,
)  # fmt: skip


def isolated(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of `value` that shares tensors and modules with it, and nothing that could be changed.

    Raises TypeError for what can't be copied so.
    """
    if isinstance(value, _SHARED):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if len(memo) > _MOST:
        raise TypeError("it refers to too much to be compared")
    if isinstance(value, dict):
        new = memo[id(value)] = copy.copy(cast("dict[Any, Any]", value))
        for key in new:
            new[key] = isolated(new[key], memo)
        return new
    if isinstance(value, list | set | frozenset | tuple):
        memo[id(value)] = value  # Until it is made, should it hold itself.
        new = memo[id(value)] = _collection(value, memo)
        return new
    state = getattr(value, "__dict__", None)
    if not isinstance(state, dict) or not _is_plain(type(value)):
        raise TypeError(f"a {type(value).__name__} may hold more than can be seen")
    new = memo[id(value)] = object.__new__(type(value))
    for name, item in cast("dict[str, Any]", state).items():
        new.__dict__[name] = isolated(item, memo)
    return new


# Objects that are looked at in one module's state. What refers to more (a trainer, a graph) is no state of a layer.
_MOST = 1000
STANDARD = frozenset(nn.Module().__dict__)
_HELD = ("_buffers", "_parameters", "_modules")


@dataclass(frozen=True)
class Kept:
    """What a module has in attributes of its own, copied, and which tensors and modules it holds."""

    own: Mapping[str, Any]
    held: Mapping[str, Mapping[str, Any]]


def kept_by(module: nn.Module) -> Kept:
    """The state of `module`, to compare with later. Raises TypeError where that can't be."""
    own = _own(module)
    return Kept(isolated(own, {}), {kind: dict(module.__dict__[kind]) for kind in _HELD})


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in STANDARD | NAMES}


def has_changed(module: nn.Module, before: Kept) -> bool:
    """Whether `module` has assigned, counted or remembered anything since."""
    own = _own(module)
    exchanged = any(
        module.__dict__[kind].get(name) is not value
        for kind, items in before.held.items()
        for name, value in items.items()
    )
    return exchanged or not same(own, before.own, set())


@functools.cache
def _is_plain(cls: type) -> bool:
    """Whether all that objects of this class hold is in their `__dict__`."""
    own = cls.__mro__[:-1]
    written = all(base.__flags__ & _HEAP and not vars(base).get("__slots__") for base in own)
    return written and not any(name in vars(base) for base in own for name in _COPIED)


# The flag of classes that are written in Python.
_HEAP = 1 << 9
# A class that has one of these has its own idea of a copy.
_COPIED = ("__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def _collection(value: Any, memo: dict[int, Any]) -> Any:
    items = [isolated(item, memo) for item in value]
    if isinstance(value, tuple) and type(value) is not tuple:
        return type(value)(*items)  # A named tuple.
    return type(value)(items)


def same(one: Any, other: Any, seen: set[int]) -> bool:
    """Whether two values that were equal copies still are, to any depth."""
    if isinstance(one, _SHARED) or isinstance(other, _SHARED):
        plain = type(one) is type(other) and isinstance(one, bool | int | float | complex | str | bytes | torch.Size)
        return one is other or (plain and bool(one == other))
    if id(one) in seen:
        return True
    seen.add(id(one))
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        first, second = cast("dict[Any, Any]", one), cast("dict[Any, Any]", other)
        return first.keys() == second.keys() and all(same(first[key], second[key], seen) for key in first)
    if isinstance(one, set | frozenset):
        return one == other
    if isinstance(one, list | tuple):
        first_items, second_items = cast("list[Any]", one), cast("list[Any]", other)
        pairs = zip(first_items, second_items, strict=False)
        return len(first_items) == len(second_items) and all(same(a, b, seen) for a, b in pairs)
    return same(vars(one), vars(other), seen)
