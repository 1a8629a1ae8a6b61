"""Are two samples of short texts of one law? A G-test over pooled cells, its p-value by
permutation, and the sample size that a power asks for.

A cell is a beginning of a text, or several of about the same frequency: all texts that go on from
it, apart from those that have a cell of their own. The cells are chosen from both samples together,
so that under the null hypothesis any relabelling of the samples is as likely: the permutation
p-value is exact whatever the cells.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, lgamma, log

import numpy as np
import torch
from numpy.typing import NDArray

from specdec.errors import InvalidArgumentError

Text = tuple[int, ...]
Counts = Mapping[Text, int]

LEAST = 20  # texts of both samples in a cell, where there is a choice
PERMUTATIONS = 9999


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one test; total_variation is between the cells of the samples, sampling noise included."""

    statistic: float
    p_value: float
    cells: int
    degrees: int
    total_variation: float
    noise: float  # what total_variation would be on average if the laws were one
    sizes: tuple[int, int]


def g_test(
    strata: Sequence[tuple[Counts, Counts]], *, cells: int, seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> Answer:  # fmt: skip
    """strata: pairs of samples, one pair per prompt; cells: of each at most.

    G is summed over the strata; each is permuted by itself. total_variation is that of the law of
    (stratum, cell). Raises InvalidArgumentError for an empty sample.
    """
    tables = [_table(pair, cells) for pair in strata]
    statistic = float(sum(_g(table[None, 0], table.sum(0))[0] for table in tables))
    rng = np.random.default_rng(seed)
    drawn, distances = np.zeros(permutations), np.zeros(permutations)
    total = sum(int(table.sum()) for table in tables)
    for table in tables:
        whole, first = table.sum(0), int(table[0].sum())
        ours = rng.multivariate_hypergeometric(whole, first, permutations, method="marginals")
        drawn += _g(ours, whole)
        distances += _distance(ours, whole) * (table.sum() / total)
    # a hair's breadth, so that the same table summed in another order counts as equal
    above = int((drawn >= statistic - 1e-9 * max(1.0, statistic)).sum())
    variation = sum(
        float(_distance(table[None, 0], table.sum(0))[0]) * int(table.sum()) / total
        for table in tables
    )
    return Answer(
        statistic, (1 + above) / (1 + permutations), sum(table.shape[1] for table in tables),
        sum(table.shape[1] - 1 for table in tables), variation, float(distances.mean()),
        (sum(int(t[0].sum()) for t in tables), sum(int(t[1].sum()) for t in tables)),
    )  # fmt: skip


def partition(counts: Counts, cells: int) -> dict[Text, int]:
    """Beginnings -> cells, at most so many; the longest beginning of a text says its cell.

    From one cell, (), the beginning with most texts that can go on is cut out of the cell it is in,
    again and again, where both it and what it leaves are LEAST or more. If no single beginning is
    frequent enough any more, the next tokens of what is left are dealt out to the cells that
    remain, the frequent ones first.
    """
    masses: Counter[Text] = Counter()
    for text, count in counts.items():
        for length in range(1, len(text) + 1):
            masses[text[:length]] += count
    left: dict[Text, int] = {(): sum(counts.values())}
    for beginning, mass in sorted(masses.items(), key=lambda item: (-item[1], item[0])):
        if len(left) >= cells or mass < LEAST:
            break
        # heavier beginnings are cut out first, and a beginning is no heavier than its own
        parent = next(b for n in range(len(beginning) - 1, -1, -1) if (b := beginning[:n]) in left)
        if left[parent] - mass >= LEAST:
            left[beginning] = mass
            left[parent] -= mass
        elif left[parent] == mass:  # nothing is left beside it: the cell goes on with a longer name
            del left[parent]
            left[beginning] = mass
    found = {name: cell for cell, name in enumerate(sorted(left))}
    return _dealt(counts, found, left, cells)


def _dealt(
    counts: Counts, found: dict[Text, int], left: dict[Text, int], cells: int
) -> dict[Text, int]:
    """found, with what is left of heavy cells in groups of next tokens."""
    total, used = sum(left.values()), len(left)
    further: dict[Text, Counter[Text]] = {name: Counter() for name in left}
    for text, count in counts.items():
        cell = _beginning(text, found)
        if len(text) > len(cell):
            further[cell][text[: len(cell) + 1]] += count
    for name, mass in sorted(left.items(), key=lambda item: (-item[1], item[0])):
        groups = min(cells - used + 1, round(mass / total * cells), mass // LEAST)
        if groups < 2:
            continue
        filled, group = 0, 0
        for beginning, count in sorted(further[name].items(), key=lambda i: (-i[1], i[0])):
            if filled >= (group + 1) * mass / groups and group + 1 < groups:
                group += 1
                used += 1
            found.setdefault(beginning, found[name] if group == 0 else used - 1)
            filled += count
    return found


def cell_of(text: Text, cells: Mapping[Text, int]) -> int:
    """The cell of a text's longest beginning."""
    return cells[_beginning(text, cells)]


def _beginning(text: Text, cells: Mapping[Text, int]) -> Text:
    return next(b for n in range(len(text), -1, -1) if (b := text[:n]) in cells)


def _table(pair: tuple[Counts, Counts], cells: int) -> NDArray[np.int64]:
    """(2, cells) counts."""
    both: Counter[Text] = Counter()
    for counts in pair:
        if not sum(counts.values()):
            raise InvalidArgumentError("counts: a sample is empty")
        both.update(counts)
    chosen = partition(both, cells)
    table = np.zeros((2, max(chosen.values()) + 1), np.int64)
    for row, counts in enumerate(pair):
        for text, count in counts.items():
            table[row, cell_of(text, chosen)] += count
    kept: NDArray[np.int64] = table[:, table.sum(0) > 0]
    return kept


def _g(ours: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """G of each row (R, K) of the first sample's counts; whole (K,) those of both together."""
    share = ours.sum(-1, keepdims=True) / whole.sum()
    total = np.zeros(ours.shape[0])
    for counts, part in ((ours, share), (whole - ours, 1 - share)):
        expected = whole * part
        ratio = np.where(counts > 0, counts / expected, 1.0)
        total += 2 * (counts * np.log(ratio)).sum(-1)
    return total


def _distance(ours: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """Total variation between the two samples' shares, by row."""
    others = whole - ours
    shares = ours / ours.sum(-1, keepdims=True) - others / others.sum(-1, keepdims=True)
    distance: NDArray[np.float64] = np.abs(shares).sum(-1) / 2
    return distance


# how many samples


def sample_size(total_variation: float, power: float, level: float, degrees: int) -> int:
    """Texts of each of two samples so that a test at this level sees cell laws that far apart with
    this power, however the difference lies.

    With n each, G is about noncentral chi-square with n/2 sum (p - q)^2 / m, m = (p + q)/2; that is
    at least 2 n TV^2 (Cauchy-Schwarz; equal where |p - q| is a fixed share of m).
    """
    for name, value in (
        ("total_variation", total_variation), ("power", power), ("level", level),
    ):  # fmt: skip
        if not 0 < value < 1:
            raise InvalidArgumentError(f"{name}={value}: expected above 0 and below 1")
    if power <= level:
        raise InvalidArgumentError(f"power={power}: expected above the level, {level}")
    return ceil(noncentrality(power, level, degrees) / (2 * total_variation**2))


@lru_cache(maxsize=64)
def noncentrality(power: float, level: float, degrees: int) -> float:
    """With it a chi-square test of so many degrees of freedom has this power at this level."""
    critical = _root(lambda x: 1 - _chi_square(x, degrees) - level, 1e4)
    return _root(lambda x: _power_gap(x, critical, degrees, power), 1e4)


def _power_gap(shift: float, critical: float, degrees: int, power: float) -> float:
    """power less that of this noncentrality: a Poisson mixture of central laws."""
    half, below, n = shift / 2, 0.0, 0
    while n < half or n < half + 12 * half**0.5 + 40:
        weight = exp(n * log(half) - half - lgamma(n + 1)) if half > 0 else float(n == 0)
        if weight > 1e-14:
            below += weight * _chi_square(critical, degrees + 2 * n)
        n += 1
    return power - (1 - below)


def _chi_square(x: float, degrees: int) -> float:
    """Its distribution function."""
    a = torch.tensor([degrees / 2, x / 2], dtype=torch.float64)
    return float(torch.special.gammainc(a[0], a[1]))


def _root(falling: Callable[[float], float], high: float) -> float:
    """Where it changes its sign below high."""
    low = 0.0
    for _ in range(80):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return high
