"""Names of tensors in the state dicts of PEFT's models, for models of this package."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from peftc.rewrite.parts import Adapter
from peftc.rewrite.program import Program

# What PEFT's wrappers put between a module's name and that of its tensors.
_BETWEEN = (".base_layer.", ".original_module.", ".token_adapter.")
# What follows from the config here.
_LEFT_OUT = (".ranknum.",)
_BASE = "base_model.model."


def rename(module: nn.Module, program: Program, state: dict[str, Any], prefix: str) -> None:
    """Let the tensors in `state` that PEFT has named have the names that they have in `module`.

    Integers that the adapters' configs say (which tokens, which entries) are not in PEFT's state dicts; they stay.
    """
    own = dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name in own:
            continue
        new = _name_in(own, name)
        value = state.pop(key)
        if new is not None:
            state.setdefault(prefix + new, value)
    said = _said(program.adapters.values())
    for name, tensor in own.items():
        if id(tensor) in said:
            state.setdefault(prefix + name, tensor)


def _name_in(own: Mapping[str, Any], name: str) -> str | None:
    """The name in `own`; None of what is not needed (what all modules share, PEFT names once more at each of them)."""
    for part in _BETWEEN:
        name = name.replace(part, ".")
    shared = _BASE + ".".join(name.split(".")[-2:])
    above = name.replace("base_model.", _BASE, 1)
    again = name not in own and above != shared and shared in own
    if again or any(part in name for part in _LEFT_OUT):
        return None
    # A vector that is a module of its own in PEFT; what all modules share, which is above the base there.
    return next((one for one in (name, name.removesuffix(".weight"), above) if one in own), name)


def _said(adapters: Iterable[Adapter]) -> set[int]:
    """The adapters' tensors of integers that are not trained, by identity."""
    parts = chain.from_iterable(adapter.parts.values() for adapter in adapters)
    tensors: list[Tensor] = [
        part.tensor(param.key) for part in parts for param in part.edit.params if not param.trainable
    ]
    return {id(tensor) for tensor in tensors if not tensor.is_floating_point()}
