"""A run's settings on small tables: sound ones pass, planted mistakes are seen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from specdec import Engine, SamplingParams
from specdec.errors import InvalidArgumentError
from specdec.evals import exact as module
from specdec.evals.audit import TOLERANCE
from specdec.evals.exact import exact, needs_draft, planted, small_options
from specdec.proposers import DraftModelProposer
from specdec.sampling import Paths
from specdec.sampling.truncation import Truncation
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


def both(options: dict[str, Any], temperature: float = 1.0, **more: Any) -> tuple[list[Any], ...]:
    drafts, sampling = needs_draft(options), SamplingParams(temperature=temperature, **more)
    given = exact(options, drafts=drafts, sampling=sampling)
    return given, planted(options, drafts=drafts, sampling=sampling)


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
    assert all(f.note.startswith("64 of 64 texts are plain decoding's; drafts") for f in sound)
    assert [f.passed for f in (*sound, *mistakes)] == [True] * 3


@pytest.mark.parametrize("proposer", ["draft", "ngram"])
def test_policy_of_costs_plans_with_made_up_ones(proposer: str) -> None:
    given = {"proposer": proposer, "policy": "auto", "num_draft_tokens": "auto"}
    sound = exact(given, drafts=proposer == "draft", sampling=SamplingParams())
    assert all(finding.passed for finding in sound), sound
    assert sound[0].details["depths"] == [0, 2]
    assert sound[0].note.endswith("; drafts of 0 to 2 levels by made-up costs")


def test_engines_that_plan_by_costs() -> None:
    asked: list[dict[str, Any]] = [
        {}, {"policy": "cost", "num_draft_tokens": 3}, {"policy": "cost", "tree": (2, 1)},
        {"proposer": "tree", "tree": None, "proposer_options": {"kind": "iid"}},
        {"tree": (2, 1)}, {"proposer": "tree", "proposer_options": {"shape": [-1]}},
        {"num_draft_tokens": 3}, {"policy": "cost", "num_draft_tokens": 0},
        {"policy": "confidence"}, {"policy": "constant", "tree": (2, 1)},
    ]  # fmt: skip
    assert [module.plans_by_cost(options) for options in asked] == [True] * 6 + [False] * 4


def test_lossy_rule_fails() -> None:
    sound, _ = both({"verification": "typical", "lossy": True}, 1.0)
    assert not any(finding.passed for finding in sound)
    assert min(finding.details["error"] for finding in sound) > 1000 * TOLERANCE


def test_broken_proposer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    propose = DraftModelProposer.propose

    def hotter(self: DraftModelProposer, *arguments: Any) -> list[Any]:
        return [module._heated(tree) for tree in propose(self, *arguments)]

    monkeypatch.setattr(DraftModelProposer, "propose", hotter)
    assert not any(f.passed for f in exact({}, drafts=True, sampling=SamplingParams()))


# --- laws that are cut off, and processors

CUT: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 50}, "top_p": {"top_p": 0.9}, "min_p": {"min_p": 0.05},
    "all three": {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    "typical_p": {"typical_p": 0.8}, "eta": {"eta_cutoff": 0.05},
}  # fmt: skip
BY_PATH: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "occurrences": {"presence_penalty": 0.4, "frequency_penalty": 0.3, "top_p": 0.9},
    "tokens by name": {"logit_bias": {1000: 0.7}, "bad_words_ids": [[3001, 17]]},
    "n-grams": {"no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("how", CUT)
def test_laws_that_are_cut_off(how: str) -> None:
    options = {"tree": (2, 1)} if how == "top_p" else {"proposer": "draft"}
    sound, mistakes = both(options, **CUT[how])
    assert [finding.name for finding in sound] == [*module.TABLES, module.EDGES]
    assert all(finding.passed for finding in (*sound, *mistakes)), (sound, mistakes)
    assert sound[-1].details["cut_off"] > 1e-3
    assert "% cut off" in sound[-1].note
    assert "unlikely tokens are not cut off" in {finding.name for finding in mistakes}


@pytest.mark.parametrize("how", BY_PATH)
def test_processors_that_look_at_the_path(how: str) -> None:
    options = {"tree": (2, 1)} if how == "occurrences" else {"proposer": "draft"}
    sound, mistakes = both(options, **BY_PATH[how])
    assert all(finding.passed for finding in (*sound, *mistakes)), (sound, mistakes)


@pytest.mark.parametrize("more", [{"temperature": 0.0}, {}, {"top_p": 0.8}], ids=str)
def test_coupled_and_greedy_texts_are_those_of_the_definition(more: dict[str, Any]) -> None:
    options = {
        "proposer": "draft",
        "verification": "gumbel" if more.get("temperature", 1) else "auto",
    }
    sound, mistakes = both(options, **more, repetition_penalty=1.2)
    assert all(finding.passed for finding in (*sound, *mistakes)), (sound, mistakes)


def test_temperature_behind_the_cut_is_a_planted_mistake() -> None:
    _, mistakes = both({"proposer": "draft"}, temperature=0.6, top_p=0.9)
    assert "tokens are cut off before the temperature" in {finding.name for finding in mistakes}
    _, mistakes = both({"proposer": "draft"}, top_p=0.9)
    assert "tokens are cut off before the temperature" not in {f.name for f in mistakes}


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ({"top_p": 0.9}, {"top_p": 0.895}),
        ({"top_p": 0.5}, {"top_p": 0.515}),
        ({"top_p": 0.9}, {"top_p": 1.0}),
        ({"min_p": 0.05}, {"min_p": 0.052}),
        ({"top_k": 2}, {"top_k": 1}),
    ],
)
def test_wrong_truncation_of_the_production_code_fails(
    how: dict[str, Any], wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    law = Truncation.law

    def other(self: Truncation, logits: Any) -> Any:
        return law(replace(self, **wrong), logits)

    monkeypatch.setattr(Truncation, "law", other)
    sound = exact({"proposer": "draft"}, drafts=True, sampling=SamplingParams(**how))
    assert not sound[-1].passed
    assert sound[-1].details["error"] > 1000 * TOLERANCE


def test_penalty_that_does_not_see_drafted_tokens_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    of_trees = Paths.of_trees

    def blind(prefixes: Any, tokens: Any, parents: Any) -> Paths:
        return of_trees(prefixes, [torch.zeros_like(t) for t in tokens], parents)

    monkeypatch.setattr(Paths, "of_trees", staticmethod(blind))
    sampling = SamplingParams(presence_penalty=0.5)
    assert not any(f.passed for f in exact({"tree": (2, 1)}, drafts=True, sampling=sampling))


def test_law_without_a_choice_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="one token has all the mass"):
        planted({}, drafts=True, sampling=SamplingParams(temperature=0.001))


def test_small_law_keeps_what_can_be_kept() -> None:
    class OnlyLarge(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            del input_ids
            return scores.index_fill(1, torch.tensor([4000]), 0.0)

    kept = RepetitionPenaltyLogitsProcessor(2.0)
    given = SamplingParams(
        9, 0.5, 50, 0.9, eos_token_ids=(7,), min_new_tokens=3, logit_bias={7: 1.0},
        processors=LogitsProcessorList([OnlyLarge(), kept]), no_repeat_ngram_size=1,
    )  # fmt: skip
    small = module.small_sampling(given)
    assert (small.temperature, small.top_k, small.top_p) == (0.5, 2, 0.9)
    assert (small.eos_token_ids, small.min_new_tokens) == ((), 0)
    assert small.logit_bias == {1: 1.0}
    assert list(small.processors or ()) == [kept]
    assert small.no_repeat_ngram_size == module.TOKENS
    assert given.top_k == 50


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
