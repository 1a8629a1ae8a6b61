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
    low, high = Estimate(0.99, 0.02, 12, (0, 1), 12).interval()
    assert 0 < low < 0.95
    assert 0.99 < high < 1
    twice = Estimate(1 + 2 * 0.99, 0.04, 12, (1, 3), 12).interval()
    assert twice == pytest.approx((1 + 2 * low, 1 + 2 * high))


def test_tries_that_are_a_cluster_each_need_no_student() -> None:
    """Their error is sqrt(0.8 * 0.2 / 4), as of 4 tries: Wilson's interval of the normal 1.96. Many
    tries of as many clusters, and what is no share of tries, keep Student's 2.776."""
    single = ratio([1, 1, 1, 1, 0], [1] * 5, (0, 1))
    assert single is not None
    assert single.interval() == pytest.approx(wilson(0.8, 4, 1.960), abs=1e-3)
    many = ratio([400, 400, 400, 400, 300], [400] * 5, (0, 1))
    fractions = ratio([0.5, 0.5, 0.5, 0.5, 0.375], [0.5] * 5, (0, 1))
    for found in (many, fractions):
        assert found is not None
        tries = 0.95 * 0.05 / found.error**2
        assert found.interval() == pytest.approx(wilson(0.95, tries, 2.776), abs=3e-3)
    # 24 tries in 4 clusters: between the two, 1.960 * 3.182 / 2.069
    some = ratio([5, 5, 5, 3], [6] * 4, (0, 1))
    assert some is not None
    tries = 0.75 * 0.25 / some.error**2
    assert some.interval() == pytest.approx(wilson(0.75, tries, 3.015), abs=3e-3)


def wilson(share: float, tries: float, reach: float) -> tuple[float, float]:
    """The shares whose own error, reach times, holds `share`: Wilson's, found by trying all."""
    held = [
        p / 1e5 for p in range(1, 10**5)
        if abs(share - p / 1e5) <= reach * (p / 1e5 * (1 - p / 1e5) / tries) ** 0.5
    ]  # fmt: skip
    return held[0], held[-1]


def test_clusters_that_agree_leave_room_for_others() -> None:
    """Wilson's bound of 0 in 20: 2.093**2 / (20 + 2.093**2) = 0.18, whatever was counted in each;
    the others could be at either bound."""
    hits = ratio([4.0] * 20, [4.0] * 20, (0, 1))
    assert hits is not None
    assert hits.interval() == pytest.approx((1 - 0.1797, 1), abs=1e-4)
    thirds = ratio([0.1] * 20, [0.3] * 20, (0, 1))  # rounding makes their error more than 0
    assert thirds is not None
    assert thirds.interval() == pytest.approx((0.2734, 0.4531), abs=1e-3)
    unequal = ratio([40.0, 1.0, 1.0], [40.0, 1.0, 1.0], (0, 1))
    equal = ratio([4.0, 4.0, 4.0], [4.0, 4.0, 4.0], (0, 1))
    assert unequal is not None
    assert equal is not None
    assert unequal.interval()[0] < equal.interval()[0] - 0.05
    assert Estimate(0.5, float("nan"), 1, (0, 1)).interval() == (0, 1)


def test_clusters_that_agree_on_what_has_no_bounds_leave_it_unknown() -> None:
    found = ratio([2.0, 4.0], [1.0, 2.0])
    assert found is not None
    assert found.interval() == (-inf, inf)
    assert found.as_dict() == {
        "value": 2.0, "standard_error": 0.0, "interval": None, "clusters": 2,
    }  # fmt: skip


def test_error_that_bounds_do_not_explain_is_student_s() -> None:
    """Each cluster at a bound of its own: 0 to 1/2 and 0 to 1 are 0 to 3/4 in sum."""
    found = ratio([1.0, 2.0, 1.0, 2.0], [2.0] * 4, (0, 0.75))
    assert found is not None
    reach = student_quantile(0.975, 3) * found.error
    assert found.interval() == pytest.approx((0.75 - reach, 0.75 + reach))


def test_texts_that_mostly_agree_are_covered() -> None:
    """The case that had no width: 9 % of 20 texts need a fourth step for 8 tokens."""
    rng = np.random.default_rng(2)
    covered = 0
    for late in rng.binomial(1, 0.09, (1000, 20)):
        found = ratio([8.0] * 20, (3 + late).tolist(), (1, 8 / 3))
        assert found is not None
        low, high = found.interval()
        covered += low <= 8 / 3.09 <= high
    assert 920 <= covered <= 985


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
        simple += abs(plain.value - 0.98) <= 2.069 * plain.error
    assert 920 <= covered <= 980
    assert simple < covered
