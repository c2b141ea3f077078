"""Cartridges: trained keys and values in front of every layer's, of which the first stay as they are."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftc.prompts.specs import PromptSpec

from .prefix_tuning import KeysAndValues


class CartridgeConfig(PromptSpec):
    """A cache of keys and values that is trained to stand for a text. Eyuboglu et al. 2025, arXiv:2506.06266.

    Of the `num_virtual_tokens` the first `num_frozen_tokens` are not trained: language models lean on their first tokens.
    It should begin with the keys and values of the text itself (`peftc.peft.initialize_kv_prefix_from_text`); without, it
    begins at random. The other fields are as of PrefixTuningConfig.

    Example: CartridgeConfig(num_virtual_tokens=512, num_frozen_tokens=1, task_type="CAUSAL_LM")
    """

    peft_type: Literal["CARTRIDGE"] = "CARTRIDGE"
    num_frozen_tokens: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _check_frozen(self) -> Self:
        if self.num_frozen_tokens > self.num_virtual_tokens:
            raise ValueError(
                f"num_frozen_tokens={self.num_frozen_tokens} is more than the num_virtual_tokens={self.num_virtual_tokens}"
                " that there are"
            )
        return self

    @property
    def rows(self) -> int:
        return self.num_virtual_tokens


class CartridgeEncoder(nn.Module):
    """Row numbers (batch, num_virtual_tokens) → keys and values (batch, num_virtual_tokens, num_layers·2·token_dim).

    `frozen_embedding` holds the first rows, `trainable_embedding` the others; in `inference_mode` `embedding` holds all.
    """

    def __init__(self, spec: CartridgeConfig) -> None:
        super().__init__()
        width, frozen = spec.fact("num_layers") * 2 * spec.fact("token_dim"), spec.num_frozen_tokens
        self.embedding = nn.Embedding(spec.rows, width) if spec.inference_mode else None
        self.frozen_embedding: nn.Parameter | None = None
        if self.embedding is not None:
            return
        if frozen:
            self.frozen_embedding = nn.Parameter(torch.randn(frozen, width), requires_grad=False)
        self.trainable_embedding = nn.Parameter(torch.randn(spec.rows - frozen, width))

    def forward(self, indices: Tensor) -> Tensor:
        if self.embedding is not None:
            return self.embedding(indices)
        own = self.trainable_embedding
        return (own if self.frozen_embedding is None else torch.cat([self.frozen_embedding, own]))[indices]


class Cartridge(KeysAndValues[CartridgeConfig]):
    """softmax(q [K_f; K_p; K]ᵀ) [V_f; V_p; V] with trained K_p, V_p.  Eyuboglu et al. 2025, arXiv:2506.06266, section 3."""

    name, spec = "cartridge", CartridgeConfig

    def encoder(self, spec: CartridgeConfig) -> CartridgeEncoder:
        return CartridgeEncoder(spec)

    def held(self, spec: CartridgeConfig, rows: Tensor) -> Mapping[str, Tensor]:
        frozen = spec.num_frozen_tokens
        own = {"trainable_embedding": rows[frozen:]}
        return {"frozen_embedding": rows[:frozen], **own} if frozen else own
