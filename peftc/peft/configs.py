"""PEFT's configs: mutable, with every field of their method's spec, which they become when they are used."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peftc.api import load_spec
from peftc.checkpoint import locate
from peftc.errors import SpecError
from peftc.peft.told import named, settle
from peftc.peft.types import VERSION, PeftType, PromptEncoderReparameterizationType, PromptTuningInit, TaskType
from peftc.prompts.specs import PromptSpec
from peftc.registry import spec_class_named, spec_classes
from peftc.specs import AdapterSpec
from peftc.specs.base import plain
from peftc.specs.io import CONFIG_NAME, absent

__all__ = ["PeftConfig", "PeftConfigMixin", "PromptLearningConfig", "get_peft_config"]

# As PEFT's documentation has it.
_MISSPELT = {"encoder_reprameterization_type": "encoder_reparameterization_type"}
# Fields that PEFT turns from lists into sets.
_SETS = ("target_modules", "exclude_modules", "feedforward_modules")
_VERSION = "peft_version"
# What fields that only inform have by default in PEFT, where that is not None.
_INFORMATIVE = {"megatron_core": "megatron.core", "qalora_group_size": 16}
_ENUMS = {
    "prompt_tuning_init": PromptTuningInit,
    "encoder_reparameterization_type": PromptEncoderReparameterizationType,
}


@dataclasses.dataclass
class PeftConfig:
    """What all configs have. `from_pretrained` gives the config of the folder's own method.

    Example: config = PeftConfig.from_pretrained("adapter"); config.base_model_name_or_path
    """

    task_type: Any = None
    peft_type: Any = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = VERSION
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.peft_type is not None:
            self.peft_type = PeftType(self.peft_type)
        if self.task_type is not None and self.task_type not in list(TaskType):
            valid = ", ".join(repr(member.value) for member in TaskType)
            raise SpecError(f"{type(self).__name__}.task_type: got {self.task_type!r}; valid are {valid}")
        for name in _SETS:
            value = getattr(self, name, None)
            if isinstance(value, list | tuple):
                setattr(self, name, set(cast("list[str]", value)))
        for name, kind in _ENUMS.items():
            value = getattr(self, name, None)
            if isinstance(value, str) and value.upper() in list(kind):
                setattr(self, name, kind(value))
        if type(self) is not PeftConfig:
            if isinstance(self.peft_type, PeftType):
                settle(self, _spec_class(self.peft_type))
            _check(self)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens."""
        return isinstance(self, PromptLearningConfig)

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is adaption prompt."""
        return self.peft_type == "ADAPTION_PROMPT"

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder, which is made if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(spec_of(self).to_dict(), indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """The config of a folder or a Hub repository, of the class of its method. `kwargs` that are no fields are
        options of the download. Raises CheckpointError, SpecError.
        """
        fields = {key: kwargs.pop(key) for key in list(kwargs) if key in all_fields() and key != "revision"}
        known = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        folder = locate(pretrained_model_name_or_path, subfolder, **{k: v for k, v in kwargs.items() if k in known})
        config = config_from(load_spec(folder))
        for name, value in fields.items():
            setattr(config, name, value)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields that a file holds."""
        return json.loads(Path(path_json_file).read_text())

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """The config of the class that `peft_type` says. Raises SpecError on an unknown one, TypeError on fields."""
        return config_class(_spec_class(kwargs.get("peft_type")))(**kwargs)


# PEFT's base class of the above; here it is the same.
PeftConfigMixin = PeftConfig


@dataclasses.dataclass
class PromptLearningConfig(PeftConfig):
    """What the configs of virtual tokens have in common."""

    num_virtual_tokens: Any = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None


def _check(config: PeftConfig) -> None:
    """Raise SpecError if a field is wrong that is given."""
    data = _given(config)
    if isinstance(config, PromptLearningConfig) and config.num_virtual_tokens is None:
        data["num_virtual_tokens"] = 1
    _spec_class(config.peft_type).from_dict(data)


def spec_of(config: Any) -> AdapterSpec:
    """The spec that a config, of here or of the package peft, is now. Raises SpecError, TypeError."""
    if isinstance(config, PeftConfig):
        return _spec_class(config.peft_type).from_dict(_given(config))
    if isinstance(config, AdapterSpec | Mapping) or callable(getattr(config, "to_dict", None)):
        return load_spec(config)
    raise TypeError(f"expected a PeftConfig, got {type(config).__name__}")


def as_config(config: Any) -> Any:
    """A spec as the config that it is here, which scripts ask and change; any other object as it is.

    Raises TypeError on dicts, of which PeftModels can't say later what they are.
    """
    if isinstance(config, Mapping):
        raise TypeError("expected a PeftConfig, got a dict: get_peft_config makes one of it")
    return config_from(config) if isinstance(config, AdapterSpec) else config


def _given(config: PeftConfig) -> dict[str, Any]:
    """The fields of the spec: without those that are only there to be asked for."""
    cls = _spec_class(config.peft_type)
    data = {key: plain(value) for key, value in vars(config).items()}
    other = cls.informative | set(cls.not_implemented)
    # None stands for the default, also where that is something; but for what is on, which it turns off.
    fields = {key: field for key, field in cls.model_fields.items() if data.get(key) is None}
    left = {key for key, field in fields.items() if not field.is_required() and field.default is not True}
    return {k: v for k, v in data.items() if k not in left and (k not in other or v != _off(cls, k))}


def _off(cls: type[AdapterSpec], key: str) -> Any:
    return {**_INFORMATIVE, **cls.not_implemented}.get(key)


def config_from(spec: AdapterSpec) -> Any:
    """The config of a spec."""
    cls = config_class(type(spec))
    known = {field.name for field in dataclasses.fields(cls)}
    data = {**spec.to_dict(), **(spec.model_extra or {})}
    config = cls(**{key: value for key, value in data.items() if key in known})
    vars(config).update({key: value for key, value in data.items() if key not in known})
    return config


def resolve(config: Any, spec: AdapterSpec) -> None:
    """Fill in what compiling has found out: default targets, sizes of prompts."""
    for key, value in spec.to_dict().items():
        if isinstance(config, PeftConfig) and key in vars(config) and vars(config)[key] is None:
            setattr(config, key, set(value) if key in _SETS and isinstance(value, list) else value)


def _spec_class(peft_type: Any) -> type[AdapterSpec]:
    name = str(plain(peft_type)).upper()
    classes = spec_classes()
    if name in absent():
        raise SpecError(f"peft_type={name!r} has no rule yet: {absent()[name]}.")
    if name not in classes:
        raise SpecError(f"peft_type={name!r}: peftc has the methods {', '.join(sorted(classes))}")
    return classes[name]


@functools.cache
def config_class(cls: type[AdapterSpec]) -> type[Any]:
    """The class of the configs of a spec class, of the same name."""
    base = PromptLearningConfig if issubclass(cls, PromptSpec) else PeftConfig
    inherited = {field.name for field in dataclasses.fields(base)}
    fields: list[tuple[str, Any, Any]] = []
    for name, field in cls.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
        if name not in inherited and not (base is PromptLearningConfig and name in cls.selectors):
            factory = functools.partial(_mutable, default)
            fields.append((name, Any, dataclasses.field(default_factory=factory)))
    others = {
        key: _off(cls, key) for key in (*sorted(cls.informative - {_VERSION, "enable_lora"}), *cls.not_implemented)
    }
    fields += [
        (name, Any, dataclasses.field(default_factory=functools.partial(_mutable, o))) for name, o in others.items()
    ]
    fields.append(("peft_type", Any, dataclasses.field(default=PeftType(cls.model_fields["peft_type"].default))))
    made: Any = dataclasses.make_dataclass(cls.__name__, fields, bases=(base,), namespace={"__doc__": cls.__doc__})
    made.__module__ = __name__
    init = made.__init__

    @functools.wraps(init)
    def documented(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{_MISSPELT.get(key, key): value for key, value in kwargs.items()})

    made.__init__ = documented
    return made


def _mutable(default: Any) -> Any:
    return plain(default) if isinstance(default, tuple | Mapping) else default


@functools.cache
def all_fields() -> frozenset[str]:
    """The names of the fields of all configs."""
    return frozenset(f.name for cls in spec_classes().values() for f in dataclasses.fields(config_class(cls)))


def get_peft_config(config_dict: Mapping[str, Any]) -> Any:
    """The config that a dict describes. Fields of older versions that are None are left out.

    Raises SpecError on an unknown `peft_type`, TypeError on unknown fields.
    """
    cls = config_class(_spec_class(config_dict.get("peft_type")))
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in config_dict.items() if key in known or value is not None})


def __getattr__(name: str) -> Any:
    """The configs of all registered methods by their names, and the classes that their fields are told in."""
    found = spec_class_named(name)
    if found is None and (told := named(name)) is not None:
        return told
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(found)
