"""An adapter's tensors under the keys that PEFT's files use, and back."""

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from peftc.checkpoint.prompts import PROMPT_KEY, load_prompt, prompt_edit, prompt_embeddings
from peftc.errors import CheckpointError, nearest
from peftc.graph.sites import parameter_name
from peftc.plan import MODULES_TO_SAVE, Edit, PlannedParam
from peftc.rewrite.program import Program
from peftc.rewrite.switch import place
from peftc.specs import PromptSpec

PREFIX = "base_model.model."
# peft (0.21) adds the delta of nn.MultiheadAttention's out_proj twice in every forward, so in its files this factor is
# half of what has that effect. Halving and doubling are exact.
_HALVED = ".base_layer.out_proj.lora_B.weight"


def adapter_state_dict(program: Program, adapter: str) -> dict[str, Tensor]:
    """The live tensors of `adapter` by their key in `adapter_model.safetensors`; the rows of a prompt are computed."""
    state: dict[str, Tensor] = {}
    prefix = _prefix(program, adapter)
    for edit in program.plan.edits:
        if edit.adapter == adapter and edit.virtual:
            state[PROMPT_KEY] = prompt_embeddings(program, edit)
        elif edit.adapter == adapter:
            for param in edit.params:
                if param.saved:
                    state[prefix + _key(edit, param)] = program.tensor(edit, param.key)
    for tensor in program.plan.trained:
        if tensor.adapter == adapter:
            state[prefix + tensor.key] = _trained(program, tensor.name)
    return state


def saved_state_dict(program: Program, adapter: str) -> dict[str, Tensor]:
    """The tensors of `adapter` as its file holds them."""
    state = adapter_state_dict(program, adapter)
    return {key: value / 2 if key.endswith(_HALVED) else value for key, value in state.items()}


def _prefix(program: Program, adapter: str) -> str:
    """What keys begin with. PEFT puts one wrapper around a model for a prompt method, two for the others."""
    return "base_model." if isinstance(program.plan.adapters[adapter], PromptSpec) else PREFIX


def _key(edit: Edit, param: PlannedParam) -> str:
    return parameter_name(edit.site if edit.saved_as is None else edit.saved_as, param.key)


def _trained(program: Program, name: str) -> Tensor:
    """The value of a bias as its adapter trained it, whether that is in the model now, merged over, or put aside."""
    journal = program.journal
    if name in journal.training:
        under = {parameter_name(item.owner, item.leaf): item.original for item in journal.merged}
        original = under.get(name)
        return program.base.get_parameter(name) if original is None else original
    return journal.trained[name]


def load_state(
    program: Program, adapter: str, tensors: Mapping[str, Tensor], encoder: Mapping[str, Tensor] | None = None
) -> None:
    """Copy `tensors` into the parameters of `adapter`; of a prompt that is to be trained, `encoder` makes them.

    A saved embedding (PEFT's `save_embedding_layers`) is compared with the base and taken over, with a warning, if it
    differs. Raises CheckpointError, with nothing copied, on missing, unexpected or mis-shaped keys, NaN or Inf.
    """
    own = adapter_state_dict(program, adapter)
    given = {_renamed(key, own): value for key, value in tensors.items() if ".original_module." not in key}
    optional, buffers = _optional(program, adapter), _buffers(program, adapter)
    missing = [key for key in own if key not in given and key not in optional]
    own = {key: target for key, target in own.items() if key in given or key not in optional}
    embeddings, unexpected = _split(program, _prefix(program, adapter), [key for key in given if key not in own])
    if missing or unexpected:
        raise CheckpointError(_mismatch(adapter, missing, unexpected, own))
    for key, target in [*own.items(), *((k, program.base.get_parameter(name)) for k, name in embeddings.items())]:
        _require_like(key, given[key], target)
        if key not in buffers:
            _require_finite(key, given[key], target)
    edit = prompt_edit(program, adapter)
    with torch.no_grad():
        for key, target in own.items():
            if edit is not None and key == PROMPT_KEY:
                load_prompt(program, edit, given[key], encoder or {})
            else:
                target.copy_(given[key] * 2 if key.endswith(_HALVED) else given[key])
    for key, name in embeddings.items():
        _take_over(program, adapter, name, given[key])


def _optional(program: Program, adapter: str) -> set[str]:
    """Keys of frozen starts, which peft's files lack: they are computed from the base weight then."""
    return {
        PREFIX + _key(edit, param)
        for edit in program.plan.edits
        for param in edit.params
        if edit.adapter == adapter and not param.trainable and param.init == "rule"
    }


def _buffers(program: Program, adapter: str) -> set[str]:
    """Keys of buffers of modules saved whole, which may hold infinities (masks)."""
    return {
        _prefix(program, adapter) + _key(edit, param)
        for edit in program.plan.edits
        for param in edit.params
        if edit.adapter == adapter and edit.rule == MODULES_TO_SAVE and not param.trainable
    }


def _renamed(key: str, own: Mapping[str, Tensor]) -> str:
    """Keys of older PEFT versions, and of modules_to_save and biases, which have had two spellings."""
    if key in own:
        return key
    for old, new in (
        (f"{MODULES_TO_SAVE}.default.", ""),
        (f"{MODULES_TO_SAVE}.", ""),
        ("base_layer.bias", "bias"),
        (".bias", ".base_layer.bias"),
    ):
        if old in key and key.replace(old, new) in own:
            return key.replace(old, new)
    return key


def _split(program: Program, prefix: str, keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Keys of whole embeddings with the base parameter they are, and keys that are nothing known."""
    names = {name for name, _ in program.base.named_parameters(remove_duplicate=False)}
    embeddings: dict[str, str] = {}
    unexpected: list[str] = []
    for key in keys:
        name = key.removeprefix(prefix).replace(".base_layer.", ".")
        if name in names and name.endswith(".weight"):
            embeddings[key] = name
        else:
            unexpected.append(key)
    return embeddings, unexpected


def _mismatch(adapter: str, missing: list[str], unexpected: list[str], own: Mapping[str, Tensor]) -> str:
    lines = [f"the file does not fit adapter {adapter!r}, which has {len(own)} tensors."]
    for label, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            lines.append(f"{len(keys)} {label}: {', '.join(keys[:4])}{' …' if len(keys) > 4 else ''}.")
    near = nearest(unexpected[0], own, limit=1) if unexpected else []
    if near:
        lines.append(f"Nearest to {unexpected[0]}: {near[0]}.")
    lines.append("Is the base model the one the adapter was trained on?")
    return " ".join(lines)


def _require_like(key: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape:
        raise CheckpointError(
            f"{key}: the file has shape {tuple(value.shape)}, the model {tuple(target.shape)}."
            " Another base model, or a resized vocabulary (resize_token_embeddings first)?"
        )
    if target.is_floating_point() and not value.is_floating_point():
        raise CheckpointError(f"{key}: the file has {value.dtype}, a floating-point tensor is expected")


def _require_finite(key: str, value: Tensor, target: Tensor) -> None:
    if value.is_floating_point() and not bool(torch.isfinite(value.to(target.dtype)).all()):
        raise CheckpointError(f"{key}: holds NaN or Inf (as {target.dtype}); the adapter is broken")


def _take_over(program: Program, adapter: str, name: str, value: Tensor) -> None:
    """Let the base's tensor `name` be the adapter's own while that is active, if it differs."""
    journal, parameter = program.journal, program.base.get_parameter(name)
    original = journal.brought[name, None] if journal.present.get(name) is not None else parameter.detach()
    if original.is_meta or torch.equal(original.to(value.dtype), value.to(original.device)):
        return
    warnings.warn(
        f"{name}: the adapter brings its own, in the place of the base model's while it is active", stacklevel=4
    )
    journal.present.setdefault(name, None)
    journal.brought[name, adapter] = value.to(device=parameter.device, dtype=parameter.dtype, copy=True)
    if program.enabled and adapter in program.active:
        place(program, name, adapter)
