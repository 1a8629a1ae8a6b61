"""Lookahead decoding: window and pool are those of the published procedure, step by step."""

import random
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec import Engine, SamplingParams, TokenTree
from specdec.errors import InvalidArgumentError
from specdec.proposers import lookahead
from specdec.proposers.lookahead import LookaheadProposer, Pool
from specdec.rng import Noise
from specdec.sequence import Sequence
from specdec.toy import TableRunner, random_table

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

KV = 1 << 20
V = 16
PROMPT = [3, 9, 4, 3, 9, 4, 3, 9]
GREEDY = SamplingParams(max_new_tokens=60, temperature=0)
SAMPLED = SamplingParams(max_new_tokens=60)
SHAPES = [(7, 5, 7), (4, 3, 2), (3, 2, 1), (1, 5, 2), (2, 6, 3), (5, 4, 1)]
each_shape = pytest.mark.parametrize(("window", "ngram", "guesses"), SHAPES)


def engine_of(runner: Any, **options: Any) -> Engine:
    return Engine(
        runner, proposer="lookahead", proposer_options=options, policy="constant", kv_memory=KV
    )


def table(order: int | None = None, concentration: float = 0.05) -> TableRunner:
    """By default every context has a law of its own: a row that saw a wrong one shows."""
    return TableRunner(random_table(V, order=order, seed=5, concentration=concentration), V)


def cycle() -> TableRunner:
    """After token t comes t + 1, for certain."""
    return TableRunner(lambda context: np.eye(V)[(context[-1] + 1) % V if context else 0], V)


def state_of(engine: Engine, sequence: Sequence) -> Any:
    assert isinstance(engine.proposer, LookaheadProposer)
    return engine.proposer._states[sequence]


def rows_of(columns: list[list[int]]) -> list[list[int]]:
    """The window as the paper writes it: row 0 without the last committed token."""
    levels = len(columns[-1])
    assert {len(column) for column in columns} == {levels}
    rows = [[column[level] for column in columns] for level in range(levels)]
    return [rows[0][1:], *rows[1:]]


class Published:
    """The published procedure in rows, one sequence; every entry's context is written out."""

    def __init__(self, runner: TableRunner, row0: list[int], W: int, N: int, G: int) -> None:
        self.runner, self.W, self.N, self.G = runner, W, N, G
        self.rows = [row0]
        self.pool: dict[int, list[tuple[int, ...]]] = {}
        self.read = 0

    def following(self, context: list[int]) -> int:
        return int(self.runner.law(tuple(context)).argmax())

    def read_text(self, tokens: list[int]) -> None:
        for end in range(self.read + 1, len(tokens) + 1):
            if end >= self.N:
                gram = tokens[end - self.N : end]
                self.insert(gram[0], tuple(gram[1:]))
        self.read = len(tokens)

    def insert(self, key: int, value: tuple[int, ...]) -> None:
        values = self.pool.setdefault(key, [])
        if value in values:
            values.remove(value)
        elif len(values) == self.G:
            values.pop(0)
        values.append(value)

    def last_row_s_argmax(self, tokens: list[int]) -> list[int]:
        """Entry (l, j) sees x0, row 0 up to (0, j), and its own column."""
        row0 = [tokens[-1], *self.rows[0]]
        if len(self.rows) == 1:
            return [self.following(tokens + row0[1 : j + 1]) for j in range(len(row0))]
        return [
            self.following(tokens + row0[1 : j + 1] + [row[j] for row in self.rows[1:]])
            for j in range(len(self.rows[-1]))
        ]

    def step(self, tokens: list[int]) -> None:
        new = self.last_row_s_argmax(tokens)
        if len(self.rows) < self.N - 1:
            self.rows = [row[1:] for row in self.rows] + [new[1:]]
            return
        key = [tokens[-1], *self.rows[0]]
        for j in range(self.W):
            self.insert(key[j], (*(row[j] for row in self.rows[1:]), new[j]))
        shifted = [*self.rows[1:], new]
        self.rows = [shifted[0][1:], *shifted[1:]]


@each_shape
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("order", [None, 1], ids=["whole", "one"])
def test_window_and_pool_follow_the_published_procedure(
    window: int, ngram: int, guesses: int, params: SamplingParams, order: int | None
) -> None:
    runner = table(order)
    engine = engine_of(runner, window=window, ngram=ngram, guesses=guesses)
    engine.add_request(PROMPT, params, seed=2)
    [sequence] = engine.scheduler.running
    state = state_of(engine, sequence)
    row0 = [column[0] for column in state.columns[1:]]
    assert len(row0) == window + ngram - 3
    twin = Published(runner, row0, window, ngram, guesses)
    deepest = window + ngram - 2
    steps = 0
    while sequence.remaining > deepest:  # from there on columns are left out
        twin.read_text(sequence.tokens)
        twin.step(sequence.tokens)
        engine.step()
        engine.group.check_integrity()
        steps += 1
        state.columns[0][0] = sequence.tokens[-1]
        assert rows_of(state.columns) == twin.rows
        assert {k: list(v) for k, v in state.pool._grams.items()} == twin.pool
        if steps == ngram - 2:  # warm-up
            assert [len(row) for row in twin.rows] == [window - 1] + [window] * (ngram - 2)
    assert steps > 5
    engine.abort_all()


@each_shape
def test_tree_holds_the_window_and_the_grams(window: int, ngram: int, guesses: int) -> None:
    engine = engine_of(table(1), window=window, ngram=ngram, guesses=guesses)
    engine.add_request(PROMPT, SamplingParams(max_new_tokens=150, temperature=0))
    [sequence] = engine.scheduler.running
    assert isinstance(engine.proposer, LookaheadProposer)
    full = (ngram - 1) * (window + guesses) - 1
    assert engine.proposer.preferred_nodes >= full
    sizes: list[int] = []
    for _ in range(ngram + 8):
        [tree] = engine.proposer.propose([sequence], [255], engine.noise)
        assert len(tree) <= (engine.proposer.preferred_nodes if len(sizes) < ngram - 2 else full)
        sizes.append(len(tree))
        TokenTree.build(tree.tokens, tree.parents)
        paths = set(paths_of(tree))
        state = state_of(engine, sequence)
        for gram in state.pool.get(sequence.tokens[-1]):
            assert gram in paths
        trunk: tuple[int, ...] = ()
        for j, column in enumerate(state.columns):
            trunk = trunk if j == 0 else (*trunk, column[0])
            assert (*trunk, *column[1:]) in paths | {()}
        engine.step()
    assert max(sizes) > 0
    engine.abort_all()


def paths_of(tree: TokenTree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


# --- what it gains


@pytest.mark.parametrize("ngram", [2, 3, 5])
def test_a_whole_gram_emits_one_token_more(ngram: int) -> None:
    engine = engine_of(cycle(), window=1, ngram=ngram, guesses=1)
    engine.add_request([*range(V), 0, 1], SamplingParams(max_new_tokens=40, temperature=0))
    for _ in range(6):
        [record] = engine.step()
        assert (record.accepted, len(record.tokens)) == (ngram - 1, ngram)
    engine.abort_all()


def test_trajectories_alone_find_the_grams() -> None:
    engine = engine_of(cycle(), window=7, ngram=5, guesses=7, pool_from_prompt=False)
    engine.add_request([2, 3], SamplingParams(max_new_tokens=60, temperature=0))
    [out] = engine
    assert list(out.token_ids) == [(4 + i) % V for i in range(60)]
    assert out.stats.accepted > 30


# --- the pool


def test_pool_keeps_the_latest_grams_of_a_token() -> None:
    pool = Pool(3, 2)
    for rest in ((1, 1), (2, 2), (1, 1), (3, 3)):
        pool.insert(7, rest)
    assert pool.get(7) == [(1, 1), (3, 3)]
    assert pool.get(8) == []


def test_pool_reads_a_text_once() -> None:
    pool, text = Pool(3, 4), [1, 2, 3, 1, 2, 4]
    for size in (0, 1, 2, 5, 5, 6):
        pool.extend(text[:size])
    assert {key: list(rests) for key, rests in pool._grams.items()} == {
        2: [(3, 1)], 3: [(1, 2)], 1: [(2, 3), (2, 4)],
    }  # fmt: skip


def test_pool_forgets_the_token_that_had_no_news_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "MAX_KEYS", 2)
    pool = Pool(2, 2)
    for first, rest in ((1, 5), (2, 6), (1, 7), (3, 8)):
        pool.insert(first, (rest,))
    assert len(pool) == 2
    assert (pool.get(1), pool.get(2), pool.get(3)) == ([(5,), (7,)], [], [(8,)])


def test_text_stays_out_of_the_pool_on_request() -> None:
    engine = engine_of(table(), pool_from_prompt=False)
    engine.add_request(PROMPT, GREEDY)
    engine.step()
    [sequence] = engine.scheduler.running
    assert len(state_of(engine, sequence).pool) == 0
    engine.abort_all()


# --- end tokens


def test_end_token_in_a_column_is_replaced() -> None:
    # token 0 ends; it follows 15, so columns meet it
    engine = engine_of(cycle(), window=4, ngram=3, guesses=2)
    params = SamplingParams(max_new_tokens=40, temperature=0, eos_token_ids=(0,))
    engine.add_request([4, 15, 4, 15, 5], params)
    [sequence] = engine.scheduler.running
    state, replaced = state_of(engine, sequence), 0
    while engine.scheduler.running:
        drawn = state.drawn
        engine.step()
        replaced += state.drawn - drawn
        assert all(0 not in column for column in state.columns)
    assert replaced > 0
    assert sequence.tokens[5:] == [*range(6, 16), 0]
    assert sequence.finish_reason == "stop"
    assert any(0 in rest for rests in state.pool._grams.values() for rest in rests)


# --- budgets, and what runs beside it


def test_budget_goes_to_the_latest_gram_then_to_the_nearest_columns() -> None:
    engine = engine_of(table(), window=2, ngram=3, guesses=2)
    engine.add_request([1, 5, 6, 1, 7, 8, 1], GREEDY)
    [sequence] = engine.scheduler.running
    proposer, state = engine.proposer, state_of(engine, sequence)
    assert proposer is not None
    state.columns = [[1, 10], [11, 12], [13]]  # the last one waited
    order = [(7,), (7, 8), (5,), (5, 6), (10,), (11,), (11, 12)]
    nodes = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 5, 7: 7, 8: 7}
    ends = {5: [4], 6: [4], 7: [4, 6], 8: [4, 6]}
    for budget, count in nodes.items():
        [tree] = proposer.propose([sequence], [budget], engine.noise)
        assert paths_of(tree) == order[:count]
        assert state.ends == ends.get(budget, [])
    engine.abort_all()


def test_nothing_moves_in_a_step_without_a_draft() -> None:
    engine = engine_of(table())
    engine.add_request(PROMPT, GREEDY)
    [sequence] = engine.scheduler.running
    assert engine.proposer is not None
    for _ in range(6):
        engine.step()
    state = state_of(engine, sequence)
    before = [list(column) for column in state.columns]
    [tree] = engine.proposer.propose([sequence], [0], engine.noise)
    assert len(tree) == 0
    verdicts = engine.verifier.verify([sequence], [tree], engine.noise)
    engine.proposer.observe([sequence], verdicts)
    state.columns[0][0] = before[0][0]
    assert state.columns == before
    engine.abort_all()


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_any_budgets_give_the_same_text(params: SamplingParams) -> None:
    wanted = [
        outputs(Engine(table(2), kv_memory=KV, verification="gumbel"), [prompt], params)[0]
        for prompt in (PROMPT, PROMPT[:1], [7, 7, 7])
    ]
    engine = Engine(
        table(2), proposer="lookahead", policy="constant", kv_memory=KV, verification="gumbel",
        proposer_options={"window": 4, "ngram": 4, "guesses": 3},
    )  # fmt: skip
    assert engine.proposer is not None
    propose, draw = engine.proposer.propose, random.Random(1)

    def some(sequences: Items[Sequence], budgets: Items[int], noise: Noise) -> list[TokenTree]:
        less = [min(budget, draw.choice((0, 1, 5, 9, 255))) for budget in budgets]
        trees = propose(sequences, less, noise)
        assert all(len(tree) <= budget for tree, budget in zip(trees, less, strict=True))
        return trees

    engine.proposer.propose = some  # type: ignore[method-assign]
    assert outputs(engine, [PROMPT, PROMPT[:1], [7, 7, 7]], params) == wanted
    assert engine.stats.accepted > 0


def outputs(
    engine: Engine, prompts: list[list[int]], params: SamplingParams
) -> list[tuple[int, ...]]:
    names = [engine.add_request(prompt, params, seed=4) for prompt in prompts]
    while engine.scheduler.running:
        engine.step()
        engine.group.check_integrity()
    by_name = {out.id: out.token_ids for out in engine.take_finished()}
    return [by_name[name] for name in names]


def test_sequences_warm_up_each_on_its_own() -> None:
    params = SamplingParams(max_new_tokens=24, temperature=0)
    prompts = [PROMPT, [7], [0, 5, 6, 5, 6]]
    alone = [outputs(Engine(table(), kv_memory=KV), [prompt], params)[0] for prompt in prompts]
    engine = engine_of(table())
    names = []
    for prompt in prompts:
        names.append(engine.add_request(prompt, params))
        engine.step()
        engine.step()
    found = {out.id: out.token_ids for out in engine}
    assert [found[name] for name in names] == alone
    assert isinstance(engine.proposer, LookaheadProposer)
    assert engine.proposer._states == {}


@pytest.mark.parametrize("length", [249, 255, 256])
def test_end_of_the_context(target: Model, length: int) -> None:
    prompt = [5 + i % 30 for i in range(length)]  # of 256
    params = SamplingParams(max_new_tokens=50, temperature=0)
    wanted = outputs(Engine(target, kv_memory=KV), [prompt], params)
    assert outputs(engine_of(target), [prompt], params) == wanted


def test_argmaxes_of_a_batch_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(table())
    for prompt in (PROMPT, [7], [1, 2]):
        engine.add_request(prompt, GREEDY)
    sequences = engine.scheduler.running
    assert engine.proposer is not None
    trees = engine.proposer.propose(sequences, [55] * 3, engine.noise)
    verdicts = engine.verifier.verify(sequences, trees, engine.noise)
    reads: list[torch.Size] = []
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        reads.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    engine.proposer.observe(sequences, verdicts)
    assert reads == [torch.Size([3 * (7 + 5 - 2)])]
    engine.abort_all()


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0: expected a whole number, 1 to 255"),
        ({"ngram": 1}, "ngram=1: expected a whole number, 2 to 255"),
        ({"guesses": 0}, "guesses=0: expected a whole number, 1 to 255"),
        ({"guesses": 2.0}, "guesses=2.0: expected a whole number"),
        ({"pool_from_prompt": 1}, "pool_from_prompt=1: expected True or False"),
        ({"window": 33, "ngram": 8}, "window=33, ngram=8, guesses=7: .* 279 nodes, .* at most 255"),
        ({"window": 1, "ngram": 31, "guesses": 1}, "window=1, ngram=31, .*: expected at most 255"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        LookaheadProposer(**options)


def test_largest_tree_is_accepted() -> None:
    assert LookaheadProposer(window=57, ngram=5, guesses=7).preferred_nodes == 255


def test_options_reach_it() -> None:
    engine = engine_of(table(), window=3, ngram=4, guesses=2)
    assert isinstance(engine.proposer, LookaheadProposer)
    assert (engine.proposer.window, engine.proposer.ngram, engine.proposer.guesses) == (3, 4, 2)
