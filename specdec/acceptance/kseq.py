"""k-SEQ over a ragged batch: optimal up to a constant for siblings that are iid from one law."""

import torch
from torch import Tensor

from specdec.acceptance.draw import sample
from specdec.acceptance.laws import require, valid
from specdec.acceptance.layout import Outcome, TreeBatch
from specdec.acceptance.trees import deepest, outcome
from specdec.rng import StepNoise


def kseq(batch: TreeBatch, p: Tensor, q: Tensor | None, noise: StepNoise) -> Outcome:
    """k-SEQ (SpecTr, Sun et al. 2023, 2310.15141), trees whose siblings are iid from one law.

    p (R, V) the target's laws, q (L, V) the stored ones. noise.accept has batch.copies copies.
    """
    require("kseq", batch.layout, p, q)
    layout, found = batch.layout, batch.layout.branches()
    tokens = batch.tokens.clamp(0, p.shape[1] - 1)
    rho = torch.ones(p.shape[0], dtype=torch.float64, device=p.device)
    siblings = torch.zeros_like(rho).index_add_(
        0, found.draw_parents, torch.ones_like(found.draw_parents, dtype=rho.dtype)
    )
    accepted = torch.full_like(layout.row_sequence, -1)  # per row the child that was taken
    for turn in found.ranks:
        rows, x = turn.parents, tokens[turn.nodes]
        if turn is found.ranks[0]:  # every row that has proposals
            rho[rows] = _rho(p[rows], _laws(batch, tokens, p, q, rows), siblings[rows])
        drawn = torch.ones_like(rho[rows])
        if q is not None and turn.used:
            drawn = torch.where(turn.is_drawn, q[turn.own, x].double(), drawn)
        coin = noise.accept[layout.row_sequence[turn.rows], layout.local[turn.rows], turn.copy]
        take = (coin < p[rows, x].double() / (rho[rows] * drawn)) & (accepted[rows] < 0)
        accepted[rows] = torch.where(take, turn.rows, accepted[rows])
    passed = torch.ones_like(accepted, dtype=torch.bool)
    passed[layout.node_rows] = accepted[layout.parent_rows] == layout.node_rows
    last = deepest(found, passed)
    extra = _extra(batch, tokens, p, q, last, rho[last], siblings[last], noise)
    return outcome(batch, last, extra, valid(batch, p, q))


def _laws(batch: TreeBatch, tokens: Tensor, p: Tensor, q: Tensor | None, rows: Tensor) -> Tensor:
    """(n, V) the one law that the proposals of each row were drawn from."""
    found = batch.layout.branches()
    points = torch.zeros((rows.shape[0], p.shape[1]), dtype=p.dtype, device=p.device)
    points.scatter_(1, tokens[found.children[rows, :1]], 1.0)
    if q is None or not found.is_used.shape[1]:
        return points
    drawn = q.index_select(0, found.laws_used[rows, 0]).to(p.dtype)
    return torch.where(found.is_used[rows, :1], drawn, points)


def _shared(p: Tensor, q: Tensor, rho: Tensor) -> Tensor:
    return torch.minimum(q, p / rho[:, None].to(p.dtype))


def _rho(p: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """(n,) the smallest rho in [1, k] with 1 - (1 - beta)^k <= rho * beta; from above, as every
    larger one up to k is valid too."""

    def is_valid(rho: Tensor) -> Tensor:
        beta = _shared(p, q, rho).sum(-1).double()
        return 1 - (1 - beta) ** k <= rho * beta

    low, high = torch.ones_like(k), k
    at_once = is_valid(low)
    for _ in range(60 if p.dtype == torch.float64 else 30):  # to the last bit of the sums
        middle = (low + high) / 2
        good = is_valid(middle)
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    return torch.where(at_once, 1.0, high)


def _extra(
    batch: TreeBatch, tokens: Tensor, p: Tensor, q: Tensor | None, last: Tensor, rho: Tensor,
    k: Tensor, noise: StepNoise,
) -> Tensor:  # fmt: skip
    """(B,) from [p - m pacc / beta]+ of each last row, m = min(q, p / rho); from p in leaves."""
    found, b = batch.layout.branches(), batch.layout.row_sequence[last]
    law, row = p.index_select(0, last), batch.layout.local[last]
    if not batch.layout.draws:
        return sample(law, noise.bonus[b, row])
    kept = _shared(law, _laws(batch, tokens, p, q, last), rho)
    beta = kept.sum(-1).double()
    scale = torch.where(beta > 0, (1 - (1 - beta) ** k) / beta, 0.0)
    left = torch.addcmul(law, kept, scale[:, None].to(p.dtype), value=-1).clamp_min_(0)
    rejected = found.has_draws[last]
    use_p = left.sum(-1) <= 0  # in a leaf k is 0, and left is p already
    coin = torch.where(rejected, noise.residual[b, row], noise.bonus[b, row])
    return sample(torch.where(use_p[:, None], law, left), coin)
