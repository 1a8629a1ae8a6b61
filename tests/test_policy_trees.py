"""Trees under the policy of costs: how many levels of a shape are drafted, with costs given."""

from collections.abc import Callable, Sequence as Items
from typing import Any

import pytest
import torch

from specdec import Engine, SamplingParams, TokenTree
from specdec.costs import StepCosts
from specdec.policy import CostPolicy
from specdec.profiling import Profiler
from specdec.proposers import NgramProposer
from specdec.toy import TableRunner, random_table
from specdec.verifier import Verdict

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part
Options = dict[str, Any]

PROMPT = [0, 45, 67, 89, 45, 67]
KV = 1 << 22
V = 16
GREEDY = SamplingParams(max_new_tokens=120, temperature=0)
TREE: Options = {"tree": (4, 2, 1)}
SHAPE: Options = {"proposer": "tree", "proposer_options": {"shape": (-1, -1, -1, 0, 0, 1, 3)}}
BEAM: Options = {"proposer": "beam_tree", "proposer_options": {"width": 3, "depth": 3}}
DYNAMIC: Options = {
    "proposer": "dynamic_tree", "proposer_options": {"nodes": 10, "depth": 3, "top_k": 3}
}  # fmt: skip
# name -> arguments of Engine, nodes by level from 0 on, what a step may draft
SHAPES: dict[str, tuple[Options, tuple[int, ...], set[int]]] = {
    "tree": (TREE, (0, 4, 12, 20), {0, 4, 12, 20}),
    "shape": (SHAPE, (0, 3, 6, 7), {0, 3, 6, 7}),
    "beam tree": (BEAM, (0, 3, 6, 9), {0, 3, 6, 9}),
    "dynamic tree": (DYNAMIC, (0, 1, 2, 10), {0, 10}),
}
each_shape = pytest.mark.parametrize("name", SHAPES)


def costs(nodes: Items[int], level: float = 0.1, row: float = 0.01) -> StepCosts:
    """Seconds of a drafted level and of a row; a plain pass takes one."""
    depths = tuple(range(len(nodes)))
    return StepCosts(
        1, 64, depths, tuple(n + 1 for n in nodes), tuple(level * d for d in depths),
        tuple(1 + row * n for n in nodes),
    )  # fmt: skip


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[StepCosts | None], None]:
    """Makes these the measured costs of every engine."""

    def give(known: StepCosts | None) -> None:
        monkeypatch.setattr(Profiler, "__call__", lambda *_: known)

    return give


def counting(step: int) -> TableRunner:
    """Says the sum of the last token and `step`, rarely one of the three behind it, never more."""
    chances = (0.97, 0.01, 0.01, 0.01)

    def law(context: tuple[int, ...]) -> Items[float]:
        found = [0.0] * V
        for rank, chance in enumerate(chances):
            found[(last(context) + step + rank) % V] = chance
        return found

    return TableRunner(law, V)


def last(context: tuple[int, ...]) -> int:
    return context[-1] if context else 0


def drafted(engine: Engine, params: SamplingParams = GREEDY, prompts: int = 1) -> list[int]:
    """Nodes of every step but the last few, where not all may fit."""
    for seed in range(prompts):
        engine.add_request([seed + 1, 2], params, seed=seed)
    found = []
    while records := engine.step():
        if engine.scheduler.running and min(s.remaining for s in engine.scheduler.running) > 4:
            found += [record.drafted for record in records]
    return found


# --- what is drafted


@each_shape
def test_shape_that_is_never_right_is_soon_not_drafted(name: str, given: Any) -> None:
    options, nodes, allowed = SHAPES[name]
    given(costs(nodes))
    found = drafted(Engine(counting(1), draft=counting(7), kv_memory=KV, **options))
    assert set(found) <= allowed
    assert found[0] > 0
    assert sum(n > 0 for n in found[20:]) <= 5  # it is tried again, ever more rarely
    assert len(found) > 100


@each_shape
def test_shape_that_is_right_is_drafted_whole(name: str, given: Any) -> None:
    options, nodes, _ = SHAPES[name]
    given(costs(nodes, level=0.02, row=0.001))
    found = drafted(Engine(counting(1), draft=counting(1), kv_memory=KV, **options))
    assert set(found[2:]) == {nodes[-1]}
    assert len(found) > 20


@each_shape
def test_constant_policy_keeps_to_the_shape(name: str, given: Any) -> None:
    options, nodes, _ = SHAPES[name]
    given(costs(nodes))
    engine = Engine(counting(1), draft=counting(7), policy="constant", kv_memory=KV, **options)
    assert set(drafted(engine)) == {nodes[-1]}


@each_shape
def test_shape_is_drafted_whole_where_no_costs_are_known(name: str, given: Any) -> None:
    options, nodes, _ = SHAPES[name]
    given(None)
    engine = Engine(counting(1), draft=counting(7), kv_memory=KV, **options)
    assert set(drafted(engine)) == {nodes[-1]}


def test_deep_tree_is_drafted_whole_where_no_costs_are_known(given: Any) -> None:
    """Deeper than the chain that stands for unknown costs."""
    given(None)
    engine = Engine(counting(1), draft=counting(7), tree=(2, 1, 1, 1, 1, 1), kv_memory=KV)
    engine.add_request([1, 2], GREEDY)
    assert [record.drafted for _ in range(3) for record in engine.step()] == [12] * 3


def test_number_beside_a_tree_is_kept_to(given: Any) -> None:
    given(costs((0, 4, 12, 20)))
    engine = Engine(counting(1), draft=counting(7), num_draft_tokens=13, kv_memory=KV, **TREE)
    assert set(drafted(engine)) == {12}


def test_levels_that_do_not_pay_are_left_out(given: Any) -> None:
    """Right on the first level and never below it."""

    def first_only(context: tuple[int, ...]) -> Items[float]:
        step = 1 if last(context) % 2 == 0 else 7  # of every two tokens one is known
        return [float(i == (last(context) + step) % V) for i in range(V)]

    given(costs((0, 2, 4, 6), level=0.2, row=0.03))
    draft = TableRunner(first_only, V)
    engine = Engine(counting(1), draft=draft, tree=(2, 1, 1), kv_memory=KV)
    found = drafted(engine, SamplingParams(max_new_tokens=500, temperature=0))[120:]
    assert 6 not in found
    assert found.count(2) > 2 * found.count(4)  # two levels are tried at times


@pytest.mark.parametrize("tree", [(2, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("right", [True, False])
def test_batch_drafts_the_whole_tree_or_nothing_of_it(
    tree: tuple[int, ...], right: bool, given: Any
) -> None:
    nodes = (0, *(tree[0] * (d + 1) for d in range(len(tree))))
    given(costs(nodes, level=0.02, row=0.001) if right else costs(nodes))
    engine = Engine(counting(1), draft=counting(1 if right else 7), tree=tree, kv_memory=KV)
    found = drafted(engine, prompts=4)[40:]
    if right:
        assert set(found) == {nodes[-1]}
    else:
        assert sum(n > 0 for n in found) < 0.1 * len(found)


# --- nothing that was drawn is dropped


@pytest.mark.parametrize("kind", ["without_replacement", "iid", "top_k", "coupled"])
def test_what_was_drawn_is_judged(
    target: Model, draft: Model, kind: str, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels are chosen before anything is drawn: every level is whole, with all of its draws, and
    the verifier gets the very trees that the proposer gave."""
    given(costs((0, 3, 9, 15), level=0.2))
    engine = Engine(
        target, draft=draft, tree=(3, 2, 1), proposer_options={"kind": kind}, kv_memory=KV
    )
    assert engine.proposer is not None
    propose, verify = engine.proposer.propose, engine.verifier.verify
    gave: list[TokenTree] = []
    got: list[TokenTree] = []

    def watched(*arguments: Any) -> list[TokenTree]:
        gave.extend(propose(*arguments))
        return gave[-len(arguments[0]) :]

    def watching(sequences: Any, trees: Items[TokenTree], noise: Any) -> list[Verdict]:
        got.extend(trees)
        return verify(sequences, trees, noise)

    monkeypatch.setattr(engine.proposer, "propose", watched)
    monkeypatch.setattr(engine.verifier, "verify", watching)
    engine.add_request(PROMPT, SamplingParams(max_new_tokens=60), seed=2, n=2)
    list(engine)
    given_trees, judged = ([tree for tree in trees if len(tree)] for trees in (gave, got))
    assert all(a is b for a, b in zip(given_trees, judged, strict=True))
    draws = {len(list(tree.proposals)) for tree in got}
    assert draws <= {0, 3, 9, 15} if kind != "iid" else max(draws) <= 15
    assert len(draws) >= 2


# --- the text


@pytest.mark.parametrize(
    "options", [TREE, SHAPE, DYNAMIC, {**TREE, "num_draft_tokens": 13}], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_that_of_plain_decoding(
    target: Model, draft: Model, options: Options, temperature: float, given: Any
) -> None:
    """At temperature 1 under the rule gumbel, seed by seed."""
    params = SamplingParams(max_new_tokens=40, temperature=temperature)
    rule = "gumbel" if temperature else "auto"
    shape = next(
        nodes for name, (its, nodes, _) in SHAPES.items() if its.items() <= options.items()
    )
    given(costs(shape, level=0.05))
    texts, lengths = [], dict[int, int]()
    for drafts in ({}, {"draft": draft, **options}):
        engine = Engine(target, kv_memory=KV, verification=rule, **drafts)
        ids = [engine.add_request([*PROMPT, i], params, seed=i) for i in range(3)]
        found = {out.id: out.token_ids for out in engine}
        texts.append([found[name] for name in ids])
        lengths = engine.stats.drafted_lengths
    assert texts[0] == texts[1]
    assert max(lengths) > 0
    assert len(lengths) >= 2


# --- what a shape that is not drafted by levels came to


class Sketch(NgramProposer):
    """A dynamic tree as a policy sees it."""

    free, by_level = False, False

    @property
    def preferred_nodes(self) -> int:
        return 12

    def nodes_within(self, depth: int) -> int:
        return 12 if depth >= 4 else depth

    def draft_rows(self, depth: int) -> tuple[int, ...]:
        return (1,) * depth

    def situation(self, sequence: Any) -> int:
        del sequence
        return 0


class Seq:
    """What a policy reads of a sequence."""

    def __init__(self) -> None:
        self.tokens, self.remaining, self.law = [0] * 20, 1000, None


def test_tree_that_was_grown_shallow_is_no_reason_to_hope_for_more() -> None:
    """Of four levels it has one, which is accepted: two tokens for the time of 2.75."""
    policy, sequence = CostPolicy(), Seq()
    known = costs((0, 1, 2, 3, 12), level=0.25, row=0.0625)
    policy.join(Sketch(), lambda *_: known, lambda _: False)
    tree = TokenTree.build(list(range(12)), [-1] * 12)
    planned = []
    for _ in range(200):
        policy.prepare([sequence])  # type: ignore[list-item]
        [nodes] = policy.plan([sequence], [100])  # type: ignore[list-item]
        planned.append(nodes)
        accepted = int(nodes > 0)
        verdict = Verdict((0,) * (accepted + 1), accepted, (0,) * accepted, torch.empty(0))
        trees = [tree if nodes else TokenTree.empty(torch.device("cpu"))]
        policy.observe([sequence], trees, [verdict])  # type: ignore[list-item]
        sequence.tokens += [0] * (accepted + 1)
    assert set(planned) == {0, 12}
    assert sum(n > 0 for n in planned[100:]) < 5


def test_rooms_of_a_shape_at_the_end_of_a_text(given: Any) -> None:
    given(costs((0, 4, 12, 20), level=0.02, row=0.001))
    engine = Engine(counting(1), draft=counting(1), kv_memory=KV, **TREE)
    engine.add_request([1, 2], SamplingParams(max_new_tokens=11, temperature=0))
    assert [record.drafted for _ in range(3) for record in engine.step()] == [20, 20, 12]


def test_sampled_tree_learns_by_itself(given: Any) -> None:
    """Equal seeds, equal texts, whoever came before."""
    given(costs((0, 4, 12, 20), level=0.1))
    tables = (random_table(V, order=1, seed=seed) for seed in (1, 2))
    target, draft = (TableRunner(table, V) for table in tables)
    engine = Engine(target, draft=draft, kv_memory=KV, **TREE)
    texts = []
    for seed in (3, 4, 3):
        engine.add_request([1, 2], SamplingParams(max_new_tokens=60), seed=seed)
        [out] = list(engine)
        texts.append(out.token_ids)
    assert texts[0] == texts[2] != texts[1]
    assert len(engine.stats.drafted_lengths) >= 2
