"""The definition of each acceptance rule, in plain Python on floats or fractions.

A node has `.p`, the target's law there, and `.proposals`, a list of (token, q, child) in draw
order, q being the law that token was drawn from given everything drawn before it. Written for
reading and for exact enumeration; batched.py is what runs.
"""

from collections.abc import Callable, Sequence
from math import exp, inf, log

from specdec.acceptance.checks import check
from specdec.acceptance.node import Node, Probability, Random, number_rows

Law = Sequence[Probability]


def verify(
    rule: str, root: Node, rng: Random, *, lossy: bool = False, **params: float
) -> list[int]:
    """The emitted tokens: the accepted path and exactly one extra token.

    Raises InvalidLawError where a law does not sum to one, holds NaN or a negative entry, gives a
    drafted token no mass, or where the tree is not one that the rule is defined for;
    InvalidArgumentError for an unknown rule or parameter, and for a lossy rule without lossy=True.
    """
    check(rule, root, lossy=lossy, params=params)
    return DEFINITIONS[rule](root, rng, **params)


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


def _walk(root: Node, rng: Random) -> list[int]:
    """Plain sampling, following the children that agree: lossless for any draft that does not see
    these coins, and as good as any rule where the draft is deterministic."""
    coins = _Coins(root, rng)
    return _follow(root, lambda node, _: coins.at(node, "bonus").categorical(node.p))


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
    coins, node, out = _Coins(root, rng), root, list[int]()
    while node.proposals:
        x, q, child = node.proposals[0]
        if not coins.at(child, "accept").bernoulli(_at_most_one(node.p[x] / q[x])):
            residual = _residual(node.p, q)
            return [*out, coins.at(node, "residual").categorical(_or(residual, node.p))]
        out.append(x)
        node = child
    return [*out, coins.at(node, "bonus").categorical(node.p)]


def _block(root: Node, rng: Random) -> list[int]:
    """Block verification (Sun et al. 2024, 2403.10444): the largest accepted prefix."""
    coins, (nodes, drafted) = _Coins(root, rng), _chain(root)
    length = len(drafted)
    weights: list[Probability] = [1]
    for node, (x, q) in zip(nodes, drafted, strict=False):
        weights.append(_at_most_one(weights[-1] * node.p[x] / q[x]))
    tau = 0
    for i in range(1, length + 1):
        accept = weights[i]
        if i < length:
            accept = _kept(sum(_residual(nodes[i].p, drafted[i][1], weights[i])), weights[i])
        if coins.at(nodes[i], "accept").bernoulli(accept):
            tau = i  # no early break: the coins are independent and the largest success counts
    out, last = [x for x, _ in drafted[:tau]], nodes[tau]
    if tau == length:
        return [*out, coins.at(last, "bonus").categorical(last.p)]
    residual = _residual(last.p, drafted[tau][1], weights[tau])
    return [*out, coins.at(last, "residual").categorical(_or(residual, last.p))]


def _recursive(root: Node, rng: Random) -> list[int]:
    """Recursive rejection sampling over the siblings of each node (SpecInfer, 2305.09781; RSD,
    2402.14160; Sequoia, 2402.12374): after a rejection the rest of p is what is still wanted."""
    coins, node, out = _Coins(root, rng), root, list[int]()
    while True:
        p, accepted = node.p, None
        for (x, q, child), copy in _copies(node):
            if coins.at(child, "accept", copy).bernoulli(_at_most_one(p[x] / q[x])):
                accepted = x, child
                break
            p = _norm(_or(_residual(p, q), p))
        if accepted is None:
            return [*out, coins.last(node).categorical(p)]
        out.append(accepted[0])
        node = accepted[1]


def _kseq(root: Node, rng: Random) -> list[int]:
    """k-SEQ (SpecTr, Sun et al. 2023, 2310.15141) for siblings that are iid from one law; works in
    floats whatever the laws are, because rho is a root of a polynomial."""
    coins, node, out = _Coins(root, rng), root, list[int]()
    while node.proposals:
        p, q, k = node.p, node.proposals[0][1], len(node.proposals)
        rho = _kseq_rho(p, q, k)
        accepted = None
        for (x, _, child), copy in _copies(node):
            if coins.at(child, "accept", copy).bernoulli(_at_most_one(p[x] / (rho * q[x]))):
                accepted = x, child
                break
        if accepted is None:
            kept = _shared(p, q, rho)
            beta = sum(kept)
            scale = (1 - (1 - beta) ** k) / beta if beta > 0 else 0
            residual = _residual(p, [scale * m for m in kept])
            return [*out, coins.last(node).categorical(_or(residual, p))]
        out.append(accepted[0])
        node = accepted[1]
    return [*out, coins.last(node).categorical(node.p)]


def _kseq_rho(p: Law, q: Law, k: int) -> float:
    """The smallest rho in [1, k] with 1 - (1 - beta)^k <= rho * beta, beta = sum min(q, p / rho);
    every larger one up to k is valid too, so the upper end of the bisection is returned."""

    def valid(rho: float) -> bool:
        beta = sum(_shared(p, q, rho))
        return bool(1 - (1 - beta) ** k <= rho * beta)

    low, high = 1.0, float(k)
    if valid(low):
        return low
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if valid(middle) else (middle, high)
    return high


def _shared(p: Law, q: Law, rho: float) -> list[Probability]:
    return [min(b, a / rho) for a, b in zip(p, q, strict=True)]


def _traversal(root: Node, rng: Random) -> list[int]:
    """Traversal verification (Weng et al. 2025, 2505.12398): leaves before their parents, depth
    first. A node is emitted with probability its weight, and what follows it is the target's."""
    coins = _Coins(root, rng)

    def visit(node: Node, weight: Probability) -> list[int] | None:
        """The tokens below this node, or None where the node itself is rejected."""
        p = node.p
        for x, q, child in node.proposals:
            entry = _at_most_one(weight * p[x] / q[x])
            # Weight 0 accepts nothing below either. So a copy of a rejected child needs no coin:
            # rejected means entry < 1, so weight * p(x) < q(x), and the residual has no x.
            if entry > 0:
                below = visit(child, entry)
                if below is not None:
                    return [x, *below]
            residual = _residual(p, q, weight)
            weight = _kept(sum(residual), weight)
            p = _norm(_or(residual, p))
        if node is not root and not coins.at(node, "accept").bernoulli(weight):
            return None  # the root's weight stays 1
        return [coins.last(node).categorical(p)]

    emitted = visit(root, 1)
    assert emitted is not None
    return emitted


def _typical(root: Node, rng: Random, eps: float = 0.09, delta: float = 0.3) -> list[int]:
    """Typical acceptance (Medusa, Cai et al. 2024, 2401.10774), lossy: the longest path of tokens
    with p(x) > min(eps, delta * exp(-entropy)); ties by the larger sum of log p, then by row.
    Medusa's code adds 1e-5 inside the entropy's logarithm; here it is the entropy."""
    coins, rows = _Coins(root, rng), number_rows(root)
    best, paths = (0, 0.0, 0), [(root, list[int](), 0.0)]
    last, out = root, list[int]()
    for node, path, score in paths:  # grows while it is read
        rank = len(path), score, -rows[id(node)]
        if rank > best:
            best, last, out = rank, node, path
        negative_entropy = sum(a * log(a) for a in node.p if a > 0)
        threshold = min(eps, delta * exp(negative_entropy))
        for (x, _, child), copy in _copies(node):
            if copy == 0 and node.p[x] > threshold:
                paths.append((child, [*path, x], score + log(node.p[x])))
    return [*out, coins.at(last, "bonus").categorical(last.p)]


DEFINITIONS: dict[str, Callable[..., list[int]]] = {
    "block": _block,
    "greedy": _greedy,
    "gumbel": _gumbel,
    "kseq": _kseq,
    "recursive": _recursive,
    "token": _token,
    "traversal": _traversal,
    "typical": _typical,
    "walk": _walk,
}


class _Coins:
    """The rng of each decision, addressed by (row, purpose, copy) where the rng can be."""

    def __init__(self, root: Node, rng: Random) -> None:
        self._rng = rng
        self._find: Callable[[int, str, int], Random] | None = getattr(rng, "at", None)
        self._rows = {} if self._find is None else number_rows(root)

    def at(self, node: Node, purpose: str, copy: int = 0) -> Random:
        if self._find is None:
            return self._rng
        return self._find(self._rows[id(node)], purpose, copy)

    def last(self, node: Node) -> Random:
        """Draws the extra token: from what its rejected proposals left, or from the leaf's law."""
        return self.at(node, "residual" if node.proposals else "bonus")


def _chain(root: Node) -> tuple[list[Node], list[tuple[int, Law]]]:
    nodes, drafted = [root], list[tuple[int, Law]]()
    while nodes[-1].proposals:
        x, q, child = nodes[-1].proposals[0]
        drafted.append((x, q))
        nodes.append(child)
    return nodes, drafted


def _copies(node: Node) -> list[tuple[tuple[int, Law, Node], int]]:
    """The proposals in draw order, each with the number of earlier ones that name its child."""
    children = [child for _, _, child in node.proposals]
    return [
        (proposal, sum(earlier is children[i] for earlier in children[:i]))
        for i, proposal in enumerate(node.proposals)
    ]


def _residual(p: Law, q: Law, weight: Probability = 1) -> list[Probability]:
    """[weight * p - q]+"""
    return [max(weight * a - b, 0) for a, b in zip(p, q, strict=True)]


def _or(weights: list[Probability], p: Law) -> Law:
    """weights, or p where rounding left nothing of them."""
    return weights if sum(weights) > 0 else p


def _norm(weights: Law) -> list[Probability]:
    total = sum(weights)
    return [a / total for a in weights]


def _kept(mass: Probability, weight: Probability) -> Probability:
    """The weight that a node keeps after a rejected proposal left `mass` of its weight."""
    slack = mass + (1 - weight)  # in this order: at weight 1 it is exactly mass
    return mass / slack if slack > 0 else 1


def _at_most_one(x: Probability) -> Probability:
    return min(x, 1)


def _argmax(values: Law) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))


def _log(p: Probability) -> float:
    return log(p) if p > 0 else -inf
