"""What a report shows of each run: facts, tables, plots, and a generation token by token."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.errors import InvalidArgumentError
from specdec.evals import plots
from specdec.evals.folder import RUN, SUMMARY, read_head
from specdec.evals.plots import Series, through
from specdec.evals.results_page import origin
from specdec.evals.results_sections import bench_settings
from specdec.evals.token_view import TokenView, token_view
from specdec.evals.trace import TRACES

Raw = dict[str, Any]
Points = dict[str, list[tuple[float, float]]]  # by kind of draft: its length, and a figure


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under heads, as they are shown."""

    title: str
    heads: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture; draw() makes it, where the report has pictures."""

    title: str
    note: str
    draw: Callable[[], str]


@dataclass(slots=True)
class Part:
    """What one run has to show."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)  # settings and provenance
    warnings: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    views: list[TokenView] = field(default_factory=list)


def read(path: Path) -> Part:
    """The part of one run: a folder of `bench --out` or `eval --out`, or a file of `tune --out`.
    Raises InvalidArgumentError for anything else, and for a run that is not finished."""
    if path.is_dir() and (path / RUN).is_file():
        kind = read_head(path)["kind"]
        if kind not in _READERS:
            raise InvalidArgumentError(
                f"{path}: a run of specdec {kind}; a report shows {', '.join(_READERS)}"
            )
        if not (path / SUMMARY).is_file():
            raise InvalidArgumentError(
                f"{path}: the run is not finished; run specdec {kind} again with the same --out"
            )
        with _whole(path / SUMMARY):
            part = _READERS[kind](path.name, _json(path / SUMMARY))
        if (path / TRACES).is_file():
            with _whole(path / TRACES):
                part.views = [token_view(found) for found in _json(path / TRACES)["traces"]]
        return part
    if path.is_file():
        raw = _json(path)
        if isinstance(raw, dict) and "findings" in raw:
            with _whole(path):
                return tune_part(path.name, raw)
    raise InvalidArgumentError(
        f"{path}: expected a folder of specdec bench --out or eval --out, or a file of tune --out"
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InvalidArgumentError(f"{path}: cannot be read: {error}") from error


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """A file whose figures are missing, or are no figures, is named."""
    try:
        yield
    except InvalidArgumentError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InvalidArgumentError(f"{path}: damaged, or of another version: {what}") from error


# --- what a run of each kind shows


def bench_part(name: str, raw: Raw) -> Part:
    """Speeds, tokens per pass by set, stages, and how deep drafts are accepted."""
    rows, settings = raw["rows"], raw["settings"]
    part = Part(f"bench: {name}", _facts(raw, bench_settings(settings)))
    if settings["random_weights"]:
        part.warnings.append(
            f"Random weights of the shape {settings['random_weights']}, random prompts: this is "
            "the speed of the system, not of a model."
        )
    part.warnings += sorted({f"{row['name']}: {row['label']}" for row in rows if row["label"]})
    part.warnings += [
        f"{row['name']} is not lossless and has no speed: {row['lossless']['note']}"
        for row in rows
        if not row["lossless"]["passed"]
    ]
    baselines = list(dict.fromkeys(b for row in rows for b in row["speed_against"]))
    part.tables.append(
        Table(
            "Speed: median (20th to 80th percentile)",
            ["", "tokens/s", *(f"against {b}" for b in baselines), "tokens per pass",
             "acceptance rate", "lossless"],
            [
                [row["name"], _spread(row["tokens_per_second"]),
                 *(_spread(row["speed_against"].get(b)) for b in baselines),
                 row["tokens_per_pass"], row["acceptance_rate"], row["lossless"]["note"]]
                for row in rows
            ],
        )
    )  # fmt: skip
    sets = list(dict.fromkeys(name for row in rows for name in row["tokens_per_pass_by_set"]))
    ours = [row for row in rows if row["drafted"]]
    part.tables.append(
        Table(
            "Tokens per target pass by prompt set",
            ["", *sets],
            [[row["name"], *(row["tokens_per_pass_by_set"].get(s) for s in sets)] for row in ours],
        )
    )
    if ours:
        part.plots += _bench_plots(rows, ours, sets)
    return part


def _bench_plots(rows: list[Raw], ours: list[Raw], sets: list[str]) -> list[Plot]:
    by_set = {s: {row["name"]: row["tokens_per_pass_by_set"].get(s, 0.0) for row in ours}
              for s in sets}  # fmt: skip
    depths = [
        Series(row["name"], range(1, len(row["passes_by_depth"]) + 1), row["passes_by_depth"],
               colour=i)
        for i, row in enumerate(ours) if row["passes_by_depth"]
    ]  # fmt: skip
    found = [
        Plot("Tokens per target pass by prompt set", "", lambda: plots.bars(
            by_set, y="tokens per target pass")),
        Plot("Acceptance by position", "Share of passes that drafted which kept at least so many "
             "drafted tokens.", lambda: plots.lines(
                 depths, x="drafted tokens kept", y="share of passes", top=1.05)),
    ]  # fmt: skip
    stages = {
        row["name"]: {k: v / row["tokens"] * 1e3 for k, v in row["seconds"].items()}
        for row in rows if row["ours"] and row["seconds"]
    }  # fmt: skip
    if stages:
        found.append(
            Plot("Time per stage", "Milliseconds per generated token.",
                 lambda: plots.stacked(stages, x="ms per token"))
        )  # fmt: skip
    lengths = _by_length(
        (row["name"], row["speed_against"].get("specdec plain", {}).get("median")) for row in rows
    )
    if any(len(points) > 1 for points in lengths.values()):
        predicted = _by_length((row["name"], row.get("predicted_speed")) for row in rows)
        found.append(_speed_plot(predicted, lengths))
    return found


def _speed_plot(predicted: Points, measured: Points) -> Plot:
    """Speed over draft length, by kind of draft."""
    series = []
    for i, kind in enumerate(dict.fromkeys([*predicted, *measured])):
        if kind in predicted:
            series.append(through(f"{kind}, predicted", predicted[kind], i))
        if kind in measured:
            series.append(through(f"{kind}, measured", measured[kind], i, joined=False))
    return Plot(
        "Speed against draft length", "Lines are the cost model's, dots were timed.",
        lambda: plots.lines(series, x="drafted tokens", y="speed against plain"),
    )  # fmt: skip


def eval_part(name: str, raw: Raw) -> Part:
    """Acceptance rates with intervals, overlap, calibration, and predictions."""
    rows = raw["rows"]
    part = Part(f"eval: {name}", _facts(raw, ""))
    heads = ["", "acceptance rate", "overlap", "tokens per pass", "cost ratio", "predicted speed",
             "measured speed"]  # fmt: skip
    keys = ("acceptance_rate", "overlap", "tokens_per_target_pass", "cost_ratio",
            "predicted_speed", "measured_speed")  # fmt: skip
    part.tables += [
        Table("Acceptance: value ± standard error", heads,
              [[row["name"], *(_figure(row, key) for key in keys)] for row in rows]),
        Table("The draft by itself: value ± standard error",
              ["", "entropy, nats", "calibration error", "both are of"],
              [[row["name"], _figure(row, "draft_entropy"), _figure(row, "calibration"),
                row.get("draft_law") or "-"] for row in rows]),
    ]  # fmt: skip
    sets = list(dict.fromkeys(s for row in rows for s in row["by_set"]))
    per_set = {s: {row["name"]: _value(row["by_set"][s]["tokens_per_target_pass"])
                   for row in rows if s in row["by_set"]} for s in sets}  # fmt: skip
    part.tables.append(
        Table("Tokens per target pass by prompt set", ["", *sets],
              [[row["name"], *(_estimate(row["by_set"].get(s, {}).get("tokens_per_target_pass"))
                               for s in sets)] for row in rows])
    )  # fmt: skip
    for key, what in (("acceptance_by_position", "position"), ("acceptance_by_rank", "rank")):
        series = [_curve(row["name"], row[key], i) for i, row in enumerate(rows) if row[key]]
        if series:
            part.plots.append(
                Plot(f"Acceptance by {what}", "With 95 % intervals where they are known.",
                     lambda series=series, what=what:  # type: ignore[misc]
                     plots.lines(series, x=what, y="acceptance", top=1.05))
            )  # fmt: skip
    part.plots.append(
        Plot("Tokens per target pass by prompt set", "",
             lambda: plots.bars(per_set, y="tokens per target pass"))
    )  # fmt: skip
    calibrated = [
        Series(row["name"], [b["confidence"] for b in row["calibration"]["bins"]],
               [b["target"] for b in row["calibration"]["bins"]], colour=i)
        for i, row in enumerate(rows) if row.get("calibration")
    ]  # fmt: skip
    if calibrated:
        part.plots.append(
            Plot("Calibration of the draft", "What the target gives the draft's best token; of "
                 "a greedy target, how often it agrees.",
                 lambda: plots.lines(calibrated, x="confidence of the draft",
                                     y="probability in the target", top=1.05))
        )  # fmt: skip
    return part


_LONG = {"ngram", "suffix", "draft"}  # chains that tell of every shorter one


def tune_part(name: str, raw: Raw) -> Part:
    """Predicted and measured speed of every setting, over the draft length where it has one."""
    findings = raw["findings"]
    part = Part(f"tune: {name}", [*_facts(raw, ""), ("best", raw["best"]["name"])])
    part.tables.append(
        Table(
            "Speed against plain decoding",
            ["", "tokens per pass, predicted", "measured", "speed, predicted", "measured"],
            [
                [f["setting"]["name"], f["tokens_per_pass"], f["measured_tokens_per_pass"],
                 f["predicted"], f["measured"]]
                for f in findings if f["measured"] is not None
            ],
        )
    )  # fmt: skip
    if raw.get("predicted_best"):
        part.tables.append(
            Table(
                "Most promising by batch and context, predicted",
                ["batch", "context", "setting", "speed"],
                [
                    [its["batch"], its["context"], its["setting"]["name"], its["predicted"]]
                    for its in raw["predicted_best"]
                ],
            )
        )
        part.tables += [
            Table(
                f"Seconds of a step: {kind}", ["batch", "context", "rows", "draft", "verify"],
                [
                    [its["batch"], its["context"], rows, f"{draft:.5f}", f"{verify:.5f}"]
                    for its in every
                    for rows, draft, verify in zip(
                        its["rows"], its["draft"], its["verify"], strict=True
                    )
                ],
            )
            for kind, every in raw["costs"].items()
        ]  # fmt: skip
    predicted = _by_length((f["setting"]["name"], f["predicted"]) for f in findings)
    measured = _by_length((f["setting"]["name"], f["measured"]) for f in findings)
    if predicted:
        part.plots.append(_speed_plot(predicted, measured))
    by_position = [
        Series(kind, range(1, len(its["acceptance_by_position"]) + 1),
               its["acceptance_by_position"], colour=i)
        for i, (kind, its) in enumerate(raw["acceptance"].items())
        if kind in _LONG and its.get("acceptance_by_position")
    ]  # fmt: skip
    if by_position:
        part.plots.append(
            Plot("Acceptance by position", "", lambda: plots.lines(
                by_position, x="position", y="acceptance", top=1.05))
        )  # fmt: skip
    return part


_READERS: dict[str, Callable[[str, Raw], Part]] = {"bench": bench_part, "eval": eval_part}


def _facts(raw: Raw, what: str) -> list[tuple[str, str]]:
    """What was run, with what, where."""
    settings = raw["settings"]
    facts = [("run", what)] if what else []
    for role in ("target", "draft"):
        its = settings.get(role)
        if isinstance(its, dict) and "sha256" in its:
            facts.append((role, f"{its['name']}: {its['class']}, {its['parameters']} parameters, "
                                f"{its['dtype']}, SHA-256 {its['sha256']}"))  # fmt: skip
    facts += [(key, str(settings[key])) for key in ("seed", "device", "threads") if key in settings]
    facts += [("session", origin({"provenance": session})) for session in raw["sessions"]]
    if "prompts" in settings and isinstance(settings["prompts"], list):
        counts = Counter(p[0] if isinstance(p, list) else str(p) for p in settings["prompts"])
        facts.append(("prompts", ", ".join(f"{name} {count}" for name, count in counts.items())))
    facts += [(f"left out: {name}", why) for name, why in (raw.get("left_out") or {}).items()]
    return facts


def _spread(found: Raw | None) -> str:
    if found is None:
        return "-"
    return f"{found['median']:.2f} ({found['p20']:.2f} to {found['p80']:.2f})"


def _value(found: Any) -> float:
    if isinstance(found, dict):
        found = next((found[key] for key in ("value", "median", "error") if key in found), None)
    return 0.0 if found is None else float(found)


def _figure(row: Raw, key: str) -> str:
    """One of an evaluation, or why there is none."""
    found = row.get(key)
    if found is None and key in row.get("undefined", {}):
        return f"none: {row['undefined'][key]}"
    return _estimate(found)


def _estimate(found: Any) -> str:
    """A number, or an estimate with its standard error."""
    if found is None:
        return "-"
    if isinstance(found, dict) and found.get("standard_error") is not None:
        return f"{found['value']:.3f} ± {found['standard_error']:.3f}"
    return f"{_value(found):.3f}"


def _curve(name: str, found: Sequence[Any], colour: int) -> Series:
    known = [f for f in found if f is not None]
    values = [_value(f) for f in known]
    ends = [tuple(f["interval"]) if f.get("interval") else (v, v)
            for f, v in zip(known, values, strict=True)]  # fmt: skip
    return Series(name, range(1, len(values) + 1), values, ends, colour=colour)


def _by_length(rows: Any) -> Points:
    """(name with a draft length at its end, speed) -> points by kind."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, speed in rows:
        match = re.fullmatch(r"(?:specdec )?([a-z_,]+)[ :](\d+)", name)
        if match and speed is not None:
            found.setdefault(match[1], []).append((int(match[2]), speed))
    return {kind: sorted(points) for kind, points in found.items()}
