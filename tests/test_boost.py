"""Boost-tuning: what counts as covered, what is trained on, what is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import specdec
from specdec import zoo
from specdec.zoo import boost

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = 4


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boost, "PROMPT", PROMPT)


@pytest.fixture(scope="module")
def pair(make_llama: Callable[..., Any]) -> tuple[Any, Any]:
    """A target, and a base draft that knows nothing of it."""
    return make_llama(16, seed=3), make_llama(16, seed=4, num_hidden_layers=1)


@pytest.fixture
def texts(pair: tuple[Any, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 16, (24, PROMPT), generator=generator)
    found = boost.continued(pair[0], prompts, 10)
    assert found.shape == (24, PROMPT + 10)
    return found


def test_span_is_covered_when_all_of_it_is_right() -> None:
    hits = torch.tensor([[1, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0]]).bool()
    wanted = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0]]).bool()
    assert torch.equal(boost.covered(hits, 2), wanted)
    assert torch.equal(boost.covered(hits, 1), hits)
    assert not boost.covered(hits, 7).any()


def test_curve_counts_each_token_once() -> None:
    first, second = torch.tensor([[1, 0, 0, 1]]).bool(), torch.tensor([[1, 1, 0, 0]]).bool()
    nothing = torch.zeros_like(first)
    assert boost.coverage_curve([first, nothing, second]) == [0.5, 0.5, 0.75]


def test_target_has_its_own_tokens_right(pair: tuple[Any, Any], texts: torch.Tensor) -> None:
    assert boost.right_tokens(pair[0], texts).float().mean() > 0.9  # but end tokens
    assert boost.right_tokens(pair[1], texts).float().mean() < 0.5


def test_only_what_remains_is_trained_on(pair: tuple[Any, Any], texts: torch.Tensor) -> None:
    some = torch.zeros(24, 10, dtype=torch.bool)
    some[3, 5:7] = True
    loss = boost.loss_on(pair[1], texts, some)
    with torch.no_grad():
        law = pair[1](input_ids=texts[3:4]).logits[0].float().log_softmax(-1)
    places = torch.tensor([PROMPT + 4, PROMPT + 5])  # each predicts the token behind it
    wanted = -law[places, texts[3, places + 1]].mean()
    assert torch.allclose(loss, wanted, atol=1e-5)
    assert boost.tune(pair[1], texts, torch.zeros_like(some), 3, 1e-3, 0) == []


def test_drafts_together_cover_more(pair: tuple[Any, Any], texts: torch.Tensor) -> None:
    drafts, figures = boost.boost(
        pair[1], texts, texts, drafts=3, steps=15, rate=3e-3, span=2, seed=0
    )
    assert len(drafts) == len(figures["coverage"]) == 3
    assert figures["coverage"] == sorted(figures["coverage"])
    assert figures["coverage"][0] == figures["drafts"][0]["alone"] > figures["untuned"]
    assert figures["coverage"][-1] > figures["coverage"][0]
    left = [d["remaining_after"] for d in figures["drafts"]]
    assert [d["remaining_before"] for d in figures["drafts"]] == [1.0, *left[:-1]]
    assert left == sorted(left, reverse=True)
    best = [boost.right_tokens(draft, texts) for draft in drafts]
    assert not torch.equal(best[0], best[1])


def test_nothing_left_ends_it(pair: tuple[Any, Any], texts: torch.Tensor) -> None:
    right = boost.right_tokens(pair[0], texts).all(1)
    assert right.any()
    drafts, _ = boost.boost(
        pair[0], texts[right], texts, drafts=3, steps=1, rate=1e-9, span=2, seed=0
    )
    assert len(drafts) == 1


def test_script_writes_drafts_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path
) -> None:
    folders = {"big": models / "target", "small": models / "draft"}
    monkeypatch.setattr(zoo, "path", folders.__getitem__)
    work, out = tmp_path / "work", tmp_path / "figures.json"
    args = ["--work", str(work), "--out", str(out), "--drafts", "2", "--steps", "2"]
    result = CliRunner().invoke(boost.main, [*args, "--prompts", "8", "--new-tokens", "6"])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["coverage"] == sorted(figures["coverage"])
    assert figures["settings"]["steps"] == 2
    target, *drafts = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (models / "target", work / "draft-1", work / "draft-2")
    )
    assert (work / "draft-2" / "model.safetensors").exists()
    ids = torch.tensor([[0, 45, 67]])
    spec = specdec.wrap(target, draft=drafts, policy="constant")
    wanted = specdec.wrap(target).generate(ids, do_sample=False, max_new_tokens=9)
    assert torch.equal(spec.generate(ids, do_sample=False, max_new_tokens=9), wanted)
