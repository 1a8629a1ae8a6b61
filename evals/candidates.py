"""What a setting promises: tokens per pass, as it was seen, over what its steps cost."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from specdec.costs import StepCosts
from specdec.proposers import Proposer
from specdec.shapes import rows_per_level
from specdec.stats import RunStats


class Place(NamedTuple):
    """Where steps are measured: sequences together, and tokens of each."""

    batch: int
    context: int


@dataclass(frozen=True, slots=True)
class Setting:
    """Arguments of specdec.wrap beside target and draft; plain values."""

    name: str
    arguments: dict[str, Any]
    uses_draft: bool = False


StepSeconds = Callable[[StepCosts, float], float]  # of a step, from costs and a context


@dataclass(slots=True)
class Candidate:
    """One setting, and what is expected of it."""

    setting: Setting
    kind: str  # of each kind a few are timed
    tokens: float  # per pass
    seconds: StepSeconds
    costs: Mapping[Place, StepCosts]
    everywhere: bool = True  # whether it does the same whatever steps cost
    gains: dict[Place, float] = field(init=False)  # predicted speed against plain decoding

    def __post_init__(self) -> None:
        self.gains = {place: self._gain(place) for place in self.costs}

    def _gain(self, place: Place) -> float:
        costs = self.costs[place]
        plain = costs.verify_seconds(1, place.context)
        return self.tokens * plain / self.seconds(costs, place.context)


def shortened(stats: RunStats, length: int) -> tuple[float, Counter[int]]:
    """Of chains cut to a length, by those of longer ones: tokens per pass and drafted lengths. At
    temperature 0, and wherever tokens are accepted one by one, they are those of a run."""
    accepted = sum(min(n, length) * times for n, times in stats.accepted_lengths.items())
    drafted: Counter[int] = Counter()
    for n, times in stats.drafted_lengths.items():
        drafted[min(n, length)] += times
    return 1 + accepted / max(1, stats.steps), drafted


def by_lengths(
    drafted: Mapping[int, int], depth: Callable[[int], int], *, drafts: bool
) -> StepSeconds:
    """Mean over steps that drafted so many nodes; depth: of a draft by its nodes."""
    steps = max(1, sum(drafted.values()))

    def seconds(costs: StepCosts, context: float) -> float:
        total = 0.0
        for nodes, times in drafted.items():
            drafting = costs.draft_seconds(depth(nodes), context) if drafts and nodes else 0.0
            total += times * (drafting + costs.verify_seconds(nodes + 1, context))
        return total / steps

    return seconds


def of_tree(shape: tuple[int, ...]) -> StepSeconds:
    """Of a static tree, by the costs of chains."""

    def seconds(costs: StepCosts, context: float) -> float:
        drafting = sum(level_seconds(costs, context, rows) for rows in rows_per_level(shape))
        return drafting + costs.verify_seconds(len(shape) + 1, context)

    return seconds


def level_seconds(costs: StepCosts, context: float, rows: int) -> float:
    """One pass of the draft over so many rows."""
    return costs.draft_seconds(1, context) + (rows - 1) * costs.catch_up


def depth_of(proposer: Proposer, most: int) -> Callable[[int], int]:
    """The least depth, up to most, of a draft of so many nodes."""
    sizes = [proposer.nodes_within(depth) for depth in range(most + 1)]

    def depth(nodes: int) -> int:
        return next((d for d, size in enumerate(sizes) if size >= nodes), most)

    return depth
