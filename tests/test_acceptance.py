"""Every rule emits the target's law: by exact enumeration, in floats and in fractions, with wrong
variants that must turn red."""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import pytest

from specdec.acceptance import RULES, reference
from specdec.errors import InvalidArgumentError, InvalidLawError

Law = Sequence[Any]  # of floats or of fractions
Context = tuple[int, ...]
Tables = dict[int, tuple[Law, Law]]  # last token -> (p, q); -1 before the first
Verify = Callable[["Node", Any], list[int]]

V = 3
SHAPES = ["generic", "correlated", "equal", "one-hot p", "one-hot q", "truncated", "disjoint"]
CHAIN_RULES = ["token", "block"]


@dataclass(eq=False)
class Node:
    p: Law
    proposals: list[tuple[int, Any, "Node"]] = field(default_factory=list)


class Replay:
    """Forces a prefix of choices, then takes the first; `leaves` visits every branch."""

    def __init__(self, forced: list[int]) -> None:
        self.forced, self.choices, self.probability = forced, list[tuple[int, int]](), Fraction(1)

    def _choose(self, weights: Sequence[Any]) -> int:
        options = [i for i, weight in enumerate(weights) if weight > 0]
        depth = len(self.choices)
        at = self.forced[depth] if depth < len(self.forced) else 0
        self.choices.append((at, len(options)))
        self.probability = self.probability * weights[options[at]] / sum(weights)
        return options[at]

    def categorical(self, weights: Law) -> int:
        return self._choose(weights)

    def bernoulli(self, p: Any) -> bool:
        assert 0 <= p <= 1
        return self._choose([p, 1 - p]) == 0

    def gumbel(self, position: int) -> Sequence[float]:
        raise AssertionError(position)


def leaves(run: Callable[[Any], Context]) -> dict[Context, Any]:
    """The exact law of run's result."""
    law: dict[Context, Any] = defaultdict(int)
    forced: list[int] = []
    while True:
        rng = Replay(forced)
        law[run(rng)] += rng.probability
        forced = [at for at, _ in rng.choices]
        while forced and forced[-1] + 1 == rng.choices[len(forced) - 1][1]:
            forced.pop()
        if not forced:
            break
        forced[-1] += 1
    assert abs(sum(law.values()) - 1) < 1e-12
    return law


def random_law(rng: random.Random) -> list[Fraction]:
    weights = [rng.randrange(1, 30) for _ in range(V)]
    return [Fraction(w, sum(weights)) for w in weights]


def restricted(law: Law, keep: Sequence[int]) -> list[Fraction]:
    total = sum(law[i] for i in keep)
    return [law[i] / total if i in keep else Fraction(0) for i in range(len(law))]


def make_tables(shape: str, seed: int, number: type) -> Tables:
    """A toy target and draft whose laws depend on the last token."""
    rng = random.Random(f"{shape} {seed}")
    tables: Tables = {}
    for last in range(-1, V):
        p, q = random_law(rng), random_law(rng)
        some = rng.sample(range(V), V)
        if shape == "correlated":
            q = [Fraction(3, 5) * a + Fraction(2, 5) * b for a, b in zip(p, q, strict=True)]
        elif shape == "equal":
            q = p
        elif shape == "one-hot p":
            p = restricted(p, some[:1])
        elif shape == "one-hot q":
            q = restricted(q, some[:1])
        elif shape == "truncated":
            p, q = restricted(p, some[:2]), restricted(q, some[1:])
        elif shape == "disjoint":
            p, q = restricted(p, some[:1]), restricted(q, some[1:])
        tables[last] = ([number(x) for x in p], [number(x) for x in q])
    return tables


def draft_chain(tables: Tables, last: int, length: int, rng: Any) -> Node:
    root = node = Node(tables[last][0])
    for _ in range(length):
        q = tables[last][1]
        last = rng.categorical(q)
        child = Node(tables[last][0])
        node.proposals = [(last, q, child)]
        node = child
    return root


def two_steps(tables: Tables, length: int, verify: Verify, tokens: int) -> dict[Context, Any]:
    """The law of the first `tokens` tokens: two iterations, then the target alone."""

    def step(last: int) -> dict[Context, Any]:
        def run(rng: Any) -> Context:
            return tuple(verify(draft_chain(tables, last, length, rng), rng))

        return leaves(run)

    laws = {last: step(last) for last in tables}
    current: dict[Context, Any] = {(): 1}
    for iteration in range(2 + tokens):
        following: dict[Context, Any] = defaultdict(int)
        for context, mass in current.items():
            last = context[-1] if context else -1
            alone = {(x,): p for x, p in enumerate(tables[last][0])}
            if len(context) >= tokens:
                following[context[:tokens]] += mass
                continue
            for emitted, p in (laws[last] if iteration < 2 else alone).items():
                following[(context + emitted)[:tokens]] += mass * p
        current = following
    return current


def target_law(tables: Tables, tokens: int) -> dict[Context, Any]:
    law: dict[Context, Any] = {}
    for context in itertools.product(range(V), repeat=tokens):
        mass: Any = 1
        for last, x in zip((-1, *context), context, strict=False):
            mass = mass * tables[last][0][x]
        law[context] = mass
    return law


def worst(a: dict[Context, Any], b: dict[Context, Any]) -> Any:
    return max(abs(a.get(k, 0) - b.get(k, 0)) for k in a.keys() | b.keys())


def total_variation(a: dict[Context, Any], b: dict[Context, Any]) -> float:
    return float(sum(abs(a.get(k, 0) - b.get(k, 0)) for k in a.keys() | b.keys())) / 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_committed_tokens_follow_the_target(rule: str, length: int, shape: str) -> None:
    verify = partial(reference.verify, rule)
    for seed in range(1 if length == 4 else 3):
        tables = make_tables(shape, seed, float)
        law = two_steps(tables, length, verify, length + 2)
        assert worst(law, target_law(tables, length + 2)) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_committed_tokens_follow_the_target_exactly(rule: str, length: int, shape: str) -> None:
    tables = make_tables(shape, 7, Fraction)
    law = two_steps(tables, length, partial(reference.verify, rule), length + 2)
    assert worst(law, target_law(tables, length + 2)) == 0


@pytest.mark.parametrize(
    ("rule", "expected"), [("token", Fraction(10, 9)), ("block", Fraction(11, 9))]
)
def test_expected_accepted_of_the_worked_example(rule: str, expected: Fraction) -> None:
    p, q = [Fraction(1, 3), Fraction(2, 3)], [Fraction(2, 3), Fraction(1, 3)]
    tables: Tables = dict.fromkeys(range(-1, 2), (p, q))

    def run(rng: Any) -> Context:
        return tuple(reference.verify(rule, draft_chain(tables, -1, 2, rng), rng))

    assert sum((len(out) - 1) * mass for out, mass in leaves(run).items()) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_block_accepts_no_less_than_token(shape: str) -> None:
    tables = make_tables(shape, 3, Fraction)

    def accepted(rule: str) -> Any:
        def run(rng: Any) -> Context:
            return tuple(reference.verify(rule, draft_chain(tables, -1, 3, rng), rng))

        return sum((len(out) - 1) * mass for out, mass in leaves(run).items())

    assert accepted("block") >= accepted("token")


def positive_part(p: Law, q: Law, weight: Any = 1) -> list[Any]:
    return [max(weight * a - b, 0) for a, b in zip(p, q, strict=True)]


def draw(weights: Law, otherwise: Law, rng: Any) -> int:
    return int(rng.categorical(weights if sum(weights) > 0 else otherwise))


def wrong_token(root: Node, rng: Any, fault: str) -> list[int]:
    node, out = root, list[int]()
    while node.proposals:
        x, q, child = node.proposals[0]
        if fault == "law not drawn from":
            q = [a * a for a in q]
            q = [a / sum(q) for a in q]
        if not rng.bernoulli(min(node.p[x] / q[x], 1)):
            law = node.p if fault == "resample from p" else positive_part(node.p, q)
            if fault == "resample from p without x":
                law = [0 if i == x else a for i, a in enumerate(node.p)]
            return [*out, draw(law, node.p, rng)]
        out.append(x)
        node = child
    return [*out, rng.categorical(node.p)]


def wrong_block(root: Node, rng: Any, fault: str) -> list[int]:
    nodes, drafted, weights = [root], list[tuple[int, Any]](), list[Any]([1])
    while nodes[-1].proposals:
        x, q, child = nodes[-1].proposals[0]
        weight = weights[-1] * nodes[-1].p[x] / q[x]
        weights.append(weight if fault == "no clip" else min(weight, 1))
        drafted.append((x, q))
        nodes.append(child)
    if fault == "no clip":
        weights = [min(weight, 1) for weight in weights]
    tau = 0
    for i in range(1, len(nodes)):
        h = weights[i]
        if i < len(drafted) and fault != "h = w":
            mass = sum(positive_part(nodes[i].p, drafted[i][1], weights[i]))
            slack = mass + (1 - weights[i])
            if fault == "1 - q(x)":
                slack = 1 - drafted[i][1][drafted[i][0]]
            h = min(mass / slack, 1) if slack > 0 else 1
        if rng.bernoulli(h):
            tau = i
        elif fault == "early break":
            break
    out = [x for x, _ in drafted[:tau]]
    if tau == len(drafted):
        return [*out, rng.categorical(nodes[tau].p)]
    p, q = nodes[tau].p, drafted[tau][1]
    law = positive_part(p, q, 1 if fault == "[p - q]+" else weights[tau])
    return [*out, draw(p if fault == "resample from p" else law, p, rng)]


@pytest.mark.parametrize(
    ("verify", "fault"),
    [
        (wrong_token, "resample from p"),
        (wrong_token, "resample from p without x"),
        (wrong_token, "law not drawn from"),
        (wrong_block, "early break"),
        (wrong_block, "[p - q]+"),
        (wrong_block, "no clip"),
        (wrong_block, "h = w"),
        (wrong_block, "1 - q(x)"),
        (wrong_block, "resample from p"),
    ],
)
def test_wrong_variant_is_caught(verify: Callable[..., list[int]], fault: str) -> None:
    def bias(fault: str) -> float:
        return max(
            total_variation(
                two_steps(tables, 3, partial(verify, fault=fault), 4), target_law(tables, 4)
            )
            for tables in (make_tables("generic", seed, float) for seed in range(3))
        )

    assert bias(fault) > 1e-3
    assert bias("none") < 1e-12


def random_tree(rng: random.Random, tables: Tables, last: int, depth: int, width: int) -> Node:
    node = Node(tables[last][0])
    if depth:
        for x in rng.sample(range(V), rng.randrange(width + 1)):
            q = [float(i == x) for i in range(V)]
            child = random_tree(rng, tables, x, depth - 1, width)
            node.proposals.append((x, q, child))
            if rng.random() < 0.3:  # drawn twice
                node.proposals.append((x, q, child))
    return node


class Coupled:
    """Keyed noise: a row per position of the text."""

    def __init__(self, noise: list[list[float]], start: int) -> None:
        self.noise, self.start = noise, start

    def gumbel(self, position: int) -> list[float]:
        return self.noise[self.start + position]


@pytest.mark.parametrize("rule", ["greedy", "gumbel"])
@pytest.mark.parametrize("shape", SHAPES)
def test_coupled_rules_emit_the_text_of_no_speculation(rule: str, shape: str) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        tables = make_tables(shape, seed, float)
        noise = [[-math.log(-math.log(rng.random())) for _ in range(V)] for _ in range(20)]

        def plain(last: int, at: int, tables: Tables = tables, noise: Any = noise) -> int:
            score = [
                a if rule == "greedy" else (math.log(a) if a else -math.inf) + g
                for a, g in zip(tables[last][0], noise[at], strict=True)
            ]
            return score.index(max(score))

        expected, emitted = list[int](), list[int]()
        while len(emitted) < 12:
            last = emitted[-1] if emitted else -1
            root = random_tree(rng, tables, last, 3, 3)
            coupled: Any = Coupled(noise, len(emitted))
            emitted += reference.verify(rule, root, coupled)
        for at in range(len(emitted)):
            expected.append(plain(expected[-1] if expected else -1, at))
        assert emitted == expected


def test_greedy_takes_the_lowest_of_equal_probabilities() -> None:
    low, high = Node([0.5, 0.5, 0.0]), Node([0.0, 0.5, 0.5])
    root = Node([0.0, 0.5, 0.5], [(2, [0, 0, 1], high), (1, [0, 1, 0], low)])
    assert reference.verify("greedy", root, Replay([])) == [1, 0]


LEAF = Node([0.5, 0.5])


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize(
    ("root", "node", "reason"),
    [
        (Node([0.5, 0.6]), "root", "sums to 1.1"),
        (Node([0.5, math.nan]), "root", "NaN"),
        (Node([1.5, -0.5]), "root", "negative"),
        (Node([math.inf, 0.5]), "root", "sums to inf"),
        (Node([0.5, 0.5], [(1, [0.5, 0.5], Node([0.9, 0.0]))]), "root/1", "sums to 0.9"),
        (Node([0.5, 0.5], [(2, [0.5, 0.5], LEAF)]), "root/2", "token 2"),
        (Node([0.5, 0.5], [(0, [0.0, 1.0], LEAF)]), "root/0", "no mass"),
        (Node([0.5, 0.5], [(0, [0.5, 0.4], LEAF)]), "root/0", "sums to 0.9"),
        (Node([0.5, 0.5], [(0, [0.5, math.nan], LEAF)]), "root/0", "NaN"),
        (Node([0.5, 0.5], [(0, [0.5, 0.3, 0.2], LEAF)]), "root/0", "length"),
        (Node([0.5, 0.5], [(0, [0.5, 0.5], Node([1.0]))]), "root/0", "length"),
    ],
    ids=[
        "p-sum", "p-nan", "p-negative", "p-infinite", "child-p", "token", "q-zero", "q-sum",
        "q-nan", "q-length", "p-length",
    ],
)  # fmt: skip
def test_bad_law_is_refused_by_name(rule: str, root: Node, node: str, reason: str) -> None:
    coupled: Any = Coupled([[0.0, 0.0]] * 3, 0)
    with pytest.raises(InvalidLawError) as caught:
        reference.verify(rule, root, coupled, lossy=True)
    assert (caught.value.rule, caught.value.node) == (rule, node)
    assert reason in caught.value.reason
    assert rule in str(caught.value)


@pytest.mark.parametrize("rule", CHAIN_RULES)
def test_chain_rules_refuse_a_branch(rule: str) -> None:
    root = Node([0.5, 0.5], [(0, [0.5, 0.5], LEAF), (1, [0.5, 0.5], LEAF)])
    with pytest.raises(InvalidLawError, match="root"):
        reference.verify(rule, root, Replay([]))


def test_unknown_rule_and_parameter_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="block, greedy, gumbel, kseq, recursive, token"):
        reference.verify("blok", LEAF, Replay([]))
    with pytest.raises(InvalidArgumentError, match="eps"):
        reference.verify("block", LEAF, Replay([]), eps=0.1)


def test_every_rule_is_defined() -> None:
    for name, rule in RULES.items():
        assert rule.name == name
        assert rule.lossless == (name != "typical")
        coupled: Any = Coupled([[0.0, 0.0]], 0)
        coupled.categorical = lambda weights: weights.index(max(weights))
        assert len(reference.verify(name, LEAF, coupled, lossy=True)) == 1
