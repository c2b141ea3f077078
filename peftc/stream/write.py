"""Writing a shard front to back: what is untouched by the file system's own copy, the rest piece by piece."""

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

from peftc.checkpoint.lazy import FileTensors
from peftc.checkpoint.tensor_file import Entry, Header
from peftc.merge.threads import Run
from peftc.progress import Tick

# Bytes after which it is noted how far a file has come.
EVERY = 256 << 20
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Tile:
    """Bytes of a tensor, where in it they begin, and a record of them for a log."""

    at: int
    content: bytes | memoryview
    record: bytes = b""


@dataclass(frozen=True)
class Piece:
    """A tensor of a new file: a copy of the bytes of `source`, or the tiles that `jobs` compute."""

    entry: Entry
    source: Entry
    jobs: Callable[[], Iterator[Callable[[], Tile]]] | None = None


@dataclass(frozen=True)
class Output:
    """A file to write, from pieces of `source`; `log` is where records go."""

    name: str
    header: Header
    pieces: Sequence[Piece]
    source: FileTensors
    log: str | None = None


@dataclass(frozen=True)
class Position:
    """How far a file has come: the pieces that are done, and the length of the log then."""

    pieces: int = 0
    log: int = 0


@dataclass(frozen=True)
class _Copy:
    start: int
    stop: int
    to: int


@dataclass(frozen=True)
class _Done:
    """So many bytes were written, this is for the log, and so many pieces are done with it."""

    count: int
    record: bytes = b""
    pieces: int = 0


def write_output(
    output: Output,
    folder: Path,
    position: Position,
    run: Run,
    note: Callable[[Position], None],
    tick: Tick,
) -> None:
    """Write `output` below `folder`, from `position` on. `note` is told positions, `tick` how many bytes were written."""
    pieces = output.pieces[position.pieces :]
    with _opened(folder / output.name, position) as file, _opened(folder / (output.log or os.devnull), position) as log:
        at = output.pieces[position.pieces].entry.start if pieces and position.pieces else len(output.header.raw)
        if not position.pieces:
            _write(file.fileno(), output.header.raw, 0)
        file.truncate(at)
        log_at = noted = position.log
        if output.log is not None:
            log.truncate(log_at)
        tick(at)
        done, noted = position.pieces, at
        _advise(output.source.fileno(), 0, 0, "SEQUENTIAL")
        for step in run(_steps(pieces, output.source.fileno(), file.fileno())):
            _write(log.fileno(), step.record, log_at)
            at, log_at, done = at + step.count, log_at + len(step.record), done + step.pieces
            tick(step.count)
            if step.pieces and at - noted >= EVERY:
                noted = at
                note(Position(done, log_at))
        if at != output.header.size:
            raise AssertionError(f"{output.name}: {at:,} of {output.header.size:,} bytes were written")


def _opened(path: Path, position: Position) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("r+b" if position.pieces else "wb", buffering=0)


def _steps(pieces: Sequence[Piece], source: int, target: int) -> Iterator[Callable[[], _Done]]:
    """What to do for `pieces` in order: copies, as long as they go, and tiles."""
    run, count = _Copy(0, 0, 0), 0
    for piece in pieces:
        adjoins = run.stop == piece.source.start and run.to + run.stop - run.start == piece.entry.start
        if count and (piece.jobs is not None or not adjoins or run.stop - run.start >= EVERY):
            yield partial(_copy, source, target, run, count)
            count = 0
        if piece.jobs is None:
            start, to = (run.start, run.to) if count else (piece.source.start, piece.entry.start)
            run, count = _Copy(start, piece.source.stop, to), count + 1
            continue
        _advise(source, piece.source.start, piece.source.nbytes, "WILLNEED")
        for job in piece.jobs():
            yield partial(_compute, piece.entry.start, job, target)
        yield lambda: _Done(0, pieces=1)
    if count:
        yield partial(_copy, source, target, run, count)


def _advise(descriptor: int, start: int, length: int, what: Literal["SEQUENTIAL", "WILLNEED"]) -> None:
    """Let the kernel read ahead."""
    if sys.platform == "linux":
        advice = os.POSIX_FADV_SEQUENTIAL if what == "SEQUENTIAL" else os.POSIX_FADV_WILLNEED
        os.posix_fadvise(descriptor, start, length, advice)


def _write(descriptor: int, content: bytes | memoryview, at: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count


def _compute(start: int, job: Callable[[], Tile], target: int) -> _Done:
    tile = job()
    _write(target, tile.content, start + tile.at)
    return _Done(len(tile.content), tile.record)


def _copy(source: int, target: int, run: _Copy, pieces: int) -> _Done:
    """Copy bytes inside the kernel, which may share them on disk; by reading and writing where it can't."""
    start, to = run.start, run.to
    while start < run.stop:
        try:
            linux = sys.platform == "linux"
            count = os.copy_file_range(source, target, run.stop - start, start, to) if linux else 0
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
            count = 0
        if not count:
            block = os.pread(source, min(_BLOCK, run.stop - start), start)
            if not block:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            _write(target, block, to)
            count = len(block)
        start, to = start + count, to + count
    return _Done(run.stop - run.start, pieces=pieces)
