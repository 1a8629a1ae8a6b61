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
