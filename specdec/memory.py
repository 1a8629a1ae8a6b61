"""Host memory in large pages, for what every pass reads from end to end.

In pages of 4 KiB such a read needs a translation every 4 KiB, and the places that chance gives
those pages decide how much of them the last cache holds. Pages of 2 MiB (Linux, transparent huge
pages) need few translations and lie in one piece.
"""

import mmap
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20
_BLOCK = 64 << 20  # bytes of addresses reserved at a time; memory is taken page by page, when used
_LINE = 64  # bytes of a line of the cache


class Arena:
    """Gives out pieces of blocks of large pages; a block is freed with its last piece."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU; torch's own where the system has no large pages to ask for."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(shape, dtype=dtype)
        size = prod(shape) * dtype.itemsize
        if self._used + size > self._block.numel():
            self._block, self._used = _reserve(max(size, _BLOCK)), 0
        piece = self._block[self._used : self._used + size]
        self._used += -(-size // _LINE) * _LINE
        return piece.view(dtype).view(shape)


def _reserve(size: int) -> Tensor:
    """Zero bytes that begin with a large page."""
    memory = mmap.mmap(-1, size + _LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without large pages has small ones to give
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -block.data_ptr() % _LARGE_PAGE
    return block[begin : begin + size]
