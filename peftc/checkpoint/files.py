"""An adapter's folder: `adapter_config.json`, `adapter_model.safetensors`, and the encoder of a prompt."""

import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from peftc.checkpoint.atomic import steady
from peftc.checkpoint.base import BaseFingerprint
from peftc.checkpoint.lazy import FileTensors
from peftc.checkpoint.manifest import Manifest, manifest_of, require_config, require_tensors, sealed
from peftc.checkpoint.tensor_file import Bytes, Entry, Header, read_tensors
from peftc.choices import Verify
from peftc.errors import CheckpointError
from peftc.registry import spec_classes
from peftc.specs import AdapterSpec, load_spec
from peftc.specs.io import CONFIG_NAME

WEIGHTS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
# What training a prompt goes on with. PEFT does not know it, and reads the folder without it.
ENCODER_NAME = "prompt_encoder.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as its folder has it. `encoder`: what makes a prompt's rows; `base`: None if the files don't say."""

    spec: AdapterSpec
    tensors: Mapping[str, Tensor]
    encoder: Mapping[str, Tensor]
    base: BaseFingerprint | None
    where: str

    def on(self, model: nn.Module) -> "AdapterFiles":
        """The same for `model`, where the file is of another layout (experts that were linears each)."""
        spec, tensors = self.spec.on_model(model, self.tensors)
        same = spec is self.spec and tensors is self.tensors
        return self if same else replace(self, spec=spec, tensors=tensors)


def read_folder(
    folder: Path, *, config: AdapterSpec | None, verify: Verify, allow_pickle: bool, encoder: bool
) -> AdapterFiles:
    """Read an adapter; with `config` in the place of the folder's own. The tensors are on the CPU, in their own memory.

    `encoder`: a prompt's encoder is needed, so a broken one is an error. Raises SpecError, CheckpointError: no adapter,
    a file that is broken, or is not what its manifest says (unless `verify="nothing"`).
    """
    with steady(folder):
        spec = load_spec(folder, spec_classes()) if config is None else config
        tensors, manifest = _weights(folder, allow_pickle, verify)
        rows = _encoder(folder / ENCODER_NAME, encoder, verify)
    return _known(folder, spec, tensors, rows, manifest, verify, own_config=config is None)


def _known(
    folder: Path,
    spec: AdapterSpec,
    tensors: Mapping[str, Tensor],
    encoder: Mapping[str, Tensor],
    manifest: Manifest | None,
    verify: Verify,
    own_config: bool,
) -> AdapterFiles:
    if manifest is not None and own_config:
        require_config(manifest, spec, folder / CONFIG_NAME)
    base = manifest.base if manifest is not None and verify == "all" else None
    return AdapterFiles(spec, tensors, encoder, base, str(folder))


def open_folder(folder: Path, verify: Verify) -> tuple[AdapterFiles, FileTensors]:
    """As `read_folder`, but the tensors are read when they are asked for, and only compared with the manifest here.

    Raises SpecError, CheckpointError.
    """
    with steady(folder):
        spec = load_spec(folder, spec_classes())
        if not (folder / WEIGHTS_NAME).exists():
            pickled = (folder / BIN_NAME).exists()
            more = ". A pickle can be loaded, and saved again from there (allow_pickle=True)" if pickled else ""
            raise CheckpointError(f"{_none_in(folder)}{more}")
        tensors = FileTensors(folder / WEIGHTS_NAME)
    manifest = _manifest(tensors.header, tensors.chunks, tensors.file, verify)
    return _known(folder, spec, tensors, {}, manifest, verify, own_config=True), tensors


def adapter_files(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    encoder: Mapping[str, Tensor],
    base: BaseFingerprint | None,
) -> dict[str, bytes]:
    """The contents of an adapter's files by name."""
    return {
        **({ENCODER_NAME: sealed(encoder, {}, None)} if encoder else {}),
        WEIGHTS_NAME: sealed(tensors, config, base),
        CONFIG_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }


def pickled(content: bytes) -> bytes:
    """The tensors of a safetensors file as a pickle has them, which says nothing of what they are of."""
    file = io.BytesIO()
    torch.save(load(content), file)
    return file.getvalue()


def _weights(folder: Path, allow_pickle: bool, verify: Verify) -> tuple[Mapping[str, Tensor], Manifest | None]:
    file, pickle = folder / WEIGHTS_NAME, folder / BIN_NAME
    if file.exists():
        return _checked(file, verify)
    if not pickle.exists():
        raise CheckpointError(_none_in(folder))
    if not allow_pickle:
        raise CheckpointError(f"{pickle}: is a pickle; pass allow_pickle=True to read it (with weights_only=True)")
    return _unpickled(pickle), None


def _none_in(folder: Path) -> str:
    file = folder / WEIGHTS_NAME
    broken = f": it is a link to {file.readlink()}, which is not there" if file.is_symlink() else ""
    return f"{folder}: holds no {WEIGHTS_NAME}{broken}"


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        data: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # The unpickler raises whatever the bytes make it raise.
        raise CheckpointError(f"{file}: can't be read with weights_only=True: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(f"{file}: holds a {type(data).__name__}, no tensors by name")
    return {str(key): value for key, value in data.items()}


def _checked(file: Path, verify: Verify) -> tuple[Mapping[str, Tensor], Manifest | None]:
    tensors, header, content = read_tensors(file)
    return tensors, _manifest(header, lambda entry: [content[entry.start : entry.stop]], file, verify)


def _manifest(header: Header, read: Callable[[Entry], Iterable[Bytes]], file: Path, verify: Verify) -> Manifest | None:
    """The manifest of a file, which its tensors agree with, if there is one to go by. `read` gives their bytes."""
    if verify not in ("all", "files", "nothing"):
        raise CheckpointError(f"verify={verify!r}: valid are 'all', 'files' and 'nothing'")
    manifest = None if verify == "nothing" else manifest_of(header.metadata, file)
    if manifest is not None:
        require_tensors(manifest, header.entries, read, file)
    return manifest


def _encoder(file: Path, needed: bool, verify: Verify) -> Mapping[str, Tensor]:
    if not file.exists():
        return {}
    try:
        return _checked(file, verify)[0]
    except CheckpointError as error:
        if needed:
            raise
        warnings.warn(f"{error}. Inference does not need it; what is saved from here will lack it", stacklevel=6)
        return {}
