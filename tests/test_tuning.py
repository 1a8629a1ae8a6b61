"""Tuning: what is predicted from costs and acceptance, and the command around it."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import Engine, SamplingParams, profiling
from specdec.cli.main import main
from specdec.cli.recipe import Recipe
from specdec.costs import StepCosts
from specdec.errors import InvalidArgumentError
from specdec.evals.candidates import (
    Candidate,
    Place,
    Setting,
    by_lengths,
    depth_of,
    of_tree,
    shortened,
)
from specdec.evals.tree_rates import PROBE, by_depth_and_rank, refined
from specdec.evals.tuning import Finding, Tuner, Tuning, plot
from specdec.stats import RunStats
from specdec.zoo.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

PROMPTS = [[0, 45, 67, 89, 45, 67], [0, 200, 31, 200], [0, *range(20, 40), *range(20, 30)], [7, 8]]
GREEDY = SamplingParams(max_new_tokens=24, temperature=0)


@pytest.fixture(scope="module", autouse=True)
def roughly() -> Iterator[None]:
    """Costs of a few steps: what they are is not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "profile", partial(profiling.profile, seconds=0.02))
        yield


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """A model is proved to run on packed rows once per object, which takes a while."""
    real = AutoModelForCausalLM.from_pretrained

    @cache
    def known(where: str) -> Any:
        return real(where, output_loading_info=True)

    def load(where: object, *, output_loading_info: bool = False, **_: object) -> Any:
        both = known(str(where))
        return both if output_loading_info else both[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", load)
        yield


@pytest.fixture(scope="module")
def tuning(target: Model, draft: Model, one_thread: Iterator[None]) -> Tuning:
    del one_thread
    tuner = Tuner(
        target, draft, PROMPTS, GREEDY, rounds=1, batches=(1, 2), contexts=(96,), progress=shown
    )
    return tuner.run()


BARS: list[tuple[str, int, int]] = []  # label, item, of how many


def shown(items: Sequence[Any], label: str) -> Iterator[Any]:
    for done, item in enumerate(items, 1):
        yield item
        BARS.append((label, done, len(items)))


def test_everything_that_was_timed_comes_first(tuning: Tuning) -> None:
    timed = [finding.measured is not None for finding in tuning.findings]
    assert timed == sorted(timed, reverse=True)
    speeds = [f.measured for f in tuning.findings if f.measured is not None]
    assert speeds == sorted(speeds, reverse=True)
    names = [f.setting.name for f in tuning.findings if f.measured is not None]
    assert {"plain", "draft, auto"} <= set(names)
    assert len(names) > 5
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
    lengths = [
        f.tokens_per_pass or 0
        for f in tuning.findings if re.fullmatch(r"draft \d+", f.setting.name)
    ]  # fmt: skip
    assert len(lengths) == 12
    assert max(lengths) == found.tokens_per_pass


def test_suffix_does_not_remember_the_round_before(tuning: Tuning, target: Model) -> None:
    timed = [
        f for f in tuning.findings
        if f.setting.name.startswith("suffix ") and f.measured is not None
    ]  # fmt: skip
    assert timed
    for found in timed:
        assert found.setting.arguments["proposer_options"] == {"cache_tokens": 0}
        engine = Engine(target, kv_memory=1 << 20, **found.setting.arguments)
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
    assert [place["batch"] for place in content["predicted_best"]] == [1, 1, 2]


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


# --- predictions

COSTS = StepCosts(
    1, 64, (0, 1, 2, 4), (1, 2, 3, 5), (0.0, 1.0, 2.0, 4.0), (10.0, 11.0, 12.0, 14.0), catch_up=0.5
)
HOME = Place(1, 64)


def test_gain_is_tokens_over_what_their_steps_cost() -> None:
    drafted = {0: 1, 4: 3}
    mean = (10 + 3 * (14 + 4)) / 4
    seconds = by_lengths(drafted, lambda nodes: nodes, drafts=True)
    its = Candidate(Setting("draft 4", {}), "draft", 3.0, seconds, {HOME: COSTS})
    assert its.gains == {HOME: pytest.approx(3 * 10 / mean)}
    assert by_lengths(drafted, lambda nodes: nodes, drafts=False)(COSTS, 64) == 13
    # levels of one and two rows; the four nodes and the root
    assert of_tree((-1, -1, 0, 1))(COSTS, 64) == pytest.approx(1 + 1.5 + 14)


def test_shortened_chains_lose_what_was_accepted_behind_their_end() -> None:
    stats = RunStats(steps=4)
    stats.accepted_lengths.update({0: 1, 2: 2, 5: 1})
    stats.drafted_lengths.update({5: 3, 1: 1})
    assert shortened(stats, 2) == (1 + (2 + 2 + 2) / 4, {2: 3, 1: 1})
    assert shortened(stats, 5) == (1 + 9 / 4, {5: 3, 1: 1})


def test_depth_of_a_draft_by_its_nodes(target: Model, draft: Model) -> None:
    engine = Engine(target, draft=draft, tree=(2, 1), kv_memory=1 << 20)
    assert engine.proposer is not None
    assert [depth_of(engine.proposer, 3)(nodes) for nodes in (0, 1, 2, 3, 4, 9)] == [
        0, 1, 1, 2, 2, 3,
    ]  # fmt: skip


def test_second_tree_counts_where_it_has_nodes() -> None:
    wide, second = RunStats(), RunStats()
    wide.ranks.update({(1, 2, 1): 5, (1, 2, 2): 1, (1, 2, 0): 4, (2, 2, 1): 2, (2, 2, 2): 2})
    second.ranks.update({(1, 1, 1): 3, (1, 1, 0): 1})
    rough = by_depth_and_rank(wide)
    assert rough == [[0.5, 0.1], [0.5, 0.5], [], [], []]
    assert refined(rough, second) == [[0.75, 0.1], [0.5, 0.5], [], [], []]
    assert len(PROBE) == 40


def test_costs_and_advice_are_of_every_place(tuning: Tuning) -> None:
    home = Place(1, 64)  # these texts are shorter
    places = [home, Place(1, 96), Place(2, 96)]
    for its in tuning.costs.values():
        assert [Place(costs.batch, costs.context) for costs in its] == places
        assert all(costs.verify_slope == 0 for costs in its)
    assert [each.place for each in tuning.advice] == places
    for each in tuning.advice[1:]:
        assert each.predicted >= 1
        assert not each.setting.name.endswith(", auto")  # there it would do something else


def test_costs_of_all_places_share_a_bar(tuning: Tuning) -> None:
    for name in tuning.costs:
        steps = [(done, of) for label, done, of in BARS if label == f"costs of {name}"]
        assert steps == [(done, 100) for done in range(1, 101)]
    assert "timing" in {label for label, _, _ in BARS}


# --- the command


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, make_llama: Callable[..., Model]) -> Path:
    """A draft with a tokenizer of its own."""
    tokenizer = train_tokenizer(["the brown items are sorted into boxes of boxes"] * 3, 4096)
    folder = tmp_path_factory.mktemp("other")
    make_llama(len(tokenizer), seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("def quicksort(items):\n\nthe quick brown fox stop it stop it\n")
    return path


def arguments_of(models: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    return [
        "tune", "--target", str(models / "target"), "--prompts", str(prompts),
        "--max-new-tokens", "8", "--rounds", "1", "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


def both_ways(recipe: Recipe, setting: Setting) -> tuple[Any, RunStats]:
    """What the printed command and the printed lines of Python do for one prompt."""
    command = [*shlex.split(recipe.command(setting)), "--max-new-tokens", "16", "--json"]
    assert command[0] == "specdec"
    result = CliRunner().invoke(main, command[1:])
    assert result.exit_code == 0, result.output
    written: dict[str, Any] = {}
    exec(recipe.python(setting), written)
    tokenizer = AutoTokenizer.from_pretrained(recipe.target)
    ids = tokenizer(command[command.index("--max-new-tokens") - 1], return_tensors="pt")
    written["spec"].generate(**ids, max_new_tokens=16, do_sample=False)
    return json.loads(result.stdout), written["spec"].last_stats


def test_what_is_printed_for_any_setting_does_the_same_both_ways(
    tuning: Tuning, models: Path
) -> None:
    """One of each kind: every other one differs in a number only."""
    recipe = Recipe(str(models / "target"), str(models / "draft"), device="cpu")
    kinds = {re.sub(r"\d+", "", f.setting.name): f.setting for f in tuning.findings}
    assert {"plain", "draft ", "suffix ", "lookahead of window ", "draft, confidence",
            "dynamic tree of  nodes", "draft and ngram "} <= set(kinds)  # fmt: skip
    kinds["tree"] = Setting(
        "tree",
        {"proposer": "tree", "policy": "constant", "proposer_options": {"shape": [-1, -1, 0]}},
        True,
    )
    for name, setting in kinds.items():
        printed, stats = both_ways(recipe, setting)
        assert printed["stats"]["tokens"] == stats.tokens
        if not name.endswith(", auto"):  # what it drafts depends on the costs of the moment
            assert printed["stats"]["drafted"] == stats.drafted, name
            assert printed["stats"]["accepted"] == stats.accepted, name


def test_command_prints_what_was_measured_and_saves_it(
    models: Path, prompts: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "tuned.json"
    result = CliRunner().invoke(
        main,
        arguments_of(models, prompts, saved, "--draft", str(models / "draft"), "--batch", "2",
                     "--plot", str(tmp_path / "gain.png")),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "milliseconds of a target pass, by rows per sequence" in result.stdout
    assert "milliseconds of a draft, by tokens per sequence" in result.stdout
    assert "speed against plain decoding" in result.stdout
    assert "best elsewhere, predicted only" in result.stdout
    content = json.loads(saved.read_text())
    assert [costs["batch"] for costs in content["costs"]["draft"]] == [1, 2]
    assert content["costs"]["draft"][0]["depths"][0] == 0
    assert content["recipes"]["command"] in result.stdout
    assert content["recipes"]["python"] in result.stdout
    assert (tmp_path / "gain.png").stat().st_size > 1000


def test_draft_of_another_tokenizer_is_printed_with_both(
    models: Path, other: Path, prompts: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "tuned.json"
    result = CliRunner().invoke(
        main, arguments_of(models, prompts, saved, "--draft", str(other), "--batch", "1", "--json")
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    recipe = Recipe(str(models / "target"), str(other), device="cpu", own_tokenizer=True)
    best = content["best"]
    assert content["recipes"]["command"] == recipe.command(Setting(**best))
    settings = [Setting(**finding["setting"]) for finding in content["findings"]]
    setting = next(each for each in settings if each.name == "draft 2")
    assert "draft_tokenizer" in recipe.python(setting)
    printed, stats = both_ways(recipe, setting)
    assert (printed["stats"]["drafted"], printed["stats"]["accepted"]) == (
        stats.drafted, stats.accepted,
    )  # fmt: skip
    assert stats.drafted


def test_what_was_measured_is_printed_where_it_cannot_be_saved(
    tuning: Tuning, models: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tuner, "run", lambda _: tuning)
    monkeypatch.setattr("specdec.cli.tune.save", full)
    saved = tmp_path / "tuned.json"
    result = CliRunner().invoke(main, arguments_of(models, prompts, saved))
    assert result.exit_code == 1
    assert "best, one text at a time" in result.stdout
    assert result.stderr == f"specdec: --out '{saved}': No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-draft", "--draft", "small"], "--no-draft and --draft exclude each other"),
        (["--prompts", "nowhere.jsonl"], "prompts 'nowhere.jsonl': expected a file or one of"),
        (["--limit", "1"], "'--limit': 1 is not in the range x>=2."),
        (["--target", "nothing"], "--target 'nothing': no built-in model"),
        (["--plot", "gain.xyz"], "--plot 'gain.xyz': expected a name that ends in .png, .svg"),
        (["--plot", "nowhere/gain.png"], "--plot 'nowhere/gain.png': there is no folder 'nowhere'"),
        (["--out", "nowhere/t.json"], "--out 'nowhere/t.json': there is no folder 'nowhere'"),
        (["--out", "."], "'--out': File '.' is a directory."),
        (["--device", "nothing"], "--device 'nothing': "),
        (["--batch", "3"], "--batch 3: expected a power of two"),
        (["--context", "9"], "--context 9: expected 64 to "),
        (["--context", "99999"], "--context 99999: expected 64 to "),
    ],
)
def test_wrong_command_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(_: Tuner) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(Tuner, "run", measured)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["tune", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_missing_matplotlib_is_found_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["tune", "--target", "nothing", "--plot", "gain.png"])
    assert result.exit_code == 2
    assert "--plot needs matplotlib: pip install 'specdec[report]'" in result.output
