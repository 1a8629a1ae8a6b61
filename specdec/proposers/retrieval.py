"""REST: what followed the end of the text in a corpus (He et al. 2023, 2311.08252)."""

import os
from collections.abc import Sequence as Items
from heapq import heappop, heappush
from typing import Any, Literal, NamedTuple, get_args

import torch

from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.proposers.retrieval_index import NO_MATCH, Match, RetrievalIndex
from specdec.rng import Noise
from specdec.sequence import Sequence
from specdec.tree import TokenTree

RetrievalMode = Literal["tree", "path"]
MAX_CONTINUATIONS = 4096
MAX_DEPTH = 64  # tokens of a continuation


class RetrievalProposer(Proposer):
    """Proposes what followed the longest end of the text, of min_match to max_match tokens, that
    occurs in an index (`specdec index build`).

    Of all occurrences at most max_continuations are read, in proportion to what follows them; mode
    `tree` takes the nodes of their trie that most of them go through, `path` its likeliest branch;
    neither goes deeper than MAX_DEPTH. The cost does not depend on the text, and on the corpus by
    the logarithm of a shard and by their number only.

    tokenizer: one that the index must have been made with. An index of other tokens drafts badly,
    but loses nothing.
    """

    name = "retrieval"
    law = "point"
    free = True

    def __init__(
        self, *, index: str | os.PathLike[str], max_match: int = 16, min_match: int = 2,
        max_continuations: int = 64, mode: RetrievalMode = "tree", tokenizer: Any = None,
    ) -> None:  # fmt: skip
        """Raises InvalidArgumentError for values out of range and for a file that is no index."""
        if not isinstance(index, str | os.PathLike):
            raise InvalidArgumentError(f"index={index!r}: expected the path of a file")
        self.index = RetrievalIndex(index)
        for name, value, least, most in (
            ("min_match", min_match, 1, self.index.header.depth),
            ("max_match", max_match, min_match, self.index.header.depth),
            ("max_continuations", max_continuations, 1, MAX_CONTINUATIONS),
        ):
            if type(value) is not int or not least <= value <= most:
                raise InvalidArgumentError(
                    f"{name}={value!r}: expected a whole number, {least} to {most}"
                )
        if mode not in get_args(RetrievalMode):
            raise InvalidArgumentError(
                f"mode={mode!r}: expected {' or '.join(get_args(RetrievalMode))}"
            )
        if tokenizer is not None:
            self.index.check_tokenizer(tokenizer)
        self.max_match, self.min_match = max_match, min_match
        self.max_continuations, self.mode = max_continuations, mode
        self._device = torch.device("cpu")
        self._empty = TokenTree.empty(self._device)
        self._found: dict[Sequence, tuple[int, Match]] = {}  # behind how many tokens

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        """Raises InvalidArgumentError for an index with tokens that the target does not have."""
        if self.index.header.vocab_size > vocab_size:
            raise InvalidArgumentError(
                f"index={self.index.path!r}: made with a vocabulary of "
                f"{self.index.header.vocab_size} tokens, the target has {vocab_size}; build one "
                "with the target's tokenizer"
            )
        self._device = group.device
        self._empty = TokenTree.empty(self._device)

    def situation(self, sequence: Sequence) -> int:
        """The length of the match."""
        return self._match(sequence).length

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        del noise
        trees = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            depth = min(budget, sequence.remaining - 1, MAX_DEPTH)
            match = self._match(sequence) if depth > 0 else NO_MATCH
            rows = self.index.continuations(match, self.max_continuations, depth)
            grow = likeliest_nodes if self.mode == "tree" else likeliest_path
            tokens, parents = grow(Trie.of(rows), budget)
            tree = TokenTree(torch.tensor(tokens, device=self._device), tuple(parents))
            trees.append(tree if tokens else self._empty)
        return trees

    def finish(self, sequence: Sequence) -> None:
        self._found.pop(sequence, None)  # one that never drafted was never searched for

    def _match(self, sequence: Sequence) -> Match:
        behind, match = self._found.get(sequence, (0, NO_MATCH))
        if behind != len(sequence.tokens):
            end = sequence.tokens[-self.max_match :]
            match = self.index.longest_match(end, self.min_match, self.max_match)
            self._found[sequence] = len(sequence.tokens), match
        return match


class Trie(NamedTuple):
    """Continuations by prefix; node 0 is the root."""

    tokens: list[int]
    counts: list[int]  # continuations through each node
    children: list[dict[int, int]]  # token -> node, in order of their first occurrence

    @staticmethod
    def of(rows: Items[Items[int]]) -> "Trie":
        trie = Trie([-1], [len(rows)], [{}])
        for row in rows:
            node = 0
            for token in row:
                child = trie.children[node].get(token)
                if child is None:
                    child = trie.children[node][token] = len(trie.tokens)
                    trie.tokens.append(token)
                    trie.counts.append(0)
                    trie.children.append({})
                trie.counts[child] += 1
                node = child
        return trie


def likeliest_nodes(trie: Trie, budget: int) -> tuple[list[int], list[int]]:
    """Tokens and parents of the nodes with the largest counts: of equals the shallower, then the
    earlier. None has more than the one above it, so they are a tree."""
    tokens: list[int] = []
    parents: list[int] = []
    heap = [(-trie.counts[node], 1, node, -1) for node in trie.children[0].values()]
    heap.sort()
    while heap and len(tokens) < budget:
        _, depth, node, parent = heappop(heap)
        for child in trie.children[node].values():
            heappush(heap, (-trie.counts[child], depth + 1, child, len(tokens)))
        tokens.append(trie.tokens[node])
        parents.append(parent)
    return tokens, parents


def likeliest_path(trie: Trie, budget: int) -> tuple[list[int], list[int]]:
    """Tokens and parents of the chain of most frequent children, of equals the earlier."""
    tokens: list[int] = []
    node = 0
    while trie.children[node] and len(tokens) < budget:
        node = max(trie.children[node].values(), key=trie.counts.__getitem__)
        tokens.append(trie.tokens[node])
    return tokens, list(range(-1, len(tokens) - 1))
