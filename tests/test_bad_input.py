"""What eval, bench and verify say of bad input: exit code 2, one line that names it."""

import json
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from specdec.cli.main import main
from specdec.cli.models import load_model
from specdec.evals import exact
from specdec.evals.exact import Finding
from specdec.evals.folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

Cli = Callable[..., Result]

COMMANDS = {
    "eval": ("--timed", "0", "--proposer", "draft:2"),
    "bench": ("--rounds", "1", "--proposer", "draft:2", "--no-transformers"),
    "verify": ("--temperature", "0", "--num-draft-tokens", "2"),
}
LONG = json.dumps({"prompt": "stop it " * 200})
LEFT_OUT = "(up to 601 tokens; the context holds 256, with 8 new ones a turn)"


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cli(command: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command on tiny models; verify leaves its tables out."""

    def sound(*_: Any, **__: Any) -> list[Finding]:
        return [Finding("tables", True, "fine")]

    monkeypatch.setattr(exact, "exact", sound)
    monkeypatch.setattr(exact, "planted", sound)
    for package in ("matplotlib", "jinja2"):  # the report's; these commands do without
        monkeypatch.setitem(sys.modules, package, None)
    once = lru_cache(load_model)
    for module in ("options", "bench"):
        monkeypatch.setattr(f"specdec.cli.{module}.load_model", once)
    pair = ("--target", str(models / "target"), "--draft", str(models / "draft"))
    less = ("--device", "cpu", "--max-new-tokens", "8", "--limit", "4", *COMMANDS[command])

    def run(*args: str) -> Result:
        result = CliRunner().invoke(main, [command, *pair, *less, *args])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return run


@pytest.fixture
def short(tmp_path: Path) -> str:
    path = tmp_path / "short.jsonl"
    path.write_text('{"prompt": "the quick"}\n')
    return str(path)


def refused(result: Result, message: str) -> None:
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


# --- prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "prompts.jsonl': it is empty"),
        (" \n\n", "prompts.jsonl': it is empty"),
        ('{"prompt": "x"}\n\n{"prompt": \n', "prompts.jsonl:3: not JSON: Expecting value"),
        ('{"prompt": "x"}\n["y"]\n', "prompts.jsonl:2: expected an object, got list"),
        ('{"prompt": "x"}\n{"turns": []}\n', "prompts.jsonl:2: expected a text or a list"),
        ('{"prompt": "x"}\n{"text": "y"}\n', "prompts.jsonl:2: unknown column 'text'"),
        ('{"prompt": "\\ud800"}\n', "prompts.jsonl:1: it is not UTF-8 text"),
        ('{"prompt": "x", "id": 1}\n{"prompt": "y", "id": 1}\n', "two have the id '1'"),
    ],
)
def test_malformed_file_is_named_with_its_line(
    cli: Cli, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    refused(cli("--prompts", str(path)), message)


def test_column_that_is_not_there_is_named(cli: Cli, short: str, tmp_path: Path) -> None:
    column = ("--column", "colour")
    refused(cli("--prompts", short, *column), "short.jsonl:1: unknown column 'colour'")
    (tmp_path / "lines.txt").write_text("the quick\n")
    refused(cli("--prompts", str(tmp_path / "lines.txt"), *column), "expected a .jsonl file")
    refused(cli("--prompts", "chat", *column), "colour")


def test_prompts_beyond_the_context_are_counted(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "the quick"}\n' + LONG + "\n")
    result = cli("--prompts", str(path))
    assert result.exit_code == 0, result.output
    assert f"{path}: 1 of 2 prompts left out {LEFT_OUT}: line-2" in result.stderr
    path.write_text(LONG + "\n")
    result = cli("--prompts", str(path))
    assert (result.exit_code, result.stdout) == (2, "")
    counted, said = result.stderr.splitlines()
    assert counted == f"{path}: 1 of 1 prompts left out {LEFT_OUT}: line-1"
    assert said == "specdec: no prompt fits the target's context"


# --- folders


def test_folder_that_is_no_run_is_refused(cli: Cli, short: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    (tmp_path / "file").write_text("")
    for name, message in (
        ("empty", "empty: it exists and is not the folder of a run; name another one"),
        ("damaged", "run.json: damaged: "),
        ("file", "is a file"),
    ):
        refused(cli("--prompts", short, "--out", str(tmp_path / name)), message)
    below = tmp_path / "file" / "run"
    result = cli("--prompts", short, "--out", str(below))
    assert (result.exit_code, result.stderr) == (1, f"specdec: {below}: Not a directory\n")


def test_run_of_another_kind_or_setting_is_refused(
    cli: Cli, command: str, short: str, tmp_path: Path
) -> None:
    RunFolder(tmp_path / "other", "chess", {})
    args = ("--prompts", short, "--out")
    refused(cli(*args, str(tmp_path / "other")), f"a run of specdec chess, not of {command}")
    assert cli(*args, str(tmp_path / "run")).exit_code == 0
    refused(cli(*args, str(tmp_path / "run"), "--seed", "5"), "its run has seed=0, this one 5")
    records = tmp_path / "run" / "records.jsonl"
    kept = records.read_bytes()
    assert cli(*args, str(tmp_path / "run")).exit_code == 0  # its own records are taken
    first = kept.splitlines(keepends=True)[0]
    for line, message in (
        (b"not", "records.jsonl:2: not JSON"),
        (b"[" * 9999, "records.jsonl:2: not JSON"),
        (b"{}", "records.jsonl:2: it is no record of this run: expected "),
        (b'{"kind": "tally", "part": 3, "row": "x"}', "records.jsonl:2: it is no record of this"),
        (b"\xff", "records.jsonl: it is not UTF-8 text"),
    ):
        records.write_bytes(first + line + b"\n")
        refused(cli(*args, str(tmp_path / "run")), message)


def test_run_on_other_prompts_of_the_same_names_is_refused(
    cli: Cli, short: str, tmp_path: Path
) -> None:
    args = ("--prompts", short, "--out", str(tmp_path / "run"))
    assert cli(*args).exit_code == 0
    assert cli(*args).exit_code == 0
    Path(short).write_text('{"prompt": "a brown fox"}\n')
    refused(cli(*args), "its run has prompts_sha256=")


# --- rows


@pytest.mark.parametrize("command", ["eval", "bench"], indirect=True)
def test_option_of_a_proposer_that_no_row_has_is_refused(
    cli: Cli, short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded before the options were looked at")

    for module in ("options", "bench"):
        monkeypatch.setattr(f"specdec.cli.{module}.load_model", loads)
    args = ("--prompts", short, "--proposer", "ngram", "--proposer-option")
    refused(
        cli(*args, "suffix.max=3"),
        "--proposer-option suffix.max: expected a proposer of the rows, draft, ngram",
    )


def test_option_of_a_proposer_that_is_no_default_is_refused(models: Path, short: str) -> None:
    args = ("--target", str(models / "target"), "--prompts", short, "--device", "cpu")
    result = CliRunner().invoke(main, ["bench", *args, "--proposer-option", "tree.kind=iid"])
    refused(result, "tree.kind: expected a proposer of the rows, ngram, suffix, lookahead")


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("eval", ("--temperature", "1", "--temperature", "1.0")),
        ("eval", ("--verification", "auto", "--verification", "auto")),
        ("eval", ("--proposer", "ngram:2", "--proposer", "ngram:2")),
        ("bench", ("--proposer", "ngram:2", "--proposer", "ngram:2")),
        ("eval", ("--prompts", "chat", "--prompts", "chat")),
        ("bench", ("--prompts", "chat", "--prompts", "chat")),
    ],
    indirect=["command"],
)
def test_row_that_is_asked_for_twice_is_refused(cli: Cli, args: tuple[str, ...]) -> None:
    value = args[-1]
    refused(cli(*args), f"Invalid value for '{args[0]}': {value}: expected each once")


@pytest.mark.parametrize("command", ["eval"], indirect=True)
def test_near_temperatures_have_rows_of_their_own(cli: Cli, short: str) -> None:
    near = ("--temperature", "0.1234567", "--temperature", "0.1234568", "--temperature", "0.5")
    rows = json.loads(cli("--prompts", short, *near, "--json").stdout)["rows"]
    names = [row["name"].rpartition(" ")[2] for row in rows]
    assert names == ["T=0.1234567", "T=0.1234568", "T=0.5"]
