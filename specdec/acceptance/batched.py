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
    is_even: bool  # chains of one length: packed tensors are padded ones, seen through a view
    roots: Tensor  # (B,) packed rows
    counts: Tensor  # (B,) nodes
    parent_rows: Tensor  # (nodes,) packed row of each node's parent
    node_rows: Tensor  # (nodes,) packed row of each node
    sequence: Tensor  # (nodes,)
    row_sequence: Tensor  # (R,)
    depths: Tensor  # (nodes,) 1 below the root
    chain_rows: Tensor  # (B, depth + 1) packed rows along each chain, its last one repeated
    nodes: Tensor  # (nodes,) 0, 1, 2, ...
    chain_nodes: Tensor  # (B, depth + 1) packed number of the node below that row, 0 past the end
    inside: Tensor  # (B, depth) bool: whether the chain reaches that depth
    is_last: Tensor  # (B, depth) bool: whether the chain ends there
    steps: Tensor  # (depth + 1,) 0, 1, 2, ...
    blank: Tensor  # (B, 1) of -1


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

    def tensor(values: object, *shape: int) -> Tensor:
        found = torch.tensor(values, dtype=torch.long, device=device)
        return found.view(shape) if shape else found

    starts = list(zip(row_offsets, node_offsets, lengths, strict=False))
    B = len(shapes)
    is_chain = all(parents == chain_parents(len(parents)) for parents in shapes)
    return _Layout(
        row_offsets=tuple(row_offsets),
        lengths=lengths,
        depth=depth,
        is_chain=is_chain,
        is_even=is_chain and len(set(lengths)) == 1,
        roots=tensor(row_offsets[:-1]),
        counts=tensor(lengths),
        parent_rows=tensor(
            [r + p + 1 for (r, _, _), parents in zip(starts, shapes, strict=True) for p in parents]
        ),
        node_rows=tensor([r + i + 1 for r, _, n in starts for i in range(n)]),
        sequence=tensor([b for b, n in enumerate(lengths) for _ in range(n)]),
        row_sequence=tensor([b for b, n in enumerate(lengths) for _ in range(n + 1)]),
        depths=tensor(depths),
        chain_rows=tensor([[r + min(i, n) for i in along] for r, _, n in starts]),
        nodes=tensor(range(node_offsets[-1])),
        chain_nodes=tensor([[o + i if i < n else 0 for i in along] for _, o, n in starts]),
        inside=tensor([[i < n for i in range(depth)] for n in lengths], B, depth).bool(),
        is_last=tensor([[i == n - 1 for i in range(depth)] for n in lengths], B, depth).bool(),
        steps=tensor(along),
        blank=tensor([[-1]] * B),
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
    return _walk(batch, best, peak - peak == 0)


def gumbel(batch: TreeBatch, p: Tensor, noise: Tensor) -> Outcome:
    """Follows argmax(log p + noise), which is plain sampling with that noise. p, noise (R, V)."""
    best = (p.log() + noise).argmax(-1)
    return _walk(batch, best, _is_law(p))


def _walk(batch: TreeBatch, best: Tensor, row_valid: Tensor) -> Outcome:
    """Emits best at each visited row; goes on to the child that carries it, if there is one."""
    layout, tokens = batch.layout, batch.tokens
    if layout.depth == 0:  # plain decoding
        path = layout.chain_rows[:, 1:]
        return Outcome(torch.zeros_like(best), best[:, None], path, row_valid)
    if layout.is_chain:
        chosen = _by_row(layout, best)  # (B, depth + 1)
        agree = _by_node(layout, tokens) == chosen[:, :-1]
        if not layout.is_even:
            agree &= layout.inside
        accepted = agree.cumprod(1).sum(1)
        passed = layout.steps <= accepted[:, None]
        emitted = torch.where(passed, chosen, -1)
        path = torch.where(passed[:, 1:], layout.chain_rows[:, 1:], -1)
        return Outcome(accepted, emitted, path, _by_row(layout, row_valid).all(1))
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
    p_drafted, q_drafted = _drafted(batch, p, q)
    coins = noise.accept[:, 1 : layout.depth + 1]
    # u * q < p rather than u < p / q: q may be tiny, and u in [0, 1) must never accept p == 0
    keep = (coins if q_drafted is None else coins * q_drafted) < p_drafted
    if not layout.is_even:
        keep &= layout.inside
    return _finish(batch, p, q, keep.cumprod(1).sum(1), None, noise)


def block(batch: TreeBatch, p: Tensor, q: Tensor | None, noise: StepNoise) -> Outcome:
    """Block verification (Sun et al. 2024, 2403.10444), chains; arguments as for token."""
    layout = _require_chain(batch, "block")
    if layout.depth == 0:
        return _extra_only(batch, p, noise)
    p_drafted, q_drafted = _drafted(batch, p, q)
    weights = _weights(p_drafted, q_drafted).to(p.dtype)
    # h_i for 1 <= i < g needs the residual mass of the next position; h_g = w_g.
    inner = weights[:, 1:-1]
    if q is None:
        mass = inner * (1 - p_drafted[:, 1:])
    else:
        residual = _by_row(layout, p)[:, 1:-1] * inner[..., None]  # (B, depth - 1, V)
        mass = residual.sub_(_by_node(layout, q)[:, 1:]).clamp_min_(0).sum(-1)
    h = torch.cat((mass / (mass + (1 - inner)), weights[:, -1:]), 1)
    if not layout.is_even:
        h = torch.where(layout.is_last, weights[:, 1:], h)
    # Not u < h: where both masses are zero h is NaN, and the definition accepts.
    success = (noise.accept[:, 1 : layout.depth + 1] >= h).logical_not_()
    if not layout.is_even:
        success &= layout.inside
    # the LARGEST success: the coins are independent, and a failed one stops nothing
    accepted = (success * layout.steps[1:]).amax(1)
    return _finish(batch, p, q, accepted, weights.gather(1, accepted[:, None]), noise)


def _weights(p_drafted: Tensor, q_drafted: Tensor | None) -> Tensor:
    """(B, depth + 1) float64: w_0 = 1, w_i = min(w_{i-1} p_i / q_i, 1), clipped at every step.

    Products, not sums of logarithms: a coin that ties with an exact weight then decides as in the
    definition. float64, where p / q of two float32 numbers cannot overflow.
    """
    ratios = p_drafted.double()
    if q_drafted is not None:
        ratios = ratios / q_drafted
    weights = [torch.ones_like(ratios[:, 0])]
    for ratio in ratios.unbind(1):
        weights.append((weights[-1] * ratio).clamp_max_(1))
    return torch.stack(weights, 1)


def _by_row(layout: _Layout, packed: Tensor) -> Tensor:
    """(R, ...) packed rows of chains -> (B, depth + 1, ...); repeats a shorter chain's last row."""
    if layout.is_even:
        return packed.view(layout.chain_rows.shape + packed.shape[1:])
    return packed[layout.chain_rows]


def _by_node(layout: _Layout, packed: Tensor) -> Tensor:
    """(nodes, ...) packed nodes of chains -> (B, depth, ...); past the end of a chain anything."""
    if layout.is_even:
        return packed.view(layout.inside.shape + packed.shape[1:])
    return packed[layout.chain_nodes[:, :-1]]


def _drafted(batch: TreeBatch, p: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(B, depth) each: what target and drafter gave the drafted tokens; None stands for one."""
    layout = batch.layout
    where = torch.add(batch.tokens, layout.parent_rows, alpha=p.shape[1])
    p_drafted = _by_node(layout, p.reshape(-1).index_select(0, where))
    if q is None:
        return p_drafted, None
    where = torch.add(batch.tokens, layout.nodes, alpha=q.shape[1])
    return p_drafted, _by_node(layout, q.reshape(-1).index_select(0, where))


def _finish(
    batch: TreeBatch, p: Tensor, q: Tensor | None, accepted: Tensor, weight: Tensor | None,
    noise: StepNoise,
) -> Outcome:  # fmt: skip
    """The extra token: from [w p - q]+ at the first row not passed, from p behind a full chain.
    weight (B, 1), None: one."""
    layout, at = batch.layout, accepted[:, None]
    law = p.index_select(0, layout.roots + accepted)  # (B, V); a chain's rows lie side by side
    complete = at == layout.counts[:, None]
    next_node = layout.chain_nodes.gather(1, at).squeeze(1)
    residual = law.clone() if weight is None else law * weight
    if q is None:
        residual.scatter_(1, batch.tokens.index_select(0, next_node)[:, None], 0.0)
    else:
        residual.sub_(q.index_select(0, next_node)).clamp_min_(0)
    # A residual without mass arises only from rounding, where q == p: p itself is then right.
    use_p = complete | (residual.sum(-1, keepdim=True) <= 0)
    coin = torch.where(complete, noise.bonus.gather(1, at), noise.residual.gather(1, at))
    extra = sample(torch.where(use_p, law, residual), coin.squeeze(1))
    passed = layout.steps[:-1] < at
    line = torch.where(passed, _by_node(layout, batch.tokens), -1)
    emitted = torch.cat((line, layout.blank), 1).scatter_(1, at, extra[:, None])
    path = torch.where(passed, layout.chain_rows[:, 1:], -1)
    return Outcome(accepted, emitted, path, _by_row(layout, _is_law(p)).all(1))


def _extra_only(batch: TreeBatch, p: Tensor, noise: StepNoise) -> Outcome:
    extra = sample(p, noise.bonus[:, 0])
    path = batch.layout.chain_rows[:, 1:]
    return Outcome(torch.zeros_like(extra), extra[:, None], path, _is_law(p))


def _is_law(p: Tensor) -> Tensor:
    """(R,) whether each row sums to one; NaN and infinity do not."""
    return p.sum(-1).sub_(1).abs_() < 1e-3


def _require_chain(batch: TreeBatch, rule: str) -> _Layout:
    if not batch.layout.is_chain:
        raise InvalidLawError(rule, "root", "it judges chains, and a tree of the batch branches")
    return batch.layout
