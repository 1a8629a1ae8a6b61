"""The whole matrix of exact tests: rules x shapes x drafts x tables, 20 seeds each, in float64 and
in fractions, and the drafter-invariant rule path by path.

    python -m specdec.evals.nightly_exact --out evals/results/exact_matrix.json

Goes on where it stopped while the sources are the same; exits 1 when a cell fails.
"""

import hashlib
import itertools
import json
import platform
from fractions import Fraction
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from specdec.acceptance import reference
from specdec.evals import coupling, enumeration
from specdec.evals.enumeration import (
    DRAFTS,
    ENUMERATED_RULES,
    SHAPES,
    START,
    TABLES,
    Joint,
    Probability,
    Tables,
    is_valid,
)  # fmt: skip

SEEDS = 20
PATHS = 400  # seeds of the drafter-invariant rule per cell
TOLERANCE = 1e-12

Result = dict[str, Any]


def cells() -> list[tuple[str, ...]]:
    """(rule, shape, draft, tables)"""
    enumerated = [
        (rule, shape, draft, tables)
        for rule, shape, draft, tables in itertools.product(
            ENUMERATED_RULES, SHAPES, DRAFTS, TABLES
        )
        if is_valid(rule, shape, draft)
    ]
    paths = itertools.product(["gumbel"], SHAPES, coupling.DRAFTS, TABLES)
    return [*enumerated, *paths]


def run_cell(rule: str, shape: str, draft: str, tables: str) -> Result:
    """The largest differences over the seeds, and the mean expected number of accepted tokens."""
    if rule == "gumbel":
        counts = [coupling.mismatches(shape, draft, tables, seed) for seed in range(PATHS)]
        return {"seeds": PATHS, "mismatches": sum(counts)}
    floats, fractions, accepted = 0.0, Fraction(0), 0.0
    for seed in range(SEEDS):
        exact = enumeration.make_tables(tables, seed)
        laws, error = _differences(rule, shape, draft, exact.as_floats())
        floats = max(floats, error)
        accepted += enumeration.accepted_tokens(laws[START]) / SEEDS
        if rule != "kseq":  # its rho is a root of a polynomial
            fractions = max(fractions, Fraction(_differences(rule, shape, draft, exact)[1]))
    result = {"seeds": SEEDS, "float64": float(f"{floats:.2g}"), "accepted": round(accepted, 4)}
    return result if rule == "kseq" else {**result, "fraction": str(fractions)}


def _differences(
    rule: str, shape: str, draft: str, tables: Tables
) -> tuple[list[Joint], Probability]:
    laws = enumeration.rule_laws(rule, shape, draft, tables, public=False)
    wanted = enumeration.promised(rule, tables)
    return laws, enumeration.compare_laws(laws, wanted, len(SHAPES[shape])).error


def passed(result: Result) -> bool:
    exact = result.get("fraction", "0") == "0" and result.get("mismatches", 0) == 0
    return exact and bool(result.get("float64", 0) < TOLERANCE)


@cache  # of what runs, not of what is edited meanwhile
def sources() -> str:
    """Of the definition and the enumeration: results of other sources are not taken over."""
    files = [Path(module.__file__ or "") for module in (reference, enumeration, coupling)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def save(out: Path, done: dict[str, Result]) -> None:
    """One line per cell, written in one go."""
    summary = {
        "sources": sources(), "python": platform.python_version(), "specdec": version("specdec"),
        "cells": len(done), "failed": [name for name, result in done.items() if not passed(result)],
        "largest float64 difference": max((r.get("float64", 0) for r in done.values()), default=0),
    }  # fmt: skip
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in summary.items()]
    rows = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in done.items()]
    text = "{\n" + ",\n".join(lines) + ',\n"results": {\n' + ",\n".join(rows) + "\n}\n}\n"
    part = out.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(out)


def load(out: Path) -> dict[str, Result]:
    if not out.exists():
        return {}
    content = json.loads(out.read_text(encoding="utf-8"))
    done: dict[str, Result] = content["results"] if content["sources"] == sources() else {}
    return done


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    """Run every cell that --out does not hold yet."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done = load(out)
    click.echo(f"sources {sources()}: {len(done)} cells are done")
    for cell in tqdm(cells(), mininterval=2):
        name = ", ".join(cell)
        if name not in done:
            done[name] = run_cell(*cell)
            save(out, done)
    failed = [name for name, result in done.items() if not passed(result)]
    if failed:
        raise click.ClickException(f"{len(failed)} cells failed, the first: {failed[0]}")
    click.echo(f"{len(done)} cells exact")


if __name__ == "__main__":
    main()
