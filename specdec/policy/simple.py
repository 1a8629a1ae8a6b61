"""Policies that ask for no costs: a constant, transformers' schedule, a draft's own confidence."""

from collections.abc import Sequence as Items

from specdec.errors import InvalidArgumentError
from specdec.policy.base import MAX_DRAFT_TOKENS, Measure, Policy, Steady, checked_number
from specdec.proposers import Proposer
from specdec.sequence import Sequence
from specdec.tree import TokenTree
from specdec.verifier import Verdict


class ConstantPolicy(Policy):
    """The same number of drafted tokens in every step."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = checked_number(num_draft_tokens, least=0)

    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        del rooms
        return [self.num_draft_tokens] * len(sequences)


class HeuristicPolicy(Policy):
    """transformers' schedule: two more after a draft that was accepted whole, else one less."""

    def __init__(self, num_draft_tokens: int = 5) -> None:
        """num_draft_tokens: of a sequence's first step."""
        self.num_draft_tokens = checked_number(num_draft_tokens, least=1)
        self._lengths: dict[Sequence, int] = {}

    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        del rooms
        return [self._lengths.get(sequence, self.num_draft_tokens) for sequence in sequences]

    def observe(
        self, sequences: Items[Sequence], trees: Items[TokenTree], verdicts: Items[Verdict]
    ) -> None:
        for sequence, tree, verdict in zip(sequences, trees, verdicts, strict=True):
            if len(tree):
                length = self._lengths.get(sequence, self.num_draft_tokens)
                whole = verdict.accepted == tree.max_depth
                longer = min(length + 2, MAX_DRAFT_TOKENS)
                self._lengths[sequence] = longer if whole else max(1, length - 1)

    def forget(self, sequence: Sequence) -> None:
        self._lengths.pop(sequence, None)


class ConfidencePolicy(Policy):
    """Drafts until a drafted token was unlikely: that token is kept and is the last (DISCO, Mamou
    et al. 2024, 2405.04304; transformers' assistant_confidence_threshold)."""

    def __init__(self, threshold: float = 0.4, num_draft_tokens: int = 20) -> None:
        """threshold: the draft's probability of a token below which it is the last."""
        given: object = threshold
        if not (isinstance(given, int | float) and 0 <= given <= 1):
            raise InvalidArgumentError(f"threshold={threshold!r}: expected 0 to 1")
        self.threshold = float(threshold)
        self.num_draft_tokens = checked_number(num_draft_tokens, least=1)

    def join(self, proposer: Proposer, measure: Measure, steady: Steady) -> None:
        del measure, steady
        if not proposer.can_stop:
            raise InvalidArgumentError(
                f"policy='confidence': proposer={proposer.name!r} cannot stop in the middle of a "
                "draft; expected 'draft'"
            )
        proposer.stop_below = self.threshold

    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        del rooms
        return [self.num_draft_tokens] * len(sequences)
