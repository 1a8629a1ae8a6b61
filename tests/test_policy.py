"""Draft lengths: the policies by themselves, and what they may not do."""

import random
from collections import Counter
from collections.abc import Callable, Sequence as Items
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

import specdec
from specdec import Engine, SamplingParams, TokenTree
from specdec.costs import StepCosts
from specdec.errors import InvalidArgumentError
from specdec.policy import (
    ConfidencePolicy,
    ConstantPolicy,
    CostPolicy,
    HeuristicPolicy,
    Policy,
    cost,
    make_policy,
)
from specdec.proposers import NgramProposer, Proposer
from specdec.verifier import Verdict

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

PROMPT = [0, 45, 67, 89, 45, 67]
KV = 1 << 20


class Sketch(NgramProposer):
    """A proposer as a policy sees it; `model` says whether its drafts cost passes."""

    free = False
    model = True
    now = 0

    def draft_rows(self, depth: int) -> tuple[int, ...]:
        return (1,) * depth if self.model else ()

    def situation(self, sequence: Any) -> int:
        del sequence
        return self.now


class Seq:
    """What a policy reads of a sequence."""

    def __init__(self, length: int = 20, remaining: int = 1000) -> None:
        self.tokens, self.remaining = [0] * length, remaining
        self.law: Any = None


def unsteady(sequence: Any) -> bool:
    del sequence
    return False


def none(nodes: int) -> int:
    del nodes
    return 0


def one(nodes: int) -> int:
    return min(1, nodes)


def whole(nodes: int) -> int:
    return nodes


def verdict(accepted: int) -> Verdict:
    tokens = (0,) * (accepted + 1)
    return Verdict(tokens, accepted, tuple(range(accepted)), torch.empty(0))


def costs(draft: float, verify: float = 1.0, per_row: float = 0.0, batch: int = 1) -> StepCosts:
    """Seconds of a drafted level, of a pass, of each of its rows."""
    depths = tuple(range(17))
    return StepCosts(
        batch, 64, depths, tuple(d + 1 for d in depths), tuple(d * draft for d in depths),
        tuple(verify + (d + 1) * per_row for d in depths),
    )  # fmt: skip


def cost_policy(known: StepCosts | None, most: int | None = None) -> CostPolicy:
    policy = CostPolicy(most)
    policy.join(Sketch(), lambda *_: known, unsteady)
    return policy


def advance(policy: Policy, sequence: Any, accepts: Callable[[int], int], room: int = 100) -> int:
    """One step of one sequence; the nodes planned."""
    policy.prepare([sequence])
    [nodes] = policy.plan([sequence], [room])
    accepted = accepts(nodes)
    tree = TokenTree.chain(torch.zeros(nodes, dtype=torch.long))
    policy.observe([sequence], [tree], [verdict(accepted)])
    sequence.tokens += [0] * (accepted + 1)
    return nodes


def best_by_hand(rate: float, known: StepCosts) -> int:
    """Leviathan et al. 2023, section 3.3: tokens of a step over its seconds."""

    def speed(depth: int) -> float:
        tokens = sum(rate**d for d in range(depth + 1))
        return tokens / (known.draft_seconds(depth, 0) + known.verify_seconds(depth + 1, 0))

    return max(range(17), key=speed)


# --- the cost model


@pytest.mark.parametrize("draft", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("rate", [0.3, 0.6, 0.8, 0.95])
def test_known_acceptance_gives_the_best_length(rate: float, draft: float) -> None:
    known = costs(draft, 0.95, 0.05)
    policy, sequence = cost_policy(known), Seq()
    draw = torch.Generator().manual_seed(3)

    def accepts(nodes: int) -> int:
        kept = (torch.rand(nodes, generator=draw) < rate).long().cumprod(0)
        return int(kept.sum())

    planned = [advance(policy, sequence, accepts) for _ in range(400)][100:]
    best = best_by_hand(rate, known)

    def speed(depth: int) -> float:
        tokens = sum(rate**d for d in range(depth + 1))
        return tokens / (known.draft_seconds(depth, 0) + known.verify_seconds(depth + 1, 0))

    got = sum(sum(rate**d for d in range(n + 1)) for n in planned) / sum(
        known.draft_seconds(n, 0) + known.verify_seconds(n + 1, 0) for n in planned
    )
    assert got > 0.95 * speed(best)


def test_hopeless_draft_costs_little() -> None:
    known = costs(0.2, 0.95, 0.05)
    policy, sequence = cost_policy(known), Seq()
    planned = [advance(policy, sequence, none) for _ in range(128)]
    spent = sum(known.draft_seconds(n, 0) + known.verify_seconds(n + 1, 0) for n in planned)
    assert spent < 1.03 * 128 * known.verify_seconds(1, 0)
    assert 0 < sum(n > 0 for n in planned[20:]) < 5  # it is tried again, ever more rarely


def test_waits_for_a_try_go_on_in_the_next_text_where_texts_learn_from_each_other() -> None:
    def tries(steady: bool) -> list[int]:
        """Drafts of each of four hopeless texts."""
        policy = CostPolicy()
        policy.join(Sketch(), lambda *_: costs(0.5), lambda _: steady)
        found = []
        for _ in range(4):
            sequence = Seq()
            found.append(sum(advance(policy, sequence, none) > 0 for _ in range(100)))
            policy.forget(sequence)  # type: ignore[arg-type]
        return found

    apart = tries(False)
    assert len(set(apart)) == 1
    assert sum(tries(True)[1:]) <= 3 < apart[0]


def test_draft_that_became_good_is_found_again() -> None:
    policy, sequence = cost_policy(costs(0.08)), Seq()
    for _ in range(40):
        advance(policy, sequence, none)
    planned = [advance(policy, sequence, whole) for _ in range(150)]
    assert planned[-1] >= 8


def test_draft_dearer_than_the_target_is_left_alone() -> None:
    policy, sequence = cost_policy(costs(1.5)), Seq()
    planned = [advance(policy, sequence, whole) for _ in range(20)]
    assert sum(planned) == 0


def test_room_and_limit_are_kept_to() -> None:
    policy, sequence = cost_policy(costs(0.001), most=6), Seq()
    planned = [advance(policy, sequence, whole) for _ in range(30)]
    assert planned[-1] == 6
    assert advance(policy, sequence, whole, room=2) == 2
    assert advance(policy, sequence, whole, room=0) == 0


def test_choice_holds_for_a_few_steps_once_enough_was_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, sequence = cost_policy(costs(0.001), most=6), Seq()
    policy._kinds = 1  # one situation
    chosen: list[int] = []
    choose = policy._best_alone

    def counted(*arguments: Any) -> int:
        chosen.append(choose(*arguments))
        return chosen[-1]

    monkeypatch.setattr(policy, "_best_alone", counted)
    for _ in range(20):
        advance(policy, sequence, whole)
    assert 5 < len(chosen) < 12
    asked = len(chosen)
    planned = [advance(policy, sequence, whole, room=n) for n in (2, 6, 0, 6, 1, 6)]
    assert planned == [2, 6, 0, 6, 1, 6]  # a short room does not hold for what comes after it
    assert len(chosen) <= asked + 2


class Lone(Sketch):
    """Tells no situations apart, as a draft model: what a step led to is known at its end."""

    situation = Proposer.situation


def test_a_situation_that_is_known_already_is_not_looked_for_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = random.Random(0)
    accepts = [draw.choice((0, 1, 9, 9) if i % 100 > 40 else (0, 0, 0, 1)) for i in range(300)]
    planned, looked = [], []
    for proposer in (Sketch(), Lone()):
        policy, sequence = CostPolicy(), Seq(remaining=10_000)
        policy.join(proposer, lambda *_: costs(0.3, 0.9, 0.02), unsteady)
        find, count = policy._find_situation, Counter[bool]()

        def counted(*arguments: Any, find: Any = find, count: Any = count) -> Any:
            count[True] += 1
            return find(*arguments)

        monkeypatch.setattr(policy, "_find_situation", counted)
        planned.append(
            [advance(policy, sequence, lambda n, most=most: min(n, most)) for most in accepts]  # type: ignore[misc]
        )
        looked.append(count[True])
    assert planned[0] == planned[1]
    assert len(set(planned[0])) >= 3
    assert looked[0] == 300
    assert looked[1] < 150


def test_unknown_costs_mean_the_default_length() -> None:
    policy, sequence = cost_policy(None), Seq()
    assert [advance(policy, sequence, one) for _ in range(3)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("draft", "model", "planned"),
    [(0.6, True, 1), (0.75, True, 1), (0.8, True, 0), (0.6, False, 1), (0.75, False, 0)],
)
def test_a_tenth_of_what_a_models_draft_costs_is_in_doubt(
    draft: float, model: bool, planned: int
) -> None:
    """At first 1.65 tokens are expected of a draft of one, and 3 % below plain decoding will do."""
    policy, proposer = CostPolicy(1), Sketch()
    proposer.model = model
    policy.join(proposer, lambda *_: costs(draft), unsteady)
    assert advance(policy, Seq(), none) == planned


def test_hopeless_draft_of_a_model_is_not_made_be_it_ever_so_cheap() -> None:
    policy, sequence = cost_policy(costs(0.08)), Seq()
    planned = [advance(policy, sequence, none) for _ in range(200)]
    assert sum(planned[100:]) < 10


def test_deeper_draft_of_a_model_must_promise_more() -> None:
    """The second level of 0.65 adds 0.42 tokens to 1.65: 1 % more per second is not enough."""
    for level, planned in ((0.32, 1), (0.28, 2)):
        known = costs(level)
        speeds = [1.65 / (1 + level), (1.65 + 0.65**2) / (1 + 2 * level)]
        assert (speeds[1] / speeds[0] > 1.02) == (planned == 2)
        assert advance(cost_policy(known, most=2), Seq(), none) == planned
        assert speeds[1] > speeds[0]


def test_each_situation_is_learnt_apart() -> None:
    policy, proposer, sequence = CostPolicy(), Sketch(), Seq()
    proposer.model = False
    policy.join(proposer, lambda *_: costs(0.0, 0.9, 0.1), unsteady)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for step in range(120):
        proposer.now = step % 2
        seen[proposer.now].append(advance(policy, sequence, whole if proposer.now else none))
    assert min(seen[1][10:]) > 8
    assert sum(seen[0][15:]) < 12


def test_runs_of_a_model_are_learnt() -> None:
    """A draft that is right in every second step drafts then, and hardly between."""
    policy, sequence = cost_policy(costs(0.1, 0.9, 0.1)), Seq()
    seen: dict[int, list[int]] = {0: [], 1: []}
    right = 0
    for _ in range(160):
        nodes = advance(policy, sequence, whole if right else none)
        seen[right].append(nodes)
        right = 1 - right if nodes else right
    assert min(seen[1][40:]) > 2 * sum(seen[0][40:]) / len(seen[0][40:])


def test_whole_drafts_are_told_from_those_accepted_in_part() -> None:
    policy, sequence = cost_policy(costs(0.1, 0.9, 0.1)), Seq()
    seen: dict[bool, list[int]] = {True: [], False: []}
    was_whole = False
    for _ in range(200):
        nodes = advance(policy, sequence, one if was_whole else whole)
        seen[was_whole].append(nodes)
        if nodes:
            was_whole = not was_whole and nodes > 1
    after_part, after_whole = (sum(seen[key][-30:]) / 30 for key in (False, True))
    assert after_part > after_whole + 2


def test_missed_context_is_paid_for() -> None:
    """A draft that has a long text to read before its first token must promise more."""
    known = costs(0.1)
    dear = StepCosts(1, 64, known.depths, known.rows, known.draft, known.verify, catch_up=0.05)
    for given, drafts in ((known, True), (dear, False)):
        policy, sequence = cost_policy(given), Seq(length=400, remaining=10)
        assert (advance(policy, sequence, whole) > 0) == drafts


def test_batch_shares_levels_and_each_sequence_keeps_what_pays() -> None:
    policy = cost_policy(costs(0.05, 0.2, 0.2, batch=2))
    sequences: list[Any] = [Seq(), Seq()]
    planned: list[int] = []
    for _ in range(60):
        policy.prepare(sequences)
        planned = policy.plan(sequences, [100, 100])
        trees = [TokenTree.chain(torch.zeros(n, dtype=torch.long)) for n in planned]
        policy.observe(sequences, trees, [verdict(planned[0]), verdict(0)])
    assert planned[0] > 4
    assert planned[1] <= 1


def test_longer_context_changes_the_choice() -> None:
    """Where attention makes every row dear, fewer are drafted."""
    flat = costs(0.02, 0.5, 0.02)
    steep = StepCosts(
        1, 64, flat.depths, flat.rows, flat.draft, flat.verify, verify_row_slope=1e-3
    )  # fmt: skip
    lengths = []
    for context in (64, 2000):
        policy, sequence = cost_policy(steep), Seq(context)
        draw = torch.Generator().manual_seed(0)
        for _ in range(80):
            nodes = advance(
                policy, sequence,
                lambda n: int((torch.rand(n, generator=draw) < 0.8).long().cumprod(0).sum()),  # noqa: B023
            )  # fmt: skip
            lengths.append(nodes)
    assert sum(lengths[40:80]) > 2 * sum(lengths[120:])


def test_forgotten_sequence_starts_anew() -> None:
    policy, sequence = cost_policy(costs(0.1)), Seq()
    first = advance(policy, sequence, none)
    for _ in range(30):
        advance(policy, sequence, none)
    assert sum(advance(policy, sequence, none) for _ in range(5)) <= 1
    policy.forget(sequence)  # type: ignore[arg-type]
    assert advance(policy, sequence, none) == first > 1


def test_one_failure_at_a_depth_does_not_bar_the_way_below() -> None:
    """A copy that breaks off at some depth is tried beyond it again."""
    policy, sequence = cost_policy(costs(0.0, 0.9, 0.02)), Seq()
    for _ in range(6):
        advance(policy, sequence, lambda nodes: min(nodes, 5))
    planned = [advance(policy, sequence, whole) for _ in range(4)]
    assert max(planned) > 8


def test_sequences_whose_text_is_fixed_learn_from_each_other() -> None:
    known = costs(0.2, 0.95, 0.05)
    for steady, wanted in ((True, 0), (False, 2)):
        policy = CostPolicy()
        policy.join(Sketch(), lambda *_: known, lambda _, steady=steady: steady)  # type: ignore[misc]
        planned: list[int] = []
        for _ in range(4):
            sequence = Seq()
            planned = [advance(policy, sequence, none) for _ in range(20)]
            policy.forget(sequence)  # type: ignore[arg-type]
        assert min(planned[0], 2) == wanted
        assert sum(planned) < 3 or not steady


class Copier(Sketch):
    """Free, with drafts of its own length."""

    free, model = True, False
    length = 3


def copier_step(policy: Policy, sequence: Any, length: int, accepts: Callable[[int], int]) -> int:
    policy.prepare([sequence])
    [budget] = policy.plan([sequence], [100])
    tree = TokenTree.chain(torch.zeros(min(budget, length), dtype=torch.long))
    [tree] = policy.cut([sequence], [tree])
    accepted = accepts(len(tree))
    policy.observe([sequence], [tree], [verdict(accepted)])
    return len(tree)


def test_free_draft_is_made_first_and_then_cut() -> None:
    """What a draft costs is known when it is there: a short one is not refused because a long one
    would not pay."""
    policy, sequence = CostPolicy(), Seq()
    policy.join(Copier(), lambda *_: costs(0.0, 0.8, 0.2), unsteady)
    policy.prepare([sequence])  # type: ignore[list-item]
    assert policy.plan([sequence], [100]) == [32]  # type: ignore[list-item]
    assert policy.plan([sequence], [7]) == [7]  # type: ignore[list-item]
    for _ in range(30):
        copier_step(policy, sequence, 12, whole)
    assert copier_step(policy, sequence, 3, whole) == 3
    assert copier_step(policy, sequence, 0, whole) == 0
    sequence = Seq()
    lengths = [copier_step(policy, sequence, 12, one) for _ in range(60)]
    assert sum(lengths[40:]) < 1.3 * 20  # a second token is tried at times


def looks(steps: int, accepts: Callable[[int], int], length: int = 0) -> list[int]:
    """The steps in which a free proposer is asked, of a sequence's first ones."""
    policy, sequence = CostPolicy(), Seq()
    policy.join(Copier(), lambda *_: costs(0.0), unsteady)
    asked = []
    for step in range(steps):
        policy.prepare([sequence])  # type: ignore[list-item]
        [budget] = policy.plan([sequence], [100])  # type: ignore[list-item]
        tree = TokenTree.chain(torch.zeros(min(budget, length), dtype=torch.long))
        trees = policy.cut([sequence], [tree])  # type: ignore[list-item]
        policy.observe([sequence], trees, [verdict(accepts(len(trees[0])))])  # type: ignore[list-item]
        if budget:
            asked.append(step)
    return asked


def test_lookups_that_lead_to_nothing_become_rarer() -> None:
    found = looks(120, none)
    rests = [b - a - 1 for a, b in pairwise(found)]
    assert rests[:25] == [0] * 15 + [1, 2, 3, 4, 5, 6, 7, 7, 7, 7]
    assert max(rests) == 7


def test_a_sequence_behind_fruitless_lookups_rests_sooner() -> None:
    """Where its text is the same whatever is drafted, and a hit gives it all patience."""

    def looked(steady: bool, hit: int) -> list[int]:
        policy = CostPolicy()
        policy.join(Copier(), lambda *_: costs(0.0), lambda _: steady)
        sequence, asked = Seq(), []
        for step in range(140):
            if step == 100:
                policy.forget(sequence)  # type: ignore[arg-type]
                sequence = Seq()
            policy.prepare([sequence])  # type: ignore[list-item]
            [budget] = policy.plan([sequence], [100])  # type: ignore[list-item]
            trees = [TokenTree.empty(torch.device("cpu"))]
            policy.observe([sequence], trees, [verdict(int(step == hit))])  # type: ignore[list-item]
            asked += [step] * (budget > 0)
        return [step for step in asked if step >= 100]

    assert looked(False, -1)[:16] == list(range(100, 116))
    assert looked(True, -1)[:5] == [100, 103, 107, 112, 118]
    assert looked(True, 98)[:15] == list(range(100, 115))


def test_a_lookup_that_helped_ends_the_rests() -> None:
    asked = iter(range(10_000))
    found = looks(200, lambda nodes: int(nodes > 0 and next(asked) == 30), length=1)
    rests = [b - a - 1 for a, b in pairwise(found)]
    helped = next(i for i in range(20, len(rests)) if rests[i] == 0)
    assert rests[helped - 1] > 0
    assert rests[helped : helped + 15] == [0] * 15


def test_lookups_that_help_at_times_do_not_rest() -> None:
    asked = iter(range(10_000))
    found = looks(90, lambda nodes: int(nodes > 0 and next(asked) % 10 == 0), length=1)
    assert len(found) > 80


def test_branches_of_a_free_draft_count_as_rows() -> None:
    wide = TokenTree.build([1, 2, 3, 4], [-1, -1, -1, 0])
    policy, sequence = CostPolicy(), Seq()
    policy.join(Copier(), lambda *_: costs(0.0, 0.2, 0.8), unsteady)
    policy.prepare([sequence])  # type: ignore[list-item]
    [tree] = policy.cut([sequence], [wide])  # type: ignore[list-item]
    assert len(tree) == 0  # one level would cost 2.4 of a pass for at most one token
    policy = CostPolicy()
    policy.join(Copier(), lambda *_: costs(0.0, 0.98, 0.02), unsteady)
    policy.prepare([sequence])  # type: ignore[list-item]
    [tree] = policy.cut([sequence], [wide])  # type: ignore[list-item]
    assert len(tree) == 4


@pytest.mark.parametrize(("share", "kept"), [(0.97, 2), (0.95, 1)])
def test_free_draft_that_is_nearly_as_good_whole_is_not_cut(
    monkeypatch: pytest.MonkeyPatch, share: float, kept: int
) -> None:
    """share: the speed of both tokens as one of the best, which is that of the first alone."""
    monkeypatch.setattr(cost, "_GUESS", 0.5)  # 1, 1.5, 1.75 tokens from one, two, three rows
    best = 1.5 / 1.25
    known = StepCosts(1, 64, (0, 1, 2), (1, 2, 3), (0.0,) * 3, (1.0, 1.25, 1.75 / (share * best)))
    policy, sequence = CostPolicy(), Seq()
    policy.join(Copier(), lambda *_: known, unsteady)
    assert copier_step(policy, sequence, 2, whole) == kept


def test_costs_are_asked_for_again_when_a_sequence_is_over() -> None:
    """The next one may share its law; where there was no room to measure, there may be now."""
    asked: list[Any] = []
    policy, law = CostPolicy(), object()
    policy.join(Sketch(), lambda sequences, _: asked.extend(sequences), unsteady)
    pair = [Seq(), Seq()]
    for sequence in pair:
        sequence.law = law
        for _ in range(2):
            advance(policy, sequence, none)
        policy.forget(sequence)  # type: ignore[arg-type]
    assert asked == pair


# --- the others


def test_heuristic_schedule_is_that_of_transformers() -> None:
    policy, sequence = HeuristicPolicy(5), Seq()
    policy.join(Sketch(), lambda *_: None, unsteady)
    outcomes = [5, 7, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    planned = [advance(policy, sequence, partial(min, a)) for a in outcomes]
    assert planned == [5, 7, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1]
    assert advance(policy, sequence, none) == 3


def test_confidence_keeps_the_token_that_stopped_the_draft(target: Model, draft: Model) -> None:
    """Contract C3: the unlikely token is judged too; only what would follow is not drawn."""
    spec = specdec.wrap(target, draft=draft, policy=ConfidencePolicy(0.4, 8))
    proposer = spec.engine.proposer
    assert proposer is not None
    propose, seen = proposer.propose, []

    def watched(sequences: Any, budgets: Any, noise: Any) -> list[TokenTree]:
        trees = propose(sequences, budgets, noise)
        seen.extend(trees)
        return trees

    proposer.propose = watched  # type: ignore[method-assign]
    options: dict[str, Any] = {
        "max_new_tokens": 60, "do_sample": True, "temperature": 0.3, "seed": 3,
    }  # fmt: skip
    spec.generate(torch.tensor([PROMPT]), **options)
    lengths = set()
    for tree in seen:
        if not len(tree):
            continue
        assert tree.laws is not None
        chances = tree.laws.gather(1, tree.tokens[:, None])[:, 0]
        assert bool((chances[:-1] >= 0.4).all())
        lengths.add(len(tree))
    assert len(lengths) > 2


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_confidence_in_a_ragged_batch_is_greedy_decoding(
    target: Model, draft: Model, threshold: float
) -> None:
    params = SamplingParams(max_new_tokens=14, temperature=0)
    prompts = [PROMPT, [7], [0, *range(20, 60)]]
    texts, drafted = [], []
    for policy in (ConstantPolicy(0), ConfidencePolicy(threshold, 6)):
        engine = Engine(target, draft=draft, policy=policy, kv_memory=KV)
        names = [engine.add_request(p, params) for p in prompts]
        found = {out.id: out.token_ids for out in engine}
        texts.append([found[name] for name in names])
        drafted.append(engine.stats.drafted)
    assert texts[0] == texts[1]
    assert drafted[0] == 0 < drafted[1]


@pytest.mark.parametrize("policy", ["auto", "cost", "heuristic", "confidence", "constant"])
def test_text_is_that_of_plain_decoding(target: Model, draft: Model, policy: str) -> None:
    ids = torch.tensor([PROMPT])
    wanted = specdec.wrap(target).generate(ids, max_new_tokens=40, do_sample=False)
    spec = specdec.wrap(target, draft=draft, policy=policy)
    assert torch.equal(spec.generate(ids, max_new_tokens=40, do_sample=False), wanted)
    noisy: dict[str, Any] = {"max_new_tokens": 40, "do_sample": True, "seed": 9}
    wanted = specdec.wrap(target).generate(ids, **noisy)
    spec = specdec.wrap(target, draft=draft, policy=policy, verification="gumbel")
    assert torch.equal(spec.generate(ids, **noisy), wanted)


def test_equal_seeds_give_equal_text_under_the_cost_model(target: Model, draft: Model) -> None:
    ids = torch.tensor([PROMPT])
    options: dict[str, Any] = {"max_new_tokens": 60, "do_sample": True, "seed": 4}
    spec = specdec.wrap(target, draft=draft)
    first = spec.generate(ids, **options)
    assert torch.equal(spec.generate(ids, **options), first)
    other = specdec.wrap(target, draft=draft)
    assert torch.equal(other.generate(ids, **options), first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clever", "auto"), "policy='clever': expected one of auto, constant"),
        (("auto", -1), "num_draft_tokens=-1: expected a whole number, 0 to 255"),
        (("cost", 256), "num_draft_tokens=256"),
        (("heuristic", True), "num_draft_tokens=True"),
        ((ConstantPolicy(2), 3), "num_draft_tokens=3: expected 'auto' beside a Policy"),
    ],
)
def test_wrong_policy_is_refused(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make_policy(*arguments)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, "high"])
def test_threshold_out_of_range_is_refused(threshold: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"threshold=.*: expected 0 to 1"):
        ConfidencePolicy(threshold)


def test_confidence_needs_a_draft_that_can_stop(target: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="proposer='ngram' cannot stop"):
        specdec.wrap(target, proposer="ngram", policy="confidence")


@pytest.mark.parametrize(
    ("name", "number", "kind"),
    [
        ("auto", "auto", CostPolicy), ("auto", 3, ConstantPolicy), ("cost", 3, CostPolicy),
        ("cost", 0, ConstantPolicy), ("heuristic", 3, HeuristicPolicy),
        ("constant", "auto", ConstantPolicy), ("confidence", 7, ConfidencePolicy),
    ],
)  # fmt: skip
def test_names(name: str, number: Any, kind: type[Policy]) -> None:
    assert type(make_policy(name, number)) is kind


def trees_of(engine: Engine) -> Items[int]:
    return sorted(engine.stats.drafted_lengths)


def test_named_tree_is_kept_to_or_cut_by_measured_costs(target: Model, draft: Model) -> None:
    params = SamplingParams(max_new_tokens=30, temperature=0)
    for policy, whole in (("constant", True), ("auto", False), ("cost", False)):
        engine = Engine(target, draft=draft, tree=(3, 2, 1), policy=policy, kv_memory=KV)
        engine.add_request(PROMPT, params)
        list(engine)
        assert (max(trees_of(engine)) == 15) == whole
        assert set(trees_of(engine)) <= {0, 3, 9, 15}


class Says(Policy):
    """Plans what a test gave."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def plan(self, sequences: Items[Any], rooms: Items[int]) -> list[int]:
        del sequences, rooms
        planned: list[int] = self.found
        return planned


@pytest.mark.parametrize(
    "found", [[-1], [], [1, 2], None, [1.5], [None], ["3"], [True], 3, (3,)], ids=repr
)
def test_plan_that_is_no_number_per_sequence_is_named(
    target: Model, draft: Model, found: Any
) -> None:
    engine = Engine(target, draft=draft, policy=Says(found), kv_memory=KV)
    engine.add_request(PROMPT, SamplingParams(max_new_tokens=8, temperature=0))
    with pytest.raises(InvalidArgumentError, match=r"policy=Says: its plan\(\) gave .* of 1 whole"):
        engine.step()
    engine.abort_all()
    assert engine.group.used == 0


def test_plan_of_more_than_fits_is_cut(target: Model, draft: Model) -> None:
    engine = Engine(target, draft=draft, policy=Says([10**6]), kv_memory=KV)
    engine.add_request(PROMPT, SamplingParams(max_new_tokens=8, temperature=0))
    assert len(next(iter(engine)).token_ids) == 8
    assert 0 < max(engine.stats.drafted_lengths) <= 7
