"""The nightly matrix and the mutation check: what they write, when they fail, where they go on."""

import ast
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from specdec.evals import mutation, nightly_exact

CELLS = [("token", "chain 3", "iid", "disjoint"), ("gumbel", "[2,1]", "iid", "one-hot p")]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nightly_exact, "cells", lambda: CELLS)
    monkeypatch.setattr(nightly_exact, "SEEDS", 1)
    monkeypatch.setattr(nightly_exact, "PATHS", 4)


@pytest.mark.usefixtures("small")
def test_nightly_matrix_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results" / "exact.json"
    first = CliRunner().invoke(nightly_exact.main, ["--out", str(out)])
    assert first.exit_code == 0, first.output
    assert "2 cells exact" in first.output
    content = json.loads(out.read_text())
    assert (content["cells"], content["failed"]) == (2, [])
    assert content["results"]["token, chain 3, iid, disjoint"] == {
        "seeds": 1, "float64": 0.0, "accepted": 0, "fraction": "0",
    }  # fmt: skip
    assert content["results"]["gumbel, [2,1], iid, one-hot p"]["mismatches"] == 0

    def again(*cell: str) -> nightly_exact.Result:
        raise AssertionError(cell)

    monkeypatch.setattr(nightly_exact, "run_cell", again)
    assert CliRunner().invoke(nightly_exact.main, ["--out", str(out)]).exit_code == 0
    monkeypatch.setattr(nightly_exact, "sources", lambda: "others")
    assert CliRunner().invoke(nightly_exact.main, ["--out", str(out)]).exit_code == 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "bad", [{"fraction": "1/3", "float64": 0.0}, {"float64": 1e-9}, {"mismatches": 1}]
)
def test_nightly_matrix_fails_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: nightly_exact.Result
) -> None:
    monkeypatch.setattr(nightly_exact, "run_cell", lambda *_: bad)
    result = CliRunner().invoke(nightly_exact.main, ["--out", str(tmp_path / "exact.json")])
    assert result.exit_code == 1
    assert "2 cells failed, the first: token, chain 3, iid, disjoint" in result.output


SOURCE = '''
def clip(x: int, top: int = 9) -> int:
    """Doc."""
    if x < top:
        return x + 1
    return min(x, top)
'''


def test_mutants_change_one_place_each() -> None:
    found = mutation.mutants(SOURCE)
    texts = [ast.unparse(mutation.mutated(SOURCE, mutant)) for mutant in found]
    original = ast.unparse(ast.parse(SOURCE))
    assert len(set(texts)) == len(texts)
    for text in texts:
        pairs = zip(text.split("\n"), original.split("\n"), strict=True)
        assert sum(a != b for a, b in pairs) == 1
    for expected in ("if x <= top:", "if x >= top:", "if False:", "return x - 1", "return x + 2",
                     "return max(x, top)", "return None", "top: int=10"):  # fmt: skip
        assert sum(expected in text for text in texts) >= 1, expected
    assert [mutant.line for mutant in found] == sorted(mutant.line for mutant in found)


def test_survivor_needs_a_reason(tmp_path: Path) -> None:
    out, survivors = tmp_path / "mutation.json", mutation.mutants(SOURCE)[:2]
    names = [mutant.name for mutant in survivors]
    assert mutation.save(out, "reference", 9, survivors) == names
    content = json.loads(out.read_text())
    assert (content["reference"]["mutants"], content["reference"]["killed"]) == (9, 7)
    content["reference"]["survivors"][0]["reason"] = "the same value"
    out.write_text(json.dumps(content))
    assert mutation.save(out, "reference", 9, survivors) == names[1:]
    assert mutation.save(out, "checks", 3, []) == []
    assert mutation.load_reasons(out, "reference")[names[0]] == "the same value"
