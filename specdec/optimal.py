"""The best static tree: by expected tokens for its size and depth, and by time on this machine
(Sequoia, Chen et al. 2024, 2402.12374, section 3.1 and 3.3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from specdec.errors import InvalidArgumentError
from specdec.shapes import MAX_NODES, rows_per_level

Acceptance = Sequence[float] | Sequence[Sequence[float]]  # by rank, or by depth and then by rank

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class TreeChoice:
    """A shape and what is expected of it."""

    shape: tuple[int, ...]  # parents, level by level; () drafts nothing
    tokens: float  # expected per target pass, with the one that the target adds
    seconds: float  # per step

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def expected_tokens(shape: Sequence[int], acceptance: Acceptance) -> float:
    """Tokens per target pass of a shape, the target's own included, when the k-th child of any
    node that was reached is the accepted one with probability acceptance[k - 1]; or, by depth, with
    acceptance[d - 1][k - 1] on level d, the last row standing for all deeper levels too."""
    rows = _rows(acceptance)
    reached, depths, ranks = [1.0], [0], [0] * (len(shape) + 1)
    for parent in shape:
        rank, row = ranks[parent + 1], rows[min(depths[parent + 1], len(rows) - 1)]
        ranks[parent + 1] += 1
        depths.append(depths[parent + 1] + 1)
        reached.append(reached[parent + 1] * (row[rank] if rank < len(row) else 0.0))
    return sum(reached)


def optimal_shape(acceptance: Acceptance, nodes: int, depth: int) -> tuple[int, ...]:
    """The shape of at most so many nodes and levels with the most expected_tokens, the smallest of
    equals. Raises InvalidArgumentError for numbers out of range."""
    table = _Table(acceptance, nodes, depth)
    return table.shape(max(range(1, nodes + 2), key=lambda size: (table.tokens(size), -size)))


def fastest_shape(
    acceptance: Acceptance,
    draft_seconds: Callable[[int], float],
    target_seconds: Callable[[int], float],
    *,
    nodes: int = MAX_NODES,
    depth: int = 16,
) -> TreeChoice:
    """The shape with the most expected tokens per second, over every size and depth.

    draft_seconds, target_seconds: measured time of one pass by its rows. Each size and depth is
    judged by the tree with the most expected tokens; drafting nothing is one of the choices. Raises
    InvalidArgumentError for numbers out of range.
    """
    _check(acceptance, nodes, depth)
    draft = [draft_seconds(rows) for rows in range(1, nodes + 2)]
    verify = [target_seconds(rows) for rows in range(1, nodes + 2)]
    if not all(isfinite(seconds) and seconds > 0 for seconds in (*draft, *verify)):
        raise InvalidArgumentError("draft_seconds, target_seconds: expected positive times")
    best = TreeChoice((), 1.0, verify[0])
    for levels in range(1, depth + 1):
        table = _Table(acceptance, nodes, levels)
        for size in range(2, nodes + 2):
            # no draft is quicker than one pass of one row per level
            tokens, least = table.tokens(size), draft[0] + verify[size - 1]
            if tokens / least <= best.tokens_per_second:
                continue
            shape = table.shape(size)
            seconds = sum(draft[rows - 1] for rows in rows_per_level(shape)) + verify[size - 1]
            if tokens / seconds > best.tokens_per_second:
                best = TreeChoice(shape, tokens, seconds)
    return best


class _Table:
    """c(n, d, b): the most expected tokens of a tree of exactly n nodes, its root counted, whose
    root is at depth d and has exactly b children, none of them below the last level.

    c(1, d, 0) = 1, and c(n, d, b) = max over m of c(m, d, b - 1) + p_b max_b' c(n - m, d + 1, b'):
    all but the last child, and a last child with n - m nodes. O(nodes^2 depth ranks).
    """

    def __init__(self, acceptance: Acceptance, nodes: int, depth: int) -> None:
        rows = _check(acceptance, nodes, depth)
        sizes = np.arange(nodes + 2)
        below = sizes[:, None] - sizes  # [n, m] -> n - m
        possible = below >= 1
        leaf = np.where(sizes == 1, 1.0, _NEVER)
        self._best = leaf  # by n; of the level that was done last
        self._degree: list[NDArray[np.int64]] = []  # per level, by n
        self._split: list[list[NDArray[np.int64]]] = []  # per level, per b, by n: m
        for level in reversed(range(depth)):
            under = np.where(possible, self._best[below * possible], _NEVER)
            reachable = np.isfinite(under)
            counts, splits = [leaf], list[NDArray[np.int64]]()
            for chance in rows[min(level, len(rows) - 1)][:nodes]:
                gain = np.where(reachable, chance * np.where(reachable, under, 0.0), _NEVER)
                both = counts[-1] + gain
                splits.append(both.argmax(1))
                counts.append(both.max(1))
            every = np.stack(counts)
            self._best = every.max(0)
            self._degree.insert(0, every.argmax(0))
            self._split.insert(0, splits)

    def tokens(self, size: int) -> float:
        """Of a tree of exactly size nodes, its root counted; -inf where there is none."""
        return float(self._best[size])

    def shape(self, size: int) -> tuple[int, ...]:
        """That tree, level by level."""
        parents: list[int] = []
        level = [(-1, size)]
        for degree, splits in zip(self._degree, self._split, strict=True):
            below: list[tuple[int, int]] = []
            for parent, its_size in level:
                for child_size in _children(its_size, degree, splits):
                    below.append((len(parents), child_size))
                    parents.append(parent)
            level = below
        return tuple(parents)


def _children(size: int, degree: NDArray[np.int64], splits: list[NDArray[np.int64]]) -> list[int]:
    """Sizes of the subtrees of a root of so many nodes, the first child first."""
    found: list[int] = []
    for rank in range(int(degree[size]), 0, -1):
        rest = int(splits[rank - 1][size])
        found.append(size - rest)
        size = rest
    return found[::-1]


def _rows(acceptance: Acceptance) -> list[list[float]]:
    """By depth, then by rank."""
    if acceptance and all(isinstance(row, Sequence) for row in acceptance):
        return [[float(chance) for chance in row] for row in acceptance]  # type: ignore[union-attr]
    return [[float(chance) for chance in acceptance]]  # type: ignore[arg-type]


def _check(acceptance: Acceptance, nodes: int, depth: int) -> list[list[float]]:
    rows = _rows(acceptance)
    if not rows[0] or not all(0 <= chance <= 1 for row in rows for chance in row):
        raise InvalidArgumentError(
            f"acceptance={acceptance!r}: expected a probability for every rank of a child"
        )
    if not 0 <= nodes <= MAX_NODES:
        raise InvalidArgumentError(f"nodes={nodes}: expected 0 to {MAX_NODES}")
    if depth < 1:
        raise InvalidArgumentError(f"depth={depth}: expected at least 1")
    return rows
