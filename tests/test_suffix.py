"""Suffix decoding: drafts and scores are those of counting by hand; the past is bounded."""

import random
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import specdec
from specdec import Engine, SamplingParams
from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError, SpecDecError
from specdec.proposers import suffix, suffix_automaton
from specdec.proposers.past_outputs import PastOutputs, _checksum
from specdec.proposers.suffix import Draft, Settings, SuffixProposer
from specdec.proposers.suffix_automaton import ROOT, Match, SuffixAutomaton
from specdec.rng import PhiloxNoise
from specdec.sequence import Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

KV = 1 << 20
PROMPTS = [[5, 6, 7, 5, 6], [9, 9, 9, 9], [3, 4], [8]]


# --- the definition, by counting


def occurrences(texts: list[list[int]], string: list[int]) -> list[tuple[int, int]]:
    """(text, end) of every occurrence, in order."""
    size = len(string)
    return [
        (t, i)
        for t, text in enumerate(texts)
        for i in range(size, len(text) + 1)
        if text[i - size : i] == string
    ]


def followers(texts: list[list[int]], string: list[int]) -> dict[int, tuple[int, tuple[int, int]]]:
    """token -> (how often it followed, where last)."""
    found: dict[int, tuple[int, tuple[int, int]]] = {}
    for t, end in occurrences(texts, string):
        if end < len(texts[t]):
            token = texts[t][end]
            found[token] = (found.get(token, (0, (0, 0)))[0] + 1, (t, end))
    return found


def counted_path(
    texts: list[list[int]], end: list[int], nodes: int, least: Fraction
) -> tuple[list[int], list[int] | None, Fraction]:
    string, prob, score = list(end), Fraction(1), Fraction(0)
    while len(string) - len(end) < nodes:
        after = followers(texts, string)
        if not after:
            break
        token = max(after, key=lambda t: after[t])
        prob *= Fraction(after[token][0], len(occurrences(texts, string)))
        if prob < least:
            break
        string.append(token)
        score += prob
    return string[len(end) :], None, score


def counted_tree(
    texts: list[list[int]], end: list[int], nodes: int, least: Fraction
) -> tuple[list[int], list[int] | None, Fraction]:
    tokens: list[int] = []
    parents: list[int] = []
    score = Fraction(0)
    open_nodes: list[tuple[Fraction, int, int, list[int]]] = []  # -prob, parent, rank, string

    def push(string: list[int], prob: Fraction, node: int) -> None:
        seen = len(occurrences(texts, string))
        after = followers(texts, string)
        order = sorted(after, key=lambda token: after[token], reverse=True)
        for rank, token in enumerate(order[: suffix.MAX_WIDTH]):
            its = prob * Fraction(after[token][0], seen)
            if its >= least:
                open_nodes.append((-its, node, rank, [*string, token]))

    push(end, Fraction(1), -1)
    while open_nodes and len(tokens) < nodes:
        best = min(open_nodes)
        open_nodes.remove(best)
        negative, parent, _, string = best
        tokens.append(string[-1])
        parents.append(parent)
        score -= negative
        push(string, -negative, len(tokens) - 1)
    return tokens, parents, score


def counted(
    texts: list[list[int]], context: list[int], budget: int, depth: int, settings: Settings
) -> tuple[list[int], list[int] | None, Fraction]:
    """Every match length, longest first; the best score, of equals the longest match."""
    budget = min(budget, depth - 1)
    best: tuple[list[int], list[int] | None, Fraction] = ([], None, Fraction(0))
    for size in range(min(depth - budget, len(context)), 0, -1):
        end = context[len(context) - size :]
        room = int(settings.max_spec_factor * size + settings.max_spec_offset + 1e-6)
        nodes = min(budget, room)
        if nodes <= 0 or not occurrences(texts, end):
            continue
        least = Fraction(str(settings.min_token_prob))
        grow = counted_tree if settings.mode == "tree" else counted_path
        found = grow(texts, end, nodes, least)
        if found[2] > best[2]:
            best = found
    return best


def random_text(draw: random.Random, alphabet: int, size: int) -> list[int]:
    return [draw.randrange(alphabet) for _ in range(size)]


def check_equal(draft: Draft, expected: tuple[list[int], list[int] | None, Fraction]) -> None:
    assert (draft.tokens, draft.parents) == expected[:2]
    assert draft.score == pytest.approx(float(expected[2]), abs=1e-12)


# --- the automaton


@pytest.mark.parametrize("depth", [2, 3, 6, 64])
def test_counts_are_those_of_counting(depth: int) -> None:
    draw = random.Random(depth)
    for alphabet in (1, 2, 3):
        texts = [random_text(draw, alphabet, draw.choice((1, 7, 25))) for _ in range(3)]
        counts = SuffixAutomaton(depth)
        for text in texts:
            counts.begin()
            for token in text:
                counts.append(token)
        for t, text in enumerate(texts):
            for i in range(len(text)):
                for size in range(1, min(depth, len(text) - i) + 1):
                    string, state = text[i : i + size], ROOT
                    for token in string:
                        state = counts.moves[state][token]
                    assert counts.count[state] == len(occurrences(texts, string)), (t, string)
                    after = followers(texts, string)
                    if size < depth:
                        best = max(after, key=lambda x: after[x], default=-1)
                        assert counts.best[state] == best


def test_match_is_the_longest_known_end() -> None:
    draw = random.Random(5)
    for depth in (2, 4, 64):
        known = [random_text(draw, 3, 20), random_text(draw, 2, 30)]
        counts = SuffixAutomaton(depth)
        for text in known:
            counts.begin()
            for token in text:
                counts.append(token)
        match, context = Match(), random_text(draw, 4, 60)
        for i, token in enumerate(context):
            counts.advance(match, token)
            ends = [context[i + 1 - n : i + 1] for n in range(min(i + 1, depth - 1), 0, -1)]
            assert match.length == next((len(e) for e in ends if occurrences(known, e)), 0)
            low = counts.length[counts.link[match.state]] if match.state != ROOT else -1
            assert low < match.length <= counts.length[match.state]


# --- drafts


@pytest.mark.parametrize("mode", ["path", "tree"])
@pytest.mark.parametrize(
    ("least", "factor", "offset"),
    [(0.1, 1.0, 0.0), (0.0, 2.0, 1.0), (0.5, 0.5, 1.5), (0.3, 0.0, 4)],
)
def test_local_draft_is_that_of_counting(
    mode: suffix.Mode, least: float, factor: float, offset: float
) -> None:
    settings = Settings(mode, least, factor, offset)
    draw = random.Random(f"{mode} {least}")
    drafted = 0
    for alphabet, depth in [(1, 64), (2, 8), (2, 64), (3, 4), (3, 64), (5, 16)]:
        for _ in range(3):
            counts = SuffixAutomaton(depth, settings.width)
            text = random_text(draw, alphabet, 40)
            for i, token in enumerate(text):
                counts.append(token)
                budget = draw.randrange(8)
                found = settings.draft(counts, counts.open, budget)
                expected = counted([text[: i + 1]], text[: i + 1], budget, depth, settings)
                check_equal(found, expected if found.tokens else (expected[0], None, expected[2]))
                drafted += len(found.tokens)
    assert drafted > 300


@pytest.mark.parametrize("mode", ["path", "tree"])
def test_request_and_past_together_are_those_of_counting(mode: suffix.Mode) -> None:
    draw = random.Random(mode)
    from_past = 0
    for alphabet in (2, 3, 4):
        proposer = SuffixProposer(mode=mode, max_depth=12, cache_tokens=80)
        past: list[list[int]] = []
        for _ in range(8):
            prompt, output = random_text(draw, alphabet, 6), random_text(draw, alphabet, 20)
            its = sequence(prompt)
            proposer.start(its)
            for token in output:
                its.tokens.append(token)
                if draw.random() < 0.3:
                    continue  # several tokens a step
                [tree] = proposer.propose([its], [4], PhiloxNoise())
                local = counted([its.tokens], its.tokens, 4, 12, proposer.settings)
                other = counted(past, its.tokens, 4, 12, proposer.settings)
                expected = other if other[2] > local[2] else local
                assert tree.tokens.tolist() == expected[0]
                if expected[1] is not None:
                    assert tree.parents == tuple(expected[1])
                from_past += other[2] > local[2]
            its.finish_reason = "length"
            proposer.finish(its)
            past.append(output)
            past = past[-len(proposer.past.outputs) :]
            assert proposer.past.outputs == past
    assert from_past > 20


def sequence(tokens: list[int]) -> Sequence:
    cache = CacheGroup(16, 16, torch.device("cpu")).open(1)
    law = SamplingParams(temperature=0).law()
    return Sequence("one", 0, list(tokens), len(tokens), law, 0, 64, frozenset(), None, cache)


def test_the_more_frequent_continuation_is_drafted_and_the_later_of_equals() -> None:
    settings = Settings("path", 0.1, 1.0, 0.0)
    counts = SuffixAutomaton(64)
    for token in [1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2]:
        counts.append(token)
    assert settings.draft(counts, counts.open, 1).tokens == [3]
    for token in [4, 1, 2]:
        counts.append(token)
    assert settings.draft(counts, counts.open, 1).tokens == [4]


# --- the past


def test_the_past_is_bounded_and_forgets_the_oldest_first() -> None:
    past = PastOutputs(100, 16)
    draw, added = random.Random(2), []
    for _ in range(200):
        added.append(random_text(draw, 4, draw.choice((1, 5, 30))))
        past.add(added[-1])
        kept = past.outputs
        assert kept == added[-len(kept) :]
        size = sum(map(len, kept))
        assert size <= 100
        assert size == past.automaton.num_tokens
        assert size + past._next.automaton.num_tokens <= 150
        if sum(map(len, added)) > 100:
            assert size > 20  # about half of it stays
    past.add(list(range(150)))
    assert past.outputs == [list(range(50, 150))]


def test_no_past_is_kept_for_a_bound_of_nothing() -> None:
    past = PastOutputs(0, 16)
    past.add([1, 2, 3])
    assert past.outputs == []
    assert past.version == 0


def test_the_past_comes_back_from_its_file(tmp_path: Path) -> None:
    first = SuffixProposer()
    first.join(CacheGroup(16, 16, torch.device("cpu")), 300)
    for output in ([1, 2, 3, 4], [5], [1, 2, 3, 5]):
        first.past.add(output)
    file = tmp_path / "past"
    first.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["past"]
    second = SuffixProposer(cache_file=file)
    assert second.past.outputs == [[1, 2, 3, 4], [5], [1, 2, 3, 5]]
    assert SuffixProposer(cache_file=file, cache_tokens=6).past.outputs == [[5], [1, 2, 3, 5]]
    second.join(CacheGroup(16, 16, torch.device("cpu")), 300)
    with pytest.raises(InvalidArgumentError, match="made with a vocabulary of 300 tokens, the"):
        SuffixProposer(cache_file=file).join(CacheGroup(16, 16, torch.device("cpu")), 301)
    its = sequence([9, 1, 2, 3])
    second.start(its)
    [tree] = second.propose([its], [1], PhiloxNoise())
    assert tree.tokens.tolist() == [5]
    SuffixProposer().save(file)
    assert SuffixProposer(cache_file=file).past.outputs == []


def damage(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def signed(
    vocab_size: int, tokens: NDArray[np.generic], ends: NDArray[np.generic]
) -> dict[str, Any]:
    """What another program may write, its checksum right."""
    return {
        "format": np.int64(1), "vocab_size": np.int64(vocab_size), "tokens": tokens, "ends": ends,
        "checksum": _checksum(vocab_size, tokens, ends),
    }  # fmt: skip


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "none" / "past", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(SpecDecError, match=f"{path}: past outputs cannot be saved: {reason}"):
            SuffixProposer().save(path)
    with pytest.raises(InvalidArgumentError, match="path=5: expected the path of a file"):
        SuffixProposer().save(5)  # type: ignore[arg-type]
    assert list(tmp_path.parent.glob(f"{tmp_path.name}*")) == [tmp_path]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    past = PastOutputs(1000, 16)
    past.add(list(range(200)))
    file = tmp_path / "past"
    past.save(file, 300)
    content = file.read_bytes()
    at = content.index(np.arange(200, dtype=np.int32).tobytes()) + 40
    good = dict(np.load(file))
    wrong = {
        "missing": None,
        "empty": b"",
        "text": b"def f():\n    return 1\n",
        "cut": content[: len(content) // 2],
        "damaged": damage(content, at),
    }
    others: dict[str, dict[str, Any]] = {
        "changed": {**good, "tokens": good["tokens"][::-1].copy()},
        "newer": {**good, "format": np.int64(2)},
        "foreign": {"weights": np.zeros(3)},
        "objects": {**good, "tokens": np.array([{}, 1], dtype=object)},
        "several formats": {**good, "format": np.arange(3)},
        "no size": {**good, "vocab_size": np.array("x")},
        "two dimensions": signed(300, good["tokens"][None], good["ends"]),
        "wide": signed(300, good["tokens"].astype(np.int64), good["ends"]),
        "too long": signed(300, good["tokens"], good["ends"] + 1),
        "backwards": signed(300, good["tokens"], np.array([-5, 200])),
        "outside": signed(199, good["tokens"], good["ends"]),
    }
    for name, held in wrong.items():
        if held is not None:
            (tmp_path / name).write_bytes(held)
    for name, arrays in others.items():
        with (tmp_path / name).open("wb") as stream:
            np.savez(stream, **arrays)
    with (tmp_path / "bare").open("wb") as stream:
        np.save(stream, np.arange(4))
    with ZipFile(tmp_path / "no arrays", "w") as archive:
        for name in good:
            archive.writestr(name, "text")
    for name in [*wrong, *others, "bare", "no arrays"]:
        with pytest.raises(InvalidArgumentError) as caught:
            SuffixProposer(cache_file=tmp_path / name)
        message = str(caught.value)
        where = str(tmp_path / name)
        assert message.startswith(f"cache_file={where!r}: expected past outputs saved by specdec")
        assert "\n" not in message
        assert "pickle" not in message
    for each in (5, b"past"):
        with pytest.raises(InvalidArgumentError, match=r"cache_file=.*: expected the path of a fi"):
            SuffixProposer(cache_file=each)  # type: ignore[arg-type]
    assert SuffixProposer(cache_file=file).past.outputs == [list(range(200))]


# --- what it costs


def lines_run(work: Callable[[], object]) -> int:
    """Executed lines of the two modules: a count of operations, the same on any machine."""
    files, count = (suffix.__file__, suffix_automaton.__file__), 0

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        del frame, arg
        count += event == "line"
        return local

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        del event, arg
        return local if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def words(draw: random.Random, size: int) -> list[int]:
    """Text of 400 words of 2 to 6 tokens, the common ones much more often."""
    known = [random_text(draw, 200, draw.randrange(2, 7)) for _ in range(400)]
    text: list[int] = []
    while len(text) < size:
        text += known[min(int(draw.paretovariate(0.6)) - 1, 399)]
    return text[:size]


@pytest.mark.parametrize("mode", ["path", "tree"])
@pytest.mark.parametrize("kind", ["words", "one token", "period"])
def test_a_step_costs_about_the_same_behind_any_context(mode: suffix.Mode, kind: str) -> None:
    draw = random.Random(0)
    text = {
        "words": words(draw, 33000),
        "one token": [7] * 33000,
        "period": random_text(draw, 50, 90) * 370,
    }[kind]
    costs = []
    for context in (2000, 32000):
        proposer, its = SuffixProposer(mode=mode, max_depth=16), sequence(text[:context])
        proposer.start(its)

        def steps(
            proposer: SuffixProposer = proposer, its: Sequence = its, context: int = context
        ) -> None:
            for size in range(context, context + 600, 3):
                its.tokens += text[size : size + 3]
                proposer.propose([its], [6], PhiloxNoise())

        costs.append(lines_run(steps))
    assert costs[0] > 600
    assert costs[1] <= 1.2 * costs[0]


def test_memory_is_linear_in_the_context() -> None:
    draw = random.Random(1)
    for alphabet in (1, 2, 1000):
        counts = SuffixAutomaton(64)
        for token in random_text(draw, alphabet, 4000):
            counts.append(token)
        assert len(counts.length) <= 2 * 4000
        assert sum(map(len, counts.moves)) <= 3 * 4000


# --- in the engine


def outputs(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[Any]:
    names = [engine.add_request(prompt, params, seed=7) for prompt in prompts]
    while engine.scheduler.running:
        engine.step()
        engine.group.check_integrity()
    assert engine.group.used == 0
    by_name = {out.id: out for out in engine.take_finished()}
    return [by_name[name] for name in names]


@pytest.mark.parametrize("mode", ["path", "tree"])
def test_greedy_output_is_plain_decoding(target: Model, mode: suffix.Mode) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=0)
    plain = outputs(Engine(target, kv_memory=KV), PROMPTS, params)
    engine = Engine(
        target, proposer="suffix", proposer_options={"mode": mode}, policy="constant", kv_memory=KV
    )
    first, again = outputs(engine, PROMPTS, params), outputs(engine, PROMPTS, params)
    for found in (first, again):
        assert [out.token_ids for out in found] == [out.token_ids for out in plain]
    assert sum(out.stats.drafted for out in first) > 0
    # the past knows the outputs by heart
    assert sum(o.stats.accepted for o in again) > 0.5 * sum(len(o.token_ids) for o in again)


def test_sampled_output_follows_the_target_s_law(make_llama: Callable[..., Model]) -> None:
    model = make_llama(5, seed=3, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    prompt, runs = [1, 2, 1, 2, 1], 1000
    proposer = SuffixProposer(mode="tree", max_spec_offset=2)
    engine = Engine(model, proposer=proposer, policy="constant", kv_memory=1 << 24)
    counts = torch.zeros(5, 5, 5)
    drafted = accepted = 0
    for half in range(2):  # the second half drafts from the past of the first
        engine.add_request(prompt, SamplingParams(max_new_tokens=3), n=runs // 2, seed=half)
        for out in engine:
            counts[out.token_ids] += 1
            drafted += out.stats.drafted
            accepted += out.stats.accepted
    assert 0 < accepted < drafted
    law = torch.zeros(5, 5, 5)
    with torch.no_grad():
        for a in range(5):
            for b in range(5):
                p = model(torch.tensor([[*prompt, a, b]])).logits[0].softmax(-1)
                law[a, b] = p[4, a] * p[5, b] * p[6]
    expected = law.flatten() * runs
    common = expected >= 5
    seen = torch.cat((counts.flatten()[common], counts.flatten()[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    chi = float(((seen - wanted) ** 2 / wanted.clamp_min(1e-9)).sum())
    cells = len(wanted) - 1
    assert cells >= 5
    assert chi < cells + 4 * (2 * cells) ** 0.5  # four standard deviations


def test_a_sequence_that_ends_leaves_its_output_only(target: Model) -> None:
    proposer = SuffixProposer()
    engine = Engine(target, proposer=proposer, policy="constant", kv_memory=KV)
    params = SamplingParams(max_new_tokens=20, temperature=0)
    stays, leaves = (engine.add_request(prompt, params) for prompt in PROMPTS[:2])
    engine.step()
    engine.abort(leaves)
    assert [its.request_id for its in proposer._requests] == [stays]
    done = {out.id: list(out.token_ids) for out in engine}
    assert proposer._requests == {}
    assert proposer.past.outputs == [done[stays]]


def test_a_resumed_sequence_forgets_the_tail_that_it_gave_up(target: Model) -> None:
    spec, alone = (specdec.wrap(target, proposer=SuffixProposer(cache_tokens=0)) for _ in range(2))
    turns = [torch.tensor([PROMPTS[0] * 3]), torch.tensor([[*PROMPTS[0] * 2, 11, 12, 11]])]
    sampled: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "seed": 5}
    spec.generate(turns[0], **sampled)
    again = spec.generate(turns[1], **sampled)
    assert torch.equal(again, alone.generate(turns[1], **sampled))


# --- wrong options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "beam"}, "mode='beam': expected path or tree"),
        ({"max_depth": 1}, "max_depth=1: expected a whole number, 2 or more"),
        ({"cache_tokens": -1}, "cache_tokens=-1: expected a whole number, 0 or more"),
        ({"cache_tokens": 0.5}, "cache_tokens=0.5: expected a whole number, 0 or more"),
        ({"min_token_prob": 1.1}, "min_token_prob=1.1: expected 0.0 to 1.0"),
        ({"min_token_prob": None}, "min_token_prob=None: expected 0.0 to 1.0"),
        ({"max_spec_factor": -1}, "max_spec_factor=-1: expected 0.0 to inf"),
        ({"max_spec_offset": float("nan")}, "max_spec_offset=nan: expected -inf to inf"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        SuffixProposer(**options)
    assert str(caught.value) == message
