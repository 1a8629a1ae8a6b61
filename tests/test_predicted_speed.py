"""Predictions beside measurements: what is predicted, what is timed, and how they are compared."""

from functools import partial
from typing import Any

import pytest

from specdec import Engine, SamplingParams
from specdec.evals.acceptance import seconds_per_token
from specdec.evals.predicted_speed import BAR, LENGTHS, TREES, Prediction, race, rows, settings

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)
PROMPT = [0, 45, 67, 45, 67]


def test_settings_are_the_lengths_and_trees(draft: Model) -> None:
    made = settings(draft)
    assert next(iter(made)) == "plain"
    assert len(made) == 1 + len(LENGTHS) + len(TREES) == 12


def test_prediction_and_measurement(target: Model, draft: Model) -> None:
    made = {name: settings(draft)[name] for name in ("plain", "draft 2", "tree 2,1")}
    makes = {name: partial(Engine, target, grow=True, **how) for name, how in made.items()}
    predictions = {
        name: Prediction(makes[name], [PROMPT], GREEDY) for name in ("draft 2", "tree 2,1")
    }

    def before() -> None:
        for each in predictions.values():
            each.measure_costs()

    seconds = race(makes, [PROMPT, [0, 7]], GREEDY, rounds=2, before=before)
    assert list(seconds) == list(made)
    assert all([len(times) for times in its] == [2, 2] for its in seconds.values())
    found = rows({name: each.outcome() for name, each in predictions.items()}, seconds)
    assert [row["setting"] for row in found] == ["draft 2", "tree 2,1"]
    for row in found:
        assert row["predicted"] > 0
        assert len(row["predictions"]) == 2
        assert 1 <= row["tokens_per_target_pass"] <= 3


def test_rows_compare_with_the_bar() -> None:
    its: dict[str, Any] = {"predictions": [2.1]}
    its |= {"predicted_speed": 2.1, "tokens_per_target_pass": 3.0, "cost_ratio": 0.1}
    seconds = {"plain": [[4.0, 4.0, 9.0]], "near": [[2.0]], "far": [[2.5]]}
    near, far = rows({"near": its, "far": its}, seconds)
    assert (near["measured"], near["within_bar"]) == (2.0, True)
    assert near["off_by"] == pytest.approx(0.05)
    assert not far["within_bar"]
    assert far["off_by"] > BAR


def test_time_of_the_prompt_is_left_out(target: Model) -> None:
    engine = Engine(target, grow=True)
    assert seconds_per_token(engine, PROMPT, GREEDY, 0) > 0
    one = SamplingParams(max_new_tokens=1, temperature=0.0)
    assert seconds_per_token(engine, PROMPT, one, 0) > 0
    assert not engine.scheduler.running
    assert engine.take_finished() == []
