"""The policy that maximises expected tokens per second, from measured costs and running rates of
acceptance."""

from bisect import bisect_left
from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass
from itertools import accumulate

from specdec.costs import StepCosts
from specdec.policy.base import (
    DEFAULT_DRAFT_TOKENS,
    MAX_DRAFT_TOKENS,
    Measure,
    Policy,
    Steady,
    checked_number,
)
from specdec.policy.history import PATIENCE, History, Situation, next_streak
from specdec.proposers import Proposer
from specdec.proposers.checked import situation_of
from specdec.rates import Rates
from specdec.sequence import Sequence
from specdec.tree import TokenTree
from specdec.verifier import Verdict

# What a rate is taken for before anything was seen; for how many hits a first guess counts, and one
# from other sequences; the same of what is usual, in one situation and at one depth (there in
# tries), where a proposer tells situations apart and where streaks do; after how many steps without
# a draft one is tried again, at least, at most, and per step that a try is expected to lose: at
# first, and after many in vain. Chosen by replaying texts of the built-in pair and drafts of known
# acceptance.
_GUESS = 0.65
_GUESS_WEIGHT, _COMMON_WEIGHT = 2.0, 15.0
_WEIGHTS, _STREAK_WEIGHTS = (2.0, 12.0), (12.0, 30.0)
_FIRST_WAIT, _LONGEST_WAIT = 6, 256
_TRIAL_STEPS, _MOST_TRIAL_STEPS = 50, 1000
_TRIED_TOGETHER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# A draft that promises so much less than plain decoding is made all the same: it teaches something,
# and plain decoding nothing. What a model's draft adds to a step is known to so much of it only: it
# is taken for that much less beside plain decoding, and a deeper draft must promise so much more
# than the best shallower one.
_CURIOSITY, _DOUBT = 0.03, 0.1
_DEEPER = 0.02
# A free draft that is nearly as good whole is not cut: costs are known no better than that.
_AS_GOOD = 0.96
_FURTHER = 4  # levels behind the best one that are looked at
_NEAR = 64  # tokens of context that costs are looked up for together
# Steps for which a sequence's choice holds at most that decodes alone, where enough was tried; the
# same where a model drafts, whose choices cost more and change less.
_HOLDS, _MODEL_HOLDS, _ENOUGH = 3, 5, 3
_STREAKS, _LENGTHS = 4, 6  # kinds of what became of the last drafts, of lengths of a free one
_EVERYWHERE = -1  # stands for all situations together


@dataclass(slots=True)
class _Outlook:
    """A sequence before a step."""

    sequence: Sequence
    history: History
    here: Situation
    reach: list[float]  # the probability that the text follows the draft to depth 1, 2, ...
    sizes: Items[int]  # nodes of a draft, by depth from 0 on


class CostPolicy(Policy):
    """The depth that promises most tokens per second: expected tokens of a step over its measured
    seconds (Leviathan et al. 2023, section 3.3, with measured costs and running acceptance).

    Where no depth pays, a sequence decodes plainly and tries one level from time to time, ever
    more rarely. What costs nothing to draft is drafted first and cut then. Of a proposer with a
    shape of its own it takes whole levels, chosen before anything is drawn; where the levels of a
    smaller draft would be others (by_level is False), the whole shape or nothing.

    A sequence whose text depends on what is drafted (sampled, and not under `gumbel`) learns by
    itself, so equal requests with equal seeds get equal text where costs are known; the others
    learn from each other too.
    """

    def __init__(self, max_draft_tokens: int | None = None) -> None:
        """max_draft_tokens: nodes at most; None: what the proposer prefers, else 16 where a model
        drafts and 32 where none does."""
        self._limit = (
            None if max_draft_tokens is None else checked_number(max_draft_tokens, least=0)
        )
        self._histories: dict[Sequence, History] = {}
        self._common: dict[int, Rates] = {}  # by situation, of all steady sequences
        self._guesses: dict[int, list[float]] = {}  # made from it
        self._waits: dict[int, tuple[int, int]] = {}  # by situation: steps since a draft, to a try
        self._measured: tuple[int, object] = (0, None)  # last: how many sequences, of what law
        self._costs: StepCosts | None = None
        self._seconds: dict[int, tuple[list[float], list[float]]] = {}  # by context
        self._proposer: Proposer | None = None
        self._measure: Measure | None = None
        self._steady: Steady = lambda _: False
        self._depth = 0  # the deepest draft
        self._unmeasured = 0  # the depth where no costs are known
        self._nodes: list[int] = []  # of a draft, by depth
        self._by_level = True
        self._first_guess: list[float] = []
        self._kinds = 1  # of situations that are one to the proposer
        self._one_situation = False  # whether a model drafts that knows no others
        self._situation_weight, self._depth_weight = _WEIGHTS
        self._doubt, self._holds = 0.0, _HOLDS
        self._fruitless = 0  # lookups on end that led to nothing in the last steady sequence

    def join(self, proposer: Proposer, measure: Measure, steady: Steady) -> None:
        self._proposer, self._measure, self._steady = proposer, measure, steady
        most = self._limit
        if most is None:
            most = proposer.preferred_nodes or (16 if proposer.draft_rows(1) else 32)
        self._nodes = [0]
        while (nodes := proposer.nodes_within(len(self._nodes))) <= most:
            if nodes <= self._nodes[-1]:
                break
            self._nodes.append(nodes)
        self._depth, self._by_level = len(self._nodes) - 1, proposer.by_level
        has_shape = proposer.preferred_nodes is not None
        self._unmeasured = self._depth if has_shape else DEFAULT_DRAFT_TOKENS
        self._first_guess = [_GUESS] * self._depth
        # A model is right in runs; a lookup that found more of a text is surer of it.
        self._kinds = _LENGTHS if proposer.free else _STREAKS if proposer.draft_rows(1) else 1
        if proposer.draft_rows(1):
            self._doubt, self._holds = _DOUBT, _MODEL_HOLDS
        if self._kinds == _STREAKS:
            self._one_situation = type(proposer).situation is Proposer.situation
            self._situation_weight, self._depth_weight = _STREAK_WEIGHTS

    def prepare(self, sequences: Items[Sequence]) -> None:
        assert self._measure is not None, "join first"
        # laws are compared by identity
        batch = len(sequences), sequences[0].law
        if batch[0] == 1 and batch == self._measured:
            return
        self._measured = batch
        costs = self._measure(sequences, self._depth) if self._depth else None
        if costs is not self._costs:
            self._costs = costs
            self._seconds.clear()
            if costs is not None:
                self._tell(costs)

    def _tell(self, costs: StepCosts) -> None:
        assert self._proposer is not None, "join first"
        plain = costs.verify_seconds(1, costs.context)
        self._proposer.weigh(lambda depth: costs.draft_seconds(depth, costs.context) / plain)

    def plan(self, sequences: Items[Sequence], rooms: Items[int]) -> list[int]:
        assert self._proposer is not None, "join first"
        if len(sequences) == 1 and not self._proposer.free:
            held = self._still_held(sequences[0], min(rooms[0], self._depth))
            if held is not None:
                return [self._nodes[held]]
        depths = [min(room, self._depth) for room in rooms]
        if self._proposer.free:
            for i, sequence in enumerate(sequences):
                if self._history(sequence).rest:
                    depths[i] = 0
        else:
            depths = self._choose(sequences, depths, lambda _: self._nodes)
        return [self._nodes[depth] for depth in depths]

    def cut(self, sequences: Items[Sequence], trees: Items[TokenTree]) -> list[TokenTree]:
        assert self._proposer is not None, "join first"
        if not self._proposer.free or self._costs is None or not any(map(len, trees)):
            return list(trees)
        depths = self._choose(
            sequences,
            [min(tree.max_depth, self._depth) for tree in trees],
            lambda i: _sizes(trees[i]),
        )
        return [tree.down_to(depth) for tree, depth in zip(trees, depths, strict=True)]

    def _choose(
        self, sequences: Items[Sequence], most: Items[int], sizes: Callable[[int], Items[int]]
    ) -> list[int]:
        """Each sequence's depth, at most `most`; sizes(i): nodes of the draft of the i-th of them,
        by depth from 0 on."""
        histories = list(map(self._find_situation, sequences, most))
        costs = self._costs
        if costs is None:
            return [min(self._unmeasured, each) for each in most]
        if len(sequences) == 1:
            held = histories[0].held(most[0])
            if held is not None:
                return [held]
        outlooks = [
            self._outlook(sequences[i], history, most[i], sizes(i))
            for i, history in enumerate(histories)
        ]
        if len(sequences) == 1:
            return [self._alone(costs, outlooks[0], most[0])]
        depths = self._best_together(costs, outlooks)
        return [
            self._probed(costs, each, depth) for each, depth in zip(outlooks, depths, strict=True)
        ]

    def _still_held(self, sequence: Sequence, most: int) -> int | None:
        """_choose() of a sequence that decodes alone, where the last step has said already in what
        situation it is: that is most steps, and each microsecond here is one of a thousand."""
        history = self._histories.get(sequence)
        if history is None or not history.known or self._costs is None:
            return None
        return history.held(most)

    def _alone(self, costs: StepCosts, outlook: _Outlook, most: int) -> int:
        """A choice takes longer than anything else here and rates change slowly: it holds for some
        steps."""
        here = outlook.here
        depth = self._probed(costs, outlook, self._best_alone(costs, outlook))
        # one that takes all there is would have taken more
        whole = depth == most > 0
        here.depth = 0 if here.trying else self._depth if whole else depth
        tries = int(here.rates.tries[1])
        if depth == 0:  # nothing is learnt until a token is tried, and costs change slowly
            here.holds = _NEAR
        else:
            here.holds = min(self._holds, tries) if tries >= _ENOUGH else 0
        return depth

    def _history(self, sequence: Sequence) -> History:
        history = self._histories.get(sequence)
        if history is None:
            steady = self._steady(sequence)
            history = History(Rates(self._depth), steady)
            history.fruitless = self._fruitless if steady else 0
            self._histories[sequence] = history
        return history

    def _find_situation(self, sequence: Sequence, most: int) -> History:
        """Where the sequence stands before a draft of at most this depth."""
        assert self._proposer is not None
        history = self._history(sequence)
        kind = min(most.bit_length(), _LENGTHS - 1) if self._proposer.free else history.streak
        history.number = number = situation_of(self._proposer, sequence) * self._kinds + kind
        here = history.situations.get(number)
        if here is None:
            here = Situation(Rates(self._depth), self._first_guess)
            if history.steady:
                here.idle, here.wait = self._waits.get(number, (0, 0))
            history.situations[number] = here
        history.here, history.known = here, self._one_situation
        return history

    def _outlook(
        self, sequence: Sequence, history: History, most: int, sizes: Items[int]
    ) -> _Outlook:
        here = history.here
        assert here is not None, "its situation was found"
        history.settle()
        weight = self._guess(history, here)
        rates, ratio = history.rates, history.rates.ratio(weight)
        if len(history.situations) > 1:
            rates, ratio = here.rates, here.rates.ratio(self._situation_weight, ratio)
        reach = rates.reach(here.guess, ratio, most, self._depth_weight)
        if not self._by_level:  # worth a thought or not, all of it is drafted
            reach += [0.0] * (most - len(reach))
        return _Outlook(sequence, history, here, reach, sizes)

    def _guess(self, history: History, here: Situation) -> float:
        """Sets what sequences before it make likely; for how many expected hits it counts."""
        if not history.steady or not self._common:
            here.guess = self._first_guess
            return _GUESS_WEIGHT
        known = self._guesses.get(history.number)
        if known is None:
            known = self._common[_EVERYWHERE].told(
                self._first_guess, _GUESS_WEIGHT, self._depth_weight
            )
            common = self._common.get(history.number)
            if common is not None and len(self._common) > 2:
                known = common.told(known, self._situation_weight, self._depth_weight)
            self._guesses[history.number] = known
        here.guess = known
        return _COMMON_WEIGHT

    def _best_alone(self, costs: StepCosts, outlook: _Outlook) -> int:
        assert self._proposer is not None
        sizes, behind = outlook.sizes, self._behind(costs, outlook)
        draft, verify = self._tables(costs, len(outlook.sequence.tokens))
        doubt, deeper = self._doubt, 1 + _DEEPER if self._doubt else 1.0
        plain, best, best_rate, expected = verify[1], 0, 0.0, 1.0
        for depth, chance in enumerate(outlook.reach, 1):
            expected += chance
            if depth < len(outlook.reach) and not self._by_level:
                continue
            seconds = behind + draft[depth] + verify[sizes[depth] + 1]
            rate = expected / seconds
            hoped = expected / (seconds - doubt * (seconds - plain))
            if rate > best_rate * deeper if best else hoped > (1 - _CURIOSITY) / plain:
                best, best_rate = depth, rate
            elif depth > best + _FURTHER:
                break
        if best and self._proposer.free:
            whole = len(sizes) - 1
            if (1 + sum(outlook.reach)) / verify[sizes[whole] + 1] > _AS_GOOD * best_rate:
                return whole
        return best

    def _tables(self, costs: StepCosts, context: int) -> tuple[list[float], list[float]]:
        """Seconds of a draft by depth and of a pass by rows, near this context."""
        place = context // _NEAR
        known = self._seconds.get(place)
        if known is None:
            middle = (place + 0.5) * _NEAR
            rows = range(MAX_DRAFT_TOKENS + 2)
            known = (
                [self._drafting(costs, depth, middle) for depth in range(self._depth + 1)],
                [costs.verify_seconds(max(1, n), middle) for n in rows],
            )
            self._seconds[place] = known
        return known

    def _best_together(self, costs: StepCosts, outlooks: Items[_Outlook]) -> list[int]:
        """Levels are drafted for all sequences together, so one depth is chosen; at each, every
        sequence is cut to where its nodes pay at the rate of plain decoding."""
        count = len(outlooks)
        context = sum(len(each.sequence.tokens) for each in outlooks) / count
        behind = sum(self._behind(costs, each) for each in outlooks) / count
        scale = count / costs.batch  # costs were measured at the next power of two
        plain = scale * costs.verify_seconds(1, context)
        best, best_rate = [0] * count, count / plain
        shallower = [d for d in _TRIED_TOGETHER if d < self._depth and self._by_level]
        worth = _worth if self._by_level else _worth_whole
        for depth in (*shallower, self._depth):
            nodes = sum(each.sizes[min(depth, len(each.reach))] for each in outlooks)
            widest = scale * costs.verify_seconds(nodes / count + 1, context)
            per_node = max(0.0, widest - plain) / max(1, nodes)
            cuts = [worth(each, depth, per_node * count / plain) for each in outlooks]
            pairs = list(zip(outlooks, cuts, strict=True))
            rows = 1 + sum(each.sizes[cut] for each, cut in pairs) / count
            drafting = self._drafting(costs, max(cuts), context)
            seconds = scale * (behind + drafting + costs.verify_seconds(rows, context))
            tokens = count + sum(sum(each.reach[:cut]) for each, cut in pairs)
            if tokens / seconds > best_rate:
                best, best_rate = cuts, tokens / seconds
        return best

    def _drafting(self, costs: StepCosts, depth: int, context: float) -> float:
        """Seconds of a draft of this depth that are still to be spent."""
        assert self._proposer is not None
        return 0.0 if self._proposer.free else costs.draft_seconds(depth, context)

    def _behind(self, costs: StepCosts, outlook: _Outlook) -> float:
        """Seconds that the draft needs to read what it missed; they serve the steps to come."""
        sequence = outlook.sequence
        missing = len(sequence.tokens) - outlook.history.read
        if missing <= 2:
            return 0.0
        steps = max(1, min(sequence.remaining // 2, missing, 32))
        return costs.catch_up * missing / steps

    def _probed(self, costs: StepCosts, outlook: _Outlook, depth: int) -> int:
        """The depth, or that of a trial where it was 0 for long enough and a better draft could
        pay."""
        here = outlook.here
        here.trying = False
        if depth > 0:
            here.idle = here.wait = 0
        elif outlook.reach:
            loss = self._loss(costs, outlook)
            first, last = int(_TRIAL_STEPS * loss), int(_MOST_TRIAL_STEPS * loss)
            here.wait = max(_FIRST_WAIT, min(here.wait or first, last, _LONGEST_WAIT))
            here.idle += 1
            if here.idle >= here.wait:
                here.idle, here.wait = 0, 2 * here.wait
                here.trying = self._could_pay(costs, outlook)
                return self._trial(outlook) if here.trying else 0
        return depth

    def _trial(self, outlook: _Outlook) -> int:
        """How deep a draft is that is tried."""
        return 1 if self._by_level else len(outlook.reach)

    def _loss(self, costs: StepCosts, outlook: _Outlook) -> float:
        """What a draft that is tried is expected to lose, in plain steps."""
        context, depth = len(outlook.sequence.tokens), self._trial(outlook)
        plain = costs.verify_seconds(1, context)
        tried = self._drafting(costs, depth, context) + costs.verify_seconds(
            outlook.sizes[depth] + 1, context
        )
        if not outlook.history.read:  # the draft would have to read the whole prompt for it
            tried += costs.catch_up * context
        return max(0.0, tried / plain - 1 - sum(outlook.reach[:depth]))

    def _could_pay(self, costs: StepCosts, outlook: _Outlook) -> bool:
        """Whether a draft that is always accepted would be quicker than plain decoding."""
        context, sizes = len(outlook.sequence.tokens), outlook.sizes
        return any(
            (depth + 1) * costs.verify_seconds(1, context)
            > self._drafting(costs, depth, context)
            + costs.verify_seconds(sizes[depth] + 1, context)
            for depth in range(self._trial(outlook), min(len(sizes) - 1, self._depth) + 1)
        )

    def observe(
        self, sequences: Items[Sequence], trees: Items[TokenTree], verdicts: Items[Verdict]
    ) -> None:
        assert self._proposer is not None, "join first"
        is_free = self._proposer.free
        for sequence, tree, verdict in zip(sequences, trees, verdicts, strict=True):
            if is_free:
                self._history(sequence).looked_up(verdict.accepted)
            if not len(tree):
                continue
            history = self._histories[sequence]
            here = history.here
            assert here is not None, "a draft was planned"
            depth, accepted = tree.max_depth, verdict.accepted
            if not self._by_level:  # that it was no deeper is part of what became of it
                depth = bisect_left(self._nodes, len(tree))
            history.seen.append((here, depth, accepted))
            if here.trying and 2 * accepted >= depth:  # again at once
                here.idle = here.wait = max(_FIRST_WAIT, here.wait // 2)
            if self._kinds == _STREAKS:
                history.streak = streak = next_streak(history.streak, depth, accepted)
                history.known = self._one_situation and streak in history.situations
                if history.known:
                    history.here, history.number = history.situations[streak], streak
            # called before the verdict's tokens are appended; a draft does not read its last token
            history.read = len(sequence.tokens) + min(accepted, depth - 1)

    def forget(self, sequence: Sequence) -> None:
        self._measured = (0, None)  # there may be room to measure now; the next may share its law
        history = self._histories.pop(sequence, None)
        if history is None or not history.steady:
            return
        # the next one has less patience, but a single hit gives it all of it
        self._fruitless = min(history.fruitless, PATIENCE)
        for situation, here in history.situations.items():
            self._waits[situation] = here.idle, here.wait
        history.settle()
        if not any(history.rates.tries):
            return
        self._keep(_EVERYWHERE, history.rates)
        for situation, here in history.situations.items():
            self._keep(situation, here.rates)
        self._guesses.clear()

    def _keep(self, situation: int, rates: Rates) -> None:
        known = self._common.get(situation)
        if known is None:
            self._common[situation] = known = Rates(self._depth)
        known.merge(rates)


def _worth(outlook: _Outlook, most: int, least: float) -> int:
    """How deep each further level adds at least this many tokens per node."""
    sizes = outlook.sizes
    for depth, chance in enumerate(outlook.reach[:most]):
        if chance < least * (sizes[depth + 1] - sizes[depth]):
            return depth
    return min(most, len(outlook.reach))


def _worth_whole(outlook: _Outlook, _: int, least: float) -> int:
    """As _worth, of a draft that is made whole or not at all."""
    whole = len(outlook.reach)
    return whole if sum(outlook.reach) >= least * outlook.sizes[whole] else 0


def _sizes(tree: TokenTree) -> Items[int]:
    """Nodes down to each depth, from 0 on."""
    if tree.is_chain:
        return range(len(tree) + 1)
    counts = [0] * (tree.max_depth + 1)
    for depth in tree.depths:
        counts[depth] += 1
    return list(accumulate(counts))
