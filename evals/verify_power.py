"""How often the two-sample test of `specdec verify` is right: which planted mistakes it sees, and
how often it cries wolf, on table models.

    python -m specdec.evals.verify_power --out evals/results/verify_power.json

Texts of a mistake are drawn from its exact law, which is enumerated (evals/wrong_rules.py): that is
what running it long enough gives. False alarms are counted twice: on samples of the target's exact
laws at the full size of the asked distance, and on texts that the production engine samples from a
table model, where the whole chain of `verify` is run at a smaller size. A mistake whose tables do
not show it would be no mistake: the script fails when one is nearer than 1e-3 to the target.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from specdec import Engine, SamplingParams
from specdec.evals.enumeration import (
    DRAFTS,
    Comparison,
    Joint,
    chained,
    compare,
    make_tables,
    plain_decoding,
    rule,
)
from specdec.evals.keyed import RekeyedNoise, compare_keyed
from specdec.evals.lossless import Plan, sample_texts
from specdec.evals.provenance import provenance
from specdec.evals.two_sample import Text, g_test
from specdec.evals.wrong_rules import FAULTS, KEY_FAULTS, KeyFault, Variant
from specdec.rng import derive_seed
from specdec.toy import table_pair

DETECT, CAUGHT_ABOVE = 0.01, 0.02
SHOWS = 1e-3  # total variation that every mistake has on one of its tables at least
PERMUTATIONS = 999
# As `verify` samples on one table: one prompt, as many cells as its four prompts have together.
PLAN = Plan(DETECT, tokens=5, cells=32, prompts=1)
ENGINE_PLAN = Plan(0.2, tokens=3, cells=16, prompts=1)


def joint_law(joint: Joint) -> tuple[list[Text], NDArray[np.float64]]:
    masses = np.array([float(mass) for mass in joint.values()])
    return list(joint), masses / masses.sum()


def drawn(law: tuple[list[Text], NDArray[np.float64]], size: int, seed: int) -> Counter[Text]:
    texts, masses = law
    counts = np.random.default_rng(seed).multinomial(size, masses).tolist()
    return Counter({text: n for text, n in zip(texts, counts, strict=True) if n})


def cut(joint: Joint, tokens: int) -> Joint:
    """The law of the first tokens."""
    law: Joint = {}
    for text, mass in joint.items():
        law[text[:tokens]] = law.get(text[:tokens], 0) + mass
    return law


def distance(a: Joint, b: Joint) -> float:
    return float(sum(abs(a.get(text, 0) - b.get(text, 0)) for text in a.keys() | b.keys())) / 2


@dataclass(frozen=True, slots=True)
class Mistake:
    """A planted mistake; law(seed) compares its text with the target's on seeded tables."""

    name: str
    law: Callable[[int], Comparison]
    tables: int  # as many as its enumeration has time for


def mistakes() -> list[Mistake]:
    return [*map(_variant, FAULTS), *map(_keyed, KEY_FAULTS)]


def _names() -> list[str]:
    return list(dict.fromkeys(mistake.name for mistake in mistakes()))


def _variant(fault: Variant) -> Mistake:
    return Mistake(fault.name, law_of(fault), 20)


def _keyed(fault: KeyFault) -> Mistake:
    return Mistake(f"{fault.rule}: {fault.name}", law_of(fault), 8)


def law_of(fault: Variant | KeyFault) -> Callable[[int], Comparison]:
    """Of its text and the target's, by seed of the tables."""

    def law(seed: int) -> Comparison:
        if isinstance(fault, Variant):
            tables = make_tables(fault.tables, seed).as_floats()
            return compare(fault.verify, fault.grow, fault.shape, tables)
        return compare_keyed(
            RekeyedNoise(fault.keys, fault.reads), rule(fault.rule), DRAFTS[fault.draft], fault.shape,
            make_tables("generic", seed),
        )  # fmt: skip

    return law


def most_biased(mistake: Mistake, seeds: int) -> tuple[int, Joint, Joint]:
    """The tables on which a mistake shows most, its law there and the target's."""
    found = []
    for seed in range(min(seeds, mistake.tables)):
        both = mistake.law(seed)
        found.append((both.total_variation, seed, both))
    _, seed, both = max(found, key=lambda item: item[:2])
    return seed, cut(both.ours, PLAN.tokens), cut(both.target, PLAN.tokens)


def power_of(mistake: Mistake, runs: int, seeds: int) -> dict[str, Any]:
    seed, ours, target = most_biased(mistake, seeds)
    far = distance(ours, target)
    laws, size = (joint_law(ours), joint_law(target)), PLAN.texts(1)
    p_values = []
    for run in range(runs):
        samples = [drawn(law, size, 2 * run + side) for side, law in enumerate(laws)]
        answer = g_test(
            [(samples[0], samples[1])], cells=PLAN.cells, seed=run, permutations=PERMUTATIONS
        )
        p_values.append(answer.p_value)
    return {
        "name": mistake.name, "seed": seed,
        "total_variation": round(far, 5),
        "caught": sum(p < PLAN.level for p in p_values), "runs": runs,
        "largest_p_value": max(p_values),
    }  # fmt: skip


def alarms_of_laws(runs: int) -> dict[str, Any]:
    """On samples of one law each, at the full size."""
    p_values = []
    size = PLAN.texts(1)
    for run in tqdm(range(runs), desc="null, exact laws"):
        laws = make_tables("generic", run).as_floats().target
        law = joint_law(chained([plain_decoding(laws)], PLAN.tokens))
        pair = drawn(law, size, 10_000 + 2 * run), drawn(law, size, 10_001 + 2 * run)
        p_values.append(
            g_test([pair], cells=PLAN.cells, seed=run, permutations=PERMUTATIONS).p_value
        )
    return _alarms(p_values, PLAN, size)


def alarms_of_engine(runs: int) -> dict[str, Any]:
    """On texts of the production engine on a table model, speculative beside plain."""
    target, draft = table_pair(4, 0.7, order=1, seed=1, zeros=1)
    alone, _ = table_pair(4, 0.7, order=1, seed=1, zeros=1)
    engines = (
        Engine(target, draft=draft, num_draft_tokens=2, policy="constant", grow=True),
        Engine(alone, grow=True),
    )
    params = SamplingParams(max_new_tokens=ENGINE_PLAN.tokens, temperature=1.0)
    size = ENGINE_PLAN.texts(1)
    p_values = []
    for run in tqdm(range(runs), desc="null, engine"):
        samples = [
            sample_texts(engine, [0], params, _seeds(run, side, size))
            for side, engine in enumerate(engines)
        ]
        p_values.append(
            g_test(
                [(samples[0], samples[1])], cells=ENGINE_PLAN.cells, seed=run,
                permutations=PERMUTATIONS,
            ).p_value
        )  # fmt: skip
    accepted = engines[0].stats.acceptance_rate
    return {**_alarms(p_values, ENGINE_PLAN, size), "acceptance_rate": round(accepted, 4)}


def _seeds(run: int, side: int, size: int) -> Sequence[int]:
    return [derive_seed(derive_seed(run, 0, side), 0, 1 + i) for i in range(size)]


def _alarms(p_values: Sequence[float], plan: Plan, size: int) -> dict[str, Any]:
    alarms = sum(p < plan.level for p in p_values)
    return {
        "runs": len(p_values), "level": plan.level, "alarms": alarms, "texts": size,
        "at_5_percent": sum(p < 0.05 for p in p_values), "detect_tv": plan.total_variation,
        "p_values": [round(p, 4) for p in p_values],
    }  # fmt: skip


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--runs", type=click.IntRange(min=1), default=20, help="Per mistake.")
@click.option("--null-runs", type=click.IntRange(min=1), default=200)
@click.option("--seeds", type=click.IntRange(min=1), default=20, help="Tables per mistake at most.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(_names()),
    metavar="MISTAKE",
    help="Count these again; the other rows, and the false alarms, are those of --out.",
)
def main(out: Path, runs: int, null_runs: int, seeds: int, only: tuple[str, ...]) -> None:
    """Counts what is caught and what is a false alarm."""
    if only and not out.exists():
        raise click.BadParameter(f"{out} holds no rows yet", param_hint="--only")
    began = time.time()
    before = json.loads(out.read_text(encoding="utf-8")) if only else None
    faults = counted(runs, seeds, before, only)
    sessions = [] if before is None else before.get("sessions", [before["provenance"]])
    result = {
        "provenance": provenance(),
        "sessions": [*sessions, {**provenance(), "only": list(only)}],
        "detect_tv": DETECT, "power": PLAN.power, "level": PLAN.level, "cells": PLAN.cells,
        "tokens": PLAN.tokens, "texts": PLAN.texts(1),
        **summed_up(faults),
        "null": before["null"] if before is not None else
        {"laws": alarms_of_laws(null_runs), "engine": alarms_of_engine(null_runs)},
        "seconds": round(time.time() - began),
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(
        f"{result['always_caught_above']} of {result['faults_above']} mistakes above "
        f"{CAUGHT_ABOVE} always caught; "
        + ", ".join(
            f"{name}: {null['alarms']} alarms of {null['runs']} at {null['level']}"
            for name, null in result["null"].items()
        )
    )
    hidden = [f["name"] for f in faults if f["total_variation"] <= SHOWS]
    if hidden:
        raise click.ClickException(f"not above {SHOWS} on any table: {', '.join(hidden)}")


def counted(
    runs: int, seeds: int, before: dict[str, Any] | None, only: Sequence[str]
) -> list[dict[str, Any]]:
    """A row per mistake; before: where those that are not asked for are taken from, if it has
    them."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)  # two may share a name
    for row in before["faults"] if before is not None else ():
        rows[row["name"]].append(row)
    return [
        power_of(mistake, runs, seeds) if mistake.name in only or not rows[mistake.name]
        else rows[mistake.name].pop(0)
        for mistake in tqdm(mistakes(), desc="planted")
    ]  # fmt: skip


def summed_up(faults: Sequence[dict[str, Any]]) -> dict[str, Any]:
    large = [f for f in faults if f["total_variation"] > CAUGHT_ABOVE]
    missed = [f["name"] for f in large if f["caught"] < f["runs"]]
    return {
        "faults": list(faults), "above": CAUGHT_ABOVE, "faults_above": len(large),
        "always_caught_above": len(large) - len(missed), "missed_above": missed,
    }  # fmt: skip


if __name__ == "__main__":
    main()
