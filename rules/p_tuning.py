"""p-tuning: embeddings before those of the tokens, made by a trained encoder."""

import warnings
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator
from torch import Tensor, nn

from peftc.prompts.calls import Stack
from peftc.prompts.rule import PromptRule
from peftc.prompts.specs import Count, PromptSpec, upper
from peftc.specs.selection import Share

from .prompt_tuning import PromptTuningConfig


class PromptEncoderConfig(PromptSpec):
    """p-tuning: embeddings made by a trained encoder. Liu et al. 2021, arXiv:2103.10385.

    `encoder_reparameterization_type`: MLP (three layers), or LSTM (bidirectional, of `encoder_num_layers` layers with
    `encoder_dropout` between them, then two layers). `encoder_hidden_size` is their width (default: `token_dim`).

    Example: PromptEncoderConfig(num_virtual_tokens=20, task_type="CAUSAL_LM", encoder_hidden_size=128)
    """

    peft_type: Literal["P_TUNING"] = "P_TUNING"
    encoder_reparameterization_type: Annotated[Literal["MLP", "LSTM"], BeforeValidator(upper)] = "MLP"
    encoder_hidden_size: Count | None = None
    encoder_num_layers: Count = 2
    encoder_dropout: Share = 0.0

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if self.encoder_reparameterization_type == "MLP" and self.encoder_num_layers != 2:
            warnings.warn(
                f"PromptEncoderConfig.encoder_num_layers={self.encoder_num_layers} has no effect: the MLP always has three"
                " layers; it is for encoder_reparameterization_type='LSTM'",
                stacklevel=2,
            )
        return self


class PromptEncoder(nn.Module):
    """Row numbers (batch, rows) → embeddings (batch, rows, token_dim).

    `embedding` holds what `lstm_head` (for LSTM: bidirectional) and `mlp_head` make the rows from; in `inference_mode`
    it holds the rows themselves, and there are no heads. Liu et al. 2021, arXiv:2103.10385, section 2.2.
    """

    def __init__(self, spec: PromptEncoderConfig) -> None:
        super().__init__()
        dim = spec.fact("token_dim")
        self.token_dim = self.input_size = self.output_size = dim
        self.hidden_size = hidden = spec.encoder_hidden_size or dim
        self.total_virtual_tokens = spec.rows
        self.encoder_type = spec.encoder_reparameterization_type
        self.embedding = nn.Embedding(spec.rows, dim)
        self.lstm_head: nn.LSTM | None = None
        self.mlp_head: nn.Sequential | None = None
        if spec.inference_mode:
            return
        if self.encoder_type == "LSTM":
            self.lstm_head = nn.LSTM(
                dim,
                hidden,
                num_layers=spec.encoder_num_layers,
                dropout=spec.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
            )

    def forward(self, indices: Tensor) -> Tensor:
        rows = self.embedding(indices)
        if self.lstm_head is not None:
            rows = self.lstm_head(rows)[0]
        return rows if self.mlp_head is None else self.mlp_head(rows)


class PTuning(PromptRule[PromptEncoderConfig]):
    """[h(P); E(x)] with trained P and encoder h.  Liu et al. 2021, arXiv:2103.10385, section 2.2."""

    name = "p_tuning"
    spec = PromptEncoderConfig
    at = "embeds"

    def resolve(self, spec: PromptEncoderConfig, stack: Stack) -> PromptEncoderConfig:
        spec = super().resolve(spec, stack)
        return spec.model_copy(update={"encoder_hidden_size": spec.encoder_hidden_size or spec.token_dim})

    def encoder(self, spec: PromptEncoderConfig) -> PromptEncoder:
        return PromptEncoder(spec)

    def folded(self, spec: PromptEncoderConfig) -> PromptTuningConfig:
        shared = set(PromptTuningConfig.model_fields) & set(PromptEncoderConfig.model_fields) - {"peft_type"}
        return PromptTuningConfig(**{name: getattr(spec, name) for name in shared})
