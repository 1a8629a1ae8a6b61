"""What is counted of a run: acceptance by rank of the draws below a node."""

from typing import Any

import pytest

from specdec import Engine, SamplingParams, StepRecord
from specdec.optimal import expected_tokens
from specdec.shapes import expansion_parents
from specdec.stats import RunStats
from specdec.toy import TableRunner

pytestmark = pytest.mark.usefixtures("one_thread")


def record(ranks: tuple[tuple[int, int], ...]) -> StepRecord:
    return StepRecord("r", 0, (1,), 3, 1, None, ranks)


def test_acceptance_by_rank_counts_the_nodes_that_had_such_a_draw() -> None:
    stats = RunStats()
    assert stats.acceptance_by_rank() == []
    stats.add(record(((3, 1), (1, 0))))
    stats.add(record(((3, 3), (1, 1))))
    stats.add(record(((2, 0),)))
    stats.add(record(()))  # nothing was drafted
    assert stats.acceptance_by_rank() == [2 / 5, 0.0, 1 / 2]
    assert stats.acceptance_by_rank(depth=1) == [1 / 3, 0.0, 1 / 2]
    assert stats.acceptance_by_rank(depth=2) == [1 / 2]
    assert stats.acceptance_by_rank(depth=3) == []
    assert stats.as_dict()["acceptance_by_rank"] == [0.4, 0.0, 0.5]


P = (0.6, 0.25, 0.1, 0.05)


@pytest.mark.parametrize("kind", ["top_k", "coupled"])
def test_ranks_of_tables_predict_tokens_per_pass(kind: str) -> None:
    """The draft is the target, whose law is the same everywhere: below any node the k-th best token
    is the one with probability P[k - 1], and the first one under shared noise. 600 steps: 0.05 is
    two and a half standard errors of a rate of a half."""
    runner, draft = (TableRunner(lambda _: P, 4) for _ in range(2))
    shape = expansion_parents((3, 2))
    engine = Engine(
        runner, draft=draft, proposer="tree", proposer_options={"shape": shape, "kind": kind},
        kv_memory=1 << 22, policy="constant",
    )  # fmt: skip
    engine.add_request([0], SamplingParams(max_new_tokens=80), n=25, seed=1)
    found: list[StepRecord] = []
    while records := engine.step():
        found += [step for step in records if step.drafted == len(shape)]
    rates = engine.stats.acceptance_by_rank()
    assert rates == pytest.approx([1.0, 0.0, 0.0] if kind == "coupled" else P[:3], abs=0.05)
    measured = sum(1 + step.accepted for step in found) / len(found)
    assert expected_tokens(shape, rates) == pytest.approx(measured, rel=0.05)
    assert len(found) > 600


@pytest.mark.parametrize("params", [SamplingParams(30), SamplingParams(30, 0)], ids=["1", "0"])
@pytest.mark.parametrize("name", ["draft", "tree", "dynamic_tree", "beam_tree"])
def test_ranks_of_every_step_lead_along_the_accepted_path(
    target: Any, draft: Any, name: str, params: SamplingParams
) -> None:
    options: dict[str, Any] = {"tree": (2, 2, 1)} if name == "tree" else {}
    engine = Engine(
        target, draft=draft, proposer=name, proposer_options=options, kv_memory=1 << 20,
        policy="constant",
    )  # fmt: skip
    engine.add_request([0, 5, 7], params, seed=2)
    while records := engine.step():
        for step in records:
            taken = [rank for _, rank in step.ranks]
            assert len([rank for rank in taken if rank]) == step.accepted
            assert 0 not in taken[:-1]
            assert all(rank <= offered for offered, rank in step.ranks)
    assert engine.stats.acceptance_by_rank()[0] > 0
