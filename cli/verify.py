"""specdec verify: is this pair, with this proposer and rule, lossless on this machine?"""

import json
import sys
from pathlib import Path
from typing import Any

import click

from specdec.cli.console import remark, with_bar
from specdec.cli.dialogues import TURNS, read_contexts
from specdec.cli.options import (
    count_option,
    draft_options,
    end_tokens,
    json_option,
    load_pair,
    model_options,
    out_option,
    prompt_options,
    seed_option,
    truncation_options,
)
from specdec.errors import InvalidArgumentError
from specdec.evals.folder import RunFolder
from specdec.evals.lossless import RECORD_SHAPES, Audit, Auditor, Plan
from specdec.evals.provenance import model_facts, prompts_sha256
from specdec.sampling import SamplingParams


@click.command()
@model_options
@draft_options
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=1.0, show_default=True,
    help="0 audits greedy decoding alone.",
)  # fmt: skip
@truncation_options
@prompt_options(8, several=False, more=TURNS)
@count_option("--max-new-tokens", 64, "Length of texts that are compared token by token.")
@click.option(
    "--detect-tv", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05,
    show_default=True,
    help="Sample as many texts as it takes to see laws of short texts that are so far apart in "
    "total variation; half of it takes four times as many.",
)  # fmt: skip
@click.option(
    "--power", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.9,
    show_default=True, help="The probability with which they are seen.",
)  # fmt: skip
@click.option(
    "--level", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.01,
    show_default=True, help="Of false alarms where there is no difference.",
)  # fmt: skip
@click.option(
    "--sampled-tokens", type=click.IntRange(min=1), default=4, show_default=True,
    help="Length of those short texts.",
)  # fmt: skip
@click.option(
    "--sampled-prompts", type=click.IntRange(min=1), default=4, show_default=True,
    help="How many prompts they follow, the shortest ones.",
)  # fmt: skip
@click.option(
    "--sampled-context", type=click.IntRange(min=1), default=None, metavar="N",
    help="They follow the first N tokens of each prompt, which is quicker.  [default: all]",
)  # fmt: skip
@click.option(
    "--cells", type=click.IntRange(min=2), default=8, show_default=True,
    help="How many kinds of short texts are told apart behind each prompt.",
)  # fmt: skip
@seed_option
@out_option
@json_option("one line")
def verify(
    target: str, draft: str | None, dtype: str, device: str | None, temperature: float, top_k: int,
    top_p: float, min_p: float, source: str, column: str | None, limit: int, max_new_tokens: int,
    detect_tv: float, power: float, level: float, sampled_tokens: int, sampled_prompts: int,
    sampled_context: int | None, cells: int, seed: int, out: Path | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Audit whether a pair of models, with what drafts and the rule that accepts, is lossless.

    Takes every outcome of the same settings, with small drafts, on small tables; compares greedy
    texts with plain decoding's; tests sampled texts against plainly sampled ones (or, under the
    rule gumbel, compares them seed by seed); and plants mistakes that it must see. --policy auto
    plans with made-up costs on the tables; with the real pair it is taken as constant, so that
    there is something to audit. Exit code 1 where the audit fails.
    """
    sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p)
    plan = Plan(
        detect_tv, power, level, sampled_tokens, cells, sampled_prompts, max_new_tokens,
        sampled_context,
    )  # fmt: skip
    plan.texts(sampled_prompts)  # refuses a power below the level
    shown = {**options, "proposer_options": dict(options["proposer_options"])}
    pair = load_pair(target, draft, dtype, device, **options)
    found = read_contexts(pair, source, column, limit, max_new_tokens)
    rows = [tokens for each in found for tokens in each.tokens]
    if not rows:
        raise InvalidArgumentError("no prompt fits the target's context")
    sampling = SamplingParams(
        max_new_tokens, temperature, top_k, top_p, min_p, end_tokens(pair.target, pair.tokenizer)
    )
    settings = {
        "target": {"name": pair.names["target"], **model_facts(pair.target)},
        "draft": None if pair.draft is None else {
            "name": pair.names["draft"], **model_facts(pair.draft)
        },
        "device": str(pair.target.device), **shown, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "min_p": min_p, "prompts": source, "prompts_sha256": prompts_sha256(rows),
        "column": column, "limit": limit,
        "max_new_tokens": max_new_tokens, "detect_tv": detect_tv, "power": power, "level": level,
        "sampled_tokens": sampled_tokens, "sampled_prompts": sampled_prompts,
        "sampled_context": sampled_context, "cells": cells, "seed": seed,
    }  # fmt: skip
    folder = RunFolder(out, "verify", settings, RECORD_SHAPES)
    audit = Auditor(
        pair.target, pair.draft, pair.options, rows, sampling, plan,
        folder=folder, seed=seed, progress=with_bar, remark=remark,
    ).run()  # fmt: skip
    if as_json:
        content = {
            **audit.as_dict(), "settings": folder.settings, "provenance": folder.sessions[-1],
        }  # fmt: skip
        click.echo(json.dumps(content))
    else:
        _show(audit)
    if not audit.passed:
        sys.exit(1)


def _show(audit: Audit) -> None:
    for part in audit.parts:
        for finding in part.findings:
            mark = "ok" if finding.passed else "FAILED"
            remark(f"{part.name}: {finding.name}: {mark}: {finding.note}")
    click.echo(audit.verdict)
