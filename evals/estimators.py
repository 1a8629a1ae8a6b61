"""Do the intervals that `specdec eval` reports cover the truth? On table models it is known.

    python -m specdec.evals.estimators --out evals/results/estimators.json

Target and draft are tables over three tokens whose laws depend on the last token. What a step
accepts, by depth and by rank, is enumerated exactly (evals/enumeration.py); chained over a text, it
gives the expected counts, and their ratios are what the estimators are for. Each seeded run
generates texts with the production engine and reports as `specdec eval` does.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import log
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from specdec import Engine, SamplingParams
from specdec.evals.acceptance import Recorder, summary
from specdec.evals.enumeration import DRAFTS, START, Joint, Tables, V, leaves, make_tables, rule
from specdec.evals.provenance import provenance
from specdec.rng import derive_seed
from specdec.toy import TableRunner

Sums = Counter[tuple[str, int]]  # (what, depth or rank) -> expected count


@dataclass(frozen=True, slots=True)
class Case:
    """A way of drafting and judging; widths by depth."""

    shape: tuple[int, ...]
    rule: str
    tables: str = "correlated"
    seed: int = 1
    tokens: int = 32

    @property
    def name(self) -> str:
        return f"{','.join(map(str, self.shape))} {self.rule}"

    @property
    def laws(self) -> Tables:
        return make_tables(self.tables, self.seed).as_floats()

    def engine(self) -> Engine:
        laws = self.laws
        target = TableRunner(lambda text: laws.target[text[-1] if text else START], V)
        draft = TableRunner(lambda text: laws.drafts[0][text[-1] if text else START], V)
        return Engine(
            target, draft=draft, tree=self.shape, verification=self.rule, kv_memory=1 << 24,
            grow=True,
        )  # fmt: skip


CASES = (
    Case((1, 1, 1), "token"), Case((1, 1, 1), "block"), Case((2, 1), "recursive"),
    Case((2, 1), "traversal"),
)  # fmt: skip


def truth(case: Case) -> dict[str, float]:
    """The expected value of everything that is estimated, by name."""
    sums = _text(case)
    found = {
        "acceptance_rate": sums["accepted", 0] / sums["drafted", 0],
        "tokens_per_target_pass": sums["tokens", 0] / sums["steps", 0],
        "overlap": sums["overlap", 0] / sums["nodes", 0],
        "draft_entropy": sums["entropy", 0] / sums["nodes", 0],
    }
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
        yield ("entropy", 0), -sum(x * log(x) for x in q if x > 0)
        for rank in range(draws):
            yield ("reached", rank), 1
            yield ("taken", rank), which == rank + 1


def estimates(case: Case, run: int, texts: int) -> dict[str, dict[str, Any]]:
    """What a run of so many texts reports, by name."""
    recorder = Recorder(case.engine())
    seeds = [derive_seed(run, 1, text) for text in range(texts)]
    params = SamplingParams(case.tokens, temperature=1.0)
    found = summary(recorder.run([[START]] * texts, params, seeds))
    names = ("acceptance_rate", "tokens_per_target_pass", "overlap", "draft_entropy")
    rows = {name: found[name] for name in names}
    for name in ("acceptance_by_position", "acceptance_by_rank"):
        rows |= {f"{name} {place}": row for place, row in enumerate(found[name], 1)}
    return rows


def coverage(case: Case, runs: int, texts: int) -> dict[str, Any]:
    """Per rate: in how many runs its interval holds the truth."""
    wanted = truth(case)
    hits: Counter[str] = Counter()
    means: Counter[str] = Counter()
    for run in tqdm(range(runs), desc=case.name):
        for name, row in estimates(case, run, texts).items():
            low, high = row["interval"]
            hits[name] += low <= wanted[name] <= high
            means[name] += row["value"] / runs
    return {
        name: {
            "truth": round(value, 6), "mean_estimate": round(means[name], 6),
            "covered": hits[name], "runs": runs,
        }
        for name, value in wanted.items()
    }  # fmt: skip


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--runs", type=click.IntRange(min=2), default=200, show_default=True)
@click.option("--texts", type=click.IntRange(min=2), default=20, show_default=True)
def main(out: Path, runs: int, texts: int) -> None:
    """Counts how often 95 % intervals cover the truth."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "provenance": provenance(), "confidence": 0.95, "texts": texts, "cases": {},
    }  # fmt: skip
    for case in CASES:
        result["cases"][case.name] = coverage(case, runs, texts)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shares = [row["covered"] / runs for rows in result["cases"].values() for row in rows.values()]
    result["coverage"] = {"least": min(shares), "most": max(shares), "rates": len(shares)}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{len(shares)} rates: covered in {min(shares):.1%} to {max(shares):.1%} of runs")


if __name__ == "__main__":
    main()
