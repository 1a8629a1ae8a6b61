"""What a rule reads: a node with its law and its proposals, and where decisions come from."""

from collections.abc import Sequence
from typing import Any, Protocol

Probability = Any  # float or fractions.Fraction
DraftLaw = Any  # Sequence[Probability]; None where no rule reads it


class Node(Protocol):
    """A scored row of the tree. It may also carry an int `row`, its number there, the root's 0."""

    @property
    def p(self) -> Sequence[Probability]: ...

    @property
    def proposals(self) -> Sequence[tuple[int, DraftLaw, "Node"]]: ...


class Random(Protocol):
    """Where decisions come from: enumerated, recorded or drawn.

    An rng that also has at(row, purpose, copy) -> rng is asked through it, so that recorded numbers
    are addressed by what they decide and not by the order of the calls. purpose is "accept",
    "residual" or "bonus"; copy counts the proposals of one node that name the same child.
    """

    def categorical(self, weights: Sequence[Probability]) -> int: ...

    def bernoulli(self, p: Probability) -> bool: ...

    def gumbel(self, position: int) -> Sequence[float]: ...


def number_rows(root: Node) -> dict[int, int]:
    """id(node) -> its row: the one it carries, else its place in breadth-first order of first
    appearance, which on a chain is the depth."""
    nodes, rows = [root], {id(root): 0}
    for node in nodes:  # grows while it is read
        for _, _, child in node.proposals:
            if id(child) not in rows:
                rows[id(child)] = len(rows)
                nodes.append(child)
    return {id(node): getattr(node, "row", rows[id(node)]) for node in nodes}
