"""The count of what the two-sample test of `verify` sees, on a few mistakes and few runs."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from specdec.evals import verify_power
from specdec.evals.lossless import Plan
from specdec.evals.verify_power import alarms_of_engine, alarms_of_laws, cut, distance, power_of
from specdec.evals.wrong_rules import LEGAL

pytestmark = pytest.mark.usefixtures("one_thread")

RAW = Path(__file__).parents[1] / "evals" / "results" / "verify_power.json"
BY_NAME = {mistake.name: mistake for mistake in verify_power.mistakes()}


@pytest.mark.parametrize(
    "name",
    ["token: resample from p", "traversal: weight kept", "token: same draft in every step"],
)
def test_planted_mistakes_are_caught(name: str) -> None:
    found = power_of(BY_NAME[name], runs=2, seeds=2)
    assert found["total_variation"] > verify_power.CAUGHT_ABOVE
    assert found["caught"] == 2


def test_sound_rule_is_not_caught() -> None:
    found = power_of(verify_power._variant(LEGAL[0]), runs=2, seeds=1)
    assert found["total_variation"] < 1e-12
    assert found["caught"] == 0


def test_no_more_false_alarms_than_the_level_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 5 %: 20 runs with more than 6 alarms have a probability below 1e-4."""
    monkeypatch.setattr(verify_power, "ENGINE_PLAN", Plan(0.4, tokens=3, cells=8, prompts=1))
    for found in (alarms_of_laws(20), alarms_of_engine(20)):
        assert found["at_5_percent"] <= 6
        assert len(found["p_values"]) == found["runs"] == 20
    assert alarms_of_engine(1)["acceptance_rate"] > 0.3


def test_law_of_the_first_tokens() -> None:
    both = BY_NAME["token: resample from p"].law(0)
    short, wanted = cut(both.ours, 2), cut(both.target, 2)
    assert {len(text) for text in short} == {2}
    assert sum(short.values()) == pytest.approx(1)
    assert 0 < distance(short, wanted) <= distance(both.ours, both.target)


def test_script_writes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = verify_power.mistakes()[:2]
    monkeypatch.setattr(verify_power, "mistakes", lambda: few)
    monkeypatch.setattr(verify_power, "ENGINE_PLAN", Plan(0.4, tokens=3, cells=8, prompts=1))
    out = tmp_path / "verify_power.json"
    args = ["--out", str(out), "--runs", "1", "--null-runs", "2", "--seeds", "1"]
    result = CliRunner().invoke(verify_power.main, args)
    assert result.exit_code == 0
    content = json.loads(out.read_text())
    assert [fault["name"] for fault in content["faults"]] == [mistake.name for mistake in few]
    assert set(content["null"]) == {"laws", "engine"}

    again = [*args[:2], "--runs", "2", "--only", few[1].name]
    result = CliRunner().invoke(verify_power.main, again)
    assert result.exit_code == 0, result.output
    later = json.loads(out.read_text())
    assert [fault["runs"] for fault in later["faults"]] == [1, 2]
    assert later["null"] == content["null"]
    assert [session["only"] for session in later["sessions"]] == [[], [few[1].name]]


def test_only_goes_on_from_rows_that_are_there(tmp_path: Path) -> None:
    args = ["--out", str(tmp_path / "none.json"), "--only", "typical"]
    result = CliRunner().invoke(verify_power.main, args)
    assert result.exit_code == 2
    assert "holds no rows yet" in result.output


def test_mistake_that_does_not_show_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Siblings that share a coin: no mistake on the first tables, one on the eighth."""
    its = BY_NAME["recursive: siblings share a coin"]
    assert its.law(0).total_variation == 0
    assert its.law(7).total_variation > 0.05
    monkeypatch.setattr(verify_power, "mistakes", lambda: [its])
    null = {"alarms": 0, "runs": 0, "level": 0.01}
    monkeypatch.setattr(verify_power, "alarms_of_laws", lambda _: null)
    monkeypatch.setattr(verify_power, "alarms_of_engine", lambda _: null)
    monkeypatch.setattr(verify_power, "PLAN", Plan(0.4, tokens=3, cells=8, prompts=1))
    args = ["--out", str(tmp_path / "power.json"), "--runs", "1", "--seeds", "1"]
    result = CliRunner().invoke(verify_power.main, args)
    assert result.exit_code == 1
    assert f"not above 0.001 on any table: {its.name}" in result.output


def test_every_committed_mistake_shows() -> None:
    content = json.loads(RAW.read_text(encoding="utf-8"))
    assert [found["name"] for found in content["faults"]] == [
        mistake.name for mistake in verify_power.mistakes()
    ]
    for found in content["faults"]:
        assert found["total_variation"] > verify_power.SHOWS, found["name"]
        assert found["caught"] == found["runs"], found["name"]
    assert content["missed_above"] == []
