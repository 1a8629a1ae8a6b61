"""Contract C3 under the cost model: every outcome of every coin, where its depths differ from one
history to the next; and policies that break it."""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence as Items
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch

from specdec import Engine, SamplingParams, TokenTree
from specdec.evals.audit import TOLERANCE, emitted_law
from specdec.evals.enumeration import Comparison
from specdec.evals.planned import SECONDS, Apart, Drafts, MadeUpCosts
from specdec.policy import Measure, Policy, Steady
from specdec.proposers import Proposer
from specdec.rng import Noise, PhiloxNoise
from specdec.sequence import Sequence
from specdec.toy import Table, TableRunner, random_table
from specdec.verifier import Verdict

V = 3
TARGET, DRAFT = random_table(V, order=None, seed=1), random_table(V, order=None, seed=2)
PROMPT = [0, 1, 2, 0, 1]  # repeats itself, so that something can be looked up
# name -> what Engine needs, and the deepest draft
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "token": ({"proposer": "draft", "verification": "token"}, 2),
    "block": ({"proposer": "draft"}, 2),
    "ngram": ({"proposer": "ngram"}, 3),
    "ensemble": ({"proposer": ["draft", "ngram"]}, 4),
    "tree": ({"tree": (2, 1)}, 4),
    "tree, iid": ({"tree": (2, 1), "proposer_options": {"kind": "iid"}}, 4),
    "shape": ({"proposer": "tree", "proposer_options": {"shape": (-1, -1, 0)}}, 3),
    "dynamic tree": (
        {"proposer": "dynamic_tree", "proposer_options": {"nodes": 4, "depth": 2, "top_k": 2}},
        4,
    ),
}
DRAWN_TREES = ("tree", "tree, iid")
each_case = pytest.mark.parametrize("name", CASES)

pytestmark = pytest.mark.usefixtures("one_thread")

MakePolicy = Callable[[Noise, int], Policy]  # with noise that it may not look at


def made_up(_: Noise, most: int) -> Policy:
    return MadeUpCosts(most)


def engine_of(
    name: str, policy: Policy, noise: Noise | None, target: Table = TARGET, draft: Table = DRAFT,
    **more: Any,
) -> Engine:  # fmt: skip
    options = CASES[name][0]
    its = None if name == "ngram" else TableRunner(draft, V)
    runner = TableRunner(target, V)
    return Engine(
        runner, draft=its, policy=policy, noise=noise, kv_memory=1 << 22, grow=True,
        **{**options, **more},
    )  # fmt: skip


def law_of(
    name: str, make_policy: MakePolicy = made_up, *, tokens: int = 3, past: int = 0,
    target: Table = TARGET, draft: Table = DRAFT,
) -> tuple[Comparison, Drafts]:  # fmt: skip
    """The law of the engine's text, and its drafts behind a past of so many tokens. The request
    asks for more than is looked at: what the policy plans always fits."""
    most = CASES[name][1]
    drafts: Drafts = defaultdict(set)

    def make(noise: Noise) -> Engine:
        policy = Apart(partial(make_policy, noise, most))
        policy.drafts = drafts
        return engine_of(name, policy, noise, target, draft)

    tokens += past
    found = emitted_law(make, target, PROMPT, tokens=tokens, new_tokens=tokens + most)
    begin = len(PROMPT) + past
    return found, defaultdict(set, {t: d for t, d in drafts.items() if len(t) >= begin})


def pairs_of(drafts: Drafts) -> set[tuple[int, int]]:
    """(depth drafted, depth verified)"""
    return set().union(*drafts.values())


# --- the contract


@each_case
def test_law_is_the_target_s_at_depths_that_differ(name: str) -> None:
    tokens = 2 if name in DRAWN_TREES else 3  # a tree has many outcomes
    found, drafts = law_of(name, tokens=tokens)
    assert found.error < TOLERANCE
    assert len(found.ours) == V**tokens
    verified = {its for _, its in pairs_of(drafts)}
    assert 0 in verified
    assert len(verified) >= (2 if "tree" in name else 3), verified
    if name == "ngram":  # looked up whole each time, then cut
        assert {whole for whole, _ in pairs_of(drafts)} == {3}
    elif name == "dynamic tree":  # whole, or not at all
        assert verified == {0, 2}
    elif tokens == 3:  # the same text, and another draft: what became of earlier drafts decides
        assert any(len(some) > 1 for some in drafts.values())


class InCompany(MadeUpCosts):
    """As if another sequence stood beside each one, that gets no further."""

    def join(self, proposer: Proposer, measure: Measure, steady: Steady) -> None:
        super().join(proposer, measure, steady)
        self.joined, self.other = proposer, list[Sequence]()

    def both(self, sequences: Items[Sequence]) -> list[Sequence]:
        if not self.other:
            self.other = [copy.copy(sequences[0])]
            self.other[0].tokens = list(sequences[0].tokens)
            self.joined.start(self.other[0])
        return [*sequences, *self.other]

    def prepare(self, sequences: Items[Sequence]) -> None:
        super().prepare(self.both(sequences))

    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        return super().plan(self.both(sequences), [*rooms, *rooms])[:1]

    def cut(self, sequences: Items[Sequence], trees: Items[TokenTree]) -> list[TokenTree]:
        return super().cut(self.both(sequences), [*trees, *trees])[:1]


@pytest.mark.parametrize("name", ["block", "ngram", "ensemble", "shape"])
def test_law_of_a_sequence_that_is_planned_beside_another(name: str) -> None:
    """One depth is chosen for all, and each cut to what pays for it."""
    found, drafts = law_of(name, lambda _, most: InCompany(most))
    assert found.error < TOLERANCE
    verified = {its for _, its in pairs_of(drafts)}
    assert 0 in verified
    assert len(verified) >= 2


# --- behind a past


def fixed(table: Table, past: int, shift: int = 0) -> Table:
    """A table whose first tokens behind the prompt are certain: they have one outcome, and the
    policy has seen something before anything is drawn. shift: away from the target's."""

    def law(context: tuple[int, ...]) -> Items[float]:
        if len(context) >= len(PROMPT) + past:
            return table(context)
        token = (len(context) ** 2 % 5 + shift) % V
        return [float(i == token) for i in range(V)]

    return law


CHEAP = (1.0, 1.2, 1.4)  # a step without a draft is soon tried again


@pytest.mark.parametrize(
    ("name", "seconds", "turn"),
    [
        # after steps without a draft, one token is tried
        ("block", CHEAP, lambda before, now: before[1] == 0 and now[1] > 0),
        # after lookups on end that led to nothing, none is made
        ("ngram", SECONDS, lambda before, now: before[0] > 0 and now[0] == 0),
    ],
)
def test_law_where_a_long_past_decides(
    name: str, seconds: Items[float], turn: Callable[[Any, Any], bool]
) -> None:
    def policy(_: Noise, most: int) -> Policy:
        return MadeUpCosts(most, seconds=seconds)

    def tables(past: int) -> dict[str, Any]:
        return {"target": fixed(TARGET, past), "draft": fixed(DRAFT, past, shift=1)}

    # where the turn comes: nothing in 60 tokens has a second outcome
    law, drafts = law_of(name, policy, tokens=60, **tables(80))
    assert len(law.ours) == 1
    steps = sorted((len(text), pair) for text, [pair] in drafts.items())
    at = next(
        length for (_, before), (length, now) in pairwise(steps)
        if turn(before, now)
    )  # fmt: skip
    past = at - 1 - len(PROMPT)  # the step before it draws already
    found, late = law_of(name, policy, tokens=2, past=past, **tables(past))
    assert found.error < TOLERANCE
    assert len(found.ours) == V**2
    assert len(pairs_of(late)) >= 2


# --- policies that break it


class Wrong(MadeUpCosts):
    """Drops a draft for what it holds, or for what will become of it."""

    def __init__(
        self, most: int, noise: Noise, drops: Callable[[Sequence, TokenTree, Noise], bool]
    ) -> None:
        super().__init__(most)
        self._noise, self._drops = noise, drops

    def cut(self, sequences: Items[Sequence], trees: Items[TokenTree]) -> list[TokenTree]:
        kept = super().cut(sequences, trees)
        for i, (sequence, tree) in enumerate(zip(sequences, kept, strict=True)):
            if len(tree) and self._drops(sequence, tree, self._noise):
                kept[i] = TokenTree.empty(tree.tokens.device)
        return kept


class Foresees(MadeUpCosts):
    """Drafts only where the coin of the first acceptance will be low."""

    def __init__(self, most: int, noise: Noise) -> None:
        super().__init__(most)
        self._noise = noise

    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        planned = super().plan(sequences, rooms)
        low = [has_low_coin(sequence, self._noise, "accept") for sequence in sequences]
        return [nodes if yes else 0 for nodes, yes in zip(planned, low, strict=True)]


def has_low_coin(sequence: Sequence, noise: Noise, purpose: str) -> bool:
    """Of the first drafted node."""
    where = [sequence.seed], [len(sequence.tokens)]
    coins = getattr(noise.step(*where, 2, torch.device("cpu")), purpose)
    coin = coins[:, 1, 0] if purpose == "accept" else coins[:, 1]
    return bool(coin < torch.tensor([0.5]))


def by_value(_: Sequence, tree: TokenTree, __: Noise) -> bool:
    return int(tree.tokens[0]) == 0


def by_coin(purpose: str, sequence: Sequence, _: TokenTree, noise: Noise) -> bool:
    return not has_low_coin(sequence, noise, purpose)


FAULTS: dict[str, MakePolicy] = {
    "a drafted token is dropped for its value": lambda n, most: Wrong(most, n, by_value),
    "a draft is dropped for the coin to come": lambda n, most: Wrong(
        most, n, partial(by_coin, "accept")
    ),
    "nothing is drafted for the coin to come": lambda n, most: Foresees(most, n),
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [*product(("token", "block"), FAULTS), *product(("ensemble", "shape"), [*FAULTS][:1])],
)
def test_policy_that_breaks_the_contract_is_seen(name: str, fault: str) -> None:
    found, _ = law_of(name, FAULTS[fault], tokens=2)
    assert found.error > 1e-3


def test_coin_that_decides_what_of_a_lookup_is_kept_is_seen() -> None:
    """Its tokens are sampled at the rows of the draft: the coin is that of the second one."""
    found, _ = law_of("ngram", lambda n, most: Wrong(most, n, partial(by_coin, "bonus")))
    assert found.error > 1e-3


def test_what_was_looked_up_may_be_dropped_for_its_value() -> None:
    found, drafts = law_of("ngram", FAULTS["a drafted token is dropped for its value"])
    assert found.error < TOLERANCE
    assert (3, 0) in pairs_of(drafts)


# --- the target's own noise


class Watched(MadeUpCosts):
    """Says how deep it lets draft."""

    depths: set[int]

    def observe(
        self, sequences: Items[Sequence], trees: Items[TokenTree], verdicts: Items[Verdict]
    ) -> None:
        super().observe(sequences, trees, verdicts)
        self.depths.update(tree.max_depth for tree in trees)


def texts_of(engine: Engine, together: int) -> list[tuple[int, ...]]:
    texts: dict[str, tuple[int, ...]] = {}
    for begin in range(0, 32, together):
        for seed in range(begin, begin + together):
            params = SamplingParams(max_new_tokens=12)
            engine.add_request(PROMPT, params, seed=seed, request_id=str(seed))
        texts |= {out.id: out.token_ids for out in engine}
    return [texts[str(seed)] for seed in range(32)]


@pytest.mark.parametrize("together", [1, 32])
@each_case
def test_coupled_text_is_plain_sampling_s(name: str, together: int) -> None:
    """Path by path, sequences alone and many that learn from each other: each token is the argmax
    of log p + G, whatever is drafted."""
    policy = Watched(CASES[name][1])
    policy.depths = set()
    engine = engine_of(name, policy, None, verification="gumbel")
    plain = Engine(TableRunner(TARGET, V), kv_memory=1 << 22)
    assert texts_of(engine, together) == texts_of(plain, together)
    assert 0 in policy.depths
    assert len(policy.depths) >= 2


def test_no_policy_can_bias_coupled_text() -> None:
    """Tokens are a function of the noise of their place alone, so there is nothing to break."""
    plain = texts_of(Engine(TableRunner(TARGET, V), kv_memory=1 << 22), 32)
    for make_policy in FAULTS.values():
        noise = PhiloxNoise()
        policy = make_policy(noise, 2)
        assert texts_of(engine_of("block", policy, noise, verification="gumbel"), 32) == plain


def test_sequences_are_planned_apart() -> None:
    """Nothing that one did moves the depths of another."""

    def depths(together: int) -> Drafts:
        policy = Apart(lambda: MadeUpCosts(2))
        texts_of(engine_of("block", policy, None), together)
        return policy.drafts

    assert depths(1) == depths(32)
