"""tree_attention against a dense softmax in float64."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.reference import Window, pack_bits, tree_attention, unpack_bits, visibility

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
# Absolute, for inputs of unit variance.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Problem:
    """A ragged batch of trees over paged keys and values, and the dense form of the same."""

    q: Tensor  # (rows, H, D)
    keys: list[Tensor]  # per sequence (context + n, K, D)
    values: list[Tensor]
    masks: list[Tensor]  # per sequence (n, n) bool
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    contexts: list[int]

    @property
    def cu_nodes(self) -> Tensor:
        sizes = [0, *(len(mask) for mask in self.masks)]
        return torch.tensor(sizes).cumsum(0)

    @property
    def bits(self) -> Tensor:
        """All rows' masks, as wide as the largest tree asks for."""
        words = -(-max(len(mask) for mask in self.masks) // 64)
        packed = [pack_bits(mask) for mask in self.masks]
        return torch.cat([torch.nn.functional.pad(p, (0, words - p.shape[1])) for p in packed])


def tree_mask(draw: random.Random, rows: int, chain: bool) -> Tensor:
    """(rows, rows) bool, row 0 the root: the rows on each row's path, itself included."""
    mask = torch.zeros(rows, rows, dtype=torch.bool)
    for row in range(rows):
        if row:
            mask[row] = mask[row - 1 if chain else draw.randrange(row)]
        mask[row, row] = True
    return mask


def problem(
    sizes: Sequence[tuple[int, int]],
    heads: int = 4,
    kv_heads: int = 2,
    key_size: int = 8,
    value_size: int = 8,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    chain: bool = False,
) -> Problem:
    """sizes: (context, rows) of each sequence. Pages are shuffled, unused slots hold NaN."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    counts = [-(-(context + rows) // page) for context, rows in sizes]
    order = list(range(sum(counts)))
    draw.shuffle(order)
    table = torch.full((len(sizes), max(counts)), -1, dtype=torch.int32)
    k_pages = torch.full((len(order), page, kv_heads, key_size), math.nan, dtype=dtype)
    v_pages = torch.full((len(order), page, kv_heads, value_size), math.nan, dtype=dtype)
    keys, values, masks = [], [], []
    for index, ((context, rows), count) in enumerate(zip(sizes, counts, strict=True)):
        own = [order.pop() for _ in range(count)]
        table[index, :count] = torch.tensor(own, dtype=torch.int32)
        length = context + rows
        keys.append(normal(length, kv_heads, key_size))
        values.append(normal(length, kv_heads, value_size))
        masks.append(tree_mask(draw, rows, chain))
        for slot in range(length):
            k_pages[own[slot // page], slot % page] = keys[-1][slot]
            v_pages[own[slot // page], slot % page] = values[-1][slot]
    q = normal(sum(rows for _, rows in sizes), heads, key_size)
    return Problem(
        q, keys, values, masks, k_pages, v_pages, table, [context for context, _ in sizes]
    )


def dense(
    p: Problem,
    scale: float,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(rows, H, Dv) float64: every score of every pair, and then a softmax over the visible."""
    out, begin = [], 0
    for keys, values, mask, context in zip(p.keys, p.values, p.masks, p.contexts, strict=True):
        n, groups = len(mask), p.q.shape[1] // keys.shape[1]
        positions = (context + mask.sum(-1) - 1).tolist()
        visible = by_hand(context, mask, positions, window)
        seen = torch.tensor(visible, dtype=torch.bool).view(n, context + n)
        k = keys.double().repeat_interleave(groups, 1)  # (T, H, D)
        v = values.double().repeat_interleave(groups, 1)
        scores = torch.einsum("nhd,thd->hnt", p.q[begin : begin + n].double(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = torch.where(seen, torch.exp(scores), 0.0)
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks.double())[:, None, None]
        out.append(torch.einsum("hnt,thd->nhd", weights / total, v))
        begin += n
    return torch.cat(out)


def by_hand(
    context: int, mask: Tensor, positions: Sequence[int], window: Window | None
) -> list[list[bool]]:
    """Which of the slots each row sees, by the definition."""
    seen = []
    at = [*range(context), *positions]
    for position, among in zip(positions, mask.tolist(), strict=True):
        line = [True] * context + among
        if window is not None and window.chunked:
            line = [
                s and at[i] // window.size >= position // window.size for i, s in enumerate(line)
            ]
        elif window is not None:
            line = [s and position - at[i] < window.size for i, s in enumerate(line)]
        seen.append(line)
    return seen


def run(
    p: Problem,
    scale: float = 0.4,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The function under test, writing into an output full of NaN."""
    out = torch.full((*p.q.shape[:2], p.v_pages.shape[3]), math.nan, dtype=p.q.dtype)
    result = tree_attention(
        p.q, p.k_pages, p.v_pages, p.block_table, torch.tensor(p.contexts), p.cu_nodes, p.bits,
        scale=scale, window=window, softcap=softcap, sinks=sinks, out=out,
    )  # fmt: skip
    assert result.data_ptr() == out.data_ptr()
    return result


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(
        found.double(), wanted, rtol=0, atol=TOLERANCE[found.dtype], equal_nan=False
    )


@pytest.mark.parametrize("context", [0, 1, 7, 63, 100])
@pytest.mark.parametrize("rows", [1, 7, 63, 100])
@pytest.mark.parametrize("chain", [False, True], ids=["tree", "chain"])
def test_tree_attention_is_softmax_over_the_path(context: int, rows: int, chain: bool) -> None:
    p = problem([(context, rows)], chain=chain)
    assert_close(run(p), dense(p, 0.4))


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (5, 1)], ids=["mha", "gqa2", "gqa3", "mqa"]
)
@pytest.mark.parametrize("rows", [1, 7, 65], ids=lambda rows: f"rows{rows}")
@pytest.mark.parametrize("options", ["plain", "capped"])
def test_query_heads_read_their_own_group(
    heads: int, kv_heads: int, rows: int, options: str
) -> None:
    p = problem([(9, rows)], heads=heads, kv_heads=kv_heads)
    softcap = 2.0 if options == "capped" else None
    assert_close(run(p, softcap=softcap), dense(p, 0.4, softcap=softcap))


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ragged_batch_of_scattered_pages(page: int, dtype: torch.dtype) -> None:
    p = problem([(0, 7), (33, 1), (5, 63), (17, 2)], page=page, dtype=dtype)
    assert_close(run(p), dense(p, 0.4))


def test_sequence_without_rows_changes_nothing() -> None:
    p = problem([(5, 3), (4, 0), (2, 4)])
    assert_close(run(p), dense(p, 0.4))


@pytest.mark.parametrize("window", [1, 4, 10, 1000])
@pytest.mark.parametrize("rows", [1, 9, 70], ids=lambda rows: f"rows{rows}")
def test_window_counts_positions_not_slots(window: int, rows: int) -> None:
    """Siblings share a position, so counting slots would hide too much of the context."""
    p = problem([(12, rows), (0, rows)])
    assert_close(run(p, window=window), dense(p, 0.4, Window(window)))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap_bounds_the_scores(softcap: float) -> None:
    p = problem([(12, 9), (0, 70)])
    assert_close(run(p, scale=2.0, softcap=softcap), dense(p, 2.0, softcap=softcap))


@pytest.mark.parametrize("rows", [1, 9, 70], ids=lambda rows: f"rows{rows}")
def test_sinks_take_part_in_the_sum_only(rows: int) -> None:
    p = problem([(12, rows)])
    sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    assert_close(run(p, sinks=sinks), dense(p, 0.4, sinks=sinks))


def test_softcap_window_and_sinks_together() -> None:
    p = problem([(12, 9), (3, 5)], heads=6, kv_heads=2)
    sinks = torch.linspace(-2, 2, 6)
    wanted = dense(p, 1.5, Window(5), 3.0, sinks)
    assert_close(run(p, 1.5, 5, 3.0, sinks), wanted)


@pytest.mark.parametrize("value_size", [4, 12])
@pytest.mark.parametrize("rows", [1, 7, 70], ids=lambda rows: f"rows{rows}")
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
def test_values_may_have_another_size_than_keys(
    value_size: int, rows: int, softcap: float | None
) -> None:
    p = problem([(9, rows)], value_size=value_size)
    assert_close(run(p, softcap=softcap), dense(p, 0.4, softcap=softcap))


def test_quantised_pages_are_scaled_per_head() -> None:
    p = problem([(9, 7), (0, 5)])
    k_scale, v_scale = torch.tensor([0.5, 4.0]), torch.tensor([3.0, 0.25])
    found = tree_attention(
        p.q, p.k_pages / k_scale[:, None], p.v_pages / v_scale[:, None], p.block_table,
        torch.tensor(p.contexts), p.cu_nodes, p.bits, scale=0.4, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    assert_close(found, dense(p, 0.4))


def test_pages_of_another_type_are_read_in_that_of_the_queries() -> None:
    p = problem([(9, 7)], dtype=torch.bfloat16)
    q = p.q.float()
    one = torch.ones(2)
    found = tree_attention(
        q, p.k_pages, p.v_pages, p.block_table, torch.tensor(p.contexts), p.cu_nodes, p.bits,
        scale=0.4, k_scale=one, v_scale=one,
    )  # fmt: skip
    assert_close(found, dense(p, 0.4))


def test_output_is_made_where_none_is_given() -> None:
    p = problem([(9, 7)], value_size=12)
    found = tree_attention(
        p.q, p.k_pages, p.v_pages, p.block_table, torch.tensor(p.contexts), p.cu_nodes, p.bits,
        scale=0.4,
    )  # fmt: skip
    assert found.is_contiguous()
    assert torch.equal(found, run(p))


@pytest.mark.parametrize("rows", [1, 5, 70], ids=lambda rows: f"rows{rows}")
@pytest.mark.parametrize("kv_heads", [1, 4], ids=["mqa", "mha"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
def test_attend_returns_what_a_model_may_view(
    rows: int, kv_heads: int, softcap: float | None
) -> None:
    p = problem([(0, rows)], kv_heads=kv_heads)
    keys, values = (reference.heads_first(t[0], 0, rows) for t in (p.keys, p.values))
    out = reference.attend(p.q, keys, values, None, scale=1.0, softcap=softcap)
    assert out.view(rows, -1).shape == (rows, 32)


# Visibility.


@pytest.mark.parametrize("chunked", [False, True], ids=["sliding", "chunked"])
@pytest.mark.parametrize("size", [1, 3, 8, 100])
@pytest.mark.parametrize("context", [0, 1, 7, 8, 23])
@pytest.mark.parametrize("rows", [1, 2, 9], ids=lambda rows: f"rows{rows}")
def test_window_of_a_tree_goes_by_position(
    chunked: bool, size: int, context: int, rows: int
) -> None:
    mask = tree_mask(random.Random(1), rows, chain=False)
    positions = context + mask.sum(-1) - 1
    window = Window(size, chunked)
    found = visibility(context, rows, mask, positions, window, CPU)
    wanted = by_hand(context, mask, positions.tolist(), window)
    if found is None:
        assert all(all(line) for line in wanted)
    else:
        assert found.tolist() == wanted


@pytest.mark.parametrize("chunked", [False, True], ids=["sliding", "chunked"])
@pytest.mark.parametrize(("context", "rows"), [(0, 1), (0, 9), (7, 1), (8, 5), (15, 2)])
def test_chain_without_a_mask_is_causal(chunked: bool, context: int, rows: int) -> None:
    causal = torch.ones(rows, rows).tril().bool()
    for window in (None, Window(4, chunked)):
        found = visibility(context, rows, None, None, window, CPU)
        wanted = by_hand(context, causal, range(context, context + rows), window)
        if found is None:
            assert all(all(line) for line in wanted)
        else:
            assert found.tolist() == wanted


# Bit masks.


@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65, 100, 128, 200])
def test_bits_survive_packing(rows: int) -> None:
    mask = torch.rand(rows, rows, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, -1] = True
    packed = pack_bits(mask)
    assert packed.dtype == torch.int64
    assert packed.shape == (rows, -(-rows // 64))
    assert torch.equal(unpack_bits(packed, rows), mask)


@pytest.mark.parametrize("row", [0, 1, 62, 63, 64, 100])
def test_bit_b_of_word_w_stands_for_row_64_w_plus_b(row: int) -> None:
    mask = torch.zeros(1, 101, dtype=torch.bool)
    mask[0, row] = True
    [words] = pack_bits(mask).tolist()
    assert [word % (1 << 64) for word in words] == [
        1 << row if row < 64 else 0,
        1 << (row - 64) if row >= 64 else 0,
    ]
