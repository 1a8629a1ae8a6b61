"""Prompt lookup: the draft is what a search of the whole context would find, at a constant cost."""

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

import specdec
from specdec import Engine, SamplingParams
from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers import ngram
from specdec.proposers.ngram import NgramIndex, NgramProposer
from specdec.rng import PhiloxNoise
from specdec.sequence import Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

KV = 1 << 20
CPU = torch.device("cpu")
ALL = [[5, 6, 7, 5, 6], [9, 9, 9, 9], [3, 4], [8]]


def searched(
    tokens: list[int], shortest: int, longest: int, occurrence: str, branches: int, budget: int
) -> list[list[int]]:
    """The definition: scans the context for every length, longest first."""
    starts: dict[int, int] = {}
    for n in range(longest, shortest - 1, -1):
        if n > len(tokens):
            continue
        end = tokens[len(tokens) - n :]
        where = [i for i in range(n, len(tokens)) if tokens[i - n : i] == end]
        for i in where[::-1] if occurrence == "latest" else where:
            if len(starts) < min(branches, budget):
                starts.setdefault(tokens[i], i)
    chains = []
    for left, start in zip(range(len(starts), 0, -1), starts.values(), strict=True):
        share = -(-budget // left)
        budget -= share
        grown = list(tokens)
        for i in range(share):
            grown.append(grown[start + i])
        chains.append(grown[len(tokens) :])
    return chains


def sequence(tokens: list[int]) -> Sequence:
    cache = CacheGroup(16, 16, CPU).open(1)
    law = SamplingParams(temperature=0).law()
    return Sequence("one", 0, tokens, len(tokens), law, 0, 64, frozenset(), None, cache)


def chains_of(tokens: list[int], **options: Any) -> list[list[int]]:
    """Every leaf's path in one proposal for these tokens."""
    budget = options.pop("budget", 4)
    proposer, its = NgramProposer(**options), sequence(tokens)
    proposer.start(its)
    [tree] = proposer.propose([its], [budget], PhiloxNoise())
    assert tree.laws is None
    assert len(tree) <= budget
    paths: list[list[int]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents, strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    above = set(tree.parents)
    return [path for node, path in enumerate(paths) if node not in above]


# --- what is proposed


@pytest.mark.parametrize("occurrence", ["latest", "earliest"])
@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 3), (2, 4), (3, 7)])
def test_index_finds_what_a_search_finds(
    occurrence: ngram.Occurrence, branches: int, shortest: int, longest: int
) -> None:
    draw = random.Random(f"{occurrence} {branches} {shortest} {longest}")
    found_any = 0
    for alphabet in (1, 2, 3, 5):
        for _ in range(12):
            tokens = [draw.randrange(alphabet) for _ in range(draw.choice((1, 2, 30, 63)))]
            index = NgramIndex(shortest, longest, occurrence, branches)
            size = 0
            while size < len(tokens):  # grows by a few tokens at a time, as in decoding
                size = min(len(tokens), size + draw.randrange(1, 5))
                index.extend(tokens[:size])
                budget = draw.randrange(7)
                found = index.continuations(tokens[:size], budget)
                expected = searched(tokens[:size], shortest, longest, occurrence, branches, budget)
                assert found == expected
                found_any += bool(found)
    assert found_any > 100


def test_longest_match_comes_first_then_the_chosen_occurrence() -> None:
    # 1 2 goes on with 3, later with 4; 2 alone last with 5
    tokens = [1, 2, 3, 8, 1, 2, 4, 8, 2, 5, 9, 1, 2]
    assert chains_of(tokens, budget=1) == [[4]]
    assert chains_of(tokens, budget=1, occurrence="earliest") == [[3]]
    assert chains_of(tokens, budget=1, max_ngram=1) == [[5]]
    assert chains_of([*tokens[:-2], 2], budget=1) == [[5]]


def test_a_copy_goes_on_into_itself() -> None:
    assert chains_of([7, 1, 2, 3, 1, 2, 3], budget=8) == [[1, 2, 3, 1, 2, 3, 1, 2]]
    assert chains_of([4, 4], budget=5) == [[4] * 5]


def test_branches_share_the_budget() -> None:
    tokens = [1, 2, 3, 3, 1, 2, 4, 4, 1, 2, 5, 5, 1, 2]
    assert chains_of(tokens, branches=3, budget=7) == [[5, 5, 1], [4, 4], [3, 3]]
    assert chains_of(tokens, branches=3, budget=2) == [[5], [4]]
    assert chains_of(tokens, branches=3, budget=0) == []


def test_nothing_is_proposed_without_a_match() -> None:
    assert chains_of([1, 2, 3, 4]) == []
    assert chains_of([1]) == []
    assert chains_of([1, 2, 3, 9, 3], min_ngram=2) == []


# --- what it costs


def lines_run(work: Callable[[], object], file: str) -> int:
    """Executed lines of one source file: a count of operations, the same on any machine."""
    count = 0

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        del frame, arg
        count += event == "line"
        return local

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        del event, arg
        return local if frame.f_code.co_filename == file else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("alphabet", [2, 1000])
def test_a_token_costs_the_same_behind_any_context(branches: int, alphabet: int) -> None:
    draw = random.Random(0)
    text = [draw.randrange(alphabet) for _ in range(33000)]
    costs = []
    for context in (2000, 32000):
        index = NgramIndex(1, 4, "latest", branches)
        index.extend(text[:context])

        def steps(index: NgramIndex = index, context: int = context) -> None:
            for size in range(context, context + 300, 3):
                head = text[:size]
                index.extend(head)
                index.continuations(head, 6)

        costs.append(lines_run(steps, ngram.__file__))
    assert costs[0] > 300
    assert costs[1] <= 1.2 * costs[0]


def test_memory_is_linear_in_the_context() -> None:
    draw = random.Random(1)
    for alphabet in (1, 2, 1000):
        index = NgramIndex(1, 4, "latest", 3)
        index.extend([draw.randrange(alphabet) for _ in range(4000)])
        assert len(index._children) <= 4 * 4000
        assert sum(map(len, index._starts)) <= 4 * 4000
        assert max(map(len, index._starts)) <= 3


# --- in the engine


def engine_of(target: Model, **options: Any) -> Engine:
    return Engine(
        target, proposer="ngram", proposer_options=options, policy="constant", kv_memory=KV
    )


def outputs(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[Any]:
    names = [engine.add_request(prompt, params, seed=7) for prompt in prompts]
    while engine.scheduler.running:
        engine.step()
        engine.group.check_integrity()
    assert engine.group.used == 0
    assert isinstance(engine.proposer, NgramProposer)
    assert engine.proposer._indexes == {}
    by_name = {out.id: out for out in engine.take_finished()}
    return [by_name[name] for name in names]


@pytest.mark.parametrize("options", [{}, {"branches": 3}, {"occurrence": "earliest"}])
def test_greedy_output_is_plain_decoding(target: Model, options: dict[str, Any]) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=0)
    plain = Engine(target, kv_memory=KV)
    names = [plain.add_request(prompt, params) for prompt in ALL]
    expected = {out.id: out.token_ids for out in plain}
    found = outputs(engine_of(target, **options), ALL, params)
    assert [out.token_ids for out in found] == [expected[name] for name in names]
    assert sum(out.stats.drafted for out in found) > 0


def test_sampled_output_follows_the_target_s_law(make_llama: Callable[..., Model]) -> None:
    # Tokens 3 and 4 after a prompt that repeats itself, against the exact law of the pairs.
    model = make_llama(5, seed=3, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    prompt, runs = [1, 2, 1, 2, 1], 1000
    engine = Engine(model, proposer=NgramProposer(branches=2), policy="constant", kv_memory=1 << 24)
    params = SamplingParams(max_new_tokens=3)
    engine.add_request(prompt, params, n=runs, seed=0)
    counts = torch.zeros(5, 5, 5)
    drafted = accepted = 0
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


def test_a_sequence_that_ends_leaves_nothing_behind(target: Model) -> None:
    engine = engine_of(target)
    proposer = engine.proposer
    assert isinstance(proposer, NgramProposer)
    params = SamplingParams(max_new_tokens=40, temperature=0)
    stays, leaves = (engine.add_request(prompt, params) for prompt in ALL[:2])
    engine.step()
    engine.abort(leaves)
    assert [its.request_id for its in proposer._indexes] == [stays]
    list(engine)
    assert proposer._indexes == {}


def test_a_resumed_sequence_forgets_the_tail_that_it_gave_up(target: Model) -> None:
    spec = specdec.wrap(target, proposer="ngram")
    alone = specdec.wrap(target, proposer="ngram")
    turns = [torch.tensor([ALL[0] * 3]), torch.tensor([[*ALL[0] * 2, 11, 12, 11]])]
    sampled: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "seed": 5}
    spec.generate(turns[0], **sampled)
    again = spec.generate(turns[1], **sampled)
    assert torch.equal(again, alone.generate(turns[1], **sampled))


def test_match_is_the_length_of_the_longest_ngram_that_occurred_before() -> None:
    index = NgramIndex(2, 4, "latest", 1)
    text = [1, 2, 3, 4, 5, 9, 2, 3, 4, 5, 7, 5, 7, 8]
    index.extend(text[:6])
    assert index.match == 0
    for end, wanted in ((7, 0), (8, 2), (9, 3), (10, 4), (11, 0), (12, 0), (13, 2), (14, 0)):
        index.extend(text[:end])
        assert index.match == wanted, end
        assert (index.match > 0) == bool(index.continuations(text[:end], 3))


# --- wrong options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_ngram": 0}, "max_ngram=0: expected a whole number, 1 to 32"),
        ({"max_ngram": 33}, "max_ngram=33: expected a whole number, 1 to 32"),
        ({"max_ngram": 2, "min_ngram": 3}, "max_ngram=2: expected a whole number, 3 to 32"),
        ({"min_ngram": "2"}, "min_ngram='2': expected a whole number, 1 to 32"),
        ({"branches": True}, "branches=True: expected a whole number, 1 or more"),
        ({"occurrence": "last"}, "occurrence='last': expected latest or earliest"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        NgramProposer(**options)
    assert str(caught.value) == message


def test_situation_tells_long_copies_from_short_ones() -> None:
    its = sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])
    proposer = NgramProposer(max_ngram=3, edits=False)
    proposer.start(its)
    found = []
    for token in (1, 2, 3, 4, 5, 6, 7, 8, 50):
        its.tokens.append(token)
        found.append(proposer.situation(its))
    # the whole match is 1, 2, .. 8 tokens, then none
    assert found == [1, 2, 3, 3 + 1, 3 + 2, 3 + 2, 3 + 3, 3 + 3, 0]
    proposer.finish(its)


def test_a_copy_that_is_followed_has_situations_of_its_own() -> None:
    its, proposer = sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]), NgramProposer(max_ngram=3)
    proposer.start(its)
    found = []
    for token in (1, 2, 3, 4, 5, 6, 50, 8, 9):
        its.tokens.append(token)
        found.append(proposer.situation(its))
    edit = 3 + 6 + 1
    # from six tokens on; an edit; back behind it; the prompt's end is the copy's
    assert found == [1, 2, 3, 3 + 1, 3 + 2, edit + 3, edit, edit + 1, 2]
    proposer.finish(its)


def test_match_goes_back_to_the_start_of_the_text_at_most() -> None:
    its, proposer = sequence([4, 4, 4, 4]), NgramProposer(max_ngram=2)
    proposer.start(its)
    assert proposer.situation(its) == 2 + 1  # the last three tokens occurred before
