"""TokenTree: the drafted tokens of one sequence, and the laws they were drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from specdec.errors import InvalidArgumentError

Kind = Literal["point", "iid", "without_replacement"]


class Law(NamedTuple):
    """Which stored row a proposal was drawn from; a point mass has none."""

    kind: Kind
    row: int | None = None


class Proposal(NamedTuple):
    """One draw, in draw order: duplicates and several drafters add proposals, not nodes."""

    parent: int  # node, -1 for the root
    token: int
    law: Law
    node: int  # the child that this draw names


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree:
    """Drafted tokens below the last committed token, which is not in the tree itself.

    tokens: (N,) int64, on any device; reading their values from the host synchronises. parents:
    -1 for a child of the root; parents come before children. draws: per proposal, in draw order,
    its node and its law; None: one per node, from the point mass or from row i of laws. laws:
    (L, V) float32, the very tensor that was sampled from.
    """

    tokens: Tensor
    parents: tuple[int, ...]
    laws: Tensor | None = None
    draws: tuple[tuple[int, Law], ...] | None = None

    @staticmethod
    def build(
        tokens: Sequence[int] | Tensor,
        parents: Sequence[int],
        proposals: Sequence[Proposal] | None = None,
        laws: Tensor | None = None,
    ) -> "TokenTree":
        """A checked tree. Without proposals every node is a point mass, or drawn iid from its row
        of laws. Raises InvalidArgumentError."""
        values = torch.as_tensor(tokens, dtype=torch.long)
        if values.ndim != 1 or values.shape[0] != len(parents):
            raise InvalidArgumentError(
                f"tokens {tuple(values.shape)}, parents ({len(parents)},): expected equal lengths"
            )
        for node, parent in enumerate(parents):
            if not -1 <= parent < node:
                raise InvalidArgumentError(
                    f"parents[{node}]={parent}: expected -1 or an earlier node"
                )
        pairs = list(zip(parents, values.tolist(), strict=True))
        if len(set(pairs)) != len(pairs):
            raise InvalidArgumentError("two nodes have the same path; duplicates are proposals")
        if proposals is None:
            if laws is not None and laws.shape[0] != len(parents):
                raise InvalidArgumentError(f"{laws.shape[0]} laws: expected one per node, or draws")
            return TokenTree(values, tuple(parents), laws)
        rows = 0 if laws is None else laws.shape[0]
        for proposal in proposals:
            _check_proposal(proposal, pairs, rows)
        if {proposal.node for proposal in proposals} != set(range(len(pairs))):
            raise InvalidArgumentError("a node that nothing proposed: every node is a draw")
        draws = tuple((p.node, p.law) for p in proposals)
        return TokenTree(values, tuple(parents), laws, draws)

    @staticmethod
    def chain(tokens: Tensor, laws: Tensor | None = None) -> "TokenTree":
        """One branch; row i of laws (N, V) is what token i was drawn from, None: point masses."""
        return TokenTree(tokens, chain_parents(tokens.shape[0]), laws)

    @staticmethod
    @cache
    def empty(device: torch.device) -> "TokenTree":
        """No speculation; the same object each time."""
        return TokenTree(torch.empty(0, dtype=torch.long, device=device), ())

    @staticmethod
    def merge(trees: Sequence["TokenTree"]) -> "TokenTree":
        """The union by full path; proposals stay in order of the trees and of their draws."""
        if not trees:
            raise InvalidArgumentError("merge needs at least one tree; TokenTree.empty is one")
        index: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        parents: list[int] = []
        draws: list[tuple[int, Law]] = []
        laws: list[Tensor] = []
        rows = 0
        for tree in trees:
            place: list[int] = []
            for token, parent in zip(tree.tokens.tolist(), tree.parents, strict=True):
                above = place[parent] if parent >= 0 else -1
                if (above, token) not in index:
                    index[above, token] = len(tokens)
                    tokens.append(token)
                    parents.append(above)
                place.append(index[above, token])
            for node, law in tree._draws():
                moved = law if law.row is None else Law(law.kind, law.row + rows)
                draws.append((place[node], moved))
            if tree.laws is not None:
                laws.append(tree.laws)
                rows += tree.laws.shape[0]
        device = trees[0].tokens.device
        return TokenTree(
            torch.tensor(tokens, dtype=torch.long, device=device), tuple(parents),
            torch.cat(laws) if laws else None, tuple(draws),
        )  # fmt: skip

    def _draws(self) -> tuple[tuple[int, Law], ...]:
        if self.draws is not None:
            return self.draws
        drawn = self.laws is not None
        return tuple(
            (node, Law("iid", node) if drawn else Law("point")) for node in range(len(self))
        )

    @property
    def proposals(self) -> tuple[Proposal, ...]:
        """Every draw in order. Reads the tokens: for tests and reports, not for the hot path."""
        values = self.tokens.tolist()
        return tuple(Proposal(self.parents[n], values[n], law, n) for n, law in self._draws())

    def ranks(self, path: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """For the root and every node of a path from it that has children: how many draws it has,
        and with which of them the path goes on, from 1; 0 where it ends."""
        if self.draws is None and self.is_chain:
            ends = ((1, 0),) if len(path) < len(self) else ()
            return ((1, 1),) * len(path) + ends
        draws = _draws_below(self.parents, self.draws)
        rows = [-1, *path]
        found = []
        for row, following in zip(rows, [*path, None], strict=True):
            if row in draws:
                its = draws[row]
                found.append((len(its), 0 if following is None else its.index(following) + 1))
        return tuple(found)

    @property
    def depths(self) -> tuple[int, ...]:
        """1 for a child of the root."""
        return tree_depths(self.parents)

    @property
    def max_depth(self) -> int:
        return max(self.depths, default=0)

    @property
    def is_chain(self) -> bool:
        return self.parents == chain_parents(len(self.parents))

    def down_to(self, depth: int) -> "TokenTree":
        """The nodes down to a depth, of a tree without laws: nothing in it was drawn."""
        assert self.laws is None, "a drawn token may not be dropped"
        assert self.draws is None, "a drawn token may not be dropped"
        if depth >= self.max_depth:
            return self
        if self.is_chain:
            return TokenTree(self.tokens[:depth], chain_parents(depth))
        kept = [node for node, its in enumerate(self.depths) if its <= depth]
        place = {-1: -1, **{node: i for i, node in enumerate(kept)}}
        return TokenTree(self.tokens[kept], tuple(place[self.parents[node]] for node in kept))

    def ancestor_mask(self) -> Tensor:
        """(N, N) bool: row i sees column j when j is i or an ancestor of i."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask.to(self.tokens.device)

    def __len__(self) -> int:
        return len(self.parents)


def _check_proposal(proposal: Proposal, pairs: list[tuple[int, int]], rows: int) -> None:
    """pairs: (parent, token) of every node; rows: stored laws."""
    node, (kind, row) = proposal.node, proposal.law
    if not 0 <= node < len(pairs) or pairs[node] != (proposal.parent, proposal.token):
        raise InvalidArgumentError(f"{proposal} does not name its node's path")
    if kind not in get_args(Kind):
        raise InvalidArgumentError(f"{proposal}: expected a law of {', '.join(get_args(Kind))}")
    if (row is None) != (kind == "point") or (row is not None and not 0 <= row < rows):
        raise InvalidArgumentError(
            f"{proposal}: expected no row for a point mass, else one of {rows} laws"
        )


@lru_cache(maxsize=512)
def chain_parents(length: int) -> tuple[int, ...]:
    return tuple(range(-1, length - 1))


@lru_cache(maxsize=256)
def children(parents: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The children of the root, then of every node, in their order."""
    found: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for node, parent in enumerate(parents):
        found[parent + 1].append(node)
    return tuple(map(tuple, found))


@lru_cache(maxsize=256)
def _draws_below(
    parents: tuple[int, ...], draws: tuple[tuple[int, Law], ...] | None
) -> dict[int, list[int]]:
    """Per node that has any, and -1 for the root, the nodes that its draws name, in draw order."""
    found: dict[int, list[int]] = {}
    for node in range(len(parents)) if draws is None else (node for node, _ in draws):
        found.setdefault(parents[node], []).append(node)
    return found


@lru_cache(maxsize=4096)
def tree_depths(parents: tuple[int, ...]) -> tuple[int, ...]:
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return tuple(depths)
