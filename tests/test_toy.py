"""Models with known laws: what they answer, what faults they see; synthetic drafts."""

from collections.abc import Iterable, Sequence as Items
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch

from specdec import Engine, SamplingParams
from specdec.cache import CachedSequence, CacheGroup, Paged
from specdec.errors import InvalidArgumentError
from specdec.runner import ModelRunner, Runner, SequenceRows
from specdec.toy import (
    ContinuationRunner,
    SyntheticDraft,
    Table,
    TableRunner,
    random_table,
    table_pair,
    with_overlap,
)

Model = Any  # a transformers model: its methods are typed in part

V, KV = 5, 1 << 16
CPU = torch.device("cpu")
WHOLE = random_table(V, order=None, seed=1)  # every token of the context counts


@pytest.fixture
def runner() -> TableRunner:
    return TableRunner(WHOLE, V)


@pytest.fixture
def group(runner: TableRunner) -> CacheGroup:
    group = CacheGroup(4, 64, CPU)
    runner.join(group)
    return group


def answers(runner: Runner, *rows: SequenceRows) -> list[list[float]]:
    laws: list[list[float]] = runner.score(rows).double().softmax(-1).tolist()
    return laws


def near(contexts: Items[tuple[int, ...]], table: Table = WHOLE) -> list[Any]:
    return [pytest.approx(table(context), abs=1e-6) for context in contexts]


def greedy(table: Table, prompt: list[int], count: int) -> tuple[int, ...]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(np.argmax(table(tuple(text)))))
    return tuple(text[len(prompt) :])


def rate(engine: Engine) -> tuple[float, float]:
    """Accepted tokens per judged one of everything that runs, and four standard errors of it."""
    accepted = judged = 0
    while records := engine.step():
        accepted += sum(record.accepted for record in records)
        judged += sum(min(record.accepted + 1, record.drafted) for record in records)
    return accepted / judged, 4 * sqrt(0.25 / judged)


def texts(
    engine: Engine, prompts: Items[list[int]], params: SamplingParams
) -> list[tuple[int, ...]]:
    for seed, prompt in enumerate(prompts):
        engine.add_request(prompt, params, seed=seed, request_id=str(seed))
    found = {out.id: out.token_ids for out in engine}
    return [found[str(seed)] for seed in range(len(prompts))]


# --- tables and their runner


def test_rows_of_a_tree_are_answered_by_their_paths(runner: TableRunner, group: CacheGroup) -> None:
    first, second = group.open(20), group.open(20)
    nodes = torch.tensor([4, 0, 1, 2])
    found = answers(
        runner,
        SequenceRows(first, [1, 2, 3], nodes, [-1, -1, 0, 2], keep=5),
        SequenceRows(second, [3, 3], keep=1),
    )
    begun = (1, 2, 3)
    wanted = [begun, (*begun, 4), (*begun, 0), (*begun, 4, 1), (*begun, 4, 1, 2), (3, 3)]
    assert found == near(wanted)
    assert (first.computed_len(runner), second.computed_len(runner)) == (7, 2)


def test_context_is_what_was_committed(runner: TableRunner, group: CacheGroup) -> None:
    sequence = group.open(20)
    nodes = torch.tensor([4, 0, 1, 2])
    runner.score([SequenceRows(sequence, [1, 2, 3], nodes, [-1, -1, 1, 2], keep=5)])
    group.commit(sequence, 3, [4, 5])  # 0, 1
    assert answers(runner, SequenceRows(sequence, [4], keep=1)) == near([(1, 2, 3, 0, 1, 4)])
    group.truncate(sequence, 2)
    assert answers(runner, SequenceRows(sequence, (), torch.tensor([4, 4]), keep=2)) == near(
        [(1, 2, 4), (1, 2, 4, 4)]
    )
    assert runner.score([SequenceRows(sequence, [1], keep=0)]).shape == (0, V)


def test_slot_with_a_foreign_position_is_seen(
    runner: TableRunner, group: CacheGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = group.open(20)
    monkeypatch.setattr(Paged, "commit", lambda *_: None)
    runner.score([SequenceRows(sequence, [1, 2], torch.tensor([3, 4]), [-1, -1], keep=0)])
    group.commit(sequence, 2, [3])
    runner.score([SequenceRows(sequence, [0])])  # node 0 in its place: of the same position
    group.truncate(sequence, 2)
    runner.score([SequenceRows(sequence, (), torch.tensor([3, 4, 1]), [-1, -1, 1], keep=0)])
    group.commit(sequence, 2, [3, 4])
    with pytest.raises(AssertionError, match=r"slots hold the positions \[0, 1, 2, 2\]"):
        runner.score([SequenceRows(sequence, [0])])


@pytest.mark.parametrize("tree", [(2, 2), (1, 1, 1)], ids=str)
def test_engine_runs_on_tables(tree: tuple[int, ...]) -> None:
    draft = TableRunner(with_overlap(WHOLE, 0.7), V)
    engine = Engine(TableRunner(WHOLE, V), draft=draft, tree=tree, policy="constant", kv_memory=KV)
    prompts = [[1, 2], [3], [0, 0, 4, 4]]
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(12, temperature=0), request_id=str(prompt))
    found = {out.id: out.token_ids for out in engine}
    assert found == {str(prompt): greedy(WHOLE, prompt, 12) for prompt in prompts}
    assert 0 < engine.stats.accepted < engine.stats.drafted


def test_wrong_commit_is_seen_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = CacheGroup.commit_all

    def wrong(
        self: CacheGroup, commits: Iterable[tuple[CachedSequence, int, Items[int]]]
    ) -> None:  # its neighbour
        commit(self, [(s, first, [slot ^ 1 for slot in slots]) for s, first, slots in commits])

    monkeypatch.setattr(CacheGroup, "commit_all", wrong)
    draft = TableRunner(WHOLE, V)
    engine = Engine(TableRunner(WHOLE, V), draft=draft, tree=(2,), policy="constant", kv_memory=KV)
    engine.add_request([1, 2], SamplingParams(12, temperature=0))
    with pytest.raises(AssertionError):
        assert [out.token_ids for out in engine] == [greedy(WHOLE, [1, 2], 12)]


def test_order_says_how_much_of_the_context_counts() -> None:
    table = random_table(V, order=2, seed=3)
    assert table((0, 1, 2)) == table((4, 1, 2)) == random_table(V, order=2, seed=3)((1, 2))
    assert table((0, 1, 2)) != table((0, 2, 2))
    assert WHOLE((0, 1)) != WHOLE((0, 1, 0)) != WHOLE((0, 0, 1))
    assert random_table(V, order=0)((1,)) == random_table(V, order=0)((2, 3))


def test_concentration_makes_laws_peaked_and_zeros_cut_them() -> None:
    flat, peaked = (random_table(V, concentration=c, seed=2) for c in (10.0, 0.05))
    assert (
        max(max(flat((t,))) for t in range(V))
        < 0.6
        < np.mean([max(peaked((t,))) for t in [*range(V)]])
    )
    cut = random_table(V, zeros=3)
    assert all(sum(x > 0 for x in cut((token,))) == 2 for token in range(V))
    assert sum(cut((1,))) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("overlap", [0, 0.2, 0.5, 0.8, 0.95, 1])
@pytest.mark.parametrize("concentration", [0.1, 1])
def test_overlap_is_exact_at_every_context(overlap: float, concentration: float) -> None:
    target, draft = table_pair(V, overlap, order=None, zeros=1, concentration=concentration, seed=7)
    for context in [(), (1,), (2,), (1, 2), (2, 1), (4, 4, 4)]:
        p, q = target.law(context), draft.law(context)
        assert np.minimum(p, q).sum() == pytest.approx(overlap, abs=1e-12)


def test_token_wise_acceptance_is_the_overlap() -> None:
    target, draft = table_pair(V, 0.6, order=None, seed=5)
    engine = Engine(
        target, draft=draft, verification="token", num_draft_tokens=3, kv_memory=1 << 20
    )
    for seed in range(40):
        engine.add_request([seed % V, 1], SamplingParams(30), seed=seed)
    found, error = rate(engine)
    assert abs(found - 0.6) < error


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_table(0), "vocab_size=0, zeros=0"),
        (lambda: random_table(3, zeros=3), "zeros=3: expected 0 <= zeros < vocab_size"),
        (lambda: random_table(3, concentration=0), "concentration=0, order=1"),
        (lambda: random_table(3, order=-1), "order=-1"),
        (lambda: with_overlap(WHOLE, 1.1), "overlap=1.1: expected 0 to 1"),
        (lambda: with_overlap(lambda _: [0.5, 0.5], 0.1)(()), "expected at least 0.5"),
        (lambda: TableRunner(lambda _: [0.5, 0.6], 2), "expected 2 probabilities"),
        (lambda: TableRunner(lambda _: [1.0], 2), "expected 2 probabilities"),
        (lambda: TableRunner(lambda _: [1.5, -0.5], 2), "expected 2 probabilities"),
        (lambda: ContinuationRunner([], 5), "expected some, of tokens below 5, got none"),
        (lambda: ContinuationRunner([[1, 5]], 5), r"got \[5\]"),
        (lambda: SyntheticDraft(TableRunner(WHOLE, V), 1.5), "acceptance=1.5: expected 0 to 1"),
        (lambda: SyntheticDraft(TableRunner(WHOLE, V), 1, pass_seconds=-1), "pass_seconds=-1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make()


# --- synthetic drafts


@pytest.mark.parametrize("acceptance", [0, 0.2, 0.8, 1])
@pytest.mark.parametrize("temperature", [0, 1])
def test_synthetic_draft_is_accepted_at_its_rate(acceptance: float, temperature: float) -> None:
    table = random_table(64, order=None, seed=4, zeros=8)
    draft = SyntheticDraft(TableRunner(table, 64), acceptance, seed=9)
    engine = Engine(TableRunner(table, 64), draft=draft, num_draft_tokens=3, kv_memory=1 << 21)
    for seed in range(32):
        engine.add_request([seed], SamplingParams(24, temperature=temperature), seed=seed)
    found, error = rate(engine)
    assert abs(found - acceptance) <= (error if 0 < acceptance < 1 else 0)
    assert draft.stats["draft"] == f"synthetic draft, acceptance {acceptance:g}"
    assert draft.rows >= engine.stats.drafted
    if acceptance == 0.8:
        by_position = engine.stats.acceptance_by_position()
        assert by_position == pytest.approx([0.8, 0.64, 0.512], abs=0.12)


@pytest.mark.parametrize("verification", ["auto", "gumbel"])
def test_synthetic_draft_changes_no_text(target: Model, verification: str) -> None:
    params = SamplingParams(20, temperature=0 if verification == "auto" else 1)
    prompts = [[0, 45, 67], [0, 200], [5, 5, 5, 5]]
    plain = Engine(target, verification=verification, kv_memory=1 << 20)
    draft = SyntheticDraft(ModelRunner(target), 0.7)
    drafted = Engine(
        target,
        draft=draft,
        tree=(1, 1, 1),
        policy="constant",
        verification=verification,
        kv_memory=1 << 20,
    )
    assert texts(drafted, prompts, params) == texts(plain, prompts, params)
    assert drafted.stats.accepted > 0


def test_tree_of_a_synthetic_draft_sees_committed_contexts() -> None:
    table = random_table(V, order=None, seed=2, zeros=1)
    engine = Engine(
        TableRunner(table, V), draft=SyntheticDraft(TableRunner(table, V), 1), tree=(2, 2, 1),
        policy="constant", kv_memory=KV,
    )  # fmt: skip
    engine.add_request([1, 2], SamplingParams(24, temperature=0))
    assert [record.accepted for _ in range(6) for record in engine.step()] == [3] * 6


def test_recited_continuation_is_accepted(target: Model) -> None:
    params = SamplingParams(24, temperature=0)
    prompts = [[0, 45, 67], [0, 200]]
    wanted = texts(Engine(target, kv_memory=1 << 20), prompts, params)
    known = [[*prompt, *text] for prompt, text in zip(prompts, wanted, strict=True)]
    recited = ContinuationRunner(known, len(target.get_input_embeddings().weight))
    for acceptance in (1, 0.6):
        engine = Engine(
            target, draft=SyntheticDraft(recited, acceptance), num_draft_tokens=4, kv_memory=1 << 20
        )
        assert texts(engine, prompts, params) == wanted
        assert engine.stats.accepted > 0
        assert (engine.stats.accepted == engine.stats.drafted) == (acceptance == 1)
    assert recited.lost == 0
    engine = Engine(target, draft=SyntheticDraft(recited, 1), num_draft_tokens=4, kv_memory=1 << 20)
    engine.add_request([9, 9], params)
    engine.step()
    assert recited.lost == 1  # the prompt


def test_pass_takes_its_time() -> None:
    draft = SyntheticDraft(ContinuationRunner([[0, 1]], V), 1, pass_seconds=0.01)
    engine = Engine(TableRunner(WHOLE, V), draft=draft, num_draft_tokens=3, kv_memory=KV)
    engine.add_request([0], SamplingParams(9))
    engine.step()
    assert engine.stats.draft_seconds >= 0.03
