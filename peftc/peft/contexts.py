"""PEFT's helpers: small things around models and files."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from peftc.checkpoint import locate
from peftc.errors import AdapterError, PeftcError
from peftc.peft.rooted import root_in
from peftc.specs.io import CONFIG_NAME

__all__ = [
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder or a Hub repository holds an adapter."""
    try:
        return (locate(model_name_or_path, None) / CONFIG_NAME).exists()
    except PeftcError:
        return False


@contextmanager
def rescale_adapter_scale(model: Any, multiplier: Any) -> Generator[None]:
    """A context in which active adapters change the base `multiplier` times as much. Raises AdapterError, TypeError."""
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
        raise TypeError(f"multiplier: expected a number, got {multiplier!r}")
    root = root_in(model)
    before = {name: root.program.adapters[name].scale for name in root.program.active}
    if not before:
        raise AdapterError("no adapter is active; set_adapter first")
    for name, scale in before.items():
        root.compiled.set_scale(name, scale * multiplier)
    try:
        yield
    finally:
        for name, scale in before.items():
            root.compiled.set_scale(name, scale)


@contextmanager
def disable_input_dtype_casting(model: Any, active: bool = True) -> Generator[None]:
    """A context that changes nothing: inputs are cast to an adapter's dtype inside its term alone."""
    yield


def update_forward_signature(model: Any) -> None:
    """Nothing: `model.get_base_model().forward` has the signature."""


def update_generate_signature(model: Any) -> None:
    """Nothing: `model.get_base_model().generate` has the signature."""


def update_signature(model: Any, method: str = "all") -> None:
    """Nothing: the base's methods have the signatures."""
