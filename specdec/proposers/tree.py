"""Trees drafted by a small model, a fixed number of children per level: SpecInfer's static
expansion (Miao et al. 2023, 2305.09781, section 3), one draft pass per level."""

from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass, field
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
from specdec.shapes import expanded, expansion, levels_within
from specdec.tree import Kind, Law as DrawLaw, TokenTree

TreeKind = Literal["without_replacement", "iid", "top_k", "coupled"]
# Mass that is spread over the vocabulary where a law has fewer tokens than a node has children.
_FLOOR = 2.0**-20


class DraftTreeProposer(Proposer):
    """Drafts trees <k1, k2, ...>: every node of depth i - 1 gets k_i children.

    kind says what the children of a node are: "without_replacement" draws of its law in draw order
    (the default, "auto"; Kool et al. 2019, 1903.06059, section 2), "iid" draws, whose duplicates
    share a node, its "top_k" tokens, or "coupled": the top-k of its law under the Gumbel noise of
    their position, which the rule gumbel reads too (2408.07978). At temperature 0, of target or
    draft, they are the top-k tokens. A law that top_k or a small vocabulary cuts to fewer tokens
    gives fewer children. tree has at most 255 nodes; a budget is used up by whole levels. The
    other options are those of the proposer draft.

    Shapes are known before anything is drawn, and nothing is read back while drafting, but for
    kind "iid", whose nodes depend on which draws agree: it reads each level's tokens once. Where a
    law runs out of tokens in some other way (top-p, grammars, underflow), a thousandth of a
    thousandth of its mass is spread over all tokens first: that is then the law drawn from and
    stored, the shape stays, and the additional tokens are judged like all others.
    """

    name = "tree"
    needs_draft = True

    def __init__(
        self, runner: Runner, *, tree: Items[int], kind: str = "auto",
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, processors: bool = True,
    ) -> None:  # fmt: skip
        kinds = ("auto", *get_args(TreeKind))
        if kind not in kinds:
            raise InvalidArgumentError(f"kind={kind!r}: expected one of {', '.join(kinds)}")
        self.widths = expansion(tree)
        self.kind = "without_replacement" if kind == "auto" else kind
        self.model = DraftModel(runner, processors, temperature, top_k, top_p, min_p)
        self.law = "coupled" if kind == "coupled" else "point" if kind == "top_k" else "sampled"
        self._group: CacheGroup | None = None

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        self._group = group
        self.model.join(group, vocab_size)

    @property
    def max_positions(self) -> int | None:
        return self.model.runner.max_positions

    @property
    def preferred_nodes(self) -> int:
        return expanded(self.widths)

    def nodes_within(self, depth: int) -> int:
        return expanded(self.widths[:depth])

    def draft_rows(self, depth: int) -> tuple[int, ...]:
        """Every level's pass computes the branched levels above it again."""
        trunk = next((i for i, width in enumerate(self.widths) if width > 1), len(self.widths))
        levels = range(min(depth, len(self.widths)))
        return tuple(
            max(1, expanded(self.widths[:level]) - min(trunk, level - 1)) for level in levels
        )

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        sprouts = [self._sprout(s, b) for s, b in zip(sequences, budgets, strict=True)]
        for level in range(max((len(sprout.widths) for sprout in sprouts), default=0)):
            active = [sprout for sprout in sprouts if len(sprout.widths) > level]
            logits = self.model.score([self._rows(sprout, level) for sprout in active])
            parts = logits.split([len(sprout.frontier) for sprout in active])
            alike: dict[tuple[Law, int], list[int]] = {}
            for i, sprout in enumerate(active):
                alike.setdefault((sprout.law, sprout.widths[level]), []).append(i)
            for (law, width), members in alike.items():
                rows = logits if len(alike) == 1 else torch.cat([parts[i] for i in members])
                self._grow([active[i] for i in members], law, width, rows, noise)
        return [sprout.tree(self.model.runner.device) for sprout in sprouts]

    def _sprout(self, sequence: Sequence, budget: int) -> "_Sprout":
        law = self.model.law(sequence)
        most = self.model.known_tokens
        if law.truncation.top_k and not law.greedy:
            most = min(most, law.truncation.top_k)
        widths = self.widths[: levels_within(self.widths, budget)]
        return _Sprout(sequence, law, tuple(min(width, most) for width in widths))

    def _rows(self, sprout: "_Sprout", level: int) -> SequenceRows:
        """A level's pass: the frontier, and those above it that are not on one line with all.

        Rows see the whole cache and what their pass lets them see. So levels that branched are
        taken back and computed again, to the same slots; a trunk without branches stays.
        """
        sequence = sprout.sequence
        if level == 0:
            return self.model.pending(sequence)
        assert self._group is not None
        trunk = sprout.trunk
        self._group.truncate(sequence.cache, len(sequence.tokens) + trunk)
        nodes = torch.cat(sprout.tokens)[trunk:]
        parents = [parent - trunk if parent >= trunk else -1 for parent in sprout.parents[trunk:]]
        return SequenceRows(sequence.cache, (), nodes, parents, keep=len(sprout.frontier))

    def _grow(
        self, sprouts: list["_Sprout"], law: Law, width: int, logits: Tensor, noise: Noise
    ) -> None:
        """Gives every node of the frontiers, logits (n, V), its children."""
        paths = _paths(sprouts, logits.device)
        counts = [len(sprout.frontier) for sprout in sprouts]
        if law.greedy or self.kind == "top_k":
            tokens = self._largest(law.scores(logits, paths), width)
            for sprout, its_tokens in zip(sprouts, tokens.split(counts), strict=True):
                sprout.add(its_tokens, "point", None)
            return
        q = law.probabilities(logits, paths)
        if self.kind == "coupled":
            where = [len(sprout.sequence.tokens) + sprout.depth for sprout in sprouts]
            seeds = [sprout.sequence.seed for sprout in sprouts]
            shared = noise.gumbel(seeds, where, q.shape[1], q.device)
            each = torch.cat([shared[i : i + 1].expand(n, -1) for i, n in enumerate(counts)])
            tokens = self._largest(q.log().add_(each), width)
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
            q = self._with_enough_tokens(q, width)
        rows = [(sprout, node + 1) for sprout in sprouts for node in sprout.frontier]
        gumbel = noise.draft_gumbel(
            [sprout.sequence.seed for sprout, _ in rows],
            [len(sprout.sequence.tokens) for sprout, _ in rows],
            [row for _, row in rows], q.shape[1], q.device,
        )  # fmt: skip
        tokens = self._largest(gumbel.add_(q.log()), width)
        counts = [len(sprout.frontier) for sprout in sprouts]
        kind: Kind = "without_replacement" if width > 1 else "iid"
        for sprout, its_tokens, its_q in zip(
            sprouts, tokens.split(counts), q.split(counts), strict=True
        ):
            sprout.add(its_tokens, kind, its_q)

    def _draw_iid(self, sprouts: list["_Sprout"], q: Tensor, width: int, noise: Noise) -> None:
        """width draws per node; those that agree share a child."""
        counts = [len(sprout.frontier) for sprout in sprouts]
        coins = []
        for sprout, count in zip(sprouts, counts, strict=True):
            first, last = sprout.drawn + 1, sprout.drawn + 1 + count * width
            step = noise.step([sprout.sequence.seed], [len(sprout.sequence.tokens)], last, q.device)
            coins.append(step.draft[0, first:last])
        drawn = sample(q.repeat_interleave(width, 0), torch.cat(coins)).view(-1, width)
        values = drawn.tolist()  # which draws agree decides which nodes there are
        first = 0
        for sprout, its_tokens, its_q in zip(
            sprouts, drawn.split(counts), q.split(counts), strict=True
        ):
            count = len(sprout.frontier)
            sprout.add(its_tokens, "iid", its_q, values[first : first + count])
            first += count

    def _largest(self, scores: Tensor, width: int) -> Tensor:
        """(n, V) -> (n, width) tokens of the largest scores, falling, that both models have."""
        return scores[:, : self.model.known_tokens].topk(width, dim=-1).indices

    def _with_enough_tokens(self, q: Tensor, width: int) -> Tensor:
        """q, with a floor under the rows that have fewer than width tokens; (n, V)."""
        known = self.model.known_tokens
        few = (q > 0).sum(-1, keepdim=True) < width
        floor = torch.full_like(q, _FLOOR / known)
        floor[:, known:] = 0
        return torch.where(few, q * (1 - _FLOOR) + floor, q)


@dataclass(slots=True, eq=False)
class _Sprout:
    """A sequence's tree while it grows, nodes numbered level by level."""

    sequence: Sequence
    law: Law
    widths: tuple[int, ...]
    depth: int = 0  # levels so far
    drawn: int = 0  # draws so far
    frontier: range = range(-1, 0)  # nodes of the last level; -1 is the root
    trunk: int = 0  # leading nodes that are all on one line, before the frontier
    tokens: list[Tensor] = field(default_factory=list)  # per level
    parents: list[int] = field(default_factory=list)
    lines: list[tuple[int, ...]] = field(default_factory=lambda: [()])  # frontier: path of nodes
    draws: list[tuple[int, DrawLaw]] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)
    rows: int = 0  # stored laws so far

    def add(
        self, drawn: Tensor, kind: Kind, q: Tensor | None, values: list[list[int]] | None = None
    ) -> None:
        """The frontier's children: drawn (n, k) in draw order, from q (n, V).

        values: drawn on the host, where equal ones share a node; None: no two siblings are equal.
        """
        begin = len(self.parents)
        if len(self.frontier) == 1 and begin == self.trunk + 1:
            self.trunk += 1
        kept: list[int] = []  # of the flattened draws, those that made a node
        lines: list[tuple[int, ...]] = []
        for i, parent in enumerate(self.frontier):
            children: dict[int, int] = {}
            for rank in range(drawn.shape[1]):
                key = values[i][rank] if values is not None else rank
                if key not in children:
                    children[key] = len(self.parents)
                    kept.append(i * drawn.shape[1] + rank)
                    lines.append((*self.lines[i], len(self.parents)))
                    self.parents.append(parent)
                law = DrawLaw(kind, None if q is None else self.rows + i)
                self.draws.append((children[key], law))
        flat = drawn.flatten()
        if len(kept) < flat.shape[0]:
            flat = flat[torch.tensor(kept, device=flat.device)]
        self.tokens.append(flat)
        if q is not None:
            self.laws.append(q)
            self.rows += q.shape[0]
        self.drawn += drawn.numel()
        self.depth += 1
        self.lines, self.frontier = lines, range(begin, len(self.parents))

    def tree(self, device: torch.device) -> TokenTree:
        if not self.tokens:
            return TokenTree.empty(device)
        laws = torch.cat(self.laws) if self.laws else None
        draws, drawn = tuple(self.draws), laws is not None
        each = ((i, DrawLaw("iid", i) if drawn else DrawLaw("point")) for i in range(len(draws)))
        short = draws == tuple(each)  # one draw per node, from the law of its number
        return TokenTree(
            torch.cat(self.tokens), tuple(self.parents), laws, None if short else draws
        )


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
            lines += [(owner, [first + node for node in line]) for line in sprout.lines]
            first += len(sprout.parents)
        return Paths.of(prefixes, drafted, lines)

    return paths
