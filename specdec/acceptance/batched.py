"""The acceptance rules over a ragged batch of trees, as torch tensors.

Rows are packed: per sequence the root, then its nodes, sequences one after the other. No loop over
nodes, vocabulary or sequences, no host synchronisation; the definition of each rule is
reference.py, and both emit the same tokens when they read the same uniforms. Here are the rules
that follow a line and those for chains; trees.py and kseq.py have the others.

p (R, V) are the target's laws, q (L, V) the stored laws of all trees, None where there are none.
Arithmetic follows p's dtype, weights and coins are compared in float64. A rule that is not defined
for these trees raises InvalidLawError before any arithmetic; a law that is none clears
Outcome.valid, and diagnose then says which.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.acceptance.draw import LARGE, largest, plus_log, sample
from specdec.acceptance.kseq import kseq
from specdec.acceptance.laws import are_laws, diagnose, is_law, require, valid
from specdec.acceptance.layout import Layout, Outcome, TreeBatch
from specdec.acceptance.trees import follow, recursive, traversal, typical
from specdec.rng import StepNoise

__all__ = [
    "BY_COINS", "Outcome", "TreeBatch", "block", "diagnose", "greedy", "gumbel", "kseq",
    "recursive", "said_by_gumbel", "said_by_walk", "sample", "token", "traversal", "typical",
    "walk",
]  # fmt: skip


def greedy(batch: TreeBatch, best: Tensor, logits: Tensor) -> Outcome:
    """Follows the target's argmax down the tree. best (R,) of logits (R, V), any tree."""
    peak = logits.gather(1, best[:, None]).squeeze(1)  # argmax lands on a NaN where there is one
    return _walk(batch, best, peak - peak == 0)


def gumbel(batch: TreeBatch, p: Tensor, noise: Tensor) -> Outcome:
    """Follows argmax(log p + noise): plain sampling with that noise (2408.07978), any tree.

    p (R, V), noise (R, V) the Gumbel rows of each row's absolute position.
    """
    return _walk(batch, *said_by_gumbel(batch, p, noise))


def said_by_gumbel(batch: TreeBatch, p: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What each row says where it is visited, (R,), and whether its law is one, (R,); as gumbel."""
    is_small = p.shape[1] < LARGE
    best = p.log().add_(noise).argmax(-1) if is_small else _visited(batch, p, noise)
    return best, is_law(p)


def _visited(batch: TreeBatch, p: Tensor, noise: Tensor) -> Tensor:
    """(R,) argmax(log p + noise) of the rows that are visited, zero in others of a branching tree.

    One row per sequence at a time: it stays in the cache, and most of a tree is never visited.
    """
    layout = batch.layout
    if layout.is_even:
        grid = layout.chain_rows.shape
        pairs = zip(p.unflatten(0, grid).unbind(1), noise.unflatten(0, grid).unbind(1), strict=True)
        return torch.stack([largest(plus_log(there, law)) for law, there in pairs], 1).flatten()
    best, rows = torch.zeros_like(layout.row_sequence), layout.roots
    for _ in range(layout.depth + 1):
        there = noise.index_select(0, rows)
        best[rows] = chosen = largest(plus_log(there, p.index_select(0, rows)))
        hit = (layout.parent_rows == rows[layout.sequence]) & (
            batch.tokens == chosen[layout.sequence]
        )
        # a child has a higher number than its parent
        below = torch.where(hit, layout.node_rows, 0)
        rows = rows.scatter_reduce(0, layout.sequence, below, "amax")
    return best


def walk(batch: TreeBatch, p: Tensor, q: Tensor | None, noise: StepNoise) -> Outcome:
    """Samples y ~ p at each visited row and goes on to the child that carries it, any tree.

    Lossless for every draft that does not see these coins; as good as any rule for deterministic
    drafts. p (R, V) the target's laws; q (L, V) is only checked.
    """
    return _walk(batch, *said_by_walk(batch, p, q, noise))


def said_by_walk(
    batch: TreeBatch, p: Tensor, q: Tensor | None, noise: StepNoise
) -> tuple[Tensor, Tensor]:
    """What each row says where it is visited, (R,), and whether the laws of each row or of each
    sequence are laws, (R,) or (B,); as walk."""
    layout = batch.layout
    require("walk", layout, p, q)
    if layout.is_even:
        coins = noise.bonus[:, : layout.depth + 1].reshape(-1)
    else:
        coins = noise.bonus[layout.row_sequence, layout.local]
    sound = is_law(p) if layout.is_chain and not layout.laws else valid(batch, p, q)
    return sample(p, coins), sound


def _walk(batch: TreeBatch, best: Tensor, is_valid: Tensor) -> Outcome:
    """Emits best (R,) at each visited row; goes on to the child that carries it, if there is one.

    is_valid (B,) or (R,), of every row.
    """
    layout, tokens = batch.layout, batch.tokens
    if layout.depth == 0:  # plain decoding
        path = layout.chain_rows[:, 1:]
        return Outcome(torch.zeros_like(best), best[:, None], path, is_valid)
    if layout.is_chain:
        chosen = _by_row(layout, best)  # (B, depth + 1)
        agree = _by_node(layout, tokens) == chosen[:, :-1]
        if not layout.is_even:
            agree &= layout.inside
        accepted = agree.cumprod(1).sum(1)
        passed = layout.steps <= accepted[:, None]
        emitted = torch.where(passed, chosen, -1)
        path = torch.where(passed[:, 1:], layout.chain_rows[:, 1:], -1)
        if is_valid.shape[0] != accepted.shape[0]:
            is_valid = _by_row(layout, is_valid).all(1)
        return Outcome(accepted, emitted, path, is_valid)
    return follow(batch, best, is_valid)


def token(batch: TreeBatch, p: Tensor, q: Tensor | None, noise: StepNoise) -> Outcome:
    """Token-wise speculative sampling (Leviathan et al. 2023, 2211.17192, algorithm 1), chains.

    p (R, V) the target's laws, q (L, V) the drafters' stored ones, None for point masses.
    """
    layout = batch.layout
    require("token", layout, p, q)
    if layout.depth == 0:
        return _extra_only(batch, p, noise)
    if not layout.is_plain:
        return recursive(batch, p, q, noise)  # the same rule, where each row has one proposal
    inside, q = _inside(batch, p), q if layout.laws else None
    p_drafted, q_drafted = _drafted(inside, p, q)
    coins = noise.accept[:, 1 : layout.depth + 1, 0]
    if q_drafted is not None:
        coins = coins * _by_node(layout, q_drafted)
    # u * q < p rather than u < p / q: q may be tiny, and u in [0, 1) must never accept p == 0
    keep = coins < _by_node(layout, p_drafted)
    if not layout.is_even:
        keep &= layout.inside
    is_valid = _valid(batch, inside, p, q, q_drafted)
    return _finish(inside, p, q, keep.cumprod(1).sum(1), None, noise, is_valid)


def block(batch: TreeBatch, p: Tensor, q: Tensor | None, noise: StepNoise) -> Outcome:
    """Block verification (Sun et al. 2024, 2403.10444), chains; arguments as for token."""
    layout = batch.layout
    require("block", layout, p, q)
    if layout.depth == 0:
        return _extra_only(batch, p, noise)
    if not layout.is_plain:
        return traversal(batch, p, q, noise)  # the same rule, where each row has one proposal
    inside, q = _inside(batch, p), q if layout.laws else None
    p_drafted, q_drafted = _drafted(inside, p, q)
    ratios = p_drafted.double() if q_drafted is None else p_drafted.double() / q_drafted
    weights = _weights(_by_node(layout, ratios)).to(p.dtype)
    # h_i for 1 <= i < g needs the residual mass of the next position; h_g = w_g.
    inner = weights[:, 1:-1]
    if q is None:
        mass = inner * (1 - _by_node(layout, p_drafted)[:, 1:])
    else:
        mass = _masses(layout, p, q, inner)
    h = torch.cat((mass / (mass + (1 - inner)), weights[:, -1:]), 1)
    if not layout.is_even:
        h = torch.where(layout.is_last, weights[:, 1:], h)
    # Not u < h: where both masses are zero h is NaN, and the definition accepts.
    success = (noise.accept[:, 1 : layout.depth + 1, 0] >= h).logical_not_()
    if not layout.is_even:
        success &= layout.inside
    # the LARGEST success: the coins are independent, and a failed one stops nothing
    accepted = (success * layout.steps[1:]).amax(1)
    weight = weights.gather(1, accepted[:, None])
    is_valid = _valid(batch, inside, p, q, q_drafted)
    return _finish(inside, p, q, accepted, weight, noise, is_valid)


def _weights(ratios: Tensor) -> Tensor:
    """(B, depth) p_i / q_i -> (B, depth + 1): w_0 = 1, w_i = min(w_{i-1} p_i / q_i, 1), clipped at
    every step.

    Products, not sums of logarithms: a coin that ties with an exact weight then decides as in the
    definition. float64, where p / q of two float32 numbers cannot overflow.
    """
    weights = [torch.ones_like(ratios[:, 0])]
    for ratio in ratios.unbind(1):
        weights.append((weights[-1] * ratio).clamp_max_(1))
    return torch.stack(weights, 1)


def _masses(layout: Layout, p: Tensor, q: Tensor, weights: Tensor) -> Tensor:
    """(B, depth - 1) sum [w p - q]+ at each row between the root and the end of its chain."""
    if p.shape[1] < LARGE:
        residual = _by_row(layout, p)[:, 1:-1] * weights[..., None]  # (B, depth - 1, V)
        return residual.sub_(_by_node(layout, q)[:, 1:]).clamp_min_(0).sum(-1)
    masses = torch.empty_like(weights)
    for i in range(1, layout.depth):  # one level at a time stays in the cache
        level = p.index_select(0, layout.chain_rows[:, i]).mul_(weights[:, i - 1 : i])
        level.sub_(q.index_select(0, layout.chain_nodes[:, i])).clamp_min_(0)
        masses[:, i - 1] = level.sum(-1)
    return masses


def _by_row(layout: Layout, packed: Tensor) -> Tensor:
    """(R, ...) packed rows of chains -> (B, depth + 1, ...); repeats a shorter chain's last row."""
    if layout.is_even:
        return packed.view(layout.chain_rows.shape + packed.shape[1:])
    return packed[layout.chain_rows]


def _by_node(layout: Layout, packed: Tensor) -> Tensor:
    """(nodes, ...) packed nodes of chains -> (B, depth, ...); past the end of a chain anything."""
    if layout.is_even:
        return packed.view(layout.inside.shape + packed.shape[1:])
    return packed[layout.chain_nodes[:, :-1]]


def _inside(batch: TreeBatch, p: Tensor) -> TreeBatch:
    """The batch with tokens inside the vocabulary, whatever came."""
    return TreeBatch(batch.layout, batch.tokens.clamp(0, p.shape[1] - 1))


def _drafted(batch: TreeBatch, p: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(nodes,) each: what target and drafter gave the drafted tokens; None stands for one."""
    layout = batch.layout
    where = torch.add(batch.tokens, layout.parent_rows, alpha=p.shape[1])
    p_drafted = p.reshape(-1).index_select(0, where)
    if q is None:
        return p_drafted, None
    where = torch.add(batch.tokens, layout.nodes, alpha=q.shape[1])
    return p_drafted, q.reshape(-1).index_select(0, where)


def _finish(
    batch: TreeBatch, p: Tensor, q: Tensor | None, accepted: Tensor, weight: Tensor | None,
    noise: StepNoise, is_valid: Tensor,
) -> Outcome:  # fmt: skip
    """The extra token: from [w p - q]+ at the first row not passed, from p behind a full chain.
    weight (B, 1), None: one."""
    layout, at = batch.layout, accepted[:, None]
    law = p.index_select(0, layout.roots + accepted)  # (B, V); a chain's rows lie side by side
    complete = at == layout.counts[:, None]
    next_node = layout.chain_nodes.gather(1, at).squeeze(1)
    scaled = law if weight is None else law * weight
    if q is None:
        residual = scaled.scatter(1, batch.tokens.index_select(0, next_node)[:, None], 0.0)
    else:
        residual = torch.sub(scaled, q.index_select(0, next_node)).clamp_min_(0)
    # A residual without mass arises only from rounding, where q == p: p itself is then right.
    use_p = complete | (residual.sum(-1, keepdim=True) <= 0)
    coin = torch.where(complete, noise.bonus.gather(1, at), noise.residual.gather(1, at))
    extra = sample(torch.where(use_p, law, residual), coin.squeeze(1))
    passed = layout.steps[:-1] < at
    line = torch.where(passed, _by_node(layout, batch.tokens), -1)
    emitted = torch.cat((line, layout.blank), 1).scatter_(1, at, extra[:, None])
    path = torch.where(passed, layout.chain_rows[:, 1:], -1)
    return Outcome(accepted, emitted, path, is_valid)


def _extra_only(batch: TreeBatch, p: Tensor, noise: StepNoise) -> Outcome:
    extra = sample(p, noise.bonus[:, 0])
    path = batch.layout.chain_rows[:, 1:]
    return Outcome(torch.zeros_like(extra), extra[:, None], path, is_law(p))


def _valid(
    batch: TreeBatch, inside: TreeBatch, p: Tensor, q: Tensor | None, q_drafted: Tensor | None
) -> Tensor:
    """(B,) whether every law of a sequence is one, and every drafted token is in the vocabulary and
    has mass in its own law."""
    held = inside.tokens == batch.tokens
    if q is None or q_drafted is None:
        sound = torch.cat((is_law(p), held))
    else:
        # both at once: on small laws the number of calls is what costs
        sound = are_laws(torch.cat((p.sum(-1), q.sum(-1))), torch.cat((p.amin(-1), q.amin(-1))))
        sound[p.shape[0] :].logical_and_(held).logical_and_(q_drafted > 0)
    return sound[batch.layout.checked].all(1)


# The rules that judge laws by a step's coins; greedy and gumbel read no coins.
BY_COINS: dict[str, Callable[[TreeBatch, Tensor, Tensor | None, StepNoise], Outcome]] = {
    "walk": walk,
    "token": token,
    "block": block,
    "recursive": recursive,
    "kseq": kseq,
    "traversal": traversal,
    "typical": typical,
}
