"""Tuning: what is predicted from costs and acceptance, and the command around it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from specdec import Engine, SamplingParams
from specdec.cli.main import main
from specdec.errors import InvalidArgumentError
from specdec.evals.tuning import Finding, Setting, Tuner, Tuning, plot

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

PROMPTS = [[0, 45, 67, 89, 45, 67], [0, 200, 31, 200], [0, *range(20, 40), *range(20, 30)], [7, 8]]
GREEDY = SamplingParams(max_new_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def tuning(target: Model, draft: Model, one_thread: Iterator[None]) -> Tuning:
    del one_thread
    return Tuner(target, draft, PROMPTS, GREEDY, rounds=1).run()


def test_everything_that_was_timed_comes_first(tuning: Tuning) -> None:
    timed = [finding.measured is not None for finding in tuning.findings]
    assert timed == sorted(timed, reverse=True)
    speeds = [f.measured for f in tuning.findings if f.measured is not None]
    assert speeds == sorted(speeds, reverse=True)
    names = [f.setting.name for f in tuning.findings if f.measured is not None]
    assert {"plain", "draft, auto", "ngram, auto", "suffix, auto"} <= set(names)
    assert next(f.measured for f in tuning.findings if f.setting.name == "plain") == 1.0


def test_predicted_tokens_per_pass_are_those_of_a_run(
    tuning: Tuning, target: Model, draft: Model
) -> None:
    """At temperature 0 a shorter chain accepts just what the long one would have of it."""
    found = next(f for f in tuning.findings if f.setting.name == "draft 12")
    engine = Engine(target, draft=draft, num_draft_tokens=12, kv_memory=1 << 20)
    for index, prompt in enumerate(PROMPTS[:2]):
        engine.add_request(prompt, GREEDY, seed=index)
        list(engine)
    accepted, steps = engine.stats.accepted, engine.stats.steps
    assert found.tokens_per_pass == pytest.approx(1 + accepted / steps)
    lengths = [f.tokens_per_pass or 0 for f in tuning.findings if f.setting.name[:6] == "draft "]
    assert len(lengths) == 12
    assert max(lengths) == found.tokens_per_pass


def test_suffix_does_not_remember_the_round_before(tuning: Tuning, target: Model) -> None:
    timed = [
        f for f in tuning.findings
        if f.setting.name.startswith("suffix ") and f.measured is not None
    ]  # fmt: skip
    assert timed
    for found in timed:
        engine = Engine(
            target, kv_memory=1 << 20, proposer_options={"cache_tokens": 0},
            **found.setting.arguments,
        )  # fmt: skip
        for number, prompt in ((2, PROMPTS[2]), (2, PROMPTS[2]), (3, PROMPTS[3])):
            engine.add_request(prompt, GREEDY, seed=number)
            list(engine)
        assert found.measured_tokens_per_pass == engine.stats.tokens_per_target_pass


def test_best_is_a_setting_that_the_engine_takes(
    tuning: Tuning, target: Model, draft: Model
) -> None:
    content = json.loads(json.dumps(tuning.as_dict()))
    assert content["best"]["name"] == tuning.best.setting.name
    for finding in content["findings"]:
        its = finding["setting"]
        model = {"draft": draft} if its["uses_draft"] else {}
        Engine(target, kv_memory=1 << 20, **model, **its["arguments"])


def test_without_a_draft_only_lookups_are_looked_at(target: Model) -> None:
    tuning = Tuner(target, None, PROMPTS[:2], GREEDY, rounds=1).run()
    assert not any(finding.setting.uses_draft for finding in tuning.findings)


def test_one_prompt_is_not_enough(target: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="1 prompts: expected at least 2"):
        Tuner(target, None, PROMPTS[:1], GREEDY)


def test_plot_shows_what_was_predicted_and_measured(tuning: Tuning, tmp_path: Path) -> None:
    plot(tuning, tmp_path / "gain.svg")
    text = (tmp_path / "gain.svg").read_text()
    assert "<svg" in text


def test_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidArgumentError, match=r"pip install 'specdec\[report\]'"):
        plot(Tuning([Finding(Setting("plain", {}))], {}, {}), tmp_path / "x.png")


# --- the command


def test_command_prints_a_table_and_saves_all(models: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def quicksort(items):\n\nthe quick brown fox stop it stop it\n")
    saved = tmp_path / "tuned.json"
    result = CliRunner().invoke(
        main,
        ["tune", "--target", str(models / "target"), "--draft", str(models / "draft"),
         "--prompts", str(prompts), "--max-new-tokens", "8", "--rounds", "1",
         "--out", str(saved), "--plot", str(tmp_path / "gain.png")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "speed against plain decoding" in result.output
    assert "best: specdec.wrap(target" in result.output
    content = json.loads(saved.read_text())
    assert content["costs"]["draft"]["depths"][0] == 0
    assert (tmp_path / "gain.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-draft", "--draft", "small"], "--no-draft and --draft exclude each other"),
        (["--prompts", "nowhere.jsonl"], "prompts 'nowhere.jsonl': expected a file or one of"),
        (["--limit", "1"], "'--limit': 1 is not in the range x>=2."),
        (["--target", "nothing"], "--target 'nothing': no built-in model"),
    ],
)
def test_wrong_command_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["tune", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
