"""Prompt methods: virtual tokens in front of the real ones, as embeddings or as cached keys and values."""

import warnings
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from peftc.errors import SpecError
from peftc.specs.base import AdapterSpec, plain

Count = Annotated[int, Field(gt=0)]


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


class PromptSpec(AdapterSpec):
    """What the prompt methods share: `num_virtual_tokens` rows are trained, the model itself is frozen.

    `token_dim`, `num_layers` and `num_attention_heads` are facts of the model: leave them out and they are read off it. A
    given `token_dim` must agree with it; for a prefix the other two as well (elsewhere they have no effect).
    `num_transformer_submodules`: 2 for SEQ_2_SEQ_LM (encoder and decoder), else 1.
    `task_type` is required when compiling: it says what becomes of labels, positions and heads.
    """

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


class PrefixTuningConfig(PromptSpec):
    """Trained keys and values before those of the tokens, in every layer. Li & Liang 2021, arXiv:2101.00190.

    `token_dim` and `num_attention_heads` are those of the keys (grouped-query attention has fewer heads).
    `prefix_projection` trains a two-layer MLP of width `encoder_hidden_size` (default: `token_dim`) that makes them.
    `init_weights="zero"` starts with keys and values of zero.
    """

    peft_type: Literal["PREFIX_TUNING"] = "PREFIX_TUNING"
    encoder_hidden_size: Count | None = None
    prefix_projection: bool = False
    init_weights: Literal["zero"] | None = None

    @property
    def rows(self) -> int:
        return self.num_virtual_tokens


class PromptTuningConfig(PromptSpec):
    """Trained embeddings before those of the tokens. Lester et al. 2021, arXiv:2104.08691.

    `prompt_tuning_init`: RANDOM (normal), SAMPLE_VOCAB (embeddings of random tokens), or TEXT: those of
    `prompt_tuning_init_text`, repeated or cut to length, by the tokenizer `tokenizer_name_or_path` (loaded with
    `tokenizer_kwargs`, but never with `trust_remote_code`).
    """

    peft_type: Literal["PROMPT_TUNING"] = "PROMPT_TUNING"
    prompt_tuning_init: Annotated[Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"], BeforeValidator(_upper)] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        text = self.prompt_tuning_init == "TEXT"
        for field in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if text and not getattr(self, field):
                raise ValueError(f"{field} is missing: prompt_tuning_init='TEXT' needs a text and the tokenizer for it")
        if self.tokenizer_kwargs and not text:
            raise ValueError(
                f"tokenizer_kwargs is for prompt_tuning_init='TEXT', not {self.prompt_tuning_init!r}; leave it out"
            )
        return self


class PromptEncoderConfig(PromptSpec):
    """p-tuning: embeddings made by a trained encoder. Liu et al. 2021, arXiv:2103.10385.

    `encoder_reparameterization_type`: MLP (three layers), or LSTM (bidirectional, of `encoder_num_layers` layers with
    `encoder_dropout` between them, then two layers). `encoder_hidden_size` is their width (default: `token_dim`).
    """

    peft_type: Literal["P_TUNING"] = "P_TUNING"
    encoder_reparameterization_type: Annotated[Literal["MLP", "LSTM"], BeforeValidator(_upper)] = "MLP"
    encoder_hidden_size: Count | None = None
    encoder_num_layers: Count = 2
    encoder_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if self.encoder_reparameterization_type == "MLP" and self.encoder_num_layers != 2:
            warnings.warn(
                f"PromptEncoderConfig.encoder_num_layers={self.encoder_num_layers} has no effect: the MLP always has three"
                " layers; it is for encoder_reparameterization_type='LSTM'",
                stacklevel=2,
            )
        return self
