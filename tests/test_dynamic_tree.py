"""Dynamic trees: the nodes that the draft thinks most probable, found on the device."""

import itertools
from collections.abc import Sequence as Items
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import Engine, SamplingParams, TokenTree
from specdec.errors import InvalidArgumentError
from specdec.proposers import DynamicTreeProposer
from specdec.rng import PhiloxNoise
from specdec.runner import SequenceRows
from specdec.toy import Table, TableRunner, random_table

pytestmark = pytest.mark.usefixtures("one_thread")

V = 5
PROMPT = (1, 2, 0)
SAMPLED = SamplingParams(max_new_tokens=20, temperature=1.0)
Path = tuple[int, ...]


def engine_of(
    draft: Table, vocab_size: int = V, limit: int | None = None, **options: Any
) -> Engine:
    target = TableRunner(random_table(vocab_size, order=None, seed=9), vocab_size)
    target.max_positions = limit
    return Engine(
        target, draft=TableRunner(draft, vocab_size, max_positions=limit), kv_memory=1 << 20,
        proposer="dynamic_tree", proposer_options=options, policy="constant",
    )  # fmt: skip


def proposed(engine: Engine, budget: int, params: SamplingParams = SAMPLED) -> TokenTree:
    engine.add_request(list(PROMPT), params, seed=3)
    assert engine.proposer is not None
    [tree] = engine.proposer.propose(engine.scheduler.running, [budget], engine.noise)
    engine.group.check_integrity()
    engine.abort_all()
    return tree


def paths(tree: TokenTree) -> list[Path]:
    found: list[Path] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def by_the_book(
    table: Table, nodes: int, depth: int, top_k: int, sharpness: float = 1.0
) -> set[Path]:
    """EAGLE-2's expansion and reranking in plain Python; no ties."""

    def probability(path: Path) -> float:
        value = 1.0
        for i, token in enumerate(path):
            powers = [chance**sharpness for chance in table((*PROMPT, *path[:i]))]
            value *= powers[token] / sum(powers)
        return value

    frontier: list[Path] = [()]
    seen: list[Path] = []
    for _ in range(depth):
        level = []
        for path in frontier:
            law = table((*PROMPT, *path))
            level += [(*path, x) for x in sorted(range(len(law)), key=lambda x: -law[x])[:top_k]]
        seen += level
        frontier = sorted(level, key=lambda path: -probability(path))[:top_k]
    return set(sorted(seen, key=lambda path: (-probability(path), len(path)))[:nodes])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("nodes", "depth", "top_k"),
    [(10, 4, 3), (6, 2, 2), (24, 3, 4), (5, 5, 1), (1, 3, 2), (12, 1, 9)],
)
def test_tree_is_that_of_the_definition(seed: int, nodes: int, depth: int, top_k: int) -> None:
    table = random_table(V, order=None, seed=seed, concentration=0.6)
    tree = proposed(engine_of(table, nodes=nodes, depth=depth, top_k=top_k), nodes)
    assert set(paths(tree)) == by_the_book(table, nodes, depth, min(top_k, V, nodes))
    assert len(set(paths(tree))) == len(tree)
    assert tree.laws is None
    assert list(tree.depths) == sorted(tree.depths)


@pytest.mark.parametrize("seed", range(3))
def test_wide_search_finds_the_best_tree_there_is(seed: int) -> None:
    table = random_table(V, order=None, seed=seed)
    tree = proposed(engine_of(table, nodes=12, depth=3, top_k=25), 12)

    def expected(some: Items[Path]) -> float:
        total = 0.0
        for path in some:
            value = 1.0
            for i, token in enumerate(path):
                value *= table((*PROMPT, *path[:i]))[token]
            total += value
        return total

    every = [path for d in (1, 2, 3) for path in itertools.product(range(V), repeat=d)]
    best = sorted((expected([path]) for path in every), reverse=True)[:12]
    assert expected(paths(tree)) == pytest.approx(sum(best), rel=1e-5)


def test_ties_prefer_the_shallower_node() -> None:
    def table(context: tuple[int, ...]) -> tuple[float, ...]:
        if len(context) == len(PROMPT):
            return (0.5, 0.5, 0.0, 0.0, 0.0)
        return (0.0, 0.0, 1.0, 0.0, 0.0)  # a child as probable as its parent

    engine = engine_of(table, nodes=9, depth=3, top_k=2)
    assert set(paths(proposed(engine, 2))) == {(0,), (1,)}
    assert set(paths(proposed(engine, 4))) == {(0,), (1,), (0, 2), (1, 2)}
    # tokens without mass are never drafted, whatever the budget
    assert len(proposed(engine, 9)) == 6


@pytest.mark.parametrize(
    ("temperature", "sharpness", "power"),
    [(0.0, None, 2.0), (0.0, 1.0, 1.0), (1.0, None, 1.0), (1.0, 0.5, 0.5)],
)
def test_sharpness_says_how_sure_a_probability_is(
    temperature: float, sharpness: float | None, power: float
) -> None:
    table = random_table(V, order=None, seed=2)
    params = SamplingParams(max_new_tokens=20, temperature=temperature)
    engine = engine_of(table, nodes=10, depth=4, top_k=3, sharpness=sharpness)
    tree = proposed(engine, 10, params)
    assert set(paths(tree)) == by_the_book(table, 10, 4, 3, power)
    others = {1.0, 2.0} - {power}
    assert any(set(paths(tree)) != by_the_book(table, 10, 4, 3, other) for other in others)


def test_coupled_tree_follows_the_noise_of_the_positions() -> None:
    table = random_table(V, order=None, seed=5)
    tree = proposed(engine_of(table, nodes=6, depth=3, top_k=2, kind="coupled"), 6)
    noise = PhiloxNoise().gumbel([3] * 3, [3, 4, 5], V, torch.device("cpu"))
    path: Path = ()
    for row in noise:
        score = torch.tensor(table((*PROMPT, *path))).log() + row
        path = (*path, int(score.argmax()))
        assert path in paths(tree)


def test_draft_runs_once_per_level_and_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(random_table(V, order=None, seed=1), nodes=10, depth=4, top_k=3)
    assert isinstance(engine.proposer, DynamicTreeProposer)
    runner, rows = engine.proposer.model.runner, list[int]()
    score = runner.score

    def counted(passed: Items[SequenceRows]) -> Tensor:
        rows.append(sum(len(r.tokens) + (0 if r.nodes is None else len(r.nodes)) for r in passed))
        return score(passed)

    runner.score = counted  # type: ignore[method-assign, assignment]
    for seed in range(2):  # two sequences still read once
        engine.add_request(list(PROMPT), SAMPLED, seed=seed)
    reads: list[tuple[int, ...]] = []
    tolist = Tensor.tolist

    def read(values: Tensor) -> Any:
        reads.append(tuple(values.shape))
        return tolist(values)

    monkeypatch.setattr(Tensor, "tolist", read)
    before = [s.cache.computed_len(runner) for s in engine.scheduler.running]
    trees = engine.proposer.propose(engine.scheduler.running, [10, 7], engine.noise)
    monkeypatch.undo()
    assert [len(tree) for tree in trees] == [10, 7]
    assert rows == [2 * n for n in (3, 3, 6, 9)]
    assert engine.proposer.draft_rows(9) == (1, 3, 6, 9)
    assert (2, 17) in reads
    # nothing of the side lines is left in the draft's cache
    after = [s.cache.computed_len(runner) for s in engine.scheduler.running]
    assert (before, after) == ([0, 0], [len(PROMPT)] * 2)
    engine.abort_all()


@pytest.mark.parametrize(("room", "nodes"), [(0, 0), (1, 1), (3, 3), (4, 10), (9, 10)])
def test_budget_near_the_end_keeps_the_tree_shallow(room: int, nodes: int) -> None:
    table = random_table(V, order=None, seed=1)
    engine = engine_of(table, nodes=10, depth=4, top_k=3)
    assert engine.proposer is not None
    assert engine.proposer.nodes_within(room) == nodes
    assert proposed(engine, nodes).max_depth <= room


def test_end_of_the_context() -> None:
    engine = engine_of(random_table(V, order=1, seed=1), limit=30, nodes=4, depth=6, top_k=5)
    plain = Engine(TableRunner(random_table(V, order=None, seed=9), V), kv_memory=1 << 20)
    texts = []
    for its, new in ((engine, 99), (plain, 28)):
        its.add_request(list(PROMPT), SamplingParams(max_new_tokens=new, temperature=0))
        texts.append([out.token_ids for out in its])
    assert texts[0] == texts[1]


def test_cut_law_gives_fewer_nodes() -> None:
    engine = engine_of(random_table(V, order=None, seed=1), nodes=30, depth=2, top_k=4)
    params = SamplingParams(max_new_tokens=20, top_k=2)
    assert len(proposed(engine, 30, params)) == 2 + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes=0: expected 1 to 255"),
        ({"nodes": 256}, "nodes=256: expected 1 to 255"),
        ({"depth": 0}, "depth=0: expected 1"),
        ({"top_k": 2.5}, "top_k=2.5: expected 1"),
        ({"depth": 20, "top_k": 20}, "depth=20, top_k=20: the draft's last pass has 380 rows"),
        ({"sharpness": 0}, "sharpness=0: expected a number up to 16"),
        ({"sharpness": float("nan")}, "sharpness=nan: expected"),
        ({"sharpness": "much"}, "sharpness='much': expected"),
        ({"kind": "iid"}, "kind='iid': expected one of auto, top_k, coupled"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        engine_of(random_table(V), **options)
