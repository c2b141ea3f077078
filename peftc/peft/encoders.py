"""PEFT's modules that make virtual tokens, usable alone: those that the methods' rules make."""

from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.peft.configs import spec_of
from peftc.prompts.rule import PromptRule
from peftc.registry import rules_of

__all__ = [
    "CPTEmbedding",
    "CartridgeEncoder",
    "MultitaskPromptEmbedding",
    "PrefixEncoder",
    "PromptEmbedding",
    "PromptEncoder",
]


class _Made(type):
    """The class of classes whose instances are what a rule makes under the same name."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, nn.Module) and type(instance).__name__ == cls.__name__


class PromptEncoder(metaclass=_Made):
    """p-tuning's encoder: row numbers (batch, rows) → embeddings (batch, rows, token_dim).

    `embedding`, and `mlp_head` or `lstm_head` unless the config is for inference.

    Example: PromptEncoder(PromptEncoderConfig(num_virtual_tokens=20, token_dim=768, encoder_hidden_size=768))
    """

    def __new__(cls, config: Any) -> Any:
        """Raises SpecError if the config lacks a size."""
        encoder, spec = _made(config)
        encoder.token_dim = encoder.input_size = encoder.output_size = spec.token_dim
        encoder.hidden_size = spec.encoder_hidden_size or spec.token_dim
        encoder.total_virtual_tokens = spec.rows
        encoder.encoder_type = spec.encoder_reparameterization_type
        return encoder


class PrefixEncoder(metaclass=_Made):
    """Prefix tuning's encoder: row numbers (batch, rows) → keys and values (batch, rows, 2 · layers · token_dim).

    Example: PrefixEncoder(PrefixTuningConfig(num_virtual_tokens=20, token_dim=768, num_layers=12))
    """

    def __new__(cls, config: Any) -> Any:
        """Raises SpecError if the config lacks a size."""
        return _made(config)[0]


class CartridgeEncoder(PrefixEncoder):
    """A cartridge's rows, the first of them frozen: as PrefixEncoder's.

    Example: CartridgeEncoder(CartridgeConfig(num_virtual_tokens=20, token_dim=768, num_layers=12))
    """


class PromptEmbedding(metaclass=_Made):
    """Prompt tuning's rows: row numbers (batch, rows) → embeddings (batch, rows, token_dim).

    `word_embeddings`: the base's, which the rows may start from.

    Example: PromptEmbedding(PromptTuningConfig(num_virtual_tokens=20, token_dim=768), model.get_input_embeddings())
    """

    def __new__(cls, config: Any, word_embeddings: Any) -> Any:
        """Raises SpecError if the config lacks a size, AdapterError if its tokenizer can't be loaded, or sizes differ."""
        encoder, spec = _made(config)
        rule = _rule(spec)

        def embed(ids: Tensor) -> Tensor:
            rows = word_embeddings(ids.to(word_embeddings.weight.device)).detach()
            if rows.shape[-1] != spec.token_dim:
                raise AdapterError(
                    f"{type(spec).__name__}.token_dim={spec.token_dim}: the word embeddings are {rows.shape[-1]} wide"
                )
            return rows

        with torch.no_grad():
            rule.start(encoder, spec, embed, word_embeddings.weight.shape[0])
        return encoder


class CPTEmbedding(PromptEmbedding):
    """Context-aware prompt tuning's rows: examples' embeddings, and how far each is moved. As PromptEmbedding's."""


class MultitaskPromptEmbedding(PromptEmbedding):
    """Multitask prompt tuning's rows: numbers (1, rows) and `task_ids` (batch,) → embeddings (batch, rows, token_dim)."""


def _rule(spec: Any) -> PromptRule[Any]:
    return next(rule for rule in rules_of(spec) if isinstance(rule, PromptRule))


def _made(config: Any) -> tuple[Any, Any]:
    """The encoder of a config, and its spec."""
    spec: Any = spec_of(config)
    return _rule(spec).encoder(spec), spec
