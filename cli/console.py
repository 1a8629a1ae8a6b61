"""Text on the terminal as it is generated: drafted and target tokens told apart by colour."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from specdec.stats import RunStats

Write = Callable[[str], None]


def colour_wanted() -> bool:
    """Colour on a terminal, unless NO_COLOR is set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


class TokenPrinter:
    """Prints tokens as text: whole characters only, and nothing of or past a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], colour: bool, write: Write) -> None:
        self._tokenizer, self._stop, self._colour, self._write = tokenizer, stop, colour, write
        self._ids: list[int] = []  # since the last line break that was printed
        self._text = ""  # decoded from _ids
        self._printed = 0  # characters of _text
        self.text = ""  # everything printed
        self.stopped = False

    def put(self, tokens: Sequence[int], drafted: int) -> None:
        """Prints one step's tokens; the first `drafted` of them were the draft's."""
        for index, token in enumerate(tokens):
            self._ids.append(token)
            self._text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            if not self._text.endswith("\ufffd"):
                self._flush(index < drafted)

    def end(self) -> None:
        """Prints what was held back in case a stop string followed."""
        if not self.stopped:
            self._emit(self._text[self._printed :], drafted=False)

    def _flush(self, drafted: bool) -> None:
        if self.stopped:
            return
        fresh = self._text[self._printed :]
        for stop in self._stop:
            at = fresh.find(stop)
            if at >= 0:
                fresh, self.stopped = fresh[:at], True
        if not self.stopped:
            fresh = fresh[: len(fresh) - self._held_back(fresh)]
        self._emit(fresh, drafted)
        self._printed += len(fresh)
        if self._printed == len(self._text) and self._text.endswith("\n"):
            self._ids, self._text, self._printed = [], "", 0

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
    parts = [
        f"{stats.tokens} tokens",
        f"{rate} tokens/s",
        f"{stats.tokens_per_target_pass:.2f} tokens per target pass",
    ]
    if stats.drafted:
        parts.append(f"acceptance {stats.acceptance_rate:.0%} of {stats.drafted} drafted")
    other = max(0.0, seconds - stats.draft_seconds - stats.verify_seconds)
    shares = (stats.draft_seconds, stats.verify_seconds, other)
    split = "/".join(f"{share / seconds:.0%}" if seconds else "-" for share in shares)
    parts.append(f"draft/verify/other {split}")
    if not stats.lossless:
        parts.append("LOSSY")
    return " | ".join(parts)
