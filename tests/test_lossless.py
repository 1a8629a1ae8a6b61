"""The audit of a pair, and its command: sound pairs pass, broken ones fail and say where."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from specdec import Engine, SamplingParams
from specdec.cli.main import main
from specdec.cli.models import load_model
from specdec.errors import InvalidArgumentError
from specdec.evals import exact, lossless
from specdec.evals.exact import Finding
from specdec.evals.folder import RunFolder
from specdec.evals.lossless import Audit, Auditor, Part, Plan
from specdec.evals.two_sample import sample_size
from specdec.rng import Noise, PhiloxNoise

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

PROMPTS = [[0, 45, 67, 89, 45, 67], [0, 200, 31, 200], [0, *range(20, 40), *range(20, 30)]]
PLAN = Plan(0.25, tokens=3, cells=6, prompts=2, greedy_tokens=24)
SAMPLED = SamplingParams(temperature=1.0)
CHAIN = {"num_draft_tokens": 3}


@pytest.fixture
def without_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what tests/test_exact.py looks at."""

    def sound(*_: Any, **__: Any) -> list[Finding]:
        return [Finding("tables", True, "fine")]

    monkeypatch.setattr(exact, "exact", sound)
    monkeypatch.setattr(exact, "planted", sound)


@pytest.fixture
def audit(target: Model, draft: Model, without_tables: None) -> Callable[..., Audit]:
    del without_tables

    def run(options: dict[str, Any] | None = None, **more: Any) -> Audit:
        drafts = more.pop("draft", draft)
        sampling = more.pop("sampling", SAMPLED)
        plan = more.pop("plan", PLAN)
        given = CHAIN if options is None else options
        return Auditor(target, drafts, given, PROMPTS, sampling, plan, **more).run()

    return run


def parts(audit: Audit) -> dict[str, Part]:
    return {part.name: part for part in audit.parts}


# --- sound pairs


def test_sound_pair_passes(audit: Callable[..., Audit]) -> None:
    found = audit()
    assert found.passed
    assert list(parts(found)) == ["exact", "greedy", "sampled", "planted"]
    assert found.verdict.startswith("LOSSLESS | exact: fine | greedy: 3 of 3 texts equal | sampled")
    [sampled] = parts(found)["sampled"].findings
    assert sampled.details["drafted"] > 0
    assert sampled.details["sizes"] == (PLAN.texts(2) * 2, PLAN.texts(2) * 2)
    content = json.loads(json.dumps(found.as_dict()))
    assert content["passed"]
    assert content["parts"]["greedy"]["findings"][0]["details"]["texts"] == 3


@pytest.mark.parametrize("options", [{"tree": (2, 1)}, {"verification": "recursive"}])
def test_other_shapes_and_rules_pass(audit: Callable[..., Audit], options: dict[str, Any]) -> None:
    assert audit({**CHAIN, **options} if "tree" not in options else options).passed


def test_greedy_alone(audit: Callable[..., Audit]) -> None:
    found = audit(sampling=SamplingParams(temperature=0.0))
    assert found.passed
    assert list(parts(found)) == ["exact", "greedy", "planted"]


def test_coupled_texts_are_compared_seed_by_seed(audit: Callable[..., Audit]) -> None:
    found = audit({**CHAIN, "verification": "gumbel"})
    assert found.passed
    [coupled] = parts(found)["coupled"].findings
    assert coupled.note == f"{3 * lossless.PATHS} of {3 * lossless.PATHS} texts equal"


def test_auto_drafts_all_the_same(audit: Callable[..., Audit]) -> None:
    """Its draft is as large as its target, so that measured costs would say to draft nothing."""
    [greedy] = parts(audit({}))["greedy"].findings
    assert greedy.details["drafted"] > 0


# --- broken ones


def test_lossy_rule_fails(audit: Callable[..., Audit]) -> None:
    found = audit({**CHAIN, "verification": "typical", "lossy": True})
    assert not parts(found)["sampled"].passed
    assert parts(found)["greedy"].passed
    assert found.verdict.startswith("NOT LOSSLESS | sampled: two samples: p = ")


def test_wrong_greedy_token_is_named(
    audit: Callable[..., Audit], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Auditor._engine

    def wrong(self: Auditor) -> Engine:
        return exact._runner_up(lambda _: make(self))(None)

    monkeypatch.setattr(Auditor, "_engine", wrong)
    found = audit(sampling=SamplingParams(temperature=0.0))
    [greedy] = parts(found)["greedy"].findings
    first = greedy.details["differences"][0]
    assert not found.passed
    assert first["gap"] > 100 * first["rounding"]
    assert f"prompt 0 has a wrong token at {first['position']}" in found.verdict


class OtherNoise(PhiloxNoise):
    """Of another request."""

    def gumbel(self, seeds: Sequence[int], *rest: Any) -> Any:
        return super().gumbel([seed ^ 1 for seed in seeds], *rest)


def test_coupled_text_of_other_noise_fails(
    audit: Callable[..., Audit], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Auditor._engine

    def wrong(self: Auditor) -> Engine:
        engine = make(self)
        other: Noise = OtherNoise()
        engine.noise = other
        return engine

    monkeypatch.setattr(Auditor, "_engine", wrong)
    found = audit({**CHAIN, "verification": "gumbel"})
    assert not parts(found)["coupled"].passed


def test_nothing_drafted_is_no_evidence(audit: Callable[..., Audit]) -> None:
    options = {"proposer": "ngram", "num_draft_tokens": 0}
    found = audit(options, draft=None)
    assert not found.passed
    assert "nothing was drafted" in found.verdict


def test_unseen_mistake_is_no_proof(
    audit: Callable[..., Audit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lossless, "_hot", lambda engine: engine)
    found = audit()
    assert not found.passed
    assert found.verdict.startswith("NOT SHOWN: a planted mistake was not seen | planted: the real")


def test_no_prompt_is_refused(target: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="prompts: none is left"):
        Auditor(target, None, {}, [], SAMPLED, PLAN)


# --- how much


def test_size_is_that_of_the_asked_power() -> None:
    assert PLAN.texts(2) * 2 == pytest.approx(sample_size(0.25, 0.9, 0.01, 10), abs=1)
    assert Plan(0.01).texts(4) * 4 > 150_000


def test_interrupted_run_goes_on_where_it_stood(
    audit: Callable[..., Audit], tmp_path: Path
) -> None:
    whole = audit().as_dict()
    jobs = []

    def stops(items: Sequence[Any], label: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if label == "sampled" and number == 2:
                raise KeyboardInterrupt
            jobs.append((label, item))
            yield item

    def goes_on(items: Sequence[Any], label: str) -> Iterator[Any]:
        for item in items:
            jobs.append((label, item))
            yield item

    with pytest.raises(KeyboardInterrupt):
        audit(folder=RunFolder(tmp_path / "run", "verify", {}), progress=stops)
    found = audit(folder=RunFolder(tmp_path / "run", "verify", {}), progress=goes_on).as_dict()
    assert len(jobs) == len({str(job) for job in jobs})
    drop = ("drafted", "accepted")
    for content in (whole, found):
        for part in content["parts"].values():
            for finding in part["findings"]:
                finding["details"] = {k: v for k, v in finding["details"].items() if k not in drop}
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(whole))
    again = audit(folder=RunFolder(tmp_path / "run", "verify", {}), progress=goes_on)
    assert len(jobs) == len({str(job) for job in jobs})
    assert again.passed


def test_time_left_is_said_once(
    audit: Callable[..., Audit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lossless, "_WORTH_SAYING", 0)
    monkeypatch.setattr(lossless, "ROUNDS", 1)
    said: list[str] = []
    audit(remark=said.append)
    assert said[0] == f"sampled: 2 x {2 * PLAN.texts(2)} texts; about 0 minutes are left"
    assert [line.split(":")[0] for line in said] == ["sampled", "planted sample"]


def test_sampled_texts_follow_the_asked_part_of_their_prompts(
    audit: Callable[..., Audit], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set[tuple[int, ...]]()
    make = lossless._Lanes.__init__

    def kept(self: Any, engine: Engine, row: int, prompt: list[int], params: Any) -> None:
        seen.add(tuple(prompt))
        make(self, engine, row, prompt, params)

    monkeypatch.setattr(lossless._Lanes, "__init__", kept)
    found = audit(plan=replace(PLAN, context=3))
    assert seen == {tuple(prompt[:3]) for prompt in PROMPTS[:2]}
    assert parts(found)["sampled"].findings[0].details["context"] == 3
    assert found.passed


# --- the command


@pytest.fixture
def cli(
    models: Path, monkeypatch: pytest.MonkeyPatch, without_tables: None
) -> Callable[..., Result]:
    del without_tables
    monkeypatch.setattr("specdec.cli.options.load_model", lru_cache(load_model))

    def run(*args: str) -> Result:
        pair = ["--target", str(models / "target"), "--draft", str(models / "draft")]
        less = ["--detect-tv", "0.3", "--limit", "2", "--max-new-tokens", "16", "--cells", "6"]
        result = CliRunner().invoke(main, ["verify", *pair, "--device", "cpu", *less, *args])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return run


@pytest.fixture
def short(tmp_path: Path) -> str:
    """Prompts that the tiny models have room for."""
    path = tmp_path / "prompts.txt"
    path.write_text("def quicksort(items):\nthe quick brown fox\n" + "stop it " * 200 + "\n")
    return str(path)


def test_verdict_is_one_line_and_details_are_kept(
    cli: Callable[..., Result], short: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = cli("--prompts", short, "--limit", "3", "--out", str(out))
    assert result.exit_code == 0
    assert result.stdout.startswith("LOSSLESS | exact: fine | greedy: 2 of 2 texts equal | sampled")
    assert result.stdout.count("\n") == 1
    assert "1 of 3 prompts left out" in result.stderr
    assert json.loads((out / "summary.json").read_text())["passed"]
    lines = (out / "records.jsonl").read_text().splitlines()
    assert {json.loads(line)["part"] for line in lines} == {
        "exact", "greedy", "sampled", "planted", "planted sample",
    }  # fmt: skip


def test_failed_audit_is_exit_code_1(cli: Callable[..., Result], short: str) -> None:
    lossy = ["--verification", "typical", "--lossy", "--temperature", "0.5", "--detect-tv", "0.15"]
    result = cli("--prompts", short, *lossy, "--json")
    content = json.loads(result.stdout)
    assert (result.exit_code, content["passed"]) == (1, False)
    assert content["settings"]["verification"] == "typical"
    assert content["provenance"]["versions"]["specdec"]
    sampled = content["parts"]["sampled"]["findings"][0]["details"]
    assert sampled["p_value"] < sampled["level"]
    assert sampled["detect_total_variation"] == 0.15


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--power", "0.01"], "power=0.01: expected above the level"),
        (["--detect-tv", "0"], "'--detect-tv'"),
        (["--prompts", "nowhere.jsonl"], "expected a file or one of"),
        (["--verification", "typical"], "pass lossy=True (--lossy)"),
    ],
)
def test_mistakes_get_one_line(
    cli: Callable[..., Result], short: str, args: list[str], message: str
) -> None:
    result = cli("--prompts", short, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_every_turn_of_a_dialogue_is_audited_behind_the_target_s_answers(
    cli: Callable[..., Result], tmp_path: Path, target: Model, tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    turns = ["one two", "three", "stop it"]
    path = tmp_path / "dialogue.jsonl"
    path.write_text(json.dumps({"turns": turns}) + "\n")
    seen: list[list[int]] = []
    make = Auditor.__init__

    def kept(self: Auditor, ours: Model, draft: Model, options: Any, rows: Any, *more: Any,
             **named: Any) -> None:  # fmt: skip
        seen.extend(rows)
        make(self, ours, draft, options, rows, *more, **named)

    monkeypatch.setattr(Auditor, "__init__", kept)
    result = cli("--prompts", str(path), "--temperature", "0", "--json")
    assert result.exit_code == 0
    [greedy] = json.loads(result.stdout)["parts"]["greedy"]["findings"]
    assert greedy["details"]["texts"] == 3
    wanted = [tokenizer(turns[0])["input_ids"]]
    for turn in turns[1:]:
        text = target.generate(torch.tensor([wanted[-1]]), max_new_tokens=16, do_sample=False)
        more = tokenizer("\n" + turn, add_special_tokens=False)["input_ids"]
        wanted.append([*text[0].tolist(), *more])
    assert seen == wanted


def test_broken_prompts_are_named_by_line(cli: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": \n')
    assert f"{path}:2: not JSON" in cli("--prompts", str(path)).stderr
    path.write_text("")
    assert "it is empty" in cli("--prompts", str(path)).stderr


def test_folder_of_another_run_is_refused(
    cli: Callable[..., Result], short: str, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    result = cli("--prompts", short, "--out", str(tmp_path / "notes"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "not the folder of a run" in result.stderr
    greedy = ["--prompts", short, "--temperature", "0", "--out", str(tmp_path / "run")]
    assert cli(*greedy).exit_code == 0
    result = cli(*greedy, "--seed", "5")
    assert result.exit_code == 2
    assert "its run has seed=0, this one 5" in result.stderr
