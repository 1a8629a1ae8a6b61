"""specdec generate: what it prints, and what bad input gets."""

import errno
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import (
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from specdec.cli import console, inputs
from specdec.cli.console import TokenPrinter, closing_line
from specdec.cli.main import main
from specdec.cli.models import load_model
from specdec.policy import POLICIES
from specdec.stats import RunStats
from specdec.zoo.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Any  # a transformers model: its methods are typed in part

PROMPT = "def quicksort(items):"
SECONDS = re.compile(r"\d+\.\d tokens/s|\d+%/\d+%/\d+%")
COMMAND = [sys.executable, "-P", "-m", "specdec.cli.main", "generate"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


class Cli:
    """Runs `specdec generate` on the tiny pair, on the CPU, with drafts of four tokens unless said
    otherwise: measured costs tell `auto` that a draft as large as its target does not pay."""

    def __init__(self, models: Path) -> None:
        self.models = models
        self.pair = [
            "--target", str(models / "target"), "--draft", str(models / "draft"), "--device", "cpu",
            "--num-draft-tokens", "4",
        ]  # fmt: skip

    def __call__(self, *args: str, stdin: str | bytes | None = None) -> Result:
        return self.raw("generate", *self.pair, *args, stdin=stdin)

    @staticmethod
    def raw(*args: str, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(main, list(args), input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.output
        return result

    def bad(self, *args: str, stdin: str | bytes | None = None, code: int = 2) -> str:
        """The one line that a mistake gets."""
        result = self(*args, stdin=stdin)
        assert (result.exit_code, result.stdout) == (code, "")
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("specdec: ")
        return result.stderr.removeprefix("specdec: ").rstrip("\n")

    def start(self, *args: str, **options: Any) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
        environment.pop("PYTHONPATH", None)
        return subprocess.Popen([*COMMAND, *self.pair, *args], env=environment, **options)


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Calls in this process share the models of a folder; those in another load them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdec.cli.options.load_model", lru_cache(load_model))
        yield


@pytest.fixture(scope="module")
def cli(models: Path) -> Cli:
    return Cli(models)


@pytest.fixture(scope="module")
def expected(target: Model, tokenizer: PreTrainedTokenizerFast) -> Callable[..., list[int]]:
    """What transformers says after a text."""

    def generate(text: str, count: int) -> list[int]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        out = target.generate(ids, max_new_tokens=count, do_sample=False)
        tokens: list[int] = out[0, ids.shape[1] :].tolist()
        return tokens

    return generate


def decode(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


# --- one prompt


@pytest.mark.parametrize("how", ["argument", "file", "standard input", "dash"])
def test_prompt_is_continued_as_transformers_does(
    cli: Cli,
    tokenizer: PreTrainedTokenizerFast,
    expected: Callable[..., list[int]],
    tmp_path: Path,
    how: str,
) -> None:
    stdin = PROMPT if how in ("standard input", "dash") else None
    where = {"argument": [PROMPT], "file": ["--prompt-file", str(tmp_path / "prompt.txt")]}
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    args = where.get(how, ["--prompt-file", "-"] if how == "dash" else [])
    result = cli(*args, "--max-new-tokens", "20", stdin=stdin)
    assert result.stdout == PROMPT + decode(tokenizer, expected(PROMPT, 20)) + "\n"
    assert result.exit_code == 0
    assert re.fullmatch(
        r"20 tokens \| S \| \d\.\d\d tokens per target pass \| acceptance \d+% of \d+ drafted \| "
        r"draft/verify/other S\n",
        SECONDS.sub("S", result.stderr),
    )


def test_no_speculation_prints_the_same_text(cli: Cli) -> None:
    drafted = cli(PROMPT, "--max-new-tokens", "20")
    plain = cli.raw(
        "generate", "--target", str(cli.models / "target"), "--no-speculation", "--device", "cpu",
        PROMPT, "--max-new-tokens", "20",
    )  # fmt: skip
    assert plain.stdout == drafted.stdout
    assert SECONDS.sub("S", plain.stderr) == (
        "20 tokens | S | 1.00 tokens per target pass | draft/verify/other S\n"
    )


def test_json_is_one_object_that_holds_everything(
    cli: Cli, tokenizer: PreTrainedTokenizerFast, expected: Callable[..., list[int]]
) -> None:
    result = cli(PROMPT, "--max-new-tokens", "12", "--json", "--seed", "5")
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    tokens = expected(PROMPT, 12)
    assert set(found) == {"target", "draft", "seed", "outputs", "stats"}
    assert found["target"] == str(cli.models / "target")
    assert found["draft"] == str(cli.models / "draft")
    assert found["seed"] == 5
    assert found["outputs"] == [
        {
            "prompt": PROMPT,
            "text": decode(tokenizer, tokens),
            "token_ids": tokens,
            "finish_reason": "length",
        }
    ]
    stats = found["stats"]
    assert set(stats) == {*RunStats().as_dict(), "wall_seconds"}
    assert stats["tokens"] == 12
    assert stats["acceptance_rate"] == pytest.approx(stats["accepted"] / stats["drafted"], abs=1e-6)
    assert stats["wall_seconds"] >= stats["seconds"]["total"]
    assert stats["lossless"] is True


def test_sampling_options_and_seed_decide_the_text(cli: Cli) -> None:
    sampled = ["--temperature", "0.8", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.01"]

    def run(*more: str) -> str:
        return cli(PROMPT, "--max-new-tokens", "12", *sampled, *more).stdout

    assert run("--seed", "1") == run("--seed", "1") != run("--seed", "2")
    found = json.loads(run("--json"))
    again = json.loads(run("--json", "--seed", str(found["seed"])))
    assert again["outputs"] == found["outputs"]
    gumbel = [run("--seed", "3", "--verification", "gumbel", "--num-draft-tokens", n) for n in "07"]
    assert gumbel[0] == gumbel[1]


def test_num_draft_tokens_is_honoured(cli: Cli) -> None:
    for count in (0, 2):
        result = cli(PROMPT, "--json", "--max-new-tokens", "9", "--num-draft-tokens", str(count))
        stats = json.loads(result.stdout)["stats"]
        assert len(stats["acceptance_by_position"]) == count


def test_draft_window_changes_the_drafts_and_not_the_text(cli: Cli) -> None:
    args = [PROMPT * 6, "--json", "--max-new-tokens", "60", "--num-draft-tokens", "5"]
    whole, near = (json.loads(cli(*args, *more).stdout) for more in ([], ["--draft-window", "16"]))
    assert near["outputs"] == whole["outputs"]
    assert near["stats"]["accepted"] != whole["stats"]["accepted"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_text_of_plain_decoding(cli: Cli, policy: str) -> None:
    options = ["--json", "--max-new-tokens", "9"]
    plain = json.loads(cli(PROMPT, *options, "--num-draft-tokens", "0").stdout)
    found = json.loads(cli(PROMPT, *options, "--policy", policy).stdout)
    assert found["outputs"] == plain["outputs"]
    lengths = found["stats"]["acceptance_by_position"]
    assert len(lengths) <= {"constant": 4, "heuristic": 8}.get(policy, 8)
    if policy in ("constant", "heuristic"):
        assert len(lengths) >= 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_runs(cli: Cli, dtype: str) -> None:
    result = cli(PROMPT, "--dtype", dtype, "--max-new-tokens", "4", "--json")
    assert json.loads(result.stdout)["stats"]["tokens"] == 4


def test_end_token_ends_the_text_and_is_not_printed(
    cli: Cli, expected: Callable[..., list[int]], tokenizer: Any, tmp_path: Path
) -> None:
    tokens = expected(PROMPT, 20)
    shutil.copytree(cli.models / "target", tmp_path / "target")
    config = tmp_path / "target" / "generation_config.json"
    changed = json.loads(config.read_text()) | {"eos_token_id": [299, tokens[6]]}
    config.write_text(json.dumps(changed))
    result = cli(PROMPT, "--target", str(tmp_path / "target"), "--json")
    [output] = json.loads(result.stdout)["outputs"]
    assert output["token_ids"] == tokens[: tokens.index(tokens[6]) + 1]
    assert output["finish_reason"] == "stop"
    assert output["text"] == decode(tokenizer, output["token_ids"])


def test_stop_string_and_what_follows_are_not_printed(
    cli: Cli, expected: Callable[..., list[int]], tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = decode(tokenizer, expected(PROMPT, 40))
    stop = next(
        whole[i : i + 2] for i in range(8, len(whole))
        if whole[i : i + 2].isascii() and whole[i : i + 2].isprintable()
    )  # fmt: skip
    result = cli(PROMPT, "--max-new-tokens", "40", "--stop", "nowhere", "--stop", stop)
    assert result.stdout == PROMPT + whole[: whole.index(stop)] + "\n"
    found = json.loads(cli(PROMPT, "--max-new-tokens", "40", "--stop", stop, "--json").stdout)
    assert found["outputs"][0]["finish_reason"] == "stop"
    assert found["stats"]["tokens"] < 40


# --- batches and chats


def test_batch_gives_each_line_what_it_gets_alone(cli: Cli) -> None:
    lines = [PROMPT, "the quick", "", "stop", "return sorted(items)", "x"]
    prompts = [line for line in lines if line]
    options = ["--max-new-tokens", "8"]
    alone = [cli(line, *options).stdout for line in prompts]
    result = cli("--batch", "2", *options, stdin="\n".join(lines))
    assert result.stdout == "".join(alone)
    assert result.stderr.startswith("40 tokens | ")
    found = json.loads(cli("--batch", "9", *options, "--json", stdin="\n".join(lines)).stdout)
    assert [output["prompt"] for output in found["outputs"]] == prompts
    assert [o["prompt"] + o["text"] + "\n" for o in found["outputs"]] == alone
    assert found["stats"]["tokens"] == 40


def test_sampled_batch_does_not_depend_on_its_size(cli: Cli) -> None:
    # with an adaptive number, what is drafted, and so the text, depends on what a batch costs
    options = [
        "--max-new-tokens",
        "8",
        "--temperature",
        "1",
        "--seed",
        "3",
        "--num-draft-tokens",
        "4",
    ]
    lines = "\n".join([PROMPT, "the quick", "stop"])
    one, two = (cli("--batch", n, *options, stdin=lines).stdout for n in "13")
    assert one == two


@pytest.fixture(scope="module")
def chat(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """The pair with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    for name in ("target", "draft"):
        shutil.copytree(models / name, folder / name)
        (folder / name / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return Cli(folder)


def test_chat_answers_each_turn_with_all_turns_before(
    chat: Cli, tokenizer: PreTrainedTokenizerFast
) -> None:
    history, answers = "", []
    for question in ("one", "two", "three"):
        history += f"<user>{question}\n<assistant>"
        ids = torch.tensor([tokenizer(history, add_special_tokens=False)["input_ids"]])
        answers.append(chat_answer(chat, ids))
        history += decode(tokenizer, answers[-1]) + "\n"
    result = chat("--chat", "--max-new-tokens", "10", stdin="one\n\ntwo\nthree\n")
    assert result.exit_code == 0
    assert result.stdout == "".join(decode(tokenizer, tokens) + "\n" for tokens in answers)
    assert [line.split(" | ")[0] for line in result.stderr.splitlines()] == ["10 tokens"] * 3


def chat_answer(chat: Cli, ids: torch.Tensor) -> list[int]:
    model: Model = LlamaForCausalLM.from_pretrained(chat.models / "target")
    out = model.generate(ids, max_new_tokens=10, do_sample=False)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


def test_chat_keeps_the_cache_between_turns(chat: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.runner import ModelRunner

    rows: list[int] = []
    score = ModelRunner.score

    def counting(self: ModelRunner, packed: Any) -> Any:
        rows.append(max(len(row.tokens) for row in packed))
        return score(self, packed)

    monkeypatch.setattr(ModelRunner, "score", counting)
    first = "a long first turn " * 4 + "\n"
    turn = ["--chat", "--max-new-tokens", "4", "--num-draft-tokens", "2"]
    chat(*turn, stdin=first)
    longest = max(rows)
    rows.clear()
    chat(*turn, stdin=first + "b\n")
    assert longest > 40
    assert sum(count > 30 for count in rows) == 2  # target and draft read the first turn, once


def test_chat_in_json_is_one_object_per_turn(chat: Cli) -> None:
    result = chat("--chat", "--json", "--max-new-tokens", "5", stdin="one\ntwo\n")
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert [turn["outputs"][0]["prompt"] for turn in turns] == ["one", "two"]
    assert [turn["stats"]["tokens"] for turn in turns] == [5, 5]
    assert result.stderr == ""


def test_chat_template_that_refuses_is_one_line(chat: Cli, tmp_path: Path) -> None:
    shutil.copytree(chat.models / "target", tmp_path / "target")
    template = tmp_path / "target" / "chat_template.jinja"
    template.write_text("{{ raise_exception('no users here') }}", encoding="utf-8")
    message = chat.bad("--chat", "--target", str(tmp_path / "target"), stdin="one\n")
    assert message == "--chat: the tokenizer's chat template: no users here"


# --- what bad input gets


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x", "--max-new-tokens", "0"], "'--max-new-tokens': 0 is not in the range x>=1."),
        (["x", "--max-new-tokens", "-3"], "'--max-new-tokens': -3 is not in the range x>=1."),
        (["x", "--max-new-tokens", "ten"], "'--max-new-tokens': 'ten' is not a valid integer"),
        (["x", "--temperature", "-1"], "'--temperature': -1.0 is not in the range x>=0."),
        (["x", "--top-p", "0"], "'--top-p': 0.0 is not in the range 0<x<=1."),
        (["x", "--top-p", "1.5"], "'--top-p': 1.5 is not in the range 0<x<=1."),
        (["x", "--min-p", "-0.1"], "'--min-p': -0.1 is not in the range 0<=x<=1."),
        (["x", "--top-k", "-1"], "'--top-k': -1 is not in the range x>=0."),
        (["x", "--seed", "-1"], f"'--seed': -1 is not in the range 0<=x<={2**64 - 1}."),
        (["x", "--batch", "0"], "'--batch': 0 is not in the range x>=1."),
        (
            ["x", "--num-draft-tokens", "-1"],
            "'--num-draft-tokens': '-1' is neither a whole number from 0 on nor 'auto'.",
        ),
        (["x", "--proposer", "magic"], "'--proposer': 'magic' is not "),
        (["x", "--verification", "blok"], "'--verification': 'blok' is not one of 'auto', "),
        (["x", "--dtype", "int8"], "'--dtype': 'int8' is not one of 'auto', 'float32', "),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_bad_option_is_named_with_its_value_and_what_is_accepted(
    cli: Cli, args: list[str], message: str
) -> None:
    assert cli.bad(*args).startswith(f"Invalid value for {message}")


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["x", "--temperature", "nan"], None, "temperature=nan: expected 0 (greedy) or more"),
        (["x", "--top-p", "nan"], None, "top_p=nan: expected in (0, 1]"),
        ([""], None, "the prompt is empty: expected some text"),
        ([" \n"], None, "the prompt is empty: expected some text"),
        ([], "", "the prompt is empty: expected some text"),
        ([], b"\xff\xfe", "standard input: it is not UTF-8 text"),
        (["\udcff"], None, "PROMPT: it is not UTF-8 text"),
        (
            ["--batch", "2"],
            "\n \n",
            "--batch: the input has no prompt, not one line of text",
        ),
        (
            ["x", "--prompt-file", "y"],
            None,
            "PROMPT and --prompt-file: expected one of the two",
        ),
        (
            ["--prompt-file", "none.txt"],
            None,
            "--prompt-file 'none.txt': No such file or directory",
        ),
        (
            ["x", "--no-speculation"],
            None,
            "--no-speculation: expected neither --draft nor --proposer",
        ),
        (["x", "--stop", ""], None, "--stop '': expected some text"),
        (
            ["x", "--draft-window", "16", "--num-draft-tokens", "17"],
            None,
            "draft_window=16: expected at least the 17 tokens that a step drafts",
        ),
        (
            ["x", "--chat"],
            None,
            "--chat reads its turns from standard input: expected no PROMPT, ",
        ),
        (
            ["x", "--verification", "typical", "--temperature", "1"],
            None,
            "verification='typical' changes what the target says; pass lossy=True (--lossy) to "
            "accept that",
        ),
        (
            ["x", "--verification", "greedy", "--temperature", "1"],
            None,
            "verification='greedy' needs temperature 0; use 'auto' or a rule that samples",
        ),
        (["x", "--device", "warp"], None, "--device 'warp': Expected one of cpu, cuda, "),
        (["x", "--device", "meta"], None, "--device 'meta': "),
        (
            ["x", "--target", "no-such-model"],
            None,
            "--target 'no-such-model': no built-in model (big, small), no folder, and no hub model "
            "that can be reached by that name",
        ),
        (["x", "--draft", "no/such"], None, "--draft 'no/such': no built-in model (big, small), "),
        (["--nope"], None, "No such option"),
        (["x", "y"], None, "Got unexpected extra argument (y)"),
    ],
    ids=lambda value: repr(value) if isinstance(value, list) else "",
)
def test_bad_usage_gets_one_line_and_exit_code_2(
    cli: Cli, args: list[str], stdin: str | bytes | None, message: str
) -> None:
    assert cli.bad(*args, stdin=stdin).startswith(message)


def test_prompt_file_that_is_no_text_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    path = str(tmp_path / "binary")
    assert cli.bad("--prompt-file", path) == f"--prompt-file {path!r}: it is not UTF-8 text"
    assert "is a directory" in cli.bad("--prompt-file", str(tmp_path))


@pytest.mark.parametrize("role", ["target", "draft"])
def test_folder_that_holds_no_model_is_refused(cli: Cli, tmp_path: Path, role: str) -> None:
    path = str(tmp_path)
    assert cli.bad("x", f"--{role}", path) == f"--{role} {path!r}: the folder has no config.json"


def broken_copy(cli: Cli, folder: Path, name: str, content: bytes | None) -> str:
    shutil.copytree(cli.models / "target", folder / "model")
    if content is None:
        (folder / "model" / name).unlink()
    else:
        (folder / "model" / name).write_bytes(content)
    return str(folder / "model")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "unheard-of"}'),
        ("model.safetensors", b"not weights"),
        ("model.safetensors", None),
        ("tokenizer.json", b"{}"),
    ],
    ids=["no JSON", "unknown type", "no safetensors", "no weights", "no tokenizer"],
)
@pytest.mark.parametrize("role", ["target", "draft"])
def test_broken_model_folder_is_named(
    cli: Cli, tmp_path: Path, role: str, name: str, content: bytes | None
) -> None:
    path = broken_copy(cli, tmp_path, name, content)
    assert cli.bad("x", f"--{role}", path).startswith(f"--{role} {path!r}: ")


def test_weights_that_are_missing_are_named(cli: Cli, tmp_path: Path, target: Model) -> None:
    from safetensors.torch import save_file

    path = broken_copy(cli, tmp_path, "model.safetensors", None)
    weights = {k: v.contiguous() for k, v in target.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    message = cli.bad("x", "--target", path)
    assert message.endswith("1 weights are not in its files, for example lm_head.weight")


def test_draft_with_another_tokenizer_gives_the_same_text(
    cli: Cli, tmp_path: Path, make_llama: Callable[..., Model]
) -> None:
    other = train_tokenizer(["another text altogether, and yet another one"] * 3, 64)
    make_llama(len(other), seed=2).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    args = [PROMPT, "--max-new-tokens", "20", "--json"]
    plain = json.loads(cli(*args).stdout)
    for shape in (["--num-draft-tokens", "3"], ["--tree", "2,1", "--policy", "constant"]):
        found = json.loads(cli(*args, *shape, "--draft", str(tmp_path)).stdout)
        assert found["outputs"] == plain["outputs"]
        assert found["stats"]["drafted"] > 0


def test_draft_with_a_padded_vocabulary_works(
    cli: Cli, tmp_path: Path, make_llama: Callable[..., Model], tokenizer: Any
) -> None:
    make_llama(len(tokenizer) + 19, seed=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    padded = cli(PROMPT, "--draft", str(tmp_path), "--max-new-tokens", "12")
    assert padded.exit_code == 0
    assert padded.stdout == cli(PROMPT, "--max-new-tokens", "12").stdout


@pytest.mark.parametrize("role", ["target", "draft"])
def test_recurrent_model_is_named_with_the_reason(
    cli: Cli, tmp_path: Path, tokenizer: Any, role: str
) -> None:
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, state_size=4
    )
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    message = cli.bad("x", f"--{role}", str(tmp_path), code=1)
    assert message.startswith(f"--{role} '{tmp_path}': MambaForCausalLM keeps a recurrent state")
    assert "cannot be taken back when drafted tokens are rejected" in message


def test_encoder_decoder_is_named(cli: Cli, tmp_path: Path, tokenizer: Any) -> None:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert cli.bad("x", "--target", str(tmp_path)) == (
        f"--target '{tmp_path}': T5Config is an encoder-decoder; specdec needs a causal LM"
    )


@pytest.mark.parametrize("how", ["alone", "in a batch"])
def test_prompt_longer_than_the_context_is_refused_before_anything_is_written(
    cli: Cli, how: str
) -> None:
    long = "x y z " * 100
    message = cli.bad(long) if how == "alone" else cli.bad("--batch", "1", stdin=f"one\n{long}\n")
    assert re.match(r"the prompt has \d+ tokens, the target's context holds 256", message)


def test_text_stops_where_the_context_ends(cli: Cli) -> None:
    found = json.loads(cli("x y z " * 40, "--max-new-tokens", "999", "--json").stdout)
    assert found["outputs"][0]["finish_reason"] == "length"
    assert found["stats"]["tokens"] < 256


def test_chat_without_a_template_is_refused_by_name(cli: Cli) -> None:
    message = cli.bad("--chat", stdin="hello\n")
    assert message == f"--chat: the tokenizer of '{cli.models / 'target'}' has no chat template"


def test_nan_in_the_target_is_named_with_the_step(
    cli: Cli, tmp_path: Path, expected: Callable[..., list[int]]
) -> None:
    tokens = expected(PROMPT, 9)
    at = next(i for i, t in enumerate(tokens[3:], 3) if t not in tokens[:i])
    shutil.copytree(cli.models / "target", tmp_path / "model")
    broken: Model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        broken.get_input_embeddings().weight[tokens[at]] = float("nan")
    broken.save_pretrained(tmp_path / "model")
    result = cli(PROMPT, "--target", str(tmp_path / "model"), "--num-draft-tokens", "0")
    assert result.exit_code == 1
    assert result.stderr == (
        f"specdec: the target's logits hold NaN or infinity at step {at + 1} of prompt-0; check "
        "its weights and dtype\n"
    )
    assert result.stdout.startswith(PROMPT)
    assert result.stdout.endswith("\n")  # what was said stays, and the error has its own line


def test_command_line_mistakes_above_a_command_are_one_line(cli: Cli) -> None:
    result = cli.raw("generat")
    assert result.exit_code == 2
    assert result.stderr.startswith("specdec: No such command 'generat'.")
    assert cli.raw("--nope").stderr.count("\n") == 1
    assert cli.raw().exit_code == 2


# --- help


def test_help_shows_every_option_with_a_description() -> None:
    result = CliRunner().invoke(main, ["generate", "--help"], terminal_width=100)
    assert result.exit_code == 0
    for option in main.commands["generate"].params:
        if option.param_type_name == "option":
            assert option.opts[0] in result.output
            assert option.help
    for name in (
        "PROMPT", "--prompt-file", "--target", "--draft", "--no-speculation", "--max-new-tokens",
        "--temperature", "--top-k", "--top-p", "--min-p", "--seed", "--stop", "--num-draft-tokens",
        "--proposer", "--verification", "--dtype", "--device", "--batch", "--chat", "--json",
    ):  # fmt: skip
        assert name in result.output


def test_help_of_the_program_lists_commands_and_exit_codes() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "generate" in result.output
    assert "130 interrupted" in " ".join(result.output.split())


# --- processes: pipes, terminals, Ctrl-C


def test_piped_output_is_plain_and_the_remark_goes_to_standard_error(cli: Cli) -> None:
    process = cli.start(PROMPT, "--max-new-tokens", "12", stdout=-1, stderr=-1, stdin=-3)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert out.decode() == cli(PROMPT, "--max-new-tokens", "12").stdout
    assert b"\x1b" not in err
    assert err.startswith(b"12 tokens | ")


def test_damaged_cost_profile_is_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    args = (PROMPT, "--max-new-tokens", "3", "--num-draft-tokens", "auto")
    assert cli(*args).exit_code == 0
    [profile] = tmp_path.iterdir()
    whole = profile.read_bytes()
    profile.write_bytes(b"\xff" + whole)
    process = cli.start(*args, stdout=-1, stderr=-1, stdin=-3)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0
    said, closing = err.decode().splitlines()
    assert said.startswith(f"specdec: warning: the cost profile {profile} is damaged (")
    assert said.endswith("; measuring anew")
    assert closing.startswith("3 tokens | ")
    assert json.loads(profile.read_bytes())["key"] == json.loads(whole)["key"]


def on_terminal(cli: Cli, *args: str, **environment: str) -> tuple[str, int]:
    """Everything that a terminal shows, and the exit code."""
    control, terminal = pty.openpty()
    process = cli.start(*args, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(control, 4096)
        except OSError as error:
            if error.errno != errno.EIO:  # so Linux says that the other side has closed
                raise
            break
        if not piece:
            break
        shown += piece
    os.close(control)
    return shown.decode(errors="replace").replace("\r\n", "\n"), process.wait(timeout=300)


def test_terminal_shows_accepted_tokens_in_colour_and_progress_while_loading(cli: Cli) -> None:
    args = [PROMPT, "--max-new-tokens", "12"]
    shown, code = on_terminal(cli, *args, NO_COLOR="", TERM="xterm")
    assert code == 0
    for role in ("target", "draft"):
        assert f"loading the {role}, {cli.models / role} …" in shown
    text = shown[shown.index(PROMPT) :]
    assert text.count("\x1b[32m") >= 1
    accepted = json.loads(cli(*args, "--json").stdout)["stats"]["accepted"]
    assert text.count("\x1b[32m") <= accepted
    plain = re.sub(r"\x1b\[\d*m", "", text)
    assert plain.startswith(cli(*args).stdout.replace("\r", ""))


def test_no_color_is_honoured(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "is_terminal", lambda stream: stream is not None)
    args = [PROMPT, "--max-new-tokens", "12"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = cli(*args).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    plain = cli(*args).stdout
    assert "\x1b[32m" in coloured
    assert plain == re.sub(r"\x1b\[\d*m", "", coloured)


def test_no_prompt_on_a_terminal_is_refused_instead_of_waiting(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "is_terminal", lambda stream: stream is not None)
    assert cli.bad(stdin="x") == (
        "no prompt: give PROMPT, --prompt-file FILE, or text on standard input"
    )


def interrupt(process: "subprocess.Popen[bytes]", after: bytes) -> tuple[bytes, bytes]:
    """Sends Ctrl-C once the output holds `after` and something more."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    out = b""
    deadline = time.monotonic() + 300
    while len(out) <= len(after) or not out.startswith(after):
        assert time.monotonic() < deadline
        piece = os.read(descriptor, 64)
        assert piece, "it ended before it could be interrupted"
        out += piece
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=300)
    return out + rest, err


@pytest.fixture(scope="module")
def slow(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A target that never comes to its end: a context of a million tokens, no end token."""
    folder = tmp_path_factory.mktemp("slow")
    shutil.copytree(cli.models / "target", folder / "target")
    shutil.copytree(cli.models / "draft", folder / "draft")
    for name in ("target", "draft"):
        path = folder / name / "config.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 60000})
        )
        path = folder / name / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 300}))
    return Cli(folder)


def test_ctrl_c_keeps_the_text_and_exits_with_130(slow: Cli) -> None:
    process = slow.start(PROMPT, "--max-new-tokens", "50000", stdout=-1, stderr=-1, stdin=-3)
    out, err = interrupt(process, PROMPT.encode())
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert re.match(rb"\d+ tokens \| ", err)
    assert err.count(b"\n") == 1


def test_ctrl_c_in_a_chat_that_waits_exits_with_130(chat: Cli) -> None:
    process = chat.start("--chat", "--max-new-tokens", "3", stdout=-1, stderr=-1, stdin=-1)
    assert process.stdin is not None
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert process.stderr is not None
    line = process.stderr.readline()  # the closing line of the first turn
    assert line.startswith(b"3 tokens | ")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_closed_pipe_ends_quietly(slow: Cli) -> None:
    process = slow.start(PROMPT, "--max-new-tokens", "50000", stdout=-1, stderr=-1, stdin=-3)
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    _, err = process.communicate(timeout=300)
    assert err == b""
    assert process.returncode == 0


def test_closed_streams_are_no_reason_to_fail(cli: Cli) -> None:
    def close() -> None:
        for number in (0, 1, 2):
            os.close(number)

    process = cli.start(PROMPT, "--max-new-tokens", "3", preexec_fn=close)
    assert process.wait(timeout=300) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_is_one_line(cli: Cli) -> None:
    with Path("/dev/full").open("wb") as full:
        process = cli.start(PROMPT, "--max-new-tokens", "3", stdin=-3, stdout=full, stderr=-1)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err == b"specdec: No space left on device\n"


# --- the printer


class Words:
    """A tokenizer that writes a space before a word unless it is the first, as sentencepiece."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(f"w{token}" for token in tokens)


def printed(printer: TokenPrinter, *steps: tuple[list[int], int]) -> str:
    for tokens, drafted in steps:
        printer.put(tokens, drafted)
    printer.end()
    return printer.text


def test_printer_keeps_the_space_between_prompt_and_first_word() -> None:
    pieces: list[str] = []
    printer = TokenPrinter(Words(), [1, 2], [], False, pieces.append)
    assert printed(printer, ([3, 4], 1), ([5], 0), (list(range(6, 30)), 0)) == "".join(pieces)
    assert "".join(pieces) == " " + " ".join(f"w{n}" for n in range(3, 30))


def test_printer_holds_incomplete_characters_and_stop_strings_back(tokenizer: Any) -> None:
    text = "né€🙂 stop st"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    printer = TokenPrinter(tokenizer, [], ["nothing"], False, pieces.append)
    assert printed(printer, *(([token], 0) for token in tokens)) == text
    assert "\ufffd" not in "".join(pieces)
    pieces.clear()
    printer = TokenPrinter(tokenizer, [], ["op st", "stop!"], False, pieces.append)
    assert printed(printer, (tokens, 2)) == "né€🙂 st"
    assert printer.stopped
    printer = TokenPrinter(tokenizer, [], ["stop?"], False, pieces.append)
    assert printed(printer, (tokens, 2)) == text  # the start of one is no stop string
    broken = tokenizer("€", add_special_tokens=False)["input_ids"][:-1]
    assert printed(TokenPrinter(tokenizer, [], [], False, pieces.append), (broken, 0)) == "\ufffd"


def test_printer_colours_what_the_draft_said() -> None:
    pieces: list[str] = []
    printed(TokenPrinter(Words(), [1], [], True, pieces.append), ([2, 3, 4], 2))
    assert pieces == ["\x1b[32m w2\x1b[0m", "\x1b[32m w3\x1b[0m", " w4"]


def test_closing_line_says_lossy_and_survives_an_empty_run() -> None:
    assert closing_line(RunStats(lossless=False), 0.0) == (
        "0 tokens | - tokens/s | draft/verify/other -/-/- | LOSSY"
    )


# --- the built-in pair


def test_builtin_pair_is_the_default() -> None:
    result = Cli.raw("generate", "--max-new-tokens", "24", "--json", PROMPT)
    found = json.loads(result.stdout)
    assert (found["target"], found["draft"]) == ("big", "small")
    assert 0 < found["stats"]["accepted"] < found["stats"]["drafted"]
    plain = Cli.raw(
        "generate", "--max-new-tokens", "24", "--json", PROMPT, "--no-speculation", "--dtype",
        "float32",
    )  # fmt: skip
    drafted = Cli.raw("generate", "--max-new-tokens", "24", "--json", PROMPT, "--dtype", "float32")
    texts = [json.loads(run.stdout)["outputs"] for run in (plain, drafted)]
    assert texts[0] == texts[1]
