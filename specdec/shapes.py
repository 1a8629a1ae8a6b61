"""Shapes of token trees that are fixed before anything is drawn."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import Any

from specdec.errors import InvalidArgumentError

# A scored row is the root or a node; kernels and cost tables count at most 256 of them.
MAX_NODES = 255


def expansion(tree: Any) -> tuple[int, ...]:
    """A static expansion <k1, k2, ...>: every node of depth i - 1 has k_i children (SpecInfer,
    Miao et al. 2023, 2305.09781, section 3). Raises InvalidArgumentError for what is none, and for
    more than MAX_NODES nodes."""
    is_list = isinstance(tree, Sequence) and not isinstance(tree, str) and len(tree) > 0
    if not is_list or not all(type(width) is int and width > 0 for width in tree):
        raise InvalidArgumentError(
            f"tree={tree!r}: expected the number of children per level, such as (3, 2, 1)"
        )
    widths = tuple(tree)
    if expanded(widths) > MAX_NODES:
        raise InvalidArgumentError(
            f"tree={tree!r} has {expanded(widths)} nodes: expected at most {MAX_NODES}; take fewer "
            "children or levels"
        )
    return widths


def expanded(widths: Sequence[int]) -> int:
    """Nodes of an expansion: the sum over levels of the product of the widths so far."""
    return sum(accumulate(widths, mul))


Levels = tuple[tuple[int, ...], ...]


def shape_parents(shape: Any) -> tuple[int, ...]:
    """Any static shape: the parent of every node, level by level, -1 for children of the root.
    Siblings stand side by side, the first one first. Raises InvalidArgumentError for what is none,
    and for more than MAX_NODES nodes."""
    is_list = isinstance(shape, Sequence) and not isinstance(shape, str) and len(shape) > 0
    if not is_list or any(type(parent) is not int for parent in shape):
        raise InvalidArgumentError(
            f"shape={shape!r}: expected the parent of every node, such as (-1, -1, 0, 0, 1)"
        )
    if len(shape) > MAX_NODES:
        raise InvalidArgumentError(f"shape: {len(shape)} nodes, expected at most {MAX_NODES}")
    before = -1
    for node, parent in enumerate(shape):
        if not before <= parent < node:
            raise InvalidArgumentError(
                f"shape[{node}]={parent}: expected {before} to {node - 1}, since nodes are listed "
                "level by level, children of one node side by side"
            )
        before = parent
    return tuple(shape)


def expansion_parents(widths: Sequence[int]) -> tuple[int, ...]:
    """The shape of an expansion."""
    parents: list[int] = []
    level = range(-1, 0)
    for width in widths:
        begin = len(parents)
        parents += [parent for parent in level for _ in range(width)]
        level = range(begin, len(parents))
    return tuple(parents)


@lru_cache(maxsize=1024)
def child_counts(shape: tuple[int, ...]) -> Levels:
    """Per level that has children how many each of its nodes has; the level of the root first."""
    counts = [0] * (len(shape) + 1)
    for parent in shape:
        counts[parent + 1] += 1
    levels: list[tuple[int, ...]] = []
    begin, size = 0, 1
    while shape and sum(counts[begin : begin + size]):
        levels.append(tuple(counts[begin : begin + size]))
        begin, size = begin + size, sum(levels[-1])
    return tuple(levels)


@lru_cache(maxsize=1024)
def cut(shape: tuple[int, ...], nodes: int, siblings: int) -> tuple[int, ...]:
    """The shape without children beyond the first `siblings` of their parent and what is below
    them, then without the last levels, so that at most this many nodes are left."""
    place: dict[int, int] = {-1: -1}
    kept: list[int] = []
    ranks: dict[int, int] = {}
    for node, parent in enumerate(shape):
        ranks[parent] = ranks.get(parent, 0) + 1
        if parent in place and ranks[parent] <= siblings:
            place[node] = len(kept)
            kept.append(place[parent])
    sizes = accumulate(sum(level) for level in child_counts(tuple(kept)))
    return tuple(kept[: max((size for size in sizes if size <= nodes), default=0)])


@lru_cache(maxsize=1024)
def within_depth(shape: tuple[int, ...], depth: int) -> int:
    """How many nodes are at most this deep."""
    return sum(sum(level) for level in child_counts(shape)[: max(0, depth)])


@lru_cache(maxsize=1024)
def rows_per_level(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows of each pass of a model that drafts the shape, one level per pass.

    A pass computes the nodes with children on the level above, and again those above them, since a
    row sees everything in the cache; but not the first ones that are on one line with all others.
    """
    expanded_nodes = [sum(count > 0 for count in level) for level in child_counts(shape)]
    rows: list[int] = []
    computed = line = 0
    for level, count in enumerate(expanded_nodes):
        if level >= 2 and line == level - 2 and expanded_nodes[level - 1] == 1:
            line += 1
        computed += count if level else 0
        rows.append(computed - line if level else 1)
    return tuple(rows)
