"""Several proposers, merged by full path into one tree under one budget (SpecInfer, Miao et al.
2023, 2305.09781, section 3)."""

from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import torch

from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.proposers.checked import check_proposer, checked, join, situation_of
from specdec.rng import Noise, OffsetNoise
from specdec.sequence import Sequence
from specdec.shapes import MAX_NODES
from specdec.tree import Law, TokenTree
from specdec.verifier import Verdict

# Nodes per step of a member that prefers no number.
_NODES = 8
# Draft noise is keyed by row, and a tree has at most so many.
_ROWS = MAX_NODES + 1
# How quickly old steps lose weight in a member's acceptance.
_KEEP = 0.97


class EnsembleProposer(Proposer):
    """Members propose for themselves; their trees share nodes of equal path, and one budget.

    Members that draw, run a model or learn from what the target says of their nodes (they implement
    observe) get a share of the budget before they propose, a function of the budget alone, and
    everything they proposed is kept (contract C3: what is drawn is never dropped). By default every
    member gets levels down to the same depth, as deep as the budget allows; shares says it in
    proportions, by label, instead. The others, lookups whose drafts are a function of the text,
    may propose up to the whole budget; what the shares left goes to those of their nodes that
    nobody proposed before and that promise most, by the running acceptance of each member per
    situation, depth and rank among siblings. A node that several propose counts once, and is
    credited to each of them.

    Draws come first, member by member, each in its order. No two members see the same draft noise.
    The first member that runs a model numbers the merged nodes, so its cache is committed as it is;
    other models in the target's cache group compute accepted tokens again in their next pass.

    Under a policy that counts time (weigh), models draft nothing where a lookup's continuation
    promises so much that they could add less than their passes cost; decided by the text and by
    what became of earlier steps, before anything is drawn.

    labels: the members' names, numbered where several are the same: "draft-1", "draft-2".
    credits: per label, nodes proposed and verified so far, and those of them that were accepted.
    """

    name = "ensemble"
    needs_draft = True  # it takes one, and does without

    def __init__(
        self, members: Items[Proposer], *, shares: Mapping[str, float] | None = None
    ) -> None:
        """Raises InvalidArgumentError for no members, one object twice, an ensemble among them, and
        for shares that are not one positive number per label."""
        if not members or not all(isinstance(member, Proposer) for member in members):
            raise InvalidArgumentError(f"members={members!r}: expected one Proposer or more")
        if len({id(member) for member in members}) < len(members):
            raise InvalidArgumentError("members: expected different objects, one came twice")
        if any(isinstance(member, EnsembleProposer) for member in members):
            raise InvalidArgumentError("members: an ensemble in an ensemble; name its members")
        for member in members:
            check_proposer(member)
        self.members = tuple(members)
        self.labels = labels_of([member.name for member in members])
        laws = {member.law for member in members}
        self.law = "sampled" if "sampled" in laws else "coupled" if "coupled" in laws else "point"
        everyone = range(len(members))
        kept = [i for i in everyone if _keeps_all(self.members[i])]
        # draws first, and of those with one law the models first
        kept.sort(key=lambda i: (members[i].law == "point", not members[i].draft_rows(1)))
        self._kept = kept
        self._free = [i for i in everyone if i not in kept]
        self.free = all(member.free for member in members)
        self.by_level = all(member.by_level for member in members)
        self._weights = None if shares is None else _weights(shares, self.labels)
        self._splits: dict[int, list[int]] = {}
        self._depths: dict[int, int] = {}  # of the models' drafts, by budget
        self.credits = {label: [0, 0] for label in self.labels}
        self._states: dict[Sequence, _State] = {}
        self._drafting: Callable[[int], float] | None = None  # passes that models take for a depth
        self._vocab_size, self._device = 0, torch.device("cpu")

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        self._vocab_size, self._device = vocab_size, group.device
        for member in self.members:
            join(member, group, vocab_size)

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        return tuple(group for member in self.members for group in member.groups)

    @property
    def max_positions(self) -> int | None:
        """Of the member that reaches farthest: the others drop out before."""
        limits = [member.max_positions for member in self.members]
        known = [limit for limit in limits if limit is not None]
        return max(known) if len(known) == len(limits) else None

    @property
    def preferred_nodes(self) -> int:
        wanted = sum(member.preferred_nodes or _NODES for member in self.members)
        return min(wanted, MAX_NODES)

    def nodes_within(self, depth: int) -> int:
        if self.free:  # any of them may fill the budget
            return max(member.nodes_within(depth) for member in self.members)
        most = sum(member.nodes_within(depth) for member in self.members)
        return min(most, max(depth, self.preferred_nodes))

    def draft_rows(self, depth: int) -> tuple[int, ...]:
        """The models draft one after the other."""
        return tuple(rows for member in self.members for rows in member.draft_rows(depth))

    def weigh(self, seconds: Callable[[int], float]) -> None:
        self._drafting = seconds

    def situation(self, sequence: Sequence) -> int:
        """One digit per member."""
        number = 0
        for member in self.members:
            number = number * 64 + min(situation_of(member, sequence), 63)
        return number

    def start(self, sequence: Sequence) -> None:
        self._states[sequence] = _State([_Rates() for _ in self.members])
        for member in self.members:
            member.start(sequence)

    def finish(self, sequence: Sequence) -> None:
        self._states.pop(sequence, None)  # one that failed on its way in was never started
        for member in self.members:
            member.finish(sequence)

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        budgets = [min(budget, MAX_NODES) for budget in budgets]
        everyone = range(len(sequences))
        looked_up: dict[int, list[TokenTree]] = {}
        for i in self._free:
            most = [
                min(budget, self._fitting(self.members[i], sequence))
                for sequence, budget in zip(sequences, budgets, strict=True)
            ]
            looked_up[i] = self._ask(i, sequences, most, noise)
        found = self._views(sequences, looked_up)
        lone = [self._is_enough(*each) for each in zip(sequences, budgets, found, strict=True)]
        drafted: dict[int, list[TokenTree]] = {}
        filled: list[dict[Any, int]] = []  # per sequence, what the first model has computed
        for place, i in enumerate(self._kept):
            member = self.members[i]
            shares = [
                0
                if lone[b] and member.draft_rows(1)
                else min(self._split(budgets[b])[i], self._fitting(member, sequences[b]))
                for b in everyone
            ]
            mine = OffsetNoise(noise, place * _ROWS) if place else noise
            drafted[i] = self._ask(i, sequences, shares, mine)
            if place == 0:
                filled = [_ahead(sequence) for sequence in sequences]
        if len(self._kept) > 1:
            for sequence, its_own in zip(sequences, filled, strict=True):
                _take_back(sequence, its_own)
        kept = self._views(sequences, drafted)
        return [self._merge(sequences[b], budgets[b], kept[b], found[b]) for b in everyone]

    def _views(
        self, sequences: Items[Sequence], trees: Mapping[int, list[TokenTree]]
    ) -> list[list["_View"]]:
        """Of each sequence, the members' trees that are not empty: one read of the device."""
        values = iter(_read([its[b] for b in range(len(sequences)) for its in trees.values()]))
        found: list[list[_View]] = []
        for b, sequence in enumerate(sequences):
            views = [_View(i, its[b], next(values)) for i, its in trees.items()]
            found.append([view for view in views if len(view.tree)])
            for view in found[-1]:
                if view.member in self._free:
                    view.situation = situation_of(self.members[view.member], sequence)
                    view.chances = self._states[sequence].rates[view.member].chances(view)
        return found

    def _is_enough(self, sequence: Sequence, budget: int, found: list["_View"]) -> bool:
        """Whether what was looked up promises more per second without what models would add:
        (1 + E) / V against (1 + E + (1 - c) M) / (V + D), with E and M the tokens that either is
        expected to get accepted, c the chance of the lookup's first token, V and D the time of a
        pass and of the models' drafts."""
        if self._drafting is None or not found:
            return False
        state, depth = self._states[sequence], self._levels(budget)
        # nothing is expected of a lookup that was not seen to be right
        known = [state.rates[view.member].chances(view, guess=0.0) for view in found]
        best = max(range(len(found)), key=lambda n: sum(known[n]))
        roots = zip(known[best], found[best].tree.parents, strict=True)
        first = sum(chance for chance, parent in roots if parent < 0)
        gain = (1 - first) * sum(state.models.rate**level for level in range(1, depth + 1))
        return self._drafting(depth) * (1 + sum(known[best])) > gain

    def _levels(self, budget: int) -> int:
        """How deep the models' shares of a budget let them draft."""
        if budget not in self._depths:
            shares = self._split(budget)
            self._depths[budget] = max(
                (
                    depth
                    for i in self._kept
                    for depth in range(1, shares[i] + 1)
                    if self.members[i].draft_rows(1)
                    and self.members[i].nodes_within(depth) <= shares[i]
                ),
                default=0,
            )
        return self._depths[budget]

    def _ask(
        self, i: int, sequences: Items[Sequence], budgets: list[int], noise: Noise
    ) -> list[TokenTree]:
        member = self.members[i]
        found = member.propose(sequences, budgets, noise)
        return checked(member, found, sequences, budgets, self._vocab_size, self._device)

    @staticmethod
    def _fitting(member: Proposer, sequence: Sequence) -> int:
        """Nodes that a member's tree may have, for its depth to fit what is left."""
        room = sequence.remaining - 1
        if member.max_positions is not None:
            room = min(room, member.max_positions - len(sequence.tokens))
        return member.nodes_within(room) if room > 0 else 0

    def _split(self, budget: int) -> list[int]:
        """Each member's share of a budget."""
        if budget not in self._splits:
            by_levels = self._weights is None
            self._splits[budget] = (
                self._by_levels(budget) if by_levels else self._by_weights(budget)
            )
        return self._splits[budget]

    def _by_levels(self, budget: int) -> list[int]:
        """Levels down to the same depth; what is left lets the first members go one deeper."""
        shares = deeper = [0] * len(self.members)
        for depth in range(1, budget + 1):
            deeper = [member.nodes_within(depth) for member in self.members]
            if sum(deeper) > budget:
                break
            shares = list(deeper)
        left = budget - sum(shares)
        for i, most in enumerate(deeper):
            if 0 < most - shares[i] <= left:
                left -= most - shares[i]
                shares[i] = most
        return shares

    def _by_weights(self, budget: int) -> list[int]:
        assert self._weights is not None
        shares = []
        for i, weight in enumerate(self._weights):
            shares.append(min(budget, round(budget * weight / sum(self._weights[i:]))))
            budget -= shares[-1]
        return shares

    def _merge(
        self, sequence: Sequence, budget: int, kept: list["_View"], found: list["_View"]
    ) -> TokenTree:
        """The union of one sequence's trees, what was looked up behind the others."""
        self._states[sequence].views = [*kept, *found]
        if len(kept) == 1 and not found:  # nothing to merge: the tree stays what it is
            kept[0].places = range(len(kept[0].tree))
            return kept[0].tree
        union = _Union()
        for view in kept:
            view.places = union.add_drawn(view)
        union.add_best([(view, view.chances) for view in found], budget - len(union.tokens))
        return union.tree(self._device)

    def proposed_by(self, sequence: Sequence, nodes: int) -> list[tuple[str, ...]]:
        """Of each node of a sequence's last tree, the labels of the members that proposed it."""
        found: list[tuple[str, ...]] = [()] * nodes
        for view in self._states[sequence].views:
            for place in view.places:
                if place >= 0:
                    found[place] += (self.labels[view.member],)
        return found

    def observe(self, sequences: Items[Sequence], verdicts: Items[Verdict]) -> None:
        for sequence, verdict in zip(sequences, verdicts, strict=True):
            state = self._states[sequence]
            for view in state.views:
                view.accepted = view.follow(verdict.tokens[: verdict.accepted])
                credit = self.credits[self.labels[view.member]]
                credit[0] += sum(place >= 0 for place in view.places)
                credit[1] += len(view.accepted)
                if view.member in self._free:
                    state.rates[view.member].add(view, verdict.tokens)
                elif self.members[view.member].draft_rows(1):
                    state.models.add(view)
        for i, member in enumerate(self.members):
            if type(member).observe is not Proposer.observe:
                its_own = [
                    self._states[sequence].verdict(i, verdict)
                    for sequence, verdict in zip(sequences, verdicts, strict=True)
                ]
                member.observe(sequences, its_own)


def labels_of(names: Items[str]) -> list[str]:
    """One label per member: its name, numbered where it is there several times."""
    seen: dict[str, int] = {}
    labels = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        labels.append(name if names.count(name) == 1 else f"{name}-{seen[name]}")
    return labels


def _keeps_all(member: Proposer) -> bool:
    learns = type(member).observe is not Proposer.observe
    return member.law != "point" or bool(member.draft_rows(1)) or learns


def _weights(shares: object, labels: list[str]) -> list[float]:
    if not isinstance(shares, Mapping) or set(shares) != set(labels):
        raise InvalidArgumentError(
            f"shares={shares!r}: expected a number for each of {', '.join(labels)}"
        )
    for label, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1e9:
            raise InvalidArgumentError(f"shares[{label!r}]={share!r}: expected a positive number")
    return [float(shares[label]) for label in labels]


def _ahead(sequence: Sequence) -> dict[Any, int]:
    """The models that have computed drafted tokens, and how far."""
    length = len(sequence.tokens)
    return {model: n for model, n in sequence.cache.computed.items() if n > length}


def _take_back(sequence: Sequence, filled: dict[Any, int]) -> None:
    """Leaves each model what `filled` says of drafted tokens, others none: the verifier commits
    slots by merged numbers, which are those of the first model alone."""
    length, computed = len(sequence.tokens), sequence.cache.computed
    for model in computed:
        computed[model] = filled.get(model, min(computed[model], length))


def _read(trees: Items[TokenTree]) -> list[list[int]]:
    """The tokens of each tree: one read of the device."""
    some = [tree.tokens for tree in trees if len(tree)]
    flat = iter(torch.cat(some).tolist() if some else ())
    return [[next(flat) for _ in range(len(tree))] for tree in trees]


@dataclass(slots=True, eq=False)
class _View:
    """One member's tree in a step, and where its nodes went."""

    member: int
    tree: TokenTree
    tokens: list[int]
    places: Items[int] = ()  # per node its merged number, -1: left out
    situation: int = 0
    chances: list[float] = field(default_factory=list)  # per node, of what was looked up
    accepted: tuple[int, ...] = ()  # nodes
    _index: dict[tuple[int, int], int] = field(default_factory=dict)

    def children(self) -> dict[tuple[int, int], int]:
        """(parent, token) -> node"""
        if not self._index:
            pairs = zip(self.tree.parents, self.tokens, strict=True)
            self._index = {pair: node for node, pair in enumerate(pairs)}
        return self._index

    def follow(self, tokens: Items[int]) -> tuple[int, ...]:
        """The nodes along a text, as far as the tree has it."""
        path: list[int] = []
        for token in tokens:
            node = self.children().get((path[-1] if path else -1, token))
            if node is None:
                break
            path.append(node)
        return tuple(path)

    def ranks(self) -> list[int]:
        """Per node how many siblings were proposed before it."""
        seen: dict[int, int] = {}
        found = []
        for parent in self.tree.parents:
            found.append(seen.get(parent, 0))
            seen[parent] = found[-1] + 1
        return found


class _Rates:
    """How often a lookup's node was right where its parent was: by situation, depth and rank."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int, int], list[float]] = {}  # tries, hits

    def chances(self, view: _View, guess: float = 0.5) -> list[float]:
        """Per node the probability that the text goes on to it; never above its parent's. guess:
        what it is taken for where nothing was seen, for the first of siblings."""
        found: list[float] = []
        for parent, depth, rank in zip(
            view.tree.parents, view.tree.depths, view.ranks(), strict=True
        ):
            tries, hits = self._counts.get((view.situation, depth, rank), (0.0, 0.0))
            rate = (hits + guess / (1 + rank)) / (tries + 1)
            found.append(rate * (found[parent] if parent >= 0 else 1.0))
        return found

    def add(self, view: _View, tokens: Items[int]) -> None:
        """tokens: what was emitted. It judges every node whose parent is on its way."""
        path = {-1, *view.follow(tokens)}
        if len(path) > len(tokens):
            path.discard(max(path))  # nobody knows what follows the last token
        right = set(view.follow(tokens))
        for node, (parent, depth, rank) in enumerate(
            zip(view.tree.parents, view.tree.depths, view.ranks(), strict=True)
        ):
            if parent in path:
                counts = self._counts.setdefault((view.situation, depth, rank), [0.0, 0.0])
                counts[0] = counts[0] * _KEEP + 1
                counts[1] = counts[1] * _KEEP + (node in right)


@dataclass(slots=True)
class _Hits:
    """How often a model's token was right where those above it were."""

    tries: float = 2.0
    hits: float = 1.0

    @property
    def rate(self) -> float:
        return self.hits / self.tries

    def add(self, view: _View) -> None:
        accepted, depth = len(view.accepted), view.tree.max_depth
        self.tries = self.tries * _KEEP + accepted + (accepted < depth)
        self.hits = self.hits * _KEEP + accepted


@dataclass(slots=True, eq=False)
class _State:
    """What is kept of one sequence from step to step."""

    rates: list[_Rates]
    models: _Hits = field(default_factory=_Hits)
    views: list[_View] = field(default_factory=list)

    def verdict(self, member: int, verdict: Verdict) -> Verdict:
        """A verdict in the numbers of one member's tree."""
        view = next((view for view in self.views if view.member == member), None)
        if view is None:
            return Verdict(verdict.tokens[:1], 0, (), verdict.logits[:1])
        path, count = view.accepted, len(view.tree)
        logits = verdict.logits[: count + 1]
        if list(view.places) != list(range(count)):
            rows = [0, *(place + 1 for place in view.places)]
            logits = verdict.logits[torch.tensor(rows, device=logits.device)]
        return Verdict(verdict.tokens[: len(path) + 1], count, path, logits)


class _Union:
    """Trees merged by full path."""

    __slots__ = ("_drawn", "_index", "_laws", "_rows", "draws", "parents", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.draws: list[tuple[int, Law]] = []
        self._drawn: set[int] = set()  # nodes that are there as a draw
        self._index: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        self._laws: list[torch.Tensor] = []
        self._rows = 0

    def add_drawn(self, view: _View) -> list[int]:
        """The whole tree with its draws, in order; returns where its nodes are.

        A point mass at a token that was proposed before is left out: nothing of that token is left
        when its turn comes, and rejecting it takes nothing away.
        """
        places: list[int] = []
        for parent, token in zip(view.tree.parents, view.tokens, strict=True):
            places.append(self._node(places[parent] if parent >= 0 else -1, token))
        for node, law in _draws(view.tree):
            if law.row is not None:
                self.draws.append((places[node], Law(law.kind, law.row + self._rows)))
            elif places[node] not in self._drawn:
                self.draws.append((places[node], law))
            self._drawn.add(places[node])
        if view.tree.laws is not None:
            self._laws.append(view.tree.laws)
            self._rows += view.tree.laws.shape[0]
        return places

    def _node(self, parent: int, token: int) -> int:
        node = self._index.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
        return node

    def add_best(self, candidates: Items[tuple[_View, list[float]]], room: int) -> None:
        """The `room` likeliest nodes that are not there yet, as point masses."""
        drawn = len(self.tokens)
        scores: list[float] = []  # of the nodes behind the drawn ones
        for view, chances in candidates:
            places: list[int] = []
            for parent, token, chance in zip(view.tree.parents, view.tokens, chances, strict=True):
                node = self._node(places[parent] if parent >= 0 else -1, token)
                places.append(node)
                if node - drawn == len(scores):
                    scores.append(chance)
                elif node >= drawn:
                    scores[node - drawn] = max(scores[node - drawn], chance)
            view.places = places
        if len(scores) > room:
            self._keep(drawn, sorted(range(len(scores)), key=lambda n: -scores[n])[:room])
            for view, _ in candidates:
                moved = {(p, t): n for n, (p, t) in enumerate(self._pairs())}
                view.places = list(_walk(view, moved))
        self.draws += [(node, Law("point")) for node in range(drawn, len(self.tokens))]

    def _keep(self, drawn: int, some: Items[int]) -> None:
        """Drops the nodes behind the drawn ones but for these; parents of those are among them,
        since none is likelier than its parent and sorting leaves equal ones in order."""
        moved = {-1: -1, **{node: node for node in range(drawn)}}
        for node in sorted(some):
            moved[drawn + node] = len(moved) - 1
        old = list(self._pairs())
        self.tokens, self.parents = self.tokens[:drawn], self.parents[:drawn]
        for node in sorted(some):
            parent, token = old[drawn + node]
            self.tokens.append(token)
            self.parents.append(moved[parent])

    def _pairs(self) -> Iterator[tuple[int, int]]:
        return zip(self.parents, self.tokens, strict=True)

    def tree(self, device: torch.device) -> TokenTree:
        if not self.tokens:
            return TokenTree.empty(device)
        tokens = torch.tensor(self.tokens, dtype=torch.long, device=device)
        laws = None if not self._laws else torch.cat(self._laws)
        points = tuple((node, Law("point")) for node in range(len(self.tokens)))
        draws = tuple(self.draws)
        # draws of one point mass per node go without saying
        return TokenTree(tokens, tuple(self.parents), laws, None if draws == points else draws)


def _walk(view: _View, index: Mapping[tuple[int, int], int]) -> Iterator[int]:
    """Each node's number in `index`, -1 where it or a node above it is not there."""
    places: list[int] = []
    for parent, token in zip(view.tree.parents, view.tokens, strict=True):
        above = places[parent] if parent >= 0 else -1
        places.append(-1 if parent >= 0 and above < 0 else index.get((above, token), -1))
        yield places[-1]


def _draws(tree: TokenTree) -> tuple[tuple[int, Law], ...]:
    if tree.draws is not None:
        return tree.draws
    drawn = tree.laws is not None
    return tuple((i, Law("iid", i) if drawn else Law("point")) for i in range(len(tree)))
