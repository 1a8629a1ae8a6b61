"""The protocol of everything that guesses the next tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence as Items
from typing import ClassVar, Literal

from specdec.cache import CacheGroup
from specdec.rng import Noise
from specdec.sequence import Sequence
from specdec.tree import TokenTree
from specdec.verifier import Verdict


class Proposer(ABC):
    """Guesses; it neither accepts nor emits. One object serves every sequence of an engine.

    law says what its proposals are drawn from: `point` (deterministic), `sampled` (fresh noise
    from the stored laws) or `coupled` (the target's own noise). Options are keyword-only arguments
    of the constructor, which raises InvalidArgumentError for values out of range; behind
    needs_draft the draft model's Runner comes first.
    """

    name: ClassVar[str]  # what wrap(proposer=...) calls it
    needs_draft: ClassVar[bool] = False
    can_stop: ClassVar[bool] = False  # whether it honours stop_below
    # Its drafts cost next to nothing and are `point`: an adaptive policy lets it draft all it would
    # and then decides what of it is verified, so observe() may see the verdict of a shorter tree.
    free: bool = False
    # Whether a smaller budget drafts the first levels of what a larger one would. Where it does
    # not, an adaptive policy drafts all that fits, or nothing.
    by_level: bool = True
    stop_below: float = 0.0  # a drafted token that was less likely than this is kept as the last
    law: Literal["point", "sampled", "coupled"]

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        """Called once, before any sequence: the target's cache group and vocabulary size."""
        del group, vocab_size

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        """Cache groups of its own, once it has joined; the engine says how large they may get."""
        return ()

    @property
    def max_positions(self) -> int | None:
        """Longest context that can be drafted from; None: unbounded."""
        return None

    @property
    def preferred_nodes(self) -> int | None:
        """Nodes per step where the caller names no number; None: the policy's own default."""
        return None

    @property
    def spare_slots(self) -> int:
        """Cache slots behind the last token that a draft fills beyond those that its tokens may be
        committed to: side branches."""
        return self.preferred_nodes or 0

    def nodes_within(self, depth: int) -> int:
        """How many nodes a draft of at most this depth may have: the budget near the end of a
        sequence, never above the larger of depth and preferred_nodes."""
        return depth

    def draft_rows(self, depth: int) -> tuple[int, ...]:
        """Rows of each draft pass, for one sequence, that a draft of this depth takes; () where no
        model drafts. Adaptive policies plan with it."""
        del depth
        return ()

    def weigh(self, seconds: Callable[[int], float]) -> None:
        """Told by a policy that counts time: what drafting down to a depth takes, as a share of a
        plain pass of the target. From then on it may leave out of a proposal, before anything of
        it is drawn, what costs more than it is worth."""
        del seconds

    def situation(self, sequence: Sequence) -> int:
        """A small number, 0 or more, that tells drafts of different prospects apart, a function of
        what was committed: adaptive policies estimate acceptance per situation (the length of the
        match that an n-gram would be copied from, say). Called before propose."""
        del sequence
        return 0

    def start(self, sequence: Sequence) -> None:
        """A sequence was admitted; its prompt is in sequence.tokens."""
        del sequence

    @abstractmethod
    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        """One tree per sequence of at most budgets[i] nodes; empty trees are fine. A step in which
        nothing is to be drafted calls neither this nor observe()."""

    def observe(self, sequences: Items[Sequence], verdicts: Items[Verdict]) -> None:
        """What the target said of the last trees; it never holds verification coins."""
        del sequences, verdicts

    def finish(self, sequence: Sequence) -> None:
        """A sequence is over; forget it."""
        del sequence
