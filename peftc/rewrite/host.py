"""Hosts: modules that run a rewritten graph.

A host is the very module that was there, with its class exchanged for one that is both a GraphModule with the new
forward and its old class. So every name, reference, hook and isinstance check stays true, equal hosts share one class,
switching is one assignment, and undoing is putting the old class back.
"""

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from peftc.graph.region import OPAQUE

_STANDARD = frozenset(nn.Module().__dict__)


class Opaque(nn.Module):
    """A host as it was before the rewrite: its own forward, without the hooks (those run around the new one)."""

    def __init__(self, host: nn.Module, patched: Any) -> None:
        super().__init__()
        # Past nn.Module.__setattr__: a registered host would be its own descendant.
        self.__dict__["host"] = host
        self.__dict__["patched"] = patched

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        patched, host = self.__dict__["patched"], self.__dict__["host"]
        if patched is not None:
            return patched(*args, **kwargs)
        return original_class(host).forward(host, *args, **kwargs)


class Code:
    """A rewritten graph, and the class that runs it in place of `original`. Shared by equal hosts; never copied.

    An `opaque` one calls the host as it was, as `base_layer`. `methods` takes the place of those of `original`: name → a
    function that makes one from the one it replaces.
    """

    def __init__(
        self,
        original: type[nn.Module],
        graph: fx.Graph,
        opaque: bool,
        methods: Mapping[str, Callable[[Any], Any]],
    ) -> None:
        self.original = original
        self.graph = graph
        self.opaque = opaque
        self.methods = dict(methods)
        self.cls = _host_class(self)

    def __reduce__(self) -> Any:
        return Code, (self.original, self.graph, self.opaque, self.methods)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Code":
        return self


def _host_class(code: Code) -> type[nn.Module]:
    template = fx.GraphModule(nn.Module(), fx.Graph())
    template.graph = code.graph
    code.graph.owning_module = None  # The template is done with, and a pickled graph would take it along.
    namespace: dict[str, Any] = {name: value for name, value in vars(template).items() if name not in _STANDARD}
    namespace.update(
        forward=type(template).forward,
        code_object=code,
        __module__=code.original.__module__,
        __qualname__=code.original.__qualname__,
        __copy__=_copy,
        __deepcopy__=_deepcopy,
        __reduce__=_reduce,
        __str__=nn.Module.__repr__,
        _replicate_for_data_parallel=nn.Module._replicate_for_data_parallel,
    )
    namespace.update({name: make(getattr(code.original, name)) for name, make in code.methods.items()})
    # Named as the class it stands in for: transformers looks up what it records of a model by the name of its class.
    return types.new_class(
        code.original.__name__, (fx.GraphModule, code.original), {}, lambda body: body.update(namespace)
    )


def _copy(self: nn.Module) -> nn.Module:
    return _restore(self, dict(self.__dict__))


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = _restore(self, {})
    memo[id(self)] = new
    state = {name: value for name, value in self.__dict__.items() if name != "_compiled_call_impl"}
    new.__dict__.update(copy.deepcopy(state, memo))
    return new


def _restore(like: nn.Module, state: dict[str, Any]) -> nn.Module:
    new: nn.Module = object.__new__(type(like))
    new.__dict__.update(state)
    return new


def _reduce(self: nn.Module) -> Any:
    return _new_host, (vars(type(self))["code_object"],), self.__getstate__()


def _new_host(code: Code) -> nn.Module:
    return object.__new__(code.cls)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class `module` had before it was made a host."""
    code = code_of(module)
    return type(module) if code is None else code.original


def code_of(module: nn.Module) -> Code | None:
    """The code that `module` runs, if it is a host now."""
    return getattr(type(module), "code_object", None)


def install(module: nn.Module, code: Code) -> None:
    """Let `module` run `code`. An opaque one keeps its own forward, patched on the instance or not, as `base_layer`."""
    if not code.opaque:
        module.__dict__.pop(OPAQUE, None)
    elif OPAQUE not in module.__dict__:
        module.__dict__[OPAQUE] = Opaque(module, module.__dict__.pop("forward", None))
    object.__setattr__(module, "__class__", code.cls)  # nn.Module's own takes ten times as long.


def uninstall(module: nn.Module) -> None:
    """Put the class back that `module` had, and its forward if that was patched."""
    code = code_of(module)
    if code is None:
        return
    if code.opaque:
        patched = module.__dict__.pop(OPAQUE).patched
        if patched is not None:
            module.__dict__["forward"] = patched
    object.__setattr__(module, "__class__", code.original)
