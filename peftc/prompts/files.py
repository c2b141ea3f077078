"""Prompt adapters in files: the rows themselves, which is all PEFT knows, and the encoder that training goes on with."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peftc.errors import CheckpointError
from peftc.plan import Edit
from peftc.prompts.find import is_virtual
from peftc.prompts.rule import PromptRule
from peftc.prompts.virtual import rows
from peftc.registry import rules_of
from peftc.rewrite.parts import Adapter, Part
from peftc.rewrite.sharding import is_sharded, put, whole
from peftc.specs import AdapterSpec

# The one tensor of a prompt adapter's file.
PROMPT_KEY = "prompt_embeddings"
_ROWS = "embedding.weight"
# Where an adapter keeps the rows that it was loaded with, and the encoder they came from, to be saved with them again.
_FIRST = "prompt_encoder"


def prompt_part(adapter: Adapter) -> Part | None:
    """The part of `adapter` that holds virtual tokens (its `module` is the encoder), or None."""
    return next((part for part in adapter.parts.values() if is_virtual(part.edit)), None)


def prompt_state(part: Part) -> dict[str, Tensor]:
    """The tensors of a prompt by their keys in files: the rows, or what makes them of each call."""
    rows_too = {PROMPT_KEY: prompt_embeddings(part)}
    if not _of_calls(part.edit):
        return rows_too
    return {**rows_too, **{name: tensor for name, tensor in part.tensors().items() if name != _ROWS}}


def prompt_embeddings(part: Part) -> Tensor:
    """The rows (rows, width) of a prompt, without dropout; the parameter itself if nothing makes it, or if a call has
    a part in it.
    """
    if not is_reparameterised(part.edit):
        return part.tensor(_ROWS)
    encoder, number = part.module, part.edit.constants["rows"]
    training = encoder.training
    try:
        with torch.no_grad():
            made = _Rows(encoder.eval())
            tensors = {name: whole(tensor) for name, tensor in made.named_parameters() if is_sharded(tensor)}
            return functional_call(made, tensors, (number,)) if tensors else made(number)
    finally:
        encoder.train(training)


class _Rows(nn.Module):
    """The rows that an encoder makes, as a module: of one that is sharded, nobody gathers the tensors for this."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, number: int) -> Tensor:
        return rows(self.encoder, number)


def is_reparameterised(edit: Edit) -> bool:
    """Whether an encoder makes the rows, instead of holding them, or what makes them of each call."""
    return not _of_calls(edit) and [param.key for param in edit.params] != [_ROWS]


def _of_calls(edit: Edit) -> bool:
    """Whether its encoder makes rows of arguments of each call."""
    return isinstance(edit.rule, PromptRule) and bool(edit.rule.asked)


def encoder_state(adapter: Adapter, part: Part) -> dict[str, Tensor]:
    """The tensors of the encoder that makes the rows, or that made them: `prompt_encoder.safetensors`. None if they follow
    from the rows.
    """
    if is_reparameterised(part.edit):
        own = part.tensors()
        held = _held(adapter, part.edit, prompt_embeddings(part))
        follow = held is not None and all(torch.equal(whole(own[name]), value) for name, value in held.items())
        return {} if follow else own
    loaded, encoder = adapter.extras.get(_FIRST, (None, {}))
    rows_now = whole(part.tensor(_ROWS)).cpu()
    return encoder if loaded is not None and torch.equal(rows_now, loaded) else {}


def trainable_spec(spec: AdapterSpec, encoder: Mapping[str, Tensor]) -> tuple[AdapterSpec, str | None]:
    """The spec to train a loaded adapter on with, and a warning if its file lacks the encoder (PEFT's files do)."""
    rule = next((rule for rule in rules_of(spec) if isinstance(rule, PromptRule)), None)
    if rule is None or encoder:
        return spec, None
    folded = rule.folded(spec)
    if folded == spec:
        return spec, None
    return folded, (
        f"the {spec.peft_type} adapter was saved without its encoder (as PEFT does): its {PROMPT_KEY} are trained on"
        f" themselves, as {type(folded).__name__}"
    )


def _held(adapter: Adapter, edit: Edit, made: Tensor) -> Mapping[str, Tensor] | None:
    """The tensors of the live encoder if it has to make these rows; None if they don't follow from them."""
    if not is_reparameterised(edit):
        return {_ROWS: made}
    assert isinstance(edit.rule, PromptRule), "the edit of a prompt"
    return edit.rule.held(adapter.spec, made)


def load_prompt(adapter: Adapter, part: Part, value: Tensor, encoder: Mapping[str, Tensor]) -> None:
    """Copy the rows, or the encoder that makes them, into place; one that is not needed now is kept for the next save.

    Raises CheckpointError, with nothing copied, if the encoder is not the planned one. It has been copied, and the
    adapter is to be dropped, if it does not make the rows that are saved beside it.
    """
    held = None if encoder and is_reparameterised(part.edit) else _held(adapter, part.edit, value)
    if held is not None:
        for name, tensor in held.items():
            put(part.tensor(name), tensor)
        if encoder:
            dtype = part.tensor(_ROWS).dtype
            adapter.extras[_FIRST] = (value.to("cpu", dtype, copy=True), dict(encoder))
        return
    if not encoder:
        raise CheckpointError(
            f"{adapter.name}: an encoder makes its {PROMPT_KEY}, and these alone don't say which one would. Make the"
            " adapter with inference_mode=True, which holds the rows themselves; or load its files under another name"
        )
    targets = part.tensors()
    wrong = [name for name in targets if name not in encoder or encoder[name].shape != targets[name].shape]
    if wrong or len(encoder) != len(targets):
        raise CheckpointError(
            f"prompt_encoder.safetensors is not of the encoder in the config: {', '.join(wrong or encoder)}. Load with"
            " is_trainable=False, which needs only the prompt_embeddings, or remove the file to train on those."
        )
    for name, target in targets.items():
        put(target, encoder[name])
    made = prompt_embeddings(part)
    if not made.is_meta and not torch.allclose(made, value.to(made), rtol=1e-3, atol=1e-3 * float(value.abs().max())):
        raise CheckpointError(
            "prompt_encoder.safetensors does not make the saved prompt_embeddings: one of the two was changed. Load with"
            " is_trainable=False to use the prompt_embeddings, or remove the file to train on them."
        )
