"""The verification part of the GPU benchmark, without a GPU: cases, floors, right and wrong."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from specdec import backend
from specdec.evals import gpu_verify
from specdec.evals.gpu_timing import WrongKernelError
from specdec.evals.gpu_verify import LAWS, SHAPES, Case, Inputs, cases, check, fused, unfused

CPU = torch.device("cpu")
RULES = backend.kernel_file("verify").RULES

pytestmark = pytest.mark.usefixtures("quick_interpreter")


def tiny(case: Case, sets: int = 2) -> list[Inputs]:
    return [
        gpu_verify.inputs(case, seed=seed, device=CPU, dtype=torch.float32) for seed in range(sets)
    ]


# --- cases


def test_every_rule_has_every_law_and_shape_but_greedy_has_one_law() -> None:
    found = cases()
    assert len(found) == len(set(found)) == (5 * len(LAWS) + 1) * len(SHAPES)
    assert {case.rule for case in found} == set(RULES)
    assert {case.law for case in found if case.rule == "greedy"} == {"plain"}
    assert {(case.batch, case.rows) for case in found} == set(SHAPES)


def test_bytes_that_a_rule_must_read() -> None:
    case = Case("walk", "plain", batch=2, rows=4, vocabulary=10)
    logits = 2 * 2 * 4 * 10
    assert case.logits_bytes == case.must_read(6, cache_bytes=0) == logits
    truncated = replace(case, law="top-p")
    assert truncated.must_read(6, cache_bytes=logits) == logits  # the second time from the cache
    assert truncated.must_read(6, cache_bytes=logits - 1) == 2 * logits
    for rule, laws in (("token", 0), ("block", 6), ("recursive", 6), ("gumbel", 0)):
        assert replace(case, rule=rule).must_read(6, 0) == logits + 4 * laws * 10


def test_input_sets_are_larger_than_the_cache() -> None:
    for case in cases():
        sets = gpu_verify.sets_for(case, 50 << 20)
        assert 2 <= sets <= 64
        assert sets * case.logits_bytes >= 2 * (50 << 20) or sets == 64


def test_chains_for_rules_that_judge_them_and_two_children_elsewhere() -> None:
    assert Case("block", "plain", 1, 4).parents == (-1, 0, 1)
    assert Case("recursive", "plain", 1, 8).parents == (-1, -1, 0, 0, 1, 1, 2)
    [problem] = tiny(Case("recursive", "plain", 2, 8, 50), sets=1)
    layout = problem.batch.layout
    assert [draw.law for draw in layout.draws] == [0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 6, 7]
    assert problem.q is not None
    assert problem.q.shape == (8, 50)
    siblings = problem.batch.tokens.view(2, 7)
    assert (siblings[:, 0:6:2] != siblings[:, 1:6:2]).all()


# --- right and wrong


@pytest.mark.parametrize("rule", RULES)
def test_the_kernels_are_right(rule: str) -> None:
    for law in LAWS if rule != "greedy" else ["plain"]:
        sets = tiny(Case(rule, law, batch=2, rows=5, vocabulary=30), sets=1)
        check(sets, [fused(problem) for problem in sets])


SPOILT: dict[str, Callable[[Any], Any]] = {
    "accepted": lambda found: replace(found, accepted=found.accepted + 1),
    "tokens": lambda found: replace(found, tokens=found.tokens.flip(1)),
    "path": lambda found: replace(found, path=found.path + 1),
    "valid": lambda found: replace(found, valid=~found.valid),
}


@pytest.mark.parametrize("field", SPOILT)
def test_a_wrong_decision_is_caught(field: str) -> None:
    sets = tiny(Case("walk", "plain", 2, 5, 50))
    calls = [lambda p=p: SPOILT[field](unfused(p)()) for p in sets]
    with pytest.raises(WrongKernelError, match="is wrong at batch 2, 5 rows: 4 of 4"):
        check(sets, calls)


def test_one_sequence_in_64_may_differ_and_no_more() -> None:
    sets = tiny(Case("walk", "plain", 32, 2, 20), sets=2)

    def spoilt(problem: Inputs, count: int) -> Callable[[], Any]:
        found = unfused(problem)()
        accepted: Tensor = found.accepted.clone()
        accepted[:count] += 1
        return lambda: replace(found, accepted=accepted)

    check(sets, [spoilt(sets[0], 1), spoilt(sets[1], 0)])
    with pytest.raises(WrongKernelError, match="2 of 64 sequences differ"):
        check(sets, [spoilt(sets[0], 1), spoilt(sets[1], 1)])


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_verify, "fused", lambda p: lambda: SPOILT["accepted"](unfused(p)()))

    def timer(calls: Sequence[Callable[[], Any]]) -> list[float]:
        raise AssertionError(f"{len(calls)} calls timed")

    with pytest.raises(WrongKernelError):
        measured(Case("walk", "plain", 1, 3, 20), timer)


# --- what is measured


def measured(case: Case, timer: Any, **options: Any) -> dict[str, Any]:
    return gpu_verify.verification(
        case, timer, CPU, torch.float32, cache_bytes=1, bandwidth=1e9, **options
    )


MOST = {"block": 6}  # else 4


@pytest.mark.parametrize("rule", RULES)
def test_a_row_has_times_launches_and_the_floor(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    run = interpreter.InterpretedFunction.run

    def counted(function: Any, *args: Any, **options: Any) -> Any:
        launches.append(function.fn.__name__)
        return run(function, *args, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", counted)

    def count(call: Callable[[], Any]) -> int:
        launches.clear()
        call()
        return len(launches)

    def timer(calls: Sequence[Callable[[], Any]]) -> list[float]:
        for call in calls:
            call()
        return [3.0, 1.0, 2.0]

    case = Case(rule, "plain" if rule == "greedy" else "top-k, top-p", 1, 3, 20)
    row = measured(case, timer, count=count)
    ours = row["contenders"]["specdec"]
    assert ours["median_us"] == 2.0
    assert 2 <= ours["launches"] <= MOST.get(rule, 4)
    assert row["contenders"]["unfused, float32 probabilities"]["of_ours"] == 1.0
    assert row["sets"] == 2
    laws = 2 if rule in ("token", "block") else 1
    assert row["must_bytes"] == case.must_read(laws, 1)
    assert row["floor_us"] == round(row["must_bytes"] / 1e3, 3)
    assert row["over_floor"] == round(2.0 / (row["must_bytes"] / 1e3), 3)
