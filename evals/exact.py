"""The settings of a run on small tables: the law of what they emit, exactly, and planted faults.

What drafts, the rule, the policy, the temperature and the truncation (top-k, top-p, min-p and the
like) and processors are those of the run, in production code; the models are tables over three
tokens, and drafts are cut to a size whose every outcome can be taken. A table costs nothing, so the
policy of costs plans with made-up ones (evals/planned.py). They are compared with the
law that transformers' own processors give on each path alone (evals/audit.py). Greedy and coupled
text has nothing random beside the seed: there each text must be the best one by those scores and
that seed's noise. What draws in a way that has no outcomes to enumerate is sampled.
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

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, TemperatureLogitsWarper

from specdec.engine import Engine
from specdec.errors import InvalidArgumentError
from specdec.evals.audit import (
    TOLERANCE,
    NotEnumerableError,
    emitted_law,
    next_scores,
    target_law,
)
from specdec.evals.enumeration import Comparison
from specdec.evals.planned import Apart, MadeUpCosts
from specdec.evals.progress import Progress, silent
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
EDGES, _BESIDE = "at the edges", 0.02  # beside them where laws are cut off
SEEDS = 64  # of path-by-path comparisons
LEVEL, DISTANCE, POWER = 1e-3, 0.05, 0.9  # where it is sampled
_SEEN = 100 * TOLERANCE  # where it is not
_CERTAIN = 0.99  # a text of this mass leaves a mistake nothing to show in
_TOGETHER = 256  # texts
# Sizes of drafts that can be enumerated, by proposer; over the run's own options.
_SMALL: dict[str, dict[str, Any]] = {
    "dynamic_tree": {"nodes": 4, "depth": 2, "top_k": 2},
    "lookahead": {"window": 2, "ngram": 3, "guesses": 2},
    "beam_tree": {"width": 2},
}
_LENGTH = {"draft": 2, "text": 2, "lookahead": 14}
_TREE = (2, 1)
MADE_UP = "made-up costs"
# The times of its race are continuous.
_SAMPLED = {"beam_tree"}


Make = Callable[[Noise | None], Engine]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check came to."""

    name: str
    passed: bool
    note: str
    details: dict[str, Any] = field(default_factory=dict)


def exact(
    options: dict[str, Any], *, drafts: bool, sampling: SamplingParams,
    progress: Progress = silent,
) -> list[Finding]:  # fmt: skip
    """One finding per pair of tables. options: of Engine beside the models; drafts: whether a model
    drafts."""
    small = small_sampling(sampling)
    with _small(options, drafts) as make:
        return [
            _checked(name, target, _with_tables(make, target, draft), options, small)
            for name, (target, draft) in progress(list(_tables(small).items()), "exact")
        ]


def planted(
    options: dict[str, Any], *, drafts: bool, sampling: SamplingParams,
    progress: Progress = silent,
) -> list[Finding]:  # fmt: skip
    """Mistakes put into the same code, one at a time; a finding passes where it was seen on some
    table. Raises InvalidArgumentError where none could show: one token has all the mass."""
    found = []
    small = small_sampling(sampling)
    with _small(options, drafts) as make:
        tables = _tables(small)
        makes = {name: _with_tables(make, *pair) for name, pair in tables.items()}
        engine, is_sampled = next(iter(makes.values()))(None), bool(_names(options) & _SAMPLED)
        faults = _faults(engine, small, is_sampled, tables, _prompt(options))
        for name, (fault, where) in progress(list(faults.items()), "planted"):
            # a mistake need not show on every table, nor at once
            tries = (
                _checked(name, tables[t][0], fault(makes[t]), options, small, tokens=tokens)
                for tokens, t in itertools.product((2, TOKENS), where)
            )
            result = next(tries)
            while result.passed and (further := next(tries, None)):
                result = further
            found.append(replace(result, passed=not result.passed))
    return found


def _tables(sampling: SamplingParams) -> dict[str, tuple[Table, Table]]:
    if not _cuts(sampling):
        return TABLES
    return {**TABLES, EDGES: (_at_edges(sampling, 5), _at_edges(sampling, 6))}


def _at_edges(sampling: SamplingParams, seed: int) -> Table:
    """Laws a little to either side of where top_p or min_p cuts off; with third tokens of all sizes
    where neither does."""
    edges = [name for name in ("top_p", "min_p") if getattr(sampling, name) not in (0, 1)]

    def table(context: tuple[int, ...]) -> list[float]:
        rng = np.random.default_rng([seed, len(context), *context])
        second, side = rng.uniform(0.6, 1), 1 + _BESIDE * rng.choice([-1, 1])
        third = second * 0.9 * 10 ** rng.uniform(-2.5, 0)
        edge = edges[rng.integers(len(edges))] if edges else ""
        if edge == "min_p":
            third = min(sampling.min_p * side, 0.95 * second)
        elif edge and sampling.top_p > 2 / 3:  # the third token's own share is at the edge
            left = (1 - sampling.top_p) * side
            third = min(left * (1 + second) / (1 - left), 0.95 * second)
        elif edge:  # the first's
            second, third = (share * (1 / (sampling.top_p * side) - 1) for share in (0.55, 0.45))
        masses = np.array([1.0, second, third])[rng.permutation(V)] ** sampling.temperature
        return [float(mass) for mass in masses / masses.sum()]

    return table


def _with_tables(make: Callable[..., Engine], target: Table, draft: Table) -> Make:
    return lambda noise: make(noise, target, draft)


def _checked(
    name: str, target: Table, make: Make, options: dict[str, Any], sampling: SamplingParams, *,
    tokens: int = TOKENS,
) -> Finding:  # fmt: skip
    depths = set[int]()
    found = _compared(name, target, _watched(make, depths), options, sampling, tokens)
    if not depths:
        return found
    note = f"{found.note}; drafts of {min(depths)} to {max(depths)} levels by {MADE_UP}"
    return replace(found, note=note, details={**found.details, "depths": sorted(depths)})


def _watched(make: Make, depths: set[int]) -> Make:
    """Where the policy of costs plans, `depths` is told how deep."""

    def watched(noise: Noise | None) -> Engine:
        engine = make(noise)
        if isinstance(engine.policy, Apart):
            engine.policy.depths = depths
        return engine

    return watched


def _compared(
    name: str, target: Table, make: Make, options: dict[str, Any], sampling: SamplingParams,
    tokens: int,
) -> Finding:  # fmt: skip
    began = time.perf_counter()
    if _is_path_by_path(make(None), sampling):
        differ = _differing(make, target, sampling)
        note = f"{SEEDS - differ} of {SEEDS} texts are plain decoding's"
        return Finding(name, differ == 0, note, {"texts": SEEDS, "differ": differ})
    prompt = _prompt(options)
    try:
        if make(None).proposer is not None and _names(options) & _SAMPLED:
            raise NotEnumerableError("its times are continuous")
        law = emitted_law(make, target, prompt, tokens=tokens, new_tokens=TOKENS, sampling=sampling)
    except NotEnumerableError as reason:
        return _sampled(name, make, target, prompt, sampling, str(reason))
    details = {
        "texts": len(law.ours), "error": float(law.error), "tolerance": TOLERANCE,
        "total_variation": law.total_variation, "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    note = f"largest error {law.error:.1g} of {len(law.target)} texts"
    if _cuts(sampling):
        whole = target_law(target, prompt, tokens, _uncut(sampling))
        details["cut_off"] = sum(p for text, p in whole.items() if text not in law.target)
        note += f", {details['cut_off']:.1%} cut off"
    return Finding(name, bool(law.error < TOLERANCE), note, details)


def _sampled(
    name: str, make: Make, target: Table, prompt: Sequence[int], sampling: SamplingParams,
    reason: str,
) -> Finding:  # fmt: skip
    """Where outcomes cannot be enumerated: texts beside as many from the law itself."""
    size = sample_size(DISTANCE, POWER, LEVEL, V**TOKENS - 1)
    params = replace(sampling, max_new_tokens=TOKENS)
    engine, ours = make(None), Counter[tuple[int, ...]]()
    for begin in range(0, size, _TOGETHER):
        n, its = min(_TOGETHER, size - begin), derive_seed(0, begin, 0)
        engine.add_request(prompt, params, n=n, seed=its)
        ours.update(out.token_ids for out in engine)
    law = target_law(target, prompt, TOKENS, params)
    drawn = np.random.default_rng(1).multinomial(size, list(law.values())).tolist()
    theirs = Counter({text: n for text, n in zip(law, drawn, strict=True) if n})
    answer = g_test([(ours, theirs)], cells=V**TOKENS)
    note = f"p = {answer.p_value:.2g} of {size} texts, sampled: {reason}"
    details = {"p_value": answer.p_value, "level": LEVEL, "texts": size, "sampled": reason}
    return Finding(name, answer.p_value >= LEVEL, note, details)


def _is_path_by_path(engine: Engine, sampling: SamplingParams) -> bool:
    return sampling.temperature == 0 or engine.verifier.rule == "gumbel"


def _differing(make: Make, target: Table, sampling: SamplingParams) -> int:
    """Seeds whose text is not plain decoding's; at temperature 0 prompts take their place."""
    engine, greedy = make(None), sampling.temperature == 0
    params = replace(sampling, max_new_tokens=2 * TOKENS)
    prompts = [[*_digits(seed), *PROMPT] if greedy else list(PROMPT) for seed in range(SEEDS)]
    for seed, prompt in enumerate(prompts):
        engine.add_request(prompt, params, seed=seed, request_id=str(seed))
    ours = {int(out.id): out.token_ids for out in engine}
    return sum(
        ours[seed] != _plain_text(target, prompt, params, None if greedy else seed)
        for seed, prompt in enumerate(prompts)
    )


def _plain_text(
    target: Table, prompt: Sequence[int], params: SamplingParams, seed: int | None
) -> tuple[int, ...]:
    """By definition: the best score at each position, with the noise of a seed."""
    text: tuple[int, ...] = ()
    for position in range(len(prompt), len(prompt) + params.max_new_tokens):
        scores = next_scores(target, prompt, text, params)
        if seed is not None:
            noise = PhiloxNoise().gumbel([seed], [position], V, scores.device)
            scores = scores.log_softmax(-1) + noise[0]
        text = (*text, int(scores.argmax()))
    return text


def _digits(number: int) -> list[int]:
    return [number // V**i % V for i in range(4)]


# the run's settings, made small


# Of a step by drafted depth, for the policy of costs: at first two levels are best, then none.
_SECONDS = (1.0, 1.6, 1.92, 2.4)


@contextmanager
def _small(options: dict[str, Any], drafts: bool) -> Iterator[Callable[..., Engine]]:
    """make(noise, target table, draft table) -> an engine of these settings on tables."""
    with tempfile.TemporaryDirectory() as folder:
        small = small_options(options, Path(folder))
        window = small.pop("draft_window")
        by_cost, number = plans_by_cost(options), small["num_draft_tokens"]
        most = number if isinstance(number, int) else None

        def make(noise: Noise | None, target: Table, draft: Table) -> Engine:
            its = TableRunner(draft, V, window=WINDOW if window else None) if drafts else None
            runner = TableRunner(target, V)
            given = small
            if by_cost:
                policy = Apart(lambda: MadeUpCosts(most, seconds=_SECONDS))
                given = {**small, "policy": policy, "num_draft_tokens": "auto"}
            return Engine(runner, draft=its, noise=noise, kv_memory=1 << 22, grow=True, **given)

        yield make


def small_sampling(sampling: SamplingParams) -> SamplingParams:
    """The same law over three tokens: what is counted in tokens is cut to leave something to draw,
    tokens that are named become some of the three, and no text ends early. Further processors are
    kept where they run on so few tokens."""
    bias = {token % V: value for token, value in (sampling.logit_bias or {}).items()}
    words = [[token % V for token in word] for word in sampling.bad_words_ids]
    return replace(
        sampling, max_new_tokens=TOKENS, top_k=min(sampling.top_k, V - 1), eos_token_ids=(),
        min_new_tokens=0, logit_bias=bias or None, bad_words_ids=words[:1],
        no_repeat_ngram_size=max(sampling.no_repeat_ngram_size, TOKENS)
        if sampling.no_repeat_ngram_size else 0,
        processors=LogitsProcessorList(filter(_runs_small, sampling.processors or ())),
    )  # fmt: skip


def _runs_small(processor: Any) -> bool:
    try:
        scores = processor(torch.tensor([PROMPT]), torch.zeros(1, V))
    except (IndexError, KeyError, RuntimeError, ValueError):
        return False
    return bool(scores.shape == (1, V) and scores.isfinite().any())


def _cuts(sampling: SamplingParams) -> bool:
    """Whether it takes the mass of unlikely tokens away."""
    return _uncut(sampling) != sampling and sampling.temperature > 0


def _uncut(sampling: SamplingParams) -> SamplingParams:
    return replace(
        sampling, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0
    )


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


def plans_by_cost(options: dict[str, Any]) -> bool:
    """Whether an engine of these options plans by costs: unless it is told a number."""
    policy, number = options.get("policy") or "auto", options.get("num_draft_tokens", "auto")
    if policy == "cost":
        return bool(number != 0)
    return bool(policy == "auto" and number == "auto")


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


def _faults(
    engine: Engine, sampling: SamplingParams, is_sampled: bool,
    tables: dict[str, tuple[Table, Table]], prompt: Sequence[int],
) -> dict[str, tuple[Fault, list[str]]]:  # fmt: skip
    """Those that matter to this engine, and the tables that they can show on; large enough for
    samples where nothing is exact."""
    if sampling.temperature == 0:
        return {"every fourth pass takes the runner-up": (_runner_up, list(TABLES)[:1])}
    is_coupled = engine.verifier.rule == "gumbel"
    heat, coldness = (3.0, 0.3) if is_sampled or is_coupled else (1.1, 0.8)
    least = 2 * DISTANCE if is_sampled or is_coupled else _SEEN
    laws = {name: target_law(pair[0], prompt, TOKENS, sampling) for name, pair in tables.items()}
    found: dict[str, tuple[Fault, list[str]]] = {}
    for name, params in _wrong_laws(sampling, heat).items():
        its = {n: target_law(pair[0], prompt, TOKENS, params) for n, pair in tables.items()}
        # where both say the same it is no mistake
        far = [n for n in laws if Comparison(its[n], laws[n]).total_variation > least]
        if far:
            found[name] = _sampling_as(params), far
    open_ = [name for name, law in laws.items() if max(law.values()) < _CERTAIN]
    if open_ and is_coupled:
        found["noise of another seed"] = _noisy(_OtherSeed), open_
    elif open_:
        found["every step reads the same noise"] = _noisy(_SameNoise), open_
        if engine.proposer is not None and engine.proposer.law == "sampled":
            found["laws that tokens were not drawn from"] = _hotter_draft(coldness), open_
    if not found:
        raise InvalidArgumentError(
            "nothing to audit: with these settings one token has all the mass; expected a larger "
            "top_k or top_p, a smaller min_p, or temperature 0"
        )
    return found


def _wrong_laws(sampling: SamplingParams, heat: float) -> dict[str, SamplingParams]:
    return {
        f"a target {heat:g} times as hot": replace(
            sampling, temperature=sampling.temperature * heat
        ),
        "unlikely tokens are not cut off": _uncut(sampling),
        "tokens are cut off before the temperature": _early(sampling),
    }


def _early(sampling: SamplingParams) -> SamplingParams:
    """Truncation as if the temperature came behind it."""
    warm = replace(sampling, temperature=1.0).law().processors
    cold = [*warm, TemperatureLogitsWarper(float(sampling.temperature))]
    plain = SamplingParams(sampling.max_new_tokens)
    return replace(plain, processors=LogitsProcessorList(cold)) if _cuts(sampling) else sampling


def _sampling_as(params: SamplingParams) -> Fault:
    def fault(make: Make) -> Make:
        def wrong(noise: Noise | None) -> Engine:
            engine = make(noise)
            add = engine.add_request

            def other(prompt: Any, asked: SamplingParams, **more: Any) -> str:
                return add(prompt, replace(params, max_new_tokens=asked.max_new_tokens), **more)

            engine.add_request = other  # type: ignore[method-assign, assignment]
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


def _hotter_draft(coldness: float) -> Fault:
    """Contract C2 broken: what is compared is not what was drawn from."""

    def fault(make: Make) -> Make:
        def wrong(noise: Noise | None) -> Engine:
            engine = make(noise)
            assert engine.proposer is not None
            propose = engine.proposer.propose

            def hotter(*arguments: Any) -> list[TokenTree]:
                return [_heated(tree, coldness) for tree in propose(*arguments)]

            engine.proposer.propose = hotter  # type: ignore[method-assign, assignment]
            return engine

        return wrong

    return fault


def _heated(tree: TokenTree, coldness: float = 0.8) -> TokenTree:
    if tree.laws is None:
        return tree
    laws = tree.laws.pow(coldness)
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
