"""specdec generate: stream text from a target with a draft, and say what speculation gained."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
from jinja2 import TemplateError

from specdec.cli.console import TokenPrinter, closing_line, colour_wanted, remark, to_stdout
from specdec.cli.inputs import questions, read_prompts
from specdec.cli.options import (
    count_option,
    draft_options,
    end_tokens,
    load_pair,
    model_options,
    temperature_option,
    truncation_options,
)
from specdec.engine import Engine, fresh_seed
from specdec.errors import InvalidArgumentError, SpecDecError
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

    def printer(self, ids: Sequence[int], write: Callable[[str], None]) -> TokenPrinter:
        colour = colour_wanted(sys.stdout) and not self.as_json
        return TokenPrinter(self.tokenizer, ids, self.stop, colour, write)


@dataclass(frozen=True, slots=True)
class _Output:
    """One finished or interrupted sample."""

    prompt: str
    text: str
    sample: Sample


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--prompt-file",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Read the prompt from a file; - is standard input.",
)
@model_options
@click.option("--no-speculation", is_flag=True, help="Plain decoding, the baseline.")
@count_option("--max-new-tokens", 128, "Length of the continuation at most.")
@temperature_option
@truncation_options
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=None,
    help="Of the sampling.  [default: a fresh one]",
)
@click.option("--stop", multiple=True, help="End before this string; may be repeated.")
@draft_options
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=None,
    metavar="N",
    help="Each line of the input is a prompt; run N at a time, print when done.",
)
@click.option("--chat", is_flag=True, help="Several turns with the tokenizer's chat template.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object (with --chat one per turn) as output."
)
def generate(
    prompt: str | None, prompt_file: str | None, target: str, draft: str | None,
    no_speculation: bool, max_new_tokens: int, temperature: float, top_k: int, top_p: float,
    min_p: float, seed: int | None, stop: tuple[str, ...], num_draft_tokens: Any,
    tree: tuple[int, ...] | None, draft_window: int | None, proposer: str | list[str] | None,
    proposer_options: dict[str, Any], policy: str, verification: str, lossy: bool, dtype: str,
    device: str | None, batch: int | None, chat: bool, as_json: bool,
) -> None:  # fmt: skip
    """Generate text from PROMPT, --prompt-file or standard input.

    On a terminal, green text was drafted and accepted by the target.
    """
    SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p)
    _check_flags(chat, prompt, prompt_file, batch, no_speculation, draft, proposer, tree)
    if "" in stop:
        raise InvalidArgumentError("--stop '': expected some text")
    prompts = [] if chat else read_prompts(prompt, prompt_file, batch)
    pair = load_pair(
        target, draft, dtype, device, no_speculation=no_speculation, proposer=proposer,
        verification=verification, lossy=lossy, num_draft_tokens=num_draft_tokens, tree=tree,
        draft_window=draft_window, proposer_options=proposer_options, policy=policy,
    )  # fmt: skip
    tokenizer = pair.tokenizer
    if chat and not tokenizer.chat_template:
        raise InvalidArgumentError(f"--chat: the tokenizer of {target!r} has no chat template")
    eos = end_tokens(pair.target, tokenizer)
    run = _Run(
        pair.engine(), tokenizer,
        SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p, eos),
        stop, fresh_seed() if seed is None else seed, as_json, pair.names,
    )  # fmt: skip
    if chat:
        interrupted = _chat(run)
    elif batch is not None:
        interrupted = _batch(run, prompts, batch)
    else:
        interrupted = _single(run, prompts[0])
    if interrupted:
        sys.exit(130)


def _check_flags(
    chat: bool, prompt: str | None, prompt_file: str | None, batch: int | None,
    no_speculation: bool, draft: str | None, proposer: str | list[str] | None,
    tree: tuple[int, ...] | None,
) -> None:  # fmt: skip
    if prompt is not None and prompt_file is not None:
        raise InvalidArgumentError("PROMPT and --prompt-file: expected one of the two")
    if chat and (prompt is not None or prompt_file is not None or batch is not None):
        raise InvalidArgumentError(
            "--chat reads its turns from standard input: expected no PROMPT, --prompt-file, --batch"
        )
    if no_speculation and (draft is not None or proposer is not None):
        raise InvalidArgumentError("--no-speculation: expected neither --draft nor --proposer")
    if no_speculation and tree is not None:
        raise InvalidArgumentError("--no-speculation: expected no --tree")


def _single(run: _Run, prompt: str) -> bool:
    """Streams one continuation; True when the user interrupted."""
    ids = run.tokenizer(prompt)["input_ids"]
    sample = run.admit(ids, 0)
    if not run.as_json:
        to_stdout(prompt)
    return _stream(run, prompt, sample)[1]


def _stream(run: _Run, prompt: str, sample: Sample) -> tuple[str, bool]:
    """The text that was printed, and whether the user interrupted."""
    printer = run.printer(sample.tokens, _silent if run.as_json else to_stdout)
    began = time.perf_counter()
    try:
        interrupted = _drive(run.engine, {sample.request_id: printer})
    except SpecDecError:
        if not run.as_json:
            printer.end()
            to_stdout("\n")  # the error gets a line of its own
        raise
    seconds = time.perf_counter() - began
    printer.end()
    if not run.as_json:
        to_stdout("\n")
    _report(run, [_Output(prompt, printer.text, sample)], seconds)
    return printer.text, interrupted


def _drive(engine: Engine, printers: dict[str, TokenPrinter]) -> bool:
    """Steps until nothing runs; True when the user interrupted. What was printed stays."""
    try:
        while engine.scheduler.running:
            for record in engine.step():
                printers[record.request_id].put(record.tokens, record.accepted)
    except KeyboardInterrupt:
        engine.abort_all()
        return True
    finally:
        engine.take_finished()
    return False


def _batch(run: _Run, prompts: list[str], size: int) -> bool:
    tokens = [run.tokenizer(text)["input_ids"] for text in prompts]
    for ids in tokens:  # before anything is written
        run.engine.check_prompt(ids)
    outputs: list[_Output] = []
    began = time.perf_counter()
    interrupted = False
    for start in range(0, len(prompts), size):
        rows = range(start, min(start + size, len(prompts)))
        samples = [run.admit(tokens[row], row) for row in rows]
        printers = {s.request_id: run.printer(s.tokens, _silent) for s in samples}
        interrupted = _drive(run.engine, printers)
        for row, sample in zip(rows, samples, strict=True):
            printer = printers[sample.request_id]
            printer.end()
            outputs.append(_Output(prompts[row], printer.text, sample))
            if not run.as_json:
                to_stdout(prompts[row] + printer.text + "\n")
        if interrupted:
            break
    _report(run, outputs, time.perf_counter() - began)
    return interrupted


def _chat(run: _Run) -> bool:
    """Turns from standard input until it ends; the cache of one turn serves the next."""
    messages: list[dict[str, str]] = []
    last: Sample | None = None
    for turn, line in enumerate(questions()):
        messages.append({"role": "user", "content": line})
        ids = _chat_tokens(run.tokenizer, messages)
        last = run.admit(ids, turn, keep_cache=True, resume=last)
        run.engine.stats = RunStats(lossless=run.engine.stats.lossless)
        answer, interrupted = _stream(run, line, last)
        if interrupted:
            return True
        messages.append({"role": "assistant", "content": answer})
    return False


def _chat_tokens(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise InvalidArgumentError(f"--chat: the tokenizer's chat template: {error}") from error
    return list(ids)


def _report(run: _Run, outputs: list[_Output], seconds: float) -> None:
    """The closing line, or everything as JSON."""
    if not run.as_json:
        remark(closing_line(run.engine.stats, seconds))
        return
    stats = run.engine.stats.as_dict()
    stats["wall_seconds"] = round(seconds, 6)
    rows = [
        {
            "prompt": output.prompt,
            "text": output.text,
            "token_ids": output.sample.tokens[output.sample.prompt_len :],
            "finish_reason": output.sample.finish_reason,
        }
        for output in outputs
    ]
    whole = {**run.names, "seed": run.seed, "outputs": rows, "stats": stats}
    to_stdout(json.dumps(whole, ensure_ascii=False) + "\n")


def _silent(text: str) -> None:
    del text
