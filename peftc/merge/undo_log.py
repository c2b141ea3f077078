"""The undo log: what arithmetic gets wrong when it takes a fold off again, a few percent of the weight's bytes.

The difference between the bits of a weight and of its estimate, in units in the last place, is mostly 0 or ±1. Four of
these are packed into a byte; larger ones follow as bytes, and those over a byte as the bits themselves. zstd does the rest.
"""

from dataclasses import dataclass
from typing import Any

import numpy
import torch
import xxhash
from torch import Tensor

from peftc.errors import MergeError
from peftc.rewrite.sharding import own

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
    step = _ordered(bits).sub_(_ordered(_bits(estimate)))
    codes = step.clamp(-2, 2).to(torch.uint8).bitwise_and_(3)  # 0, 1, -1 → 3; 2 says larger.
    places = _larger(codes)
    large = step[places]
    fits = (large > _ESCAPE) & (large <= 127)
    rest = bits[places[~fits]]
    compress = _zstandard().ZstdCompressor(level=3).compress
    parts = (_packed(codes), torch.where(fits, large, _ESCAPE).to(torch.int8), rest)
    return Chunk(*(compress(part.cpu().numpy().tobytes()) for part in parts))


def decode(chunk: Chunk, estimate: Tensor) -> Tensor:
    """The weight that `encode` was given with this `estimate`, bit for bit."""
    decompress = _zstandard().ZstdDecompressor().decompress
    integer, device = _INTEGERS[estimate.itemsize], estimate.device

    def read(data: bytes, dtype: torch.dtype) -> Tensor:
        raw = decompress(data)
        return (
            torch.frombuffer(bytearray(raw), dtype=dtype).to(device) if raw else torch.empty(0, dtype=dtype).to(device)
        )

    codes = _unpacked(read(chunk.steps, torch.uint8))[: estimate.numel()]
    # The two bits as a number with a sign: 3 is -1.
    step = ((codes << 6).view(torch.int8) >> 6).to(integer)
    larger = read(chunk.larger, torch.int8)
    places = _larger(codes)
    step[places] = larger.to(integer)
    bits = _ordered(_ordered(_bits(estimate)).add_(step))
    bits[places[larger == _ESCAPE]] = read(chunk.bits, integer)
    return bits.view(estimate.dtype).view(estimate.shape)


def _larger(codes: Tensor) -> Tensor:
    """Where a step is larger than one; by numpy, which takes a tenth of the time."""
    return torch.from_numpy(numpy.flatnonzero(codes.cpu().numpy() == 2)).to(codes.device)


def _packed(codes: Tensor) -> Tensor:
    """Numbers of two bits, four to a byte, the first lowest."""
    four = torch.nn.functional.pad(codes, (0, -codes.numel() % 4)).view(torch.int32)
    return (four | four >> 6 | four >> 12 | four >> 18).to(torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """What `_packed` was given, and up to three zeros."""
    byte = packed.to(torch.int32)
    return ((byte | byte << 6 | byte << 12 | byte << 18) & 0x03030303).view(torch.uint8)


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


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.itemsize])


def _ordered(bits: Tensor) -> Tensor:
    """The bits of floats as integers in the order of the floats, one step per unit in the last place; and back."""
    signs = bits >> (8 * bits.itemsize - 1)
    return signs.bitwise_and_(torch.iinfo(bits.dtype).max).bitwise_xor_(bits)
