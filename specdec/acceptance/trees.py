"""The rules for trees over a ragged batch: what each row wants, judged for all rows at once.

Every quantity that a coin is compared with is a function of laws and tokens alone, so it is
computed for all nodes, side by side where neither is above nor before the other; the coins then
pick. Loops run over depth and sibling rank only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.acceptance.draw import LARGE, sample
from specdec.acceptance.laws import require, valid
from specdec.acceptance.layout import Branches, Outcome, Round, TreeBatch
from specdec.rng import StepNoise

_MOST = 1e30  # stands for infinity: times a law's entry it stays finite


def follow(batch: TreeBatch, best: Tensor, is_valid: Tensor) -> Outcome:
    """Emits best (R,) at each visited row; goes on to the child that carries it, if there is one.

    is_valid (B,) or (R,), of every row.
    """
    layout, found = batch.layout, batch.layout.branches()
    passed = torch.ones_like(best, dtype=torch.bool)
    passed[layout.node_rows] = batch.tokens == best[layout.parent_rows]
    last = deepest(found, passed)
    if is_valid.shape[0] != last.shape[0]:
        is_valid = is_valid[found.post_order].all(1)
    return outcome(batch, last, best[last], is_valid)


def recursive(batch: TreeBatch, p: Tensor, q: Tensor | None, noise: StepNoise) -> Outcome:
    """Recursive rejection sampling over the siblings of each row (SpecInfer, 2305.09781; RSD,
    2402.14160; Sequoia, 2402.12374), any tree and any mix of draws.

    p (R, V) the target's laws, q (L, V) the stored ones. noise.accept has batch.copies copies.
    """
    require("recursive", batch.layout, p, q)
    layout, found = batch.layout, batch.layout.branches()
    rest = Remainder.start(batch, p, q)
    accepted = torch.full_like(layout.row_sequence, -1)  # per row the child that was taken
    # all depths at once are fewer calls, one at a time stays in the cache
    for turn in found.ranks if p.shape[1] < LARGE else found.rounds:
        ratio, scale = rest.ratio(turn)
        coin = noise.accept[layout.row_sequence[turn.rows], layout.local[turn.rows], turn.copy]
        # u < p / q as in the definition; ratio is zero where p is, whatever u
        take = (coin < ratio) & (accepted[turn.parents] < 0)
        accepted[turn.parents] = torch.where(take, turn.rows, accepted[turn.parents])
        rest.reject(turn, scale, needed=not turn.is_last)
    passed = torch.ones_like(accepted, dtype=torch.bool)
    passed[layout.node_rows] = accepted[layout.parent_rows] == layout.node_rows
    last = deepest(found, passed)
    return outcome(batch, last, rest.draw(last, noise), valid(batch, p, q) & rest.sound())


def traversal(batch: TreeBatch, p: Tensor, q: Tensor | None, noise: StepNoise) -> Outcome:
    """Traversal verification (Weng et al. 2025, 2505.12398), any tree and any mix of draws.

    Weights and running residuals do not depend on the coins: the answer is the first row, children
    before parents, whose coin is below its final weight. Arguments as for recursive; one accept
    coin per row. A copy of a child needs none: it is reached only when the child was rejected, so
    entry < 1, so w p(x) < q(x), the residual has no x, and the copy's weight is 0.
    """
    require("traversal", batch.layout, p, q)
    layout, found = batch.layout, batch.layout.branches()
    rest = Remainder.start(batch, p, q)
    for turn in found.rounds:
        ratio, scale = rest.ratio(turn)
        entry = (rest.weight[turn.parents] * ratio).clamp_max_(1)
        rest.weight[turn.rows[turn.fresh]] = entry[turn.fresh]
        rest.reject(turn, scale, needed=True)
    passed = noise.accept[layout.row_sequence, layout.local, 0] < rest.weight  # the root's is 1
    first = passed[found.post_order].long().argmax(1, keepdim=True)
    last = found.post_order.gather(1, first).squeeze(1)
    return outcome(batch, last, rest.draw(last, noise), valid(batch, p, q) & rest.sound())


def typical(
    batch: TreeBatch, p: Tensor, q: Tensor | None, noise: StepNoise, *,
    eps: float = 0.09, delta: float = 0.3,
) -> Outcome:  # fmt: skip
    """Typical acceptance (Medusa, Cai et al. 2024, 2401.10774); LOSSY: it changes the text's law.

    The longest path of tokens with p(x) > min(eps, delta exp(-entropy)), ties by the larger sum of
    log p, then by row; the extra token follows p. q (L, V) is only checked.
    """
    require("typical", batch.layout, p, q)
    layout, found = batch.layout, batch.layout.branches()
    entropy = torch.special.entr(p).sum(-1).double()
    x = batch.tokens.clamp(0, p.shape[1] - 1)
    drafted = p[layout.parent_rows, x].double()
    threshold = (delta * (-entropy).exp()).clamp_max(eps)
    passed = torch.ones_like(entropy, dtype=torch.bool)
    passed[layout.node_rows] = drafted > threshold[layout.parent_rows]
    alive = passed[found.lineage].all(1)
    score = torch.zeros_like(entropy)
    score[layout.node_rows] = drafted.log()
    # rows on the line behind its end repeat and must not count twice
    steps = found.row_depths[:, None] >= layout.steps
    score = torch.where(steps, score[found.lineage], 0.0).cumsum(1)[:, -1]
    order = found.post_order.sort(1).values  # rows by number; the root pads in front
    depth = torch.where(alive, found.row_depths, -1)[order]
    longest = depth == depth.amax(1, keepdim=True)
    score = torch.where(longest, score[order], -torch.inf)
    first = score.argmax(1, keepdim=True)
    last = order.gather(1, first).squeeze(1)
    coin = noise.bonus[layout.row_sequence[last], layout.local[last]]
    return outcome(batch, last, sample(p[last], coin), valid(batch, p, q))


@dataclass(slots=True, eq=False)
class Remainder:
    """What is left of each row's law after some of its proposals were rejected.

    A rejection turns the running law r, of weight w, into norm([w r - q]+). Since [[a]+ - b]+ is
    [a - b]+ for b >= 0, what is left of p is always [p - sum_s share_s law_s]+ up to a factor: one
    number per stored law that the row's proposals use, and nothing of size V is kept. Rejected
    tokens have nothing left: w r(x) < q(x), else x had been accepted with certainty.
    """

    batch: TreeBatch
    found: Branches
    tokens: Tensor  # (nodes,) inside the vocabulary, whatever came
    p: Tensor  # (R, V)
    q: Tensor | None  # (L, V), L > 0
    weight: Tensor  # (R,) float64; 1 where the rule has none
    mass: Tensor  # (R,) float64, of the remainder
    share: Tensor  # (R, places) of each stored law in use
    exhausted: Tensor  # (R,) bool: a proposal that what was left of its law could not give

    @staticmethod
    def start(batch: TreeBatch, p: Tensor, q: Tensor | None) -> "Remainder":
        found = batch.layout.branches()
        ones = torch.ones(p.shape[0], dtype=torch.float64, device=p.device)
        return Remainder(
            batch, found, batch.tokens.clamp(0, p.shape[1] - 1), p,
            q if batch.layout.laws else None, ones, ones.clone(),
            torch.zeros_like(found.laws_used, dtype=p.dtype), torch.zeros_like(found.has_draws),
        )  # fmt: skip

    def sound(self) -> Tensor:
        """(B,) whether every law drawn from without replacement had something left."""
        return self.exhausted[self.found.post_order].any(1).logical_not_()

    def ratio(self, turn: Round) -> tuple[Tensor, Tensor]:
        """(n,) r(x) / q(x) of each proposal, and the factor from its stored law to q."""
        x = self.tokens[turn.nodes]
        left = self.p[turn.parents, x]
        for place, used in enumerate(turn.used):
            assert self.q is not None
            n = used.shape[0]
            share = self.share[turn.parents[:n], place]
            left[:n] = torch.addcmul(left[:n], self._law(used, x[:n]), share, value=-1)
        left = torch.where(turn.is_copy, 0.0, left.clamp_min_(0)).double()
        scale = torch.ones_like(left)
        if self.q is None:
            return left / self.mass[turn.parents], scale
        if turn.reduced.shape[0]:
            rest = self.q.index_select(0, turn.own[turn.reduced]).to(self.p.dtype)
            rest.scatter_(1, self.tokens[turn.taken], 0.0)
            total = rest.sum(-1).double()
            scale[turn.reduced] = 1 / total
            held = rest.gather(1, x[turn.reduced][:, None]).squeeze(1) > 0
            self.exhausted[turn.parents[turn.reduced]] |= held.logical_not_()
        drawn = torch.where(turn.is_drawn, self._law(turn.own, x).double() * scale, 1.0)
        return left / self.mass[turn.parents] / drawn, scale

    def reject(self, turn: Round, scale: Tensor, *, needed: bool) -> None:
        """Takes each proposal's law out of its row. needed: whether the mass is read again."""
        rows, weight, mass = turn.parents, self.weight[turn.parents], self.mass[turn.parents]
        before = self.share[rows]
        if turn.used:
            # [w r - q]+ = w / mass * [left - mass / w * scale * law]+
            more = torch.where(turn.is_drawn, mass / weight * scale, 0.0)
            share = before.gather(1, turn.place[:, None]).squeeze(1) + more.to(before.dtype)
            share = share.clamp_max_(_MOST)
            self.share[rows, turn.place] = share
        if not needed:
            return
        left = self._left(rows, turn.used, self.tokens[turn.siblings]).sum(-1).double()
        some = left > 0
        # rounding left nothing, or nothing was wanted: what was there before is right
        self.mass[rows] = torch.where(some, left, mass)
        self.share[rows] = torch.where(some[:, None], self.share[rows], before)
        kept = weight * left / mass
        total = kept + (1 - weight)  # in this order: at weight 1 it is exactly kept
        self.weight[rows] = torch.where(total > 0, kept / total, 1.0)

    def _left(self, rows: Tensor, used: tuple[Tensor, ...], gone: Tensor) -> Tensor:
        """(n, V) remainders; gone (n, m) rejected tokens, laws used by the first rows alone."""
        left = self.p.index_select(0, rows)
        for place, law in enumerate(used):
            assert self.q is not None
            n = law.shape[0]
            share = self.share[rows[:n], place][:, None]
            left[:n].addcmul_(self.q.index_select(0, law).to(left.dtype), share, value=-1)
        return left.clamp_min_(0).scatter_(1, gone, 0.0)

    def _law(self, rows: Tensor, x: Tensor) -> Tensor:
        assert self.q is not None
        return self.q[rows, x].to(self.p.dtype)

    def draw(self, last: Tensor, noise: StepNoise) -> Tensor:
        """(B,) the extra token of each sequence: what its last row's rejected proposals left."""
        found, b = self.found, self.batch.layout.row_sequence[last]
        law, row = self.p.index_select(0, last), self.batch.layout.local[last]
        if not self.batch.layout.draws:
            return sample(law, noise.bonus[b, row])
        left = law.clone()
        for place in range(self.share.shape[1]):
            assert self.q is not None
            other = self.q.index_select(0, found.laws_used[last, place]).to(left.dtype)
            # a place that the row does not use holds a law of somebody else, maybe not a sound one
            other.masked_fill_(found.is_used[last, place].logical_not()[:, None], 0.0)
            left.addcmul_(other, self.share[last, place][:, None], value=-1)
        left.clamp_min_(0).scatter_(1, self.tokens[found.children[last]], 0.0)
        rejected = found.has_draws[last]
        use_p = (left.sum(-1) <= 0) | rejected.logical_not()
        coin = torch.where(rejected, noise.residual[b, row], noise.bonus[b, row])
        return sample(torch.where(use_p[:, None], law, left), coin)


def deepest(found: Branches, passed: Tensor) -> Tensor:
    """(B,) the deepest row all of whose line passed (R,); those rows are one path."""
    alive = passed[found.lineage].all(1)
    depth = torch.where(alive, found.row_depths, -1)[found.post_order]
    return found.post_order.gather(1, depth.argmax(1, keepdim=True)).squeeze(1)


def outcome(batch: TreeBatch, last: Tensor, extra: Tensor, is_valid: Tensor) -> Outcome:
    """Accepts the path to `last` (B,), which `extra` (B,) follows."""
    layout, found = batch.layout, batch.layout.branches()
    accepted = found.row_depths[last]
    passed = layout.steps[:-1] < accepted[:, None]
    line = found.lineage[last][:, 1:]
    path = torch.where(passed, line, -1)
    carried = torch.zeros_like(layout.row_sequence)  # a root carries nothing and is not read
    carried[layout.node_rows] = batch.tokens
    emitted = torch.cat((torch.where(passed, carried[line], -1), layout.blank), 1)
    emitted.scatter_(1, accepted[:, None], extra[:, None])
    return Outcome(accepted, emitted, path, is_valid)
