"""Prompt methods: virtual tokens in front of the real ones, as embeddings or as cached keys and values."""

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from peftc.errors import SpecError
from peftc.specs.base import AdapterSpec, plain
from peftc.specs.selection import Count


def upper(value: Any) -> Any:
    """Names in capitals, as PEFT accepts them in any case."""
    return value.upper() if isinstance(value, str) else value


class PromptSpec(AdapterSpec):
    """What the prompt methods share: `num_virtual_tokens` rows are trained, the model itself is frozen.

    `token_dim`, `num_layers` and `num_attention_heads` are facts of the model: leave them out and they are read off it. A
    given `token_dim` must agree with it; for a prefix the other two as well (elsewhere they have no effect).
    `num_transformer_submodules`: 2 for SEQ_2_SEQ_LM (encoder and decoder), else 1.
    `task_type` is required when compiling: it says what becomes of labels, positions and heads.

    Example: peftc.PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    """

    key_prefix: ClassVar[str] = "base_model."

    num_virtual_tokens: Count
    token_dim: Count | None = None
    num_transformer_submodules: Literal[1, 2] | None = None
    num_attention_heads: Count | None = None
    num_layers: Count | None = None

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        for field in ("target_modules", "exclude_modules"):
            if getattr(self, field) is not None:
                raise ValueError(f"{field}: prompt methods change the model's call, not modules of it; leave it out")
        return self

    def to_dict(self) -> dict[str, Any]:
        return plain(self.model_dump(exclude={"target_modules", "exclude_modules"}))

    def fact(self, field: str) -> int:
        """A field that was given, or read off the model when compiling. Raises SpecError if it is still open."""
        value = getattr(self, field)
        if value is None:
            raise SpecError(f"{type(self).__name__}.{field} is not known before compiling; give it")
        return value

    @property
    def rows(self) -> int:
        """Rows of `prompt_embeddings`: `num_virtual_tokens` for every transformer that has embeddings."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)
