"""Reading and writing specs: dicts, JSON, YAML, and foreign objects with PEFT's `to_dict()`."""

import functools
import json
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import yaml

from peftc.errors import SpecError, nearest_hint
from peftc.specs.base import AdapterSpec, plain

CONFIG_NAME = "adapter_config.json"
# The entry points that name methods without a rule.
ABSENT = "peftc.absent"
_MAX_BYTES = 16 << 20


def load_spec(source: Any, known: Mapping[str, type[AdapterSpec]]) -> AdapterSpec:
    """A spec from a spec, a dict, a path (a JSON or YAML file, or a folder with `adapter_config.json`), or an object
    with PEFT's `to_dict()`. `known` maps a `peft_type` to its spec class.

    Raises SpecError: unknown or missing `peft_type`, broken file, wrong fields. Keys peftc does not know are kept and
    reported with one warning.
    """
    if isinstance(source, AdapterSpec):
        return source
    if isinstance(source, str | Path):
        path = Path(source)
        file = path / CONFIG_NAME if os.path.isdir(path) else path
        return _from_dict(_read(file), known, str(file))
    if isinstance(source, Mapping):
        return _from_dict(cast(Mapping[str, Any], source), known, "spec")
    to_dict = getattr(source, "to_dict", None)
    fields = to_dict() if callable(to_dict) else None
    if isinstance(fields, Mapping):
        return _from_dict(cast(Mapping[str, Any], fields), known, type(source).__name__)
    raise SpecError(
        f"spec: {type(source).__name__} is not a spec. Give a spec such as LoraConfig, a dict, a path to"
        f" {CONFIG_NAME} or a YAML file, or a PEFT config object."
    )


def load_specs(source: Any, adapter_name: str, known: Mapping[str, type[AdapterSpec]]) -> dict[str, AdapterSpec]:
    """Spec by adapter name: `source` is one spec, for `adapter_name`, or a mapping of names to specs."""
    if isinstance(source, Mapping) and "peft_type" not in source:
        several = cast(Mapping[Any, Any], source)
        if several and not any(name in AdapterSpec.model_fields for name in several):
            return {str(name): load_spec(one, known) for name, one in several.items()}
    return {adapter_name: load_spec(source, known)}


def _read(file: Path) -> Mapping[str, Any]:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it is over {_MAX_BYTES:,} bytes")
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SpecError(
            f"{file}: no such file. Give the path of an {CONFIG_NAME}, or of the folder it is in."
        ) from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{str(file)[:200]}: can't be read as text: {error}") from None
    try:
        data: Any = yaml.safe_load(text) if file.suffix in (".yaml", ".yml") else json.loads(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise SpecError(f"{file}: not valid {'YAML' if file.suffix != '.json' else 'JSON'}: {error}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{file}: holds a {type(data).__name__}, expected a mapping of fields")
    return cast(dict[str, Any], data)


def _from_dict(data: Mapping[str, Any], known: Mapping[str, type[AdapterSpec]], where: str) -> AdapterSpec:
    data = plain(data)
    name = data.get("peft_type")
    if name is None:
        raise SpecError(f"{where}: peft_type is missing; valid are {', '.join(sorted(known))}")
    if not isinstance(name, str) or name not in known:
        if str(name) in absent():
            raise SpecError(f"{where}: peft_type: {name!r} has no rule yet: {absent()[str(name)]}.")
        hint = nearest_hint(str(name).upper(), known)
        raise SpecError(f"{where}: peft_type: {name!r} is not known; valid are {', '.join(sorted(known))}.{hint}")
    try:
        spec = known[name].from_dict(data)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    if spec.unknown_keys:
        keys = ", ".join(map(repr, spec.unknown_keys))
        warnings.warn(f"{where}: keys without effect here, kept as they are: {keys}", stacklevel=4)
    return spec


@functools.cache
def absent() -> Mapping[str, str]:
    """By `peft_type` of a method that has no rule, what is missing and what comes closest, as installed packages say."""
    found: dict[str, str] = {}
    for point in entry_points(group=ABSENT):
        found.update(cast("Mapping[str, str]", point.load()))
    return found
