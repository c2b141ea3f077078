"""Hosts as they were: views that share what the host has, and copies."""

import copy

from torch import nn

from peftc.rewrite.hosts import BASE, BOUND, READS, VIEWED, original_class, uninstall
from peftc.rewrite.walking import Added


def as_it_was(host: nn.Module) -> nn.Module:
    """A view of a host without adapters: of its own class, with its own parameters, buffers and children."""
    view: nn.Module = object.__new__(original_class(host))
    children = {name: child for name, child in host.__dict__["_modules"].items() if not isinstance(child, Added)}
    state = {name: value for name, value in host.__dict__.items() if not name.startswith("peftc")}
    view.__dict__.update({**state, "_modules": children, VIEWED: host})
    return view


def pristine_copy(module: nn.Module) -> nn.Module:
    """A deep copy of `module` as it was before it was a host."""
    state = {name: module.__dict__.pop(name) for name in (BOUND, BASE, READS) if name in module.__dict__}
    try:
        new = copy.deepcopy(module)
    finally:
        module.__dict__.update(state)
    uninstall(new)
    return new
