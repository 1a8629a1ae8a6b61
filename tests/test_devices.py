"""Nothing of a step is made on another device than the models': run on the meta device, where an
operator over tensors of two devices raises, since CI has no GPU."""

from collections.abc import Sequence as Items

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from specdec.acceptance import batched
from specdec.acceptance.batched import TreeBatch
from specdec.attention import LayerCall, Segment, Step
from specdec.backend import Window
from specdec.cache import BlockTable, CachedSequence, CacheGroup, LayerShape, Paged
from specdec.proposers import DraftModelProposer
from specdec.rng import PhiloxNoise
from specdec.runner import SequenceRows
from specdec.sampling import Law, Paths, Prefix, SamplingParams
from specdec.sequence import Sequence
from specdec.tree import Law as DrawLaw, TokenTree

META = torch.device("meta")
V = 64


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def trees() -> dict[str, TokenTree]:
    tokens = empty(4, dtype=torch.long)
    siblings = tuple((node, DrawLaw("iid", 0)) for node in (0, 1, 0, 2))
    return {
        "nothing": TokenTree.empty(META),
        "chain": TokenTree.chain(tokens, empty(4, V)),
        "points": TokenTree.chain(tokens),
        "tree": TokenTree(tokens, (-1, -1, 0, 1), empty(4, V)),
        "duplicates": TokenTree(empty(3, dtype=torch.long), (-1, -1, -1), empty(1, V), siblings),
    }


def test_the_meta_device_tells_two_devices_apart() -> None:
    with pytest.raises(RuntimeError, match="device"):
        empty(3) * torch.ones(3)


@pytest.mark.parametrize("rule", [*batched.BY_COINS, "greedy", "gumbel"])
@pytest.mark.parametrize("name", list(trees()))
def test_rules(rule: str, name: str) -> None:
    tree = trees()[name]
    batch = TreeBatch.of([tree])
    rows = len(tree) + 1
    p = empty(rows, V)
    noise = PhiloxNoise()
    if rule == "greedy":
        outcome = batched.greedy(batch, p.argmax(-1), p)
    elif rule == "gumbel":
        outcome = batched.gumbel(batch, p, noise.gumbel([1] * rows, range(rows), V, META))
    else:
        if rule in ("token", "block") and not batch.layout.is_chain:
            pytest.skip("judges chains")
        if rule == "kseq" and name in ("tree", "points"):
            pytest.skip("judges siblings drawn iid from one law")
        coins = noise.step([1], [9], rows, META, batch.copies)
        outcome = batched.BY_COINS[rule](batch, p, tree.laws, coins)
    for part in (outcome.accepted, outcome.tokens, outcome.path, outcome.valid):
        assert part.device == META


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01),
        SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, min_new_tokens=3),
    ],
    ids=["plain", "truncated", "penalties"],
)
def test_laws(params: SamplingParams) -> None:
    tree = trees()["tree"]

    def paths() -> Paths:
        return Paths.of_trees([Prefix([1, 2, 3], 2, 0)], [tree.tokens], [tree.parents])

    law = params.law()
    assert law.probabilities(empty(5, V), paths).device == META
    assert law.best(empty(5, V), paths).device == META


class MetaRunner:
    """A model without values."""

    vocab_size, device = V, META
    max_positions: int | None = 512

    def join(self, group: CacheGroup) -> None:
        group.add_model(self, [])

    def score(self, rows: Items[SequenceRows]) -> Tensor:
        for row in rows:
            assert row.nodes is None or row.nodes.device == META
        return empty(sum(row.keep for row in rows), V)


@pytest.mark.parametrize("law", [SamplingParams().law(), Law([], greedy=True)], ids=["T1", "T0"])
def test_drafting(law: Law) -> None:
    runner = MetaRunner()
    proposer = DraftModelProposer(runner)
    proposer.join(CacheGroup(16, 64, META), V)
    cache = CachedSequence(BlockTable(16))
    sequence = Sequence("r", 0, [1, 2, 3], 3, law, 5, 10, frozenset(), None, cache)
    [tree] = proposer.propose([sequence], [3], PhiloxNoise())
    assert len(tree) == 3
    assert tree.tokens.device == META
    assert (tree.laws is None) == law.greedy
    assert tree.laws is None or tree.laws.device == META


@pytest.mark.parametrize("window", [None, Window(4)], ids=["full", "window"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "scattered"])
def test_attention(window: Window | None, contiguous: bool) -> None:
    table = BlockTable(4)
    table.extend([0, 1, 2, 3] if contiguous else [3, 0, 2, 1])
    memory = Paged([LayerShape(2, 8, 8, torch.float32)], 4, 4, META)
    mask, positions = empty(3, 3, dtype=torch.bool), empty(3, dtype=torch.long)
    segments = [Segment(3, 5, table, mask, positions), Segment(1, 8, table)]
    step = Step(memory, segments, {})
    call = LayerCall(0, 1.0, window, None)
    out = step.attend(call, empty(4, 4, 8), empty(4, 2, 8), empty(4, 2, 8), None)
    assert out.device == META
    memory.move(empty(2, dtype=torch.long), empty(2, dtype=torch.long))


def test_processors_keep_to_the_device() -> None:
    law = Law([RepetitionPenaltyLogitsProcessor(1.3)], greedy=False)
    tree = trees()["chain"]
    found = law.probabilities(
        empty(5, V), lambda: Paths.of_trees([Prefix([1, 2], 2, 0)], [tree.tokens], [tree.parents])
    )
    assert found.device == META
