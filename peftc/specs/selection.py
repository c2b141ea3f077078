"""Fields by which specs of several methods select sites, or sizes at them; the engine serves these and no others."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from peftc.specs.base import AdapterSpec, LayerIndices, Names, OneOrMoreNames, require_regex

T = TypeVar("T")
Count = Annotated[int, Field(gt=0)]
Rank = Count
# A probability, or what is left out.
Share = Annotated[float, Field(ge=0, lt=1)]
# How the keys of patterns, and layers_pattern, are set into regular expressions, as in PEFT.
_PATTERN = r"(.*\.)?({})$"
LAYERS_PATTERN = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."


class LayerSelection(AdapterSpec):
    """A spec that can be kept to some layers.

    `layers_to_transform` keeps the layers with these indices; `layers_pattern` names the list that holds them.
    """

    layers_to_transform: LayerIndices | None = None
    layers_pattern: OneOrMoreNames | None = None

    @field_validator("layers_to_transform", "layers_pattern", mode="before")
    @classmethod
    def _none_if_empty(cls, value: Any) -> Any:
        # As files have it where all layers, or no pattern, are meant.
        return None if isinstance(value, str | list | tuple) and not value else value

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if isinstance(self.target_modules, str):
            for field in ("layers_to_transform", "layers_pattern"):
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"{field} contradicts target_modules={self.target_modules!r}: it applies to a list of names;"
                        " give target_modules as a list, or put the layers into the regular expression"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        for pattern in self.layers_pattern or ():
            require_regex("layers_pattern", pattern, LAYERS_PATTERN)
        return self

    def respelled(self, names: Mapping[str, str]) -> Self:
        return super().respelled(names).model_copy(update={"layers_to_transform": None, "layers_pattern": None})

    @property
    def goes_by_plain_names(self) -> bool:
        return super().goes_by_plain_names and not self.layers_pattern


class ParameterSelection(AdapterSpec):
    """A spec that can name parameters (`experts.gate_up_proj`) which no module that is an op holds."""

    target_parameters: Names | None = None


class Patterned(AdapterSpec):
    """A spec with numbers that are others at some modules: `patterns` names the fields that say so, beside those of its
    bases; the first key for which `re.match(rf"(.*\\.)?({key})$", fqn)` holds wins.
    """

    patterns: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _check_patterns(self) -> Self:
        for field, own in patterns_of(self).items():
            for key in own:
                require_regex(field, key, _PATTERN)
        return self

    def respelled(self, names: Mapping[str, str]) -> Self:
        update: dict[str, Any] = {}
        for field, own in patterns_of(self).items():
            found = {re.escape(new): first_match(own, old, None) for old, new in names.items()}
            update[field] = {name: value for name, value in found.items() if value is not None}
        return super().respelled(names).model_copy(update=update)

    @property
    def goes_by_plain_names(self) -> bool:
        return super().goes_by_plain_names and not any(patterns_of(self).values())


class PatternedRank(Patterned):
    """A spec with a rank, and others at some modules."""

    patterns = ("rank_pattern",)

    r: Rank = 8
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)

    def rank_for(self, fqn: str) -> int:
        """The rank at module `fqn`, after `rank_pattern`."""
        return first_match(self.rank_pattern, fqn, self.r)

    def respelled(self, names: Mapping[str, str]) -> Self:
        ranks = {re.escape(new): self.rank_for(old) for old, new in names.items()}
        update = {"rank_pattern": {name: rank for name, rank in ranks.items() if rank != self.r}}
        return super().respelled(names).model_copy(update=update)


class PatternedAlpha(Patterned):
    """A spec with an alpha, and others at some modules."""

    patterns = ("alpha_pattern",)

    alpha_pattern: dict[str, float | int] = Field(default_factory=dict)


def selects(selector: str | Sequence[str], fqn: str) -> bool:
    """Whether `target_modules` (not `all-linear`), or `exclude_modules`, matches module `fqn`."""
    if isinstance(selector, str):
        return re.fullmatch(selector, fqn) is not None
    return any(fqn == name or fqn.endswith(f".{name}") for name in selector)


def shortest_names(chosen: Sequence[str], modules: Iterable[str]) -> tuple[str, ...]:
    """The last parts of the names `chosen`, if these select no others of a model's `modules`; else the whole names."""
    ends = tuple(dict.fromkeys(fqn.rpartition(".")[2] for fqn in chosen))
    return ends if {fqn for fqn in modules if selects(ends, fqn)} == set(chosen) else tuple(chosen)


# The class that a spec must inherit for the engine to serve a field.
SELECTIONS: Mapping[str, type[AdapterSpec]] = {
    "layers_to_transform": LayerSelection,
    "layers_pattern": LayerSelection,
    "target_parameters": ParameterSelection,
    "rank_pattern": PatternedRank,
    "alpha_pattern": PatternedAlpha,
}


def patterns_of(spec: AdapterSpec) -> dict[str, Mapping[str, Any]]:
    """The patterns of a spec by field, those of its bases first."""
    classes = (*type(spec).__mro__[1:], type(spec))
    return {field: getattr(spec, field) for cls in classes for field in vars(cls).get("patterns", ())}


def pattern_matches(key: str, fqn: str) -> bool:
    """Whether a key of a pattern applies to module `fqn`."""
    return re.match(_PATTERN.format(key), fqn) is not None


def first_match(patterns: Mapping[str, T], fqn: str, default: T) -> T:
    """The value of the first key that applies to module `fqn`."""
    return next((value for key, value in patterns.items() if pattern_matches(key, fqn)), default)


def exact_patterns(values: Mapping[str, T], default: T | None) -> dict[str, T]:
    """Keys and values of a pattern that gives the modules `values`, but for those that have the default anyway."""
    # A key matches every fqn that ends with it, and the first wins: longer ones go first.
    other = [fqn for fqn in values if values[fqn] != default]
    named = [fqn for fqn in values if fqn in other or any(fqn.endswith(f".{key}") for key in other)]
    return {fqn: values[fqn] for fqn in sorted(named, key=len, reverse=True)}
