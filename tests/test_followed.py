"""Rules that follow one line, on the host: what the tensor rules decide, to the token."""

import random
from typing import Any

import pytest
import torch

from specdec.acceptance import batched
from specdec.acceptance.batched import TreeBatch
from specdec.acceptance.followed import followed, have_peaks
from specdec.rng import PhiloxNoise
from specdec.tree import TokenTree

V = 4


class Said(list[int]):
    """What rows say. A walk that asks more often than there are rows would never end: it is stopped
    here."""

    asked = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        if isinstance(place, slice):
            return Said(found)
        self.asked += 1
        assert self.asked <= len(self), "the walk goes round"
        return found


def made_up(draw: random.Random, kind: str) -> TokenTree:
    count = draw.choice((0, 1, 2, 7))
    if kind == "chain":
        parents = list(range(-1, count - 1))
    else:
        parents = [draw.randrange(-1, node) for node in range(count)]
    used: dict[int, list[int]] = {}
    tokens: list[int] = []
    for node, parent in enumerate(parents):
        left = [t for t in range(V) if t not in used.get(parent, [])]
        if not left:
            return TokenTree.build(tokens, parents[:node])
        tokens.append(draw.choice(left))
        used.setdefault(parent, []).append(tokens[-1])
    return TokenTree.build(tokens, parents)


@pytest.mark.parametrize("kind", ["chain", "tree"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_the_tensor_rule(kind: str, batch_size: int) -> None:
    accepted = 0
    for seed in range(300):
        draw = random.Random(seed)
        trees = [made_up(draw, kind) for _ in range(batch_size)]
        rows = sum(len(tree) + 1 for tree in trees)
        # few numbers, so that ties are common; some that are none
        logits = torch.tensor([[draw.randrange(3) for _ in range(V)] for _ in range(rows)]).float()
        for bad in (float("nan"), float("inf"), float("-inf")):
            if draw.random() < 0.1:
                logits[draw.randrange(rows)] = bad
        best = logits.argmax(-1)
        batch = TreeBatch.of(trees)
        outcome = batched.greedy(batch, best, logits)
        lines = followed(trees, Said(best.tolist()), have_peaks(best, logits))
        assert len(lines) == batch_size
        for index, line in enumerate(lines):
            assert (line is not None) == bool(outcome.valid[index])
            if line is None:
                continue
            count = int(outcome.accepted[index])
            accepted += count
            first = batch.row_offsets[index] + 1
            assert line[0] == tuple(outcome.tokens[index, : count + 1].tolist())
            assert line[1] == tuple(row - first for row in outcome.path[index, :count].tolist())
    assert accepted > 20


def test_a_sequence_is_told_sound_as_a_whole_too() -> None:
    trees = [TokenTree.build([1], [-1]), TokenTree.build([2, 3], [-1, -1])]
    said = Said([1, 4, 3, 0, 2])
    assert followed(trees, said, [True, True]) == [((1, 4), (0,)), ((3, 2), (1,))]
    assert followed(trees, said, [True, False]) == [((1, 4), (0,)), None]
    assert followed(trees, said, [True, True, True, True, False]) == [((1, 4), (0,)), None]


def test_said_by_gumbel_and_walk_are_what_the_rules_follow() -> None:
    noise = PhiloxNoise()
    for seed in range(50):
        draw = random.Random(seed)
        trees = [made_up(draw, draw.choice(("chain", "tree"))) for _ in range(3)]
        batch = TreeBatch.of(trees)
        rows = batch.row_offsets[-1]
        p = torch.rand(rows, V, generator=torch.Generator().manual_seed(seed))
        p /= p.sum(-1, keepdim=True)
        there = noise.gumbel([seed] * rows, list(range(rows)), V, p.device)
        coins = noise.step([1, 2, 3], [0, 0, 0], max(map(len, trees)) + 1, p.device, batch.copies)
        for (said, sound), outcome in (
            (batched.said_by_gumbel(batch, p, there), batched.gumbel(batch, p, there)),
            (batched.said_by_walk(batch, p, None, coins), batched.walk(batch, p, None, coins)),
        ):
            lines = followed(trees, Said(said.tolist()), sound.tolist())
            for line, tokens, count in zip(
                lines, outcome.tokens.tolist(), outcome.accepted.tolist(), strict=True
            ):
                assert line is not None
                assert list(line[0]) == tokens[: count + 1]
