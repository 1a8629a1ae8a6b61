"""Pages and who holds them: allocation, reference counts and block tables. No tensors here."""

from array import array
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from specdec.errors import CacheFullError


class PagePool:
    """Numbered pages of a fixed size, handed out in runs that are as contiguous as possible.

    Contiguity is what lets attention on the CPU read views instead of gathered copies.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size  # slots per page
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # sorted
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def grow(self, num_pages: int) -> None:
        """Adds pages at the end, up to num_pages in all."""
        self._free.extend(range(self.num_pages, num_pages))
        self._references.extend([0] * (num_pages - self.num_pages))
        self.num_pages = max(self.num_pages, num_pages)

    def allocate(self, count: int) -> list[int]:
        """count pages with one reference each: the first contiguous run, else the lowest free."""
        if count > len(self._free):
            raise CacheFullError(
                f"{count} pages of {self.page_size} slots are needed, {len(self._free)} of "
                f"{self.num_pages} are free; raise kv_memory, shorten the prompts or lower "
                "max_new_tokens"
            )
        begin = self._first_run(count)
        pages = self._free[begin : begin + count]
        del self._free[begin : begin + count]
        for page in pages:
            self._references[page] = 1
        return pages

    def _first_run(self, count: int) -> int:
        start = 0
        for index in range(1, len(self._free)):
            if index - start == count:
                return start
            if self._free[index] != self._free[index - 1] + 1:
                start = index
        return start if len(self._free) - start >= count else 0

    def retain(self, pages: Sequence[int]) -> None:
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._references[page] -= 1
            assert self._references[page] >= 0, f"page {page} released twice"
            if self._references[page] == 0:
                insort(self._free, page)

    def check_integrity(self, tables: Sequence["BlockTable"]) -> None:
        """Raises AssertionError unless the tables given account for every page that is not free."""
        held = [0] * self.num_pages
        for table in tables:
            for page in table.pages:
                held[page] += 1
        assert held == self._references, "reference counts differ from the block tables"
        free = {page for page, count in enumerate(held) if count == 0}
        assert self._free == sorted(free), "the free list differs from the unreferenced pages"


@dataclass(slots=True)
class BlockTable:
    """The pages of one sequence in one cache group, in order of their slots."""

    page_size: int
    pages: list[int] = field(default_factory=list)
    contiguous: bool = True
    numbers: "array[int]" = field(default_factory=lambda: array("i"))  # pages, as kernels read them

    def extend(self, pages: Sequence[int]) -> None:
        self.numbers.extend(pages)
        for page in pages:
            if self.pages and page != self.pages[-1] + 1:
                self.contiguous = False
            self.pages.append(page)

    def recycle(self, first: int, count: int) -> None:
        """Puts count pages, from the first on, behind all others: what they held is forgotten."""
        dropped = self.pages[first : first + count]
        self.pages = [*self.pages[:first], *self.pages[first + count :], *dropped]
        self.numbers = array("i", self.pages)
        self.contiguous = all(b == a + 1 for a, b in pairwise(self.pages))

    @property
    def capacity(self) -> int:
        """Slots."""
        return len(self.pages) * self.page_size

    @property
    def base(self) -> int:
        """Flat number of slot 0; slot i is base + i where the pages are contiguous."""
        return self.pages[0] * self.page_size

    def flat(self, slot: int) -> int:
        """Flat number of one slot: page times page size plus offset."""
        return self.pages[slot // self.page_size] * self.page_size + slot % self.page_size
