"""A draft model grows a tree by stochastic beam search (RSD-S, Jeon et al. 2024, 2402.14160,
section 3.2.2; Kool et al. 2019, 1903.06059): paths sampled without replacement."""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.proposers.beams import Beams, Chosen, by_law, chosen, paths_of
from specdec.proposers.model import DraftModel
from specdec.rng import Noise
from specdec.runner import Runner
from specdec.sampling import Law
from specdec.sequence import Sequence
from specdec.shapes import MAX_NODES
from specdec.tree import Law as DrawLaw, TokenTree

# Rates below e**_LEAST are taken for it: any rate is lossless, an infinite time would lose a node.
_LEAST = -600.0


class BeamTreeProposer(Proposer):
    """Drafts `width` nodes on each of `depth` levels, wherever the draft's paths lead.

    A level is a race: below a path of probability P that arrived at time t, its first child arrives
    at t and the others one after the other, every token x at rate P q(x). The first `width`
    arrivals of the level are its nodes. This is stochastic beam search with times -log of Kool's
    perturbed log-probabilities: level by level, `width` paths without replacement.

    Lossless under recursive and traversal verification with q, without the siblings before, as the
    law of each child. Proof: by the competition of exponential clocks the token of an arrival has
    that law given its parent and everything that arrived before, and whether there is room for an
    arrival depends on what came before it alone. Take the last arrival of all: it is the last
    child of its parent, has no children, and nobody else's existence depends on it, so that the
    rule emits the same law of text with or without it. Take away one after the other; without any
    the text is the target's.

    A budget is used up by whole levels, or by a narrower first one. At temperature 0, of target or
    draft, this is beam search. One draft pass per level and one read from the device per step. The
    other options are those of the proposer draft.
    """

    name = "beam_tree"
    needs_draft = True
    law = "sampled"

    def __init__(
        self, runner: Runner, *, width: int = 4, depth: int = 5, temperature: float | None = None,
        top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        processors: bool = True,
    ) -> None:  # fmt: skip
        for option, value in (("width", width), ("depth", depth)):
            if type(value) is not int or not 1 <= value <= MAX_NODES:
                raise InvalidArgumentError(f"{option}={value!r}: expected 1 to {MAX_NODES}")
        if width * depth > MAX_NODES:
            raise InvalidArgumentError(
                f"width={width}, depth={depth}: {width * depth} nodes, expected at most "
                f"{MAX_NODES}; take fewer of either"
            )
        self.width, self.depth = width, depth
        self.model = DraftModel(runner, processors, temperature, top_k, top_p, min_p)

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        self.model.join(group, vocab_size)

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        return self.model.groups

    @property
    def max_positions(self) -> int | None:
        return self.model.runner.max_positions

    @property
    def preferred_nodes(self) -> int:
        return self.width * self.depth

    def nodes_within(self, depth: int) -> int:
        return self.width * min(depth, self.depth)

    def draft_rows(self, depth: int) -> tuple[int, ...]:
        return tuple(max(1, level * self.width) for level in range(min(depth, self.depth)))

    def start(self, sequence: Sequence) -> None:
        self.model.start(sequence)

    def finish(self, sequence: Sequence) -> None:
        self.model.finish(sequence)

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        beams = [self._begin(s, b) for s, b in zip(sequences, budgets, strict=True)]
        laws: dict[int, list[Tensor]] = {id(its): [] for its in beams}
        while active := [its for its in beams if its.depth < its.levels]:
            rows = [its.next_pass(self.model) for its in active]
            for law, members, logits in by_law(active, self.model.score(rows)):
                self._extend(members, law, logits, noise, laws)
        for its in beams:
            self.model.cut(its.sequence, 0)  # the lines are in other slots than the tree
        return [_tree(nodes, its) for nodes, its in zip(chosen(beams), laws.values(), strict=True)]

    def _begin(self, sequence: Sequence, budget: int) -> Beams:
        width = min(self.width, budget, self.model.known_tokens)
        levels = min(self.depth, budget // width) if width else 0
        law = self.model.law(sequence)
        return Beams(sequence, law, width * levels, width, levels, self.model.runner.device)

    def _extend(
        self, beams: list[Beams], law: Law, logits: Tensor, noise: Noise,
        laws: dict[int, list[Tensor]],
    ) -> None:  # fmt: skip
        """One more level for sequences of one law; logits (n, V)."""
        if law.greedy:
            q, log_q = None, law.scores(logits, paths_of(beams)).log_softmax(-1)
            perturbed = log_q
        else:
            q = law.probabilities(logits, paths_of(beams))
            log_q = q.log()
            perturbed = self._gumbel(beams, q, noise).add_(log_q)
        most = max(its.width for its in beams)
        best = perturbed[:, : self.model.known_ids].topk(most, dim=-1)
        gained = log_q.gather(1, best.indices).double()
        first = 0
        for its in beams:
            mine = slice(first, first + its.rows)
            first += its.rows
            tokens, gain = best.indices[mine, : its.width], gained[mine, : its.width]
            if q is None:
                times = -(its.score[:, None] + gain)  # the most probable path arrives first
            else:
                times = _arrivals(its, best.values[mine, : its.width])
                laws[id(its)].append(q[mine])
            _choose(its, tokens, gain, times)

    def _gumbel(self, beams: list[Beams], q: Tensor, noise: Noise) -> Tensor:
        """(n, V), one row per path: rows 1 + (depth - 1) * width on, 0 for the root."""
        rows = [
            (its.sequence, max(0, 1 + (its.depth - 1) * its.width) + i)
            for its in beams
            for i in range(its.rows)
        ]
        return noise.draft_gumbel(
            [sequence.seed for sequence, _ in rows],
            [len(sequence.tokens) for sequence, _ in rows],
            [row for _, row in rows], q.shape[1], q.device,
        )  # fmt: skip


def _arrivals(its: Beams, perturbed: Tensor) -> Tensor:
    """(rows, c) times of the children, from log q + Gumbel noise, falling: inf where q is 0.

    exp(-perturbed) is an arrival at rate q; counted from the first one, at rate P q.
    """
    alone = (-perturbed.double()).exp()
    waited = (alone - alone[:, :1]) * (-its.score.clamp_min(_LEAST)).exp()[:, None]
    return torch.where(alone.isinf(), torch.inf, its.time[:, None] + waited)


def _choose(its: Beams, tokens: Tensor, gain: Tensor, times: Tensor) -> None:
    """The first arrivals of all children, (rows, c) each, become the level's nodes."""
    c = tokens.shape[1]
    order = times.flatten().sort(stable=True).indices[: its.width]
    above, time, picked = order // c, times.flatten()[order], tokens.flatten()[order]
    score = (its.score[:, None] + gain).flatten()[order]
    ranks = torch.where(time.isinf(), -torch.inf, 0.0)
    numbers = its.record(picked, its.numbers[above], ranks)
    its.go_on(above, picked, numbers, score, time)


def _tree(nodes: Chosen, laws: list[Tensor]) -> TokenTree:
    """laws: per level those of its paths, so that row i + 1 is the law below candidate i."""
    if not laws or not nodes.parents:
        return TokenTree(nodes.tokens, nodes.parents)
    rows = (0 if p < 0 else nodes.candidates[p] + 1 for p in nodes.parents)
    draws = tuple((node, DrawLaw("without_replacement", row)) for node, row in enumerate(rows))
    return TokenTree(nodes.tokens, nodes.parents, torch.cat(laws), draws)
