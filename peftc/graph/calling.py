"""How a flat program is called: the names, sizes and dtypes of its inputs, and what its outputs make."""

import functools
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftc.errors import CaptureError
from peftc.graph.finding import parameter_at


@dataclass(frozen=True)
class Leaf:
    """One placeholder: a tensor of these `sizes` (names where they are open) and this dtype, or a fixed `value`."""

    name: str
    sizes: tuple[int | str, ...] = ()
    dtype: torch.dtype | None = None
    value: Any = None


@dataclass(frozen=True)
class CacheLeaf:
    """The placeholder of a cache that grows, and the keys and values of every layer as they were in the trace, in turn.

    `double`: it is of an encoder-decoder.
    """

    name: str
    leaves: tuple[Leaf, ...]
    double: bool


@dataclass(frozen=True, eq=False)
class Signature:
    """The inputs by `names`, the placeholders they come apart to, and how outputs are put together.

    `defaults`: of all arguments of the model, in order. `guards`: what the trace took for true of sizes. `modules`: the
    names of the model's modules, `dtypes` of one of its parameters, by which a cast is noticed. `caches`: the inputs that
    are caches; a call without one begins with an empty one, as the model does.
    """

    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    leaves: tuple[Leaf, ...]
    inputs: pytree.TreeSpec
    outputs: pytree.TreeSpec
    guards: tuple[str, ...] = ()
    modules: frozenset[str] = frozenset()
    dtypes: tuple[tuple[str, torch.dtype], ...] = ()
    caches: tuple[CacheLeaf, ...] = ()

    def takes(self, names: Collection[str]) -> bool:
        """Whether a call may give inputs of these names."""
        return set(self.names) <= set(names) <= set(self.known)

    @property
    def known(self) -> tuple[str, ...]:
        """The names of all inputs."""
        return (*self.names, *(one.name for one in self.caches))

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The placeholders' values in a call.

        Raises CaptureError if other inputs are given, or ones of another size or dtype than the program was captured for.
        """
        given = {**dict(zip(self.defaults, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if not is_default(self.defaults, name, value)}
        if not self.takes(given):
            raise CaptureError(self._names(given))
        values, spec = pytree.tree_flatten({name: given[name] for name in self.names})
        if spec != self.inputs:
            raise CaptureError(f"the program was captured with {self.inputs}, and is called with {spec}")
        sizes: dict[str, int] = {}
        for leaf, value in zip(self.leaves, values, strict=True):
            wrong = _wrong(leaf, value, sizes)
            if wrong:
                raise CaptureError(
                    f"{leaf.name}: {wrong}; capture again with inputs like these, or use capture='modules'"
                )
        caches = [_begun(one, given.get(one.name), values, sizes) for one in self.caches]
        begun = {one.name: cache for one, cache in zip(self.caches, caches, strict=True)}
        advice = self._positions(begun)
        return [*values, *guarded(caches, self.guards, {**given, **begun}, advice)]

    def _positions(self, caches: Mapping[str, Any]) -> str:
        """What to do if the model works out positions from caches, and these are empty."""
        empty = [name for name, cache in caches.items() if cache.get_seq_length() == 0]
        if not empty or "position_ids" in self.names or "position_ids" not in self.defaults:
            return ""
        return f" ({empty[0]} is empty, and where positions begin follows from it: name position_ids among the inputs, too)"

    def _names(self, given: Mapping[str, Any]) -> str:
        missing = [name for name in self.names if name not in given]
        extra = [name for name in given if name not in self.known]
        parts = [f"{', '.join(names)} {word}" for names, word in ((missing, "missing"), (extra, "not known")) if names]
        return (
            f"the program takes exactly {', '.join(self.known)}: {'; '.join(parts)}. Name what it is called with in inputs="
            " when compiling, or use capture='modules', which keeps the model's own call."
        )

    def require_dtype(self, model: nn.Module) -> None:
        """Raise CaptureError if `model` has been cast since: the graph has casts for the dtypes of before."""
        for name, dtype in self.dtypes:
            now = parameter_at(model, name).dtype
            if now != dtype:
                raise CaptureError(
                    f"the model is {now} now, and was captured in {dtype}, which its program has casts for. Cast first, and"
                    " compile then."
                )

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, which takes the placeholders' values, as what takes the model's arguments and gives its outputs."""

        def call(bound: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                refuse_hooks(bound.host)
                self.require_dtype(bound.host)
            return pytree.tree_unflatten(run(bound, *self.flat(args, kwargs)), self.outputs)

        return call


def guarded(value: Any, guards: Sequence[str], given: Mapping[str, Any], advice: str = "") -> Any:
    """`value`, if the guards are true of the inputs `given`, by name. Raises CaptureError, with `advice`."""
    if guards:
        given = {name: _apart(one) for name, one in given.items()}
    broken = next((code for code in guards if not holds(code, given)), None)
    if broken is not None:
        raise CaptureError(
            f"the program was captured for inputs of which {broken}; capture again with inputs like these{advice}, or use"
            " capture='modules'"
        )
    return value


def _apart(value: Any) -> Any:
    """A cache as its tensors, in turn, as guards have it."""
    if isinstance(value, Tensor) or "transformers" not in sys.modules:
        return value
    from peftc.graph import caches  # Late, as transformers takes its time.

    return caches.tensors(value) if caches.is_cache(value) else value


def _begun(one: CacheLeaf, cache: Any, values: Sequence[Any], sizes: dict[str, int]) -> Any:
    """The cache of a call; an empty one has tensors of no tokens. Raises CaptureError."""
    from peftc.graph import caches  # Late, as in _apart.

    first = next(value for value in values if isinstance(value, Tensor))
    known = {str(leaf.sizes[0]): sizes.get(str(leaf.sizes[0]), first.shape[0]) for leaf in one.leaves}
    shapes = [[known.get(size, 0) if isinstance(size, str) else size for size in leaf.sizes] for leaf in one.leaves]
    empty = [first.new_empty(shape, dtype=leaf.dtype) for shape, leaf in zip(shapes, one.leaves, strict=True)]
    begun = caches.begun(one.name, cache, one.double, empty)
    for leaf, tensor in zip(one.leaves, caches.tensors(begun), strict=True):
        wrong = _wrong(leaf, tensor, sizes)
        if wrong:
            raise CaptureError(f"{one.name}: one of its tensors {wrong}; give another one, or use capture='modules'")
    return begun


@functools.lru_cache(maxsize=4096)
def _compiled(code: str) -> Any:
    return compile(code, "<guard>", "eval")


def holds(code: str, given: Mapping[str, Any]) -> bool:
    """Whether a guard of torch.export, an expression of sizes, is true of these inputs; not if it can't be told."""
    try:
        return bool(eval(_compiled(code), {"__builtins__": {}, "L": given, "max": max, "min": min, "math": math}))
    except (NameError, LookupError, TypeError, AttributeError, SyntaxError, ZeroDivisionError):
        return False


def by_mode_of_host(
    evaluate: Callable[..., Any], train: Callable[..., Any], modules: frozenset[str]
) -> Callable[..., Any]:
    """What runs one of two graphs, by the mode of the whole model. Raises CaptureError if parts of it are in another."""

    def forward(bound: Any, *args: Any, **kwargs: Any) -> Any:
        training = bound.host.training
        for fqn, module in bound.host.named_modules():
            if fqn in modules and module.training is not training:
                raise CaptureError(
                    f"{fqn}: is not in the mode of the whole model, of which train() and eval() are two graphs"
                    " (capture='export'). Put both in one mode, or use capture='modules'."
                )
        return (train if training else evaluate)(bound, *args, **kwargs)

    return forward


def refuse_hooks(model: nn.Module) -> None:
    """Raise CaptureError if a module inside of `model` has hooks, which one flat graph does not run."""
    hooked = [m for m in model.modules() if (m._forward_hooks or m._forward_pre_hooks) and m is not model]
    if hooked:
        fqn = next(name for name, module in model.named_modules() if module is hooked[0])
        raise CaptureError(
            f"{fqn}: has hooks, which do not run in one flat graph (capture='export'). Remove them, or use"
            " capture='modules'."
        )


def is_default(defaults: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether a call that leaves `name` out gives it this value."""
    default = defaults.get(name)
    return value is default or (type(value) in (bool, int, float, str) and value == default)


def _wrong(leaf: Leaf, value: Any, sizes: dict[str, int]) -> str | None:
    """What of a value is not as in the trace; `sizes` are those of the open dimensions so far."""
    if leaf.dtype is None:
        return None if value == leaf.value else f"is {value!r}, and was {leaf.value!r} in the trace"
    if not isinstance(value, Tensor):
        return f"is {type(value).__name__}, no tensor"
    if value.dtype != leaf.dtype or value.dim() != len(leaf.sizes):
        return f"is {value.dtype} {list(value.shape)}, and was {leaf.dtype} {_said(leaf)} in the trace"
    for size, expected in zip(value.shape, leaf.sizes, strict=True):
        if (sizes.setdefault(expected, size) if isinstance(expected, str) else expected) != size:
            return f"is of shape {list(value.shape)}, where the trace fixed {_said(leaf)}"
    return None


def _said(leaf: Leaf) -> str:
    return f"[{', '.join(map(str, leaf.sizes))}]"
