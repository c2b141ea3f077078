"""Merging adapters into a checkpoint on disk, without the model in memory; and taking them out again."""

import contextlib
import json
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from peftc.checkpoint import Download, Verify, locate
from peftc.checkpoint.atomic import settle
from peftc.checkpoint.files import WEIGHTS_NAME
from peftc.checkpoint.lazy import FileTensors
from peftc.checkpoint.tensor_file import Header, parse_header, read_json
from peftc.errors import CheckpointError
from peftc.merge.undo_log import require_zstandard
from peftc.specs.io import CONFIG_NAME
from peftc.stream.changes import Options, Work, thought_through
from peftc.stream.job import Job, do, is_new, require_done
from peftc.stream.layout import base_outputs, changed_files, copied, log_name, merged_outputs
from peftc.stream.log import Log, places_in
from peftc.stream.sharded import UNDO, Checkpoint, inside, open_checkpoint

_TOLD = "undo.json"
_ORIGINALS = "originals"
PathLike = str | os.PathLike[str]


def merge_checkpoint(
    base_dir: PathLike,
    adapter: PathLike | Sequence[PathLike],
    out_dir: PathLike,
    *,
    weights: Sequence[float] | None = None,
    untie: bool = False,
    undo: bool = False,
    model: nn.Module | None = None,
    verify: Verify = "all",
    progress: bool = True,
    subfolder: str | None = None,
    **download: Unpack[Download],
) -> None:
    """Merge adapters into a checkpoint's safetensors files, tile by tile: memory does not grow with the model.

    The files in `out_dir` have the bytes that loading, merging and saving would give them. Several adapters are folded one
    after the other; with `weights` w, their weighted sum is (Σ wᵢ·Δᵢ exactly, as `combination_type="cat"`). Tensors that no
    adapter changes, tokenizer and configs are copied. Killed at any moment, the same call goes on where it was; `out_dir`
    has files only when all are there.

    `base_dir`: a folder with model.safetensors, or with shards and their index. `adapter`: as in `load_adapter`, with
    `subfolder` and `download`; safetensors only. `untie`: cut ties as `merge_adapter` does. `undo`: write `peftc_undo`,
    from which `unmerge_checkpoint` makes the base again, byte for byte (needs zstandard: `peftc[undo]`). `model`: one of
    the same structure, on any device, if it can't be told from `config.json` or the tensors' names. `verify`: as in
    `load_adapter`.

    Raises CheckpointError, SpecError, NoMatchError, MergeError; `out_dir` has no files then.
    """
    _require_posix()
    if undo:
        require_zstandard()
    sources = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)
    folders = [locate(source, subfolder, **download) for source in sources]
    if not folders:
        raise CheckpointError("merge_checkpoint: no adapter given")
    if weights is not None and len(weights) != len(folders):
        raise CheckpointError(f"merge_checkpoint: {len(weights)} weights for {len(folders)} adapters")
    base, out = Path(base_dir), Path(out_dir)
    settle(base)
    checkpoint = open_checkpoint(base)
    options = Options(None if weights is None else tuple(map(float, weights)), untie, verify, undo)
    told = {"base": str(base_dir), "adapters": list(map(str, sources)), "weights": weights and list(weights)}
    inputs = {**told, "untie": untie, "undo": undo, "files": _stamps(checkpoint, folders)}
    if not is_new(out):
        return require_done(out, inputs)
    with _shards(checkpoint) as shards:
        work = thought_through(checkpoint, shards, folders, model, options)
        files = {name: inside(base, name).read_bytes() for name in checkpoint.others}
        changed = changed_files(work)
        outputs = merged_outputs(work, undo)
        if undo:
            files |= _undo_files(work, folders, files, changed, options)
            outputs += [
                copied(f"{UNDO}/{name}/{WEIGHTS_NAME}", source.tensors) for name, source in work.sources.items()
            ]
        do(Job(f"merge into {out.name}", out, inputs, files | changed, outputs), progress)


def unmerge_checkpoint(
    merged_dir: PathLike, out_dir: PathLike, *, model: nn.Module | None = None, progress: bool = True
) -> None:
    """The base again, byte for byte, from what `merge_checkpoint(…, undo=True)` wrote. `model`: as there.

    Raises CheckpointError: no undo files, one of them or a merged tensor was changed; `out_dir` has no files then.
    """
    _require_posix()
    require_zstandard()
    folder, out = Path(merged_dir), Path(out_dir)
    settle(folder)
    if not (folder / UNDO / _TOLD).is_file():
        raise CheckpointError(f"{folder}: has no {UNDO}; it was not merged with undo=True")
    merged = open_checkpoint(folder)
    told = read_json(folder / UNDO / _TOLD)
    base = _before(merged, told)
    adapters = [folder / UNDO / name for name in told["adapters"]]
    inputs = {"merged": str(merged_dir), "files": _stamps(merged, adapters)}
    if not is_new(out):
        return _require_base(out, told)
    files = {name: _original(folder, name, digest) for name, digest in told["files"].items()}
    with _shards(merged) as shards, _log(merged) as log:
        weights = None if told["weights"] is None else tuple(told["weights"])
        options = Options(weights, told["untie"], "files", True, frozenset(told["brought"]), told["tile"])
        work = thought_through(base, shards, adapters, model, options)
        do(Job(f"unmerge into {out.name}", out, inputs, files, base_outputs(work, log), recorded=False), progress)


def _require_posix() -> None:
    if sys.platform == "win32":
        raise CheckpointError(
            "merging on disk writes one file from several threads (pwrite), which Windows has not: use WSL, or load the"
            " model and merge_and_unload()"
        )


def _require_base(out: Path, told: Mapping[str, Any]) -> None:
    """Raise CheckpointError if what is in `out` is not what unmerging writes there, as far as names and sizes tell."""
    found = {file.relative_to(out).as_posix(): file for file in out.rglob("*") if file.is_file()}
    small = all(
        sha256(found[name].read_bytes()).hexdigest() == told["files"][name] for name in told["files"] if name in found
    )
    sizes = {name: file.stat().st_size for name, file in found.items() if name in told["shards"]}
    if not small or sizes != told["shards"] or set(found) != {*told["files"], *told["shards"]}:
        raise CheckpointError(f"{out}: there is something in it already; give a new or an empty folder")


def _stamps(checkpoint: Checkpoint, folders: Sequence[Path]) -> dict[str, Any]:
    """What tells one state of the files that are read from another: sizes, and times of change in ns."""
    paths = [checkpoint.folder / name for name in (*checkpoint.shards, *checkpoint.others)]
    paths += [folder / name for folder in folders for name in (CONFIG_NAME, WEIGHTS_NAME)]
    stats = {str(path): path.stat() for path in paths if path.exists()}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


@contextlib.contextmanager
def _shards(checkpoint: Checkpoint) -> Generator[Mapping[str, FileTensors]]:
    with contextlib.ExitStack() as stack:
        opened = {name: FileTensors(inside(checkpoint.folder, name)) for name in checkpoint.shards}
        for file in opened.values():
            stack.callback(file.close)
        yield opened


@contextlib.contextmanager
def _log(merged: Checkpoint) -> Generator[Log]:
    with contextlib.ExitStack() as stack:
        places: dict[str, Any] = {}
        for name in merged.shards:
            path = inside(merged.folder, log_name(name))
            file = stack.enter_context(path.open("rb"))
            places |= places_in(file.fileno(), path, path.stat().st_size)
        yield Log(places)


def _undo_files(
    work: Work, folders: Sequence[Path], files: Mapping[str, bytes], changed: Mapping[str, bytes], options: Options
) -> dict[str, bytes]:
    """What `unmerge_checkpoint` needs beside the logs and the adapters' tensors."""
    kept = {name: content for name, content in files.items() if name in changed or name == "config.json"}
    heads = {f"{name}.header": header.raw for name, header in work.checkpoint.shards.items()}
    told = {
        "version": 1,
        "adapters": list(work.sources),
        "weights": options.weights,
        "untie": options.untie,
        "tile": options.tile,
        "brought": [name for name, change in work.changes.items() if change.start is not None],
        "files": {name: sha256(content).hexdigest() for name, content in files.items()},
        "shards": {name: header.size for name, header in work.checkpoint.shards.items()},
    }
    return {
        f"{UNDO}/{_TOLD}": (json.dumps(told, indent=2) + "\n").encode(),
        **{f"{UNDO}/{_ORIGINALS}/{name}": content for name, content in {**kept, **heads}.items()},
        **{
            f"{UNDO}/{name}/{CONFIG_NAME}": (folder / CONFIG_NAME).read_bytes()
            for name, folder in zip(work.sources, folders, strict=True)
        },
    }


def _before(merged: Checkpoint, told: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint as it was before the merge, whose config is among the originals."""
    originals = merged.folder / UNDO / _ORIGINALS
    shards = {name: _header(originals / f"{name}.header", size) for name, size in told["shards"].items()}
    where = {tensor: name for name, header in shards.items() for tensor in header.entries}
    return replace(merged, shards=shards, where=where, configs=originals)


def _header(file: Path, size: int) -> Header:
    try:
        return parse_header(file.read_bytes(), size)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: is damaged: {error}") from None


def _original(folder: Path, name: str, digest: str) -> bytes:
    """A file of the base that is no shard: as it is, or as it was put aside."""
    own = folder / UNDO / _ORIGINALS / name
    content = (own if own.is_file() else inside(folder, name)).read_bytes()
    if sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{folder / name}: is not the base's; it was changed since the merge. Put it back.")
    return content
