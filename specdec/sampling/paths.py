"""The tokens that lead to every row of logits: committed ones, then drafted ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Path = Sequence[int]
ABSENT = -1  # stands before the first token of a path that is shorter than the longest


class Prefix(NamedTuple):
    """What one sequence has committed."""

    tokens: Path  # prompt included
    prompt_len: int
    padding: int = 0  # left padding tokens that transformers counted before the prompt


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """One path per row. Lengths are known on the host; building and using ids never syncs."""

    ids: Tensor  # (n, L) right-aligned, ABSENT on the left; on the device of the logits
    lengths: tuple[int, ...]  # tokens of each path, prompt included
    prompt_lens: tuple[int, ...]
    paddings: tuple[int, ...]

    @staticmethod
    def of(
        prefixes: Sequence[Prefix], drafted: Tensor, lines: Sequence[tuple[int, Sequence[int]]]
    ) -> "Paths":
        """A path for every line (prefix, drafted tokens behind it as indices into drafted (m,))."""
        starts = np.cumsum([0, *(len(prefix.tokens) for prefix in prefixes)])
        committed = [token for prefix in prefixes for token in prefix.tokens]
        source = torch.cat(
            (
                torch.tensor(committed, dtype=torch.long, device=drafted.device),
                drafted,
                drafted.new_full((1,), ABSENT),
            )
        )
        owners = [prefixes[owner] for owner, _ in lines]
        lengths = tuple(
            len(owner.tokens) + len(tail) for owner, (_, tail) in zip(owners, lines, strict=True)
        )
        width = max(lengths, default=0)
        where = np.full((len(lines), width), len(source) - 1)
        for row, (length, (owner, tail)) in enumerate(zip(lengths, lines, strict=True)):
            end = width - len(tail)
            where[row, width - length : end] = np.arange(starts[owner], starts[owner + 1])
            where[row, end:] = np.asarray(tail, dtype=np.int64) + len(committed)
        index = torch.from_numpy(where).to(drafted.device)
        return Paths(
            source[index], lengths,
            tuple(owner.prompt_len for owner in owners), tuple(owner.padding for owner in owners),
        )  # fmt: skip

    @staticmethod
    def of_trees(
        prefixes: Sequence[Prefix], tokens: Sequence[Tensor], parents: Sequence[Sequence[int]]
    ) -> "Paths":
        """The rows of one tree per prefix: the root's path, then every node's."""
        lines: list[tuple[int, tuple[int, ...]]] = []
        first = 0  # the tree's first node among all drafted tokens
        for owner, its_parents in enumerate(parents):
            tails: list[tuple[int, ...]] = [()]
            for node, parent in enumerate(its_parents):
                tails.append((*tails[parent + 1], first + node))
            lines += [(owner, tail) for tail in tails]
            first += len(its_parents)
        return Paths.of(prefixes, torch.cat(list(tokens)), lines)

    def rows(self) -> list[list[int]]:
        """Every path on the host: one synchronisation."""
        return [
            row[len(row) - length :]
            for row, length in zip(self.ids.tolist(), self.lengths, strict=True)
        ]

    def counted(self) -> list[int]:
        """Lengths as transformers counts them: left padding included."""
        return [n + padding for n, padding in zip(self.lengths, self.paddings, strict=True)]

    def from_position(self, starts: Sequence[int]) -> Tensor:
        """ids without the tokens before position starts[row] of each path."""
        width = self.ids.shape[1]
        first = [width - n + max(0, s) for n, s in zip(self.lengths, starts, strict=True)]
        columns = torch.arange(width, device=self.ids.device)
        hidden = columns < torch.tensor(first, device=self.ids.device)[:, None]
        return self.ids.masked_fill(hidden, ABSENT)
