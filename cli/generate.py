"""specdec generate: stream text from a target with a draft, and say what speculation gained."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch
from jinja2 import TemplateError

from specdec import proposers
from specdec.acceptance import RULES
from specdec.cli.console import TokenPrinter, closing_line, colour_wanted, remark, to_stdout
from specdec.cli.inputs import questions, read_prompts
from specdec.cli.models import (
    DTYPES,
    check_device,
    check_same_vocabulary,
    load_model,
    load_tokenizer,
)
from specdec.engine import PAGE_SIZE, Engine, fresh_seed
from specdec.errors import InvalidArgumentError, SpecDecError
from specdec.hf import stop_check
from specdec.rng import derive_seed
from specdec.sampling import SamplingParams
from specdec.sequence import Sequence as Sample
from specdec.shapes import expansion
from specdec.stats import RunStats


def _draft_tokens(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    if value == "auto":
        return value
    if not value.isdecimal():
        raise click.BadParameter(
            f"{value!r} is neither a whole number from 0 on nor 'auto'.", ctx, param
        )
    return int(value)


def _tree_shape(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r}: expected numbers such as 3,2,1.", ctx, param)
    return expansion([int(part) for part in parts])


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
@click.option(
    "--target",
    default="big",
    show_default=True,
    help="Model whose law is kept: big, a folder or a hub name.",
)
@click.option(
    "--draft",
    default=None,
    help="Small model with the target's tokenizer.  [default: small with --target big]",
)
@click.option("--no-speculation", is_flag=True, help="Plain decoding, the baseline.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Length of the continuation at most.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 is greedy decoding.",
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 keeps all tokens."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Keep the likeliest tokens that have this mass.",
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Drop tokens less likely than this share of the likeliest.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=None,
    help="Of the sampling.  [default: a fresh one]",
)
@click.option("--stop", multiple=True, help="End before this string; may be repeated.")
@click.option(
    "--num-draft-tokens",
    callback=_draft_tokens,
    metavar="N|auto",
    default="auto",
    show_default=True,
    help="Tokens drafted per step.",
)
@click.option(
    "--tree",
    callback=_tree_shape,
    metavar="K1,K2,…",
    default=None,
    help="Draft a tree: children of each token, level by level.  [default: a chain]",
)
@click.option(
    "--draft-window",
    type=click.IntRange(min=PAGE_SIZE),
    metavar="N",
    default=None,
    help="The draft sees the last N tokens and the first few.  [default: all]",
)
@click.option(
    "--proposer",
    type=click.Choice(proposers.names()),
    default=None,
    help="What drafts.  [default: draft, where there is one]",
)
@click.option(
    "--verification",
    type=click.Choice(["auto", *RULES]),
    default="auto",
    show_default=True,
    help="The rule that accepts or rejects.",
)
@click.option("--lossy", is_flag=True, help="Allow a rule that changes what the target says.")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="auto",
    show_default=True,
    help="Of the weights; auto is as stored.",
)
@click.option("--device", default=None, help="cpu, cuda, …  [default: cuda where there is one]")
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
    tree: tuple[int, ...] | None, draft_window: int | None, proposer: str | None,
    verification: str, lossy: bool, dtype: str, device: str | None, batch: int | None,
    chat: bool, as_json: bool,
) -> None:  # fmt: skip
    """Generate text from PROMPT, --prompt-file or standard input.

    On a terminal, green text was drafted and accepted by the target.
    """
    SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p)
    _check_flags(chat, prompt, prompt_file, batch, no_speculation, draft, proposer, tree)
    if "" in stop:
        raise InvalidArgumentError("--stop '': expected some text")
    prompts = [] if chat else read_prompts(prompt, prompt_file, batch)
    if draft is None and target == "big" and not no_speculation and _wants_draft(proposer):
        draft = "small"
    tokenizer = load_tokenizer("target", target)
    if chat and not tokenizer.chat_template:
        raise InvalidArgumentError(f"--chat: the tokenizer of {target!r} has no chat template")
    engine = _build_engine(
        target, draft, tokenizer, dtype, device, proposer=proposer, verification=verification,
        lossy=lossy, num_draft_tokens=num_draft_tokens, tree=tree, draft_window=draft_window,
    )  # fmt: skip
    eos = end_tokens(engine, tokenizer)
    run = _Run(
        engine, tokenizer, SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p, eos),
        stop, fresh_seed() if seed is None else seed, as_json, {"target": target, "draft": draft},
    )  # fmt: skip
    if chat:
        interrupted = _chat(run)
    elif batch is not None:
        interrupted = _batch(run, prompts, batch)
    else:
        interrupted = _single(run, prompts[0])
    if interrupted:
        sys.exit(130)


def _wants_draft(proposer: str | None) -> bool:
    return proposer is None or proposers.find(proposer).needs_draft


def _check_flags(
    chat: bool, prompt: str | None, prompt_file: str | None, batch: int | None,
    no_speculation: bool, draft: str | None, proposer: str | None, tree: tuple[int, ...] | None,
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


def _build_engine(
    target: str, draft: str | None, tokenizer: Any, dtype: str, device: str | None, **options: Any
) -> Engine:
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(where)
    if draft is not None:
        check_same_vocabulary(tokenizer, load_tokenizer("draft", draft), (target, draft))
    model = load_model("target", target, dtype, where)
    small = load_model("draft", draft, dtype, where) if draft is not None else None
    return Engine(model, draft=small, grow=True, **options)


def end_tokens(engine: Engine, tokenizer: Any) -> tuple[int, ...]:
    """End tokens: those of the model's generation config, else the tokenizer's."""
    config = getattr(getattr(engine.target, "model", None), "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, Sequence) else (int(eos),)


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
