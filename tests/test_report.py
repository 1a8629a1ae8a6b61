"""The report: what it shows of each kind of run, that texts cannot break out, what it refuses."""

import json
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from specdec import Engine, SamplingParams
from specdec.cli.main import main
from specdec.errors import InvalidArgumentError
from specdec.evals import plots
from specdec.evals.folder import RunFolder
from specdec.evals.plots import Series, lines, through
from specdec.evals.report import html, markdown, write
from specdec.evals.report_parts import eval_part, read, tune_part
from specdec.evals.token_view import token_view
from specdec.evals.trace import TARGET, trace

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

EVIL = "<script>alert(1)</script>"


class Reader(HTMLParser):
    """Every tag of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "path", "use", "rect", "line"):
            self.open.append(tag)
        self.addresses += [v or "" for name, v in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench with a trace."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": f"stop it {EVIL}"}) + "\n")
    result = CliRunner().invoke(
        main,
        ["bench", "--target", str(models / "target"), "--draft", str(models / "draft"),
         "--prompts", str(prompts), "--max-new-tokens", "10", "--rounds", "1", "--device", "cpu",
         "--no-transformers", "--proposer", "draft:2", "--proposer", "draft:3",
         "--proposer", "tree:2,1", "--out", str(folder / "run"), "--trace"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_a_bench_becomes_one_page_that_needs_nothing_else(run: Path, tmp_path: Path) -> None:
    write([read(run)], tmp_path / "r.html", "Speed & more")
    page = Reader((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "Speed & more" in page.text
    assert page.tags.count("svg") >= 4
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "link" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert not page.open
    for words in ("specdec tree:2,1", "Time per stage", "Acceptance by position", "SHA-256",
                  "Speed against draft length", "Tokens per target pass by prompt set",
                  "Token by token", "not run on a GPU"):  # fmt: skip
        assert words in page.text
    assert EVIL in page.text  # as text, in the prompt of the trace


def test_speed_against_draft_length_has_the_cost_model_beside_it(run: Path) -> None:
    rows = {row["name"]: row for row in json.loads((run / "summary.json").read_text())["rows"]}
    for name in ("specdec draft:2", "specdec draft:3"):
        assert 0.1 < rows[name]["predicted_speed"] < 4
    assert rows["specdec tree:2,1"]["predicted_speed"] is None  # of no one length
    assert rows["specdec plain"]["predicted_speed"] is None
    [plot] = [plot for plot in read(run).plots if plot.title == "Speed against draft length"]
    svg = plot.draw()
    assert "draft, predicted" in svg
    assert "draft, measured" in svg


def test_markdown_holds_the_tables_and_no_markup_from_files(run: Path) -> None:
    part = read(run)
    part.title = "bench: <b>*x*</b>"
    text = markdown([part], "Report")
    assert "| specdec draft:3 | " in text
    assert "proposed by" in text
    assert "\\<b\\>\\*x\\*\\</b\\>" in text


def test_what_is_synthetic_or_refused_is_said_first(run: Path, tmp_path: Path) -> None:
    raw = json.loads((run / "summary.json").read_text())
    raw["rows"][1]["label"] = "synthetic draft, acceptance 0.8"
    raw["rows"][2]["lossless"] = {"passed": False, "note": "not the target's own"}
    raw["rows"][2] |= {"tokens_per_second": None, "speed_against": {}, "seconds": None}
    raw["settings"]["random_weights"] = "llama-3-8b"
    folder = tmp_path / "run"
    RunFolder(folder, "bench", raw["settings"]).finish(raw)
    part = read(folder)
    assert any("Random weights" in warning for warning in part.warnings)
    assert any("synthetic draft, acceptance 0.8" in warning for warning in part.warnings)
    assert any("is not lossless and has no speed" in warning for warning in part.warnings)
    page = html([part], "x")
    assert page.index("is not lossless") < page.index("<table>")


# --- traces


def test_a_trace_tells_who_proposed_what(target: Model, draft: Model, tokenizer: Any) -> None:
    sampling = SamplingParams(max_new_tokens=20, temperature=0)
    prompt = [0, 45, 67, 89, 45, 67]
    engine = Engine(target, grow=True, draft=draft, proposer=["draft", "ngram"],
                    num_draft_tokens=4)  # fmt: skip
    verifier = engine.verifier
    found = trace(engine, prompt, sampling, 0)
    assert engine.verifier is verifier
    engine.add_request(prompt, sampling, seed=0)
    [plain] = list(engine)
    assert tuple(t for step in found.steps for t in step.emitted) == plain.token_ids
    for step in found.steps:
        kept = [node for node in step.nodes if node.accepted]
        assert [n.token for n in kept] == list(step.emitted)[: len(kept)]
        assert [n.by for n in kept] == list(step.by)[: len(kept)]
        assert len(step.by) == len(step.emitted)
        for node in step.nodes:
            assert node.by
            assert set(node.by) <= {"draft", "ngram"}
            assert 0 <= node.target <= 1
            assert node.accepted <= (node.parent < 0 or step.nodes[node.parent].accepted)
    assert any(by == (TARGET,) for step in found.steps for by in step.by)
    assert set(found.as_dict(tokenizer)["texts"]) == {
        str(t)
        for t in (*prompt, *plain.token_ids, *(n.token for s in found.steps for n in s.nodes))
    }


def test_probabilities_are_those_of_the_laws(target: Model, draft: Model) -> None:
    sampling = SamplingParams(max_new_tokens=12, temperature=0.8)
    prompt = [0, 45, 67]
    engine = Engine(target, grow=True, draft=draft, num_draft_tokens=2)
    found = trace(engine, prompt, sampling, 3)
    text = list(prompt)
    for step in found.steps:
        for node in step.nodes[:1]:
            for model, said in ((target, node.target), (draft, node.draft)):
                logits = model(torch.tensor([text])).logits[0, -1].detach()
                assert said == pytest.approx(
                    float((logits / 0.8).softmax(-1)[node.token]), abs=1e-4
                )
        text += step.emitted


def test_a_tree_is_drawn_without_crossing_lines(target: Model, draft: Model) -> None:
    engine = Engine(target, grow=True, draft=draft, tree=(2, 2, 1), policy="constant")
    found = trace(engine, [0, 45], SamplingParams(max_new_tokens=9, temperature=0), 0)
    view = token_view(
        {"row": "tree", "set": "s", "prompt": "p", "trace": json.loads(
            json.dumps(found.as_dict(None)))}
    )  # fmt: skip
    for step, shown in zip(found.steps, view.steps, strict=True):
        places = [(node.x, node.y) for node in shown.nodes]
        assert len(set(places)) == len(places)
        for node, drawn in zip(step.nodes, shown.nodes, strict=True):
            assert drawn.accepted == node.accepted
            assert drawn.x + 120 <= shown.width
            assert 0 < drawn.y < shown.height
            if node.parent >= 0:
                assert drawn.x > places[node.parent][0]
                assert drawn.y >= places[node.parent][1]
    assert len(view.tokens) == 9
    drafted = sum(len(step.nodes) for step in found.steps)
    assert view.counts[1][0][:2] == ["tree", drafted]


# --- other runs


def test_a_tuning_shows_predictions_as_lines_and_measurements_as_dots() -> None:
    def finding(name: str, predicted: float | None, measured: float | None) -> dict[str, Any]:
        return {"setting": {"name": name}, "tokens_per_pass": 2.0, "predicted": predicted,
                "measured": measured, "measured_tokens_per_pass": 2.0}  # fmt: skip

    part = tune_part("t.json", {
        "best": {"name": "draft 2"}, "settings": {"device": "cpu"}, "sessions": [],
        "findings": [finding("draft 2", 1.4, 1.3), finding("draft 1", 1.2, None),
                     finding("plain", 1.0, 1.0), finding("draft, auto", None, 1.2)],
        "acceptance": {"draft": {"acceptance_by_position": [0.6, 0.4]}, "tree": {}},
        "predicted_best": [{"batch": 4, "context": 64, "setting": {"name": "draft 1"},
                            "predicted": 1.1}],
        "costs": {"draft": [{"batch": 4, "context": 64, "rows": [1, 2], "draft": [0.0, 0.001],
                             "verify": [0.002, 0.003]}]},
    })  # fmt: skip
    assert part.tables[1].rows == [[4, 64, "draft 1", 1.1]]
    assert part.tables[2].rows[1] == [4, 64, 2, "0.00100", "0.00300"]
    assert [row[0] for row in part.tables[0].rows] == ["draft 2", "plain", "draft, auto"]
    assert ("device", "cpu") in part.facts
    svg = part.plots[0].draw()
    assert "draft, predicted" in svg
    assert "draft, measured" in svg
    dots = lines([through("a", [(1, 1), (2, 1.5)], 0, joined=False)], x="x", y="y")
    joined = lines([through("a", [(1, 1), (2, 1.5)], 0)], x="x", y="y")
    assert joined.count("clip-path") > dots.count("clip-path")  # a line is clipped to the axes
    assert part.plots[1].title == "Acceptance by position"


def test_an_evaluation_shows_rates_with_their_errors() -> None:
    rate = {"value": 0.5, "standard_error": 0.05, "interval": [0.4, 0.6], "clusters": 9}
    alone = {"value": 0.25, "standard_error": None, "interval": None, "clusters": 1}
    row = {
        "name": "draft 4", "acceptance_rate": rate, "overlap": rate, "draft_entropy": None,
        "tokens_per_target_pass": alone, "acceptance_by_position": [rate, alone, None],
        "acceptance_by_rank": [], "by_set": {"json": {"tokens_per_target_pass": rate}},
        "calibration": {"error": 0.1, "bins": [{"confidence": 0.3, "target": 0.2, "places": 4}]},
        "cost_ratio": 0.1, "predicted_speed": 1.5, "measured_speed": {"median": 1.4},
        "draft_law": "of tables", "undefined": {"draft_entropy": "it looked"},
    }  # fmt: skip
    raw = {"rows": [row], "settings": {"seed": 0}, "sessions": [], "left_out": {"x": "no room"}}
    part = eval_part("run", raw)
    assert part.tables[0].rows[0] == [
        "draft 4", "0.500 ± 0.050", "0.500 ± 0.050", "0.250", "0.100", "1.500", "1.400",
    ]  # fmt: skip
    assert part.tables[1].rows[0] == ["draft 4", "none: it looked", "0.100", "of tables"]
    assert ("left out: x", "no room") in part.facts
    assert len(part.plots) == 3
    page = Reader(html([part], "x"))
    assert "svg" in page.tags
    assert "none: it looked" in page.text


# --- pictures


def test_plots_are_whole_svg_in_the_colour_of_the_page() -> None:
    two = [Series("a<b", [1, 2], [0.5, 0.2], [(0.4, 0.6), (0.1, 0.3)]), Series("b", [1], [3.0])]
    drawn = [
        plots.lines(two, x="x & y", y="y"),
        plots.bars({"s": {"a": 1.0, "b": 2.0}, "t": {"b": 3.0}}, y="y"),
        plots.stacked({"row": {"draft": 1.0, "verify": 2.0}}, x="ms"),
    ]
    for svg in drawn:
        ElementTree.fromstring(svg)
        assert "currentColor" in svg
        assert "#010203" not in svg
    assert "a&lt;b" in drawn[0]
    assert drawn[0] == plots.lines(two, x="x & y", y="y")  # the same bytes from the same figures


# --- what is refused


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(main, ["report", str(run), "--out", str(tmp_path / "r.html")])
    assert result.exit_code == 2
    assert f"specdec: the report needs {module}: pip install 'specdec[report]'" in result.output


def test_command_writes_both_kinds(run: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "r.html", tmp_path / "r.md"]
    command = ["report", str(run), "--title", "Mine", *(f"--out={path}" for path in outputs)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert [path.read_text(encoding="utf-8").count("Mine") for path in outputs] == [2, 1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", '{"settings": {}, "sessions": []}'),
        ("summary.json", "[]"),
        ("summary.json", "3"),
        ("summary.json", '{"rows": [3], "settings": {}, "sessions": []}'),
        ("summary.json", "[" * 100_000 + "]" * 100_000),
        ("traces.json", "{}"),
        ("traces.json", "[]"),
        ("traces.json", '{"traces": [{"row": "a"}]}'),
    ],
)
@pytest.mark.parametrize("kind", ["bench", "eval"])
def test_file_without_its_figures_is_named(
    run: Path, tmp_path: Path, kind: str, name: str, content: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    if name == "summary.json":
        head = json.loads((run / "run.json").read_text()) | {"kind": kind}
        (tmp_path / "run" / "run.json").write_text(json.dumps(head))
    (tmp_path / "run" / name).write_text(content)
    result = CliRunner().invoke(main, ["report", str(tmp_path / "run"), "--out", "x.md"])
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert f"{tmp_path / 'run' / name}: " in result.output


def test_tuning_without_its_figures_is_named(tmp_path: Path) -> None:
    (tmp_path / "tune.json").write_text('{"findings": []}')
    with pytest.raises(InvalidArgumentError, match=r"tune.json: damaged"):
        read(tmp_path / "tune.json")


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    (tmp_path / "y.json").write_text("{")
    for path, message in (
        (tmp_path, "expected a folder of specdec bench --out"),
        (tmp_path / "x.json", "expected a folder of specdec bench --out"),
        (tmp_path / "y.json", "cannot be read"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            read(path)
    RunFolder(tmp_path / "half", "bench", {})
    with pytest.raises(InvalidArgumentError, match="not finished; run specdec bench again"):
        read(tmp_path / "half")
    RunFolder(tmp_path / "other", "verify", {})
    with pytest.raises(InvalidArgumentError, match="a run of specdec verify; a report shows"):
        read(tmp_path / "other")
    with pytest.raises(InvalidArgumentError, match=r"ends in \.html or \.md"):
        write([read(run)], tmp_path / "r.pdf", "x")
    result = CliRunner().invoke(main, ["bench", "--trace"])
    assert result.exit_code == 2
    assert "--trace: expected --out FOLDER" in result.output
