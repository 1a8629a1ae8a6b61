"""The two-sample test: its cells, its p-values under and off the null, its sample sizes."""

import itertools
from collections import Counter

import numpy as np
import pytest

from specdec.errors import InvalidArgumentError
from specdec.evals.two_sample import (
    LEAST,
    Counts,
    cell_of,
    g_test,
    noncentrality,
    partition,
    sample_size,
)

TEXTS = list(itertools.product(range(3), repeat=3))


def drawn(law: np.ndarray, size: int, rng: np.random.Generator) -> Counter[tuple[int, ...]]:
    counts = rng.multinomial(size, law).tolist()
    return Counter({text: n for text, n in zip(TEXTS, counts, strict=True) if n})


def some_law(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(len(TEXTS), 0.7))


# --- cells


def test_cells_are_the_heaviest_beginnings() -> None:
    counts: Counts = {(0, 0): 500, (0, 1): 300, (1, 0): 100, (1, 1): 60, (2, 0): 40}
    assert partition(counts, 1) == {(): 0}
    assert partition(counts, 2) == {(): 0, (0,): 1}
    assert partition(counts, 3) == {(): 0, (0,): 1, (0, 0): 2}
    # what (0, 0) left of (0,) all begins with (0, 1)
    found = partition(counts, 4)
    assert found == {(): 0, (0, 0): 1, (0, 1): 2, (1,): 3}
    assert [cell_of(text, found) for text in counts] == [1, 2, 3, 3, 0]


def test_cells_hold_enough_texts_and_every_text_has_one() -> None:
    counts = drawn(some_law(), 2000, np.random.default_rng(1))
    found = partition(counts, 16)
    masses: Counter[int] = Counter()
    for text, n in counts.items():
        masses[cell_of(text, found)] += n
    assert len(masses) <= 16
    assert min(masses.values()) >= LEAST
    assert sum(masses.values()) == 2000


def test_texts_that_begin_alike_are_told_apart_further_on() -> None:
    """A model that is certain of its first tokens leaves cells for the later ones."""
    counts: Counts = {(7, 7, 7, 0): 600, (7, 7, 7, 1): 300, (7, 7, 7, 2): 100}
    found = partition(counts, 3)
    assert len({cell_of(text, found) for text in counts}) == 3


def test_rare_texts_are_dealt_out_by_frequency() -> None:
    """A flat law has no frequent beginning; its test must not end with one cell."""
    counts: Counts = {(token, 0): 1 + (token < 50) for token in range(250)}
    found = partition(counts, 6)
    masses: Counter[int] = Counter()
    for text, n in counts.items():
        masses[cell_of(text, found)] += n
    assert sorted(masses) == list(range(6))
    assert min(masses.values()) >= LEAST
    assert max(masses.values()) <= 2 * min(masses.values())
    assert cell_of((0, 0), found) != cell_of((249, 0), found)
    assert cell_of((999, 3), found) == found[()]


def test_one_text_makes_one_cell() -> None:
    answer = g_test([({(1, 2): 50}, {(1, 2): 70})], cells=8)
    assert (answer.p_value, answer.cells, answer.degrees) == (1.0, 1, 0)
    assert answer.sizes == (50, 70)


# --- p-values


def test_false_alarms_are_at_the_level() -> None:
    """400 pairs of samples of one law: uniform p-values, by the binomial law within 4 deviations;
    strata and unequal sizes too."""
    rng, law, other = np.random.default_rng(5), some_law(), some_law(1)
    p_values = [
        g_test(
            [(drawn(law, 600, rng), drawn(law, 900, rng)),
             (drawn(other, 300, rng), drawn(other, 300, rng))],
            cells=10, seed=i, permutations=199,
        ).p_value
        for i in range(400)
    ]  # fmt: skip
    for level in (0.05, 0.2, 0.5):
        alarms = sum(p <= level for p in p_values)
        assert abs(alarms - 400 * level) < 4 * (400 * level * (1 - level)) ** 0.5


def test_difference_of_the_asked_size_is_seen_with_the_asked_power() -> None:
    """The hardest difference: every cell a fixed share up or down."""
    rng, distance = np.random.default_rng(2), 0.04
    law = np.full(len(TEXTS) - 1, 1 / (len(TEXTS) - 1))
    p = np.append(law, 0.0)
    sign = np.append(np.resize([1.0, -1.0], len(law)), 0.0)
    q = p * (1 + 2 * distance * sign)
    assert abs(q - p).sum() / 2 == pytest.approx(distance)
    size = sample_size(distance, 0.9, 0.01, len(law) - 1)
    seen = sum(
        g_test([(drawn(p, size, rng), drawn(q, size, rng))], cells=27, seed=i, permutations=499)
        .p_value
        <= 0.01
        for i in range(100)
    )  # fmt: skip
    assert 80 <= seen <= 99  # 90 expected, 3 deviations are 9


def test_bias_in_one_stratum_of_two_is_seen() -> None:
    rng, law = np.random.default_rng(3), some_law()
    same = drawn(law, 5000, rng), drawn(law, 5000, rng)
    other = drawn(law, 5000, rng), drawn(some_law(4), 5000, rng)
    assert g_test([same], cells=9).p_value > 0.01
    answer = g_test([same, other], cells=9)
    assert answer.p_value == 1 / 10_000
    assert answer.total_variation > 5 * answer.noise


def test_empty_sample_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="a sample is empty"):
        g_test([({}, {(1,): 3})], cells=4)


# --- sizes


def test_noncentrality_of_one_degree_is_the_normal_law_s() -> None:
    """(z at 0.995 + z at 0.9) squared; the other tail's share is below 1e-6."""
    assert noncentrality(0.9, 0.01, 1) == pytest.approx((2.575829 + 1.281552) ** 2, abs=1e-3)


@pytest.mark.parametrize("degrees", [2, 9, 28])
def test_noncentrality_gives_the_power(degrees: int) -> None:
    rng = np.random.default_rng(degrees)
    critical = np.quantile(rng.chisquare(degrees, 200_000), 0.95)
    drawn = rng.noncentral_chisquare(degrees, noncentrality(0.8, 0.05, degrees), 200_000)
    assert (drawn > critical).mean() == pytest.approx(0.8, abs=0.01)


def test_half_the_distance_takes_four_times_the_texts() -> None:
    assert sample_size(0.01, 0.9, 0.01, 7) == pytest.approx(
        4 * sample_size(0.02, 0.9, 0.01, 7), abs=4
    )
    assert sample_size(0.01, 0.9, 0.01, 7) > sample_size(0.01, 0.8, 0.01, 7)


@pytest.mark.parametrize(
    ("distance", "power", "level", "message"),
    [
        (0.0, 0.9, 0.01, "total_variation=0.0: expected above 0"),
        (0.1, 1.0, 0.01, "power=1.0"),
        (0.1, 0.9, 1.5, "level=1.5"),
        (0.1, 0.01, 0.05, "power=0.01: expected above the level"),
    ],
)
def test_sizes_out_of_range(distance: float, power: float, level: float, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        sample_size(distance, power, level, 3)
