"""What the methods with embedded virtual tokens share: the facts they take from the model."""

from typing import Any, TypeVar

from peftc.graph.sites import Stack
from peftc.rule import PromptRule
from peftc.specs import PromptSpec

P = TypeVar("P", bound=PromptSpec)


class VirtualTokens(PromptRule[P]):
    """[P; E(x)] in place of E(x), where P has `rows` × `token_dim` elements."""

    at = "embeds"

    def resolve(self, spec: P, stack: Stack) -> P:
        submodules = 2 if stack.is_encoder_decoder and spec.task_type == "SEQ_2_SEQ_LM" else 1
        update: dict[str, Any] = {
            "token_dim": spec.token_dim or stack.token_dim,
            "num_transformer_submodules": spec.num_transformer_submodules or submodules,
            "num_attention_heads": spec.num_attention_heads or stack.num_attention_heads,
            "num_layers": spec.num_layers or stack.num_layers,
        }
        return spec.model_copy(update=update)

    def disagreement(self, spec: P, stack: Stack) -> str | None:
        if spec.token_dim != stack.token_dim:
            return f"token_dim={spec.token_dim} contradicts the model, which embeds in {stack.token_dim}; leave it out"
        if spec.num_transformer_submodules == 2 and not stack.is_encoder_decoder:
            return "num_transformer_submodules=2 is for encoder-decoder models; leave it out"
        if not stack.embedding:
            return "its get_input_embeddings() gives no embedding with a weight (vocabulary, width)"
        return None

    def width(self, spec: P) -> int:
        return spec.fact("token_dim")
