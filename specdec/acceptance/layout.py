"""The shape of a batch of trees as index tensors: made on the host, once per shape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from specdec.tree import Law, TokenTree, chain_parents, tree_depths

Draws = tuple[tuple[int, Law], ...]
Shape = tuple[tuple[int, ...], Draws | None, int]  # parents, draws, stored laws
MakeTensor = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Draw:
    """One proposal of the batch, in packed numbers."""

    parent: int  # row
    row: int  # of the node that it names
    node: int  # packed number of that node, its place among the batch's tokens
    kind: str
    law: int  # stored row, -1 for a point mass
    rank: int  # proposals of the same parent before it
    copy: int  # those of them that name the same node
    taken: tuple[int, ...]  # nodes that earlier siblings drew from the same stored law


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """Proposals that are judged side by side: at most one per parent, n of them.

    Those whose parents have used more stored laws come first, so that the laws in use at place s of
    their parents belong to the first proposals of the round.
    """

    parents: Tensor  # (n,) rows
    rows: Tensor  # (n,) of the proposed nodes
    nodes: Tensor  # (n,) the same as packed nodes
    siblings: Tensor  # (n, rank + 1) packed nodes of the parent's proposals so far, this one last
    used: tuple[Tensor, ...]  # per place (n_s,) stored law, n_s falling
    is_drawn: Tensor  # (n,) bool: from a stored law, not a point mass
    own: Tensor  # (n,) stored law, 0 for a point mass
    place: Tensor  # (n,) which of the parent's laws that is
    reduced: Tensor  # (m,) the proposals drawn from what earlier siblings left of their law
    taken: (
        Tensor  # (m, most) packed nodes that are gone from that law, repeated; unread where m = 0
    )
    copy: Tensor  # (n,)
    is_copy: Tensor  # (n,) bool: of an earlier proposal
    fresh: Tensor  # (f,) the others
    is_last: bool  # no parent of the round has a proposal after this one


@dataclass(frozen=True, slots=True, eq=False)
class Branches:
    """What the rules for trees need beside the chains' tensors."""

    rounds: tuple[Round, ...]  # by depth, then by rank
    ranks: tuple[Round, ...]  # by rank alone, all depths at once
    lineage: Tensor  # (R, depth + 1) rows from the root to each row, which then repeats
    row_depths: Tensor  # (R,)
    post_order: Tensor  # (B, most rows) rows, children in draw order before parents; the root pads
    has_draws: Tensor  # (R,) bool
    children: Tensor  # (R, most proposals) packed nodes of its proposals, repeated; any in leaves
    laws_used: Tensor  # (R, places) stored laws of its proposals, 0 where there are fewer
    is_used: Tensor  # (R, places) bool
    draw_parents: Tensor  # (P,) rows
    draw_nodes: Tensor  # (P,) packed nodes
    draw_laws: Tensor  # (P,) stored laws, 0 for point masses
    draw_is_point: Tensor  # (P,) bool
    draw_sequence: Tensor  # (P,)
    law_sequence: Tensor  # (L,)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Index tensors of one batch shape; a function of the parents and the draws alone.

    Rows are packed: per sequence the root, then its nodes, sequences one after the other.
    """

    row_offsets: tuple[int, ...]  # (B + 1,) first packed row of each sequence
    lengths: tuple[int, ...]  # nodes per sequence
    depth: int  # of the deepest tree
    laws: int  # stored laws of all trees
    draws: tuple[Draw, ...]
    copies: int  # most proposals that name one node
    is_chain: bool  # every row has at most one proposal
    is_even: bool  # chains of one length: packed tensors are padded ones, seen through a view
    is_plain: bool  # chains of point masses alone, or of node i drawn from law i
    roots: Tensor  # (B,) packed rows
    counts: Tensor  # (B,) nodes
    parent_rows: Tensor  # (nodes,) packed row of each node's parent
    node_rows: Tensor  # (nodes,) packed row of each node
    sequence: Tensor  # (nodes,)
    row_sequence: Tensor  # (R,)
    local: Tensor  # (R,) a row's number in its own tree
    chain_rows: Tensor  # (B, depth + 1) packed rows along each chain, its last one repeated
    nodes: Tensor  # (nodes,) 0, 1, 2, ...
    chain_nodes: Tensor  # (B, depth + 1) packed number of the node below that row, 0 past the end
    inside: Tensor  # (B, depth) bool: whether the chain reaches that depth
    is_last: Tensor  # (B, depth) bool: whether the chain ends there
    checked: (
        Tensor  # (B, 2 depth + 1) per sequence its rows and, numbered after all rows, its nodes
    )
    steps: Tensor  # (depth + 1,) 0, 1, 2, ...
    blank: Tensor  # (B, 1) of -1
    branches: Callable[[], Branches]  # made on first use: chains never need it


@dataclass(frozen=True, slots=True, eq=False)
class TreeBatch:
    """The trees of one step: their layout, made on the host, and their tokens, on the device."""

    layout: Layout
    tokens: Tensor  # (nodes,) packed

    @staticmethod
    def of(trees: Sequence[TokenTree]) -> "TreeBatch":
        tokens = trees[0].tokens if len(trees) == 1 else torch.cat([t.tokens for t in trees])
        return TreeBatch(_layout(shapes_of(trees), tokens.device), tokens)

    @property
    def row_offsets(self) -> tuple[int, ...]:
        """First packed row of each sequence, and the number of rows."""
        return self.layout.row_offsets

    @property
    def copies(self) -> int:
        """Accept coins that each row needs: pass it to Noise.step."""
        return self.layout.copies


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a rule decided, per sequence; -1 pads."""

    accepted: Tensor  # (B,) drafted tokens kept
    tokens: Tensor  # (B, depth + 1) the accepted path, then exactly one extra token
    path: Tensor  # (B, depth) packed rows of the accepted nodes
    valid: Tensor  # (B,) bool: False where the laws were none; see laws.diagnose


def shapes_of(trees: Sequence[TokenTree]) -> tuple[Shape, ...]:
    """All that a layout depends on."""
    return tuple((t.parents, t.draws, 0 if t.laws is None else t.laws.shape[0]) for t in trees)


@lru_cache(maxsize=256)
def _layout(shapes: tuple[Shape, ...], device: torch.device) -> Layout:
    lengths = tuple(len(parents) for parents, _, _ in shapes)
    row_offsets, node_offsets = [0], [0]
    for n in lengths:
        row_offsets.append(row_offsets[-1] + n + 1)
        node_offsets.append(node_offsets[-1] + n)
    depth = max((d for parents, _, _ in shapes for d in tree_depths(parents)), default=0)
    along = range(depth + 1)
    draws = draws_of(shapes)
    is_chain = len(draws) == node_offsets[-1] and all(
        parents == chain_parents(len(parents)) for parents, _, _ in shapes
    )

    def tensor(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    @lru_cache(maxsize=1)
    def branches() -> Branches:
        return _branches(shapes, draws, depth, tensor)

    starts = list(zip(row_offsets, node_offsets, lengths, strict=False))
    R = row_offsets[-1]
    return Layout(
        row_offsets=tuple(row_offsets),
        lengths=lengths,
        depth=depth,
        laws=sum(stored for _, _, stored in shapes),
        draws=draws,
        copies=1 + max((draw.copy for draw in draws), default=0),
        is_chain=is_chain,
        is_even=is_chain and len(set(lengths)) == 1,
        is_plain=is_chain and are_plain(draws, sum(stored for _, _, stored in shapes)),
        roots=tensor(row_offsets[:-1]),
        counts=tensor(lengths),
        parent_rows=tensor(
            [r + p + 1 for (r, _, _), (ps, _, _) in zip(starts, shapes, strict=True) for p in ps]
        ),
        node_rows=tensor([r + i + 1 for r, _, n in starts for i in range(n)]),
        sequence=tensor([b for b, n in enumerate(lengths) for _ in range(n)]),
        row_sequence=tensor([b for b, n in enumerate(lengths) for _ in range(n + 1)]),
        local=tensor([i for n in lengths for i in range(n + 1)]),
        chain_rows=tensor([[r + min(i, n) for i in along] for r, _, n in starts]),
        nodes=tensor(range(node_offsets[-1])),
        chain_nodes=tensor([[o + i if i < n else 0 for i in along] for _, o, n in starts]),
        inside=tensor([[i < n for i in range(depth)] for n in lengths]).bool(),
        is_last=tensor([[i == n - 1 for i in range(depth)] for n in lengths]).bool(),
        checked=tensor(
            [
                [
                    *(r + min(i, n) for i in along),
                    *(R + o + i if i < n else r for i in range(depth)),
                ]
                for r, o, n in starts
            ]
        ),
        steps=tensor(along),
        blank=tensor([[-1]] * len(shapes)),
        branches=branches,
    )


def draws_of(shapes: tuple[Shape, ...]) -> tuple[Draw, ...]:
    """Every proposal, sequences one after the other, each in draw order."""
    found: list[Draw] = []
    row = node = law = 0
    for parents, given, stored in shapes:
        pairs = given
        if pairs is None:
            kind: Law = Law("point")
            pairs = tuple((i, Law("iid", i) if stored else kind) for i in range(len(parents)))
        siblings: dict[int, list[Draw]] = {}
        for i, (kind_name, law_row) in pairs:
            earlier = siblings.setdefault(parents[i], [])
            own = -1 if law_row is None else law + law_row
            taken = {d.node for d in earlier if d.law == own}
            draw = Draw(
                row + parents[i] + 1, row + i + 1, node + i, kind_name, own, len(earlier),
                sum(d.node == node + i for d in earlier),
                tuple(sorted(taken)) if kind_name == "without_replacement" else (),
            )  # fmt: skip
            earlier.append(draw)
            found.append(draw)
        row, node, law = row + len(parents) + 1, node + len(parents), law + stored
    return tuple(found)


def are_plain(draws: tuple[Draw, ...], laws: int) -> bool:
    """Whether every node was drawn once, in order: all from point masses, or node i from law i."""
    in_order = [d.node for d in draws] == list(range(len(draws)))
    return in_order and (laws == 0 or (laws == len(draws) and all(d.law == d.node for d in draws)))


def _branches(
    shapes: tuple[Shape, ...], draws: tuple[Draw, ...], depth: int, tensor: MakeTensor
) -> Branches:
    lines: list[list[int]] = []  # per row, the rows from its root to it
    for parents, _, _ in shapes:
        first = len(lines)
        lines.append([first])
        for p in parents:
            lines.append([*lines[first + p + 1], len(lines)])
    proposals: list[list[Draw]] = [[] for _ in lines]
    for draw in draws:
        proposals[draw.parent].append(draw)
    used = [list(dict.fromkeys(d.law for d in ds if d.law >= 0)) for ds in proposals]
    places = max(map(len, used))
    widest = max(1, *map(len, proposals))
    nodes = [[d.node for d in ds] or [0] for ds in proposals]
    orders = _post_orders(shapes, proposals)
    most = max(map(len, orders))
    sequences = [b for b, order in enumerate(orders) for _ in order]

    def rounds(key: Callable[[Draw], tuple[int, ...]]) -> tuple[Round, ...]:
        groups: dict[tuple[int, ...], list[Draw]] = {}
        for draw in draws:
            groups.setdefault(key(draw), []).append(draw)
        return tuple(_round(groups[k], proposals, tensor) for k in sorted(groups))

    return Branches(
        rounds=rounds(lambda d: (len(lines[d.parent]), d.rank)),
        ranks=rounds(lambda d: (d.rank,)),
        lineage=tensor([line + line[-1:] * (depth + 1 - len(line)) for line in lines]),
        row_depths=tensor([len(line) - 1 for line in lines]),
        post_order=tensor([order + order[-1:] * (most - len(order)) for order in orders]),
        has_draws=tensor([bool(ds) for ds in proposals]).bool(),
        children=tensor([ns + ns[-1:] * (widest - len(ns)) for ns in nodes]),
        laws_used=tensor([u + [0] * (places - len(u)) for u in used]),
        is_used=tensor([[s < len(u) for s in range(places)] for u in used]).bool(),
        draw_parents=tensor([d.parent for d in draws]),
        draw_nodes=tensor([d.node for d in draws]),
        draw_laws=tensor([max(d.law, 0) for d in draws]),
        draw_is_point=tensor([d.law < 0 for d in draws]).bool(),
        draw_sequence=tensor([sequences[d.parent] for d in draws]),
        law_sequence=tensor([b for b, (_, _, n) in enumerate(shapes) for _ in range(n)]),
    )


def _post_orders(shapes: tuple[Shape, ...], proposals: list[list[Draw]]) -> list[list[int]]:
    """Per sequence its rows depth first, children in draw order before their parent."""
    orders: list[list[int]] = []
    root = 0
    for parents, _, _ in shapes:
        # parents first and children backwards, then the whole reversed
        order, pending = list[int](), [root]
        while pending:
            order.append(pending.pop())
            pending.extend(d.row for d in proposals[order[-1]] if d.copy == 0)
        orders.append(order[::-1])
        root += len(parents) + 1
    return orders


def _round(group: list[Draw], proposals: list[list[Draw]], tensor: MakeTensor) -> Round:
    def laws_so_far(draw: Draw) -> list[int]:
        so_far = proposals[draw.parent][: draw.rank + 1]
        return list(dict.fromkeys(d.law for d in so_far if d.law >= 0))

    group = sorted(group, key=lambda d: -len(laws_so_far(d)))
    laws = [laws_so_far(d) for d in group]
    reduced = [i for i, d in enumerate(group) if d.taken]
    most = max((len(group[i].taken) for i in reduced), default=0)
    return Round(
        parents=tensor([d.parent for d in group]),
        rows=tensor([d.row for d in group]),
        nodes=tensor([d.node for d in group]),
        siblings=tensor([[e.node for e in proposals[d.parent][: d.rank + 1]] for d in group]),
        used=tuple(tensor([u[s] for u in laws if len(u) > s]) for s in range(len(laws[0]))),
        is_drawn=tensor([d.law >= 0 for d in group]).bool(),
        own=tensor([max(d.law, 0) for d in group]),
        place=tensor(
            [u.index(d.law) if d.law >= 0 else 0 for d, u in zip(group, laws, strict=True)]
        ),
        reduced=tensor(reduced),
        taken=tensor(
            [group[i].taken + group[i].taken[-1:] * (most - len(group[i].taken)) for i in reduced]
        ),
        copy=tensor([d.copy for d in group]),
        is_copy=tensor([d.copy > 0 for d in group]).bool(),
        fresh=tensor([i for i, d in enumerate(group) if d.copy == 0]),
        is_last=all(d.rank + 1 == len(proposals[d.parent]) for d in group),
    )  # fmt: skip
