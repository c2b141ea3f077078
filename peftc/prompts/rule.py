"""The contract of prompt methods: a module that makes rows, and where these enter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from peftc.errors import RuleError
from peftc.prompts.calls import Stack
from peftc.prompts.specs import PromptSpec
from peftc.rule import Constant, Rule

# The child of a call's module that holds the encoders, by adapter name, as in PEFT.
PROMPT_ENCODER = "prompt_encoder"
P = TypeVar("P", bound=PromptSpec)


# What only rules have that adapt weights.
_OF_WEIGHTS = (
    *("params", "shared", "placed", "dropouts", "check", "cannot_fold", "initialise", "gather", "draw", "calibration"),
    *("weight", "bias", "input", "output", "factors", "unfold", "read_shape", "begins"),
)


class PromptRule(Rule[P]):
    """A method that puts trained virtual tokens into a model's call; register it as any rule.

    `at` says where: `embeds`, before the embedded tokens, or `past`, as cached keys and values. The tensors come from
    an encoder, a plain module: called with the row numbers (1, rows) it returns the rows (1, rows, width). The engine
    does the rest: masks, labels, positions, caches. Saved is what the encoder returns, as `prompt_embeddings`.

    Where the rule takes `arguments` of the call for every row, it gets them by name, (batch,), and returns rows for each,
    (batch, rows, width); saved are its tensors, `embedding.weight` as `prompt_embeddings`, others by their own names.

    Example::

        class Table(PromptRule[TableConfig]):
            name, spec, at = "table", TableConfig, "embeds"

            def encoder(self, spec):
                return nn.Embedding(spec.rows, spec.fact("token_dim"))
    """

    ops = ("call",)
    container = PROMPT_ENCODER
    at: ClassVar[Literal["embeds", "past"]]

    @property
    def asked(self) -> list[str]:
        """The arguments of the call that the encoder takes."""
        return [name for name, one in self.arguments.items() if one.each == "row"]

    def loss(self, logits: Tensor, labels: Tensor, given: Mapping[str, Tensor], p: Any) -> Tensor:
        """The loss instead of the model's own, at `embeds`: of `logits` (batch, rows + tokens, vocabulary) and the `labels`
        (batch, tokens) of the call. `given`: arguments of the call for every token, (batch, tokens); `p`: the constants.
        """
        raise NotImplementedError

    def resolve(self, spec: P, stack: Stack) -> P:
        """`spec` with what it leaves open read off the model."""
        halves = 2 if stack.is_encoder_decoder and spec.task_type == "SEQ_2_SEQ_LM" else 1
        facts = {
            "token_dim": stack.token_dim,
            "num_transformer_submodules": halves,
            "num_attention_heads": stack.num_attention_heads,
            "num_layers": stack.num_layers,
        }
        return spec.model_copy(update={name: value for name, value in facts.items() if getattr(spec, name) is None})

    def disagreement(self, spec: P, stack: Stack) -> str | None:
        """Why a resolved `spec` does not fit the model, or None."""
        if spec.num_transformer_submodules == 2 and not stack.is_encoder_decoder:
            return "num_transformer_submodules=2 is for encoder-decoder models; leave it out"
        if self.at == "embeds" and spec.token_dim != stack.token_dim:
            return f"token_dim={spec.token_dim} contradicts the model, which embeds in {stack.token_dim}; leave it out"
        if self.at == "embeds" and not stack.embedding:
            return "its get_input_embeddings() gives no embedding with a weight (vocabulary, width)"
        return None

    def width(self, spec: P) -> int:
        """The width of a row: `token_dim` at `embeds`; at `past` a key and a value of that width for every layer."""
        return spec.fact("token_dim") * (1 if self.at == "embeds" else 2 * spec.fact("num_layers"))

    def encoder(self, spec: P) -> nn.Module:
        """The encoder of a resolved `spec`; with `inference_mode`, one `embedding` that holds the rows themselves, unless
        they depend on the call.
        """
        raise NotImplementedError

    def held(self, spec: P, rows: Tensor) -> Mapping[str, Tensor] | None:
        """The tensors, by name, of an encoder that returns these `rows`; None if they don't follow from them."""
        return None

    def start(self, encoder: nn.Module, spec: P, embed: Callable[[Tensor], Tensor], vocab_size: int) -> None:
        """Initialise a fresh `encoder` further. `embed` gives the model's embeddings (n, token_dim) of n token ids."""

    def folded(self, spec: P) -> PromptSpec:
        """The spec of the same rows without reparameterisation: what can be trained on without the encoder."""
        return spec

    def complete(self) -> None:
        if getattr(self, "at", None) not in ("embeds", "past"):
            raise RuleError(f"{type(self).__name__}: a prompt rule must set 'at' to 'embeds' or 'past'")
        unused = [name for name in _OF_WEIGHTS if self.offers(name)]
        if unused:
            raise RuleError(
                f"{type(self).__name__}: a prompt rule has no {', '.join(unused)}, which would never be called: its tensors"
                " are those of its encoder"
            )

    def module(self, spec: P, site: Any) -> nn.Module:
        return self.encoder(spec)

    def start_module(
        self,
        module: nn.Module,
        spec: P,
        constants: Mapping[str, Constant],
        host: nn.Module,
        part_of: Callable[[str], nn.Module],
    ) -> None:
        path = str(constants["embedding"])
        embedding = host.get_submodule(path) if path else None
        weight = next((embedding or host).parameters())
        if embedding is not None and not weight.is_meta and not spec.inference_mode:
            called = part_of(path)
            self.start(module, spec, lambda ids: called(ids.to(weight.device)), weight.shape[0])

    def summary(self, adapter: str, constants: Mapping[str, Constant], slots: Sequence[str]) -> list[str]:
        number = constants["num_virtual_tokens"]
        if "embeds" in slots:
            dropped = "; dropped again from the hidden states" if constants["drop"] else ""
            return [f"{number} tokens ({adapter}) before the embedded ones of every sequence{dropped}"]
        if "past" in slots:
            layers = constants["num_layers"]
            return [f"{number} keys and values ({adapter}) before those of every sequence, in {layers} layers"]
        return []

    def cautions(self, constants: Mapping[str, Constant], slots: Sequence[str]) -> list[str]:
        if "embeds" not in slots or constants["rows"] == constants["num_virtual_tokens"]:
            return []
        return ["stores rows for the decoder too, as PEFT does; like there they have no effect"]
