"""The acceptance rules over a ragged batch of trees, as torch tensors.

Rows are packed: per sequence the root, then its nodes, sequences one after the other. No loop over
nodes, vocabulary or sequences, no host synchronisation; the definition of each rule is
reference.py, and both emit the same tokens when they read the same uniforms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from specdec.errors import InvalidLawError
from specdec.rng import StepNoise
from specdec.tree import TokenTree, chain_parents, tree_depths


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """Index tensors of one batch shape; a function of the parents alone."""

    row_offsets: tuple[int, ...]  # (B + 1,) first packed row of each sequence
    lengths: tuple[int, ...]  # nodes per sequence
    depth: int  # of the deepest tree
    is_chain: bool
    roots: Tensor  # (B,) packed rows
    counts: Tensor  # (B,) nodes
    parent_rows: Tensor  # (nodes,) packed row of each node's parent
    node_rows: Tensor  # (nodes,) packed row of each node
    sequence: Tensor  # (nodes,)
    row_sequence: Tensor  # (R,)
    depths: Tensor  # (nodes,) 1 below the root
    chain_rows: Tensor  # (B, depth + 1) packed rows along each chain, its last one repeated
    chain_nodes: Tensor  # (B, depth) node numbers in the packed (nodes,) order, 0 past the end
    inside: Tensor  # (B, depth) bool: whether the chain reaches that depth


@lru_cache(maxsize=256)
def _layout(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> _Layout:
    lengths = tuple(len(parents) for parents in shapes)
    row_offsets, node_offsets = [0], [0]
    for n in lengths:
        row_offsets.append(row_offsets[-1] + n + 1)
        node_offsets.append(node_offsets[-1] + n)
    depths = [d for parents in shapes for d in tree_depths(parents)]
    depth = max(depths, default=0)
    along = range(depth + 1)

    def tensor(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    starts = list(zip(row_offsets, node_offsets, lengths, strict=False))
    return _Layout(
        tuple(row_offsets),
        lengths,
        depth,
        all(parents == chain_parents(len(parents)) for parents in shapes),
        tensor(row_offsets[:-1]),
        tensor(lengths),
        tensor(
            [r + p + 1 for (r, _, _), parents in zip(starts, shapes, strict=True) for p in parents]
        ),
        tensor([r + i + 1 for r, _, n in starts for i in range(n)]),
        tensor([b for b, n in enumerate(lengths) for _ in range(n)]),
        tensor([b for b, n in enumerate(lengths) for _ in range(n + 1)]),
        tensor(depths),
        tensor([[r + min(i, n) for i in along] for r, _, n in starts]),
        tensor([[o + i if i < n else 0 for i in range(depth)] for _, o, n in starts]).view(
            len(shapes), depth
        ),
        tensor([[i < n for i in range(depth)] for n in lengths]).view(len(shapes), depth).bool(),
    )


@dataclass(frozen=True, slots=True, eq=False)
class TreeBatch:
    """The trees of one step: their layout, made on the host, and their tokens, on the device."""

    layout: _Layout
    tokens: Tensor  # (nodes,) packed

    @staticmethod
    def of(trees: Sequence[TokenTree]) -> "TreeBatch":
        tokens = trees[0].tokens if len(trees) == 1 else torch.cat([t.tokens for t in trees])
        return TreeBatch(_layout(tuple(t.parents for t in trees), tokens.device), tokens)

    @property
    def row_offsets(self) -> tuple[int, ...]:
        """First packed row of each sequence, and the number of rows."""
        return self.layout.row_offsets


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a rule decided, per sequence; -1 pads."""

    accepted: Tensor  # (B,) drafted tokens kept
    tokens: Tensor  # (B, depth + 1) the accepted path, then exactly one extra token
    path: Tensor  # (B, depth) packed rows of the accepted nodes
    valid: Tensor  # (B,) bool: False where the target's numbers were not


def sample(weights: Tensor, uniforms: Tensor) -> Tensor:
    """(B, V) unnormalised laws, (B,) uniforms -> (B,) tokens: the first with cumsum > u * total.

    A token of weight zero is never drawn: its cumulative sum equals its predecessor's, and at the
    upper end u * total < total keeps the search inside.
    """
    sums = weights.cumsum(-1, dtype=torch.float64)
    wanted = uniforms.to(torch.float64)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True).squeeze(1).clamp_max(weights.shape[1] - 1)


def greedy(batch: TreeBatch, best: Tensor, logits: Tensor) -> Outcome:
    """Follows the target's argmax down the tree. best (R,) of logits (R, V), any tree."""
    peak = logits.gather(1, best[:, None]).squeeze(1)  # argmax lands on a NaN where there is one
    return _walk(batch, best, torch.isfinite(peak))


def gumbel(batch: TreeBatch, p: Tensor, noise: Tensor) -> Outcome:
    """Follows argmax(log p + noise), which is plain sampling with that noise. p, noise (R, V)."""
    best = (p.log() + noise).argmax(-1)
    return _walk(batch, best, _is_law(p))


def _walk(batch: TreeBatch, best: Tensor, row_valid: Tensor) -> Outcome:
    """Emits best at each visited row; goes on to the child that carries it, if there is one."""
    layout, tokens = batch.layout, batch.tokens
    if layout.is_chain:
        rows = layout.chain_rows
        chosen = best[rows]
        if layout.depth == 0:
            accepted = torch.zeros_like(layout.roots)
        else:
            drafted = tokens[layout.chain_nodes]
            agree = (drafted == chosen[:, :-1]) & layout.inside
            accepted = agree.cumprod(1).sum(1)
        return _chain_outcome(
            batch, accepted, chosen.gather(1, accepted[:, None]), row_valid[rows].all(1)
        )
    hit = tokens == best[layout.parent_rows]
    alive = torch.zeros(layout.row_offsets[-1], dtype=torch.bool, device=best.device)
    alive[layout.roots] = True
    for depth in range(1, layout.depth + 1):
        alive[layout.node_rows] |= hit & alive[layout.parent_rows] & (layout.depths == depth)
    kept = alive[layout.node_rows]
    count = len(layout.lengths)
    accepted = torch.zeros(count, dtype=torch.long, device=best.device)
    accepted.index_add_(0, layout.sequence, kept.long())
    path = torch.full((count, layout.depth + 1), -1, dtype=torch.long, device=best.device)
    # Live nodes have one place each; the others all write to the spare last column.
    column = torch.where(kept, layout.depths - 1, layout.depth)
    path[layout.sequence, column] = layout.node_rows
    path = path[:, : layout.depth]
    steps = torch.arange(layout.depth, device=best.device)
    path = torch.where(steps < accepted[:, None], path, -1)
    visited = torch.cat((layout.roots[:, None], path), 1)
    emitted = torch.where(visited >= 0, best[visited.clamp_min(0)], -1)
    bad = torch.zeros(count, dtype=torch.long, device=best.device)
    bad.index_add_(0, layout.row_sequence, (~row_valid).long())
    return Outcome(accepted, emitted, path, bad == 0)


def token(batch: TreeBatch, p: Tensor, q: Tensor | None, noise: StepNoise) -> Outcome:
    """Token-wise speculative sampling (Leviathan et al. 2023, 2211.17192, algorithm 1), chains.

    p (R, V) the target's laws, q (nodes, V) the drafter's stored ones, None for point masses.
    """
    layout = _require_chain(batch, "token")
    if layout.depth == 0:
        return _extra_only(batch, p, noise)
    drafted = batch.tokens[layout.chain_nodes]  # (B, G)
    rows = layout.chain_rows
    p_drafted = p[rows[:, :-1], drafted]
    q_drafted = 1.0 if q is None else q[layout.chain_nodes, drafted]
    coins = noise.accept[:, 1 : layout.depth + 1]
    # u * q < p rather than u < p / q: q may be tiny, and u in [0, 1) must never accept p == 0
    keep = (coins * q_drafted < p_drafted) & layout.inside
    accepted = keep.long().cumprod(1).sum(1)
    weight = torch.ones_like(p[:1, :1]).expand(len(layout.lengths), 1)
    return _finish(batch, p, q, accepted, weight, noise)


def block(batch: TreeBatch, p: Tensor, q: Tensor | None, noise: StepNoise) -> Outcome:
    """Block verification (Sun et al. 2024, 2403.10444), chains; arguments as for token."""
    layout = _require_chain(batch, "block")
    if layout.depth == 0:
        return _extra_only(batch, p, noise)
    rows = layout.chain_rows
    drafted = batch.tokens[layout.chain_nodes]
    p_drafted = p[rows[:, :-1], drafted]
    q_drafted = torch.ones_like(p_drafted) if q is None else q[layout.chain_nodes, drafted]
    ratios = p_drafted / q_drafted
    kept: list[Tensor] = [torch.ones_like(ratios[:, 0])]
    for i in range(layout.depth):  # clipped at every step, not only at the end
        kept.append((kept[-1] * ratios[:, i]).clamp_max(1))
    weights = torch.stack(kept, 1)  # (B, G + 1), w_0 = 1
    # h_i for 1 <= i < g needs the residual mass of the next position; h_g = w_g.
    residual = torch.zeros_like(weights)
    if layout.depth > 1:
        nodes = layout.chain_nodes[:, 1:]
        inner = p[rows[:, 1:-1]] * weights[:, 1:-1, None]  # (B, G - 1, V)
        if q is None:
            inner = inner.sum(-1) - torch.minimum(
                inner.gather(2, drafted[:, 1:, None]).squeeze(2), torch.ones_like(inner[..., 0])
            )
            residual[:, 1:-1] = inner
        else:
            residual[:, 1:-1] = (inner - q[nodes]).clamp_min_(0).sum(-1)
    slack = residual + (1 - weights)
    h = torch.where(slack > 0, residual / slack, 1.0)
    steps = torch.arange(layout.depth + 1, device=p.device)
    last = layout.counts[:, None]
    h = torch.where(steps == last, weights, h)
    coins = noise.accept[:, : layout.depth + 1]
    success = (coins < h) & (steps >= 1) & (steps <= last)
    # the LARGEST success: the coins are independent, and a failed one stops nothing
    accepted = (success * steps).amax(1)
    weight = weights.gather(1, accepted[:, None])
    return _finish(batch, p, q, accepted, weight, noise)


def _finish(
    batch: TreeBatch, p: Tensor, q: Tensor | None, accepted: Tensor, weight: Tensor,
    noise: StepNoise,
) -> Outcome:  # fmt: skip
    """The extra token: from [w p - q]+ at the first row not passed, from p behind a full chain."""
    layout = batch.layout
    at = accepted[:, None]
    law = p[layout.chain_rows.gather(1, at).squeeze(1)]  # (B, V)
    complete = at >= layout.counts[:, None]
    next_node = layout.chain_nodes.gather(1, at.clamp_max(layout.depth - 1)).squeeze(1)
    if q is None:
        removed = torch.zeros_like(law).scatter_(1, batch.tokens[next_node][:, None], 1.0)
    else:
        removed = q[next_node]
    residual = (weight * law - removed).clamp_min_(0)
    # A residual without mass arises only from rounding, where q == p: p itself is then right.
    use_p = complete | (residual.sum(-1, keepdim=True) <= 0)
    weights = torch.where(use_p, law, residual)
    coin = torch.where(complete, noise.bonus.gather(1, at), noise.residual.gather(1, at))
    extra = sample(weights, coin.squeeze(1))
    return _chain_outcome(batch, accepted, extra[:, None], _is_law(p)[layout.chain_rows].all(1))


def _extra_only(batch: TreeBatch, p: Tensor, noise: StepNoise) -> Outcome:
    extra = sample(p, noise.bonus[:, 0])
    return _chain_outcome(batch, torch.zeros_like(extra), extra[:, None], _is_law(p))


def _chain_outcome(batch: TreeBatch, accepted: Tensor, extra: Tensor, valid: Tensor) -> Outcome:
    layout = batch.layout
    at = accepted[:, None]
    if layout.depth == 0:
        return Outcome(accepted, extra, layout.chain_nodes, valid)
    steps = torch.arange(layout.depth + 1, device=at.device)
    drafted = batch.tokens[layout.chain_nodes]
    line = torch.cat((drafted, extra), 1)
    emitted = torch.where(steps < at, line, torch.where(steps == at, extra, -1))
    path = torch.where(steps[:-1] < at, layout.chain_rows[:, 1:], -1)
    return Outcome(accepted, emitted, path, valid)


def _is_law(p: Tensor) -> Tensor:
    """(R,) whether each row sums to one; NaN and infinity do not."""
    return (p.sum(-1) - 1).abs() < 1e-3


def _require_chain(batch: TreeBatch, rule: str) -> _Layout:
    if not batch.layout.is_chain:
        raise InvalidLawError(rule, "root", "it judges chains, and a tree of the batch branches")
    return batch.layout
