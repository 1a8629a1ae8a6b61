"""Acceptance statistics and the command around them."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import log
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from specdec import Engine, SamplingParams
from specdec.cli.main import main
from specdec.cli.models import load_model
from specdec.costs import StepCosts
from specdec.errors import InvalidArgumentError
from specdec.evals.acceptance import DRAWN, UNDRAWN, Evaluation, Setting, Task, forecast, summary
from specdec.evals.folder import RunFolder
from specdec.evals.recorder import Recorder, Tally, added
from specdec.toy import TableRunner

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

P, Q = (0.5, 0.3, 0.2, 0.0), (0.2, 0.2, 0.2, 0.4)  # overlap 0.6
SAMPLED = SamplingParams(max_new_tokens=12, temperature=1.0)
TASKS = [Task("a", "1", [0, 45, 67, 45, 67]), Task("a", "2", [0, 9, 8]), Task("b", "1", [0, 5])]


def tables(**options: Any) -> Engine:
    draft = TableRunner(lambda _: Q, 4)
    return Engine(TableRunner(lambda _: P, 4), draft=draft, policy="constant", grow=True, **options)


def run(engine: Engine, texts: int = 40, sampling: SamplingParams = SAMPLED) -> list[Tally]:
    return Recorder(engine).run([[0]] * texts, sampling, range(texts))


# --- counts


def test_counts_are_the_engine_s_own() -> None:
    engine = tables(num_draft_tokens=3, verification="token")
    found, stats = summary(run(engine)), engine.stats
    assert found["drafted"] == stats.drafted
    assert found["accepted"] == stats.accepted
    assert (found["tokens"], found["steps"]) == (stats.tokens, stats.steps) == (480, stats.steps)
    positions = [row["value"] for row in found["acceptance_by_position"]]
    assert positions == pytest.approx(stats.acceptance_by_position(), abs=1e-6)
    ranks = [row["value"] for row in found["acceptance_by_rank"]]
    assert ranks == pytest.approx(stats.acceptance_by_rank(), abs=1e-6)


def test_overlap_and_entropy_are_those_of_the_laws() -> None:
    """The same at every place, so without an error; the counted rate is near it."""
    found = summary(run(tables(num_draft_tokens=3, verification="token")))
    assert found["overlap"]["value"] == pytest.approx(0.6, abs=1e-6)
    assert found["overlap"]["standard_error"] == pytest.approx(0.0, abs=1e-6)
    rank = found["acceptance_by_rank"][0]
    assert abs(rank["value"] - 0.6) < 4 * rank["standard_error"]
    entropy = -sum(q * log(q) for q in Q)
    assert found["draft_entropy"]["value"] == pytest.approx(entropy, abs=1e-6)
    # the draft's best token is one that the target never says
    [calibration] = found["calibration"]["bins"]
    assert (calibration["confidence"], calibration["target"]) == (0.4, 0.0)
    assert found["calibration"]["error"] == 0.4
    assert found["draft_law"] == DRAWN


def test_tree_is_counted_by_depth_and_rank() -> None:
    engine = tables(tree=(2, 1))
    found = summary(run(engine))
    assert len(found["acceptance_by_position"]) == len(found["acceptance_by_rank"]) == 2
    ranks = [row["value"] for row in found["acceptance_by_rank"]]
    assert ranks == pytest.approx(engine.stats.acceptance_by_rank(), abs=1e-6)
    first, second = (row["value"] for row in found["acceptance_by_position"])
    assert 1 > first > second > 0


def test_certain_draft_is_compared_by_its_token() -> None:
    """An n-gram has no law of its own: what the target gives its token is the overlap."""
    engine = Engine(
        TableRunner(lambda _: P, 4), proposer="ngram", num_draft_tokens=2, policy="constant",
        grow=True,
    )  # fmt: skip
    found = summary(run(engine))
    assert found["draft_entropy"] is None
    assert found["calibration"] is None
    assert found["draft_law"] is None
    assert 0.2 < found["overlap"]["value"] < 0.5


def test_greedy_overlap_is_agreement() -> None:
    greedy = SamplingParams(max_new_tokens=12, temperature=0.0)
    found = summary(run(tables(num_draft_tokens=2), 3, greedy))
    assert found["overlap"]["value"] == 0.0  # argmax of the draft is token 3, the target's 0
    assert found["acceptance_rate"]["value"] == 0.0


def test_coupled_draft_has_no_overlap() -> None:
    found = summary(run(tables(num_draft_tokens=2, verification="gumbel")))
    assert found["overlap"] is None
    assert found["acceptance_rate"]["value"] > 0.2


def test_tallies_add_up() -> None:
    tallies = run(tables(num_draft_tokens=3), 6)
    whole = added(tallies)
    assert summary([whole])["acceptance_rate"]["value"] == pytest.approx(
        summary(tallies)["acceptance_rate"]["value"]
    )
    assert sum(whole.sizes.values()) == whole.steps
    assert added([]).steps == 0


def test_nothing_counted_is_none() -> None:
    found = summary([Tally(tokens=3, steps=3)])
    assert found["acceptance_rate"] is None
    assert found["overlap"] is None
    assert found["acceptance_by_position"] == []
    assert found["tokens_per_target_pass"]["value"] == 1.0


# --- what follows


def costs(draft: float, verify: tuple[float, ...] = (1.0, 1.0, 1.0)) -> StepCosts:
    return StepCosts(1, 0, (0, 1, 3), (1, 2, 4), (0.0, draft, 3 * draft), verify)


def chains(accepted: Sequence[int]) -> list[Tally]:
    """Steps of 3 drafted tokens that accepted so many."""
    return [
        Tally(
            tokens=n + 1, steps=1, drafted=3, accepted=n, offered=[1] * 3,
            kept=[int(n > i) for i in range(3)], reached=[min(n + 1, 3)], taken=[n],
            sizes={"3 3": 1}, context=10,
        )
        for n in accepted
    ]  # fmt: skip


def test_predicted_speed_is_tokens_over_seconds() -> None:
    found = forecast(chains([3, 1, 0, 2]), costs(0.1), drafts=True)
    assert found["predicted_speed"] == pytest.approx(2.5 / 1.3, abs=1e-4)
    assert found["cost_ratio"] == pytest.approx(0.1)
    # 1 + 3/4 + 1/2 + 1/4 tokens of length 3 in 1.3, 2.25 of length 2 in 1.2
    assert found["best_length"] == {
        "length": 3, "predicted_speed": pytest.approx(2.5 / 1.3, abs=1e-4), "longest_drafted": 3,
    }  # fmt: skip
    assert found["best_tree"]["shape"][:2] == [-1, 0]


def test_dear_draft_is_best_left_alone() -> None:
    found = forecast(chains([3, 1, 0, 2]), costs(2.0), drafts=True)
    assert found["best_length"]["length"] == 0
    assert found["best_length"]["predicted_speed"] == 1.0
    assert found["best_tree"]["shape"] == []


def test_lookup_costs_nothing_to_draft() -> None:
    found = forecast(chains([1, 0]), costs(5.0), drafts=False)
    assert found["predicted_speed"] == 1.5
    assert found["best_tree"] is None


def test_unknown_costs_predict_nothing() -> None:
    assert forecast(chains([1]), None, drafts=True)["predicted_speed"] is None


# --- the run


def settings(draft: Model) -> list[Setting]:
    more = {"draft": draft, "policy": "constant"}
    return [
        Setting("chain", {**more, "num_draft_tokens": 3}, SAMPLED),
        Setting("tree", {**more, "tree": (2, 1)}, SAMPLED),
        Setting("odd", {**more, "tree": (2, 1), "verification": "token"}, SAMPLED),
    ]


@pytest.fixture(scope="module")
def found(target: Model, draft: Model, one_thread: Iterator[None]) -> dict[str, Any]:
    del one_thread
    return Evaluation(target, settings(draft), TASKS, timed=1, rounds=1, samples=2).run()


def test_every_setting_is_measured(found: dict[str, Any]) -> None:
    assert [row["name"] for row in found["rows"]] == ["chain", "tree"]
    assert "it judges chains" in found["left_out"]["odd"]
    for row in json.loads(json.dumps(found["rows"])):
        assert row["prompts"] == 3
        assert row["tokens"] == 3 * 2 * 12
        assert {name: its["prompts"] for name, its in row["by_set"].items()} == {"a": 2, "b": 1}
        assert row["predicted_speed"] > 0
        assert row["measured_speed"]["value"] > 0
        assert 0 < row["overlap"]["value"] < 1
        assert row["costs"]["batch"] == 1
    assert found["rows"][0]["best_length"]["longest_drafted"] == 3
    assert found["rows"][1]["best_length"] is None


def test_interrupted_run_goes_on_where_it_stood(
    target: Model, draft: Model, tmp_path: Path
) -> None:
    def evaluation(progress: Any) -> Evaluation:
        return Evaluation(
            target, settings(draft)[:2], TASKS, timed=0, progress=progress,
            folder=RunFolder(tmp_path / "run", "eval", {}),
        )  # fmt: skip

    labels = []
    done = []

    def stops(items: Sequence[Any], label: str) -> Iterator[Any]:
        if label == "tree":
            raise KeyboardInterrupt
        yield from items

    def goes_on(items: Sequence[Any], label: str) -> Iterator[Any]:
        labels.append((label, len(items)))
        for item in items:
            yield item
            done.append(label)

    with pytest.raises(KeyboardInterrupt):
        evaluation(stops).run()
    rows = evaluation(goes_on).run()["rows"]
    # a bar moves with each prompt, those of one batch included
    assert [label for label in labels if "costs" not in label[0]] == [("chain", 0), ("tree", 3)]
    assert done.count("tree") == 3
    whole = Evaluation(target, settings(draft)[:2], TASKS, timed=0).run()["rows"]
    for row, other in zip(rows, whole, strict=True):
        assert row["acceptance_rate"] == other["acceptance_rate"]
        assert row["overlap"] == other["overlap"]


def test_turns_of_a_dialogue_are_one_cluster(target: Model, draft: Model) -> None:
    turns = [Task("a", f"1 turn {i}", [0, 45 + i, 67], "1") for i in range(2)]
    [row] = Evaluation(target, settings(draft)[:1], [*turns, TASKS[1]], timed=0).run()["rows"]
    assert row["prompts"] == 2
    assert row["tokens"] == 3 * 12


def test_nothing_to_evaluate(target: Model, draft: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="nothing to evaluate"):
        Evaluation(target, [], TASKS)
    with pytest.raises(InvalidArgumentError, match=r"odd: .*it judges chains"):
        Evaluation(target, settings(draft)[2:], TASKS).run()


# --- the command


@pytest.fixture
def cli(models: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setattr("specdec.cli.options.load_model", lru_cache(load_model))

    def invoke(*args: str, draft: bool = True) -> Result:
        pair = ["--target", str(models / "target")]
        pair += ["--draft", str(models / "draft")] if draft else []
        less = ["--max-new-tokens", "8", "--timed", "0", "--device", "cpu"]
        result = CliRunner().invoke(main, ["eval", *pair, *less, *args])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


@pytest.fixture
def short(tmp_path: Path) -> str:
    """Prompts; the tiny models have no room for the last."""
    path = tmp_path / "prompts.jsonl"
    texts = ["def quicksort(items):", "the quick brown fox", "stop it " * 200]
    lines = [json.dumps({"id": str(i), "prompt": text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_table_and_details(cli: Callable[..., Result], short: str) -> None:
    result = cli(
        "--prompts", short, "--proposer", "draft:3", "--proposer", "ngram:4", "--temperature", "0",
        "--temperature", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    names = ["draft:3 auto T=0", "draft:3 auto T=1", "ngram:4 auto T=0", "ngram:4 auto T=1"]
    assert [line[:16] for line in result.stdout.splitlines()[1:5]] == names
    assert "accepted by depth: " in result.stdout
    assert result.stdout.count("entropy of the draft, nats: ") == 2
    assert result.stdout.count("both are of: the draft's own laws, whose best tokens") == 1
    assert result.stdout.count("both are of: the laws that drafted tokens were drawn from") == 1
    assert result.stdout.count("calibration of the draft: none: a lookup has no law") == 1
    # the sampled text repeats nothing
    assert result.stdout.count("calibration of the draft: none: nothing was drafted") == 1
    assert result.stdout.count("  overlap: none: nothing was drafted") == 1
    assert "1 of 3 prompts left out" in result.stderr


def test_json_and_folder(cli: Callable[..., Result], short: str, tmp_path: Path) -> None:
    args = ["--prompts", short, "--proposer", "tree:2,1", "--out", str(tmp_path / "run"), "--json"]
    result = cli(*args)
    content = json.loads(result.stdout)
    [row] = content["rows"]
    assert row["name"] == "tree:2,1 auto T=0"
    assert row["draft_entropy"]["value"] > 0
    assert row["calibration"]["error"] > 0
    assert row["draft_law"] == UNDRAWN
    assert row["undefined"] == {"measured_speed": "it was not timed"}
    assert content["settings"]["prompts"] == [[short, "0"], [short, "1"]]
    assert content["sessions"][0]["versions"]["specdec"]
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["prompt"] for line in lines) == ["0", "1"]
    again = json.loads(cli(*args).stdout)
    assert again["rows"][0]["acceptance_rate"] == content["rows"][0]["acceptance_rate"]
    assert len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) == 2
    refused = cli(*args, "--seed", "4")
    assert refused.exit_code == 2
    assert "its run has seed=0, this one 4" in refused.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--proposer", "oracle"], "oracle"),
        (["--proposer", "draft:x"], "with whole numbers"),
        (["--proposer", "tree:2,1", "--verification", "block"], "it judges chains"),
        (["--prompts", "nowhere.jsonl"], "expected a file or one of"),
        (["--prompts", "json", "--column", "colour"], "unknown column 'colour'"),
    ],
)
def test_mistakes_get_one_line(
    cli: Callable[..., Result], short: str, args: list[str], message: str
) -> None:
    sampled = ["--temperature", "1"]
    result = cli(*(() if "--prompts" in args else ("--prompts", short)), *sampled, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_draft_that_is_missing_is_asked_for(cli: Callable[..., Result], short: str) -> None:
    result = cli("--prompts", short, "--proposer", "draft:2", draft=False)
    assert result.exit_code == 2
    assert "a draft is needed; name one with --draft" in result.stderr


def test_unknown_column_is_named_with_its_line(cli: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    result = cli("--prompts", str(path), "--proposer", "ngram:2")
    assert result.exit_code == 2
    assert f"{path}:2: unknown column 'text'" in result.stderr


def test_every_turn_is_continued_behind_the_target_s_answers(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dialogue.jsonl"
    path.write_text(json.dumps({"id": "x", "turns": ["one two", "three"]}) + "\n")
    seen: list[list[int]] = []
    make = Evaluation.__init__

    def kept(self: Evaluation, target: Model, rows: Any, tasks: Any, **more: Any) -> None:
        seen.extend(task.tokens for task in tasks)
        make(self, target, rows, tasks, **more)

    monkeypatch.setattr(Evaluation, "__init__", kept)
    result = cli("--prompts", str(path), "--proposer", "draft:2", "--json")
    content = json.loads(result.stdout)
    assert content["settings"]["prompts"] == [[str(path), "x"], [str(path), "x turn 2"]]
    assert content["rows"][0]["prompts"] == 1
    first, second = seen
    assert second[: len(first)] == first
    assert len(second) > len(first) + 8  # eight tokens of the answer, then the next turn
