"""specdec bench: speed against plain decoding and transformers' own assisted generation."""

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from specdec.cli.console import remark, with_bar
from specdec.cli.models import (
    DTYPES,
    announced,
    check_device,
    load_model,
    load_tokenizer,
    tokenizer_options,
)
from specdec.cli.options import (
    LOSSLESS,
    check_members,
    count_option,
    end_tokens,
    json_option,
    model_options,
    out_option,
    prompt_options,
    row_options,
    seed_option,
    temperature_option,
    truncation_options,
    with_tokenizer,
)
from specdec.errors import InvalidArgumentError
from specdec.evals import prompts as prompt_sets
from specdec.evals.bench import RECORD_SHAPES, Bench, Dialogue, Task, TokenPrompts
from specdec.evals.contenders import Speculation
from specdec.evals.folder import RunFolder
from specdec.evals.gate import Gate
from specdec.evals.lineup import (
    Models,
    Synthetic,
    Wanted,
    default_speculations,
    lineup,
    synthetic_lineup,
)
from specdec.evals.prompts import Prompt
from specdec.evals.provenance import model_facts, prompts_sha256
from specdec.evals.random_models import NAMES, random_model, random_prompts
from specdec.evals.spec_bench import write_answers
from specdec.evals.trace import TRACES, write_traces
from specdec.sampling import SamplingParams


@click.command()
@model_options
@click.option("--no-draft", is_flag=True, help="Compare what drafts without a model only.")
@row_options()
@click.option("--no-transformers", is_flag=True, help="Leave transformers' own rows out.")
@click.option(
    "--assistant-tokens", type=click.IntRange(min=1), multiple=True, metavar="N",
    help="A row of transformers' assistant with N tokens in every pass; may be repeated.",
)  # fmt: skip
@count_option("--lookup-tokens", 10, "transformers' prompt_lookup_num_tokens.")
@prompt_options(10, several=True)
@count_option("--max-new-tokens", 128, "Tokens per turn at most.")
@click.option(
    "--ignore-eos", is_flag=True, help="Go on behind end tokens: every text has its full length."
)
@click.option(
    "--chat/--no-chat", default=None,
    help="Whether prompts go through the tokenizer's chat template.  [default: with --spec-bench, "
    "where there is one]",
)  # fmt: skip
@temperature_option
@truncation_options
@count_option("--rounds", 3, "How often each row continues each prompt.")
@seed_option
@click.option(
    "--verification", type=click.Choice(LOSSLESS), default="auto", show_default=True,
    help="The rule of our rows.",
)  # fmt: skip
@click.option(
    "--synthetic-acceptance", "acceptance", type=click.FloatRange(0, 1), default=None,
    help="Draft with a SYNTHETIC model that is right at this rate, on both sides.",
)  # fmt: skip
@click.option(
    "--synthetic-cost", "cost", type=click.FloatRange(min=0), default=0.1, show_default=True,
    help="What a pass of it costs, as a share of the target's.",
)  # fmt: skip
@click.option(
    "--random-weights", "shape", type=click.Choice(NAMES), default=None,
    help="A target of this published shape with random weights, on random prompts.",
)  # fmt: skip
@count_option("--prompt-tokens", 32, "Length of those prompts.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="Of torch.  [default: its own]"
)
@out_option
@click.option(
    "--spec-bench", "answers", type=click.Path(file_okay=False, path_type=Path),
    help="Write answer files for Spec-Bench's scoring scripts into this folder.",
)  # fmt: skip
@click.option(
    "--trace", "traced", is_flag=True,
    help="Keep who proposed each token of the first prompt, for specdec report; needs --out.",
)  # fmt: skip
@json_option()
def bench(
    target: str, draft: str | None, no_draft: bool, speculations: tuple[Speculation, ...],
    options: dict[str, dict[str, Any]], no_transformers: bool, assistant_tokens: tuple[int, ...],
    lookup_tokens: int, sources: tuple[str, ...], column: str | None, limit: int,
    max_new_tokens: int, ignore_eos: bool, chat: bool | None, temperature: float, top_k: int,
    top_p: float, min_p: float, rounds: int, seed: int, verification: str, acceptance: float | None,
    cost: float, shape: str | None, prompt_tokens: int, dtype: str, device: str | None,
    threads: int | None, out: Path | None, answers: Path | None, traced: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure speed: plain decoding, what drafts, and transformers' own, in turn in one process.

    Every row continues every prompt in every round. A row whose texts are not the target's own gets
    no speed, and the command fails where it is one of ours. Speeds are medians with the 20th and
    80th percentile over prompts and rounds.
    """
    _check_flags(draft, no_draft, acceptance, shape, temperature, answers, chat, speculations)
    _check_folders(out, answers, traced)
    if speculations:  # else they depend on the models
        check_members(options, speculations)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(where)
    if threads is not None:
        torch.set_num_threads(threads)
    models, names, tokenizer = _load(target, draft, no_draft, shape, dtype, where, acceptance)
    ends = () if ignore_eos or shape else end_tokens(models.target, tokenizer)
    sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p, ends)
    dialogue: Dialogue | TokenPrompts
    if shape is not None:
        dialogue = TokenPrompts()
        tasks = _random_tasks(models.target.config.vocab_size, limit, prompt_tokens, seed)
    else:
        dialogue = _dialogue(tokenizer, target, chat, answers is not None)
        tasks = _tasks(sources, column, limit, dialogue, models.target, max_new_tokens)
    if not speculations:
        speculations = _defaults(models, acceptance, shape)
    check_members(options, speculations)
    options = with_tokenizer(options, speculations, tokenizer)
    wanted = Wanted(
        speculations, not no_transformers, assistant_tokens, lookup_tokens, verification, options
    )
    settings = {
        **names, "random_weights": shape, "synthetic_acceptance": acceptance,
        "synthetic_cost": None if acceptance is None else cost,
        "rows": [each.text for each in speculations], "transformers": not no_transformers,
        "assistant_tokens": assistant_tokens, "lookup_tokens": lookup_tokens,
        "proposer_options": {
            name: {k: v for k, v in its.items() if k != "tokenizer"}
            for name, its in options.items()
        },
        "prompts": [[task.set, task.prompt.id] for task in tasks],
        "prompts_sha256": prompts_sha256(
            dialogue.tokens([turn], []) for task in tasks for turn in task.prompt.turns
        ),
        "chat": isinstance(dialogue, Dialogue) and dialogue.chat,
        "max_new_tokens": max_new_tokens, "eos_token_ids": ends, "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "min_p": min_p, "rounds": rounds, "seed": seed,
        "verification": verification, "device": where, "threads": torch.get_num_threads(),
    }  # fmt: skip
    folder = RunFolder(out, "bench", settings, RECORD_SHAPES)
    if acceptance is None:
        rows = lineup(models, sampling, wanted)
    else:
        synthetic = Synthetic(acceptance, cost)
        rows = synthetic_lineup(
            models, sampling, wanted, synthetic, tasks, dialogue, seed, with_bar
        )
    gate = Gate(models.baseline, sampling)
    summary = Bench(
        rows, tasks, dialogue, gate, folder, rounds=rounds, seed=seed, progress=with_bar
    ).run()
    if answers is not None:
        assert isinstance(dialogue, Dialogue)
        write_answers(answers, Path(target).name, summary, folder.records, tasks, dialogue)
    if traced and out is not None:
        write_traces(out / TRACES, rows, tasks, dialogue, tokenizer, sampling, seed, with_bar)
    _report(summary, as_json)


def _report(summary: dict[str, Any], as_json: bool) -> None:
    """Prints; ends the command where a row of ours is not lossless."""
    if as_json:
        click.echo(json.dumps(summary))
    else:
        _show(summary)
    if any(row["ours"] and not row["lossless"]["passed"] for row in summary["rows"]):
        sys.exit(1)


def _check_folders(out: Path | None, answers: Path | None, traced: bool) -> None:
    if traced and out is None:
        raise InvalidArgumentError("--trace: expected --out FOLDER, where the trace is kept")
    if answers is not None and answers.exists() and any(answers.iterdir()):
        raise InvalidArgumentError(f"--spec-bench {answers}: it is not empty; name a new folder")


def _check_flags(
    draft: str | None, no_draft: bool, acceptance: float | None, shape: str | None,
    temperature: float, answers: Path | None, chat: bool | None,
    speculations: Sequence[Speculation],
) -> None:  # fmt: skip
    if no_draft and draft is not None:
        raise InvalidArgumentError("--no-draft and --draft exclude each other")
    if acceptance is not None and (draft is not None or no_draft):
        raise InvalidArgumentError(
            "--synthetic-acceptance: expected neither --draft nor --no-draft"
        )
    if acceptance is not None and temperature > 0:
        raise InvalidArgumentError(
            "--synthetic-acceptance: the draft knows the greedy text; expected --temperature 0"
        )
    if shape is not None and (draft is not None or answers is not None or chat):
        raise InvalidArgumentError(
            "--random-weights: expected no --draft, --spec-bench or --chat; its draft is "
            "--synthetic-acceptance"
        )
    needing = next((each.text for each in speculations if each.num_drafts), None)
    if needing is not None and (no_draft or (shape is not None and acceptance is None)):
        raise InvalidArgumentError(
            f"--proposer {needing}: it needs a draft; expected --draft or --synthetic-acceptance"
        )


def _load(
    target: str, draft: str | None, no_draft: bool, shape: str | None, dtype: str, device: str,
    acceptance: float | None,
) -> tuple[Models, dict[str, Any], Any]:  # fmt: skip
    """Models, what they are, and the target's tokenizer."""
    if shape is not None:
        kind = torch.bfloat16 if dtype == "auto" else DTYPES[dtype]
        assert isinstance(kind, torch.dtype)
        with announced(f"making random weights of the shape {shape} …"):
            model = random_model(shape, kind, device)
        named = {"target": {"name": f"random {shape}", **model_facts(model)}, "draft": None}
        return Models(model, copy.deepcopy(model)), named, None
    if draft is None and target == "big" and not no_draft and acceptance is None:
        draft = "small"
    tokenizer = load_tokenizer("target", target)
    model = load_model("target", target, dtype, device)
    names: dict[str, Any] = {"target": {"name": target, **model_facts(model)}, "draft": None}
    if draft is None:
        return Models(model, copy.deepcopy(model)), names, tokenizer
    small = load_model("draft", draft, dtype, device)
    names["draft"] = {"name": draft, **model_facts(small)}
    tokenizers = tokenizer_options(tokenizer, load_tokenizer("draft", draft))
    both = Models(
        model, copy.deepcopy(model), small, copy.deepcopy(small), tokenizers=tokenizers or None
    )
    return both, names, tokenizer


def _defaults(
    models: Models, acceptance: float | None, shape: str | None
) -> tuple[Speculation, ...]:
    """Lookups say nothing of a synthetic draft, nor of random texts."""
    if acceptance is not None:
        return tuple(Speculation.parse(text) for text in ("draft", "draft:4", "draft:8"))
    return () if shape is not None else default_speculations(models)


def _dialogue(tokenizer: Any, target: str, chat: bool | None, for_answers: bool) -> Dialogue:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise InvalidArgumentError(f"--chat: the tokenizer of {target!r} has no chat template")
    return Dialogue(tokenizer, chat=has_template and for_answers if chat is None else chat)


def _tasks(
    sources: Sequence[str], column: str | None, limit: int, dialogue: Dialogue, model: Any,
    new_tokens: int,
) -> list[Task]:  # fmt: skip
    """The prompts that fit; says which do not."""
    if column is not None and set(sources) <= set(prompt_sets.names()):
        raise InvalidArgumentError(
            f"--column {column}: expected a .jsonl file as --prompts, got {', '.join(sources)}"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tasks: list[Task] = []
    for source in sources:
        # sets have columns of their own, and may stand beside files
        its_own = column if source not in prompt_sets.names() else None
        found = prompt_sets.load(source, column=its_own)
        fitting = prompt_sets.fitting(
            found[:limit], dialogue.length, context=context, new_tokens=new_tokens
        )  # fmt: skip
        if fitting.note:
            remark(f"{source}: {fitting.note}")
        tasks += [Task(source, prompt) for prompt in fitting.kept]
    if not tasks:
        raise InvalidArgumentError("no prompt fits the target's context")
    return tasks


def _random_tasks(vocab_size: int, count: int, tokens: int, seed: int) -> list[Task]:
    drawn = random_prompts(vocab_size, count, tokens, seed=seed)
    return [
        Task("random tokens", Prompt(f"random-{i}", "", (" ".join(map(str, ids)),)))
        for i, ids in enumerate(drawn)
    ]


def _show(summary: dict[str, Any]) -> None:
    rows = summary["rows"]
    width = max(len(row["name"]) for row in rows)
    baselines = list(dict.fromkeys(name for row in rows for name in row["speed_against"]))
    heads = [
        f"{'tokens/s':>24}",
        *(f"{'against ' + name:>22}" for name in baselines),
        "tokens/pass",
    ]
    click.echo(f"{'':{width}}  " + "  ".join(heads) + "  lossless")
    for row in rows:
        cells = [f"{_spread(row['tokens_per_second'], 1):>24}"]
        cells += [f"{_spread(row['speed_against'].get(name), 2):>22}" for name in baselines]
        per_pass = row["tokens_per_pass"]
        cells.append(f"{'-' if per_pass is None else format(per_pass, '.2f'):>11}")
        verdict = "" if row["lossless"]["passed"] else "NOT LOSSLESS, no speed: "
        note = verdict + row["lossless"]["note"] + (f" [{row['label']}]" if row["label"] else "")
        click.echo(f"{row['name']:{width}}  " + "  ".join(cells) + f"  {note}")
    for name, why in summary["left_out"].items():
        click.echo(f"{name}: left out: {' '.join(why.split())}")
    shape = summary["settings"]["random_weights"]
    if shape is not None:
        click.echo(f"RANDOM WEIGHTS of the shape {shape}, random prompts: speed of the system only")
    click.echo("medians (20th to 80th percentile over prompts and rounds)")


def _spread(found: dict[str, float] | None, digits: int) -> str:
    if found is None:
        return "-"
    middle, low, high = (f"{found[key]:.{digits}f}" for key in ("median", "p20", "p80"))
    return f"{middle} ({low} to {high})"
