"""The log of a merged shard: for every tile that was changed, what it takes to have the old bytes again."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from peftc.checkpoint.lazy import read_at
from peftc.checkpoint.tensor_file import bytes_of
from peftc.errors import CheckpointError
from peftc.merge.undo_log import Chunk, decode, kept

# Lengths of the tensor's name and of the three parts of the chunk; CRC-32 of the new bytes and of the old.
_HEAD = struct.Struct("<H5I")


@dataclass(frozen=True)
class _Place:
    start: int
    lengths: tuple[int, int, int]
    crcs: tuple[int, int]


@dataclass(frozen=True)
class Log:
    """Open logs: by tensor, the file (descriptor, path) of its tiles and where they are in it."""

    places: Mapping[str, tuple[int, Path, Sequence[_Place]]]


def record(name: str, chunk: Chunk, new: int, old: int) -> bytes:
    """A tile as the log has it."""
    parts = (chunk.steps, chunk.larger, chunk.bits)
    text = name.encode()
    return b"".join([_HEAD.pack(len(text), *map(len, parts), new, old), text, *parts])


def places_in(descriptor: int, file: Path, size: int) -> dict[str, tuple[int, Path, list[_Place]]]:
    """The tiles of a log by tensor. Raises CheckpointError if it is damaged."""
    found: dict[str, tuple[int, Path, list[_Place]]] = {}
    at = 0
    while at < size:
        length, *lengths, new, old = _HEAD.unpack(read_at(descriptor, file, at, at + _HEAD.size))
        start = at + _HEAD.size + length
        name = read_at(descriptor, file, at + _HEAD.size, start).decode(errors="replace")
        at = start + sum(lengths)
        if at > size:
            raise CheckpointError(f"{file}: is cut short, or damaged")
        found.setdefault(name, (descriptor, file, []))[2].append(
            _Place(start, (lengths[0], lengths[1], lengths[2]), (new, old))
        )
    return found


def restored(log: Log, name: str, number: int, new: Tensor, estimate: Tensor | None) -> bytes | memoryview:
    """The old bytes of a tile from its `new` values. Raises CheckpointError if it, or the log, is not what it was."""
    if name not in log.places or number >= len(log.places[name][2]):
        raise CheckpointError(f"{name}: the undo log lacks it; it was made by another merge")
    descriptor, file, places = log.places[name]
    place = places[number]
    if zlib.crc32(bytes_of(new)) != place.crcs[0]:
        raise CheckpointError(f"{name}: is not what the merge wrote, so its undo log does not give the original")
    content = bytes(read_at(descriptor, file, place.start, place.start + sum(place.lengths)))
    ends = (place.lengths[0], place.lengths[0] + place.lengths[1])
    chunk = Chunk(content[: ends[0]], content[ends[0] : ends[1]], content[ends[1] :])
    try:
        old = kept(chunk) if estimate is None else bytes_of(decode(chunk, estimate))
    except Exception as error:  # zstandard and torch raise what the bytes make them raise.
        raise CheckpointError(f"{file}: the log of {name} is damaged: {error}") from None
    if zlib.crc32(old) != place.crcs[1]:
        raise CheckpointError(f"{file}: the log of {name} is damaged: it does not give the original bytes")
    return old
