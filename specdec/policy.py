"""How many tokens to draft, or none: decided on the host before anything of the step is drawn, from
past steps and measured costs only (contract: nothing drawn in a step decides what it keeps)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass, field

from specdec.costs import StepCosts
from specdec.errors import InvalidArgumentError
from specdec.proposers import Proposer
from specdec.sequence import Sequence
from specdec.tree import TokenTree
from specdec.verifier import Verdict

DEFAULT_DRAFT_TOKENS = 4
MAX_DRAFT_TOKENS = 255
POLICIES = ("auto", "constant", "heuristic", "confidence", "cost")

Measure = Callable[[Items[Sequence], int], StepCosts | None]  # for a batch, down to a depth


class Policy(ABC):
    """Chooses each sequence's draft length for the coming step."""

    def join(self, proposer: Proposer, measure: Measure) -> None:
        """Called once, before any sequence. measure gives the costs of a step of these sequences,
        None where they cannot be measured. Raises InvalidArgumentError for a proposer that the
        policy cannot lead."""
        del proposer, measure

    def prepare(self, sequences: Items[Sequence]) -> None:
        """Called before a step is timed; what takes long once belongs here."""
        del sequences

    @abstractmethod
    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        """Nodes that each sequence may draft; 0 means plain decoding. The engine cuts them to what
        fits. rooms: how deep a draft of each can be."""

    def observe(
        self, sequences: Items[Sequence], trees: Items[TokenTree], verdicts: Items[Verdict]
    ) -> None:
        """What became of the step's drafts; the verdicts' tokens are not appended yet."""
        del sequences, trees, verdicts

    def forget(self, sequence: Sequence) -> None:
        """A sequence is over."""
        del sequence


class ConstantPolicy(Policy):
    """The same number of drafted tokens in every step."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = _checked(num_draft_tokens, least=0)

    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        del rooms
        return [self.num_draft_tokens] * len(sequences)


class HeuristicPolicy(Policy):
    """transformers' schedule: two more after a draft that was accepted whole, else one less."""

    def __init__(self, num_draft_tokens: int = 5) -> None:
        """num_draft_tokens: of a sequence's first step."""
        self.num_draft_tokens = _checked(num_draft_tokens, least=1)
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
        self.num_draft_tokens = _checked(num_draft_tokens, least=1)

    def join(self, proposer: Proposer, measure: Measure) -> None:
        del measure
        if not proposer.can_stop:
            raise InvalidArgumentError(
                f"policy='confidence': proposer={proposer.name!r} cannot stop in the middle of a "
                "draft; expected 'draft'"
            )
        proposer.stop_below = self.threshold

    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        del rooms
        return [self.num_draft_tokens] * len(sequences)


# How quickly old steps lose weight; what a rate is taken for before anything was seen, and for how
# many tries that counts; for how many tries the rate over all depths counts at each; after how many
# steps without a draft one is tried again, at least, at most, and per step that a try costs.
_KEEP, _GUESS, _GUESS_WEIGHT, _DEPTH_WEIGHT = 0.985, 0.6, 1.0, 12.0
_FIRST_WAIT, _LONGEST_WAIT, _TRIAL_STEPS = 4, 256, 50
_TRIED_TOGETHER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class _Rates:
    """How often a drafted token of each depth was accepted, where the one above it was."""

    __slots__ = ("hits", "tries")

    def __init__(self, depth: int) -> None:
        self.tries, self.hits = [0.0] * (depth + 1), [0.0] * (depth + 1)

    def overall(self, guess: float) -> float:
        """Over all depths, beside a guess."""
        return (sum(self.hits) + _GUESS_WEIGHT * guess) / (sum(self.tries) + _GUESS_WEIGHT)

    def add(self, drafted: int, accepted: int) -> None:
        tries, hits = self.tries, self.hits
        last = min(drafted, len(tries) - 1)
        for depth in range(1, min(accepted + 1, last) + 1):
            tries[depth] = tries[depth] * _KEEP + 1
            hits[depth] = hits[depth] * _KEEP + (depth <= accepted)


@dataclass(slots=True)
class _Situation:
    rates: _Rates
    idle: int = 0  # steps since the last draft
    wait: int = _FIRST_WAIT  # idle steps after which one token is tried


@dataclass(slots=True)
class _History:
    """What the drafts of one sequence came to."""

    rates: _Rates
    situations: dict[int, _Situation] = field(default_factory=dict)
    current: int = 0  # the situation of the coming step
    read: int = 0  # tokens that the draft has read


class CostPolicy(Policy):
    """The depth that promises most tokens per second: expected tokens of a step over its measured
    seconds (Leviathan et al. 2023, section 3.3, with measured costs and running acceptance).

    Each sequence learns by itself, so equal requests with equal seeds get equal text where costs
    are known. Where no depth pays it decodes plainly and tries one token from time to time, ever
    more rarely.
    """

    def __init__(self, max_draft_tokens: int | None = None) -> None:
        """max_draft_tokens: nodes at most; None: 16 where a model drafts, else 32."""
        self._limit = None if max_draft_tokens is None else _checked(max_draft_tokens, least=0)
        self._histories: dict[Sequence, _History] = {}
        self._costs: StepCosts | None = None
        self._proposer: Proposer | None = None
        self._measure: Measure | None = None
        self._depth = 0  # the deepest draft
        self._nodes: list[int] = []  # of a draft, by depth

    def join(self, proposer: Proposer, measure: Measure) -> None:
        self._proposer, self._measure = proposer, measure
        most = self._limit
        if most is None:
            most = proposer.preferred_nodes or (16 if proposer.draft_rows(1) else 32)
        self._nodes = [0]
        while (nodes := proposer.nodes_within(len(self._nodes))) <= most:
            if nodes <= self._nodes[-1]:
                break
            self._nodes.append(nodes)
        self._depth = len(self._nodes) - 1

    def prepare(self, sequences: Items[Sequence]) -> None:
        assert self._measure is not None, "join first"
        self._costs = self._measure(sequences, self._depth) if self._depth else None

    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        assert self._proposer is not None, "join first"
        rises = []
        for sequence, room in zip(sequences, rooms, strict=True):
            history = self._histories.get(sequence)
            if history is None:
                self._histories[sequence] = history = _History(_Rates(self._depth))
            history.current = self._proposer.situation(sequence)
            rises.append(self._reach(history, min(room, self._depth)))
        if self._costs is None:
            depths = [min(DEFAULT_DRAFT_TOKENS, len(reach)) for reach in rises]
        elif len(sequences) == 1:
            depths = [self._best_alone(self._costs, sequences[0], rises[0])]
        else:
            depths = self._best_together(self._costs, sequences, rises)
        return [
            self._nodes[self._probed(sequence, depth, len(reach))]
            for sequence, depth, reach in zip(sequences, depths, rises, strict=True)
        ]

    def _reach(self, history: _History, most: int) -> list[float]:
        """The probability that the text follows the draft to depth 1, 2, ..."""
        rates = history.rates
        usual = rates.overall(_GUESS)
        here = history.situations.get(history.current)
        if here is not None and len(history.situations) > 1:
            rates, usual = here.rates, here.rates.overall(usual)
        alive, reach = 1.0, []
        for depth in range(1, most + 1):
            # what was seen at this depth, and what is usual: one bad step at some depth must not
            # keep deeper ones from being tried
            alive *= (rates.hits[depth] + _DEPTH_WEIGHT * usual) / (
                rates.tries[depth] + _DEPTH_WEIGHT
            )
            reach.append(alive)
        return reach

    def _best_alone(self, costs: StepCosts, sequence: Sequence, reach: list[float]) -> int:
        context, behind = len(sequence.tokens), self._behind(costs, sequence)
        best, best_rate, expected = 0, 1 / costs.verify_seconds(1, context), 1.0
        for depth, chance in enumerate(reach, 1):
            expected += chance
            rate = expected / (
                behind
                + costs.draft_seconds(depth, context)
                + costs.verify_seconds(self._nodes[depth] + 1, context)
            )
            if rate > best_rate:
                best, best_rate = depth, rate
        return best

    def _best_together(
        self, costs: StepCosts, sequences: Items[Sequence], rises: Items[list[float]]
    ) -> list[int]:
        """Levels are drafted for all sequences together, so one depth is chosen; at each, every
        sequence is cut to where its nodes pay at the rate of plain decoding."""
        count = len(sequences)
        context = sum(len(s.tokens) for s in sequences) / count
        behind = sum(self._behind(costs, s) for s in sequences) / count
        scale = count / costs.batch  # costs were measured at the next power of two
        plain = scale * costs.verify_seconds(1, context)
        best, best_rate = [0] * count, count / plain
        for depth in (d for d in _TRIED_TOGETHER if d <= self._depth):
            widest = scale * costs.verify_seconds(self._nodes[depth] + 1, context)
            per_node = max(0.0, widest - plain) / (count * self._nodes[depth])
            cuts = [self._worth(reach[:depth], per_node * count / plain) for reach in rises]
            rows = 1 + sum(self._nodes[cut] for cut in cuts) / count
            drafting = costs.draft_seconds(max(cuts), context)
            seconds = scale * (behind + drafting + costs.verify_seconds(rows, context))
            tokens = count + sum(sum(reach[:cut]) for reach, cut in zip(rises, cuts, strict=True))
            if tokens / seconds > best_rate:
                best, best_rate = cuts, tokens / seconds
        return best

    def _worth(self, reach: list[float], least: float) -> int:
        """How deep each further level adds at least this many tokens per node."""
        depth = 0
        for chance in reach:
            if chance < least * (self._nodes[depth + 1] - self._nodes[depth]):
                break
            depth += 1
        return depth

    def _behind(self, costs: StepCosts, sequence: Sequence) -> float:
        """Seconds that the draft needs to read what it missed; they serve the steps to come."""
        missing = len(sequence.tokens) - self._histories[sequence].read
        if missing <= 2:
            return 0.0
        steps = max(1, min(sequence.remaining // 2, missing, 32))
        return costs.catch_up * missing / steps

    def _probed(self, sequence: Sequence, depth: int, most: int) -> int:
        """The depth, or 1 where it was 0 for long enough and a better draft could pay."""
        history = self._histories[sequence]
        here = history.situations.get(history.current)
        if here is None:
            here = history.situations[history.current] = _Situation(_Rates(self._depth))
            here.wait = self._first_wait(sequence)
        if depth > 0:
            here.idle, here.wait = 0, self._first_wait(sequence)
        elif most > 0:
            here.idle += 1
            if here.idle >= here.wait:
                here.idle, here.wait = 0, min(2 * here.wait, _LONGEST_WAIT)
                return int(self._could_pay(sequence, most))
        return depth

    def _first_wait(self, sequence: Sequence) -> int:
        """Steps after which a token is tried: the more a try costs, the later."""
        costs, context = self._costs, len(sequence.tokens)
        if costs is None or not self._depth:
            return _FIRST_WAIT
        plain = costs.verify_seconds(1, context)
        tried = costs.draft_seconds(1, context) + costs.verify_seconds(self._nodes[1] + 1, context)
        return max(_FIRST_WAIT, min(int(_TRIAL_STEPS * (tried / plain - 1)), _LONGEST_WAIT))

    def _could_pay(self, sequence: Sequence, most: int) -> bool:
        """Whether a draft that is always accepted would be quicker than plain decoding."""
        costs, context = self._costs, len(sequence.tokens)
        return costs is None or any(
            (depth + 1) * costs.verify_seconds(1, context)
            > costs.draft_seconds(depth, context)
            + costs.verify_seconds(self._nodes[depth] + 1, context)
            for depth in range(1, most + 1)
        )

    def observe(
        self, sequences: Items[Sequence], trees: Items[TokenTree], verdicts: Items[Verdict]
    ) -> None:
        for sequence, tree, verdict in zip(sequences, trees, verdicts, strict=True):
            if not len(tree):
                continue
            history = self._histories[sequence]
            depth = tree.max_depth
            history.rates.add(depth, verdict.accepted)
            history.situations[history.current].rates.add(depth, verdict.accepted)
            # called before the verdict's tokens are appended; a draft does not read its last token
            history.read = len(sequence.tokens) + min(verdict.accepted, depth - 1)

    def forget(self, sequence: Sequence) -> None:
        self._histories.pop(sequence, None)


def _checked(number: object, *, least: int) -> int:
    if type(number) is not int or not least <= number <= MAX_DRAFT_TOKENS:
        raise InvalidArgumentError(
            f"num_draft_tokens={number!r}: expected a whole number, {least} to "
            f"{MAX_DRAFT_TOKENS}, or 'auto'"
        )
    return number


def make_policy(policy: str | Policy, num_draft_tokens: int | str) -> Policy:
    """The policy behind wrap's arguments of these names; a number alone means a constant one."""
    if isinstance(policy, Policy):
        if num_draft_tokens != "auto":
            raise InvalidArgumentError(
                f"num_draft_tokens={num_draft_tokens!r}: expected 'auto' beside a Policy object"
            )
        return policy
    if policy not in POLICIES:
        raise InvalidArgumentError(
            f"policy={policy!r}: expected one of {', '.join(POLICIES)}, or a Policy"
        )
    if num_draft_tokens == "auto":
        return _BY_NAME[policy]()
    number = _checked(num_draft_tokens, least=0)
    if policy in ("auto", "constant") or number == 0:
        return ConstantPolicy(number)
    if policy == "cost":
        return CostPolicy(number)
    if policy == "heuristic":
        return HeuristicPolicy(number)
    return ConfidencePolicy(num_draft_tokens=number)


_BY_NAME: dict[str, Callable[[], Policy]] = {
    "auto": CostPolicy, "cost": CostPolicy, "heuristic": HeuristicPolicy,
    "confidence": ConfidencePolicy, "constant": lambda: ConstantPolicy(DEFAULT_DRAFT_TOKENS),
}  # fmt: skip
