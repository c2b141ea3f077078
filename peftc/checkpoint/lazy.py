"""The tensors of a safetensors file, read one by one when they are asked for."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from peftc.checkpoint.tensor_file import DTYPES, Entry, read_header, tensor_in
from peftc.errors import CheckpointError

_BLOCK = 8 << 20


class FileTensors(Mapping[str, Tensor]):
    """A file's tensors by name. It stays open, so a file that takes its place meanwhile is not mixed in.

    Raises CheckpointError if the file is not sound, or becomes shorter.
    """

    def __init__(self, file: Path) -> None:
        self.header = read_header(file)
        self.file = file
        self._stream = file.open("rb", buffering=0)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensor(self.header.entries[name])

    def _tensor(self, entry: Entry) -> Tensor:
        try:
            return tensor_in(self.read(entry.start, entry.stop), entry, entry.start)
        except ValueError as error:
            raise CheckpointError(f"{self.file}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.entries)

    def __len__(self) -> int:
        return len(self.header.entries)

    def rows(self, name: str, part: slice) -> Tensor:
        """Rows of a tensor, read into memory of their own; of a scalar, all of it."""
        entry = self.header.entries[name]
        if not entry.shape:
            return self[name]
        width = entry.nbytes // max(1, entry.shape[0])
        start, stop = entry.start + part.start * width, entry.start + part.stop * width
        return self._tensor(Entry(name, entry.dtype, (part.stop - part.start, *entry.shape[1:]), start, stop))

    def parts(self, name: str) -> Iterator[slice]:
        """A tensor's rows in slices of about 8 MiB, to look at one of which at a time."""
        entry = self.header.entries[name]
        length = entry.shape[0] if entry.shape else 1
        size = max(1, _BLOCK * length // max(1, entry.nbytes))
        return (slice(at, min(length, at + size)) for at in range(0, length, size))

    def chunks(self, entry: Entry) -> Iterator[bytearray]:
        """The bytes of a tensor, some 8 MiB at a time."""
        return (self.read(at, min(entry.stop, at + _BLOCK)) for at in range(entry.start, entry.stop, _BLOCK))

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes from `start` to `stop` of the file. Can be called from several threads."""
        return read_at(self._stream.fileno(), self.file, start, stop)

    def fileno(self) -> int:
        """The descriptor of the open file."""
        return self._stream.fileno()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_at(descriptor: int, file: Path, start: int, stop: int) -> bytearray:
    """The bytes from `start` to `stop` of an open file. Raises CheckpointError if it ends before."""
    content = bytearray(stop - start)
    view, done = memoryview(content), 0
    while done < len(content):
        count = os.preadv(descriptor, [view[done:]], start + done)
        if not count:
            raise CheckpointError(f"{file}: became shorter while it was read: it ends before byte {stop:,}")
        done += count
    return content


def outline(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Tensors on the meta device with the shapes and dtypes of `entries`."""
    return {
        name: torch.empty(entry.shape, dtype=DTYPES.get(entry.dtype, torch.uint8), device="meta")
        for name, entry in entries.items()
    }
