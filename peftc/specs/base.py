"""The fields every adapter spec has, and how a wrong one is reported."""

import dataclasses
import enum
import re
from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from peftc.errors import SpecError, nearest, nearest_hint
from peftc.specs.pattern import Pattern

TaskType = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
# Which biases of the base an adapter trains: those of its sites, or all.
TrainedBiases = Literal["none", "all", "adapted"]

# The heads that a task trains beside the adapter, as PEFT's task models do.
TASK_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def plain(value: Any) -> Any:
    """`value` in terms JSON has: enum members as their values, sets as sorted lists, dataclasses by their fields."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in cast(Iterable[Any], value)), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast(Iterable[Any], value)]
    return value


def _as_tuple(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    items = cast("list[Any]", value)
    # What can't be in a list of names is left for the error to show.
    return tuple(dict.fromkeys(items) if all(isinstance(item, str | int) for item in items) else items)


def _as_targets(value: Any) -> Any:
    return Pattern.read(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else _as_tuple(value)


def _one_as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) and not isinstance(value, bool) else _as_tuple(value)


def require_regex(field: str, text: str, template: str = "{}") -> None:
    """Raise ValueError if `text`, set into the `template` it will be used in, is not a regular expression."""
    try:
        re.compile(template.format(text))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{field}: {text!r} is not a regular expression: {error}") from None


Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_as_tuple)]
OneOrMoreNames = Annotated[tuple[Name, ...], BeforeValidator(_one_as_tuple)]
LayerIndices = Annotated[tuple[int, ...], BeforeValidator(_one_as_tuple)]
Selector = Annotated[Name | Names, BeforeValidator(_as_tuple)]
Targets = Annotated[Name | Names | Pattern, BeforeValidator(_as_targets)]


class AdapterSpec(BaseModel):
    """What one adapter changes. Frozen; a PEFT `adapter_config.json` is a spec.

    `target_modules`: a list of names (a module matches if its fqn equals a name or ends with `"." + name`), one string
    (a regular expression that must match the whole fqn, or `"all-linear"`), a `Pattern` over the dataflow of a program
    (`capture="export"` or `"symbolic"`), or None for the defaults of the model type.
    `exclude_modules` is matched the same way and wins. `modules_to_save`: modules trained and saved whole.
    Keys that peftc does not know are kept in `model_extra` and written back.

    Example: peftc.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], exclude_modules=["lm_head"])

    Raises SpecError, naming the field, the value and the nearest valid ones.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", protected_namespaces=(), allow_inf_nan=False)

    # PEFT fields that peftc does not implement, with the value that means "off". Another value is refused.
    not_implemented: ClassVar[Mapping[str, Any]] = {}
    # What to do instead of some of these.
    closest: ClassVar[Mapping[str, str]] = {}
    # Fields PEFT writes that only inform.
    informative: ClassVar[frozenset[str]] = frozenset({"peft_version"})
    # Fields that select modules; one that is None has a default for the model's architecture, if it is in `defaulted`.
    selectors: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules")
    defaulted: ClassVar[tuple[str, ...]] = ("target_modules",)
    # Fields of its own that are named like one that the engine serves, and mean something else.
    apart: ClassVar[frozenset[str]] = frozenset()
    # The method whose default selectors are this one's too, where a family of models has none for it.
    defaults_of: ClassVar[str | None] = None
    # Whether PEFT's config of the method has `exclude_modules`; where not, files name the modules that are left.
    excludes: ClassVar[bool] = True
    # Whether the default of `target_modules` is the model's input embedding.
    on_embedding: ClassVar[bool] = False
    # Of specs that belong to others: what keys of files have between the name of a module and those of its tensors.
    kept_in: ClassVar[str | None] = None
    # What the keys of files begin with.
    key_prefix: ClassVar[str] = "base_model.model."

    peft_type: Any
    task_type: TaskType | None = None
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    target_modules: Targets | None = None
    exclude_modules: Selector | None = None
    modules_to_save: Names | None = None

    def __init__(self, **data: Any) -> None:
        name = type(self).__name__
        if "peft_type" not in data and "peft_type" in type(self).model_fields:
            data = {"peft_type": type(self).model_fields["peft_type"].default, **data}
        try:
            super().__init__(**plain(data))
        except ValidationError as error:
            # That a value is no pattern either says nothing to who has misspelt a name.
            items = [item for item in error.errors() if "Pattern" not in item["loc"]]
            raise SpecError(f"{name}: " + "; ".join(_explain(type(self), item) for item in items)) from None
        for key in self.unknown_keys:
            hint = nearest_hint(key, type(self).model_fields, 3)
            raise SpecError(
                f"{name}.{key}: no such field.{hint} Use {name}.from_dict(...) to keep keys peftc does not know."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A spec from the contents of an `adapter_config.json`; unknown keys are kept, see `unknown_keys`."""
        known = {key: value for key, value in data.items() if key in cls._all_keys()}
        extra = {key: plain(value) for key, value in data.items() if key not in known}
        return cls(**known).model_copy(update=extra)

    @model_validator(mode="before")
    @classmethod
    def _none_is_off(cls, data: dict[str, Any]) -> dict[str, Any]:
        """What is on by default is off if it is None (`"init_lora_weights": null`), as in PEFT."""
        fields = {name: cls.model_fields[name] for name in cls.model_fields.keys() & data if data[name] is None}
        off = [n for n, field in fields.items() if field.default is True and NoneType not in get_args(field.annotation)]
        return {**data, **dict.fromkeys(off, False)}

    @classmethod
    def _all_keys(cls) -> set[str]:
        return set(cls.model_fields) | set(cls.not_implemented) | cls.informative

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """Keys of the source that peftc does not know; kept, but without effect."""
        return tuple(key for key in (self.model_extra or {}) if key not in self._all_keys())

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in self.selectors:
            selector = getattr(self, field)
            if isinstance(selector, str):
                require_regex(field, selector)
        for key, off in self.not_implemented.items():
            value = (self.model_extra or {}).get(key, off)
            if value != off and value:
                near = self.closest.get(key)
                hint = "" if near is None else f". What comes closest: {near}"
                raise ValueError(
                    f"{key}={value!r} is not implemented; leave it at {off!r} (it would change the result){hint}"
                )
        return self

    @property
    def trained_biases(self) -> TrainedBiases:
        """Which biases of the base model are trained with this adapter: as `bias` says, where the method has that field."""
        value = str(vars(self).get("bias", "none"))
        return "adapted" if value.endswith("_only") else cast(TrainedBiases, value)

    def companions(self) -> Mapping[str, tuple["AdapterSpec", ...]]:
        """Specs, of other methods too, that belong to this one, by the field that asks for them: one adapter has it all."""
        return {}

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The spec for a model that calls modules otherwise which its companions name."""
        return self

    @property
    def ties_bind(self) -> bool:
        """Whether it is an error if an end of a tie can't follow another one (see `Rule.replaces_rows`)."""
        return False

    @property
    def ties_targets(self) -> bool:
        """Whether the input embedding is adapted, or saved whole, in one with what is tied to it, if either is."""
        return False

    def respelled(self, names: Mapping[str, str]) -> Self:
        """The spec for a model that calls the adapted modules otherwise: `names` has the new names by the old ones."""
        update: dict[str, Any] = {"target_modules": tuple(names.values()), "exclude_modules": None}
        return self.model_copy(update=update)

    @property
    def goes_by_plain_names(self) -> bool:
        """Whether nothing but the ends of names decides what is adapted, and how."""
        targets = self.target_modules
        return not self.exclude_modules and (isinstance(targets, tuple) or targets == "all-linear")

    @property
    def named_targets(self) -> str | tuple[str, ...]:
        """`target_modules` as names; a pattern has none before a plan says which it stands for."""
        return () if self.target_modules is None or isinstance(self.target_modules, Pattern) else self.target_modules

    @property
    def heads(self) -> tuple[str, ...]:
        """Modules that `task_type` adds to `modules_to_save` where the model has them."""
        return TASK_HEADS.get(self.task_type or "", ())

    def on_model(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        """This spec and the tensors of its file as an adapter of `model` has them, where the file is of an older model."""
        return self, tensors

    def reshaped(self, model: nn.Module) -> nn.Module:
        """The model that adapters of this spec are put on: `model`, or a copy with other modules, which share its tensors,
        that knows that it is one. Raises SpecError.
        """
        return model

    def scaled(self, factor: float) -> Self:
        """The spec of an adapter that changes the base `factor` times as much. Raises SpecError if the method has none."""
        raise SpecError(f"{type(self).__name__} has no field that scales the adapter")

    def to_dict(self) -> dict[str, Any]:
        """The spec in JSON terms, as `adapter_config.json` holds it."""
        return plain(self.model_dump())


def _explain(cls: type[AdapterSpec], item: Any) -> str:
    """One pydantic error as `field: value: why, what is valid`."""
    path = [part for part in item["loc"] if part not in ("str", "int", "float", "bool", "tuple[str, ...]")]
    field = ".".join(str(part) for part in path if not str(part).startswith(("function-", "constrained-", "literal[")))
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{field}: no such field"
    if not field:
        return message
    if item["type"] == "missing":
        return f"{field} is missing; give it"
    value = item["input"]
    text = f"{field}: got {value!r}; {message[0].lower()}{message[1:]}"
    if item["type"] == "literal_error" and isinstance(value, str):
        options = re.findall(r"'([^']+)'", str(item["ctx"]["expected"]))
        near = nearest(value, options) or nearest(value.upper(), options) or nearest(value.lower(), options)
        text += f" (nearest: {near[0]!r})" if near else ""
    if isinstance(value, str) and re.fullmatch(r"\d+", value) and item["type"] in ("int_type", "float_type"):
        text += f" (did you mean {value}, without quotes?)"
    if isinstance(value, str) and item["type"] == "tuple_type" and _holds_names(cls, field):
        text = f"{field}: got {value!r}; give a list of names (did you mean [{value!r}]?)"
    return text


def _holds_names(cls: type[AdapterSpec], field: str) -> bool:
    annotation = cls.model_fields[field].annotation if field in cls.model_fields else None
    return Names in (annotation, *get_args(annotation))
