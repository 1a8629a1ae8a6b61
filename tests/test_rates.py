"""Running rates: what is seen counts beside what is guessed."""

import pytest

from specdec.rates import Rates

GUESS = [0.5] * 4


def test_nothing_seen_is_the_guess() -> None:
    rates = Rates(4)
    assert rates.ratio(2.0) == 1.0
    assert rates.reach(GUESS, 1.0, 3, 12.0) == pytest.approx([0.5, 0.25, 0.125])
    assert rates.told(GUESS, 2.0, 12.0) == pytest.approx(GUESS)


def test_one_draft_counts_down_to_its_first_rejection() -> None:
    rates = Rates(4)
    rates.add(4, 1, GUESS)
    assert rates.tries == [0, 1, 1, 0, 0]
    assert rates.hits == [0, 1, 0, 0, 0]
    assert rates.ratio(2.0) == pytest.approx((1 + 2) / (1 + 2), abs=0.02)
    first, second = rates.reach(GUESS, 1.0, 2, 12.0)
    assert first == pytest.approx(7 / 13)
    assert second / first == pytest.approx(6 / 13)


def test_what_is_not_worth_a_thought_ends_the_reach() -> None:
    rates = Rates(4)
    for _ in range(100):
        rates.add(4, 0, GUESS)
    assert len(rates.reach(GUESS, 0.0, 4, 1.0)) == 1


def test_old_tries_lose_weight() -> None:
    rates = Rates(2)
    for hit in [1] * 200 + [0] * 200:
        rates.add(1, hit, GUESS)
    assert rates.hits[1] / rates.tries[1] < 0.02
    assert 30 < rates.tries[1] < 50
    for _ in range(400):
        rates.add(1, 1, GUESS)
    assert rates.ratio(2.0) == pytest.approx((40 + 2) / (20 + 2), abs=0.01)


def test_merged_rates_tell_the_next_sequence() -> None:
    common = Rates(2)
    for _ in range(40):
        own = Rates(2)
        for hit in (2, 2, 2, 0):
            own.add(2, hit, GUESS[:2])
        common.merge(own)
    first, second = common.told(GUESS[:2], 2.0, 12.0)
    assert first == pytest.approx(0.75, abs=0.02)
    assert second == pytest.approx(0.99, abs=0.02)
    assert max(common.tries) <= 160
