"""The engine: requests come, advance together, end, and leave no page behind."""

from collections import Counter
from collections.abc import Callable, Sequence as Items
from dataclasses import replace
from math import isnan
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    NoRepeatNGramLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

import specdec
from specdec import Engine, RunStats, SamplingParams, StepRecord, zoo
from specdec.errors import CacheFullError, InvalidArgumentError, UnsupportedModelError
from specdec.forward import jit
from specdec.proposers import DraftModelProposer
from specdec.rng import derive_seed
from specdec.runner import ModelRunner, SequenceRows
from specdec.sequence import Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

KV = 1 << 20
PROMPTS = [[0, 45, 67, 89], [0, 200, 31], [0, *range(20, 60)], [7]]
GREEDY = SamplingParams(max_new_tokens=16, temperature=0)
SAMPLED = SamplingParams(max_new_tokens=16, temperature=0.9, top_k=50, top_p=0.95, min_p=0.01)


@pytest.fixture(scope="module")
def make(target: Model, draft: Model) -> Callable[..., Engine]:
    """An engine of the tiny pair."""

    def build(**options: Any) -> Engine:
        return Engine(target, **{"draft": draft, "kv_memory": KV, **options})

    return build


def check_all_free(engine: Engine) -> None:
    engine.group.check_integrity()
    assert engine.group.used == 0
    assert engine.scheduler.running == []


def run(engine: Engine) -> dict[tuple[str, int], tuple[int, ...]]:
    """Steps to the end under watch: (request, sample) -> tokens."""
    emitted: dict[tuple[str, int], tuple[int, ...]] = {}
    while engine.scheduler.running:
        for record in engine.step():
            key = record.request_id, record.index
            emitted[key] = emitted.get(key, ()) + record.tokens
        engine.group.check_integrity()
    outputs = {(out.id, out.index): out.token_ids for out in engine.take_finished()}
    assert all(outputs[key][-len(tokens) :] == tokens for key, tokens in emitted.items())
    check_all_free(engine)
    return outputs


def one(engine: Engine, prompt: Items[int], params: SamplingParams, **more: Any) -> tuple[int, ...]:
    """What a request gets alone."""
    name = engine.add_request(prompt, params, **more)
    return run(engine)[name, 0]


# --- requests


def test_requests_in_one_batch_get_what_they_get_alone(make: Callable[..., Engine]) -> None:
    penalised = SamplingParams(
        max_new_tokens=9,
        temperature=0.7,
        processors=LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)]),
    )
    mixed = [
        (PROMPTS[0], GREEDY, 1), (PROMPTS[1], SAMPLED, 2), (PROMPTS[2], SAMPLED, 3),
        (PROMPTS[3], penalised, 4), (PROMPTS[2], GREEDY, 5), (PROMPTS[1], SAMPLED, 6),
    ]  # fmt: skip
    engine = make(num_draft_tokens=4)  # an adaptive number promises the law alone
    alone = [one(engine, prompt, params, seed=seed) for prompt, params, seed in mixed]
    names = [engine.add_request(prompt, params, seed=seed) for prompt, params, seed in mixed]
    together = run(engine)
    assert [together[name, 0] for name in names] == alone
    assert len(set(alone[3])) == 9
    assert alone[1] != alone[5]


@pytest.mark.parametrize("drafting", [{"draft": None}, {"num_draft_tokens": 4}], ids=["no", "yes"])
def test_requests_sampled_alike_are_judged_together_as_alone(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, drafting: dict[str, Any]
) -> None:
    """What is alike may be of any length; another top-k is another law."""
    engine = make(**drafting)
    alike = [SAMPLED, replace(SAMPLED, max_new_tokens=9), replace(SAMPLED)]
    mixed = [*alike, replace(SAMPLED, top_k=49)]
    alone = [one(engine, p, s, seed=3) for p, s in zip(PROMPTS, mixed, strict=True)]
    judged: list[list[int]] = []
    judge = engine.verifier._judge

    def spy(rule: str, sequences: Items[Sequence], *rest: Any) -> Any:
        judged.append([len(s.tokens) for s in sequences])
        return judge(rule, sequences, *rest)

    monkeypatch.setattr(engine.verifier, "_judge", spy)
    names = [engine.add_request(p, s, seed=3) for p, s in zip(PROMPTS, mixed, strict=True)]
    engine.step()
    assert judged == [[len(p) for p in PROMPTS[:3]], [len(PROMPTS[3])]]
    together = run(engine)
    assert [together[name, 0] for name in names] == alone


def test_request_that_joins_later_changes_nothing(make: Callable[..., Engine]) -> None:
    engine = make(num_draft_tokens=4)
    alone = [one(engine, PROMPTS[0], SAMPLED, seed=1), one(engine, PROMPTS[2], GREEDY)]
    first = engine.add_request(PROMPTS[0], SAMPLED, seed=1)
    for _ in range(2):
        engine.step()
    second = engine.add_request(torch.tensor([PROMPTS[2]]), GREEDY)
    assert run(engine) == {(first, 0): alone[0], (second, 0): alone[1]}


def test_greedy_equals_the_model_s_own_generate(make: Callable[..., Engine], target: Model) -> None:
    for prompt in PROMPTS:
        out = target.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
        assert one(make(), prompt, GREEDY) == tuple(out[0, len(prompt) :].tolist())


def test_samples_of_a_request_have_their_own_seeds(make: Callable[..., Engine]) -> None:
    engine = make(num_draft_tokens=4)
    name = engine.add_request(PROMPTS[0], SAMPLED, n=3, seed=7)
    samples = run(engine)
    assert set(samples) == {(name, 0), (name, 1), (name, 2)}
    for index in range(3):
        assert samples[name, index] == one(
            engine, PROMPTS[0], SAMPLED, seed=derive_seed(7, 0, index)
        )
    assert len(set(samples.values())) == 3


def test_seed_of_torch_governs_a_request_without_one(make: Callable[..., Engine]) -> None:
    engine = make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = [one(engine, PROMPTS[0], SAMPLED) for _ in range(2)]
        torch.manual_seed(3)
        assert [one(engine, PROMPTS[0], SAMPLED) for _ in range(2)] == first
    assert first[0] != first[1]


def test_iterating_yields_every_sample_when_it_is_done(make: Callable[..., Engine]) -> None:
    engine = make()
    short = SamplingParams(max_new_tokens=2, temperature=0)
    engine.add_request(PROMPTS[0], GREEDY, request_id="long")
    engine.add_request(PROMPTS[1], short, request_id="short", n=2)
    outputs = list(engine)
    assert [(out.id, out.index) for out in outputs] == [("short", 0), ("short", 1), ("long", 0)]
    assert [out.finish_reason for out in outputs] == ["length"] * 3
    assert [len(out.token_ids) for out in outputs] == [2, 2, 16]
    assert [out.stats.tokens for out in outputs] == [2, 2, 16]
    assert list(engine) == []
    assert engine.step() == []
    check_all_free(engine)


def test_request_ids_are_given_or_made_and_never_used_twice_at_once(
    make: Callable[..., Engine],
) -> None:
    engine = make()
    made = [engine.add_request(PROMPTS[0], GREEDY) for _ in range(2)]
    assert len(set(made)) == 2
    assert engine.add_request(PROMPTS[0], GREEDY, request_id="mine") == "mine"
    with pytest.raises(InvalidArgumentError, match="request_id='mine' is running already"):
        engine.add_request(PROMPTS[0], GREEDY, request_id="mine")
    run(engine)
    assert engine.add_request(PROMPTS[0], GREEDY, request_id="mine") == "mine"
    run(engine)


def test_stop_callable_sees_prompt_and_tokens_and_ends_the_request(
    make: Callable[..., Engine],
) -> None:
    engine = make()
    free = one(engine, PROMPTS[0], GREEDY)
    seen: list[list[int]] = []

    def stop(tokens: list[int]) -> bool:
        seen.append(list(tokens))
        return len(tokens) == len(PROMPTS[0]) + 5

    name = engine.add_request(PROMPTS[0], GREEDY, stop=stop)
    [out] = list(engine)
    assert (out.id, out.token_ids, out.finish_reason) == (name, free[:5], "stop")
    assert seen == [[*PROMPTS[0], *free[:n]] for n in range(1, 6)]
    check_all_free(engine)


def test_end_token_ends_a_request_inside_an_accepted_block(
    target: Model,
) -> None:
    engine = Engine(target, draft=target, num_draft_tokens=7, kv_memory=KV)
    free = one(engine, PROMPTS[0], GREEDY)
    for at in (0, 3, 7):
        params = SamplingParams(max_new_tokens=16, temperature=0, eos_token_ids=(free[at], 299))
        engine.add_request(PROMPTS[0], params)
        wanted = free[: free.index(free[at]) + 1]
        records = [record for _ in range(at // 8 + 1) for record in engine.step()]
        assert sum((record.tokens for record in records), ()) == wanted
        assert records[-1].finish_reason == "stop"
        [out] = list(engine)
        assert (out.token_ids, out.finish_reason) == (wanted, "stop")


def test_aborted_request_keeps_what_it_said_and_frees_its_pages(
    make: Callable[..., Engine],
) -> None:
    engine = make()
    full = one(engine, PROMPTS[0], GREEDY)
    engine.add_request(PROMPTS[0], GREEDY, request_id="a", n=2)
    engine.add_request(PROMPTS[1], GREEDY, request_id="b")
    engine.step()
    engine.abort("a")
    engine.group.check_integrity()
    done = {(out.id, out.index): out for out in engine}
    assert [done["a", i].finish_reason for i in range(2)] == ["abort", "abort"]
    count = len(done["a", 0].token_ids)
    assert 0 < count < 16
    assert done["a", 0].token_ids == full[:count]
    assert done["b", 0].finish_reason == "length"
    check_all_free(engine)


@pytest.mark.parametrize("name", ["a", "never"], ids=["finished", "unknown"])
def test_abort_of_a_request_that_is_not_running_is_refused(
    make: Callable[..., Engine], name: str
) -> None:
    engine = make()
    one(engine, PROMPTS[0], GREEDY, request_id="a")
    engine.add_request(PROMPTS[0], GREEDY, request_id="b")
    with pytest.raises(InvalidArgumentError, match=f"request_id='{name}' is not running.*: b"):
        engine.abort(name)


# --- an interrupted step


class Interrupts(DraftModelProposer):
    """Raises where it is told to, once."""

    def __init__(self, runner: ModelRunner, where: str) -> None:
        super().__init__(runner)
        self.where = where
        self.armed = False

    def hit(self, where: str) -> None:
        if self.armed and where == self.where:
            self.armed = False
            raise KeyboardInterrupt

    def propose(self, *args: Any) -> Any:
        trees = super().propose(*args)
        self.hit("after drafting")
        return trees

    def observe(self, sequences: Any, verdicts: Any) -> None:
        super().observe(sequences, verdicts)
        self.hit("after verifying")


@pytest.mark.parametrize("where", ["after drafting", "after verifying", "between two tokens"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_step_that_was_interrupted_can_be_taken_again(
    target: Model,
    draft: Model,
    make: Callable[..., Engine],
    where: str,
    params: SamplingParams,
) -> None:
    # gumbel: the law of the other rules does not depend on where a step begins, their tokens do
    wanted = [one(make(verification="gumbel"), p, params, seed=4) for p in PROMPTS[:3]]
    proposer = Interrupts(ModelRunner(draft), where)
    engine = Engine(
        target, proposer=proposer, verification="gumbel", policy="constant", kv_memory=KV
    )

    def stop(tokens: list[int]) -> bool:
        if len(tokens) == len(PROMPTS[1]) + 7:  # not in the first step
            proposer.hit("between two tokens")
        return False

    for prompt in PROMPTS[:3]:
        engine.add_request(prompt, params, seed=4, stop=stop if prompt is PROMPTS[1] else None)
    engine.step()
    proposer.armed = True
    with pytest.raises(KeyboardInterrupt):
        list(engine)
    engine.group.check_integrity()
    outputs = sorted(engine, key=lambda out: out.id)
    assert [out.token_ids for out in outputs] == wanted
    check_all_free(engine)


# --- the cache


def test_pool_is_allocated_at_once_and_stays_within_kv_memory(make: Callable[..., Engine]) -> None:
    engine = make(kv_memory=300_000)

    def held() -> int:
        return sum(
            pages.numel() * pages.itemsize
            for memory in engine.group.memory.values()
            for pages in (*memory.keys, *memory.values)
        )

    before = held()
    assert 0.9 * 300_000 < before <= 300_000
    for prompt in PROMPTS:
        engine.add_request(prompt, GREEDY)
    run(engine)
    assert held() == before


def test_request_that_does_not_fit_raises_and_takes_nothing(make: Callable[..., Engine]) -> None:
    engine = make(kv_memory=64 * 1024)
    slots = engine.group.pool.num_pages * 16
    assert 16 < slots < 250
    long = SamplingParams(max_new_tokens=250, temperature=0)
    with pytest.raises(CacheFullError, match=r"pages .* are needed, .* are free; raise kv_memory"):
        engine.add_request(PROMPTS[0], long)
    check_all_free(engine)
    assert len(one(engine, PROMPTS[0], GREEDY)) == 16


def test_samples_are_admitted_all_or_none(make: Callable[..., Engine]) -> None:
    engine = make(kv_memory=64 * 1024)
    fits = engine.group.pool.num_pages // 2  # 20 slots: two pages each
    with pytest.raises(CacheFullError):
        engine.add_request(PROMPTS[0], GREEDY, n=fits + 1)
    check_all_free(engine)
    engine.add_request(PROMPTS[0], GREEDY, n=fits)
    assert len(run(engine)) == fits


@pytest.mark.parametrize("kv_memory", [0, 100])
def test_kv_memory_below_one_page_is_refused(make: Callable[..., Engine], kv_memory: int) -> None:
    with pytest.raises(CacheFullError, match=f"kv_memory={kv_memory} bytes holds not even one"):
        make(kv_memory=kv_memory)


def test_wrap_grows_its_pool_up_to_kv_memory(target: Model, draft: Model) -> None:
    spec = specdec.wrap(target, draft=draft, kv_memory=64 * 1024)
    pool = spec.engine.group.pool
    assert pool.num_pages == 0
    spec.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=8)
    assert 0 < pool.num_pages <= spec.engine.group.max_pages
    with pytest.raises(CacheFullError):
        spec.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=250)
    assert pool.num_pages <= spec.engine.group.max_pages


class Counting(ModelRunner):
    """Counts the rows it computes."""

    rows = 0

    def score(self, rows: Items[SequenceRows]) -> Tensor:
        self.rows += sum(len(r.tokens) + (0 if r.nodes is None else len(r.nodes)) for r in rows)
        return super().score(rows)


def test_resumed_cache_computes_only_what_is_new_and_says_the_same(
    target: Model, draft: Model
) -> None:
    counting = Counting(target)
    engine = Engine(counting, draft=draft, kv_memory=KV, num_draft_tokens=3)

    def turn(prompt: list[int], **more: Any) -> tuple[Sequence, int]:
        before = counting.rows
        sequence = engine.admit("chat", 0, prompt, GREEDY.law(), 1, 12, (), None, **more)
        while sequence.finish_reason is None:
            engine.step()
            engine.group.check_integrity()
        engine.take_finished()
        return sequence, counting.rows - before

    first, _ = turn(PROMPTS[2], keep_cache=True)
    assert engine.group.used > 0
    longer = [*first.tokens, 11, 12, 13]
    again, rows = turn(longer, keep_cache=True, resume=first)
    fresh, all_rows = turn(longer)
    assert again.tokens == fresh.tokens
    # the last token of the first turn was never computed
    assert all_rows - rows == len(first.tokens) - 1

    changed = [*longer[:20], 99, *longer[21:]]
    shared, some_rows = turn(changed, keep_cache=True, resume=again)
    fresh, all_rows = turn(changed)
    assert shared.tokens == fresh.tokens
    assert all_rows - some_rows == 20

    same, few_rows = turn(changed, resume=shared)
    assert same.tokens == fresh.tokens
    assert all_rows - few_rows == len(changed) - 1
    check_all_free(engine)


def test_context_cuts_a_request(make: Callable[..., Engine], target: Model) -> None:
    prompt = [5 + i % 200 for i in range(250)]
    long = SamplingParams(max_new_tokens=100, temperature=0)
    engine = make(num_draft_tokens=7)
    engine.add_request(prompt, long)
    [out] = list(engine)
    assert (len(out.token_ids), out.finish_reason) == (7, "length")  # the last one is not fed back
    wanted = target.generate(
        torch.tensor([prompt]), max_new_tokens=7, do_sample=False, eos_token_id=None
    )
    assert out.token_ids == tuple(wanted[0, 250:].tolist())
    assert len(one(engine, [5] * 256, long)) == 1
    with pytest.raises(InvalidArgumentError, match="257 tokens, the target's context holds 256"):
        engine.add_request([5] * 257, long)
    check_all_free(engine)


def test_shorter_context_of_the_draft_only_ends_drafting(
    target: Model, make_llama: Callable[..., Model]
) -> None:
    short = make_llama(target.config.vocab_size, seed=0, max_position_embeddings=64)
    short.load_state_dict(target.state_dict())
    engine = Engine(target, draft=short, kv_memory=KV, num_draft_tokens=5)
    params = SamplingParams(max_new_tokens=60, temperature=0)
    plain = one(Engine(target, kv_memory=KV), PROMPTS[2], params)
    assert one(engine, PROMPTS[2], params) == plain
    # up to the 64th token everything is drafted, nothing is behind it
    assert engine.stats.drafted_lengths[0] >= 60 - 24
    assert engine.stats.drafted_lengths[5] > 0


# --- records and sums


def test_records_say_what_happened_in_each_step(target: Model) -> None:
    engine = Engine(target, draft=target, num_draft_tokens=3, kv_memory=KV)
    name = engine.add_request(PROMPTS[0], SamplingParams(max_new_tokens=10, temperature=0))
    records = [engine.step() for _ in range(3)]
    assert all(len(step) == 1 for step in records)
    assert [(r.request_id, r.index, len(r.tokens), r.drafted, r.accepted, r.finish_reason)
            for [r] in records] == [
        (name, 0, 4, 3, 3, None),
        (name, 0, 4, 3, 3, None),
        (name, 0, 2, 1, 1, "length"),  # the last token need not be drafted
    ]  # fmt: skip
    assert engine.stats.tokens == 10
    assert engine.stats.steps == 3
    assert engine.stats.tokens_per_target_pass == 10 / 3


def test_sums_over_records_are_right() -> None:
    stats = RunStats()
    assert isnan(stats.acceptance_rate)
    assert isnan(stats.tokens_per_target_pass)
    assert isnan(stats.tokens_per_second)
    assert stats.acceptance_by_position() == []
    for drafted, accepted, kept in [
        (4, 4, 5),
        (4, 1, 2),
        (4, 2, 3),
        (2, 0, 1),
        (0, 0, 1),
        (2, 2, 1),
    ]:
        stats.add(StepRecord("r", 0, (9,) * kept, drafted, accepted))
    assert (stats.tokens, stats.steps, stats.drafted, stats.accepted) == (13, 6, 16, 9)
    assert stats.acceptance_rate == 9 / 16
    assert stats.tokens_per_target_pass == 13 / 6
    assert stats.acceptance_by_position() == [4 / 5, 3 / 5, 1 / 3, 1 / 3]
    assert stats.drafted_lengths == Counter({4: 3, 2: 2, 0: 1})
    stats.total_seconds, stats.draft_seconds, stats.verify_seconds = 2.0, 0.5, 1.25
    assert stats.tokens_per_second == 6.5
    assert stats.other_seconds == 0.25
    assert stats.as_dict() == {
        "tokens": 13, "steps": 6, "drafted": 16, "accepted": 9,
        "acceptance_rate": 0.5625, "tokens_per_target_pass": 2.166667, "tokens_per_second": 6.5,
        "acceptance_by_position": [0.8, 0.6, 0.333333, 0.333333],
        "acceptance_by_rank": [],
        "seconds": {"total": 2.0, "draft": 0.5, "verify": 1.25, "other": 0.25},
        "lossless": True, "slow_processors": [],
    }  # fmt: skip
    assert RunStats().as_dict()["acceptance_rate"] is None


def test_engine_s_sums_are_those_of_its_requests(make: Callable[..., Engine]) -> None:
    engine = make()
    for prompt in PROMPTS:
        engine.add_request(prompt, SAMPLED, seed=1)
    parts = [out.stats for out in engine]
    for name in ("tokens", "steps", "drafted", "accepted"):
        assert getattr(engine.stats, name) == sum(getattr(part, name) for part in parts)
    for name in ("total_seconds", "draft_seconds", "verify_seconds"):
        assert getattr(engine.stats, name) == pytest.approx(sum(getattr(p, name) for p in parts))


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree": "auto"}, "tree='auto'"),
        ({"draft_window": 4}, "draft_window=4: expected a whole number of tokens from 16 on"),
        ({"proposer_options": {"n": 3}}, "proposer_options="),
        ({"policy": "clever"}, "policy='clever': expected one of auto, constant, "),
        ({"num_draft_tokens": -1}, "num_draft_tokens=-1: expected a whole number, 0 to"),
        ({"num_draft_tokens": 2.5}, r"num_draft_tokens=2\.5: expected a whole number, 0 to"),
        ({"num_draft_tokens": True}, "num_draft_tokens=True"),
        ({"verification": "blok"}, "verification='blok': expected 'auto' or one of block, "),
        ({"proposer": "crystal ball"}, "proposer='crystal ball': expected one of beam_tree"),
        ({"proposer": "draft", "draft": None}, "proposer='draft' needs draft="),
        ({"draft": []}, "draft: expected one model or more, got none"),
        ({"draft": "small"}, "expected a transformers PreTrainedModel, got builtins.str"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value)),
)
def test_option_that_is_not_understood_is_refused_by_name(
    make: Callable[..., Engine], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make(**options)


def test_proposer_object_and_draft_exclude_each_other(
    make: Callable[..., Engine], draft: Model
) -> None:
    with pytest.raises(InvalidArgumentError, match="either draft or a Proposer object"):
        make(proposer=DraftModelProposer(ModelRunner(draft)))


def test_draft_with_another_vocabulary_is_refused(
    target: Model, make_llama: Callable[..., Model]
) -> None:
    other = make_llama(5000, seed=1, hidden_size=8)
    with pytest.raises(
        InvalidArgumentError, match=r"vocabulary has 5000 tokens, the target's 30[0-9]"
    ):
        Engine(target, draft=other, kv_memory=KV)


def test_greedy_rule_refuses_a_sampled_request_before_it_takes_a_page(
    make: Callable[..., Engine],
) -> None:
    engine = make(verification="greedy")
    with pytest.raises(InvalidArgumentError, match="verification='greedy' needs temperature 0"):
        engine.add_request(PROMPTS[0], SAMPLED)
    check_all_free(engine)
    assert len(one(engine, PROMPTS[0], GREEDY)) == 16


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([4, -1], {}, "prompt token -1: expected 0 to"),
        ([4, 100_000], {}, "prompt token 100000: expected 0 to"),
        (torch.ones(2, 3, dtype=torch.long), {}, r"input_ids: expected one prompt, got shape \(2"),
        (torch.ones(3), {}, "input_ids: expected token ids, got torch.float32"),
        ([4], {"n": 0}, "n=0: expected at least 1"),
        ([4], {"seed": -1}, "seed=-1"),
    ],
    ids=["empty", "negative", "too large", "two prompts", "floats", "n", "seed"],
)
def test_bad_request_is_refused(
    make: Callable[..., Engine], prompt: Any, more: dict[str, Any], message: str
) -> None:
    engine = make()
    with pytest.raises(InvalidArgumentError, match=message):
        engine.add_request(prompt, GREEDY, **more)
    check_all_free(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected at least 1"),
        ({"temperature": -0.1}, r"temperature=-0\.1: expected 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, r"top_p=0\.0: expected in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"min_p": 2.0}, r"min_p=2\.0: expected in \[0, 1\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value)),
)
def test_bad_sampling_parameter_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        SamplingParams(**options)


def test_whole_numbers_are_fine_as_sampling_parameters(make: Callable[..., Engine]) -> None:
    params = SamplingParams(max_new_tokens=4, temperature=2, top_p=1, min_p=0)
    assert len(one(make(), PROMPTS[0], params, seed=1)) == 4


def test_recurrent_model_is_refused_with_the_reason() -> None:
    config = MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM keeps a recurrent state"):
        Engine(MambaForCausalLM(config), kv_memory=KV)


def test_encoder_decoder_is_refused_with_the_reason() -> None:
    config = T5Config(vocab_size=32, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-dec"):
        Engine(T5ForConditionalGeneration(config), kv_memory=KV)


# --- the built-in pair


def test_builtin_pair_serves_a_mixed_batch_as_alone() -> None:
    big, small = (
        AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32)
        for name in ("big", "small")
    )
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"))
    engine = Engine(big, draft=small, num_draft_tokens=4, kv_memory=32 << 20)
    texts = ["def quicksort(items):", "class Stack:\n", "import os\n"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    params = [GREEDY, SAMPLED, GREEDY]
    alone = [one(engine, p, s, seed=2) for p, s in zip(prompts, params, strict=True)]
    names = [engine.add_request(p, s, seed=2) for p, s in zip(prompts, params, strict=True)]
    together = run(engine)
    assert [together[name, 0] for name in names] == alone
    assert engine.stats.acceptance_rate > 0.3


@pytest.mark.skipif(bool(jit.why_not()), reason=jit.why_not())
def test_steps_of_few_rows_run_on_one_thread() -> None:
    """Two threads that share a core with another process wait for each other at every operator."""
    small = AutoModelForCausalLM.from_pretrained(zoo.path("small"))
    engine = Engine(small, draft=small, num_draft_tokens=2, kv_memory=KV)
    seen: list[int] = []
    score = engine.target.score

    def spy(rows: Items[SequenceRows]) -> Tensor:
        seen.append(torch.get_num_threads())
        return score(rows)

    engine.target.score = spy  # type: ignore[method-assign]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        engine.add_request(PROMPTS[0] * 10, SamplingParams(max_new_tokens=6, temperature=0))
        list(engine)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen[0] == 2  # the prompt is worth them
    assert set(seen[1:]) == {1}
