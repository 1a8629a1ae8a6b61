"""Ensembles: the law of their text, their budget, caches and credits, and what they refuse."""

import json
import math
from collections.abc import Callable, Iterator, Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner

import specdec
from specdec import Engine, Proposer, SamplingParams, TokenTree, proposers
from specdec.cli.main import main
from specdec.errors import InvalidArgumentError
from specdec.evals.audit import TOLERANCE, emitted_law
from specdec.evals.enumeration import Comparison
from specdec.proposers import EnsembleProposer, ensemble
from specdec.rng import Noise, OffsetNoise, PhiloxNoise, RecordedNoise
from specdec.runner import ModelRunner
from specdec.sequence import Sequence
from specdec.toy import ContinuationRunner, SyntheticDraft, TableRunner, random_table
from specdec.tree import Law, Proposal
from specdec.verifier import Verdict

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any
KV = 1 << 20
V = 3
TARGET, FIRST, SECOND = (random_table(V, order=None, seed=seed) for seed in (1, 2, 3))
PROMPT = [0, 1, 2, 0, 1]  # repeats itself, so that something can be looked up
GREEDY = SamplingParams(max_new_tokens=14, temperature=0)
SAMPLED = SamplingParams(max_new_tokens=14, temperature=0.9, top_p=0.95)
PROMPTS = [[0, 45, 67, 89, 45, 67], [0, 200, 31, 200], [0, *range(20, 60), *range(20, 30)], [7]]


class Watched(Engine):
    """An engine whose cache is checked after every step."""

    def step(self) -> list[specdec.StepRecord]:
        records = super().step()
        self.check_integrity()
        for sequence in self.scheduler.running:
            for computed in sequence.cache.computed.values():
                assert computed <= len(sequence.tokens)
        return records


def texts(
    engine: Engine, prompts: Items[list[int]], params: SamplingParams
) -> list[tuple[int, ...]]:
    """The continuations of prompts that run side by side."""
    names = [engine.add_request(prompt, params, seed=i) for i, prompt in enumerate(prompts)]
    found = {out.id: out.token_ids for out in engine}
    assert all(group.used == 0 for group in engine.groups)
    return [found[name] for name in names]


@pytest.fixture(scope="module")
def make(target: Model, draft: Model, make_draft: Any) -> Callable[..., Watched]:
    """An engine of the tiny target; drafts=n: with so many different drafts."""
    others = [draft, make_draft(target, 0.02), make_draft(target, 0.03)]

    def build(drafts: int = 0, **options: Any) -> Watched:
        if drafts:
            options["draft"] = others[:drafts]
        return Watched(target, **{"kv_memory": KV, "policy": "constant", **options})

    return build


# --- the law of the text


def audited(tables: Items[Any], **options: Any) -> Comparison:
    def build(noise: Noise) -> Engine:
        drafts = [TableRunner(table, V) for table in tables]
        return Engine(
            TableRunner(TARGET, V), draft=drafts, noise=noise, kv_memory=1 << 22, grow=True,
            policy="constant", **options,
        )  # fmt: skip

    return emitted_law(build, TARGET, PROMPT, tokens=3)


CASES: list[tuple[list[Any], dict[str, Any]]] = [
    ([FIRST, SECOND], {"num_draft_tokens": 2}),
    ([FIRST, SECOND], {"num_draft_tokens": 3, "verification": "recursive"}),
    ([FIRST, SECOND], {"num_draft_tokens": 3, "proposer": ["draft", "draft", "ngram"]}),
    ([FIRST, FIRST], {"num_draft_tokens": 3, "proposer": ["ngram", "draft", "draft"]}),
    ([FIRST, SECOND], {"tree": (2,)}),
    (
        [FIRST, SECOND],
        {"num_draft_tokens": 3, "proposer": ["tree", "draft"],
         "proposer_options": {"tree": {"tree": (2,)}}},
    ),
    (
        [FIRST, SECOND],
        {"num_draft_tokens": 4, "proposer": ["draft", "tree", "ngram", "suffix"],
         "proposer_options": {"tree": {"tree": (1, 2), "kind": "top_k"},
                              "draft": {"temperature": 0.5}, "ngram": {"branches": 2}}},
    ),
]  # fmt: skip
each_case = pytest.mark.parametrize(
    ("tables", "options"), CASES, ids=[str([*options.values()]) for _, options in CASES]
)


@each_case
def test_law_of_three_tokens_is_the_target_s(tables: list[Any], options: dict[str, Any]) -> None:
    """Every outcome of every draw and coin, through the production code (see evals/audit.py)."""
    assert audited(tables, **options).error < TOLERANCE


def test_draft_noise_that_members_share_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "_ROWS", 0)
    assert audited([FIRST, FIRST], num_draft_tokens=2).error > 1e-3


def test_share_that_depends_on_what_was_drawn_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second member that drops a node which the first had not drawn (contract C3)."""
    add = ensemble._Union.add_drawn

    def picky(self: Any, view: Any) -> list[int]:
        if self.tokens and view.tokens[0] not in self.tokens:
            return [-1] * len(view.tree)
        return add(self, view)

    monkeypatch.setattr(ensemble._Union, "add_drawn", picky)
    assert audited([FIRST, SECOND], num_draft_tokens=2).error > 1e-3


def test_offset_noise_is_that_of_other_rows() -> None:
    noise, cpu = PhiloxNoise(), torch.device("cpu")
    moved = OffsetNoise(noise, 5)
    whole, part = noise.step([7, 8], [3, 4], 9, cpu), moved.step([7, 8], [3, 4], 4, cpu)
    assert torch.equal(part.draft, whole.draft[:, 5:])
    drawn = moved.draft_gumbel([7], [3], [2], 11, cpu)
    assert torch.equal(drawn, noise.draft_gumbel([7], [3], [7], 11, cpu))
    assert not torch.equal(drawn, noise.draft_gumbel([7], [3], [2], 11, cpu))
    assert torch.equal(moved.gumbel([7], [3], 11, cpu), noise.gumbel([7], [3], 11, cpu))
    with pytest.raises(InvalidArgumentError, match="no 6 recorded uniforms"):
        OffsetNoise(RecordedNoise(), 5).step([0], [0], 1, cpu)


# --- greedy and coupled text, caches

LISTS: list[tuple[int, dict[str, Any]]] = [
    (1, {"proposer": "ensemble"}),
    (1, {"proposer": ["ngram", "draft", "suffix"]}),
    (2, {}),
    (2, {"tree": (2, 1)}),
    (2, {"proposer": ["draft", "tree"], "proposer_options": {"tree": {"tree": (3, 2)}}}),
    (2, {"proposer": ["tree", "draft", "ngram"], "num_draft_tokens": 14,
         "proposer_options": {"tree": {"tree": (2, 2)}, "shares": {"tree": 6, "draft": 4,
                                                                   "ngram": 4}}}),
    (3, {"proposer": ["draft", "draft", "draft", "ngram"]}),
    (1, {"proposer": ["lookahead", "draft", "ngram"]}),
    (2, {"draft_window": 16}),
    (2, {"draft_window": 24, "proposer": ["tree", "draft", "ngram"],
         "proposer_options": {"tree": {"tree": (2, 2)}}}),
    (0, {"proposer": ["ngram", "suffix"]}),
    (0, {"proposer": "ensemble", "proposer_options": {"members": ["suffix"]}}),
]  # fmt: skip
each_list = pytest.mark.parametrize(("drafts", "options"), LISTS, ids=str)


@each_list
def test_text_is_that_of_plain_decoding(
    make: Callable[..., Watched], drafts: int, options: dict[str, Any]
) -> None:
    engine = make(drafts, **options)
    assert texts(engine, PROMPTS, GREEDY) == texts(make(), PROMPTS, GREEDY)
    assert engine.stats.accepted > 0
    coupled = make(drafts, verification="gumbel", **options)
    assert texts(coupled, PROMPTS, SAMPLED) == texts(make(), PROMPTS, SAMPLED)


@each_list
def test_sampled_text_does_not_depend_on_the_batch(
    make: Callable[..., Watched], drafts: int, options: dict[str, Any]
) -> None:
    together = texts(make(drafts, **options), PROMPTS, SAMPLED)
    # the seed of a prompt is its number
    alone = [
        texts(make(drafts, **options), [[7]] * i + [prompt], SAMPLED)[i]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone


@pytest.mark.parametrize("options", [{}, {"tree": (2, 2)}], ids=str)
def test_second_draft_knows_the_text(
    target: Model, make_draft: Any, options: dict[str, Any]
) -> None:
    """The target as the second of two drafts is right to the last level, whatever the first did to
    the slots."""
    engine = Watched(
        target, draft=[make_draft(target, 0.05), target], kv_memory=KV, policy="constant",
        **options,
    )  # fmt: skip
    depth = 2 if options else 8
    engine.add_request(PROMPTS[0], SamplingParams(60, 0), seed=3)
    assert [record.accepted for _ in range(5) for record in engine.step()] == [depth] * 5
    engine.abort_all()


def test_second_draft_with_a_window_knows_the_text(target: Model, make_draft: Any) -> None:
    # its own group is committed by its own numbers
    engine = Watched(
        target, draft=[make_draft(target, 0.05), target], draft_window=32, kv_memory=KV,
        tree=(2, 1, 1), policy="constant",
    )  # fmt: skip
    engine.add_request(PROMPTS[0], SamplingParams(20, 0), seed=3)
    assert [record.accepted for _ in range(4) for record in engine.step()] == [3] * 4
    engine.abort_all()


def test_first_draft_keeps_what_was_committed(make: Callable[..., Watched]) -> None:
    engine = make(2, num_draft_tokens=6)
    assert isinstance(engine.proposer, EnsembleProposer)
    first, second = (member.runner for member in engine.proposer.members)  # type: ignore[attr-defined]
    engine.add_request(PROMPTS[0], GREEDY)
    for _ in range(3):
        [sequence] = engine.scheduler.running
        before = len(sequence.tokens)
        [record] = engine.step()
        [view, *_] = engine.proposer._states[sequence].views
        # the last token of a chain is drafted, not computed
        known = before + min(len(view.accepted), len(view.tree) - 1)
        assert sequence.cache.computed_len(first) == known
        assert sequence.cache.computed_len(second) == before
        assert record.accepted >= len(view.accepted)
    engine.abort_all()


def test_interrupted_step_leaves_the_text_whole(
    make: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(2, proposer=["draft", "draft", "ngram"])
    name = engine.add_request(PROMPTS[0], GREEDY)
    engine.step()
    assert isinstance(engine.proposer, EnsembleProposer)
    propose = engine.proposer.members[1].propose

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.proposer.members[1], "propose", fail)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(engine.proposer.members[1], "propose", propose)
    [out] = list(engine)
    assert (out.id, out.token_ids) == (name, texts(make(), PROMPTS[:1], GREEDY)[0])


class Recital:
    """Recites a text that repeats itself, drafted by n-grams and a model that is often wrong, and
    counts steps and those in which the model drafted."""

    def __init__(self, passes: float | None) -> None:
        """passes: of the target, that a drafted level takes, if anybody says so."""
        prompt, text = [0, *range(1, 10)], [*range(1, 10)] * 12
        known = [[*prompt, *text]]
        draft = SyntheticDraft(ContinuationRunner(known, 16), 0.6)
        engine = Watched(
            ContinuationRunner(known, 16), draft=draft, proposer=["draft", "ngram"],
            num_draft_tokens=4, policy="constant", kv_memory=KV,
        )  # fmt: skip
        assert isinstance(engine.proposer, EnsembleProposer)
        if passes is not None:
            engine.proposer.weigh(lambda depth: passes * depth)
        engine.add_request(prompt, SamplingParams(len(text), 0))
        [state] = engine.proposer._states.values()
        self.steps = self.drafted = 0
        while engine.scheduler.running:
            engine.step()
            self.steps += 1
            self.drafted += any(engine.proposer.labels[v.member] == "draft" for v in state.views)
        [out] = engine.take_finished()
        assert out.token_ids == tuple(text)


def test_models_rest_where_a_lookup_is_known_to_be_right() -> None:
    unweighed, free, dear = (Recital(passes) for passes in (None, 0.0, 0.3))
    assert unweighed.drafted == free.drafted >= free.steps - 1  # the last token is not drafted
    assert 2 <= dear.drafted < dear.steps // 2  # at first nothing is known of lookups
    cheap = Recital(0.001)
    assert dear.drafted < cheap.drafted


def test_lookups_alone_are_free() -> None:
    lookups = EnsembleProposer([proposers.find("ngram")(), proposers.find("suffix")()])
    assert lookups.free
    assert [lookups.nodes_within(depth) for depth in (1, 5, 40)] == [1, 5, 40]


# --- members that are written down


class Fixed(Proposer):
    """Proposes a tree that a test gave; records what it was told."""

    name = "fixed"
    law = "point"

    def __init__(self, tree: TokenTree, *, situation: int = 0) -> None:
        self.tree, self.number = tree, situation
        self.budgets: list[int] = []

    def situation(self, sequence: Sequence) -> int:
        del sequence
        return self.number

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        del noise
        self.budgets += budgets
        return [
            TokenTree(self.tree.tokens[:budget], self.tree.parents[:budget], self.tree.laws)
            for _, budget in zip(sequences, budgets, strict=True)
        ]


class Listening(Fixed):
    """Learns from verdicts, so that nothing it proposed is left out."""

    name = "listening"
    seen: ClassVar[list[Verdict]] = []

    def observe(self, sequences: Items[Sequence], verdicts: Items[Verdict]) -> None:
        del sequences
        self.seen.extend(verdicts)


def chain(*tokens: int) -> TokenTree:
    return TokenTree.chain(torch.tensor(tokens, dtype=torch.long))


def branches(*tokens: int) -> TokenTree:
    return TokenTree(torch.tensor(tokens), (-1,) * len(tokens))


def certain(text: Items[int]) -> TableRunner:
    """A target of ten tokens that goes on with this text."""

    def law(context: tuple[int, ...]) -> list[float]:
        place = len(context) - 1
        following = text[place] if 0 <= place < len(text) else 0
        return [float(token == following) for token in range(10)]

    return TableRunner(law, 10)


def stepped(
    members: list[Proposer], budget: int, text: Items[int] = (1, 2, 3, 4, 5, 6), steps: int = 1,
    **options: Any,
) -> Iterator[tuple[Engine, TokenTree, specdec.StepRecord]]:  # fmt: skip
    """Steps behind [9], with the trees verified in them."""
    engine = Watched(
        certain(text), proposer=EnsembleProposer(members, **options), num_draft_tokens=budget,
        kv_memory=1 << 22,
    )  # fmt: skip
    trees: list[TokenTree] = []
    verify = engine.verifier.verify

    def seen(sequences: Any, its_trees: Any, noise: Any) -> Any:
        trees.extend(its_trees)
        return verify(sequences, its_trees, noise)

    engine.verifier.verify = seen  # type: ignore[method-assign, assignment]
    engine.add_request([9], SamplingParams(40, 0))
    for _ in range(steps):
        [record] = engine.step()
        yield engine, trees[-1], record
    engine.abort_all()


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents, strict=True):
        found.append(((*found[parent],) if parent >= 0 else ()) + (token,))
    return found


def test_trees_are_merged_by_full_path() -> None:
    [(_, tree, record)] = stepped([Fixed(chain(1, 2, 7)), Fixed(chain(1, 8, 2))], 6)
    assert paths(tree) == [(1,), (1, 2), (1, 2, 7), (1, 8), (1, 8, 2)]
    assert (record.drafted, record.accepted) == (5, 2)


def test_budget_that_agreement_saves_goes_deeper() -> None:
    listening, lookup = Listening(chain(1, 2, 3, 4)), Fixed(chain(1, 2, 3, 4, 5, 6, 7, 8))
    [(_, tree, record)] = stepped([listening, lookup], 6)
    assert listening.budgets == [3]
    assert lookup.budgets == [6]
    assert paths(tree)[-1] == (1, 2, 3, 4, 5, 6)
    assert record.accepted == 6


@pytest.mark.parametrize("budget", range(6))
def test_budget_is_kept(budget: int) -> None:
    members = [Listening(chain(3, 4, 5)), Fixed(branches(1, 2)), Fixed(chain(6, 7, 8))]
    for _, tree, _ in stepped(list(members), budget):
        assert len(tree) == budget
        # where nothing is to be drafted, nobody is asked
        assert members[0].budgets == ([-(-budget // 3)] if budget else [])


def test_unused_share_goes_to_lookups() -> None:
    [(_, tree, _)] = stepped([Listening(chain(3)), Fixed(chain(1, 2, 3, 4, 5, 6))], 6)
    assert paths(tree) == [(3,), *((*range(1, n),) for n in range(2, 7))]


def test_likelier_nodes_are_kept() -> None:
    """Of two lookups the one that was right so far gets the budget."""
    wrong, right = Fixed(chain(9, 9, 9, 9)), Fixed(chain(1, 1, 1, 1))
    *_, (_, tree, record) = stepped([wrong, right], 4, text=[1] * 40, steps=6)
    assert paths(tree) == [(1,) * n for n in range(1, 5)]
    assert record.accepted == 4


def test_situations_are_told_apart() -> None:
    """What was learnt in one situation says nothing of another."""
    wrong, right = Fixed(chain(9, 9), situation=1), Fixed(chain(1, 1), situation=1)
    found = []
    for engine, tree, _ in stepped([wrong, right], 2, text=[1] * 60, steps=9):
        assert isinstance(engine.proposer, EnsembleProposer)
        found.append(paths(tree))
        wrong.number = 2 if len(found) == 7 else wrong.number
        right.number = 2 if len(found) == 7 else right.number
    assert found[0] == found[7] == [(9,), (1,)]
    assert found[6] == [(1,), (1, 1)]


def test_credits_go_to_every_member_that_proposed_a_node() -> None:
    members: list[Proposer] = [Fixed(chain(1, 2, 9)), Fixed(chain(1, 9)), Listening(branches(8, 1))]
    for engine, _, _ in stepped(members, 9):
        assert isinstance(engine.proposer, EnsembleProposer)
        assert engine.proposer.credits == {
            "fixed-1": [3, 2], "fixed-2": [2, 1], "listening": [2, 1],
        }  # fmt: skip


def test_verdicts_come_in_the_member_s_own_numbers() -> None:
    Listening.seen.clear()
    first, second = Listening(chain(7, 8)), Listening(chain(1, 2, 9))
    for engine, tree, record in stepped([first, second], 6):
        assert paths(tree) == [(7,), (7, 8), (1,), (1, 2), (1, 2, 9)]
        assert record.tokens == (1, 2, 3)
        assert [v.path for v in Listening.seen] == [(), (0, 1)]
        assert [v.tokens for v in Listening.seen] == [(1,), (1, 2, 3)]
        assert [v.drafted for v in Listening.seen] == [2, 3]
        best = [v.logits.argmax(-1).tolist() for v in Listening.seen]
        assert best == [[1, 2, 3], [1, 2, 3, 4]]
        assert engine.stats.drafted == 5


def test_members_without_a_tree_hear_of_the_root() -> None:
    Listening.seen.clear()
    list(stepped([Listening(chain()), Fixed(chain(1))], 3))
    [verdict] = Listening.seen
    assert (verdict.tokens, verdict.drafted, verdict.path) == ((1,), 0, ())
    assert verdict.logits.shape == (1, 10)


@pytest.mark.parametrize(
    ("shares", "budget", "wanted"),
    [((3, 1), 8, [6, 2]), ((1, 3), 8, [2, 6]), ((1, 1), 5, [2, 3]), ((1, 99), 3, [0, 3])],
)
def test_shares_are_proportions(shares: tuple[int, int], budget: int, wanted: list[int]) -> None:
    long = chain(*range(1, 9))
    members = [Listening(long), Listening(long)]
    both = {"listening-1": shares[0], "listening-2": shares[1]}
    list(stepped(list(members), budget, shares=both))
    assert [member.budgets[0] for member in members] == wanted


def test_drafts_get_the_same_depth(make: Callable[..., Watched]) -> None:
    engine = make(
        2, proposer=["draft", "tree"], proposer_options={"tree": {"tree": (3, 2, 1)}}
    )  # fmt: skip
    assert isinstance(engine.proposer, EnsembleProposer)
    depths = {4: [1, 3], 5: [2, 3], 11: [2, 9], 12: [3, 9], 18: [3, 15], 23: [8, 15]}
    assert {budget: engine.proposer._split(budget) for budget in depths} == depths
    assert engine.proposer._split(1) == [1, 0]
    assert engine.proposer.preferred_nodes == 23
    assert [engine.proposer.nodes_within(depth) for depth in (1, 2, 3, 50)] == [4, 11, 18, 50]
    assert engine.proposer.draft_rows(2) == (1, 1, 1, 3)


def test_what_members_say_is_combined() -> None:
    members: list[Proposer] = [Fixed(chain(1), situation=2), Fixed(chain(1), situation=70)]
    found = EnsembleProposer(members)
    assert found.situation(None) == 2 * 64 + 63  # type: ignore[arg-type]
    assert found.max_positions is None
    assert found.law == "point"
    members[1].law = "coupled"
    assert EnsembleProposer(members).law == "coupled"
    members[0].law = "sampled"
    assert EnsembleProposer(members).law == "sampled"


def test_draft_with_a_short_context_drops_out(
    target: Model, make_llama: Any, make: Callable[..., Watched]
) -> None:
    short = make_llama(target.config.vocab_size, seed=0, max_position_embeddings=48)
    prompt = [5 + i % 30 for i in range(40)]
    params = SamplingParams(max_new_tokens=30, temperature=0)
    engine = make(draft=[short], proposer=["draft", "ngram"])
    assert engine.proposer is not None
    assert engine.proposer.max_positions is None
    assert texts(engine, [prompt], params) == texts(make(), [prompt], params)
    assert make(draft=[short], proposer=["draft"]).proposer.max_positions == 48  # type: ignore[union-attr]


def test_draws_come_before_lookups_and_each_node_is_proposed_once_by_them() -> None:
    laws = torch.full((2, 10), 0.1)
    drawn = Fixed(TokenTree.chain(torch.tensor([1, 2]), laws))
    drawn.law = "sampled"  # type: ignore[assignment]
    lookups = [Fixed(chain(1, 2, 3)), Fixed(chain(1, 2, 3))]
    [(_, tree, _)] = stepped([*lookups, drawn], 9)
    assert tree.laws is not None
    assert torch.equal(tree.laws, laws)
    assert tree.proposals == (
        Proposal(-1, 1, Law("iid", 0), 0), Proposal(0, 2, Law("iid", 1), 1),
        Proposal(1, 3, Law("point"), 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("drafts", "options", "params", "rule"),
    [
        (1, {"proposer": ["draft", "ngram"]}, SAMPLED, {"traversal", "block"}),
        (2, {}, SAMPLED, {"traversal", "block"}),
        (0, {"proposer": ["ngram", "suffix"]}, SAMPLED, {"walk"}),
        (1, {"proposer": ["draft", "ngram"]}, GREEDY, {"greedy"}),
        (1, {"proposer": ["tree", "ngram"],
             "proposer_options": {"tree": {"tree": (2,), "kind": "coupled"}}}, SAMPLED, {"gumbel"}),
    ],
    ids=["draft and ngram", "two drafts", "lookups", "greedy", "coupled tree"],
)  # fmt: skip
def test_rule_that_auto_means(
    make: Callable[..., Watched], drafts: int, options: dict[str, Any], params: SamplingParams,
    rule: set[str],
) -> None:  # fmt: skip
    engine = make(drafts, **options)
    rule_for, found = engine.verifier.rule_for, set()

    def seen(law: Any, trees: Any) -> str:
        name = rule_for(law, trees)
        if any(len(tree) for tree in trees):
            found.add(name)
        return name

    engine.verifier.rule_for = seen  # type: ignore[method-assign]
    texts(engine, PROMPTS[:1], params)
    assert found <= rule
    assert found


# --- plug-ins that break the protocol


def broken(tree: Any, **change: Any) -> Proposer:
    class Broken(Fixed):
        name = "plug-in"

        def propose(self, sequences: Any, budgets: Any, noise: Any) -> Any:
            del sequences, budgets, noise
            return tree

    found = Broken(chain(1))
    for name, value in change.items():
        setattr(found, name, value)
    return found


CPU = torch.device("cpu")
WRONG: list[tuple[Any, str]] = [
    (None, "expected a list of 1 trees, got NoneType"),
    ([], "expected a list of 1 trees, got 0 of them"),
    ([chain(1)] * 2, "expected a list of 1 trees, got 2 of them"),
    (["1 2"], "expected TokenTrees, got str"),
    ([chain(1, 2, 3, 4, 5)], "a tree of 5 nodes: expected at most 4"),
    ([chain(1, 10)], "token 10: expected 0 to 9, the target's vocabulary"),
    ([chain(-1)], "token -1: expected 0 to 9"),
    ([TokenTree(torch.tensor([1, 2]), (-1,))], r"tokens \(2,\) of torch.int64: expected \(1,\)"),
    ([TokenTree(torch.tensor([1.0]), (-1,))], "tokens .* of torch.float32: expected"),
    ([TokenTree(torch.tensor([1, 2]), (-1, 1))], r"parents\[1\]=1: expected -1 or an earlier"),
    ([TokenTree(torch.tensor([1]), [-1])], "parents and draws: expected tuples"),  # type: ignore[arg-type]
    ([TokenTree.chain(torch.tensor([1]), torch.ones(1, 9))], r"laws \(1, 9\): expected \(rows, 10"),
    ([TokenTree.chain(torch.tensor([1]), torch.ones(2, 10))], "2 laws for 1 nodes"),
    ([replace(chain(1, 2), draws=((0, Law("point")),))], "nothing drew node 1"),
    ([replace(chain(1), draws=((1, Law("point")),))], "a draw of node 1: expected 0 to 0"),
    ([replace(chain(1), draws=((0, Law("some")),))], "a law of kind 'some'"),  # type: ignore[arg-type]
    ([replace(chain(1), draws=((0, Law("iid", 0)),))], "a draw from law 0 of kind 'iid'"),
    ([replace(chain(1), tokens=torch.zeros(1, dtype=torch.long, device="meta"))], "tokens on meta"),
]


@pytest.mark.parametrize(("trees", "message"), WRONG, ids=[m[:30] for _, m in WRONG])
@pytest.mark.parametrize("is_member", [False, True], ids=["alone", "member"])
def test_plug_in_that_breaks_the_protocol_is_named(
    trees: Any, message: str, is_member: bool
) -> None:
    plug_in: Proposer = broken(trees, law="sampled")
    proposer = EnsembleProposer([plug_in]) if is_member else plug_in
    engine = Watched(certain([1]), proposer=proposer, num_draft_tokens=4, kv_memory=1 << 22)
    engine.add_request([9], SamplingParams(40, 0))
    with pytest.raises(InvalidArgumentError, match=f"proposer='plug-in' broke the .*{message}"):
        engine.step()
    engine.group.check_integrity()
    engine.abort_all()
    assert engine.group.used == 0


def test_tree_that_is_too_deep_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in = broken([chain(1, 2, 3)])
    engine = Watched(certain([1]), proposer=plug_in, num_draft_tokens=4, kv_memory=1 << 22)
    monkeypatch.setattr(plug_in, "nodes_within", lambda _: 9)  # 9 would be refused when it joins
    engine.add_request([9], SamplingParams(3, 0))
    with pytest.raises(InvalidArgumentError, match="a tree of depth 3: expected at most 2, as 3 t"):
        engine.step()
    engine.abort_all()


def test_point_proposer_with_laws_is_named() -> None:
    plug_in = broken([TokenTree.chain(torch.tensor([1]), torch.full((1, 10), 0.1))])
    engine = Watched(certain([1]), proposer=plug_in, num_draft_tokens=4, kv_memory=1 << 22)
    engine.add_request([9], SamplingParams(40, 0))
    with pytest.raises(InvalidArgumentError, match="with laws: expected none, as its law is 'poi"):
        engine.step()
    engine.abort_all()


# --- what is refused


@pytest.mark.parametrize(
    ("drafts", "options", "message"),
    [
        (1, {"proposer": []}, r"proposer=\[\]: expected a list of names and Proposers"),
        (0, {"proposer": [3]}, "expected a list of names and Proposers"),
        (0, {"proposer": {"ngram"}}, "expected a list of names and Proposers"),
        (0, {"proposer": ["ngram", "nobody"]}, "proposer='nobody': expected one of"),
        (0, {"proposer": ["ngram", "ensemble"]}, "an ensemble cannot be in an ensemble"),
        (0, {"proposer": ["draft", "ngram"]}, "1 of them need a draft, 0 came"),
        (1, {"proposer": ["ngram", "suffix"]}, "0 of them need a draft, 1 came"),
        (1, {"proposer": ["draft", "tree"]}, "2 of them need a draft, 1 came"),
        (2, {"proposer": "ngram"}, "proposer='ngram' has no use for a draft"),
        (2, {"tree": (2,), "proposer": ["draft", "tree"]}, "expected proposer='tree' or none"),
        (2, {"proposer": ["draft", "draft"], "proposer_options": {"draft": {}}},
         "'draft' is there several times: expected options by member, for draft-1, draft-2, or"),
        (1, {"proposer": ["draft", "ngram"], "proposer_options": {"temperature": 1}},
         "'temperature' is no member: expected options by member, for draft, ngram, or shares"),
        (1, {"proposer": ["draft", "ngram"], "proposer_options": {"ngram": 3}},
         r"proposer_options\['ngram'\]=3: expected a mapping"),
        (1, {"proposer": ["draft", "ngram"], "proposer_options": {"ngram": {"size": 3}}},
         "'size' is no option of proposer='ngram'"),
        (1, {"proposer": ["draft", "ngram"], "proposer_options": {"shares": {"draft": 1}}},
         "expected a number for each of draft, ngram"),
        (1, {"proposer": ["draft", "ngram"], "proposer_options": {"shares": [1, 2]}},
         r"shares=\[1, 2\]: expected a number for each"),
        (1, {"proposer": ["draft", "ngram"],
             "proposer_options": {"shares": {"draft": 0, "ngram": 1}}},
         r"shares\['draft'\]=0: expected a positive number"),
        (2, {"proposer_options": {"heat": 1}}, "'heat' is no option of proposer='draft'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(
    make: Callable[..., Watched], drafts: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make(drafts, **options)


def test_members_that_do_not_fit_are_refused(target: Model, draft: Model) -> None:
    one = Fixed(chain(1))
    with pytest.raises(InvalidArgumentError, match="different objects, one came twice"):
        EnsembleProposer([one, one])
    with pytest.raises(InvalidArgumentError, match="an ensemble in an ensemble"):
        EnsembleProposer([one, EnsembleProposer([Fixed(chain(1))])])
    with pytest.raises(InvalidArgumentError, match="expected one Proposer or more"):
        EnsembleProposer([])
    runner = ModelRunner(draft)
    with pytest.raises(InvalidArgumentError, match="different Runners, one came twice"):
        Engine(target, draft=[runner, runner], kv_memory=KV)


def test_options_reach_their_members(make: Callable[..., Watched]) -> None:
    engine = make(
        2, proposer=["draft", "ngram", "draft"],
        proposer_options={"draft-2": {"temperature": 0.5}, "ngram": {"branches": 3}},
    )  # fmt: skip
    assert isinstance(engine.proposer, EnsembleProposer)
    assert engine.proposer.labels == ["draft-1", "ngram", "draft-2"]
    first, ngram, second = engine.proposer.members
    assert isinstance(ngram, proposers.NgramProposer)
    assert ngram.branches == 3
    assert first.model._own == {}  # type: ignore[attr-defined]
    assert second.model._own == {"temperature": 0.5}  # type: ignore[attr-defined]
    both = make(2, proposer_options={"temperature": 0.5, "shares": {"draft-1": 1, "draft-2": 2}})
    assert isinstance(both.proposer, EnsembleProposer)
    assert all(m.model._own == {"temperature": 0.5} for m in both.proposer.members)  # type: ignore[attr-defined]
    assert both.proposer._split(6) == [2, 4]


def test_wrap_takes_lists(target: Model, draft: Model) -> None:
    ids = torch.tensor([PROMPTS[0]])
    wanted = target.generate(ids, do_sample=False, max_new_tokens=20)
    for options in (
        {"draft": [draft, draft]},
        {"draft": draft, "proposer": ["draft", "ngram"]},
        {"draft": draft, "proposer": "ensemble"},
        {"proposer": [Fixed(chain(45, 67)), "ngram"]},
    ):
        spec = specdec.wrap(target, **options)
        assert torch.equal(spec.generate(ids, do_sample=False, max_new_tokens=20), wanted)


@pytest.mark.parametrize("names", ["draft,ngram", "suffix,ngram,draft"])
def test_list_on_the_command_line(models: Path, names: str) -> None:
    args = ["generate", "def f", "--target", str(models / "target"), "--max-new-tokens", "9"]
    args += ["--draft", str(models / "draft"), "--json"]
    plain, several = (
        json.loads(CliRunner().invoke(main, [*args, *more]).stdout)
        for more in (["--num-draft-tokens", "0"], ["--proposer", names, "--num-draft-tokens", "6"])
    )
    assert several["outputs"] == plain["outputs"]
    assert several["stats"]["drafted"] > plain["stats"]["drafted"] == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ngram,magic", "'--proposer': 'magic' is not "),
        ("ngram,", "'--proposer': '' is not "),
    ],
)
def test_bad_list_on_the_command_line_is_one_line(value: str, message: str) -> None:
    result = CliRunner().invoke(main, ["generate", "x", "--proposer", value])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_more_is_accepted_than_by_a_member_alone(make: Callable[..., Watched]) -> None:
    """Greedy, each step of the ensemble goes at least as far as any member would from there."""
    rates = []
    for proposer in ("draft", ["draft", "ngram"]):
        engine = make(1, proposer=proposer, num_draft_tokens=4 if proposer == "draft" else 8)
        texts(engine, PROMPTS, SamplingParams(60, 0))
        rates.append(engine.stats.tokens_per_target_pass)
    assert rates[1] >= rates[0]
    assert not math.isnan(rates[0])
