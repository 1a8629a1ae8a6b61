"""specdec tune: measure costs and acceptance on this machine, print the best settings."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from specdec.cli.console import with_bar
from specdec.cli.models import (
    check_device,
    load_model,
    load_tokenizer,
    tokenizer_options,
)
from specdec.cli.options import dtype_option, json_option, pair_options, temperature_option
from specdec.errors import InvalidArgumentError
from specdec.evals import prompts as prompt_sets
from specdec.evals.provenance import model_facts
from specdec.evals.tuning import Finding, Tuner, plot, save
from specdec.sampling import SamplingParams


@click.command()
@pair_options
@click.option("--no-draft", is_flag=True, help="Look at what drafts without a model only.")
@click.option(
    "--prompts", "source", default="heldout_code", show_default=True,
    help=f"A set ({', '.join(prompt_sets.names())}), or a .jsonl or text file.",
)  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(min=2), default=12, show_default=True, help="Prompts at most."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True,
    help="Tokens per prompt.",
)  # fmt: skip
@temperature_option
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True,
    help="How often each setting continues each prompt; the least time counts.",
)  # fmt: skip
@dtype_option
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Save everything as JSON."
)
@click.option(
    "--plot", "picture", type=click.Path(dir_okay=False, path_type=Path),
    help="Predicted against measured gain, as .png, .svg or .pdf; needs specdec[report].",
)  # fmt: skip
@json_option()
def tune(
    target: str, draft: str | None, no_draft: bool, source: str, limit: int, max_new_tokens: int,
    temperature: float, rounds: int, dtype: str, device: str, out: Path | None,
    picture: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Find what drafts best for a pair of models on this machine.

    Measures what steps cost and how much is accepted, predicts the gain of every setting, times the
    most promising, and prints them with the arguments of specdec.wrap for the best.
    """
    if no_draft and draft is not None:
        raise InvalidArgumentError("--no-draft and --draft exclude each other")
    check_device(device)
    if draft is None and target == "big" and not no_draft:
        draft = "small"
    tokenizer = load_tokenizer("target", target)
    tokenizers = (
        {} if draft is None else tokenizer_options(tokenizer, load_tokenizer("draft", draft))
    )
    models = [
        None if name is None else load_model(role, name, dtype, device)
        for role, name in (("target", target), ("draft", draft))
    ]
    found = prompt_sets.load(source)[:limit]
    context = getattr(models[0].config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr]
    fitting = prompt_sets.fitting(
        found, lambda text: len(tokenizer(text)["input_ids"]), context=context,
        new_tokens=max_new_tokens,
    )  # fmt: skip
    if fitting.note:
        click.echo(fitting.note, err=True)
    ids = [tokenizer(prompt.text)["input_ids"] for prompt in fitting.kept]
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    tuning = Tuner(
        models[0], models[1], ids, sampling,
        rounds=rounds, progress=with_bar, tokenizers=tokenizers,
    ).run()  # fmt: skip
    if out is not None:
        its = zip(("target", "draft"), (target, draft), models, strict=True)
        save(
            tuning, out,
            {
                **{role: {"name": n, **model_facts(m)} for role, n, m in its if m is not None},
                "prompts": [source] * len(ids), "max_new_tokens": max_new_tokens,
                "temperature": temperature, "rounds": rounds, "device": device,
            },
        )  # fmt: skip
    if picture is not None:
        plot(tuning, picture)
    if as_json:
        click.echo(json.dumps(tuning.as_dict()))
        return
    _show(tuning.findings)


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
    best = findings[0].setting
    draft = ["draft=draft"] if best.uses_draft else []
    arguments = ", ".join(
        ["target", *draft, *(f"{name}={value!r}" for name, value in best.arguments.items())]
    )
    click.echo(f"\nbest: specdec.wrap({arguments})")
