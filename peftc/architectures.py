"""Model families: default targets and roles per `model_type`, from the YAML files of installed packages."""

import functools
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from torch import nn

from peftc.errors import RuleError
from peftc.graph.sites import transformers_config
from peftc.specs.base import AdapterSpec, Names

GROUP = "peftc.architectures"


def _targets(value: Any) -> Any:
    return tuple(cast(list[Any], value)) if isinstance(value, list) else value


Targets = Annotated[tuple[str, ...] | str, BeforeValidator(_targets)]


# Default selectors of one method, by the field of its spec.
Defaults = dict[str, Targets]


class Family(BaseModel):
    """One architecture file: the model types it is for, defaults by `peft_type`, and module name suffix by role."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model_types: Names
    defaults: dict[str, Defaults] = {}
    roles: dict[str, Names] = {}

    def role_of(self, fqn: str) -> str | None:
        """The role of module `fqn`: `attention.query`, `mlp.down`, `head` …"""
        path = f".{fqn}"
        return next((role for role, ends in self._ends.items() if path.endswith(ends)), None)

    def defaults_for(self, spec: type[AdapterSpec]) -> Defaults | None:
        """The default selectors of a method: its own, or those of the method that it takes them from."""
        like = self.defaults.get(spec.defaults_of or "")
        return self.defaults.get(spec.model_fields["peft_type"].default, like)

    @functools.cached_property
    def _ends(self) -> dict[str, tuple[str, ...]]:
        return {role: tuple(f".{name}" for name in names) for role, names in self.roles.items()}


@functools.cache
def families() -> Mapping[str, Family]:
    """Family by `model_type`. Raises RuleError on a malformed file, or a model type in two files."""
    found: dict[str, Family] = {}
    for point in entry_points(group=GROUP):
        for file in sorted(files(point.value).iterdir(), key=lambda file: file.name):
            if not file.name.endswith(".yaml"):
                continue
            try:
                family = Family.model_validate(yaml.load(file.read_text("utf-8"), _LOADER))
            except (ValidationError, yaml.YAMLError) as error:
                raise RuleError(f"architecture file {file.name}: {error}") from None
            for model_type in family.model_types:
                if model_type in found:
                    raise RuleError(f"architecture file {file.name}: {model_type!r} is in another file too")
                found[model_type] = family
    return found


def family_of(model: nn.Module) -> Family | None:
    """The family of a transformers model, if it is known."""
    return families().get(getattr(transformers_config(model), "model_type", None) or "")


def role_of(model: nn.Module) -> Callable[[str], str | None]:
    """What gives the role of a name in `model`, if its architecture is known."""
    family = family_of(model)
    return (lambda fqn: None) if family is None else family.role_of


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
