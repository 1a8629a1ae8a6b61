"""specdec tune: measure costs and acceptance on this machine, print the best settings."""

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

from specdec.cli.console import remark, with_bar
from specdec.cli.models import (
    check_device,
    load_model,
    load_tokenizer,
    tokenizer_options,
)
from specdec.cli.options import (
    count_option,
    end_tokens,
    json_option,
    model_options,
    temperature_option,
)
from specdec.cli.recipe import Recipe, flags
from specdec.errors import InvalidArgumentError
from specdec.evals import prompts as prompt_sets
from specdec.evals.candidates import Place
from specdec.evals.provenance import model_facts
from specdec.evals.tuning import Finding, Tuner, Tuning, check_plot, plot, save
from specdec.sampling import SamplingParams

_ROWS, _DEPTHS = (1, 2, 3, 5, 9, 17, 33), (1, 2, 4, 8, 12)  # shown of what was measured


@click.command()
@model_options
@click.option("--no-draft", is_flag=True, help="Look at what drafts without a model only.")
@click.option(
    "--prompts", "source", default="heldout_code", show_default=True,
    help=f"A set ({', '.join(prompt_sets.names())}), or a .jsonl or text file.",
)  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(min=2), default=12, show_default=True, help="Prompts at most."
)
@count_option("--max-new-tokens", 64, "Tokens per prompt at most.", least=2)
@temperature_option
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, default=(1, 4),
    show_default=True,
    help="Sequences that steps are measured with, a power of two; may be repeated.",
)  # fmt: skip
@click.option(
    "--context", "contexts", type=click.IntRange(min=1), multiple=True,
    help="Tokens of each; may be repeated.  [default: those of the prompts' texts]",
)  # fmt: skip
@count_option("--rounds", 3, "How often each setting continues each prompt; the least time counts.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default="tuned.json",
    show_default=True, help="Save everything here, as JSON.",
)  # fmt: skip
@click.option(
    "--plot", "picture", type=click.Path(dir_okay=False, path_type=Path),
    help="Predicted against measured gain, as .png, .svg or .pdf; needs specdec[report].",
)  # fmt: skip
@json_option()
def tune(
    target: str, draft: str | None, no_draft: bool, source: str, limit: int, max_new_tokens: int,
    temperature: float, batches: tuple[int, ...], contexts: tuple[int, ...], rounds: int,
    dtype: str, device: str | None, out: Path, picture: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Find what drafts best for a pair of models on this machine.

    Measures what steps cost by batch, rows and context and how much is accepted, predicts the gain
    of every setting, times the most promising, one text at a time, and prints how to run the best.
    Speeds leave out the reading of the prompt.
    """
    if no_draft and draft is not None:
        raise InvalidArgumentError("--no-draft and --draft exclude each other")
    _check_file("--out", out)
    if picture is not None:
        _check_file("--plot", picture)
        check_plot(picture)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(where)
    found = prompt_sets.load(source)[:limit]
    if draft is None and target == "big" and not no_draft:
        draft = "small"
    tokenizer = load_tokenizer("target", target)
    tokenizers = (
        {} if draft is None else tokenizer_options(tokenizer, load_tokenizer("draft", draft))
    )
    models = [
        None if name is None else load_model(role, name, dtype, where)
        for role, name in (("target", target), ("draft", draft))
    ]
    context = getattr(models[0].config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr]
    fitting = prompt_sets.fitting(
        found, lambda text: len(tokenizer(text)["input_ids"]), context=context,
        new_tokens=max_new_tokens,
    )  # fmt: skip
    if fitting.note:
        remark(fitting.note)
    ids = [tokenizer(prompt.text)["input_ids"] for prompt in fitting.kept]
    ends = end_tokens(models[0], tokenizer)
    sampling = SamplingParams(max_new_tokens, temperature, eos_token_ids=ends)
    tuner = Tuner(
        models[0], models[1], ids, sampling, rounds=rounds, progress=with_bar,
        tokenizers=tokenizers, batches=batches, contexts=contexts,
    )  # fmt: skip
    its = zip(("target", "draft"), (target, draft), models, strict=True)
    settings = {
        **{role: {"name": n, **model_facts(m)} for role, n, m in its if m is not None},
        "prompts": [source] * len(ids), "max_new_tokens": max_new_tokens,
        "temperature": temperature, "rounds": rounds, "device": where,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    recipe = Recipe(target, draft, dtype, device, temperature, bool(tokenizers))
    tuning = tuner.run()
    best = tuning.best.setting
    recipes = {"command": recipe.command(best), "python": recipe.python(best)}
    if as_json:
        click.echo(json.dumps({**tuning.as_dict(), "recipes": recipes}))
    else:
        _show_costs(tuning)
        _show(tuning.findings)
        _show_elsewhere(tuning, tuner.home)
        _show_best(tuning.best, recipes)
    _written("--out", out, lambda: save(tuning, out, settings, recipes))
    if picture is not None:
        _written("--plot", picture, lambda: plot(tuning, picture))


def _check_file(option: str, path: Path) -> None:
    """Before anything is measured: what was measured must not be lost."""
    folder = path.parent
    if not folder.is_dir():
        raise InvalidArgumentError(f"{option} {str(path)!r}: there is no folder {str(folder)!r}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InvalidArgumentError(f"{option} {str(path)!r}: it cannot be written")


def _written(option: str, path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise click.ClickException(f"{option} {str(path)!r}: {error.strerror}") from error
    remark(f"written: {path}")


def _show_costs(tuning: Tuning) -> None:
    """A line per batch and context: of the target's pass, and of the draft."""
    tables: list[tuple[str, str, tuple[int, ...]]] = [
        ("lookups", "a target pass, by rows per sequence", _ROWS)
    ]
    if "draft" in tuning.costs:
        tables.append(("draft", "a draft, by tokens per sequence", _DEPTHS))
    for name, title, columns in tables:
        click.echo(f"milliseconds of {title}")
        click.echo("batch  context" + "".join(f"{number:>9}" for number in columns))
        for costs in tuning.costs[name]:
            seconds = costs.verify_seconds if name == "lookups" else costs.draft_seconds
            cells = (f"{1000 * seconds(number, costs.context):>9.2f}" for number in columns)
            click.echo(f"{costs.batch:>5}  {costs.context:>7}" + "".join(cells))
        click.echo()


def _show(findings: Sequence[Finding]) -> None:
    timed = [finding for finding in findings if finding.measured is not None]
    width = max(len(finding.setting.name) for finding in timed)
    click.echo(f"{'':{width}}  tokens per pass   speed against plain decoding")
    click.echo(f"{'setting':{width}}  pred.   meas.    predicted   measured")
    for finding in timed:
        cells = [
            finding.tokens_per_pass, finding.measured_tokens_per_pass, finding.predicted,
            finding.measured,
        ]  # fmt: skip
        shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        click.echo(
            f"{finding.setting.name:{width}}  {shown[0]:>5}   {shown[1]:>5}   {shown[2]:>10}   "
            f"{shown[3]:>8}"
        )


def _show_elsewhere(tuning: Tuning, home: Place) -> None:
    """What is predicted for other batches and contexts than the timed one."""
    others = [each for each in tuning.advice if each.place != home]
    if others:
        click.echo("\nbest elsewhere, predicted only\nbatch  context  speed  setting")
    for each in others:
        batch, context = each.place
        named = shlex.join(flags(each.setting))
        click.echo(
            f"{batch:>5}  {context:>7}  {each.predicted:>5.2f}  {each.setting.name}: {named}"
        )


def _show_best(best: Finding, recipes: dict[str, str]) -> None:
    predicted = "" if best.predicted is None else f"{best.predicted:.2f} predicted, "
    click.echo(
        f"\nbest, one text at a time: {best.setting.name}, {predicted}{best.measured:.2f} measured"
    )
    click.echo(f"\n{recipes['command']}\n\n{recipes['python']}")
