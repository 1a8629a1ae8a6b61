"""Does the two-sample test of `specdec verify --detect-tv 0.01` catch mistakes that are planted in
the production engine? The user's view of what evals/verify_power.py draws from enumerated laws.

    python -m specdec.evals.planted_power --run FOLDER --out evals/results/planted_power.json

Both sides are sampled by engines on a table model, at the full size of the asked distance. A
mistake that the engine refuses to run is caught too. Sound ones go through the same machinery and
must pass. Records are kept in FOLDER: a run that was interrupted goes on, and several may share the
work.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from specdec import SamplingParams
from specdec.engine import Engine
from specdec.errors import SpecDecError
from specdec.evals.enumeration import START
from specdec.evals.folder import RunFolder
from specdec.evals.lossless import LANES, Plan, sample_texts
from specdec.evals.planted_engine import engine_of, plain_engine
from specdec.evals.provenance import provenance
from specdec.evals.two_sample import Text, g_test
from specdec.evals.verify_power import CAUGHT_ABOVE, cut, distance, law_of
from specdec.evals.wrong_rules import FAULTS, KEY_FAULTS, LEGAL, KeyFault, Variant
from specdec.rng import derive_seed

PLAN = Plan(0.01, tokens=3, cells=32, prompts=1)
SEED = 10  # of the tables
# One or more of every rule; the whole list takes hours.
CHOSEN = (
    "token: resample from p", "token: no fault", "block: early break", "traversal: weight kept",
    "recursive: no residual between siblings", "kseq: whole law without replacement", "typical",
    "token: same draft in every step", "block: drawn from the top two, declared whole",
    "traversal: law not renormalised without replacement", "traversal: stop before an unsure law",
)  # fmt: skip
_CHUNK = 8 * LANES


def named() -> dict[str, Variant | KeyFault]:
    """By the names of evals/verify_power.py; where two share one, the first."""
    found: dict[str, Variant | KeyFault] = {}
    for fault in (*FAULTS, *KEY_FAULTS, *LEGAL):
        name = f"{fault.rule}: {fault.name}" if isinstance(fault, KeyFault) else fault.name
        found.setdefault(name, fault)
    return found


def sampled(engine: Engine, size: int, side: int, label: str) -> Counter[Text]:
    """Texts of one side."""
    params = SamplingParams(max_new_tokens=PLAN.tokens, temperature=1.0)
    base = derive_seed(SEED, 0, 1 + side)
    texts = Counter[Text]()
    for begin in tqdm(range(0, size, _CHUNK), desc=label):
        seeds = range(begin, min(begin + _CHUNK, size))
        its = [derive_seed(base, 0, 1 + n) for n in seeds]
        texts.update(sample_texts(engine, [START], params, its))
    return texts


def examined(name: str, size: int, plain: dict[str, Counter[Text]]) -> dict[str, Any]:
    """One mistake; plain: texts of the target alone by kind of tables, filled as needed."""
    fault = named()[name]
    law = law_of(fault)(SEED)
    far = distance(cut(law.ours, PLAN.tokens), cut(law.target, PLAN.tokens))
    found: dict[str, Any] = {
        "name": name, "sound": fault in LEGAL, "texts": size, "total_variation": round(far, 5),
    }  # fmt: skip
    try:
        ours = sampled(engine_of(fault, SEED), size, 0, name)
    except SpecDecError as error:
        return {**found, "refused": str(error), "caught": True}
    kind = fault.tables if isinstance(fault, Variant) else "generic"
    if kind not in plain:
        plain[kind] = sampled(plain_engine(fault, SEED), size, 1, f"plain, {kind}")
    answer = g_test([(ours, plain[kind])], cells=PLAN.cells)
    return {
        **found, "p_value": answer.p_value, "caught": answer.p_value < PLAN.level,
        "sampled_total_variation": round(answer.total_variation, 5),
    }  # fmt: skip


def result(records: Sequence[dict[str, Any]], session: dict[str, Any]) -> dict[str, Any]:
    """What is committed."""
    wrong = [r for r in records if not r["sound"] and r["total_variation"] > CAUGHT_ABOVE]
    return {
        "provenance": session, "detect_tv": PLAN.total_variation, "power": PLAN.power,
        "level": PLAN.level, "tokens": PLAN.tokens, "cells": PLAN.cells, "tables": SEED,
        "above": CAUGHT_ABOVE, "faults_above": len(wrong),
        "caught_above": sum(r["caught"] for r in wrong), "faults": list(records),
    }  # fmt: skip


@click.command()
@click.option("--run", "folder", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=None)
@click.option("--only", multiple=True, type=click.Choice(list(named())), default=CHOSEN)
@click.option("--texts", type=click.IntRange(min=1), default=PLAN.texts(1), show_default=True)
def main(folder: Path, out: Path | None, only: tuple[str, ...], texts: int) -> None:
    """Samples what FOLDER does not hold yet; --out sums it up."""
    run = RunFolder(folder, "planted power", {"texts": texts, "tables": SEED})
    plain: dict[str, Counter[Text]] = {}
    for name in only:
        if name not in {record["name"] for record in run.records}:
            run.append(examined(name, texts, plain))
            click.echo(json.dumps(run.records[-1]))
    if out is not None:
        content = result(run.records, provenance())
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
