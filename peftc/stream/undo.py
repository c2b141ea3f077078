"""What lies in `peftc_undo`: all but the logs that it takes to have the base again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from peftc.checkpoint.tensor_file import Header, parse_header, read_json
from peftc.errors import CheckpointError
from peftc.specs.io import CONFIG_NAME
from peftc.stream.sharded import UNDO, Checkpoint, inside
from peftc.stream.work import Options, Work

_TOLD = "undo.json"
_ORIGINALS = "originals"


def _is_inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError("is a path out of the folder")
    return name


Name = Annotated[str, AfterValidator(_is_inside)]


class Told(BaseModel):
    """How a merge was made. `brought`: what adapters brought. Of the base: SHA-256 of `files`, sizes of `shards`."""

    model_config = ConfigDict(strict=True, frozen=True)

    version: Literal[1]
    adapters: list[Name]
    weights: list[float] | None
    untie: bool
    tile: PositiveInt
    brought: list[str]
    files: dict[Name, str]
    shards: dict[Name, NonNegativeInt]


def read_told(folder: Path) -> Told:
    """How the checkpoint in `folder` was merged. Raises CheckpointError if that is not said, or makes no sense."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not (folder / UNDO / _TOLD).exists():
        raise CheckpointError(f"{folder}: has no {UNDO}; it was not merged with undo=True")
    file = inside(folder, f"{UNDO}/{_TOLD}")
    try:
        return Told.model_validate(read_json(file))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{file}: is damaged: {where}: {error.errors()[0]['msg']}") from None


def require_base(out: Path, told: Told) -> None:
    """Raise CheckpointError if what is in `out` is not what unmerging writes there, as far as names and sizes tell."""
    found = {file.relative_to(out).as_posix(): file for file in out.rglob("*") if file.is_file()}
    small = all(
        sha256(found[name].read_bytes()).hexdigest() == told.files[name] for name in told.files if name in found
    )
    sizes = {name: file.stat().st_size for name, file in found.items() if name in told.shards}
    if not small or sizes != told.shards or set(found) != {*told.files, *told.shards}:
        raise CheckpointError(f"{out}: there is something in it already; give a new or an empty folder")


def undo_files(
    work: Work, folders: Sequence[Path], files: Mapping[str, bytes], changed: Mapping[str, bytes], options: Options
) -> dict[str, bytes]:
    """What `unmerge_checkpoint` needs beside the logs and the adapters' tensors."""
    kept = {name: content for name, content in files.items() if name in changed or name == "config.json"}
    heads = {f"{name}.header": header.raw for name, header in work.checkpoint.shards.items()}
    told = Told(
        version=1,
        adapters=list(work.sources),
        weights=None if options.weights is None else list(options.weights),
        untie=options.untie,
        tile=options.tile,
        brought=[name for name, change in work.changes.items() if change.start is not None],
        files={name: sha256(content).hexdigest() for name, content in files.items()},
        shards={name: header.size for name, header in work.checkpoint.shards.items()},
    )
    return {
        f"{UNDO}/{_TOLD}": (told.model_dump_json(indent=2) + "\n").encode(),
        **{f"{UNDO}/{_ORIGINALS}/{name}": content for name, content in {**kept, **heads}.items()},
        **{
            f"{UNDO}/{name}/{CONFIG_NAME}": (folder / CONFIG_NAME).read_bytes()
            for name, folder in zip(work.sources, folders, strict=True)
        },
    }


def before(merged: Checkpoint, told: Told) -> Checkpoint:
    """The checkpoint as it was before the merge, whose config is among the originals."""
    originals = merged.folder / UNDO / _ORIGINALS
    shards = {name: _header(inside(originals, f"{name}.header"), size) for name, size in told.shards.items()}
    where = {tensor: name for name, header in shards.items() for tensor in header.entries}
    # Where a tensor is stored twice, the index says which one counts.
    counts = {tensor: name for tensor, name in merged.where.items() if tensor in shards[name].entries}
    where |= counts
    return replace(merged, shards=shards, where=where, configs=originals)


def _header(file: Path, size: int) -> Header:
    try:
        return parse_header(file.read_bytes(), size)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: is damaged: {error}") from None


def original(folder: Path, name: str, digest: str) -> bytes:
    """A file of the base that is no shard: as it is, or as it was put aside."""
    own = f"{UNDO}/{_ORIGINALS}/{name}"
    content = inside(folder, own if (folder / own).exists() else name).read_bytes()
    if sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{folder / name}: is not the base's; it was changed since the merge. Put it back.")
    return content
