"""specdec generate: stream text from a target with a draft, and say what speculation gained."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from specdec.cli.console import TokenPrinter, closing_line, colour_wanted
from specdec.cli.models import DTYPES, check_same_vocabulary, load_model, load_tokenizer
from specdec.engine import Engine, fresh_seed
from specdec.errors import InvalidArgumentError
from specdec.hf import stop_check
from specdec.rng import derive_seed
from specdec.sampling import SamplingParams
from specdec.sequence import Sequence as Sample
from specdec.stats import RunStats


@dataclass(frozen=True, slots=True)
class _Run:
    """Everything one invocation needs once the models are there."""

    engine: Engine
    tokenizer: Any
    sampling: SamplingParams
    stop: tuple[str, ...]
    seed: int
    as_json: bool
    names: dict[str, str | None]

    def admit(self, ids: list[int], row: int, **more: Any) -> Sample:
        return self.engine.admit(
            f"prompt-{row}", 0, ids, self.sampling.law(), derive_seed(self.seed, row, 0),
            self.sampling.max_new_tokens, self.sampling.eos_token_ids,
            stop_check(self.tokenizer, self.stop), **more,
        )  # fmt: skip


@click.command()
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=click.Path(dir_okay=False, allow_dash=True),
              help="Read the prompt from a file; - is standard input.")  # fmt: skip
@click.option("--target", default="big", show_default=True,
              help="Model whose law is kept: big, a folder or a hub name.")  # fmt: skip
@click.option("--draft", default=None,
              help="Small model with the target's tokenizer [default: small with target big].")  # fmt: skip
@click.option("--no-speculation", is_flag=True, help="Plain decoding, the baseline.")
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="0 keeps all tokens.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--min-p", default=0.0, show_default=True)
@click.option("--seed", type=int, default=None, help="Of the sampling [default: a fresh one].")
@click.option("--stop", multiple=True, help="End before this string; may be repeated.")
@click.option("--num-draft-tokens", default="auto", show_default=True, metavar="N|auto")
@click.option("--proposer", default=None, help="What drafts [default: draft].")
@click.option("--verification", default="auto", show_default=True,
              help="auto, greedy, token, block or gumbel.")  # fmt: skip
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="auto", show_default=True)
@click.option("--device", default=None, help="cpu, cuda, … [default: cuda where there is one].")
@click.option("--batch", type=int, default=None, metavar="N",
              help="Each line of the input is a prompt; run N at a time, print when done.")  # fmt: skip
@click.option("--chat", is_flag=True, help="Several turns with the tokenizer's chat template.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def generate(
    prompt: str | None, prompt_file: str | None, target: str, draft: str | None,
    no_speculation: bool, max_new_tokens: int, temperature: float, top_k: int, top_p: float,
    min_p: float, seed: int | None, stop: tuple[str, ...], num_draft_tokens: str,
    proposer: str | None, verification: str, dtype: str, device: str | None, batch: int | None,
    chat: bool, as_json: bool,
) -> None:  # fmt: skip
    """Generate text from PROMPT, --prompt-file or standard input.

    On a terminal, green text was drafted and accepted by the target.
    """
    sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p)
    _check_flags(chat, prompt, prompt_file, batch, no_speculation, draft, proposer)
    prompts = [] if chat else _read_prompts(prompt, prompt_file, batch)
    if draft is None and target == "big" and not no_speculation:
        draft = "small"
    tokenizer = load_tokenizer("target", target)
    if chat and not tokenizer.chat_template:
        raise InvalidArgumentError(f"--chat: the tokenizer of {target} has no chat template")
    engine = _build_engine(
        target, draft, tokenizer, dtype, device, proposer=proposer, verification=verification,
        num_draft_tokens=_draft_tokens(num_draft_tokens),
    )  # fmt: skip
    eos = engine_eos(engine, tokenizer)
    sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p, eos)
    run = _Run(
        engine, tokenizer, sampling, stop, fresh_seed() if seed is None else seed, as_json,
        {"target": target, "draft": draft},
    )  # fmt: skip
    try:
        if chat:
            _chat(run)
        elif batch is not None:
            _batch(run, prompts, batch)
        else:
            _stream(run, prompts[0])
    except BrokenPipeError:
        # the reader has gone (| head): nothing is left to say, not even at interpreter exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _check_flags(
    chat: bool, prompt: str | None, prompt_file: str | None, batch: int | None,
    no_speculation: bool, draft: str | None, proposer: str | None,
) -> None:  # fmt: skip
    if prompt is not None and prompt_file is not None:
        raise InvalidArgumentError("PROMPT and --prompt-file: expected one of the two")
    if chat and (prompt is not None or prompt_file is not None or batch is not None):
        raise InvalidArgumentError("--chat reads its turns from standard input; drop the prompt")
    if batch is not None and batch < 1:
        raise InvalidArgumentError(f"--batch {batch}: expected at least 1")
    if no_speculation and (draft is not None or proposer is not None):
        raise InvalidArgumentError("--no-speculation takes no --draft and no --proposer")


def _draft_tokens(text: str) -> Any:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise InvalidArgumentError(
            f"--num-draft-tokens {text!r}: expected a whole number or auto"
        ) from None


def _read_prompts(prompt: str | None, prompt_file: str | None, batch: int | None) -> list[str]:
    if prompt is None:
        prompt = _read_text(prompt_file)
    if batch is not None:
        lines = [line for line in prompt.splitlines() if line.strip()]
        if not lines:
            raise InvalidArgumentError("--batch: the input has no prompt, not one line of text")
        return lines
    if not prompt.strip():
        raise InvalidArgumentError("the prompt is empty: expected some text")
    return [prompt]


def _read_text(prompt_file: str | None) -> str:
    if prompt_file in (None, "-"):
        if prompt_file is None and sys.stdin.isatty():
            raise InvalidArgumentError(
                "no prompt: give PROMPT, --prompt-file FILE, or text on standard input"
            )
        return sys.stdin.read()
    assert prompt_file is not None
    try:
        return Path(prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidArgumentError(f"--prompt-file {prompt_file}: {reason}") from error


def _build_engine(
    target: str, draft: str | None, tokenizer: Any, dtype: str, device: str | None, **options: Any
) -> Engine:
    import torch

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model("target", target, dtype, where)
    small = None
    if draft is not None:
        check_same_vocabulary(tokenizer, load_tokenizer("draft", draft), (target, draft))
        small = load_model("draft", draft, dtype, where)
    return Engine(model, draft=small, grow=True, **options)


def engine_eos(engine: Engine, tokenizer: Any) -> tuple[int, ...]:
    """End tokens: those of the model's generation config, else the tokenizer's."""
    config = getattr(getattr(engine.target, "model", None), "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, Sequence) else (int(eos),)


def _stream(run: _Run, prompt: str) -> None:
    ids = run.tokenizer(prompt)["input_ids"]
    write = _silent if run.as_json else _to_stdout
    printer = TokenPrinter(run.tokenizer, run.stop, colour_wanted() and not run.as_json, write)
    if not run.as_json:
        _to_stdout(prompt)
    sample = run.admit(ids, 0)
    began = time.perf_counter()
    interrupted = _drive(run.engine, {id(sample): printer}, {sample.request_id: id(sample)})
    seconds = time.perf_counter() - began
    printer.end()
    if run.as_json:
        _print_json(run, [(prompt, printer.text, sample)], seconds)
    else:
        click.echo()
        click.echo(click.style(closing_line(run.engine.stats, seconds), dim=True), err=True)
    if interrupted:
        sys.exit(130)


def _drive(engine: Engine, printers: dict[int, TokenPrinter], keys: dict[str, int]) -> bool:
    """Steps until nothing runs; True when the user interrupted. What was printed stays."""
    try:
        while engine.scheduler.running:
            for record in engine.step():
                printers[keys[record.request_id]].put(record.tokens, record.accepted)
    except KeyboardInterrupt:
        engine.abort_all()
        return True
    finally:
        engine.take_finished()
    return False


def _batch(run: _Run, prompts: list[str], size: int) -> None:
    results: list[tuple[str, str, Sample]] = []
    began = time.perf_counter()
    interrupted = False
    for start in range(0, len(prompts), size):
        group = prompts[start : start + size]
        samples = [
            run.admit(run.tokenizer(text)["input_ids"], start + row)
            for row, text in enumerate(group)
        ]
        printers = {id(s): TokenPrinter(run.tokenizer, run.stop, False, _silent) for s in samples}
        interrupted = _drive(run.engine, printers, {s.request_id: id(s) for s in samples})
        for text, sample in zip(group, samples, strict=True):
            printers[id(sample)].end()
            results.append((text, printers[id(sample)].text, sample))
            if not run.as_json:
                click.echo(text + printers[id(sample)].text)
        if interrupted:
            break
    seconds = time.perf_counter() - began
    if run.as_json:
        _print_json(run, results, seconds)
    else:
        click.echo(click.style(closing_line(run.engine.stats, seconds), dim=True), err=True)
    if interrupted:
        sys.exit(130)


def _chat(run: _Run) -> None:
    """Turns from standard input until it ends; the cache of one turn serves the next."""
    messages: list[dict[str, str]] = []
    last: Sample | None = None
    lines = iter(lambda: _ask(sys.stdin.isatty()), None)
    for turn, line in enumerate(lines):
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        ids = run.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        sample = run.admit(list(ids), turn, keep_cache=True, resume=last)
        run.engine.stats = RunStats(lossless=run.engine.stats.lossless)
        printer = TokenPrinter(run.tokenizer, run.stop, colour_wanted(), _to_stdout)
        began = time.perf_counter()
        interrupted = _drive(run.engine, {0: printer}, {sample.request_id: 0})
        printer.end()
        click.echo()
        seconds = time.perf_counter() - began
        click.echo(click.style(closing_line(run.engine.stats, seconds), dim=True), err=True)
        if interrupted:
            sys.exit(130)
        messages.append({"role": "assistant", "content": printer.text})
        last = sample


def _ask(prompted: bool) -> str | None:
    """One line of the user's, None at the end of the input."""
    if prompted:
        click.echo("> ", nl=False)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _print_json(run: _Run, results: list[tuple[str, str, Sample]], seconds: float) -> None:
    stats = run.engine.stats.as_dict()
    stats["wall_seconds"] = round(seconds, 6)
    click.echo(
        json.dumps(
            {
                **run.names,
                "seed": run.seed,
                "outputs": [
                    {
                        "prompt": prompt,
                        "text": text,
                        "token_ids": sample.tokens[sample.prompt_len :],
                        "finish_reason": sample.finish_reason,
                    }
                    for prompt, text, sample in results
                ],
                "stats": stats,
            },
            ensure_ascii=False,
        )
    )


def _to_stdout(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _silent(text: str) -> None:
    del text
