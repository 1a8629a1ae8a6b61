"""What the estimators are held to: expected counts of texts on tables, against the engine's own."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from specdec.evals import estimators
from specdec.evals.estimators import TREES, Case, Followed, coverage, estimates, looked_up, truth

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = [
    *(Case(shape, rule, tokens=8, texts=60) for shape, rule in TREES),
    Followed("draft", 0, 2, tokens=8, texts=60), Followed("lookup", 0, 4, tokens=8, texts=60),
    Followed("lookup", 1, 1, tokens=6, texts=60),
]  # fmt: skip


def test_truth_of_a_step_by_hand() -> None:
    """One drafted token, two tokens of text: a step that accepts it, or two steps."""
    case = Case((1,), "token", tokens=2)
    p, q = case.laws.target[0], case.laws.drafts[0][0]
    overlap = sum(map(min, p, q))
    wanted = truth(case)
    assert wanted["acceptance_by_position 1"] == pytest.approx(overlap)
    assert wanted["overlap"] == pytest.approx(overlap)
    assert wanted["tokens_per_target_pass"] == pytest.approx(2 / (2 - overlap))


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_intervals_hold_the_truth(case: Case | Followed) -> None:
    """One long run per case: every estimate within 4.5 standard errors of what is expected."""
    wanted, [found] = truth(case), estimates(case, [0])
    assert set(found) == set(wanted)
    for name, row in found.items():
        assert abs(row["value"] - wanted[name]) < 4.5 * row["standard_error"], name


def test_coverage_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few short runs: 95 % of all intervals, 4 deviations at the least; the first by themselves."""
    case = Case((1, 1, 1), "token", tokens=8, texts=10)
    monkeypatch.setattr(estimators, "_FIRST", 5)
    rows, first = coverage(case, runs=12), coverage(case, runs=5)
    for name, row in rows.items():
        assert (row["covered_first"], row["first"]) == (first[name]["covered"], 5)
    hits, runs = sum(row["covered"] for row in rows.values()), 12 * len(rows)
    assert hits / runs > 0.8


def test_script_writes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((1, 1, 1), "token", tokens=8, texts=3)
    monkeypatch.setattr(estimators, "CASES", [case])
    out = tmp_path / "estimators.json"
    result = CliRunner().invoke(estimators.main, ["--runs", "2", "--out", str(out)])
    assert result.exit_code == 0
    content = json.loads(out.read_text())
    assert content["coverage"]["rates"] == len(content["cases"][case.name])
    assert content["provenance"]["versions"]["specdec"]


def test_lookup_by_hand() -> None:
    assert looked_up((0, 1, 2, 0, 1), 3) == [2, 0, 1]
    assert looked_up((1, 1), 3) == [1, 1, 1]  # into itself
    assert looked_up((0, 2, 0, 1, 0), 1) == [1]  # the latest
    assert looked_up((0, 1), 3) == []


def test_names_say_what_differs() -> None:
    case = Case((2, 1), "traversal", "generic", 3, tokens=8)
    assert case.name == "2,1 traversal, tables 3, 8 tokens"
    assert Followed("lookup", 0, 4, texts=5).name == "lookup greedy, 5 texts"
