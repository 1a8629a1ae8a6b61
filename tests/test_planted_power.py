"""Mistakes in the production engine: planted where they belong, caught or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from specdec.errors import NumericalError
from specdec.evals import lossless, planted_power
from specdec.evals.enumeration import START
from specdec.evals.folder import RunFolder
from specdec.evals.keyed import RekeyedNoise
from specdec.evals.planted_engine import Grown, engine_of
from specdec.evals.planted_power import examined, named
from specdec.evals.wrong_rules import FAULTS, KEY_FAULTS, KeyFault, Variant
from specdec.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = 512


def nothing() -> RunFolder:
    return RunFolder(None, "planted power", {})


def test_every_mistake_has_an_engine() -> None:
    """That emits whole texts, or refuses to go on with what is no law."""
    refused = []
    every: list[Variant | KeyFault] = [*FAULTS, *KEY_FAULTS]
    for fault in every:
        engine = engine_of(fault, planted_power.SEED)
        engine.add_request([START], SamplingParams(max_new_tokens=4), n=4, seed=1)
        try:
            assert [len(out.token_ids) for out in engine] == [4] * 4
        except NumericalError:
            refused.append(fault.name)
    assert len(refused) == 2
    assert all("not renormalised" in name for name in refused)


@pytest.mark.parametrize(
    "name",
    ["block: early break", "token: best of two kept",
     "recursive: siblings sorted by token", "typical"],
)  # fmt: skip
def test_large_mistakes_are_caught_by_few_texts(name: str) -> None:
    found = examined(name, FEW, nothing())
    assert found["total_variation"] > 0.1
    assert found["caught"]


@pytest.mark.parametrize("name", ["token: no fault", "traversal: no fault", "recursive: no fault"])
def test_what_is_planted_changes_nothing_but_the_mistake(name: str) -> None:
    found = examined(name, FEW, nothing())
    assert (found["sound"], found["total_variation"]) == (True, pytest.approx(0, abs=1e-12))
    assert found["p_value"] > 1e-3


def test_what_the_engine_refuses_is_caught() -> None:
    found = examined("traversal: law not renormalised without replacement", FEW, nothing())
    assert found["caught"]
    assert "not 1" in found["refused"]


def test_mistakes_are_planted_where_they_belong() -> None:
    wrong_rule = engine_of(named()["traversal: weight kept"], 0)
    assert wrong_rule.verifier._judge.__module__ == "specdec.evals.planted_engine"
    wrong_draft = engine_of(named()["kseq: whole law without replacement"], 0)
    assert isinstance(wrong_draft.proposer, Grown)
    assert wrong_draft.verifier.rule == "kseq"
    wrong_key = engine_of(named()["token: same coins in every step"], 0)
    assert isinstance(wrong_key.noise, RekeyedNoise)
    assert wrong_key.proposer is not None
    assert wrong_key.proposer.name == "draft"


def test_script_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted_power, "_CHUNK", 32)
    out, run = tmp_path / "power.json", ["--run", str(tmp_path / "run"), "--texts", "64"]
    only = ["--only", "typical", "--only", "token: no fault"]
    made: list[int] = []
    sample = lossless.sample_texts

    def stops(*given: Any) -> Any:
        made.append(given[-1][0])
        if len(made) == 3:
            raise KeyboardInterrupt
        return sample(*given)

    monkeypatch.setattr(planted_power, "sample_texts", stops)
    command = [*run, *only, "--out", str(out)]
    assert CliRunner().invoke(planted_power.main, command).exit_code == 1
    assert CliRunner().invoke(planted_power.main, command).exit_code == 0
    assert len(made) == 7  # two sides and one more, in halves; one half was begun twice
    content = json.loads(out.read_text())
    assert [fault["name"] for fault in content["faults"]] == ["typical", "token: no fault"]
    assert (content["faults_above"], content["caught_above"]) == (1, 1)
