"""specdec eval: acceptance statistics of one or more proposers on prompt sets."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import click

from specdec.cli.console import with_bar
from specdec.cli.dialogues import TURNS, read_contexts
from specdec.cli.options import (
    LOSSLESS,
    Pair,
    check_members,
    count_option,
    each_once,
    end_tokens,
    json_option,
    load_pair,
    model_options,
    out_option,
    prompt_options,
    row_options,
    seed_option,
    truncation_options,
    with_tokenizer,
)
from specdec.errors import InvalidArgumentError
from specdec.evals.acceptance import RECORD_SHAPES, Evaluation, Setting, Task
from specdec.evals.contenders import Speculation
from specdec.evals.folder import RunFolder
from specdec.evals.provenance import model_facts, prompts_sha256
from specdec.sampling import SamplingParams


@click.command("eval")
@model_options
@row_options(("draft:4", "tree:2,2,1", "ngram:8"))
@click.option(
    "--verification", "rules", multiple=True, type=click.Choice(LOSSLESS), callback=each_once,
    default=("auto",), show_default=True, help="The rule that accepts; may be repeated.",
)  # fmt: skip
@click.option(
    "--temperature", "temperatures", multiple=True, type=click.FloatRange(min=0),
    callback=each_once, default=(0.0,), show_default=True,
    help="0 is greedy decoding; may be repeated.",
)  # fmt: skip
@truncation_options
@prompt_options(20, several=True, more=TURNS)
@count_option("--max-new-tokens", 64, "Tokens per prompt at most.")
@count_option("--samples", 1, "Continuations of each prompt.")
@count_option(
    "--timed", 4, "Prompts of each set whose speed is measured beside plain decoding.", least=0
)
@count_option("--rounds", 3, "How often each of those is continued; the least time counts.")
@seed_option
@out_option
@json_option()
def evaluate(
    target: str, draft: str | None, dtype: str, device: str | None,
    speculations: tuple[Speculation, ...], options: dict[str, dict[str, Any]],
    rules: tuple[str, ...], temperatures: tuple[float, ...], top_k: int, top_p: float,
    min_p: float, sources: tuple[str, ...], column: str | None, limit: int, max_new_tokens: int,
    samples: int, timed: int, rounds: int, seed: int, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure how much of what is drafted is accepted.

    Every proposer, rule and temperature continues every prompt. Reports acceptance with standard
    errors over prompts, by depth, by rank of the child and by prompt set, the overlap of the two
    models' laws, the draft's entropy and calibration, and what measured costs say of speed: the
    predicted beside the measured one, the best length and tree.

    At temperature 0 the overlap is how often the two agree on the best token; the draft's entropy
    and calibration are those of its softmax at temperature 1, of which it drafts the best token.
    """
    check_members(options, speculations)
    needs_draft = any(each.num_drafts for each in speculations)
    pair = load_pair(
        target, draft, dtype, device, no_speculation=not needs_draft, proposer=None,
        proposer_options={},
    )  # fmt: skip
    if needs_draft and pair.draft is None:
        raise InvalidArgumentError("--proposer: a draft is needed; name one with --draft")
    tasks = _tasks(pair, sources, column, limit, max_new_tokens)
    ends = end_tokens(pair.target, pair.tokenizer)
    tokenizers = pair.options["proposer_options"]
    known = with_tokenizer(options, speculations, pair.tokenizer)
    settings = []
    for each, rule, temperature in product(speculations, rules, temperatures):
        arguments = each.arguments(pair.draft, _with_tokenizers(each, known, tokenizers))
        # where plain decoding is quicker, auto would draft nothing
        arguments |= {"policy": "constant", "verification": rule}
        sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p, ends)
        settings.append(
            Setting(f"{each.text} {rule} T={_exactly(temperature)}", arguments, sampling)
        )
    folder = RunFolder(
        out, "eval",
        {
            "target": {"name": target, **model_facts(pair.target)},
            "draft": None if pair.draft is None else {
                "name": pair.names["draft"], **model_facts(pair.draft)
            },
            "rows": [setting.name for setting in settings], "proposer_options": options,
            "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "prompts": [[task.set, task.id] for task in tasks],
            "prompts_sha256": prompts_sha256(task.tokens for task in tasks),
            "max_new_tokens": max_new_tokens,
            "samples": samples, "timed": timed, "rounds": rounds, "seed": seed,
            "device": str(pair.target.device),
        },
        RECORD_SHAPES,
    )  # fmt: skip
    found = Evaluation(
        pair.target, settings, tasks, folder=folder, samples=samples, rounds=rounds, timed=timed,
        seed=seed, progress=with_bar,
    ).run()  # fmt: skip
    if as_json:
        click.echo(json.dumps(found))
    else:
        _show(found)


def _exactly(temperature: float) -> str:
    """Short, and another text for every other number: rows are told apart by it."""
    short = f"{temperature:g}"
    return short if float(short) == temperature else repr(temperature)


def _with_tokenizers(
    each: Speculation, options: dict[str, dict[str, Any]], tokenizers: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Both, where a draft has a tokenizer of its own."""
    if not (tokenizers and each.num_drafts and len(each.members) == 1):
        return options
    [name] = each.members
    return {**options, name: {**tokenizers, **options.get(name, {})}}


def _tasks(
    pair: Pair, sources: tuple[str, ...], column: str | None, limit: int, new_tokens: int
) -> list[Task]:
    """Every turn of the prompts that fit; says which do not."""
    tasks: list[Task] = []
    for source in sources:
        for each in read_contexts(pair, source, column, limit, new_tokens):
            for turn, tokens in enumerate(each.tokens, 1):
                name = each.prompt.id if turn == 1 else f"{each.prompt.id} turn {turn}"
                tasks.append(Task(source, name, tokens, each.prompt.id))
    if not tasks:
        raise InvalidArgumentError("no prompt fits the target's context")
    return tasks


def _show(found: dict[str, Any]) -> None:
    rows = found["rows"]
    width = max(len(row["name"]) for row in rows)
    click.echo(
        f"{'':{width}}  {'acceptance':>15}  {'overlap':>15}  {'tokens/pass':>15}  {'cost':>5}  "
        f"{'speed: predicted':>16}  {'measured':>15}"
    )
    for row in rows:
        cells = [
            _with_error(row[name])
            for name in ("acceptance_rate", "overlap", "tokens_per_target_pass")
        ]
        click.echo(
            f"{row['name']:{width}}  "
            + "  ".join(f"{cell:>15}" for cell in cells)
            + f"  {_number(row['cost_ratio']):>5}  {_number(row['predicted_speed']):>16}"
            + f"  {_with_error(row['measured_speed']):>15}"
        )
    for row in rows:
        _show_details(row)
    for name, why in found["left_out"].items():
        click.echo(f"{name}: left out: {' '.join(why.split())}")
    click.echo("\n± is the standard error over prompts; speed is against plain decoding")


def _show_details(row: dict[str, Any]) -> None:
    click.echo(f"\n{row['name']}")
    lines = {
        "accepted by depth": _list(row["acceptance_by_position"]),
        "accepted by rank of the child": _list(row["acceptance_by_rank"]),
    }
    if len(row["by_set"]) > 1:
        lines |= {
            f"accepted of {name}": _with_error(its["acceptance_rate"])
            for name, its in row["by_set"].items()
        }
    if row["draft_entropy"] is not None:
        lines["entropy of the draft, nats"] = _with_error(row["draft_entropy"])
        lines["calibration error of the draft"] = _number(row["calibration"]["error"])
        lines["both are of"] = row["draft_law"]
    else:
        lines["entropy and calibration of the draft"] = f"none: {row['undefined']['draft_entropy']}"
    if row["overlap"] is None:
        lines["overlap"] = f"none: {row['undefined']['overlap']}"
    best, tree = row["best_length"], row["best_tree"]
    if best is not None:
        lines["best length"] = f"{best['length']}, speed {best['predicted_speed']:.2f} predicted"
        if best["length"] == best["longest_drafted"]:
            lines["best length"] += "; longer ones were not drafted"
    if tree is not None:
        lines["best tree"] = (
            f"{len(tree['shape'])} nodes, speed {tree['predicted_speed']:.2f} predicted, "
            f"parents {json.dumps(tree['shape'])}"
        )
    for name, text in lines.items():
        if text:
            click.echo(f"  {name}: {text}")


def _list(rows: list[dict[str, Any] | None]) -> str:
    return ", ".join(_with_error(row) for row in rows)


def _with_error(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    error = found["standard_error"]
    return f"{found['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
