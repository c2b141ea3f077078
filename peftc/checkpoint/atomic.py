"""Changing files of a folder all at once: after a crash at any moment all of them are the old ones, or all the new.

A change is staged in a folder of its own inside the one it is for. Renaming that to `.peftc-commit` is the moment at which
the change holds; moving the files to their places can then be finished by whoever comes next, under a lock. The heads of a
change (configs, without which no library takes the rest for an adapter) go first and come last, so nobody who knows nothing
of this reads the new of one file with the old of another.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from peftc.errors import CheckpointError

if sys.platform != "win32":
    import fcntl  # Windows has no locks of folders; they can't be opened there, so none is tried.

STAGE = ".peftc-save-"
COMMIT = ".peftc-commit"
_ORDER = "commit.json"
_FILES = "files"
_OLD = "old"


def replace_files(folder: Path, files: Mapping[str, bytes], heads: Sequence[str], remove: Sequence[str] = ()) -> None:
    """Write `files` (by path in `folder`), and remove others: all or nothing. Modes are those of new files (umask).

    Raises CheckpointError with the bytes needed (a full disk, a folder that can't be written); nothing is changed then.
    """
    size = sum(map(len, files.values()))
    with explained(folder, "write", size):
        folder.mkdir(parents=True, exist_ok=True)
        with _staging(folder) as stage:
            for name, content in files.items():
                write(stage / _FILES / name, content)
            if _below(stage / _FILES, ()) != sorted(files):
                raise OSError(errno.EIO, f"{stage} was changed by another process")
            commit(folder, stage, heads, remove)


@contextlib.contextmanager
def staged(folder: Path, heads: Sequence[str]) -> Generator[Path]:
    """A folder to write into, whose files take their places in `folder` when the context ends: all or, on an error, none.

    Raises CheckpointError if `folder` can't be written.
    """
    with explained(folder, "write", 0):
        folder.mkdir(parents=True, exist_ok=True)
        with _staging(folder) as stage:
            (stage / _FILES).mkdir()
            yield stage / _FILES
            commit(folder, stage, [name for name in heads if (stage / _FILES / name).exists()])


def commit(folder: Path, stage: Path, heads: Sequence[str], remove: Sequence[str] = ()) -> None:
    """Put what is under `stage`/files in its place in `folder`, and remove others; once committed, it can't be lost.

    Raises OSError if a file can't be put in its place (it is a folder, or another user's); all is as it was then.
    """
    order = {"files": _below(stage / _FILES, ()), "heads": list(heads), "remove": list(remove)}
    write(stage / _ORDER, json.dumps(order).encode())
    _sync_tree(stage)
    with locked(folder):
        _finish(folder)
        _require_inside(folder, [*order["files"], *order["heads"], *order["remove"]])
        os.rename(stage, folder / COMMIT)
        _sync(folder)
        try:
            _finish(folder)
        except OSError:
            if (folder / COMMIT / _ORDER).is_file():
                _revert(folder, stage)
            raise
        _sweep(folder)


def settle(folder: Path) -> None:
    """Finish a change of `folder`, or one of the folder above it, that was interrupted after it was committed."""
    folder = folder.resolve()
    for place in (folder.parent, folder):
        if (place / COMMIT).is_dir():
            with explained(place, "finish the interrupted save in", 0), locked(place):
                _finish(place)


@contextlib.contextmanager
def steady(folder: Path) -> Generator[None]:
    """A context in which no save changes `folder`: what is read in it belongs together."""
    folder = folder.resolve()
    while True:
        settle(folder)
        with locked(folder, shared=True), locked(folder.parent, shared=True):
            if not any((place / COMMIT).is_dir() for place in (folder.parent, folder)):
                yield
                return


@contextlib.contextmanager
def locked(folder: Path, shared: bool = False, wait: bool = True) -> Generator[None]:
    """Hold the lock of `folder`, which ends with the process. Raises BlockingIOError if it is taken and not `wait`."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # A folder that may be entered but not listed: nobody here can save into it either.
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # Some network file systems have no locks; renames are atomic there as well.
            pass
        yield
    finally:
        with contextlib.suppress(OSError):  # A process forked meanwhile would else go on holding it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextlib.contextmanager
def explained(folder: Path, what: str, size: int) -> Generator[None]:
    """Turn an OSError into a CheckpointError that says how much room is needed."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        room = f"; {free_bytes(folder):,} are free" if full else ""
        raise CheckpointError(
            f"can't {what} {folder} ({size:,} bytes needed{room}): {error.strerror or error}. What was there is as it was."
        ) from None


def free_bytes(folder: Path) -> int:
    """The bytes that may still be written below `folder`, which need not exist yet."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def write(path: Path, content: bytes) -> None:
    """Write a file of a stage, down to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def sync(descriptor: int) -> None:
    """fsync, where the file system has it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise  # A disk that turns out to be full is no missing feature.


@contextlib.contextmanager
def _staging(folder: Path) -> Generator[Path]:
    with contextlib.ExitStack() as stack:
        with locked(folder):  # Whoever sweeps has it too, and so never sees a stage without its lock.
            stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=folder))
            stack.callback(shutil.rmtree, stage, ignore_errors=True)
            stack.enter_context(locked(stage))
        yield stage


def _finish(folder: Path) -> None:
    """Move the files of a committed change to their places. Can be repeated from wherever it stopped."""
    stage = folder / COMMIT
    if (stage / _ORDER).is_file():
        order = _order_in(folder, stage)
        heads = [name for name in order["heads"] if (stage / _FILES / name).exists()]
        for name in [*heads, *order["remove"]]:
            _move(folder / name, stage / _OLD / name)
        for name in [*_below(stage / _FILES, heads), *heads]:
            _move(folder / name, stage / _OLD / name)
            _move(stage / _FILES / name, folder / name)
            _sync((folder / name).parent)
        (stage / _ORDER).unlink()
    if stage.is_dir():
        shutil.rmtree(stage)


def _revert(folder: Path, stage: Path) -> None:
    """Put everything back as it was before a change that can't be finished, and make it a stage again."""
    committed = folder / COMMIT
    order = _order_in(folder, committed)
    left = _below(committed / _FILES, ())
    for name in order["files"]:
        if name not in left:
            _move(folder / name, committed / _FILES / name)
    for name in _below(committed / _OLD, ()):
        _move(committed / _OLD / name, folder / name)
    os.rename(committed, stage)


def _order_in(folder: Path, stage: Path) -> dict[str, list[str]]:
    """What is to be done for a committed change. A folder may come from anywhere, and with it what only looks like one.

    Raises CheckpointError unless it is all about files inside of `folder`.
    """
    try:
        order: Any = json.loads((stage / _ORDER).read_bytes())
        lists = {part: [str(Path(name)) for name in order[part]] for part in ("files", "heads", "remove")}
        links = [place for place, names, _ in os.walk(stage) if Path(place).is_symlink() or _linked(place, names)]
        if links or stage.is_symlink():
            raise ValueError("it has links")
        _require_inside(folder, [*chain(*lists.values()), *_below(stage / _FILES, ()), *_below(stage / _OLD, ())])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{stage}: was not left by a save ({error}); remove it. Nothing was changed.") from None
    return lists


def _linked(place: str, names: Iterable[str]) -> bool:
    return any(os.path.islink(os.path.join(place, name)) for name in names)


def _require_inside(folder: Path, names: Iterable[str]) -> None:
    """Raise OSError unless these are names of files below `folder`, or could be: no way out of it, no link, no folder."""
    for name in names:
        path = PurePosixPath(name)
        above = [folder / part for part in path.parents if part.parts]
        if path.is_absolute() or ".." in path.parts or any(place.is_symlink() for place in above):
            raise OSError(errno.EPERM, f"{name!r} is not inside of the folder, or below a link in it")
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise OSError(errno.EISDIR, f"{name!r} is a folder")


def _move(source: Path, target: Path) -> None:
    """Move a file that may not be there, over one that may be."""
    if source.exists() or source.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)


def _below(root: Path, without: Iterable[str]) -> list[str]:
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() or path.is_symlink())
    return [name for name in files if name not in without]


def _sweep(folder: Path) -> None:
    """Remove what saves have left that were killed: stages whose lock nobody holds."""
    for stage in folder.glob(f"{STAGE}*"):
        with contextlib.suppress(OSError), locked(stage, wait=False):
            shutil.rmtree(stage, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for path, _, _ in os.walk(root):
        _sync(Path(path))


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Not every file system syncs folders.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
