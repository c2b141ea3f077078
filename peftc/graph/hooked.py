"""Modules that others have wrapped or hooked.

Accelerate patches `forward` on the instance, and keeps the real one as `_old_forward`. A hook of its moves inputs to a
device and loads weights that are offloaded; what is inside of it can be traced and rewritten.
"""

import sys
from types import MethodType
from typing import Any

import torch
from torch import nn

# What accelerate keeps on a module.
HOOK, INNER = "_hf_hook", "_old_forward"
NAMES = frozenset({HOOK, INNER, "forward"})


def compiled_inside(module: nn.Module) -> nn.Module | None:
    """The module that torch.compile has wrapped as `module`; None for any other."""
    return module._modules["_orig_mod"] if type(module).__module__ == "torch._dynamo.eval_frame" else None


def given_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that FSDP2 has made `cls` from, by which models are known; any other is itself."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return next(base for base in cls.__bases__ if base is not fsdp) if fsdp in cls.__bases__ else cls


def is_hooked(module: nn.Module) -> bool:
    """Whether the patched forward of `module` is accelerate's, around the forward of its class."""
    inner = module.__dict__.get(INNER)
    own = isinstance(inner, MethodType) and inner.__func__ is type(module).forward and inner.__self__ is module
    return own and HOOK in module.__dict__ and "forward" in module.__dict__


def is_patched(module: nn.Module) -> bool:
    """Whether a call of `module` runs another forward than its class's, hooks apart."""
    return "forward" in module.__dict__ and not is_hooked(module)


# transformers' styles of tensor parallelism that cut a linear's or an embedding's weight, and nothing else.
_STYLES = ("ColwiseParallel", "RowwiseParallel", "EmbeddingParallel")


def parallel_style(forward: Any) -> tuple[Any, Any] | None:
    """The style and the mesh of a `forward` that transformers' tensor parallelism has put around a module's own."""
    if getattr(forward, "__name__", "") != "tp_forward":
        return None
    held = dict(zip(forward.__code__.co_freevars, (cell.cell_contents for cell in forward.__closure__), strict=True))
    if type(held.get("self")).__name__ not in _STYLES or not isinstance(held.get("original_forward"), MethodType):
        return None
    return held["self"], held["mesh"]


def is_offloaded(module: nn.Module, weight: torch.Tensor | None) -> bool:
    """Whether `weight` of `module` is in memory during its calls only."""
    return weight is not None and weight.is_meta and HOOK in module.__dict__


def device_of(module: nn.Module, weight: torch.Tensor) -> torch.device:
    """The device that `module` computes with `weight` on."""
    if not is_offloaded(module, weight):
        return weight.device
    hook: Any = module.__dict__[HOOK]
    hooks: list[Any] = list(getattr(hook, "hooks", (hook,)))
    found = next((d for h in hooks if (d := getattr(h, "execution_device", None)) is not None), "cpu")
    return torch.device(found)
