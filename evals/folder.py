"""The folder of a long run: its settings, and one JSON line per piece of work that is done, so that
a run that was interrupted goes on where it stood."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specdec.errors import InvalidArgumentError
from specdec.evals.provenance import provenance

FORMAT = 1
RUN, RECORDS, SUMMARY = "run.json", "records.jsonl", "summary.json"
Shape = Mapping[str, type]  # what a record must have under which names


class RunFolder:
    """Records of one run, in memory and, where a path is given, on disk as they come.

    A folder that exists is resumed where it holds a run of the same kind and settings. Raises
    InvalidArgumentError where it does not, and for a file in it that is damaged; a last line that
    was cut off by an interruption is dropped. shapes: those that a record can have; one that has
    none of them is somebody else's.
    """

    def __init__(
        self, path: Path | None, kind: str, settings: dict[str, Any], shapes: Sequence[Shape] = ()
    ) -> None:
        self.path, self.kind, self.shapes = path, kind, shapes
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.records: list[dict[str, Any]] = []
        self.sessions: list[dict[str, Any]] = []
        if path is None:
            self.sessions = [provenance()]
            return
        if path.exists():
            self._resume(path)
        path.mkdir(parents=True, exist_ok=True)
        self.sessions.append(provenance())
        head = {
            "format": FORMAT, "kind": kind, "settings": self.settings, "sessions": self.sessions,
        }  # fmt: skip
        (path / RUN).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")

    def _resume(self, path: Path) -> None:
        head = read_head(path)
        if head["kind"] != self.kind:
            raise InvalidArgumentError(
                f"--out {path}: it holds a run of specdec {head['kind']}, not of {self.kind}; name "
                "another folder"
            )
        before = head["settings"]
        for name in sorted({*before, *self.settings}):
            old, new = before.get(name), self.settings.get(name)
            if old != new:
                raise InvalidArgumentError(
                    f"--out {path}: its run has {name}={_short(old)}, this one {_short(new)}; name "
                    "another folder, or use the same settings to resume"
                )
        self.sessions = head["sessions"]
        self.records = read_records(path, self.shapes, repair=True)

    def append(self, record: dict[str, Any]) -> None:
        """Keeps one record, at once."""
        self.records.append(record)
        if self.path is not None:
            with (self.path / RECORDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes what came out."""
        if self.path is not None:
            text = json.dumps(summary, indent=1) + "\n"
            (self.path / SUMMARY).write_text(text, encoding="utf-8")


def read_head(path: Path) -> dict[str, Any]:
    """A run's kind, settings and sessions. Raises InvalidArgumentError where there are none."""
    if not path.is_dir() or not (path / RUN).is_file():
        raise InvalidArgumentError(
            f"--out {path}: it exists and is not the folder of a run; name another one"
        )
    try:
        head = json.loads((path / RUN).read_text(encoding="utf-8"))
        version = head["format"]
        for name, wanted in (("kind", str), ("settings", dict), ("sessions", list)):
            if not isinstance(head[name], wanted):
                raise ValueError(f"its {name} is no {wanted.__name__}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArgumentError(f"{path / RUN}: damaged: {error}") from error
    if version != FORMAT:
        raise InvalidArgumentError(f"{path / RUN}: format {version!r}: expected {FORMAT}")
    found: dict[str, Any] = head
    return found


def read_records(
    path: Path, shapes: Sequence[Shape] = (), *, repair: bool = False
) -> list[dict[str, Any]]:
    """The records so far. A last line without its end was cut off: it is passed over, and with
    repair taken out of the file. Raises InvalidArgumentError naming a line that is damaged, or that
    has none of the shapes where there are any."""
    file = path / RECORDS
    if not file.is_file():
        return []
    try:
        whole, cut, rest = file.read_text(encoding="utf-8").rpartition("\n")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{file}: it is not UTF-8 text") from error
    if repair and rest:
        file.write_text(whole + cut, encoding="utf-8")
    records = []
    for number, line in enumerate(whole.split("\n") if whole else [], 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"{file}:{number}: not JSON") from error
        if not isinstance(record, dict):
            raise InvalidArgumentError(f"{file}:{number}: expected an object")
        if shapes and not any(_has(record, shape) for shape in shapes):
            expected = ", or ".join(", ".join(shape) for shape in shapes)
            raise InvalidArgumentError(
                f"{file}:{number}: it is no record of this run: expected {expected}"
            )
        records.append(record)
    return records


def _has(record: dict[str, Any], shape: Shape) -> bool:
    return all(isinstance(record.get(name), kind) for name, kind in shape.items())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
