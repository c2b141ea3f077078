"""`adapter_config.json`, `adapter_model.safetensors` and the model card: reading, and writing all or nothing."""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from peftc.errors import CheckpointError
from peftc.registry import spec_classes
from peftc.specs import AdapterSpec, load_spec
from peftc.specs.io import CONFIG_NAME

WEIGHTS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
# What training a prompt goes on with. PEFT does not know it, and reads the folder without it.
ENCODER_NAME = "prompt_encoder.safetensors"


def locate(
    source: str | os.PathLike[str], *, subfolder: str | None = None, revision: str | None = None, token: Any = None
) -> Path:
    """The folder of an adapter: `source` if it is one, else downloaded from the Hugging Face Hub.

    Raises CheckpointError if it is neither a folder nor a repository that can be reached.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        names = (CONFIG_NAME, WEIGHTS_NAME, BIN_NAME, ENCODER_NAME)
        patterns = [f"{subfolder}/{name}" if subfolder else name for name in names]
        try:
            folder = Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=patterns))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(
                f"{source}: neither a folder here nor a Hub repository that can be reached ({error})"
            ) from None
    return folder / subfolder if subfolder else folder


def read_spec(folder: Path) -> AdapterSpec:
    """The spec in the folder's `adapter_config.json`. Raises SpecError."""
    return load_spec(folder, spec_classes())


def read_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The folder's adapter tensors, on the CPU. Raises CheckpointError if there are none, or the file is broken.

    `adapter_model.bin`, a pickle, is read only if `allow_pickle`, and then with `weights_only=True`.
    """
    file = folder / WEIGHTS_NAME
    if file.is_file():
        return _load(file)
    pickle = folder / BIN_NAME
    if not pickle.is_file():
        raise CheckpointError(f"{folder}: holds no {WEIGHTS_NAME}")
    if not allow_pickle:
        raise CheckpointError(f"{pickle}: is a pickle; pass allow_pickle=True to read it (with weights_only=True)")
    try:
        return torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:  # The unpickler raises whatever the bytes make it raise.
        raise CheckpointError(f"{pickle}: can't be read with weights_only=True: {error}") from None


def read_encoder(folder: Path) -> dict[str, Tensor]:
    """The tensors of the encoder that a prompt is trained with, or none. Raises CheckpointError on a broken file."""
    file = folder / ENCODER_NAME
    return _load(file) if file.is_file() else {}


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str,
    encoder: Mapping[str, Tensor],
) -> None:
    """Write one adapter: every file under another name first, then renamed, the config last; modes as umask says.

    Raises CheckpointError if the folder can't be written; files that were there are then still whole.
    """
    files = {
        **({ENCODER_NAME: _bytes(encoder)} if encoder else {}),
        WEIGHTS_NAME: _bytes(tensors),
        CONFIG_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "README.md").exists():
            files = {"README.md": card.encode(), **files}
        with tempfile.TemporaryDirectory(prefix=".peftc-", dir=folder) as temporary:
            for name, content in files.items():
                _write(Path(temporary) / name, content)
            for name in files:
                os.replace(Path(temporary) / name, folder / name)
            if not encoder:  # One that is there made other rows.
                (folder / ENCODER_NAME).unlink(missing_ok=True)
    except OSError as error:
        size = sum(map(len, files.values()))
        raise CheckpointError(f"{folder}: can't write the adapter ({size:,} bytes): {error}") from None


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    contiguous = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    return save(contiguous, metadata={"format": "pt"})


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        with contextlib.suppress(OSError):  # Some network file systems have no fsync.
            os.fsync(file.fileno())
