"""Context-aware prompt tuning: examples as a prompt, whose embeddings move a little, with a loss on their labels, too."""

import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from peftc.errors import AdapterError
from peftc.prompts.rule import PromptRule
from peftc.prompts.specs import Count, PromptSpec
from peftc.rule import Argument, Constant

Numbers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
_IGNORED = -100  # The label that losses pass over.
_UNMOVED = 1e-10  # How far a token may be moved that may not.


class CPTConfig(PromptSpec):
    """Examples whose embeddings are trained, each within a ball. Blau et al. 2024, arXiv:2410.17222.

    `cpt_token_ids`: the tokens of the examples. `cpt_tokens_type_mask` says what each is: 1 a template of the input, 2 the
    input, 3 a template of the output, 4 the label; of the second example 5 to 8, and so on; 0 none of these. Labels stay as
    they are; the others move within `opt_projection_epsilon` (inputs) or `opt_projection_format_epsilon` (templates), times
    √(token_dim/2048). The loss is of the labels of the examples and of the call, whose own kinds `input_type_mask` (batch,
    tokens) says, 4 by default. `opt_weighted_loss_type="decay"`: that of the last label counts whole, the one before it
    `opt_loss_decay_factor` times, and so on. `cpt_mask` and `tokenizer_name_or_path` are informative.

    Example: CPTConfig(cpt_token_ids=ids, cpt_tokens_type_mask=kinds, task_type="CAUSAL_LM")
    """

    peft_type: Literal["CPT"] = "CPT"
    num_virtual_tokens: Count = 1
    cpt_token_ids: Numbers = (0,)
    cpt_mask: Numbers | None = None
    cpt_tokens_type_mask: Numbers | None = None
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    opt_loss_decay_factor: Annotated[float, Field(ge=0)] = 1.0
    opt_projection_epsilon: Annotated[float, Field(ge=0)] = 0.1
    opt_projection_format_epsilon: Annotated[float, Field(ge=0)] = 0.1
    tokenizer_name_or_path: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _count(cls, data: Any) -> Any:
        given = data.get("cpt_token_ids")
        ids = given if isinstance(given, torch.Tensor) or given else (0,)
        count = len(ids) if isinstance(ids, list | tuple) else 1  # Others are refused with the field's own words.
        ones = {name: (1,) * count for name in ("cpt_mask", "cpt_tokens_type_mask") if data.get(name) is None}
        return {**data, **ones, "cpt_token_ids": ids, "num_virtual_tokens": count, "num_transformer_submodules": 1}

    @model_validator(mode="after")
    def _check_cpt(self) -> Self:
        for field in ("cpt_mask", "cpt_tokens_type_mask"):
            if (number := len(getattr(self, field))) != len(self.cpt_token_ids):
                raise ValueError(f"{field} has {number} entries, cpt_token_ids {len(self.cpt_token_ids)}")
        if self.task_type not in (None, "CAUSAL_LM"):
            raise ValueError(f"task_type={self.task_type!r}: its loss is for CAUSAL_LM")
        if 0 in (self.cpt_mask or ()):
            warnings.warn("CPTConfig.cpt_mask has no effect, here as in PEFT: all tokens are attended to", stacklevel=2)
        return self

    @property
    def reach(self) -> tuple[float, ...]:
        """How far each token may move from where it began."""
        scale = (self.fact("token_dim") / 2048) ** 0.5
        template, text = scale * self.opt_projection_format_epsilon, scale * self.opt_projection_epsilon
        return tuple((_UNMOVED, template, text, template)[kind % 4] for kind in self.cpt_tokens_type_mask or ())


class CPTEmbedding(nn.Module):
    """Row numbers (batch, rows) → embeddings (batch, rows, token_dim).

    Those of `embedding`, which is frozen, moved by those of `delta_embedding` within reach; in `inference_mode` `embedding`
    holds the rows themselves.
    """

    def __init__(self, spec: CPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.rows, spec.fact("token_dim"))
        self.delta_embedding: nn.Embedding | None = None
        self.reach = spec.reach
        if not spec.inference_mode:
            self.embedding.requires_grad_(False)
            self.delta_embedding = nn.Embedding(spec.rows, spec.fact("token_dim"))
            nn.init.zeros_(self.delta_embedding.weight)

    def forward(self, indices: Tensor) -> Tensor:
        if self.delta_embedding is None:
            return self.embedding(indices)
        delta = self.delta_embedding.weight
        # The gradient passes by the projection, as if it had been made after the step, and by what does not move.
        moved = (delta - delta.detach()) * (delta.new_tensor(self.reach)[:, None] > _UNMOVED)
        return self.embedding(indices) + (_within(delta.detach(), self.reach) + moved)[indices]


def _within(delta: Tensor, reach: tuple[float, ...]) -> Tensor:
    """`delta` with rows of a norm of `reach` at most."""
    norm, limit = delta.norm(dim=1, keepdim=True), delta.new_tensor(reach)[:, None]
    return torch.where(norm > 0, delta * (limit / norm.clamp(min=limit)), delta)


class Cpt(PromptRule[CPTConfig]):
    """[E(c) + δ; E(x)] with trained δ, ‖δᵢ‖ ≤ εᵢ.  Blau et al. 2024, arXiv:2410.17222, section 4."""

    name, spec, at = "cpt", CPTConfig, "embeds"
    arguments: ClassVar[Mapping[str, Argument]] = {"input_type_mask": Argument(each="token", needed=False)}

    def constants(self, spec: CPTConfig, site: Any) -> dict[str, Constant]:
        decay = spec.opt_loss_decay_factor if spec.opt_weighted_loss_type == "decay" else 1.0
        return {"ids": spec.cpt_token_ids, "kinds": tuple(spec.cpt_tokens_type_mask or ()), "decay": decay}

    def encoder(self, spec: CPTConfig) -> CPTEmbedding:
        return CPTEmbedding(spec)

    def start(self, encoder: nn.Module, spec: CPTConfig, embed: Callable[[Tensor], Tensor], vocab_size: int) -> None:
        if max(spec.cpt_token_ids) >= vocab_size:
            raise AdapterError(f"CPTConfig.cpt_token_ids: {max(spec.cpt_token_ids)}, and the model embeds {vocab_size}")
        encoder.get_parameter("embedding.weight").copy_(embed(torch.tensor(spec.cpt_token_ids)))

    def held(self, spec: CPTConfig, rows: Tensor) -> Mapping[str, Tensor]:
        return {"embedding.weight": rows, "delta_embedding.weight": torch.zeros_like(rows)}

    def after_step(self, spec: CPTConfig, tensors: Mapping[str, Mapping[str, Tensor]], step: int, state: Any) -> None:
        for delta in (own["delta_embedding.weight"] for own in tensors.values() if "delta_embedding.weight" in own):
            delta.copy_(_within(delta, spec.reach))

    def loss(self, logits: Tensor, labels: Tensor, given: Mapping[str, Tensor], p: Any) -> Tensor:
        ids, kinds = (torch.tensor(value, device=labels.device).expand(len(labels), -1) for value in (p.ids, p.kinds))
        own = given.get("input_type_mask", torch.full_like(labels, 4)).to(labels.device)
        if own.shape != labels.shape:
            raise AdapterError(f"input_type_mask is {tuple(own.shape)}, and labels are {tuple(labels.shape)}")
        before = -(-max(p.kinds) // 4) * 4  # Whole examples, so that what a token is stays what it is.
        kinds = torch.cat([kinds, torch.where(own > 0, own + before, own)], 1)[:, 1:]
        wanted = torch.cat([ids, labels], 1)[:, 1:].masked_fill((kinds == 0) | (kinds % 4 != 0), _IGNORED)
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), reduction="none").view_as(wanted)
        return (each * p.decay ** _later(kinds))[wanted != _IGNORED].mean()


def _later(kinds: Tensor) -> Tensor:
    """For every label, how many labels of its row are of later examples."""
    order = kinds.where(kinds % 4 == 0, 0).sort(stable=True, dim=1, descending=True)
    first = F.pad(order.values[:, 1:] != order.values[:, :-1], (1, 0))
    return torch.empty_like(kinds).scatter(1, order.indices, first.long().cumsum(1))
