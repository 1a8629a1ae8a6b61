"""Answer files as Spec-Bench's scoring scripts read them (Xia et al. 2024, 2401.07851)."""

import json
import re
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.evals import prompts as prompt_sets
from specdec.evals.bench import Dialogue, Task
from specdec.evals.contenders import Turn


def write_answers(
    folder: Path, model: str, summary: dict[str, Any], records: Sequence[dict[str, Any]],
    tasks: Sequence[Task], dialogue: Dialogue,
) -> list[Path]:  # fmt: skip
    """One file per row that was lossless, one line per question, one choice per round.

    new_tokens, decoding_steps and wall_time are per turn; accept_lengths has the tokens of every
    pass of the target, over all turns. Lines are sorted by question.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for row in summary["rows"]:
        if not row["lossless"]["passed"]:
            continue
        name = f"{model}-{row['name']}"
        its = [record for record in records if record["row"] == row["name"]]
        lines = [
            _answer(name, task, [r for r in its if r["task"] == index], dialogue)
            for index, task in enumerate(tasks)
        ]
        lines.sort(key=lambda line: (str(type(line["question_id"])), line["question_id"]))
        path = folder / (_slug(name) + ".jsonl")
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        paths.append(path)
    return paths


def _answer(
    model: str, task: Task, records: Sequence[dict[str, Any]], dialogue: Dialogue
) -> dict[str, Any]:
    name = task.prompt.id
    return {
        "question_id": int(name) if name.isdecimal() else name,
        "category": task.set if task.set in prompt_sets.names() else task.prompt.source,
        "answer_id": uuid.uuid4().hex[:22],
        "model_id": model,
        "choices": [
            _choice(index, record, dialogue)
            for index, record in enumerate(sorted(records, key=lambda r: int(r["round"])))
        ],
        "tstamp": time.time(),
    }


def _choice(index: int, record: dict[str, Any], dialogue: Dialogue) -> dict[str, Any]:
    turns = [Turn.of(turn) for turn in record["turns"]]
    return {
        "index": index,
        "turns": [dialogue.text(turn.tokens) for turn in turns],
        "decoding_steps": [len(turn.emitted) for turn in turns],
        "new_tokens": [len(turn.tokens) for turn in turns],
        "wall_time": [turn.seconds for turn in turns],
        "accept_lengths": [count for turn in turns for count in turn.emitted],
    }


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
