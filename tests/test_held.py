"""A model that is held to a text says it, whoever drafts."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

import specdec
from specdec import Engine, SamplingParams
from specdec.errors import InvalidArgumentError
from specdec.evals.held import HeldRunner, HeldTo

Model = Any  # a transformers model: its methods are typed in part

TEXT = [0, 45, 67, 89, 23, 45, 67, 89, 23, 45, 67, 89, 99, 23, 45, 67]


@pytest.mark.parametrize("sampled", [False, True])
def test_text_is_said(target: Model, sampled: bool) -> None:
    prompt = torch.tensor([TEXT[:6]])
    held = LogitsProcessorList([HeldTo(TEXT)])
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": sampled, "eos_token_id": None}
    spec = specdec.wrap(target, proposer="ngram", num_draft_tokens=4, policy="constant")
    for out in (
        target.generate(prompt, logits_processor=held, **options),
        spec.generate(prompt, logits_processor=held, **options),
    ):
        assert out[0].tolist() == TEXT
    assert spec.last_stats is not None
    assert spec.last_stats.tokens_per_target_pass > 1.5  # the text repeats itself


def test_last_token_is_repeated_behind_the_end(target: Model) -> None:
    out = target.generate(
        torch.tensor([[0]]), logits_processor=LogitsProcessorList([HeldTo([0, 5])]),
        max_new_tokens=3, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert out[0].tolist() == [0, 5, 5, 5]


def test_empty_text_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="text: it is empty"):
        HeldTo([])


def test_runner_says_the_text_whatever_is_drafted(target: Model) -> None:
    text = [0, 45, 67, 89, 45, 67, 89, 45, 67, 12, 13, 45, 67]
    for options in ({}, {"proposer": "ngram"}, {"proposer": "suffix", "num_draft_tokens": 6}):
        held = HeldRunner(target)
        held.text = torch.tensor(text)
        engine = Engine(held, kv_memory=1 << 20, **options)
        engine.add_request(text[:3], SamplingParams(max_new_tokens=10, temperature=0))
        [out] = list(engine)
        assert list(out.token_ids) == text[3:]
        assert engine.stats.accepted > 0 or not options
