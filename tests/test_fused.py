"""The verifier on Triton's fused rules emits what it emits on torch's, and knows when it may.

Without a GPU the kernels run in Triton's interpreter; backend.choose is made to name either.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from specdec import Engine, backend
from specdec.acceptance import fused
from specdec.backend import Choice
from specdec.errors import NumericalError
from specdec.rng import Noise, OffsetNoise, PhiloxNoise
from specdec.runner import SequenceRows
from specdec.sampling import Law, SamplingParams
from specdec.toy import TableRunner, random_table, with_overlap
from specdec.tree import Law as Drawn, TokenTree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V = 13
Name = Literal["triton", "torch"]


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """A launch remaps triton.language once: not again at every call inside it, as the interpreter
    does, nor does every sum need a check for overflow."""
    if DEVICE.type == "cuda":
        yield
        return
    mapped: set[str] = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__ not in mapped:
            mapped.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        builder = interpreter.interpreter_builder
        quick = dataclasses.replace(builder.options, sanitize_overflow=False)
        patch.setattr(builder, "options", quick)
        yield


class OnDevice(TableRunner):
    """Its logits are where the kernels run."""

    device = DEVICE

    def score(self, rows: Sequence[SequenceRows]) -> Tensor:
        return super().score(rows).to(DEVICE)


class Poisoned(OnDevice):
    """A NaN among the logits of every fourth pass."""

    def score(self, rows: Sequence[SequenceRows]) -> Tensor:
        logits = super().score(rows)
        if self.passes % 4 == 0:
            logits[0, 5] = float("nan")
        return logits


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(rule, sequences) of every call of the fused rules."""
    calls: list[tuple[str, int]] = []
    judge = fused.judge

    def recorded(rule: str, trees: Sequence[TokenTree], *rest: Any) -> Any:
        calls.append((rule, len(trees)))
        return judge(rule, trees, *rest)

    monkeypatch.setattr(fused, "judge", recorded)
    return calls


TABLE = random_table(V, order=2, seed=3, concentration=0.5)
SETTINGS = [
    SamplingParams(max_new_tokens=9),
    SamplingParams(max_new_tokens=7, temperature=0.7, top_p=0.9),
    SamplingParams(max_new_tokens=8, temperature=1.4, top_k=6, min_p=0.02),
]


def generated(
    name: Name, settings: Sequence[SamplingParams], target: type[OnDevice] = OnDevice,
    **options: Any,
) -> list[tuple[int, ...]]:  # fmt: skip
    if options.get("draft"):
        options["draft"] = OnDevice(with_overlap(TABLE, 0.7, seed=4), V)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choose", lambda _: Choice(name, "the test says so"))
        engine = Engine(target(TABLE, V), grow=True, **options)
        for seed, sampling in enumerate(settings):
            engine.add_request([1, 2, 3, 1, 2][: 3 + seed], sampling, seed=seed)
        outputs = {output.id: output.token_ids for output in engine}
        engine.check_integrity()
    return [outputs[name] for name in sorted(outputs)]


NGRAM: dict[str, Any] = {"proposer": "ngram", "num_draft_tokens": 3, "policy": "constant"}
DRAFT: dict[str, Any] = {"draft": True, "num_draft_tokens": 3, "policy": "constant"}
TREE: dict[str, Any] = {"draft": True, "tree": (2, 1), "policy": "constant"}


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("gumbel", {}),
        ("gumbel", {**TREE, "verification": "gumbel"}),
        ("walk", NGRAM),
        ("walk", {**TREE, "verification": "walk"}),
        ("block", DRAFT),
        ("token", {**DRAFT, "verification": "token"}),
        ("recursive", {**TREE, "verification": "recursive"}),
    ],
    ids=["plain", "gumbel", "ngram", "walk", "block", "token", "recursive"],
)
def test_sampled_text_is_the_twins_and_a_batch_is_one_call(
    rule: str, options: dict[str, Any], judged: list[tuple[str, int]]
) -> None:
    wanted = generated("torch", SETTINGS, **options)
    assert judged == []
    assert generated("triton", SETTINGS, **options) == wanted
    assert [len(tokens) for tokens in wanted] == [9, 7, 8]
    assert judged[0] == (rule, 3), "three laws, one call"
    assert {found for found, _ in judged} <= {rule, "walk"}  # walk: where nothing was drafted


@pytest.mark.parametrize("options", [{}, NGRAM, TREE], ids=["plain", "chain", "tree"])
def test_greedy_text_is_the_twins(options: dict[str, Any], judged: list[tuple[str, int]]) -> None:
    settings = [SamplingParams(max_new_tokens=count, temperature=0) for count in (6, 9)]
    wanted = generated("torch", settings, **options)
    assert generated("triton", settings, **options) == wanted
    assert judged[0] == ("greedy", 2)


def test_requests_that_the_kernels_cannot_judge_share_a_batch_with_others(
    judged: list[tuple[str, int]],
) -> None:
    settings = [*SETTINGS, SamplingParams(max_new_tokens=6, repetition_penalty=1.5),
                SamplingParams(max_new_tokens=6, temperature=0)]  # fmt: skip
    wanted = generated("torch", settings, **NGRAM)
    assert generated("triton", settings, **NGRAM) == wanted
    assert set(judged[:2]) == {("walk", 3), ("greedy", 1)}


def test_traversal_stays_with_torch(judged: list[tuple[str, int]]) -> None:
    wanted = generated("torch", SETTINGS, **TREE)  # auto: traversal for drawn trees
    assert generated("triton", SETTINGS, **TREE) == wanted
    assert {rule for rule, _ in judged} <= {"walk"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_hold_nan_are_an_error(temperature: float) -> None:
    settings = [SamplingParams(max_new_tokens=30, temperature=temperature)]
    with pytest.raises(NumericalError, match="the target's logits hold NaN or infinity at step 3"):
        generated("triton", settings, Poisoned)


CHAIN = TokenTree.chain(torch.tensor([1, 2, 3]), torch.ones(3, V) / V)
POINTS = TokenTree.chain(torch.tensor([1, 2]))
BRANCHED = TokenTree(torch.tensor([1, 2, 3]), (-1, -1, 0), torch.ones(3, V) / V)
TWICE = TokenTree(
    torch.tensor([1]), (-1,), torch.ones(1, V) / V, ((0, Drawn("iid", 0)), (0, Drawn("iid", 0)))
)
LARGE = TokenTree.chain(torch.zeros(256, dtype=torch.long))
SAMPLED, GREEDY = SamplingParams(top_p=0.9).law(), SamplingParams(temperature=0).law()


@pytest.mark.parametrize(
    ("rule", "trees", "can"),
    [
        ("walk", [CHAIN, BRANCHED], True),
        ("gumbel", [BRANCHED], True),
        ("recursive", [TWICE, BRANCHED], True),
        ("block", [CHAIN, TokenTree.empty(DEVICE)], True),
        ("token", [POINTS], True),
        ("block", [BRANCHED], False),
        ("token", [TWICE], False),  # torch's judges it as a tree
        ("block", [CHAIN, POINTS], False),
        ("traversal", [CHAIN], False),
        ("kseq", [TWICE], False),
        ("typical", [CHAIN], False),
        ("walk", [LARGE], False),
    ],
)
def test_which_rules_and_trees_are_fused(rule: str, trees: list[TokenTree], can: bool) -> None:
    assert fused.can_judge(rule, SAMPLED, trees, PhiloxNoise(), torch.bfloat16) == can


@pytest.mark.parametrize(
    ("rule", "law", "noise", "dtype", "can"),
    [
        ("walk", SAMPLED, PhiloxNoise(), torch.float32, True),
        ("walk", SAMPLED, PhiloxNoise(), torch.float64, False),
        ("walk", SamplingParams(presence_penalty=1).law(), PhiloxNoise(), torch.float32, False),
        ("walk", SamplingParams(typical_p=0.9).law(), PhiloxNoise(), torch.float32, False),
        ("walk", SAMPLED, OffsetNoise(PhiloxNoise(), 3), torch.float32, False),
        ("greedy", GREEDY, OffsetNoise(PhiloxNoise(), 3), torch.float16, True),
        ("greedy", SamplingParams(temperature=0, repetition_penalty=2).law(), PhiloxNoise(),
         torch.float32, False),
    ],
)  # fmt: skip
def test_which_laws_and_noises_are_fused(
    rule: str, law: Law, noise: Noise, dtype: torch.dtype, can: bool
) -> None:
    assert fused.can_judge(rule, law, [POINTS], noise, dtype) == can
