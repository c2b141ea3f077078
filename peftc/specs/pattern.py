"""Patterns over the dataflow of a model: which ops are meant, by themselves and by what is around them. Plain data."""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_serializer

from peftc.errors import SpecError

# A size that is ly that, or from one to another; None is open.
Size = int | tuple[int | None, int | None]


class Pattern(BaseModel):
    """An op, and what is around it. All that is given must hold; an empty pattern is any node. Frozen.

    `op`: a row of the table of ops ("linear", "embedding"), or the name of a function ("silu",
    "scaled_dot_product_attention"). `name`: a regular expression that the whole fqn of the weight matches. `dims`,
    `in_features`, `out_features`: of its weight, sizes as a number or (least, most). `made_by`: "model", or "adapter" for
    what edits have inserted.

    Around it, each a pattern or several of which one must hold: `input`, what gives its input, directly; `follows`, what
    is before it, and `feeds`, what is after it, with no other matrix between; `beside`, another node with the same input.
    `operand`, in `feeds`: as which operand of that node the value arrives. For `feeds` there are names: "attention.query",
    "attention.key", "attention.value" (of fused attention, or of products around a softmax).

    Example: peftc.LoraConfig(target_modules=peftc.Pattern(op="linear", feeds="attention.query"))

    Raises SpecError.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    op: str | None = None
    name: str | None = None
    dims: int | None = None
    in_features: Size | None = None
    out_features: Size | None = None
    made_by: Literal["model", "adapter"] | None = None
    operand: int | None = None
    input: tuple["Pattern", ...] = ()
    follows: tuple["Pattern", ...] = ()
    feeds: tuple["Pattern", ...] = ()
    beside: tuple["Pattern", ...] = ()

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            told = [f"{'.'.join(map(str, one['loc']))}: got {one['input']!r}; {one['msg']}" for one in error.errors()]
            raise SpecError(f"Pattern: {'; '.join(told)}") from None

    @field_validator("name")
    @classmethod
    def _is_regex(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return value

    @field_validator("in_features", "out_features", mode="before")
    @classmethod
    def _as_range(cls, value: Any) -> Any:
        return tuple(cast("list[Any]", value)) if isinstance(value, list) else value

    @field_validator("input", "follows", "feeds", "beside", mode="before")
    @classmethod
    def _as_patterns(cls, value: Any) -> Any:
        given: list[Any] = list(cast("Any", value)) if isinstance(value, list | tuple) else [value]
        found: list[Any] = []
        for one in given:
            found += _NAMED[one] if isinstance(one, str) and one in _NAMED else [_made(one)]
        return tuple(found)

    @property
    def needs_dataflow(self) -> bool:
        """Whether it says anything that modules alone don't."""
        return bool(self.input or self.follows or self.feeds or self.beside or self.made_by or self.operand is not None)

    @model_serializer
    def to_dict(self) -> dict[str, Any]:
        """What is given, in JSON terms; `Pattern(**data)` is the pattern again."""
        found: dict[str, Any] = {}
        for field in type(self).model_fields:
            value = getattr(self, field)
            if field in ("input", "follows", "feeds", "beside"):
                value = [one.to_dict() for one in value]
            if value not in (None, []):
                found[field] = list(cast("Any", value)) if isinstance(value, tuple) else value
        return found

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """The pattern of `to_dict`'s terms. Raises SpecError."""
        return cls(**data)

    def __str__(self) -> str:
        return f"Pattern({', '.join(f'{key}={value!r}' for key, value in self.to_dict().items())})"

    __repr__ = __str__


def _made(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Pattern(**cast("Mapping[str, Any]", value))
    if isinstance(value, str):
        raise ValueError(f"{value!r} is no name of a place; there are {', '.join(_NAMED)}")
    return value


_FUSED, _SOFTMAX = "scaled_dot_product_attention", Pattern(op="softmax")
# What the places in an attention are, in its two forms.
_NAMED: Mapping[str, tuple[Pattern, ...]] = {
    "attention.query": (Pattern(op=_FUSED, operand=0), Pattern(op="matmul", operand=0, feeds=_SOFTMAX)),
    "attention.key": (Pattern(op=_FUSED, operand=1), Pattern(op="matmul", operand=1, feeds=_SOFTMAX)),
    "attention.value": (Pattern(op=_FUSED, operand=2), Pattern(op="matmul", operand=1, follows=_SOFTMAX)),
}
