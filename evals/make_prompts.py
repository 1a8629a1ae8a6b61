"""Make the prompt sets that are derived or drawn; the others are text, written for this project.

    python -m specdec.evals.make_prompts

Writes prompts/{heldout_code,copy_edits,json,random,summarise}.jsonl, COUNT objects each, one per
line, with id, source and prompt, copy_edits with reference too; the same bytes every time (the
first two: on Python 3.11, whose standard library they are cut from). prompts/README.md says more.
"""

import ast
import json
import random
import re
import string
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from specdec.zoo.corpus import SourceFile, read_corpus

COUNT = 40
FOLDER = Path(__file__).parent / "prompts"
OUT = FOLDER / "heldout_code.jsonl"
MAX_CHARS, MIN_CHARS = 900, 200
# of a function to be copied; twice as long, and what is generated, fits the built-in pair's context
MAX_COPIED, MIN_COPIED = 900, 450
BEGUN = 0.3  # share of the copy that stands in the prompt

Row = dict[str, str]


def cut_points(file: SourceFile) -> list[int]:
    """Character offsets right behind the docstring, or the signature, of each function."""
    lines = file.text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    offsets = [
        starts[node.body[1].lineno - 1]
        for node in ast.walk(ast.parse(file.text))
        if isinstance(node, ast.FunctionDef) and len(node.body) > 2
    ]
    return sorted(o for o in offsets if o >= MIN_CHARS)


def heldout_code() -> list[Row]:
    """The text before the body of a function, up to MAX_CHARS of it, starting at a line."""
    found = []
    for file in _held_out():
        for offset in cut_points(file):
            begin = file.text.find("\n", max(0, offset - MAX_CHARS)) + 1
            text = file.text[begin:offset].rstrip("\n") + "\n"
            found.append({"source": file.name, "prompt": text})
    return _spread(found)


def copy_edits() -> list[Row]:
    """A function, and the beginning of the same function with one name replaced; its rest is the
    reference."""
    found = []
    for file in _held_out():
        for node in ast.walk(ast.parse(file.text)):
            if isinstance(node, ast.FunctionDef):
                text = "\n".join(file.text.splitlines()[node.lineno - 1 : node.end_lineno])
                text = textwrap.dedent(text) + "\n"
                name = _frequent_name(node)
                if MIN_COPIED <= len(text) <= MAX_COPIED and name is not None:
                    found.append({"source": file.name, **_edited(text, name)})
    return _spread(found)


def _frequent_name(function: ast.FunctionDef) -> str | None:
    """The local name that is used most, three times at least; the first of equals."""
    uses = Counter(
        node.id if isinstance(node, ast.Name) else node.arg
        for node in ast.walk(function)
        if isinstance(node, (ast.Name, ast.arg))
    )
    stored = {
        node.id if isinstance(node, ast.Name) else node.arg
        for node in ast.walk(function)
        if isinstance(node, ast.arg)
        or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    }
    usual = [n for n in sorted(stored) if uses[n] >= 3 and n not in ("self", "cls", "_")]
    return max(usual, key=lambda n: uses[n], default=None)


def _edited(text: str, name: str) -> Row:
    new = f"the_{name}"
    copy = re.sub(rf"\b{name}\b", new, text)
    lines = copy.splitlines(keepends=True)
    begun = ""
    while len(begun) < BEGUN * len(copy):
        begun += lines.pop(0)
    begun = begun.rstrip()  # tokenizers join a newline with the spaces that follow
    prompt = f"{text}\n\n# The same function with {name} renamed to {new}:\n\n{begun}"
    return {"prompt": prompt, "reference": copy[len(begun) :]}


def json_records() -> list[Row]:
    """Lists of records of one form, cut behind the first key of a record."""
    rng = random.Random("json")
    rows = []
    for _ in range(COUNT):
        name, make = rng.choice(list(_RECORDS.items()))
        records = [json.dumps(make(rng, number)) for number in range(1, rng.randint(7, 11))]
        *whole, last = records
        text = "[\n" + "".join(f"  {record},\n" for record in whole)
        rows.append({"source": name, "prompt": text + "  " + last[: last.index(",") + 1]})
    return rows


def _person(rng: random.Random, number: int) -> dict[str, object]:
    name = rng.choice(_NAMES)
    return {
        "id": number, "name": name, "email": f"{name.lower()}@example.com",
        "age": rng.randint(18, 80), "active": rng.random() < 0.7,
    }  # fmt: skip


def _reading(rng: random.Random, number: int) -> dict[str, object]:
    return {
        "time": f"2024-05-01T{number:02d}:00:00Z", "sensor": rng.choice(("north", "south", "roof")),
        "temperature": round(rng.uniform(5, 25), 1), "humidity": rng.randint(30, 90),
        "status": rng.choice(("ok", "ok", "ok", "late")),
    }  # fmt: skip


def _order(rng: random.Random, number: int) -> dict[str, object]:
    return {
        "order": 1000 + number, "customer": rng.choice(_NAMES),
        "items": [{"product": rng.choice(_PRODUCTS), "count": rng.randint(1, 5)}],
        "paid": rng.random() < 0.5, "shipped": None,
    }  # fmt: skip


def _event(rng: random.Random, number: int) -> dict[str, object]:
    return {
        "line": number, "level": rng.choice(("info", "info", "warning", "error")),
        "module": rng.choice(("cache", "server", "parser")),
        "message": rng.choice(("request finished", "connection closed", "value is missing")),
    }  # fmt: skip


_NAMES = ("Ada", "Ben", "Carla", "Dora", "Emil", "Fatima", "Goran", "Hanna", "Ivo", "June")
_PRODUCTS = ("lamp", "chair", "table", "shelf", "rug", "mirror")
_RECORDS: dict[str, Callable[[random.Random, int], dict[str, object]]] = {
    "people": _person, "readings": _reading, "orders": _order, "events": _event,
}  # fmt: skip


def noise() -> list[Row]:
    """Letters and digits, each drawn alone: nothing in them can be guessed."""
    rng = random.Random("random")
    letters = string.ascii_letters + string.digits
    texts = ["".join(rng.choices(letters, k=240)) for _ in range(COUNT)]
    return [{"source": "uniform letters and digits", "prompt": text} for text in texts]


def summarise() -> list[Row]:
    """Two paragraphs of the prose, and the wish for a summary."""
    lines = (FOLDER / "prose.jsonl").read_text(encoding="utf-8").splitlines()
    prose = [json.loads(line) for line in lines]
    rows = []
    for first, second in zip(prose, [*prose[1:], prose[0]], strict=True):
        text = f"{first['prompt']}\n\n{second['prompt']}"
        prompt = f"Summarise the following text in two sentences.\n\n{text}\n\nSummary:"
        rows.append({"source": f"{first['id']}, {second['id']}", "prompt": prompt})
    return rows


def _held_out() -> list[SourceFile]:
    return [file for file in read_corpus() if file.held_out]


def _spread(found: list[Row]) -> list[Row]:
    """COUNT of them, evenly."""
    step = len(found) / COUNT
    return [found[int(i * step)] for i in range(COUNT)]


# file name -> (prefix of the ids, maker)
SETS: dict[str, tuple[str, Callable[[], list[Row]]]] = {
    "heldout_code": ("code", heldout_code),
    "copy_edits": ("copy", copy_edits),
    "json": ("json", json_records),
    "random": ("random", noise),
    "summarise": ("summarise", summarise),
}


def rows_of(name: str) -> list[Row]:
    prefix, make = SETS[name]
    return [{"id": f"{prefix}-{i:02d}", **row} for i, row in enumerate(make())]


def main() -> None:
    for name in SETS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(name)]
        (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
