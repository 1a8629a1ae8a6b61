"""Does the two-sample test of `specdec verify --detect-tv 0.01` catch mistakes that are planted in
the production engine? The user's view of what evals/verify_power.py draws from enumerated laws.

    python -m specdec.evals.planted_power --run FOLDER --out evals/results/planted_power.json

Both sides are sampled by engines on a table model, at the full size of the asked distance. A
mistake that the engine refuses to run is caught too. Sound ones go through the same machinery and
must pass. Texts are kept in FOLDER as they come: a run that was interrupted goes on.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
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
from specdec.evals.two_sample import Text, g_test
from specdec.evals.verify_power import CAUGHT_ABOVE, cut, distance, law_of
from specdec.evals.wrong_rules import FAULTS, KEY_FAULTS, LEGAL, KeyFault, Variant
from specdec.rng import derive_seed

PLAN = Plan(0.01, tokens=3, cells=32, prompts=1)
SEED = 10  # of the tables
# One or more of every rule; the whole list takes hours.
CHOSEN = (
    "traversal: law not renormalised without replacement", "token: resample from p",
    "block: early break", "traversal: weight kept", "recursive: no residual between siblings",
    "kseq: whole law without replacement", "typical", "token: same draft in every step",
    "token: no fault", "traversal: stop before an unsure law",
)  # fmt: skip
_CHUNK = 64 * LANES  # texts of a record
_PLAIN = "plain"


def named() -> dict[str, Variant | KeyFault]:
    """By the names of evals/verify_power.py; where two share one, the first."""
    found: dict[str, Variant | KeyFault] = {}
    for fault in (*FAULTS, *KEY_FAULTS, *LEGAL):
        name = f"{fault.rule}: {fault.name}" if isinstance(fault, KeyFault) else fault.name
        found.setdefault(name, fault)
    return found


def sampled(run: RunFolder, key: str, make: Callable[[], Engine], size: int) -> Counter[Text]:
    """The texts of one side, those that the folder does not hold yet from an engine."""
    texts, done = Counter[Text](), set[int]()
    for record in run.records:
        if record["key"] == key and record["begin"] not in done:
            done.add(record["begin"])
            texts.update({tuple(text): n for text, n in record["texts"]})
    begins = [begin for begin in range(0, size, _CHUNK) if begin not in done]
    if begins:
        engine, params = make(), SamplingParams(max_new_tokens=PLAN.tokens, temperature=1.0)
    base = derive_seed(SEED, 0, 1 + key.startswith(_PLAIN))
    for begin in tqdm(begins, desc=key):
        numbers = range(begin, min(begin + _CHUNK, size))
        some = sample_texts(engine, [START], params, [derive_seed(base, 0, 1 + n) for n in numbers])
        run.append({"key": key, "begin": begin, "texts": [[list(t), n] for t, n in some.items()]})
        texts.update(some)
    return texts


def examined(name: str, size: int, run: RunFolder) -> dict[str, Any]:
    """One mistake."""
    fault = named()[name]
    law = law_of(fault)(SEED)
    far = distance(cut(law.ours, PLAN.tokens), cut(law.target, PLAN.tokens))
    found: dict[str, Any] = {
        "name": name, "sound": fault in LEGAL, "texts": size, "total_variation": round(far, 5),
    }  # fmt: skip
    kind = fault.tables if isinstance(fault, Variant) else "generic"
    try:
        ours = sampled(run, name, lambda: engine_of(fault, SEED), size)
    except SpecDecError as error:
        return {**found, "refused": str(error), "caught": True}
    plain = sampled(run, f"{_PLAIN}, {kind}", lambda: plain_engine(fault, SEED), size)
    answer = g_test([(ours, plain)], cells=PLAN.cells)
    return {
        **found, "p_value": answer.p_value, "caught": answer.p_value < PLAN.level,
        "sampled_total_variation": round(answer.total_variation, 5),
    }  # fmt: skip


def result(found: Sequence[dict[str, Any]], session: dict[str, Any]) -> dict[str, Any]:
    """What is committed."""
    wrong = [f for f in found if not f["sound"] and f["total_variation"] > CAUGHT_ABOVE]
    return {
        "provenance": session, "detect_tv": PLAN.total_variation, "power": PLAN.power,
        "level": PLAN.level, "tokens": PLAN.tokens, "cells": PLAN.cells, "tables": SEED,
        "above": CAUGHT_ABOVE, "faults_above": len(wrong),
        "caught_above": sum(f["caught"] for f in wrong), "faults": list(found),
    }  # fmt: skip


@click.command()
@click.option("--run", "folder", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--only", multiple=True, type=click.Choice(list(named())), default=CHOSEN)
@click.option("--texts", type=click.IntRange(min=1), default=PLAN.texts(1), show_default=True)
def main(folder: Path, out: Path, only: tuple[str, ...], texts: int) -> None:
    """Samples what FOLDER does not hold yet, and sums up."""
    run = RunFolder(folder, "planted power", {"texts": texts, "tables": SEED})
    found: list[dict[str, Any]] = []
    for name in only:
        found.append(examined(name, texts, run))
        click.echo(json.dumps(found[-1]))
        content = json.dumps(result(found, run.sessions[-1]), indent=1)
        out.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
