"""What the estimators are held to: expected counts of texts on tables, against the engine's own."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from specdec.evals import estimators
from specdec.evals.estimators import CASES, Case, coverage, estimates, truth

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = [Case(case.shape, case.rule, tokens=8) for case in CASES]


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
def test_intervals_hold_the_truth(case: Case) -> None:
    """One long run per case: every estimate within 4.5 standard errors of what is expected."""
    wanted, found = truth(case), estimates(case, 0, 60)
    assert set(found) == set(wanted)
    for name, row in found.items():
        assert abs(row["value"] - wanted[name]) < 4.5 * row["standard_error"], name


def test_coverage_is_counted() -> None:
    """Few short runs: 95 % of all intervals, 4 deviations at the least."""
    rows = coverage(SHORT[0], runs=12, texts=10)
    hits, runs = sum(row["covered"] for row in rows.values()), 12 * len(rows)
    assert hits / runs > 0.8
    assert {"truth", "mean_estimate", "covered", "runs"} == set(rows["overlap"])


def test_script_writes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "CASES", SHORT[:1])
    out = tmp_path / "estimators.json"
    result = CliRunner().invoke(estimators.main, ["--runs", "2", "--texts", "3", "--out", str(out)])
    assert result.exit_code == 0
    content = json.loads(out.read_text())
    assert content["coverage"]["rates"] == len(content["cases"]["1,1,1 token"])
    assert content["provenance"]["versions"]["specdec"]
