"""The undo log: what arithmetic gets wrong when it takes a fold off again, a few percent of the weight's bytes.

The difference between the bits of a weight and of its estimate, in units in the last place, is mostly 0 or ±1. Four of
these are packed into a byte; larger ones follow as bytes, and those over a byte as the bits themselves. zstd does the rest.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy
import numpy.typing
import torch
import xxhash
from torch import Tensor

from peftc.errors import MergeError
from peftc.rewrite.sharding import own

Numbers = numpy.typing.NDArray[Any]
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ESCAPE = -128


@dataclass(frozen=True)
class Chunk:
    """The log of one tile: steps of 0, ±1 or "larger" (two bits each), the larger ones, the bits of the largest."""

    steps: bytes
    larger: bytes
    bits: bytes

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return len(self.steps) + len(self.larger) + len(self.bits)


def encode(weight: Tensor, estimate: Tensor) -> Chunk:
    """What `decode` needs to make `weight` from `estimate`, which has the same shape and dtype: exact for all bits."""
    bits = _bits(weight)
    # Differences wrap around, and back.
    step = _ordered(bits, "weight")
    step -= _ordered(_bits(estimate), "estimate")
    codes = numpy.clip(step, -2, 2, out=_scratch("estimate", step)).astype(numpy.uint8)
    codes &= 3  # 0, 1, -1 → 3; 2 says larger.
    places = numpy.flatnonzero(codes == 2)
    large = step[places]
    fits = (large > _ESCAPE) & (large <= 127)
    parts = (_packed(codes), numpy.where(fits, large, _ESCAPE).astype(numpy.int8), bits[places[~fits]])
    compress = _zstandard().ZstdCompressor(level=1).compress
    return Chunk(*(compress(part) for part in parts))


def decode(chunk: Chunk, estimate: Tensor) -> Tensor:
    """The weight that `encode` was given with this `estimate`, bit for bit."""
    decompress = _zstandard().ZstdDecompressor().decompress
    guess = _bits(estimate)
    steps = _unpacked(numpy.frombuffer(decompress(chunk.steps), numpy.uint8))[: guess.size]
    larger, places = numpy.frombuffer(decompress(chunk.larger), numpy.int8), numpy.flatnonzero(steps == 2)
    ordered = _ordered(guess, "estimate")
    ordered += steps
    ordered[places] += larger.astype(guess.dtype) - 2
    bits = _ordered(ordered, "weight").copy()
    bits[places[larger == _ESCAPE]] = numpy.frombuffer(decompress(chunk.bits), guess.dtype)
    return torch.from_numpy(bits).to(estimate.device).view(estimate.dtype).view(estimate.shape)


def _packed(codes: Numbers) -> Numbers:
    """Numbers of two bits, four to a byte, the first lowest."""
    four = numpy.pad(codes, (0, -codes.size % 4)) if codes.size % 4 else codes
    # So the four come to lie side by side in the highest byte.
    product = four.view("<u4") * numpy.uint32(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6)
    return (product >> 24).astype(numpy.uint8)


def _unpacked(packed: Numbers) -> Numbers:
    """What `_packed` was given, as numbers with a sign but for 2, and up to three zeros."""
    return numpy.take(_FOUR, packed).view(numpy.int8)


# By byte, the four steps in it.
_FOUR = numpy.array([0, 1, 2, -1], numpy.int8)[numpy.arange(256)[:, None] >> [0, 2, 4, 6] & 3].view("<u4")[:, 0]


def keep(weight: Tensor) -> Chunk:
    """The log of a tile that nothing can be said about: all its bytes."""
    return Chunk(_zstandard().ZstdCompressor(level=3).compress(_bytes(weight)), b"", b"")


def kept(chunk: Chunk) -> bytes:
    """The bytes of the tile that `keep` was given."""
    return _zstandard().ZstdDecompressor().decompress(chunk.steps)


def checksum(tensor: Tensor) -> int | None:
    """A hash of the bytes of a dense tensor, or of this process's shard; None where there are none to read (meta)."""
    tensor = own(tensor)
    if tensor.is_meta or type(tensor.data) is not Tensor:
        return None
    return xxhash.xxh3_64_intdigest(_bytes(tensor))


class RunningSum:
    """The `checksum` of a tensor that is read part by part, in order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, part: Tensor) -> None:
        """Go on with the bytes of `part`, which is dense."""
        self._hash.update(_bytes(part))

    @property
    def value(self) -> int:
        """That of all parts so far."""
        return self._hash.intdigest()


def require_zstandard() -> None:
    """Raise MergeError, naming the extra, if zstandard is not installed."""
    _zstandard()


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise MergeError("an undo log is compressed with zstandard: pip install 'peftc[undo]'") from None
    return zstandard


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data


def _bits(tensor: Tensor) -> Numbers:
    return tensor.detach().contiguous().cpu().view(-1).view(_INTEGERS[tensor.itemsize]).numpy()


def _ordered(bits: Numbers, name: str) -> Numbers:
    """The bits of floats as integers in the order of the floats, one step per unit in the last place; and back.

    In this thread's memory of that `name`.
    """
    ordered = numpy.right_shift(bits, 8 * bits.itemsize - 1, out=_scratch(name, bits))
    ordered &= numpy.iinfo(bits.dtype).max
    ordered ^= bits
    return ordered


# By thread, memory that is used again: to get it anew for each tile takes longer than the arithmetic.
_OWN = threading.local()


def _scratch(name: str, like: Numbers) -> Numbers:
    """An array like this one, of any values, good until this thread asks for it by that name again."""
    key = f"{name}, {like.dtype}"
    known: Numbers | None = getattr(_OWN, key, None)
    if known is None or known.size < like.size:
        known = numpy.empty_like(like)
        setattr(_OWN, key, known)
    return known[: like.size]
