"""PEFT's classes for what a field of a config is told in (EvaConfig, …): dataclasses with the fields of the spec's."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast, get_args

from pydantic import BaseModel

from peftc.registry import spec_classes
from peftc.specs import AdapterSpec

# Those that PEFT makes by itself, by the start that asks for them.
_MADE = {"eva": "eva_config", "corda": "corda_config"}
# Where PEFT has a dict.
_DICTS = ("loftq_config",)


@functools.cache
def fields(cls: type[AdapterSpec]) -> dict[str, type[Any]]:
    """The fields of a spec that are told in a class of their own, and PEFT's form of it."""
    found: dict[str, type[Any]] = {}
    for name, field in cls.model_fields.items():
        for kind in get_args(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found[name] = _dataclass(kind)
    return found


def named(name: str) -> type[Any] | None:
    """The class of this name, if any spec is told something in it."""
    return next((one for cls in spec_classes().values() for one in fields(cls).values() if one.__name__ == name), None)


@functools.cache
def _dataclass(kind: type[BaseModel]) -> type[Any]:
    own = [(name, Any, dataclasses.field(default=field.default)) for name, field in kind.model_fields.items()]
    made = dataclasses.make_dataclass(kind.__name__, own, namespace={"__doc__": kind.__doc__})
    made.__module__ = __name__
    return made


def settle(config: Any, cls: type[AdapterSpec]) -> None:
    """Let the fields of a config be told in the classes that PEFT has there."""
    for name, kind in fields(cls).items():
        value: Any = getattr(config, name, None)
        if name in _DICTS:
            setattr(config, name, dataclasses.asdict(value) if isinstance(value, kind) else value or {})
        elif isinstance(value, Mapping):
            known = {field.name for field in dataclasses.fields(kind)}
            given = cast("Mapping[str, Any]", value)
            setattr(config, name, kind(**{key: one for key, one in given.items() if key in known}))
        elif value is None and _MADE.get(str(getattr(config, "init_lora_weights", None))) == name:
            setattr(config, name, kind())
