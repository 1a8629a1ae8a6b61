"""specdec.memory: pieces of large pages."""

import mmap
from itertools import pairwise
from typing import Any

import pytest
import torch

from specdec import memory
from specdec.memory import Arena

LARGE_PAGE = 2 << 20
needs_large_pages = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for"
)


def spans(*tensors: torch.Tensor) -> list[tuple[int, int]]:
    return sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3,), (5, 7), (0, 4), (2, 3, 0), ()])
def test_zeros_of_a_shape_and_type(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = Arena().zeros(shape, dtype)
    assert made.shape == shape
    assert made.dtype == dtype
    assert made.is_contiguous()
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))


def test_pieces_do_not_overlap_and_begin_with_a_cache_line() -> None:
    arena = Arena()
    made = [arena.zeros((n,), torch.bfloat16) for n in (1, 33, 7, 1000, 31)]
    for value, piece in enumerate(made, 1):
        piece.fill_(value)
    for value, piece in enumerate(made, 1):
        assert (piece == value).all()
    ends = spans(*made)
    assert all(a[1] <= b[0] for a, b in pairwise(ends))
    assert all(begin % 64 == 0 for begin, _ in ends)


@needs_large_pages
def test_a_block_begins_with_a_large_page_and_pieces_share_it() -> None:
    arena = Arena()
    first, second = (arena.zeros((100,), torch.float32) for _ in range(2))
    assert first.data_ptr() % LARGE_PAGE == 0
    assert second.data_ptr() - first.data_ptr() == 448  # 400 bytes, up to a whole line


def test_what_no_longer_fits_begins_a_new_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_BLOCK", 1 << 12)
    arena = Arena()
    made = [arena.zeros((1 << 9,), torch.float32) for _ in range(5)]  # two of them fill a block
    made.append(arena.zeros((1 << 14,), torch.float32))  # more than a block
    for value, piece in enumerate(made, 1):
        piece.fill_(value)
    for value, piece in enumerate(made, 1):
        assert (piece == value).all()


@needs_large_pages
def test_a_block_is_freed_with_its_last_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []

    class Watched(mmap.mmap):
        def __del__(self) -> None:
            closed.append(1)

    monkeypatch.setattr(mmap, "mmap", Watched)
    arena = Arena()
    first, second = (arena.zeros((8,), torch.float32) for _ in range(2))
    del arena, first
    assert not closed
    second += 1
    del second
    assert closed == [1]


@needs_large_pages
def test_small_pages_do_where_the_kernel_has_no_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: Any) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert torch.equal(Arena().zeros((5,), torch.float32), torch.zeros(5))


def test_other_systems_get_memory_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert torch.equal(Arena().zeros((2, 3), torch.bfloat16), torch.zeros(2, 3).bfloat16())
