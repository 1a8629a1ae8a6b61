"""Paths that a draft model extends level by level, on the device: what trees grow from whose shape
the draft itself decides."""

from collections.abc import Callable, Iterator, Sequence as Items
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from specdec.proposers.model import DraftModel
from specdec.runner import SequenceRows
from specdec.sampling import Law, Paths, Prefix
from specdec.sequence import Sequence


class Beams:
    """One sequence's paths, and the candidates that they were chosen from.

    Level 0 has the empty path, every later level `width` paths, so that sizes and the parents of
    every pass are known on the host while the tokens are not. A pass computes each path on a line
    of its own: as many rows as if the levels of a branched tree were computed again.
    """

    def __init__(
        self, sequence: Sequence, law: Law, nodes: int, width: int, levels: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.sequence, self.law = sequence, law
        self.nodes = nodes  # at most, of the tree
        self.width = width  # paths
        self.levels = levels  # to be drafted
        self.depth = 0  # levels so far
        self.paths = torch.empty(1, 0, dtype=torch.long, device=device)  # (rows, depth) tokens
        self.numbers = torch.full((1,), -1, device=device)  # (rows,) each path's last candidate
        self.score = torch.zeros(1, dtype=torch.float64, device=device)  # (rows,) log-probability
        self.time = torch.zeros(1, dtype=torch.float64, device=device)  # (rows,) of beam_tree alone
        # of candidates, numbered in the order of their making:
        self.tokens = torch.empty(0, dtype=torch.long, device=device)
        self.parents = torch.empty(0, dtype=torch.long, device=device)  # -1: the root
        self.ranks = torch.empty(0, dtype=torch.float64, device=device)  # -inf: makes no node

    @property
    def rows(self) -> int:
        """Paths, and rows of logits in the coming pass."""
        return self.numbers.shape[0]

    def next_pass(self, model: DraftModel) -> SequenceRows:
        """What the draft has not computed yet, then all paths; logits of their last tokens."""
        if self.depth == 0:
            return model.pending(self.sequence)
        model.cut(self.sequence, 0)
        parents = _side_by_side(self.rows, self.depth)
        nodes = self.paths.t().flatten()
        return SequenceRows(model.cache(self.sequence), (), nodes, parents, keep=self.rows)

    def record(self, tokens: Tensor, parents: Tensor, ranks: Tensor) -> Tensor:
        """Adds candidates (m,), parents as their numbers; returns the numbers of the new ones."""
        first = self.tokens.shape[0]
        self.tokens = torch.cat((self.tokens, tokens))
        self.parents = torch.cat((self.parents, parents))
        self.ranks = torch.cat((self.ranks, ranks))
        return torch.arange(first, first + tokens.shape[0], device=tokens.device)

    def go_on(
        self, above: Tensor, tokens: Tensor, numbers: Tensor, score: Tensor, time: Tensor | None
    ) -> None:
        """The paths of the next level: which path each one extends, with which token."""
        self.paths = torch.cat((self.paths[above], tokens[:, None]), 1)
        self.numbers, self.score = numbers, score
        if time is not None:
            self.time = time
        self.depth += 1


def by_law(beams: Items[Beams], logits: Tensor) -> Iterator[tuple[Law, list[Beams], Tensor]]:
    """Those that share a law, with their rows of logits."""
    parts = logits.split([its.rows for its in beams])
    alike: dict[Law, list[int]] = {}
    for i, its in enumerate(beams):
        alike.setdefault(its.law, []).append(i)
    for law, members in alike.items():
        rows = logits if len(alike) == 1 else torch.cat([parts[i] for i in members])
        yield law, [beams[i] for i in members], rows


def paths_of(beams: Items[Beams]) -> Callable[[], Paths]:
    """The tokens that lead to every row of logits."""

    def paths() -> Paths:
        prefixes = [
            Prefix(s.tokens, s.prompt_len, s.left_padding) for s in (its.sequence for its in beams)
        ]
        lines: list[tuple[int, range]] = []
        first = 0
        for owner, its in enumerate(beams):
            for _ in range(its.rows):
                lines.append((owner, range(first, first + its.depth)))
                first += its.depth
        return Paths.of(prefixes, torch.cat([its.paths.flatten() for its in beams]), lines)

    return paths


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """The nodes of one tree."""

    tokens: Tensor  # (n,)
    parents: tuple[int, ...]
    candidates: tuple[int, ...]  # the number that each node had as a candidate


def chosen(beams: Items[Beams]) -> list[Chosen]:
    """Per sequence its best-ranked candidates, at most `nodes` of them, in the order of their
    making. Ties prefer the earlier, hence the shallower one: a parent comes before its children as
    long as it ranks no lower. The one time that anything is read back."""
    picks = [_best(its) for its in beams]
    if not picks:
        return []
    numbers, parents = torch.cat(picks, 1).tolist()
    found: list[Chosen] = []
    first = 0
    for its, pick in zip(beams, picks, strict=True):
        last = first + pick.shape[1]
        mine = [number for number in numbers[first:last] if number >= 0]
        place = {-1: -1, **{number: node for node, number in enumerate(mine)}}
        above = tuple(place[parent] for parent in parents[first : first + len(mine)])
        found.append(Chosen(its.tokens[pick[0, : len(mine)]], above, tuple(mine)))
        first = last
    return found


def _best(its: Beams) -> Tensor:
    """(2, n) numbers of the nodes, rising, and of their parents; numbers behind the last are -1."""
    count = its.ranks.shape[0]
    order = its.ranks.sort(descending=True, stable=True).indices[: its.nodes]
    numbers = torch.where(its.ranks[order] > float("-inf"), order, count).sort().values
    parents = its.parents[numbers.clamp_max(max(0, count - 1))]
    return torch.stack((torch.where(numbers < count, numbers, -1), parents))


@lru_cache(maxsize=256)
def _side_by_side(lines: int, depth: int) -> tuple[int, ...]:
    """Parents of so many lines, listed level by level."""
    return tuple(max(-1, row - lines) for row in range(lines * depth))
