"""wrap().generate is transformers' generate: the same tokens, arguments and output types."""

import copy
from collections.abc import Callable
from itertools import pairwise
from math import log, sqrt
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

import specdec
from specdec import zoo
from specdec.acceptance import RULES, batched
from specdec.errors import InvalidArgumentError, NumericalError
from specdec.hf import SpecModel
from specdec.rng import PhiloxNoise, derive_seed

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part
Inputs = dict[str, Any]  # input_ids and attention_mask

TEXTS = [
    "def quicksort(items):",
    "the",
    "the quick brown fox jumps over the lazy dog, again and again",
    "return sorted(",
    "stop",
    "x = [1, 2, 3]\ny = {4: 5}\n",
    "fox fox fox",
    "a",
]
NEW = 24


def encode(tokenizer: Any, *texts: str) -> Inputs:
    batch = tokenizer(list(texts), return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def continuation(out: Tensor, inputs: Inputs, row: int = 0) -> list[int]:
    """What was generated, without padding at the end."""
    tokens: list[int] = out[row, inputs["input_ids"].shape[1] :].tolist()
    while tokens and tokens[-1] == 2:
        tokens.pop()
    return tokens


def free(spec: SpecModel) -> bool:
    """Nothing is running and every page was given back."""
    spec.engine.group.check_integrity()
    return not spec.engine.scheduler.running and spec.engine.group.used == 0


SAMPLED_RULES = [rule for rule in RULES if rule != "greedy"]


@pytest.fixture(scope="module")
def prompt(tokenizer: PreTrainedTokenizerFast) -> Inputs:
    return encode(tokenizer, TEXTS[0])


@pytest.fixture(scope="module")
def batch(tokenizer: PreTrainedTokenizerFast) -> Inputs:
    return encode(tokenizer, *TEXTS)


@pytest.fixture(scope="module")
def greedy(target: Model, prompt: Inputs) -> list[int]:
    """What transformers says after the prompt."""
    out = target.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    return continuation(out, prompt)


@pytest.fixture(scope="module")
def alone(target: Model, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """What transformers says after each text on its own."""
    rows = []
    for text in TEXTS:
        one = encode(tokenizer, text)
        out = target.generate(**one, max_new_tokens=NEW, do_sample=False)
        rows.append(continuation(out, one))
    return rows


@pytest.fixture(scope="module")
def spec(target: Model, draft: Model) -> SpecModel:
    return specdec.wrap(target, draft=draft, num_draft_tokens=4)


@pytest.fixture(scope="module")
def sure(target: Model) -> SpecModel:
    """The target drafts for itself, seven tokens at a time: every greedy draft is accepted."""
    return specdec.wrap(target, draft=target, num_draft_tokens=7)


# --- greedy equals transformers


@pytest.mark.parametrize("num_draft_tokens", [None, 1, 4, 7], ids=lambda n: f"draft {n}")
def test_greedy_tokens_equal_transformers_alone_and_in_a_batch(
    target: Model,
    draft: Model,
    batch: Inputs,
    alone: list[list[int]],
    prompt: Inputs,
    num_draft_tokens: int | None,
) -> None:
    if num_draft_tokens is None:
        spec = specdec.wrap(target)
    else:
        spec = specdec.wrap(target, draft=draft, num_draft_tokens=num_draft_tokens)
    one = spec.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    assert continuation(one, prompt) == alone[0]
    out = spec.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert [continuation(out, batch, row) for row in range(len(TEXTS))] == alone
    theirs = target.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, theirs)
    assert spec.last_stats is not None
    assert (spec.last_stats.accepted > 0) == (num_draft_tokens is not None)
    assert free(spec)


def test_draft_that_is_the_target_is_accepted_whole(
    sure: SpecModel, prompt: Inputs, greedy: list[int]
) -> None:
    out = sure.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    assert continuation(out, prompt) == greedy
    assert sure.last_stats is not None
    assert sure.last_stats.acceptance_rate == 1
    assert sure.last_stats.steps == NEW // 8


def test_two_wraps_of_one_model_and_the_model_itself_do_not_disturb_each_other(
    target: Model,
    draft: Model,
    prompt: Inputs,
    greedy: list[int],
) -> None:
    first = specdec.wrap(target, draft=draft, num_draft_tokens=2)
    second = specdec.wrap(target)
    third = specdec.wrap(draft, draft=target)  # the roles exchanged
    for spec in (first, second, first):
        out = spec.generate(**prompt, max_new_tokens=NEW, do_sample=False)
        assert continuation(out, prompt) == greedy
    theirs = draft.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(third.generate(**prompt, max_new_tokens=NEW, do_sample=False), theirs)
    again = target.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    assert continuation(again, prompt) == greedy


@pytest.mark.parametrize("rows", [-20, 18], ids=["smaller", "larger"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_draft_whose_vocabulary_differs_by_padding_rows_works(
    target: Model,
    draft: Model,
    batch: Inputs,
    alone: list[list[int]],
    rows: int,
    do_sample: bool,
) -> None:
    padded = copy.deepcopy(draft)
    size = target.config.vocab_size + rows
    padded.resize_token_embeddings(size, mean_resizing=False)
    spec = specdec.wrap(target, draft=padded, num_draft_tokens=4)
    out = spec.generate(**batch, max_new_tokens=NEW, do_sample=do_sample, seed=3)
    if not do_sample:
        assert [continuation(out, batch, row) for row in range(len(TEXTS))] == alone
    assert int(out.max()) < target.config.vocab_size
    if rows < 0:  # the draft had to read tokens that it does not have
        assert int(out.max()) >= size
    assert spec.last_stats is not None
    assert spec.last_stats.accepted > 0


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_transformers_own_hook_gives_the_same(
    spec: SpecModel, target: Model, batch: Inputs, do_sample: bool
) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": do_sample, "seed": 11}
    hooked = target.generate(**batch, **options, custom_generate=spec)
    assert torch.equal(hooked, spec.generate(**batch, **options))
    whole = target.generate(**batch, **options, custom_generate=spec, return_dict_in_generate=True)
    assert torch.equal(whole.sequences, hooked)
    assert whole.stats.tokens == sum(len(continuation(hooked, batch, i)) for i in range(len(TEXTS)))


# --- sampling: seeds


@pytest.mark.parametrize("rule", ["auto", *SAMPLED_RULES])
def test_batch_row_equals_the_row_alone_with_its_seed(
    target: Model,
    draft: Model,
    tokenizer: PreTrainedTokenizerFast,
    batch: Inputs,
    rule: str,
) -> None:
    spec = specdec.wrap(
        target, draft=draft, verification=rule, lossy=rule == "typical", num_draft_tokens=4
    )
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "top_p": 0.95}
    out = spec.generate(**batch, **options, seed=5)
    seeds = [derive_seed(5, row, 0) for row in range(len(TEXTS))]
    assert torch.equal(out, spec.generate(**batch, **options, seed=seeds))
    for row, text in enumerate(TEXTS):
        one = encode(tokenizer, text)
        single = spec.generate(**one, **options, seed=seeds[row])
        assert continuation(single, one) == continuation(out, batch, row)


def test_gumbel_rule_gives_the_tokens_of_plain_sampling(
    target: Model, draft: Model, batch: Inputs
) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "seed": 8}
    plain = specdec.wrap(target).generate(**batch, **options)
    drafted = specdec.wrap(target, draft=draft, verification="gumbel").generate(**batch, **options)
    assert torch.equal(plain, drafted)


def test_sampling_is_reproducible_by_seed_and_by_torchs_generator(
    spec: SpecModel, prompt: Inputs
) -> None:
    def run(**options: Any) -> list[int]:
        return continuation(
            spec.generate(**prompt, max_new_tokens=NEW, do_sample=True, **options), prompt
        )

    assert run(seed=1) == run(seed=1) != run(seed=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        first, second = run(), run()
        torch.manual_seed(4)
        assert [run(), run()] == [first, second]
        assert first != second


def test_num_return_sequences_gives_the_samples_that_their_seeds_give(
    target: Model, draft: Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = specdec.wrap(target, draft=draft, num_draft_tokens=4)
    two = encode(tokenizer, *TEXTS[:2])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True}
    out = spec.generate(**two, **options, num_return_sequences=3, seed=9)
    assert out.shape[0] == 6
    rows = [continuation(out, two, row) for row in range(6)]
    for index, text in enumerate(TEXTS[:2]):
        one = encode(tokenizer, text)
        for sample in range(3):
            single = spec.generate(**one, **options, seed=derive_seed(9, index, sample))
            assert continuation(single, one) == rows[3 * index + sample]
    assert len({tuple(row) for row in rows}) == 6


@pytest.mark.parametrize(
    ("seed", "message"),
    [([1, 2], r"seed: .*one per prompt \(1\); got 2"), (-1, "seed=-1"), (1 << 64, "seed=")],
    ids=["two", "negative", "too large"],
)
def test_bad_seed_is_refused(
    spec: SpecModel, prompt: Inputs, seed: int | list[int], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        spec.generate(**prompt, do_sample=True, max_new_tokens=2, seed=seed)
    assert free(spec)


# --- logits processors


def processors() -> LogitsProcessorList:
    return LogitsProcessorList(
        [
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(9),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.1),
        ]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 0.3},
        {"bad_words_ids": "greedy"},
        {"min_new_tokens": 9, "eos_token_id": "greedy"},
        {"exponential_decay_length_penalty": (3, 2.0), "min_new_tokens": 2},
        {"forced_eos_token_id": 77},
        {"suppress_tokens": "greedy"},
        {"sequence_bias": [[[101], -9.0], [[40], 4.0]]},
        {"temperature": 0.6, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
        {"logits_processor": "warpers", "repetition_penalty": 1.8},
    ],
    ids=lambda options: " ".join(options),
)
def test_processors_give_transformers_own_output(
    spec: SpecModel,
    target: Model,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Inputs,
    batch: Inputs,
    alone: list[list[int]],
    options: dict[str, Any],
) -> None:
    greedy = alone[0]
    if "bad_words_ids" in options:
        options = {"bad_words_ids": [[greedy[2]], greedy[4:6]]}
    if "eos_token_id" in options:
        options = {**options, "eos_token_id": [greedy[1], greedy[3], greedy[11]]}
    if "suppress_tokens" in options:
        options = {"suppress_tokens": greedy[1:4]}
    if "logits_processor" in options:
        options = {**options, "logits_processor": processors()}
    options = {**options, "do_sample": False, "max_new_tokens": NEW}
    wanted = target.generate(**prompt, **options)
    out = spec.generate(**prompt, **options)
    assert torch.equal(out, wanted)
    if "temperature" not in options:  # greedy decoding ignores the warpers
        assert continuation(out, prompt) != greedy
    together = spec.generate(**batch, **options)
    for row, text in enumerate(TEXTS):
        one = encode(tokenizer, text)
        wanted = target.generate(**one, **options)
        assert continuation(together, batch, row) == continuation(wanted, one)
    # transformers counts padding as said already (until some 5.x for the repetition penalty too)
    if options.get("no_repeat_ngram_size") != 1 and "repetition_penalty" not in options:
        assert torch.equal(together, target.generate(**batch, **options))


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_draft_is_processed_along_the_same_paths_as_the_target(
    sure: SpecModel, batch: Inputs, do_sample: bool
) -> None:
    options: dict[str, Any] = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    sure.generate(**batch, **options, max_new_tokens=NEW, do_sample=do_sample, seed=1)
    assert sure.last_stats is not None
    assert sure.last_stats.acceptance_rate > 0.999


def test_processor_of_the_callers_own_is_called_along_each_path(
    spec: SpecModel, target: Model, batch: Inputs
) -> None:
    class NoNeighbours:
        """The next token may not be within 40 of the last one."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            near = torch.arange(scores.shape[1])[None] - input_ids[:, -1:]
            return scores.masked_fill(near.abs() < 40, float("-inf"))

    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
    own = LogitsProcessorList([NoNeighbours()])
    out = spec.generate(**batch, **options, logits_processor=own)
    wanted = target.generate(**batch, **options, logits_processor=own)
    assert torch.equal(out, wanted)
    assert not torch.equal(out, spec.generate(**batch, **options))
    out = spec.generate(**batch, **options, logits_processor=own, return_dict_in_generate=True)
    assert out.stats.slow_processors == ("NoNeighbours",)


class Brackets(LogitsProcessor):
    """A grammar with a state: tokens 0, 3, 6.. open, 1, 4, 7.. close, at most two deep.

    It reads on from where it stood, so transformers can call it on one growing text.
    """

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.length: int | None = None

    def fork(self, parent: "Brackets", token: int) -> "Brackets":
        return Brackets(parent.depth + {0: 1, 1: -1, 2: 0}[token % 3])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        [ids] = input_ids.tolist()
        for token in ids[self.length :] if self.length is not None else ():
            self.depth = self.fork(self, token).depth
        self.length = len(ids)
        kind = torch.arange(scores.shape[1]) % 3
        banned = (kind == 0) & (self.depth == 2) | (kind == 1) & (self.depth == 0)
        return scores.masked_fill(banned, float("-inf"))


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 4])
def test_grammar_that_forks_gives_the_text_of_transformers_sequential_run(
    target: Model,
    draft: Model,
    tokenizer: PreTrainedTokenizerFast,
    batch: Inputs,
    num_draft_tokens: int,
) -> None:
    spec = specdec.wrap(target, draft=draft, num_draft_tokens=num_draft_tokens)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
    out = spec.generate(**batch, **options, logits_processor=LogitsProcessorList([Brackets()]))
    for row, text in enumerate(TEXTS):
        one = encode(tokenizer, text)
        own = LogitsProcessorList([Brackets()])
        wanted = target.generate(**one, **options, logits_processor=own)
        assert continuation(out, batch, row) == continuation(wanted, one)
    assert not torch.equal(out, spec.generate(**batch, **options))
    assert spec.last_stats is not None
    assert spec.last_stats.accepted > 0 or num_draft_tokens == 0


def test_grammar_holds_in_sampled_text_and_its_forks_are_shown(sure: SpecModel) -> None:
    own = LogitsProcessorList([Brackets()])
    prompt = torch.tensor([[5, 6, 7]])
    out = sure.generate(
        prompt, do_sample=True, max_new_tokens=64, seed=4, logits_processor=own,
        eos_token_id=None, return_dict_in_generate=True,
    )  # fmt: skip
    depth = 0
    for token in out.sequences[0, 3:].tolist():
        depth += {0: 1, 1: -1, 2: 0}[token % 3]
        assert 0 <= depth <= 2
    assert out.stats.slow_processors == ("Brackets",)
    assert out.stats.acceptance_rate > 0.999  # the draft has the same states


def test_processor_is_not_asked_about_drafts_behind_the_end(
    sure: SpecModel, target: Model, prompt: Inputs, greedy: list[int]
) -> None:
    class EndsOnce(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            assert eos not in input_ids[0, prompt["input_ids"].shape[1] :].tolist()
            return scores + 0

    eos = greedy[3]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": eos}
    own = LogitsProcessorList([EndsOnce()])
    out = sure.generate(**prompt, **options, logits_processor=own)
    assert torch.equal(out, target.generate(**prompt, **options))
    assert sure.last_stats is not None
    assert sure.last_stats.steps == 1


def test_processor_with_a_state_and_no_fork_is_refused_by_name(
    spec: SpecModel, prompt: Inputs
) -> None:
    class Alternates(LogitsProcessor):
        calls = 0

        def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            return scores if self.calls % 2 else -scores

    with pytest.raises(InvalidArgumentError, match=r"Alternates: .* fork\(parent, token\)"):
        spec.generate(
            **prompt, max_new_tokens=4, logits_processor=LogitsProcessorList([Alternates()])
        )
    assert free(spec)


# --- a draft that samples by other settings than the target


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.4}, {"temperature": 0}, {"top_k": 3, "temperature": 2.0}, {"top_p": 0.5}],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_settings_of_the_draft_change_nothing_in_the_law(
    tiny_pair: tuple[Model, Model], options: dict[str, Any]
) -> None:
    target, draft = tiny_pair
    law = two_token_law(target)
    lengths = []
    for its_options in (options, None):
        spec = specdec.wrap(target, draft=draft, num_draft_tokens=2, proposer_options=its_options)
        if its_options:
            assert distance(spec, law) < bound(law)
        spec.generate(torch.tensor([PROMPT] * 64), do_sample=True, max_new_tokens=9, seed=1)
        assert spec.last_stats is not None
        lengths.append(spec.last_stats.accepted_lengths)
    assert lengths[0] != lengths[1]


def test_draft_without_the_targets_processors_is_lossless_and_calls_them_less(
    target: Model, prompt: Inputs
) -> None:
    class OddOnly(LogitsProcessor):
        calls = 0

        def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
            OddOnly.calls += 1
            return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 0, float("-inf"))

    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    own = LogitsProcessorList([OddOnly()])
    wanted = target.generate(**prompt, **options, logits_processor=own)
    rates, calls = [], []
    for processors in (True, False):
        spec = specdec.wrap(
            target, draft=target, num_draft_tokens=3, proposer_options={"processors": processors}
        )
        OddOnly.calls = 0
        assert torch.equal(spec.generate(**prompt, **options, logits_processor=own), wanted)
        assert spec.last_stats is not None
        rates.append(spec.last_stats.acceptance_rate)
        calls.append(OddOnly.calls / spec.last_stats.steps)
    assert rates[1] < rates[0] == 1
    assert calls[1] < calls[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heat": 1.0}, r"proposer_options=.*heat.*: expected .*temperature, top_k, top_p, min_p"),
        ({"temperature": -1.0}, r"temperature=-1\.0: expected"),
        ({"top_k": 2.5}, r"top_k=2\.5: expected"),
    ],
    ids=["unknown", "negative", "no number"],
)
def test_bad_setting_of_the_draft_is_refused(
    target: Model, draft: Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        specdec.wrap(target, draft=draft, proposer_options=options)


@pytest.mark.parametrize("rule", SAMPLED_RULES)
def test_truncated_sampling_stays_inside_the_target_s_nucleus(
    target: Model, draft: Model, prompt: Inputs, rule: str
) -> None:
    spec = specdec.wrap(target, draft=draft, verification=rule, lossy=rule == "typical")
    out = spec.generate(**prompt, do_sample=True, top_k=2, max_new_tokens=64, seed=2)
    with torch.no_grad():
        logits = target(out[:, :-1]).logits[0, prompt["input_ids"].shape[1] - 1 :]
    best = logits.topk(2).indices.tolist()
    new = out[0, prompt["input_ids"].shape[1] :].tolist()
    assert all(token in two for token, two in zip(new, best, strict=True))
    assert any(token == two[1] for token, two in zip(new, best, strict=True))


# --- where generation ends


@pytest.mark.parametrize("at", [0, 2, 6, 8])
def test_end_token_inside_an_accepted_block_ends_the_output(
    sure: SpecModel,
    target: Model,
    prompt: Inputs,
    greedy: list[int],
    at: int,
) -> None:
    eos = greedy[at]
    out = sure.generate(**prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=eos)
    assert continuation(out, prompt) == greedy[: greedy.index(eos) + 1]
    wanted = target.generate(**prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=eos)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
def test_max_new_tokens_is_exact(
    sure: SpecModel, prompt: Inputs, greedy: list[int], count: int
) -> None:
    out = sure.generate(**prompt, max_new_tokens=count, do_sample=False)
    assert out[0, prompt["input_ids"].shape[1] :].tolist() == greedy[:count]
    length = prompt["input_ids"].shape[1] + count
    assert sure.generate(**prompt, max_length=length, do_sample=False).shape[1] == length


def ascii_pairs(tokenizer: Any, tokens: list[int]) -> list[str]:
    """Strings that span the border of two tokens of plain text."""
    texts = [tokenizer.decode([token]) for token in tokens]
    return [
        a[-1] + b[0]
        for a, b in pairwise(texts)
        if a.isascii() and b.isascii() and a.isprintable() and b.isprintable() and a and b
    ]


@pytest.mark.parametrize("where", ["argument", "config", "model default", "model default, config"])
def test_stop_strings_end_where_transformers_ends(
    sure: SpecModel,
    target: Model,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Inputs,
    greedy: list[int],
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spans = ascii_pairs(tokenizer, greedy)
    assert spans, "the model must say two printable tokens in a row"
    strings = ["never said", spans[-1], spans[0]]
    options: dict[str, Any] = {"tokenizer": tokenizer}
    length = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2, "eos_token_id": 1}
    if where == "argument":
        options |= {"stop_strings": strings, **length}
    elif where == "config":
        options["generation_config"] = GenerationConfig(**length, stop_strings=strings)
    else:
        monkeypatch.setattr(target.generation_config, "stop_strings", strings)
        if "config" in where:
            options["generation_config"] = GenerationConfig(**length)
        else:
            options |= length
    out = sure.generate(**prompt, **options)
    wanted = target.generate(**prompt, **options)
    assert torch.equal(out, wanted)
    assert 0 < len(continuation(out, prompt)) < len(greedy)
    if "generation_config" in options and where == "config":
        assert options["generation_config"].stop_strings == strings  # the caller's is untouched


def test_stop_strings_in_a_batch_end_each_row_on_its_own(
    spec: SpecModel,
    target: Model,
    tokenizer: PreTrainedTokenizerFast,
    batch: Inputs,
    alone: list[list[int]],
) -> None:
    strings = [span for tokens in alone[::2] for span in ascii_pairs(tokenizer, tokens)[:1]]
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "tokenizer": tokenizer}
    out = spec.generate(**batch, **options, stop_strings=strings)
    wanted = target.generate(**batch, **options, stop_strings=strings)
    assert torch.equal(out, wanted)
    lengths = {len(continuation(out, batch, row)) for row in range(len(TEXTS))}
    assert len(lengths) > 1


class EndsWithin(StoppingCriteria):
    """Stops a row whose last two tokens sum to a multiple of 5."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        del kwargs
        assert scores is None
        return (input_ids[:, -2:].sum(1) % 5) == 0


def test_stopping_criteria_of_the_caller_s_own_are_asked_after_every_token(
    sure: SpecModel, target: Model, batch: Inputs, alone: list[list[int]]
) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    own = StoppingCriteriaList([EndsWithin()])
    out = sure.generate(**batch, **options, stopping_criteria=own)
    wanted = target.generate(
        **batch, **options, stopping_criteria=StoppingCriteriaList([EndsWithin()])
    )
    assert torch.equal(out, wanted)
    assert len(own) == 1  # the caller's list is untouched
    assert [continuation(out, batch, row) for row in range(len(TEXTS))] != alone


def test_generation_config_object_is_honoured(
    spec: SpecModel, target: Model, prompt: Inputs
) -> None:
    config = GenerationConfig(
        max_new_tokens=11, do_sample=False, repetition_penalty=1.5, pad_token_id=2, eos_token_id=1
    )
    out = spec.generate(**prompt, generation_config=config)
    wanted = target.generate(**prompt, generation_config=config)
    assert torch.equal(out, wanted)


# --- streamers


class Recorder:
    """Writes down every call."""

    def __init__(self) -> None:
        self.calls: list[list[int] | str] = []

    def put(self, value: Tensor) -> None:
        self.calls.append(value.flatten().tolist())

    def end(self) -> None:
        self.calls.append("end")


def test_streamer_gets_the_calls_that_transformers_makes(
    sure: SpecModel, target: Model, prompt: Inputs, greedy: list[int]
) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": NEW, "do_sample": False, "eos_token_id": greedy[5]
    }  # fmt: skip
    ours, theirs = Recorder(), Recorder()
    sure.generate(**prompt, **options, streamer=ours)
    target.generate(**prompt, **options, streamer=theirs)
    assert ours.calls == theirs.calls
    assert ours.calls.count("end") == 1
    assert ours.calls[-2] == [greedy[5]]


def test_text_streamer_prints_what_transformers_prints(
    spec: SpecModel,
    target: Model,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Inputs,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    spec.generate(**prompt, **options, streamer=TextStreamer(tokenizer))
    ours = capsys.readouterr().out
    target.generate(**prompt, **options, streamer=TextStreamer(tokenizer))
    assert ours == capsys.readouterr().out
    assert "def quicksort(items):" in ours


def test_text_iterator_streamer_yields_exactly_the_output(
    spec: SpecModel, tokenizer: PreTrainedTokenizerFast, prompt: Inputs
) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=300)
    results: list[Tensor] = []
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "seed": 6}

    def run() -> None:
        results.append(spec.generate(**prompt, **options, streamer=streamer))

    thread = Thread(target=run)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(continuation(results[0], prompt))


def test_streamer_of_a_batch_raises_as_in_transformers(
    spec: SpecModel,
    target: Model,
    tokenizer: PreTrainedTokenizerFast,
    batch: Inputs,
) -> None:
    for generate in (target.generate, spec.generate):
        with pytest.raises(ValueError, match="only supports batch size 1"):
            generate(**batch, max_new_tokens=4, streamer=TextStreamer(tokenizer))
    assert free(spec)


# --- output types and statistics


def test_output_type_is_transformers_with_stats(
    spec: SpecModel, batch: Inputs, alone: list[list[int]]
) -> None:
    out = spec.generate(**batch, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert issubclass(type(out), GenerateDecoderOnlyOutput)
    assert torch.equal(out["sequences"], out.sequences)
    stats = spec.last_stats
    assert stats is not None
    assert out.stats is stats
    assert stats.tokens == sum(len(row) for row in alone)
    assert 0 < stats.accepted < stats.drafted
    assert sum(stats.accepted_lengths.values()) == stats.steps
    assert sum(k * n for k, n in stats.drafted_lengths.items()) == stats.drafted
    assert stats.lossless
    assert stats.slow_processors == ()
    assert 0 < stats.draft_seconds + stats.verify_seconds <= stats.total_seconds


SCORED: dict[str, Any] = {
    "output_scores": True, "output_logits": True, "return_dict_in_generate": True
}  # fmt: skip


def _penalises_padding() -> bool:
    """Whether transformers' repetition penalty counts a batch's left padding (5.17 does)."""
    try:
        RepetitionPenaltyLogitsProcessor(1.4, prompt_ignore_length=torch.tensor([1]))
    except ValueError:
        return True
    return False


penalty: dict[str, Any] = {"repetition_penalty": 1.4, "suppress_tokens": [9, 22]}
not_with_padding = pytest.mark.skipif(
    _penalises_padding(), reason="this transformers penalises left padding; specdec never does"
)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param(penalty, marks=not_with_padding), {"min_new_tokens": 3}],
    ids=lambda options: " ".join(options) or "plain",
)
def test_scores_and_logits_are_those_of_transformers(
    spec: SpecModel,
    target: Model,
    batch: Inputs,
    alone: list[list[int]],
    options: dict[str, Any],
) -> None:
    options = {**options, **SCORED, "do_sample": False, "max_new_tokens": 10}
    options["eos_token_id"] = [1, alone[0][4], alone[1][2]]
    ours, theirs = spec.generate(**batch, **options), target.generate(**batch, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    lengths = [len(continuation(ours.sequences, batch, row)) for row in range(len(TEXTS))]
    assert min(lengths) < max(lengths) == len(ours.scores)
    for name in ("scores", "logits"):
        mine, wanted = getattr(ours, name), getattr(theirs, name)
        assert isinstance(mine, tuple)
        assert len(mine) == len(wanted)
        for step, (one, other) in enumerate(zip(mine, wanted, strict=True)):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            running = torch.tensor(lengths) > step
            torch.testing.assert_close(one[running], other[running], rtol=1e-4, atol=1e-4)
            assert not one[~running].any()
    got, wanted = (
        target.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        for out in (ours, theirs)
    )
    running = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    torch.testing.assert_close(got[running], wanted[running], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["auto", "token", "gumbel"])
def test_scores_of_sampled_tokens_are_their_log_probabilities_under_the_target(
    target: Model, draft: Model, batch: Inputs, rule: str
) -> None:
    spec = specdec.wrap(target, draft=draft, verification=rule)
    warpers: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
    out = spec.generate(
        **batch, **SCORED, **warpers, do_sample=True, max_new_tokens=9, seed=3, eos_token_id=None
    )
    width = batch["input_ids"].shape[1]
    mask = torch.cat((batch["attention_mask"], torch.ones(len(TEXTS), 9, dtype=torch.long)), 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = target(out.sequences, attention_mask=mask, position_ids=positions).logits
    rows = logits[:, width - 1 : -1].flatten(0, 1)
    listed = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(40), TopPLogitsWarper(0.9)]
    everything: Any = LogitsProcessorList(listed)
    law = everything(torch.zeros(len(rows), 1, dtype=torch.long), rows).log_softmax(-1)
    wanted = law.gather(1, out.sequences[:, width:].reshape(-1, 1)).view(len(TEXTS), 9)
    got = target.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.stack(out.logits, 1).flatten(0, 1), rows, rtol=0, atol=1e-3)


def test_scores_are_returned_only_when_asked_for(spec: SpecModel, prompt: Inputs) -> None:
    out = spec.generate(**prompt, max_new_tokens=3, return_dict_in_generate=True)
    assert out.scores is None
    assert out.logits is None
    out = spec.generate(
        **prompt, max_new_tokens=3, return_dict_in_generate=True, output_logits=True
    )
    assert out.scores is None
    assert len(out.logits) == 3


def test_statistics_are_of_the_last_call_alone(spec: SpecModel, prompt: Inputs) -> None:
    for count in (5, 3):
        spec.generate(**prompt, max_new_tokens=count, do_sample=False)
        assert spec.last_stats is not None
        assert spec.last_stats.tokens == count


# --- what is refused


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_beams", {"num_beams": 2}),
        ("output_attentions", {"output_attentions": True}),
        ("output_hidden_states", {"output_hidden_states": True}),
        ("assistant_model", {"assistant_model": object()}),
        ("negative_prompt_ids", {"negative_prompt_ids": torch.ones(1, 2, dtype=torch.long)}),
        ("past_key_values", {"past_key_values": DynamicCache()}),
        ("position_ids", {"position_ids": torch.zeros(1, 6, dtype=torch.long)}),
        ("inputs_embeds", {"inputs_embeds": torch.zeros(1, 6, 32)}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
        ("penalty_alpha", {"penalty_alpha": 0.6, "top_k": 4}),
        ("ClassifierFreeGuidance", {"guidance_scale": 2.0}),
        ("tokenizer", {"stop_strings": "x"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_argument_that_cannot_be_honoured_is_refused_by_name(
    spec: SpecModel, prompt: Inputs, name: str, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        spec.generate(**prompt, max_new_tokens=2, **options)
    assert free(spec)


def test_prefix_function_is_for_one_prompt(
    spec: SpecModel, target: Model, prompt: Inputs, batch: Inputs
) -> None:
    options: dict[str, Any] = {
        "prefix_allowed_tokens_fn": lambda _, ids: [(int(ids[-1]) * 7 + k) % 300 for k in range(9)],
        "max_new_tokens": 8,
        "do_sample": False,
    }
    wanted = target.generate(**prompt, **options)
    assert torch.equal(spec.generate(**prompt, **options), wanted)
    with pytest.raises(InvalidArgumentError, match="prefix_allowed_tokens_fn"):
        spec.generate(**batch, **options)
    with pytest.raises(InvalidArgumentError, match="encoder_repetition_penalty"):
        spec.generate(**batch, encoder_repetition_penalty=1.2, max_new_tokens=2)


def test_spec_of_another_model_is_refused(spec: SpecModel, draft: Model, prompt: Inputs) -> None:
    with pytest.raises(InvalidArgumentError, match="wraps another LlamaForCausalLM"):
        draft.generate(**prompt, max_new_tokens=2, custom_generate=spec)


def test_row_without_a_token_is_refused(spec: SpecModel, batch: Inputs) -> None:
    mask = batch["attention_mask"].clone()
    mask[1] = 0
    with pytest.raises(InvalidArgumentError, match="prompt is empty"):
        spec.generate(batch["input_ids"], attention_mask=mask, max_new_tokens=2)
    assert free(spec)


def test_prompt_longer_than_the_context_is_refused(spec: SpecModel) -> None:
    with pytest.raises(InvalidArgumentError, match="257 tokens, the target's context holds 256"):
        spec.generate(torch.full((1, 257), 5), max_new_tokens=2)


def test_nan_in_the_targets_logits_is_named_with_its_step(
    target: Model, prompt: Inputs, greedy: list[int]
) -> None:
    broken = copy.deepcopy(target)
    at = next(i for i, t in enumerate(greedy[2:9], 2) if t not in greedy[:i])
    spec = specdec.wrap(broken)
    with torch.no_grad():  # read when this token is the last one
        broken.get_input_embeddings().weight[greedy[at]] = float("nan")
    for _ in range(2):  # the step is counted anew
        with pytest.raises(NumericalError, match=rf"target's logits hold NaN .* step {at + 1} "):
            spec.generate(**prompt, max_new_tokens=NEW, do_sample=False)
        assert free(spec)


@pytest.mark.parametrize("rule", ["token", "block", "recursive", "kseq", "traversal"])
def test_nan_in_the_drafts_law_is_never_taken_for_one(
    target: Model, prompt: Inputs, rule: str
) -> None:
    broken = copy.deepcopy(target)
    spec = specdec.wrap(target, draft=broken, verification=rule, num_draft_tokens=3)
    with torch.no_grad():  # <|bos|>, which the proof of the model does not read
        broken.get_input_embeddings().weight[0] = float("nan")
    with pytest.raises(NumericalError, match=r"the draft's logits hold NaN .* step 0"):
        spec.generate(**prompt, max_new_tokens=4, do_sample=True, seed=1)
    assert free(spec)


def test_interrupted_call_gives_its_pages_back_and_the_next_one_works(
    spec: SpecModel, prompt: Inputs, greedy: list[int]
) -> None:
    class Interrupts(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.calls) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spec.generate(**prompt, max_new_tokens=NEW, do_sample=False, streamer=Interrupts())
    assert free(spec)
    out = spec.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    assert continuation(out, prompt) == greedy


# --- the law of what is sampled

SAMPLES = 6144
PROMPT = [3, 6, 4]


@pytest.fixture(scope="module")
def tiny_pair(
    make_llama: Callable[..., Model], make_draft: Callable[..., Model]
) -> tuple[Model, Model]:
    """Eight tokens, no end token, a draft that is right about half of the time."""
    target = make_llama(8, seed=3, hidden_size=16, num_hidden_layers=1)
    target.generation_config.eos_token_id = None
    return target, make_draft(target, 0.15)


def two_token_law(model: Model) -> Tensor:
    """(64,) probabilities of every continuation of two tokens."""
    ids = torch.tensor([[*PROMPT, token] for token in range(8)])
    with torch.no_grad():
        p = model(ids).logits.double().softmax(-1)
    law: Tensor = (p[0, -2][:, None] * p[:, -1]).flatten()
    return law


def distance(spec: SpecModel, law: Tensor) -> float:
    """Total variation between the law and SAMPLES sampled continuations' first two tokens."""
    counts = torch.zeros(64)
    for seed in range(SAMPLES // 512):
        out = spec.generate(
            torch.tensor([PROMPT]), do_sample=True, max_new_tokens=3, num_return_sequences=512,
            top_k=0, seed=100 + seed,
        )  # fmt: skip
        pairs = out[:, len(PROMPT)] * 8 + out[:, len(PROMPT) + 1]
        counts += torch.bincount(pairs, minlength=64)
    return float((counts / counts.sum() - law).abs().sum()) / 2


def bound(law: Tensor) -> float:
    """What sampling noise alone exceeds with probability 1e-4: the mean of the total variation,
    then McDiarmid's inequality."""
    mean = float((law * (1 - law) / SAMPLES).sqrt().sum()) / 2
    return mean + sqrt(log(1e4) / (2 * SAMPLES))


@pytest.mark.parametrize("rule", [rule for rule in SAMPLED_RULES if RULES[rule].lossless])
def test_sampled_tokens_follow_the_exact_law(tiny_pair: tuple[Model, Model], rule: str) -> None:
    target, draft = tiny_pair
    spec = specdec.wrap(target, draft=draft, verification=rule, num_draft_tokens=2)
    law = two_token_law(target)
    assert distance(spec, law) < bound(law) < 0.09
    assert spec.last_stats is not None
    assert 0.05 < spec.last_stats.acceptance_rate < 0.9


@pytest.mark.parametrize("rule", ["token", "block", "gumbel"])
def test_planted_wrong_rule_is_caught(
    tiny_pair: tuple[Model, Model],
    rule: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, draft = tiny_pair
    finish, gumbel = batched._finish, PhiloxNoise.gumbel

    def from_target(batch: Any, p: Tensor, q: Tensor, *rest: Any) -> Any:
        return finish(batch, p, torch.zeros_like(q), *rest)  # the residual becomes p itself

    monkeypatch.setattr(batched, "_finish", from_target)
    monkeypatch.setattr(PhiloxNoise, "gumbel", lambda self, *a: 0.6 * gumbel(self, *a))
    spec = specdec.wrap(target, draft=draft, verification=rule, num_draft_tokens=2)
    law = two_token_law(target)
    assert distance(spec, law) > bound(law)


# --- the built-in pair


@pytest.fixture(scope="module")
def builtin() -> tuple[SpecModel, Any, Any]:
    big, small = (
        AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32)
        for name in ("big", "small")
    )
    spec = specdec.wrap(big, draft=small, num_draft_tokens=4)
    return spec, big, AutoTokenizer.from_pretrained(zoo.path("big"))


def test_builtin_pair_equals_transformers_in_a_batch(builtin: tuple[SpecModel, Any, Any]) -> None:
    spec, big, tokenizer = builtin
    inputs = encode(tokenizer, "def quicksort(items):", "import os\n\n", "class Stack:\n    def")
    out = spec.generate(**inputs, max_new_tokens=32, do_sample=False)
    assert torch.equal(out, big.generate(**inputs, max_new_tokens=32, do_sample=False))
    assert spec.last_stats is not None
    assert spec.last_stats.tokens_per_target_pass > 1.5


def test_builtin_pair_samples_reproducibly(builtin: tuple[SpecModel, Any, Any]) -> None:
    spec, _, tokenizer = builtin
    inputs = encode(tokenizer, "def quicksort(items):")
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.8}
    first = spec.generate(**inputs, **options, seed=1)
    assert torch.equal(first, spec.generate(**inputs, **options, seed=1))
    assert not torch.equal(first, spec.generate(**inputs, **options, seed=2))
