"""Memory of large new tensors."""

import ctypes
import mmap
import sys

from torch import Tensor

# What is smaller has few pages, and shares them with others.
_LARGE = 2**22


def in_huge_pages(tensor: Tensor) -> Tensor:
    """`tensor`, which nobody has written to yet. Linux is asked for its memory in pages of megabytes, where it gives them
    to those who ask: to write 16 MiB the first time takes a seventh then. It may refuse, and nothing is different.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu" and tensor.nbytes >= _LARGE:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor
