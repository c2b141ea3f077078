"""Prompt tuning: trained embeddings before those of the tokens."""

import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, model_validator
from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.prompts.rule import PromptRule
from peftc.prompts.specs import PromptSpec, upper


class PromptTuningConfig(PromptSpec):
    """Trained embeddings before those of the tokens. Lester et al. 2021, arXiv:2104.08691.

    `prompt_tuning_init`: RANDOM (normal), SAMPLE_VOCAB (embeddings of random tokens), or TEXT: those of
    `prompt_tuning_init_text`, repeated or cut to length, by the tokenizer `tokenizer_name_or_path` (loaded with
    `tokenizer_kwargs`, but never with `trust_remote_code`).

    Example: PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    """

    peft_type: Literal["PROMPT_TUNING"] = "PROMPT_TUNING"
    prompt_tuning_init: Annotated[Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"], BeforeValidator(upper)] = "RANDOM"
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


class PromptEmbedding(nn.Module):
    """Row numbers (batch, rows) → embeddings (batch, rows, token_dim), which `embedding` holds."""

    def __init__(self, spec: PromptTuningConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.rows, spec.fact("token_dim"))

    def forward(self, indices: Tensor) -> Tensor:
        return self.embedding(indices)


class PromptTuning(PromptRule[PromptTuningConfig]):
    """[P; E(x)] with trained P.  Lester et al. 2021, arXiv:2104.08691, section 2."""

    name = "prompt_tuning"
    spec = PromptTuningConfig
    at = "embeds"

    def encoder(self, spec: PromptTuningConfig) -> PromptEmbedding:
        return PromptEmbedding(spec)

    def start(
        self, encoder: nn.Module, spec: PromptTuningConfig, embed: Callable[[Tensor], Tensor], vocab_size: int
    ) -> None:
        if spec.prompt_tuning_init == "RANDOM":
            return
        text = spec.prompt_tuning_init == "TEXT"
        ids = _text_ids(spec) if text else torch.randint(0, vocab_size, (spec.rows,))
        if int(ids.max()) >= vocab_size:
            raise AdapterError(
                f"PromptTuningConfig.tokenizer_name_or_path: {spec.tokenizer_name_or_path!r} gives token {int(ids.max())},"
                f" the model embeds {vocab_size}; is it the model's own tokenizer?"
            )
        weight = encoder.get_parameter("embedding.weight")
        weight.copy_(embed(ids))


def _text_ids(spec: PromptTuningConfig) -> Tensor:
    """The token ids of the text, repeated or cut to the number of rows."""
    from transformers import AutoTokenizer

    options = dict(spec.tokenizer_kwargs or {})
    if options.pop("trust_remote_code", None):
        warnings.warn("tokenizer_kwargs: trust_remote_code is ignored; no code named by a spec is run", stacklevel=2)
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.tokenizer_name_or_path, **options)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise AdapterError(
            f"PromptTuningConfig.tokenizer_name_or_path: no tokenizer can be loaded from {spec.tokenizer_name_or_path!r}:"
            f" {str(error).partition(chr(10))[0]}"
        ) from None
    ids: list[int] = tokenizer(spec.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise AdapterError(
            f"PromptTuningConfig.prompt_tuning_init_text: {spec.prompt_tuning_init_text!r} has no tokens"
        )
    return torch.tensor(ids).repeat(-(-spec.rows // len(ids)))[: spec.rows]
