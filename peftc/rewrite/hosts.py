"""Hosts: modules that run a rewritten graph while an adapter is active.

A host is the very module that was there. Its class is exchanged once for a subclass whose forward runs what is bound to
the module, or else the old forward. So every name, reference, hook and isinstance check stays true, a switch assigns one
attribute, and whoever exchanges the class too (FSDP2 does, before or after) finds and keeps it.
"""

import copy
import functools
import re
import types
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_module_registration_hook

from peftc.errors import AdapterError
from peftc.graph.calling import Signature, by_mode_of_host, guarded
from peftc.graph.hooked import INNER, is_hooked
from peftc.graph.packing import Rows, packed, unpacked
from peftc.graph.region import OPAQUE, invoke
from peftc.rewrite.boundary import boundary_of
from peftc.rewrite.lent import in_forward, lent
from peftc.rewrite.walking import TRACED, children, hidden, hiding, is_walking, may_walk, set_children

# Attributes of a host: what it runs now (a binding, or None), itself as it was, and a forward patched on it before.
BOUND, BASE, _PATCHED = "peftc", "peftc_base", "peftc_patched"
# Of a module whose weights may be stood in for: the host that computes with them, as it was, and the path from that to it.
READS = "peftc_reads"
VIEWED = "peftc_viewed"  # Of a view of a host as it was: the host.
# How generated code reads a weight of its host: past what others get who read it.
_OWN = "peftc_"


class Unbound:
    """A host as it was before the rewrite: calls its own forward, without the hooks (those run around the new one).

    `standing`: under torch.compile, which traces one call at a time, the weights that stand for the host's own in it.
    """

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        self.boundary = boundary_of(host, host.__dict__.get(_PATCHED))
        self.standing: Mapping[str, Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = _as_it_was(self.host, original_class(self.host), args, kwargs)
        return result if self.boundary is None else self.boundary.given(result)


def _as_it_was(host: nn.Module, original: type[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The call of the forward that `host` had, which is meant for its own children and weights."""
    patched = host.__dict__.get(_PATCHED)
    with hidden(host):
        return original.forward(host, *args, **kwargs) if patched is None else patched(*args, **kwargs)


# By host, the weights that stand for its own in the call that this thread is in, by their paths from the host.
_standing: ContextVar[Mapping[int, Mapping[str, Tensor]]] = ContextVar("standing")
_NOTHING: Mapping[int, Mapping[str, Tensor]] = types.MappingProxyType({})


def with_weights(
    base: Unbound,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    more_args: tuple[Any, ...] = (),
    more_kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Any:
    """The call of `base`, in which these `weights`, by their paths from the host, stand for its own."""
    if torch.compiler.is_compiling():
        base.standing = weights
        result = invoke(base, args, kwargs, more_args, more_kwargs)
        base.standing = None
        return result
    token = _standing.set({**_standing.get({}), id(base.host): weights or {}})
    try:
        return invoke(base, args, kwargs, more_args, more_kwargs)
    finally:
        _standing.reset(token)


def _reader(leaf: str) -> property:
    """An attribute that is the module's own tensor; inside a call of `with_weights` what stands for it there; and to a
    forward that reads it past the call of its host, the tensor as active adapters make it.
    """

    def read(self: nn.Module) -> Any:
        own = _stored(self, leaf)
        reads = self.__dict__.get(READS)
        host, prefix = (self, "") if reads is None else (reads[0].host, reads[1])
        bound = host.__dict__.get(BOUND)
        if bound is None or own is None:
            return own
        compiling = torch.compiler.is_compiling()
        if reads is not None:
            weights = reads[0].standing if compiling else _standing.get(_NOTHING).get(id(host))
            if weights is not None and prefix + leaf in weights:
                return weights[prefix + leaf]
        inside = is_walking(host)
        return own if inside or not in_forward() else bound.lent(prefix + leaf, own)

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[leaf] = value  # What nn.DataParallel and FSDP1 give in its place for a while is no parameter.

    def delete(self: nn.Module) -> None:
        if leaf not in self.__dict__:
            raise AttributeError(leaf)
        del self.__dict__[leaf]

    return property(read, write, delete)


def _own_reader(leaf: str) -> property:
    return property(lambda self: _stored(self, leaf))  # For generated code.


def _stored(module: nn.Module, leaf: str) -> Any:
    for slots in (module._parameters, module._buffers, module.__dict__):
        if leaf in slots:
            return slots[leaf]
    raise AttributeError(f"{type(module).__name__!r} object has no attribute {leaf!r}")


def own_path(path: str) -> str:
    """How generated code reads the tensor at `path` of its host, past those who get it as adapters make it."""
    module, dot, leaf = path.rpartition(".")
    return f"{module}{dot}{_OWN}{leaf}"


class Code:
    """A rewritten graph and the function that runs it: `forward(binding, …)`. Equal hosts share it; it names no adapter."""

    def __init__(
        self,
        graph: fx.Graph,
        ran: tuple[Any, ...] = (),
        signature: Signature | None = None,
        training: "Code | None" = None,
    ) -> None:
        template = fx.GraphModule(nn.Module(), fx.Graph())
        template.graph = graph
        graph.owning_module = None  # The template is done with, and a pickled graph would take it along.
        self.graph = graph
        self.ran = ran  # What every pass did to it.
        self.calls_base = any(str(node.target) == OPAQUE for node in graph.nodes)
        self.text = template.code
        self.signature = signature  # Of a whole program, which takes its inputs apart.
        self.training = training  # What runs in its place under train().
        self.forward: Callable[..., Any] = type(template).forward
        if signature is not None:
            asks = any(node.target is guarded for node in graph.nodes)  # Itself, of what it makes of the inputs.
            self.forward = (replace(signature, guards=()) if asks else signature).around(self.forward)
        if training is not None:
            self.forward = by_mode_of_host(
                self.forward, training.forward, signature.modules if signature else frozenset()
            )

    def __reduce__(self) -> Any:
        return _unpacked_code, (packed(self.graph), self.ran, self.signature, self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Code":
        return self


def _unpacked_code(rows: Rows, *made: Any) -> Code:
    return Code(unpacked(rows), *made)


class Binding:
    """What a host runs: a code, the host itself, the host as it was, and the parts `a0`, `a1`, … that the code reads."""

    def __init__(self, code: Code, host: nn.Module, parts: Iterable[Any]) -> None:
        self.code = code
        self.run = code.forward
        self.host = host
        if code.calls_base:
            self.base = base_of(host)
            if self.base.boundary is not None:
                self.run = self.base.boundary.around(code.forward)
        self.__dict__.update({f"a{number}": part for number, part in enumerate(parts)})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, run=state["code"].forward)

    @property
    def parts(self) -> dict[str, Any]:
        """The parts by name."""
        return {name: part for name, part in self.__dict__.items() if re.fullmatch(r"a\d+", name)}

    def lent(self, path: str, own: Tensor) -> Tensor:
        """What a forward gets that reads the tensor at `path` of the host, not in a call of it."""
        return lent(self.parts.values(), path, own)


@functools.cache
def _host_class(
    original: type[nn.Module],
    leaves: tuple[str, ...],
    methods: tuple[tuple[str, Any], ...],
    also: tuple[type[Any], ...],
) -> Any:
    """The class of hosts of class `original`; `leaves` are parameters that may be stood in for, `methods` make the methods
    of these names from those that `original` has, and hosts are instances of the classes `also` too.
    """
    walks = may_walk(original)

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = getattr(self, BOUND, None)
        if bound is not None:
            return bound.run(bound, *args, **kwargs)
        if walks or _PATCHED in self.__dict__:
            return _as_it_was(self, original, args, kwargs)
        return original.forward(self, *args, **kwargs)

    namespace: dict[str, Any] = {
        "forward": forward,
        "peftc_original": original,
        "peftc_made": (original, leaves, methods, also),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__copy__": _copy,
        "__deepcopy__": _deepcopy,
        "__reduce__": _reduce,
        "_replicate_for_data_parallel": _replicate,
        **hiding(original),
        **({"_modules": property(children, set_children)} if walks else {}),
        **{leaf: _reader(leaf) for leaf in leaves},
        **{f"{_OWN}{leaf}": _own_reader(leaf) for leaf in leaves},
        **{name: make(getattr(original, name)) for name, make in methods},
    }
    # Named as the class it stands in for: transformers looks up what it records of a model by the name of its class.
    return types.new_class(original.__name__, (original, *also), {}, lambda body: body.update(namespace))


def _replicate(self: nn.Module) -> nn.Module:
    """The host as nn.DataParallel copies it to another device: bound to what its copy has there, at its first call."""
    replica = nn.Module._replicate_for_data_parallel(self)
    reads = replica.__dict__.pop(READS, None)
    replica.__dict__.pop(BASE, None)
    if reads is not None:
        replica.__dict__[READS] = (base_of(replica), reads[1])
    bound = replica.__dict__.get(BOUND)
    if bound is not None:
        replica.__dict__[BOUND] = _Replica(replica, bound)
    return replica


class _Replica:
    """What a replica is bound to until its first call, when its children are there."""

    def __init__(self, host: nn.Module, bound: Any) -> None:
        self.host, self.bound = host, bound

    def _parts(self) -> list[Any]:
        return [part.on_replica(self.host) for part in self.bound.parts.values()]

    def lent(self, path: str, own: Tensor) -> Tensor:
        """As of a Binding."""
        return lent(self._parts(), path, own)

    def run(self, _: Any, *args: Any, **kwargs: Any) -> Any:
        """As of a Binding, which takes its place."""
        self.host.__dict__[BOUND] = new = Binding(self.bound.code, self.host, self._parts())
        return new.run(new, *args, **kwargs)


def _copy(self: nn.Module) -> nn.Module:
    new: nn.Module = object.__new__(type(self))
    new.__dict__.update(self.__dict__)
    return new


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new: nn.Module = object.__new__(type(self))
    memo[id(self)] = new
    state = {name: value for name, value in self.__dict__.items() if name != "_compiled_call_impl"}
    new.__dict__.update(copy.deepcopy(state, memo))
    return new


def _reduce(self: nn.Module) -> Any:
    return _new_host, vars(_made(type(self)))["peftc_made"], self.__getstate__()


def _new_host(*made: Any) -> nn.Module:
    return object.__new__(_host_class(*made))


def _made(cls: type[nn.Module]) -> type[nn.Module]:
    """The host class that `cls` is, or was made from by others."""
    return next(base for base in cls.__mro__ if "peftc_made" in vars(base))


def is_host(module: nn.Module) -> bool:
    """Whether `module` is a host now, whatever class others have made of it since."""
    return original_class(module) is not type(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class `module` had before it was made a host."""
    return getattr(type(module), "peftc_original", type(module))


def install(module: nn.Module, leaves: Iterable[str] = (), methods: Mapping[str, Any] | None = None) -> None:
    """Make `module` a host that runs its old forward until something is bound to it. Once more adds what is new."""
    wanted, more = tuple(sorted(set(leaves))), methods or {}
    if is_host(module):
        original, before, known, also = vars(_made(type(module)))["peftc_made"]
        wanted = tuple(sorted({*wanted, *before}))
        if wanted != before or not set(more) <= {name for name, _ in known}:
            _exchange(module, _host_class(original, wanted, (*known, *more.items()), also))
        return
    hooked = is_hooked(module)
    if "forward" in module.__dict__ and not hooked:
        module.__dict__[_PATCHED] = module.__dict__.pop("forward")
    module.__dict__[BOUND] = None
    # nn.Module's own __setattr__ takes ten times as long.
    object.__setattr__(module, "__class__", _host_class(type(module), wanted, tuple(more.items()), ()))
    if hooked:  # Accelerate's hook stays outside, around what the host runs.
        module.__dict__[INNER] = types.MethodType(type(module).forward, module)


def be_also(module: nn.Module, also: tuple[type[Any], ...]) -> None:
    """Let a host be an instance of the classes `also` beside its own, which it finds its attributes in first."""
    original, leaves, methods, before = vars(_made(type(module)))["peftc_made"]
    if also != before:
        _exchange(module, _host_class(original, leaves, methods, also))


def _keep_hosts(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Refuse to let a module that is a host, or has some inside, be exchanged for one without it."""
    old = parent._modules.get(name)
    copied = parent.__dict__.get("_is_replica", False)  # By nn.DataParallel, which gives it copies of the children.
    if old is None or old is child or copied or type(parent).__module__ == "torch._dynamo.eval_frame":
        return
    if child is not None and child.__dict__.get(VIEWED) is old:
        return  # The host as it was takes its own place: that is how some take adapters off.
    hosts = [module for module in old.modules() if is_host(module)]
    if hosts and (child is None or not any(module is hosts[0] for module in child.modules())):
        raise AdapterError(
            f"{type(parent).__name__}.{name}: adapters are on it, and would be lost with it. Exchange modules first,"
            " then compile; or unload(). A wrapper may take it in."
        )


register_module_module_registration_hook(cast(Any, _keep_hosts))


def _exchange(module: nn.Module, cls: type[nn.Module]) -> None:
    """Put `cls` in the place of the host class of `module`, inside of what others have made of it."""
    object.__setattr__(module, "__class__", _remade(type(module), cls))


def _remade(outer: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    if "peftc_made" in vars(outer):
        return cls
    made = {base: any("peftc_made" in vars(one) for one in base.__mro__) for base in outer.__bases__}
    bases = tuple(_remade(base, cls) if made[base] else base for base in outer.__bases__)
    namespace = {name: value for name, value in vars(outer).items() if name not in ("__dict__", "__weakref__")}
    return types.new_class(outer.__name__, bases, {}, lambda body: body.update(namespace))


def base_of(host: nn.Module) -> Unbound:
    """The host as it was before the rewrite."""
    base = host.__dict__.get(BASE)
    if base is None:
        base = host.__dict__[BASE] = Unbound(host)
    return base


def reads(module: nn.Module, host: nn.Module, prefix: str) -> None:
    """Let the attributes of `module`, at path `prefix` of a host, be stood in for in the calls of that host."""
    module.__dict__[READS] = (base_of(host), prefix)


def uninstall(module: nn.Module) -> None:
    """Put the class back that `module` had, and its forward if that was patched."""
    if not is_host(module):
        return
    for name in (BOUND, BASE, READS, TRACED):
        module.__dict__.pop(name, None)
    patched = module.__dict__.pop(_PATCHED, None)
    if patched is not None:
        module.__dict__["forward"] = patched
    hooked = is_hooked(module)
    _exchange(module, original_class(module))
    if hooked:
        module.__dict__[INNER] = types.MethodType(type(module).forward, module)
