"""The paged cache: who holds which page, which slots each model has filled, what a commit moves."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from specdec.cache import (
    BlockTable,
    CachedSequence,
    CacheGroup,
    LayerShape,
    Paged,
    PagePool,
    pages_for_memory,
)
from specdec.errors import CacheFullError

PAGE = 4
CPU = torch.device("cpu")
SHAPES = [LayerShape(2, 3, 5, torch.float32), LayerShape(1, 4, 4, torch.bfloat16)]


# Pages.


def test_pages_come_from_the_lowest_contiguous_run() -> None:
    pool = PagePool(10, PAGE)
    assert pool.allocate(2) == [0, 1]
    middle = pool.allocate(3)
    assert middle == [2, 3, 4]
    assert pool.allocate(1) == [5]
    pool.release([0, 1])
    pool.release(middle[1:])
    # free: 0 1, 3 4, 6 7 8 9
    assert pool.allocate(3) == [6, 7, 8]
    assert pool.allocate(2) == [0, 1]
    assert pool.num_free == 3


def test_last_run_of_the_pool_is_a_run_too() -> None:
    pool = PagePool(6, PAGE)
    pages = pool.allocate(6)
    pool.release([pages[1], *pages[4:]])
    assert pool.allocate(2) == [4, 5]


def test_pages_are_the_lowest_free_ones_where_no_run_is_long_enough() -> None:
    pool = PagePool(6, PAGE)
    pages = pool.allocate(6)
    pool.release(pages[::2])
    assert pool.allocate(2) == [0, 2]
    assert pool.allocate(1) == [4]


def test_no_pages_are_a_valid_request() -> None:
    assert PagePool(2, PAGE).allocate(0) == []
    assert PagePool(0, PAGE).allocate(0) == []


def test_page_is_free_when_its_last_holder_releases_it() -> None:
    pool = PagePool(2, PAGE)
    [page] = pool.allocate(1)
    pool.retain([page])
    pool.release([page])
    assert pool.num_free == 1
    assert pool.allocate(1) != [page]
    pool.release([page])
    assert pool.allocate(1) == [page]


def test_releasing_a_page_twice_is_a_bug() -> None:
    pool = PagePool(2, PAGE)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="page 0 released twice"):
        pool.release(pages)


def test_retaining_a_free_page_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="page 1 is free"):
        PagePool(2, PAGE).retain([1])


def test_full_pool_says_what_was_needed_and_what_to_do() -> None:
    pool = PagePool(3, PAGE)
    pool.allocate(1)
    with pytest.raises(CacheFullError) as full:
        pool.allocate(3)
    assert str(full.value) == (
        "3 pages of 4 slots are needed, 2 of 3 are free; raise kv_memory, shorten the prompts or "
        "lower max_new_tokens"
    )
    assert pool.num_free == 2


def test_grown_pool_offers_the_new_pages() -> None:
    pool = PagePool(1, PAGE)
    assert pool.allocate(1) == [0]
    pool.grow(3)
    assert (pool.num_pages, pool.num_free) == (3, 2)
    assert pool.allocate(2) == [1, 2]


def test_block_table_knows_whether_its_pages_are_contiguous() -> None:
    table = BlockTable(PAGE)
    table.extend([3, 4])
    assert (table.contiguous, table.capacity, table.base) == (True, 8, 12)
    assert [table.flat(slot) for slot in (0, 3, 4, 7)] == [12, 15, 16, 19]
    table.extend([6])
    assert (table.contiguous, table.capacity) == (False, 12)
    assert [table.flat(slot) for slot in (7, 8, 11)] == [19, 24, 27]


def test_block_table_going_backwards_is_not_contiguous() -> None:
    table = BlockTable(PAGE)
    table.extend([2, 1])
    assert not table.contiguous


@pytest.mark.parametrize(
    ("kv_memory", "pages"), [(400, 1), (799, 1), (800, 2), (8000, 20)], ids=str
)
def test_pages_for_memory_rounds_down(kv_memory: int, pages: int) -> None:
    assert pages_for_memory(kv_memory, page_size=PAGE, slot_bytes=100) == pages


def test_memory_below_one_page_is_refused() -> None:
    with pytest.raises(CacheFullError, match=r"kv_memory=399 bytes holds not even one page of 4 s"):
        pages_for_memory(399, page_size=PAGE, slot_bytes=100)


def test_slot_bytes_count_keys_and_values_of_every_layer() -> None:
    memory = Paged(SHAPES, 2, PAGE, CPU)
    assert memory.slot_bytes == 2 * (3 + 5) * 4 + 1 * (4 + 4) * 2


# Groups of sequences.


def group_of(*models: str, max_slots: int = 64) -> CacheGroup:
    group = CacheGroup(PAGE, max_slots, CPU)
    for model in models:
        group.add_model(model, SHAPES)
    return group


def fill(group: CacheGroup, sequence: CachedSequence, model: str, begin: int, end: int) -> None:
    """Writes into slots begin to end - 1 what tells them apart, and counts them as computed."""
    for slot in range(begin, end):
        write(group, sequence, model, slot, slot)
    sequence.computed[model] = end


def write(group: CacheGroup, sequence: CachedSequence, model: str, slot: int, value: int) -> None:
    memory, flat = group.memory[model], sequence.table.flat(slot)
    for layer, tensors in enumerate((*memory.flat_keys, *memory.flat_values)):
        tensors[flat] = value + layer / 4


def contents(group: CacheGroup, sequence: CachedSequence, model: str) -> list[int]:
    """What the filled slots hold, slot by slot; the same in every layer, keys and values."""
    memory = group.memory[model]
    flat = torch.tensor(
        [sequence.table.flat(slot) for slot in range(sequence.computed_len(model))],
        dtype=torch.long,
    )
    found: list[Tensor] = []
    for layer, tensors in enumerate((*memory.flat_keys, *memory.flat_values)):
        taken = tensors.index_select(0, flat).double() - layer / 4
        assert torch.equal(taken.amin((1, 2)), taken.amax((1, 2)))
        found.append(taken[:, 0, 0])
    assert all(torch.equal(found[0], other) for other in found[1:])
    return [int(value) for value in found[0]]


def test_open_grows_the_pool_on_demand_and_keeps_what_is_there() -> None:
    group = group_of("target")
    first = group.open(5)
    assert (first.table.capacity, group.pool.num_pages) == (8, 2)
    fill(group, first, "target", 0, 5)
    second = group.open(9)
    assert second.table.capacity == 12
    assert set(first.table.pages).isdisjoint(second.table.pages)
    assert contents(group, first, "target") == [0, 1, 2, 3, 4]
    group.check_integrity()


def test_reserve_adds_only_the_pages_that_are_missing() -> None:
    group = group_of("target")
    sequence = group.open(5)
    group.reserve(sequence, 8)
    assert sequence.table.capacity == 8
    group.reserve(sequence, 9)
    assert sequence.table.capacity == 12
    group.reserve(sequence, 3)
    assert sequence.table.capacity == 12
    group.check_integrity()


def test_reserve_between_neighbours_scatters_the_pages() -> None:
    group = group_of("target")
    first, second = group.open(4), group.open(4)
    group.reserve(first, 8)
    assert not first.table.contiguous
    assert second.table.contiguous
    group.check_integrity()


def test_limit_is_reached_exactly_and_then_refused() -> None:
    group = group_of("target", max_slots=4 * PAGE + 3)
    sequence = group.open(3 * PAGE)
    group.reserve(sequence, 4 * PAGE)
    assert group.pool.num_pages == 4
    with pytest.raises(CacheFullError, match="1 pages of 4 slots are needed, 0 of 4 are free"):
        group.reserve(sequence, 4 * PAGE + 1)
    with pytest.raises(CacheFullError):
        group.open(1)
    group.close(sequence)
    assert group.open(4 * PAGE).table.capacity == 4 * PAGE
    group.check_integrity()


def test_refused_open_leaves_no_trace() -> None:
    group = group_of("target", max_slots=2 * PAGE)
    group.open(PAGE)
    with pytest.raises(CacheFullError):
        group.open(2 * PAGE)
    group.check_integrity()
    assert group.used == 1


def test_closed_sequence_gives_its_pages_to_the_next() -> None:
    group = group_of("target", max_slots=4 * PAGE)
    first, second = group.open(2 * PAGE), group.open(2 * PAGE)
    pages = list(first.table.pages)
    group.close(first)
    assert group.used == 2
    assert group.open(2 * PAGE).table.pages == pages
    group.close(second)
    group.check_integrity()


def test_allocate_makes_room_up_front_and_never_shrinks() -> None:
    group = group_of("target")
    group.allocate(5)
    memory = group.memory["target"]
    assert [len(pages) for pages in (*memory.keys, *memory.values)] == [5] * 4
    group.allocate(2)
    assert group.pool.num_pages == 5
    assert group.open(20).table.contiguous


def test_flat_views_follow_a_grown_memory() -> None:
    group = group_of("target")
    group.allocate(2)
    group.allocate(6)
    memory = group.memory["target"]
    for pages, flat in zip(memory.keys, memory.flat_keys, strict=True):
        assert flat.data_ptr() == pages.data_ptr()
        assert len(flat) == 6 * PAGE


# Commits.


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Every (sources, destinations) that is copied."""
    seen: list[tuple[list[int], list[int]]] = []
    move = Paged.move

    def recorded(memory: Paged, sources: Tensor, destinations: Tensor) -> None:
        seen.append((sources.tolist(), destinations.tolist()))
        move(memory, sources, destinations)

    monkeypatch.setattr(Paged, "move", recorded)
    return seen


Moves = list[tuple[list[int], list[int]]]


@pytest.mark.parametrize("accepted", [0, 1, 4])
def test_commit_of_a_chain_copies_nothing(accepted: int, moves: Moves) -> None:
    group = group_of("target")
    sequence = group.open(16)
    fill(group, sequence, "target", 0, 10)
    group.commit(sequence, 6, range(6, 6 + accepted))
    assert contents(group, sequence, "target") == list(range(6 + accepted))
    assert moves == []


def scattered_pages(group: CacheGroup) -> CachedSequence:
    """16 slots on pages that lie apart and out of order."""
    sequence, *others = (group.open(4) for _ in range(7))
    for index in (5, 1, 3):
        group.close(others[index])
        group.reserve(sequence, sequence.table.capacity + 1)
        others[index] = group.open(4) if index == 5 else others[index]
    assert not sequence.table.contiguous
    return sequence


@pytest.mark.parametrize("place", [lambda group: group.open(16), scattered_pages])
@pytest.mark.parametrize(
    "slots",
    [[8], [7, 9], [6, 8, 9], [7, 8, 9, 10, 11], [6, 7, 8, 15], [8, 9, 15]],
    ids=lambda slots: "-".join(map(str, slots)),
)
def test_commit_of_a_tree_path_moves_its_slots_together(
    place: Callable[[CacheGroup], CachedSequence], slots: Sequence[int], moves: Moves
) -> None:
    """Ranges overlap in [7, 8, 9, 10, 11]: each slot is read before it is overwritten."""
    group = group_of("target")
    sequence = place(group)
    fill(group, sequence, "target", 0, 16)
    group.commit(sequence, 6, slots)
    assert contents(group, sequence, "target") == [0, 1, 2, 3, 4, 5, *slots]
    assert len(moves) == 1
    group.check_integrity()


def test_commit_serves_every_model_as_far_as_it_has_filled_the_path() -> None:
    group = group_of("target", "draft", "late", "idle")
    sequence = group.open(16)
    fill(group, sequence, "target", 0, 14)
    fill(group, sequence, "draft", 0, 10)
    fill(group, sequence, "late", 0, 4)
    group.commit(sequence, 6, [7, 9, 12])
    assert contents(group, sequence, "target") == [0, 1, 2, 3, 4, 5, 7, 9, 12]
    assert contents(group, sequence, "draft") == [0, 1, 2, 3, 4, 5, 7, 9]
    assert contents(group, sequence, "late") == [0, 1, 2, 3]
    assert sequence.computed_len("idle") == 0
    assert contents(group, sequence, "idle") == []


def test_model_that_filled_only_up_to_the_root_keeps_that() -> None:
    group = group_of("target", "draft")
    sequence = group.open(16)
    fill(group, sequence, "target", 0, 12)
    fill(group, sequence, "draft", 0, 6)
    group.commit(sequence, 6, [8, 10])
    assert sequence.computed == {"target": 8, "draft": 6}


def test_commit_touches_no_other_sequence() -> None:
    group = group_of("target")
    other, sequence = group.open(16), group.open(16)
    fill(group, other, "target", 0, 16)
    fill(group, sequence, "target", 0, 16)
    group.commit(sequence, 2, [5, 9])
    assert contents(group, other, "target") == list(range(16))


def test_truncate_forgets_in_every_model() -> None:
    group = group_of("target", "draft")
    sequence = group.open(16)
    fill(group, sequence, "target", 0, 12)
    fill(group, sequence, "draft", 0, 5)
    group.truncate(sequence, 8)
    assert sequence.computed == {"target": 8, "draft": 5}
    assert contents(group, sequence, "target") == list(range(8))
    assert sequence.table.capacity == 16


# Integrity.


def lose_a_page(group: CacheGroup, sequence: CachedSequence) -> None:
    del group
    sequence.table.pages.pop()


def share_a_page_uncounted(group: CacheGroup, sequence: CachedSequence) -> None:
    group.open(4).table.pages[0] = sequence.table.pages[0]


def free_a_held_page(group: CacheGroup, sequence: CachedSequence) -> None:
    group.pool._free.insert(0, sequence.table.pages[0])


def forget_a_free_page(group: CacheGroup, sequence: CachedSequence) -> None:
    del sequence
    group.pool._free.pop()


def unsort_the_free_list(group: CacheGroup, sequence: CachedSequence) -> None:
    del sequence
    group.pool._free.reverse()


def fill_more_than_reserved(group: CacheGroup, sequence: CachedSequence) -> None:
    del group
    sequence.computed["target"] = sequence.table.capacity + 1


def call_it_scattered(group: CacheGroup, sequence: CachedSequence) -> None:
    del group
    sequence.table.contiguous = False


def swap_pages(group: CacheGroup, sequence: CachedSequence) -> None:
    del group
    sequence.table.pages.reverse()


@pytest.mark.parametrize(
    ("corrupt", "complaint"),
    [
        (lose_a_page, "reference counts differ"),
        (share_a_page_uncounted, "reference counts differ"),
        (free_a_held_page, "free list differs"),
        (forget_a_free_page, "free list differs"),
        (unsort_the_free_list, "free list differs"),
        (fill_more_than_reserved, "more slots filled than reserved"),
        (call_it_scattered, "contiguous flag is stale"),
        (swap_pages, "contiguous flag is stale"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_planted_corruption_is_found(
    corrupt: Callable[[CacheGroup, CachedSequence], None], complaint: str
) -> None:
    group = group_of("target")
    group.allocate(8)
    sequence = group.open(8)
    fill(group, sequence, "target", 0, 6)
    group.check_integrity()
    corrupt(group, sequence)
    with pytest.raises(AssertionError, match=complaint):
        group.check_integrity()


class Shadow:
    """One sequence beside plain lists of what each model's slots must hold."""

    def __init__(self, group: CacheGroup, draw: random.Random) -> None:
        self.group, self.draw = group, draw
        self.cache = group.open(draw.randrange(1, 30))
        self.values: dict[str, list[int]] = {str(model): [] for model in group.memory}

    def grow(self) -> None:
        self.group.reserve(self.cache, self.cache.table.capacity + self.draw.randrange(9))

    def fill(self) -> None:
        for model, held in self.values.items():
            room = self.cache.table.capacity - len(held)
            for _ in range(min(room, self.draw.randrange(6))):
                held.append(self.draw.randrange(64))
                write(self.group, self.cache, model, len(held) - 1, held[-1])
            self.cache.computed[model] = len(held)

    def commit(self) -> None:
        lengths = [len(held) for held in self.values.values()]
        length = self.draw.randrange(min(lengths) + 1)
        rest = range(length, max(lengths))
        slots = sorted(self.draw.sample(rest, self.draw.randrange(len(rest) + 1)))
        self.group.commit(self.cache, length, slots)
        for held in self.values.values():
            held[length:] = [held[slot] for slot in slots if slot < len(held)]

    def cut(self) -> None:
        length = self.draw.randrange(max(map(len, self.values.values())) + 1)
        self.group.truncate(self.cache, length)
        for held in self.values.values():
            del held[length:]

    def check(self) -> None:
        for model, held in self.values.items():
            assert contents(self.group, self.cache, model) == held


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_keep_pages_and_contents_intact(seed: int) -> None:
    draw, refused = random.Random(seed), 0
    group = group_of("target", "draft", max_slots=24 * PAGE)
    shadows: list[Shadow] = []
    for step in range(200):
        choice = draw.choice(["open", "grow", "grow", "fill", "fill", "commit", "cut", "close"])
        try:
            if choice == "open" or not shadows:
                shadows.append(Shadow(group, draw))
            elif choice == "close":
                group.close(shadows.pop(draw.randrange(len(shadows))).cache)
            else:
                getattr(draw.choice(shadows), choice)()
        except CacheFullError:
            refused += 1
        group.check_integrity()
        if step % 5 == 0:
            for shadow in shadows:
                shadow.check()
    assert refused > 0, "the limit was never reached"


def test_group_grows_for_a_sequence_that_is_longer_than_twice_the_pool() -> None:
    group = CacheGroup(PAGE, 64 * PAGE, CPU)
    group.add_model("model", SHAPES)
    first = group.open(4 * PAGE)
    group.close(group.open(3 * PAGE))  # leaves free pages, but too few
    group.open(20 * PAGE)
    assert group.pool.num_pages >= 24
    group.close(first)
    group.check_integrity()


# Pages dropped from the middle.


def test_dropped_pages_go_behind_the_others_and_lower_the_slots() -> None:
    group = CacheGroup(PAGE, 64, CPU)
    group.add_model("model", SHAPES)
    sequence = group.open(20, sinks=3)
    assert (sequence.sinks, sequence.table.pages) == (4, [0, 1, 2, 3, 4])
    sequence.computed["model"] = 19
    group.drop(sequence, 7)  # no whole page lies between the sinks and position 7
    assert sequence.dropped == 0
    group.drop(sequence, 13)
    assert (sequence.dropped, sequence.table.pages) == (8, [0, 3, 4, 1, 2])
    assert not sequence.table.contiguous
    assert [sequence.slot(position) for position in (0, 3, 12, 18)] == [0, 3, 4, 10]
    assert sequence.computed_len("model") == 19
    group.check_integrity()
    group.drop(sequence, 13)  # dropped already
    assert sequence.dropped == 8


def test_commit_behind_dropped_pages_moves_what_it_should() -> None:
    group = CacheGroup(PAGE, 64, CPU)
    memory = group.add_model("model", SHAPES)
    sequence = group.open(16, sinks=4)
    sequence.computed["model"] = 12
    group.drop(sequence, 8)
    sequence.computed["model"] = 16  # four nodes behind twelve positions
    numbers = torch.arange(16.0)
    slots = [sequence.table.flat(slot) for slot in range(12)]
    memory.flat_keys[0][slots] = numbers[:12].view(12, 1, 1).expand(12, 2, 3)
    group.commit(sequence, 12, [13, 15])
    assert sequence.computed_len("model") == 14
    # position 12 is slot 8: nodes 13 and 15 were slots 9 and 11
    moved = memory.flat_keys[0][slots][:, 0, 0].tolist()
    assert moved == [0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 10, 11]


@pytest.mark.parametrize(
    ("length", "left", "dropped"), [(13, 13, 8), (12, 12, 8), (11, 4, 0), (2, 2, 0)]
)
def test_truncating_into_what_was_dropped_leaves_the_sinks(
    length: int, left: int, dropped: int
) -> None:
    group = CacheGroup(PAGE, 64, CPU)
    group.add_model("model", SHAPES)
    sequence = group.open(20, sinks=4)
    sequence.computed["model"] = 19
    group.drop(sequence, 12)
    group.truncate(sequence, length)
    assert (sequence.computed_len("model"), sequence.dropped) == (left, dropped)
    group.check_integrity()
