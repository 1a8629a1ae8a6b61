"""Exact laws by enumeration: every branch of drafting and verifying on toy tables, no sampling.

An experiment is a rule, a tree shape, a way of drafting and the tables of a toy target and two toy
drafts over V = 3 tokens. Its law is summed over all outcomes of all draws and coins, in fractions
(differences are then exactly 0) or in floats. The tables depend on the last token alone, so the law
of one iteration is computed once per last token and iterations are chained.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol

from specdec.acceptance import reference

V = 3
START = 0  # the token that the text begins after

Probability = Any  # float or Fraction
Law = Sequence[Probability]
Tokens = tuple[int, ...]
Joint = dict[Tokens, Probability]
Verify = Callable[[Any, Any], Sequence[int]]  # (root, rng) -> emitted tokens

SHAPES: dict[str, tuple[int, ...]] = {
    "chain 3": (1, 1, 1),
    "chain 4": (1, 1, 1, 1),
    "[2,1]": (2, 1),
    "[2,2]": (2, 2),
    "[3,1]": (3, 1),
    "[2,1,1]": (2, 1, 1),
}
TABLES = (
    "generic", "correlated", "q == p", "one-hot p", "one-hot q", "truncated p", "truncated q",
    "truncated p and q", "disjoint",
)  # fmt: skip
CHAIN_RULES = ("token", "block")
TREE_RULES = ("recursive", "traversal", "walk", "greedy")
ENUMERATED_RULES = (*CHAIN_RULES, *TREE_RULES, "kseq")


# Tables


@dataclass(frozen=True)
class Tables:
    """The next-token laws of the target and of two drafts, by last token."""

    target: tuple[Law, ...]
    drafts: tuple[tuple[Law, ...], tuple[Law, ...]]

    def as_floats(self) -> "Tables":
        def convert(laws: Sequence[Law]) -> tuple[Law, ...]:
            return tuple(tuple(float(x) for x in law) for law in laws)

        return Tables(convert(self.target), (convert(self.drafts[0]), convert(self.drafts[1])))


@lru_cache(maxsize=32)
def make_tables(name: str, seed: int) -> Tables:
    """Seeded tables in fractions with small denominators, so that ties happen too."""
    rng = random.Random(f"{name} {seed}")
    rows = [_make_row(name, rng) for _ in range(V)]
    target, first, second = zip(*rows, strict=True)
    return Tables(target, (first, second))


def _make_row(name: str, rng: random.Random) -> tuple[Law, Law, Law]:
    p, q, r = (_random_law(rng) for _ in range(3))
    some = rng.sample(range(V), V)
    if name == "correlated":
        q, r = _mix(p, q), _mix(p, r)
    elif name == "q == p":
        q = r = p
    elif name == "disjoint":
        return _restrict(p, some[:1]), _restrict(q, some[1:]), _restrict(r, some[1:])
    if name == "one-hot p":
        p = _restrict(p, some[:1])
    if name == "one-hot q":
        q, r = _restrict(q, some[1:2]), _restrict(r, some[2:])
    if name in ("truncated p", "truncated p and q"):
        p = _restrict(p, some[:2])
    if name in ("truncated q", "truncated p and q"):
        q, r = _restrict(q, some[1:]), _restrict(r, some[::2])
    return p, q, r


def _random_law(rng: random.Random) -> Law:
    cuts = sorted(rng.sample(range(1, 12), V - 1))
    return tuple(Fraction(b - a, 12) for a, b in itertools.pairwise([0, *cuts, 12]))


def _mix(p: Law, q: Law) -> Law:
    return tuple((3 * a + 2 * b) / 5 for a, b in zip(p, q, strict=True))


def _restrict(law: Law, keep: Sequence[int]) -> Law:
    return without(law, set(range(V)) - set(keep))


def without(law: Law, tokens: set[int]) -> Law:
    """law with these tokens taken out and the rest scaled up; all zero where nothing is left."""
    rest = [0 * x if t in tokens else x for t, x in enumerate(law)]
    total = sum(rest)
    return tuple(x / total for x in rest) if total > 0 else tuple(rest)


def point(token: int, like: Law) -> Law:
    """The point mass at token, in the numbers of `like`."""
    one = type(like[0])(1)
    return tuple(one if t == token else 0 * one for t in range(len(like)))


# Enumeration


class Rng(Protocol):
    def draw(self, weights: Law) -> int: ...


class Choice(NamedTuple):
    taken: int
    options: int
    before: Probability  # of the branch, up to here


class Replay:
    """Follows a path of choices and takes the first option from its end on; `leaves` visits all.

    draw() is for drafts. categorical() only picks a token when `pick` is set: the extra token of
    most rules decides nothing any more, so its law is kept whole in `extra` and -1 is returned.
    """

    def __init__(self, path: list[Choice], pick: bool) -> None:
        self.path, self.pick = path, pick
        self.probability: Probability = 1
        self.extra: Law | None = None
        self._depth, self._last = 0, len(path) - 1

    def choose(self, weights: Law, total: Probability = 1) -> int:
        """The index of one of the weights, which sum to total."""
        options = [i for i, weight in enumerate(weights) if weight]
        if len(options) == 1:
            return options[0]
        depth, self._depth = self._depth, self._depth + 1
        if depth > self._last:
            self.path.append(Choice(0, len(options), self.probability))
        taken = options[self.path[depth].taken]
        if depth >= self._last:  # what the path repeats was multiplied by an earlier branch
            self.probability = self.path[depth].before * weights[taken]
            if total != 1:
                self.probability = self.probability / total
        return taken

    def draw(self, weights: Law) -> int:
        return self.choose(weights)

    def bernoulli(self, p: Probability) -> bool:
        assert 0 <= p <= 1, p
        return self.choose((p, 1 - p)) == 0

    def categorical(self, weights: Law) -> int:
        assert self.extra is None, "drawn after the extra token"
        assert min(weights) >= 0, weights
        if self.pick:
            return self.choose(weights, sum(weights))
        self.extra = weights
        return -1

    def gumbel(self, position: int) -> Sequence[float]:
        raise AssertionError(f"no enumerated Gumbel noise at {position}")


def leaves(run: Callable[[Replay], Sequence[int]], *, pick: bool = True) -> Joint:
    """The exact law of run's result."""
    law: Joint = defaultdict(int)
    path = list[Choice]()
    while True:
        rng = Replay(path, pick)
        out = tuple(run(rng))
        if rng.extra is None:
            law[out] += rng.probability
        else:
            scale = rng.probability / sum(rng.extra)
            for token, weight in enumerate(rng.extra):
                if weight:
                    law[(*out[:-1], token)] += scale * weight
        while path and path[-1].taken + 1 == path[-1].options:
            path.pop()
        if not path:
            break
        path[-1] = path[-1]._replace(taken=path[-1].taken + 1)
    assert abs(sum(law.values()) - 1) < 1e-12, "the branches do not add up to one"
    return law


# Drafting


class Node:
    """A node whose proposals are drawn when they are first looked at.

    Draws do not depend on the verifier's coins, so the joint law is that of a tree drawn first. The
    public `verify` looks at every node before it decides anything; a bare definition does not,
    which spares the branches below rejected siblings.
    """

    def __init__(self, p: Law, expand: Callable[[], list[tuple[int, Law, "Node"]]]) -> None:
        self.p, self._expand = p, expand
        self._proposals: list[tuple[int, Law, Node]] | None = None

    @property
    def proposals(self) -> list[tuple[int, Law, "Node"]]:
        if self._proposals is None:
            self._proposals = self._expand()
        return self._proposals


@dataclass(frozen=True)
class Place:
    """Where siblings are drawn."""

    last: int  # the token of their parent
    depth: int  # of their parent
    width: int  # how many the shape wants
    confidence: Probability  # what the parent's own law gave it; 1 at the root


Draw = Callable[[Tables, Place, Rng], list[tuple[int, Law]]]  # (token, law) in draw order
Grow = Callable[[tuple[int, ...], Tables, int, Rng], Node]


def by_node(draw: Draw) -> Grow:
    """Trees whose nodes draw their children one node at a time."""

    def grow(shape: tuple[int, ...], tables: Tables, last: int, rng: Rng) -> Node:
        def node(last: int, depth: int, confidence: Probability) -> Node:
            def expand() -> list[tuple[int, Law, Node]]:
                if depth == len(shape):
                    return []
                drawn = draw(tables, Place(last, depth, shape[depth], confidence), rng)
                children = {x: node(x, depth + 1, q[x]) for x, q in drawn}
                return [(x, q, children[x]) for x, q in drawn]

            return Node(tables.target[last], expand)

        return node(last, 0, 1)

    return grow


def draw_iid(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
    q = tables.drafts[0][place.last]
    return [(rng.draw(q), q) for _ in range(place.width)]


def draw_without_replacement(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
    """No more siblings than the law has tokens."""
    drawn = list[tuple[int, Law]]()
    q = tables.drafts[0][place.last]
    for _ in range(min(place.width, sum(x > 0 for x in q))):
        left = without(q, {x for x, _ in drawn})
        drawn.append((rng.draw(left), left))
    return drawn


def best_tokens(q: Law, count: int) -> list[int]:
    return sorted(range(V), key=lambda t: -q[t])[:count]


def draw_deterministic(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
    del rng
    q = tables.drafts[0][place.last]
    return [(x, point(x, q)) for x in best_tokens(q, place.width)]


def draw_several(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
    """Two drafts in turn: over the siblings, and on a chain over the depths."""
    turn = place.depth if place.width == 1 else 0
    laws = [tables.drafts[(turn + j) % 2][place.last] for j in range(place.width)]
    return [(rng.draw(q), q) for q in laws]


def draw_mixed(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
    """All but one sibling deterministic, the last drawn from the rest; on a chain by turns."""
    if place.width == 1:
        return (draw_deterministic if place.depth % 2 else draw_iid)(tables, place, rng)
    q = tables.drafts[0][place.last]
    fixed = best_tokens(q, place.width - 1)
    drawn = [(x, point(x, q)) for x in fixed]
    left = without(q, set(fixed))
    if sum(left) > 0:
        drawn.append((rng.draw(left), left))
    return drawn


def grow_merged(drafts: int) -> Grow:
    """Whole sequences, as many as the root has children (a chain: two), drawn by `drafts` drafts in
    turn and merged by path; a token drawn twice is two proposals of one node. The first is as long
    as the shape is deep, the others have two tokens."""

    def grow(shape: tuple[int, ...], tables: Tables, last: int, rng: Rng) -> Node:
        def node(last: int, depth: int, members: list[int]) -> Node:
            def expand() -> list[tuple[int, Law, Node]]:
                alive = [i for i in members if depth < (2 if i else len(shape))]
                laws = [tables.drafts[i % drafts][last] for i in alive]
                tokens = [rng.draw(q) for q in laws]
                through = {x: [i for i, y in zip(alive, tokens, strict=True) if x == y]
                           for x in tokens}  # fmt: skip
                children = {x: node(x, depth + 1, those) for x, those in through.items()}
                return [(x, q, children[x]) for x, q in zip(tokens, laws, strict=True)]

            return Node(tables.target[last], expand)

        return node(last, 0, list(range(max(shape[0], 2))))

    return grow


DRAFTS: dict[str, Grow] = {
    "iid": by_node(draw_iid),
    "without replacement": by_node(draw_without_replacement),
    "deterministic": by_node(draw_deterministic),
    "several drafts": by_node(draw_several),
    "merged": grow_merged(2),
    "mixed": by_node(draw_mixed),
    "merged, one draft": grow_merged(1),
}


def is_valid(rule: str, shape: str, draft: str) -> bool:
    """Whether the rule judges such trees, and the matrix has such a cell."""
    chain = shape.startswith("chain") and not draft.startswith("merged")
    if rule in CHAIN_RULES:
        return chain
    if rule == "kseq":
        return chain or draft in ("iid", "merged, one draft")
    return draft != "merged, one draft"


# Laws of the text


def one_iteration(
    verify: Verify, grow: Grow, shape: tuple[int, ...], tables: Tables, last: int, *, pick: bool
) -> Joint:
    """The exact law of what one iteration emits after `last`."""
    return leaves(lambda rng: verify(grow(shape, tables, last, rng), rng), pick=pick)


def chained(steps: Sequence[Callable[[int], Joint]], tokens: int) -> Joint:
    """The joint law of the first tokens when iteration i has the law steps[i](last token); the last
    of the steps is repeated."""

    @cache
    def cut(i: int, last: int, length: int) -> Joint:
        law: Joint = defaultdict(int)
        for emitted, mass in steps[i](last).items():
            law[emitted[:length]] += mass
        return law

    done, current = Joint(), Joint({(): 1})
    for i in itertools.count():
        following: Joint = defaultdict(int)
        for text, mass in current.items():
            last = text[-1] if text else START
            for emitted, p in cut(min(i, len(steps) - 1), last, tokens - len(text)).items():
                longer = text + emitted
                into = done if len(longer) == tokens else following
                into[longer] = into.get(longer, 0) + mass * p
        if not following:
            return done
        current = following
    raise AssertionError


def plain_decoding(laws: Sequence[Law]) -> Callable[[int], Joint]:
    """An iteration that emits one token of these laws."""
    return lambda last: {(x,): p for x, p in enumerate(laws[last]) if p > 0}


class Comparison(NamedTuple):
    """The joint law of the first depth + 2 tokens: from two iterations, the target alone behind
    them, and from plain decoding."""

    ours: Joint
    target: Joint

    @property
    def error(self) -> Probability:
        """max |ours - target|"""
        return max(abs(a - b) for a, b in self._pairs())

    @property
    def total_variation(self) -> float:
        return float(sum(abs(a - b) for a, b in self._pairs())) / 2

    def _pairs(self) -> list[tuple[Probability, Probability]]:
        texts = self.ours.keys() | self.target.keys()
        return [(self.ours.get(text, 0), self.target.get(text, 0)) for text in texts]


def iteration_laws(
    verify: Verify, grow: Grow, shape: tuple[int, ...], tables: Tables, *, pick: bool = True
) -> list[Joint]:
    """What one iteration emits, by last token."""
    return [
        one_iteration(verify, grow, shape, tables, last, pick=pick) for last in range(V)
    ]  # fmt: skip


def compare_laws(laws: Sequence[Joint], wanted: Sequence[Law], depth: int) -> Comparison:
    """laws: of an iteration, wanted: of plain decoding, both by last token."""
    speculative, plain, tokens = laws.__getitem__, plain_decoding(wanted), depth + 2
    return Comparison(chained([speculative, speculative, plain], tokens), chained([plain], tokens))


def compare(verify: Verify, grow: Grow, shape: tuple[int, ...], tables: Tables) -> Comparison:
    """Any verifier on any draft against the target."""
    laws = iteration_laws(verify, grow, shape, tables)
    return compare_laws(laws, tables.target, len(shape))


def accepted_tokens(iteration: Joint) -> Probability:
    """Expected number of accepted tokens: all but one of the emitted."""
    return sum((len(emitted) - 1) * mass for emitted, mass in iteration.items())


def expected_accepted(
    verify: Verify, grow: Grow, shape: tuple[int, ...], tables: Tables
) -> Probability:
    """How many drafted tokens an iteration after START accepts."""
    return accepted_tokens(one_iteration(verify, grow, shape, tables, START, pick=True))


def rule(name: str, *, public: bool = True) -> Verify:
    """public: `verify`, which sees and checks the whole tree before it decides; else the bare
    definition."""

    def verify(root: Any, rng: Any) -> list[int]:
        definition = reference.DEFINITIONS[name]
        return reference.verify(name, root, rng) if public else definition(root, rng)

    return verify


def rule_laws(
    name: str, shape: str, draft: str, tables: Tables, *, public: bool = True
) -> list[Joint]:
    """One cell of the matrix: what an iteration emits, by last token."""
    pick = name in ("greedy", "walk")  # their tokens decide
    verify = rule(name, public=public)
    return iteration_laws(verify, DRAFTS[draft], SHAPES[shape], tables, pick=pick)


def promised(name: str, tables: Tables) -> Sequence[Law]:
    """What plain decoding samples from: the target's laws; for greedy their argmax."""
    if name != "greedy":
        return tables.target
    return [point(best_tokens(p, 1)[0], p) for p in tables.target]


def compare_rule(
    name: str, shape: str, draft: str, tables: Tables, *, public: bool = True
) -> Comparison:
    laws = rule_laws(name, shape, draft, tables, public=public)
    return compare_laws(laws, promised(name, tables), len(SHAPES[shape]))
