"""What an adaptive policy remembers of a sequence: how its drafts fared, by situation."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from specdec.rates import Rates

# After so many lookups on end that led to nothing, a sequence rests between two of them: a step,
# then one more each time, up to so many. A lookup costs some percent of a small model's pass.
PATIENCE, _LONGEST_REST = 16, 7


@dataclass(slots=True)
class Situation:
    """What drafts of one kind of prospects came to, and what was chosen for them last."""

    rates: Rates
    # what a chance is taken for by depth, before anything is known of this sequence
    guess: Items[float]
    idle: int = 0  # steps since the last draft
    wait: int = 0  # idle steps after which one token is tried; 0: not known yet
    trying: bool = False  # the coming step does
    depth: int = 0  # chosen last
    holds: int = 0  # for so many further steps

    def held(self, most: int) -> int | None:
        """The depth chosen last, of at most `most`, where it still holds."""
        if not self.holds or not (self.depth or self.idle + 1 < self.wait):
            return None
        self.holds -= 1
        self.trying = False
        self.idle += self.depth == 0 and most > 0
        return min(self.depth, most)


@dataclass(slots=True)
class History:
    """What the drafts of one sequence came to."""

    rates: Rates
    steady: bool  # its text is the same whatever is drafted
    situations: dict[int, Situation] = field(default_factory=dict)
    here: Situation | None = None  # the situation of the coming step
    known: bool = False  # whether that one is set already
    number: int = 0  # its number
    streak: int = 0  # what became of the last drafts, where that tells situations apart
    read: int = 0  # tokens that the draft has read
    fruitless: int = 0  # lookups on end that led to nothing
    rest: int = 0  # steps to come without one
    # drafts that are not in the rates yet: where, how deep, how many of them were accepted
    seen: list[tuple[Situation, int, int]] = field(default_factory=list)

    def looked_up(self, accepted: int) -> None:
        """What became of a step of a free proposer."""
        if self.rest:
            self.rest -= 1
            return
        self.fruitless = 0 if accepted else self.fruitless + 1
        self.rest = min(max(0, self.fruitless + 1 - PATIENCE), _LONGEST_REST)

    def held(self, most: int) -> int | None:
        """The depth chosen last in the situation of the coming step, where it still holds."""
        return None if self.here is None else self.here.held(most)

    def settle(self) -> None:
        """Takes into the rates what was seen."""
        for here, depth, accepted in self.seen:
            self.rates.add(depth, accepted, here.guess)
            here.rates.add(depth, accepted, here.guess)
        self.seen.clear()


def next_streak(before: int, depth: int, accepted: int) -> int:
    """0: rejected at once, or nothing drafted yet; 1: in part; 2: accepted whole; 3: again."""
    if accepted == depth:
        return 3 if before >= 2 else 2
    return int(accepted > 0)
