"""How far long work has come, for whoever looks on: a bar on stderr, where the work takes longer than a second.

In a pipe there is none; nor with `PEFTC_PROGRESS=0`, nor where an argument says so.
"""

import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from threading import Timer
from typing import Any, Literal, Protocol

VARIABLE = "PEFTC_PROGRESS"
_OFF = ("0", "false", "no", "off")
# Seconds after which a bar comes up: what is done by then needs none.
DELAY = 1.0

Unit = Literal["bytes", "sites", "tensors", "steps", "batches"]


class Tick(Protocol):
    """Told that `count` more are done, and what comes next."""

    def __call__(self, count: int = 1, doing: str | None = None, /) -> None: ...


def wanted(asked: bool = True) -> bool:
    """Whether progress is to be shown: it is asked for, no variable turns it off, and somebody looks on."""
    off = os.environ.get(VARIABLE, "").strip().lower() in _OFF
    return asked and not off and (sys.stderr.isatty() or _in_notebook())


@contextmanager
def bar(what: str, total: int | None, unit: Unit, shown: bool = True) -> Generator[Tick]:
    """A context that shows how much of `total` is done, by what it is told; None: nobody knows how much there is. `shown`:
    if that is wanted at all.

    Example::

        with bar("merge", len(sites), "sites") as tick:
            for site in sites:
                fold(site)
                tick()
    """
    if not wanted(shown):
        yield unseen
    elif _in_notebook():
        with _widget(what, total, unit) as tick:
            yield tick
    else:
        with _line(what, total, unit) as tick:
            yield tick


def unseen(count: int = 1, doing: str | None = None, /) -> None:
    """Nobody looks on."""


@contextmanager
def _line(what: str, total: int | None, unit: Unit) -> Generator[Tick]:
    """A line of a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    rate = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    count_of = (MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    columns: tuple[ProgressColumn, ...] = rate if unit == "bytes" else count_of
    shown = Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=Console(stderr=True))
    task = shown.add_task(what, total=total)

    def tick(count: int = 1, doing: str | None = None, /) -> None:
        shown.update(task, advance=count, description=what if doing is None else f"{what}: {doing}")

    begin = Timer(DELAY, shown.start)
    begin.daemon = True
    begin.start()
    try:
        yield tick
    finally:
        begin.cancel()
        begin.join()
        if shown.live.is_started:
            shown.stop()


@contextmanager
def _widget(what: str, total: int | None, unit: Unit) -> Generator[Tick]:
    """A widget of a notebook, or what comes nearest there."""
    from tqdm.auto import tqdm

    scale: Mapping[str, Any] = {"unit": "B", "unit_scale": True} if unit == "bytes" else {"unit": f" {unit}"}
    with tqdm(desc=what, total=total, delay=DELAY, **scale) as shown:

        def tick(count: int = 1, doing: str | None = None, /) -> None:
            if doing is not None:
                shown.set_description(f"{what}: {doing}")
            shown.update(count)

        yield tick


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules
