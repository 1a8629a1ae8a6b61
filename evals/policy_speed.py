"""Is `auto` ever slower than plain decoding, and is it as fast as the best fixed draft length? And
prompt lookup beside transformers' own. Both sides of every figure alternate in one process.

    python -m specdec.evals.policy_speed sets --out evals/results/policy_sets.json
    python -m specdec.evals.policy_speed synthetic --out evals/results/policy_synthetic.json
    python -m specdec.evals.policy_speed lookup --out evals/results/policy_lookup.json

The contenders take turns, a few tokens each (race() says how); what counts is processor time of the
one thread that works, so that other jobs on a shared machine count by the caches alone. Suffix
decoding forgets past outputs here, or later rounds would copy the first one's. Of a conversation
the first turn is continued. At T=1 the rule is `gumbel`, under which every contender writes the
same text. `copy_edits` is held to its reference, because the built-in pair does not copy: the
target's pass is computed as ever, then its logits are replaced by certainty of the reference's next
token; for transformers a logits processor does the same. The synthetic draft is right with a known
probability and takes a known share of a target pass.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LogitsProcessorList

from specdec import Engine, SamplingParams, zoo
from specdec.evals import prompts as prompt_sets
from specdec.evals.held import HeldRunner, HeldTo
from specdec.evals.provenance import provenance
from specdec.evals.speed import DTYPES, load
from specdec.toy import ContinuationRunner, SyntheticDraft

SETS = (
    "heldout_code", "copy_edits", "json", "prose", "random", "chat", "multi_turn", "summarise",
)  # fmt: skip
HELD = "copy_edits"
# Fixed numbers of drafted tokens by proposer; of several, that share a tree, all of its nodes.
LENGTHS = {
    "draft": (1, 2, 3, 4, 6, 8), "ngram": (2, 4, 8, 16, 32), "suffix": (4, 8, 16, 32),
    "draft,ngram": (2, 4, 8, 16),
}  # fmt: skip
TURN = 16  # tokens
ACCEPTANCE = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)


class Racer(ABC):
    """One way to continue a prompt."""

    def __init__(self, name: str, tokens: int) -> None:
        self.name = name
        self.tokens = tokens  # of a text, at most
        self.seconds: list[float] = []  # per prompt
        self.texts: list[tuple[int, ...]] = []
        self.begun = 0  # tokens of the step that also read the prompt; 0: not known
        self.begin_seconds: list[float] = []
        self.begin_tokens: list[int] = []

    @abstractmethod
    def start(self, prompt: list[int], seed: int) -> None:
        """The next prompt."""

    @abstractmethod
    def advance(self) -> tuple[list[float], bool]:
        """Goes on for about TURN tokens: processor seconds of each new token, whether more come."""

    @abstractmethod
    def text(self) -> tuple[int, ...]:
        """The new tokens, when no more come."""


class EngineRacer(Racer):
    """An Engine."""

    def __init__(self, name: str, target: Any, tokens: int, temperature: float, **how: Any) -> None:
        super().__init__(name, tokens)
        self.engine = Engine(target, grow=True, **how)
        self._temperature = temperature
        self._admission = 0.0

    def start(self, prompt: list[int], seed: int) -> None:
        began = time.thread_time()
        params = SamplingParams(max_new_tokens=self.tokens, temperature=self._temperature)
        self.engine.add_request(prompt, params, seed=seed)
        self._admission, self.begun = time.thread_time() - began, 0

    def advance(self) -> tuple[list[float], bool]:
        each: list[float] = []
        spent, self._admission = self._admission, 0.0
        while len(each) < TURN:
            began = time.thread_time()
            [record] = self.engine.step()
            spent += time.thread_time() - began
            each += [spent / len(record.tokens)] * len(record.tokens)
            self.begun = self.begun or len(record.tokens)
            spent = 0.0
            if record.finish_reason is not None:
                return each, False
        return each, True

    def text(self) -> tuple[int, ...]:
        [output] = self.engine.take_finished()
        return output.token_ids


class CallRacer(Racer):
    """A function that does all at once; run(prompt, tokens) -> the new tokens."""

    def __init__(
        self, name: str, tokens: int, run: Callable[[list[int], int], tuple[int, ...]]
    ) -> None:
        super().__init__(name, tokens)
        self._run = run
        self._prompt: list[int] = []
        self._text: tuple[int, ...] = ()

    def start(self, prompt: list[int], seed: int) -> None:
        del seed
        self._prompt = prompt

    def advance(self) -> tuple[list[float], bool]:
        began = time.thread_time()
        self._text = self._run(self._prompt, self.tokens)
        return [(time.thread_time() - began) / len(self._text)] * len(self._text), False

    def text(self) -> tuple[int, ...]:
        return self._text


def race(
    racers: Sequence[Racer], prompts: list[list[int]], rounds: int, label: str,
    before: Callable[[int], None] = lambda _: None,
) -> None:  # fmt: skip
    """Every racer on every prompt, a few tokens each in turn.

    A slow spell of the machine is shorter than a text: it takes turns with the racers, and the
    figure of a prompt is the sum over pieces of TURN tokens of the median of the rounds. The first
    round of all warms up and is not counted.
    """
    for index, prompt in enumerate(tqdm(prompts, desc=label, mininterval=5)):
        before(index)
        found: list[list[list[float]]] = [[] for _ in racers]
        texts: list[tuple[int, ...]] = []
        for round_ in range(rounds + (index == 0)):
            spent: list[list[float]] = [[] for _ in racers]
            for each in racers:
                each.start(prompt, index)
            running = list(range(len(racers)))
            while running:
                for i in list(running):
                    seconds, more = racers[i].advance()
                    spent[i] += seconds
                    if not more:
                        running.remove(i)
                running = running[1:] + running[:1]  # nobody always follows the same one
            texts = [each.text() for each in racers]
            if index or round_:
                for i, seconds in enumerate(spent):
                    found[i].append(seconds)
        for each, rows, text in zip(racers, found, texts, strict=True):
            length = min(len(row) for row in rows)
            pieces = range(0, length, TURN)
            each.seconds.append(
                sum(median(sum(row[p : min(p + TURN, length)]) for row in rows) for p in pieces)
            )
            each.begin_seconds.append(median(sum(row[: each.begun]) for row in rows))
            each.begin_tokens.append(each.begun)
            each.texts.append(text)


def outcome(racers: Sequence[Racer]) -> dict[str, Any]:
    """Speed of each against the first, which decodes plainly; auto against the best fixed. A speed
    counts everything, that of decoding all but the step that reads the prompt."""
    total = {each.name: sum(each.seconds) for each in racers}
    plain = total[racers[0].name]
    fixed = {name: s for name, s in total.items() if name.startswith("fixed")}
    best = min({racers[0].name: plain, **fixed}.items(), key=lambda item: item[1])
    return {
        "speed against plain": {name: plain / seconds for name, seconds in total.items()},
        "decoding against plain": {
            each.name: _decoding(each) / _decoding(racers[0]) for each in racers if each.begun
        },
        "best fixed": best[0],
        "auto against best fixed": best[1] / total["auto"],
        "tokens per target pass": {
            each.name: each.engine.stats.tokens_per_target_pass
            for each in racers
            if isinstance(each, EngineRacer)
        },
        "seconds": {each.name: each.seconds for each in racers},
    }


def _decoding(racer: Racer) -> float:
    """Tokens per second."""
    tokens = sum(len(text) for text in racer.texts) - sum(racer.begin_tokens)
    return tokens / (sum(racer.seconds) - sum(racer.begin_seconds))


def hold_to(
    helds: Sequence[HeldRunner], racers: Sequence[Racer], ids: Sequence[list[int]],
    wholes: Sequence[list[int]], index: int,
) -> None:  # fmt: skip
    """The reference is what is said, and all of it."""
    for held in helds:
        held.text = torch.tensor(wholes[index])
    for racer in racers:
        racer.tokens = len(wholes[index]) - len(ids[index])


def read(name: str, count: int, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and where the set has them the continuations."""
    found = prompt_sets.load(name)[:count]
    ids = [tokenizer(prompt.text)["input_ids"] for prompt in found]
    wholes = [
        tokenizer(prompt.text + prompt.reference[0])["input_ids"] if prompt.reference else []
        for prompt in found
    ]
    return ids, wholes


@click.group()
def main() -> None:
    """Adaptive draft lengths against fixed ones and none."""
    torch.set_num_threads(1)


_COMMON = (
    click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True),
    click.option("--prompts", "count", default=10, show_default=True),
    click.option("--tokens", default=128, show_default=True),
    click.option("--rounds", default=3, show_default=True),
    click.option("--out", type=click.Path(path_type=Path), required=True),
)


def _common(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_COMMON):
        command = option(command)
    return command


def hopeless(draft: Any) -> Any:
    """The draft with its weights in another order: as dear, and never right."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in draft.parameters():
            flat = weight.view(-1)
            flat.copy_(flat[torch.randperm(flat.shape[0], generator=draw)])
    return draft


@main.command()
@_common
@click.option("--only", multiple=True, type=click.Choice(SETS), help="Some sets.")
@click.option(
    "--proposer", "proposers", multiple=True, type=click.Choice(list(LENGTHS)),
    help="Some ways to draft.",
)  # fmt: skip
def sets(
    dtype: str, count: int, tokens: int, rounds: int, out: Path, only: tuple[str, ...],
    proposers: tuple[str, ...],
) -> None:  # fmt: skip
    """auto, fixed lengths and plain decoding on each prompt set, with each proposer."""
    kind = DTYPES[dtype]
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"))
    big, small, broken = load("big", kind), load("small", kind), hopeless(load("small", kind))
    result: dict[str, Any] = {"provenance": provenance(), "dtype": dtype, "tokens": tokens}
    result["sets"] = {}
    for name in only or SETS:
        ids, wholes = read(name, count, tokenizer)
        draft = broken if name == "random" else small
        for temperature in (0.0,) if name == HELD else (0.0, 1.0):
            for proposer in proposers or LENGTHS:
                helds, racers = field(big, draft, name == HELD, tokens, temperature, proposer)

                label = f"{name}, T={temperature:g}, {proposer}"
                hold = [partial(hold_to, helds, racers, ids, wholes)] if helds else []
                race(racers, ids, rounds, label, *hold)
                if any(r.texts != racers[0].texts for r in racers):
                    raise click.ClickException(f"{label}: the texts differ: not lossless")
                result["sets"][label] = outcome(racers)
                _show(label, result["sets"][label])
                _save(out, result)


def field(
    big: Any, draft: Any, is_held: bool, tokens: int, temperature: float, proposer: str
) -> tuple[list[HeldRunner], list[Racer]]:
    """Plain decoding, auto and every fixed length, and the runners that are held to a text."""
    helds: list[HeldRunner] = []

    def racer(name: str, **how: Any) -> Racer:
        target = big
        if is_held:  # each engine needs a runner of its own
            target = HeldRunner(big)
            helds.append(target)
        return EngineRacer(name, target, tokens, temperature, **how)

    members = proposer.split(",")
    how: dict[str, Any] = {"proposer": members if len(members) > 1 else proposer}
    if temperature:
        how["verification"] = "gumbel"
    if "draft" in members:
        how["draft"] = draft
    elif proposer == "suffix":
        how["proposer_options"] = {"cache_tokens": 0}
    racers = [racer("plain"), racer("auto", **how)]
    racers += [racer(f"fixed {n}", num_draft_tokens=n, **how) for n in LENGTHS[proposer]]
    return helds, racers


@main.command()
@_common
@click.option("--share", default=0.15, show_default=True, help="Draft pass over target pass.")
def synthetic(dtype: str, count: int, tokens: int, rounds: int, out: Path, share: float) -> None:
    """auto against fixed lengths with a synthetic draft of known acceptance."""
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"))
    big = load("big", DTYPES[dtype])
    ids, _ = read("heldout_code", count, tokenizer)
    plain = EngineRacer("plain", big, tokens, 0.0)
    race([plain], ids, 1, "plain text")
    known = [[*prompt, *text] for prompt, text in zip(ids, plain.texts, strict=True)]
    pass_seconds = share * sum(plain.seconds) / (tokens * len(ids))
    result: dict[str, Any] = {
        "provenance": provenance(), "dtype": dtype, "tokens": tokens,
        "draft": "synthetic", "pass_seconds": pass_seconds, "share": share, "acceptance": {},
    }  # fmt: skip
    for rate in ACCEPTANCE:

        def draft(rate: float = rate) -> SyntheticDraft:
            oracle = ContinuationRunner(known, len(tokenizer))
            return SyntheticDraft(oracle, rate, pass_seconds=pass_seconds)

        racers: list[Racer] = [EngineRacer("plain", big, tokens, 0.0)]
        racers.append(EngineRacer("auto", big, tokens, 0.0, draft=draft()))
        racers += [
            EngineRacer(f"fixed {n}", big, tokens, 0.0, draft=draft(), num_draft_tokens=n)
            for n in (1, 2, 3, 4, 6, 8, 12, 16)
        ]
        label = f"acceptance {rate:g}"
        race(racers, ids, rounds, label)
        result["acceptance"][f"{rate:g}"] = outcome(racers)
        _show(label, result["acceptance"][f"{rate:g}"])
        _save(out, result)


@main.command()
@_common
def lookup(dtype: str, count: int, tokens: int, rounds: int, out: Path) -> None:
    """Prompt lookup on copy-heavy prompts, ours and transformers'."""
    kind = DTYPES[dtype]
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"))
    big, theirs = load("big", kind), load("big", kind)
    ids, wholes = read(HELD, count, tokenizer)
    helds: list[HeldRunner] = []

    def held() -> HeldRunner:
        helds.append(HeldRunner(big))  # each engine needs a runner of its own
        return helds[-1]

    processors = LogitsProcessorList()
    racers: list[Racer] = [
        EngineRacer("plain", held(), tokens, 0.0),
        EngineRacer("auto", held(), tokens, 0.0, proposer="ngram"),
        *(
            EngineRacer(f"fixed {n}", held(), tokens, 0.0, proposer="ngram", num_draft_tokens=n)
            for n in LENGTHS["ngram"]
        ),
    ]

    def transformers(**options: Any) -> Callable[[list[int], int], tuple[int, ...]]:
        def run(prompt: list[int], tokens: int) -> tuple[int, ...]:
            with torch.no_grad():
                ids = theirs.generate(
                    torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False,
                    logits_processor=processors, **options,
                )  # fmt: skip
            return tuple(ids[0, len(prompt) :].tolist())

        return run

    racers.append(CallRacer("transformers", tokens, transformers()))
    racers += [
        CallRacer(
            f"transformers lookup {n}, ngram {size}",
            tokens,
            transformers(prompt_lookup_num_tokens=n, max_matching_ngram_size=size),
        )
        for n in (4, 8, 16, 32)
        for size in (2, 4)
    ]

    def hold(index: int) -> None:
        hold_to(helds, racers, ids, wholes, index)
        processors[:] = [HeldTo(wholes[index])]

    race(racers, ids, rounds, "lookup", hold)
    if any(each.texts != racers[0].texts for each in racers):
        raise click.ClickException("the texts differ")
    found = outcome(racers)
    speed = found["speed against plain"]
    best = max((n for n in speed if "lookup" in n), key=lambda n: speed[n])
    found["best of transformers"] = best
    found["auto against it"] = speed["auto"] / speed[best]
    found["best fixed against it"] = speed[found["best fixed"]] / speed[best]
    _show("lookup", found)
    click.echo(f"against {best}: {found['auto against it']:.2f}")
    _save(out, {"provenance": provenance(), "dtype": dtype, "tokens": tokens, **found})


def _show(label: str, found: dict[str, Any]) -> None:
    speed = ", ".join(f"{name} {x:.2f}" for name, x in found["speed against plain"].items())
    decoding = found["decoding against plain"]["auto"]
    ratio = found["auto against best fixed"]
    click.echo(f"{label}: {speed}; auto / best fixed {ratio:.3f}; auto, decoding {decoding:.2f}")


def _save(out: Path, result: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
