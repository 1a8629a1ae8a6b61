"""Counts of what an engine drafts and its target keeps, and of the draft's own laws, by text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.engine import Engine
from specdec.evals.draft_laws import (
    After,
    DraftLaws,
    drafting_models,
    no_paths,
    nowhere,
    replaced,
)
from specdec.rng import Noise
from specdec.sampling import Law, SamplingParams
from specdec.sequence import Sequence as Sample
from specdec.tree import Proposal, TokenTree
from specdec.verifier import Verdict

BINS = 10  # of the draft's confidence


@dataclass(slots=True)
class Tally:
    """Counts of one prompt. Lists by depth or rank begin with the first."""

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    offered: list[int] = field(default_factory=list)  # by depth: steps that drafted so deep
    kept: list[int] = field(default_factory=list)  # by depth: steps that accepted so deep
    reached: list[int] = field(default_factory=list)  # by rank: nodes with so many draws
    taken: list[int] = field(default_factory=list)  # by rank: this draw was accepted
    overlap: float = 0.0
    overlaps: int = 0
    entropy: float = 0.0  # of the draft's laws, nats
    laws: int = 0
    undrawn: int = 0  # of those, where the draft took its best token
    confidence: list[float] = field(default_factory=lambda: [0.0] * BINS)  # of the best token
    right: list[float] = field(default_factory=lambda: [0.0] * BINS)  # the target's probability
    binned: list[int] = field(default_factory=lambda: [0] * BINS)
    sizes: dict[str, int] = field(default_factory=dict)  # "depth nodes" -> steps
    context: int = 0  # tokens before each step, summed

    def add(
        self, tree: TokenTree, verdict: Verdict, p: Tensor, after: After, *, compares: bool
    ) -> None:
        """One step. p (rows, V): the target's laws, root row first; after: the draft's, where none
        is stored. compares: whether a token is accepted by what the two have in common."""
        depth, ranks = tree.max_depth, tree.ranks(verdict.path)
        self.drafted += len(tree)
        self.accepted += verdict.accepted
        for level in range(depth):
            _count(self.offered, level, 1)
            _count(self.kept, level, int(verdict.accepted > level))
        for draws, which in ranks:
            for rank in range(draws):
                _count(self.reached, rank, 1)
                _count(self.taken, rank, int(which == rank + 1))
        size = f"{depth} {len(tree)}"
        self.sizes[size] = self.sizes.get(size, 0) + 1
        firsts: dict[int, Proposal] = {}
        for proposal in tree.proposals:
            firsts.setdefault(proposal.parent, proposal)
        for length, node in enumerate((-1, *verdict.path)):
            if node not in firsts:
                continue
            first, target = firsts[node], p[node + 1].double()
            row = first.law.row
            drawn = None if row is None or tree.laws is None else tree.laws[row].double()
            if compares:
                self._compare(target, first.token, drawn)
            found = after(verdict.tokens[:length]) if drawn is None else drawn
            if found is not None:
                self._judge(target, found.double(), is_drawn=drawn is not None)

    def _compare(self, p: Tensor, token: int, q: Tensor | None) -> None:
        """The target's law at a node that was reached, and that of its first draw; q None: a point
        mass on the token."""
        self.overlaps += 1
        self.overlap += float(p[token] if q is None else torch.minimum(p, q).sum())

    def _judge(self, p: Tensor, q: Tensor, *, is_drawn: bool) -> None:
        """The draft's law there by itself, and how right it is about its best token."""
        self.entropy -= float((q * q.clamp_min(1e-300).log()).sum())
        self.laws += 1
        self.undrawn += not is_drawn
        confidence, best = q.max(-1)
        place = min(int(float(confidence) * BINS), BINS - 1)
        self.confidence[place] += float(confidence)
        self.right[place] += float(p[best])
        self.binned[place] += 1


def _count(counts: list[int], index: int, by: int) -> None:
    counts.extend([0] * (index + 1 - len(counts)))
    counts[index] += by


class Recorder:
    """Counts what an engine's verifier says, by sequence, while it runs texts."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tallies: dict[str, Tally] = {}
        self._is_coupled = engine.proposer is not None and engine.proposer.law == "coupled"
        self._verify = engine.verifier.verify
        models = drafting_models(engine.proposer)
        self._drafts = DraftLaws(models[0]) if len(models) == 1 else None

    def _recorded(
        self, sequences: Sequence[Sample], trees: Sequence[TokenTree], noise: Noise
    ) -> list[Verdict]:
        verdicts = self._verify(sequences, trees, noise)
        for sequence, tree, verdict in zip(sequences, trees, verdicts, strict=True):
            tally = self.tallies.setdefault(sequence.request_id, Tally())
            tally.context += len(sequence.tokens)
            after = nowhere if self._drafts is None else self._drafts.take(sequence)
            # sampled with the target's noise, a token is accepted more often than the laws overlap
            compares = not self._is_coupled or sequence.law.greedy
            p = _laws(sequence.law, verdict.logits)
            tally.add(tree, verdict, p, after, compares=compares)
        return verdicts

    def run(
        self, prompts: Sequence[list[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> list[Tally]:
        """Continues the prompts together."""
        found = dict(self.each(prompts, sampling, seeds))
        return [found[number] for number in range(len(prompts))]

    def each(
        self, prompts: Sequence[list[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Tally]]:
        """As run, each prompt by its number when its text ends. Only meanwhile does the engine do
        more than it would: what is timed behind it is not slowed down."""
        self.tallies.clear()
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            self.engine.add_request(prompt, sampling, seed=seed, request_id=str(number))
        listening: AbstractContextManager[None] = nullcontext()
        if self._drafts is not None:
            listening = self._drafts.listening()
        with replaced(self.engine.verifier, "verify", self._recorded), listening:
            for out in self.engine:
                tally = self.tallies[out.id]
                tally.tokens, tally.steps = len(out.token_ids), out.stats.steps
                yield int(out.id), tally


def _laws(law: Law, logits: Tensor) -> Tensor:
    if law.greedy:
        best = law.best(logits, no_paths)
        return torch.nn.functional.one_hot(best, logits.shape[1]).float()
    return law.probabilities(logits, no_paths)


def added(tallies: Sequence[Tally]) -> Tally:
    """The sum of several."""
    total = Tally()
    for tally in tallies:
        for name, value in asdict(tally).items():
            mine = getattr(total, name)
            if isinstance(value, dict):
                setattr(total, name, dict(Counter(mine) + Counter(value)))
            elif isinstance(value, list):
                size = max(len(mine), len(value))
                pairs = zip(_padded(mine, size), _padded(value, size), strict=True)
                setattr(total, name, [a + b for a, b in pairs])
            else:
                setattr(total, name, mine + value)
    return total


def _padded(values: list[Any], size: int) -> list[Any]:
    return values + [0] * (size - len(values))
