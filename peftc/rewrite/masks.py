"""Which numbers a dropout keeps, in one bit each: what the backward pass keeps of it."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Eight bytes that are 0 or 1, times the first and shifted, are eight bits; a byte times the second, and the third, is back.
_GATHER, _SPREAD, _ONE_EACH = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - (1 << 64)


def drawn(x: Tensor, kept: float) -> Tensor:
    """Ones for this share of the numbers of `x`, else zeros: those that F.dropout keeps for the same seed."""
    return torch.empty_like(x).bernoulli_(kept)


def packed(mask: Tensor) -> Tensor:
    """The zeros and ones of `mask` as bits, eight to a byte."""
    flat = mask.to(torch.bool).reshape(-1)
    flat = F.pad(flat, (0, -flat.numel() % 8)).contiguous()
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpacked(bits: Tensor, like: Tensor) -> Tensor:
    """The mask that `bits` were made of, with the shape and dtype of `like`."""
    spread = ((bits.to(torch.int64) * _SPREAD) & _ONE_EACH).view(torch.uint8).ne(0)
    return spread[: math.prod(like.shape)].view(like.shape).to(like.dtype)
