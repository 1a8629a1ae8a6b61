"""The definition of each acceptance rule, in plain Python on floats or fractions.

A node has `.p`, the target's law there, and `.proposals`, a list of (token, q, child) in draw
order, q being the law that token was drawn from given everything drawn before it. Written for
reading and for exact enumeration; batched.py is what runs.
"""

from collections.abc import Callable, Sequence
from math import inf, log
from typing import Any, Protocol

from specdec.errors import InvalidArgumentError, InvalidLawError

Probability = Any  # float or fractions.Fraction
_TOLERANCE = 1e-6


class Node(Protocol):
    """A scored row of the tree."""

    @property
    def p(self) -> Sequence[Probability]: ...

    @property
    def proposals(self) -> Sequence[tuple[int, Sequence[Probability], "Node"]]: ...


class Random(Protocol):
    """Where decisions come from: enumerated, recorded or drawn.

    An rng that also has at(node, purpose, proposal) -> rng is asked through it, so that recorded
    numbers are addressed by what they decide and not by the order of the calls.
    """

    def categorical(self, weights: Sequence[Probability]) -> int: ...

    def bernoulli(self, p: Probability) -> bool: ...

    def gumbel(self, position: int) -> Sequence[float]: ...


def verify(
    rule: str, root: Node, rng: Random, *, lossy: bool = False, **params: float
) -> list[int]:
    """The emitted tokens: the accepted path and exactly one extra token.

    Raises InvalidLawError where a law does not sum to one, holds NaN or a negative entry, gives a
    drafted token no mass, or where the tree is not one that the rule is defined for.
    """
    if rule not in _RULES:
        raise InvalidArgumentError(f"rule={rule!r}: expected one of {', '.join(sorted(_RULES))}")
    if params:
        raise InvalidArgumentError(f"rule {rule!r} takes no parameter {sorted(params)[0]!r}")
    del lossy  # every rule here is lossless
    _check(rule, root)
    return _RULES[rule](root, rng)


def _greedy(root: Node, rng: Random) -> list[int]:
    """Follow the target's lowest-index argmax."""
    del rng
    return _follow(root, lambda node, _: _argmax(node.p))


def _gumbel(root: Node, rng: Random) -> list[int]:
    """Plain sampling by argmax(log p + G), following the children that agree (2408.07978)."""

    def choose(node: Node, depth: int) -> int:
        noise = rng.gumbel(depth)
        scores = [_log(p) + g for p, g in zip(node.p, noise, strict=True)]
        return _argmax(scores)

    return _follow(root, choose)


def _follow(root: Node, choose: Callable[[Node, int], int]) -> list[int]:
    node, out = root, list[int]()
    while True:
        out.append(choose(node, len(out)))
        child = next((c for token, _, c in node.proposals if token == out[-1]), None)
        if child is None:
            return out
        node = child


def _token(root: Node, rng: Random) -> list[int]:
    """Token-wise speculative sampling (Leviathan et al. 2023, 2211.17192; Chen et al. 2023)."""
    node, out = root, list[int]()
    while node.proposals:
        x, q, child = node.proposals[0]
        if not _at(rng, len(out) + 1, "accept").bernoulli(_at_most_one(node.p[x] / q[x])):
            return [*out, _residual(node.p, q, 1, rng, len(out))]
        out.append(x)
        node = child
    return [*out, _at(rng, len(out), "bonus").categorical(node.p)]


def _block(root: Node, rng: Random) -> list[int]:
    """Block verification (Sun et al. 2024, 2403.10444): the largest accepted prefix."""
    nodes, drafted = _chain(root)
    length = len(drafted)
    weights: list[Probability] = [1]
    for node, (x, q) in zip(nodes, drafted, strict=False):
        weights.append(_at_most_one(weights[-1] * node.p[x] / q[x]))
    tau = 0
    for i in range(1, length + 1):
        accept = weights[i]
        if i < length:
            mass = sum(_residual_weights(nodes[i].p, drafted[i][1], weights[i]))
            slack = mass + (1 - weights[i])
            accept = mass / slack if slack > 0 else 1
        if _at(rng, i, "accept").bernoulli(accept):
            tau = i  # no early break: the coins are independent and the largest success counts
    out = [x for x, _ in drafted[:tau]]
    if tau == length:
        return [*out, _at(rng, tau, "bonus").categorical(nodes[tau].p)]
    return [*out, _residual(nodes[tau].p, drafted[tau][1], weights[tau], rng, tau)]


_RULES: dict[str, Callable[[Node, Random], list[int]]] = {
    "block": _block,
    "greedy": _greedy,
    "gumbel": _gumbel,
    "token": _token,
}


def _chain(root: Node) -> tuple[list[Node], list[tuple[int, Sequence[Probability]]]]:
    nodes, drafted = [root], list[tuple[int, Sequence[Probability]]]()
    while nodes[-1].proposals:
        x, q, child = nodes[-1].proposals[0]
        drafted.append((x, q))
        nodes.append(child)
    return nodes, drafted


def _residual(
    p: Sequence[Probability], q: Sequence[Probability], weight: Probability, rng: Random, row: int
) -> int:
    """Draws from [weight * p - q]+; from p where rounding left nothing of it."""
    weights = _residual_weights(p, q, weight)
    return _at(rng, row, "residual").categorical(weights if sum(weights) > 0 else p)


def _residual_weights(
    p: Sequence[Probability], q: Sequence[Probability], weight: Probability
) -> list[Probability]:
    return [max(weight * a - b, 0) for a, b in zip(p, q, strict=True)]


def _at_most_one(x: Probability) -> Probability:
    return min(x, 1)


def _at(rng: Random, node: int, purpose: str) -> Random:
    """The rng of one decision; node counts rows along the path, the root being 0."""
    at: Callable[[int, str, int], Random] | None = getattr(rng, "at", None)
    return rng if at is None else at(node, purpose, 0)


def _argmax(values: Sequence[Probability]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))


def _log(p: Probability) -> float:
    return log(p) if p > 0 else -inf


def _check(rule: str, root: Node) -> None:
    """Refuses laws and trees that the rule is not defined for. greedy and gumbel never read q, so
    there it may be None; a q that is given must be a law that the drafted token has mass in."""
    chains_only = rule in ("token", "block")
    size = len(root.p)
    pending: list[tuple[str, Node]] = [("root", root)]
    seen = {id(root)}  # duplicate siblings share their child
    while pending:
        name, node = pending.pop()
        _check_law(rule, name, "the target's law", node.p, size)
        if chains_only and len(node.proposals) > 1:
            raise InvalidLawError(rule, name, f"{len(node.proposals)} children; it judges chains")
        for token, q, child in node.proposals:
            below = f"{name}/{token}"
            if not 0 <= token < size:
                raise InvalidLawError(rule, below, f"token {token} is not in 0..{size - 1}")
            if chains_only or q is not None:
                _check_law(rule, below, "the draft's law", q, size)
                if not q[token] > 0:
                    raise InvalidLawError(rule, below, "the drafted token has no mass in its law q")
            if id(child) not in seen:
                seen.add(id(child))
                pending.append((below, child))


def _check_law(rule: str, node: str, what: str, law: Sequence[Probability], size: int) -> None:
    if len(law) != size:
        raise InvalidLawError(rule, node, f"{what} has length {len(law)}, the root's has {size}")
    if any(not x >= 0 for x in law):  # NaN fails every comparison
        raise InvalidLawError(rule, node, f"{what} has a negative or NaN entry")
    if not abs(sum(law) - 1) <= _TOLERANCE:
        raise InvalidLawError(rule, node, f"{what} sums to {float(sum(law)):.6g}, not 1")
