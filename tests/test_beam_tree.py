"""Stochastic-beam trees: the law of the text in exact fractions, and that what is drawn in
production follows the race that the proof is about."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import log, sqrt
from typing import Any

import pytest

from specdec import Engine, SamplingParams, TokenTree
from specdec.acceptance import reference
from specdec.errors import InvalidArgumentError
from specdec.evals.enumeration import (
    START,
    Comparison,
    Law,
    Rng,
    Tables,
    compare_laws,
    iteration_laws,
    leaves,
    make_tables,
    without,
)
from specdec.proposers import beam_tree
from specdec.toy import TableRunner, random_table

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLED = SamplingParams(max_new_tokens=20, temperature=1.0)

# --- the race in exact numbers


class Node:
    """A node while the race is on. Its children arrive at rate `chance` times what is left of the
    law; the first one arrives with it."""

    def __init__(self, p: Law, last: int, depth: int, chance: Any) -> None:
        self.p, self.last, self.depth, self.chance = p, last, depth, chance
        self.proposals: list[tuple[int, Law, Node]] = []


Order = Callable[[list[tuple[int, Law, Any]]], list[tuple[int, Law, Any]]]


def race(width: int, depth: int, order: Order = lambda found: found) -> Callable[..., Any]:
    """Trees of `width` nodes on each of `depth` levels. All levels run on one clock, so that the
    next arrival anywhere is a choice with rational probabilities."""

    def grow(shape: tuple[int, ...], tables: Tables, last: int, rng: Rng) -> Node:
        del shape
        root = Node(tables.target[last], last, 0, Fraction(1))
        nodes, places = [root], [0] + [width] * depth

        def left(node: Node) -> Law:
            return without(tables.drafts[0][node.last], {x for x, _, _ in node.proposals})

        def rate(node: Node) -> Any:
            if node.depth == depth or not places[node.depth + 1]:
                return Fraction(0)
            q = tables.drafts[0][node.last]
            return node.chance * (sum(q) - sum(q[x] for x, _, _ in node.proposals))

        def arrive(parent: Node) -> None:
            q = left(parent)
            x = rng.draw(q)
            below = parent.chance * tables.drafts[0][parent.last][x]
            child = Node(tables.target[x], x, parent.depth + 1, below)
            parent.proposals.append((x, q, child))
            places[child.depth] -= 1
            nodes.append(child)
            if rate(child):
                arrive(child)

        arrive(root)
        while total := sum(map(rate, nodes)):
            arrive(nodes[rng.draw(tuple(rate(node) / total for node in nodes))])
        for node in nodes:
            node.proposals = order(node.proposals)
        return root

    return grow


def compare(rule: str, grow: Callable[..., Any], tables: Tables, depth: int) -> Comparison:
    def verify(root: Any, rng: Any) -> Sequence[int]:
        return reference.verify(rule, root, rng)

    laws = iteration_laws(verify, grow, (1,) * depth, tables, pick=False)
    return compare_laws(laws, tables.target, depth)


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize(
    ("table", "width", "depth"),
    [
        *((table, 2, 2) for table in ("generic", "correlated", "one-hot p", "truncated q")),
        *((table, 3, 2) for table in ("generic", "truncated p and q")),
        ("generic", 2, 3),
    ],
)
def test_text_has_exactly_the_target_s_law(rule: str, table: str, width: int, depth: int) -> None:
    found = compare(rule, race(width, depth), make_tables(table, 1), depth)
    assert found.error == 0


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_siblings_in_another_order_are_caught(rule: str) -> None:
    wrong = race(2, 2, lambda found: sorted(found, key=lambda proposal: proposal[0]))
    tables = make_tables("generic", 0).as_floats()
    assert compare(rule, wrong, tables, 2).total_variation > 1e-2


def test_shape_depends_on_the_tokens() -> None:
    """The reason why the proof is needed: a level's places go to the parents by what was drawn."""
    tables = make_tables("generic", 0)

    def shape(rng: Any) -> tuple[int, ...]:
        root = race(3, 2)((), tables, 0, rng)
        first = root.proposals[0]
        return (first[0], len(first[2].proposals))

    law = leaves(shape)
    by_token: dict[int, dict[int, Any]] = defaultdict(dict)
    for (token, children), mass in law.items():
        by_token[token][children] = mass
    shares = {round(float(c[1] / sum(c.values())), 6) for c in by_token.values() if 1 in c}
    assert len(shares) > 1


# --- what is drawn in production

V = 3


def engine_of(table: Any, vocab_size: int = V, **options: Any) -> Engine:
    return Engine(
        TableRunner(random_table(vocab_size, order=1, seed=9), vocab_size), kv_memory=1 << 22,
        draft=TableRunner(table, vocab_size), proposer="beam_tree", proposer_options=options,
        policy="constant", grow=True,
    )  # fmt: skip


def proposed(engine: Engine, budget: int, seeds: Sequence[int], params: Any) -> list[TokenTree]:
    for seed in seeds:
        engine.add_request([0, 1], params, seed=seed)
    assert engine.proposer is not None
    running = engine.scheduler.running
    trees = engine.proposer.propose(running, [budget] * len(running), engine.noise)
    engine.group.check_integrity()
    engine.abort_all()
    return trees


def described(root: Any) -> tuple[int, ...]:
    """The tree depth first: how many children, then each one's token and what is below it."""
    found = [len(root.proposals)]
    for x, _, child in root.proposals:
        found += [x, *described(child)]
    return tuple(found)


def described_tree(tree: TokenTree) -> tuple[int, ...]:
    children: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for proposal in tree.proposals:
        children[proposal.parent].append((proposal.token, proposal.node))

    def below(node: int) -> list[int]:
        found = [len(children[node])]
        for token, child in children[node]:
            found += [token, *below(child)]
        return found

    return tuple(below(-1))


def chi_square(width: int, depth: int) -> tuple[float, float]:
    """Of 2048 whole trees, rare ones together, against the exact law of the race; and what chance
    exceeds with probability 1e-6 at the most (Laurent and Massart 2000, lemma 1)."""
    tables, count = make_tables("generic", 1).as_floats(), 2048
    law = leaves(lambda rng: described(race(width, depth)((), tables, 1, rng)))
    engine = engine_of(
        lambda context: tables.drafts[0][context[-1] if context else START],
        width=width, depth=depth,
    )  # fmt: skip
    seen: Counter[tuple[int, ...]] = Counter()
    for first in range(0, count, 1024):
        trees = proposed(engine, 99, range(first, first + 1024), SAMPLED)
        seen.update(map(described_tree, trees))
    assert seen.keys() <= law.keys()
    rare = [tree for tree, p in law.items() if p * count < 8]
    cells = [(seen[tree], p * count) for tree, p in law.items() if p * count >= 8]
    cells.append((sum(seen[tree] for tree in rare), count * sum(law[tree] for tree in rare)))
    found = sum((n - wanted) ** 2 / wanted for n, wanted in cells if wanted > 0)
    degrees, x = len(cells) - 1, log(1e6)
    assert degrees > 10
    return found, degrees + 2 * sqrt(degrees * x) + 2 * x


@pytest.mark.parametrize(("width", "depth"), [(3, 2), (2, 3)])
def test_trees_are_drawn_by_the_race(width: int, depth: int) -> None:
    found, bound = chi_square(width, depth)
    assert found < bound


def test_race_at_other_rates_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam_tree, "_LEAST", 0.0)  # as if every path had probability 1
    found, bound = chi_square(3, 2)
    assert found > bound


def test_stored_laws_are_those_of_the_parents() -> None:
    table = random_table(5, order=None, seed=2)
    [tree] = proposed(engine_of(table, 5, width=3, depth=3), 9, [4], SAMPLED)
    assert len(tree) == 9
    TokenTree.build(tree.tokens, tree.parents, tree.proposals, tree.laws)
    paths: list[tuple[int, ...]] = []
    for proposal in tree.proposals:
        above = paths[proposal.parent] if proposal.parent >= 0 else ()
        paths.append((*above, proposal.token))
        assert proposal.law.kind == "without_replacement"
        assert proposal.law.row is not None
        assert tree.laws is not None
        wanted = pytest.approx(table((0, 1, *above)), abs=1e-6)
        assert tree.laws[proposal.law.row].tolist() == wanted


def test_tokens_without_mass_are_never_drawn() -> None:
    # 3 tokens of 6: fewer than a level has places for
    table = random_table(6, order=None, seed=3, zeros=3)
    for tree in proposed(engine_of(table, 6, width=5, depth=2), 10, range(64), SAMPLED):
        assert len(tree) == 3 + 5
        for proposal in tree.proposals:
            assert tree.laws is not None
            assert proposal.law.row is not None
            assert tree.laws[proposal.law.row, proposal.token] > 0


def test_greedy_target_is_drafted_for_by_beam_search() -> None:
    table = random_table(5, order=None, seed=2)
    greedy = SamplingParams(max_new_tokens=20, temperature=0)
    [tree] = proposed(engine_of(table, 5, width=2, depth=3), 6, [1], greedy)
    assert tree.laws is None
    beam: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    wanted = set()
    for _ in range(3):
        longer = [(p * q, (*path, x)) for p, path in beam
                  for x, q in enumerate(table((0, 1, *path)))]  # fmt: skip
        beam = sorted(longer, reverse=True)[:2]
        wanted |= {path for _, path in beam}
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    assert set(found) == wanted


@pytest.mark.parametrize(
    ("budget", "nodes"), [(0, 0), (1, 1), (2, 2), (3, 3), (5, 3), (6, 6), (9, 9), (99, 9)]
)
def test_budget_is_used_up_by_whole_levels(budget: int, nodes: int) -> None:
    engine = engine_of(random_table(5, order=None, seed=2), 5, width=3, depth=3)
    [tree] = proposed(engine, budget, [1], SAMPLED)
    assert len(tree) == nodes
    assert engine.proposer is not None
    assert [engine.proposer.nodes_within(d) for d in (0, 1, 2, 3, 9)] == [0, 3, 6, 9, 9]
    assert engine.proposer.draft_rows(9) == (1, 3, 6)


def test_sequences_of_several_laws_share_a_pass() -> None:
    engine = engine_of(random_table(5, order=None, seed=2), 5, width=3, depth=2)
    others = [SAMPLED, SamplingParams(20, 0.5), SamplingParams(20, 0), SamplingParams(20, top_k=2)]
    alone = [proposed(engine, 6, [7], params)[0] for params in others]
    for params in others:
        engine.add_request([0, 1], params, seed=7)
    assert engine.proposer is not None
    trees = engine.proposer.propose(engine.scheduler.running, [6] * 4, engine.noise)
    assert [tree.tokens.tolist() for tree in trees] == [tree.tokens.tolist() for tree in alone]
    assert [tree.parents for tree in trees] == [tree.parents for tree in alone]
    engine.abort_all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width=0: expected 1 to 255"),
        ({"depth": True}, "depth=True: expected 1 to 255"),
        ({"width": 64, "depth": 4}, "width=64, depth=4: 256 nodes, expected at most 255"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        engine_of(random_table(V), **options)
