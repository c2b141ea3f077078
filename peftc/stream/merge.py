"""Merging adapters into a checkpoint on disk, without the model in memory; and taking them out again."""

import contextlib
import os
import sys
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from peftc.checkpoint import Download, Verify, locate
from peftc.checkpoint.atomic import explained, settle
from peftc.checkpoint.files import WEIGHTS_NAME
from peftc.errors import CheckpointError
from peftc.merge.undo_log import require_zstandard
from peftc.specs.io import CONFIG_NAME
from peftc.stream.changes import thought_through
from peftc.stream.job import Job, do, is_new, require_done
from peftc.stream.layout import base_outputs, changed_files, copied, log_name, merged_outputs
from peftc.stream.log import Log, places_in
from peftc.stream.sharded import UNDO, Checkpoint, inside, open_checkpoint, opened_shards
from peftc.stream.undo import before, original, read_told, require_base, undo_files
from peftc.stream.work import Options, Work
from peftc.stream.write import Output

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
    `load_adapter`. `progress`: show how much is written, if somebody looks on.

    Example: peftc.merge_checkpoint("base", "adapter", "merged", undo=True)

    Raises CheckpointError, SpecError, NoMatchError, MergeError; `out_dir` has no files then.
    """
    _require_able(undo)
    sources = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)
    folders = [locate(source, subfolder, **download) for source in sources]
    options = Options(_numbers(weights, len(folders)), untie, verify, undo)
    base, out = Path(base_dir).resolve(), Path(out_dir)
    record = {"base": str(base_dir), "adapters": list(map(str, sources)), "weights": options.weights}
    with explained(out, "merge into", 0):
        settle(base)
        checkpoint = open_checkpoint(base)
        inputs = partial(_inputs, checkpoint, folders, options)
        stamped = inputs()
        if not is_new(out):
            return require_done(out, stamped)
        with opened_shards(checkpoint) as shards:
            work = thought_through(checkpoint, shards, folders, model, options)
            do(Job(f"merge into {out.name}", out, stamped, inputs, *_contents(work, folders), record), progress)


def _inputs(checkpoint: Checkpoint, folders: Sequence[Path], options: Options) -> dict[str, Any]:
    """All that the result depends on, as it is now."""
    told = {"weights": options.weights, "untie": options.untie, "undo": options.undo}
    return {**told, "files": _stamps(checkpoint, folders)}


def _contents(work: Work, folders: Sequence[Path]) -> tuple[dict[str, bytes], list[Output]]:
    """What the new folder has: small files by path, and what is written tile by tile."""
    options = work.options
    files = {name: inside(work.checkpoint.folder, name).read_bytes() for name in work.checkpoint.others}
    changed, outputs = changed_files(work), merged_outputs(work, options.undo)
    if options.undo:
        files |= undo_files(work, folders, files, changed, options)
        outputs += [copied(f"{UNDO}/{name}/{WEIGHTS_NAME}", source.original) for name, source in work.sources.items()]
    return files | changed, outputs


def unmerge_checkpoint(
    merged_dir: PathLike, out_dir: PathLike, *, model: nn.Module | None = None, progress: bool = True
) -> None:
    """The base again, byte for byte, from what `merge_checkpoint(…, undo=True)` wrote: its shards, and what was copied.

    `model`, `progress`: as there. Killed at any moment, the same call goes on where it was.

    Raises CheckpointError: no undo files, one of them or a merged tensor was changed; `out_dir` has no files then.

    Example: peftc.unmerge_checkpoint("merged", "base")
    """
    _require_able(undo=True)
    folder, out = Path(merged_dir).resolve(), Path(out_dir)
    with explained(out, "unmerge into", 0):
        settle(folder)
        told, merged = read_told(folder), open_checkpoint(folder)
        base = before(merged, told)
        adapters = [folder / UNDO / name for name in told.adapters]
        logs = [inside(folder, log_name(name)) for name in merged.shards]

        def inputs() -> dict[str, Any]:
            return {"told": told.model_dump(), "files": _stamps(merged, adapters, logs)}

        if not is_new(out):
            return require_base(out, told)
        stamped = inputs()
        files = {name: original(folder, name, digest) for name, digest in told.files.items()}
        with opened_shards(merged) as shards, _log(merged) as log:
            weights = None if told.weights is None else tuple(told.weights)
            options = Options(weights, told.untie, "files", True, frozenset(told.brought), told.tile)
            work = thought_through(base, shards, adapters, model, options)
            do(Job(f"unmerge into {out.name}", out, stamped, inputs, files, base_outputs(work, log)), progress)


def _numbers(weights: Sequence[float] | None, count: int) -> tuple[float, ...] | None:
    if count == 0:
        raise CheckpointError("merge_checkpoint: no adapter given")
    if weights is None:
        return None
    try:
        numbers = tuple(map(float, weights))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"merge_checkpoint: weights={weights!r}: {error}; give a number for each adapter"
        ) from None
    if len(numbers) != count:
        raise CheckpointError(f"merge_checkpoint: {len(numbers)} weights for {count} adapters")
    return numbers


def _require_able(undo: bool) -> None:
    if sys.platform == "win32":
        raise CheckpointError(
            "merging on disk writes one file from several threads (pwrite), which Windows has not: use WSL, or load the"
            " model and merge_and_unload()"
        )
    if undo:
        require_zstandard()


def _stamps(checkpoint: Checkpoint, folders: Sequence[Path], more: Sequence[Path] = ()) -> dict[str, Any]:
    """What tells one state of the files that are read from another: sizes, and times of change in ns."""
    paths = [checkpoint.folder / name for name in (*checkpoint.shards, *checkpoint.others)]
    paths += [folder / name for folder in folders for name in (CONFIG_NAME, WEIGHTS_NAME)]
    paths += more
    stats = {str(path.resolve()): path.stat() for path in paths if path.exists()}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


@contextlib.contextmanager
def _log(merged: Checkpoint) -> Generator[Log]:
    with contextlib.ExitStack() as stack:
        places: dict[str, Any] = {}
        for name in merged.shards:
            path = inside(merged.folder, log_name(name))
            file = stack.enter_context(path.open("rb"))
            places |= places_in(file.fileno(), path, path.stat().st_size)
        yield Log(places)
