"""The manifest of an adapter's file: hashes of its tensors, a copy of its config, a fingerprint of its base.

It is a text in the metadata of `adapter_model.safetensors`, which PEFT, transformers and vLLM do not look at. So config and
weights name each other: a bit that flipped, an edited alpha, the files of two saves in one folder are noticed.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Tensor

from peftc.checkpoint.base import BaseFingerprint
from peftc.checkpoint.tensor_file import Bytes, Entry, bytes_of, dtype_name, to_bytes
from peftc.errors import CheckpointError, SpecError
from peftc.registry import spec_classes
from peftc.specs import AdapterSpec, load_spec

_KEY = "peftc"
_VERSION = 1
_OVERRIDE = "To load it all the same: verify='nothing'."
# What a person may put right without changing what the adapter computes.
_FREE = frozenset({"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"})


@dataclass(frozen=True)
class Manifest:
    """What an adapter's file was when it was saved. `tensors`: a hash by key."""

    tensors: Mapping[str, str]
    config: Mapping[str, Any]
    base: BaseFingerprint | None


def sealed(tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: BaseFingerprint | None) -> bytes:
    """A safetensors file of `tensors` with its manifest."""
    own = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    hashes = {key: _hash(dtype_name(value), tuple(value.shape), [bytes_of(value)]) for key, value in own.items()}
    manifest = Manifest(hashes, config, base)
    text = json.dumps({"version": _VERSION, **asdict(manifest)}, sort_keys=True)
    return to_bytes(own, {"format": "pt", _KEY: f"{_digest(text)} {text}"})


def manifest_of(metadata: Mapping[str, str], where: Any) -> Manifest | None:
    """The manifest in a file's metadata, or None. Raises CheckpointError if it is damaged."""
    damaged = CheckpointError(f"{where}: its manifest is damaged, so nothing in it can be relied on. {_OVERRIDE}")
    if _KEY not in metadata:
        if any(re.match(r"[0-9a-f]{32} \{", text) for text in metadata.values()):
            raise damaged  # It is there, under a name that is not its own.
        return None
    digest, _, text = metadata[_KEY].partition(" ")
    if digest != _digest(text):
        raise damaged
    try:
        fields = json.loads(text)
        if fields.pop("version") != _VERSION:
            return None  # Of a later peftc: what it says is not known here.
        base = fields.pop("base")
        return Manifest(**fields, base=None if base is None else BaseFingerprint(**base))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise damaged from None


def require_tensors(
    manifest: Manifest, entries: Mapping[str, Entry], read: Callable[[Entry], Iterable[Bytes]], where: Any
) -> None:
    """Raise CheckpointError, naming them, if the tensors that `read` gives the bytes of are not those that were saved."""
    wrong = [key for key, e in entries.items() if manifest.tensors.get(key) != _hash(e.dtype, e.shape, read(e))]
    lost = [key for key in manifest.tensors if key not in entries]
    if wrong or lost:
        named = ", ".join([*wrong, *lost][:4])
        raise CheckpointError(
            f"{where}: {len(wrong) + len(lost)} of {len(manifest.tensors)} tensors are not what was saved: {named}. The"
            f" file is damaged, or was changed by something that kept its manifest; get it again. {_OVERRIDE}"
        )


def require_config(manifest: Manifest, spec: AdapterSpec, where: Any) -> None:
    """Raise CheckpointError, naming the fields, if the config is not the one the weights were saved with."""
    try:
        saved = _fields(load_spec(manifest.config, spec_classes()))
    except SpecError:
        return  # Of a method or with fields of a later peftc; then the file's own config says so.
    now = _fields(spec)
    changed = [key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key)]
    if changed:
        told = "; ".join(f"{key} is {now.get(key)!r}, was {saved.get(key)!r}" for key in changed[:4])
        raise CheckpointError(
            f"{where}: the config is not the one these weights were saved with: {told}. Put it back, or get both files"
            f" again. {_OVERRIDE}"
        )


def _hash(dtype: str, shape: tuple[int, ...], content: Iterable[Bytes]) -> str:
    """128 bits of the SHA-256 of a tensor: its dtype, its shape, its bytes. As hex digits."""
    digest = hashlib.sha256(f"{dtype}{shape}".encode())
    for part in content:
        digest.update(part)
    return digest.hexdigest()[:32]


def _fields(spec: AdapterSpec) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(json.dumps({k: v for k, v in spec.to_dict().items() if k not in _FREE})))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
