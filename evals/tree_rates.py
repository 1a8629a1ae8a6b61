"""Acceptance by depth and rank of a child, measured twice, for the best tree there is.

A wide tree shows many ranks, but what is reached below its side branches is accepted less often
than what follows the draft's first choices. So the best tree for its rates measures them again,
where it has nodes.
"""

from collections.abc import Sequence

from specdec.optimal import optimal_shape
from specdec.stats import RunStats

LEVELS = 12  # at most
RANKS = 8  # at most
DEPTHS = range(1, 6)  # that ranks are measured at; the last stands for those below
# Ranks are measured on the best tree for a guess: many ranks at the root, long lines below.
PROBE = optimal_shape([0.6, 0.14, 0.07, 0.05, 0.04, 0.03, 0.02, 0.02], 40, LEVELS)


def by_depth_and_rank(stats: RunStats) -> list[list[float]]:
    """What a run of PROBE saw."""
    return [stats.acceptance_by_rank(depth)[:RANKS] for depth in DEPTHS]


def refined(rough: Sequence[Sequence[float]], stats: RunStats) -> list[list[float]]:
    """The same, from a second tree where it has nodes."""
    found = []
    for row, seen in zip(rough, by_depth_and_rank(stats), strict=True):
        found.append([*seen, *row[len(seen) :]])
    return found
