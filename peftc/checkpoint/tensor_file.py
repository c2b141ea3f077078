"""safetensors files: their headers, read with suspicion, and their tensors, read into memory that is their own.

The format: 8 bytes with the header's length (little-endian), the header in JSON (name → dtype, shape, two offsets), the
data. Source: https://github.com/huggingface/safetensors, "Format". Nothing is memory-mapped, so a file that is cut short
later does not take the process with it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from peftc.errors import CheckpointError

# As in safetensors itself.
MAX_HEADER = 100_000_000
MAX_JSON = 64 << 20
Bytes = bytes | bytearray | memoryview

# In the order in which safetensors lays tensors out (then by name).
DTYPES: Mapping[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What people have under a safetensors name that is none; looked for where the first bytes make no sense as a length.
_IMPOSTORS: Mapping[bytes, str] = {
    b"<": "it is an HTML or XML page: a download that failed, or wanted a login",
    b"version https://git-lfs": "it is a Git LFS pointer: run `git lfs pull`",
    b"PK\x03\x04": "it is a zip archive, probably a pickle of torch.save",
    b"\x80\x02": "it is a pickle",
    b"GGUF": "it is a GGUF file",
}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: the bytes from `start` to `stop`, counted from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """What a file says of itself. `entries` are in the order of their data; `raw` are its first bytes, as they are."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    raw: bytes

    @property
    def size(self) -> int:
        """The size of the whole file in bytes."""
        return max((entry.stop for entry in self.entries.values()), default=len(self.raw))


def read_header(file: Path) -> Header:
    """The header of a safetensors file of any size. Raises CheckpointError unless it and the file's size are sound."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            return parse_header(first + stream.read(_header_length(first, size)), size)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from None


def read_tensors(file: Path) -> tuple[dict[str, Tensor], Header, memoryview]:
    """All tensors of a file, on the CPU, its header, and the bytes that they share.

    Raises CheckpointError on a file that is not sound.
    """
    try:
        with file.open("rb") as stream:
            content = bytearray(os.fstat(stream.fileno()).st_size)
            view = memoryview(content)
            done = 0
            while done < len(content) and (count := stream.readinto(view[done:])):
                done += count
        if done < len(content):
            raise ValueError(f"it became shorter while it was read ({done:,} of {len(content):,} bytes)")
        first = bytes(content[:8])
        header = parse_header(bytes(content[: 8 + _header_length(first, len(content))]), len(content))
        return {name: tensor_in(content, entry) for name, entry in header.entries.items()}, header, view
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from None


def tensor_in(content: bytearray, entry: Entry, offset: int = 0) -> Tensor:
    """The tensor of `entry` in a buffer that begins at the file's byte `offset`: a view of it, where aligned."""
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise ValueError(f"{entry.name}: torch has no dtype {entry.dtype}")
    start, count = entry.start - offset, prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    if start % dtype.itemsize:
        content, start = bytearray(content[start : start + entry.nbytes]), 0
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start).view(entry.shape)


def parse_header(raw: bytes, size: int) -> Header:
    """The header in the first bytes of a file of `size` bytes. Raises ValueError unless it covers the file exactly."""
    items = _json(raw[8:])
    metadata = items.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no mapping of texts")
    entries = sorted(
        (_entry(name, item, len(raw)) for name, item in items.items()), key=lambda entry: (entry.start, entry.stop)
    )
    bounds = [len(raw), *(bound for entry in entries for bound in (entry.start, entry.stop))]
    for (before, after), entry in zip(list(pairwise(bounds))[::2], entries, strict=True):
        if before != after:
            raise ValueError(f"{entry.name}: its data does not begin where those before it end")
    if bounds[-1] > size:
        raise ValueError(f"it is cut short: {size:,} of {bounds[-1]:,} bytes are there")
    if bounds[-1] < size:
        raise ValueError(f"{size - bounds[-1]:,} bytes follow its last tensor")
    return Header({entry.name: entry for entry in entries}, cast("dict[str, str]", metadata), raw)


def make_header(entries: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> Header:
    """The header of a new file with tensors of (name, dtype, shape, bytes), laid out as safetensors does."""
    order = list(DTYPES)
    ordered = sorted(entries, key=lambda e: (order.index(e[1]) if e[1] in DTYPES else len(order), e[0]))
    items: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name, dtype, shape, nbytes in ordered:
        items[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [stop, stop + nbytes]}
        stop += nbytes
    text = json.dumps(items, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    return parse_header(raw, len(raw) + stop)


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of CPU tensors; the same bytes for the same tensors and metadata, every time."""
    sizes = [(name, dtype_name(t), tuple(t.shape), t.numel() * t.itemsize) for name, t in tensors.items()]
    header = make_header(sizes, metadata)
    return b"".join([header.raw, *(bytes_of(tensors[name]) for name in header.entries)])


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, as they lie in files."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def dtype_name(tensor: Tensor) -> str:
    """The name that safetensors has for the dtype of `tensor`."""
    return _NAMES[tensor.dtype]


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MiB. Raises CheckpointError."""
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise ValueError(f"it is over {MAX_JSON:,} bytes")
        return _json(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: can't be read as JSON: {error}") from None


def _json(content: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is there twice")
        return found

    data: Any = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    if not isinstance(data, dict):
        raise ValueError(f"it holds a {type(data).__name__}, no mapping")
    return cast("dict[str, Any]", data)


def _header_length(first: bytes, size: int) -> int:
    if len(first) < 8:
        raise ValueError(f"it has {size} bytes, not even a header's length")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER or 8 + length > size:
        for start, reason in _IMPOSTORS.items():
            if first.lstrip().startswith(start[:8]):
                raise ValueError(reason)
        raise ValueError(
            f"its header would have {length:,} bytes, the file has {size:,} (a header at most {MAX_HEADER:,})"
        )
    return length


def _entry(name: str, item: Any, begin: int) -> Entry:
    fields = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(f"{name}: its entry is not dtype, shape and two data_offsets")
    entry = Entry(name, dtype, shape, begin + offsets[0], begin + offsets[1])
    if (dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != entry.nbytes) or entry.nbytes < 0:
        raise ValueError(f"{name}: {dtype} of shape {shape} is not {entry.nbytes:,} bytes")
    return entry


def _sizes(value: Any) -> tuple[int, ...] | None:
    sizes = cast("list[Any]", value) if isinstance(value, list) else None
    plain = sizes is not None and all(type(size) is int and 0 <= size < 2**62 for size in sizes)
    return tuple(sizes) if sizes is not None and plain else None


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: not a readable safetensors file: {error}")
