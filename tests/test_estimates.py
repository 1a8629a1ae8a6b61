"""Rates over clusters: their errors and intervals."""

from math import inf, isnan

import numpy as np
import pytest

from specdec.errors import InvalidArgumentError
from specdec.evals.estimates import Estimate, ratio, student_quantile


def test_ratio_of_sums() -> None:
    found = ratio([1, 2, 0], [4, 4, 0])
    assert found is not None
    assert (found.value, found.clusters) == (3 / 8, 2)
    # residuals -0.5 and 0.5: sqrt(2 * 0.5) / 8
    assert found.error == pytest.approx(0.125)
    assert found.as_dict()["standard_error"] == 0.125


def test_one_cluster_has_no_error() -> None:
    found = ratio([1.0], [4.0])
    assert found is not None
    assert isnan(found.error)
    assert found.interval() == (-inf, inf)
    assert found.as_dict() == {
        "value": 0.25, "standard_error": None, "interval": None, "clusters": 1,
    }  # fmt: skip


def test_nothing_counted() -> None:
    assert ratio([], []) is None
    assert ratio([0, 0], [0, 0]) is None


def test_intervals_cover_where_tokens_of_a_text_hang_together() -> None:
    """Texts of unequal length with a rate of their own each: taken token by token the interval
    would cover less than 60 %; 95 % of 1000 within 4 deviations."""
    rng = np.random.default_rng(0)
    covered = alone = 0
    for _ in range(1000):
        sizes = rng.integers(5, 60, 20)
        rates = rng.beta(2, 2, 20)  # on average 1/2, whatever the size
        hits = rng.binomial(sizes, rates)
        found = ratio(hits.tolist(), sizes.tolist())
        assert found is not None
        low, high = found.interval()
        covered += low <= 0.5 <= high
        naive = 1.96 * (found.value * (1 - found.value) / sizes.sum()) ** 0.5
        alone += abs(found.value - 0.5) <= naive
    assert 922 <= covered <= 978
    assert alone < 600


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    # tables of Student's law
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 5, 2.571), (0.975, 19, 2.093),
     (0.95, 10, 1.812), (0.975, 1000, 1.962), (0.5, 7, 0.0)],
)  # fmt: skip
def test_student_quantiles_are_the_tables(
    probability: float, degrees: int, expected: float
) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(expected, rel=2e-3, abs=1e-9)
    assert student_quantile(1 - probability, degrees) == pytest.approx(
        -expected, rel=2e-3, abs=1e-9
    )


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_quantiles_out_of_range(probability: float, degrees: int) -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected inside 0\.\.1"):
        student_quantile(probability, degrees)


def test_interval_is_symmetric() -> None:
    low, high = Estimate(0.4, 0.1, 20).interval()
    assert (low + high) / 2 == pytest.approx(0.4)
    assert high - low == pytest.approx(2 * 2.093 * 0.1, rel=1e-3)


def test_interval_stays_inside_its_bounds() -> None:
    """Wilson's: 9 of 10 independent tries, by the tables of the normal law's 1.96."""
    found = ratio([1.0] * 900 + [0.0] * 100, [1.0] * 1000, (0, 1))
    assert found is not None
    assert found.interval() == pytest.approx((0.8798, 0.9171), abs=2e-4)
    low, high = Estimate(0.99, 0.02, 12, (0, 1), 50).interval()
    assert 0 < low < 0.95
    assert 0.99 < high < 1
    twice = Estimate(1 + 2 * 0.99, 0.04, 12, (1, 3), 50).interval()
    assert twice == pytest.approx((1 + 2 * low, 1 + 2 * high))


def test_nothing_but_hits_leaves_room_for_a_miss() -> None:
    found = ratio([4.0, 6.0, 5.0], [4.0, 6.0, 5.0], (0, 1))
    assert found is not None
    low, high = found.interval()
    assert high == pytest.approx(1)
    assert 0.3 < low < 0.7
    exact = ratio([0.5, 0.5], [1.0, 1.0], (0, 1))
    assert exact is not None
    assert exact.interval() == (0.5, 0.5)
    assert Estimate(0.5, float("nan"), 1, (0, 1), 9).interval() == (0, 1)


def test_rare_misses_are_covered() -> None:
    """2 % misses among 120 tries in 24 texts: the simple interval covers less."""
    rng = np.random.default_rng(1)
    covered = simple = 0
    for _ in range(1000):
        hits = rng.binomial(5, 0.98, 24)
        found = ratio(hits.tolist(), [5] * 24, (0, 1))
        plain = ratio(hits.tolist(), [5] * 24)
        assert found is not None
        assert plain is not None
        low, high = found.interval()
        covered += low <= 0.98 <= high
        low, high = plain.interval()
        simple += low <= 0.98 <= high
    assert 920 <= covered <= 980
    assert simple < covered
