"""Known mistakes of speculative decoding, planted: the exact harness must see every one of them.

Each was shipped or published somewhere, or is one step from it. `FAULTS` bias the text; `LEGAL`
look as suspicious and do not. A harness in which no fault shows proves nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from specdec.evals.enumeration import (
    DRAFTS,
    Draw,
    Grow,
    Law,
    Node,
    Place,
    Probability,
    Rng,
    Tables,
    Verify,
    best_tokens,
    by_node,
    compare,
    draw_iid,
    draw_without_replacement,
    make_tables,
    point,
    rule,
    without,
)
from specdec.evals.keyed import PURPOSES, Key

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """One way of drafting and verifying."""

    name: str
    verify: Verify
    grow: Grow
    shape: Shape
    tables: str = "generic"


def bias(variant: Variant, seed: int) -> float:
    """Total variation between its text and the target's."""
    tables = make_tables(variant.tables, seed).as_floats()
    return compare(variant.verify, variant.grow, variant.shape, tables).total_variation


# Wrong verifiers; without a fault each of them is the rule.


def token(root: Any, rng: Any, fault: str = "") -> list[int]:
    node, out = root, list[int]()
    while node.proposals:
        x, q, child = node.proposals[0]
        if fault == "another temperature":
            q = _norm([a * a for a in q])
        if not rng.bernoulli(min(node.p[x] / q[x], 1)):
            law = _positive(node.p, q)
            if fault == "resample from p":
                law = node.p
            if fault == "resample from p without x":
                law = [0 * a if i == x else a for i, a in enumerate(node.p)]
            return [*out, _draw(law, node.p, rng)]
        out.append(x)
        node = child
    return [*out, rng.categorical(node.p)]


_GREEDY = "greedy, the target not modified"


def block(root: Any, rng: Any, fault: str = "") -> list[int]:
    nodes, drafted, ratios = [root], list[tuple[int, Law]](), list[Probability]([1])
    while nodes[-1].proposals:
        x, q, child = nodes[-1].proposals[0]
        ratio = ratios[-1] * nodes[-1].p[x] / q[x]
        ratios.append(ratio if fault in ("clip at the end only", _GREEDY) else min(ratio, 1))
        drafted.append((x, q))
        nodes.append(child)
    if fault == _GREEDY:
        return _greedy_block(nodes, drafted, ratios, rng)
    weights = [min(ratio, 1) for ratio in ratios]
    tau = 0
    for i in range(1, len(nodes)):
        if rng.bernoulli(_block_chance(nodes, drafted, weights[i], i, fault)):
            tau = i
        elif fault == "early break":
            break
    out = [x for x, _ in drafted[:tau]]
    if tau == len(drafted):
        return [*out, rng.categorical(nodes[tau].p)]
    p, q = nodes[tau].p, drafted[tau][1]
    law = _positive(p, q, 1 if fault == "residual [p - q]+" else weights[tau])
    return [*out, _draw(p if fault == "resample from p" else law, p, rng)]


def _greedy_block(
    nodes: list[Any], drafted: list[tuple[int, Law]], ratios: list[Probability], rng: Any
) -> list[int]:
    """What accepts most in one step; sound only where the tokens that follow a rejection are drawn
    from what is left of the target (Sun et al. 2024, 2403.10444, appendix)."""
    last = len(drafted)
    tau = next((i for i in range(last, 0, -1) if rng.bernoulli(_greedy_chance(
        nodes, drafted, ratios[i], i))), 0)  # fmt: skip
    out = [x for x, _ in drafted[:tau]]
    p = nodes[tau].p
    if tau == last:
        return [*out, rng.categorical(p)]
    return [*out, _draw(_positive(p, drafted[tau][1], ratios[tau]), p, rng)]


def _greedy_chance(
    nodes: list[Any], drafted: list[tuple[int, Law]], ratio: Probability, i: int
) -> Probability:
    if i == len(drafted):
        return min(ratio, 1)
    p, q = nodes[i].p, drafted[i][1]
    short = sum(max(b - ratio * a, 0) for a, b in zip(p, q, strict=True))
    return min(sum(_positive(p, q, ratio)) / short, 1) if short > 0 else 1


def _block_chance(
    nodes: list[Any], drafted: list[tuple[int, Law]], weight: Probability, i: int, fault: str
) -> Probability:
    if i == len(drafted) or fault == "h = w":
        return weight
    x, q = drafted[i]
    mass = sum(_positive(nodes[i].p, q, weight))
    slack = 1 - q[x] if fault == "R / (1 - q(x))" else mass + (1 - weight)
    return min(mass / slack, 1) if slack > 0 else 1


def recursive(root: Any, rng: Any, fault: str = "") -> list[int]:
    node, out = root, list[int]()
    while True:
        p, accepted = node.p, None
        for x, q, child in node.proposals:
            if rng.bernoulli(min(p[x] / q[x], 1)):
                accepted = x, child
                break
            start = node.p if fault == "residual of the original p" else p
            if fault != "no residual between siblings":
                p = _norm(_or(_positive(start, q), p))
        if accepted is None:
            return [*out, rng.categorical(node.p if fault == "resample from p" else p)]
        out.append(accepted[0])
        node = accepted[1]


def traversal(root: Any, rng: Any, fault: str = "") -> list[int]:
    def visit(node: Any, weight: Probability) -> list[int] | None:
        p = node.p
        if fault == "small p dropped":
            p = [a if a > 0.1 else 0 * a for a in p]
        for x, q, child in node.proposals:
            below = visit(child, min(weight * p[x] / q[x], 1))
            if below is not None:
                return [x, *below]
            if fault == "q restricted to the siblings":
                drawn = {y for y, _, _ in node.proposals}
                q = without(q, set(range(len(q))) - drawn)
            residual = _positive(p, q, weight)
            mass = sum(residual)
            slack = mass + (1 - weight)
            if fault == "R / (1 - q(x))":
                slack = 1 - q[x]
            if fault != "weight kept":
                weight = min(mass / slack, 1) if slack > 0 else 1
            p = _norm(_or(residual, p))
        if node is not root and not rng.bernoulli(weight):
            return None
        return [rng.categorical(p)]

    emitted = visit(root, 1)
    return [rng.categorical(root.p)] if emitted is None else emitted


# Wrong drafts: what is declared is not what was drawn, or the drawn tokens were chosen among.


def _declared(draw: Draw, declare: Callable[[Law, list[int]], Law]) -> Draw:
    """Tokens drawn as by `draw`; declare(q, earlier tokens) is said to be their law."""

    def drawn(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
        tokens = [x for x, _ in draw(tables, place, rng)]
        q = tables.drafts[0][place.last]
        return [(x, declare(q, tokens[:j])) for j, x in enumerate(tokens)]

    return drawn


def _draw_top_two(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
    q = tables.drafts[0][place.last]
    cut = without(q, set(best_tokens(q, 3)[2:]))
    return [(rng.draw(cut), cut) for _ in range(place.width)]


def _draw_best(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
    del rng
    q = tables.drafts[0][place.last]
    return [(x, point(x, q)) for x in best_tokens(q, place.width)]


def _whole_law(q: Law, earlier: list[int]) -> Law:
    del earlier
    return q


def _not_renormalised(q: Law, earlier: list[int]) -> Law:
    return [0 * a if t in earlier else a for t, a in enumerate(q)]


def _renormalised(q: Law, earlier: list[int]) -> Law:
    return without(q, set(earlier))


def _reordered(draw: Draw, order: Callable[[list[int], Law, Rng], list[int]]) -> Draw:
    def drawn(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
        q = tables.drafts[0][place.last]
        return [(x, q) for x in order([x for x, _ in draw(tables, place, rng)], q, rng)]

    return drawn


def _by_token(tokens: list[int], q: Law, rng: Rng) -> list[int]:
    del q, rng
    return sorted(tokens)


def _by_law(tokens: list[int], q: Law, rng: Rng) -> list[int]:
    del rng
    return sorted(tokens, key=lambda t: -q[t])


def _shuffled(tokens: list[int], q: Law, rng: Rng) -> list[int]:
    one = sum(q) / len(tokens)
    first = rng.draw([one] * len(tokens))
    return tokens[first:] + tokens[:first]


def _distinct(tokens: list[int], q: Law, rng: Rng) -> list[int]:
    del q, rng
    return list(dict.fromkeys(tokens))


def _best_of_two(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
    q = tables.drafts[0][place.last]
    return [(max(rng.draw(q), rng.draw(q), key=lambda t: q[t]), q)]


def _stop_instead(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
    """A drawn token that the draft is not sure of is dropped."""
    return [(x, q) for x, q in draw_iid(tables, place, rng) if q[x] >= 0.3]


def _grow_by_token_and_depth(shape: Shape, tables: Tables, last: int, rng: Rng) -> Node:
    """As many sequences as the root has children; the nodes of one token at one depth are one,
    below whichever sequence drew it first (a merge that is not by path)."""
    lists: dict[tuple[int, int], list[tuple[int, Law, Node]]] = {(0, last): []}
    above: dict[tuple[int, int], tuple[int, int]] = {}

    def node(place: tuple[int, int]) -> Node:
        return Node(tables.target[place[1]], lambda: lists[place])

    for _ in range(shape[0]):
        place = 0, last
        for depth in range(1, len(shape) + 1):
            q = tables.drafts[0][place[1]]
            below = depth, rng.draw(q)
            lists.setdefault(below, [])
            if above.setdefault(below, place) == place:
                lists[place].append((below[1], q, node(below)))
            place = below
    return node((0, last))


# Drafts that only look wrong.


def _stop_after(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
    """A token that the draft is not sure of is kept; nothing is drafted behind it."""
    return draw_iid(tables, place, rng) if place.confidence >= 0.3 else []


def _stop_before(tables: Tables, place: Place, rng: Rng) -> list[tuple[int, Law]]:
    """Nothing is drawn from a law without a clear favourite."""
    sure = max(tables.drafts[0][place.last]) >= 0.5
    return draw_iid(tables, place, rng) if sure else []


def _grow_by_level(shape: Shape, tables: Tables, last: int, rng: Rng) -> Node:
    """Two levels; how many children every node of the second has depends on the whole first."""
    q = tables.drafts[0]
    first = draw_without_replacement(tables, Place(last, 0, shape[0], 1), rng)
    width = 1 + sum(x for x, _ in first) % 2

    def child(x: int) -> Node:
        def expand() -> list[tuple[int, Law, Node]]:
            tokens = [rng.draw(q[x]) for _ in range(width)]
            leaves = {y: Node(tables.target[y], list) for y in tokens}
            return [(y, q[x], leaves[y]) for y in tokens]

        return Node(tables.target[x], expand)

    return Node(tables.target[last], lambda: [(x, law, child(x)) for x, law in first])


_IID, _WITHOUT = DRAFTS["iid"], DRAFTS["without replacement"]
_definition = partial(rule, public=False)


def _verifiers(
    verify: Callable[..., list[int]], grow: Grow, shape: Shape, *faults: str
) -> list[Variant]:
    name = verify.__name__
    return [Variant(f"{name}: {f}", partial(verify, fault=f), grow, shape) for f in faults]


def _drafts(name: str, draw: Draw, shape: Shape, *rules: str) -> list[Variant]:
    return [Variant(f"{r}: {name}", _definition(r), by_node(draw), shape) for r in rules]


_SIBLINGS = ("recursive", "traversal")

FAULTS: tuple[Variant, ...] = (
    *_verifiers(token, _IID, (1, 1), "resample from p", "resample from p without x",
                "another temperature"),
    *_verifiers(block, _IID, (1, 1, 1), "early break", "residual [p - q]+", "clip at the end only",
                "h = w", "R / (1 - q(x))", "resample from p", _GREEDY),
    *_verifiers(recursive, _IID, (2, 2), "residual of the original p",
                "no residual between siblings", "resample from p"),
    *_verifiers(traversal, _IID, (1, 1), "R / (1 - q(x))", "weight kept", "small p dropped"),
    *_verifiers(traversal, _WITHOUT, (2, 1), "weight kept", "q restricted to the siblings"),
    *_drafts("drawn from the top two, declared whole", _declared(_draw_top_two, _whole_law),
             (1, 1), "token", "block", "recursive"),
    *_drafts("law not renormalised without replacement",
             _declared(draw_without_replacement, _not_renormalised), (2, 1), *_SIBLINGS),
    *_drafts("whole law without replacement",
             _declared(draw_without_replacement, _whole_law), (2, 1), *_SIBLINGS, "kseq"),
    *_drafts("siblings sorted by token",
             _declared(_reordered(draw_without_replacement, _by_token), _renormalised), (2, 1),
             *_SIBLINGS),
    *_drafts("siblings in random order",
             _declared(_reordered(draw_without_replacement, _shuffled), _renormalised), (2, 1),
             *_SIBLINGS),
    *_drafts("iid siblings sorted by law", _reordered(draw_iid, _by_law), (2, 1), *_SIBLINGS),
    *_drafts("duplicates dropped", _reordered(draw_iid, _distinct), (2, 1), *_SIBLINGS),
    *_drafts("best of two kept", _best_of_two, (1, 1), "token", *_SIBLINGS),
    *_drafts("best tokens verified with p / q", _declared(_draw_best, _renormalised), (2, 1),
             *_SIBLINGS),
    *_drafts("unsure token dropped", _stop_instead, (1, 1), "token", "block", *_SIBLINGS),
    *(Variant(f"{r}: trees merged by token and depth", _definition(r), _grow_by_token_and_depth,
              (2, 1)) for r in _SIBLINGS),
    Variant("typical", _definition("typical"), _IID, (1, 1, 1)),
)  # fmt: skip

LEGAL: tuple[Variant, ...] = (
    *_drafts("stop after an unsure token", _stop_after, (1, 1, 1), "token", "block", *_SIBLINGS),
    *_drafts("stop before an unsure law", _stop_before, (1, 1, 1), "token", "block", *_SIBLINGS),
    *(Variant(f"{r}: widths by the level above", _definition(r), _grow_by_level, (2, 2))
      for r in (*_SIBLINGS, "walk")),
    *(Variant(f"{v.__name__}: no fault", v, _IID, (1, 1, 1)) for v in (token, block)),
    *(Variant(f"{v.__name__}: no fault", v, _WITHOUT, (2, 2)) for v in (recursive, traversal)),
)  # fmt: skip


def _position(position: int, row: int) -> tuple[int, int]:
    return position + row, 0


def _same_step(position: int, row: int) -> tuple[int, int]:
    del position
    return 0, row


def _siblings(position: int, row: int) -> tuple[int, int]:
    del row
    return position, 1


@dataclass(frozen=True)
class KeyFault:
    """Numbers of a step under another key than (tokens committed when it began, node)."""

    name: str
    keys: Mapping[str, Key]  # by purpose
    rule: str
    draft: str
    shape: Shape
    reads: Mapping[str, str] = field(default_factory=dict)  # a purpose that has another's numbers


_BACKWARD = ("block", "traversal")  # they look at later draws before they decide earlier ones

KEY_FAULTS: tuple[KeyFault, ...] = tuple(
    KeyFault(name, dict.fromkeys(purposes, key), rule, draft, shape)
    for name, purposes, key, rules, draft, shape in (
        ("everything keyed by position", PURPOSES, _position, _BACKWARD, "iid", (1, 1)),
        ("draft keyed by position", ("draft",), _position, _BACKWARD, "iid", (1, 1)),
        ("coins keyed by position", PURPOSES[1:], _position, _BACKWARD, "iid", (1, 1)),
        ("same coins in every step", ("accept",), _same_step, ("token", "block"), "iid", (1, 1)),
        ("same draft in every step", ("draft",), _same_step, ("token", "block"), "iid", (1, 1)),
        ("siblings share a coin", ("accept",), _siblings, _SIBLINGS, "without replacement", (3,)),
    )
    for rule in rules
) + tuple(
    KeyFault("the draft sees the coins", {}, rule, "iid", (1, 1), {"draft": "accept"})
    for rule in ("token", "block")
)


def _positive(p: Law, q: Law, weight: Probability = 1) -> list[Probability]:
    return [max(weight * a - b, 0) for a, b in zip(p, q, strict=True)]


def _or(weights: Sequence[Probability], p: Law) -> Law:
    return weights if sum(weights) > 0 else p


def _norm(weights: Law) -> list[Probability]:
    return [a / sum(weights) for a in weights]


def _draw(weights: Law, otherwise: Law, rng: Any) -> int:
    return int(rng.categorical(_or(weights, otherwise)))
