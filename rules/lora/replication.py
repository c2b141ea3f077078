"""A deeper model out of the layers of one: some are there several times, with the same weights and adapters of their own.

As mergekit's passthrough merges; PEFT's field `layer_replication`.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from peftc.errors import SpecError
from peftc.graph.copying import structural_copy

# What a model whose layers were replicated remembers: by which ranges.
_MARK = "_peftc_replicated"
# What lists of layers are called.
_LISTS = ("layers", "layer", "h", "blocks", "block")

Ranges = Sequence[tuple[int, int]]


def replicated(model: nn.Module, ranges: Ranges) -> nn.Module:
    """A copy of `model`, sharing its tensors, with the layers [start, end) of each range one after the other;
    `model` itself if it has them already.

    Raises SpecError: the model has not one list of layers, a range is beyond it, or the model is one of other ranges.
    """
    before = model.__dict__.get(_MARK)
    if before == tuple(ranges):
        return model
    said = f"layer_replication={[list(pair) for pair in ranges]}"
    if before is not None:
        raise SpecError(f"{said}: the model's layers are replicated already, by {[list(pair) for pair in before]}")
    path = _list_of(model, said)
    count = len(_layers(model, path))
    wrong = [list(pair) for pair in ranges if not 0 <= pair[0] < pair[1] <= count]
    if wrong:
        raise SpecError(f"{said}: {wrong[0]} is no range [start, end) of the {count} layers in {path}")
    numbers = [number for start, end in ranges for number in range(start, end)]
    new = structural_copy(model)
    owner, _, leaf = path.rpartition(".")
    old = _layers(new, path)
    parent = new.get_submodule(owner) if owner else new
    parent._modules[leaf] = nn.ModuleList(_again(old[number], at) for at, number in enumerate(numbers))
    for module in new.modules():
        _tell(module.__dict__.get("config"), numbers, count)
    new.__dict__[_MARK] = tuple(ranges)
    return new


def _list_of(model: nn.Module, said: str) -> str:
    """The name of the model's one list of layers."""
    found = [
        fqn
        for fqn, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and fqn.rpartition(".")[2] in _LISTS and len(module)
    ]
    outer = [fqn for fqn in found if not any(fqn.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise SpecError(
            f"{said}: is for models with one list of layers; this {type(model).__name__} has {outer or 'none'}"
        )
    return outer[0]


def _layers(model: nn.Module, path: str) -> nn.ModuleList:
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList), "it was looked for"
    return layers


def _again(layer: nn.Module, number: int) -> nn.Module:
    """A layer with the very parameters of `layer`, which tells caches its own number."""
    new = structural_copy(layer)
    for module, original in zip(new.modules(), layer.modules(), strict=True):
        module._parameters.update(original._parameters)
        if "layer_idx" in module.__dict__:
            module.__dict__["layer_idx"] = number
    return new


def _tell(config: Any, numbers: Sequence[int], count: int) -> None:
    """Let a config have so many layers, and what it says of each."""
    own: dict[str, Any] = getattr(config, "__dict__", {})
    if own.get("num_hidden_layers", own.get("n_layer")) != count:
        return
    for name, value in list(own.items()):
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[number] for number in numbers])
    config.num_hidden_layers = len(numbers)
