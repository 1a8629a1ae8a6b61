"""Entropy and calibration of drafts that take their best tokens, held to tables."""

from collections.abc import Iterator, Sequence
from math import log
from typing import Any

import pytest

from specdec import Engine, SamplingParams
from specdec.evals.acceptance import DRAWN, UNDRAWN, summary, undefined
from specdec.evals.draft_laws import DraftLaws, drafting_models, replaced
from specdec.evals.progress import by_share
from specdec.evals.recorder import BINS, Recorder, Tally
from specdec.evals.trace import proposed_by
from specdec.sequence import Sequence as Sample
from specdec.toy import TableRunner, random_table
from specdec.tree import TokenTree
from specdec.verifier import Verdict

V, TOKENS = 6, 24
GREEDY = SamplingParams(max_new_tokens=TOKENS, temperature=0.0)
HEAT = 0.7
SAMPLED = SamplingParams(max_new_tokens=TOKENS, temperature=HEAT)
P = random_table(V, order=2, seed=1, concentration=0.7)
R = random_table(V, order=2, seed=2, concentration=0.7)


def mixed(context: tuple[int, ...]) -> list[float]:
    return [0.6 * p + 0.4 * r for p, r in zip(P(context), R(context), strict=True)]


def engine(**options: Any) -> Engine:
    if options.get("proposer") != "ngram":
        drafts = options.pop("drafts", 1)
        draft = [TableRunner(mixed, V, window=options.pop("window", None)) for _ in range(drafts)]
        options["draft"] = draft if isinstance(options.get("proposer"), list) else draft[0]
    return Engine(TableRunner(P, V), policy="constant", grow=True, **options)


PROMPTS = [[0, 1], [2, 3, 4], [5], [1, 1, 2, 1, 1]]


def places(made: Engine, sampling: SamplingParams) -> list[tuple[int, ...]]:
    """Contexts that a draft model was judged at: where the accepted path came to a node that has
    children of the model's."""
    found: list[tuple[int, ...]] = []
    verify = made.verifier.verify

    def seen(sequences: Sequence[Sample], trees: Sequence[TokenTree], noise: Any) -> list[Verdict]:
        verdicts = verify(sequences, trees, noise)
        for sequence, tree, verdict in zip(sequences, trees, verdicts, strict=True):
            who = proposed_by(made, sequence, tree)
            its = {above for above, by in zip(tree.parents, who, strict=True) if by != ("ngram",)}
            for length, node in enumerate((-1, *verdict.path)):
                if node in its:
                    found.append((*sequence.tokens, *verdict.tokens[:length]))
        return verdicts

    made.verifier.verify = seen  # type: ignore[method-assign]
    for number, prompt in enumerate(PROMPTS):
        made.add_request(prompt, sampling, seed=number)
    list(made)
    return found


def sharpened(law: Sequence[float]) -> list[float]:
    """At the temperature HEAT."""
    powers = [q ** (1 / HEAT) for q in law]
    return [power / sum(powers) for power in powers]


def entropy(law: Sequence[float]) -> float:
    return -sum(q * log(q) for q in law if q > 0)


WAYS: list[dict[str, Any]] = [
    {"num_draft_tokens": 3},
    {"num_draft_tokens": 4, "window": 16},
    {"tree": (2, 2, 1)},
    {"tree": (1, 2, 1, 2)},
    {"proposer": "tree", "proposer_options": {"shape": [-1, -1, -1, 0, 1, 1, 4, 6]}},
    {"proposer": "dynamic_tree", "proposer_options": {"nodes": 9, "depth": 4, "top_k": 3}},
    {"proposer": "beam_tree", "proposer_options": {"width": 2, "depth": 3}},
]


def check(tallies: list[Tally], contexts: list[tuple[int, ...]], *, is_greedy: bool) -> None:
    """The sums over all texts, against those of the tables."""
    assert sum(t.laws for t in tallies) == sum(t.undrawn for t in tallies) == len(contexts) > 20
    pairs = [(mixed(context), list(P(context))) for context in contexts]
    if not is_greedy:
        pairs = [(sharpened(q), sharpened(p)) for q, p in pairs]
    total = sum(entropy(q) for q, _ in pairs)
    assert sum(t.entropy for t in tallies) == pytest.approx(total, rel=1e-5)
    bins: list[list[float]] = [[0, 0.0, 0.0] for _ in range(BINS)]
    for q, p in pairs:
        best = q.index(max(q))
        its = bins[int(max(q) * BINS)]
        its[0] += 1
        its[1] += max(q)
        its[2] += p.index(max(p)) == best if is_greedy else p[best]
    for place, (count, confidence, right) in enumerate(bins):
        assert sum(t.binned[place] for t in tallies) == count
        assert sum(t.confidence[place] for t in tallies) == pytest.approx(confidence, rel=1e-5)
        assert sum(t.right[place] for t in tallies) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_greedy_drafts_are_judged_by_the_model_s_own_laws(options: dict[str, Any]) -> None:
    contexts = places(engine(**options), GREEDY)
    tallies = Recorder(engine(**options)).run(PROMPTS, GREEDY, range(len(PROMPTS)))
    check(tallies, contexts, is_greedy=True)
    found = summary(tallies)
    assert found["draft_law"] == UNDRAWN
    # for chains and trees the first child is the best token: agreement is the overlap
    right = sum(sum(t.right) for t in tallies) / len(contexts)
    assert found["overlap"]["value"] == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize(
    "options", [WAYS[5], {"num_draft_tokens": 3, "verification": "gumbel"}], ids=str
)
def test_best_tokens_of_a_sampled_run_have_the_law_of_its_settings(options: dict[str, Any]) -> None:
    made = engine(**options)
    contexts = places(engine(**options), SAMPLED)
    tallies = Recorder(made).run(PROMPTS, SAMPLED, range(len(PROMPTS)))
    check(tallies, contexts, is_greedy=False)
    found = summary(tallies)
    assert found["draft_law"] == UNDRAWN
    assert (found["overlap"] is None) == ("verification" in options)


def test_ensemble_is_judged_where_its_model_drafted() -> None:
    """Behind what a lookup alone proposed the model has no law; where it has one it is the
    table's."""
    options: dict[str, Any] = {"proposer": ["draft", "ngram"], "num_draft_tokens": 6}
    tallies = Recorder(engine(**options)).run(PROMPTS, GREEDY, range(len(PROMPTS)))
    check(tallies, places(engine(**options), GREEDY), is_greedy=True)
    assert sum(t.laws for t in tallies) < sum(t.overlaps for t in tallies)


def test_nothing_is_left_on_the_engine_and_texts_stay_what_they_are() -> None:
    made = engine(num_draft_tokens=3)
    Recorder(made).run(PROMPTS, GREEDY, range(len(PROMPTS)))
    assert "verify" not in vars(made.verifier)
    assert "score" not in vars(made.proposer.model)  # type: ignore[union-attr]
    recorder, plain = Recorder(made), engine(num_draft_tokens=3)
    for number, prompt in enumerate(PROMPTS):
        plain.add_request(prompt, SAMPLED, seed=number, request_id=str(number))
    texts = {out.id: out.token_ids for out in plain}
    watched: dict[str, tuple[int, ...]] = {}
    take = made.take_finished

    def kept() -> Any:
        outs = take()
        watched.update({out.id: out.token_ids for out in outs})
        return outs

    made.take_finished = kept  # type: ignore[method-assign]
    recorder.run(PROMPTS, SAMPLED, range(len(PROMPTS)))
    assert watched == texts


def test_law_of_a_step_is_not_taken_for_that_of_the_next() -> None:
    """A model may rest in a step of an ensemble."""
    made = engine(num_draft_tokens=3)
    [model] = drafting_models(made.proposer)
    laws, known = DraftLaws(model), []
    verify = made.verifier.verify

    def asks(sequences: Sequence[Sample], *more: Any) -> list[Verdict]:
        known.append([laws.take(sequences[0])(()) is not None for _ in range(2)])
        return verify(sequences, *more)

    made.add_request([0], SamplingParams(max_new_tokens=6, temperature=0.0))
    with replaced(made.verifier, "verify", asks), laws.listening():
        list(made)
    assert [True, False] in known
    assert [True, True] not in known


def test_figures_that_are_not_defined_say_why() -> None:
    def why(sampling: SamplingParams = GREEDY, **options: Any) -> dict[str, str]:
        made = engine(**options)
        row = summary(Recorder(made).run(PROMPTS, sampling, range(len(PROMPTS))))
        return undefined(
            {**row, "cost_ratio": 1.0, "predicted_speed": 1.0, "measured_speed": 1.0}, made
        )

    assert why(num_draft_tokens=2) == why(SAMPLED, num_draft_tokens=2) == {}
    assert why(proposer="ngram", num_draft_tokens=2) == {
        "draft_entropy": "a lookup has no law", "calibration": "a lookup has no law",
    }  # fmt: skip
    two = why(proposer=["draft", "draft"], drafts=2, num_draft_tokens=4)
    assert set(two.values()) == {"several models draft"}
    coupled = why(SAMPLED, num_draft_tokens=2, verification="gumbel")
    assert list(coupled) == ["overlap"]
    assert why(GREEDY, num_draft_tokens=2, verification="gumbel") == {}
    nothing = why(proposer="ngram", num_draft_tokens=0)
    assert nothing["overlap"] == nothing["draft_entropy"] == "nothing was drafted"


def test_drawn_tokens_have_the_laws_that_are_stored() -> None:
    found = summary(Recorder(engine(tree=(2, 1))).run(PROMPTS, SAMPLED, range(4)))
    assert found["draft_law"] == DRAWN


# --- bars


def test_share_moves_a_bar_of_hundred() -> None:
    moved: list[int] = []

    def progress(items: Sequence[Any], label: str) -> Iterator[Any]:
        assert label == "costs"
        for item in items:
            yield item
            moved.append(item)

    with by_share(progress, "costs") as report:
        assert moved == []
        report(0.0)
        report(0.25)
        assert len(moved) == 25
        report(0.1)
        assert len(moved) == 25
        report(1.0)
        assert len(moved) == 99
    assert len(moved) == 100
    with by_share(progress, "costs"):
        pass
    assert len(moved) == 100  # known costs have no bar
    with by_share(progress, "costs") as report:
        report(0.5)
    assert len(moved) == 200  # it ends full


def test_measuring_costs_tells_how_far_it_is() -> None:
    shares: list[float] = []
    made = engine(num_draft_tokens=3)
    made.step_costs(GREEDY, max_depth=3, fresh=True, report=shares.append)
    assert len(shares) > 5
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert 0.3 < shares[-1] <= 1
