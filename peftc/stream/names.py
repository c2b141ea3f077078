"""Which tensors of a checkpoint are which parameters of its model: renamed, or fused and split (experts, qkv)."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from peftc.checkpoint.spelling import checkpoint_renamings
from peftc.errors import CheckpointError
from peftc.graph.sites import transformers_config


@dataclass(frozen=True)
class Fusion:
    """Stored tensors that transformers makes into one parameter or several.

    `parts`: by stored tensor, in the order in which they are fused, the pattern of the converter that it matches and its
    name after the renamings. `parameters`: what they are in the model, by what the converter calls them.
    """

    parts: Mapping[str, tuple[str, str]]
    parameters: Mapping[str, str]
    target: str
    converter: Any

    def fuse(self, stored: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The parameters by name, from all stored tensors."""
        made = _converted(self.converter, self.target, self.parts, stored, model)
        return {self.parameters[name]: value for name, value in made.items()}

    def split(self, values: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The stored tensors, from all parameters by name."""
        back = self.converter.reverse_transform()
        target = ""
        for name, own in self.parameters.items():
            target, pattern = back.rename_source_key(name)
            back.add_tensor(target, name, pattern, values[own])
        made = back.convert(target, model=model, config=transformers_config(model))
        return {stored: _tensor(made[plain]) for stored, (_, plain) in self.parts.items()}


@dataclass(frozen=True)
class Names:
    """By parameter (or buffer) of the model: `direct`, its stored tensor; `fused`, the several that it comes from."""

    direct: Mapping[str, str]
    fused: Mapping[str, Fusion]


def names_of(model: nn.Module, stored: Mapping[str, Tensor]) -> Names:
    """Match stored tensors (on the meta device) with the parameters of `model`, as transformers does on loading."""
    own = set(model.state_dict())
    if transformers_config(model) is None:
        return Names({name: name for name in stored if name in own}, {})
    from transformers.core_model_loading import dot_natural_key

    base = cast(Any, model)
    renamings, converters = checkpoint_renamings(base), _converters(base)
    prefix = str(base.base_model_prefix)
    direct: dict[str, str] = {}
    groups: dict[str, tuple[Any, dict[str, tuple[str, str]]]] = {}
    for original in sorted(stored, key=dot_natural_key):
        plain = original
        for renaming in renamings:
            plain = renaming.rename_source_key(plain)[0]
        converter, target, pattern = _match(plain, converters)
        if converter is None:
            direct.setdefault(_with_prefix(plain, prefix, own), original)
        else:
            groups.setdefault(target, (converter, {}))[1][original] = (pattern, plain)
    fused: dict[str, Fusion] = {}
    for target, (converter, parts) in groups.items():
        try:
            made = _converted(converter, target, parts, stored, model)
        except Exception as error:  # Whatever transformers' converters raise on shapes and names that are not theirs.
            raise CheckpointError(
                f"{next(iter(parts))} and what belongs to it can't become {target}: {error}"
            ) from None
        dtypes = {stored[part].dtype for part in parts}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{next(iter(parts))} and what belongs to it are of {len(dtypes)} dtypes; store them in one"
            )
        fusion = Fusion(parts, {name: _with_prefix(name, prefix, own) for name in made}, target, converter)
        fused |= dict.fromkeys(fusion.parameters.values(), fusion)
    return Names(direct, fused)


def _converters(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightConverter)]


def _match(name: str, converters: Iterable[Any]) -> tuple[Any, str, str]:
    for converter in converters:
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return converter, renamed, pattern
    return None, name, ""


def _converted(
    converter: Any, target: str, parts: Mapping[str, tuple[str, str]], stored: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    own = copy.deepcopy(converter)
    for name, (pattern, plain) in parts.items():
        own.add_tensor(target, plain, pattern, stored[name])
    made = own.convert(target, model=model, config=transformers_config(model))
    return {name: _tensor(value) for name, value in made.items()}


def _with_prefix(name: str, prefix: str, own: set[str]) -> str:
    """A backbone's weights in a model with a head, or the other way round."""
    candidates = [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else [name]
    return next((candidate for candidate in candidates if candidate in own), name)


def _tensor(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value
