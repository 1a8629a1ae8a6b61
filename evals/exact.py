"""The settings of a run on small tables: the law of what they emit, exactly, and planted faults.

What drafts, the rule, the policy and the temperature are those of the run, in production code; the
models are tables over three tokens, and drafts are cut to a size whose every outcome can be taken
(evals/audit.py). Truncation (top-k, top-p, min-p) is left to the samples of the real pair. Greedy
and coupled text has nothing random beside the seed: there each text must be plain decoding's own.
What draws in a way that has no outcomes to enumerate is sampled.
"""

import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specdec.engine import Engine
from specdec.evals.audit import TOLERANCE, NotEnumerableError, emitted_law
from specdec.evals.two_sample import g_test, sample_size
from specdec.proposers import find
from specdec.proposers.retrieval_build import write_index
from specdec.rng import Noise, PhiloxNoise, StepNoise, derive_seed
from specdec.runner import SequenceRows
from specdec.sampling import SamplingParams
from specdec.toy import Table, TableRunner, random_table
from specdec.tree import TokenTree

V = 3
PROMPT = (0, 1, 2, 0, 1)  # repeats itself, so that something can be looked up
LONG_PROMPT = tuple(i * i % 7 % V for i in range(60))  # behind which a draft with a window forgets
WINDOW = 16
TOKENS = 3
# (target, draft): peaked and flat laws, and tokens without mass
TABLES: dict[str, tuple[Table, Table]] = {
    "generic": (random_table(V, order=None, seed=1), random_table(V, order=None, seed=2)),
    "without mass": (
        random_table(V, order=None, seed=3, zeros=1), random_table(V, order=None, seed=4, zeros=1),
    ),
}  # fmt: skip
SEEDS = 64  # of path-by-path comparisons
LEVEL, DISTANCE, POWER = 1e-3, 0.05, 0.9  # where it is sampled
_TOGETHER = 256  # texts
# Sizes of drafts that can be enumerated, by proposer; over the run's own options.
_SMALL: dict[str, dict[str, Any]] = {
    "dynamic_tree": {"nodes": 4, "depth": 2, "top_k": 2},
    "lookahead": {"window": 2, "ngram": 3, "guesses": 2},
    "beam_tree": {"width": 2},
}
_LENGTH = {"draft": 2, "text": 2, "lookahead": 14}
_TREE = (2, 1)
# The times of its race are continuous.
_SAMPLED = {"beam_tree"}


Make = Callable[[Noise | None], Engine]
Progress = Callable[[Sequence[Any], str], Iterator[Any]]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check came to."""

    name: str
    passed: bool
    note: str
    details: dict[str, Any] = field(default_factory=dict)


def exact(
    options: dict[str, Any], *, drafts: bool, temperature: float,
    progress: Progress = lambda items, _: iter(items),
) -> list[Finding]:  # fmt: skip
    """One finding per pair of tables. options: of Engine beside the models; drafts: whether a model
    drafts."""
    with _small(options, drafts) as make:
        return [
            _checked(name, target, _with_tables(make, target, draft), options, temperature)
            for name, (target, draft) in progress(list(TABLES.items()), "exact")
        ]


def planted(
    options: dict[str, Any], *, drafts: bool, temperature: float,
    progress: Progress = lambda items, _: iter(items),
) -> list[Finding]:  # fmt: skip
    """Mistakes put into the same code, one at a time; a finding passes where it was seen."""
    found = []
    with _small(options, drafts) as make:
        target, draft = TABLES["generic"]
        sound = _with_tables(make, target, draft)
        is_sampled = bool(_names(options) & _SAMPLED)
        faults = _faults(sound(None), temperature, is_sampled)
        for name, fault in progress(list(faults.items()), "planted"):
            result = _checked(name, target, fault(sound), options, temperature, tokens=2)
            found.append(replace(result, passed=not result.passed))
    return found


def _with_tables(make: Callable[..., Engine], target: Table, draft: Table) -> Make:
    return lambda noise: make(noise, target, draft)


def _checked(
    name: str, target: Table, make: Make, options: dict[str, Any], temperature: float, *,
    tokens: int = TOKENS,
) -> Finding:  # fmt: skip
    began = time.perf_counter()
    if _is_path_by_path(make(None), temperature):
        differ = _differing(make, target, temperature)
        note = f"{SEEDS - differ} of {SEEDS} texts are plain decoding's"
        return Finding(name, differ == 0, note, {"texts": SEEDS, "differ": differ})
    prompt = _prompt(options)
    try:
        if make(None).proposer is not None and _names(options) & _SAMPLED:
            raise NotEnumerableError("its times are continuous")
        law = emitted_law(
            make, target, prompt, tokens=tokens, new_tokens=TOKENS, temperature=temperature
        )
    except NotEnumerableError as reason:
        return _sampled(name, make, target, prompt, temperature, str(reason))
    details = {
        "texts": len(law.ours), "error": float(law.error), "tolerance": TOLERANCE,
        "total_variation": law.total_variation, "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    note = f"largest error {law.error:.1g} of {len(law.target)} texts"
    return Finding(name, bool(law.error < TOLERANCE), note, details)


def _sampled(
    name: str, make: Make, target: Table, prompt: Sequence[int], temperature: float, reason: str
) -> Finding:
    """Where outcomes cannot be enumerated."""
    size = sample_size(DISTANCE, POWER, LEVEL, V**TOKENS - 1)
    params = SamplingParams(max_new_tokens=TOKENS, temperature=temperature)
    samples = []
    for seed, engine in enumerate((make(None), _plain(target))):
        counts = Counter[tuple[int, ...]]()
        for begin in range(0, size, _TOGETHER):
            n, its = min(_TOGETHER, size - begin), derive_seed(seed, begin, 0)
            engine.add_request(prompt, params, n=n, seed=its)
            counts.update(out.token_ids for out in engine)
        samples.append(counts)
    answer = g_test([(samples[0], samples[1])], cells=V**TOKENS)
    note = f"p = {answer.p_value:.2g} of {size} texts, sampled: {reason}"
    details = {"p_value": answer.p_value, "level": LEVEL, "texts": size, "sampled": reason}
    return Finding(name, answer.p_value >= LEVEL, note, details)


def _is_path_by_path(engine: Engine, temperature: float) -> bool:
    return temperature == 0 or engine.verifier.rule == "gumbel"


def _differing(make: Make, target: Table, temperature: float) -> int:
    """Seeds whose text is not plain decoding's; at temperature 0 prompts take their place."""
    texts = []
    params = SamplingParams(max_new_tokens=6, temperature=temperature)
    for engine in (make(None), _plain(target)):
        for seed in range(SEEDS):
            prompt = [*_digits(seed), *PROMPT] if temperature == 0 else list(PROMPT)
            engine.add_request(prompt, params, seed=seed, request_id=str(seed))
        texts.append({out.id: out.token_ids for out in engine})
    return sum(texts[0][name] != texts[1][name] for name in texts[0])


def _digits(number: int) -> list[int]:
    return [number // V**i % V for i in range(4)]


def _plain(target: Table) -> Engine:
    return Engine(TableRunner(target, V), kv_memory=1 << 22, grow=True)


# the run's settings, made small


@contextmanager
def _small(options: dict[str, Any], drafts: bool) -> Iterator[Callable[..., Engine]]:
    """make(noise, target table, draft table) -> an engine of these settings on tables."""
    with tempfile.TemporaryDirectory() as folder:
        small = small_options(options, Path(folder))
        window = small.pop("draft_window")

        def make(noise: Noise | None, target: Table, draft: Table) -> Engine:
            its = TableRunner(draft, V, window=WINDOW if window else None) if drafts else None
            runner = TableRunner(target, V)
            return Engine(runner, draft=its, noise=noise, kv_memory=1 << 22, grow=True, **small)

        yield make


def small_options(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same proposer, rule, policy and kinds of draws; few nodes. folder: for files."""
    small = {"draft_window": None, "num_draft_tokens": "auto", "tree": None, **options}
    own = _small_own(small, folder)
    names = _names(small)
    if small["tree"] is not None:
        widths = [min(width, 2) for width in small["tree"]][:2]
        small["tree"] = [*widths[:1], *(1 for _ in widths[1:])] if widths[0] == 2 else widths
    elif names == {"tree"} and not {"shape", "tree"} & set(own):
        own["tree"] = list(_TREE)
    elif small.get("policy") in (None, "auto", "constant", "cost"):
        length = max(_LENGTH.get(name, 3) for name in names)
        given = small["num_draft_tokens"]
        small["num_draft_tokens"] = min(length, given) if isinstance(given, int) else length
    if {"nodes", "shape", "tree"} & set(own):
        small["num_draft_tokens"] = "auto"
    small["proposer_options"] = own
    return small


def _small_own(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Options of the proposer, those of an ensemble's members by label."""
    given = dict(options.get("proposer_options") or {})
    proposer = options.get("proposer")
    if isinstance(proposer, list):
        labels = {name: name for name in proposer if name in _SMALL or name == "retrieval"}
        for label, name in labels.items():
            given[label] = _cut(name, dict(given.get(label, {})), folder)
        return given
    [name] = _names(options)
    return _cut(name, given, folder)


def _cut(name: str, given: dict[str, Any], folder: Path) -> dict[str, Any]:
    if "tokenizer" in given and "draft_tokenizer" in given:
        # the draft has two of the target's letters, at other places, and one of its own
        given |= {"tokenizer": _spelling("abc"), "draft_tokenizer": _spelling("cad")}
    if name == "retrieval":
        index = folder / "small.idx"
        write_index(index, [([0, 1, 2, 0, 1, 1, 2, 2, 0], True)], vocab_size=V)
        return {**{k: v for k, v in given.items() if k != "tokenizer"}, "index": index,
                "min_match": 1}  # fmt: skip
    if "shape" in given:
        given["shape"] = [-1, -1, 0]
    if "tree" in given:
        given["tree"] = list(_TREE)
    return {**given, **_SMALL.get(name, {})}


def _names(options: dict[str, Any]) -> set[str]:
    proposer = options.get("proposer")
    if proposer is None:
        return {"tree" if options.get("tree") is not None else "draft"}
    return set(proposer) if isinstance(proposer, list) else {proposer}


def _prompt(options: dict[str, Any]) -> tuple[int, ...]:
    return LONG_PROMPT if options.get("draft_window") else PROMPT


def _spelling(letters: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are these letters."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    )


def needs_draft(options: dict[str, Any]) -> bool:
    return any(find(name).needs_draft for name in _names(options))


# planted faults

Fault = Callable[[Make], Make]


def _faults(engine: Engine, temperature: float, is_sampled: bool) -> dict[str, Fault]:
    """Those that matter to this engine; large enough for samples where nothing is exact."""
    if temperature == 0:
        return {"every fourth pass takes the runner-up": _runner_up}
    heat = 2.0 if is_sampled else 1.1
    found: dict[str, Fault] = {f"a target {heat:g} times as hot": _hotter_target(heat)}
    if engine.verifier.rule == "gumbel":
        return {**found, "noise of another seed": _noisy(_OtherSeed)}
    found["every step reads the same noise"] = _noisy(_SameNoise)
    if engine.proposer is not None and engine.proposer.law == "sampled":
        found["laws that tokens were not drawn from"] = _hotter_draft
    return found


def _hotter_target(heat: float) -> Fault:
    def fault(make: Make) -> Make:
        def wrong(noise: Noise | None) -> Engine:
            engine = make(noise)
            score = engine.target.score
            engine.target.score = lambda rows: score(rows) / heat  # type: ignore[method-assign]
            return engine

        return wrong

    return fault


def _runner_up(make: Make) -> Make:
    def wrong(noise: Noise | None) -> Engine:
        engine = make(noise)
        score, passes = engine.target.score, itertools.count(1)

        def blunt(rows: Sequence[SequenceRows]) -> Tensor:
            logits = score(rows)
            return logits if next(passes) % 4 else -logits

        engine.target.score = blunt  # type: ignore[method-assign]
        return engine

    return wrong


def _hotter_draft(make: Make) -> Make:
    """Contract C2 broken: what is compared is not what was drawn from."""

    def wrong(noise: Noise | None) -> Engine:
        engine = make(noise)
        assert engine.proposer is not None
        propose = engine.proposer.propose

        def hotter(*arguments: Any) -> list[TokenTree]:
            return [_heated(tree) for tree in propose(*arguments)]

        engine.proposer.propose = hotter  # type: ignore[method-assign, assignment]
        return engine

    return wrong


def _heated(tree: TokenTree) -> TokenTree:
    if tree.laws is None:
        return tree
    laws = tree.laws.pow(0.8)
    return replace(tree, laws=laws / laws.sum(-1, keepdim=True))


def _noisy(kind: Callable[[Noise], Noise]) -> Fault:
    return lambda make: lambda noise: make(kind(noise or PhiloxNoise()))


class _SameNoise(Noise):
    """Contract C4 broken: noise is not of its step."""

    def __init__(self, noise: Noise) -> None:
        self._noise = noise

    def step(
        self, seeds: Sequence[int], positions: Sequence[int], rows: int, device: torch.device,
        copies: int = 1,
    ) -> StepNoise:  # fmt: skip
        return self._noise.step(seeds, [0] * len(positions), rows, device, copies)

    def gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device
    ) -> Tensor:
        return self._noise.gumbel(seeds, positions, vocab, device)

    def draft_gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], rows: Sequence[int], vocab: int,
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        return self._noise.draft_gumbel(seeds, [0] * len(positions), rows, vocab, device)


class _OtherSeed(_SameNoise):
    """Coupled to another run."""

    def step(
        self, seeds: Sequence[int], positions: Sequence[int], rows: int, device: torch.device,
        copies: int = 1,
    ) -> StepNoise:  # fmt: skip
        return self._noise.step(seeds, positions, rows, device, copies)

    def gumbel(
        self, seeds: Sequence[int], positions: Sequence[int], vocab: int, device: torch.device
    ) -> Tensor:
        return self._noise.gumbel([seed + 1 for seed in seeds], positions, vocab, device)
