"""The policy of costs on table models, where nothing has a cost: seconds that are made up, and to
every sequence a policy of its own.

Worlds that are enumerated (evals/audit.py) run side by side as the sequences of one batch. What one
does must not hang on the others, or the same outcomes would not lead to the same text twice.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence as Items

from specdec.costs import StepCosts
from specdec.policy import CostPolicy, Measure, Policy, Steady
from specdec.proposers import Proposer
from specdec.sequence import Sequence
from specdec.tree import TokenTree
from specdec.verifier import Verdict

# Of a step by drafted depth, plain decoding first: dear enough that a first rejection ends drafting
# for a while, and an acceptance in part or in whole makes the next draft another.
SECONDS = (1.0, 1.6, 2.0, 2.4)

# Per text the depths that were drafted behind it, and how much of them was verified.
Drafts = defaultdict[tuple[int, ...], set[tuple[int, int]]]


class MadeUpCosts(CostPolicy):
    """The cost model, with costs that are given and not measured."""

    def __init__(
        self, max_draft_tokens: int | None = None, *, seconds: Items[float] = SECONDS
    ) -> None:
        """seconds: of a step, by depth from 0 on; linear behind the last."""
        super().__init__(max_draft_tokens)
        self._made_up = tuple(seconds)

    def join(self, proposer: Proposer, measure: Measure, steady: Steady) -> None:
        del measure
        rows = [1]
        for depth in range(1, len(self._made_up)):
            nodes = proposer.nodes_within(depth)
            if nodes < rows[-1]:  # below the deepest level of a shape
                break
            rows.append(1 + nodes)
        depths, seconds = tuple(range(len(rows))), self._made_up[: len(rows)]
        # all of it in the pass: where a lookup drafts, the rest costs nothing
        costs = StepCosts(1, 0, depths, tuple(rows), (0.0,) * len(rows), seconds)
        super().join(proposer, lambda *_: costs, steady)


class Apart(Policy):
    """To each sequence a policy of its own, which sees it as if it ran alone.

    drafts: what was drafted and verified behind each text; depths: of all that was verified.
    """

    def __init__(self, make: Callable[[], Policy]) -> None:
        self.drafts: Drafts = defaultdict(set)
        self.depths: set[int] = set()
        self._make = make
        self._policies: dict[Sequence, Policy] = {}
        self._whole: dict[Sequence, int] = {}  # depth drafted in the step that is under way
        self._joined: tuple[Proposer, Measure, Steady] | None = None

    def join(self, proposer: Proposer, measure: Measure, steady: Steady) -> None:
        self._joined = proposer, measure, steady

    def _its(self, sequence: Sequence) -> Policy:
        policy = self._policies.get(sequence)
        if policy is None:
            assert self._joined is not None, "join first"
            self._policies[sequence] = policy = self._make()
            policy.join(*self._joined)
        return policy

    def prepare(self, sequences: Items[Sequence]) -> None:
        for sequence in sequences:
            self._its(sequence).prepare([sequence])

    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        pairs = zip(sequences, rooms, strict=True)
        return [self._its(sequence).plan([sequence], [room])[0] for sequence, room in pairs]

    def cut(self, sequences: Items[Sequence], trees: Items[TokenTree]) -> list[TokenTree]:
        self._whole = {s: tree.max_depth for s, tree in zip(sequences, trees, strict=True)}
        pairs = zip(sequences, trees, strict=True)
        return [self._its(sequence).cut([sequence], [tree])[0] for sequence, tree in pairs]

    def observe(
        self, sequences: Items[Sequence], trees: Items[TokenTree], verdicts: Items[Verdict]
    ) -> None:
        for sequence, tree, verdict in zip(sequences, trees, verdicts, strict=True):
            # where nobody drafts there is nothing to cut
            depths = self._whole.pop(sequence, 0), tree.max_depth
            self.drafts[tuple(sequence.tokens)].add(depths)
            self.depths.add(depths[1])
            self._its(sequence).observe([sequence], [tree], [verdict])

    def forget(self, sequence: Sequence) -> None:
        policy = self._policies.pop(sequence, None)
        if policy is not None:
            policy.forget(sequence)
