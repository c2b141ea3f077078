"""Whole embeddings in an adapter's file: PEFT's `save_embedding_layers`, and what a file brings of its own."""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from peftc.checkpoint.base import originals
from peftc.checkpoint.spelling import base_name
from peftc.edits import Edit
from peftc.errors import CheckpointError
from peftc.graph.finding import module_at, parameter_at
from peftc.graph.sites import is_pretrained, parameter_name, transformers_config
from peftc.rewrite.program import Program
from peftc.rewrite.sharding import is_flattened, is_sharded
from peftc.specs import AdapterSpec

SaveEmbeddings = bool | Literal["auto"]
# PEFT's own list: the names for which `auto` saves a targeted embedding.
_COMMON = ("embed_tokens", "lm_head")


def embedding_state(
    program: Program, adapter: str, prefix: str, save: SaveEmbeddings, full: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The whole embeddings to save with `adapter`, by key: detached, as they are while it is active. Of sharded ones,
    those in `full`, by name, if they are there.

    `auto`: those that it adapts under their common names or brought itself, and all if the vocabulary was resized since
    the base was saved. Raises CheckpointError if `save` is none of the three.
    """
    if save not in (True, False, "auto"):
        raise CheckpointError(f"save_embedding_layers={save!r}: valid are True, False and 'auto'")
    if save is False:
        return {}
    modules = _embeddings(program.base)
    if save is True and not modules:
        warnings.warn(
            "save_embedding_layers: the model is none of transformers, so its embeddings aren't known", stacklevel=5
        )
    edits = program.adapters[adapter].edits
    targeted, whole = ({edit.site for edit in edits if edit.whole is saved} for saved in (False, True))
    places = places_of(edits)
    parts = any(edit.rule.replaces_rows for edit in edits)  # As in PEFT, whoever trains rows saves rows.
    every = save is True or (bool(modules) and _resized(program.base))
    found: dict[str, Tensor] = {}
    for fqn in modules:
        common = fqn in targeted and fqn.rpartition(".")[2] in _COMMON and not parts
        for leaf in module_at(program.base, fqn)._parameters:
            name = parameter_name(fqn, leaf)
            if (
                name in program.given.requires_grad
                and fqn not in whole
                and (every or common or program.overlay.brings(name, adapter))
            ):
                key = prefix + (f"{places[fqn]}.base_layer.{leaf}" if fqn in targeted else parameter_name(fqn, leaf))
                value = _value(program, name, adapter)
                found[key] = full.get(name, value) if is_sharded(value) or is_flattened(value) else value
    return found


def places_of(edits: Iterable[Edit]) -> dict[str, str]:
    """By site, what keys have for it: of one that follows another, its own name with what the other's has in it."""
    found: dict[str, str] = {}
    for edit in edits:
        first, saved_as = edit.follows or edit.site, edit.saved_as
        inside = saved_as.removeprefix(first) if saved_as is not None and saved_as.startswith(f"{first}.") else ""
        found[edit.site] = edit.site + inside
    return found


def split_embeddings(program: Program, spec: AdapterSpec, keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Keys of whole embeddings with the base parameter they are, and keys that are nothing known."""
    keys = list(keys)
    heads = _embeddings(program.base) if keys else []
    embeddings: dict[str, str] = {}
    unexpected: list[str] = []
    for key in keys:
        name = base_name(spec, key)
        module, _, leaf = name.rpartition(".")
        if name in program.given.requires_grad and (leaf == "weight" or module in heads):
            embeddings[key] = name
        else:
            unexpected.append(key)
    return embeddings, unexpected


def take_over(program: Program, adapter: str, name: str, value: Tensor) -> None:
    """Let the base's tensor `name` be the adapter's own while that is active, if it differs."""
    own = originals(program, [name]).get(name)
    if own is None or own.is_meta or torch.equal(own.to(value.dtype), value.to(own.device)):
        return
    warnings.warn(
        f"{name}: the adapter brings its own, in the place of the base model's while it is active", stacklevel=5
    )
    program.overlay.bring(program.base, name, adapter, value)
    if program.enabled and adapter in program.active:
        program.overlay.place(program.base, {name: adapter})


def _embeddings(base: nn.Module) -> list[str]:
    """The fqns of a transformers model's input and output embeddings."""
    if not is_pretrained(base):
        return []
    model, wanted = cast(Any, base), list[Any]()
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # Models of sound and images have none.
            wanted.append(get())
    return [fqn for fqn, module in base.named_modules() if any(module is one for one in wanted)]


def _value(program: Program, name: str, adapter: str) -> Tensor:
    if program.overlay.present.get(name) == adapter:
        return parameter_at(program.base, name).detach()
    value = program.overlay.aside.get((name, adapter), originals(program, [name]).get(name))
    if value is None:
        raise CheckpointError(f"{name}: is merged in place, so its own values can't be saved; unmerge_adapter() first")
    return value


def _resized(base: nn.Module) -> bool:
    """Whether the vocabulary is another than in the base's config, as far as that is on this machine."""
    config = cast(Any, transformers_config(base))
    if not config.name_or_path:
        return False
    from transformers import AutoConfig

    try:
        saved = AutoConfig.from_pretrained(config.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return False
    return _vocabulary(saved) != _vocabulary(config)


def _vocabulary(config: Any) -> int | None:
    return cast("int | None", getattr(config.get_text_config(), "vocab_size", None))
