"""Weights that a model reads past their module's call: `self.child.weight`, in a parent's forward or in a helper.

Such a read gets what the module itself computes with while adapters are active: the folded weight, or the trained copy's.
It is known when it happens, so no source is looked through, and helpers and computed names are found too.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from peftc.errors import AdapterError
from peftc.graph.sites import WeightSite, canonical
from peftc.rule import Bound


def in_forward() -> bool:
    """Whether a forward is running that calls this, and not a hook of a call or a tool that looks at the model."""
    if torch.compiler.is_compiling():
        return True
    if sys._getframe(2).f_code.co_filename.startswith(_DISTRIBUTED):
        return False
    frame, inner = sys._getframe(1), sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "forward":
        if frame.f_code.co_filename == _CALLS and frame.f_code.co_name in ("_call_impl", "inner"):
            # What the call runs now: the forward, by whatever name it was put there, or a hook.
            return inner.f_code is _code_of(frame.f_locals.get("forward_call"))
        frame, inner = frame.f_back, frame
    return frame is not None


# Where FSDP1 is, whose forward, around the model's, gathers weights.
_DISTRIBUTED = str(Path(torch.__file__).parent / "distributed")
# The file in which torch calls modules.
_CALLS = nn.Module._call_impl.__code__.co_filename


def _code_of(forward: Any) -> Any:
    if isinstance(forward, partial):
        return None  # Accelerate's, which runs hooks of its own around the module's forward.
    return getattr(getattr(forward, "__func__", forward), "__code__", None)


def lent(parts: Iterable[Any], path: str, own: Tensor) -> Tensor:
    """What stands for `own`, the tensor at `path` of a host, while `parts` are active there.

    Computed at the first use: most who read a weight only ask for its dtype. Raises AdapterError there if that can't be.
    """
    changes: list[Change] = []
    last, learns = None, False
    for part in parts:
        change = _change(part, path)
        if change is not None:
            changes.append(change)
            last, learns = part, learns or _learns(part)
    if last is None:
        return own
    if last.edit.whole:
        return last.live(path)
    return _later(own, lambda: _changed(changes, own), learns)


def _learns(part: Any) -> bool:
    return any(part.live(param.key).requires_grad for param in part.edit.params)


def _passed_on(make: Callable[[], Tensor], gradient: Tensor) -> None:
    """Give the gradient of a tensor that was made, and used as it is, to what it was made of."""
    with torch.enable_grad():
        made = make()
    made.backward(gradient)


def not_lent(own: Tensor, why: str) -> Tensor:
    """What stands for `own` where nothing can: AdapterError, with these words, when its value is used."""

    def refuse() -> Tensor:
        raise AdapterError(why)

    return _later(own, refuse)


def _later(own: Tensor, make: Callable[[], Tensor], learns: bool = False) -> Tensor:
    if torch.compiler.is_compiling() or type(own) not in (nn.Parameter, Tensor):
        return make()  # torch.compile computes nothing that is not used.
    plain = own.detach()
    if learns and torch.is_grad_enabled():
        # An autograd.Function takes the tensor itself for its input, and gives the gradient to that.
        plain.requires_grad_().register_hook(partial(_passed_on, make))
    value = plain.as_subclass(Lent)
    value.make = make
    return value


Change = Callable[[Tensor], Tensor]


def _changed(changes: Iterable[Change], own: Tensor) -> Tensor:
    half = own.is_floating_point() and own.itemsize == 2
    value = own.to(torch.float32) if half else own
    for change in changes:
        value = change(value)
    return value.to(own.dtype)


def _change(part: Any, path: str) -> Change | None:
    """What the edit of a part makes of the tensor at `path` of its host; None if it leaves that alone."""
    edit, site = part.edit, part.site
    if edit.whole:
        return (lambda _: part.live(path)) if any(param.key == path for param in edit.params) else None
    if not isinstance(site, WeightSite):
        return None
    if path == _relative(site.weight, site):
        return lambda weight: _folded(part, canonical(weight, site))
    if path == _relative(site.bias, site) and edit.rule.offers("bias"):
        return lambda bias: edit.rule.bias(bias, _bound(part, bias))
    return None


def _folded(part: Any, weight: Tensor) -> Tensor:
    edit, site = part.edit, part.site
    if edit.unmergeable is not None:
        raise AdapterError(
            f"{site.fqn}: the model reads its weight past its call, and adapter {edit.adapter!r} can't be folded into that:"
            f" {edit.unmergeable}. Leave it out (exclude_modules)."
        )
    return canonical(edit.rule.weight(weight, _bound(part, weight)), site)


def _relative(name: str | None, site: WeightSite) -> str | None:
    return None if name is None else name.removeprefix(f"{site.owner}.") if site.owner else name


def _bound(part: Any, tensor: Tensor) -> Bound:
    tensors = {param.name: part.live(param.key) for param in part.edit.params}
    wide = {name: value.to(tensor.dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    return Bound({**wide, **part.edit.constants}, {"weight": lambda: tensor, "bias": lambda: tensor})


class Lent(Tensor):
    """A weight as it is read: facts about it (dtype, device, shape) are the stored weight's, values are made when used."""

    make: Callable[[], Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Tensor functions get the value; only facts are asked of the stored weight."""
        if func not in _FACTS:
            args, kwargs = tree_map_only(Lent, lambda value: value.make(), (args, dict(kwargs or {})))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_FACTS = frozenset(
    [
        *(
            getattr(Tensor, name).__get__
            for name in ("dtype", "device", "shape", "ndim", "is_cuda", "is_meta", "layout", "itemsize", "is_sparse")
        ),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "is_floating_point", "__len__")),
    ]
)
