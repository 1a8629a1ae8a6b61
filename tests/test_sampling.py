"""The law sampled from: transformers' own processors on every path alone, and no full sort."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from specdec import Engine, SamplingParams
from specdec.errors import InvalidArgumentError, SpecDecError
from specdec.sampling import (
    ForkableProcessor,
    Law,
    Paths,
    Prefix,
    SharedLaws,
    Truncation,
    truncation,
)

INF = float("inf")
SIZES = (1, 2, 7, 63, 1000, 5003)


def no_paths() -> Paths:
    raise AssertionError("asked for paths that nobody needs")


def random_scores(n: int, V: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(n, V, generator=torch.Generator().manual_seed(seed)) * scale


def shapes_of_laws(V: int) -> dict[str, Tensor]:
    """Scores of eight rows: peaked, like text, flat, and full of ties."""
    draw = torch.Generator().manual_seed(V)
    zipf = torch.stack([-1.2 * (torch.randperm(V, generator=draw) + 1).log() for _ in range(8)])
    noise = torch.randn(8, V, generator=draw)
    ninf = noise.masked_fill(torch.rand(8, V, generator=draw) < 0.5, -INF)
    ninf[:, V // 2] = 1.0
    return {
        "normal": noise * 3,
        "peaked": noise * 30,
        "zipf": zipf + 0.1 * noise,
        "flat": noise * 1e-2,
        "constant": torch.zeros(8, V),
        "two values": (noise > 0).float(),
        "bf16": (noise * 3).bfloat16().float(),
        "half at -inf": ninf,
    }


# --- truncation


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("k", [1, 2, 20, 50, 400, 6000])
def test_top_k_keeps_what_transformers_keeps_ties_included(V: int, k: int) -> None:
    for name, scores in shapes_of_laws(V).items():
        wanted = hf.TopKLogitsWarper(k)(None, scores)
        assert torch.equal(Truncation(top_k=k).scores(scores), wanted), name
        largest = truncation.k_largest(scores, k)
        assert torch.equal(largest, scores.sort(descending=True).values[:, :k]), name


def nucleus_is_valid(kept: Tensor, p: Tensor, top_p: float) -> bool:
    """Whether the tokens kept are the likeliest, all ties of the last, and no more than needed."""
    p = p.double()
    least = torch.where(kept, p, INF).amin(-1, keepdim=True)
    mass_above = torch.where(p > least, p, 0).sum(-1)
    mass = torch.where(kept, p, 0).sum(-1)
    whole = bool((kept == (p >= least)).all())
    return whole and bool((mass > top_p - 1e-6).all()) and bool((mass_above < top_p + 1e-6).all())


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.95, 0.9999])
def test_top_p_keeps_what_transformers_keeps_but_for_ties_at_the_boundary(
    V: int, top_p: float
) -> None:
    for name, scores in shapes_of_laws(V).items():
        p = torch.softmax(scores, -1)
        kept = Truncation(top_p=top_p).scores(scores).isfinite()
        theirs = hf.TopPLogitsWarper(top_p)(None, scores).isfinite()
        kept_mass = kept & (p > 0)  # -inf at tokens without any probability says nothing
        assert nucleus_is_valid(kept_mass, p, top_p), name
        least = torch.where(kept_mass, p, INF).amin(-1, keepdim=True)
        differ = kept_mass != (theirs & (p > 0))
        assert bool((p == least)[differ].all()), name  # ties of the last token kept
        if name in ("normal", "zipf") and V > 63:
            assert not differ.any(), name


@pytest.mark.parametrize("V", SIZES)
def test_quickselect_and_bisection_find_the_same_cutoff(V: int) -> None:
    for name, scores in shapes_of_laws(V).items():
        p = torch.softmax(scores, -1)
        for top_p in (1e-6, 0.3, 0.8, 0.95, 0.9999):
            tail = float(np.float32(1 - top_p))
            by_select = truncation.nucleus_cutoff(p, top_p)
            assert torch.equal(by_select, truncation._bisect(p, tail)), (name, top_p)


WARPERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "top_k top_p": {"top_k": 40, "top_p": 0.8},
    "top_k of all": {"top_k": 10_000, "top_p": 0.8},
    "all four": {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
}


def by_transformers(processors: Sequence[Any], path: Sequence[int], scores: Tensor) -> Tensor:
    """What its list of processors makes of the (n, V) scores behind one path."""
    everything: Any = LogitsProcessorList(processors)
    processed: Tensor = everything(torch.tensor([path] * len(scores)), scores)
    return processed


def warpers(options: dict[str, Any]) -> list[Any]:
    kinds = {
        "temperature": hf.TemperatureLogitsWarper, "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper, "min_p": hf.MinPLogitsWarper,
    }  # fmt: skip
    return [kinds[name](value) for name, value in options.items()]


@pytest.mark.parametrize("options", WARPERS.values(), ids=WARPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_law_is_the_softmax_of_transformers_warpers(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    logits = random_scores(6, 3001).to(dtype)
    before = logits.clone()
    law = Law(warpers(options), greedy=False)
    assert law.truncation == Truncation(**options)
    wanted = by_transformers(warpers(options), [0], logits.float())
    p = law.probabilities(logits, no_paths)
    if dtype == torch.float32 or "top_p" not in options:  # bf16 logits are full of ties
        assert torch.equal(law.scores(logits, no_paths), wanted)
        assert torch.equal(p > 0, wanted > -INF)
        torch.testing.assert_close(p, torch.softmax(wanted, -1), rtol=2e-6, atol=1e-9)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), torch.ones(6))
    assert torch.equal(logits, before)
    assert not law.by_path


def test_plain_law_is_one_softmax() -> None:
    logits = random_scores(3, 50)
    assert torch.equal(Law([], greedy=False).probabilities(logits, no_paths), logits.softmax(-1))
    assert Law([], greedy=True).best(logits, no_paths).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("options", WARPERS.values(), ids=WARPERS)
@pytest.mark.parametrize("value", [float("nan"), INF])
def test_nan_and_infinity_are_never_hidden(options: dict[str, Any], value: float) -> None:
    logits = random_scores(3, 3001)
    logits[1, 77] = value
    p = Truncation(**options).law(logits)
    assert p.isnan().all(-1).tolist() == [False, True, False]


def test_warpers_between_other_processors_are_truncations_too() -> None:
    listed: list[Any] = [
        hf.TopKLogitsWarper(30), hf.TopPLogitsWarper(0.9), hf.TypicalLogitsWarper(0.8),
        hf.TopPLogitsWarper(0.9), hf.TopKLogitsWarper(5), hf.MinPLogitsWarper(0.3),
    ]  # fmt: skip
    law = Law(listed, greedy=False)
    assert law.truncation == Truncation(top_k=5, min_p=0.3)
    scores = random_scores(8, 500)
    wanted = by_transformers(listed, [0], scores)
    assert torch.equal(law.scores(scores, no_paths), wanted)


def test_warper_with_unusual_options_is_transformers_own() -> None:
    listed: list[Any] = [
        hf.TopPLogitsWarper(0.2, min_tokens_to_keep=9), hf.MinPLogitsWarper(0.5, filter_value=-9.0)
    ]  # fmt: skip
    scores = random_scores(4, 60)
    wanted = by_transformers(listed, [0], scores)
    law = Law(listed, greedy=False)
    assert law.truncation == Truncation()
    assert torch.equal(law.scores(scores, no_paths), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("options", WARPERS.values(), ids=WARPERS)
def test_truncation_on_the_device_is_that_of_the_cpu_without_a_synchronisation(
    options: dict[str, Any],
) -> None:
    scores = random_scores(16, 20_000)
    on_device = scores.cuda()
    Truncation(**options).law(on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        p = Truncation(**options).law(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = Truncation(**options).law(scores)
    assert torch.equal(p.cpu() > 0, wanted > 0)
    torch.testing.assert_close(p.cpu(), wanted, rtol=1e-5, atol=1e-9)


# --- processors along paths

V = 37
PREFIXES = [
    Prefix([3], 1),
    Prefix([5, 6, 5, 6, 7, 1], 4, padding=3),
    Prefix([9, 9, 9, 8, 9, 9, 2, 9, 40], 9, padding=0),  # 40: outside of the scores
]
TREES = [
    ([6, 7, 5, 6], [-1, 0, 0, -1]),
    ([5, 6, 7, 1, 8], [-1, 0, 1, 2, 0]),
    ([], []),
]


def paths_of_trees() -> Paths:
    tokens = [torch.tensor(t, dtype=torch.long) for t, _ in TREES]
    return Paths.of_trees(PREFIXES, tokens, [parents for _, parents in TREES])


def paths_by_hand() -> list[tuple[list[int], int]]:
    """(path, padding) of every row."""
    rows = []
    for prefix, (tokens, parents) in zip(PREFIXES, TREES, strict=True):
        lines = [list(prefix.tokens)]
        for token, parent in zip(tokens, parents, strict=True):
            lines.append([*lines[parent + 1], token])
        rows += [(line, prefix.padding) for line in lines]
    return rows


def test_paths_are_those_of_the_rows() -> None:
    paths = paths_of_trees()
    assert paths.rows() == [row for row, _ in paths_by_hand()]
    assert paths.counted() == [len(row) + padding for row, padding in paths_by_hand()]
    assert paths.prompt_lens == (1,) * 5 + (4,) * 6 + (9,)
    generated = paths.from_position(paths.prompt_lens)
    assert [[t for t in row if t >= 0] for row in generated.tolist()] == [
        row[prompt:] for row, prompt in zip(paths.rows(), paths.prompt_lens, strict=True)
    ]


KNOWN: dict[str, Callable[[], LogitsProcessor]] = {
    "repetition": lambda: hf.RepetitionPenaltyLogitsProcessor(1.7),
    "repetition below 1": lambda: hf.RepetitionPenaltyLogitsProcessor(0.4),
    "repetition, prompt ignored": lambda: hf.RepetitionPenaltyLogitsProcessor(1.7, 5),
    "1-grams": lambda: hf.NoRepeatNGramLogitsProcessor(1),
    "2-grams": lambda: hf.NoRepeatNGramLogitsProcessor(2),
    "3-grams": lambda: hf.NoRepeatNGramLogitsProcessor(3),
    "9-grams": lambda: hf.NoRepeatNGramLogitsProcessor(9),
    "bias": lambda: hf.SequenceBiasLogitsProcessor(
        [[[4], 2.5], [[5, 6], -1.5], [[6, 7, 1], 3.0], [[3, 6], -INF], [[9, 9, 9, 9, 9], 1.0]]
    ),
    "bad words": lambda: hf.NoBadWordsLogitsProcessor([[8], [5, 6], [9, 9, 2]], eos_token_id=8),
    "min length": lambda: hf.MinLengthLogitsProcessor(3, [1, 30, 99]),
    "min new tokens": lambda: hf.MinNewTokensLengthLogitsProcessor(7, 4, [1, 36]),
    "suppress": lambda: hf.SuppressTokensLogitsProcessor([0, 5, 36]),
    "suppress at begin": lambda: hf.SuppressTokensAtBeginLogitsProcessor([2, 5], 9),
    "forced bos": lambda: hf.ForcedBOSTokenLogitsProcessor(11),
    "forced eos": lambda: hf.ForcedEOSTokenLogitsProcessor(11, [1, 2]),
    "exponential decay": lambda: hf.ExponentialDecayLengthPenalty((2, 1.37), [1, 30], 4),
    "typical": lambda: hf.TypicalLogitsWarper(0.6),
    "epsilon": lambda: hf.EpsilonLogitsWarper(0.02),
    "eta": lambda: hf.EtaLogitsWarper(0.2),
    "top-h": lambda: hf.TopHLogitsWarper(0.5),
    "normalisation": hf.LogitNormalization,
    "no infinity": hf.InfNanRemoveLogitsProcessor,
}


# These count the left padding that transformers put before a prompt.
BY_LENGTH = (
    hf.MinLengthLogitsProcessor, hf.MinNewTokensLengthLogitsProcessor,
    hf.SuppressTokensAtBeginLogitsProcessor, hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor, hf.ExponentialDecayLengthPenalty,
)  # fmt: skip


def _older_transformers() -> bool:
    """Whether its own processors fail on ids beyond the scores, and differ at the ends of paths."""
    try:
        hf.RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[V]]), torch.zeros(1, V))
    except RuntimeError:
        return True
    return False


# What it changed since: nothing to compare with before (5.17).
CHANGED = ("repetition", "repetition below 1", "repetition, prompt ignored", "1-grams", "bias")
needs_newer = pytest.mark.skipif(
    _older_transformers(), reason="this transformers' own processors fail on these paths"
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_newer if n in CHANGED else ()) for n in KNOWN]
)
def test_known_processor_gives_on_all_rows_what_transformers_gives_on_each_path(name: str) -> None:
    make = KNOWN[name]
    rows = paths_by_hand()
    scores = random_scores(len(rows), V)
    scores[3, 5:9] = -INF
    scores[4, 6] = 0.0
    scores[7] = scores[6]
    processor = make()
    counts_padding = isinstance(processor, BY_LENGTH) or name == "repetition, prompt ignored"
    wanted = torch.cat(
        [
            make()(torch.tensor([[0] * padding * counts_padding + path]), scores[i : i + 1])
            for i, (path, padding) in enumerate(rows)
        ]
    )
    law = Law([processor], greedy=False)
    before = scores.clone()
    assert torch.equal(law.scores(scores, paths_of_trees), wanted)
    assert torch.equal(scores, before)
    assert torch.equal(wanted, before) == (name == "9-grams")  # no path is as long
    assert law.slow_processors == ()


@needs_newer
def test_repetition_penalty_ignores_left_padding_as_transformers_batch_does() -> None:
    prompts = [[3, 4], [5, 5, 6, 7], [8]]
    width, pad = 4, 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    paddings = [width - len(p) for p in prompts]
    scores = random_scores(3, V)
    own = hf.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.tensor(paddings))
    prefixes = [Prefix(p, len(p), n) for p, n in zip(prompts, paddings, strict=True)]
    none = [torch.empty(0, dtype=torch.long)] * 3
    law = Law([hf.RepetitionPenaltyLogitsProcessor(1.5)], greedy=False)
    ours = law.scores(scores, lambda: Paths.of_trees(prefixes, none, [[]] * 3))
    assert torch.equal(ours, own(ids, scores))


@needs_newer
def test_several_processors_in_their_order() -> None:
    def make() -> list[Any]:
        return [
            *(KNOWN[name]() for name in ("bias", "repetition", "2-grams", "bad words")),
            *warpers({"temperature": 0.7, "top_k": 9, "top_p": 0.9}),
        ]

    rows = paths_by_hand()
    scores = random_scores(len(rows), V)
    wanted = torch.cat(
        [by_transformers(make(), path, scores[i : i + 1]) for i, (path, _) in enumerate(rows)]
    )
    law = Law(make(), greedy=False)
    assert torch.equal(law.scores(scores, paths_of_trees), wanted)
    p = law.probabilities(scores, paths_of_trees)
    torch.testing.assert_close(p, wanted.softmax(-1), rtol=2e-6, atol=1e-9)
    assert torch.equal(law.best(scores, paths_of_trees), wanted.argmax(-1))


class NoNeighbours(LogitsProcessor):
    """A function of (ids, scores) that nobody knows."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        near = (torch.arange(scores.shape[1])[None] - input_ids[:, -1:]).abs() < 4
        return scores.masked_fill(near, -INF) + input_ids.shape[1]


def test_unknown_processor_is_called_on_every_unpadded_path() -> None:
    rows = paths_by_hand()
    scores = random_scores(len(rows), V)
    law = Law([NoNeighbours()], greedy=False)
    wanted = [NoNeighbours()(torch.tensor([p]), scores[i : i + 1]) for i, (p, _) in enumerate(rows)]
    assert torch.equal(law.scores(scores, paths_of_trees), torch.cat(wanted))
    assert law.slow_processors == ("NoNeighbours",)
    law.prove([1, 2, 3], V, torch.device("cpu"))


def test_subclass_of_a_known_processor_is_unknown() -> None:
    class Doubles(hf.RepetitionPenaltyLogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return 2 * scores + input_ids[:, -1:]

    scores = random_scores(12, V)
    law = Law([Doubles(1.5)], greedy=False)
    last = torch.tensor([path[-1:] for path, _ in paths_by_hand()])
    assert torch.equal(law.scores(scores, paths_of_trees), 2 * scores + last)
    assert law.slow_processors == ("Doubles",)


# --- processors with a state


class CountsCalls(LogitsProcessor):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores + self.calls % 2


class RemembersTheLongest(LogitsProcessor):
    def __init__(self) -> None:
        self.longest = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.longest = max(self.longest, input_ids.shape[1])
        return scores + self.longest


class ForksItself(LogitsProcessor):
    def __init__(self) -> None:
        self.count = 0

    def fork(self, parent: "ForksItself", token: int) -> "ForksItself":
        parent.count += token
        return parent

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        return scores + self.count


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (CountsCalls(), "CountsCalls: a repeated call changes its result"),
        (RemembersTheLongest(), "RemembersTheLongest: a discarded branch changes its result"),
        (ForksItself(), "ForksItself: a call of a fork changes what other forks give"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_state_that_drafts_would_corrupt_is_refused_by_name(processor: Any, reason: str) -> None:
    law = Law([processor], greedy=False)
    with pytest.raises(InvalidArgumentError, match=reason):
        law.prove([1, 2, 3], V, torch.device("cpu"))


def test_known_state_is_refused_before_anything_is_called() -> None:
    watermark = hf.SynthIDTextWatermarkLogitsProcessor(2, [1, 2], 16, 0, 4, torch.device("cpu"))
    with pytest.raises(SpecDecError, match=r"SynthIDText.* keeps a state .*fork\(parent, token\)"):
        Law([watermark], greedy=False)


class Brackets(LogitsProcessor):
    """A grammar: tokens 0, 3, 6.. open, 1, 4, 7.. close what is open, at most two deep. It reads
    on from where it stood, so it also works when it is called on one growing text."""

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.length: int | None = None  # of the text that depth belongs to

    def fork(self, parent: "Brackets", token: int) -> "Brackets":
        return Brackets(parent.depth + {0: 1, 1: -1, 2: 0}[token % 3])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        [ids] = input_ids.tolist()
        for token in ids[self.length :] if self.length is not None else ():
            self.depth = self.fork(self, token).depth
        self.length = len(ids)
        kind = torch.arange(scores.shape[1]) % 3
        banned = (kind == 0) & (self.depth == 2) | (kind == 1) & (self.depth == 0)
        return scores.masked_fill(banned, -INF)


def depths(tokens: Sequence[int]) -> list[int]:
    return list(accumulate({0: 1, 1: -1, 2: 0}[token % 3] for token in tokens))


def test_every_node_of_a_tree_has_a_state_of_its_own() -> None:
    law = Law([Brackets()], greedy=False)
    assert isinstance(Brackets(), ForkableProcessor)
    law.prove([1, 2, 3], V, torch.device("cpu"))
    prefix = Prefix([7, 7], 2)
    tokens, parents = [3, 6, 4, 2, 1, 5], [-1, 0, 0, -1, 1, 4]
    drafted = [torch.tensor(tokens)]
    kind = torch.arange(V) % 3
    for _ in range(2):  # what was discarded does not come back
        paths = Paths.of_trees([prefix], drafted, [parents])
        scores = law.scores(
            torch.zeros(7, V), partial(Paths.of_trees, [prefix], drafted, [parents])
        )
        for row, path in zip(scores, paths.rows(), strict=True):
            depth = depths([2, *path[2:]])[-1]
            assert bool(row[kind == 0].isfinite().all()) == (depth < 2)
            assert bool(row[kind == 1].isfinite().all()) == (depth > 0)
    longer = Prefix([7, 7, 3, 6], 2)  # the committed path goes on; its states were kept
    [processor] = law._slow
    states = dict(processor._states)  # type: ignore[union-attr]
    law.scores(torch.zeros(1, V), lambda: Paths.of([longer], torch.tensor([4]), [(0, [0])]))
    added = set(processor._states) - set(states)  # type: ignore[union-attr]
    assert added == {(2, (7, 7, 3, 6, 4))}


def test_forgotten_states_are_forked_again() -> None:
    law = Law([Brackets()], greedy=False)
    tokens = [3, 4] * 300
    for end in (600, 3, 600):
        prefix = Prefix([7, *tokens[:end]], 1)
        nothing = torch.empty(0, dtype=torch.long)
        row = law.scores(torch.zeros(1, V), partial(Paths.of, [prefix], nothing, [(0, [])]))
        assert bool(row[0, 1].isfinite()) == (depths(tokens[:end])[-1] > 0)
    [processor] = law._slow
    assert len(processor._states) <= 4 * 32  # type: ignore[union-attr]


# --- SamplingParams


@needs_newer
def test_sampling_params_apply_in_transformers_order() -> None:
    params = SamplingParams(
        temperature=0.7, top_k=20, top_p=0.95, min_p=0.01, typical_p=0.9, epsilon_cutoff=1e-3,
        eta_cutoff=2e-3, repetition_penalty=1.3, logit_bias={4: 2.0, 5: -INF},
        bad_words_ids=[[7], [5, 6]], no_repeat_ngram_size=3, eos_token_ids=(36,),
        processors=LogitsProcessorList([NoNeighbours()]),
    )  # fmt: skip
    theirs = [
        hf.SequenceBiasLogitsProcessor([[[4], 2.0], [[5], -INF]]),
        hf.RepetitionPenaltyLogitsProcessor(1.3), hf.NoRepeatNGramLogitsProcessor(3),
        hf.NoBadWordsLogitsProcessor([[7], [5, 6]]), NoNeighbours(),
        hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.95),
        hf.MinPLogitsWarper(0.01), hf.TypicalLogitsWarper(0.9), hf.EpsilonLogitsWarper(1e-3),
        hf.EtaLogitsWarper(2e-3),
    ]  # fmt: skip
    rows = paths_by_hand()
    scores = random_scores(len(rows), V)
    wanted = [by_transformers(theirs, p, scores[i : i + 1]) for i, (p, _) in enumerate(rows)]
    assert torch.equal(params.law().scores(scores, paths_of_trees), torch.cat(wanted))


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    law = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, temperature=0).law()
    rows = paths_by_hand()
    scores = random_scores(len(rows), V)
    wanted = scores.clone()
    for i, prompt_len in enumerate(paths_of_trees().prompt_lens):
        for token in {t for t in rows[i][0][prompt_len:] if t < V}:
            wanted[i, token] -= 0.25 * rows[i][0][prompt_len:].count(token)
            wanted[i, token] -= 0.5
    torch.testing.assert_close(law.scores(scores, paths_of_trees), wanted, rtol=0, atol=1e-6)
    assert law.slow_processors == ()


def test_min_new_tokens_counts_from_the_end_of_the_prompt() -> None:
    law = SamplingParams(min_new_tokens=2, eos_token_ids=(1, 99), temperature=0).law()
    paths = paths_of_trees()
    scores = law.scores(random_scores(12, V), lambda: paths)
    early = [n - p < 2 for n, p in zip(paths.lengths, paths.prompt_lens, strict=True)]
    assert scores[:, 1].isinf().tolist() == early
    assert scores[:, [0, *range(2, V)]].isfinite().all()


def test_equal_params_share_a_law_while_it_is_in_use() -> None:
    laws, params = SharedLaws(), SamplingParams(top_p=0.9, bad_words_ids=((1, 2),))
    law = laws.of(params)
    assert laws.of(SamplingParams(7, top_p=0.9, bad_words_ids=((1, 2),))) is law
    assert laws.of(SamplingParams(top_p=0.8, bad_words_ids=((1, 2),))) is not law
    gone = ref(law)
    del law
    assert gone() is None


@pytest.mark.parametrize(
    "options",
    [
        {"processors": LogitsProcessorList([hf.TopKLogitsWarper(3)])},
        {"processors": (hf.TopKLogitsWarper(3),)}, {"logit_bias": {1: 1.0}},
        {"bad_words_ids": [[1]]},
    ],
)  # fmt: skip
def test_what_a_caller_could_still_change_is_not_shared(options: dict[str, Any]) -> None:
    laws, params = SharedLaws(), SamplingParams(**options)
    assert laws.of(params) is not laws.of(params)


def test_greedy_ignores_what_comes_from_temperature_on() -> None:
    params = SamplingParams(temperature=0, top_k=1, top_p=0.1, min_p=0.9, typical_p=0.2)
    assert params.law().processors == ()


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0}, {"temperature": -1}, {"temperature": INF}, {"temperature": "warm"},
        {"temperature": float("nan")}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0.0},
        {"top_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": INF},
        {"presence_penalty": float("nan")}, {"frequency_penalty": INF},
        {"logit_bias": {-1: 1.0}}, {"logit_bias": {3: INF}}, {"logit_bias": [(3, 1.0)]},
        {"bad_words_ids": [[]]}, {"bad_words_ids": [[3, -1]]}, {"no_repeat_ngram_size": -1},
        {"min_new_tokens": -2}, {"typical_p": 0}, {"epsilon_cutoff": 1.0}, {"eta_cutoff": -0.1},
        {"eos_token_ids": ("end",)},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)  # fmt: skip
def test_sampling_param_out_of_range_is_refused_by_name(options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises(InvalidArgumentError, match=f"{name}=.*: expected "):
        SamplingParams(**options)


def test_engine_honours_the_params_and_refuses_tokens_it_does_not_have(
    target: Any, draft: Any
) -> None:
    engine = Engine(target, draft=draft, num_draft_tokens=3, kv_memory=1 << 20)

    def run(**options: Any) -> tuple[int, ...]:
        params = SamplingParams(max_new_tokens=9, temperature=0, **options)
        engine.add_request([5, 9, 30], params)
        [out] = list(engine)
        return out.token_ids

    free = run()
    assert run(logit_bias={77: 1e4}) == (77,) * 9
    assert run(logit_bias={free[0]: -INF})[0] != free[0]
    assert free[:2] != run(bad_words_ids=[free[:2]])[:2]
    assert len(set(run(no_repeat_ngram_size=1))) == 9
    assert len(run(eos_token_ids=(free[0], free[1]), min_new_tokens=5)) >= 5
    assert len(set(run(presence_penalty=2e4))) == 9
    with pytest.raises(InvalidArgumentError, match=r"token 900: expected 0 to 300"):
        run(logit_bias={900: 1.0})
