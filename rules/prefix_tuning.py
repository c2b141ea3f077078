"""Prefix tuning: trained keys and values before those of the tokens, in every layer."""

from typing import Literal, TypeVar

from torch import Tensor, nn

from peftc.prompts.calls import Stack
from peftc.prompts.rule import PromptRule
from peftc.prompts.specs import Count, PromptSpec

P = TypeVar("P", bound=PromptSpec)


class PrefixTuningConfig(PromptSpec):
    """Trained keys and values before those of the tokens, in every layer. Li & Liang 2021, arXiv:2101.00190.

    `token_dim` and `num_attention_heads` are those of the keys (grouped-query attention has fewer heads).
    `prefix_projection` trains a two-layer MLP of width `encoder_hidden_size` (default: `token_dim`) that makes them.
    `init_weights="zero"` starts with keys and values of zero.

    Example: PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    """

    peft_type: Literal["PREFIX_TUNING"] = "PREFIX_TUNING"
    encoder_hidden_size: Count | None = None
    prefix_projection: bool = False
    init_weights: Literal["zero"] | None = None

    @property
    def rows(self) -> int:
        return self.num_virtual_tokens


class PrefixEncoder(nn.Module):
    """Row numbers (batch, num_virtual_tokens) → keys and values (batch, num_virtual_tokens, num_layers·2·token_dim).

    `embedding` holds the rows; with `prefix_projection` (and outside `inference_mode`) it is `token_dim` wide, and
    `transform`, a two-layer MLP with tanh, makes the rows from it. Li & Liang 2021, section 4.3.
    """

    def __init__(self, spec: PrefixTuningConfig) -> None:
        super().__init__()
        dim, layers, rows = spec.fact("token_dim"), spec.fact("num_layers"), spec.num_virtual_tokens
        self.prefix_projection = spec.prefix_projection and not spec.inference_mode
        self.embedding = nn.Embedding(rows, dim if self.prefix_projection else layers * 2 * dim)
        self.transform: nn.Sequential | None = None
        if self.prefix_projection:
            hidden = spec.encoder_hidden_size or dim
            self.transform = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, layers * 2 * dim))
        last = self.transform[-1] if self.transform is not None else self.embedding
        if spec.init_weights == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, prefix: Tensor) -> Tensor:
        rows = self.embedding(prefix)
        return rows if self.transform is None else self.transform(rows)


class KeysAndValues(PromptRule[P]):
    """What goes before the keys and values of the tokens, in every layer."""

    at = "past"

    def resolve(self, spec: P, stack: Stack) -> P:
        keys = {
            "token_dim": spec.token_dim or stack.key_value_heads * stack.head_dim,
            "num_attention_heads": spec.num_attention_heads or stack.key_value_heads,
        }
        return super().resolve(spec.model_copy(update=keys), stack)

    def disagreement(self, spec: P, stack: Stack) -> str | None:
        width = stack.key_value_heads * stack.head_dim
        if stack.no_past:
            return f"no prefix fits into its cache: {stack.no_past}. Prompt tuning or p-tuning would do."
        if (spec.token_dim, spec.num_attention_heads) != (width, stack.key_value_heads):
            return (
                f"token_dim={spec.token_dim} with num_attention_heads={spec.num_attention_heads} contradicts the model,"
                f" whose keys are {stack.key_value_heads} heads × {stack.head_dim} = {width} wide; leave both out"
            )
        if spec.num_layers != stack.num_layers and not stack.is_encoder_decoder:
            return f"num_layers={spec.num_layers} contradicts the model, which has {stack.num_layers}; leave it out"
        return super().disagreement(spec, stack)


class PrefixTuning(KeysAndValues[PrefixTuningConfig]):
    """softmax(q [K_p; K]ᵀ) [V_p; V] with trained K_p, V_p.  Li & Liang 2021, arXiv:2101.00190, section 4.2."""

    name, spec = "prefix_tuning", PrefixTuningConfig

    def resolve(self, spec: PrefixTuningConfig, stack: Stack) -> PrefixTuningConfig:
        spec = super().resolve(spec, stack)
        width = spec.encoder_hidden_size or spec.token_dim
        return spec.model_copy(update={"encoder_hidden_size": width}) if spec.prefix_projection else spec

    def encoder(self, spec: PrefixTuningConfig) -> PrefixEncoder:
        return PrefixEncoder(spec)

    def folded(self, spec: PrefixTuningConfig) -> PrefixTuningConfig:
        return spec.model_copy(update={"prefix_projection": False})
