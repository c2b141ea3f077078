"""PEFT's hot-swapping: the values of an adapter exchanged while it stays where it is."""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftc.api import load_spec
from peftc.checkpoint import load_state, locate, read_adapter
from peftc.errors import AdapterError
from peftc.peft.configs import spec_of
from peftc.peft.models import root_in

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]

# What two configs may differ in.
_ORIGIN = ("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "task_type", "target_modules")
_OTHER = (*_ORIGIN, "lora_dropout", "init_lora_weights", "exclude_modules")


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Raise AdapterError (a ValueError) if adapters of these configs can't take each other's place."""
    one, other = spec_of(config0).to_dict(), spec_of(config1).to_dict()
    differing = [key for key in {**one, **other} if key not in _OTHER and one.get(key) != other.get(key)]
    if differing:
        key = differing[0]
        raise AdapterError(
            f"hot-swapping: the adapters differ in {', '.join(differing)} ({key}: {one.get(key)!r} and {other.get(key)!r})."
            " Load the new one beside the old (load_adapter, set_adapter); torch.compile compiles nothing anew for that if"
            " the shapes are the same"
        )


def hotswap_adapter_from_state_dict(
    model: Any, state_dict: Mapping[str, Tensor], adapter_name: str, config: Any, parameter_prefix: str = "lora_"
) -> None:
    """Give an adapter the values of another, by the keys of files, with or without its name in them.

    Raises AdapterError if the adapters differ in shape or scaling, CheckpointError if keys are missing or too many;
    nothing is changed then.
    """
    root = root_in(model)
    check_hotswap_configs_compatible(root.program.plan.adapters[adapter_name].to_dict(), config)
    plain = {key.replace(f".{adapter_name}.", "."): value for key, value in state_dict.items()}
    prefix = root.program.adapters[adapter_name].spec.key_prefix
    given = {key if key.startswith("base_model.") else prefix + key: value for key, value in plain.items()}
    load_state(root.program, adapter_name, given, where="hot-swapping")


def hotswap_adapter(
    model: Any, model_name_or_path: str | os.PathLike[str], adapter_name: str, torch_device: Any = None, **kwargs: Any
) -> None:
    """Give an adapter the values of one from a folder or a Hub repository. Raises as `hotswap_adapter_from_state_dict`."""
    folder = locate(model_name_or_path, kwargs.pop("subfolder", None), **kwargs)
    files = read_adapter(folder)
    hotswap_adapter_from_state_dict(model, files.tensors, adapter_name, load_spec(folder))


def prepare_model_for_compiled_hotswap(
    model: Any, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Nothing has to be prepared: scalings are tensors here, and adapters of one shape share a graph.

    Raises AdapterError for a `target_rank` that an adapter does not have: ranks are not padded.
    """
    ranks = {edit.constants.get("r") for edit in root_in(model).program.plan.edits if not edit.whole}
    if target_rank is not None and ranks != {target_rank}:
        raise AdapterError(
            f"target_rank={target_rank}: the adapters have rank {', '.join(sorted(map(str, ranks)))}, and ranks are not"
            " padded. Hot-swap adapters of equal rank, or load them side by side (load_adapter, set_adapter)"
        )
