"""A run's settings on small tables: sound ones pass, planted mistakes are seen."""

from pathlib import Path
from typing import Any

import pytest

from specdec import Engine
from specdec.evals import exact as module
from specdec.evals.audit import TOLERANCE
from specdec.evals.exact import exact, needs_draft, planted, small_options
from specdec.proposers import DraftModelProposer
from specdec.toy import TableRunner, random_table

pytestmark = pytest.mark.usefixtures("one_thread")

OTHER = {"tokenizer": module._spelling("xyz"), "draft_tokenizer": module._spelling("zxy")}
CASES: list[tuple[dict[str, Any], float]] = [
    ({"proposer": None, "num_draft_tokens": "auto"}, 1.0),
    ({"proposer": "draft", "verification": "token", "num_draft_tokens": 9}, 0.7),
    ({"tree": (4, 3, 2), "verification": "recursive"}, 1.0),
    ({"proposer": "lookahead"}, 1.0),
    ({"proposer": "retrieval", "proposer_options": {"index": "/nowhere", "tokenizer": 1}}, 1.0),
    ({"proposer": "text", "proposer_options": OTHER}, 1.0),
    ({"proposer": ["draft", "ngram"]}, 1.0),
    ({"proposer": "tree", "verification": "gumbel"}, 1.0),
    ({"policy": "confidence"}, 1.0),
    ({"proposer": "draft", "draft_window": 64}, 1.0),
]


def both(options: dict[str, Any], temperature: float) -> tuple[list[Any], list[Any]]:
    drafts = needs_draft(options)
    given = exact(options, drafts=drafts, temperature=temperature)
    return given, planted(options, drafts=drafts, temperature=temperature)


@pytest.mark.parametrize(("options", "temperature"), CASES, ids=lambda v: str(v)[:60])
def test_sound_settings_pass_and_planted_mistakes_are_seen(
    options: dict[str, Any], temperature: float
) -> None:
    sound, mistakes = both(options, temperature)
    assert [finding.name for finding in sound] == list(module.TABLES)
    assert all(finding.passed for finding in sound), sound
    assert len(mistakes) >= 2
    assert all(finding.passed for finding in mistakes), mistakes


def test_greedy_text_is_plain_decoding_s() -> None:
    sound, mistakes = both({"proposer": "draft"}, 0.0)
    assert [f.note for f in sound] == ["64 of 64 texts are plain decoding's"] * 2
    assert [f.passed for f in (*sound, *mistakes)] == [True] * 3


def test_lossy_rule_fails() -> None:
    sound, _ = both({"verification": "typical", "lossy": True}, 1.0)
    assert not any(finding.passed for finding in sound)
    assert min(finding.details["error"] for finding in sound) > 1000 * TOLERANCE


def test_broken_proposer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    propose = DraftModelProposer.propose

    def hotter(self: DraftModelProposer, *arguments: Any) -> list[Any]:
        return [module._heated(tree) for tree in propose(self, *arguments)]

    monkeypatch.setattr(DraftModelProposer, "propose", hotter)
    assert not any(f.passed for f in exact({}, drafts=True, temperature=1.0))


def test_what_cannot_be_enumerated_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISTANCE", 0.15)  # a tenth of the texts
    [first, second], mistakes = both({"proposer": "beam_tree"}, 1.0)
    assert first.passed
    assert second.passed
    assert mistakes[0].passed
    assert "times are continuous" in first.note
    assert first.details["texts"] > 500


# --- sizes


def test_drafts_are_cut_and_kinds_kept(tmp_path: Path) -> None:
    def small(**options: Any) -> dict[str, Any]:
        return small_options(options, tmp_path)

    assert small(tree=(5, 4, 3))["tree"] == [2, 1]
    assert small(tree=(1, 4))["tree"] == [1, 2]
    assert small(num_draft_tokens=12)["num_draft_tokens"] == 2
    assert small(num_draft_tokens=1)["num_draft_tokens"] == 1
    assert small(proposer="ngram")["num_draft_tokens"] == 3
    assert small(policy="heuristic")["num_draft_tokens"] == "auto"
    given: dict[str, Any] = {"shape": [-1] * 40, "kind": "iid", "temperature": 0.5}
    own = small(proposer="tree", proposer_options=given)["proposer_options"]
    assert own == {"shape": [-1, -1, 0], "kind": "iid", "temperature": 0.5}
    assert len(given["shape"]) == 40  # the caller's own stays
    dynamic = small(proposer="dynamic_tree", proposer_options={"nodes": 60})
    assert dynamic["proposer_options"] == {"nodes": 4, "depth": 2, "top_k": 2}


def test_members_of_an_ensemble_are_cut_too(tmp_path: Path) -> None:
    small = small_options({"proposer": ["lookahead", "ngram"], "proposer_options": {}}, tmp_path)
    engine = Engine(TableRunner(random_table(3), 3), grow=True, **_without_window(small))
    assert engine.proposer is not None
    assert small["proposer_options"] == {"lookahead": {"window": 2, "ngram": 3, "guesses": 2}}


def _without_window(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "draft_window"}
