"""The drafter-invariant rule: its text is that of plain sampling with the same noise, whatever was
drafted; and the closed-form joint law of a draft and a target that share their Gumbel noise.
"""

import itertools
import random
from collections.abc import Sequence
from math import inf, log

from specdec.acceptance import reference
from specdec.evals import enumeration
from specdec.evals.enumeration import SHAPES, START, Grow, Law, Place, Rng, Tables, V, by_node

LENGTH = 8  # tokens per text
_SHARED = "shared noise"
DRAFTS = (*enumeration.DRAFTS, _SHARED)


class Noise:
    """Gumbel noise by absolute position, and the uniforms of drafts that ignore it."""

    def __init__(self, seed: str) -> None:
        rng = random.Random(seed)
        depth = max(len(shape) for shape in SHAPES.values())
        self.rows = [
            [-log(rng.expovariate(1)) for _ in range(V)] for _ in range(LENGTH + 2 * depth)
        ]
        self.start = 0  # position of the token that follows the root
        self._rng = rng

    def gumbel(self, position: int) -> Sequence[float]:
        return self.rows[self.start + position]

    def draw(self, weights: Law) -> int:
        return self._rng.choices(range(len(weights)), weights)[0]

    def categorical(self, weights: Law) -> int:
        raise AssertionError(weights)

    def bernoulli(self, p: float) -> bool:
        raise AssertionError(p)


def best(law: Law, noise: Sequence[float], count: int = 1) -> list[int]:
    """The tokens with the largest log law + noise, in descending order."""
    scores = [(log(p) if p > 0 else -inf) + g for p, g in zip(law, noise, strict=True)]
    return sorted(range(len(law)), key=lambda t: -scores[t])[:count]


def mismatches(shape: str, draft: str, tables: str, seed: int) -> int:
    """How many of LENGTH tokens differ between speculation and plain sampling."""
    laws = enumeration.make_tables(tables, seed % 20).as_floats()
    noise = Noise(f"{shape} {draft} {tables} {seed}")
    grow = _shared_noise(noise) if draft == _SHARED else enumeration.DRAFTS[draft]
    text = [START]
    while len(text) <= LENGTH:
        noise.start = len(text) - 1
        text += reference.verify("gumbel", grow(SHAPES[shape], laws, text[-1], noise), noise)
    plain = [START]
    for row in noise.rows[: len(text) - 1]:
        plain += best(laws.target[plain[-1]], row)
    return sum(a != b for a, b in zip(text, plain, strict=True))


def _shared_noise(noise: Noise) -> Grow:
    """Children are the best tokens of log q + the very noise that the target will use."""

    def draw(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
        del rng
        q = tables.drafts[0][place.last]
        tokens = best(q, noise.gumbel(place.depth), place.width)
        return [(x, enumeration.point(x, q)) for x in tokens]

    return by_node(draw)


def coupled_pair(p: Law, q: Law) -> dict[tuple[int, int], float]:
    """Pr[draft = x, target = y] when both take their argmax with the same Gumbel noise.

    With E = exp(-G) iid exponential, y is the first of a race at rates p and x of one at rates q.
    Given the winning times s and r * s, every other exponential is above max(p, q * r) * s; what is
    left is an integral over r of a rational function between the kinks p / q (Daliri, Musco and
    Suresh 2024, 2408.07978, for the diagonal).
    """
    joint = dict[tuple[int, int], float]()
    for x, y in itertools.product(range(len(p)), repeat=2):
        if not (q[x] > 0 and p[y] > 0):
            continue
        if x == y:
            joint[x, y] = 1 / sum(max(a / p[x], b / q[x]) for a, b in zip(p, q, strict=True))
            continue
        low, high = p[x] / q[x], p[y] / q[y] if q[y] > 0 else inf
        if low < high:
            joint[x, y] = p[y] * q[x] * _race(p, q, x, y, low, high)
    return joint


def _race(p: Law, q: Law, x: int, y: int, low: float, high: float) -> float:
    """The integral of (p_y + q_x r + sum over the others of max(p, q r)) ** -2 from low to high."""
    others = [(a, b) for z, (a, b) in enumerate(zip(p, q, strict=True)) if z not in (x, y)]
    kinks = sorted(a / b for a, b in others if b > 0 and low < a / b < high)
    total = 0.0
    for start, end in itertools.pairwise([low, *kinks, high]):
        middle = start + 1 if end == inf else (start + end) / 2
        flat = p[y] + sum(a for a, b in others if a >= b * middle)
        slope = q[x] + sum(b for a, b in others if a < b * middle)
        at_end = 0.0 if end == inf else 1 / (flat + slope * end)
        total += (1 / (flat + slope * start) - at_end) / slope
    return total
