"""Text on the terminal as it is generated: drafted and target tokens told apart by colour."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import click
from tqdm import tqdm

from specdec.stats import RunStats

Write = Callable[[str], None]
_CONTEXT = 8  # tokens before a new one that its text may depend on


def is_terminal(stream: TextIO | None) -> bool:
    """Whether someone reads along; a stream that was closed is None."""
    return stream is not None and stream.isatty()


def colour_wanted(stream: TextIO | None) -> bool:
    """Colour on a terminal, unless NO_COLOR is set (no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def with_bar(items: Sequence[Any], label: str) -> Iterator[Any]:
    """The items, with a bar and the time left where someone looks on."""
    yield from tqdm(items, desc=label, leave=False, disable=None)


def to_stdout(text: str) -> None:
    """Writes text as it is; escape sequences in generated text are part of it."""
    click.echo(text, nl=False, color=True)


def remark(text: str, *, newline: bool = True) -> None:
    """A line about the run, on standard error."""
    shown = click.style(text, dim=True) if colour_wanted(sys.stderr) else text
    click.echo(shown, err=True, nl=newline)


class TokenPrinter:
    """Prints tokens as text: whole characters only, and nothing of or past a stop string.

    prompt: the tokens before; a tokenizer that writes spaces between words needs them.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str], colour: bool, write: Write
    ) -> None:
        self._tokenizer, self._stop, self._colour, self._write = tokenizer, stop, colour, write
        self._context = list(prompt[-_CONTEXT:])
        self._fresh: list[int] = []  # tokens that do not end with a whole character yet
        self._held = ""  # text that may be the start of a stop string
        self.text = ""  # everything printed
        self.stopped = False

    def put(self, tokens: Sequence[int], drafted: int) -> None:
        """Prints one step's tokens; the first `drafted` of them were the draft's."""
        for index, token in enumerate(tokens):
            self._fresh.append(token)
            text = self._decode_fresh()
            if not text.endswith("\ufffd"):
                self._context = [*self._context, *self._fresh][-_CONTEXT:]
                self._fresh = []
                self._flush(text, index < drafted)

    def end(self) -> None:
        """Prints what was held back in case a stop string followed."""
        self._flush(self._decode_fresh(), drafted=False)
        if not self.stopped:
            self._emit(self._held, drafted=False)

    def _decode_fresh(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=True)
        whole = self._tokenizer.decode([*self._context, *self._fresh], skip_special_tokens=True)
        return str(whole[len(before) :])

    def _flush(self, text: str, drafted: bool) -> None:
        if self.stopped:
            return
        text = self._held + text
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            text, self.stopped = text[: min(ends)], True
        keep = 0 if self.stopped else self._held_back(text)
        self._held = text[len(text) - keep :]
        self._emit(text[: len(text) - keep], drafted)

    def _held_back(self, text: str) -> int:
        """Length of the longest end of text that may be the start of a stop string."""
        lengths = [
            n
            for stop in self._stop
            for n in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:n])
        ]
        return max(lengths, default=0)

    def _emit(self, text: str, drafted: bool) -> None:
        self.text += text
        if text:
            self._write(click.style(text, fg="green") if self._colour and drafted else text)


def closing_line(stats: RunStats, seconds: float) -> str:
    """What a run did, in one line. seconds: wall clock of the whole generation."""
    rate = f"{stats.tokens / seconds:.1f}" if seconds else "-"
    parts = [f"{stats.tokens} tokens", f"{rate} tokens/s"]
    if stats.steps:
        parts.append(f"{stats.tokens_per_target_pass:.2f} tokens per target pass")
    if stats.drafted:
        parts.append(f"acceptance {stats.acceptance_rate:.0%} of {stats.drafted} drafted")
    other = max(0.0, seconds - stats.draft_seconds - stats.verify_seconds)
    shares = (stats.draft_seconds, stats.verify_seconds, other)
    split = "/".join(f"{share / seconds:.0%}" if seconds else "-" for share in shares)
    parts.append(f"draft/verify/other {split}")
    if not stats.lossless:
        parts.append("LOSSY")
    return " | ".join(parts)
