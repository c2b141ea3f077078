"""The ops that put virtual tokens into a model's call; generated code calls them.

Each takes the call's `Progress` and one of its arguments, and returns the argument that goes on. A call with an empty
cache is the first of its sequences: virtual tokens enter. Any other continues a cache that holds them already: only
masks and positions have to count them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.graph.sites import transformers_config
from peftc.rewrite.acting import given_beside, of_rows
from peftc.rewrite.parts import Part
from peftc.rule import Bound

IGNORED = -100  # The label that losses pass over.
_HELD = "peftc_virtual_tokens"  # The attribute of a cache that says whose virtual tokens it holds.

# (adapter, slot, number) of every prompt adapter of a call.
Held = tuple[tuple[str, str, int], ...]


class Progress(NamedTuple):
    """Where a call is: sequences, tokens given, virtual tokens (embedded, cached), and the length of the cache given."""

    batch: int
    tokens: int
    embedded: int
    prefixed: int
    cached: int
    held: Held

    @property
    def first(self) -> bool:
        """Whether virtual tokens enter in this call."""
        return self.cached == 0

    @property
    def virtual(self) -> int:
        """All virtual tokens."""
        return self.embedded + self.prefixed


def progress(held: Held, past: Any, *inputs: Tensor | None) -> Progress:
    """Measure a call by the first of its `inputs` that is given, (batch, tokens, …), and its cache.

    A cache that is still empty is marked as one that will hold the virtual tokens of `held`. Raises AdapterError for a
    cache of fixed size, which was made without room for them, and for one that holds others.
    """
    given = next((tensor for tensor in inputs if tensor is not None), None)
    if given is None:
        raise AdapterError("a prompt method needs input_ids or inputs_embeds; the call has neither")
    embedded, prefixed = (sum(number for _, slot, number in held if slot == own) for own in ("embeds", "past"))
    if isinstance(past, tuple | list):
        raise AdapterError("past_key_values is a tuple of tensors; pass a transformers Cache (DynamicCache)")
    if past is not None and getattr(past, "is_compileable", False):
        raise AdapterError(
            f"{type(past).__name__}: a cache of fixed size has no room for the {embedded + prefixed} virtual tokens of the"
            " active prompt adapter. Use a dynamic one (cache_implementation='dynamic'), or disable the adapter."
        )
    cached = 0 if past is None else past.get_seq_length()
    at = Progress(given.shape[0], given.shape[1], embedded, prefixed, cached, held)
    if at.first:
        mark(at, past)
    elif getattr(past, _HELD, ()) != held or cached < at.virtual:
        raise AdapterError(
            f"the cache given holds the virtual tokens of {_names(getattr(past, _HELD, ()))}, active are those of"
            f" {_names(held)}: make it with the adapters that are active now (and do not crop it into their tokens)."
        )
    return at


def _names(held: Held) -> str:
    return ", ".join(f"{name!r} ({number})" for name, _, number in held) or "no adapter"


def mark(at: Progress, past: Any) -> None:
    """Note on a cache whose virtual tokens it holds: its length does not tell."""
    if past is not None:
        setattr(past, _HELD, at.held)


def held_by(cache: Any) -> int:
    """How many virtual tokens a cache holds."""
    return sum(number for _, _, number in getattr(cache, _HELD, ()))


def remember(output: Any, at: Progress) -> Any:
    """The model output, its cache marked as one that holds the virtual tokens that entered in this call."""
    from transformers import Cache  # Late, as it takes its time; here the model is one of transformers.

    if at.first:
        values = output if isinstance(output, tuple) else output.values()
        mark(at, next((value for value in values if isinstance(value, Cache)), None))
    return output


def rows(encoder: nn.Module, number: int) -> Tensor:
    """The trained rows (number, width) of a prompt encoder."""
    return rows_for(encoder, number, {})[0]


def rows_for(encoder: nn.Module, number: int, given: Mapping[str, Tensor]) -> Tensor:
    """The trained rows (1 or batch, number, width) of a prompt encoder, for what is `given` of the call: (batch,) each."""
    device = next(tensors_in(encoder)).device
    numbers = {name: value.to(device) for name, value in given.items()}
    return encoder(torch.arange(number, device=device)[None], **numbers)


def tensors_in(module: nn.Module) -> Iterator[Tensor]:
    """The parameters in a module; on a replica of nn.DataParallel, the attributes that stand for them."""
    yield from module.parameters()
    yield from (value for one in module.modules() for value in vars(one).values() if isinstance(value, Tensor))


def prepend(
    at: Progress,
    embedding: nn.Module,
    ids: Tensor | None,
    embeds: Tensor | None,
    parts: Sequence[Part],
) -> Tensor | None:
    """`inputs_embeds` (batch, rows + tokens, width) on a first call, with those of `parts`; what was given, or None, on any
    other.
    """
    if not at.first:
        return embeds
    if ids is not None and embeds is not None:
        raise AdapterError("give input_ids or inputs_embeds, not both")
    tokens: Tensor = embedding(ids) if embeds is None else embeds
    prompts = [_prompt(part, at.batch).to(device=tokens.device, dtype=tokens.dtype) for part in parts]
    return torch.cat([*prompts, tokens], dim=1)


def _prompt(part: Part, batch: int) -> Tensor:
    """The rows (batch, number, width) of a part that are embedded."""
    edit = part.edit
    given = {name: of_rows(part, name, batch) for name, one in edit.rule.arguments.items() if one.each == "row"}
    made = rows_for(part.module, cast(int, edit.constants["rows"]), given)
    return made[:, : cast(int, edit.constants["num_virtual_tokens"])].expand(batch, -1, -1)


def unless_first(at: Progress, value: Any) -> Any:
    """`value`, or None on a first call, where embeddings stand for the token ids."""
    return None if at.first else value


def lead(at: Progress, value: Tensor | None, fill: int) -> Tensor | None:
    """`value` (…, tokens) with `fill` for the embedded virtual tokens of a first call: labels, token types.

    Of another length, it is for the logits that `logits_to_keep` leaves, and stays.
    """
    if value is None or not at.first or value.shape[-1] != at.tokens:
        return value
    return torch.cat([value.new_full((*value.shape[:-1], at.embedded), fill), value], dim=-1)


def widen_mask(at: Progress, mask: Any, host: Any) -> Any:
    """An attention mask that covers the virtual tokens too; one that does so already is left as it is.

    2-D masks (batch, keys) of any dtype; 4-D ones (batch, heads or 1, queries, keys), boolean or additive, where no query
    is virtual. Raises AdapterError if the number of keys is neither with nor without the virtual tokens, or if padding
    between them and the text would push them out of a layer's window.
    """
    if mask is None:
        return None
    if isinstance(mask, dict):
        return {kind: widen_mask(at, one, host) for kind, one in mask.items()}
    if mask.dim() not in (2, 4):
        raise AdapterError(f"an attention mask of shape {tuple(mask.shape)}; pass a 2-D one (batch, tokens)")
    seen = at.cached - (0 if at.first else at.virtual) + at.tokens
    keys = mask.shape[-1]
    if keys == seen + at.virtual and (mask.dim() == 2 or mask.shape[-2] == at.tokens + at.embedded * at.first):
        return mask
    if keys != seen:
        raise AdapterError(
            f"the attention mask covers {keys} tokens; this call sees {seen}"
            + (f" ({at.cached} cached, of which {at.virtual} virtual, and {at.tokens} new)" if at.cached else "")
            + f", or {seen + at.virtual} with the virtual ones. To go on from a cache, pass only the new tokens, and a mask"
            " of all real ones."
        )
    if mask.dim() == 2:
        if not torch.compiler.is_compiling():
            _require_in_window(at, mask, host)
        return torch.cat([mask.new_ones(mask.shape[0], at.virtual), mask], dim=1)
    if at.first and at.embedded:
        raise AdapterError(
            f"an attention mask of shape {tuple(mask.shape)} has no rows for virtual tokens; pass a 2-D one (batch, tokens)"
        )
    open_ = mask.new_zeros if mask.is_floating_point() else mask.new_ones
    return torch.cat([open_(*mask.shape[:-1], at.virtual), mask], dim=-1)


def _require_in_window(at: Progress, mask: Tensor, host: Any) -> None:
    """Raise AdapterError if a layer's window is too short for this call and a row is padded on the left."""
    config = transformers_config(host)
    text = config.get_text_config() if config is not None else None
    sizes = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = min((size for size in sizes if isinstance(size, int)), default=None)
    kinds = getattr(text, "layer_types", None) or ("sliding_attention",)
    if window is None or mask.shape[-1] + at.virtual <= window or not {*kinds} & _WINDOWED:
        return
    if bool((mask[:, 0] == 0).any()):
        raise AdapterError(
            "a row is padded on the left, which puts padding between the virtual tokens and the text, and layers of this"
            f" model see {window} positions back: padded rows would lose the virtual tokens earlier than others. Pad on"
            " the right, or give rows of one length."
        )


_WINDOWED = frozenset({"sliding_attention", "chunked_attention"})


def shift_positions(at: Progress, positions: Tensor | None) -> Tensor | None:
    """Position ids (…, tokens) after those of the virtual tokens, with the embedded ones' own on a first call."""
    if positions is None:
        return None
    shifted = positions + at.virtual
    if not at.first or not at.embedded:
        return shifted
    own = torch.arange(at.prefixed, at.virtual, device=positions.device, dtype=positions.dtype)
    return torch.cat([own.expand(*positions.shape[:-1], -1), shifted], dim=-1)


def shift_indices(at: Progress, kept: Any) -> Any:
    """`logits_to_keep`: what counts from the end stays, indices from the front count from the first virtual token."""
    return torch.where(kept < 0, kept, kept + at.embedded) if at.first and isinstance(kept, Tensor) else kept


def widen_memory(mask: Tensor | None, memory: Tensor | None) -> Tensor | None:
    """The encoder's attention mask as wide as its output, which virtual tokens have made longer."""
    if mask is None or memory is None or mask.dim() != 2:
        return mask
    missing = memory.shape[1] - mask.shape[1]
    return torch.cat([mask.new_ones(mask.shape[0], missing), mask], dim=1) if missing > 0 else mask


def drop(output: Any, at: Progress) -> Any:
    """The model output without the hidden states of the virtual tokens that entered in this call."""
    if not at.first:
        return output
    if isinstance(output, tuple):
        return (output[0][:, at.embedded :], *output[1:])
    output["last_hidden_state"] = output["last_hidden_state"][:, at.embedded :]
    return output


def weigh(output: Any, at: Progress, labels: Tensor | None, part: Part) -> Any:
    """The model output with the loss that the rule of `part` has, where virtual tokens entered and labels are given.

    Raises AdapterError if there are embedded tokens of others, or not as many logits as tokens.
    """
    if labels is None or not at.first:
        return output
    logits: Tensor = output[1] if isinstance(output, tuple) else output["logits"]
    others = at.embedded - cast(int, part.edit.constants["num_virtual_tokens"])
    if others:
        raise AdapterError(
            f"{part.edit.adapter!r} has a loss of its own, of its tokens and the call's, and there are {others} tokens of"
            " other adapters between these: compute the loss with that one active alone"
        )
    if logits.shape[1] != at.embedded + labels.shape[1]:
        raise AdapterError(
            f"{part.edit.adapter!r} has a loss of its own, of its {at.embedded} tokens and the call's: with labels of"
            f" {labels.shape[1]} tokens that takes {at.embedded + labels.shape[1]} logits a row, and the model gave"
            f" {logits.shape[1]}. Leave logits_to_keep out, and give labels for all tokens"
        )
    rule = cast(Any, part.edit.rule)
    loss = rule.loss(logits, labels.to(logits.device), given_beside(part), Bound(part.edit.constants))
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output
