"""Reading an adapter's folder: the spec to compile, and the tensors to put into it."""

import warnings
from pathlib import Path

from torch import Tensor

from peftc.checkpoint.files import read_encoder, read_spec, read_tensors
from peftc.checkpoint.prompts import trainable_spec
from peftc.errors import CheckpointError
from peftc.specs import AdapterSpec


def read_adapter(
    folder: Path, *, config: AdapterSpec | None = None, is_trainable: bool, allow_pickle: bool
) -> tuple[AdapterSpec, dict[str, Tensor], dict[str, Tensor]]:
    """The spec (`config` in its place, if given), the adapter's tensors, and those of a prompt's encoder.

    A prompt that is to be trained without the encoder it was saved with becomes one without reparameterisation, with a
    warning. Raises SpecError, CheckpointError.
    """
    spec = read_spec(folder) if config is None else config
    tensors = read_tensors(folder, allow_pickle=allow_pickle)
    encoder = _encoder(folder, is_trainable)
    if is_trainable:
        spec, warning = trainable_spec(spec, encoder)
        if warning:
            warnings.warn(warning, stacklevel=4)
    return spec.model_copy(update={"inference_mode": not is_trainable}), tensors, encoder


def _encoder(folder: Path, needed: bool) -> dict[str, Tensor]:
    try:
        return read_encoder(folder)
    except CheckpointError as error:
        if needed:
            raise
        warnings.warn(f"{error}. Inference does not need it; what is saved from here will lack it", stacklevel=5)
        return {}
