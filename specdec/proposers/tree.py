"""A small draft model proposes a tree whose shape is fixed before anything is drawn, one pass per
level (SpecInfer, Miao et al. 2023, 2305.09781; Sequoia, Chen et al. 2024, 2402.12374)."""

from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from specdec.acceptance.batched import sample
from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.proposers.model import DraftModel
from specdec.rng import Noise
from specdec.runner import Runner, SequenceRows
from specdec.sampling import Law, Paths, Prefix
from specdec.sequence import Sequence
from specdec.shapes import (
    Levels,
    child_counts,
    cut,
    expansion,
    expansion_parents,
    rows_per_level,
    shape_parents,
    within_depth,
)
from specdec.tree import Kind, Law as DrawLaw, TokenTree
from specdec.verifier import Verdict

TreeKind = Literal["without_replacement", "iid", "top_k", "coupled"]
# Mass that is spread over the vocabulary where a law has fewer tokens than a node has children.
_FLOOR = 2.0**-20


class DraftTreeProposer(Proposer):
    """Drafts static trees, given as tree or as shape.

    tree=<k1, k2, ...>: every node of depth i - 1 gets k_i children. shape: the parent of every
    node, level by level, -1 for children of the root (specdec.optimal finds the best one). At most
    255 nodes; a budget is used up by whole levels.

    kind says what the children of a node are: "without_replacement" draws of its law in draw order
    (the default, "auto"; Kool et al. 2019, 1903.06059, section 2), "iid" draws, its "top_k" tokens,
    or "coupled": the top-k of its law under the Gumbel noise of their position, which the rule
    gumbel reads too (2408.07978). At temperature 0, of target or draft, they are the top-k tokens.
    The k-th draw takes the place of the k-th child in the shape; iid draws that agree share a node,
    at the place of the first of them. A law that top_k or a small vocabulary cuts to fewer tokens
    gives fewer children. The other options are those of the proposer draft.

    Shapes are known before anything is drawn, and nothing is read back while drafting, but for
    kind "iid", whose nodes depend on which draws agree: it reads each level's tokens once. Where a
    law runs out of tokens in some other way (top-p, grammars, underflow), a thousandth of a
    thousandth of its mass is spread over all tokens first: that is then the law drawn from and
    stored, the shape stays, and the additional tokens are judged like all others.

    Nodes without children are never computed by the draft; they come last in the tree, so that the
    others stand in the slots where the draft computed them.
    """

    name = "tree"
    needs_draft = True

    def __init__(
        self, runner: Runner, *, tree: Items[int] | None = None, shape: Items[int] | None = None,
        kind: str = "auto", temperature: float | None = None, top_k: int | None = None,
        top_p: float | None = None, min_p: float | None = None, processors: bool = True,
        tokenizer: Any = None, draft_tokenizer: Any = None,
    ) -> None:  # fmt: skip
        kinds = ("auto", *get_args(TreeKind))
        if kind not in kinds:
            raise InvalidArgumentError(f"kind={kind!r}: expected one of {', '.join(kinds)}")
        self.shape = _one_shape(tree, shape)
        self.kind = "without_replacement" if kind == "auto" else kind
        self.model = DraftModel(
            runner, processors, temperature, top_k, top_p, min_p, tokenizer, draft_tokenizer
        )
        self.law = "coupled" if kind == "coupled" else "point" if kind == "top_k" else "sampled"

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        self.model.join(group, vocab_size)

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        return self.model.groups

    def start(self, sequence: Sequence) -> None:
        self.model.start(sequence)

    def observe(self, sequences: Items[Sequence], verdicts: Items[Verdict]) -> None:
        self.model.observe(sequences, verdicts)

    def finish(self, sequence: Sequence) -> None:
        self.model.finish(sequence)

    @property
    def max_positions(self) -> int | None:
        return self.model.max_positions

    @property
    def preferred_nodes(self) -> int:
        return len(self.shape)

    def nodes_within(self, depth: int) -> int:
        return within_depth(self.shape, depth)

    def draft_rows(self, depth: int) -> tuple[int, ...]:
        """Every level's pass computes the branched levels above it again."""
        return rows_per_level(self.shape)[:depth]

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        budgets = self.model.within(sequences, budgets)
        sprouts = [self._sprout(s, b) for s, b in zip(sequences, budgets, strict=True)]
        while active := [sprout for sprout in sprouts if sprout.frontier]:
            logits = self.model.score([self._rows(sprout) for sprout in active])
            parts = logits.split([len(sprout.frontier) for sprout in active])
            alike: dict[Law, list[int]] = {}
            for i, sprout in enumerate(active):
                alike.setdefault(sprout.law, []).append(i)
            for law, members in alike.items():
                rows = logits if len(alike) == 1 else torch.cat([parts[i] for i in members])
                self._grow([active[i] for i in members], law, rows, noise)
        return [sprout.tree(self.model.runner.device) for sprout in sprouts]

    def _sprout(self, sequence: Sequence, budget: int) -> "_Sprout":
        law = self.model.law(sequence)
        most = self.model.known_tokens
        if law.truncation.top_k and not law.greedy:
            most = min(most, law.truncation.top_k)
        return _Sprout(sequence, law, child_counts(cut(self.shape, budget, most)))

    def _rows(self, sprout: "_Sprout") -> SequenceRows:
        """A level's pass: the frontier, and those above it that are not on one line with all.

        Rows see the whole cache and what their pass lets them see. So levels that branched are
        taken back and computed again, to the same slots; a trunk without branches stays.
        """
        sequence = sprout.sequence
        if not sprout.depth:
            return self.model.pending(sequence)
        trunk = sprout.trunk
        self.model.cut(sequence, trunk)
        nodes = torch.cat(sprout.tokens)[trunk:]
        parents = [parent - trunk if parent >= trunk else -1 for parent in sprout.parents[trunk:]]
        cache = self.model.cache(sequence)
        return SequenceRows(cache, (), nodes, parents, keep=len(sprout.frontier))

    def _grow(self, sprouts: list["_Sprout"], law: Law, logits: Tensor, noise: Noise) -> None:
        """Gives every node of the frontiers, logits (n, V), its children: as many draws as the
        widest node wants are made for each, and those beyond its own number are not looked at."""
        paths = _paths(sprouts, logits.device)
        counts = [len(sprout.frontier) for sprout in sprouts]
        width = max(sprout.width for sprout in sprouts)
        if law.greedy or self.kind == "top_k":
            tokens = self.model.largest(law.scores(logits, paths), width)
            for sprout, its_tokens in zip(sprouts, tokens.split(counts), strict=True):
                sprout.add(its_tokens, "point", None)
            return
        q = law.probabilities(logits, paths)
        if self.kind == "coupled":
            where = [len(sprout.sequence.tokens) + sprout.depth for sprout in sprouts]
            seeds = [sprout.sequence.seed for sprout in sprouts]
            shared = noise.gumbel(seeds, where, q.shape[1], q.device)
            each = torch.cat([shared[i : i + 1].expand(n, -1) for i, n in enumerate(counts)])
            tokens = self.model.largest(q.log().add_(each), width)
            for sprout, its_tokens in zip(sprouts, tokens.split(counts), strict=True):
                sprout.add(its_tokens, "point", None)
            return
        draw = self._draw_iid if self.kind == "iid" else self._draw_without_replacement
        draw(sprouts, q, width, noise)

    def _draw_without_replacement(
        self, sprouts: list["_Sprout"], q: Tensor, width: int, noise: Noise
    ) -> None:
        """Gumbel top-k: the k largest of log q + G, falling, are k draws in draw order."""
        if width > 1:
            q = self._with_enough_tokens(q, sprouts)
        rows = [(sprout, spot.node + 1) for sprout in sprouts for spot in sprout.frontier]
        gumbel = noise.draft_gumbel(
            [sprout.sequence.seed for sprout, _ in rows],
            [len(sprout.sequence.tokens) for sprout, _ in rows],
            [row for _, row in rows], q.shape[1], q.device,
        )  # fmt: skip
        tokens = self.model.largest(gumbel.add_(q.log()), width)
        counts = [len(sprout.frontier) for sprout in sprouts]
        for sprout, its_tokens, its_q in zip(
            sprouts, tokens.split(counts), q.split(counts), strict=True
        ):
            sprout.add(its_tokens, "without_replacement", its_q)

    def _draw_iid(self, sprouts: list["_Sprout"], q: Tensor, width: int, noise: Noise) -> None:
        """As many draws per node as its sequence's widest one wants, so that they are the same in
        any company; those that agree share a child."""
        del width
        coins, sizes, repeats = [], [], []
        for sprout in sprouts:
            count, its_width = len(sprout.frontier), sprout.width
            sizes.append(count * its_width)
            repeats += [its_width] * count
            first, last = sprout.drawn + 1, sprout.drawn + 1 + sizes[-1]
            step = noise.step([sprout.sequence.seed], [len(sprout.sequence.tokens)], last, q.device)
            coins.append(step.draft[0, first:last])
        rows = q.repeat_interleave(_numbers(tuple(repeats), q.device), 0)
        drawn = sample(rows, torch.cat(coins))
        values, begin = drawn.tolist(), 0  # which draws agree decides which nodes there are
        laws = q.split([len(sprout.frontier) for sprout in sprouts])
        for sprout, tokens, its_q in zip(sprouts, drawn.split(sizes), laws, strict=True):
            each = sprout.width
            ends = range(begin, begin + tokens.shape[0], each)
            begin += tokens.shape[0]
            its_values = [values[at : at + each] for at in ends]
            sprout.add(tokens.view(-1, each), "iid", its_q, its_values)

    def _with_enough_tokens(self, q: Tensor, sprouts: Items["_Sprout"]) -> Tensor:
        """q (n, V), with a floor under the rows that have fewer tokens than children."""
        wanted = tuple(spot.children for sprout in sprouts for spot in sprout.frontier)
        few = (q > 0).sum(-1, keepdim=True) < _numbers(wanted, q.device)[:, None]
        return torch.where(few, q * (1 - _FLOOR) + self.model.uniform(q) * _FLOOR, q)


@dataclass(frozen=True, slots=True)
class _Spot:
    """A node that gets children."""

    node: int  # -1: the root
    children: int
    first: int  # of its children, among the places of the next level
    line: tuple[int, ...]  # nodes from the root to it, itself included


@dataclass(slots=True, eq=False)
class _Sprout:
    """A sequence's tree while it grows.

    Nodes with children are numbered level by level, in the order in which the draft computes them;
    leaf i is -1 - i until all others have their number.
    """

    sequence: Sequence
    law: Law
    levels: Levels  # of the shape: children of each place, level by level
    depth: int = 0  # levels so far
    drawn: int = 0  # draws so far
    frontier: list[_Spot] = field(default_factory=list)
    trunk: int = 0  # leading nodes that are all on one line, before the frontier
    tokens: list[Tensor] = field(default_factory=list)  # per level, of nodes with children
    parents: list[int] = field(default_factory=list)  # of nodes with children
    leaves: list[Tensor] = field(default_factory=list)  # tokens, per level
    leaf_parents: list[int] = field(default_factory=list)
    draws: list[tuple[int, DrawLaw]] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)
    rows: int = 0  # stored laws so far

    def __post_init__(self) -> None:
        if self.levels:
            self.frontier = [_Spot(-1, self.levels[0][0], 0, ())]

    @property
    def width(self) -> int:
        """Children of the frontier's widest node."""
        return max(spot.children for spot in self.frontier)

    def add(
        self, drawn: Tensor, kind: Kind, q: Tensor | None, values: list[list[int]] | None = None
    ) -> None:
        """The frontier's children: drawn (n, k) in draw order, from q (n, V).

        values: drawn on the host, where equal ones share a node; None: no two siblings are equal.
        """
        if len(self.frontier) == 1 and len(self.parents) == self.trunk + 1:
            self.trunk += 1
        inner: list[int] = []  # of the flattened draws, those that made a node with children
        outer: list[int] = []  # a leaf
        frontier: list[_Spot] = []
        firsts = self._firsts()
        for i, spot in enumerate(self.frontier):
            nodes: dict[int, int] = {}
            its_kind: Kind = "iid" if kind == "without_replacement" and spot.children == 1 else kind
            law = DrawLaw(its_kind, None if q is None else self.rows + i)
            for rank in range(spot.children):
                key = values[i][rank] if values is not None else rank
                if key not in nodes:
                    children, first = firsts[spot.first + rank]
                    at = i * drawn.shape[1] + rank
                    if children:
                        nodes[key] = len(self.parents)
                        line = (*spot.line, nodes[key])
                        frontier.append(_Spot(nodes[key], children, first, line))
                        self.parents.append(spot.node)
                        inner.append(at)
                    else:
                        nodes[key] = -1 - len(self.leaf_parents)
                        self.leaf_parents.append(spot.node)
                        outer.append(at)
                self.draws.append((nodes[key], law))
        flat = drawn.flatten()
        self.tokens.append(_taken(flat, inner))
        self.leaves.append(_taken(flat, outer))
        if q is not None:
            self.laws.append(q)
            self.rows += q.shape[0]
        self.drawn += len(self.frontier) * self.width
        self.depth += 1
        self.frontier = frontier

    def _firsts(self) -> list[tuple[int, int]]:
        """For every place of the level being drawn: its children and the place of the first."""
        if self.depth + 1 == len(self.levels):
            return [(0, 0)] * sum(self.levels[self.depth])
        found, first = [], 0
        for children in self.levels[self.depth + 1]:
            found.append((children, first))
            first += children
        return found

    def tree(self, device: torch.device) -> TokenTree:
        if not self.draws:
            return TokenTree.empty(device)
        laws = torch.cat(self.laws) if self.laws else None
        inner = len(self.parents)
        draws = tuple((n if n >= 0 else inner - 1 - n, law) for n, law in self.draws)
        each = (DrawLaw("iid", i) if laws is not None else DrawLaw("point")
                for i in range(len(draws)))  # fmt: skip
        short = draws == tuple(enumerate(each))  # one draw per node, from the law of its number
        return TokenTree(
            torch.cat([*self.tokens, *self.leaves]), (*self.parents, *self.leaf_parents), laws,
            None if short else draws,
        )  # fmt: skip


def _one_shape(tree: Items[int] | None, shape: Items[int] | None) -> tuple[int, ...]:
    if tree is not None and shape is not None:
        raise InvalidArgumentError(f"tree={tree!r}, shape={shape!r}: expected one of them")
    if shape is not None:
        return shape_parents(shape)
    if tree is None:
        raise InvalidArgumentError(
            "proposer='tree' needs proposer_options={'tree': ...}, or {'shape': ...}"
        )
    return expansion_parents(expansion(tree))


def _taken(flat: Tensor, where: list[int]) -> Tensor:
    """The values at these places, in this order."""
    if len(where) == flat.shape[0]:
        return flat
    return flat[_numbers(tuple(where), flat.device)]


@lru_cache(maxsize=1024)
def _numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


def _paths(sprouts: list[_Sprout], device: torch.device) -> Callable[[], Paths]:
    """The path to every node of the frontiers."""

    def paths() -> Paths:
        prefixes = [
            Prefix(s.tokens, s.prompt_len, s.left_padding) for s in (x.sequence for x in sprouts)
        ]
        flat = [tokens for sprout in sprouts for tokens in sprout.tokens]
        drafted = torch.cat(flat) if flat else torch.empty(0, dtype=torch.long, device=device)
        lines: list[tuple[int, Any]] = []
        first = 0
        for owner, sprout in enumerate(sprouts):
            lines += [(owner, [first + node for node in spot.line]) for spot in sprout.frontier]
            first += len(sprout.parents)
        return Paths.of(prefixes, drafted, lines)

    return paths
