"""Do the intervals that `specdec eval` reports cover the truth? On table models it is known.

    python -m specdec.evals.estimators --out evals/results/estimators.json

Target and draft are tables over three tokens whose laws depend on the last token. What a step
accepts, by depth and by rank, is enumerated exactly (evals/enumeration.py); chained over a text, it
gives the expected counts, and their ratios are what the estimators are for. Drafts that follow from
the text before them, lookups and greedy ones, are counted along every text of every prompt. Each
seeded run generates texts with the production engine and reports as `specdec eval` does.

Of 101 rates that are covered in exactly 95 % of runs, 3 are outside of 92 to 98 % in 200 runs by
chance, none in 500. Rates of few misses, all on one side, are covered in up to 97.5 %: an interval
with 2.5 % on either side cannot miss on the other, where no miss at all is more likely than that.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import log
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from specdec import Engine, SamplingParams
from specdec.evals.acceptance import summary
from specdec.evals.enumeration import (
    DRAFTS,
    START,
    Joint,
    Tables,
    Tokens,
    V,
    leaves,
    make_tables,
    rule,
)  # fmt: skip
from specdec.evals.provenance import provenance
from specdec.evals.recorder import Recorder, Tally
from specdec.rng import derive_seed
from specdec.toy import TableRunner, table_pair

Sums = Counter[tuple[str, int]]  # (what, depth or rank) -> expected count

TOKENS, TEXTS = 32, 20  # of a text, of a run
DEPTH = 3  # of drafts that follow from the text
_TOGETHER = 20  # runs
_FIRST = 200  # runs that are counted by themselves too


@dataclass(frozen=True, slots=True)
class Case:
    """A way of drafting and judging; widths by depth."""

    shape: tuple[int, ...]
    rule: str
    tables: str = "correlated"
    seed: int = 1
    tokens: int = TOKENS
    texts: int = TEXTS
    temperature: float = 1.0

    @property
    def name(self) -> str:
        others = f", tables {self.seed}" if self.seed != 1 else ""
        return f"{','.join(map(str, self.shape))} {self.rule}{others}{_size(self)}"

    @property
    def laws(self) -> Tables:
        return make_tables(self.tables, self.seed).as_floats()

    def engine(self) -> Engine:
        laws = self.laws
        target = TableRunner(lambda text: laws.target[text[-1] if text else START], V)
        draft = TableRunner(lambda text: laws.drafts[0][text[-1] if text else START], V)
        return Engine(
            target, draft=draft, tree=self.shape, policy="constant", verification=self.rule,
            kv_memory=1 << 24, grow=True,
        )  # fmt: skip

    def prompts(self, run: int) -> list[list[int]]:
        del run
        return [[START]] * self.texts

    def sums(self) -> Sums:
        """Expected counts of a text."""
        return _text(self)


@dataclass(frozen=True, slots=True)
class Followed:
    """A draft of DEPTH tokens that is a function of the text, behind prompts of random tokens."""

    drafts: str  # "lookup" or "draft", a greedy one
    temperature: float
    prompt: int  # tokens
    tokens: int = TOKENS
    texts: int = TEXTS

    @property
    def name(self) -> str:
        return f"{self.drafts} {'sampled' if self.temperature else 'greedy'}{_size(self)}"

    def engine(self) -> Engine:
        target, draft = _pair()
        what: dict[str, Any] = {"draft": draft} if self.drafts == "draft" else {"proposer": "ngram"}
        return Engine(
            target, num_draft_tokens=DEPTH, policy="constant", kv_memory=1 << 24, grow=True, **what
        )

    def prompts(self, run: int) -> list[list[int]]:
        rng = random.Random(run)
        return [[rng.randrange(V) for _ in range(self.prompt)] for _ in range(self.texts)]

    def sums(self) -> Sums:
        """Expected counts of a text."""
        total: Sums = Counter()
        for prompt in product(range(V), repeat=self.prompt):
            for text, chance in self._texts(prompt):
                for key, count in self._counted(prompt, text):
                    total[key] += chance * count / V**self.prompt
        return total

    def _texts(self, prompt: Tokens) -> list[tuple[Tokens, float]]:
        law: list[tuple[Tokens, float]] = [((), 1.0)]
        for _ in range(self.tokens):
            law = [
                ((*text, x), chance * p)
                for text, chance in law
                for x, p in enumerate(self._law((*prompt, *text)))
                if p > 0
            ]
        return law

    def _law(self, context: Tokens) -> list[float]:
        p = _pair()[0].law(context).tolist()
        return p if self.temperature else [float(x == p.index(max(p))) for x in range(V)]

    def _counted(self, prompt: Tokens, text: Tokens) -> Iterator[tuple[tuple[str, int], float]]:
        begun = 0
        while begun < len(text):
            before = (*prompt, *text[:begun])
            depth = min(DEPTH, len(text) - begun - 1)  # the last token is the target's own
            drafted = (looked_up if self.drafts == "lookup" else _drafted)(before, depth)
            pairs = zip(drafted, text[begun:], strict=False)
            accepted = next((i for i, (a, b) in enumerate(pairs) if a != b), len(drafted))
            yield ("steps", 0), 1
            yield ("tokens", 0), accepted + 1
            yield ("drafted", 0), len(drafted)
            yield ("accepted", 0), accepted
            for place, token in enumerate(drafted):
                yield ("offered", place), 1
                yield ("kept", place), place < accepted
                if place <= accepted:
                    yield ("nodes", 0), 1
                    context = (*before, *drafted[:place])
                    yield ("overlap", 0), self._law(context)[token]
                    if self.drafts == "draft":  # of the law whose best token was drafted
                        yield ("entropy", 0), _entropy(_pair()[1].law(context).tolist())
                    yield ("reached", 0), 1
                    yield ("taken", 0), place < accepted
            begun += accepted + 1


@cache
def _pair() -> tuple[TableRunner, TableRunner]:
    return table_pair(V, 0.7, order=3, seed=1)


def looked_up(context: Tokens, depth: int, longest: int = 4) -> list[int]:
    """What follows the latest earlier match of the longest suffix; goes on into itself."""
    for length in range(min(longest, len(context) - 1), 0, -1):
        for end in range(len(context) - 1, length - 1, -1):
            if context[end - length : end] == context[-length:]:
                text = list(context)
                for place in range(depth):
                    text.append(text[end + place])
                return text[len(context) :]
    return []


def _drafted(context: Tokens, depth: int) -> list[int]:
    text = list(context)
    for _ in range(depth):
        text.append(int(_pair()[1].law(tuple(text)).argmax()))
    return text[len(context) :]


def _entropy(law: Sequence[float]) -> float:
    """Nats."""
    return -sum(x * log(x) for x in law if x > 0)


def _size(case: Case | Followed) -> str:
    tokens = f", {case.tokens} tokens" if case.tokens != TOKENS else ""
    return tokens + (f", {case.texts} texts" if case.texts != TEXTS else "")


TREES: tuple[tuple[tuple[int, ...], str], ...] = (
    ((1, 1, 1), "token"), ((1, 1, 1), "block"), ((2, 1), "recursive"), ((2, 1), "traversal"),
)  # fmt: skip
CASES: tuple[Case | Followed, ...] = (
    *(Case(shape, rule) for shape, rule in TREES),
    *(Case(shape, rule, tokens=8) for shape, rule in TREES),
    Case((1, 1, 1), "block", tokens=16, texts=5),
    Case((2, 1), "traversal", "generic", 3, tokens=8),
    Followed("draft", 0, 4, 8), Followed("lookup", 0, 4, 16), Followed("lookup", 1, 2, tokens=8),
)  # fmt: skip


def truth(case: Case | Followed) -> dict[str, float]:
    """The expected value of everything that is estimated, by name."""
    sums = case.sums()
    found = {
        "acceptance_rate": sums["accepted", 0] / sums["drafted", 0],
        "tokens_per_target_pass": sums["tokens", 0] / sums["steps", 0],
        "overlap": sums["overlap", 0] / sums["nodes", 0],
    }
    if ("entropy", 0) in sums:
        found["draft_entropy"] = sums["entropy", 0] / sums["nodes", 0]
    for what, of, name in (
        ("kept", "offered", "acceptance_by_position"), ("taken", "reached", "acceptance_by_rank"),
    ):  # fmt: skip
        found |= {
            f"{name} {place + 1}": sums[what, place] / count
            for (kind, place), count in sorted(sums.items())
            if kind == of
        }
    return found


def _text(case: Case) -> Sums:
    """Expected counts of a whole text."""
    total: Sums = Counter()
    alive = {(START, case.tokens): 1.0}  # (last token, tokens to come) -> probability
    while alive:
        following: dict[tuple[int, int], float] = defaultdict(float)
        for (last, rest), chance in alive.items():
            shape = case.shape[: rest - 1]  # the last token is the target's own
            for outcome, mass in _step(case, shape, last).items():
                emitted, ranks = _decoded(outcome)
                for key, count in _counted(case.laws, shape, last, emitted, ranks):
                    total[key] += chance * mass * count
                if rest > len(emitted):
                    following[emitted[-1], rest - len(emitted)] += chance * mass
        alive = following
    return total


@cache
def _step(case: Case, shape: tuple[int, ...], last: int) -> Joint:
    """The law of one step behind `last`: emitted tokens, then (draws, accepted or 0) by depth."""
    grow, verify, tables = DRAFTS["without replacement"], rule(case.rule, public=False), case.laws

    def run(rng: Any) -> list[int]:
        root = grow(shape, tables, last, rng)
        emitted = list(verify(root, rng))
        node, ranks = root, list[int]()
        for token in [*emitted[:-1], -1]:
            tokens = [x for x, _, _ in node.proposals]
            if tokens:
                ranks += [len(tokens), tokens.index(token) + 1 if token in tokens else 0]
            if token in tokens:
                node = node.proposals[tokens.index(token)][2]
        return [len(emitted), *emitted, *ranks]

    return leaves(run)


def _decoded(outcome: tuple[int, ...]) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    count = outcome[0]
    flat = outcome[1 + count :]
    return outcome[1 : 1 + count], list(zip(flat[::2], flat[1::2], strict=True))


def _counted(
    laws: Tables, shape: tuple[int, ...], last: int, emitted: tuple[int, ...],
    ranks: list[tuple[int, int]],
) -> Iterator[tuple[tuple[str, int], float]]:  # fmt: skip
    """What one outcome adds to each sum."""
    nodes, wide = 0, 1
    for width in shape:
        wide *= width
        nodes += wide
    accepted = len(emitted) - 1
    yield ("steps", 0), 1
    yield ("tokens", 0), len(emitted)
    yield ("drafted", 0), nodes
    yield ("accepted", 0), accepted
    for depth in range(len(shape)):
        yield ("offered", depth), 1
        yield ("kept", depth), depth < accepted
    for before, (draws, which) in zip((last, *emitted), ranks, strict=False):
        p, q = laws.target[before], laws.drafts[0][before]
        yield ("nodes", 0), 1
        yield ("overlap", 0), sum(map(min, p, q))
        yield ("entropy", 0), _entropy(q)
        for rank in range(draws):
            yield ("reached", rank), 1
            yield ("taken", rank), which == rank + 1


def estimates(case: Case | Followed, runs: Sequence[int]) -> list[dict[str, dict[str, Any]]]:
    """What each of these runs reports, by name; their texts are generated together."""
    recorder = Recorder(case.engine())
    params = SamplingParams(case.tokens, temperature=case.temperature)
    prompts = [prompt for run in runs for prompt in case.prompts(run)]
    seeds = [derive_seed(run, 1, text) for run in runs for text in range(case.texts)]
    tallies = recorder.run(prompts, params, seeds)
    return [_reported(tallies[i : i + case.texts]) for i in range(0, len(tallies), case.texts)]


def _reported(tallies: Sequence[Tally]) -> dict[str, dict[str, Any]]:
    found = summary(tallies)
    names = ("acceptance_rate", "tokens_per_target_pass", "overlap", "draft_entropy")
    rows = {name: found[name] for name in names if found[name] is not None}
    for name in ("acceptance_by_position", "acceptance_by_rank"):
        rows |= {f"{name} {place}": row for place, row in enumerate(found[name], 1)}
    return rows


def coverage(case: Case | Followed, runs: int) -> dict[str, Any]:
    """Per rate: in how many runs its interval holds the truth."""
    wanted = truth(case)
    hits: Counter[str] = Counter()
    early: Counter[str] = Counter()
    means: Counter[str] = Counter()
    for begin in tqdm(range(0, runs, _TOGETHER), desc=case.name):
        for run, rows in enumerate(
            estimates(case, range(begin, min(begin + _TOGETHER, runs))), begin
        ):
            for name, row in rows.items():
                low, high = row["interval"]
                hits[name] += low <= wanted[name] <= high
                early[name] += run < _FIRST and low <= wanted[name] <= high
                means[name] += row["value"] / runs
    return {
        name: {
            "truth": round(value, 6), "mean_estimate": round(means[name], 6),
            "covered": hits[name], "runs": runs,
            "covered_first": early[name], "first": min(runs, _FIRST),
        }
        for name, value in wanted.items()
    }  # fmt: skip


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--runs", type=click.IntRange(min=2), default=500, show_default=True)
def main(out: Path, runs: int) -> None:
    """Counts how often 95 % intervals cover the truth."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "provenance": provenance(), "confidence": 0.95, "texts": TEXTS, "tokens": TOKENS,
        "cases": {},
    }  # fmt: skip
    for case in CASES:
        result["cases"][case.name] = coverage(case, runs)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shares = [row["covered"] / runs for rows in result["cases"].values() for row in rows.values()]
    result["coverage"] = {"least": min(shares), "most": max(shares), "rates": len(shares)}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{len(shares)} rates: covered in {min(shares):.1%} to {max(shares):.1%} of runs")


if __name__ == "__main__":
    main()
