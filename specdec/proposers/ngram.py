"""Prompt lookup: what followed the last few tokens before, in prompt or output (Saxena 2023;
LLMA, 2304.04487)."""

from collections.abc import Sequence as Items
from typing import Literal, get_args

import torch

from specdec.cache import CacheGroup
from specdec.errors import InvalidArgumentError
from specdec.proposers.base import Proposer
from specdec.proposers.edited_copy import EditedCopy
from specdec.rng import Noise
from specdec.sequence import Sequence
from specdec.tree import TokenTree

Occurrence = Literal["latest", "earliest"]
MAX_NGRAM = 32  # the index holds an entry per token and length
_LEAST_COPIED = 6  # tokens, of a copy that is followed across edits


class NgramProposer(Proposer):
    """Proposes the continuation of the longest earlier match of the last min_ngram to max_ngram
    tokens, at its latest or its earliest occurrence.

    A copy that reaches the end of the context goes on into itself, so a repeated line is drafted
    whole. branches: at most this many continuations, which differ in their first token, share the
    budget as a tree: those of the longest match first, then those of shorter ones. edits: a copy of
    the prompt is followed across edits, and what was edited before is edited alike (EditedCopy);
    that continuation comes before all others.

    The draft is a function of the committed tokens. A token costs max_ngram dictionary accesses
    once, and its memory is linear; nothing is scanned again.
    """

    name = "ngram"
    law = "point"
    free = True

    def __init__(
        self, *, max_ngram: int = 4, min_ngram: int = 1, occurrence: Occurrence = "latest",
        branches: int = 1, edits: bool = True,
    ) -> None:  # fmt: skip
        """Raises InvalidArgumentError for values out of range."""
        for name, value, least, most in (
            ("min_ngram", min_ngram, 1, MAX_NGRAM),
            ("max_ngram", max_ngram, min_ngram, MAX_NGRAM),
            ("branches", branches, 1, None),
        ):
            if type(value) is not int or value < least or (most is not None and value > most):
                span = f"{least} or more" if most is None else f"{least} to {most}"
                raise InvalidArgumentError(f"{name}={value!r}: expected a whole number, {span}")
        if occurrence not in get_args(Occurrence):
            raise InvalidArgumentError(
                f"occurrence={occurrence!r}: expected {' or '.join(get_args(Occurrence))}"
            )
        if not isinstance(edits, bool):
            raise InvalidArgumentError(f"edits={edits!r}: expected True or False")
        self.max_ngram, self.min_ngram = max_ngram, min_ngram
        self.occurrence, self.branches, self.edits = occurrence, branches, edits
        self._device = torch.device("cpu")
        self._empty = TokenTree.empty(self._device)
        self._indexes: dict[Sequence, NgramIndex] = {}
        self._copies: dict[Sequence, EditedCopy] = {}

    def join(self, group: CacheGroup, vocab_size: int) -> None:
        del vocab_size
        self._device = group.device
        self._empty = TokenTree.empty(self._device)

    def start(self, sequence: Sequence) -> None:
        tokens = sequence.tokens
        index = NgramIndex(self.min_ngram, self.max_ngram, self.occurrence, self.branches)
        index.extend(tokens)
        self._indexes[sequence] = index
        if self.edits:
            self._copies[sequence] = copy = EditedCopy(len(tokens))
            self._find_copy(index, copy, tokens)

    def _read(self, sequence: Sequence) -> "NgramIndex":
        """The index of a sequence, with what was said since the last call."""
        index, tokens = self._indexes[sequence], sequence.tokens
        copy = self._copies.get(sequence)
        if copy is None:
            index.extend(tokens)
            return index
        for place in range(index.size, len(tokens)):
            index.extend(tokens, place + 1)
            if copy.follows:
                copy.read(tokens, place)
            if not copy.follows:
                self._find_copy(index, copy, tokens)
        return index

    def _find_copy(self, index: "NgramIndex", copy: EditedCopy, tokens: list[int]) -> None:
        """Begins to follow the copy that the text is in, if it is long enough."""
        length = index.match
        if length == self.max_ngram:
            same = length + index.further(tokens, length)
            if same >= _LEAST_COPIED:
                copy.begin(index.goes_on_at(length), same)

    def situation(self, sequence: Sequence) -> int:
        """The length of the match, 0 where there is none; where it is longer than max_ngram, the
        bits of how much longer on top: a long copy goes on for longer. A copy that is followed has
        situations of its own: an edit, then the bits of what was copied since."""
        index = self._read(sequence)
        copy = self._copies.get(sequence)
        if copy is not None and copy.follows:
            edit = self.max_ngram + MAX_NGRAM.bit_length() + 1
            return edit + min(copy.run, MAX_NGRAM).bit_length()
        length = index.match
        if length < self.max_ngram:
            return length
        return length + index.further(sequence.tokens, length).bit_length()

    def propose(
        self, sequences: Items[Sequence], budgets: Items[int], noise: Noise
    ) -> list[TokenTree]:
        del noise
        trees = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            if not budget:  # what was said since is read when it is needed
                trees.append(self._empty)
                continue
            index, tokens = self._read(sequence), sequence.tokens
            copy = self._copies.get(sequence)
            copied: list[int] = []
            if copy is not None and copy.follows:
                otherwise = [] if copy.run else index.continuation(tokens, budget)
                copied = copy.continuation(tokens, budget, otherwise)
            found = index.continuations(tokens, budget, copied)
            trees.append(self._tree(found) if found else self._empty)
        return trees

    def finish(self, sequence: Sequence) -> None:
        # one that failed on its way in was never started
        self._indexes.pop(sequence, None)
        self._copies.pop(sequence, None)

    def _tree(self, chains: list[list[int]]) -> TokenTree:
        """Chains below the root; their first tokens differ."""
        if len(chains) == 1:
            return TokenTree.chain(torch.tensor(chains[0], device=self._device))
        tokens: list[int] = []
        parents: list[int] = []
        for chain in chains:
            parents += (-1, *range(len(tokens), len(tokens) + len(chain) - 1))
            tokens += chain
        return TokenTree(torch.tensor(tokens, device=self._device), tuple(parents))


class NgramIndex:
    """Where every n-gram of a growing text goes on: a trie of its n-grams up to max_ngram."""

    __slots__ = ("_active", "_children", "_keep_latest", "_starts", "branches", "max_ngram",
                 "min_ngram", "size")  # fmt: skip

    def __init__(
        self, min_ngram: int, max_ngram: int, occurrence: Occurrence, branches: int
    ) -> None:
        self.min_ngram, self.max_ngram, self.branches = min_ngram, max_ngram, branches
        self.size = 0  # tokens read
        self._keep_latest = occurrence == "latest"
        self._children: dict[int, int] = {}  # node << 32 | token -> node
        # Per node, where the text goes on behind the n-gram: the preferred position first, at most
        # `branches` of them, their tokens distinct.
        self._starts: list[tuple[int, ...]] = [()]
        self._active = [0]  # the nodes of the last 0, 1, .. max_ngram tokens

    def extend(self, tokens: list[int], end: int | None = None) -> None:
        """Reads what the text has grown by since the last call, or of it up to `end`."""
        children, starts, active = self._children, self._starts, self._active
        end = len(tokens) if end is None else end
        for i in range(self.size, end):
            token = tokens[i]
            for node in active[self.min_ngram :]:
                held = starts[node]
                starts[node] = self._with(held, i, tokens) if held else (i,)
            fresh = [0]
            for node in active[: self.max_ngram]:
                key = node << 32 | token
                child = children.get(key)
                if child is None:
                    children[key] = child = len(starts)
                    starts.append(())
                fresh.append(child)
            active = fresh
        self._active, self.size = active, end

    def _with(self, held: tuple[int, ...], start: int, tokens: list[int]) -> tuple[int, ...]:
        if self._keep_latest:
            if self.branches == 1:
                return (start,)
            others = [p for p in held if tokens[p] != tokens[start]]
            return (start, *others[: self.branches - 1])
        if len(held) == self.branches or any(tokens[p] == tokens[start] for p in held):
            return held
        return (*held, start)

    @property
    def match(self) -> int:
        """How many of the last tokens, up to max_ngram, occurred before; 0 below min_ngram."""
        for length in range(len(self._active) - 1, self.min_ngram - 1, -1):
            if self._starts[self._active[length]]:
                return length
        return 0

    def goes_on_at(self, length: int) -> int:
        """The position behind the match of this length."""
        return self._starts[self._active[length]][0]

    def further(self, tokens: list[int], length: int) -> int:
        """By how many tokens, up to MAX_NGRAM, the match of this length goes on backwards."""
        start = self.goes_on_at(length) - 1 - length
        end = self.size - 1 - length
        most = min(start + 1, MAX_NGRAM)
        same = 0
        while same < most and tokens[start - same] == tokens[end - same]:
            same += 1
        return same

    def continuation(self, tokens: list[int], count: int) -> list[int]:
        """The best one, whole; empty where nothing matches."""
        length = self.match
        return _copy(tokens, self.goes_on_at(length), count) if length else []

    def continuations(
        self, tokens: list[int], budget: int, first: Items[int] = ()
    ) -> list[list[int]]:
        """At most `branches` continuations of the text that was read, best first, of at most
        `budget` tokens together; first: one of as many tokens that is better than all of them."""
        limit = min(self.branches, budget)
        starts: dict[int, int] = {}  # first token -> position
        if first:
            starts[first[0]] = -1
        for node in self._active[: self.min_ngram - 1 : -1]:  # the longest n-gram first
            if len(starts) >= limit:
                break
            for start in self._starts[node]:
                if len(starts) < limit:
                    starts.setdefault(tokens[start], start)
        chains = []
        for left, start in zip(range(len(starts), 0, -1), starts.values(), strict=True):
            share = -(-budget // left)
            budget -= share
            chains.append(list(first[:share]) if start < 0 else _copy(tokens, start, share))
        return chains


def _copy(tokens: list[int], start: int, count: int) -> list[int]:
    """tokens[start : start + count]; at the end of the text it goes on with what it copied."""
    found = tokens[start : start + count]
    if len(found) < count:
        found *= -(-count // len(found))
        del found[count:]
    return found
