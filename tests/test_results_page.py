"""docs/results.md is made from the raw files, all of them, and from nothing else."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from specdec.errors import InvalidArgumentError
from specdec.evals.check_results import main as check
from specdec.evals.markdown import table
from specdec.evals.results_audits import estimators, planted_power
from specdec.evals.results_kernels import gpu_bench, kernel_compile
from specdec.evals.results_page import page
from specdec.evals.results_sections import SECTIONS, bench, policy_sets

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evals" / "results"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RESULTS, tmp_path / "evals" / "results"))


def test_the_committed_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == page(RESULTS)


def test_every_raw_file_is_named_on_the_page() -> None:
    text = page(RESULTS)
    for path in RESULTS.glob("*.json"):
        assert f"`{path.name}`: " in text


def test_the_page_follows_the_raw_file(results: Path) -> None:
    path = results / "speed_shapes.json"
    raw = json.loads(path.read_text())
    raw["shapes"]["125M float32"]["specdec plain / transformers"] = 77.125
    path.write_text(json.dumps(raw))
    assert "77.12" in page(results)


def test_a_raw_file_without_a_section_is_an_error(results: Path) -> None:
    (results / "novelty.json").write_text("{}")
    with pytest.raises(InvalidArgumentError, match=r"novelty\.json: no section of docs"):
        page(results)


def test_a_section_without_its_file_is_an_error(results: Path) -> None:
    (results / "ensemble.json").unlink()
    with pytest.raises(InvalidArgumentError, match=r"ensemble\.json: no such file"):
        page(results)


def test_a_damaged_raw_file_is_named(results: Path) -> None:
    (results / "ensemble.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match=r"ensemble\.json: not JSON"):
        page(results)


def test_the_check_fails_on_a_stale_page_and_writes_a_fresh_one(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = results.parent.parent
    monkeypatch.setattr(sys, "argv", ["check_results.py"])
    with pytest.raises(SystemExit, match="it differs from evals/results"):
        check(root)
    monkeypatch.setattr(sys, "argv", ["check_results.py", "--write"])
    check(root)
    monkeypatch.setattr(sys, "argv", ["check_results.py"])
    check(root)
    with (root / "docs" / "results.md").open("a") as file:
        file.write("By hand: ten times as fast.\n")
    with pytest.raises(SystemExit, match="it differs from evals/results"):
        check(root)


def test_no_two_sections_read_one_file() -> None:
    for path in RESULTS.glob("*.json"):
        assert len([s for s in SECTIONS if path.match(s.pattern)]) == 1


def test_cells_cannot_break_a_table() -> None:
    assert table(["a", "b"], [["x|y\nz", None], [True, 0.125]]) == [
        "| a | b |", "|---|---:|", "| x\\|y z | - |", "| yes | 0.12 |",
    ]  # fmt: skip


def test_a_bench_is_labelled_and_what_was_refused_has_no_speed() -> None:
    spread = {"median": 2.0, "p20": 1.0, "p80": 3.0}
    base: dict[str, Any] = {"tokens_per_pass": 1.0, "speed_against": {}, "label": ""}
    good = {**base, "name": "transformers", "tokens_per_second": spread,
            "lossless": {"note": "1 of 1 texts equal"}}  # fmt: skip
    bad = {**base, "name": "specdec x", "tokens_per_second": None, "label": "synthetic draft",
           "lossless": {"note": "not the target's own"}}  # fmt: skip
    settings = {
        "target": {"name": "t", "parameters": 10**9, "dtype": "bfloat16"}, "draft": None,
        "temperature": 0, "prompts": [["json", "a"], ["json", "b"]], "max_new_tokens": 8,
        "rounds": 3, "random_weights": "llama-3-8b", "synthetic_acceptance": 0.8,
    }  # fmt: skip
    text = "\n".join(bench({"bench_x.json": {"rows": [good, bad], "settings": settings}}))
    assert "RANDOM WEIGHTS; SYNTHETIC draft, acceptance 0.8" in text
    assert "2 of json" in text
    assert "| transformers | 2.00 (1.00 to 3.00) | 1.00 | 1 of 1 texts equal |" in text
    assert "| specdec x (synthetic draft) | - | 1.00 | not the target's own |" in text


def test_audits_of_the_evaluation_become_tables() -> None:
    rate = {"truth": 0.5, "mean_estimate": 0.5, "covered": 475, "runs": 500,
            "covered_first": 184, "first": 200}  # fmt: skip
    wide = {**rate, "covered": 491, "covered_first": 196}
    null = {"alarms": 1, "runs": 200, "level": 0.001}
    files: dict[str, dict[str, Any]] = {
        "estimators": {"confidence": 0.95, "texts": 24,
                       "cases": {"1,1 token": {"a": rate, "b": wide}}},
        "predicted_speed": {"dtype": "float32", "worst": 0.08, "rows": [
            {"setting": "draft 2", "predicted": 1.5, "measured": 1.4, "off_by": 0.0714,
             "tokens_per_target_pass": 2.25}]},
        "verify_power": {"detect_tv": 0.01, "above": 0.02, "always_caught_above": 1,
                         "faults_above": 1, "null": {"laws": null}, "faults": [
            {"name": "walk: x", "total_variation": 0.1, "caught": 20, "runs": 20}]},
        "planted_power": {"detect_tv": 0.01, "above": 0.02, "caught_above": 2, "faults_above": 2,
                          "faults": [
            {"name": "walk: x", "sound": False, "texts": 9, "total_variation": 0.1,
             "refused": "no law", "caught": True},
            {"name": "walk: y", "sound": True, "texts": 9, "total_variation": 0.0,
             "p_value": 0.5, "caught": False}]},
        "optimal_trees": {"prompts": 4, "samples": 2, "new_tokens": 8, "settings": {"sampled": {
            "sizes": [{"nodes": 8, "predicted": 2.5, "predicted_over_measured": 1.25,
                       "optimal_tree_over_chain": 1.5, "contenders": {
                "optimal tree": {"tokens_per_target_pass": 2.0, "standard_error": 0.1},
                "chain": {"tokens_per_target_pass": 1.75, "standard_error": 0.25}}}]}}},
    }  # fmt: skip
    rows = {
        "estimators": "| 1,1 token | 2 | 95.0% | 98.2% |",
        "predicted_speed": "| draft 2 | 1.50 | 1.40 | +7.1% | 2.25 |",
        "verify_power": "| walk: x | 0.1000 | 20 of 20 |",
        "planted_power": "| walk: x | 0.1000 | refused by the engine | caught |",
        "optimal_trees": "| sampled, 8 | 2.50 | 2.00 ± 0.10 | 1.25 | 1.75 ± 0.25 | 1.50 "
        "|  | 1.14 |",
    }
    for section in SECTIONS:
        name = section.pattern.removesuffix(".json")
        if name in files:
            assert rows.pop(name) in section.make({section.pattern: files[name]})
    assert rows == {}
    counted = " ".join(estimators({"estimators.json": files["estimators"]}))
    assert "in 92 to 98% of 200 runs: 2 of 2 rates." in counted
    assert "in 92 to 98% of 500 runs: 1 of 2 rates." in counted
    planted = files["planted_power"]
    assert "caught. Sound ones in the same machinery, caught: 0 of 1." in _words(planted)
    del planted["faults"][1]
    assert "Sound" not in _words(planted)


def _words(raw: dict[str, Any]) -> str:
    return " ".join(planted_power({"planted_power.json": raw}))


def test_a_failed_audit_is_shown_as_one(results: Path) -> None:
    path = results / "verify_pair.json"
    raw = json.loads(path.read_text())
    raw["verdict"] = "NOT LOSSLESS | sampled: two samples: p = 0"
    raw["parts"]["sampled"]["findings"][0]["passed"] = False
    path.write_text(json.dumps(raw))
    text = page(results)
    assert "\nNot lossless.\n" in text
    assert "| sampled | two samples | NO |" in text


def test_without_a_gpu_the_page_says_so(results: Path) -> None:
    (results / "gpu_bench.json").unlink(missing_ok=True)
    assert "## Kernels on a GPU\n\nNot run on a GPU: " in page(results)


def test_gpu_figures_stand_beside_their_contenders() -> None:
    row = {
        "model": "m", "page": 16, "batch": 1, "context": 2048, "rows": 8, "of_bandwidth": 0.5,
        "of_floor": 0.625,
        "contenders": {
            "specdec": {"median_us": 4.0, "of_ours": 1.0}, "a": {"error": "not installed"},
            "b": {"median_us": 8.0, "of_ours": 2.0},
        },
    }  # fmt: skip
    raw = {
        "device": {"name": "NVIDIA H200"}, "dtype": "bfloat16", "attention": [row],
        "commit": [{"model": "m", "batch": 1, "median_us": 3.0, "moved_bytes": 2_500_000}],
        "verification": [{
            "rule": "walk", "law": "top-p", "batch": 8, "rows": 8, "over_floor": 1.25,
            "contenders": {
                "specdec": {"median_us": 6.0, "launches": 4},
                "unfused": {"median_us": 30.0, "of_ours": 5.0, "launches": 20},
            },
        }],
        "ceilings": {"read_bytes_per_second": 4.25e12, "flops_per_second": 7.5e14},
    }  # fmt: skip
    text = "\n".join(gpu_bench({"gpu_bench.json": raw}))
    assert "NVIDIA H200, bfloat16" in text
    assert "4.25 TB/s" in text
    assert "| m, page 16 | 1 | 2048 | 8 | 4.00 | 0.50 | 0.62 | - | 2.00 |" in text
    assert "| m | 1 | 3.00 | 2.50 |" in text
    assert "| walk, top-p | 8 | 8 | 6.00 | 1.25 | 4 | 5.00 |" in text


def test_kernels_are_summed_up_and_a_violation_is_shown() -> None:
    fine = [96, 65536, {}, {"ld.global 16 B": 4, "wgmma": 12}, {"num_warps": 4}]
    other = [112, 65536, {}, {"wgmma": 8}, {"num_warps": 4}]
    spills = [255, 1024, {"bytes of stack": 8}, {}, {"num_warps": 4}]
    raw = {
        "shared_limit": {"sm_90": 232448}, "violations": ["combine b, sm_90: spills 8 bytes"],
        "targets": {"sm_90": {"attend a": fine, "attend b": other, "combine b": spills}},
    }  # fmt: skip
    text = "\n".join(kernel_compile({"kernel_compile.json": raw}))
    assert "- combine b, sm_90: spills 8 bytes" in text
    assert "| sm_90 | 3 | 255 | 64 of 227 | 1 |" in text
    row = "2 | 96 to 112 | 65536 | 0 | ld.global 16 B: 0 to 4, wgmma: 8 to 12 |"
    assert f"| attend, sm_90 | {row}" in text
    assert "| combine, sm_90 | 1 | 255 | 1024 | 1 |  |" in text


def test_sets_and_proposers_of_the_race_are_rows_of_their_own() -> None:
    """Whichever of them a run had: each is named, and what of a conversation was continued."""
    found = {
        "speed against plain": {"plain": 1.0, "auto": 1.25, "fixed 4": 1.5},
        "best fixed": "fixed 4", "decoding against plain": {"auto": 1.2},
        "auto against best fixed": 0.83,
    }  # fmt: skip
    labels = ["json, T=0, draft", "multi_turn, T=1, draft,ngram"]
    for some in (labels[:1], labels):
        raw = {"sets": dict.fromkeys(some, found)}
        text = "\n".join(policy_sets({"policy_sets.json": raw}))
        assert ("first turn" in text) == (len(some) == 2)
        for label in some:
            assert f"| {label} | 1.25 | 1.20 | fixed 4 | 1.50 | 0.83 |" in text
