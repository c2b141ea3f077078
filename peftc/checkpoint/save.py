"""Saving adapters: specs as PEFT's configs, tensors, the model card; all of them in one step or none."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from peftc.checkpoint.atomic import replace_files
from peftc.checkpoint.base import fingerprint_of
from peftc.checkpoint.card import CARD_NAME, card
from peftc.checkpoint.embeddings import SaveEmbeddings
from peftc.checkpoint.files import BIN_NAME, ENCODER_NAME, WEIGHTS_NAME, adapter_files, pickled
from peftc.checkpoint.misread import misread_by_peft
from peftc.checkpoint.per_expert import per_expert_form
from peftc.checkpoint.serving import serving_form
from peftc.checkpoint.spelling import by_plain_names
from peftc.checkpoint.state import saved_state_dict, spec_filed
from peftc.choices import Form
from peftc.errors import CheckpointError
from peftc.graph.hooked import given_class
from peftc.graph.sites import transformers_config
from peftc.merge.combine import target_names
from peftc.prompts.files import encoder_state, prompt_part
from peftc.rewrite.hosts import original_class
from peftc.rewrite.program import Program
from peftc.rewrite.sharding import is_sharded, reshard, whole
from peftc.specs.io import CONFIG_NAME

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveOptions:
    """How adapters are saved; see `CompiledModel.save_pretrained`."""

    bake: bool = False
    save_embedding_layers: SaveEmbeddings = "auto"
    form: Form = "peft"
    state_dict: Mapping[str, Tensor] | None = None
    pickled: bool = False
    dtype: torch.dtype | None = None


def save_adapters(folder: Path, program: Program, adapters: Sequence[str], options: SaveOptions) -> None:
    """Write `adapters`: `default` into `folder`, others into subfolders of their name.

    Raises CheckpointError if that can't be done; what was there is then as it was.
    """
    if options.form not in get_args(Form):
        raise CheckpointError(f"form={options.form!r}: valid are {', '.join(map(repr, get_args(Form)))}")
    files: dict[str, bytes] = {}
    gone: list[str] = []
    for name in adapters:
        _warn(program, name, options)
        path = "" if name == "default" else f"{name}/"
        config, own = _files(program, name, options)
        if options.pickled:
            own[BIN_NAME] = pickled(own.pop(WEIGHTS_NAME))
            gone.append(path + WEIGHTS_NAME)  # One that is there would be read in its place.
        if not (folder / path / CARD_NAME).exists():
            own[CARD_NAME] = card(config, transformers_config(program.base) is not None).encode()
        files |= {path + file: content for file, content in own.items()}
        gone += [] if ENCODER_NAME in own else [path + ENCODER_NAME]  # One that is there made other rows.
    replace_files(folder, files, [name for name in files if name.endswith(CONFIG_NAME)], gone)
    _LOG.info("saved %s to %s: %d bytes", ", ".join(adapters), folder, sum(map(len, files.values())))


def _warn(program: Program, name: str, options: SaveOptions) -> None:
    """Say what whoever loads the files would not expect."""
    scale = program.adapters[name].scale
    misread = misread_by_peft(program, name) if options.form == "peft" else None
    if misread is not None:
        warnings.warn(misread, stacklevel=4)
    if scale != 1 and not options.bake and options.form == "peft":
        warnings.warn(
            f"{name!r} is set to scale {scale:g}, which its file does not say: it loads at 1. bake=True writes it in",
            stacklevel=4,
        )


def _files(program: Program, adapter: str, options: SaveOptions) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The adapter's config, and its files; whoever shares the model takes part."""
    reshard(program.base)
    config = config_of(program, adapter, options.bake)
    written, encoder, full = config, dict[str, Tensor](), None
    if options.form == "serving":
        written, tensors = serving_form(program, adapter, config)
    elif options.form == "per_expert":
        written, tensors = per_expert_form(program, adapter, config, options.save_embedding_layers)
    else:
        own = program.adapters[adapter]
        part = prompt_part(own)
        state = encoder_state(own, part) if part is not None else {}
        encoder = {key: whole(value) for key, value in state.items()}
        tensors = saved_state_dict(program, adapter, options.save_embedding_layers, options.state_dict)
        full = None if options.state_dict is None else by_plain_names(options.state_dict)
    tensors, encoder = (_in_dtype(own, options.dtype, adapter) for own in (tensors, encoder))
    return config, adapter_files(written, tensors, encoder, fingerprint_of(program, adapter, full))


def _in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, adapter: str) -> Mapping[str, Tensor]:
    """Floating-point tensors in a dtype. Raises CheckpointError for numbers that it can't hold."""
    if dtype is None:
        return tensors
    cast = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    lost = [key for key, tensor in cast.items() if not (tensor.isfinite() | ~tensors[key].isfinite()).all()]
    if lost:
        raise CheckpointError(f"{adapter!r}: {lost[0]} has numbers that {dtype} can't hold; take torch.bfloat16")
    return cast


def gather(program: Program, adapters: Sequence[str], options: SaveOptions) -> None:
    """Take part in gathering what another process saves; nothing happens where nothing is sharded."""
    if any(is_sharded(parameter) for parameter in program.base.parameters()):
        for name in adapters:
            _files(program, name, options)


def config_of(program: Program, adapter: str, bake: bool = False) -> dict[str, Any]:
    """The spec as saved: for inference, with the base model's name, and its class where no task says it. `bake`: at
    the scale that is set.
    """
    spec, scale = spec_filed(program, adapter), program.adapters[adapter].scale
    config = {**(spec.scaled(scale) if bake and scale != 1 else spec).to_dict(), "inference_mode": True}
    if not spec.excludes and config.pop("exclude_modules") is not None:
        sites = [edit.site for edit in program.adapters[adapter].edits if not edit.whole]
        config["target_modules"] = list(target_names(program.base, sites))
    base_config = transformers_config(program.base)
    if config["base_model_name_or_path"] is None and base_config is not None:
        config["base_model_name_or_path"] = base_config.name_or_path or None
    if config["task_type"] is None and config["auto_mapping"] is None and base_config is not None:
        cls = given_class(original_class(program.base))
        config["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return config
