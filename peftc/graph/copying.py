"""The structural copy: a model with its own modules, which shares the frozen tensors of the original."""

import copy
from collections import OrderedDict
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn

from peftc.errors import CaptureError
from peftc.graph.hooked import compiled_inside
from peftc.graph.rows import is_quantised
from peftc.graph.sites import is_lazy


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the module structure (hooks, configs and plain attributes included) sharing the parameters' storage.

    Every parameter becomes a frozen alias, so neither `requires_grad` nor `.data` of the original is ever touched; tied
    ones stay tied. Buffers are copied, because a forward may update them (batch norm), but for the packed weights of
    quantised linears, which are shared.

    Raises CaptureError if a plain attribute can't be copied.
    """
    memo: dict[int, Any] = {}
    originals: set[int] = set()
    for fqn, module in model.named_modules():
        originals.add(id(module))
        if isinstance(module.__dict__.get("forward"), FunctionType) and compiled_inside(module) is None:
            # A plain function is not bound to the copy; it would go on calling the original.
            raise CaptureError(
                f"{fqn or type(model).__name__}: its forward was replaced by a function, which a copy would share with the"
                " original. Compile with inplace=True, or replace it by a method (types.MethodType)."
            )
        renormed = isinstance(module, nn.Embedding) and module.max_norm is not None
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo and not is_lazy(parameter):
                # An embedding with max_norm rewrites its own weight in forward, so that one can't be shared.
                memo[id(parameter)] = _alias(parameter, clone=renormed)
        for buffer in module._buffers.values() if is_quantised(module) else ():
            if buffer is not None and not buffer.is_floating_point():
                memo[id(buffer)] = buffer
        for value in module.__dict__.values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()
    try:
        return _own(_copy_module(model, memo), originals)
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise CaptureError(
            f"{type(model).__name__} can't be copied ({type(error).__name__}: {error}). Compile it with inplace=True;"
            " unload() then gives the very model back."
        ) from error


def _own(new: nn.Module, originals: set[int]) -> nn.Module:
    """`new`, frozen, if no module of it is one of the original's (whose class has its own idea of a copy)."""
    for fqn, module in new.named_modules():
        if id(module) in originals:
            raise TypeError(f"a copy of {fqn!r} is that module itself")
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and not is_lazy(parameter):
                parameter.requires_grad_(False)
    return new


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """copy.deepcopy of a module, five times as fast for ordinary ones, whose dicts are mostly empty or of modules."""
    done = memo.get(id(module))
    if done is not None:
        return done
    inner = compiled_inside(module)
    if inner is not None:
        new = memo[id(module)] = cast(Any, type(module))(_copy_module(inner, memo), cast(Any, module).dynamo_ctx)
        return new
    if any(getattr(type(module), name, None) is not ordinary for name, ordinary in _ORDINARY.items()):
        return copy.deepcopy(module, memo)
    new = memo[id(module)] = object.__new__(type(module))
    for name, value in module.__getstate__().items():
        if type(value) in _ATOMS:
            new.__dict__[name] = value
        elif name == "_modules":
            children = {key: _copied(child, memo) for key, child in value.items()}
            new.__dict__[name] = type(value)(children)
        elif type(value) in (dict, OrderedDict, set) and not value:
            new.__dict__[name] = type(value)()
        else:
            new.__dict__[name] = copy.deepcopy(value, memo)
    return new


def _copied(child: nn.Module | None, memo: dict[int, Any]) -> nn.Module | None:
    return None if child is None else _copy_module(child, memo)  # An empty container is false.


_ATOMS = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
# A class that overrides one of these has its own idea of a copy.
_ORDINARY = {
    "__deepcopy__": None,
    "__getstate__": nn.Module.__getstate__,
    "__setstate__": nn.Module.__setstate__,
    "__reduce__": object.__reduce__,
    "__reduce_ex__": object.__reduce_ex__,
}


def _alias(parameter: nn.Parameter, clone: bool) -> nn.Parameter:
    data = parameter.detach()
    if clone:
        data = data.clone()
    if type(parameter) is nn.Parameter:
        return nn.Parameter(data, requires_grad=False)
    alias = torch.Tensor._make_subclass(type(parameter), data, False)
    vars(alias).update(vars(parameter))
    return alias
