"""Key and value tensors of one cache group, and the slots that each model has filled."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from specdec import backend
from specdec.cache.pages import BlockTable, PagePool
from specdec.errors import CacheFullError
from specdec.memory import Arena


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Geometry of one attention layer's cache."""

    kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def slot_bytes(self) -> int:
        return self.kv_heads * (self.key_size + self.value_size) * self.dtype.itemsize


def kernels_for(shapes: Sequence[LayerShape], device: torch.device) -> backend.Choice:
    """Which kernels attend over layers of these shapes and move what they hold, and why."""
    sizes = (size for shape in shapes for size in (shape.key_size, shape.value_size))
    return backend.choose_for(device, (shape.dtype for shape in shapes), sizes)


class Paged:
    """Layer memory of one model in one group: pages (P, page, K, D) of keys and of values."""

    def __init__(
        self, shapes: Sequence[LayerShape], num_pages: int, page_size: int, device: torch.device
    ) -> None:
        self.shapes, self.page_size, self.device = tuple(shapes), page_size, device
        self.on_triton = bool(shapes) and kernels_for(shapes, device).name == "triton"
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        new = self._allocator()
        for shape in self.shapes:
            head = (num_pages, page_size, shape.kv_heads)
            self.keys.append(new((*head, shape.key_size), shape.dtype))
            self.values.append(new((*head, shape.value_size), shape.dtype))
        self._make_views()

    def _allocator(self) -> Callable[[tuple[int, ...], torch.dtype], Tensor]:
        if self.device.type == "cpu":
            return Arena().zeros
        return lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=self.device)

    def _make_views(self) -> None:
        self.flat_keys = [pages.flatten(0, 1) for pages in self.keys]  # (P * page, K, D)
        self.flat_values = [pages.flatten(0, 1) for pages in self.values]
        self._table: Any = None  # of the tensors' addresses, for Triton; made when needed

    def grow(self, num_pages: int) -> None:
        """Enlarges every tensor to num_pages, keeping what is there."""
        new = self._allocator()
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                larger = new((num_pages, *old.shape[1:]), old.dtype)
                larger[: old.shape[0]] = old
                tensors[index] = larger
        self._make_views()

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        """Copies flat slots; sources and destinations may overlap."""
        for tensors in (self.flat_keys, self.flat_values):
            for flat in tensors:
                flat.index_copy_(0, destinations, flat.index_select(0, sources))

    def commit(self, paths: Sequence["Path"]) -> None:
        """Closes up the slots of accepted paths, all sequences and layers at once."""
        if self.on_triton:
            if self._table is None:
                self._table = backend.layer_table([*self.keys, *self.values])
            moves = [(path.table.numbers, path.begin, path.nodes) for path in paths]
            backend.commit_paths(self._table, moves)
            return
        sources = [path.table.flat(path.begin + node) for path in paths for node in path.nodes]
        destinations = [
            path.table.flat(path.begin + i) for path in paths for i in range(len(path.nodes))
        ]
        self.move(
            torch.tensor(sources, device=self.device),
            torch.tensor(destinations, device=self.device),
        )

    @property
    def slot_bytes(self) -> int:
        return sum(shape.slot_bytes for shape in self.shapes)


@dataclass(frozen=True, slots=True)
class Path:
    """The accepted nodes of one sequence's tree, whose node j is in slot begin + j; rising."""

    table: BlockTable
    begin: int
    nodes: Sequence[int]


@dataclass(slots=True)
class CachedSequence:
    """What the cache knows of one sequence: its pages, and how far each model has filled them.

    Lengths are counted in positions. Slots are positions too, until pages are dropped from the
    middle: those behind the sinks then stand `dropped` slots lower.
    """

    table: BlockTable
    computed: dict[Hashable, int] = field(default_factory=dict)  # model -> positions filled
    sinks: int = 0  # leading positions, whole pages, that are never dropped
    dropped: int = 0  # positions behind the sinks, whole pages, that were

    def computed_len(self, model: Hashable) -> int:
        return self.computed.get(model, 0)

    def slot(self, position: int) -> int:
        """Where a position is kept that was not dropped."""
        return position if position < self.sinks else position - self.dropped


class CacheGroup:
    """One block table per sequence, shared by every model that lives in the group.

    Target and draft fill the same slots of the same pages, so one commit serves both.
    """

    def __init__(self, page_size: int, max_slots: int, device: torch.device) -> None:
        self.pool = PagePool(0, page_size)
        self.max_pages = max_slots // page_size
        self.device = device
        self.memory: dict[Hashable, Paged] = {}
        self._sequences: list[CachedSequence] = []

    def add_model(self, model: Hashable, shapes: Sequence[LayerShape]) -> Paged:
        """Gives a model its layers' memory in this group; every model before any sequence."""
        memory = Paged(shapes, self.pool.num_pages, self.pool.page_size, self.device)
        self.memory[model] = memory
        return memory

    def open(self, slots: int, sinks: int = 0) -> CachedSequence:
        """A new sequence with room for this many slots, grown on demand up to max_slots.

        sinks: leading positions, rounded up to pages, that drop() leaves alone.
        """
        count = -(-slots // self.pool.page_size)
        if count > self.pool.num_free:
            self.allocate(min(self.max_pages, max(self.pool.num_pages * 2, self.used + count)))
        page = self.pool.page_size
        sequence = CachedSequence(BlockTable(page), sinks=-(-sinks // page) * page)
        sequence.table.extend(self.pool.allocate(count))
        self._sequences.append(sequence)
        return sequence

    @property
    def used(self) -> int:
        return self.pool.num_pages - self.pool.num_free

    def allocate(self, num_pages: int) -> None:
        """Makes the pool at least num_pages large."""
        if num_pages > self.pool.num_pages:
            for memory in self.memory.values():
                memory.grow(num_pages)
            self.pool.grow(num_pages)

    def reserve(self, sequence: CachedSequence, slots: int) -> None:
        """Makes sure that the sequence has at least this many slots."""
        missing = slots - sequence.table.capacity
        if missing > 0:
            count = -(-missing // self.pool.page_size)
            if count > self.pool.num_free:
                self.allocate(min(self.max_pages, max(self.pool.num_pages * 2, self.used + count)))
            sequence.table.extend(self.pool.allocate(count))

    def commit(self, sequence: CachedSequence, length: int, slots: Sequence[int]) -> None:
        """commit_all of one sequence."""
        self.commit_all([(sequence, length, slots)])

    def commit_all(
        self, commits: Iterable[tuple[CachedSequence, int, Sequence[int]]]
    ) -> None:  # fmt: skip
        """Of each sequence: keeps what is in the given slots, rising, as slots length, length + 1,
        ...

        A model that has filled only the first of them keeps those. Nothing is copied where the
        slots already stand where they belong, as those of every chain do. Slots are counted as
        positions here: as if nothing had been dropped.
        """
        paths: dict[Hashable, list[Path]] = {}
        for sequence, length, slots in commits:
            for model, computed in sequence.computed.items():
                if computed <= length:
                    continue
                kept = next((i for i, slot in enumerate(slots) if slot >= computed), len(slots))
                if any(slot != length + index for index, slot in enumerate(slots[:kept])):
                    nodes = [slot - length for slot in slots[:kept]]
                    path = Path(sequence.table, sequence.slot(length), nodes)
                    paths.setdefault(model, []).append(path)
                sequence.computed[model] = length + kept
        for model, its in paths.items():
            self.memory[model].commit(its)

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Forgets every position from length on, for every model.

        Where the position before was dropped, all but the sinks is forgotten.
        """
        if sequence.dropped and length < sequence.sinks + sequence.dropped:
            length, sequence.dropped = min(length, sequence.sinks), 0
        for model, computed in sequence.computed.items():
            sequence.computed[model] = min(computed, length)

    def drop(self, sequence: CachedSequence, first: int) -> None:
        """Forgets the positions between the sinks and the first one given, whole pages only.

        Their pages serve the same sequence again, so that it holds no more than it reserved. Every
        model must have filled the positions up to the first.
        """
        page = self.pool.page_size
        count = (first - sequence.sinks - sequence.dropped) // page
        if count > 0:
            sequence.table.recycle(sequence.sinks // page, count)
            sequence.dropped += count * page

    def close(self, sequence: CachedSequence) -> None:
        """Gives the pages back."""
        self._sequences.remove(sequence)
        self.pool.release(sequence.table.pages)

    def check_integrity(self) -> None:
        """Raises AssertionError unless pages, tables and lengths agree."""
        self.pool.check_integrity([sequence.table for sequence in self._sequences])
        for sequence in self._sequences:
            longest = max(sequence.computed.values(), default=0)
            held = longest - sequence.dropped
            assert held <= sequence.table.capacity, "more slots filled than reserved"
            assert sequence.dropped == 0 or held >= sequence.sinks, "more dropped than filled"
            pages = sequence.table.pages
            runs = all(b == a + 1 for a, b in pairwise(pages))
            assert runs == sequence.table.contiguous, "the contiguous flag is stale"
            assert list(sequence.table.numbers) == pages, "the kernels' page numbers are stale"


def pages_for_memory(kv_memory: int, page_size: int, slot_bytes: int) -> int:
    """How many pages fit into kv_memory bytes when one slot of all models costs slot_bytes."""
    pages = kv_memory // (page_size * slot_bytes)
    if pages < 1:
        raise CacheFullError(
            f"kv_memory={kv_memory} bytes holds not even one page of {page_size} slots "
            f"({page_size * slot_bytes} bytes); raise kv_memory"
        )
    return pages
