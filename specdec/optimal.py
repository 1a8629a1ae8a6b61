"""The best static tree: by expected tokens for its size and depth, and by time on this machine
(Sequoia, Chen et al. 2024, 2402.12374, section 3.1 and 3.3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from specdec.errors import InvalidArgumentError
from specdec.shapes import MAX_NODES, rows_per_level

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


def expected_tokens(shape: Sequence[int], acceptance: Sequence[float]) -> float:
    """Tokens per target pass of a shape, the target's own included, when the k-th child of any
    node that was reached is the accepted one with probability acceptance[k - 1]."""
    reached, ranks = [1.0], [0] * (len(shape) + 1)
    for parent in shape:
        rank = ranks[parent + 1]
        ranks[parent + 1] += 1
        chance = acceptance[rank] if rank < len(acceptance) else 0.0
        reached.append(reached[parent + 1] * chance)
    return sum(reached)


def optimal_shape(acceptance: Sequence[float], nodes: int, depth: int) -> tuple[int, ...]:
    """The shape of at most so many nodes and levels with the most expected tokens, the smallest of
    equals. Raises InvalidArgumentError for numbers out of range."""
    table = _Table(acceptance, nodes, depth)
    best = max(range(1, nodes + 2), key=lambda size: (table.tokens(size, depth), -size))
    return table.shape(best, depth)


def fastest_shape(
    acceptance: Sequence[float],
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
    table = _Table(acceptance, nodes, depth)
    draft = [draft_seconds(rows) for rows in range(1, nodes + 2)]
    verify = [target_seconds(rows) for rows in range(1, nodes + 2)]
    if not all(isfinite(seconds) and seconds > 0 for seconds in (*draft, *verify)):
        raise InvalidArgumentError("draft_seconds, target_seconds: expected positive times")
    best = TreeChoice((), 1.0, verify[0])
    for levels in range(1, depth + 1):
        for size in range(2, nodes + 2):
            # no draft is quicker than one pass of one row per level
            tokens, least = table.tokens(size, levels), draft[0] + verify[size - 1]
            if tokens / least <= best.tokens_per_second:
                continue
            shape = table.shape(size, levels)
            seconds = sum(draft[rows - 1] for rows in rows_per_level(shape)) + verify[size - 1]
            if tokens / seconds > best.tokens_per_second:
                best = TreeChoice(shape, tokens, seconds)
    return best


class _Table:
    """c(n, l, b): the most expected tokens of a tree of exactly n nodes, its root counted, on at
    most l levels, whose root has exactly b children.

    c(1, l, 0) = 1, and c(n, l, b) = max over m of c(m, l, b - 1) + p_b max_b' c(n - m, l - 1, b'):
    all but the last child, and a last child with n - m nodes. O(nodes^2 depth ranks).
    """

    def __init__(self, acceptance: Sequence[float], nodes: int, depth: int) -> None:
        p = _check(acceptance, nodes, depth)[:nodes]
        sizes = np.arange(nodes + 2)
        below = sizes[:, None] - sizes  # [n, m] -> n - m
        possible = below >= 1
        self._best = [np.full(nodes + 2, _NEVER)]  # per level, by n
        self._degree: list[NDArray[np.int64]] = [np.zeros(nodes + 2, np.int64)]
        self._split: list[list[NDArray[np.int64]]] = [[]]  # per level, per b, by n: m
        for _ in range(depth + 1):
            under = np.where(possible, self._best[-1][below * possible], _NEVER)
            reachable = np.isfinite(under)
            counts = [np.where(sizes == 1, 1.0, _NEVER)]
            splits: list[NDArray[np.int64]] = []
            for chance in p:
                gain = np.where(reachable, chance * np.where(reachable, under, 0.0), _NEVER)
                both = counts[-1] + gain
                splits.append(both.argmax(1))
                counts.append(both.max(1))
            every = np.stack(counts)
            self._best.append(every.max(0))
            self._degree.append(every.argmax(0))
            self._split.append(splits)

    def tokens(self, size: int, depth: int) -> float:
        """Of a tree of exactly size nodes, its root counted; -inf where there is none."""
        return float(self._best[depth + 1][size])

    def shape(self, size: int, depth: int) -> tuple[int, ...]:
        """That tree, level by level."""
        parents: list[int] = []
        level = [(-1, size)]
        for left in range(depth + 1, 0, -1):
            below: list[tuple[int, int]] = []
            for parent, its_size in level:
                for child_size in self._children(its_size, left):
                    below.append((len(parents), child_size))
                    parents.append(parent)
            level = below
        return tuple(parents)

    def _children(self, size: int, levels: int) -> list[int]:
        """Sizes of the root's subtrees, the first child first."""
        found: list[int] = []
        for rank in range(int(self._degree[levels][size]), 0, -1):
            rest = int(self._split[levels][rank - 1][size])
            found.append(size - rest)
            size = rest
        return found[::-1]


def _check(acceptance: Sequence[float], nodes: int, depth: int) -> list[float]:
    p = [float(chance) for chance in acceptance]
    if not p or not all(0 <= chance <= 1 for chance in p):
        raise InvalidArgumentError(
            f"acceptance={acceptance!r}: expected a probability for every rank of a child"
        )
    if not 0 <= nodes <= MAX_NODES:
        raise InvalidArgumentError(f"nodes={nodes}: expected 0 to {MAX_NODES}")
    if depth < 1:
        raise InvalidArgumentError(f"depth={depth}: expected at least 1")
    return p
