"""Memory of large new tensors: asking the system for it takes as long as filling it."""

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

# What is smaller has few pages, and shares them with others.
_LARGE = 2**22
# Bytes that a Room asks for at a time, and where in them a tensor may begin.
_PIECE, _ALIGNED = 2**24, 64


def in_huge_pages(tensor: Tensor) -> Tensor:
    """`tensor`, which nobody has written to yet. Linux is asked for its memory in pages of megabytes, where it gives them
    to those who ask: to write 16 MiB the first time takes a seventh then. It may refuse, and nothing is different.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu" and tensor.nbytes >= _LARGE:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor


class Room:
    """Memory of the CPU for plain tensors that are made one by one and dropped together, asked for in pieces of many. A
    piece is given back when the last tensor in it is gone.
    """

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """`torch.stack(tensors)`, without gradients; on other devices just that."""
        like = tensors[0]
        if like.device.type != "cpu":
            return torch.stack(list(tensors))
        length = len(tensors) * like.nbytes
        taken = -(-length // _ALIGNED) * _ALIGNED
        with torch.inference_mode(False):  # What is made here is also for use outside of it.
            if taken > self._left.numel():
                self._left = in_huge_pages(torch.empty(max(taken, _PIECE), dtype=torch.uint8))
            own, self._left = self._left[:length].view(like.dtype), self._left[taken:]
            out = own.view(len(tensors), *like.shape)
        return torch.stack(list(tensors), out=out)
