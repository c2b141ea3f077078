"""What adapters add to a module is hidden from the module's own forward, however that walks over its children."""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn

# The attribute of a module whose own forward torch.compile traces.
TRACED = "peftc_traced"


class Added:
    """A child that adapters add to a host. The host's own forward, which may walk the children, never meets it."""


def may_walk(original: type[nn.Module]) -> bool:
    """Whether the forward of this class may go over its children; none of torch's does, but in containers."""
    return not original.forward.__module__.startswith("torch.nn.modules")


# The hosts whose own forwards this thread is in.
_walking: ContextVar[frozenset[int]] = ContextVar("walking")
_NONE: frozenset[int] = frozenset()


@contextmanager
def hidden(host: nn.Module) -> Generator[None]:
    """Hide from this thread what adapters have added to `host`."""
    if torch.compiler.is_compiling():
        host.__dict__[TRACED] = True
        yield
        host.__dict__[TRACED] = False
        return
    token = _walking.set(_walking.get(_NONE) | {id(host)})
    try:
        yield
    finally:
        _walking.reset(token)


def is_walking(host: nn.Module) -> bool:
    """Whether the call that this is in is one of `host`'s own forward."""
    if torch.compiler.is_compiling():
        return bool(host.__dict__.get(TRACED))
    return id(host) in _walking.get(_NONE)


def children(self: nn.Module) -> dict[str, nn.Module | None]:
    """The `_modules` of a host: in its own forward those that it had before."""
    modules = self.__dict__["_modules"]
    return _own_items(modules) if is_walking(self) else modules


def set_children(self: nn.Module, modules: dict[str, nn.Module | None]) -> None:
    self.__dict__["_modules"] = modules


def _own_items(modules: dict[str, nn.Module | None]) -> dict[str, nn.Module | None]:
    """These modules without those that adapters have added."""
    return {name: child for name, child in modules.items() if not isinstance(child, Added)}


def _iterated(self: nn.Module) -> Iterator[nn.Module | None]:
    return iter(_own_items(self._modules).values())


def _length(self: nn.Module) -> int:
    return len(_own_items(self._modules))


def _item(self: nn.Module, index: Any) -> Any:
    """As the container's own `[]`, whose slices are of its class: here of the class that it had before."""
    original = cast(Any, type(self)).peftc_original
    if not isinstance(index, slice):
        return original.__getitem__(self, index)
    chosen = list(_own_items(self._modules).items())[index]
    return original(OrderedDict(chosen) if issubclass(original, nn.Sequential) else [module for _, module in chosen])


def _view(name: str) -> Callable[[nn.Module], Any]:
    return lambda self: getattr(_own_items(self._modules), name)()


def _names(self: nn.Module) -> Iterator[str]:
    return iter(_own_items(self._modules))


_SEQUENCE: Mapping[str, Any] = {"__iter__": _iterated, "__len__": _length, "__getitem__": _item}
_DICT: Mapping[str, Any] = {
    "__iter__": _names,
    "__len__": _length,
    **{name: _view(name) for name in ("keys", "values", "items")},
}


def hiding(original: type[nn.Module]) -> Mapping[str, Any]:
    """What a container's host overrides so that its forward, which walks the container, meets its own modules only."""
    for base, hidden in ((nn.Sequential, _SEQUENCE), (nn.ModuleList, _SEQUENCE), (nn.ModuleDict, _DICT)):
        if issubclass(original, base):
            return {name: made for name, made in hidden.items() if getattr(original, name) is getattr(base, name)}
    return {}
