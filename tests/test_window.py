"""A draft with a window: what it sees, what it holds, and that nobody can tell from the output."""

from collections.abc import Callable, Sequence as Items
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import specdec
from specdec import Engine, SamplingParams
from specdec.cache import CacheGroup
from specdec.engine import PAGE_SIZE
from specdec.errors import InvalidArgumentError
from specdec.forward import ModuleForward
from specdec.proposers.model import DraftModel, window_slots
from specdec.rng import Noise
from specdec.runner import ModelRunner, SequenceRows
from specdec.sequence import Sequence
from specdec.tree import TokenTree

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

VOCAB, CONTEXT, WINDOW = 64, 512, 32
KV = 1 << 22
SHAPES: list[dict[str, Any]] = [
    {"num_draft_tokens": 5}, {"tree": (3, 2, 1), "policy": "constant"},
    {"tree": (2, 2), "policy": "constant", "proposer_options": {"kind": "iid"}},
    {"tree": (1, 2, 2), "policy": "constant", "proposer_options": {"kind": "top_k"}},
]  # fmt: skip
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: str([*s.values()]))


@pytest.fixture(scope="module")
def pair(make_llama: Callable[..., Model], make_draft: Callable[..., Model]) -> tuple[Model, Model]:
    target = make_llama(VOCAB, seed=0, max_position_embeddings=CONTEXT)
    target.generation_config.eos_token_id = None
    return target, make_draft(target)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(t) for t in torch.randint(3, VOCAB, (length,), generator=generator)]


def texts(
    engine: Engine, prompts: Items[list[int]], params: SamplingParams, seeds: Items[int]
) -> list[tuple[int, ...]]:
    ids = [
        engine.add_request(prompt, params, seed=seed)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    while engine.scheduler.running:
        engine.step()
        engine.check_integrity()
    found = {out.id: out.token_ids for out in engine.take_finished()}
    assert all(group.used == 0 for group in engine.groups)
    return [found[name] for name in ids]


def a_sequence(tokens: list[int], new: int = 64) -> Sequence:
    law = SamplingParams(temperature=0).law()
    group = CacheGroup(PAGE_SIZE, 1 << 12, torch.device("cpu"))
    return Sequence(
        "a", 0, list(tokens), len(tokens), law, 0, new, frozenset(), None, group.open(0)
    )


def windowed(model: Model, window: int) -> DraftModel:
    draft = DraftModel(ModelRunner(model, window), True, None, None, None, None)
    draft.join(CacheGroup(PAGE_SIZE, 0, torch.device("cpu")), model.config.vocab_size)
    draft.groups[0].max_pages = 1 << 8
    return draft


# --- what it sees


@torch.no_grad()
def reference(model: Model, tokens: list[int], first_seen: list[int]) -> Tensor:
    """transformers' own logits (L, V) where row i sees the sinks and from first_seen[i] on."""
    at = torch.arange(len(tokens))
    seen = at[None, :] <= at[:, None]
    seen &= (at[None, :] < PAGE_SIZE) | (at[None, :] >= torch.tensor(first_seen)[:, None])
    bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
    logits: Tensor = model(
        input_ids=torch.tensor([tokens]), attention_mask=bias, position_ids=at[None],
        use_cache=False,
    ).logits[0]  # fmt: skip
    return logits


def first_kept(position: int, window: int) -> int:
    """The first position behind the sinks that is held where the window counts from here."""
    return max(PAGE_SIZE, (position - window) // PAGE_SIZE * PAGE_SIZE)


def read(first_seen: list[int], length: int, window: int) -> None:
    """Reads up to length: in pieces no longer than the window, then the last few at once."""
    while (count := min(length - PAGE_SIZE - len(first_seen), window)) > 0:
        first_seen += [first_kept(len(first_seen), window)] * count
    first_seen += [first_kept(length - 1, window)] * (length - len(first_seen))


@pytest.mark.parametrize("window", [16, 32, 40])
def test_draft_sees_the_sinks_and_the_window(pair: tuple[Model, Model], window: int) -> None:
    _, model = pair
    draft = windowed(model, window)
    tokens = prompt_of(230, seed=1)
    # one more token at a time around two drops, then in larger steps
    lengths = [9, *range(window + 14, window + 52), 150, 151, 170, 230]
    first_seen: list[int] = []
    sequence = a_sequence(tokens[:9], new=300)
    draft.start(sequence)
    for length in lengths:
        sequence.tokens[:] = tokens[:length]
        read(first_seen, length, window)
        found = draft.score([draft.pending(sequence)])
        wanted = reference(model, tokens[:length], first_seen)
        torch.testing.assert_close(found, wanted[-1:], rtol=1e-4, atol=1e-4)
        draft.groups[0].check_integrity()
        assert len(draft.cache(sequence).table.pages) * PAGE_SIZE <= window_slots(window, PAGE_SIZE)
    near = reference(model, tokens, first_seen)[-1]  # the window makes a difference
    far = reference(model, tokens, [0] * len(tokens))[-1]
    assert not torch.allclose(near, far, rtol=1e-2, atol=1e-2)


def test_tree_behind_a_window_sees_its_own_branch(pair: tuple[Model, Model]) -> None:
    _, model = pair
    draft = windowed(model, WINDOW)
    tokens = prompt_of(100, seed=2)
    sequence = a_sequence(tokens)
    draft.start(sequence)
    draft.score([draft.pending(sequence)])
    first_seen: list[int] = []
    read(first_seen, len(tokens), WINDOW)
    nodes, parents = [5, 9, 7, 11], [-1, -1, 0, 1]
    rows = SequenceRows(draft.cache(sequence), (), torch.tensor(nodes), parents, keep=4)
    found = draft.score([rows])
    for node, path in enumerate([[5], [9], [5, 7], [9, 11]]):
        seen = [*first_seen, *first_seen[-1:] * len(path)]
        wanted = reference(model, [*tokens, *path], seen)[-1]
        torch.testing.assert_close(found[node], wanted, rtol=1e-4, atol=1e-4)


def test_scattered_pages_are_read_alike_by_every_forward(
    make_llama: Callable[..., Model],
) -> None:
    """The compiled attention, which takes these heads, walks pages; torch's gathers them."""
    model = make_llama(VOCAB, seed=5, hidden_size=128, num_attention_heads=2)
    tokens = prompt_of(160, seed=3)
    first_seen: list[int] = []
    read(first_seen, len(tokens), WINDOW)
    wanted = reference(model, tokens, first_seen)[-1:]
    for compiled in (True, False):
        draft = windowed(model, WINDOW)
        sequence = a_sequence(tokens)
        draft.start(sequence)
        if not compiled:
            runner: Any = draft.runner
            runner._prepared = replace(runner._prepared, forward=ModuleForward(model))
        found = draft.score([draft.pending(sequence)])
        assert not draft.cache(sequence).table.contiguous
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# --- what comes out


@each_shape
def test_greedy_output_is_that_of_plain_decoding(
    pair: tuple[Model, Model], shape: dict[str, Any]
) -> None:
    target, draft = pair
    prompts = [prompt_of(n, seed=n) for n in (150, 3, 60, 33)]
    params = SamplingParams(max_new_tokens=90, temperature=0)
    wanted = texts(Engine(target, kv_memory=KV), prompts, params, range(4))
    engine = Engine(target, draft=draft, draft_window=WINDOW, kv_memory=KV, **shape)
    assert texts(engine, prompts, params, range(4)) == wanted
    assert engine.stats.accepted > 20  # the window moves under the drafts, and they still fit


@each_shape
def test_sampled_output_under_gumbel_is_that_of_plain_sampling(
    pair: tuple[Model, Model], shape: dict[str, Any]
) -> None:
    target, draft = pair
    prompts = [prompt_of(n, seed=n) for n in (120, 5, 47)]
    params = SamplingParams(max_new_tokens=60, temperature=0.9)
    wanted = texts(Engine(target, kv_memory=KV), prompts, params, range(3))
    engine = Engine(
        target, draft=draft, draft_window=16, kv_memory=KV, verification="gumbel", **shape
    )
    assert texts(engine, prompts, params, range(3)) == wanted


@pytest.mark.parametrize("rule", ["auto", "token"])
def test_a_sequence_drafts_the_same_in_a_batch_as_alone(
    pair: tuple[Model, Model], rule: str
) -> None:
    target, draft = pair
    prompts = [prompt_of(n, seed=n) for n in (140, 4, 75)]
    params = SamplingParams(max_new_tokens=50, temperature=0.8)

    def engine() -> Engine:
        return Engine(
            target, draft=draft, draft_window=WINDOW, kv_memory=KV, verification=rule,
            num_draft_tokens=4,
        )  # fmt: skip

    alone = [texts(engine(), [p], params, [i])[0] for i, p in enumerate(prompts)]
    assert texts(engine(), prompts, params, range(3)) == alone


def test_window_longer_than_the_text_changes_nothing(pair: tuple[Model, Model]) -> None:
    target, draft = pair
    params = SamplingParams(max_new_tokens=40, temperature=0.8)
    engines = [
        Engine(target, draft=draft, kv_memory=KV, num_draft_tokens=4, draft_window=window)
        for window in (None, 256)
    ]
    found = [texts(engine, [prompt_of(30), prompt_of(9)], params, [1, 2]) for engine in engines]
    assert found[0] == found[1]
    assert engines[0].stats.accepted == engines[1].stats.accepted


# --- what it holds


@pytest.mark.parametrize("length", [1, 300, 400])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=["chain", "tree"])
def test_memory_stays_within_the_stated_bound(
    pair: tuple[Model, Model], length: int, shape: dict[str, Any]
) -> None:
    target, draft = pair
    engine = Engine(target, draft=draft, draft_window=16, kv_memory=KV, grow=True, **shape)
    own = engine.groups[1]
    most = window_slots(16, PAGE_SIZE) // PAGE_SIZE
    assert most == 4
    engine.add_request(prompt_of(length), SamplingParams(max_new_tokens=100, temperature=0))
    while engine.scheduler.running:
        engine.step()
        assert own.used <= most
    assert own.pool.num_pages <= most  # nor was it more for a moment


def test_pool_is_split_before_anything_is_allocated(pair: tuple[Model, Model]) -> None:
    target, draft = pair
    engine = Engine(target, draft=draft, draft_window=16, kv_memory=KV)
    held = [
        tensor.numel() * tensor.element_size()
        for group in engine.groups
        for memory in group.memory.values()
        for tensor in (*memory.keys, *memory.values)
    ]
    assert KV * 0.99 < sum(held) <= KV


# --- interruptions


class Interrupting(Engine):
    """Raises at every other step, after the draft has drafted."""

    broken = False

    def _propose(self, sequences: list[Sequence]) -> list[TokenTree] | None:
        trees = super()._propose(sequences)
        self.broken = not self.broken
        if self.broken:
            raise KeyboardInterrupt
        return trees


@each_shape
def test_steps_that_raised_leave_no_trace(pair: tuple[Model, Model], shape: dict[str, Any]) -> None:
    target, draft = pair
    params = SamplingParams(max_new_tokens=40, temperature=0.8)
    options = {"draft": draft, "draft_window": 16, "kv_memory": KV, **shape}
    wanted = texts(Engine(target, **options), [prompt_of(70)], params, [3])
    engine = Interrupting(target, **options)
    engine.add_request(prompt_of(70), params, seed=3)
    while engine.scheduler.running:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.check_integrity()
        engine.step()
    assert [out.token_ids for out in engine.take_finished()] == wanted


def test_verification_that_raised_leaves_no_trace(
    pair: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = pair
    params = SamplingParams(max_new_tokens=30, temperature=0.8)
    options = {"draft": draft, "draft_window": 16, "kv_memory": KV, "num_draft_tokens": 4}
    wanted = texts(Engine(target, **options), [prompt_of(70)], params, [3])
    engine = Engine(target, **options)
    engine.add_request(prompt_of(70), params, seed=3)
    assert engine.proposer is not None
    observe = engine.proposer.observe

    def late(*args: Any) -> None:
        observe(*args)
        raise KeyboardInterrupt  # the draft has committed, the text has not

    while engine.scheduler.running:
        with monkeypatch.context() as patch:
            patch.setattr(engine.proposer, "observe", late)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        engine.step()
    assert [out.token_ids for out in engine.take_finished()] == wanted


def test_abort_gives_the_pages_back(pair: tuple[Model, Model]) -> None:
    target, draft = pair
    engine = Engine(target, draft=draft, draft_window=16, kv_memory=KV, num_draft_tokens=4)
    params = SamplingParams(max_new_tokens=40, temperature=0)
    kept, gone = (engine.add_request(prompt_of(n), params) for n in (50, 90))
    engine.step()
    used = engine.groups[1].used
    engine.abort(gone)
    engine.check_integrity()
    assert 0 < engine.groups[1].used < used
    assert [out.id for out in engine] == [gone, kept]
    assert [group.used for group in engine.groups] == [0, 0]


def test_proposal_on_a_row_without_budget_is_caught_up_later(pair: tuple[Model, Model]) -> None:
    """A draft that was left out for a while reads what was committed meanwhile."""
    target, draft = pair
    engine = Engine(target, draft=draft, draft_window=16, kv_memory=KV, num_draft_tokens=4)
    params = SamplingParams(max_new_tokens=120, temperature=0)
    [wanted] = texts(Engine(target, kv_memory=KV), [prompt_of(40)], params, [0])
    engine.add_request(prompt_of(40), params)
    assert engine.proposer is not None
    propose, count = engine.proposer.propose, 0

    def seldom(sequences: Items[Sequence], budgets: Items[int], noise: Noise) -> list[TokenTree]:
        nonlocal count
        count += 1
        return propose(sequences, budgets if count % 30 == 0 else [0] * len(budgets), noise)

    engine.proposer.propose = seldom  # type: ignore[method-assign]
    while engine.scheduler.running:
        engine.step()
        engine.check_integrity()
    assert engine.stats.drafted > 0
    assert [out.token_ids for out in engine.take_finished()] == [wanted]


# --- what is refused


@pytest.mark.parametrize("window", [0, -1, 15, 2.5, True, "512"])
def test_window_out_of_range_is_refused(pair: tuple[Model, Model], window: Any) -> None:
    target, draft = pair
    with pytest.raises(InvalidArgumentError, match=r"draft_window=.*expected a whole number"):
        specdec.wrap(target, draft=draft, draft_window=window)


@pytest.mark.parametrize(
    "options", [{"num_draft_tokens": 17}, {"tree": (4, 4)}], ids=["chain", "tree"]
)
def test_window_shorter_than_the_drafts_is_refused(
    pair: tuple[Model, Model], options: dict[str, Any]
) -> None:
    target, draft = pair
    with pytest.raises(InvalidArgumentError, match=r"draft_window=16: expected at least the \d+"):
        specdec.wrap(target, draft=draft, draft_window=16, **options)


def test_window_as_long_as_the_named_number_of_drafts_is_enough(
    pair: tuple[Model, Model],
) -> None:
    """Whatever a proposer would draft where no number is named."""
    target, draft = pair
    params = SamplingParams(max_new_tokens=60, temperature=0)
    prompts = [prompt_of(50)]
    wanted = texts(Engine(target, kv_memory=KV), prompts, params, [1])
    for options in ({"proposer": "dynamic_tree"}, {"tree": (4, 4)}):
        engine = Engine(
            target, draft=draft, draft_window=16, num_draft_tokens=16, kv_memory=KV, **options
        )
        assert texts(engine, prompts, params, [1]) == wanted
        assert 0 < max(engine.stats.drafted_lengths) <= 16


def test_window_needs_a_draft_model(pair: tuple[Model, Model]) -> None:
    target, draft = pair
    for options in ({}, {"proposer": "ngram"}):
        with pytest.raises(InvalidArgumentError, match="draft_window=64: expected draft="):
            specdec.wrap(target, draft_window=64, **options)
    runner = ModelRunner(draft)
    with pytest.raises(InvalidArgumentError, match=r"draft_window=64: .* got ModelRunner"):
        specdec.wrap(target, draft=runner, draft_window=64)


def test_draft_whose_layers_have_windows_is_refused_by_name(pair: tuple[Model, Model]) -> None:
    target, _ = pair
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=24,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    with pytest.raises(InvalidArgumentError, match=r"draft_window=64: layers of MistralForCausal"):
        specdec.wrap(target, draft=MistralForCausalLM(config).eval(), draft_window=64)
