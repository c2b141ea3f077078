"""A job that can be killed at any moment and run again: its stage, how far it has come, and the end of it.

What is written is put below `.peftc-merge` in the new folder, and from there to its places in one step (see
`peftc.checkpoint.atomic`). How far files have come is only believed by the same boot of the machine, whose page cache has
what was written; after another boot a job starts from the beginning.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from peftc.checkpoint.atomic import commit, explained, free_bytes, locked, settle, write
from peftc.errors import CheckpointError, PeftcError
from peftc.merge.threads import Run, side_by_side
from peftc.progress import Tick, bar
from peftc.stream.sharded import RECORD
from peftc.stream.write import Output, Position, write_output

STAGE = ".peftc-merge"
_FILES = "files"
_JOB = "job.json"
_PROGRESS = "progress.json"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A new folder to write: small `files` by path, and `outputs`.

    `inputs`: all that the result depends on, and `now` what that is by now. `record`: becomes `peftc_merge.json`.
    """

    what: str
    folder: Path
    inputs: Mapping[str, Any]
    now: Callable[[], Mapping[str, Any]]
    files: Mapping[str, bytes]
    outputs: Sequence[Output]
    record: Mapping[str, Any] | None = None

    @property
    def written(self) -> int:
        """Bytes of the outputs, logs not counted."""
        return sum(output.header.size for output in self.outputs)

    @property
    def size(self) -> int:
        """Bytes of the new folder, logs not counted."""
        return sum(map(len, self.files.values())) + self.written


def is_new(folder: Path) -> bool:
    """Whether there is nothing in `folder` but the stage of a job, once an interrupted end of one is brought to its own."""
    if not folder.exists():
        return True
    settle(folder)
    return folder.is_dir() and all(item.name == STAGE for item in folder.iterdir())


def require_done(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Raise CheckpointError if what is in `folder` was not written by a job of these `inputs`."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        record = json.loads((folder / RECORD).read_bytes())
        same = record.get("inputs") == _digest(inputs)
        if same and all((folder / name).stat().st_size == size for name, size in record["sizes"].items()):
            return
    raise CheckpointError(f"{folder}: there is something in it already; give a new or an empty folder")


def do(job: Job, progress: bool) -> None:
    """Do the job, or what is left of it. Raises CheckpointError; what was written is kept, and gone on with next time.

    Where the job itself is at fault (PeftcError), nothing is kept.
    """
    room = free_bytes(job.folder) + sum(file.stat().st_size for file in job.folder.rglob("*") if file.is_file())
    if room < job.size:
        raise CheckpointError(f"{job.folder}: {job.size:,} bytes are needed and {room:,} are free; nothing was written")
    with explained(job.folder, job.what, job.size):
        stage = job.folder / STAGE
        (stage / _FILES).mkdir(parents=True, exist_ok=True)
        with _alone(stage):
            _require_new(job, stage)
            done = _begin(stage, job)
            _LOG.info(
                "%s: %s", job.what, f"goes on, {len(done)} of {len(job.outputs)} files are begun" if done else "begins"
            )
            record = {} if job.record is None else {RECORD: _record(job, job.record)}
            for name, content in {**job.files, **record}.items():
                write(stage / _FILES / name, content)
            try:
                with bar(job.what, job.written, "bytes", progress) as tick, side_by_side(torch.device("cpu")) as run:
                    _write_outputs(job, stage, done, run, tick)
                if _digest(job.now()) != _digest(job.inputs):
                    raise CheckpointError(f"{job.what}: files that it reads were changed meanwhile; call again")
            except PeftcError:
                shutil.rmtree(stage)
                raise
            # Without its config a folder is nobody's model.
            commit(job.folder, stage, [name for name in job.files if name == "config.json"])
            _LOG.info("%s: done, %d bytes", job.what, job.size)


def _write_outputs(job: Job, stage: Path, done: dict[str, Position], run: Run, tick: Tick) -> None:
    """Write what is not yet, and bring it to the disk while the next is computed."""
    with ThreadPoolExecutor(1) as disk:
        flushes = []
        for output in job.outputs:

            def note(position: Position, name: str = output.name) -> None:
                done[name] = position
                _save(stage, done)

            if done.get(output.name, Position()).pieces < max(1, len(output.pieces)):
                write_output(output, stage / _FILES, done.get(output.name, Position()), run, note, tick)
                note(Position(max(1, len(output.pieces)), 0))
            else:
                tick(output.header.size)
            names = [output.name, *([output.log] if output.log is not None else [])]
            flushes += [disk.submit(_flush, stage / _FILES / name) for name in names]
        for flush in flushes:
            flush.result()


def _require_new(job: Job, stage: Path) -> None:
    """Another process may have been faster, between a first look and this one's turn."""
    if not is_new(job.folder):
        shutil.rmtree(stage, ignore_errors=True)
        raise CheckpointError(f"{job.folder}: another process has written it meanwhile; what it wrote is as it was")


def _begin(stage: Path, job: Job) -> dict[str, Position]:
    """How far an interrupted run of this very job has come; what another job left is removed."""
    key = {"inputs": _digest(job.inputs), "boot": _boot()}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        if json.loads((stage / _JOB).read_bytes()) == key:
            come = {name: Position(**at) for name, at in json.loads((stage / _PROGRESS).read_bytes()).items()}
            return {o.name: come[o.name] for o in job.outputs if o.name in come and _is_there(o, stage, come[o.name])}
    shutil.rmtree(stage / _FILES)
    (stage / _FILES).mkdir()
    (stage / _PROGRESS).unlink(missing_ok=True)
    write(stage / _JOB, json.dumps(key).encode())
    return {}


def _is_there(output: Output, stage: Path, position: Position) -> bool:
    """Whether the files are as long as they are said to be."""
    pieces = output.pieces
    if not 0 < position.pieces <= max(1, len(pieces)):
        return False
    size = pieces[position.pieces].entry.start if position.pieces < len(pieces) else output.header.size
    log = (stage / _FILES / output.log).stat().st_size if output.log is not None else position.log
    return (stage / _FILES / output.name).stat().st_size >= size and log >= position.log


def _save(stage: Path, done: Mapping[str, Position]) -> None:
    new = stage / f"{_PROGRESS}.new"
    new.write_text(json.dumps({name: asdict(position) for name, position in done.items()}))
    os.replace(new, stage / _PROGRESS)


def _record(job: Job, record: Mapping[str, Any]) -> bytes:
    sizes = {output.name: output.header.size for output in job.outputs}
    return (json.dumps({**record, "inputs": _digest(job.inputs), "sizes": sizes}, indent=2) + "\n").encode()


def _digest(inputs: Mapping[str, Any]) -> str:
    return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _alone(stage: Path) -> Generator[None]:
    lock = locked(stage, wait=False)
    try:
        lock.__enter__()
    except BlockingIOError:
        raise CheckpointError(f"{stage.parent}: another process is writing it; wait for that one to end") from None
    with contextlib.ExitStack() as stack:
        stack.push(lock)
        yield
