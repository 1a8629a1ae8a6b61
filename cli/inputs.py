"""Where prompts come from: the command line, a file or standard input."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from specdec.cli.console import is_terminal, remark
from specdec.errors import InvalidArgumentError


def read_prompts(prompt: str | None, prompt_file: str | None, batch: int | None) -> list[str]:
    """One prompt, or with --batch one per line that says something."""
    text = _read_text(prompt_file) if prompt is None else _checked("PROMPT", prompt)
    if batch is not None:
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise InvalidArgumentError("--batch: the input has no prompt, not one line of text")
        return lines
    if not text.strip():
        raise InvalidArgumentError("the prompt is empty: expected some text")
    return [text]


def questions() -> Iterator[str]:
    """The lines of standard input that say something, asked for on a terminal."""
    while sys.stdin is not None:
        if is_terminal(sys.stdin):
            remark("> ", newline=False)
        line = _read_stdin(sys.stdin.readline)
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def member_options(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """NAME.OPTION=VALUE -> the options of each proposer; a value is JSON where it can be."""
    found: dict[str, dict[str, Any]] = {}
    for text in values:
        path, equals, value = text.partition("=")
        name, dot, option = path.partition(".")
        if not (equals and dot and name and option):
            raise click.BadParameter(f"{text!r}: expected NAME.OPTION=VALUE.", ctx, param)
        its = found.setdefault(name, {})
        try:
            its[option] = json.loads(value)
        except ValueError:
            its[option] = value
    return found


def _read_text(prompt_file: str | None) -> str:
    if prompt_file in (None, "-"):
        if sys.stdin is None or (prompt_file is None and is_terminal(sys.stdin)):
            raise InvalidArgumentError(
                "no prompt: give PROMPT, --prompt-file FILE, or text on standard input"
            )
        return _read_stdin(sys.stdin.read)
    assert prompt_file is not None
    try:
        return Path(prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidArgumentError(f"--prompt-file {prompt_file!r}: {reason}") from error


def _read_stdin(read: Callable[[], str]) -> str:
    try:
        return _checked("standard input", read())
    except UnicodeDecodeError as error:
        raise InvalidArgumentError("standard input: it is not UTF-8 text") from error


def _checked(what: str, text: str) -> str:
    """Python keeps bytes that are no text as lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{what}: it is not UTF-8 text") from error
    return text
