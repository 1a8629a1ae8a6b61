"""specdec bench: what runs, what is refused a speed, what is resumed, and the answer files."""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from specdec import Engine, SamplingParams
from specdec.cli.main import main
from specdec.costs import StepCosts
from specdec.errors import InvalidArgumentError
from specdec.evals.bench import Bench, Dialogue, Task, TokenPrompts, passes_by_depth, spread
from specdec.evals.contenders import PLAIN, Contender, Ours, Speculation, Theirs, Turn
from specdec.evals.folder import RunFolder, read_records
from specdec.evals.gate import Gate, Near, uniform_p_value
from specdec.evals.lineup import Models, Synthetic, Wanted, known_texts, lineup, synthetic_lineup
from specdec.evals.progress import Progress, silent
from specdec.evals.prompts import Prompt
from specdec.evals.random_models import NAMES, random_model, random_prompts, shape
from specdec.evals.spec_bench import write_answers
from specdec.evals.trace import write_traces

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
SAMPLED = SamplingParams(max_new_tokens=12, temperature=0.9)
TEXT = "the quick brown fox"


def both_sides(target: Model, draft: Model) -> Models:
    return Models(
        copy.deepcopy(target), copy.deepcopy(target), copy.deepcopy(draft), copy.deepcopy(draft)
    )


def tasks(*texts: str) -> list[Task]:
    return [Task("here", Prompt(f"p-{i}", "", (text,))) for i, text in enumerate(texts)]


def run_bench(
    rows: list[Contender], gate: Gate, tokenizer: Any, *, rounds: int = 2, out: Path | None = None,
    settings: dict[str, Any] | None = None, work: list[Task] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    folder = RunFolder(out, "bench", settings or {})
    work = tasks(TEXT, "def sort(") if work is None else work
    dialogue = Dialogue(tokenizer, chat=False)
    return Bench(rows, work, dialogue, gate, folder, rounds=rounds, seed=0, progress=progress).run()


# --- what the cost model says


def test_prediction_is_tokens_over_what_passes_cost(
    target: Model, draft: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Ours("d", Engine(target, draft=draft, num_draft_tokens=2, grow=True), GREEDY)
    known = StepCosts(1, 64, (0, 1, 2), (1, 2, 3), (0.0, 0.25, 0.5), (1.0, 1.25, 1.5))
    monkeypatch.setattr(ours.engine, "step_costs", lambda *_, **__: known)
    # the first pass of a turn reads the prompt
    turn = Turn((1,) * 8, (1, 3, 1, 2, 1), (0, 2, 2, 1, 0), 1.0)
    assert ours.predicted_speed([turn], 10) == pytest.approx(7 * 1.0 / (2.0 + 2.0 + 1.5 + 1.0))
    plain = Turn((1, 2), (1, 1), (0, 0), 1.0)
    assert ours.predicted_speed([plain], 10) is None


# --- rows


@pytest.mark.parametrize("text", ["draft:x", "draft:4,2", "nobody", "tree:3,-1", "ngram,nobody"])
def test_a_bad_row_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="proposer"):
        Speculation.parse(text)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("draft", {"proposer": "draft", "draft": "D"}),
        ("draft:auto", {"proposer": "draft", "draft": "D"}),
        ("draft:4", {"proposer": "draft", "draft": "D", "num_draft_tokens": 4}),
        ("tree:3,2", {"proposer": "tree", "draft": "D", "tree": (3, 2), "policy": "constant"}),
        ("ngram:8", {"proposer": "ngram", "num_draft_tokens": 8,
                     "proposer_options": {"max_ngram": 2}}),
        # past outputs would be the answers of the round before
        ("suffix", {"proposer": "suffix", "proposer_options": {"cache_tokens": 0}}),
        ("draft,suffix", {"proposer": ["draft", "suffix"], "draft": ["D"],
                          "proposer_options": {"suffix": {"cache_tokens": 0}}}),
    ],
)  # fmt: skip
def test_a_row_becomes_arguments_of_the_engine(text: str, arguments: dict[str, Any]) -> None:
    assert Speculation.parse(text).arguments("D", {"ngram": {"max_ngram": 2}}) == arguments


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_row_counts_its_tokens_by_pass(
    target: Model, draft: Model, tokenizer: Any, sampling: SamplingParams
) -> None:
    wanted = Wanted(
        tuple(map(Speculation.parse, ("draft:3", "tree:2,1", "ngram"))), assistant_lengths=(3,)
    )
    rows = lineup(both_sides(target, draft), sampling, wanted)
    assert [row.name for row in rows] == [
        "transformers", "transformers assistant", "transformers assistant 3",
        "transformers lookup 10", "specdec plain", "specdec draft:3", "specdec tree:2,1",
        "specdec ngram",
    ]  # fmt: skip
    prompt = tokenizer(TEXT)["input_ids"]
    for row in rows:
        turn = row.run(prompt, 5)
        assert sum(turn.emitted) == len(turn.tokens) == 12, row.name
        assert len(turn.drafted) == len(turn.emitted)
        assert all(count <= drafted + 1 for count, drafted in zip(turn.emitted, turn.drafted,
                                                                  strict=True))  # fmt: skip
        assert turn.seconds > 0
        assert Turn.of(json.loads(json.dumps(turn.as_dict()))) == turn


def test_the_assistant_is_left_as_it_was(target: Model, draft: Model) -> None:
    models = both_sides(target, draft)
    config = models.assistant.generation_config
    config.num_assistant_tokens_schedule = "heuristic"
    before = config.to_dict()
    row = Theirs("x", models.baseline, GREEDY, constant=2, assistant_model=models.assistant)
    row.run([0, 45, 67, 89], 0)
    assert config.to_dict() == before
    assert max(row.run([0, 45, 67, 89], 0).drafted) <= 2


# --- the gate


def greedy_text(target: Model, prompt: list[int]) -> list[int]:
    return list(Ours(PLAIN, Engine(target, grow=True), GREEDY).run(prompt, 0).tokens)


def test_a_token_that_is_not_the_best_is_found(target: Model) -> None:
    prompt = [0, 45, 67]
    tokens = greedy_text(target, prompt)
    gate = Gate(copy.deepcopy(target), GREEDY)
    assert gate.not_best(prompt, tokens, None) == []
    tokens[7] = (tokens[7] + 1) % 256
    found = gate.not_best(prompt, tokens, None)
    assert found[0].position == 7
    assert not found[0].is_explained


def test_bfloat16_is_excused_by_its_rounding_alone(target: Model) -> None:
    prompt = [0, 45, 67]
    half = copy.deepcopy(target).to(torch.bfloat16)
    tokens = greedy_text(copy.deepcopy(half), prompt)
    gate = Gate(half, GREEDY)
    assert all(near.is_explained for near in gate.not_best(prompt, tokens, None))
    ranks = half(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1].argsort()
    tokens[0] = int(ranks[-20])
    assert not gate.not_best(prompt, tokens, None)[0].is_explained


def test_a_gap_is_explained_by_four_rounding_errors() -> None:
    assert Near(0, gap=0.04, rounding=0.01).is_explained
    assert not Near(0, gap=0.05, rounding=0.01).is_explained


def test_the_coupled_text_of_a_seed_is_known(target: Model) -> None:
    prompt = [0, 45, 67]
    gate = Gate(copy.deepcopy(target), SAMPLED)
    tokens = Ours(PLAIN, Engine(target, grow=True), SAMPLED).run(prompt, 11).tokens
    assert gate.not_best(prompt, tokens, 11) == []
    assert not all(near.is_explained for near in gate.not_best(prompt, tokens, 12))


def test_false_alarms_of_the_law_test_are_as_rare_as_stated() -> None:
    rng = np.random.default_rng(0)
    for n in (40, 400):
        p_values = np.array([uniform_p_value(rng.random(n).tolist()) for _ in range(400)])
        for level in (0.05, 0.2):
            assert abs((p_values < level).mean() - level) < 3.5 * (level * (1 - level) / 400) ** 0.5


def test_transforms_of_sampled_texts_are_uniform_and_of_sharpened_ones_not(target: Model) -> None:
    engine = Engine(target, grow=True)
    gate = Gate(copy.deepcopy(target), SamplingParams(max_new_tokens=40, temperature=1.3))
    p_values = []
    for temperature in (1.3, 1.0):
        found: list[float] = []
        sampling = SamplingParams(max_new_tokens=40, temperature=temperature)
        for seed in range(24):
            prompt = [0, 40 + seed]
            tokens = Ours(PLAIN, engine, sampling).run(prompt, seed).tokens
            found += gate.transforms(prompt, tokens)
        p_values.append(uniform_p_value(found))
    assert p_values[0] > 0.01
    assert p_values[1] < 1e-4
    assert uniform_p_value([0.1, 2.0]) == 0.0  # a token without mass


class Liar(Ours):
    """Ours, but for the last token of a text."""

    def run(self, prompt: Sequence[int], seed: int) -> Turn:
        turn = super().run(prompt, seed)
        wrong = (*turn.tokens[:-1], (turn.tokens[-1] + 1) % 256)
        return Turn(wrong, turn.emitted, turn.drafted, turn.seconds)


def test_a_row_that_is_not_lossless_gets_no_speed(
    target: Model, draft: Model, tokenizer: Any
) -> None:
    models = both_sides(target, draft)
    rows = lineup(models, GREEDY, Wanted((Speculation.parse("draft:3"),), transformers=False))
    rows.append(Liar("specdec liar", Engine(models.target, grow=True), GREEDY))
    summary = run_bench(rows, Gate(models.baseline, GREEDY), tokenizer)
    plain, honest, liar = summary["rows"]
    assert plain["tokens_per_second"]["median"] > 0
    assert honest["lossless"]["equal"] == honest["lossless"]["texts"] == 4
    assert honest["speed_against"][PLAIN]["median"] > 0
    assert liar["tokens_per_second"] is None
    assert liar["speed_against"] == {}
    assert liar["seconds"] is None
    assert "not the target's own" in liar["lossless"]["note"]


def test_nothing_is_compared_with_a_baseline_that_lies(target: Model, tokenizer: Any) -> None:
    rows: list[Contender] = [
        Liar("specdec liar", Engine(target, grow=True), GREEDY),
        Ours(PLAIN, Engine(target, grow=True), GREEDY),
    ]
    summary = run_bench(rows, Gate(copy.deepcopy(target), GREEDY), tokenizer)
    assert summary["rows"][1]["speed_against"] == {}
    assert summary["rows"][1]["tokens_per_second"] is not None


class Refuser(Contender):
    name, is_ours = "transformers refuser", False

    def run(self, prompt: Sequence[int], seed: int) -> Turn:
        raise ValueError(f"not for this model: {len(prompt)}, {seed}")


def test_a_row_of_transformers_that_cannot_run_is_left_out_and_reported(
    target: Model, tokenizer: Any
) -> None:
    rows: list[Contender] = [Ours(PLAIN, Engine(target, grow=True), GREEDY), Refuser()]
    summary = run_bench(rows, Gate(copy.deepcopy(target), GREEDY), tokenizer)
    assert [row["name"] for row in summary["rows"]] == [PLAIN]
    [(name, reason)] = summary["left_out"].items()
    assert name == "transformers refuser"
    assert reason.startswith("ValueError: not for this model")


def test_sampled_rows_are_judged_by_their_noise_or_by_the_law(
    target: Model, draft: Model, tokenizer: Any
) -> None:
    models = both_sides(target, draft)
    wanted = Wanted((Speculation.parse("draft:3"),))
    rows = lineup(models, SAMPLED, wanted)
    found = run_bench(rows, Gate(models.baseline, SAMPLED), tokenizer, rounds=3)["rows"]
    by_name = {row["name"]: row["lossless"] for row in found}
    assert by_name[PLAIN]["p_value"] is None
    assert by_name[PLAIN]["equal"] == by_name[PLAIN]["texts"] == 6
    assert by_name["specdec draft:3"]["p_value"] > 1e-4
    assert by_name["specdec draft:3"]["tested_tokens"] == 72
    assert all(row["passed"] for row in by_name.values())


def test_everything_that_takes_a_while_has_a_bar(
    target: Model, draft: Model, tokenizer: Any, tmp_path: Path
) -> None:
    rows = lineup(
        both_sides(target, draft), GREEDY,
        Wanted((Speculation.parse("draft:3"), Speculation.parse("ngram")), transformers=False),
    )  # fmt: skip
    bars: dict[str, int] = {}

    def progress(items: Sequence[Any], label: str) -> Iterator[Any]:
        for item in items:
            yield item
            bars[label] = bars.get(label, 0) + 1

    run_bench(rows, Gate(copy.deepcopy(target), GREEDY), tokenizer, rounds=1, progress=progress)
    write_traces(
        tmp_path / "traces.json", rows, tasks(TEXT), Dialogue(tokenizer, chat=False), tokenizer,
        GREEDY, 0, progress,
    )  # fmt: skip
    assert bars == {
        "warming up": 3, "timing": 2, "checking the texts": 3, "predicting": 3, "traces": 2,
    }  # fmt: skip


def test_spread_and_depths() -> None:
    assert spread([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    assert spread([float(n) for n in range(11)]) == {"median": 5.0, "p20": 2.0, "p80": 8.0}
    turn = Turn((1,) * 6, (1, 3, 2), (0, 3, 3), 1.0)
    assert passes_by_depth([turn]) == [1.0, 0.5]
    assert passes_by_depth([]) == []


# --- the folder


def test_an_interrupted_run_is_resumed(target: Model, tokenizer: Any, tmp_path: Path) -> None:
    rows: list[Contender] = [Ours(PLAIN, Engine(target, grow=True), GREEDY)]
    gate = Gate(copy.deepcopy(target), GREEDY)
    out = tmp_path / "run"
    whole = run_bench(rows, gate, tokenizer, out=out, settings={"a": 1})
    lines = (out / "records.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 4
    # killed in the middle of a line
    (out / "records.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    again = run_bench(rows, gate, tokenizer, out=out, settings={"a": 1})
    kept = (out / "records.jsonl").read_text().splitlines(keepends=True)
    assert kept[:2] == lines[:2]
    assert len(kept) == 4
    assert again["rows"][0]["tokens"] == whole["rows"][0]["tokens"]
    assert len(again["sessions"]) == 2
    assert json.loads((out / "summary.json").read_text()) == again
    # done: nothing is generated again
    broken: list[Contender] = [Ours(PLAIN, Engine(target, grow=True), GREEDY)]
    broken[0].run = None  # type: ignore[method-assign, assignment]
    assert run_bench(broken, gate, tokenizer, out=out, settings={"a": 1})["rows"]


def test_a_folder_of_anything_else_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", "bench", {"rounds": 3, "rows": ["a"] * 99})
    with pytest.raises(InvalidArgumentError, match="its run has rounds=3, this one 4"):
        RunFolder(tmp_path / "run", "bench", {"rounds": 4, "rows": ["a"] * 99})
    with pytest.raises(InvalidArgumentError, match="holds a run of specdec bench, not of eval"):
        RunFolder(tmp_path / "run", "eval", {})
    with pytest.raises(InvalidArgumentError, match="it exists and is not the folder of a run"):
        RunFolder(tmp_path, "bench", {})
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(InvalidArgumentError, match=r"run\.json: damaged: 'format'"):
        RunFolder(tmp_path / "run", "bench", {})
    (tmp_path / "run" / "run.json").write_text('{"format": 9, "kind": "", "settings": {}, '
                                               '"sessions": []}')  # fmt: skip
    with pytest.raises(InvalidArgumentError, match="format 9: expected 1"):
        RunFolder(tmp_path / "run", "bench", {})


@pytest.mark.parametrize(("line", "message"), [("{", "not JSON"), ("[]", "expected an object")])
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "records.jsonl").write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(InvalidArgumentError, match=rf"records\.jsonl:2: {message}"):
        read_records(tmp_path)


# --- synthetic drafts and random weights


def test_a_synthetic_draft_is_right_at_its_rate_on_both_sides(
    make_llama: Any, tokenizer: Any
) -> None:
    target = make_llama(len(tokenizer), seed=0)
    models = Models(copy.deepcopy(target), target)
    sampling = SamplingParams(max_new_tokens=48, temperature=0)
    work = tasks(*(f"{TEXT} {n}" for n in range(4)))
    wanted = Wanted((Speculation.parse("draft:3"), Speculation.parse("ngram:2")),
                    assistant_lengths=(3,))  # fmt: skip
    dialogue = Dialogue(tokenizer, chat=False)
    rows = synthetic_lineup(
        models,
        sampling,
        wanted,
        Synthetic(0.7, 0.0),
        work,
        dialogue,
        0,
        lambda items, _: iter(items),
    )
    summary = run_bench(rows, Gate(models.baseline, sampling), tokenizer, rounds=1, work=work)
    by_name = {row["name"]: row for row in summary["rows"]}
    assert all(row["lossless"]["passed"] for row in by_name.values())
    for name in ("specdec draft:3", "transformers assistant 3"):
        row = by_name[name]
        assert row["label"].startswith("synthetic draft, acceptance 0.7")
        # (1 - a^4) / (1 - a) tokens in a pass of 3 drafted ones, a little less at the ends
        assert row["tokens_per_pass"] == pytest.approx((1 - 0.7**4) / 0.3, abs=0.45), name
    assert [by_name[name]["label"] for name in ("specdec plain", "specdec ngram:2")] == ["", ""]


def test_known_texts_hold_every_turn(target: Model, tokenizer: Any) -> None:
    work = [Task("here", Prompt("two", "", ("the quick", "brown fox")))]
    row = Ours(PLAIN, Engine(target, grow=True), GREEDY)
    texts, turns = known_texts(
        row, work, Dialogue(tokenizer, chat=False), lambda items, _: iter(items)
    )
    assert len(texts) == len(turns) == 2
    assert texts[1][: len(texts[0])] == texts[0]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.2-1b", 1_235_814_400), ("qwen3-0.6b", 596_049_920), ("llama-3-8b", 8_030_261_248)],
)
def test_random_models_have_the_published_size(name: str, parameters: int) -> None:
    model_class, config = shape(name)
    with torch.device("meta"):
        model = model_class(config)
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_random_models_and_prompts_are_functions_of_the_seed() -> None:
    small: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    a, b, c = (
        random_model(NAMES[0], torch.float32, seed=seed, **small).lm_head.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    prompts = random_prompts(50, 3, 7)
    assert prompts == random_prompts(50, 3, 7)
    assert [len(prompt) for prompt in prompts] == [7] * 3
    assert TokenPrompts().tokens(["3 4"], []) == [3, 4]


# --- answer files


def test_answer_files_hold_what_the_scoring_scripts_read(
    target: Model, tokenizer: Any, tmp_path: Path
) -> None:
    work = [
        Task("q.jsonl", Prompt("82", "writing", ("the quick", "brown fox"))),
        Task("q.jsonl", Prompt("9", "qa", ("stop it",))),
    ]
    rows: list[Contender] = [
        Ours(PLAIN, Engine(target, grow=True), GREEDY),
        Liar("specdec liar", Engine(target, grow=True), GREEDY),
    ]
    dialogue = Dialogue(tokenizer, chat=False)
    folder = RunFolder(None, "bench", {})
    gate = Gate(copy.deepcopy(target), GREEDY)
    summary = Bench(rows, work, dialogue, gate, folder, rounds=2, seed=0).run()
    [path] = write_answers(tmp_path / "a", "tiny", summary, folder.records, work, dialogue)
    assert path.name == "tiny-specdec-plain.jsonl"  # none for the liar
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["question_id"], second["question_id"]) == (9, 82)
    assert second["category"] == "writing"
    assert second["model_id"] == "tiny-specdec plain"
    assert len(second["answer_id"]) == 22
    assert [choice["index"] for choice in second["choices"]] == [0, 1]
    choice = second["choices"][0]
    assert set(choice) == {
        "index", "turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths",
    }  # fmt: skip
    assert len(choice["turns"]) == len(choice["wall_time"]) == 2
    assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"]) == 24
    assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])


def test_a_second_turn_follows_the_first_answer(tokenizer: Any) -> None:
    dialogue = Dialogue(tokenizer, chat=False)
    first = dialogue.tokens(["the quick"], [])
    second = dialogue.tokens(["the quick", "fox"], [[45, 46]])
    assert second[: len(first) + 2] == [*first, 45, 46]
    assert tokenizer.decode(second[len(first) + 2 :]) == "\nfox"
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = None  # no BOS, which a later turn has none of
    for each in (tokenizer, bare):
        dialogue = Dialogue(each, chat=False)
        turns = ["the quick", "brown", "fox"]
        needed = len(dialogue.tokens(turns, [[], []]))
        assert needed <= sum(map(dialogue.length, turns)) <= needed + 1
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    ids = Dialogue(chatty, chat=True).tokens(["hi", "so"], [chatty("stop it ")["input_ids"]])
    text = chatty.decode(ids, skip_special_tokens=True)
    assert text == "user: hi\nassistant: stop it\nuser: so\n"


# --- the command


def arguments(models: Path, *more: str) -> list[str]:
    return ["bench", "--target", str(models / "target"), "--draft", str(models / "draft"),
            "--max-new-tokens", "8", "--rounds", "1", "--limit", "2", "--device", "cpu",
            *more]  # fmt: skip


def test_command_prints_a_table_and_keeps_what_it_measured(models: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def quicksort(items):\n" + "x " * 400 + "\n")
    out, answers = tmp_path / "out", tmp_path / "answers"
    command = arguments(
        models, "--prompts", str(prompts), "--out", str(out), "--spec-bench", str(answers),
        "--proposer", "draft:3", "--proposer", "ngram", "--proposer-option", "ngram.max_ngram=2",
    )  # fmt: skip
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "1 of 2 prompts left out" in result.output
    for row in ("transformers assistant", "specdec plain", "specdec draft:3", "specdec ngram"):
        assert row in result.output
    assert "1 of 1 texts equal" in result.output
    assert len(list(answers.iterdir())) == 6
    before = (out / "records.jsonl").read_text()
    again = CliRunner().invoke(main, [*command[:-8], "--json", *command[-6:]])
    assert again.exit_code == 0, again.output
    assert (out / "records.jsonl").read_text() == before
    summary = json.loads(again.stdout)
    assert summary["settings"]["proposer_options"] == {"ngram": {"max_ngram": 2}}
    assert summary["settings"]["target"]["class"] == "LlamaForCausalLM"
    assert len(summary["settings"]["target"]["sha256"]) == 64


def test_min_p_is_every_row_s(models: Path, tmp_path: Path) -> None:
    """No token is less likely than the likeliest: the text is the greedy one, whatever is drawn."""

    def texts(*more: str) -> dict[str, list[list[int]]]:
        out = tmp_path / more[-1]
        command = arguments(
            models, "--prompts", "chat", "--proposer", "draft:3", "--proposer", "ngram:2",
            "--json", "--out", str(out), *more,
        )  # fmt: skip
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["settings"]["min_p"] == (
            float(more[-1]) if more[2:] else 0
        )
        found: dict[str, list[list[int]]] = {}
        for record in read_records(out):
            found.setdefault(record["row"], []).append(record["turns"][0]["tokens"])
        return found

    greedy, cut = texts("--temperature", "0"), texts("--temperature", "1.5", "--min-p", "1")
    assert set(greedy) == set(cut)
    assert "transformers" in greedy
    for row, found in cut.items():
        assert found == greedy["specdec plain"], row


def test_command_with_a_synthetic_draft_says_so(models: Path) -> None:
    result = CliRunner().invoke(
        main,
        ["bench", "--target", str(models / "target"), "--synthetic-acceptance", "0.5",
         "--proposer", "draft:3", "--max-new-tokens", "8", "--rounds", "1", "--limit", "1",
         "--prompts", "chat",
         "--device", "cpu", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    labels = {row["name"]: row["label"] for row in found["rows"]}
    assert found["settings"]["synthetic_acceptance"] == 0.5
    synthetic = "synthetic draft, acceptance 0.5, cost 0.1 of a target pass"
    assert labels["specdec draft:3"] == labels["transformers assistant"] == synthetic


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--no-draft"], "--no-draft and --draft exclude each other"),
        (["--synthetic-acceptance", "0.5"], "expected neither --draft nor --no-draft"),
        (["--random-weights", "qwen3-0.6b"], "expected no --draft, --spec-bench or --chat"),
        (["--proposer", "ngram", "--proposer", "ngram"], "ngram: expected each once"),
        (["--proposer", "ngram:x"], "expected NAME, NAME:N or tree:K1,K2"),
        (["--proposer-option", "ngram=3"], "expected NAME.OPTION=VALUE"),
        (["--chat"], "has no chat template"),
        (["--prompts", "nowhere"], "prompts 'nowhere': expected a file or one of"),
        (["--verification", "typical"], "'typical' is not one of"),
        (["--column", "q", "--prompts", "x.txt"], "prompts 'x.txt': expected a file"),
    ],
)  # fmt: skip
def test_command_says_in_one_line_what_is_wrong(
    models: Path, more: list[str], message: str
) -> None:
    result = CliRunner().invoke(main, arguments(models, *more))
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_command_fails_where_a_row_of_ours_is_not_lossless(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.evals.lineup.Ours", Liar)
    result = CliRunner().invoke(
        main, arguments(models, "--proposer", "draft:3", "--prompts", "chat")
    )
    assert result.exit_code == 1
    assert "NOT LOSSLESS, no speed: prompt" in result.output
