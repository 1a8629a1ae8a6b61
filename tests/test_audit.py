"""The exact law of the engine's output for every registered proposer, and planted faults that the
audit must see."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specdec import Engine, SamplingParams, TokenTree
from specdec.acceptance import batched
from specdec.cache import CachedSequence, CacheGroup
from specdec.evals.audit import TOLERANCE, Coins, EnumeratedNoise, emitted_law, target_law
from specdec.evals.enumeration import Comparison
from specdec.proposers import REGISTRY, DraftModelProposer
from specdec.proposers.model import DraftModel
from specdec.proposers.retrieval_build import write_index
from specdec.rng import Noise, StepNoise
from specdec.sequence import Sequence
from specdec.toy import TableRunner, random_table

V = 3
TARGET, DRAFT = random_table(V, order=None, seed=1), random_table(V, order=None, seed=2)
CUT = random_table(V, order=None, seed=3, zeros=1)  # laws with a token that has no mass
PROMPT = [0, 1, 2, 0, 1]  # repeats itself, so that something can be looked up

FOLDER = tempfile.TemporaryDirectory()
INDEX = Path(FOLDER.name) / "small.idx"
write_index(INDEX, [([0, 1, 2, 0, 1, 1, 2, 2, 0], True), ([1, 0, 2, 1], True)], vocab_size=V)


def spelling(letters: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are these letters."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    )


# the draft has two of the target's letters, at other places, and one of its own
OTHER = {"tokenizer": spelling("abc"), "draft_tokenizer": spelling("cad")}

# name -> what Engine needs besides the proposer's name, small enough to take every outcome
OPTIONS: dict[str, dict[str, Any]] = {
    "draft": {"num_draft_tokens": 2},
    "lookahead": {
        "num_draft_tokens": 14,
        "proposer_options": {"window": 2, "ngram": 3, "guesses": 2},
    },
    "retrieval": {
        "num_draft_tokens": 3,
        "proposer_options": {"index": INDEX, "min_match": 1},
    },
    "tree": {"proposer_options": {"tree": (2, 1)}},
    "text": {"num_draft_tokens": 2, "proposer_options": OTHER},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, OPTIONS.get(name, {"num_draft_tokens": 3})) for name in sorted(REGISTRY)),
    ("draft", {"num_draft_tokens": 2, "verification": "token"}),
    ("draft", {"num_draft_tokens": 2, "verification": "recursive"}),
    ("draft", {"num_draft_tokens": 2, "proposer_options": {"temperature": 0.5, "top_k": 2}}),
    ("draft", {"num_draft_tokens": 2, "proposer_options": {**OTHER, "vocabulary": "shared"}}),
    ("tree", {"tree": (2, 1), "proposer_options": OTHER}),
    ("tree", {"tree": (2, 1), "verification": "recursive"}),
    ("tree", {"tree": (1, 2)}),
    ("tree", {"tree": (2, 1), "proposer_options": {"kind": "iid"}}),
    ("tree", {"tree": (2,), "verification": "kseq"}),
    ("tree", {"tree": (2, 1), "proposer_options": {"kind": "top_k"}}),
    ("tree", {"proposer": "tree", "proposer_options": {"shape": (-1, -1, 1), "kind": "auto"}}),
    ("tree", {"proposer": "tree", "proposer_options": {"shape": (-1, -1, 1), "kind": "iid"}}),
    ("dynamic_tree", {"proposer_options": {"nodes": 4, "depth": 2, "top_k": 2}}),
    ("suffix", {"num_draft_tokens": 2, "verification": "recursive"}),
    ("draft", {"policy": "heuristic"}),
    ("draft", {"policy": "confidence"}),
]


def label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps([*value.values()], default=lambda _: "")


each_case = pytest.mark.parametrize(
    ("name", "options"),
    CASES,
    ids=label,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def maker(
    name: str, options: dict[str, Any], target: Any = TARGET, draft: Any = DRAFT,
    window: int | None = None,
) -> Any:  # fmt: skip
    """make(noise): an engine on tables with this proposer."""

    def make(noise: Noise | None) -> Engine:
        its_draft = TableRunner(draft, V, window=window) if REGISTRY[name].needs_draft else None
        fixed = {"policy": "constant"} if name in ("tree", "dynamic_tree") else {}
        given = {**fixed, **options, **({} if "tree" in options else {"proposer": name})}
        runner = TableRunner(target, V)
        return Engine(runner, draft=its_draft, noise=noise, kv_memory=1 << 22, grow=True, **given)

    return make


def audited(name: str, options: dict[str, Any], **more: Any) -> Comparison:
    return emitted_law(maker(name, options), TARGET, PROMPT, tokens=3, **more)


# --- the contract


@pytest.mark.parametrize(
    ("name", "options"),
    # the times of a beam tree's race are continuous: tests/test_beam_tree.py takes it to pieces
    [case for case in CASES if case[0] != "beam_tree"],
    ids=label,
)
def test_law_of_three_tokens_is_the_target_s(name: str, options: dict[str, Any]) -> None:
    """Two steps at the least, every outcome of every draw and coin, through the production float32
    code; 3e-8 is the difference found, 3e-7 what rounding may explain."""
    make, engines = maker(name, options), list[Engine]()

    def kept(noise: Noise) -> Engine:
        engines.append(make(noise))
        return engines[-1]

    found = emitted_law(kept, TARGET, PROMPT, tokens=3)
    assert found.error < TOLERANCE
    assert len(found.ours) == V**3
    assert sum(engine.stats.accepted for engine in engines) > 0


@pytest.mark.parametrize("name", ["draft", "tree"])
def test_draft_that_has_forgotten_pages(name: str) -> None:
    prompt = [i * i % 7 % V for i in range(60)]
    make = maker(name, OPTIONS[name], window=16)
    assert emitted_law(make, TARGET, prompt, tokens=2, new_tokens=3).error < TOLERANCE
    engine = make(None)
    engine.add_request(prompt, SamplingParams(max_new_tokens=5))
    engine.step()
    [cache] = engine.proposer.model._caches.values()
    assert cache.dropped > 0


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("name", ["draft", "tree", "ngram"])
def test_law_at_another_temperature(name: str, temperature: float) -> None:
    options = OPTIONS.get(name, {"num_draft_tokens": 2})
    assert (
        audited(name, options, sampling=SamplingParams(temperature=temperature)).error < TOLERANCE
    )


def test_longer_chain_over_more_steps() -> None:
    assert audited("draft", {"num_draft_tokens": 3}, new_tokens=4).error < TOLERANCE


@pytest.mark.parametrize(("target", "draft"), [(CUT, DRAFT), (DRAFT, CUT), (CUT, CUT)])
@pytest.mark.parametrize("name", ["draft", "tree"])
def test_tokens_without_mass(name: str, target: Any, draft: Any) -> None:
    make = maker(name, OPTIONS[name], target, draft)
    found = emitted_law(make, target, PROMPT)
    assert found.error < TOLERANCE


@each_case
def test_coupled_text_is_plain_sampling_s(name: str, options: dict[str, Any]) -> None:
    """Under the rule gumbel draft and target may read the same continuous noise, which has no
    outcomes to enumerate. Path by path there is nothing to integrate: each text must be that of
    plain decoding with the same seed, whose tokens are argmax(log p + G), so exactly of law p
    (Gumbel-max)."""
    coupled = {**options, "verification": "gumbel"}
    texts = []
    for engine in (maker(name, coupled)(None), Engine(TableRunner(TARGET, V), kv_memory=1 << 22)):
        for seed in range(64):
            params = SamplingParams(max_new_tokens=6)
            engine.add_request(PROMPT, params, seed=seed, request_id=str(seed))
        texts.append({out.id: out.token_ids for out in engine})
    assert texts[0] == texts[1]


def test_target_law_is_a_law() -> None:
    law = target_law(TARGET, PROMPT, 3)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    assert law[0, 1, 2] == pytest.approx(
        TARGET((*PROMPT,))[0] * TARGET((*PROMPT, 0))[1] * TARGET((*PROMPT, 0, 1))[2], abs=1e-15
    )


# --- planted faults


class Rekeyed(EnumeratedNoise):
    """Noise that every step reads again."""

    def step(
        self, seeds: Items[int], positions: Items[int], rows: int, device: torch.device,
        copies: int = 1,
    ) -> StepNoise:  # fmt: skip
        return super().step(seeds, [0] * len(positions), rows, device, copies)


def test_noise_that_two_steps_share_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.evals.audit.EnumeratedNoise", Rekeyed)
    assert audited("draft", {"num_draft_tokens": 2}).error > 1e-3


def test_one_coin_for_all_siblings_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = batched.BY_COINS["recursive"]

    def shared(batch: Any, p: Tensor, q: Any, noise: StepNoise) -> Any:
        first = torch.zeros_like(noise.accept[:, :, 0].names)  # type: ignore[attr-defined]
        coin = noise.accept.gather(1, first[..., None])
        return rule(batch, p, q, replace(noise, accept=coin))

    monkeypatch.setitem(batched.BY_COINS, "recursive", shared)
    options = {"tree": (2,), "verification": "recursive"}
    assert audited("tree", options).error > 1e-3


def test_siblings_in_another_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = DraftModel.largest
    monkeypatch.setattr(
        DraftModel, "largest",
        lambda self, scores, width: largest(self, scores, width).sort(-1).values,
    )  # fmt: skip
    assert audited("tree", OPTIONS["tree"]).error > 1e-2


def changed(change: Callable[[TokenTree], TokenTree]) -> Any:
    """DraftModelProposer.propose with its trees changed."""
    propose = DraftModelProposer.propose

    def wrong(
        self: DraftModelProposer, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        return [change(tree) for tree in propose(self, sequences, budgets, noise)]

    return wrong


def hotter(tree: TokenTree) -> TokenTree:
    """Says that its tokens were drawn at another temperature (contract C2)."""
    if tree.laws is None:
        return tree
    laws = tree.laws.pow(0.8)
    return replace(tree, laws=laws / laws.sum(-1, keepdim=True))


def without_unlikely(tree: TokenTree) -> TokenTree:
    """Drops the tail from the first token on that its own law finds unlikely (contract C3)."""
    if tree.laws is None:
        return tree
    likely = tree.laws.gather(1, tree.tokens[:, None]).squeeze(1) >= 0.3
    keep = int(likely.long().cumprod(0).sum())
    if keep == 0:
        return TokenTree.empty(tree.tokens.device)
    return TokenTree.chain(tree.tokens[:keep], tree.laws[:keep])


@pytest.mark.parametrize("change", [hotter, without_unlikely])
def test_draft_that_breaks_the_contract_is_seen(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[TokenTree], TokenTree]
) -> None:
    monkeypatch.setattr(DraftModelProposer, "propose", changed(change))
    assert audited("draft", {"num_draft_tokens": 2}).error > 1e-3


def test_wrong_commit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = CacheGroup.commit_all

    def neighbour(
        self: CacheGroup, commits: Iterable[tuple[CachedSequence, int, Items[int]]]
    ) -> None:  # the sibling's slot
        commit(
            self, [(s, first, [max(first, x - 1) for x in slots]) for s, first, slots in commits]
        )

    monkeypatch.setattr(CacheGroup, "commit_all", neighbour)
    make = maker("tree", {"proposer_options": {"tree": (2,)}})
    assert emitted_law(make, TARGET, PROMPT).error > 1e-3


def test_unknown_use_of_a_coin_is_named() -> None:
    with pytest.raises(AssertionError, match="sqrt of coins: teach specdec"):
        torch.sqrt(Coins([], torch.zeros(1)))  # type: ignore[arg-type]
