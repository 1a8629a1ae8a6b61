"""Which rows a benchmark has: plain decoding, what drafts, and transformers' own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specdec.engine import Engine
from specdec.evals.bench import Dialogue, Task, TokenPrompts
from specdec.evals.contenders import (
    OURS,
    PLAIN,
    THEIRS,
    Contender,
    Ours,
    Speculation,
    Theirs,
    Turn,
    without_defaults,
)
from specdec.evals.progress import Progress
from specdec.evals.synthetic import SyntheticAssistant
from specdec.sampling import SamplingParams
from specdec.toy import ContinuationRunner, SyntheticDraft


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """Both sides of a comparison, loaded apart: transformers' are never wrapped."""

    baseline: Any
    target: Any
    assistant: Any = None  # as draft, with the same weights
    draft: Any = None
    # {"tokenizer": the target's, "draft_tokenizer": the draft's} where they differ
    tokenizers: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a benchmark is asked to compare."""

    speculations: tuple[Speculation, ...]
    transformers: bool = True
    assistant_lengths: tuple[int, ...] = ()  # beside the assistant's own configuration
    lookup_tokens: int = 10
    verification: str = "auto"
    options: dict[str, dict[str, Any]] | None = None  # of proposers, by name


def default_speculations(models: Models) -> tuple[Speculation, ...]:
    """What makes sense for a pair."""
    lookups = ("ngram", "suffix", "lookahead")
    if models.draft is None:
        names: tuple[str, ...] = lookups
    elif models.tokenizers:
        names = ("draft", "ngram", "suffix")
    else:
        names = ("draft", "draft:4", "tree:3,2,1", *lookups, "draft,ngram")
    return tuple(Speculation.parse(name) for name in names)


def lineup(models: Models, sampling: SamplingParams, wanted: Wanted) -> list[Contender]:
    """The rows, the baseline first. Raises InvalidArgumentError."""
    rows: list[Contender] = []
    if wanted.transformers:
        base = without_defaults(models.baseline)
        rows.append(Theirs(THEIRS, base, sampling))
        if models.assistant is not None:
            more = {"assistant_model": models.assistant}
            if models.tokenizers:
                more["tokenizer"] = models.tokenizers["tokenizer"]
                more["assistant_tokenizer"] = models.tokenizers["draft_tokenizer"]
            rows += _assisted(base, sampling, wanted, **more)
        number = wanted.lookup_tokens
        rows.append(
            Theirs(f"{THEIRS} lookup {number}", base, sampling, prompt_lookup_num_tokens=number)
        )
    rows.append(plain(models.target, sampling))
    for speculation in wanted.speculations:
        options = dict(wanted.options or {})
        if models.tokenizers:
            for name in speculation.members:
                options[name] = {**models.tokenizers, **options.get(name, {})}
        arguments = speculation.arguments(models.draft, options)
        rows.append(_ours(models.target, sampling, speculation, wanted, arguments))
    return rows


def plain(target: Any, sampling: SamplingParams) -> Ours:
    return Ours(PLAIN, Engine(target, grow=True), sampling)


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A draft that is right at a known rate, and what a pass of it costs."""

    acceptance: float
    cost: float  # of a pass, as a share of the target's


def synthetic_lineup(
    models: Models, sampling: SamplingParams, wanted: Wanted, synthetic: Synthetic,
    tasks: Sequence[Task], dialogue: Dialogue | TokenPrompts, seed: int, progress: Progress,
) -> list[Contender]:  # fmt: skip
    """As lineup, with a synthetic draft on both sides; greedy. Its texts and the seconds of a pass
    are those of plain decoding, which runs first."""
    row = plain(models.target, sampling)
    texts, turns = known_texts(row, tasks, dialogue, progress)
    passes = sum(len(turn.emitted) for turn in turns)
    pass_seconds = synthetic.cost * sum(turn.seconds for turn in turns) / passes
    vocab_size = row.engine.target.vocab_size

    def draft() -> SyntheticDraft:
        oracle = ContinuationRunner(texts, vocab_size, models.target.device)
        return SyntheticDraft(oracle, synthetic.acceptance, seed=seed, pass_seconds=pass_seconds)

    label = f"{draft().label}, cost {synthetic.cost:g} of a target pass"
    rows: list[Contender] = []
    if wanted.transformers:
        base = without_defaults(models.baseline)
        assistant = SyntheticAssistant(
            texts, vocab_size, synthetic.acceptance, seed=seed, pass_seconds=pass_seconds
        ).to(base.device)
        rows.append(Theirs(THEIRS, base, sampling))
        rows += _assisted(base, sampling, wanted, label=label, assistant_model=assistant)
    rows.append(row)
    for speculation in wanted.speculations:
        if not speculation.num_drafts:
            rows.append(_ours(models.target, sampling, speculation, wanted,
                              speculation.arguments(None, wanted.options or {})))  # fmt: skip
            continue
        arguments = speculation.arguments(None, wanted.options or {})
        its = [draft() for _ in range(speculation.num_drafts)]
        arguments["draft"] = its if len(speculation.members) > 1 else its[0]
        rows.append(_ours(models.target, sampling, speculation, wanted, arguments, label))
    return rows


def known_texts(
    row: Contender, tasks: Sequence[Task], dialogue: Dialogue | TokenPrompts, progress: Progress
) -> tuple[list[list[int]], list[Turn]]:
    """Every prompt with its continuation, and how long they took."""
    texts: list[list[int]] = []
    turns: list[Turn] = []
    for task in progress(tasks, "plain texts"):
        answers: list[Turn] = []
        for count in range(1, len(task.prompt.turns) + 1):
            ids = dialogue.tokens(task.prompt.turns[:count], [turn.tokens for turn in answers])
            answers.append(row.run(ids, 0))
            texts.append([*ids, *answers[-1].tokens])
        turns += answers
    return texts, turns


def _assisted(
    base: Any, sampling: SamplingParams, wanted: Wanted, *, label: str = "", **more: Any
) -> list[Contender]:
    """The assistant as it is configured, and with constant lengths."""
    name = f"{THEIRS} assistant"
    return [
        Theirs(name, base, sampling, label=label, **more),
        *(
            Theirs(f"{name} {length}", base, sampling, label=label, constant=length, **more)
            for length in wanted.assistant_lengths
        ),
    ]


def _ours(
    target: Any, sampling: SamplingParams, speculation: Speculation, wanted: Wanted,
    arguments: dict[str, Any], label: str = "",
) -> Ours:  # fmt: skip
    engine = Engine(target, grow=True, verification=wanted.verification, **arguments)
    return Ours(f"{OURS} {speculation.text}", engine, sampling, label=label)
