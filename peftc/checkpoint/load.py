"""Reading an adapter's folder: the spec to compile, and the tensors to put into it."""

import warnings
from dataclasses import replace
from pathlib import Path

from peftc.checkpoint.files import AdapterFiles, read_folder
from peftc.choices import Verify
from peftc.prompts.files import trainable_spec
from peftc.specs import AdapterSpec


def read_adapter(
    folder: Path,
    *,
    config: AdapterSpec | None = None,
    is_trainable: bool = False,
    allow_pickle: bool = False,
    verify: Verify = "all",
) -> AdapterFiles:
    """An adapter's files, with the spec to compile it by (`config` in its place, if given).

    A prompt that is to be trained without the encoder it was saved with becomes one without reparameterisation, with a
    warning. Raises SpecError, CheckpointError.
    """
    files = read_folder(folder, config=config, verify=verify, allow_pickle=allow_pickle, encoder=is_trainable)
    spec = files.spec
    if is_trainable:
        spec, warning = trainable_spec(spec, files.encoder)
        if warning:
            warnings.warn(warning, stacklevel=4)
    return replace(files, spec=spec.model_copy(update={"inference_mode": not is_trainable}))
