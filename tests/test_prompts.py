"""Prompt sets: what ships, that scripts make the same bytes again, and how files are read."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from specdec import zoo
from specdec.errors import InvalidArgumentError
from specdec.evals import make_prompts, prompts
from specdec.evals.prompts import Prompt, fitting, load

OURS = [
    "chat", "copy_edits", "heldout_code", "json", "multi_turn", "prose", "random", "summarise",
]  # fmt: skip
CUT_FROM_PYTHON = ("heldout_code", "copy_edits")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some.jsonl"


def test_sets_that_ship() -> None:
    assert prompts.names() == OURS


@pytest.mark.parametrize("name", OURS)
def test_set_has_forty_prompts_that_fit_the_built_in_pair(name: str) -> None:
    found = load(name)
    assert len(found) >= 40
    assert len({prompt.turns for prompt in found}) == len(found)
    assert all(prompt.source for prompt in found)
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"))
    room = fitting(found, lambda text: len(tokenizer(text)["input_ids"]), context=1024,
                   new_tokens=256)  # fmt: skip
    assert (room.kept, room.note) == (found, "")


@pytest.mark.parametrize(
    "name", [name for name in make_prompts.SETS if name not in CUT_FROM_PYTHON]
)
def test_script_makes_the_same_prompts_again(name: str) -> None:
    path = make_prompts.FOLDER / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert make_prompts.rows_of(name) == rows


def test_prompts_cut_from_python_are_of_their_form() -> None:
    # their bytes depend on the library's version, their form does not
    for name in CUT_FROM_PYTHON:
        rows = make_prompts.rows_of(name)
        assert len(rows) == 40
        if sys.version_info[:3] == (3, 11, 7):
            path = make_prompts.FOLDER / f"{name}.jsonl"
            assert [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]] == rows


def test_edited_copy_is_begun_and_its_rest_is_the_reference() -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("big"))
    for prompt in load("copy_edits"):
        original, rest = prompt.text.split("\n\n# The same function with ")
        names, begun = rest.split(":\n\n", 1)
        old, new = names.split(" renamed to ")
        [left] = prompt.reference
        assert (begun + left).replace(new, old) == original.replace(new, old)
        assert 0.2 < len(begun) / len(begun + left) < 0.8
        assert len(tokenizer(prompt.text + left)["input_ids"]) < 1024


def test_multi_turn_has_turns() -> None:
    turns = [len(prompt.turns) for prompt in load("multi_turn")]
    assert set(turns) == {2, 3}
    assert {len(prompt.turns) for prompt in load("chat")} == {1}


def test_json_prompts_are_cut_inside_a_record() -> None:
    for prompt in load("json"):
        records, last = prompt.text.rsplit("\n", 1)
        values = json.loads(records.rstrip(",") + "]")
        assert all(list(a) == list(b) for a, b in pairwise(values))
        assert next(iter(json.loads(last.strip().rstrip(",") + "}"))) == next(iter(values[0]))


# --- files


def test_spec_bench_file(file: Path) -> None:
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Hello.", "And now?"]},
        {"question_id": 82, "category": "math", "turns": ["1 + 1?"], "reference": ["2"]},
        # some of its references say nothing about one of the turns
        {"question_id": 103, "category": "reasoning", "turns": ["Why?", "Why not?"],
         "reference": ["Because.", ""]},
        # and others name several answers
        {"question_id": 481, "category": "rag", "turns": ["Who sings?"],
         "reference": [["A bird", "A kettle"]]},
    ]  # fmt: skip
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    assert load(file) == [
        Prompt("81", "writing", ("Hello.", "And now?")), Prompt("82", "math", ("1 + 1?",), ("2",)),
        Prompt("103", "reasoning", ("Why?", "Why not?"), ("Because.", "")),
        Prompt("481", "rag", ("Who sings?",), ("A bird",)),
    ]  # fmt: skip
    assert load(str(file))[0].text == "Hello."


def test_named_column_passes_over_the_others(file: Path) -> None:
    file.write_text('{"body": "a\u2028b", "stars": 3}\n{"body": "c", "prompt": "d"}\n', "utf-8")
    assert load(file, column="body") == [
        Prompt("line-1", "", ("a\u2028b",)), Prompt("line-2", "", ("c",))
    ]  # fmt: skip


def test_column_that_is_not_there_is_named(file: Path) -> None:
    file.write_text('{"body": "a"}\n{"text": "b", "stars": 3}\n', "utf-8")
    with pytest.raises(InvalidArgumentError, match=r":2: unknown column 'body': .* text, stars$"):
        load(file, column="body")


def test_text_file_has_a_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("one\n\n  \ntwo words\n", encoding="utf-8")
    assert load(path) == [Prompt("line-1", "", ("one",)), Prompt("line-4", "", ("two words",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"some.jsonl:2: not JSON: Expecting property name"),
        ('["x"]', "some.jsonl:2: expected an object, got list"),
        ('{"prompt": "x", "mood": 1}', "some.jsonl:2: unknown column 'mood': expected prompt, tur"),
        ('{"id": "x"}', "some.jsonl:2: expected one of prompt, turns"),
        ('{"prompt": "x", "turns": ["x"]}', "some.jsonl:2: expected one of prompt, turns"),
        ('{"prompt": " "}', "some.jsonl:2: expected a text or a list of texts, none empty"),
        ('{"turns": []}', "some.jsonl:2: expected a text or a list"),
        ('{"turns": ["x", 3]}', "some.jsonl:2: expected a text or a list"),
        ('{"prompt": "x", "reference": 3}', "some.jsonl:2: reference: expected a text or a list"),
        ('{"prompt": "x", "reference": ["y", [3]]}', "some.jsonl:2: reference: expected a text or"),
        ('{"turns": ["x", ""], "reference": ["y", ""]}', "some.jsonl:2: expected a text or a list"),
        ('{"prompt": "x", "reference": "\\ud800"}', "some.jsonl:2: it is not UTF-8 text"),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "some.jsonl:2: .* nested too deep"),
        ('{"prompt": "\\ud800"}', "some.jsonl:2: it is not UTF-8 text"),
        ('{"prompt": "y", "id": 1}', "two have the id '1'"),
    ],
)
def test_malformed_line_is_named(file: Path, line: str, message: str) -> None:
    file.write_text(f'{{"prompt": "x", "id": "1"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=message):
        load(file)


def test_file_that_cannot_be_read_is_named(tmp_path: Path, file: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected a file or one of chat, copy_edits"):
        load("no_such_set")
    for name in ("empty.jsonl", "empty.txt"):
        (tmp_path / name).write_text(" \n\n", encoding="utf-8")
        with pytest.raises(InvalidArgumentError, match=rf"{name}': it is empty"):
            load(tmp_path / name)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgumentError, match="it is not UTF-8 text"):
        load(file)
    with pytest.raises(InvalidArgumentError, match="Is a directory"):
        load(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"column='x': expected a \.jsonl file"):
        load(tmp_path / "empty.txt", column="x")


# --- room


def test_prompts_beyond_the_context_are_counted_not_cut() -> None:
    some = [Prompt(str(n), "", ("x" * n,)) for n in (3, 9, 5, 12)] + [
        Prompt("two", "", ("xx", "x"))
    ]
    room = fitting(some, len, context=8, new_tokens=3)
    assert [prompt.id for prompt in room.kept] == ["3", "5"]
    assert room.too_long == [("9", 9), ("12", 12), ("two", 3)]
    assert room.note == (
        "3 of 5 prompts left out (up to 12 tokens; the context holds 8, with 3 new ones a turn): "
        "9, 12, two"
    )
    assert fitting(some, len, context=None, new_tokens=3).kept == some
    assert fitting(some, len, context=1, new_tokens=3).note.endswith("3, 9, 5, ...")
