"""The protocol of policies."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence as Items
from typing import Any

from specdec.costs import StepCosts
from specdec.errors import InvalidArgumentError
from specdec.proposers import Proposer
from specdec.sequence import Sequence
from specdec.tree import TokenTree
from specdec.verifier import Verdict

DEFAULT_DRAFT_TOKENS = 4
MAX_DRAFT_TOKENS = 255

Measure = Callable[[Items[Sequence], int], StepCosts | None]  # for a batch, down to a depth
Steady = Callable[[Sequence], bool]  # whether its text is the same whatever is drafted


class Policy(ABC):
    """Chooses each sequence's draft length for the coming step."""

    def join(self, proposer: Proposer, measure: Measure, steady: Steady) -> None:
        """Called once, before any sequence. measure gives the costs of a step of these sequences,
        None where they cannot be measured; steady says of a sequence whether its text is the same
        whatever is drafted. Raises InvalidArgumentError for a proposer that the policy cannot
        lead."""
        del proposer, measure, steady

    def prepare(self, sequences: Items[Sequence]) -> None:
        """Called before a step is timed; what takes long once belongs here."""
        del sequences

    @abstractmethod
    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        """Nodes that each sequence may draft; 0 means plain decoding. The engine cuts them to what
        fits. rooms: how deep a draft of each can be."""

    def cut(self, sequences: Items[Sequence], trees: Items[TokenTree]) -> list[TokenTree]:
        """What of the planned drafts is verified. Only those of a proposer that is `free` may be
        cut: a drawn token that is dropped would bias the text (contract C3)."""
        del sequences
        return list(trees)

    def observe(
        self, sequences: Items[Sequence], trees: Items[TokenTree], verdicts: Items[Verdict]
    ) -> None:
        """What became of the step's drafts; the verdicts' tokens are not appended yet."""
        del sequences, trees, verdicts

    def forget(self, sequence: Sequence) -> None:
        """A sequence is over."""
        del sequence


def planned(policy: Policy, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
    """policy.plan(sequences, rooms). Raises InvalidArgumentError, naming the policy, unless it is
    one whole number per sequence, 0 or more."""
    found: Any = policy.plan(sequences, rooms)
    if type(found) is list and len(found) == len(sequences):
        for nodes in found:
            if type(nodes) is not int or nodes < 0:
                break
        else:
            return found
    raise InvalidArgumentError(
        f"policy={type(policy).__name__}: its plan() gave {found!r}: expected a list of "
        f"{len(sequences)} whole numbers, 0 or more, one per sequence"
    )


def checked_number(number: object, *, least: int) -> int:
    """A draft length that a caller gave. Raises InvalidArgumentError."""
    if type(number) is not int or not least <= number <= MAX_DRAFT_TOKENS:
        raise InvalidArgumentError(
            f"num_draft_tokens={number!r}: expected a whole number, {least} to "
            f"{MAX_DRAFT_TOKENS}, or 'auto'"
        )
    return number
