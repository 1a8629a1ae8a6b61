"""The batched rules emit what their definitions emit when both read the same uniforms."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.acceptance import RULES, batched, reference
from specdec.acceptance.batched import Outcome, TreeBatch
from specdec.errors import InvalidLawError
from specdec.rng import StepNoise
from specdec.tree import TokenTree

Law = Sequence[Any]
CHAIN_RULES = ["token", "block"]
ULP = 2.0**-23


@dataclass(eq=False)
class Node:
    p: Law
    proposals: list[tuple[int, Any, "Node"]] = field(default_factory=list)


class Coupled:
    """Keyed noise: a row per position of the text."""

    def __init__(self, noise: list[list[float]], start: int) -> None:
        self.noise, self.start = noise, start

    def gumbel(self, position: int) -> list[float]:
        return self.noise[self.start + position]


def positive_part(p: Law, q: Law, weight: Any = 1) -> list[Any]:
    return [max(weight * a - b, 0) for a, b in zip(p, q, strict=True)]


def uniforms(B: int, rows: int, generator: torch.Generator | None = None, top: int = 2**24) -> Any:
    drawn = torch.randint(top, (4, B, rows), generator=generator).float() / top
    return StepNoise(*drawn.unbind())


class Recorded:
    """The same uniforms for the definition; remembers how close the closest decision was."""

    def __init__(self, noise: StepNoise, b: int) -> None:
        self.noise, self.b, self.margin, self.u = noise, b, math.inf, 0.0

    def at(self, node: int, purpose: str, proposal: int) -> "Recorded":
        assert proposal == 0
        self.u = getattr(self.noise, purpose)[self.b, node].item()
        return self

    def bernoulli(self, p: float) -> bool:
        self.margin = min(self.margin, abs(self.u - p))
        return self.u < p

    def categorical(self, weights: Law) -> int:
        sums = list(itertools.accumulate(weights))
        wanted = self.u * sums[-1]
        gaps = (abs(s - wanted) for s, w in zip(sums, weights, strict=True) if w > 0)
        self.margin = min(self.margin, *gaps)
        return next(i for i, s in enumerate(sums) if s > wanted)

    def gumbel(self, position: int) -> Sequence[float]:
        raise AssertionError(position)


def batch_law(kind: str, rows: int, V: int, g: torch.Generator) -> Tensor:
    """(rows, V) float64 laws, near and far from each other, ties and zeros among them."""
    if kind == "dyadic":  # eighths: every tie is an exact one
        cuts = torch.randint(9, (rows, V - 1), generator=g).sort(-1).values / 8.0
        edges = (torch.zeros(rows, 1), cuts, torch.ones(rows, 1))
        return torch.cat(edges, 1).diff(dim=1).double()
    law = torch.rand((rows, V), generator=g, dtype=torch.float64) ** 3 + 1e-9
    if kind == "zeros":
        law[torch.rand((rows, V), generator=g) < 0.6] = 0
        law[:, V // 2] += 0.1
    if kind == "one-hot":
        law = torch.eye(V, dtype=torch.float64)[torch.randint(V, (rows,), generator=g)]
    return law / law.sum(-1, keepdim=True)


def make_case(
    seed: int, kind: str, lengths: list[int], V: int, dtype: torch.dtype
) -> tuple[list[TokenTree], Tensor, Tensor]:
    """Trees drafted from their laws, p (R, V), q (nodes, V)."""
    g = torch.Generator().manual_seed(seed)
    p = batch_law("generic" if kind in ("equal", "disjoint") else kind, sum(lengths) + len(lengths),
                  V, g)  # fmt: skip
    q = batch_law("generic" if kind == "disjoint" else kind, sum(lengths), V, g)
    if kind == "disjoint":
        p[:, : V // 2] = 0
        q[:, V // 2 :] = 0
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    p, q = p.to(dtype), q.to(dtype)
    trees, node, row = [], 0, 0
    for n in lengths:
        if kind == "equal":
            q[node : node + n] = p[row : row + n]
        tokens = torch.empty(0, dtype=torch.long)
        if n:
            tokens = torch.multinomial(q[node : node + n], 1, generator=g)[:, 0]
        laws = q[node : node + n] if n else None
        trees.append(TokenTree.chain(tokens, laws))
        node, row = node + n, row + n + 1
    return trees, p, q


def reference_chain(tree: TokenTree, p: Tensor, q: Tensor | None) -> Node:
    nodes = [Node(row) for row in p.double().tolist()]
    for i, x in enumerate(tree.tokens.tolist()):
        law = [float(y == x) for y in range(p.shape[1])] if q is None else q[i].double().tolist()
        nodes[i].proposals = [(x, law, nodes[i + 1])]
    return nodes[0]


def block_margin(root: Node, noise: StepNoise, b: int) -> float:
    """The closest decision of block verification, before its ill-conditioned division."""
    node, weight, margin, i = root, 1.0, math.inf, 0
    while node.proposals:
        x, q, child = node.proposals[0]
        weight, i = min(weight * node.p[x] / q[x], 1.0), i + 1
        u = noise.accept[b, i].item()
        mass, slack = weight, 1.0
        if child.proposals:
            mass = sum(positive_part(child.p, child.proposals[0][1], weight))
            slack = mass + (1 - weight)
        margin, node = min(margin, abs(u * slack - mass)), child
    return margin


def emitted(outcome: Outcome, b: int) -> list[int]:
    row, n = outcome.tokens[b].tolist(), int(outcome.accepted[b])
    assert row[n + 1 :] == [-1] * (len(row) - n - 1)
    path = outcome.path[b].tolist()
    assert all(r >= 0 for r in path[:n])
    assert path[n:] == [-1] * (len(path) - n)
    return row[: n + 1]


LENGTHS = [[0], [1], [5], [3, 3, 3], [0, 0], [0, 4, 1], [7, 2, 0, 5], [64], [1, 64, 0], [2] * 9]
KINDS = ["generic", "zeros", "one-hot", "equal", "disjoint", "dyadic"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("drawn", [True, False], ids=["sampled", "point"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_batched_emits_what_the_definition_emits(
    rule: str, kind: str, drawn: bool, dtype: torch.dtype
) -> None:
    cases = mismatches = 0
    for seed, lengths in enumerate(LENGTHS * 4):
        V = (2, 3, 11, 50)[seed % 4]
        trees, p, q = make_case(seed, kind, lengths, V, dtype)
        g = torch.Generator().manual_seed(1000 + seed)
        noise = uniforms(len(trees), max(lengths) + 1, g, top=8 if kind == "dyadic" else 2**24)
        batch = TreeBatch.of(trees)
        outcome = getattr(batched, rule)(batch, p, q if drawn else None, noise)
        assert outcome.valid.all()
        node = 0
        for b, tree in enumerate(trees):
            rows = slice(batch.row_offsets[b], batch.row_offsets[b + 1])
            laws = q[node : node + len(tree)] if drawn else None
            root, rng = reference_chain(tree, p[rows], laws), Recorded(noise, b)
            expected = reference.verify(rule, root, rng)
            ours, node, cases = emitted(outcome, b), node + len(tree), cases + 1
            n = int(outcome.accepted[b])
            assert outcome.path[b, :n].tolist() == list(range(rows.start + 1, rows.start + 1 + n))
            if ours != expected:
                margin = min(rng.margin, block_margin(root, noise, b) if rule == "block" else 1)
                assert margin < 8 * ULP, (lengths, b, margin)
                mismatches += 1
    assert cases >= 100
    assert mismatches <= (0 if kind in ("generic", "zeros", "one-hot", "disjoint") else 2)


@pytest.mark.parametrize("rule", ["greedy", "gumbel"])
@pytest.mark.parametrize("kind", ["generic", "zeros", "dyadic"])
@pytest.mark.parametrize("branching", [True, False], ids=["trees", "chains"])
def test_batched_walk_emits_what_the_definition_emits(
    rule: str, kind: str, branching: bool
) -> None:
    for seed in range(60):
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        V = rng.choice([2, 3, 5])
        sizes = [rng.choice([0, 1, 4, 15, 40]) for _ in range(rng.randrange(1, 5))]
        trees = [grow(rng, n, V, branching) for n in sizes]
        batch = TreeBatch.of(trees)
        p = batch_law(kind, batch.row_offsets[-1], V, g).float()
        depth = max(t.max_depth for t in trees)
        levels = -(-torch.rand((len(trees), depth + 1, V), generator=g).clamp_min(1e-6).log()).log()
        noise = torch.cat([levels[b, [0, *t.depths]] for b, t in enumerate(trees)])
        if rule == "greedy":
            outcome = batched.greedy(batch, p.argmax(-1), p)
        else:
            outcome = batched.gumbel(batch, p, noise)
        assert outcome.valid.all()
        for b, tree in enumerate(trees):
            nodes = [Node(p[row].double().tolist())
                     for row in range(batch.row_offsets[b], batch.row_offsets[b + 1])]  # fmt: skip
            for proposal in tree.proposals:
                q = [float(x == proposal.token) for x in range(V)]
                nodes[proposal.parent + 1].proposals.append(
                    (proposal.token, q, nodes[proposal.node + 1])
                )
            coupled: Any = Coupled(levels[b].double().tolist(), 0)
            for row in nodes:
                row.p = [x / sum(row.p) for x in row.p]
            assert emitted(outcome, b) == reference.verify(rule, nodes[0], coupled)
            place = [r - batch.row_offsets[b] - 1 for r in outcome.path[b].tolist() if r >= 0]
            assert tree.tokens[place].tolist() == emitted(outcome, b)[:-1]
            assert [tree.parents[i] for i in place] == [-1, *place][: len(place)]


def grow(rng: random.Random, size: int, V: int, branching: bool) -> TokenTree:
    pairs: list[tuple[int, int]] = []
    while len(pairs) < size:
        parent = rng.randrange(-1, len(pairs)) if branching else len(pairs) - 1
        free = [x for x in range(V) if (parent, x) not in pairs]
        if free:
            pairs.append((parent, rng.choice(free)))
    return TokenTree.build([x for _, x in pairs], [parent for parent, _ in pairs])


@pytest.mark.parametrize("V", [1, 2, 63, 4096])
def test_sample_never_draws_weight_zero(V: int) -> None:
    g = torch.Generator().manual_seed(V)
    edge = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    for _ in range(50):
        weights = torch.rand((4, V), generator=g) ** 8
        weights[torch.rand((4, V), generator=g) < 0.7] = 0
        weights[:, V // 2] += 1e-6
        drawn = batched.sample(weights, edge)
        assert (weights.gather(1, drawn[:, None]) > 0).all()
        assert drawn[0] == weights[0].nonzero()[0]
        assert drawn[3] == weights[3].nonzero()[-1] or weights[3, drawn[3] + 1 :].sum() < 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.5])
def test_bad_target_row_invalidates_its_sequence_alone(value: float) -> None:
    trees = [TokenTree.chain(torch.zeros(n, dtype=torch.long)) for n in (2, 0, 3)]
    batch, noise = TreeBatch.of(trees), uniforms(3, 4)
    branching = TreeBatch.of([TokenTree.build([0, 1], [-1, -1]), *trees[1:]])
    p = torch.full((8, 4), 0.25)
    p[6, 1] = value
    for outcome in (
        batched.token(batch, p, None, noise),
        batched.block(batch, p, None, noise),
        batched.gumbel(batch, p, torch.zeros(8, 4)),
        batched.gumbel(branching, p, torch.zeros(8, 4)),
    ):
        assert outcome.valid.tolist() == [True, True, False]
    alone = TreeBatch.of(trees[1:2])
    assert batched.token(alone, p[6:7], None, uniforms(1, 1)).valid.tolist() == [False]
    if not math.isfinite(value):
        logits = p.clone()
        best = logits.argmax(-1)
        assert batched.greedy(batch, best, logits).valid.tolist() == [True, True, False]


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_chain_rules_refuse_a_branch(rule: str) -> None:
    tree = TokenTree.build([0, 1], [-1, -1])
    laws = torch.full((3, 2), 0.5)
    with pytest.raises(InvalidLawError):
        getattr(batched, rule)(TreeBatch.of([tree]), laws, None, uniforms(1, 3))


def test_every_rule_is_batched() -> None:
    for name in RULES:
        assert callable(getattr(batched, name))
