"""Reading an adapter's folder: the spec to compile, and the tensors to put into it."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from peftc.checkpoint.files import AdapterFiles, read_folder
from peftc.choices import Verify
from peftc.errors import CheckpointError
from peftc.prompts.files import trainable_spec
from peftc.specs import AdapterSpec

# What all keys of a file begin with.
_PREFIXES = ("base_model.model.", "base_model.")


def read_adapter(
    folder: Path,
    *,
    config: AdapterSpec | None = None,
    is_trainable: bool = False,
    allow_pickle: bool = False,
    verify: Verify = "all",
    key_mapping: Mapping[str, str] | None = None,
) -> AdapterFiles:
    """An adapter's files, with the spec to compile it by (`config` in its place, if given). `key_mapping`: see `remapped`.

    A prompt that is to be trained without the encoder it was saved with becomes one without reparameterisation, with a
    warning. Raises SpecError, CheckpointError.
    """
    files = read_folder(folder, config=config, verify=verify, allow_pickle=allow_pickle, encoder=is_trainable)
    if key_mapping:
        files = replace(files, tensors=remapped(files.tensors, key_mapping, files.where))
    spec = files.spec
    if is_trainable:
        spec, warning = trainable_spec(spec, files.encoder)
        if warning:
            warnings.warn(warning, stacklevel=4)
    return replace(files, spec=spec.model_copy(update={"inference_mode": not is_trainable}))


def remapped(tensors: Mapping[str, Tensor], mapping: Mapping[str, str], where: str) -> dict[str, Tensor]:
    """`tensors` under other keys: of `mapping`, by regular expression, the first counts that occurs in a name, without the
    prefix that all have. Raises CheckpointError on what is no regular expression, and if two tensors get one key.
    """
    told: Any = mapping
    if not isinstance(told, Mapping) or not all(isinstance(text, str) for pair in told.items() for text in pair):
        raise CheckpointError(f"key_mapping={told!r}: give texts by regular expression")
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
        name = key.removeprefix(prefix)
        try:
            news = (re.subn(pattern, to, name) for pattern, to in mapping.items())
            new = prefix + next((text for text, count in news if count), name)
        except re.error as error:
            raise CheckpointError(f"key_mapping: {mapping!r} is not of regular expressions: {error}") from None
        if new in found:
            raise CheckpointError(f"{where}: key_mapping gives two tensors the name {new}; make its patterns narrower")
        found[new] = tensor
    return found
