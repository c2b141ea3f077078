"""A model's checkpoint as it lies in a folder: shards, their headers, and everything else to take along."""

import os
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from peftc.checkpoint.lazy import FileTensors
from peftc.checkpoint.tensor_file import Entry, Header, read_header, read_json
from peftc.errors import CheckpointError
from peftc.specs.io import CONFIG_NAME

# As transformers and diffusers call them.
_STEMS = ("model", "diffusion_pytorch_model")
# Weights in other formats would be those from before the merge.
_STALE = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".onnx_data", ".safetensors")
UNDO = "peftc_undo"
RECORD = "peftc_merge.json"


@dataclass(frozen=True)
class Checkpoint:
    """`shards`: headers by file name; `where`: the shard of every tensor; `others`: files to copy, by path,
    the index among them.

    `configs`: the folder of its config.json.
    """

    folder: Path
    configs: Path
    shards: Mapping[str, Header]
    where: Mapping[str, str]
    index: str | None
    others: tuple[str, ...]

    def entry(self, tensor: str) -> Entry:
        """Where a tensor lies in its shard."""
        return self.shards[self.where[tensor]].entries[tensor]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(header.size for header in self.shards.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the index and the headers of a checkpoint's folder; no weights.

    Raises CheckpointError: no safetensors there, a shard that is missing, broken or outside of the folder.
    """
    index, names = _shard_names(folder)
    shards = {name: read_header(inside(folder, name)) for name in dict.fromkeys(names.values())}
    if index is None:
        names = {tensor: name for name, header in shards.items() for tensor in header.entries}
    for tensor, name in names.items():
        if tensor not in shards[name].entries:
            raise CheckpointError(f"{folder / str(index)}: says that {tensor} is in {name}, which does not have it")
    return Checkpoint(folder, folder, shards, names, index, tuple(_others(folder)))


@contextmanager
def opened_shards(checkpoint: Checkpoint) -> Generator[Mapping[str, FileTensors]]:
    """The open files of a checkpoint's shards by name."""
    with ExitStack() as stack:
        opened = {name: FileTensors(inside(checkpoint.folder, name)) for name in checkpoint.shards}
        for file in opened.values():
            stack.callback(file.close)
        yield opened


def _shard_names(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The name of the index, if there is one, and the shard by tensor (by itself, where there is none)."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder. A merge works on files: give a checkpoint's folder on this machine"
        )
    for stem in _STEMS:
        if (folder / f"{stem}.safetensors").exists():
            return None, {"": f"{stem}.safetensors"}
        index = f"{stem}.safetensors.index.json"
        if (folder / index).exists():
            return index, _weight_map(folder, index)
    pickles = next(folder.glob("pytorch_model*.bin"), None)
    hint = f" {pickles.name} is a pickle: load the model and save it again." if pickles else ""
    raise CheckpointError(f"{folder}: holds no model.safetensors and no index of shards.{hint}")


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    found: Any = read_json(inside(folder, index)).get("weight_map")
    entries = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if not entries or not all(isinstance(name, str) and name.endswith(".safetensors") for name in entries.values()):
        raise CheckpointError(f"{folder / index}: its weight_map is no mapping of tensors to safetensors files")
    return entries


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises CheckpointError if it is, or links to one, outside of it.

    The Hub's cache keeps a snapshot's files in the `blobs` beside `snapshots`; links there are its own.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: {name!r} is a path out of the folder; nothing was read")
    real, root = Path(os.path.realpath(folder / path)), Path(os.path.realpath(folder))
    blobs = [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else []
    if not any(real.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise CheckpointError(f"{folder}: {name!r} is a link out of the folder, to {real}; nothing was read")
    if not real.is_file():
        raise CheckpointError(f"{folder}: lacks the file {name!r}")
    return folder / path


def _others(folder: Path) -> list[str]:
    """Configs, tokenizers, cards, licences: all but weights and what is hidden."""
    found: list[str] = []
    for place, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != UNDO)
        relative = Path(place).relative_to(folder)
        found += [(relative / name).as_posix() for name in sorted(names) if not name.startswith(".")]
    # An adapter's config beside a merged model would make transformers look for the adapter.
    gone = (RECORD, CONFIG_NAME)
    names = [name for name in found if PurePosixPath(name).name not in gone]
    return [name for name in names if not name.endswith((*_STALE, ".bin.index.json"))]


def _unreadable(error: OSError) -> None:
    raise CheckpointError(f"{error.filename}: can't be read, so the new folder would lack it: {error.strerror}")
