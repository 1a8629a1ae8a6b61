"""One pass of a model over packed rows: what its layers share, gathered and copied once.

Every layer then writes its keys and values and attends: two or three launches, no wait, no copy.
Likewise the commit of all sequences' accepted paths is one launch for all layers.
"""

from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import attention, cache
from specdec.kernels.cache import LayerTable
from specdec.kernels.reference import Window
from specdec.kernels.tiles import MAX_ROWS, num_splits, split_unit
from specdec.kernels.upload import upload

# Partial sums of one launch; more rows are attended in several. It bounds what a long prompt takes.
_WORKSPACE_BYTES = 1 << 29
_TABLE_STEP = 16  # pages: rows of the table start at aligned addresses, whatever the context


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows that one sequence has in a call; row i goes to slot context + i."""

    rows: int
    context: int
    pages: "array[int]"  # of the sequence, "i"
    parents: tuple[int, ...] = ()  # of its last rows, the nodes, -1: the last row of the chain

    @property
    def chain(self) -> int:
        return self.rows - len(self.parents)


def pieces_of(
    rows: int, context: int, pages: "array[int]", parents: tuple[int, ...] = ()
) -> list[Piece]:
    """A sequence's rows, a chain and the nodes behind it, in pieces of at most 256 rows.

    Only a tree of more nodes than that is a larger piece: its rows do not see all before them.
    """
    nodes = len(parents)
    tail = min(rows - nodes, max(MAX_ROWS - nodes, 0)) if nodes else 0
    head = rows - nodes - tail
    pieces = [
        Piece(min(MAX_ROWS, head - begin), context + begin, pages)
        for begin in range(0, head, MAX_ROWS)
    ]
    if nodes:
        pieces.append(Piece(tail + nodes, context + head, pages, parents))
    return pieces


@lru_cache(maxsize=1024)
def _bits(chain: int, parents: tuple[int, ...], words: int) -> bytes:
    """Ancestor bits of a piece's rows, `words` int64 each."""
    seen = [(1 << (row + 1)) - 1 for row in range(chain)]
    above = seen[-1] if seen else 0
    for node, parent in enumerate(parents):
        seen.append((above if parent < 0 else seen[chain + parent]) | 1 << (chain + node))
    return b"".join(line.to_bytes(8 * words, "little") for line in seen)


@dataclass(slots=True, eq=False)
class _Group:
    """Neighbouring pieces that are attended in one launch."""

    rows: slice
    table: Tensor  # (pieces, pages) int32
    contexts: Tensor  # (pieces,)
    offsets: Tensor  # (pieces + 1,) from 0
    bits: Tensor  # (rows, words)
    most_context: int
    most_rows: int
    plans: dict[object, attention.Plan] = field(default_factory=dict)


class PackedPass:
    """The pieces of one pass. Its tensors are the pass's own: nothing outlives it."""

    def __init__(self, pieces: Sequence[Piece], page_size: int, device: torch.device) -> None:
        self._pieces, self._on = list(pieces), on(device)
        self._most_rows = max((piece.rows for piece in pieces), default=0)
        words = max(1, -(-self._most_rows // 64))
        lengths = [piece.context + piece.rows for piece in pieces]
        width = max((-(-length // page_size) for length in lengths), default=0)
        width = -(-width // _TABLE_STEP) * _TABLE_STEP
        table, bits, slots = array("i"), bytearray(), array("q")
        contexts, offsets = array("q"), array("q", [0])
        for piece, length in zip(pieces, lengths, strict=True):
            pages = piece.pages[: -(-length // page_size)]
            table += pages
            table.frombytes(bytes((width - len(pages)) * table.itemsize))
            bits += _bits(piece.chain, piece.parents, words)
            _extend_slots(slots, piece.context, length, pages, page_size)
            contexts.append(piece.context)
            offsets.append(offsets[-1] + piece.rows)
        found = upload(
            [
                (table.tobytes(), torch.int32), (bits, torch.int64),
                (slots.tobytes(), torch.int64),
                (contexts.tobytes(), torch.int64),
                (offsets.tobytes(), torch.int64),
            ],
            device,
        )  # fmt: skip
        self._table = found[0].view(len(contexts), width)
        self._bits = found[1].view(-1, words)
        self._slots, self._contexts, self._offsets = found[2:]
        self._groups: dict[tuple[int, int, int], list[_Group]] = {}

    def layer(
        self, q: Tensor, keys: Tensor, values: Tensor, k_pages: Tensor, v_pages: Tensor, *,
        scale: float, window: Window | None, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Writes keys (rows, K, D) and values (rows, K, Dv) of all rows to one layer's pages, then
        attends with q (rows, H, D). Returns (rows, H, Dv), as tree_attention of every piece.

        Nothing is checked: the pages are of a type and of sizes that tree_attention takes.
        """
        dtype = q.dtype
        q, keys, values = (t.to(k_pages.dtype) for t in (q, keys, values))
        rows, heads, kv_heads = q.shape[0], q.shape[1], k_pages.shape[2]
        out = q.new_empty(rows, heads, v_pages.shape[3])
        if out.numel() == 0:
            return out.to(dtype)
        if q.stride(2) != 1:
            q = q.contiguous()
        with self._on:
            cache.write(
                _side_by_side(keys), _side_by_side(values), k_pages, v_pages, self._slots
            )  # fmt: skip
            for group in self._grouped(heads, kv_heads, v_pages.shape[3]):
                its_q, its_out = q[group.rows], out[group.rows]
                plan = self._plan(group, its_q, k_pages, v_pages, window, softcap)
                attention.attend(
                    plan, its_q, k_pages, v_pages, group.table, group.contexts, group.offsets,
                    group.bits, its_out, scale=scale, window=window, softcap=softcap, sinks=sinks,
                )  # fmt: skip
        return out.to(dtype)

    def _plan(
        self, group: _Group, q: Tensor, k_pages: Tensor, v_pages: Tensor, window: Window | None,
        softcap: float | None,
    ) -> attention.Plan:  # fmt: skip
        key = (q.shape, q.dtype, v_pages.shape, window, softcap is None)
        plan = group.plans.get(key)
        if plan is None:
            plan = group.plans[key] = attention.Plan.of(
                q, k_pages, v_pages, group.table, window=window, softcap=softcap,
                max_context=group.most_context, unit=None, most_rows=group.most_rows,
            )  # fmt: skip
        return plan

    def _grouped(self, heads: int, kv_heads: int, value_size: int) -> list[_Group]:
        key = (heads, kv_heads, value_size)
        groups = self._groups.get(key)
        if groups is None:
            ends = self._ends(heads * (value_size + 2) * 4, split_unit(kv_heads))
            begins = [0, *ends[:-1]]
            groups = [self._group(*span) for span in zip(begins, ends, strict=True)]
            self._groups[key] = groups
        return groups

    def _ends(self, sum_bytes: int, unit: int) -> list[int]:
        """Where groups of pieces end whose workspace is within bounds; sum_bytes: of the partial
        sums of one row in one split."""
        ends, rows, splits = list[int](), 0, 0
        for index, piece in enumerate(self._pieces):
            its = num_splits(piece.context + self._most_rows, unit)
            if rows and (rows + piece.rows) * max(splits, its) * sum_bytes > _WORKSPACE_BYTES:
                ends.append(index)
                rows, splits = 0, 0
            rows, splits = rows + piece.rows, max(splits, its)
        return [*ends, len(self._pieces)]

    def _group(self, begin: int, end: int) -> _Group:
        pieces = self._pieces[begin:end]
        first = sum(piece.rows for piece in self._pieces[:begin])
        rows = slice(first, first + sum(piece.rows for piece in pieces))
        contexts, offsets = self._contexts, self._offsets
        if len(pieces) < len(self._pieces):
            contexts = contexts[begin:end].clone()  # an aligned address
            offsets = offsets[begin : end + 1] - first
        return _Group(
            rows, self._table[begin:end], contexts, offsets, self._bits[rows],
            max(piece.context for piece in pieces), max(piece.rows for piece in pieces),
        )  # fmt: skip


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments' is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _extend_slots(
    slots: "array[int]", begin: int, end: int, pages: "array[int]", page_size: int
) -> None:
    """Adds the flat numbers of a sequence's slots begin .. end - 1."""
    while begin < end:
        index, offset = divmod(begin, page_size)
        count = min(page_size - offset, end - begin)
        flat = pages[index] * page_size + offset
        slots.extend(range(flat, flat + count))
        begin += count


def _side_by_side(new: Tensor) -> Tensor:
    """(rows, K, D) as scatter reads them: the heads of a row behind each other."""
    if new.stride(2) == 1 and (new.stride(1) == new.shape[2] or new.shape[1] == 1):
        return new
    return new.contiguous()


@dataclass(frozen=True, slots=True)
class Move:
    """An accepted path of one sequence: its i-th node goes to slot begin + i."""

    pages: "array[int]"  # of the sequence, "i"
    begin: int  # slots before the tree, whose node j has slot begin + j
    nodes: Sequence[int]  # rising


def commit(layers: LayerTable, moves: Sequence[Move]) -> None:
    """Keeps the accepted paths of all sequences in all layers: one copy, one launch."""
    page = layers.page_size
    depth = max(len(move.nodes) for move in moves)
    # only the pages that a move reaches; a row of a path is a node's number and one
    tables = [
        move.pages[move.begin // page : (move.begin + move.nodes[-1]) // page + 1] for move in moves
    ]
    width = max(map(len, tables))
    width = -(-width // _TABLE_STEP) * _TABLE_STEP
    table, paths = array("i"), array("q")
    for move, its in zip(moves, tables, strict=True):
        table += its
        table.extend([-1] * (width - len(its)))
        paths.extend(node + 1 for node in move.nodes)
        paths.extend([-1] * (depth - len(move.nodes)))
    found = upload(
        [
            (table.tobytes(), torch.int32), (paths.tobytes(), torch.int64),
            (array("q", [move.begin % page for move in moves]).tobytes(), torch.int64),
            (bytes(8 * (len(moves) + 1)), torch.int64),
        ],
        layers.device,
    )  # fmt: skip
    count = len(moves)
    with on(layers.device):
        cache.commit(
            layers, found[0].view(count, width), found[2], found[3], found[1].view(count, depth)
        )  # fmt: skip
