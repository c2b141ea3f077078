"""Specs from the command line: a file, options, or both."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peftc.api import load_spec
from peftc.errors import SpecError, nearest_hint
from peftc.registry import spec_classes
from peftc.specs import AdapterSpec


def spec_of(
    file: Path | None, method: str | None, targets: str | None, rank: int | None, fields: Sequence[str]
) -> AdapterSpec:
    """The spec in `file`, or a new one of `method`, with what the options say in the place of its fields.

    One of the two is needed. `targets`: names with commas between them, or `all-linear`; `fields`: `name=value`. Raises
    SpecError.
    """
    given = dict(map(_field, fields))
    if targets is not None:
        names = [name for part in targets.split(",") if (name := part.strip())]
        given["target_modules"] = "all-linear" if names == ["all-linear"] else names
    if rank is not None:
        given["r"] = rank
    if file is None:
        return _with({"peft_type": str(method).upper()}, given)
    if method is not None:
        raise SpecError(f"--method={method}: {file} says what method it is of; give one of the two")
    return _with(load_spec(file).to_dict(), given) if given else load_spec(file)


def _with(start: Mapping[str, Any], given: Mapping[str, Any]) -> AdapterSpec:
    cls = spec_classes().get(start["peft_type"], AdapterSpec)  # A method that nobody knows is refused below.
    for name in given if cls is not AdapterSpec else ():
        if name not in cls.model_fields and name not in cls.not_implemented:
            raise SpecError(f"{cls.__name__}.{name}: no such field.{nearest_hint(name, cls.model_fields, 3)}")
    return load_spec({**start, **given})


def _field(text: str) -> tuple[str, Any]:
    """`name=value`, with the value as JSON or YAML."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise SpecError(f"--field {text}: give it as name=value")
    try:
        return name, json.loads(value)  # YAML takes 1e-3 for a text.
    except ValueError:
        pass
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecError(f"--field {text}: the value is neither JSON nor YAML: {error}") from None
