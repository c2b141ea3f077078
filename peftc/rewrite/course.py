"""How far a pass over batches has come: told on a bar, and kept in a file that a later pass goes on from."""

import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import torch
from torch import nn
from torch.utils.data import Dataset

from peftc.errors import AdapterError, PeftcError
from peftc.progress import Tick, unseen

# The file is written again when that has taken so many times less than what was done since.
SHARE = 20


@dataclass
class Course:
    """One pass: `of` says what is learned of what, `known` holds what has been, and `looked` how many batches that is of.

    What is known may hold tensors, numbers and text in dicts, lists and tuples, and instances of `classes`: no other
    class is made of what a file says.
    """

    of: Mapping[str, Any]
    file: Path | None = None
    classes: tuple[type[Any], ...] = ()
    tick: Tick = unseen
    known: dict[str, Any] = field(default_factory=dict[str, Any])
    looked: int = 0
    _skip: int = 0
    _since: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    def go_on(self) -> None:
        """Take up what the file knows, if it is there. Raises AdapterError if it is of something else, or none of these."""
        if self.file is None or not self.file.exists():
            return
        where = f"calibrate: resume={str(self.file)!r}"
        try:
            with torch.serialization.safe_globals(list(self.classes)):
                found = torch.load(self.file, weights_only=True)
            of, looked, known = (found[name] for name in ("of", "looked", "known"))
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, BadZipFile, pickle.UnpicklingError) as error:
            told = str(error).partition("\n")[0]
            raise AdapterError(f"{where} can't be read ({told}): delete it, or give another name") from None
        if of != self.of:
            raise AdapterError(f"{where} is of another spec, or of other sites: delete it, or give another name")
        self.known, self.looked, self._skip = known, looked, looked
        self.tick(looked)

    def new(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Those of the `batches` that no earlier pass has looked at."""
        for batch in batches:
            if self._skip:
                self._skip -= 1
            else:
                yield batch

    def run(self, call: Callable[[Any, Any], Any], base: nn.Module, batch: Any) -> Any:
        """What `call` makes of the next batch. Raises AdapterError, with what was raised as its cause."""
        try:
            return call(base, batch)
        except (PeftcError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            told = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise AdapterError(
                f"calibrate: batch number {self.looked + 1} ({_names(batch)}) failed with {told}. A batch is what the"
                " model is called with: a mapping of keyword arguments, a tuple of positional ones, or the one argument;"
                " call= calls it otherwise"
            ) from error

    def done(self) -> None:
        """Count one more batch; write the file if it is time to."""
        self.looked += 1
        self.tick()
        if self.file is not None and time.monotonic() - self._since >= SHARE * self._took:
            self.keep()

    def keep(self) -> None:
        """Write the file, if there is to be one: all of it or, if that fails, not. Raises AdapterError."""
        if self.file is None:
            return
        before, part = time.monotonic(), self.file.with_name(f"{self.file.name}.part")
        try:
            with part.open("wb") as stream:
                torch.save({"of": dict(self.of), "looked": self.looked, "known": self.known}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(self.file)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise AdapterError(f"calibrate: resume={str(self.file)!r} can't be written: {error}") from None
        self._since = time.monotonic()
        self._took = self._since - before


def require_batches(batches: Any) -> Iterable[Any]:
    """`batches`. Raises AdapterError if it is none, or one batch."""
    if isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable | Dataset):
        raise AdapterError(
            f"calibrate: batches is one {type(batches).__name__}: give a list of batches, a DataLoader or another iterable"
        )
    return cast("Iterable[Any]", batches)


def _names(batch: Any) -> str:
    return ", ".join(map(str, cast("Mapping[Any, Any]", batch))) if isinstance(batch, Mapping) else type(batch).__name__
