"""Prompt sets that ship with the package, described in README.md, and loaders for other files."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from specdec.errors import InvalidArgumentError

# ours, then those of Spec-Bench's question.jsonl
_TEXTS = ("prompt", "turns")
_IDS = ("id", "question_id")
_SOURCES = ("source", "category")
_REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a user says: one turn, or several that follow each other's answers."""

    id: str
    source: str  # where it is from, or its category; empty where the file does not say
    turns: tuple[str, ...]
    # what may be said to each turn; empty where the file does not know
    reference: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The first turn."""
        return self.turns[0]


def names() -> list[str]:
    """The sets that ship with the package."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".jsonl") for f in files if f.name.endswith(".jsonl"))


def load(source: str | Path, *, column: str | None = None) -> list[Prompt]:
    """The prompts of a set by name, or of a file.

    A .jsonl file has one object per line: a text under `prompt`, or a list of them under `turns`,
    and where it likes `id` and `source`; those of Spec-Bench (question_id, category, turns,
    reference) are read too. `column` names the text's key where it is another; then other keys are
    passed over. In any other file every line that is not blank is a prompt. Raises
    InvalidArgumentError naming the file and the line.
    """
    if str(source) in names():
        file = resources.files(__name__) / f"{source}.jsonl"
        return _objects(str(source), file.read_text(encoding="utf-8"), column)
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidArgumentError(
            f"prompts {str(source)!r}: expected a file or one of {', '.join(names())}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidArgumentError(f"prompts {str(source)!r}: {reason}") from error
    if path.suffix == ".jsonl":
        return _objects(str(source), text, column)
    if column is not None:
        raise InvalidArgumentError(f"column={column!r}: expected a .jsonl file, got {source}")
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    return _some(str(source), [Prompt(f"line-{n}", "", (line,)) for n, line in lines])


@dataclass(frozen=True, slots=True)
class Fitting:
    """Which prompts a context has room for; nothing is ever cut."""

    kept: list[Prompt]
    too_long: list[tuple[str, int]]  # id, tokens of all its turns
    context: int | None  # tokens; None: unbounded
    new_tokens: int  # per turn

    @property
    def note(self) -> str:
        """One line to report; empty where every prompt fits."""
        if not self.too_long:
            return ""
        count, longest = len(self.too_long), max(tokens for _, tokens in self.too_long)
        some = ", ".join(name for name, _ in self.too_long[:3]) + (", ..." if count > 3 else "")
        return (
            f"{count} of {count + len(self.kept)} prompts left out (up to {longest} tokens; the "
            f"context holds {self.context}, with {self.new_tokens} new ones a turn): {some}"
        )


def fitting(
    prompts: Sequence[Prompt], count_tokens: Callable[[str], int], *, context: int | None,
    new_tokens: int,
) -> Fitting:  # fmt: skip
    """Those whose turns leave room for new_tokens per turn in the context (None: unbounded).

    count_tokens: the length of a text in the model's tokens.
    """
    kept, too_long = list[Prompt](), list[tuple[str, int]]()
    for prompt in prompts:
        tokens = sum(count_tokens(turn) for turn in prompt.turns)
        if context is not None and tokens + new_tokens * len(prompt.turns) > context:
            too_long.append((prompt.id, tokens))
        else:
            kept.append(prompt)
    return Fitting(kept, too_long, context, new_tokens)


def _objects(source: str, text: str, column: str | None) -> list[Prompt]:
    # not splitlines: JSON may hold the other line separators as they are
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return _some(source, [_read(f"{source}:{n}", n, line, column) for n, line in lines])


def _some(source: str, prompts: list[Prompt]) -> list[Prompt]:
    if not prompts:
        raise InvalidArgumentError(f"prompts {source!r}: it is empty")
    seen = set[str]()
    for prompt in prompts:
        if prompt.id in seen:
            raise InvalidArgumentError(f"prompts {source!r}: two have the id {prompt.id!r}")
        seen.add(prompt.id)
    return prompts


def _read(where: str, number: int, line: str, column: str | None) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(f"{where}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise InvalidArgumentError(f"{where}: its lists or objects are nested too deep") from error
    if not isinstance(row, dict):
        raise InvalidArgumentError(f"{where}: expected an object, got {type(row).__name__}")
    texts = _TEXTS if column is None else (column,)
    if column is None:
        known = (*texts, *_IDS, *_SOURCES, _REFERENCE)
        unknown = [key for key in row if key not in known]
        if unknown:
            raise InvalidArgumentError(
                f"{where}: unknown column {unknown[0]!r}: expected {', '.join(known)}; or name the "
                "text's own with column="
            )
    found = [row[key] for key in texts if key in row]
    if column is not None and not found:
        raise InvalidArgumentError(
            f"{where}: unknown column {column!r}: expected one of {', '.join(row) or 'none'}"
        )
    if len(found) != 1:
        raise InvalidArgumentError(f"{where}: expected one of {', '.join(texts)}")
    turns = _texts(where, found[0])
    reference = _references(where, row.get(_REFERENCE))
    name = next((row[key] for key in _IDS if key in row), f"line-{number}")
    category = next((row[key] for key in _SOURCES if key in row), "")
    return Prompt(str(name), str(category), turns, reference)


def _references(where: str, value: Any) -> tuple[str, ...]:
    """By turn. Spec-Bench leaves some empty, and names several short answers to others: of those
    the first."""
    if not value:
        return ()
    given = value if isinstance(value, list) else [value]
    texts = [each[0] if isinstance(each, list) and each else each for each in given]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidArgumentError(f"{where}: {_REFERENCE}: expected a text or a list of texts")
    return _encodable(where, texts)


def _texts(where: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
        raise InvalidArgumentError(f"{where}: expected a text or a list of texts, none empty")
    return _encodable(where, texts)


def _encodable(where: str, texts: list[str]) -> tuple[str, ...]:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # JSON may name half a character, which no tokenizer takes
        raise InvalidArgumentError(f"{where}: it is not UTF-8 text") from error
    return tuple(texts)


def _is_text(turn: Any) -> bool:
    return isinstance(turn, str) and bool(turn.strip())
