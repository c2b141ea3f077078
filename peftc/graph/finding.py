"""Modules and parameters by their names, through wrappers that were put around modules since the names were noted."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn


def modules_at(model: nn.Module, fqns: Iterable[str]) -> dict[str, nn.Module]:
    """The modules at `fqns`; the way to each goes over those that are found already, where get_submodule starts anew."""
    found = {"": model}

    def at(fqn: str) -> nn.Module:
        if fqn not in found:
            parent, _, name = fqn.rpartition(".")
            found[fqn] = _child(at(parent), name)
        return found[fqn]

    return {fqn: at(fqn) for fqn in fqns}


def _child(module: nn.Module, name: str) -> nn.Module:
    """The child `name`, or that of what has been wrapped since the name was noted: a wrapper has one child."""
    while name not in module._modules and len(module._modules) == 1:
        module = cast(nn.Module, next(iter(module._modules.values())))
    return cast(nn.Module, module._modules[name])


def module_at(model: nn.Module, fqn: str) -> nn.Module:
    """The module `fqn`, through wrappers that were put around modules since."""
    return modules_at(model, [fqn])[fqn]


def attribute_at(root: Any, path: str) -> Any:
    """The attribute at a dotted `path`; None if there is none."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def holder_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter or buffer `name`, through wrappers, and what it is called there."""
    fqn, _, leaf = name.rpartition(".")
    module = module_at(model, fqn)
    while leaf not in module._parameters and leaf not in module._buffers and len(module._modules) == 1:
        module = cast(nn.Module, next(iter(module._modules.values())))
    return module, leaf


def parameter_at(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter `name`, through wrappers."""
    module, leaf = holder_of(model, name)
    return cast(nn.Parameter, module._parameters[leaf])
